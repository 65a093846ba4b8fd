"""fastrnn.LSTM, GRU and RNN: torch.nn's modules on fused layers.

Parameters, initialisation, checks and state_dict are torch.nn.RNNBase's own.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, overload

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from ._backends import backend, takes_mask
from ._drop_in import DropIn
from ._functions import (
    FUSED,
    FUSED_STACK,
    dropout_factors,
    may_run_side_by_side,
    run_layer,
    run_packed,
    run_stack,
    runs_side_by_side,
)
from ._layer import CELLS, Layer, replaced
from ._onnx import refuse
from ._onnx import run_layer as run_onnx_layer
from ._options import OPTIONS, option, written
from ._packed import check_frozen, forget, packed
from ._ragged import (
    as_lengths,
    check_lengths,
    check_scale,
    check_steps,
    from_mask,
    gather,
    is_per_sample,
    row_of_each,
    scatter,
    segment_starts,
)
from ._states import State, start
from ._torch import Gru, Lstm, Rnn, is_exporting_to_onnx, is_tracing, is_transforming

States = tuple[Tensor, ...]  # (h,) or (h, c), each [L * D, B, H]
Lengths: TypeAlias = "Tensor | NDArray[Any] | Sequence[int]"
Steps: TypeAlias = "Tensor | NDArray[Any]"  # marks, laid out as the input without its features


def _autocast(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as torch.autocast hands them to an operator of lower precision."""
    eligible = torch.float32, torch.bfloat16, torch.float16
    return tuple(t.to(dtype) if t.dtype in eligible else t for t in tensors)


class _Rows(NamedTuple):
    """Where the rows of a batch begin, end and are reset, and what comes in beside x."""

    batch: Any  # B, in a trace a tensor
    batch_sizes: Tensor | None = None  # or a mask, where the backend takes one
    resets: Tensor | None = None
    mask: Tensor | None = None  # bool [T, B], for the reference implementation
    lengths: Tensor | None = None  # int64 [B], where every row's first steps are its valid ones
    inputs: tuple[Tensor, ...] | None = None  # of each layer, laid out as its x: see Layer.inputs
    grad_scale: Tensor | None = None  # laid out as resets
    order: Tensor | None = None  # int64 [B]: the caller's row of each row, where they were sorted


class _Call(NamedTuple):
    """What the layers of a module run on, in the types in which they do."""

    x: Tensor
    rows: _Rows
    weights: list[Tensor]
    options: tuple[Any, ...]  # of each layer's record
    output_dtype: torch.dtype | None  # None: x's


