"""One recurrent layer as a torch.autograd.Function: the scan and the gradients of all its inputs.

Layout. Without batch_sizes the input is [T, B, I] and all rows live for T steps. With batch_sizes,
an int64 CPU tensor [T], it is [N, I] without padding, rows sorted longest first, as
PackedSequence.data. Sequences come out laid out as the input. `weights` are, direction by
direction, w_ih, w_hh, b_ih, b_hh, w_hr, as in torch.nn.RNNBase; biases and w_hr may be absent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from . import reference
from ._ops import (
    CELLS,
    _library,
    filled,
    is_plain,
    scan_backward,
    scan_backward_cpu,
    scan_forward,
    scan_forward_cpu,
)
from ._ragged import gather, mask_from_batch_sizes, scatter


class Spec(NamedTuple):
    """What of a layer is not a tensor to differentiate."""

    mode: str  # as torch.nn.RNNBase.mode
    directions: int
    batch: int  # B; rows without any step exist only here and in the states
    batch_sizes: Tensor | None  # or, if _ops.takes_mask, a bool mask [T, B]
    resets: Tensor | None  # bool, laid out as the input: True where a segment of a row begins
    reverse: bool = False  # the only direction runs from each row's last step to its first


def transforming() -> bool:
    """Whether torch.func or forward-mode AD is at work, which no tensor shows by requires_grad."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


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
    all_c: bool = False,
) -> tuple[Tensor, ...]:
    """The fused layer: output, h_n [D, B, P], c_n (LSTM), and with `keep` what backward reads.

    For an LSTM that begins with every c_t, which `all_c` asks for alone.
    """
    if c_0 is not None and not CELLS[spec.mode].has_cell_state:
        raise ValueError(f"c_0: expected None for {spec.mode}, which has no cell state")
    each = _split(weights, spec.directions)
    kinds = len(each[0])
    plain = not torch.compiler.is_compiling() and is_plain(x, h_0, c_0, *weights)
    scan: Callable[..., Any] = scan_forward_cpu if plain else scan_forward
    results = scan(
        spec.mode,
        x,
        [w[0] for w in each],
        [w[1] for w in each],
        [w[-1] for w in each] if kinds % 2 else [],
        [w[2] for w in each] if kinds > 3 else [],
        [w[3] for w in each] if kinds > 3 else [],
        h_0,
        c_0,
        spec.batch_sizes,
        spec.resets,
        spec.batch,
        spec.reverse,
        keep,
        all_c,
    )
    return filled(x, results) if keep and plain else results


