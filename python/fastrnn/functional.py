"""Recurrent layers as functions of their weights, without a module.

`lstm`, `gru`, `rnn_tanh` and `rnn_relu` run the kernels of the modules. Use them if the weights are
not parameters of a module: if another network computes them, or if you keep them in a list.

All four are equivalent to this program in plain torch, with the `step` of their own description:

    import torch
    from torch.nn.functional import dropout as drop, linear

    def run(step, x, hx, weights, num_layers=1, bidirectional=False, dropout=0.0, mask=None):
        directions = 2 if bidirectional else 1
        each = len(weights) // (num_layers * directions)
        finals = []
        for k in range(num_layers):
            sequences = []
            for d in range(directions):
                i = k * directions + d
                own = weights[i * each : (i + 1) * each]
                state = tuple(s[i] for s in hx)
                outputs = [None] * len(x)
                for t in reversed(range(len(x))) if d == 1 else range(len(x)):
                    new = step(x[t], state, *own)
                    if mask is None:
                        state, outputs[t] = new, new[0]
                    else:
                        valid = mask[t][:, None]
                        state = tuple(torch.where(valid, n, s) for n, s in zip(new, state))
                        outputs[t] = torch.where(valid, new[0], 0)
                sequences.append(torch.stack(outputs))
                finals.append(state)
            x = torch.cat(sequences, -1)
            if k < num_layers - 1:
                x = drop(x, dropout)
        return x, tuple(torch.stack(s) for s in zip(*finals))

Shapes: T steps, B batch rows, I inputs, H hidden units, L layers, D directions (2 if bidirectional,
else 1), G gates, and P features of h, which is H without a projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ._backends import takes_mask
from ._functions import run_layers
from ._layer import CELLS, Layer
from ._ragged import (
    check_lengths,
    check_steps,
    from_mask,
    gather,
    is_per_sample,
    scatter,
    segment_starts,
)

__all__ = ["gru", "lstm", "rnn_relu", "rnn_tanh"]

Steps = Tensor | NDArray[Any]
Lengths = Steps | Sequence[int]

_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)


def lstm(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    checkpoint_every: int | None = None,
    lengths: Lengths | None = None,
    mask: Steps | None = None,
    reset: Steps | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A long short-term memory network, as fastrnn.LSTM computes it.

    Equivalent to `run` of fastrnn.functional with this step:

        def step(x, state, w_ih, w_hh, *others):
            h, c = state
            b_ih, b_hh = others[:2] if len(others) > 1 else (None, None)
            i, f, g, o = (linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            return linear(h, others[-1]) if len(others) % 2 else h, c  # with w_hr, projected

    Args:
        x: [T, B, I], or [B, T, I] with batch_first.
        hx: (h_0, c_0), [L * D, B, P] and [L * D, B, H]; None means zeros.
        weights: one layer after the other, and in a layer one direction after the other: w_ih
            [4 * H, I, or D * P after the first layer], w_hh [4 * H, P], b_ih [4 * H], b_hh [4 * H],
            w_hr [P, H]. Both biases may be absent, and so may w_hr; then P = H.
        num_layers: L.
        bidirectional: whether each layer has a second direction, from the last step to the first.
        batch_first: whether x and output are [B, T, features] instead of [T, B, features].
        dropout: probability of dropout on the output of every layer but the last.
        checkpoint_every: keep for backward only the output and the states between segments of so
            many steps, and compute the rest again.
        lengths: B integers, the numbers of valid steps, as in the forward of fastrnn.LSTM.
        mask: bool or integers, [T, B] or [B, T] as in x: which steps are valid.
        reset: as mask; which steps begin a new segment of their row.

    Returns:
        output: laid out as x, with D * P features.
        (h_n, c_n): the states after each row's last valid step, shaped like hx.

    Raises:
        ValueError: if an argument is of a wrong type, shape or range, or both lengths and mask are
            given.

    Examples:
        >>> import torch, fastrnn
        >>> w_ih, w_hh = torch.randn(4 * 16, 8), torch.randn(4 * 16, 16)
        >>> output, (h, c) = fastrnn.functional.lstm(torch.randn(5, 3, 8), None, [w_ih, w_hh])
        >>> output.shape, h.shape
        (torch.Size([5, 3, 16]), torch.Size([1, 3, 16]))
    """
    if hx is not None and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
        raise ValueError(f"hx: expected (h_0, c_0) or None, got {_shown(hx)}")
    layers = num_layers, bidirectional, batch_first, dropout, checkpoint_every
    output, (h_n, c_n) = _run("LSTM", x, hx, weights, layers, lengths, mask, reset)
    return output, (h_n, c_n)


