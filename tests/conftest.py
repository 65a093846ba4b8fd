import os

# Before torch loads: its threads spin at barriers, and a busy machine would take minutes more.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import fastrnn
from helpers import CELLS, TOLERANCE


def pytest_report_header() -> str:
    return (
        f"fastrnn {fastrnn.__version__}, CPU variant {fastrnn.cpu_variant()} "
        f"of {', '.join(fastrnn.cpu_variants())}; torch {torch.__version__}"
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
