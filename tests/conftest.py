import importlib.util
import os
from pathlib import Path

# Before torch loads: its threads spin at barriers, and a busy machine would take minutes more.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Kernels of users' own cells stay from one run to the next.
os.environ.setdefault("FASTRNN_CACHE", str(Path(__file__).parents[1] / "build" / "cells"))

import pytest
import torch

import fastrnn
from fastrnn._backends import register
from helpers import CELLS, TOLERANCE

# What tests a CPU, a process, a program, the sources or the reference implementation, or puts its
# tensors on the CPU.
NAMES = """
    architecture bench cell cell_packages cell_search char_lm common_modules diagnostics distributed
    docs examples exchange freeze fuzz int8 learn libraries math onnx packaging policy reference
    seq2seq stream substitution surnames tagging threads tiles tools torch_models truncation types
    variants visualise word_lm
"""
CPU_ONLY = NAMES.split()
if importlib.util.find_spec("hypothesis") is None:  # a GPU's machine may not have it
    CPU_ONLY += ["properties"]


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--device",
        choices=["cpu", "cuda", "harness"],
        default="cpu",
        help="what runs the layers: harness is the CUDA kernels, compiled for the CPU",
    )


def pytest_configure(config) -> None:
    device = config.getoption("device")
    if device == "cpu":
        return
    torch.backends.cudnn.allow_tf32 = False  # the tolerances are those of float32
    if device == "cuda":
        torch.set_default_device("cuda")
        for dtype in TOLERANCE:  # cuDNN adds up in another order than any CPU
            TOLERANCE[dtype] *= 10
    else:
        from backends import h100
        from harness import build

        register("cpu", h100(build.load()))


def pytest_ignore_collect(collection_path, config) -> bool | None:
    """Of the CPU's tests, a GPU runs those of layers; its own are in cuda."""
    if config.getoption("device") == "cpu":
        return None
    name = collection_path.stem
    return name == "cuda" or name.removeprefix("test_") in CPU_ONLY or None


def pytest_report_header(config) -> str:
    return (
        f"fastrnn {fastrnn.__version__} on {config.getoption('device')}, CPU variant "
        f"{fastrnn.cpu_variant()} of {', '.join(fastrnn.cpu_variants())}; torch {torch.__version__}"
    )


@pytest.fixture(params=CELLS)
def cell(request) -> str:
    return request.param


@pytest.fixture(params=TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=[False, True], ids=["uni", "bi"])
def bidirectional(request) -> bool:
    return request.param


@pytest.fixture
def one_thread():
    """Enough for tiny models, and quick on a busy machine, where torch.nn's threads spin."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
