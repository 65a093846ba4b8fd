"""The reference implementation of every layer, in plain torch.

It defines what fastrnn computes. It is slow, obvious and differentiable by autograd, on any device
and in any dtype. The kernels are tested against it, and whatever has no kernel runs on it.

Shapes: T steps, B batch rows, I input size, H hidden size, D directions, L layers, G gates of the
cell. With a projection (LSTM only) h has P features and c has H; without one P = H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

__all__ = ["Norms", "Options", "elman_cell", "gru_cell", "layer", "lstm_cell", "rnn", "scan"]

State = tuple[Tensor, ...]  # (h,) or (h, c)


class Options(NamedTuple):
    """What a layer does beside running its cell; each field off by default.

    Attributes:
        grad_scale: [T, B], by which what flows back from a step to the one before it, through all
            states, is multiplied. The first step's is that of the initial states.
        grad_clip: the largest magnitude, elementwise, that flows back so, after grad_scale.
        h_mask: [D, B, P], which multiplies the h that W_hh multiplies.
        zoneout: the probabilities (of h, of the other states) that a unit keeps its state.
        seed: int64 [1], from which zoneout draws; None: the expectation.
        layer_norm: whether W_ih x and W_hh h are normalised, each over all gates and units, and
            the c that an LSTM's output reads over all units. The weights of a direction then end
            with gains [G * H] of the former two and, of an LSTM, gain and bias [H] of c; those of a
            user's own cell have the gains before its learned vectors.
    """

    grad_scale: Tensor | None = None
    grad_clip: float = inf
    h_mask: Tensor | None = None
    zoneout: tuple[float, float] = (0.0, 0.0)
    seed: Tensor | None = None
    layer_norm: bool = False


class Norms(NamedTuple):
    """The learned vectors of layer normalisation (Ba et al., arXiv:1607.06450) of one direction.

    Attributes:
        ih: [G * H], the gain of W_ih x.
        hh: [G * H], the gain of W_hh h.
        c: [H], the gain of the c that an LSTM's output reads.
        bias_c: [H], its bias.
    """

    ih: Tensor
    hh: Tensor
    c: Tensor | None = None
    bias_c: Tensor | None = None


def _normalise(x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    return layer_norm(x, x.shape[-1:], gain, bias, 1e-5)


def products(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    norms: Norms | None,
) -> tuple[Tensor, Tensor]:
    """What goes into the gates: W_ih x + b_ih and W_hh h + b_hh."""
    if norms is None:
        return linear(x, w_ih, b_ih), linear(h, w_hh, b_hh)
    return _normalise(linear(x, w_ih), norms.ih, b_ih), _normalise(linear(h, w_hh), norms.hh, b_hh)


def elman_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
    *,
    masked: Tensor | None = None,
    norms: Norms | None = None,
) -> Tensor:
    """One step of an Elman cell, as torch.nn.RNNCell: x [B, I], h [B, H] -> h' [B, H].

    Of this cell and all others, masked [B, H] is what w_hh multiplies, h if not given; with norms,
    the products are normalised.
    """
    f = {"tanh": torch.tanh, "relu": torch.relu}[nonlinearity]
    own, recurrent = products(x, h if masked is None else masked, w_ih, w_hh, b_ih, b_hh, norms)
    return f(own + recurrent)


def gru_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    masked: Tensor | None = None,
    norms: Norms | None = None,
) -> Tensor:
    """One step of a GRU cell, as torch.nn.GRUCell: x [B, I], h [B, H] -> h' [B, H]."""
    own, recurrent = products(x, h if masked is None else masked, w_ih, w_hh, b_ih, b_hh, norms)
    (x_r, x_z, x_n), (h_r, h_z, h_n) = own.chunk(3, -1), recurrent.chunk(3, -1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return n + z * (h - n)


def lstm_cell(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    masked: Tensor | None = None,
    norms: Norms | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM cell, as torch.nn.LSTMCell: x [B, I], h [B, P], c [B, H] -> h', c'.

    w_hr [P, H] projects h' (Sak et al., arXiv:1402.1128).
    """
    h, c = state
    h = h if masked is None else masked
    own, recurrent = products(x, h, w_ih, w_hh, b_ih, b_hh, norms)
    i, f, g, o = (own + recurrent).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    read = c if norms is None else _normalise(c, norms.c, norms.bias_c)
    h = torch.sigmoid(o) * torch.tanh(read)
    return (h if w_hr is None else linear(h, w_hr)), c


class _Cell(NamedTuple):
    """A step of a cell, from x, the state and w_ih, w_hh, b_ih, b_hh and, if projected, w_hr."""

    gates: int  # G
    states: int  # 1, h; or 2, h and c
    step: Callable[..., State]
    # One of the user's own: the step takes the weights as they come, and inputs by that name.
    is_general: bool = False


def _of_h(cell: Callable[..., Tensor]) -> Callable[..., State]:
    """The step of a cell whose state is h alone."""
    return lambda x, state, *weights, **options: (cell(x, state[0], *weights, **options),)


_CELLS = {
    "LSTM": _Cell(4, 2, lstm_cell),
    "GRU": _Cell(3, 1, _of_h(gru_cell)),
    "RNN_TANH": _Cell(1, 1, _of_h(partial(elman_cell, nonlinearity="tanh"))),
    "RNN_RELU": _Cell(1, 1, _of_h(partial(elman_cell, nonlinearity="relu"))),
}


def add_cell(mode: str, gates: int, states: int, step: Callable[..., State]) -> None:
    """Makes a cell of the user's own known by its step(x, state, *weights, inputs, masked,
    layer_norm)."""
    _CELLS[mode] = _Cell(gates, states, step, True)


def _arguments(weights: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The weights of a direction as a cell takes them: biases and projection may be absent."""
    biases = weights[2:4] if len(weights) >= 4 else (None, None)
    return (*weights[:2], *biases, *weights[-1:]) if len(weights) % 2 else (*weights[:2], *biases)


class _Edge(torch.autograd.Function):
    """A state that enters a step, as it is; its gradient goes back scaled and clamped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(state: Tensor, scale: Tensor | None, limit: float) -> Tensor:
        return state.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, scale, ctx.limit = inputs
        ctx.save_for_backward(scale)
        ctx.save_for_forward(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        if scale is not None:
            grad = torch.where(scale == 0, 0, grad * scale)
        return grad.clamp(-ctx.limit, ctx.limit) if ctx.limit < inf else grad, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (scale,) = ctx.saved_tensors
        return tangent if scale is None else torch.where(scale == 0, 0, tangent * scale)


# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
_PHILOX_MULTIPLIERS, _PHILOX_WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Four random words of 32 bits for a counter of four and a key of two, all in int64."""
    c = tuple(word & _WORD for word in counter)
    k = tuple(word & _WORD for word in key)
    for _ in range(10):
        products = [word * m for word, m in zip((c[0], c[2]), _PHILOX_MULTIPLIERS)]  # wrap around
        high, low = ([p >> 32 & _WORD for p in products], [p & _WORD for p in products])
        c = (high[1] ^ c[1] ^ k[0], low[1], high[0] ^ c[3] ^ k[1], low[0])
        k = tuple(word + step & _WORD for word, step in zip(k, _PHILOX_WEYL))
    return c


def kept(
    seed: Tensor, probability: float, direction: int, step: int, state: int, shape: Sequence[int]
) -> Tensor:
    """bool [B, H]: the units whose state zoneout keeps in a step; state 0 is h, 1 all others.

    Unit 64 g + 16 w + l takes the w-th word of the counter (16 g + l, row, step, direction + 2
    state), and the key is the seed: so it depends on nothing but the place of the unit.
    """
    rows, units = shape
    device = seed.device
    lane = torch.arange((units + 63) // 64 * 16, device=device)
    row = torch.arange(rows, device=device).unsqueeze(1)
    seed = seed.reshape(())
    last = torch.full((), direction + 2 * state, dtype=torch.int64, device=device)
    first = torch.full((), step, dtype=torch.int64, device=device)
    words = philox((lane, row, first, last), (seed, seed >> 32))
    each = [w.expand(rows, len(lane)).unflatten(1, (-1, 16)) for w in words]
    word = torch.stack(each, 2).flatten(1)[:, :units]
    return word < int(probability * 2**32)


def _zone_out(after: State, before: State, options: Options, d: int, t: int) -> State:
    """The states after a step, of which zoneout keeps some as they were."""
    p_h, p_c = options.zoneout
    mixed = []
    for k, (new, old) in enumerate(zip(after, before)):
        p = p_c if k else p_h
        if not p:
            mixed.append(new)
        elif options.seed is None:
            mixed.append(p * old + (1 - p) * new)
        else:
            keeps = kept(options.seed, p, d, t, min(k, 1), new.shape)
            mixed.append(torch.where(keeps, old, new))
    return tuple(mixed)


def scan(
    mode: str,
    x: Tensor,
    state: State,
    weights: Sequence[Tensor],
    mask: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    inputs: Tensor | None = None,
    options: Options | None = None,
    direction: int = 0,
) -> tuple[State, State]:
    """A cell over all steps of x [T, B, I], from the last to the first if `reverse`.

    A step that mask [T, B] marks False leaves the state as it is and outputs zeros. A step that
    reset [T, B] marks True begins a new segment: the scan enters it, or in reverse the segment
    before it, with a zero state. On a masked step, a reset counts for the row's next valid one.
    inputs [T, B, Z * H] are those of a user's own cell that no weight multiplies. direction: which
    one of the layer's this is.
    Returns the states of every step, each [T, B, P or H], and the final state, each [B, P or H].
    """
    options = options or Options()
    steps = range(len(x) - 1, -1, -1) if reverse else range(len(x))
    cell = _CELLS[mode]
    more: dict[str, Any] = {}
    if options.layer_norm and cell.is_general:
        more["layer_norm"] = True
    elif options.layer_norm:
        count = 2 * cell.states
        weights, more["norms"] = weights[:-count], Norms(*weights[-count:])
    arguments = tuple(weights) if cell.is_general else _arguments(weights)
    outputs: list[State] = [()] * len(x)
    everywhere = x.new_ones(x.shape[1], dtype=torch.bool)
    between = begun = ~everywhere  # rows at a boundary; rows that have had a valid step
    for t in steps:
        if reset is not None:
            valid = everywhere if mask is None else mask[t]
            if not reverse:
                between = between | reset[t]
            state = tuple(torch.where((between & valid).unsqueeze(-1), 0, s) for s in state)
            between, begun = between & ~valid, begun | valid
            if reverse:
                between = (between | reset[t]) & begun
        entering = state
        if options.grad_scale is not None or options.grad_clip < inf:
            scale = None if options.grad_scale is None else options.grad_scale[t].unsqueeze(-1)
            entering = tuple(_Edge.apply(s, scale, options.grad_clip) for s in state)  # type: ignore[no-untyped-call]
        if cell.is_general:
            more["inputs"] = None if inputs is None else inputs[t]
        if options.h_mask is not None:
            more["masked"] = entering[0] * options.h_mask[direction]
        after = cell.step(x[t], entering, *arguments, **more)
        if any(options.zoneout):
            after = _zone_out(after, entering, options, direction, t)
        if mask is None:
            state = outputs[t] = after
        else:
            valid = mask[t].unsqueeze(-1)
            state = tuple(torch.where(valid, new, before) for new, before in zip(after, state))
            outputs[t] = tuple(torch.where(valid, new, 0) for new in after)
    if not outputs:
        return tuple(s.new_zeros(0, *s.shape) for s in state), state
    return tuple(torch.stack(s) for s in zip(*outputs)), state


def layer(
    mode: str,
    x: Tensor,
    states: State,
    weights: Sequence[Sequence[Tensor]],
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    inputs: Tensor | None = None,
    options: Options | None = None,
) -> tuple[Tensor, State, Tensor | None]:
    """One layer in all its directions: forward and reverse, or a single one, which `reverse` turns.

    x [T, B, I]; mask and reset [T, B] as in `scan`; states h_0 [D, B, P] and, for an LSTM, c_0
    [D, B, H]; weights one sequence per direction. Returns output [T, B, D * P], the final states
    like `states`, and all c_t [T, B, D * H] (LSTM) or None. A user's own cell may have more states,
    all c_t are then [T, B, D * C * H], and inputs [T, B, D * Z * H].
    """
    if mask is not None:
        # A where() alone would let NaN through: its gradient is 0 * NaN.
        x = torch.where(mask.unsqueeze(-1), x, 0)
        inputs = None if inputs is None else torch.where(mask.unsqueeze(-1), inputs, 0)
    by_direction = [None] * len(weights) if inputs is None else inputs.chunk(len(weights), -1)
    runs = [
        scan(mode, x, tuple(s[d] for s in states), w, mask, d == 1 or reverse, reset, z, options, d)
        for d, (w, z) in enumerate(zip(weights, by_direction))
    ]
    output = torch.cat([outputs[0] for outputs, _ in runs], -1)
    others = [s for outputs, _ in runs for s in outputs[1:]]
    final = tuple(torch.stack(s) for s in zip(*(state for _, state in runs)))
    return output, final, torch.cat(others, -1) if others else None


def rnn(
    mode: str,
    x: Tensor,
    hx: Tensor | tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
    """A whole torch.nn.LSTM, GRU or RNN without dropout.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        x: [T, B, I].
        hx: h_0 [L * D, B, P], for an LSTM the pair (h_0, c_0 [L * D, B, H]); None means zeros.
        weights: as in torch.nn.RNNBase: layer by layer, direction by direction w_ih, w_hh, b_ih,
            b_hh, w_hr, where biases and projection may be absent.
        mask: bool [T, B], True where a step is valid.
        reset: bool [T, B], True where a step begins a new segment of its row.

    Returns:
        output [T, B, D * P] and the final states, shaped like hx.
    """
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    groups = [weights[i : i + each] for i in range(0, len(weights), each)]
    if hx is None:
        cell, (rows, proj) = _CELLS[mode], groups[0][1].shape
        sizes = (proj, rows // cell.gates)[: cell.states]
        states: State = tuple(x.new_zeros(len(groups), x.shape[1], size) for size in sizes)
    else:
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    finals = []
    for k in range(0, len(groups), directions):
        own = slice(k, k + directions)
        x, final, _ = layer(mode, x, tuple(s[own] for s in states), groups[own], mask, reset)
        finals.append(final)
    last = tuple(torch.cat(s) for s in zip(*finals))
    return x, (last[0], last[1]) if len(last) > 1 else last[0]
