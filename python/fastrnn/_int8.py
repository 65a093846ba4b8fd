"""Layers with weights of 8 bits, for inference on the CPU; see csrc/cpu/int8.h.

A row w of a weight is scale * q, with q = round(w * (127 / max |w|)) in [-127, 127] and scale =
max |w| / 127. Inputs and states are quantised in the same way as they come, row by row; products
are sums of integers, which are exact; biases, gates and states are float32. So a row's result is
the same bit for bit alone and in any batch, for any number of threads, on every processor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._layer import CELLS, Layer
from ._load import _cpu

States = tuple[Tensor, ...]

_SCALE = "_scale"  # after a weight's name


def quantize(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The integers of a float weight [R, K], torch.int8, and the scales of its rows [R].

    A row whose greatest magnitude is below 2**-100 counts as zero.

    Raises:
        ValueError: for a weight that is not float, not finite, or not on the CPU; says its name.
    """
    if not weight.is_floating_point() or weight.device.type != "cpu":
        raise ValueError(
            f"{name}: expected a float tensor on cpu, got {weight.dtype} on {weight.device}"
        )
    weight = weight.detach().float()
    most = weight.abs().amax(1)
    if not bool(torch.isfinite(most).all()):
        raise ValueError(f"{name}: expected finite numbers, got infinity or NaN")
    most = torch.where(most < 2.0**-100, torch.zeros_like(most), most)
    inverse = torch.where(most == 0, most, 127 / most)
    return torch.round(weight * inverse.unsqueeze(1)).to(torch.int8), most / 127


