"""Where the harness is built with sanitizers, they see what the kernels do to memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from fastrnn import _cuda_ops
from harness import build

class Short(_cuda_ops.Scan):
    def _find_plan(self, *args):
        problem, plan, size = super()._find_plan(*args)
        return problem, plan, size - {missing}

scan = Short(build.load(sanitize=True), device=90)
x, weights = torch.zeros(2, 3, 4), [[torch.zeros(15, n)] for n in (4, 5)]
scan.forward("GRU", x, *weights, [], [], [], None, None, None, None, 3, False, False, False)
"""


@pytest.mark.skipif(
    os.environ.get("FASTRNN_HARNESS_SANITIZE") != "1", reason="the harness has no sanitizers"
)
@pytest.mark.parametrize("missing", [0, 8])
def test_a_short_workspace(harness, missing):
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(missing=missing)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if missing:
        assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
        assert "start_kernel" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
