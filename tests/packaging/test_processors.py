"""On processors that are emulated: the kernels they can run are chosen, and give the same bits.

Needs QEMU's user mode emulator (Debian: qemu-user or qemu-user-static). torch itself runs on
processors with AVX only, so the extension is run alone.
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import fastrnn
from fastrnn.__main__ import openmp_library

QEMU = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
SCAN = Path(__file__).with_name("scan.py")

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64 processors"),
    pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed"),
]

PROCESSORS = {
    "qemu64,-sse3,-cx16": ["baseline"],  # x86-64-v1: no more than the architecture demands
    "Opteron_G1": ["baseline"],
    "Nehalem": ["baseline"],
    "SandyBridge": ["baseline"],  # AVX; the oldest that torch runs on
    "Haswell": ["avx2", "baseline"],
    "Haswell,-avx2": ["baseline"],
    "Haswell,-fma": ["baseline"],
    "Haswell,-f16c": ["baseline"],
}


def python(*args: str, processor: str = "", **env: str) -> str:
    emulator = [QEMU, "-cpu", processor] if processor else []
    env = {"OMP_WAIT_POLICY": "passive"} | env
    done = subprocess.run(
        [*emulator, sys.executable, *args],
        env={k: v for k, v in os.environ.items() if k != "FASTRNN_CPU"} | env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@cache
def runs_python(processor: str) -> bool:
    """Some systems build all their programs for newer processors."""
    try:
        return python("-c", "print(1)", processor=processor) == "1\n"
    except AssertionError:
        return False


@pytest.fixture(params=PROCESSORS)
def processor(request) -> str:
    if not runs_python(request.param):
        pytest.skip(f"this Python itself does not run on {request.param}")
    return request.param


@cache
def scan(processor: str = "", variant: str = "") -> dict:
    extension = importlib.util.find_spec("fastrnn._cpu").origin
    args = str(SCAN), extension, openmp_library()
    return json.loads(python(*args, processor=processor, FASTRNN_CPU=variant))


def test_scan(processor):
    emulated = scan(processor)
    assert emulated["variants"] == PROCESSORS[processor]
    variant = emulated["variants"][0]
    if variant not in fastrnn.cpu_variants():
        pytest.skip(f"this machine cannot run {variant} to compare with")
    assert emulated["scans"] == scan(variant=variant)["scans"]


# Not on Haswell: in the emulator, QEMU 7.2, torch.nn.LSTM's own float32 results are wrong there.
@pytest.mark.parametrize("processor", ["SandyBridge"], indirect=True)
def test_with_torch(processor):
    report = json.loads(python("-m", "fastrnn", "--json", processor=processor))
    assert report["ok"] is True
    assert report["cpu"]["variants"] == PROCESSORS[processor]
