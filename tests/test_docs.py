"""Every Python example in the README runs, in order, in one namespace."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[tuple[int, str]]:
    text = README.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.mark.skipif(not README.exists(), reason="the README is not part of this tree")
def test_readme(tmp_path, monkeypatch):
    assert blocks(), "no ```python block found"
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "readme"}
    for line, source in blocks():  # newlines in front: a traceback names the README's own line
        exec(compile("\n" * line + source, str(README), "exec"), namespace)
