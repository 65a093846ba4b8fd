"""What torch.utils.flop_counter counts for a scan: its matrix products, as torch counts its own.

A product of [m, k] and [k, n] counts as 2 * m * n * k, and everything else as nothing. So a row of
the input counts twice for every number in the weights that it is multiplied with.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from math import prod
from types import ModuleType
from typing import Any

import torch

from ._layer import Layer, Saved

_COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def _numbers(weights: Sequence[Shape]) -> int:
    return sum(map(prod, weights))


def scan_flops(
    rows: int, weight_ih: Sequence[Shape], weight_hh: Sequence[Shape], weight_hr: Sequence[Shape]
) -> int:
    """Of the forward pass over N rows; the weights' shapes by direction, weight_hr may be empty."""
    return 2 * rows * (_numbers(weight_ih) + _numbers(weight_hh) + _numbers(weight_hr))


def scan_backward_flops(
    rows: int,
    batch: int,
    weight_ih: Sequence[Shape],
    weight_hh: Sequence[Shape],
    weight_hr: Sequence[Shape],
    *,
    wanted: Sequence[bool],
) -> int:
    """Of the backward pass; `wanted` says which gradients: of x, h_0, W_ih, W_hh and W_hr."""
    want_x, want_h_0, want_ih, want_hh, want_hr = wanted
    # What the first step of a row hands back is the gradient of h_0.
    recurrent = rows if want_h_0 else max(rows - batch, 0)
    return 2 * (
        rows * (want_x + want_ih) * _numbers(weight_ih)
        + (recurrent + rows * want_hh) * _numbers(weight_hh)
        + rows * (1 + want_hr) * _numbers(weight_hr)
    )


def _weights(layer: Layer) -> tuple[Sequence[Shape], Sequence[Shape], Sequence[Shape]]:
    """The shapes of W_ih, W_hh and W_hr by direction, of a record of shapes in place of tensors."""
    each: Any = layer.by_direction
    weight_hh = [w[1] for w in each] if layer.cell.recurrent else []
    return (
        [w[0] for w in each],
        weight_hh,
        [w[layer.matrices - 1] for w in each if layer.has_projection],
    )


def _forward(*args: Any, out_shape: Any) -> int:
    layer = Layer._make(args)
    return scan_flops(prod(layer.x[:-1]), *_weights(layer))


def _backward(*args: Any, out_shape: Any) -> int:
    count = len(Layer._fields)
    layer, saved = Layer._make(args[:count]), Saved._make(args[count:])
    want_x, want_h_0, _, _, *want_weights = saved.wanted
    each = len(layer.weights) // layer.directions
    want_ih = any(want_weights[::each])
    want_hh = layer.cell.recurrent > 0 and any(want_weights[1::each])
    want_hr = layer.has_projection and any(want_weights[layer.matrices - 1 :: each])
    wanted = want_x, want_h_0, want_ih, want_hh, want_hr
    return scan_backward_flops(prod(layer.x[:-1]), layer.batch, *_weights(layer), wanted=wanted)


def _register(counter: ModuleType) -> None:
    operators = torch.ops.fastrnn
    counter.register_flop_formula(operators.scan_forward)(_forward)
    counter.register_flop_formula(operators.scan_backward)(_backward)


class _OnImport(MetaPathFinder):
    """Registers when the counter is imported, which with Triton takes most of a second."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Tells torch.utils.flop_counter, now or when it is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _OnImport())