class Int8Layers:
    """The layers of an LSTM, GRU or RNN, each packed once into integers of 8 bits.

    Args:
        mode: as torch.nn.RNNBase.mode.
        directions: D.
        layers: of each layer its weights and scales, as _cpu.Int8Layer takes them.
    """

    def __init__(
        self,
        mode: str,
        directions: int,
        layers: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]],
    ) -> None:
        self.mode, self.directions = mode, directions
        self.layers = [_cpu.Int8Layer(mode, directions, *layer) for layer in layers]

    @classmethod
    def of(
        cls, mode: str, directions: int, num_layers: int, weights: Mapping[str, Tensor]
    ) -> Int8Layers:
        """Quantises float weights, named and ordered as the parameters of torch.nn.RNNBase."""
        state: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if name.startswith("bias"):
                state[name] = weight.detach().float()
            else:
                state[name], state[name + _SCALE] = quantize(name, weight)
        return cls.from_state_dict(mode, directions, num_layers, state)

    @classmethod
    def from_state_dict(
        cls, mode: str, directions: int, num_layers: int, state: Mapping[str, Tensor]
    ) -> Int8Layers:
        """The layers of which state_dict() was saved."""

        def of_layer(k: int) -> tuple[list[Tensor], list[Tensor]]:
            weights, scales = [], []
            for name in _names(k, directions):
                if name in state:
                    weights.append(state[name])
                if name + _SCALE in state:
                    scales.append(state[name + _SCALE])
            return weights, scales

        return cls(mode, directions, map(of_layer, range(num_layers)))

    def state_dict(self) -> dict[str, Tensor]:
        """New tensors, by the names of torch.nn.RNNBase's parameters: weights as torch.int8, the
        scales of their rows (weight_ih_l0_scale [G*H]), and biases."""
        state: dict[str, Tensor] = {}
        for k, layer in enumerate(self.layers):
            weights, scales = iter(layer.weights), iter(layer.scales)
            each = len(layer.weights) // self.directions
            # w_ih, w_hh, perhaps both biases, perhaps w_hr
            wanted = [True, True, each > 3, each > 3, each % 2 == 1]
            for i, name in enumerate(_names(k, self.directions)):
                if not wanted[i % 5]:
                    continue
                state[name] = next(weights)
                if name.startswith("weight"):
                    state[name + _SCALE] = next(scales)
        return state

    @property
    def bytes(self) -> int:
        """What all weights, scales and biases take."""
        return sum(layer.bytes for layer in self.layers)

    def run(
        self,
        x: Tensor,
        states: States | None,
        batch: int,
        batch_sizes: Tensor | None = None,
        resets: Tensor | None = None,
        all_states: bool = False,
    ) -> tuple[Tensor, States, list[Tensor]]:
        """All layers over x, float32 [T, B, I] or, with batch_sizes, ragged [N, I].

        No gradient goes through it. A row of x or of a state that holds infinity or NaN makes NaN.

        Args:
            x: the input; see Layer.
            states: (h_0,) or (h_0, c_0), of all layers, [L * D, B, features]; None: zeros.
            batch: B.
            batch_sizes: int64 [T], the rows that are alive at each step.
            resets: bool, laid out as x.
            all_states: whether to return the states of every step.

        Returns:
            The output, the final states, shaped like states, and of each layer, if asked for, the
            states of every step: c of an LSTM, else h.

        Raises:
            ValueError: names the field of the record that does not fit.
        """
        directions = self.directions
        finals, sequences = [], []
        for k, layer in enumerate(self.layers):
            h_0, c_0 = None, None
            if states is not None:
                part = slice(k * directions, (k + 1) * directions)
                own = states if len(self.layers) == 1 else tuple(s[part] for s in states)
                h_0, c_0 = (*own, None)[:2]
            record: tuple[Any, ...] = Layer(
                self.mode, directions, batch, False, 0, False, all_states,
                x, h_0, c_0, batch_sizes, resets, None, (),
            )  # fmt: skip
            x, h_n, c_n, extra, _ = layer.run(record)
            finals.append((h_n,) if c_n is None else (h_n, c_n))
            if all_states:
                sequences.append(x if extra is None else extra)
        if len(finals) == 1:
            return x, finals[0], sequences
        return x, tuple(map(torch.cat, zip(*finals))), sequences

    def __getstate__(self) -> tuple[Any, ...]:
        packed = [(layer.weights, layer.scales) for layer in self.layers]
        return self.mode, self.directions, packed

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def _names(layer: int, directions: int) -> list[str]:
    """The names that parameters of a layer may have, in their order."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    return [f"{kind}_l{layer}{end}" for end in ("", "_reverse")[:directions] for kind in kinds]


# -- A module whose forward runs on them -----------------------------------------------------------


def attach(module: Any) -> Int8Layers:
    """Quantises the weights of a fastrnn.LSTM, GRU or RNN; from now on its forward runs on them.

    Its parameters stay as they are, and are not read any more.

    Returns:
        The layers; to run the module on others, set_layers(module, others).
    """
    names = module._flat_weights_names
    weights = {name: getattr(module, name) for name in names}
    directions = 2 if module.bidirectional else 1
    layers = Int8Layers.of(module.mode, directions, module.num_layers, weights)
    set_layers(module, layers)
    return layers


def set_layers(module: Any, layers: Int8Layers) -> None:
    """From now on the module's forward runs on `layers`."""
    module._run = partial(_run, layers)
    module._run_directly = partial(_run_directly, layers, module.batch_first)


def detach(module: Any) -> None:
    """The module's forward runs on its parameters again."""
    del module._run, module._run_directly


def _run(
    layers: Int8Layers, x: Tensor, states: States | None, rows: Any, all_states: bool
) -> tuple[Tensor, States, list[Tensor]]:
    """In place of a module's _run."""
    return layers.run(x, states, rows.batch, rows.batch_sizes, rows.resets, all_states)


def _run_directly(layers: Int8Layers, batch_first: bool, input: Any, hx: Any) -> Any:
    """In place of a module's _run_directly: the module's result; None where the call is more than
    tensors of a batch, or not right."""
    if torch.compiler.is_compiling() or type(input) is not Tensor or input.dim() != 3:
        return None
    states: States | None = hx if isinstance(hx, tuple) else None if hx is None else (hx,)
    has_cell_state = CELLS[layers.mode].has_cell_state
    entries = layers.directions * len(layers.layers)
    if states is not None and (
        len(states) != 1 + has_cell_state
        or any(type(s) is not Tensor or s.dim() != 3 or s.shape[0] != entries for s in states)
    ):
        return None
    x = input.transpose(0, 1) if batch_first else input
    if 0 in x.shape:
        return None
    try:
        output, final, _ = layers.run(x, states, x.shape[1])
    except ValueError:
        return None
    if batch_first:
        output = output.transpose(0, 1)
    return output, (final if has_cell_state else final[0])
