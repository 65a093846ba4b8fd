"""The solutions to the exercises of docs/learn, and what they share."""

import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))

collect_ignore_glob = [] if (DOCS / "course.py").exists() else ["*"]  # not in the source archive


@pytest.fixture(autouse=True)
def course_settings():
    """As on the pages: numbers of 64 bits, and one thread."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def run_page(tmp_path_factory):
    """Runs a page's program, once: what its blocks print, its names, and its picture's folder."""
    import course

    @cache
    def run(stem):
        folder = tmp_path_factory.mktemp(stem)
        outputs, names = course.run(course.LEARN / f"{stem}.md", folder)
        return SimpleNamespace(outputs=outputs, names=SimpleNamespace(**names), folder=folder)

    return run