class _RNNBase(DropIn, RNNBase):
    """What LSTM, GRU and RNN share. States are a tuple here, (h,) or (h, c)."""

    checkpoint_every: int | None = None  # also of modules that replace() turned
    _options: Mapping[str, Any] = {}  # those that are on; replaced, never changed
    weight_dropout: float = option("weight_dropout")
    variational: bool = option("variational")
    recurrent_dropout: float = option("recurrent_dropout")
    zoneout: float | tuple[float, float] = option("zoneout")
    grad_clip: float | None = option("grad_clip")
    layer_norm: bool = option("layer_norm")

    def __init__(
        self, mode: str, *args: Any, checkpoint_every: int | None = None, **kwargs: Any
    ) -> None:
        own = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        every = checkpoint_every
        if every is not None and (
            not isinstance(every, int) or isinstance(every, bool) or every < 1
        ):
            raise ValueError(
                f"checkpoint_every: expected an integer above 0 or None, got {every!r}"
            )
        super().__init__(mode, *args, **kwargs)
        if every is not None:
            self.checkpoint_every = every
        if own.get("layer_norm") is True:
            self._add_gains()
        for name, value in own.items():
            setattr(self, name, value)

    def _add_gains(self) -> None:
        """Makes the parameters of layer normalisation, after the others of each direction."""
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            w_ih, w_hh = (getattr(self, name) for name in names[:2])
            vectors = {"gain_ih": w_ih.new_ones(len(w_ih)), "gain_hh": w_hh.new_ones(len(w_hh))}
            if self.mode == "LSTM":
                vectors["gain_c"] = w_ih.new_ones(self.hidden_size)
                vectors["bias_c"] = w_ih.new_zeros(self.hidden_size)
            for name, vector in vectors.items():
                self.register_parameter(name + suffix, torch.nn.Parameter(vector))
                names.append(name + suffix)
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        self._init_flat_weights()

    @property
    def has_gains(self) -> bool:
        return "gain_ih_l0" in self._parameters

    def reset_parameters(self) -> None:
        """Sets the parameters to new initial values."""
        super().reset_parameters()
        for name, parameter in self._parameters.items():
            if parameter is not None and name.startswith(("gain_", "bias_c_")):
                torch.nn.init.constant_(parameter, float(name.startswith("gain_")))

    def flatten_parameters(self) -> None:
        """As torch.nn's for cuDNN, which has no layer normalisation."""
        if not self.has_gains:
            super().flatten_parameters()

    @property
    def has_recurrent_weight(self) -> bool:
        """Whether the cell has a weight_hh."""
        return True

    def extra_repr(self) -> str:
        own = [self._without_twin(), self._shown_frozen()]
        return ", ".join([super().extra_repr(), *filter(None, own)])

    def _without_twin(self) -> str:
        every = self.checkpoint_every
        own = {} if every is None else {"checkpoint_every": every}
        return written({**own, **self._options})

    def drop_options(self) -> str:
        options = self._without_twin()
        for name in ("checkpoint_every", "_options"):
            vars(self).pop(name, None)
        return options

    @property
    def is_torchs_in_eval(self) -> bool:
        return not any(OPTIONS[name].in_eval for name in self._options)

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        # Of a layer that is no part of a model, torch's exporter to ONNX by a trace gives all
        # arguments by position, the options too, and a bool as a tensor.
        if is_exporting_to_onnx():
            names = ("lengths", "mask", "reset", "return_states", "grad_scale")
            options = {name: value for name, value in zip(names, args[2:]) if value is not None}
            if not options.get("return_states", False):
                options.pop("return_states", None)
            args, kwargs = args[:2], kwargs | options
        return super()._slow_forward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _run_otherwise(self, input: Any, hx: Any, **options: Any) -> Any:
        """The call as one of torch's tools wants it; None if none of them is at work."""
        if torch.compiler.is_compiling():
            return None
        given = {
            name: value
            for name, value in options.items()
            if value is not None and value is not False
        }
        arguments = (input,) if hx is None else (input, hx)
        node = self._traced(arguments, given)
        if node is not None:
            return node
        packed = isinstance(input, PackedSequence)
        # torch's exporter to ONNX by a trace finds the lengths of what was packed.
        to_onnx = packed and is_tracing() and is_exporting_to_onnx()
        if to_onnx or self._is_torchs(() if packed else input, hx):
            own = {**given, **self._options}
            if own:
                raise RuntimeError(
                    f"{next(iter(own))}: expected none here, as torch's own forward runs for "
                    "Expanded Weights, objects that are not tensors, and ONNX of a PackedSequence"
                )
            if self._theirs is None:
                raise RuntimeError(
                    f"{type(self).__name__}: torch.nn has no such cell, but its forward runs for "
                    "Expanded Weights, objects that are not tensors, and ONNX of a PackedSequence"
                )
            return self._theirs.forward(self, input, hx)
        return None

    def _run_directly(self, input: Any, hx: Any) -> Any:
        """forward without options on plain tensors; None where it is more than that, or may be
        wrong."""
        if torch.compiler.is_compiling():
            return None
        if self._frozen is not None:
            return self._run_frozen(input, hx)
        if self._options and (self.training or self.zoneout or self.grad_clip or self.layer_norm):
            return None
        every = self.checkpoint_every or 0
        return backend("cpu").run_module(self.__dict__, input, hx, every, FUSED, FUSED_STACK)

    def _run_frozen(self, input: Any, hx: Any) -> Any:
        """The same of a frozen module."""
        model = self._packed
        has_pair = CELLS[self.mode].has_cell_state
        if model is None or self.training or type(input) is not Tensor or input.dim() != 3:
            return None
        h, c = hx if isinstance(hx, tuple) and len(hx) == 2 else (hx, None)
        if h is not None and (c is None) is has_pair:
            return None
        x = input.transpose(0, 1) if self.batch_first else input
        result = model.run(self.__dict__, x, h, c)
        if result is None:
            return None
        output, h_n, c_n = result
        if self.batch_first:
            output = output.transpose(0, 1)
        return output, (h_n, c_n) if has_pair else h_n

    @property
    def cell_mode(self) -> str:
        """The cell of its layers: Layer.mode."""
        return self.mode

    def _weights(self) -> list[Tensor]:
        """The weights by their names, right whatever a user put in a parameter's place; or those of
        the list _flat_weights, as far as it is newer than they are, as in torch."""
        own = self._parameters
        named = [
            w if (w := own.get(name)) is not None else getattr(self, name)
            for name in self._flat_weights_names
        ]
        if torch.compiler.is_compiling() or is_transforming():
            return named
        listed: list[Any] = self._flat_weights
        if len(listed) == len(named) and all(map(operator.is_, listed, named)):
            return named
        refs: list[Any] = self._flat_weight_refs
        if all(ref is not None and ref() is w for ref, w in zip(refs, named)):
            return listed
        if all(map(operator.is_, named, own.values())):
            self._flat_weights = list(named)
            self._flat_weight_refs = [weakref.ref(w) for w in named]
        return named

    def _run(
        self,
        x: Tensor,
        states: States | None,
        rows: _Rows,
        all_states: bool,
    ) -> tuple[Tensor, States, list[Tensor]]:
        """All layers over x, [T, B, I] or ragged [N, I].

        Returns output, final states and, if asked for, the states of every step and layer: c_t of
        an LSTM, else h_t.
        """
        if states is None and rows.batch_sizes is not None and is_tracing():
            # The one argument by which the traced operator knows B.
            states = self._zeros(x, rows.batch)
        call, given = self._prepare(x, None if states is None else [states], rows, all_states)
        states = None if given is None else given[0]
        together = self._run_side_by_side(call, states)
        if together is not None:
            return together
        own: list[States] | None = None
        if states is not None:
            own = [states]
            if self.num_layers > 1:
                directions = 2 if self.bidirectional else 1
                parts = [
                    slice(k * directions, (k + 1) * directions) for k in range(self.num_layers)
                ]
                own = [tuple(s[part] for s in states) for part in parts]
        x, finals, sequences = self._run_each(call, own, all_states)
        final = finals[0] if self.num_layers == 1 else tuple(map(torch.cat, zip(*finals)))
        return x, final, sequences

    def _prepare(
        self, x: Tensor, states: Sequence[States] | None, rows: _Rows, all_states: bool
    ) -> tuple[_Call, Sequence[States] | None]:
        """What the layers run on, and the states: with autocast and dropout on weights."""
        weights = self._weights()
        if self.training and self._options:
            weights = self._drop_weights(weights)
        output_dtype = None
        if self._frozen is not None:
            x, states = self._as_frozen(x, states)
        elif not x.is_meta and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            if self.mode == "GRU" and x.device.type == "cpu":  # as torch.nn.GRU
                state_dtype = x.dtype if states is None else states[0][0].dtype
                output_dtype = torch.promote_types(dtype, state_dtype)
            x, *weights = _autocast(dtype, x, *weights)
            if rows.inputs is not None:
                rows = replaced(rows, inputs=_autocast(dtype, *rows.inputs))
            states = None if states is None else [_autocast(dtype, *each) for each in states]
        # Without gradients there is nothing to save.
        every = (self.checkpoint_every or 0) if torch.is_grad_enabled() else 0
        directions = 2 if self.bidirectional else 1
        clip, zoneout = self.grad_clip or 0.0, self._zoneout_of_each()
        kept = every, False, all_states
        options = (self.mode, directions, rows.batch, False, *kept, clip, *zoneout, self.layer_norm)
        if rows.grad_scale is not None:  # in the type that states are carried in
            state_dtype = torch.float32 if x.dtype.itemsize == 2 else x.dtype
            rows = replaced(rows, grad_scale=rows.grad_scale.to(state_dtype))
        return _Call(x, rows, weights, options, output_dtype), states

    @staticmethod
    def _layer(
        call: _Call,
        x: Tensor,
        states: States | None,
        weights: Sequence[Tensor],
        drawn: tuple[Tensor | None, Tensor | None] = (None, None),
        inputs: Tensor | None = None,
    ) -> Layer:
        """The record of a layer, or of all of them together."""
        rows = call.rows
        h_0: Tensor | None = None
        c_0: Tensor | None = None
        if states is not None:
            h_0, c_0 = (*states, None)[:2]
        steps = rows.batch_sizes, rows.resets, rows.grad_scale
        return Layer.of(call.options, (x, h_0, c_0, *steps, *drawn, inputs, *weights))

    def _run_side_by_side(
        self, call: _Call, states: States | None
    ) -> tuple[Tensor, States, list[Tensor]] | None:
        """What _run returns, if the layers run side by side; else None."""
        rows, layers = call.rows, self.num_layers
        if not may_run_side_by_side(call.x, rows.batch_sizes, layers):
            return None
        if self._frozen is not None or rows.mask is not None or rows.inputs is not None:
            return None
        if self.training and self.recurrent_dropout:
            return None
        stack = self._layer(call, call.x, states, call.weights)
        kind = runs_side_by_side(stack, layers)
        if not kind:
            return None
        dropout = None
        if self.dropout and self.training:
            dropout = dropout_factors(
                stack, layers, lambda y: self._drop_between(y, rows, inplace=True)
            )
        output, final, every = run_stack(kind, stack, layers, dropout)
        return output, final, [s for each in every for s in self._states_of(*each)]

    def _run_each(
        self, call: _Call, states: Sequence[States] | None, all_states: bool
    ) -> tuple[Tensor, list[States], list[Tensor]]:
        """One layer after the other, from the states of each, [D, B, H]."""
        x, rows = call.x, call.rows
        each = len(call.weights) // self.num_layers
        to_onnx = is_exporting_to_onnx()
        model = None
        if self._frozen is not None and not (torch.compiler.is_compiling() or is_tracing()):
            model = packed(self)
        finals, sequences = [], []
        for k in range(self.num_layers):
            own = None if states is None else states[k]
            weights = call.weights[k * each : (k + 1) * each]
            inputs = None if rows.inputs is None else rows.inputs[k]
            drawn = self._draw(x, rows) if self.training and self._options else (None, None)
            layer = self._layer(call, x, own, weights, drawn, inputs)
            if to_onnx:
                x, final, cells = run_onnx_layer(layer, rows.lengths, self.hidden_size)
            elif self._frozen is not None:
                ready = None if model is None else model.layers[k]
                x, final, cells = run_packed(layer, rows.mask, self._frozen, ready)
            else:
                x, final, cells = run_layer(layer, rows.mask)
            finals.append(final)
            if all_states:
                sequences += self._states_of(x, cells)
            if self.dropout and self.training and k < self.num_layers - 1:
                x = self._drop_between(x, rows)
        if call.output_dtype is not None:
            x, *sequences = (t.to(call.output_dtype) for t in (x, *sequences))
            finals = [tuple(s.to(call.output_dtype) for s in final) for final in finals]
        return x, finals, sequences

    def _as_frozen(
        self, x: Tensor, states: Sequence[States] | None
    ) -> tuple[Tensor, Sequence[States] | None]:
        """Input and states of a frozen layer, which autocast does not concern."""
        check_frozen(self, x, *(s for each in states or () for s in each))
        dtype = self._weights()[0].dtype
        if x.dtype == dtype or not torch.is_autocast_enabled(x.device.type):
            return x, states
        own = None if states is None else [tuple(s.to(dtype) for s in each) for each in states]
        return x.to(dtype), own

    def _state_sizes(self) -> list[int]:
        """The features of h and of the other states."""
        others = CELLS[self.mode].states * self.hidden_size
        return [self.proj_size or self.hidden_size, *([others] if others else [])]

    def _drop_weights(self, weights: list[Tensor]) -> list[Tensor]:
        """The weights, with dropout on each W_hh: layer by layer, direction by direction."""
        if not self.weight_dropout:
            return weights
        is_hh = [name.startswith("weight_hh_") for name in self._flat_weights_names]
        dropout = torch.nn.functional.dropout
        return [dropout(w, self.weight_dropout) if hh else w for w, hh in zip(weights, is_hh)]

    def _zoneout_of_each(self) -> tuple[float, float]:
        """The probabilities of h and of the other states."""
        zoneout = self.zoneout
        if isinstance(zoneout, tuple):
            return zoneout
        return zoneout, zoneout if self.mode == "LSTM" else 0.0

    def _draw(self, x: Tensor, rows: _Rows) -> tuple[Tensor | None, Tensor | None]:
        """What is random in a layer: the mask of recurrent dropout, and the seed of zoneout."""
        h_mask = seed = None
        if self.recurrent_dropout:
            sizes = 2 if self.bidirectional else 1, rows.batch, self.proj_size or self.hidden_size
            h_mask = torch.nn.functional.dropout(x.new_ones(sizes), self.recurrent_dropout)
            h_mask = h_mask if rows.order is None else h_mask.index_select(1, rows.order)
        if self.zoneout:
            seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device)
        return h_mask, seed

    def _drop_between(self, x: Tensor, rows: _Rows, *, inplace: bool = False) -> Tensor:
        """Dropout between two layers."""
        dropout = torch.nn.functional.dropout
        if not self.variational:
            return dropout(x, self.dropout, inplace=inplace)
        mask = dropout(x.new_ones(rows.batch, x.shape[-1]), self.dropout)
        if x.dim() == 2 and rows.batch_sizes is not None:  # packed
            mask = mask[row_of_each(rows.batch_sizes, x, rows.order)]
        return x.mul_(mask) if inplace else x * mask

    def _zeros(self, x: Tensor, batch: Any) -> States:
        entries = self.num_layers * (2 if self.bidirectional else 1)
        return tuple(x.new_zeros(entries, batch, size) for size in self._state_sizes())

    def initial_state(self, hx: Any = None, *, batch: int | None = None) -> State:
        """The state before the first step, to run the module one step at a time: see fastrnn.State.

        Without gradients, on the CPU, this packs the weights, once for the module.

        Args:
            hx: as in forward, with B or without; None means zeros.
            batch: B, for inputs [B, I]. None without hx: unbatched, for inputs [I].

        Raises:
            ValueError: if the module is bidirectional, since its second direction begins at the
                last step; or if hx or batch is of a wrong type or shape.
        """
        return start(self, hx, batch)

    def _wants_gradient(self, *tensors: Tensor) -> bool:
        """Whether a step on these has one; a frozen module has none."""
        if self._frozen is not None or not torch.is_grad_enabled():
            return False
        return any(t.requires_grad for t in (*tensors, *self.parameters()))

    def _advance(
        self, x: Tensor, states: Sequence[States], inputs: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, list[States]]:
        """All layers over x [T, B, I], from the states of each layer: the output and the states
        after it."""
        call, own = self._prepare(x, states, _Rows(x.shape[1], inputs=inputs), False)
        output, finals, _ = self._run_each(call, own, False)
        return output, finals

    def _states_of(self, output: Tensor, others: Tensor | None) -> list[Tensor]:
        """What return_states gives of one layer."""
        return [output if others is None else others]

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        # functional_call puts weights in place that _flat_weights never sees, of another dtype too.
        flat = self._flat_weights
        if input.dtype is flat[0].dtype:  # type: ignore[union-attr]
            return super().check_input(input, batch_sizes)
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        try:
            super().check_input(input, batch_sizes)
        finally:
            self._flat_weights = flat

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        forget(self)

    def _check_states(self, input: Tensor, states: States, batch_sizes: Tensor | None) -> None:
        self.check_forward_args(input, states[0], batch_sizes)

    @staticmethod
    def _check_dims(states: States, expected: int) -> None:
        if states[0].dim() != expected:
            kind = "batched 3-D" if expected == 3 else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx should also be {expected}-D "
                f"but got {states[0].dim()}-D tensor"
            )

    def _forward(
        self,
        input: Tensor | PackedSequence,
        states: States | None,
        lengths: Tensor | NDArray[Any] | Sequence[int] | None,
        mask: Tensor | NDArray[Any] | None,
        reset: Tensor | NDArray[Any] | PackedSequence | None,
        all_states: bool,
        grad_scale: Tensor | NDArray[Any] | PackedSequence | None,
        inputs: tuple[Tensor, ...] | None = None,
    ) -> tuple[Any, States, tuple[Any, ...]]:
        """forward of every module: output, final states, and the states of each layer's steps."""
        if lengths is not None and mask is not None:
            raise ValueError("lengths, mask: expected one of them, got both")
        if isinstance(input, PackedSequence):
            if lengths is not None or mask is not None:
                name, given = ("mask", mask) if lengths is None else ("lengths", lengths)
                raise ValueError(
                    f"{name}: expected None with a PackedSequence, which has lengths of its own, "
                    f"got {type(given).__name__}"
                )
            if is_exporting_to_onnx():
                raise RuntimeError(
                    "input: expected a tensor for ONNX, got a PackedSequence; pass lengths="
                )
            return self._forward_packed(input, states, reset, all_states, grad_scale, inputs)

        batch_dim = 0 if self.batch_first else 1
        is_batched = input.dim() == 3
        shape = input.shape[:-1]
        input, states = self._to_batch(input, states, batch_dim)
        if inputs is not None and not is_batched:
            inputs = tuple(z.unsqueeze(batch_dim) for z in inputs)
        steps, batch = input.shape[1 - batch_dim], input.shape[batch_dim]
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

        def by_step(name: str, given: Any, check: Callable[..., Tensor] = check_steps) -> Tensor:
            values = check(name, given, shape).to(input.device).reshape(input.shape[:-1])
            return values.t() if self.batch_first else values  # [T, B]

        scale = None if grad_scale is None else by_step("grad_scale", grad_scale, check_scale)
        if is_exporting_to_onnx():
            refuse(self, mask=mask, reset=reset, return_states=all_states, grad_scale=grad_scale)
            ends = None if lengths is None else as_lengths(lengths, batch, steps).to(input.device)
            rows = _Rows(batch, lengths=ends)
            results = self._run_padded(input, states, rows, all_states)
        else:
            resets = None if reset is None else by_step("reset", reset)
            ends = None
            if lengths is not None:
                ends = check_lengths(lengths, batch, steps, input.device)
                mask = torch.arange(steps, device=input.device).unsqueeze(1) < ends
            elif mask is not None:
                mask = by_step("mask", mask)
            rows = _Rows(batch, resets=resets, inputs=inputs, lengths=ends, grad_scale=scale)
            results = self._run_batch(input, states, mask, rows, all_states)
        (output, *sequences), final = results
        if not is_batched:
            output, *sequences = (s.squeeze(batch_dim) for s in (output, *sequences))
            final = tuple(s.squeeze(1) for s in final)
        return output, final, tuple(sequences)

    def _to_batch(
        self, input: Tensor, states: States | None, batch_dim: int
    ) -> tuple[Tensor, States | None]:
        """Checked input and states, with a batch of one where they have none."""
        if input.dim() not in (2, 3):
            name, noun = ("RNN", " tensor") if self.mode.startswith("RNN") else (self.mode, "")
            raise ValueError(
                f"{name}: Expected input to be 2D or 3D, got {input.dim()}D{noun} instead"
            )
        is_batched = input.dim() == 3
        if not is_batched:
            input = input.unsqueeze(batch_dim)
        if states is None:
            self.check_input(input, None)
            return input, None
        self._check_dims(states, 3 if is_batched else 2)
        if not is_batched:
            states = tuple(s.unsqueeze(1) for s in states)
        self._check_states(input, states, None)
        return input, states

    def _run_batch(
        self,
        input: Tensor,
        states: States | None,
        mask: Tensor | None,
        rows: _Rows,
        all_states: bool,
    ) -> tuple[tuple[Tensor, ...], States]:
        """As the masked steps allow, padded or packed. mask and the resets are [T, B]."""
        if mask is None or is_per_sample(mask):
            return self._run_padded(input, states, replaced(rows, mask=mask), all_states)
        saves = CELLS[self.mode].saves_gates or self.layer_norm
        if takes_mask(input) and not (self.checkpoint_every and saves):
            # Segments of steps are cut from packed rows, where no reset hides behind a masked step.
            resets = None if rows.resets is None else segment_starts(mask, rows.resets)
            rows = replaced(rows, batch_sizes=mask, resets=resets)
            return self._run_padded(input, states, rows, all_states)
        return self._run_ragged(input, states, mask, rows, all_states)

    def _run_padded(
        self, input: Tensor, states: States | None, rows: _Rows, all_states: bool
    ) -> tuple[tuple[Tensor, ...], States]:
        """All steps of all rows: output and the states of each layer's steps; final states."""
        x = input.transpose(0, 1) if self.batch_first else input
        if self.batch_first and rows.inputs is not None:
            rows = replaced(rows, inputs=tuple(z.transpose(0, 1) for z in rows.inputs))
        output, final, sequences = self._run(x, states, rows, all_states)
        laid_out = (s.transpose(0, 1) if self.batch_first else s for s in (output, *sequences))
        return tuple(laid_out), final

    def _run_ragged(
        self,
        input: Tensor,
        states: States | None,
        mask: Tensor,
        rows: _Rows,
        all_states: bool,
    ) -> tuple[tuple[Tensor, ...], States]:
        """The same of the valid steps alone, packed. mask and the resets are [T, B]."""
        ragged = from_mask(mask, self.batch_first, rows.lengths)
        if ragged is None:  # all are valid
            return self._run_padded(input, states, rows, all_states)
        if states is not None:
            states = tuple(s.index_select(1, ragged.sorted_indices) for s in states)
        resets, scale, inputs = rows.resets, rows.grad_scale, rows.inputs

        def of_valid(values: Tensor) -> Tensor:  # [T, B] -> [N]
            return (values.t() if self.batch_first else values).flatten()[ragged.rows]

        resets = None if resets is None else of_valid(segment_starts(mask, resets))
        scale = None if scale is None else of_valid(scale)

        def packed(features: Tensor) -> Tensor:
            return gather(features.reshape(-1, features.shape[-1]), ragged.rows)

        x = packed(input)
        inputs = None if inputs is None else tuple(map(packed, inputs))
        rows = _Rows(
            mask.shape[1],
            ragged.batch_sizes,
            resets,
            inputs=inputs,
            grad_scale=scale,
            order=ragged.sorted_indices,
        )
        output, final, sequences = self._run(x, states, rows, all_states)
        padded = (scatter(s, ragged.rows, mask.numel()) for s in (output, *sequences))
        laid_out = tuple(s.view(*input.shape[:-1], -1) for s in padded)
        return laid_out, tuple(s.index_select(1, ragged.unsorted_indices) for s in final)

    def _forward_packed(
        self,
        input: PackedSequence,
        states: States | None,
        reset: Tensor | NDArray[Any] | PackedSequence | None,
        all_states: bool,
        grad_scale: Tensor | NDArray[Any] | PackedSequence | None,
        inputs: tuple[Tensor, ...] | None,
    ) -> tuple[PackedSequence, States, tuple[PackedSequence, ...]]:
        x, batch_sizes, sorted_indices, unsorted_indices = input
        if states is None:
            self.check_input(x, batch_sizes)
        else:
            if sorted_indices is not None:
                states = tuple(s.index_select(1, sorted_indices) for s in states)
            self._check_states(x, states, batch_sizes)
        resets = None
        if reset is not None:
            marks = reset.data if isinstance(reset, PackedSequence) else reset
            resets = check_steps("reset", marks, x.shape[:1]).to(x.device)
        scale = None
        if grad_scale is not None:
            given = grad_scale.data if isinstance(grad_scale, PackedSequence) else grad_scale
            scale = check_scale("grad_scale", given, x.shape[:1]).to(x.device)
        # In a trace a number would stay what it is for the input at hand.
        batch = batch_sizes[0] if is_tracing() else int(batch_sizes[0])
        rows = _Rows(
            batch, batch_sizes, resets, inputs=inputs, grad_scale=scale, order=sorted_indices
        )
        output, final, sequences = self._run(x, states, rows, all_states)
        if unsorted_indices is not None:
            final = tuple(s.index_select(1, unsorted_indices) for s in final)
        packed = (PackedSequence(s, *input[1:]) for s in (output, *sequences))
        return next(packed), final, tuple(packed)


