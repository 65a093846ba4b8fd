"""Deep models whose layers run side by side, a few steps apart: csrc/cpu/*_stack.h."""

import pytest
import torch

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
    weights = tuple(model.all_weights[-1])
    x = torch.zeros(steps, batch, model.hidden_size, dtype=weights[0].dtype)
    layer = Layer.plain(model.mode, 1, batch, x, None, None, weights, keep=False, all_c=False)
    return _cpu.plan_stack(layer, model.num_layers)


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


def test_second_derivatives(deep):
    model, x = deep

    def work():
        y, _ = model(x)
        parameters = list(model.parameters())
        first = torch.autograd.grad((y**2).sum(), [x, *parameters], create_graph=True)
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


def test_cell_of_the_users_own():
    torch.manual_seed(0)
    model = fastrnn.cells.MGU(16, 64, 3)
    x = torch.randn(120, 2, 16)
    torch.set_num_threads(2)
    with torch.no_grad():
        found = run(model, x)
        torch.set_num_threads(1)
        assert_same_bits(found, run(model, x))
