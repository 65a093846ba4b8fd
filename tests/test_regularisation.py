"""Options that torch.nn's layers have not: dropout on weights, rows and states."""

import copy
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import _functions, reference
from fastrnn._backends import backend as backend_of
from fastrnn._backends import takes_mask
from helpers import (
    assert_close,
    assert_same_bits,
    inputs,
    make,
    make_mask,
    pack,
    run,
    seeded,
    unpack,
    wrapped,
)

T, B = 7, 4
OPTIONS = {
    "weight_dropout": 0.4,
    "variational": True,
    "recurrent_dropout": 0.4,
    "zoneout": 0.3,
    "grad_clip": 0.05,
}
IN_TRAINING = ["weight_dropout", "variational", "recurrent_dropout"]
MASKS = ["none", "lengths", "holes", "reset", "reset and holes"]


def given(kind: str) -> dict:
    """The arguments of a call."""
    options = {}
    if "reset" in kind:
        options["reset"] = torch.rand(T, B, generator=seeded()) < 0.4
    if "lengths" in kind or "holes" in kind:
        options["mask"] = make_mask("holes" if "holes" in kind else "lengths", T, B)
    if "scale" in kind:
        options["grad_scale"] = torch.rand(T, B, generator=seeded(2)) * 2
        options["grad_scale"][2] = 0
    return options