class LSTM(_RNNBase):
    """A long short-term memory network: torch.nn.LSTM on fused layers.

    A step of one layer and direction, from x and the state (h, c):

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh)
        g = tanh(W_ih x + b_ih + W_hh h + b_hh)
        c' = f * c + i * g
        h' = o * tanh(c')

    each gate with its own rows of the weights. With proj_size, h' is multiplied by W_hr (Sak et
    al., arXiv:1402.1128). Hochreiter and Schmidhuber, 1997, with the forget gate of Gers et al.,
    2000. The reference implementation is fastrnn.reference.lstm_cell.

    Parameters, initial values and state_dict are those of torch.nn.LSTM; a state_dict goes both
    ways.

    Args:
        input_size: I, the features of a step of the input.
        hidden_size: H, the hidden units.
        num_layers: L; each layer takes the output of the one before.
        bias: whether there are b_ih and b_hh.
        batch_first: whether input and output are [B, T, features] instead of [T, B, features].
        dropout: probability of dropout on the output of every layer but the last, in training.
        bidirectional: whether each layer has a second direction, from the last step to the first.
        proj_size: P, the features of a projected h; 0 for none, and P = H.
        device: of the parameters.
        dtype: of the parameters.
        checkpoint_every: keep for backward only the output and the states between segments of so
            many steps, and compute the rest again, a segment at a time: less memory for at most one
            more forward.
        weight_dropout: probability of dropout on the entries of each W_hh, in training: one mask
            for each call, the same for all rows and steps (Wan et al., 2013; Merity et al.,
            arXiv:1708.02182). torch.nn.functional.dropout draws them before anything else, layer
            by layer and direction by direction.
        variational: whether `dropout` draws one mask per row, the same for all its steps (Gal and
            Ghahramani, arXiv:1512.05287).
        recurrent_dropout: probability of dropout on the h that W_hh multiplies, in training: one
            mask per row, direction and layer, the same for all steps, as Keras has it.
        zoneout: probability that a unit keeps its h and c in a step, or a pair of two (p_h, p_c)
            (Krueger et al., arXiv:1606.01305). In training it is drawn for each step, row and unit,
            from a seed of torch's generator; in eval mode a state is p * previous + (1 - p) * new.
        grad_clip: the largest magnitude, elementwise, of the gradient that flows back from a step
            to the one before it (Graves, arXiv:1308.0850), after grad_scale of forward; None for
            any. What was clipped cannot be differentiated again.
        layer_norm: whether W_ih x and W_hh h are normalised (Ba et al., arXiv:1607.06450), each
            over all its 4 * H values with epsilon 1e-5, and the output reads a normalised c, while
            c itself is carried on as it is:

                LN(W_ih x) * gain_ih + b_ih + LN(W_hh h) * gain_hh + b_hh  in place of the sum above
                h' = o * tanh(LN(c') * gain_c + bias_c)

            Each layer and direction then has further parameters, gain_ih_l0 and gain_hh_l0 [4 * H]
            and gain_c_l0 [H], initially 1, and bias_c_l0 [H], initially 0.

    Raises:
        ValueError: if an argument is out of range. The messages are torch.nn's.
        TypeError: if a size is not an int, or dropout is not a number.

    Examples:
        >>> import torch, fastrnn
        >>> rnn = fastrnn.LSTM(8, 16, num_layers=2, bidirectional=True)
        >>> output, (h, c) = rnn(torch.randn(5, 3, 8), lengths=[5, 0, 2])
        >>> output.shape, h.shape
        (torch.Size([5, 3, 32]), torch.Size([4, 3, 16]))
        >>> output, (h, c), cells = rnn(torch.randn(5, 3, 8), return_states=True)
        >>> [tuple(layer.shape) for layer in cells]
        [(5, 3, 32), (5, 3, 32)]
    """

    _theirs = Lstm

    @overload  # type: ignore[misc]  # one, for types and documentation
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        checkpoint_every: int | None = None,
        weight_dropout: float = 0.0,
        variational: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        grad_clip: float | None = None,
        layer_norm: bool = False,
    ) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    # The checks that torch.nn.LSTM adds to RNNBase are methods of that class.
    get_expected_cell_size = Lstm.get_expected_cell_size
    check_forward_args: Any = Lstm.check_forward_args
    permute_hidden: Any = Lstm.permute_hidden

    def _check_states(self, input: Tensor, states: States, batch_sizes: Tensor | None) -> None:
        self.check_forward_args(input, states, batch_sizes)
        if len(states) > 2:
            raise RuntimeError("lstm expects two hidden states")

    @staticmethod
    def _check_dims(states: States, expected: int) -> None:
        if states[0].dim() != expected or states[1].dim() != expected:
            kind = "batched 3-D" if expected == 3 else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {expected}-D but got "
                f"({states[0].dim()}-D, {states[1].dim()}-D) tensors"
            )

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Lengths | None = None,
        mask: Steps | None = None,
        reset: Steps | None = None,
        return_states: Literal[False] = False,
        grad_scale: Steps | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Lengths | None = None,
        mask: Steps | None = None,
        reset: Steps | None = None,
        return_states: Literal[True],
        grad_scale: Steps | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, ...]]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        reset: Steps | PackedSequence | None = None,
        return_states: Literal[False] = False,
        grad_scale: Steps | PackedSequence | None = None,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        reset: Steps | PackedSequence | None = None,
        return_states: Literal[True],
        grad_scale: Steps | PackedSequence | None = None,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor], tuple[PackedSequence, ...]]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | NDArray[Any] | Sequence[int] | None = None,
        mask: Tensor | NDArray[Any] | None = None,
        reset: Tensor | NDArray[Any] | PackedSequence | None = None,
        return_states: bool = False,
        grad_scale: Steps | PackedSequence | None = None,
    ) -> Any:
        """Runs all layers over all steps.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
            hx: (h_0, c_0), [L * D, B, P] and [L * D, B, H], without B if unbatched. None means
                zeros.
            lengths: B integers, a tensor, an array or a list: the number of valid steps of each
                row, which come first. In any order; 0 is allowed.
            mask: bool or integers, a tensor or an array, laid out as the input without its
                features: True, or not zero as in a tokenizer's attention_mask, where a step is
                valid, in any pattern. A masked step leaves the state unchanged and outputs zeros,
                and its input has no effect. Not together with lengths.
            reset: as mask (a PackedSequence or its data, for a PackedSequence); True where a step
                begins a new segment of its row, such as an episode or a document. Nothing passes
                from one segment to another: the forward direction enters a segment, and the reverse
                direction the segment before it, with a zero state. A reset on a masked step applies
                to the row's next valid step.
            return_states: whether to return c too.
            grad_scale: a floating tensor or array, laid out as mask (for a PackedSequence one, or
                its data): the gradient that flows back from a step, through h and c, to the step
                before it in its direction, or to hx, is multiplied by that step's value. 0 cuts:
                see fastrnn.truncation. A masked step hands on what it gets.

        Returns:
            output: laid out as input, with D * P features; a PackedSequence for a PackedSequence.
            (h_n, c_n): the states after each row's last valid step, shaped like hx. There the
                reverse direction begins.
            c: with return_states only: the cell states of every step, a tuple
                with one entry [..., D * H] per layer, laid out as output.

        Raises:
            ValueError: if lengths, mask, reset or grad_scale is of a wrong type, shape or range, or
                both lengths and mask are given, or one of them with a PackedSequence.
            RuntimeError: if input or hx is of a wrong shape or device; the message is torch.nn's.
        """
        # return_states first: of the proxies of torch.fx it alone says that it is none of a bool.
        is_plain = not return_states and lengths is None and mask is None
        if is_plain and reset is None and grad_scale is None:
            result = self._run_directly(input, hx)
            if result is not None:
                return result
        result = self._run_otherwise(
            input,
            hx,
            lengths=lengths,
            mask=mask,
            reset=reset,
            return_states=return_states,
            grad_scale=grad_scale,
        )
        if result is not None:
            return result
        states = None if hx is None else (hx[0], hx[1], *hx[2:])
        output, (h_n, c_n), c = self._forward(
            input, states, lengths, mask, reset, return_states, grad_scale
        )
        return (output, (h_n, c_n), c) if return_states else (output, (h_n, c_n))

    if TYPE_CHECKING:
        __call__ = forward


