"""fastrnn.LSTM, GRU and RNN: torch.nn's modules on fused layers.

Parameters, initialisation, checks and state_dict are torch.nn.RNNBase's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from ._functions import FUNCTIONS, Spec, layer_forward, reference_layer, transforming
from ._ops import has_kernel
from ._ragged import check_lengths, check_mask, from_mask, gather, is_per_sample, scatter

States = tuple[Tensor, ...]  # (h,) or (h, c), each [L*D, B, H]


def _run_layer(
    spec: Spec,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    mask: Tensor | None = None,
) -> tuple[Tensor, States]:
    """One layer, on its kernel where there is one: output and final states."""
    tensors = [x, *weights] + [s for s in (h_0, c_0) if s is not None]
    compiling, transformed = torch.compiler.is_compiling(), transforming()
    if (
        mask is not None
        or len(weights) // spec.directions in (3, 5)  # a projection
        or not all(map(has_kernel, tensors))
        or (compiling and transformed)  # which torch.compile knows for plain torch only
    ):
        output, *states = reference_layer(spec, x, h_0, c_0, weights, mask)[:3]
    elif compiling:  # the bare operator has a gradient too
        output, *states = layer_forward(spec, x, h_0, c_0, weights, torch.is_grad_enabled())[:3]
    elif transformed or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        function = FUNCTIONS[spec.mode]
        output, *states = function.apply(*spec, x, h_0, c_0, *weights)[:3]  # type: ignore[no-untyped-call]
    else:
        with torch._C._AutoDispatchBelowAutograd():
            output, *states = layer_forward(spec, x, h_0, c_0, weights, keep=False)[:3]
    return output, tuple(states[: 2 if spec.mode == "LSTM" else 1])


class _RNNBase(RNNBase):
    """What LSTM, GRU and RNN share. States are a tuple here, (h,) or (h, c)."""

    def _run(
        self,
        x: Tensor,
        states: States | None,
        batch: int,
        batch_sizes: Tensor | None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, States]:
        """All layers over x, [T, B, I], ragged [N, I], or [T, B, I] under mask [T, B]."""
        directions = 2 if self.bidirectional else 1
        spec = Spec(self.mode, directions, batch, batch_sizes)
        # Read by name: the attribute is right whatever a user put in the parameter's place.
        weights = [getattr(self, name) for name in self._flat_weights_names]
        each = len(weights) // self.num_layers
        finals = []
        for k in range(self.num_layers):
            h_0: Tensor | None = None
            c_0: Tensor | None = None
            if states is not None:
                own = [s[k * directions : (k + 1) * directions] for s in states]
                h_0, c_0 = own[0], own[1] if len(own) > 1 else None
            x, final = _run_layer(spec, x, h_0, c_0, weights[k * each : (k + 1) * each], mask)
            finals.append(final)
            if self.dropout and self.training and k < self.num_layers - 1:
                x = torch.nn.functional.dropout(x, self.dropout)
        if self.num_layers == 1:
            return x, finals[0]
        return x, tuple(torch.cat(s) for s in zip(*finals))

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
        lengths: Tensor | Sequence[int] | None,
        mask: Tensor | None,
    ) -> tuple[Tensor | PackedSequence, States]:
        if lengths is not None and mask is not None:
            raise ValueError("expected lengths or mask, got both")
        if isinstance(input, PackedSequence):
            if lengths is not None or mask is not None:
                name = "mask" if lengths is None else "lengths"
                raise ValueError(f"{name}: expected none with a PackedSequence, which has its own")
            return self._forward_packed(input, states)

        if input.dim() not in (2, 3):
            name, noun = ("RNN", " tensor") if self.mode.startswith("RNN") else (self.mode, "")
            raise ValueError(
                f"{name}: Expected input to be 2D or 3D, got {input.dim()}D{noun} instead"
            )
        shape = input.shape[:-1]
        is_batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not is_batched:
            input = input.unsqueeze(batch_dim)
        if states is not None:
            self._check_dims(states, 3 if is_batched else 2)
            if not is_batched:
                states = tuple(s.unsqueeze(1) for s in states)
            self._check_states(input, states, None)
        else:
            self.check_input(input, None)
        steps, batch = input.shape[1 - batch_dim], input.shape[batch_dim]
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

        ragged = None
        if lengths is not None:
            ends = check_lengths(lengths, batch, steps, input.device)
            mask = torch.arange(steps, device=input.device).unsqueeze(1) < ends
        elif mask is not None:
            mask = check_mask(mask, shape).to(input.device).reshape(input.shape[:-1])
            mask = mask.t() if self.batch_first else mask
        if mask is not None and not is_per_sample(mask):
            ragged, mask = from_mask(mask, self.batch_first), None

        if ragged is None:
            x = input.transpose(0, 1) if self.batch_first else input
            output, final = self._run(x, states, batch, None, mask)
            if self.batch_first:
                output = output.transpose(0, 1)
        else:
            if states is not None:
                states = tuple(s.index_select(1, ragged.sorted_indices) for s in states)
            x = gather(input.reshape(-1, input.shape[-1]), ragged.rows)
            output, final = self._run(x, states, batch, ragged.batch_sizes)
            output = scatter(output, ragged.rows, steps * batch).view(*input.shape[:-1], -1)
            final = tuple(s.index_select(1, ragged.unsorted_indices) for s in final)
        if not is_batched:
            output = output.squeeze(batch_dim)
            final = tuple(s.squeeze(1) for s in final)
        return output, final

    def _forward_packed(
        self, input: PackedSequence, states: States | None
    ) -> tuple[PackedSequence, States]:
        x, batch_sizes, sorted_indices, unsorted_indices = input
        if states is None:
            self.check_input(x, batch_sizes)
        else:
            if sorted_indices is not None:
                states = tuple(s.index_select(1, sorted_indices) for s in states)
            self._check_states(x, states, batch_sizes)
        output, final = self._run(x, states, int(batch_sizes[0]), batch_sizes)
        if unsorted_indices is not None:
            final = tuple(s.index_select(1, unsorted_indices) for s in final)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), final


_ARGUMENTS = """
    Constructor, parameters, initial weights and state_dict are those of torch.nn.{name}; a
    state_dict goes both ways.

    forward(input, hx=None, *, lengths=None, mask=None) -> output, {final}

    Args:
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
        hx: {hx}. None means zeros.
        lengths: int64 [B] or a list, the number of real steps of each row, in any order, 0 allowed.
        mask: bool, laid out as the input's first two dimensions, True where a step is real, in any
            pattern. A step that is not real leaves the state as it is and outputs zeros, and what
            stands there in the input never matters.

    Returns:
        output: laid out as input with D*H features, a PackedSequence for a PackedSequence.
        {final}: the states after each row's last real step, where the reverse direction starts.

    Raises:
        torch.nn's own errors for what torch.nn refuses; ValueError for a wrong lengths or mask.
