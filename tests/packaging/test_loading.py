"""The extensions load: _cpu with torch's OpenMP runtime, _cuda or nothing in its place."""

import subprocess
import sys

import pytest

from fastrnn._load import openmp_library

# What torch 2.6 for aarch64 does: no library that it shows to all others depends on the runtime.
HIDDEN = """
import ctypes
load = ctypes.CDLL
ctypes.CDLL = lambda name, mode=0, **more: load(name, **more)
import torch
ctypes.CDLL = load
try:
    ctypes.CDLL(None).GOMP_parallel
except AttributeError:
    print("hidden")
"""
BROKEN_CUDA = """
import sys
class Broken:
    def find_spec(name, path, target=None):
        if name == "fastrnn._cuda":
            raise ImportError("libcuda.so.1: cannot open shared object file")
sys.meta_path.insert(0, Broken)
"""
RUN = """
import torch, fastrnn
from fastrnn.__main__ import openmp
y, _ = fastrnn.GRU(8, 64)(torch.randn(20, 32, 8))
y.sum().backward()
assert not openmp()["others"], openmp()
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(openmp_library() is None, reason="no OpenMP runtime of a known kind")
@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's way to load libraries")
def test_hidden_runtime():
    assert python(HIDDEN + RUN) == "hidden\n"


def test_cuda_library_that_does_not_load():
    python(BROKEN_CUDA + RUN)
