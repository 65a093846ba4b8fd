"""The wheel for arm64 that .ci/arm64 has built, in an emulator: pytest
tests/packaging/check_arm64.py, after it.

Neither the order of sums nor what is fused is the same as on x86-64: results agree within the error
of their dtype.
"""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from fastrnn import _cpu
from fastrnn.__main__ import openmp_library

SCAN = Path(__file__).with_name("scan.py")
BUILD = Path(__file__).resolve().parents[2] / "build" / "arm64"
# Of the largest number of a tensor.
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}


def scan(*command: str, **env: str) -> dict:
    done = subprocess.run(
        [*command, "--values"], env=os.environ | env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def emulated() -> dict:
    (extension,) = BUILD.glob("site/fastrnn/_cpu.*.so")
    (openmp,) = BUILD.glob("root/usr/lib/aarch64-linux-gnu/libgomp.so.1")
    command = BUILD / "python", SCAN, extension, openmp
    return scan(*map(str, command), OMP_WAIT_POLICY="passive", FASTRNN_CPU="")


def test_threads(emulated):
    assert emulated["variants"] == ["baseline"]
    scans = emulated["scans"]
    alone = {name: digest for name, digest in scans.items() if name.endswith(" 1 threads")}
    assert len(alone) == len(scans) / 2
    assert all(scans[n.replace(" 1 threads", " 2 threads")] == alone[n] for n in alone)


def numbers(dtype: str, text: str) -> torch.Tensor:
    data = numpy.frombuffer(base64.b64decode(text), numpy.uint8).copy()
    return torch.from_numpy(data).view(getattr(torch, dtype)).double()


def test_results(emulated):
    here = scan(sys.executable, str(SCAN), _cpu.__file__, openmp_library(), FASTRNN_CPU="baseline")
    assert here["values"].keys() == emulated["values"].keys()
    for name, tensors in here["values"].items():
        dtype = name.split()[1].removeprefix("torch.")
        for i, (expected, actual) in enumerate(zip(tensors, emulated["values"][name])):
            assert expected[0] == actual[0]
            expected, actual = numbers(*expected), numbers(*actual)
            most = expected.abs().max()
            error = (actual - expected).abs().max() / most if most > 0 else actual.abs().max()
            assert error <= TOLERANCE[dtype], f"{name}, tensor {i}: error {error:.2g}"


def test_layers():
    """Each cell against torch.nn's, forward and backward, on that torch."""
    done = subprocess.run(
        [BUILD / "python", "-m", "fastrnn", "--json"],
        env=os.environ | {"PYTHONPATH": str(BUILD / "site"), "FASTRNN_CPU": ""},
        cwd=BUILD,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True, report
    assert "aarch64" in done.stdout