"""


class LSTM(_RNNBase):
    __doc__ = "A long short-term memory network; see fastrnn.reference.lstm_cell.\n" + (
        _ARGUMENTS.format(
            name="LSTM", final="(h_n, c_n)", hx="(h_0, c_0), [L*D, B, H] each ([L*D, H] unbatched)"
        )
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    # The checks that torch.nn.LSTM adds to RNNBase are methods of that class.
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args: Any = torch.nn.LSTM.check_forward_args
    permute_hidden: Any = torch.nn.LSTM.permute_hidden

    def _check_states(self, input: Tensor, states: States, batch_sizes: Tensor | None) -> None:
        self.check_forward_args(input, states, batch_sizes)

    @staticmethod
    def _check_dims(states: States, expected: int) -> None:
        if states[0].dim() != expected or states[1].dim() != expected:
            kind = "batched 3-D" if expected == 3 else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {expected}-D but got "
                f"({states[0].dim()}-D, {states[1].dim()}-D) tensors"
            )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        if hx is not None and len(hx) > 2:
            raise RuntimeError("lstm expects two hidden states")
        states = None if hx is None else tuple(hx)
        output, (h_n, c_n) = self._forward(input, states, lengths, mask)
        return output, (h_n, c_n)


class _OneState(_RNNBase):
    """GRU and RNN, whose state is h alone."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        output, (h_n,) = self._forward(input, None if hx is None else (hx,), lengths, mask)
        return output, h_n


class GRU(_OneState):
    __doc__ = "A gated recurrent unit network; see fastrnn.reference.gru_cell.\n" + (
        _ARGUMENTS.format(name="GRU", final="h_n", hx="h_0 [L*D, B, H] ([L*D, H] unbatched)")
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)


class RNN(_OneState):
    __doc__ = "An Elman network with tanh or relu; see fastrnn.reference.elman_cell.\n" + (
        _ARGUMENTS.format(name="RNN", final="h_n", hx="h_0 [L*D, B, H] ([L*D, H] unbatched)")
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:  # the 4th positional argument, as torch.nn.RNN's
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        modes = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
        if self.nonlinearity not in modes:
            raise ValueError(
                f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(modes[self.nonlinearity], *args, **kwargs)
