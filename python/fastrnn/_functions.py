"""One recurrent layer as a torch.autograd.Function: the scan and the gradients of all its inputs.

Layout. Without batch_sizes the input is [T, B, I] and all rows live for T steps. With batch_sizes,
an int64 CPU tensor [T], it is [N, I] without padding, rows sorted longest first, as
PackedSequence.data. Sequences come out laid out as the input. `weights` are, direction by
direction, w_ih, w_hh, b_ih, b_hh, or only w_ih, w_hh, as in torch.nn.RNNBase.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._ops import CELLS, scan_backward, scan_forward
from ._ragged import gather, mask_from_batch_sizes, scatter


class Spec(NamedTuple):
    """What of a layer is not a tensor to differentiate."""

    mode: str  # as torch.nn.RNNBase.mode
    directions: int
    batch: int  # B; rows without any step exist only here and in the states
    batch_sizes: Tensor | None


def _split(weights: Sequence[Tensor], directions: int) -> list[Sequence[Tensor]]:
    each = len(weights) // directions
    return [weights[i : i + each] for i in range(0, len(weights), each)]


def layer_forward(
    spec: Spec,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    keep: bool,
) -> tuple[Tensor, ...]:
    """The fused layer: output, h_n [D, B, H], c_n (LSTM), and with `keep` what backward reads."""
    each = _split(weights, spec.directions)
    has_bias = len(each[0]) > 2
    results: tuple[Tensor, ...] = scan_forward(
        spec.mode,
        x,
        [w[0] for w in each],
        [w[1] for w in each],
        [w[2] for w in each] if has_bias else [],
        [w[3] for w in each] if has_bias else [],
        h_0,
        c_0,
        spec.batch_sizes,
        spec.batch,
        keep,
    )
    return results


def reference_layer(
    spec: Spec,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The same layer by its definition: output, h_n and, for an LSTM, c_n and every c_t."""
    each = _split(weights, spec.directions)
    mask = None
    if spec.batch_sizes is not None:
        mask = mask_from_batch_sizes(spec.batch_sizes, spec.batch, x.device)
        index = mask.flatten().nonzero().squeeze(1)
        x = scatter(x, index, mask.numel()).view(*mask.shape, x.shape[-1])
    hidden = each[0][0].shape[0] // CELLS[spec.mode].gates
    if h_0 is None:
        h_0 = x.new_zeros(spec.directions, spec.batch, each[0][1].shape[1])
    states: tuple[Tensor, ...] = (h_0,)
    if CELLS[spec.mode].has_cell_state:
        if c_0 is None:
            c_0 = x.new_zeros(spec.directions, spec.batch, hidden)
        states = (h_0, c_0)
    output, final, cells = reference.layer(spec.mode, x, states, each, mask)
    sequences = [output] if cells is None else [output, cells]
    if mask is not None:
        sequences = [gather(s.reshape(mask.numel(), -1), index) for s in sequences]
    return (sequences[0], *final, *sequences[1:])


class _Saved(NamedTuple):
    """What forward leaves for backward."""

    x: Tensor
    h_0: Tensor | None
    c_0: Tensor | None
    output: Tensor
    extra: Tensor
    gates: Tensor
    weights: Sequence[Tensor]


