"""Deep models whose layers run side by side, a few steps apart: csrc/cpu/*_stack.h."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn._layer import Layer
from fastrnn._load import _cpu
from helpers import assert_same_bits

# Steps, rows, features, units and layers.
SHAPES = [
    (200, 1, 20, 64, 4),
    (231, 4, 9, 64, 2),
    (333, 3, 7, 33, 3),
    (131, 1, 40, 70, 5),
]
MODELS = {"LSTM": fastrnn.LSTM, "GRU": fastrnn.GRU, "RNN": fastrnn.RNN}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def plan(model, steps: int, batch: int) -> tuple[int, int, int]:
    weights = tuple(model._flat_weights)
    x = torch.zeros(steps, batch, model.input_size, dtype=weights[0].dtype)
    stack = Layer.plain(model.mode, 1, batch, x, None, None, weights)
    return _cpu.plan_stack(stack, model.num_layers)


def run(model, *args) -> dict[str, torch.Tensor]:
    output, states = model(*args)
    states = states if isinstance(states, tuple) else (states,)
    return dict(zip(("output", "h_n", "c_n"), (output, *states)))


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", MODELS)
def test_same_bits_as_one_after_the_other(cell, shape, dtype, count):
    steps, batch, features, hidden, layers = shape
    torch.manual_seed(0)
    model = MODELS[cell](features, hidden, layers, dtype=dtype)
    x = torch.randn(steps, batch, features, dtype=dtype)
    states = [torch.randn(layers, batch, hidden, dtype=dtype) for _ in range(1 + (cell == "LSTM"))]
    hx = tuple(states) if cell == "LSTM" else states[0]
    for args in ((x,), (x, hx)):
        with torch.no_grad():
            torch.set_num_threads(1)
            expected = run(model, *args)
            torch.set_num_threads(count)
            assert_same_bits(run(model, *args), expected)


@pytest.mark.parametrize("weights", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"zoneout": 0.2}], ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_frozen_models(cell, options, weights):
    torch.manual_seed(0)
    if weights is torch.int8 and options:
        pytest.skip("8 bits are for plain layers")
    model = fastrnn.freeze(MODELS[cell](20, 64, 3, **options).eval(), weights)
    x = torch.randn(200, 2, 20)
    hx = states_for(cell, 3, 2, 64, torch.float32)
    args = (x, tuple(hx) if cell == "LSTM" else hx[0])
    with torch.no_grad():
        torch.set_num_threads(1)
        expected = run(model, *args)
        torch.set_num_threads(3)
        assert_same_bits(run(model, *args), expected)


def train(model, x, states, count: int, *, finals_only: bool = False) -> dict[str, torch.Tensor]:
    """Results and gradients on so many threads."""
    torch.set_num_threads(count)
    x, *states = (t.detach().clone().requires_grad_() for t in (x, *states))
    model.zero_grad()
    results = run(model, x, *([tuple(states) if len(states) > 1 else states[0]] if states else []))
    given = list(results.values())[finals_only:]
    loss = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in given)
    loss.backward()
    gradients = {"x": x.grad, **{f"state {i}": h.grad for i, h in enumerate(states)}}
    gradients |= {name: p.grad.clone() for name, p in model.named_parameters()}
    return {name: t.detach() for name, t in (results | gradients).items()}


def names_in(graph) -> set[str]:
    """The names of the nodes of a graph."""
    found, left = set(), [graph]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [following for following, _ in node.next_functions]
    return {type(node).__name__ for node in found}


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    else:
        for each in value:
            yield from tensors_in(each)


def train_with(
    model, x, count: int, *, forward_only: bool = False, **given
) -> tuple[list[torch.Tensor], set[str]]:
    """Results and, unless without, gradients of a call with options, on so many threads; and the
    names in its graph."""
    torch.set_num_threads(count)
    torch.manual_seed(7)
    data = (x.data if isinstance(x, PackedSequence) else x).detach().clone().requires_grad_()
    own = PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data
    with torch.set_grad_enabled(not forward_only):
        output, states, *sequences = model(own, **given)
    results = list(tensors_in((output, states, sequences)))
    if forward_only:
        return results, set()
    sums = ((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in results)
    gradients = torch.autograd.grad(sum(sums), [data, *model.parameters()])
    return [*(t.detach() for t in results), *gradients], names_in(results[0].grad_fn)


def marks(steps: int, batch: int, share: float) -> torch.Tensor:
    return torch.rand(steps, batch, generator=torch.Generator().manual_seed(0)) < share


CALLS = {
    "lengths": lambda t, b: {"lengths": [t, *range(t // 3, t // 3 + b - 1)]},
    "an empty row": lambda t, b: {"lengths": [t, *([0] * (b - 1))]},
    "mask": lambda t, b: {"mask": marks(t, b, 0.7)},
    "reset": lambda t, b: {"reset": marks(t, b, 0.05)},
    "return_states": lambda t, b: {"return_states": True},
    "grad_scale": lambda t, b: {"grad_scale": marks(t, b, 0.9).float() * 0.9},
    "all": lambda t, b: {
        "mask": marks(t, b, 0.8),
        "reset": marks(t, b, 0.1),
        "grad_scale": marks(t, b, 0.9).float(),
        "return_states": True,
    },
}
OPTIONS = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "one mask per row": {"dropout": 0.3, "variational": True},
    "clipped": {"grad_clip": 0.01},
    "W_hh dropped": {"weight_dropout": 0.2},
}


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cell", MODELS)
def test_options(cell, options, call, count):
    torch.manual_seed(0)
    steps, batch, layers = 130, 3, 3
    model = MODELS[cell](9, 64, layers, **OPTIONS[options])
    x, given = torch.randn(steps, batch, 9), CALLS[call](steps, batch)
    for forward_only in (False, True):
        found, _ = train_with(model, x, count, forward_only=forward_only, **given)
        expected, names = train_with(model, x, 1, forward_only=forward_only, **given)
        assert "FusedStackBackward" not in names
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same_bits({f"result {i}": a}, {f"result {i}": b})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", MODELS)
def test_dropout_and_states_of_each_type(cell, dtype):
    torch.manual_seed(0)
    model = MODELS[cell](9, 33, 3, dropout=0.4, batch_first=True, dtype=dtype)
    x, reset = torch.randn(2, 200, 9).to(dtype), marks(2, 200, 0.1)
    for given in ({"return_states": True, "reset": reset}, {"lengths": [70, 200]}):
        found, _ = train_with(model, x, 2, **given)
        expected, _ = train_with(model, x, 1, **given)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_packed_sequences():
    torch.manual_seed(0)
    model = fastrnn.GRU(9, 64, 3, dropout=0.2)
    rows = [torch.randn(n, 9) for n in (40, 150, 3)]
    x = torch.nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
    for given in ({}, {"return_states": True}):
        found, _ = train_with(model, x, 2, **given)
        for a, b in zip(found, train_with(model, x, 1, **given)[0], strict=True):
            assert torch.equal(a, b)


def states_for(cell: str, layers: int, batch: int, hidden: int, dtype) -> list[torch.Tensor]:
    return [torch.randn(layers, batch, hidden).to(dtype) for _ in range(1 + (cell == "LSTM"))]


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 1, 5, 64, 2), (500, 4, 64, 64, 2)], ids=str)
@pytest.mark.parametrize("cell", MODELS)
def test_gradients_have_the_same_bits(cell, shape, dtype, count):
    steps, batch, features, hidden, layers = shape
    torch.manual_seed(0)
    model = MODELS[cell](features, hidden, layers, dtype=dtype, bias=count > 2)
    x = torch.randn(steps, batch, features).to(dtype)
    for states in ([], states_for(cell, layers, batch, hidden, dtype)):
        for finals_only in (False, True):
            found = train(model, x, states, count, finals_only=finals_only)
            assert_same_bits(found, train(model, x, states, 1, finals_only=finals_only))


def test_projections():
    torch.manual_seed(0)
    model = fastrnn.LSTM(20, 64, 3, proj_size=40)
    x = torch.randn(150, 1, 20)
    states = [torch.randn(3, 1, 40), torch.randn(3, 1, 64)]
    assert_same_bits(train(model, x, states, 2), train(model, x, states, 1))


@pytest.fixture
def deep():
    """A model whose layers run side by side in training, too."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = fastrnn.LSTM(20, 64, 2, dtype=torch.float64)
    x = torch.randn(200, 1, 20, dtype=torch.float64, requires_grad=True)
    if type(model(x)[0].grad_fn).__name__ != "FusedStackBackward":
        pytest.skip("this processor runs them one after the other")
    return model, x