def reference_layer(
    spec: Spec,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The same layer by its definition: output, h_n and, for an LSTM, c_n and every c_t.

    mask [T, B] may stand in for batch_sizes; x is [T, B, I] then.
    """
    each = _split(weights, spec.directions)
    index, resets = None, spec.resets
    if spec.batch_sizes is not None and spec.batch_sizes.dtype == torch.bool:
        mask = spec.batch_sizes
    elif spec.batch_sizes is not None:
        mask = mask_from_batch_sizes(spec.batch_sizes, spec.batch, x.device)
        index = mask.flatten().nonzero().squeeze(1)
        x = scatter(x, index, mask.numel()).view(*mask.shape, x.shape[-1])
        if resets is not None:
            resets = scatter(resets, index, mask.numel()).view(mask.shape)
    hidden = each[0][0].shape[0] // CELLS[spec.mode].gates
    if h_0 is None:
        h_0 = x.new_zeros(spec.directions, spec.batch, each[0][1].shape[1])
    states: tuple[Tensor, ...] = (h_0,)
    if CELLS[spec.mode].has_cell_state:
        if c_0 is None:
            c_0 = x.new_zeros(spec.directions, spec.batch, hidden)
        states = (h_0, c_0)
    output, final, cells = reference.layer(spec.mode, x, states, each, mask, resets, spec.reverse)
    sequences = [output] if cells is None else [output, cells]
    if index is not None:
        sequences = [gather(s.flatten(0, 1), index) for s in sequences]
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
    kinds = len(each[0])  # w_ih, w_hh, perhaps both biases, perhaps w_hr
    want_kind = [any(want_weights[i::kinds]) for i in range(kinds)]
    want_hr, want_bias = kinds % 2 == 1 and want_kind[-1], kinds > 3 and any(want_kind[2:4])
    plain = not torch.compiler.is_compiling() and is_plain(
        saved.x, saved.h_0, saved.c_0, *grads, *saved.weights
    )
    scan: Callable[..., tuple[Tensor, ...]] = scan_backward_cpu if plain else scan_backward
    d_x, d_h_0, d_c_0, d_ih, d_hh, d_hr, *d_biases = scan(
        spec.mode,
        saved.x,
        [w[0] for w in each],
        [w[1] for w in each],
        [w[-1] for w in each] if kinds % 2 else [],
        saved.h_0,
        saved.c_0,
        spec.batch_sizes,
        spec.resets,
        spec.batch,
        spec.reverse,
        saved.output,
        saved.extra,
        saved.gates,
        *grads,
        [want_x, want_h_0, want_c_0, *want_kind[:2], want_hr, want_bias],
    )
    d_kinds = [d_ih, d_hh, *(d_biases if kinds > 3 else []), d_hr]
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


def _vmap_by_loop(
    function: type[torch.autograd.Function], count: int, in_dims: Sequence[Any], args: Sequence[Any]
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """vmap of a function as `count` calls of its kernel."""
    runs = [
        function.apply(
            *(
                a.select(d, i).contiguous() if isinstance(d, int) else a
                for a, d in zip(args, in_dims)
            )
        )
        for i in range(count)
    ]
    outputs = tuple(None if each[0] is None else torch.stack(each) for each in zip(*runs))
    return outputs, tuple(None if output is None else 0 for output in outputs)


class LayerFunction(torch.autograd.Function):
    """One layer in all its directions as an autograd function.

    Twice differentiable, and made for torch.func: grad, vmap, jvp and what they compose to.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """apply(mode, directions, batch, batch_sizes, resets, reverse, x, h_0, c_0, *weights).

        Args:
            mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
            directions: D, 1 or 2; the second runs from each row's last step to its first.
            batch: B. Rows without any step exist in the states alone.
            batch_sizes: None, and all rows live for T steps; or an int64 CPU tensor [T], the rows
                alive at each step, not increasing, as in a PackedSequence.
            resets: None, or a bool tensor laid out as x without its features, True where a segment
                of a row begins.
            reverse: whether a single direction runs from each row's last step to its first.
            x: [T, B, I]; with batch_sizes [N, I] without padding, the rows of one step after the
                other, longest row first, as PackedSequence.data.
            h_0: [D, B, P], or None for zeros; P = H without a projection.
            c_0: [D, B, H] for an LSTM, or None.
            weights: direction by direction w_ih [G * H, I], w_hh [G * H, P], b_ih [G * H], b_hh
                [G * H] and w_hr [P, H], as in torch.nn.RNNBase; biases and w_hr may be absent.

        Returns:
            output: laid out as x, with D * P features.
            h_n: [D, B, P], after each row's last step.
            c_n: [D, B, H], for an LSTM, else empty.
            c: every c_t, laid out as output, with D * H features, for an LSTM; else nothing to use.
            gates: for backward alone.

        Raises:
            ValueError: if a tensor has another shape, dtype or device than these.
        """
        # torch's, without its look at the signature, which takes as long as a small step.
        if transforming() or torch.compiler.is_compiling():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, cls).apply(  # type: ignore[misc]
            *unwrap_dead_wrappers(args)
        )

    @staticmethod
    def forward(
        mode: str,
        directions: int,
        batch: int,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        spec = Spec(mode, directions, batch, batch_sizes, resets, reverse)
        with torch._C._AutoDispatchBelowAutograd():
            return layer_forward(spec, x, h_0, c_0, weights, keep=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        mode, directions, batch, batch_sizes, resets, reverse, x, h_0, c_0, *weights = inputs
        out, _, c_n, extra, gates = output
        ctx.set_materialize_grads(False)
        if CELLS[mode].has_cell_state:
            ctx.mark_non_differentiable(gates)
        else:
            ctx.mark_non_differentiable(c_n, extra, gates)
        ctx.mode, ctx.directions, ctx.batch, ctx.reverse = mode, directions, batch, reverse
        ctx.save_for_backward(batch_sizes, resets, x, h_0, c_0, out, extra, gates, *weights)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(batch_sizes, resets, x, h_0, c_0, *weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, resets, x, h_0, c_0, output, extra, gates, *weights = ctx.saved_tensors
        spec = Spec(ctx.mode, ctx.directions, ctx.batch, batch_sizes, resets, ctx.reverse)
        wanted = ctx.needs_input_grad[6:]
        # torch.compile brings zeros for outputs that have no gradient.
        grads = grads[:4] if CELLS[ctx.mode].has_cell_state else (*grads[:2], None, None)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or transforming():
            # As a Function of its own, so that backward can be differentiated again.
            d_inputs = LayerBackward.apply(  # type: ignore[no-untyped-call]
                *spec, wanted, output, extra, gates, *grads, x, h_0, c_0, *weights
            )
        else:
            saved = _Saved(x, h_0, c_0, output, extra, gates, weights)
            d_inputs = layer_backward(spec, saved, grads, wanted)
        return (*(None,) * 6, *d_inputs)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        mode, directions, batch, batch_sizes, resets, reverse, *tensors = args
        if batch_sizes is not None or any(dim is not None for dim in in_dims[9:]):
            return _vmap_by_loop(cls, info.batch_size, in_dims, args)
        # All share the weights: their rows run as one batch [..., V * B, features].
        samples = info.batch_size

        def fold(t: Tensor | None, dim: int | None) -> Tensor | None:
            if t is None:
                return None
            t = t.unsqueeze(1) if dim is None else t.movedim(dim, 1)
            return t.expand(-1, samples, *t.shape[2:]).flatten(1, 2)

        rows = [fold(t, dim) for t, dim in zip(tensors[:3], in_dims[6:9])]
        resets = fold(resets, in_dims[4])
        given = mode, directions, samples * batch, None, resets, reverse, *rows, *tensors[3:]
        *shown, gates = cls.apply(*given)
        outputs = [t if t.dim() == 1 else t.unflatten(1, (samples, batch)) for t in shown]
        if gates.dim() > 1:
            gates = (
                gates.unflatten(1, (len(shown[0]), samples, batch)).transpose(1, 2).flatten(2, 3)
            )
        outputs.append(gates)
        return tuple(outputs), tuple(None if t.dim() == 1 else 1 for t in outputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, resets, *tensors = ctx.saved_tensors
        spec = Spec(ctx.mode, ctx.directions, ctx.batch, batch_sizes, resets, ctx.reverse)
        given = [i for i, t in enumerate(tensors) if t is not None]

        def layer(*present: Tensor) -> tuple[Tensor, ...]:
            x, h_0, c_0, *weights = _place(given, present, len(tensors))
            return reference_layer(spec, x, h_0, c_0, weights)

        changes = _jvp(layer, given, tensors, tangents[6:])
        return (*changes, *(None,) * (5 - len(changes)))


def _place(given: Sequence[int], present: Sequence[Tensor], count: int) -> list[Any]:
    """`count` places, None but for the tensors present, which go to those given."""
    places = dict(zip(given, present))
    return [places.get(i) for i in range(count)]


def _jvp(
    function: Callable[..., tuple[Tensor, ...]],
    given: Sequence[int],
    tensors: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """The change of the function's values along the tangents, None standing for zero."""
    primals = tuple(t for t in tensors if t is not None)
    changes = (tangents[i] for i in given)
    full = tuple(torch.zeros_like(p) if c is None else c for p, c in zip(primals, changes))
    # By reverse mode twice: torch does not nest forward mode.
    values, vjp, *_ = torch.func.vjp(function, *primals)
    transposed = torch.func.vjp(vjp, tuple(torch.zeros_like(v) for v in values))[1]
    result: tuple[Tensor, ...] = transposed(full)[0]
    return result


class LayerBackward(torch.autograd.Function):
    """The gradient of LayerFunction; its own gradient is that of the definition."""

    @staticmethod
    def forward(
        mode: str,
        directions: int,
        batch: int,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
        wanted: Sequence[bool],
        output: Tensor,
        extra: Tensor,
        gates: Tensor,
        *tensors: Any,
    ) -> tuple[Tensor | None, ...]:
        grads, (x, h_0, c_0, *weights) = tensors[:4], tensors[4:]
        saved = _Saved(x, h_0, c_0, output, extra, gates, weights)
        spec = Spec(mode, directions, batch, batch_sizes, resets, reverse)
        return tuple(layer_backward(spec, saved, grads, wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        mode, directions, batch, batch_sizes, resets, reverse, ctx.wanted, *_ = inputs
        ctx.mode, ctx.directions, ctx.batch, ctx.reverse = mode, directions, batch, reverse
        ctx.save_for_backward(batch_sizes, resets, *inputs[10:])
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(batch_sizes, resets, *inputs[10:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def _definition(
        ctx: Any, asked: Sequence[bool]
    ) -> tuple[Callable[..., tuple[Tensor, ...]], list[int], list[Tensor | None]]:
        """The gradients asked for by the definition, and the tensors they are a function of."""
        batch_sizes, resets, *tensors = ctx.saved_tensors
        spec = Spec(ctx.mode, ctx.directions, ctx.batch, batch_sizes, resets, ctx.reverse)
        given = [i for i, t in enumerate(tensors) if t is not None]
        inputs = [i for i in given if i >= 4]

        def gradients(*values: Tensor) -> tuple[Tensor, ...]:
            full = _place(given, values, len(tensors))

            def layer(*present: Tensor) -> tuple[Tensor, ...]:
                x, h_0, c_0, *weights = _place(inputs, present, len(tensors))[4:]
                return reference_layer(spec, x, h_0, c_0, weights)

            outputs, vjp, *_ = torch.func.vjp(layer, *(full[i] for i in inputs))
            grads = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, full))
            results = _place(inputs, vjp(grads), len(tensors))[4:]
            return tuple(result for result, ask in zip(results, asked) if ask)

        return gradients, given, tensors

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Tensor | None, ...]:
        asked = [second is not None for second in seconds]
        gradients, given, tensors = LayerBackward._definition(ctx, asked)
        if not any(asked):
            return (None,) * (10 + len(tensors))
        vjp = torch.func.vjp(gradients, *(tensors[i] for i in given))[1]
        results = vjp(tuple(s for s in seconds if s is not None))
        return (None,) * 10 + tuple(_place(given, results, len(tensors)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap_by_loop(LayerBackward, info.batch_size, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, given, tensors = LayerBackward._definition(ctx, ctx.wanted)
        changes = _jvp(gradients, given, tensors, tangents[10:])
        asked = [i for i, wanted in enumerate(ctx.wanted) if wanted]
        return tuple(_place(asked, changes, len(ctx.wanted)))


class ElmanFunction(LayerFunction):
    """An Elman layer (torch.nn.RNN), modes "RNN_TANH" and "RNN_RELU"."""


class GRUFunction(LayerFunction):
    """A GRU layer (torch.nn.GRU), mode "GRU"."""


class LSTMFunction(LayerFunction):
    """An LSTM layer (torch.nn.LSTM), mode "LSTM"."""


FUNCTIONS: dict[str, type[LayerFunction]] = {
    "RNN_TANH": ElmanFunction,
    "RNN_RELU": ElmanFunction,
    "GRU": GRUFunction,
    "LSTM": LSTMFunction,
}


def _scan_forward_autograd(
    mode: str,
    x: Tensor,
    weight_ih: list[Tensor],
    weight_hh: list[Tensor],
    weight_hr: list[Tensor],
    bias_ih: list[Tensor],
    bias_hh: list[Tensor],
    h_0: Tensor | None,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    batch: int,
    reverse: bool,
    keep: bool,
    all_c: bool,
) -> tuple[Tensor, ...]:
    """The gradient of the bare operator, as compiled graphs and exported programs call it."""
    batch = x.shape[1] if batch_sizes is None else batch  # a trace knows only the number
    kinds = [w for w in (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr) if w]
    weights = [w for each in zip(*kinds) for w in each]
    spec = Spec(mode, len(weight_ih), batch, batch_sizes, resets, reverse)
    tensors = [x, *weights] + [s for s in (h_0, c_0) if s is not None]
    if transforming() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        results = FUNCTIONS[mode].apply(*spec, x, h_0, c_0, *weights)
        if keep:
            return results
        extra = results[3] if all_c else results[3].new_empty(0)
        return (*results[:3], extra, x.new_empty(0))
    with torch._C._AutoDispatchBelowAutograd():
        return filled(x, layer_forward(spec, x, h_0, c_0, weights, keep, all_c))


_library.impl("scan_forward", _scan_forward_autograd, "Autograd")
