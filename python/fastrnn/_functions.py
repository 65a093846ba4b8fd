"""One recurrent layer as a torch.autograd.Function: projection GEMM, scan, and their gradients.

Layout. Without batch_sizes the input is [T, B, I] and all rows live for T steps. With batch_sizes, an
int64 CPU tensor [T], it is [N, I] without padding, rows sorted longest first, as PackedSequence.data.
Sequences come out laid out as the input. `weights` are, direction by direction, w_ih, w_hh, b_ih, b_hh,
or only w_ih, w_hh, as in torch.nn.RNNBase.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _gemm, reference
from ._ops import CELLS, scan_backward, scan_forward
from ._ragged import gather, last_rows, mask_from_batch_sizes, previous_rows, scatter

Result = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]


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
) -> Result:
    """The fused layer: output, h_n [D, B, H], c_n (LSTM), extra and the gates that backward reads.

    Without `keep`, extra is empty and the gates are not to be used.
    """
    each = _split(weights, spec.directions)
    steps = len(x) if spec.batch_sizes is None else len(spec.batch_sizes)
    rows = x.reshape(-1, x.shape[-1])
    gates = [_gemm.linear(rows, w[0], w[2] if len(w) > 2 else None) for w in each]
    output, h_n, c_n, extra = scan_forward(
        spec.mode,
        gates,
        [w[1] for w in each],
        [w[3] for w in each if len(w) > 2],
        h_0,
        c_0,
        spec.batch_sizes,
        steps,
        spec.batch,
        keep,
    )
    shape = (*x.shape[:-1], output.shape[-1])
    return output.view(shape), h_n, c_n, extra.view(shape) if extra.numel() else extra, gates


def reference_layer(
    spec: Spec,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The same layer by its definition: output, h_n and, for an LSTM, c_n and every c_t."""
    each = _split(weights, spec.directions)
    mask = index = None
    if spec.batch_sizes is not None:
        mask = mask_from_batch_sizes(spec.batch_sizes, spec.batch, x.device)
        index = mask.flatten().nonzero().squeeze(1)
        x = scatter(x, index, mask.numel()).view(*mask.shape, x.shape[-1])
    hidden = each[0][0].shape[0] // CELLS[spec.mode].gates
    if h_0 is None:
        h_0 = x.new_zeros(spec.directions, spec.batch, each[0][1].shape[1])
    states = (h_0,)
    if CELLS[spec.mode].has_cell_state:
        if c_0 is None:
            c_0 = x.new_zeros(spec.directions, spec.batch, hidden)
        states = (h_0, c_0)
    output, final, cells = reference.layer(spec.mode, x, states, each, mask)
    sequences = [output] if cells is None else [output, cells]
    if index is not None:
        sequences = [gather(s.reshape(mask.numel(), -1), index) for s in sequences]
    return (sequences[0], *final, *sequences[1:])


class _Saved(NamedTuple):
    """What forward leaves for backward."""

    x: Tensor
    h_0: Tensor | None
    c_0: Tensor | None
    output: Tensor
    extra: Tensor
    gates: Sequence[Tensor]
    weights: Sequence[Tensor]


