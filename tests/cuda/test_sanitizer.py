"""Where the harness is built with sanitizers, they see what the kernels do to memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The values of the tables are what the bindings do not look at.
SCRIPT = """
import torch
from backends import h100
from fastrnn._cuda_rows import Rows
from harness import build
from test_scan import make_case

backend = h100(build.load(sanitize=True))
layer = make_case("GRU", 2, 3, 4, 5, ragged=True).layer
rows = Rows(layer, backend.upload)
rows.place[0] += {beyond} * rows.count
results = layer._replace(keep=True).make_results()
backend._run(False, layer, rows, results.saved, results)
"""


@pytest.mark.skipif(
    os.environ.get("FASTRNN_HARNESS_SANITIZE") != "1", reason="the harness has no sanitizers"
)
@pytest.mark.parametrize("beyond", [0, 1])
def test_a_place_beyond_the_last(harness, beyond):
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(beyond=beyond)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if beyond:
        assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
        assert "ForwardItems" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