def gru(
    x: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    checkpoint_every: int | None = None,
    lengths: Lengths | None = None,
    mask: Steps | None = None,
    reset: Steps | None = None,
) -> tuple[Tensor, Tensor]:
    """A gated recurrent unit network, as fastrnn.GRU computes it.

    Equivalent to `run` of fastrnn.functional with this step:

        def step(x, state, w_ih, w_hh, b_ih=None, b_hh=None):
            (h,) = state
            x_r, x_z, x_n = linear(x, w_ih, b_ih).chunk(3, -1)
            h_r, h_z, h_n = linear(h, w_hh, b_hh).chunk(3, -1)
            r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
            n = torch.tanh(x_n + r * h_n)
            return ((1 - z) * n + z * h,)

    Args:
        x: [T, B, I], or [B, T, I] with batch_first.
        hx: h_0, [L * D, B, H]; None means zeros.
        weights: one layer after the other, and in a layer one direction after the other: w_ih
            [3 * H, I, or D * H after the first layer], w_hh [3 * H, H], b_ih [3 * H], b_hh [3 * H].
            Both biases may be absent.
        num_layers: L.
        bidirectional: whether each layer has a second direction, from the last step to the first.
        batch_first: whether x and output are [B, T, features] instead of [T, B, features].
        dropout: probability of dropout on the output of every layer but the last.
        checkpoint_every: keep for backward only the output and the states between segments of so
            many steps, and compute the rest again.
        lengths: B integers, the numbers of valid steps, as in the forward of fastrnn.GRU.
        mask: bool or integers, [T, B] or [B, T] as in x: which steps are valid.
        reset: as mask; which steps begin a new segment of their row.

    Returns:
        output: laid out as x, with D * H features.
        h_n: the state after each row's last valid step, shaped like hx.

    Raises:
        ValueError: if an argument is of a wrong type, shape or range, or both lengths and mask are
            given.

    Examples:
        >>> import torch, fastrnn
        >>> rnn = torch.nn.GRU(8, 16, num_layers=2)
        >>> weights, x = list(rnn.parameters()), torch.randn(5, 3, 8)
        >>> output, h = fastrnn.functional.gru(x, None, weights, num_layers=2, lengths=[5, 0, 2])
        >>> output.shape, h.shape
        (torch.Size([5, 3, 16]), torch.Size([2, 3, 16]))
    """
    layers = num_layers, bidirectional, batch_first, dropout, checkpoint_every
    output, (h_n,) = _run("GRU", x, _single(hx), weights, layers, lengths, mask, reset)
    return output, h_n


