"""docs/contract.md: every row names tests that exist, and the rows that no other test shows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from helpers import assert_close, inputs, make, pair, run, unpack

LAYERS, CELLS = ["LSTM", "GRU", "RNN"], ["LSTMCell", "GRUCell", "RNNCell"]
TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "contract.md"

needs_page = pytest.mark.skipif(not PAGE.exists(), reason="the page is not part of this tree")


# -- The page -------------------------------------------------------------------------------------


def rows() -> list[list[str]]:
    """The cells of every row of every table, without heads and rules."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in found if row[0] != "what" and set(row[0]) != {"-"}]


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@needs_page
def test_every_row_has_tests_that_exist():
    found = rows()
    assert len(found) > 80
    wrong = []
    for row in found:
        what, _, ours, tests = row  # a | within a cell would make it five
        named = [
            re.fullmatch(r"`tests/((?:cuda/)?test_\w+\.py)::(test_\w+)`", t)
            for t in tests.split("<br>")
        ]
        if not tests and "not yet" in ours:
            continue
        for match in named:
            path = TESTS / match[1] if match else None
            if not (path and path.exists() and match[2] in names_in(path)):
                wrong.append((what, tests))
    assert not wrong


@needs_page
def test_links_within_the_repository():
    targets = re.findall(r"\]\((?!https://)([^)#]*)#?[^)]*\)", PAGE.read_text(encoding="utf-8"))
    assert targets
    assert not [target for target in targets if not (PAGE.parent / target).exists()]


# -- Construction ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
@pytest.mark.parametrize("name", LAYERS)
def test_constructor_arguments(name):
    """Every number of positional arguments gives the same module as in torch.nn; so do names."""
    extra = {"nonlinearity": "relu"} if name == "RNN" else {}
    proj_size = 2 if name == "LSTM" else 0
    given = {"input_size": 3, "hidden_size": 4, "num_layers": 2} | extra
    given |= {"bias": False, "batch_first": True, "dropout": 0.25, "bidirectional": True}
    given |= {"proj_size": proj_size, "device": "meta", "dtype": torch.float64}

    def state(library, *args, **options):
        model = getattr(library, name)(*args, **options)
        own = {k: v for k, v in vars(model).items() if not k.startswith("_") and k != "training"}
        weights = [(n, p.shape, p.dtype, p.device) for n, p in model.named_parameters()]
        return own, weights, repr(model)

    for count in range(2, len(given) + 1):
        args = list(given.values())[:count]
        assert state(fastrnn, *args) == state(nn, *args)
    if not proj_size:
        del given["proj_size"]  # refused by name, even 0
    by_name = state(fastrnn, **given)
    assert by_name == state(nn, **given)
    assert (
        by_name[0].items()
        >= {k: v for k, v in given.items() if k not in ("device", "dtype")}.items()
    )


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"proj_size": 2}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_names_and_shapes_of_parameters(name, options):
    if "proj_size" in options and name != "LSTM":
        pytest.skip("an option of LSTM")
    models = [getattr(lib, name)(3, 4, 2, bidirectional=True, **options) for lib in (fastrnn, nn)]
    ours, theirs = ([(n, p.shape) for n, p in m.named_parameters()] for m in models)
    assert ours == theirs
    kinds = ["weight_ih", "weight_hh"]
    kinds += ["bias_ih", "bias_hh"] if options.get("bias", True) else []
    kinds += ["weight_hr"] if "proj_size" in options else []
    suffixes = ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert [n for n, _ in ours] == [f"{kind}_{suffix}" for suffix in suffixes for kind in kinds]


# -- Call -----------------------------------------------------------------------------------------


def test_a_row_of_length_zero(cell):
    """It cannot be packed; as a length it is a row whose state stays."""
    model, _ = pair(cell, 3, 4, bidirectional=True)
    x, hx = inputs(model, 5, 2)
    with pytest.raises(RuntimeError, match="greater than 0"):
        pack_padded_sequence(x, [5, 0])
    output, last = model(x, hx, lengths=[5, 0])
    assert not output[:, 1].any()
    assert all(torch.equal(h[:, 1], h_0[:, 1]) for h, h_0 in zip(unpack(last), unpack(hx)))


@pytest.mark.parametrize("with_hx", [True, False], ids=["hx", "no-hx"])
def test_dtype_under_autocast(cell, with_hx):
    """An input of another dtype than the weights' is refused without autocast only."""
    shown = []
    for model in pair(cell, 3, 4):
        x, hx = inputs(model, 5, 2, hx=with_hx)
        with pytest.raises(ValueError, match="bfloat16"):
            model(x.bfloat16(), hx)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            output, last = model(x.bfloat16(), hx)
        shown.append(dict(enumerate(t.detach() for t in (output, *unpack(last)))))
    assert_close(*shown, 0.02)


