"""Each CPU variant in a process of its own, and each thread count, which never changes a bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrnn
from helpers import assert_same_bits, inputs, make, make_mask, run


def python(variant: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args],
        env=os.environ | {"FASTRNN_CPU": variant},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("variant", fastrnn.cpu_variants())
def test_variant(variant):
    tests = [
        str(Path(__file__).with_name(name))
        for name in ("test_tiles.py", "test_masked.py", "test_half.py")
    ]
    result = python(variant, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def test_every_processor_runs_the_baseline():
    assert "baseline" in fastrnn.cpu_variants()
    assert len(set(fastrnn.cpu_variants())) == len(fastrnn.cpu_variants())


@pytest.mark.parametrize("name", ["pentium", "AVX-999", "cuda"])
def test_unknown_variant(name):
    result = python(name, "-c", "import fastrnn")
    assert result.returncode == 1
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith(("ImportError", "RuntimeError"))
    for word in ("FASTRNN_CPU", name, *fastrnn.cpu_variants()):
        assert word in error


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "holes"])
@pytest.mark.parametrize("sizes", [(20, 1, 9, 128), (6, 33, 65, 129), (2, 3, 4, 300)], ids=str)
def test_thread_counts(cell, dtype, bidirectional, sizes, masked, num_threads):
    T, B, *features = sizes
    model = make(fastrnn, cell, *features, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, T, B)
    mask = make_mask("holes", T, B) if masked else None
    results = []
    for threads in (1, 2, 3, 4):
        num_threads(threads)
        results.append(run(model, x, hx, mask=mask))
        assert_same_bits(run(model, x, hx, mask=mask), results[-1])
    for result in results[1:]:
        assert_same_bits(result, results[0])