class _OneState(_RNNBase):
    """GRU and RNN, whose state is h alone."""

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        mask: Steps | None = None,
        reset: Steps | None = None,
        return_states: Literal[False] = False,
        grad_scale: Steps | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        mask: Steps | None = None,
        reset: Steps | None = None,
        return_states: Literal[True],
        grad_scale: Steps | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Steps | PackedSequence | None = None,
        return_states: Literal[False] = False,
        grad_scale: Steps | PackedSequence | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Steps | PackedSequence | None = None,
        return_states: Literal[True],
        grad_scale: Steps | PackedSequence | None = None,
    ) -> tuple[PackedSequence, Tensor, tuple[PackedSequence, ...]]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | NDArray[Any] | Sequence[int] | None = None,
        mask: Tensor | NDArray[Any] | None = None,
        reset: Tensor | NDArray[Any] | PackedSequence | None = None,
        return_states: bool = False,
        grad_scale: Steps | PackedSequence | None = None,
    ) -> Any:
        """Runs all layers over all steps.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
            hx: h_0 [L * D, B, H], without B if unbatched. None means zeros.
            lengths: B integers, a tensor, an array or a list: the number of valid steps of each
                row, which come first. In any order; 0 is allowed.
            mask: bool or integers, a tensor or an array, laid out as the input without its
                features: True, or not zero as in a tokenizer's attention_mask, where a step is
                valid, in any pattern. A masked step leaves the state unchanged and outputs zeros,
                and its input has no effect. Not together with lengths.
            reset: as mask (a PackedSequence or its data, for a PackedSequence); True where a step
                begins a new segment of its row, such as an episode or a document. Nothing passes
                from one segment to another: the forward direction enters a segment, and the reverse
                direction the segment before it, with a zero state. A reset on a masked step applies
                to the row's next valid step.
            return_states: whether to return h too.
            grad_scale: a floating tensor or array, laid out as mask (for a PackedSequence one, or
                its data): the gradient that flows back from a step, through h, to the step before
                it in its direction, or to hx, is multiplied by that step's value. 0 cuts: see
                fastrnn.truncation. A masked step hands on what it gets.

        Returns:
            output: laid out as input, with D * H features; a PackedSequence for a PackedSequence.
            h_n: the state after each row's last valid step, shaped like hx. There the reverse
                direction begins.
            h: with return_states only: the hidden states of every step, a tuple
                with one entry [..., D * H] per layer, laid out as output.

        Raises:
            ValueError: if lengths, mask, reset or grad_scale is of a wrong type, shape or range, or
                both lengths and mask are given, or one of them with a PackedSequence.
            RuntimeError: if input or hx is of a wrong shape or device; the message is torch.nn's.
        """
        # return_states first: of the proxies of torch.fx it alone says that it is none of a bool.
        is_plain = not return_states and lengths is None and mask is None
        if is_plain and reset is None and grad_scale is None:
            result = self._run_directly(input, hx)
            if result is not None:
                return result
        result = self._run_otherwise(
            input,
            hx,
            lengths=lengths,
            mask=mask,
            reset=reset,
            return_states=return_states,
            grad_scale=grad_scale,
        )
        if result is not None:
            return result
        states = None if hx is None else (hx,)
        output, (h_n,), h = self._forward(
            input, states, lengths, mask, reset, return_states, grad_scale
        )
        return (output, h_n, h) if return_states else (output, h_n)

    if TYPE_CHECKING:
        __call__ = forward