@contextmanager
def by_reference() -> Iterator[None]:
    """Nothing has a kernel inside `with`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_functions, "runs_cell", lambda mode, x: False)
        yield


def seeded_run(model, *args, **options) -> dict:
    torch.manual_seed(3)
    return run(model, *args, **options)


# -- All of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_a_module_keeps_it(cell, name):
    value = OPTIONS[name]
    plain, model = make(fastrnn, cell, 3, 5), make(fastrnn, cell, 3, 5, **{name: value})
    assert f"{name}=" in repr(model)
    assert name not in repr(plain)
    assert getattr(plain, name) == getattr(type(plain), name).fget(plain)
    for other in (model, copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert getattr(other, name) == getattr(model, name) != getattr(plain, name)
    setattr(model, name, getattr(plain, name))
    assert repr(model) == repr(plain)
    assert getattr(copy.deepcopy(plain), name) == getattr(plain, name)


def test_copies_share_nothing():
    model = fastrnn.GRU(3, 5, weight_dropout=0.5)
    other = copy.copy(model)
    other.weight_dropout = 0.25
    assert model.weight_dropout == 0.5


def test_modules_from_before():
    """One pickled before there were options loads without them, and so does its state_dict."""
    model = fastrnn.GRU(3, 5)
    assert "_options" not in vars(model)
    fastrnn.GRU(3, 5, weight_dropout=0.5).load_state_dict(model.state_dict())


def test_replace_and_restore():
    model = torch.nn.Sequential(torch.nn.LSTM(3, 5))
    fastrnn.replace(model)
    assert model[0].weight_dropout == 0
    own = torch.nn.Sequential(fastrnn.LSTM(3, 5, weight_dropout=0.5, variational=True))
    report = fastrnn.restore(own, all=True)
    assert "without weight_dropout=0.5, variational=True, which torch.nn.LSTM does not have" in str(
        report[0]
    )
    assert "weight_dropout" not in repr(fastrnn.replace(own) and own)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", [*OPTIONS, "layer_norm"])
def test_what_torch_has_not(name):
    model = fastrnn.GRU(3, 5, **{name: OPTIONS.get(name, True)})
    with pytest.raises(RuntimeError, match=rf"{name}=.*: torch\.jit\.script compiles"):
        torch.jit.script(torch.nn.Sequential(model))


PROBABILITIES = [-0.1, 1.0, 1.5, float("nan"), "0.5", None, True]
WRONG = [
    *(("weight_dropout", p, "a probability in [0, 1)") for p in PROBABILITIES),
    *(("variational", v, "a bool") for v in (1, 0.5, None)),
    *(("recurrent_dropout", p, "a probability in [0, 1)") for p in PROBABILITIES),
    *(("zoneout", p, "a probability in [0, 1)") for p in PROBABILITIES),
    *(("grad_clip", v, "a number above 0 or None") for v in (0, -1, float("inf"), "1", True)),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG)
def test_wrong_values(cell, name, value, expected):
    text = f"{name}: expected {expected}, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make(fastrnn, cell, 3, 5, **{name: value})
    model = make(fastrnn, cell, 3, 5)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        setattr(model, name, value)


@pytest.mark.parametrize("pair", [(0.1,), (0.1, 0.2, 0.3), (0.1, 1.0), (0.1, "0.2")])
def test_wrong_pairs(cell, pair):
    more = ", or those of h and c" if cell == "LSTM" else ""
    text = f"zoneout: expected a probability in [0, 1){more}, got {pair!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make(fastrnn, cell, 3, 5, zoneout=pair)


def test_a_pair_is_for_an_lstm():
    assert fastrnn.LSTM(3, 5, zoneout=[0.1, 0]).zoneout == (0.1, 0)
    assert "zoneout" not in repr(fastrnn.LSTM(3, 5, zoneout=(0, 0)))
    with pytest.raises(ValueError, match=r"zoneout: expected a probability in \[0, 1\), got"):
        fastrnn.GRU(3, 5, zoneout=(0.1, 0.2))


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (torch.ones(T, B).bool(), "torch.bool [7, 4]"),
        (torch.ones(T, B).long(), "torch.int64 [7, 4]"),
        (torch.ones(T), "torch.float32 [7]"),
        ([0.5], "list"),
        (0.5, "float"),
    ],
)
def test_wrong_scales(cell, given, got):
    model = make(fastrnn, cell, 3, 5)
    text = f"grad_scale: expected a floating tensor of shape [7, 4], got {got}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        model(torch.randn(T, B, 3), grad_scale=given)


FORMS = {
    **{name: {name: value} for name, value in OPTIONS.items()},
    "zoneout of h": {"zoneout": 0.3},
    "zoneout of h and c": {"zoneout": (0.2, 0.5)},
    "zoneout of c": {"zoneout": (0.0, 0.5)},
    "zoneout in eval": {"zoneout": 0.3},
    "all": OPTIONS,
    "scale": {},
    "layer_norm": {"layer_norm": True},
    "layer_norm of all": {**OPTIONS, "layer_norm": True},
}
WITH_SCALE = "all", "scale", "layer_norm of all"
CLIPPED = "grad_clip", "all", "layer_norm of all"


def double(hx):
    return pack(tuple(h.double() for h in unpack(hx)))


def with_gains(model):
    """The model, with gains and biases that are not their initial ones."""
    random = seeded(5)
    for name, parameter in model.named_parameters():
        if "gain" in name or "bias_c" in name:
            with torch.no_grad():
                parameter += torch.randn(parameter.shape, generator=random).to(parameter) / 2
    return model


def form_of(form: str, cell: str, **options):
    """A model and the kind of its calls."""
    own = dict(FORMS[form])
    if isinstance(own.get("zoneout"), tuple) and cell != "LSTM":
        pytest.skip("a pair is for an LSTM")
    model = with_gains(make(fastrnn, cell, 3, 5, 2, dropout=0.3, **own, **options))
    return model.eval() if "eval" in form else model


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("kind", ["none", "lengths", "reset and holes"])
@pytest.mark.parametrize("form", FORMS)
def test_kernels_equal_the_reference(cell, form, kind, every):
    options = {"bidirectional": True, "dtype": torch.float64, "checkpoint_every": every}
    model = form_of(form, cell, **options)
    kind += " scale" if form in WITH_SCALE else ""
    for hx in (True, False):
        x, hx = inputs(model, T, B, hx=hx)
        actual = seeded_run(model, x, hx, **given(kind))
        with by_reference():
            expected = seeded_run(model, x, hx, **given(kind))
        assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("kind", ["none", "reset and holes"])
@pytest.mark.parametrize("form", FORMS)
def test_projection(form, kind, every):
    options = {"bidirectional": True, "dtype": torch.float64, "checkpoint_every": every}
    model = form_of(form, "LSTM", proj_size=2, **options)
    kind += " scale" if form in WITH_SCALE else ""
    x, hx = inputs(model, T, B)
    actual = seeded_run(model, x, hx, **given(kind))
    with by_reference():
        expected = seeded_run(model, x, hx, **given(kind))
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("form", [*FORMS, "projection"])
@pytest.mark.parametrize("rows", [1, 37])
def test_blocks_and_threads(cell, form, rows):
    """More rows and units than a block has; the same bits from any number of threads."""
    more = {"bidirectional": True, "checkpoint_every": None if rows == 1 else 30}
    if form == "projection":
        if cell != "LSTM":
            pytest.skip("no projection")
        form, more = "layer_norm of all", more | {"proj_size": 33}
    own = FORMS[form]
    if isinstance(own.get("zoneout"), tuple) and cell != "LSTM":
        pytest.skip("a pair is for an LSTM")
    model = with_gains(make(fastrnn, cell, 20, 70, **own, **more))
    model.train("eval" not in form)
    x, hx = inputs(model, 100, rows)
    call = {"grad_scale": torch.rand(100, rows)} if form in WITH_SCALE else {}
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(seeded_run(model, x, hx, **call))
    torch.set_num_threads(threads)
    # The others' products are torch's; an eval mode's relu has no kernel.
    if not takes_mask(x) and (cell != "RNN_RELU" or "eval" not in form):
        assert_same_bits(results[1], results[0])
        assert_same_bits(results[2], results[0])
    with by_reference():
        expected = seeded_run(model, x, hx, **call)
    # To normalise c is to divide by what may be small, in which float32 is lost either way.
    tolerance = 3e-5 if "layer_norm" not in own else 1e-3 if cell == "LSTM" else 1e-4
    assert_close(results[0], expected, tolerance)
    if "layer_norm" in own:
        model, x, hx = model.double(), x.double(), double(hx)
        call = {name: scale.double() for name, scale in call.items()}
        actual = seeded_run(model, x, hx, **call)
        with by_reference():
            expected = seeded_run(model, x, hx, **call)
        assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_16_bit_types(cell, form, dtype):
    """Close to float64 as far as the type reaches."""
    model = form_of(form, cell, dtype=dtype, checkpoint_every=3)
    x, hx = inputs(model, T, B)
    kind = "holes scale" if form in WITH_SCALE else "holes"
    actual = seeded_run(model, x, hx, **given(kind))
    expected = seeded_run(copy.deepcopy(model).double(), x.double(), double(hx), **given(kind))
    assert_close({k: v.double() for k, v in actual.items()}, expected, 0.1)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "grad_clip"])
def test_double_backward(cell, form):
    model = form_of(form, cell, bidirectional=True, dtype=torch.float64)
    model.grad_clip = None  # of "all"
    x, hx = inputs(model, T, B)
    kind = "lengths scale" if form in WITH_SCALE else "lengths"
    results = []

    def differentiate_twice():
        torch.manual_seed(3)
        wanted = [x.requires_grad_(), *model.parameters()]
        output, _ = model(x, hx, **given(kind))
        grads = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
        return dict(enumerate((*grads, *twice)))

    results.append(differentiate_twice())
    with by_reference():
        results.append(differentiate_twice())
    assert_close(*results, 1e-12)


def test_a_clipped_gradient_has_none(cell):
    model = make(fastrnn, cell, 3, 5, dtype=torch.float64, grad_clip=0.1)
    x, _ = inputs(model, T, B)
    x.requires_grad_()
    (first,) = torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="grad_clip: expected None where gradients are diff"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("scale", *CLIPPED)])
def test_gradcheck(cell, form):
    """With a fixed seed, against finite differences; scaled edges are compared elsewhere."""
    own = FORMS[form]
    if isinstance(own.get("zoneout"), tuple) and cell != "LSTM":
        pytest.skip("a pair is for an LSTM")
    options = {"bidirectional": True, "dtype": torch.float64, "dropout": 0.3}
    model = with_gains(make(fastrnn, cell, 2, 3, 2, **options, **own)).train("eval" not in form)
    x, hx = inputs(model, 4, 3)
    states = hx if isinstance(hx, tuple) else (hx,)
    parameters = dict(model.named_parameters())

    def forward(x, *rest):
        torch.manual_seed(3)
        hx = rest[: len(states)] if len(states) > 1 else rest[0]
        weights = dict(zip(parameters, rest[len(states) :], strict=True))
        output, h_n = functional_call(model, weights, (x, hx), {"lengths": [2, 0, 4]})
        return output, *(h_n if isinstance(h_n, tuple) else (h_n,))

    leaves = tuple(t.detach().requires_grad_() for t in (x, *states, *parameters.values()))
    assert torch.autograd.gradcheck(forward, leaves)


def test_gradcheck_of_all(cell):
    """The same of everything that changes no gradient on its way."""
    own = {k: v for k, v in FORMS["layer_norm of all"].items() if k != "grad_clip"}
    model = make(fastrnn, cell, 2, 3, 2, dtype=torch.float64, dropout=0.3, **own)
    with_gains(model)
    x = inputs(model, 4, 3)[0].requires_grad_()

    def forward(x):
        torch.manual_seed(3)
        return model(x, grad_scale=torch.ones(4, 3))[0]

    assert torch.autograd.gradcheck(forward, x)
    assert torch.autograd.gradgradcheck(forward, x)


@pytest.mark.parametrize("form", FORMS)
def test_it_compiles(cell, form):
    torch._dynamo.reset()
    model = form_of(form, cell, bidirectional=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, hx = inputs(model, T, B)
    for kind in ("none", "holes"):
        kind += " scale" if form in WITH_SCALE else ""
        actual = seeded_run(model, x, hx, forward=compiled.__call__, **given(kind))
        assert_close(actual, seeded_run(model, x, hx, **given(kind)))


@pytest.mark.parametrize("form", FORMS)
def test_transforms(cell, form):
    """Gradients by torch.func, and of single samples."""
    model = form_of(form, cell, dtype=torch.float64)
    if form == "scale":
        model.dropout = 0.0  # nothing is drawn, so that samples can be compared
    x, _ = inputs(model, T, B)
    call = given("scale") if form in WITH_SCALE else {}
    parameters = dict(model.named_parameters())

    def loss(weights, x, **options):
        return functional_call(model, weights, (x,), options)[0].square().sum()

    torch.manual_seed(3)
    by_func = torch.func.grad(loss)(parameters, x, **call)
    torch.manual_seed(3)
    by_autograd = torch.autograd.grad(loss(parameters, x, **call), list(parameters.values()))
    assert_close(by_func, dict(zip(parameters, by_autograd)), 1e-12)

    def of_sample(x, scale):
        options = {} if scale is None else {"grad_scale": scale.unsqueeze(1)}
        return torch.func.grad(loss, 1)(parameters, x.unsqueeze(1), **options).squeeze(1)

    scale = call.get("grad_scale")
    in_dims = (1, None if scale is None else 1)
    torch.manual_seed(3)
    each = torch.func.vmap(of_sample, in_dims, 1, randomness="different")(x, scale)
    assert each.shape == x.shape
    if form == "scale":
        by_hand = [of_sample(x[:, i], scale[:, i]) for i in range(B)]
        torch.testing.assert_close(each, torch.stack(by_hand, 1))


# -- layer_norm ------------------------------------------------------------------------------------


def loop_of(model, x):
    """A unidirectional layer with layer_norm as a loop over torch's own functions."""
    w = {name.removesuffix("_l0"): p for name, p in model.named_parameters()}
    h = c = x.new_zeros(x.shape[1], model.hidden_size)

    def norm(values, gain, bias):
        return torch.nn.functional.layer_norm(values, values.shape[-1:], gain, bias)

    outputs = []
    for step in x:
        own = norm(step @ w["weight_ih"].t(), w["gain_ih"], w["bias_ih"])
        recurrent = norm(h @ w["weight_hh"].t(), w["gain_hh"], w["bias_hh"])
        if model.mode == "LSTM":
            i, f, g, o = (own + recurrent).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * norm(c, w["gain_c"], w["bias_c"]).tanh()
        elif model.mode == "GRU":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = own.chunk(3, -1), recurrent.chunk(3, -1)
            r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
            h = (1 - z) * (x_n + r * h_n).tanh() + z * h
        else:
            f = {"RNN_TANH": torch.tanh, "RNN_RELU": torch.relu}[model.mode]
            h = f(own + recurrent)
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize(("rows", "features", "hidden"), [(4, 3, 5), (1, 40, 70), (9, 64, 48)])
def test_layer_norm_is_a_loop_of_torchs(cell, rows, features, hidden):
    model = with_gains(make(fastrnn, cell, features, hidden, layer_norm=True))
    x = torch.randn(T, rows, features, generator=seeded())
    wanted = [x.requires_grad_(), *model.parameters()]
    weights = torch.randn(T, rows, hidden, generator=seeded(1))
    results = []
    for forward in (lambda x: model(x)[0], lambda x: loop_of(model, x)):
        output = forward(x)
        grads = torch.autograd.grad((output * weights).mean(), wanted)
        results.append((output, *grads))
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert (actual - expected).norm() <= (4e-6 if i else 1e-6) * expected.norm()