def both(work) -> tuple:
    """What work() returns with two threads, and with one."""
    torch.set_num_threads(2)
    found = work()
    torch.set_num_threads(1)
    return found, work()


@pytest.mark.parametrize("call", [{}, *CALLS], ids=str)
def test_options_run_side_by_side(deep, call):
    _, x = deep
    for given in ({}, {"dropout": 0.3}, {"dropout": 0.3, "variational": True}):
        own = fastrnn.LSTM(20, 64, 2, dtype=torch.float64, **given)
        _, names = train_with(own, x, 2, **(CALLS[call](*x.shape[:2]) if call else {}))
        assert "FusedStackBackward" in names
    own = fastrnn.LSTM(20, 64, 2, dtype=torch.float64, recurrent_dropout=0.3)
    assert "FusedStackBackward" not in train_with(own, x, 2)[1]


@pytest.mark.parametrize("given", [{}, {"dropout": 0.3}, {"lengths": [150]}], ids=str)
def test_functions(deep, given):
    _, x = deep
    own = fastrnn.LSTM(20, 64, 2, dtype=torch.float64)

    def work():
        torch.manual_seed(0)
        y, _ = fastrnn.functional.lstm(x, None, own._flat_weights, num_layers=2, **given)
        return names_in(y.grad_fn), torch.autograd.grad(y.sum(), [x, *own.parameters()])

    (names, found), (alone, expected) = both(work)
    assert "FusedStackBackward" in names - alone
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("call", [{}, *CALLS], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_second_derivatives(deep, dropout, call):
    model, x = deep
    model.dropout = dropout
    given = CALLS[call](*x.shape[:2]) if call else {}

    def work():
        torch.manual_seed(0)
        y, _, *states = model(x, **given)
        parameters = list(model.parameters())
        loss = (y**2).sum() + sum((s**2).sum() for s in (states[0] if states else ()))
        first = torch.autograd.grad(loss, [x, *parameters], create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), [x, *parameters])

    for a, b in zip(*both(work), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gradients_in_batches(deep):
    model, x = deep

    def work():
        y, _ = model(x)
        several = torch.stack([torch.ones_like(y), y.detach()])
        return torch.autograd.grad(y, [x, *model.parameters()], several, is_grads_batched=True)

    for a, b in zip(*both(work), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_backward_twice(deep):
    model, x = deep
    y, _ = model(x)
    first = torch.autograd.grad(y.sum(), [x, *model.parameters()], retain_graph=True)
    second = torch.autograd.grad(y.sum(), [x, *model.parameters()])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_only_what_is_asked_for(deep):
    model, x = deep
    y, (h_n, _) = model(x)
    [alone] = torch.autograd.grad(h_n[0].sum(), [model.weight_hh_l0], retain_graph=True)
    every = torch.autograd.grad(h_n[0].sum(), [x, *model.parameters()], retain_graph=True)
    names = ["x", *(name for name, _ in model.named_parameters())]
    found = dict(zip(names, every))
    assert torch.equal(alone, found["weight_hh_l0"])
    assert not found["weight_ih_l1"].any()  # zeros, as of torch.nn.LSTM
    no_x = model(x.detach())[0]
    assert type(no_x.grad_fn).__name__ == "FusedStackBackward"
    [weight] = torch.autograd.grad(no_x.sum(), [model.weight_ih_l0])
    [expected] = torch.autograd.grad(y.sum(), [model.weight_ih_l0])
    assert torch.equal(weight, expected)


def sharing(x, kind: str):
    """A function of x whose stack has inputs that depend on each other, and its parameters."""
    model = fastrnn.LSTM(64, 64, 2, dtype=torch.float64)
    x = torch.nn.functional.pad(x, (0, 44))
    if kind == "tied weights":
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(model, f"{name}_l1", getattr(model, f"{name}_l0"))
        return lambda: model(x)[0], list(model.parameters())
    if kind == "states of x":
        states = (torch.stack([x.mean(0).tanh()] * 2), torch.stack([x.amax(0).tanh()] * 2))
        return lambda: model(x, states)[0], list(model.parameters())
    return lambda: model(model(x)[0])[0], list(model.parameters())


@pytest.mark.parametrize("kind", ["tied weights", "states of x", "twice"])
def test_inputs_that_share(deep, kind):
    _, x = deep
    run, parameters = sharing(x, kind)
    y = run()
    assert "FusedStackBackward" in names_in(y.grad_fn)
    expected = torch.autograd.grad(y.sum(), [x, *parameters], retain_graph=True)
    found = torch.autograd.grad(y.sum(), [x, *parameters], create_graph=True)
    batched = torch.autograd.grad(
        y, [x, *parameters], torch.ones_like(y)[None], is_grads_batched=True, retain_graph=True
    )
    with FlopCounterMode(display=False):
        watched = torch.autograd.grad(y.sum(), [x, *parameters])
    for a, *others in zip(expected, found, batched, watched, strict=True):
        for b in others:
            torch.testing.assert_close(b.reshape(a.shape), a, rtol=1e-10, atol=1e-12)


def test_layers_that_do_not_fit(deep):
    model, x = deep
    stack = Layer.plain("LSTM", 1, 1, x.detach(), None, None, tuple(model._flat_weights))
    for name, value in (("reverse", True), ("checkpoint_every", 10), ("zoneout_h", 0.1)):
        with pytest.raises(ValueError, match=f"{name}: expected none"):
            _cpu.forward_stack(stack._replace(**{name: value}), 2, None)


class Copies:
    """A sequence that makes its tensors when it is asked for them."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors)

    def __getitem__(self, i):
        return self.tensors[i].clone()


def test_weights_in_any_sequence(deep):
    model, x = deep
    weights = tuple(w.detach() for w in model._flat_weights)
    stack = Layer.plain("LSTM", 1, 1, x.detach(), None, None, weights)
    copies = (*stack[:-1], Copies(weights))
    for a, b in zip(_cpu.forward_stack(stack, 2, None), _cpu.forward_stack(copies, 2, None)):
        assert torch.equal(a, b)


def test_what_was_changed_in_place_is_an_error(deep):
    model, x = deep
    y, _ = model(x)
    with torch.no_grad():
        model.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["weight_hh_l1", "bias_ih_l0"])
def test_frozen_parameters_run_layer_by_layer(deep, name):
    """Backward then ends where nothing is wanted any more."""
    model, x = deep
    model.get_parameter(name).requires_grad_(False)
    y, _ = model(x)
    assert type(y.grad_fn).__name__ == "FusedLSTMFunctionBackward"


def test_checkpoints_run_layer_by_layer(deep):
    model, x = deep
    every = fastrnn.LSTM(20, 64, 2, dtype=torch.float64, checkpoint_every=50)
    every.load_state_dict(model.state_dict())
    assert type(every(x)[0].grad_fn).__name__ == "FusedLSTMFunctionBackward"
    a, b = (torch.autograd.grad(m(x)[0].sum(), x)[0] for m in (model, every))
    assert torch.equal(a, b)


@pytest.mark.skipif("avx512" not in _cpu.cpu_variant(), reason="figures of AVX-512")
@pytest.mark.parametrize("cell", MODELS)
def test_plan(cell):
    """Small models take it, with rows divided where there are more threads than layers; not those
    that keep all threads busy by themselves, nor single layers or short sequences."""
    torch.set_num_threads(2)
    model = MODELS[cell](64, 64, 2)
    assert plan(model, 400, 2)[:2] == (2, 1)
    assert plan(model, 24, 2)[0] == 1
    assert plan(MODELS[cell](64, 64), 400, 2)[0] == 1
    assert plan(MODELS[cell](512, 512, 2), 400, 64)[0] == 1
    torch.set_num_threads(8)
    assert plan(MODELS[cell](64, 64, 4), 400, 16)[:2] == (8, 2)
    torch.set_num_threads(1)
    assert plan(model, 400, 2)[0] == 1


@pytest.mark.skipif("avx512" not in _cpu.cpu_variant(), reason="figures of AVX-512")
def test_plan_of_rows_that_end():
    """It is that of the rows that there are at a step on average."""
    torch.set_num_threads(2)
    model = fastrnn.LSTM(64, 64, 2)
    sizes = torch.tensor([64] + [1] * 399)
    x, weights = torch.zeros(int(sizes.sum()), 64), tuple(model._flat_weights)
    stack = Layer.plain("LSTM", 1, 64, x, None, None, weights, sizes)
    assert _cpu.plan_stack(stack, 2) == plan(model, 400, 2)


@pytest.mark.parametrize("name", ["MGU", "PeepholeLSTM", "SLSTM"])
def test_cells_of_a_users_own(name):
    torch.manual_seed(0)
    model = getattr(fastrnn.cells, name)(16, 64, 3, dropout=0.1)
    x = torch.randn(120, 2, 16)
    for forward_only in (True, False):
        for given in ({}, {"return_states": True, "reset": marks(120, 2, 0.1)}):
            found, _ = train_with(model, x, 2, forward_only=forward_only, **given)
            expected, _ = train_with(model, x, 1, forward_only=forward_only, **given)
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)
