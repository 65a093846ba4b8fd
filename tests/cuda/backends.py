"""Ways to run the CUDA kernels: on a GPU or on the harness, and in which arithmetic."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from fastrnn._cuda_backend import CudaBackend, Nvcc
from fastrnn._kernels import Toolchain
from harness import build


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


class Target(NamedTuple):
    """Where the kernels run."""

    name: str
    kernels: ModuleType
    device: str

    @property
    def toolchain(self) -> Toolchain:
        return Nvcc(self.kernels) if self.name == "cuda" else build.Harness(self.kernels)

    def capability(self, engine: Engine) -> int:
        if self.name == "cuda":
            major, minor = torch.cuda.get_device_capability()
            return 10 * major + minor
        return 75 if engine.dtype.itemsize == 2 and not engine.tensor else 90

    def backend(
        self, engine: Engine, choose: Callable[[Any, Any], Any] | None = None
    ) -> CudaBackend:
        """The backend on these kernels; skips the test where the device cannot run it."""
        capability = self.capability(engine)
        if self.name == "cuda" and engine.dtype != torch.float64:
            if engine.tensor and capability < 80:
                pytest.skip("no tensor cores for this type")
            if engine.dtype.itemsize == 2 and not engine.tensor and capability >= 80:
                pytest.skip("compiled for older GPUs only")
        return CudaBackend(
            self.kernels,
            choose=choose,
            allows_tf32=lambda: engine.tensor,
            device=capability,
            toolchain=self.toolchain,
        )


def h100(kernels: ModuleType) -> CudaBackend:
    """The kernels of the harness as on an H100, or as FASTRNN_CUDA_PLAN says."""
    info = kernels.DeviceInfo(132, 227 * 1024, 90)
    backend = CudaBackend(
        kernels,
        choose=lambda problem, _: backend.make_plan(problem, info),
        device=info.capability,
        toolchain=build.Harness(kernels),
    )
    return backend