def test_parameters_of_layer_norm(cell):
    model = make(fastrnn, cell, 3, 5, 2, bidirectional=True, layer_norm=True)
    plain = make(fastrnn, cell, 3, 5, 2, bidirectional=True)
    assert repr(model).endswith(", layer_norm=True)")
    own = {k: v for k, v in model.state_dict().items() if k not in plain.state_dict()}
    gates = {"LSTM": 4, "GRU": 3}.get(cell, 1)
    sizes = {"gain_ih": gates * 5, "gain_hh": gates * 5}
    sizes |= {"gain_c": 5, "bias_c": 5} if cell == "LSTM" else {}
    places = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    assert {k: v.tolist() for k, v in own.items()} == {
        name + place: [float(name != "bias_c")] * size
        for name, size in sizes.items()
        for place in places
    }
    assert [len(names) for names in model.all_weights] == [4 + len(sizes)] * 4
    with_gains(model).reset_parameters()
    assert {k: v.tolist() for k, v in model.state_dict().items() if k in own} == {
        k: v.tolist() for k, v in own.items()
    }
    with_gains(model)
    x, hx = inputs(model, T, B)
    expected = run(model, x, hx)
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert repr(other) == repr(model)
        assert_same_bits(run(other, x, hx), expected)
    fresh = make(fastrnn, cell, 3, 5, 2, bidirectional=True, layer_norm=True)
    fresh.load_state_dict(model.state_dict())
    assert_same_bits(run(fresh, x, hx), expected)


