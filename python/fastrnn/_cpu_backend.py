"""The CPU's backend: all of it is compiled, see csrc/cpu/bind/."""

from __future__ import annotations

import torch

from . import _int8, _kernels
from ._backends import INT8, Backend, register
from ._layer import Layer, Results
from ._load import _cpu


class CpuBackend(Backend):
    """fastrnn._cpu as a Backend."""

    backward = staticmethod(_cpu.backward)
    run_module = staticmethod(_cpu.run_module)
    record = staticmethod(_cpu.record)
    replay = staticmethod(_cpu.replay)
    forward_stack = staticmethod(_cpu.forward_stack)
    record_stack = staticmethod(_cpu.record_stack)
    replay_stack = staticmethod(_cpu.replay_stack)
    packs = True
    keep = staticmethod(_cpu.PackedModel)

    def runs_side_by_side(self, stack: Layer, layers: int, /) -> bool:
        threads, _, _ = _cpu.plan_stack(stack, layers)
        return threads > 1

    def runs_cell(self, mode: str, dtype: torch.dtype) -> bool:
        return _kernels.load(mode, dtype)

    def pack(self, layer: Layer, storage: str, /) -> _cpu.PackedLayer:
        if storage == INT8:
            return _int8.pack(layer.mode, layer.directions, layer.weights)
        return _cpu.PackedLayer(layer, storage)

    def forward(self, layer: Layer) -> Results:
        return Results._make(_cpu.forward(layer))


register("cpu", CpuBackend())