class GRU(_OneState):
    """A gated recurrent unit network: torch.nn.GRU on fused layers.

    A step of one layer and direction, from x and the state h:

        r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh)
        n = tanh(W_ih x + b_ih + r * (W_hh h + b_hh))
        h' = (1 - z) * n + z * h

    each gate with its own rows of the weights. Cho et al., arXiv:1406.1078, with r after the matrix
    product, as torch has it. The reference implementation is fastrnn.reference.gru_cell.

    Parameters, initial values and state_dict are those of torch.nn.GRU; a state_dict goes both
    ways.

    Args:
        input_size: I, the features of a step of the input.
        hidden_size: H, the hidden units.
        num_layers: L; each layer takes the output of the one before.
        bias: whether there are b_ih and b_hh.
        batch_first: whether input and output are [B, T, features] instead of [T, B, features].
        dropout: probability of dropout on the output of every layer but the last, in training.
        bidirectional: whether each layer has a second direction, from the last step to the first.
        device: of the parameters.
        dtype: of the parameters.
        checkpoint_every: keep for backward only the output and the states between segments of so
            many steps, and compute the rest again, a segment at a time: less memory for at most one
            more forward.
        weight_dropout: probability of dropout on the entries of each W_hh, in training: one mask
            for each call, the same for all rows and steps (Wan et al., 2013; Merity et al.,
            arXiv:1708.02182). torch.nn.functional.dropout draws them before anything else, layer
            by layer and direction by direction.
        variational: whether `dropout` draws one mask per row, the same for all its steps (Gal and
            Ghahramani, arXiv:1512.05287).
        recurrent_dropout: probability of dropout on the h that W_hh multiplies, in training: one
            mask per row, direction and layer, the same for all steps, as Keras has it.
        zoneout: probability that a unit keeps its h in a step (Krueger et al., arXiv:1606.01305).
            In training it is drawn for each step, row and unit, from a seed of torch's generator;
            in eval mode h is p * previous + (1 - p) * new.
        grad_clip: the largest magnitude, elementwise, of the gradient that flows back from a step
            to the one before it (Graves, arXiv:1308.0850), after grad_scale of forward; None for
            any. What was clipped cannot be differentiated again.
        layer_norm: whether W_ih x and W_hh h are normalised (Ba et al., arXiv:1607.06450), each
            over all its 3 * H values with epsilon 1e-5: LN(W_ih x) * gain_ih + b_ih takes the place
            of W_ih x + b_ih, and LN(W_hh h) * gain_hh + b_hh that of W_hh h + b_hh. Each layer and
            direction then has further parameters, gain_ih_l0 and gain_hh_l0 [3 * H], initially 1.

    Raises:
        ValueError: if an argument is out of range, or proj_size is given. The messages are
            torch.nn's.
        TypeError: if a size is not an int, or dropout is not a number.

    Examples:
        >>> import torch, fastrnn
        >>> rnn = fastrnn.GRU(8, 16, batch_first=True)
        >>> x, begins = torch.randn(3, 5, 8), torch.rand(3, 5) < 0.3
        >>> output, h = rnn(x, reset=begins)
        >>> output.shape, h.shape
        (torch.Size([3, 5, 16]), torch.Size([1, 3, 16]))
    """

    _theirs = Gru

    @overload  # type: ignore[misc]  # one, for types and documentation
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        checkpoint_every: int | None = None,
        weight_dropout: float = 0.0,
        variational: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        grad_clip: float | None = None,
        layer_norm: bool = False,
    ) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)


