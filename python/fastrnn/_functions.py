"""One layer as a torch.autograd.Function: the scan and the gradients of all its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backends import backend, has_kernel, runs_cell, runs_options
from ._layer import CELLS, CONSTANTS, LEAST_STACK_STEPS, Layer, Results, Saved, replaced
from ._operators import (
    Call,
    filled,
    inspect,
    library,
    scan_backward,
    scan_forward,
    scan_packed,
    with_batch,
)
from ._packed import stored
from ._ragged import gather, mask_from_batch_sizes, scatter
from ._torch import (
    below_autograd,
    bind_apply,
    by_sample,
    has_forward_ad,
    is_batched,
    is_tracing,
    is_transforming,
    unwrap_dead_wrappers,
)


def reference_layer(layer: Layer, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """The layer by the reference implementation: output, h_n and, for an LSTM, c_n and every c_t.

    mask [T, B] may stand in for batch_sizes; x is [T, B, I] then.
    """
    # torch 2.6 cannot compile the properties of a NamedTuple.
    mode, directions, batch, reverse, _, _, _, clip, p_h, p_c, norm, x, *tensors, weights = layer
    h_0, c_0, sizes, resets, grad_scale, h_mask, seed, inputs = tensors
    each, hidden = len(weights) // directions, weights[0].shape[0] // CELLS[mode].gates
    proj = weights[1].shape[1] if CELLS[mode].recurrent else hidden
    groups = [weights[i : i + each] for i in range(0, len(weights), each)]
    index = None
    if sizes is not None and sizes.dtype == torch.bool:
        mask = sizes
    elif sizes is not None:
        mask = mask_from_batch_sizes(sizes, batch, x.device)
        index = mask.flatten().nonzero().squeeze(1)
        x = scatter(x, index, mask.numel()).view(*mask.shape, x.shape[-1])
        if inputs is not None:
            inputs = scatter(inputs, index, mask.numel()).view(*mask.shape, inputs.shape[-1])
        if resets is not None:
            resets = scatter(resets, index, mask.numel()).view(mask.shape)
        if grad_scale is not None:
            grad_scale = scatter(grad_scale, index, mask.numel()).view(mask.shape)
    if h_0 is None:
        h_0 = x.new_zeros(directions, batch, proj)
    states: tuple[Tensor, ...] = (h_0,)
    if CELLS[mode].has_cell_state:
        if c_0 is None:
            c_0 = x.new_zeros(directions, batch, CELLS[mode].states * hidden)
        states = (h_0, *c_0.split(hidden, -1))
    options = reference.Options(grad_scale, clip or inf, h_mask, (p_h, p_c), seed, norm)
    output, final, cells = reference.layer(
        mode, x, states, groups, mask, resets, reverse, inputs, options
    )
    if len(final) > 2:
        final = (final[0], torch.cat(final[1:], -1))
    sequences = [output] if cells is None else [output, cells]
    if index is not None:
        sequences = [gather(s.flatten(0, 1), index) for s in sequences]
    return (sequences[0], *final, *sequences[1:])


def _vmap_by_loop(
    function: Callable[..., Any], count: int, in_dims: Sequence[Any], args: Sequence[Any]
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """vmap of a function as `count` calls of its kernel."""
    runs = [
        function(
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

    It is twice differentiable, and supports grad, vmap, jvp of torch.func and their combinations.
    Its arguments inside are layer.options, one tuple, and layer.tensors.
    """

    modes: tuple[str, ...] = tuple(CELLS)

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """apply(mode, directions, batch, batch_sizes, resets, reverse, x, h_0, c_0, *weights).

        Args:
            mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU", if the class supports it.
            directions: D, 1 or 2; the second runs from each row's last step to its first.
            batch: B. Rows without any step have states only.
            batch_sizes: None, if all rows have T steps; or an int64 CPU tensor [T], the number of
                rows that have each step, not increasing, as in a PackedSequence.
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
            c: every c_t, laid out as output, with D * H features, for an LSTM; else meaningless.
            gates: for backward only.

        Raises:
            ValueError: if the class does not support the mode, or a tensor is missing or has a
                wrong shape, dtype or device.

        Examples:
            >>> import torch, fastrnn
            >>> weights = [torch.randn(3 * 16, 8), torch.randn(3 * 16, 16)]
            >>> x, batch_sizes = torch.randn(7, 8), torch.tensor([3, 2, 2])  # 3, 3 and 1 steps
            >>> output, h_n, *_ = fastrnn.GRUFunction.apply(
            ...     "GRU", 1, 3, batch_sizes, None, False, x, None, None, *weights
            ... )
            >>> output.shape, h_n.shape
            (torch.Size([7, 16]), torch.Size([1, 3, 16]))
        """
        if isinstance(args[0], tuple):  # by torch.func, with the arguments of forward
            return cls._apply(*args)
        mode, directions, batch, batch_sizes, resets, reverse, x, h_0, c_0, *weights = args
        if mode not in cls.modes:
            raise ValueError(f"mode: expected {' or '.join(cls.modes)}, got {mode!r}")
        options = {"reverse": reverse, "keep": True, "all_c": True}
        layer = Layer.plain(
            mode, directions, batch, x, h_0, c_0, weights, batch_sizes, resets, **options
        )
        for name, tensor in (("x", x), *((f"weights[{i}]", w) for i, w in enumerate(weights))):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        return cls.run(layer)

    @classmethod
    def run(cls, layer: Layer) -> tuple[Tensor, ...]:
        """The results of the layer, differentiable."""
        return cls._apply(layer.options, *layer.tensors)

    @classmethod
    def _apply(cls, *args: Any) -> tuple[Tensor, ...]:
        if is_transforming() or torch.compiler.is_compiling():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return bind_apply(cls)(*unwrap_dead_wrappers(args))

    @staticmethod
    def forward(options: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        layer = Layer.of(options, tensors)
        with below_autograd():
            return tuple(filled(layer.x, scan_forward(layer)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.options, *tensors = inputs
        results = Results._make(output)
        ctx.set_materialize_grads(False)
        constant = [results.saved]
        if not CELLS[ctx.options[0]].has_cell_state:
            constant += [results.c_n, results.extra]
        ctx.mark_non_differentiable(*constant)
        ctx.save_for_backward(results.output, results.extra, results.saved, *tensors)
        if has_forward_ad():
            ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        output, extra, saved, *tensors = ctx.saved_tensors
        # torch.compile brings zeros for outputs that have no gradient.
        has_cells = CELLS[ctx.options[0]].has_cell_state
        gives_cells = has_cells and extra.dim() > 1
        grads = grads[:4] if gives_cells else (*grads[: 2 + has_cells], None, None)
        needed = ctx.needs_input_grad[1:]
        wanted = _differentiated(needed)
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() or compiling or is_transforming() or is_batched(grads):
            given = output, extra, saved, *grads[:4]
            gradients = LayerBackward.run(ctx.options, wanted, *given, *tensors)
        else:
            layer = Layer.of(ctx.options, tensors)
            given = Saved._make((output, extra, saved, *grads[:4], wanted))
            gradients = scan_backward(layer, given)
        return _by_input(gradients)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        layer = Layer.of(args[0], args[1:])
        dims: Any = Layer.of(args[0], in_dims[1:])
        # Zoneout draws by the place of a row, which is another in a batch of all samples.
        by_loop = layer.batch_sizes is not None or layer.seed is not None
        if by_loop or any(dim is not None for dim in dims.weights):
            return _vmap_by_loop(cls._apply, info.batch_size, in_dims, args)
        # All share the weights: their rows run as one batch [..., V * B, features].
        samples, batch = info.batch_size, layer.batch

        def fold(t: Tensor | None, dim: int | None) -> Tensor | None:
            if t is None:
                return None
            t = t.unsqueeze(1) if dim is None else t.movedim(dim, 1)
            return t.expand(-1, samples, *t.shape[2:]).flatten(1, 2)

        x = fold(layer.x, dims.x)
        assert x is not None
        folded = layer._replace(
            batch=samples * batch,
            x=x,
            h_0=fold(layer.h_0, dims.h_0),
            c_0=fold(layer.c_0, dims.c_0),
            resets=fold(layer.resets, dims.resets),
            grad_scale=fold(layer.grad_scale, dims.grad_scale),
            h_mask=fold(layer.h_mask, dims.h_mask),
            inputs=fold(layer.inputs, dims.inputs),
        )
        *results, saved = cls.run(folded)
        outputs = [t if t.dim() == 1 else t.unflatten(1, (samples, batch)) for t in results]
        if saved.dim() > 1:  # the gates, [D, T * V * B, G * H]
            saved = saved.unflatten(1, (len(x), samples, batch)).transpose(1, 2).flatten(2, 3)
        outputs.append(saved)
        return tuple(outputs), tuple(None if t.dim() == 1 else 1 for t in outputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        given = [i for i in _differentiable(tensors) if tensors[i] is not None]

        def function(*present: Tensor) -> tuple[Tensor, ...]:
            return reference_layer(Layer.of(ctx.options, _place(given, present, tensors)))

        changes = _jvp(function, given, tensors, tangents[1:])
        return (*changes, *(None,) * (5 - len(changes)))


def _differentiable(tensors: Sequence[Any]) -> list[int]:
    """The places of x, h_0, c_0, inputs and the weights among layer.tensors."""
    return [i for i in range(len(tensors)) if i not in CONSTANTS]


def _differentiated(of_tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Of what there is for each of layer.tensors, that of x, h_0, c_0, inputs and the weights."""
    return *of_tensors[: CONSTANTS.start], *of_tensors[CONSTANTS.stop :]


def _by_input(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of x, h_0, c_0, inputs and each weight, as those of options and layer.tensors."""
    start = CONSTANTS.start
    return None, *gradients[:start], *(None,) * len(CONSTANTS), *gradients[start:]


def _place(given: Sequence[int], present: Sequence[Tensor], others: Sequence[Any]) -> list[Any]:
    """`others`, with the tensors present at the places given."""
    places = list(others)
    for i, tensor in zip(given, present):
        places[i] = tensor
    return places


def _jvp(
    function: Callable[..., tuple[Tensor, ...]],
    given: Sequence[int],
    tensors: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """The change of the function's values along the tangents, None standing for zero."""
    primals = tuple(t for i in given if (t := tensors[i]) is not None)
    changes = (tangents[i] for i in given)
    full = tuple(torch.zeros_like(p) if c is None else c for p, c in zip(primals, changes))
    # By reverse mode twice: torch does not nest forward mode.
    values, vjp, *_ = torch.func.vjp(function, *primals)
    transposed = torch.func.vjp(vjp, tuple(torch.zeros_like(v) for v in values))[1]
    result: tuple[Tensor, ...] = transposed(full)[0]
    return result


class LayerBackward(torch.autograd.Function):
    """The gradient of LayerFunction; its own gradient is that of the reference implementation.

    Its arguments are layer.options, which gradients are wanted, output, extra and saved, four
    incoming gradients, and layer.tensors.
    """

    @classmethod
    def run(
        cls, options: tuple[Any, ...], wanted: Sequence[bool], *tensors: Any
    ) -> Sequence[Tensor | None]:
        """The gradients, so that they can be differentiated again."""

        def function(*tensors: Any) -> tuple[Tensor | None, ...]:
            return cls.apply(options, wanted, *tensors)  # type: ignore[no-untyped-call]

        if not torch.compiler.is_compiling() and is_batched(tensors):
            return by_sample(function, tensors)
        return function(*tensors)

    @staticmethod
    def forward(
        options: tuple[Any, ...], wanted: Sequence[bool], *tensors: Any
    ) -> tuple[Tensor | None, ...]:
        layer = Layer.of(options, tensors[7:])
        return tuple(scan_backward(layer, Saved._make((*tensors[:7], wanted))))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options, ctx.wanted, *_ = inputs
        ctx.save_for_backward(*inputs[5:])
        if has_forward_ad():
            ctx.save_for_forward(*inputs[5:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def _by_reference(
        ctx: Any, asked: Sequence[bool]
    ) -> tuple[Callable[..., tuple[Tensor, ...]], list[int], list[Any]]:
        """The gradients asked for by the reference implementation, as a function of the tensors at
        some places; these places; all tensors."""
        tensors = list(ctx.saved_tensors)
        if Layer.of(ctx.options, tensors[4:]).grad_clip:
            # It would depend on which parts of a gradient flow together, as a clamp is not linear.
            raise RuntimeError(
                "grad_clip: expected None where gradients are differentiated again, as those that "
                "were clipped have no derivative"
            )
        inputs = [4 + i for i in _differentiable(tensors[4:])]
        given = [i for i in (*range(4), *inputs) if tensors[i] is not None]

        def gradients(*values: Tensor) -> tuple[Tensor, ...]:
            full = _place(given, values, tensors)
            present = [i for i in inputs if full[i] is not None]

            def function(*values: Tensor) -> tuple[Tensor, ...]:
                return reference_layer(Layer.of(ctx.options, _place(present, values, full)[4:]))

            outputs, vjp, *_ = torch.func.vjp(function, *(full[i] for i in present))
            grads = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, full))
            results = dict(zip(present, vjp(grads)))
            return tuple(results[i] for i, ask in zip(inputs, asked) if ask)

        return gradients, given, tensors

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Tensor | None, ...]:
        asked = [second is not None for second in seconds]
        gradients, given, tensors = LayerBackward._by_reference(ctx, asked)
        none: list[Any] = [None] * len(tensors)
        if any(asked):
            vjp = torch.func.vjp(gradients, *(tensors[i] for i in given))[1]
            none = _place(given, vjp(tuple(s for s in seconds if s is not None)), none)
        return (None,) * 5 + tuple(none)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap_by_loop(LayerBackward.apply, info.batch_size, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, given, tensors = LayerBackward._by_reference(ctx, ctx.wanted)
        changes = _jvp(gradients, given, tensors, tangents[5:])
        asked = [i for i, wanted in enumerate(ctx.wanted) if wanted]
        return tuple(_place(asked, changes, [None] * len(ctx.wanted)))


class ElmanFunction(LayerFunction):
    """An Elman layer (torch.nn.RNN), modes "RNN_TANH" and "RNN_RELU"."""

    modes = ("RNN_TANH", "RNN_RELU")


class GRUFunction(LayerFunction):
    """A GRU layer (torch.nn.GRU), mode "GRU"."""

    modes = ("GRU",)


class LSTMFunction(LayerFunction):
    """An LSTM layer (torch.nn.LSTM), mode "LSTM"."""

    modes = ("LSTM",)


FUNCTIONS = {m: f for f in (ElmanFunction, GRUFunction, LSTMFunction) for m in f.modes}


class FusedLayer(torch.autograd.Function):
    """LayerFunction for plain tensors: what a training step pays for, and no more.

    It returns output, h_n, and of cells with a cell state c_n and, if asked for, every c_t. Made
    for eager calls that nothing watches (see _operators.inspect); a backward that is watched, or
    that is to be differentiated again, takes LayerBackward.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        return backend("cpu").record(ctx, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = None if is_batched(grads) else backend("cpu").replay(ctx, *grads)
        if gradients is not None:
            return gradients
        *saved, tensors = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        wanted = _differentiated(ctx.needs_input_grad[1:])
        given = *filled(tensors[0], *saved), *grads, *(None,) * (4 - len(grads))
        return _by_input(LayerBackward.run(ctx.options, wanted, *given, *tensors))


# One per cell, for its name in the graph. The bound method spares a look at the signature.
FUSED = {
    mode: bind_apply(type(f"Fused{function.__name__}", (FusedLayer,), {}))
    for mode, function in FUNCTIONS.items()
}


class FusedStack(torch.autograd.Function):
    """FusedLayer of several layers in one direction, which run side by side.

    Its arguments are the number of layers, the options and tensors of a stack's record, and between
    the two dropout: see Backend.forward_stack.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        return backend("cpu").record_stack(ctx, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = None if is_batched(grads) else backend("cpu").replay_stack(ctx, *grads)
        return _through_each_layer(ctx, grads) if gradients is None else gradients


FUSED_STACK = bind_apply(FusedStack)


def _through_each_layer(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of a FusedStack, differentiable, by running its layers again."""
    create_graph = torch.is_grad_enabled()
    layers, options = ctx.options
    _, _, _, *needed = ctx.needs_input_grad
    first = 3 * layers  # output, extra and saved of each layer come before
    dropout, *given = ctx.saved_tensors[first : first + 1 + len(needed)]
    with torch.enable_grad():
        # Aliases: one input may depend on another one, or be the same tensor.
        tensors = [t.view_as(t) if need else t for t, need in zip(given, needed)]
        stack = Layer.of(options, tensors)
        x, outputs, finals, others = stack.x, [], [], []
        for k in range(layers):
            output, final, cells = run_layer(_layer_of(stack, layers, k, x))
            outputs.append(output)
            finals.append(final)
            others.append(cells)
            x = output if dropout is None or k + 1 == layers else output * dropout[k]
        results = [x, *map(torch.cat, zip(*finals))]
        if stack.all_c:
            results += [*outputs[:-1], *(t for t in others if t is not None)]
        used = [(result, grad) for result, grad in zip(results, grads) if grad is not None]
        gradients = torch.autograd.grad(
            [result for result, _ in used],
            [t for t, need in zip(tensors, needed) if need],
            [grad for _, grad in used],
            create_graph=create_graph,
            materialize_grads=True,
        )
    found = iter(gradients)
    return None, None, None, *(next(found) if need else None for need in needed)


def _layer_of(stack: Layer, layers: int, k: int, x: Tensor) -> Layer:
    """The k-th layer of a stack, on x."""
    each, directions = len(stack.weights) // layers, stack.directions
    part = slice(k * directions, (k + 1) * directions)
    h_0, c_0 = [None if s is None else s[part] for s in (stack.h_0, stack.c_0)]
    weights = tuple(stack.weights[k * each : (k + 1) * each])
    return replaced(stack, x=x, h_0=h_0, c_0=c_0, weights=weights, keep=False)


def run_layers(
    stack: Layer, layers: int, dropout: float, mask: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Layers with dropout between them, side by side where that should be faster: output and final
    states of all. mask: as in run_layer."""
    drop = torch.nn.functional.dropout
    x, finals = stack.x, []
    if mask is None and may_run_side_by_side(x, stack.batch_sizes, layers):
        kind = runs_side_by_side(stack, layers)
        if kind:
            factors = None
            if dropout:
                factors = dropout_factors(stack, layers, lambda y: drop(y, dropout, inplace=True))
            output, states, _ = run_stack(kind, stack, layers, factors)
            return output, states
    for k in range(layers):
        x, final, _ = run_layer(_layer_of(stack, layers, k, x), mask)
        finals.append(final)
        if dropout and k + 1 < layers:
            x = drop(x, dropout)
    return x, tuple(torch.cat(s) for s in zip(*finals))


def dropout_factors(stack: Layer, layers: int, drop: Callable[[Tensor], Tensor]) -> Tensor:
    """What dropout, which works in place, multiplies the output of each layer but the last by."""
    factors = stack.x.new_ones(layers - 1, *stack.x.shape[:-1], stack.proj)
    for between in factors:
        drop(between)
    return factors


def may_run_side_by_side(x: Tensor, batch_sizes: Tensor | None, layers: int) -> bool:
    """Whether runs_side_by_side() is worth a record of all layers."""
    if layers < 2 or torch.compiler.is_compiling() or is_tracing():
        return False
    return (x if batch_sizes is None else batch_sizes).shape[0] >= LEAST_STACK_STEPS


def runs_side_by_side(stack: Layer, layers: int) -> Call:
    """What the call of run_stack() is, if that runs these layers and should be faster than
    run_layer() of each; else Call.WATCHED."""
    options = stack.checkpoint_every, stack.layer_norm, stack.zoneout_h, stack.zoneout_c
    others = stack.inputs, stack.h_mask, stack.seed
    if stack.directions > 1 or stack.reverse or stack.cell.states > 1:
        return Call.WATCHED
    if any(options) or any(t is not None for t in others):
        return Call.WATCHED
    kind = inspect(stack) if stack.x.is_cpu and runs_cell(stack.mode, stack.x) else Call.WATCHED
    # Else backward may end at some layer.
    if kind is Call.DIFFERENTIABLE and not all(w.requires_grad for w in stack.weights):
        return Call.WATCHED
    return kind if kind and backend("cpu").runs_side_by_side(stack, layers) else Call.WATCHED


def run_stack(
    kind: Call, stack: Layer, layers: int, dropout: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...], list[tuple[Tensor, Tensor | None]]]:
    """Layers side by side: see Backend.forward_stack. Output, final states of all layers, and if
    asked for the output and every c_t of each layer."""
    if kind is Call.DIFFERENTIABLE:
        results = FUSED_STACK(layers, stack.keeping(True).options, dropout, *stack.tensors)
    else:
        results = backend("cpu").forward_stack(stack, layers, dropout)
    finals = 2 if stack.cell.has_cell_state else 1
    output, states, others = results[0], results[1 : 1 + finals], results[1 + finals :]
    if not stack.all_c:
        return output, states, []
    outputs = *others[: layers - 1], output
    cells = [c.to(output.dtype) for c in others[layers - 1 :]] or [None] * layers
    return output, states, list(zip(outputs, cells))


def add_function(mode: str, name: str) -> None:
    """Makes the functions of a cell that is not built in."""
    function = type(f"{name}Function", (LayerFunction,), {"modes": (mode,)})
    FUNCTIONS[mode] = function  # type: ignore[assignment]
    FUSED[mode] = bind_apply(type(f"Fused{name}Function", (FusedLayer,), {}))


def _runs_options(layer: Layer) -> bool:
    """Whether the layer's kernel runs it with its options."""
    if not runs_options(layer):
        return False
    # Backward would need an h that only its mean with the one before is kept of. It could be
    # computed from that, but for rounding, and a relu's derivative is another beside 0.
    is_mean = layer.zoneout_h > 0 and layer.seed is None and torch.is_grad_enabled()
    return not is_mean or layer.mode in ("LSTM", "GRU", "RNN_TANH")


def run_layer(
    layer: Layer, mask: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """A layer on its kernel where there is one: output, final states, every c_t if asked for.

    mask [T, B] may stand in for batch_sizes where no kernel is to run.
    """
    compiling = torch.compiler.is_compiling()
    has_cell = runs_cell(layer.mode, layer.x) and _runs_options(layer)
    is_watched = compiling or mask is not None or not has_cell
    kind = Call.WATCHED if is_watched else inspect(layer)
    results: tuple[Any, ...]
    if kind is Call.PLAIN:
        results = tuple(backend("cpu").forward(layer))
    elif kind is Call.DIFFERENTIABLE:
        results = FUSED[layer.mode](layer.keeping(True).options, *layer.tensors)
    else:
        results = _run_watched(layer, mask, compiling, has_cell)
    output, h_n, *rest = results
    if not CELLS[layer.mode].has_cell_state:  # torch 2.6 cannot compile layer.cell
        return output, (h_n,), None
    return output, (h_n, rest[0]), rest[1].to(output.dtype) if layer.all_c else None


def run_packed(
    layer: Layer, mask: Tensor | None, storage: str, packed: Any
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """The same of a layer of packed weights, without a gradient."""
    results: tuple[Any, ...]
    if mask is not None or (is_transforming() and not torch.compiler.is_compiling()):
        values = layer._replace(weights=stored(tuple(layer.weights), storage))
        results = tuple(t.detach() for t in reference_layer(values, mask))
    else:
        results = tuple(scan_packed(layer, storage, packed))
    output, h_n, *rest = results
    if not CELLS[layer.mode].has_cell_state:
        return output, (h_n,), None
    return output, (h_n, rest[0]), rest[1].to(output.dtype) if layer.all_c else None


def _run_watched(
    layer: Layer, mask: Tensor | None, compiling: bool, has_cell: bool
) -> tuple[Any, ...]:
    given = layer.x, layer.h_0, layer.c_0, layer.inputs, *layer.weights
    tensors = [t for t in given if t is not None]
    transforming = is_transforming()
    on_kernels = (
        mask is None
        and has_cell
        and all(map(has_kernel, tensors))
        and not (compiling and transforming)  # which torch.compile knows for plain torch only
    )
    if not (on_kernels and layer.x.is_cpu):
        _check_devices(layer)
    if not on_kernels:
        return reference_layer(layer, mask)
    if transforming:
        layer = layer._replace(checkpoint_every=0)
    if compiling or is_tracing():
        keep = compiling and torch.is_grad_enabled()  # the bare operator has a gradient too
        return scan_forward(layer.keeping(keep))
    if transforming or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return FUNCTIONS[layer.mode].run(layer.keeping(True))
    with below_autograd():
        return scan_forward(layer)


def _check_devices(layer: Layer) -> None:
    x = layer.x
    others = ("hidden", (layer.h_0, layer.c_0)), ("inputs", (layer.inputs,))
    for name, tensors in (*others, ("parameter", layer.weights)):
        for t in tensors:
            if t is not None and t.device != x.device:
                raise RuntimeError(
                    f"Input and {name} tensors are not at the same device, found input tensor at "
                    f"{x.device} and {name} tensor at {t.device}"
                )


def _scan_forward_autograd(*args: Any) -> tuple[Any, ...]:
    """The gradient of the bare operator, as compiled graphs and exported programs call it."""
    layer = with_batch(Layer._make(args))
    tensors = [t for t in layer.tensors if t is not None]
    if is_transforming() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        results = Results._make(FUNCTIONS[layer.mode].run(layer.keeping(True)))
        if layer.keep:
            return results
        empty = layer.x.new_empty(0)
        extra = results.extra if layer.all_c and layer.cell.has_cell_state else empty
        return (*results[:3], extra, empty)
    with below_autograd():
        return tuple(filled(layer.x, scan_forward(layer)))


library.impl("scan_forward", _scan_forward_autograd, "Autograd")
