"""Ways to run the CUDA kernels: on a GPU or on the harness, and in which arithmetic."""

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from fastrnn import _cuda_ops, _functions, _modules, _ops


class Engine(NamedTuple):
    """How a block multiplies."""

    dtype: torch.dtype
    tensor: bool  # on tensor cores
    tolerance: float  # of the largest error, relative to the largest entry (or to 1)


ENGINES = {
    "f32": Engine(torch.float32, False, 2e-5),
    "tf32": Engine(torch.float32, True, 4e-3),
    "f64": Engine(torch.float64, False, 1e-12),
    "bf16": Engine(torch.bfloat16, True, 6e-2),
    "f16": Engine(torch.float16, True, 8e-3),
    "bf16-plain": Engine(torch.bfloat16, False, 6e-2),  # before sm_80
    "f16-plain": Engine(torch.float16, False, 8e-3),
}


class Backend(NamedTuple):
    name: str
    kernels: ModuleType
    device: str

    def capability(self, engine: Engine) -> int:
        if self.name == "cuda":
            major, minor = torch.cuda.get_device_capability()
            return 10 * major + minor
        return 75 if engine.dtype.itemsize == 2 and not engine.tensor else 90

    def scan(
        self, engine: Engine, choose: Callable[[Any, Any], Any] | None = None
    ) -> _cuda_ops.Scan:
        """The operators on these kernels; skips the test where the device cannot run it."""
        capability = self.capability(engine)
        if self.name == "cuda" and engine.dtype != torch.float64:
            if engine.tensor and capability < 80:
                pytest.skip("no tensor cores for this type")
            if engine.dtype.itemsize == 2 and not engine.tensor and capability >= 80:
                pytest.skip("compiled for older GPUs only")
        return _cuda_ops.Scan(self.kernels, choose, capability)


def take_over(kernels: ModuleType) -> None:
    """From now on in this process, layers on CPU tensors run on the kernels of the harness.

    They run as on an H100, or as FASTRNN_CUDA_PLAN says.
    """
    h100 = kernels.DeviceInfo(132, 227 * 1024, 90)
    scan = _cuda_ops.Scan(kernels, device=h100.capability)
    scan._choose = lambda problem, _: scan._make_plan(problem, h100)
    _functions.scan_forward_cpu, _functions.scan_backward_cpu = scan.forward, scan.backward
    _modules.takes_mask = _ops.has_kernel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these operators have kernels already
        _ops._library.impl("scan_forward", scan.forward, "CPU", allow_override=True)
        _ops._library.impl("scan_backward", scan.backward, "CPU", allow_override=True)