class RNN(_OneState):
    """An Elman network: torch.nn.RNN on fused layers.

    A step of one layer and direction, from x and the state h, where f is tanh or relu:

        h' = f(W_ih x + b_ih + W_hh h + b_hh)

    Elman, "Finding structure in time", 1990. The reference implementation is
    fastrnn.reference.elman_cell.

    Parameters, initial values and state_dict are those of torch.nn.RNN; a state_dict goes both
    ways.

    Args:
        input_size: I, the features of a step of the input.
        hidden_size: H, the hidden units.
        num_layers: L; each layer takes the output of the one before.
        nonlinearity: "tanh" or "relu".
        bias: whether there are b_ih and b_hh.
        batch_first: whether input and output are [B, T, features] instead of [T, B, features].
        dropout: probability of dropout on the output of every layer but the last, in training.
        bidirectional: whether each layer has a second direction, from the last step to the first.
        device: of the parameters.
        dtype: of the parameters.
        checkpoint_every: changes nothing: backward of an Elman layer needs its output alone.
        weight_dropout: probability of dropout on the entries of each W_hh, in training: one mask
            for each call, the same for all rows and steps (Wan et al., 2013; Merity et al.,
            arXiv:1708.02182). torch.nn.functional.dropout draws them before anything else, layer
            by layer and direction by direction.
        variational: whether `dropout` draws one mask per row, the same for all its steps (Gal and
            Ghahramani, arXiv:1512.05287).
        recurrent_dropout: probability of dropout on the h that W_hh multiplies, in training: one
            mask per row, direction and layer, the same for all steps, as Keras has it.
        zoneout: probability that a unit keeps its h in a step (Krueger et al., arXiv:1606.01305).
            In training it is drawn for each step, row and unit, from a seed of torch's generator;
            in eval mode h is p * previous + (1 - p) * new.
        grad_clip: the largest magnitude, elementwise, of the gradient that flows back from a step
            to the one before it (Graves, arXiv:1308.0850), after grad_scale of forward; None for
            any. What was clipped cannot be differentiated again.
        layer_norm: whether W_ih x and W_hh h are normalised (Ba et al., arXiv:1607.06450), each
            over all its H values with epsilon 1e-5: LN(W_ih x) * gain_ih + b_ih takes the place of
            W_ih x + b_ih, and LN(W_hh h) * gain_hh + b_hh that of W_hh h + b_hh. Each layer and
            direction then has further parameters, gain_ih_l0 and gain_hh_l0 [H], initially 1.

    Raises:
        ValueError: if an argument is out of range, or proj_size is given. The messages are
            torch.nn's.
        TypeError: if a size is not an int, or dropout is not a number.

    Examples:
        >>> import torch, fastrnn
        >>> rnn = fastrnn.RNN(8, 16, nonlinearity="relu")
        >>> output, h = rnn(torch.randn(5, 3, 8), mask=torch.ones(5, 3, dtype=torch.bool))
        >>> torch.equal(output[-1], h[0])
        True
    """

    _theirs = Rnn

    @overload  # type: ignore[misc]  # one, for types and documentation
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        checkpoint_every: int | None = None,
        weight_dropout: float = 0.0,
        variational: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        grad_clip: float | None = None,
        layer_norm: bool = False,
    ) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:  # the 4th positional argument, as torch.nn.RNN's
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)
