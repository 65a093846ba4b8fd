"""The cells against the original torch.nn classes, on the fused layer and on torch's operator."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import fastrnn
from helpers import TOLERANCE, assert_close, pack, seeded, unpack, wrapped

CELLS = {
    "LSTM": ("LSTMCell", {}),
    "GRU": ("GRUCell", {}),
    "RNN_TANH": ("RNNCell", {"nonlinearity": "tanh"}),
    "RNN_RELU": ("RNNCell", {"nonlinearity": "relu"}),
}
SMALL, LARGE = (2, 3, 5), (131, 7, 257)  # B, I, H on either side of the choice


def pair(cell: str, inputs: int, hidden: int, **options) -> tuple[nn.Module, nn.Module]:
    """Ours and the original, each built from the same seed."""
    name, extra = CELLS[cell]
    modules = []
    for library in (fastrnn, nn):
        torch.manual_seed(0)
        modules.append(getattr(library, name)(inputs, hidden, **extra, **options))
    return modules[0], modules[1]


def arguments(cell: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 1):
    """An input and a state; shape is B, I, H, or I, H unbatched."""
    generator = seeded(seed)
    *batch, inputs, hidden = shape

    def randn(size: int):
        return torch.randn(*batch, size, generator=generator).to(dtype)

    x, h, c = randn(inputs), randn(hidden), randn(hidden)
    return x, (h, c) if cell == "LSTM" else h


def run(model: nn.Module, x, hx=None) -> dict[str, torch.Tensor]:
    """The new states and all gradients, by name."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *unpack(hx))]
    states = unpack(model(leaves[0], pack(tuple(leaves[1:]))))
    wanted = [*leaves, *model.parameters()]
    incoming = [torch.linspace(-1, 1, s.numel(), dtype=s.dtype).view_as(s) for s in states]
    grads = torch.autograd.grad(states, wanted, incoming)
    named = {f"state {i}": s.detach() for i, s in enumerate(states)}
    return named | {f"grad {i}": g for i, g in enumerate(grads)}


@pytest.fixture(params=CELLS)
def cell(request) -> str:
    return request.param


@pytest.fixture
def fused():
    """The calls of the fused layer."""
    with wrapped() as backend:
        yield backend.layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_hx", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
def test_parity(cell, dtype, sizes, with_hx, bias, fused):
    ours, theirs = pair(cell, *sizes[1:], bias=bias, dtype=dtype)
    x, hx = arguments(cell, *sizes, dtype=dtype)
    hx = hx if with_hx else None
    assert_close(run(ours, x, hx), run(theirs, x, hx), 4 * TOLERANCE[dtype])
    assert len(fused) == (sizes == LARGE)
    with torch.no_grad():
        actual, expected = unpack(ours(x, hx)), unpack(theirs(x, hx))
    assert_close(dict(enumerate(actual)), dict(enumerate(expected)))
    assert not any(t.requires_grad for t in actual)


@pytest.mark.parametrize("shape", [(3, 5), (1, 3, 5), (0, 3, 5), (2, 3, 0), (0, 7, 0)], ids=str)
def test_shapes(cell, shape):
    ours, theirs = pair(cell, *shape[-2:])
    x, hx = arguments(cell, *shape)
    assert_close(run(ours, x, hx), run(theirs, x, hx))
    assert_close(run(ours, x), run(theirs, x))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"device": "meta"}], ids=str)
def test_construction(cell, options):
    ours, theirs = pair(cell, 3, 5, **options)
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    signatures = [
        [(p.name, p.default) for p in inspect.signature(type(m)).parameters.values()]
        for m in (ours, theirs)
    ]
    assert signatures[0] == signatures[1]
    assert ours.__constants__ == theirs.__constants__
    if not options.get("device"):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def bad_calls(cell: str, batch: int, inputs: int, hidden: int):
    def hx(*shape: int, other: tuple[int, ...] | None = None, **options):
        h = torch.zeros(shape, **options)
        return (h, torch.zeros(other or shape, **options)) if cell == "LSTM" else h

    x, h = torch.zeros(batch, inputs), torch.zeros(batch, hidden)
    yield "3-D input", (torch.zeros(batch, 2, inputs),)
    yield "0-D input", (torch.zeros(()),)
    yield "input size", (torch.zeros(batch, inputs + 1), hx(batch, hidden))
    yield "hidden size", (x, hx(batch, hidden - 1))
    yield "batch broadcast", (x, hx(1, hidden))
    yield "batch size", (x, hx(batch + 1, hidden))
    yield "unbatched hx", (x, hx(hidden))
    yield "3-D hx", (x, hx(1, batch, hidden))
    yield "batched hx for unbatched x", (x[0], hx(1, hidden))
    yield "3 states", (x, (h, h, h))
    yield "1 state", (x, (h,))
    yield "dtype of x", (x.double(), hx(batch, hidden))
    yield "dtype of hx", (x, hx(batch, hidden, dtype=torch.float64))
    if cell == "LSTM":
        yield "size of c", (x, hx(batch, hidden, other=(batch, hidden + 1)))
        yield "batch of c", (x, hx(batch, hidden, other=(1, hidden)))
        yield "tensor hx", (x, torch.zeros(2, batch, hidden))


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
def test_errors(cell, sizes):
    """torch's own type and text, whichever way the step would have run."""
    ours, theirs = pair(cell, *sizes[1:])
    for what, args in bad_calls(cell, *sizes):
        with pytest.raises(Exception) as expected:  # noqa: PT011
            theirs(*args)
        with pytest.raises(expected.type) as actual:
            ours(*args)
        assert str(actual.value) == str(expected.value), what


