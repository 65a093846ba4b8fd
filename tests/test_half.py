"""bfloat16 and float16: no further from float64 than torch.nn, with states carried in float32."""

import pytest
import torch
from torch import nn

import fastrnn
from helpers import inputs, make, make_mask, pair, run, unpack

HALF = [torch.bfloat16, torch.float16]


def errors(model, exact, x, hx, **options):
    """RMS distance of every result and gradient from that in float64, relative to its RMS."""
    wide = None if hx is None else tuple(h.double() for h in unpack(hx))
    expected = run(exact, x.double(), wide if wide is None or len(wide) > 1 else wide[0], **options)
    actual = run(model, x, hx, **options)
    assert {t.dtype for t in actual.values()} == {x.dtype}
    return {
        name: float((actual[name].double() - t).norm() / t.norm().clamp(min=1e-9))
        for name, t in expected.items()
    }


def exact_of(model: nn.RNNBase, cell: str, *sizes: int, **options) -> nn.RNNBase:
    exact = make(fastrnn, cell, *sizes, dtype=torch.float64, **options)
    exact.load_state_dict(model.state_dict())
    return exact


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
def test_no_further_than_torch(cell, half, bidirectional, hx):
    sizes, options = (20, 33, 2), {"bidirectional": bidirectional}
    ours, theirs = pair(cell, *sizes, dtype=half, **options)
    exact = exact_of(ours, cell, *sizes, **options)
    x, hx = inputs(ours, 30, 5, hx=hx)
    mine, other = errors(ours, exact, x, hx), errors(theirs, exact, x, hx)
    epsilon = torch.finfo(half).eps
    for name in mine:
        if cell == "RNN_RELU" and name.startswith("grad"):
            continue  # a sum next to zero changes sides by chance, which outweighs all rounding
        # One rounding of the result is unavoidable.
        assert mine[name] <= 1.2 * other[name] + epsilon / 4, name


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("masked", ["holes", "lengths"])
@pytest.mark.parametrize("sizes", [(1, 1, 3, 5), (12, 4, 17, 33), (40, 20, 9, 130)], ids=str)
def test_masks_and_resets(cell, half, bidirectional, masked, sizes, request):
    T, B, *features = sizes
    model = make(fastrnn, cell, *features, bidirectional=bidirectional, dtype=half)
    exact = exact_of(model, cell, *features, bidirectional=bidirectional)
    x, hx = inputs(model, T, B)
    options = {"mask": make_mask(masked, T, B), "reset": torch.rand(T, B) < 0.2}
    # On CUDA, W_ih x + b_ih is rounded once more.
    bound = (12 if request.config.getoption("device") == "cpu" else 24) * torch.finfo(half).eps
    for name, error in errors(model, exact, x, hx, **options).items():
        assert error <= bound, name


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_the_state_is_carried_in_float32(cell, half):
    """A state that grows by less than half a place of the 16-bit type at each step still grows."""
    model = make(fastrnn, cell, 1, 1, bias=False).to(half)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        gates = [[20.0], [20.0], [0.002], [20.0]] if cell == "LSTM" else [[0.0], [8.0], [20.0]]
        model.weight_ih_l0.copy_(torch.tensor(gates))
    start = torch.full((1, 1, 1), 1.0 if cell == "LSTM" else 0.5, dtype=half)
    hx = (torch.zeros_like(start), start) if cell == "LSTM" else start
    steps = 200
    exact = make(fastrnn, cell, 1, 1, bias=False, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    x = torch.ones(steps, 1, 1, dtype=half)
    with torch.no_grad():
        last = unpack(model(x, hx)[1])[-1].item()
        wide = tuple(h.double() for h in hx) if cell == "LSTM" else hx.double()
        wanted = unpack(exact(x.double(), wide)[1])[-1].item()
    assert abs(wanted - start.item()) > 0.03
    assert last == pytest.approx(wanted, rel=torch.finfo(half).eps)


@pytest.mark.parametrize("half", HALF, ids=str)
def test_special_values(half):
    """Every 16-bit number goes through the kernels' conversions: relu(1 * x) is max(x, 0)."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half)
    model = fastrnn.RNN(1, 1, nonlinearity="relu", bias=False, dtype=half)
    with torch.no_grad():
        model.weight_ih_l0.fill_(1)
        model.weight_hh_l0.fill_(0)
        output = model(x.view(1, -1, 1))[0].flatten()
        few = torch.cat([model(part.view(1, -1, 1))[0].flatten() for part in x[::401].split(5)])
    # Processors that multiply pairs of bfloat16 take subnormal ones for zero.
    tiny = torch.finfo(half).tiny if fastrnn.cpu_variant() == "avx512bf16" else 0
    for actual, given in ((output, x), (few, x[::401])):
        expected = torch.relu(given)
        torch.testing.assert_close(actual, expected, rtol=0, atol=tiny, equal_nan=True)


@pytest.mark.parametrize("half", HALF, ids=str)
def test_return_states_have_the_dtype_of_output(half):
    model = make(fastrnn, "LSTM", 3, 5, dtype=half)
    output, (_, c_n), (c,) = model(torch.randn(4, 2, 3, dtype=half), return_states=True)
    assert c.dtype == output.dtype == half
    assert torch.equal(c[-1], c_n[0])


# Autocast.


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("hx_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_autocast(cell, hx_dtype, grad, bidirectional):
    ours, theirs = pair(cell, 6, 9, 2, bidirectional=bidirectional)
    x, hx = inputs(ours, 7, 3, hx=hx_dtype is not None)
    if hx is not None:
        hx = tuple(h.to(hx_dtype) for h in unpack(hx))
        hx = hx if len(hx) > 1 else hx[0]
    results = []
    with (
        torch.set_grad_enabled(grad),
        torch.autocast(torch.get_default_device().type, torch.bfloat16),
    ):
        for model in (ours, theirs):
            output, last = model(x, hx)
            shown = [output, *unpack(last)]
            if grad:
                loss = sum(t.float().sin().sum() for t in shown)
                shown += torch.autograd.grad(loss, list(model.parameters()))
            results.append(shown)
    for ours_, theirs_ in zip(*results):
        assert ours_.dtype == theirs_.dtype
        scale = theirs_.abs().max().clamp(min=1)
        assert (ours_.double() - theirs_.double()).abs().max() / scale < 0.03


def test_autocast_leaves_float64_alone(cell):
    ours, theirs = pair(cell, 6, 9, dtype=torch.float64)
    x, hx = inputs(ours, 7, 3)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert ours(x, hx)[0].dtype == theirs(x, hx)[0].dtype == torch.float64


def test_autocast_to_float16(cell):
    """torch.nn.LSTM fails here."""
    model = make(fastrnn, cell, 6, 9)
    x, hx = inputs(model, 7, 3)
    with torch.autocast(torch.get_default_device().type, torch.float16):
        output, _ = model(x, hx)
    assert output.dtype == (torch.float32 if cell == "GRU" else torch.float16)
    torch.testing.assert_close(output.float(), model(x, hx)[0], atol=2e-2, rtol=0)


@pytest.mark.parametrize("H", [15, 16, 17, 33])
def test_infinity_stays_infinity(H):
    """Beyond the last unit, no product of infinity with a padding zero counts as a factor."""
    ours, theirs = pair("RNN_RELU", 3, H, dtype=torch.bfloat16)
    with torch.no_grad():
        for p in (*ours.parameters(), *theirs.parameters()):
            p.fill_(2)
        x = torch.ones(40, 3, 3, dtype=torch.bfloat16)
        output, expected = ours(x)[0], theirs(x)[0]
    assert expected.isinf().any()
    assert not output.isnan().any()
    assert torch.equal(output.isinf()[-1], expected.isinf()[-1])