def rnn_tanh(
    x: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    lengths: Lengths | None = None,
    mask: Steps | None = None,
    reset: Steps | None = None,
) -> tuple[Tensor, Tensor]:
    """An Elman network with tanh, as fastrnn.RNN computes it.

    Equivalent to `run` of fastrnn.functional with this step:

        def step(x, state, w_ih, w_hh, b_ih=None, b_hh=None):
            (h,) = state
            return (torch.tanh(linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)),)

    Args:
        x: [T, B, I], or [B, T, I] with batch_first.
        hx: h_0, [L * D, B, H]; None means zeros.
        weights: one layer after the other, and in a layer one direction after the other: w_ih
            [H, I, or D * H after the first layer], w_hh [H, H], b_ih [H], b_hh [H]. Both biases may
            be absent.
        num_layers: L.
        bidirectional: whether each layer has a second direction, from the last step to the first.
        batch_first: whether x and output are [B, T, features] instead of [T, B, features].
        dropout: probability of dropout on the output of every layer but the last.
        lengths: B integers, the numbers of valid steps, as in the forward of fastrnn.RNN.
        mask: bool or integers, [T, B] or [B, T] as in x: which steps are valid.
        reset: as mask; which steps begin a new segment of their row.

    Returns:
        output: laid out as x, with D * H features.
        h_n: the state after each row's last valid step, shaped like hx.

    Raises:
        ValueError: if an argument is of a wrong type, shape or range, or both lengths and mask are
            given.

    Examples:
        >>> import torch, fastrnn
        >>> weights = [torch.randn(16, 8), torch.randn(16, 16), torch.zeros(16), torch.zeros(16)]
        >>> output, h = fastrnn.functional.rnn_tanh(torch.randn(5, 3, 8), None, weights)
        >>> output.shape
        torch.Size([5, 3, 16])
    """
    layers = num_layers, bidirectional, batch_first, dropout, None
    output, (h_n,) = _run("RNN_TANH", x, _single(hx), weights, layers, lengths, mask, reset)
    return output, h_n


def rnn_relu(
    x: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    lengths: Lengths | None = None,
    mask: Steps | None = None,
    reset: Steps | None = None,
) -> tuple[Tensor, Tensor]:
    """An Elman network with relu: arguments, results and errors are those of rnn_tanh.

    Equivalent to `run` of fastrnn.functional with this step:

        def step(x, state, w_ih, w_hh, b_ih=None, b_hh=None):
            (h,) = state
            return (torch.relu(linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)),)

    Examples:
        >>> import torch, fastrnn
        >>> weights = [torch.randn(16, 8), torch.randn(16, 16) / 4]
        >>> output, h = fastrnn.functional.rnn_relu(torch.randn(5, 3, 8), None, weights)
        >>> bool((output >= 0).all())
        True
    """
    layers = num_layers, bidirectional, batch_first, dropout, None
    output, (h_n,) = _run("RNN_RELU", x, _single(hx), weights, layers, lengths, mask, reset)
    return output, h_n


# -- What they share -------------------------------------------------------------------------------


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def _single(hx: Tensor | None) -> tuple[Tensor] | None:
    return None if hx is None else (hx,)


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer above 0, got {value!r}")


