"""What the tests share: cells, model pairs, masks, and one forward and backward as named tensors.

A new cell or dtype is one line in CELLS or TOLERANCE.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn import _backends

# mode -> class name in fastrnn and torch.nn, constructor options, autograd.Function
CELLS = {
    "LSTM": ("LSTM", {}, fastrnn.LSTMFunction),
    "GRU": ("GRU", {}, fastrnn.GRUFunction),
    "RNN_TANH": ("RNN", {"nonlinearity": "tanh"}, fastrnn.ElmanFunction),
    "RNN_RELU": ("RNN", {"nonlinearity": "relu"}, fastrnn.ElmanFunction),
}
# dtypes with kernels -> largest error allowed, relative to the largest entry (or to 1)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
MASKS = ["lengths", "left", "holes"]

State = Tensor | tuple[Tensor, ...] | None


def seeded(seed: int = 0) -> torch.Generator:
    """A generator on the device where tensors are made."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def make(library, cell: str, *sizes: int, **options) -> nn.RNNBase:
    """The model for `cell` from `library` (fastrnn or torch.nn); the seed is set first."""
    name, extra, _ = CELLS[cell]
    torch.manual_seed(0)
    return getattr(library, name)(*sizes, **extra, **options)


def pair(cell: str, *sizes: int, **options) -> tuple[nn.RNNBase, nn.RNNBase]:
    """A fastrnn model and the original torch.nn model with the same weights."""
    ours, theirs = make(fastrnn, cell, *sizes, **options), make(nn, cell, *sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(model: nn.RNNBase, T: int, B: int, *, hx: bool = True, seed: int = 0):
    """A random input in the model's layout and dtype and, if asked for, an initial state."""
    generator = seeded(seed)
    entries = model.num_layers * (2 if model.bidirectional else 1)

    def randn(*shape: int) -> Tensor:  # drawn in float32, so that every dtype sees the same values
        return torch.randn(shape, generator=generator).to(model.weight_ih_l0.dtype)

    x = randn(*((B, T) if model.batch_first else (T, B)), model.input_size)
    sizes = [model.proj_size or model.hidden_size]
    sizes += [model.hidden_size] if model.mode == "LSTM" else []
    states = tuple(randn(entries, B, size) for size in sizes)
    return x, pack(states) if hx else None


def make_mask(kind: str, T: int, B: int, seed: int = 0) -> Tensor:
    """A bool [T, B] mask with a row of no real step if B > 1, and a full row if B > 2."""
    generator = seeded(seed)
    if kind == "holes":
        mask = torch.rand(T, B, generator=generator) < 0.6
    else:
        mask = from_lengths(torch.randint(1, T + 1, (B,), generator=generator), T)
    mask[:, 1:2] = False
    mask[:, 2:3] = True
    return mask.flip(0) if kind == "left" else mask


def from_lengths(lengths: Tensor | list[int], T: int) -> Tensor:
    return torch.arange(T)[:, None] < torch.as_tensor(lengths)


def unpack(hx: State) -> tuple[Tensor, ...]:
    return () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)


def pack(states: tuple[Tensor, ...]) -> State:
    return states if len(states) > 1 else states[0] if states else None


def run(
    model: nn.RNNBase, x: Tensor, hx: State = None, *, forward: Callable | None = None, **options
) -> dict[str, Tensor]:
    """Outputs and all gradients of one forward and backward, by name.

    `forward` stands in for the model's own; every call gets the same incoming gradients.
    """
    x = x.detach().requires_grad_()
    states = tuple(h.detach().requires_grad_() for h in unpack(hx))
    output, h_n = (forward or model)(x, pack(states), **options)
    results = dict(zip(("output", "h_n", "c_n"), (output, *unpack(h_n)), strict=False))

    generator = seeded(1)
    incoming = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in results.values()]
    wanted = {"input": x, **dict(zip(("h_0", "c_0"), states, strict=False))}
    wanted |= dict(model.named_parameters())
    grads = torch.autograd.grad(tuple(results.values()), tuple(wanted.values()), incoming)
    results |= {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | None = None
) -> None:
    """Every tensor agrees in shape, dtype and value; NaN agrees with nothing."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        if want.numel():
            error = ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()
            bound = TOLERANCE[want.dtype] if tolerance is None else tolerance
            assert error <= bound, f"{name}: error {error:.2e} > {bound:.0e}"


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert torch.equal(actual[name], want), f"{name}: not the same bits"


def row_by_row(model: nn.RNNBase) -> Callable:
    """What a mask means: each row run alone by `model`, on its real steps only."""

    def forward(x: Tensor, hx: State, *, mask: Tensor):
        entries = model.num_layers * (2 if model.bidirectional else 1)
        count = 1 + (model.mode == "LSTM")
        states = unpack(hx) or (x.new_zeros(entries, x.size(1), model.hidden_size),) * count
        outputs, finals = [], []
        for row, real in enumerate(mask.T):
            last = tuple(h[:, row] for h in states)
            output = x.new_zeros(x.size(0), model.hidden_size * (1 + model.bidirectional))
            if real.any():
                steps, h_n = model(x[real, row], pack(last))
                output = output.index_put((real.nonzero()[:, 0],), steps)
                last = unpack(h_n)
            outputs.append(output)
            finals.append(last)
        return torch.stack(outputs, 1), pack(
            tuple(torch.stack(f, 1) for f in zip(*finals, strict=True))
        )

    return forward


class Wrapped(_backends.Backend):
    """A backend with something around its two passes, which every call of a layer then takes."""

    def __init__(
        self,
        inner: _backends.Backend,
        forward: Callable | None = None,
        backward: Callable | None = None,
    ) -> None:
        self.inner = inner
        self._forward, self._backward = forward, backward
        self.takes_mask = inner.takes_mask
        self.runs_options = inner.runs_options
        self.layers = []  # of the calls of forward

    def forward(self, layer):
        self.layers.append(layer)
        results = self.inner.forward(layer)
        return self._forward(results) if self._forward else results

    def backward(self, layer, saved):
        gradients = self.inner.backward(layer, saved)
        return self._backward(gradients) if self._backward else gradients


@contextmanager
def wrapped(forward: Callable | None = None, backward: Callable | None = None) -> Iterator[Wrapped]:
    """The CPU's layers run on a Wrapped backend inside `with`."""
    inner = _backends.backend("cpu")
    _backends.register("cpu", wrapper := Wrapped(inner, forward, backward))
    yield wrapper
    _backends.register("cpu", inner)
