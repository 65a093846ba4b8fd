"""The CUDA kernels on a GPU, if there is one, and everywhere on the CPU by the harness.

FASTRNN_HARNESS_SANITIZE=1 builds the harness with AddressSanitizer:

    LD_PRELOAD=$(c++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
        FASTRNN_HARNESS_SANITIZE=1 python -m pytest tests/cuda
"""

import os
from types import ModuleType

import pytest
import torch

from backends import ENGINES, Engine, Target
from harness import build


@pytest.fixture(params=ENGINES)
def engine(request) -> Engine:
    return ENGINES[request.param]


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    pytest.importorskip("pybind11")
    return build.load(sanitize=os.environ.get("FASTRNN_HARNESS_SANITIZE") == "1")


@pytest.fixture(params=["harness", "cuda"])
def target(request) -> Target:
    if request.param == "harness":
        return Target("harness", request.getfixturevalue("harness"), "cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    _cuda = pytest.importorskip("fastrnn._cuda")
    return Target("cuda", _cuda, "cuda")