def test_layer_norm_is_the_constructors(cell):
    """Its parameters are made there, so neither other classes nor other calls can do without."""
    model, plain = make(fastrnn, cell, 3, 5, layer_norm=True), make(fastrnn, cell, 3, 5)
    with pytest.raises(
        ValueError, match=r"^layer_norm: expected True for one made with it, got False$"
    ):
        model.layer_norm = False
    with pytest.raises(
        ValueError, match=r"^layer_norm: expected False for a module made without, got True$"
    ):
        plain.layer_norm = True
    with pytest.raises(ValueError, match=r"^layer_norm: expected a bool, got 1$"):
        make(fastrnn, cell, 3, 5, layer_norm=1)
    with pytest.raises(ValueError, match=r"^layer_norm: expected False for a cell without recurre"):
        fastrnn.cells.SRU(3, 5, layer_norm=True)
    report = fastrnn.restore(torch.nn.Sequential(model), all=True)
    assert "torch.nn has no layer normalisation" in str(report[0])
    assert model.layer_norm
    with pytest.raises(ValueError, match=r"expected None or torch\.bfloat16 for a"):
        fastrnn.freeze(model.eval(), torch.int8)


@pytest.mark.parametrize("proj_size", [0, 4])
def test_layer_norm_step_by_step(cell, proj_size):
    if proj_size and cell != "LSTM":
        pytest.skip("torch's projections are an LSTM's")
    sizes = {"proj_size": proj_size} if proj_size else {}
    model = with_gains(make(fastrnn, cell, 3, 70, 2, **sizes, layer_norm=True)).eval()
    x, hx = inputs(model, T, B)
    with torch.no_grad():
        whole = model(x, hx)[0]
        torch.testing.assert_close(steps(model, x, hx), whole)
        torch.testing.assert_close(model.initial_state(hx).transduce(x), whole)
        for weights in (None, torch.bfloat16):
            frozen = fastrnn.freeze(copy.deepcopy(model), weights)
            result = frozen(x, hx)[0]
            tolerance = {} if weights is None else {"rtol": 0.1, "atol": 0.1}
            torch.testing.assert_close(result, whole, **tolerance)
            assert torch.equal(steps(frozen, x, hx), result)
            assert torch.equal(frozen.initial_state(hx).transduce(x), result)
            single = tuple(s[:, :1] for s in hx) if cell == "LSTM" else hx[:, :1]
            assert torch.equal(frozen(x[:, :1], single)[0], result[:, :1])
    # With gradients, through the states.
    outputs = [s.output() for s in model.initial_state(hx).add_inputs(x.requires_grad_())]
    (stepwise,) = torch.autograd.grad(torch.stack(outputs).sum(), x)
    (at_once,) = torch.autograd.grad(model(x, hx)[0].sum(), x)
    torch.testing.assert_close(stepwise, at_once)