# -- Weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_parametrized_weight_is_computed_once_a_call(cell, training):
    """With spectral_norm in training, each computation is a step of its power iteration."""
    calls = []

    class Counted(nn.Module):
        def forward(self, weight):
            calls.append(weight)
            return weight * 2

    model = make(fastrnn, cell, 3, 4, 2, bidirectional=True).train(training)
    nn.utils.parametrize.register_parametrization(model, "weight_hh_l0", Counted())
    calls.clear()
    for hx in (True, False):
        model(*inputs(model, 5, 2, hx=hx))
    assert len(calls) == 2


# -- Transforms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_fake_tensors(name):
    """Shapes, strides and dtypes, those of the gradients too, without computing anything."""
    results = []
    for library in (fastrnn, nn):
        with FakeTensorMode():
            model = getattr(library, name)(3, 4)
            x = torch.randn(*([5] if name in LAYERS else []), 2, 3, requires_grad=True)
            outputs = tree_leaves(model(x))
            grads = torch.autograd.grad(sum(t.sum() for t in outputs), [x, *model.parameters()])
            assert type(outputs[0]).__name__ == "FakeTensor"
            shown = [(t.shape, t.stride(), t.dtype, t.device) for t in outputs]
            results.append((shown, [(g.shape, g.dtype, g.device) for g in grads]))
    assert results[0] == results[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jvp's import, in torch
@pytest.mark.parametrize("transform", ["jvp", "per-sample gradients"])
def test_transforms_in_float32(cell, transform):
    """In torch.nn the cell and the dtype decide on them. Against its gradients in float64."""
    ours, theirs = pair(cell, 3, 4)
    theirs.double()
    params = {name: p.detach() for name, p in ours.named_parameters()}
    xs = torch.stack([inputs(ours, 5, 2, seed=seed)[0] for seed in range(3)])

    def loss(params, x):
        return functional_call(ours, params, (x,))[0].sin().sum()

    each = []
    for x in xs.double():
        total = theirs(x)[0].sin().sum()
        each.append(torch.autograd.grad(total, [*theirs.parameters()]))
    expected = {name: torch.stack(g) for name, g in zip(params, zip(*each))}
    if transform == "jvp":
        along = {name: p.cos() for name, p in params.items()}
        actual = {"change": jvp(lambda p: loss(p, xs[0]), (params,), (along,))[1]}
        expected = {"change": sum((g[0] * along[name]).sum() for name, g in expected.items())}
    else:
        actual = vmap(grad(loss), (None, 0))(params, xs)
    assert_close(actual, {name: t.float() for name, t in expected.items()})


def test_export_of_fixed_sizes(cell):
    model = make(fastrnn, cell, 3, 4, 2, bidirectional=True)
    x, hx = inputs(model, 5, 2)
    exported = torch.export.export(model, (x, hx), strict=False).module()
    actual, expected = (tree_leaves(m(x, hx)) for m in (exported, model))
    assert_close(dict(enumerate(actual)), dict(enumerate(expected)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit itself is
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("batch", [2, 3])
def test_jit_trace(cell, tracked, batch):
    """Values and gradients for a length, and a batch, that the trace has not seen."""
    model = make(fastrnn, cell, 3, 4, 2, bidirectional=True)
    with torch.set_grad_enabled(tracked):
        traced = torch.jit.trace(model, inputs(model, 5, 2))
    x, hx = inputs(model, 7, batch, seed=1)
    assert_close(run(model, x, hx, forward=traced.__call__), run(model, x, hx))


SUBSTITUTION = """
import sys, torch
from torch import nn
import fastrnn

NAMES = "LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"
theirs = {name: getattr(nn, name) for name in NAMES}
inputs = {name: torch.randn(2, 3) if "Cell" in name else torch.randn(5, 2, 3) for name in NAMES}
if sys.argv[1] == "late":
    for name in NAMES:
        getattr(fastrnn, name)(3, 4)(inputs[name])
for name in NAMES:
    setattr(nn, name, getattr(fastrnn, name))
for name in NAMES:
    ours = getattr(nn, name)(3, 4)
    assert type(ours) is getattr(fastrnn, name)
    original = theirs[name](3, 4)
    original.load_state_dict(ours.state_dict())
    for x in (inputs[name], inputs[name].double()):
        ours, original = ours.to(x.dtype), original.to(x.dtype)
        torch.testing.assert_close(ours(x), original(x))
        with torch.no_grad():
            torch.testing.assert_close(ours(x), original(x))
    texts = []
    for module in (ours, original):
        try:
            module(inputs[name].double()[..., :2])
        except RuntimeError as error:
            texts.append(str(error))
    assert len(texts) == 2 and texts[0] == texts[1], texts
    model = nn.Sequential(original)
    assert len(fastrnn.replace(model).swapped) == 1
    assert type(model[0]) is getattr(fastrnn, name)
    fastrnn.restore(model)
    assert type(model[0]) is theirs[name]
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_classes_in_the_place_of_torchs(when):
    """torch.nn.LSTM = fastrnn.LSTM, before or after fastrnn's first use."""
    command = [sys.executable, "-c", SUBSTITUTION, when]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