def _recurrent_gradient(
    spec: Spec, direction: int, d_gates: Tensor, output: Tensor, h_0: Tensor | None, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of w_hh [G*H, H] and b_hh from d_gates [N, G*H] and output [N, H], of one direction."""
    if spec.batch_sizes is not None:
        first = int(spec.batch_sizes[0]) if len(spec.batch_sizes) else 0
        h_prev = torch.zeros_like(output, memory_format=torch.contiguous_format)
        if first:
            early = previous_rows(spec.batch_sizes)
            if direction == 0:
                torch.index_select(output, 0, early, out=h_prev[first:])
                starts = torch.arange(first)
            else:
                h_prev[early] = output[first:]
                starts = last_rows(spec.batch_sizes)
            if h_0 is not None:
                h_prev[starts] = h_0[:first]
        return _gemm.grad_weight(d_gates, h_prev, bias)
    # All rows live for all steps: h_{t-1} is the output, shifted by one step.
    batch = spec.batch
    if direction == 0:
        late, early, start = d_gates[batch:], output[: len(output) - batch], d_gates[:batch]
    else:
        cut = max(len(output) - batch, 0)
        late, early, start = d_gates[:cut], output[batch:], d_gates[cut:]
    d_weight, _ = _gemm.grad_weight(late, early, False)
    if h_0 is not None:
        d_weight = d_weight.addmm(start.t(), h_0)
    return d_weight, d_gates.sum(0) if bias else None


def layer_backward(
    spec: Spec,
    saved: _Saved,
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    d_extra: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, h_0, c_0 and the weights; None where not wanted."""
    want_x, want_h_0, want_c_0, *want_weights = wanted
    each = _split(saved.weights, spec.directions)
    steps = len(saved.x) if spec.batch_sizes is None else len(spec.batch_sizes)
    features = saved.output.shape[-1]

    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None or not t.numel() else t.reshape(-1, t.shape[-1])

    x, output = saved.x.reshape(-1, saved.x.shape[-1]), saved.output.reshape(-1, features)
    d_gates, d_gates_hh, d_h_0, d_c_0 = scan_backward(
        spec.mode,
        list(saved.gates),
        [w[1] for w in each],
        saved.h_0,
        saved.c_0,
        output,
        saved.extra.reshape(-1, features),
        spec.batch_sizes,
        steps,
        spec.batch,
        rows(d_output),
        d_h_n,
        d_c_n,
        rows(d_extra),
        want_h_0,
        want_c_0,
    )
    splits = CELLS[spec.mode].splits_gradient
    hidden = features // spec.directions
    d_x = None
    d_weights: list[Tensor | None] = []
    for d, w in enumerate(each):
        grad = d_gates[d]
        grad_hh = d_gates_hh[d] if splits else grad
        wants = want_weights[d * len(w) : (d + 1) * len(w)]
        if want_x:
            part = _gemm.grad_input(grad, w[0])
            d_x = part if d_x is None else d_x.add_(part)
        bias = len(w) > 2
        d_w_ih = d_w_hh = d_b_ih = d_b_hh = None
        if wants[0]:
            d_w_ih, d_b_ih = _gemm.grad_weight(grad, x, bias)
        elif bias:
            d_b_ih = grad.sum(0)
        if wants[1]:
            h_0 = None if saved.h_0 is None else saved.h_0[d]
            out = output[:, d * hidden : (d + 1) * hidden]
            d_w_hh, d_b_hh = _recurrent_gradient(spec, d, grad_hh, out, h_0, bias and splits)
        if bias and d_b_hh is None:
            assert d_b_ih is not None
            d_b_hh = grad_hh.sum(0) if splits else d_b_ih.clone()
        d_weights += [d_w_ih, d_w_hh, d_b_ih, d_b_hh][: len(w)]
    return [
        None if d_x is None else d_x.view(saved.x.shape),
        d_h_0 if want_h_0 else None,
        d_c_0 if want_c_0 else None,
        *d_weights,
    ]


class LayerFunction(torch.autograd.Function):
    """apply(mode, directions, batch, batch_sizes, x, h_0, c_0, *weights).

    h_0 [D, B, H] and, for an LSTM, c_0 [D, B, H] may be None for zeros. Returns output, laid out as x
    with D*H features, h_n [D, B, H], c_n [D, B, H] and every c_t, laid out as output (the last two only
    for an LSTM, else empty); what follows in the tuple is for backward.
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
        *results, gates = layer_forward(spec, x, h_0, c_0, weights, keep=True)
        return (*results, *gates)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        mode, directions, batch, batch_sizes, x, h_0, c_0, *weights = inputs
        out, _, c_n, extra, *gates = output
        ctx.set_materialize_grads(False)
        if CELLS[mode].has_cell_state:
            ctx.mark_non_differentiable(*gates)
        else:
            ctx.mark_non_differentiable(c_n, extra, *gates)
        ctx.mode, ctx.directions, ctx.batch = mode, directions, batch
        ctx.save_for_backward(batch_sizes, x, h_0, c_0, out, extra, *gates, *weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, x, h_0, c_0, output, extra, *rest = ctx.saved_tensors
        d = ctx.directions
        wanted = ctx.needs_input_grad[4:]
        arguments = (ctx.mode, d, ctx.batch, batch_sizes, wanted, output, extra, *rest[:d])
        # As a Function of its own, so that backward can be differentiated again.
        d_inputs = LayerBackward.apply(*arguments, *grads[:4], x, h_0, c_0, *rest[d:])
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
        *tensors: Any,
    ) -> tuple[Tensor | None, ...]:
        gates, grads = tensors[:directions], tensors[directions : directions + 4]
        x, h_0, c_0, *weights = tensors[directions + 4 :]
        saved = _Saved(x, h_0, c_0, output, extra, gates, weights)
        spec = Spec(mode, directions, batch, batch_sizes)
        return tuple(layer_backward(spec, saved, *grads, wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        mode, directions, batch, batch_sizes, wanted, _, _, *tensors = inputs
        ctx.spec = mode, directions, batch
        ctx.wanted = wanted
        ctx.count = len(inputs)
        ctx.save_for_backward(batch_sizes, *tensors[directions:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, *tensors = ctx.saved_tensors
        spec = Spec(*ctx.spec, batch_sizes)
        given = [i for i, t in enumerate(tensors) if t is not None]

        def first_order(*values: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = [None] * len(tensors)
            for i, value in zip(given, values):
                full[i] = value
            d_output, d_h_n, d_c_n, d_extra, *inputs = full

            def layer(*present: Tensor) -> tuple[Tensor, ...]:
                place = iter(present)
                x, h_0, c_0, *weights = (None if t is None else next(place) for t in inputs)
                return reference_layer(spec, x, h_0, c_0, weights)

            outputs, vjp = torch.func.vjp(layer, *(t for t in inputs if t is not None))
            has_cells = CELLS[spec.mode].has_cell_state
            grads = (d_output, d_h_n, d_c_n, d_extra) if has_cells else (d_output, d_h_n)
            gradients = iter(
                vjp(tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grads)))
            )
            all_gradients = (None if t is None else next(gradients) for t in inputs)
            return tuple(
                g for g, second in zip(all_gradients, seconds) if second is not None
            )

        _, vjp = torch.func.vjp(first_order, *(tensors[i] for i in given))
        results = vjp(tuple(s for s in seconds if s is not None))
        full: list[Tensor | None] = [None] * ctx.count
        for i, result in zip(given, results):
            full[ctx.count - len(tensors) + i] = result
        return tuple(full)


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