def layer_backward(
    spec: Spec, saved: _Saved, grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x, h_0, c_0 and the weights, None where not wanted.

    `grads` are those of output, h_n, c_n and every c_t; None means zero.
    """
    want_x, want_h_0, want_c_0, *want_weights = wanted
    each = _split(saved.weights, spec.directions)
    kinds = len(each[0])  # w_ih, w_hh and perhaps both biases
    want_kind = [any(want_weights[i::kinds]) for i in range(kinds)]
    d_x, d_h_0, d_c_0, *d_kinds = scan_backward(
        spec.mode,
        saved.x,
        [w[0] for w in each],
        [w[1] for w in each],
        saved.h_0,
        saved.c_0,
        spec.batch_sizes,
        spec.batch,
        saved.output,
        saved.extra,
        saved.gates,
        *grads,
        [want_x, want_h_0, want_c_0, *want_kind[:2], any(want_kind[2:])],
    )
    d_weights = [
        d_kinds[i][d] if want_weights[d * kinds + i] else None
        for d in range(spec.directions)
        for i in range(kinds)
    ]
    if want_x:
        d_x = d_x[0] if spec.directions == 1 else d_x.sum(0)
    return [
        d_x if want_x else None,
        d_h_0 if want_h_0 else None,
        d_c_0 if want_c_0 else None,
        *d_weights,
    ]


class LayerFunction(torch.autograd.Function):
    """apply(mode, directions, batch, batch_sizes, x, h_0, c_0, *weights).

    h_0 [D, B, H] and, for an LSTM, c_0 [D, B, H] may be None for zeros. Returns output, laid out as
    x with D*H features, h_n [D, B, H], c_n [D, B, H] and every c_t, laid out as output (these two
    only for an LSTM), and a last tensor for backward alone.
    """

    @staticmethod
    def forward(
        mode: str,
        directions: int,
        batch: int,
        batch_sizes: Tensor | None,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        spec = Spec(mode, directions, batch, batch_sizes)
        return layer_forward(spec, x, h_0, c_0, weights, keep=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        mode, directions, batch, batch_sizes, x, h_0, c_0, *weights = inputs
        out, _, c_n, extra, gates = output
        ctx.set_materialize_grads(False)
        if CELLS[mode].has_cell_state:
            ctx.mark_non_differentiable(gates)
        else:
            ctx.mark_non_differentiable(c_n, extra, gates)
        ctx.mode, ctx.directions, ctx.batch = mode, directions, batch
        ctx.save_for_backward(batch_sizes, x, h_0, c_0, out, extra, gates, *weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, x, h_0, c_0, output, extra, gates, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        spec = (ctx.mode, ctx.directions, ctx.batch, batch_sizes)
        # As a Function of its own, so that backward can be differentiated again.
        d_inputs = LayerBackward.apply(  # type: ignore[no-untyped-call]
            *spec, wanted, output, extra, gates, *grads[:4], x, h_0, c_0, *weights
        )
        return (None, None, None, None, *d_inputs)


class LayerBackward(torch.autograd.Function):
    """The gradient of LayerFunction; its own gradient is that of the definition."""

    @staticmethod
    def forward(
        mode: str,
        directions: int,
        batch: int,
        batch_sizes: Tensor | None,
        wanted: Sequence[bool],
        output: Tensor,
        extra: Tensor,
        gates: Tensor,
        *tensors: Any,
    ) -> tuple[Tensor | None, ...]:
        grads, (x, h_0, c_0, *weights) = tensors[:4], tensors[4:]
        saved = _Saved(x, h_0, c_0, output, extra, gates, weights)
        spec = Spec(mode, directions, batch, batch_sizes)
        return tuple(layer_backward(spec, saved, grads, wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        mode, directions, batch, batch_sizes, *_ = inputs
        ctx.spec = mode, directions, batch
        ctx.count = len(inputs)
        ctx.save_for_backward(batch_sizes, *inputs[8:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(second is None for second in seconds):
            return (None,) * ctx.count
        batch_sizes, *tensors = ctx.saved_tensors
        mode, directions, batch = ctx.spec
        spec = Spec(mode, directions, batch, batch_sizes)
        given = [i for i, t in enumerate(tensors) if t is not None]

        def first_order(*values: Tensor) -> tuple[Tensor, ...]:
            """The gradients that forward computed, of those inputs whose own gradients came."""
            full = dict(zip(given, values))
            inputs = [i for i in given if i >= 4]

            def layer(*present: Tensor) -> tuple[Tensor, ...]:
                place = dict(zip(inputs, present))
                weights = [place[i] for i in inputs if i > 6]
                return reference_layer(spec, place[4], place.get(5), place.get(6), weights)

            outputs, vjp, *_ = torch.func.vjp(layer, *(full[i] for i in inputs))
            grads = tuple(full.get(i, torch.zeros_like(o)) for i, o in enumerate(outputs))
            gradients = dict(zip(inputs, vjp(grads)))
            return tuple(gradients[4 + i] for i, s in enumerate(seconds) if s is not None)

        vjp = torch.func.vjp(first_order, *(tensors[i] for i in given))[1]
        results = dict(zip(given, vjp(tuple(s for s in seconds if s is not None))))
        before = ctx.count - len(tensors)
        return (None,) * before + tuple(results.get(i) for i in range(len(tensors)))


class ElmanFunction(LayerFunction):
    __doc__ = "An Elman layer (torch.nn.RNN), modes RNN_TANH and RNN_RELU.\n\n" + str(
        LayerFunction.__doc__
    )


class GRUFunction(LayerFunction):
    __doc__ = "A GRU layer (torch.nn.GRU), mode GRU.\n\n" + str(LayerFunction.__doc__)


class LSTMFunction(LayerFunction):
    __doc__ = "An LSTM layer (torch.nn.LSTM), mode LSTM.\n\n" + str(LayerFunction.__doc__)


FUNCTIONS: dict[str, type[LayerFunction]] = {
    "RNN_TANH": ElmanFunction,
    "RNN_RELU": ElmanFunction,
    "GRU": GRUFunction,
    "LSTM": LSTMFunction,
}