# -- weight_dropout --------------------------------------------------------------------------------


def masked_by_hand(model, p: float):
    """A plain copy whose W_hh are masked, in the order of the layers and directions."""
    plain = copy.deepcopy(model)
    plain.weight_dropout = 0
    with torch.no_grad():
        for name in model._flat_weights_names:
            if name.startswith("weight_hh"):
                weight = getattr(plain, name)
                weight.copy_(dropout(weight, p))
    return plain


@pytest.mark.parametrize("kind", MASKS)
def test_weight_dropout_is_masking_by_hand(cell, bidirectional, kind):
    model = make(
        fastrnn, cell, 3, 5, 2, bidirectional=bidirectional, weight_dropout=0.4, dropout=0.2
    )
    x, hx = inputs(model, T, B)
    torch.manual_seed(3)
    actual = run(model, x, hx, **given(kind))
    torch.manual_seed(3)
    plain = masked_by_hand(model, 0.4)
    expected = run(plain, x, hx, **given(kind))
    masks = {
        name: (getattr(plain, name) != 0) / (1 - 0.4)
        for name in model._flat_weights_names
        if name.startswith("weight_hh")
    }
    for name, mask in masks.items():  # by hand the gradient is that of the masked weight
        expected[f"grad {name}"] = expected[f"grad {name}"] * mask
    assert_same_bits(actual, expected)
    assert all((mask == 0).any() and (mask != 0).any() for mask in masks.values())


@pytest.mark.parametrize("name", IN_TRAINING)
def test_nothing_in_eval(cell, name):
    options = {"dropout": 0.3, name: OPTIONS[name]}
    plain, model = make(fastrnn, cell, 3, 5, 2), make(fastrnn, cell, 3, 5, 2, **options).eval()
    x, hx = inputs(model, T, B)
    assert_same_bits(run(model, x, hx), run(plain, x, hx))


@pytest.mark.parametrize("name", [*IN_TRAINING, "zoneout"])
def test_no_call_ignores_it(cell, name):
    """The direct path, packed rows and unbatched ones draw in training."""
    model = make(fastrnn, cell, 3, 5, 2, dropout=0.3)
    other = make(fastrnn, cell, 3, 5, 2, dropout=0.3, **{name: OPTIONS[name]})
    x, hx = inputs(model, T, B)
    packed = pack_padded_sequence(x, [3, 7, 1, 5], enforce_sorted=False)
    for call in (
        lambda m: m(x, hx)[0],
        lambda m: m(x)[0],
        lambda m: m(packed, hx)[0].data,
        lambda m: m(x[:, 0])[0],
    ):
        results = []
        for m in (model, other):
            torch.manual_seed(5)
            results.append(call(m).detach())
        assert not torch.equal(*results)


def test_a_cell_without_recurrent_weights():
    with pytest.raises(ValueError, match="weight_dropout: expected 0 for a cell without recurrent"):
        fastrnn.cells.SRU(3, 5, weight_dropout=0.5)
    fastrnn.cells.SRU(3, 5, weight_dropout=0.0, variational=True)


# -- variational -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
def test_variational(cell, bidirectional, kind):
    """One mask per row, the same for every step of it, whatever the order of the rows."""
    p = 0.4
    model = make(fastrnn, cell, 3, 5, 2, bidirectional=bidirectional, dropout=p, variational=True)
    plain = make(fastrnn, cell, 3, 5, 2, bidirectional=bidirectional)

    def by_hand(x, hx, **options):
        directions = 1 + bidirectional
        states = helpers_split(hx, directions)
        y, h = first(x, states[0], **options)
        y = y * dropout(y.new_ones(B, y.shape[-1]), p)
        y, last = second(y, states[1], **options)
        return y, helpers_join(h, last)

    def fastrnn_layer(model, k):
        own = make(fastrnn, cell, 3 if k == 0 else 5 * (1 + bidirectional), 5,
                   bidirectional=bidirectional)  # fmt: skip
        for name in own._flat_weights_names:
            setattr(own, name, getattr(model, name.replace("_l0", f"_l{k}")))
        return own

    def helpers_split(hx, d):
        states = hx if isinstance(hx, tuple) else (hx,)
        parts = [tuple(s[k * d : (k + 1) * d] for s in states) for k in range(2)]
        return parts if isinstance(hx, tuple) else [part[0] for part in parts]

    def helpers_join(a, b):
        return tuple(map(torch.cat, zip(a, b))) if isinstance(a, tuple) else torch.cat((a, b))

    first, second = (fastrnn_layer(plain, k) for k in range(2))
    x, hx = inputs(model, T, B)
    torch.manual_seed(3)
    actual = run(model, x, hx, **given(kind))
    torch.manual_seed(3)
    expected = run(plain, x, hx, forward=by_hand, **given(kind))
    assert_close(actual, expected, 1e-6)


