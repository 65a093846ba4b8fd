"""README.md as a package index shows it."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Not by sys.path, on which processes that tests start would find the package without its extension.
_spec = importlib.util.spec_from_file_location("pypi_readme", ROOT / "python" / "pypi_readme.py")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
absolute = _module.absolute

README = (ROOT / "README.md").read_text(encoding="utf-8")
TARGET = re.compile(r"\]\(([^()\s]+)\)")


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_with_a_repository():
    text = absolute(README, "https://example.org/us/fastrnn/")
    targets = TARGET.findall(prose(text))
    assert len(targets) == len(TARGET.findall(prose(README)))
    assert all(t.startswith(("https://", "#")) for t in targets), targets
    assert "https://example.org/us/fastrnn/raw/HEAD/docs/img/speedup.svg" in targets
    assert "https://example.org/us/fastrnn/blob/HEAD/docs/install.md" in targets


def test_without_a_repository():
    text = absolute(README, "")
    assert all(t.startswith(("https://", "#")) for t in TARGET.findall(prose(text)))
    assert "docs/img" not in text
    assert "installation" in text
    assert "[Installation]" not in text


def test_code_stays():
    code = "```python\nf = table[0](docs)\n```\n"
    text = f"{code}`a[1](b)` and [a page](docs/a.md), [a site](https://x.org), [below](#here)\n"
    text += "[`code` in a link](docs/a.md)\n"
    expected = f"{code}`a[1](b)` and a page, [a site](https://x.org), [below](#here)\n"
    expected += "`code` in a link\n"
    assert absolute(text, "") == expected
    assert "[`code` in a link](https://x.org/blob/HEAD/docs/a.md)" in absolute(
        text, "https://x.org"
    )
