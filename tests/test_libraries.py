"""The programs of docs/libraries.md, each where the package is that it needs."""

import warnings

import pytest
import torch

from test_docs import DOCS, blocks

PAGE = DOCS / "libraries.md"
PACKAGES = dict.fromkeys(b.title for b in blocks(PAGE) if b.title) if PAGE.exists() else {}


@pytest.mark.parametrize("package", PACKAGES)
def test_program(package, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        pytest.importorskip(package, exc_type=(ImportError, OSError))
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(0)
        namespace: dict = {"__name__": "__main__"}
        for block in blocks(PAGE):
            if block.title == package:
                code = "\n" * (block.line - 1) + block.source  # a traceback names the page's line
                exec(compile(code, str(PAGE), "exec"), namespace)


def test_every_program_is_run():
    assert {*PACKAGES} == {
        "sb3_contrib", "torchrl", "opacus", "lightning", "transformers", "neuralforecast", "darts",
        "speechbrain",
    }  # fmt: skip
    assert all(b.title or b.language != "python" for b in blocks(PAGE))