def test_variational_packed(cell):
    model = make(fastrnn, cell, 3, 5, 2, dropout=0.5, variational=True)
    x, hx = inputs(model, T, B)
    lengths = [3, 7, 1, 5]
    torch.manual_seed(3)
    packed, _ = model(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    torch.manual_seed(3)
    padded, _ = model(x, hx, lengths=lengths)
    unpacked, _ = torch.nn.utils.rnn.pad_packed_sequence(packed)
    assert torch.equal(unpacked, padded)


# -- recurrent_dropout -----------------------------------------------------------------------------


def test_recurrent_dropout_masks_by_row(bidirectional):
    """An Elman layer by hand, with the mask that F.dropout draws."""
    model = fastrnn.RNN(3, 5, bidirectional=bidirectional, recurrent_dropout=0.5)
    model = model.double()
    x, _ = inputs(model, T, B, hx=False)
    torch.manual_seed(3)
    actual, _ = model(x)
    torch.manual_seed(3)
    masks = dropout(x.new_ones(1 + bidirectional, B, 5), 0.5)
    outputs = []
    for d, suffix in enumerate(("_l0", "_l0_reverse")[: 1 + bidirectional]):
        w_ih, w_hh, b_ih, b_hh = (
            getattr(model, f"{name}{suffix}")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h, each = x.new_zeros(B, 5), []
        for step in x.flip(0) if d else x:
            h = torch.tanh(step @ w_ih.T + b_ih + (h * masks[d]) @ w_hh.T + b_hh)
            each.append(h)
        outputs.append(torch.stack(each[::-1] if d else each))
    torch.testing.assert_close(actual, torch.cat(outputs, -1))


def as_in_keras(model):
    """Keras's layer with the model's weights: kernels transposed, in a GRU z before r."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras runs on another backend")
    name = {"LSTM": "LSTM", "GRU": "GRU"}.get(model.mode, "SimpleRNN")
    options = {"activation": "relu"} if model.mode == "RNN_RELU" else {}
    options |= {"reset_after": True} if name == "GRU" else {}
    layer = getattr(keras.layers, name)(
        model.hidden_size, recurrent_dropout=0.5, return_sequences=True, **options
    )
    layer.build((None, None, model.input_size))
    w_ih, w_hh, b_ih, b_hh = (w.detach() for w in model._flat_weights)
    if name == "GRU":
        r, z, n = torch.arange(3 * model.hidden_size).chunk(3)
        w_ih, w_hh, b_ih, b_hh = (w[torch.cat((z, r, n))] for w in (w_ih, w_hh, b_ih, b_hh))
    bias = torch.stack((b_ih, b_hh)) if name == "GRU" else b_ih + b_hh
    layer.set_weights([w_ih.T.numpy(), w_hh.T.numpy(), bias.numpy()])
    return layer


@pytest.mark.filterwarnings("ignore")
def test_recurrent_dropout_is_that_of_keras(cell):
    """Given the same mask, which it would draw for each gate."""
    model = make(fastrnn, cell, 3, 5, recurrent_dropout=0.5)
    layer = as_in_keras(model)
    x, _ = inputs(model, T, B, hx=False)
    torch.manual_seed(3)
    mask = dropout(torch.ones(1, B, 5), 0.5)[0]
    gates = 1 if cell.startswith("RNN") else 4
    layer.cell.get_recurrent_dropout_mask = lambda h: mask if gates == 1 else [mask] * gates
    expected = layer(x.transpose(0, 1), training=True).transpose(0, 1)
    torch.manual_seed(3)
    actual, _ = model(x)
    torch.testing.assert_close(actual, expected.to(actual), rtol=1e-5, atol=1e-6)
    assert not torch.equal(actual, model.eval()(x)[0])


# -- zoneout ---------------------------------------------------------------------------------------


def test_philox_as_published():
    """Known answers of the authors' own tests (Random123, kat_vectors)."""
    zeros = [torch.tensor(0)] * 6
    ones = [torch.tensor(0xFFFFFFFF)] * 6
    for words, expected in (
        (zeros, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ones, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        assert tuple(map(int, reference.philox(words[:4], words[4:]))) == expected


def kept_states(p: float, steps: int, rows: int, units: int):
    """bool [T, B, H]: where a GRU's h is the one before, bit for bit."""
    model = fastrnn.GRU(2, units, zoneout=p)
    x = torch.randn(steps, rows, 2)
    h_0 = torch.randn(1, rows, units)
    output, _ = model(x, h_0)
    before = torch.cat((h_0, output[:-1]))
    return output == before


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_zoneout_keeps_as_often_as_it_says(p):
    torch.manual_seed(0)
    kept = kept_states(p, 100, 100, 100).double()

    def far(counts, n):
        return (counts.mean() if n is None else counts - p).abs() / (p * (1 - p) / n) ** 0.5

    assert far(kept.mean(), kept.numel()) < 4
    for axis in range(3):  # per step, row and unit: of a hundred each the largest, see below
        others = [i for i in range(3) if i != axis]
        assert far(kept.mean(others), 1e4).max() < 4.5
        # Neighbours know nothing of each other.
        a, b = kept.narrow(axis, 0, 99), kept.narrow(axis, 1, 99)
        both = (a * b).mean() - p * p
        assert abs(both) < 4 * p * (1 - p) / a.numel() ** 0.5 + 4 * p * p / a.numel() ** 0.5


def test_zoneout_draws_anew():
    """Each call, layer and direction; the same seed gives the same."""
    torch.manual_seed(0)
    one, two = (kept_states(0.5, 20, 3, 8) for _ in range(2))
    torch.manual_seed(0)
    again = kept_states(0.5, 20, 3, 8)
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    seed = torch.tensor([5])
    draws = [
        reference.kept(seed + s, 0.5, d, t, k, (8, 64))
        for s in (0, 2**32) for d in (0, 1) for t in (0, 1) for k in (0, 1)
    ]  # fmt: skip
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_zoneout_of_c(bidirectional):
    """h comes from the cell state that the cell has made, not from the one that is kept."""
    model = fastrnn.LSTM(3, 70, bidirectional=bidirectional, zoneout=(0.0, 0.5)).double()
    x, hx = inputs(model, T, B)
    _, _, (cells,) = model(x, hx, return_states=True)
    forward = cells[..., :70]
    before = torch.cat((hx[1][:1], forward[:-1]))
    assert 0.4 < (forward == before).double().mean() < 0.6


def test_zoneout_in_eval_is_the_expectation(cell):
    p = 0.3
    model = make(fastrnn, cell, 3, 5, zoneout=p, dtype=torch.float64).eval()
    x, hx = inputs(model, 1, B)
    plain = make(fastrnn, cell, 3, 5, dtype=torch.float64)
    _, actual = model(x, hx)
    _, new = plain(x, hx)
    for state, before, after in zip(
        *(s if isinstance(s, tuple) else (s,) for s in (actual, hx, new))
    ):
        torch.testing.assert_close(state, p * before + (1 - p) * after, rtol=0, atol=1e-15)


def test_checkpointing_draws_the_same(cell):
    results = []
    for every in (None, 5):
        model = make(fastrnn, cell, 3, 70, zoneout=0.3, checkpoint_every=every)
        x, hx = inputs(model, 33, B)
        results.append(seeded_run(model, x, hx))
    exact = [k for k in results[0] if not k.startswith("grad weight") and "bias" not in k]
    assert_same_bits(*({k: r[k] for k in exact} for r in results))


# -- One step at a time, and frozen ----------------------------------------------------------------


def steps(model, x, hx):
    """The outputs of one step after the other."""
    states = model.initial_state(hx).add_inputs(x)
    return torch.stack([state.output() for state in states])


@pytest.mark.parametrize("proj_size", [0, 4])
def test_zoneout_step_by_step(cell, proj_size):
    if proj_size and cell != "LSTM":
        pytest.skip("torch's projections are an LSTM's")
    zoneout = (0.3, 0.2) if cell == "LSTM" else 0.3
    sizes = {"proj_size": proj_size} if proj_size else {}
    model = make(fastrnn, cell, 3, 70, 2, **sizes, zoneout=zoneout).eval()
    x, hx = inputs(model, T, B)
    with torch.no_grad():
        plain = make(fastrnn, cell, 3, 70, 2, **sizes).eval()(x, hx)[0]
        whole = model(x, hx)[0]
        assert not torch.allclose(whole, plain, atol=1e-3)
        torch.testing.assert_close(steps(model, x, hx), whole)
        torch.testing.assert_close(model.initial_state(hx).transduce(x), whole)
        for weights in (None, torch.bfloat16, torch.int8):
            frozen = fastrnn.freeze(copy.deepcopy(model), weights)
            result = frozen(x, hx)[0]
            tolerance = {} if weights is None else {"rtol": 0.1, "atol": 0.05}
            torch.testing.assert_close(result, whole, **tolerance)
            assert not torch.allclose(result, plain, atol=1e-2)
            assert torch.equal(steps(frozen, x, hx), result)
            assert torch.equal(frozen.initial_state(hx).transduce(x), result)
            lengths = torch.tensor([T, 3, T, 1])
            masked = frozen(x, hx, lengths=lengths)[0]
            assert torch.equal(masked[:3, 1], result[:3, 1])


@pytest.mark.parametrize("name", ["dropout", *IN_TRAINING, "zoneout"])
def test_a_step_in_training_draws(cell, name):
    """Without gradients, where steps run on packed weights."""
    value = 0.5 if name == "dropout" else OPTIONS[name]
    others = {"dropout": 0.5} if name == "variational" else {}
    model = make(fastrnn, cell, 3, 5, 2, **others, **{name: value})
    x, hx = inputs(model, T, B)
    with torch.no_grad():
        state = model.eval().initial_state(hx)
        in_eval = [state.add_input(x[0]).output(), state.transduce(x)]
        model.train()
        in_training = [state.add_input(x[0]).output(), state.transduce(x)]
    for a, b in zip(in_eval, in_training):
        assert not torch.equal(a, b)


# -- grad_scale and grad_clip ----------------------------------------------------------------------


def test_cuts_are_segments(cell):
    """Where all rows are cut, the gradient is that of the parts, with the states detached."""
    model = make(fastrnn, cell, 3, 5, 2, dtype=torch.float64)
    x, hx = inputs(model, T, B)
    scale = torch.ones(T, B)
    scale[[0, 3, 5]] = 0
    whole, cut = {}, {}
    for found, parts, options in (
        (whole, [x], {"grad_scale": scale}),
        (cut, x.split([3, 2, 2]), {}),
    ):
        model.zero_grad()
        states = hx
        for part in parts:
            states = (
                tuple(s.detach() for s in states) if isinstance(states, tuple) else states.detach()
            )
            output, states = model(part, states, **options)
            output.square().sum().backward()
        found |= {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_close(whole, cut, 1e-13)


def test_clip_holds_every_edge():
    """One unit whose gradient would grow: by hand."""
    model = fastrnn.RNN(1, 1, bias=False, nonlinearity="relu", grad_clip=2.0).double()
    with torch.no_grad():
        model.weight_ih_l0.fill_(1)
        model.weight_hh_l0.fill_(3)
    x = torch.ones(4, 1, 1, dtype=torch.float64, requires_grad=True)
    h_0 = torch.ones(1, 1, 1, dtype=torch.float64, requires_grad=True)
    _, h_n = model(x, h_0)
    h_n.sum().backward()
    assert x.grad.flatten().tolist() == [2, 2, 2, 1]
    assert h_0.grad.item() == 2


def test_a_clip_that_nothing_reaches(cell):
    plain, model = make(fastrnn, cell, 3, 5), make(fastrnn, cell, 3, 5, grad_clip=1e6)
    x, hx = inputs(model, T, B)
    assert_same_bits(run(model, x, hx), run(plain, x, hx))


@pytest.mark.parametrize("kind", MASKS)
def test_a_scale_of_ones(cell, kind):
    model = make(fastrnn, cell, 3, 5, 2, bidirectional=True)
    x, hx = inputs(model, T, B)
    scaled = run(model, x, hx, grad_scale=torch.ones(T, B), **given(kind))
    assert_same_bits(scaled, run(model, x, hx, **given(kind)))


def test_layouts_of_the_scale(cell):
    model = make(fastrnn, cell, 3, 5, batch_first=True)
    x, hx = inputs(model, T, B)
    scale = torch.rand(B, T)
    expected = run(model, x, hx, grad_scale=scale)
    assert_same_bits(run(model, x, hx, grad_scale=scale.numpy()), expected)
    lengths = [7, 7, 7, 7]
    packed = run(
        model,
        x,
        hx,
        forward=lambda x, hx: unpacked(
            model(
                pack_padded_sequence(x, lengths, batch_first=True),
                hx,
                grad_scale=pack_padded_sequence(scale, lengths, batch_first=True),
            )
        ),
    )
    assert_close(packed, expected)


def unpacked(result):
    return torch.nn.utils.rnn.pad_packed_sequence(result[0], batch_first=True)[0], result[1]


# -- Backends --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["zoneout", "recurrent_dropout", "grad_clip", "grad_scale", "layer_norm"]
)
def test_a_backend_without_options(cell, name, monkeypatch):
    """As CUDA's of some: the reference implementation runs."""
    own = {} if name == "grad_scale" else {name: OPTIONS.get(name, True)}
    model = make(fastrnn, cell, 3, 5, 2, bidirectional=True, **own)
    x, hx = inputs(model, T, B)
    kind = "holes scale" if name == "grad_scale" else "holes"
    expected = seeded_run(model, x, hx, **given(kind))
    with wrapped() as backend:
        model(x, hx, **given(kind))
        assert backend.layers
    monkeypatch.setattr(type(backend_of("cpu")), "runs_options", lambda self, layer: False)
    with wrapped() as backend:
        actual = seeded_run(model, x, hx, **given(kind))
    assert not backend.layers
    assert_close(actual, expected, 3e-5)  # of layer_norm, see test_blocks_and_threads


# -- Cells of the user's own -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MGU", "PeepholeLSTM", "SRU", "SLSTM"])
@pytest.mark.parametrize("kind", ["none", "reset and holes"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_own_cells(name, kind, layer_norm):
    cls = getattr(fastrnn.cells, name)
    own = {**OPTIONS, "layer_norm": layer_norm}
    if not cls.definition.recurrent:
        if layer_norm:
            pytest.skip("no product that recurs")
        own = {k: v for k, v in own.items() if not k.endswith("t_dropout")}
    torch.manual_seed(0)
    model = cls(3, 5, 2, dropout=0.3, bidirectional=True, checkpoint_every=3, **own)
    model = with_gains(model.double())
    x = torch.randn(T, B, 3).double()
    hx = tuple(torch.randn(4, B, 5).double() for _ in cls.definition.states)
    hx = hx if len(hx) > 1 else hx[0]
    actual = seeded_run(model, x, hx, **given(kind + " scale"))
    with by_reference():
        expected = seeded_run(model, x, hx, **given(kind + " scale"))
    assert_close(actual, expected, 1e-11)