def test_unknown_nonlinearity():
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: swish"):
        fastrnn.RNNCell(3, 5, nonlinearity="swish")(torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64], ids=str)
def test_other_dtypes(cell, dtype, fused):
    if dtype.is_complex and cell == "RNN_RELU":
        pytest.skip("relu is not defined for complex numbers")
    ours, theirs = pair(cell, *LARGE[1:], dtype=dtype)
    x, hx = arguments(cell, *LARGE, dtype=dtype)
    actual, expected = run(ours, x, hx), run(theirs, x, hx)
    if cell == "RNN_RELU":  # where a sum is next to zero, rounding decides on the gradient
        actual, expected = ({"state": r["state 0"]} for r in (actual, expected))
    assert_close(actual, expected, 2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert not (fused and dtype.is_complex)


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
def test_autocast(cell, sizes):
    ours, theirs = pair(cell, *sizes[1:])
    x, hx = arguments(cell, *sizes)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual, expected = unpack(ours(x, hx)), unpack(theirs(x, hx))
    assert_close(dict(enumerate(actual)), dict(enumerate(expected)), 0)


def test_loop_is_the_layer(cell):
    """A cell stepped over a sequence, with gradients through time, is the layer."""
    steps, (batch, inputs, hidden) = 3, LARGE
    ours, _ = pair(cell, inputs, hidden, dtype=torch.float64)
    name = "LSTM" if cell == "LSTM" else "GRU" if cell == "GRU" else "RNN"
    layer = getattr(fastrnn, name)(inputs, hidden, **CELLS[cell][1], dtype=torch.float64)
    layer.load_state_dict({f"{k}_l0": v for k, v in ours.state_dict().items()})
    x, hx = torch.randn(steps, batch, inputs, dtype=torch.float64), None
    outputs = []
    for step in x:
        hx = ours(step, hx)
        outputs.append(unpack(hx)[0])
    torch.stack(outputs).square().sum().backward()
    layer(x)[0].square().sum().backward()
    for k, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, getattr(layer, f"{k}_l0").grad)


def test_copies(cell):
    ours, _ = pair(cell, *LARGE[1:])
    x, hx = arguments(cell, *LARGE)
    expected = run(ours, x, hx)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        assert_close(run(twin, x, hx), expected, 0)


def test_parametrized(cell):
    """A weight that is computed at each access is read once a step."""
    ours, theirs = pair(cell, *LARGE[1:])
    for model in (ours, theirs):
        torch.manual_seed(0)
        nn.utils.parametrizations.spectral_norm(model, "weight_hh")
    x, hx = arguments(cell, *LARGE)
    for _ in range(2):  # every access in training goes on with the power iteration
        assert_close(run(ours, x, hx), run(theirs, x, hx))
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), 0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # jvp's import, in torch
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (64, 3, 256)], ids=str)
def test_transforms(cell, shape):
    """vmap, vmap(grad), jvp and an ensemble, also where torch's own cells have no rule for it."""
    ours, _ = pair(cell, *shape[-2:], dtype=torch.float64)
    x, hx = arguments(cell, *shape, dtype=torch.float64)
    xs = torch.stack([x, -x, 2 * x])

    def loss(x):
        return unpack(ours(x, hx))[0].square().sum()

    close = torch.testing.assert_close
    close(vmap(ours)(xs), pack(tuple(map(torch.stack, zip(*(unpack(ours(x)) for x in xs))))))
    grads = [torch.autograd.grad(loss(x), x)[0] for x in xs.clone().requires_grad_().unbind()]
    close(vmap(grad(loss))(xs), torch.stack(grads))
    close(jvp(loss, (x,), (xs[1],))[1], (grads[0] * xs[1]).sum())

    members = {k: torch.stack([p, p / 2]).detach() for k, p in ours.named_parameters()}
    ensemble = vmap(lambda p: unpack(functional_call(ours, p, (x, hx)))[0])(members)
    for i, member in enumerate(ensemble):
        close(
            member, unpack(functional_call(ours, {k: p[i] for k, p in members.items()}, (x, hx)))[0]
        )


def test_compile_and_export(cell):
    """One graph for every batch size, on either side of the choice."""
    ours, _ = pair(cell, 3, 256)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager")
    x, hx = arguments(cell, 4, 3, 256)
    batch = {0: torch.export.Dim("batch", min=2, max=1000)}
    exported = torch.export.export(
        ours, (x, hx), dynamic_shapes=(batch, pack((batch,) * len(unpack(hx))))
    ).module()
    for rows in (4, 100):
        x, hx = arguments(cell, rows, 3, 256)
        for model in (compiled, exported):
            torch.testing.assert_close(model(x, hx), ours(x, hx))