def _check_weights(
    mode: str, features: int, weights: Sequence[Tensor], num_layers: int, directions: int
) -> tuple[int, int]:
    """P and H of weights that fit together; ValueError for any others."""
    count = num_layers * directions
    most, options = (5, "2 to 5") if mode == "LSTM" else (4, "2 or 4")
    each = len(weights) // count
    if len(weights) % count or not 2 <= each <= most or (mode != "LSTM" and each == 3):
        raise ValueError(
            f"weights: expected {options} tensors for each of {num_layers} layers in {directions} "
            f"directions, got {len(weights)} in all"
        )
    for i, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise ValueError(f"weights[{i}]: expected a tensor, got {type(weight).__name__}")
    gates = int(CELLS[mode].gates)
    rows = weights[0].shape[0] if weights[0].dim() else 0
    hidden = max(rows // gates, 1)
    proj = hidden if each % 2 == 0 else weights[each - 1].shape[0]
    shapes: list[tuple[int, ...]] = [(gates * hidden, features), (gates * hidden, proj)]
    if each >= 4:
        shapes += [(gates * hidden,)] * 2
    if each % 2:
        shapes.append((proj, hidden))
    names = ["w_ih", "w_hh", "b_ih", "b_hh"][: each - each % 2] + ["w_hr"] * (each % 2)
    for i, weight in enumerate(weights):
        place = i % each
        if i == directions * each:  # the layers after the first
            shapes[0] = (gates * hidden, directions * proj)
        if weight.shape != shapes[place]:
            raise ValueError(
                f"weights[{i}]: expected {names[place]} of shape {list(shapes[place])}, "
                f"got {list(weight.shape)}"
            )
    return proj, hidden


def _run(
    mode: str,
    x: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    layers: tuple[int, bool, bool, float, int | None],
    lengths: Lengths | None,
    mask: Steps | None,
    reset: Steps | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All layers: output and final states."""
    num_layers, bidirectional, batch_first, dropout, checkpoint_every = layers
    if not isinstance(x, Tensor) or x.dim() != 3:
        layout = "[B, T, I]" if batch_first else "[T, B, I]"
        raise ValueError(f"x: expected a tensor {layout}, got {_shown(x)}")
    _positive("num_layers", num_layers)
    if checkpoint_every is not None:
        _positive("checkpoint_every", checkpoint_every)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a number in [0, 1], got {dropout!r}")
    if lengths is not None and mask is not None:
        raise ValueError("lengths, mask: expected one of them, got both")
    steps, batch = x.shape[:2] if not batch_first else (x.shape[1], x.shape[0])
    if steps == 0:
        raise ValueError(f"x: expected at least one step, got {_shown(x)}")
    directions = 2 if bidirectional else 1
    sizes = _check_weights(mode, x.shape[2], weights, num_layers, directions)
    entries = num_layers * directions
    for i, (name, size) in enumerate(zip(("h_0", "c_0"), sizes)):
        if hx is not None and i < len(hx):
            expected = entries, batch, size
            if not isinstance(hx[i], Tensor) or hx[i].shape != expected:
                got = _shown(hx[i])
                raise ValueError(f"hx: expected {name} of shape {list(expected)}, got {got}")

    def by_step(name: str, given: object) -> Tensor:  # [T, B]
        marks = check_steps(name, given, x.shape[:2]).to(x.device)
        return marks.t() if batch_first else marks

    resets = None if reset is None else by_step("reset", reset)
    valid = None if mask is None else by_step("mask", mask)
    ends = None
    if lengths is not None:
        ends = check_lengths(lengths, batch, steps, x.device)
        valid = torch.arange(steps, device=x.device).unsqueeze(1) < ends

    states = None if hx is None else tuple(hx)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, *weights = (t.to(dtype) if t.dtype in _AUTOCAST else t for t in (x, *weights))
        states = None if states is None else tuple(s.to(dtype) for s in states)

    shape, batch_sizes, ragged = x.shape, None, None
    if valid is not None and not is_per_sample(valid):
        # Segments of steps are cut from packed rows, where no reset hides behind a masked step.
        in_kernel = takes_mask(x) and not (checkpoint_every and CELLS[mode].saves_gates)
        if resets is not None:
            resets = segment_starts(valid, resets)
        if in_kernel:
            batch_sizes, valid = valid, None
        else:
            ragged, valid = from_mask(valid, batch_first, ends), None
    if ragged is None:
        x = x.transpose(0, 1) if batch_first else x
    else:
        batch_sizes = ragged.batch_sizes
        x = gather(x.reshape(-1, shape[2]), ragged.rows)
        if resets is not None:
            resets = (resets.t() if batch_first else resets).flatten()[ragged.rows]
        if states is not None:
            states = tuple(s.index_select(1, ragged.sorted_indices) for s in states)

    every = (checkpoint_every or 0) if torch.is_grad_enabled() else 0
    h_0, c_0 = (None, None) if states is None else (*states, None)[:2]
    given = x, h_0, c_0, weights, batch_sizes, resets
    layer = Layer.plain(mode, directions, batch, *given, checkpoint_every=every)
    x, last = run_layers(layer, num_layers, dropout, valid)

    if ragged is None:
        return x.transpose(0, 1) if batch_first else x, last
    x = scatter(x, ragged.rows, steps * batch).view(*shape[:2], -1)
    return x, tuple(s.index_select(1, ragged.unsorted_indices) for s in last)
