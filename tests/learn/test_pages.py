"""The course is true: programs and notebooks print what the pages say, and draw their pictures."""

import html
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from course import LEARN, PAGES, agrees, blocks, count_lines, notebook, program

ROOT = LEARN.parents[1]
STEMS = [page.stem for page in PAGES]


def texts(picture, numbers):
    """The words of an SVG, and its numbers if they are asked for."""
    found = re.findall(r"<text\b[^>]*>(.*?)</text>", picture.read_text("utf-8"), re.DOTALL)
    plain = [html.unescape(re.sub("<[^>]*>", "", text)) for text in found]
    return [text for text in plain if numbers or re.search("[a-z]", text)]


def drawn_by(picture):
    return re.search(r"Matplotlib v[\d.]+", picture.read_text("utf-8"))[0]


@pytest.mark.parametrize("stem", STEMS)
def test_program(run_page, stem):
    page, ran = LEARN / f"{stem}.md", run_page(stem)
    for block, printed in zip(blocks(page), ran.outputs, strict=True):
        assert agrees(block, printed), f"{page.name}:{block.line} printed\n{printed}"
    drawn, shown = ran.folder / f"{stem}.svg", LEARN / "img" / f"{stem}.svg"
    assert f"](img/{stem}.svg)" in page.read_text("utf-8")
    if all(block.title in (None, "prints") for block in blocks(page)):
        # Which numbers stand at an axis is the choice of matplotlib, and changes with its version.
        numbers = drawn_by(drawn) == drawn_by(shown)
        again = "python docs/course.py --update draws it again"
        assert texts(drawn, numbers) == texts(shown, numbers), again
    assert shown.stat().st_size < 150_000


@pytest.mark.parametrize("stem", STEMS)
def test_program_is_short(stem):
    assert 20 < count_lines(LEARN / f"{stem}.md") <= 80
    compile(program(LEARN / f"{stem}.md"), stem, "exec")


@pytest.mark.skipif(find_spec("nbclient") is None, reason="needs nbclient")
@pytest.mark.skipif(find_spec("ipykernel") is None, reason="needs ipykernel")
@pytest.mark.filterwarnings("ignore")  # those of Jupyter
@pytest.mark.parametrize("stem", STEMS)
def test_notebook(stem, tmp_path, monkeypatch):
    """It runs from top to bottom, prints the same, and shows the picture."""
    import nbformat
    from nbclient import NotebookClient

    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel shows pictures inline
    page = LEARN / f"{stem}.md"
    made = nbformat.reads(notebook(page), as_version=4)
    nbformat.validate(made)
    NotebookClient(
        made, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    cells = [cell for cell in made.cells if cell.cell_type == "code"]
    for block, cell in zip(blocks(page), cells, strict=True):
        printed = "".join(out.text for out in cell.outputs if out.get("name") == "stdout")
        assert agrees(block, printed), f"{page.name}:{block.line} printed\n{printed}"
    shown = [out for c in cells for out in c.outputs if out.output_type == "display_data"]
    assert any("image/png" in out.data for out in shown)
    assert (tmp_path / f"{stem}.svg").exists()


@pytest.mark.parametrize("stem", STEMS)
def test_exercises_are_solved(stem):
    text = (LEARN / f"{stem}.md").read_text("utf-8")
    number = stem[:2]
    (solutions,) = Path(__file__).parent.glob(f"test_{number}_*.py")
    assert f"Solutions, as tests: `tests/learn/{solutions.name}`" in text
    exercises = text.partition("\n## Exercises\n")[2].partition("\nSolutions, as tests")[0]
    assert re.findall(r"^(\d)\. ", exercises, re.MULTILINE) == ["1", "2", "3"]
    solved = re.findall(r"^def test_(\d)_", solutions.read_text("utf-8"), re.MULTILINE)
    assert {*solved} == {"1", "2", "3"}


def test_ten_pages():
    assert [stem[:2] for stem in STEMS] == [f"{n:02}" for n in range(1, 11)]
    index = (LEARN / "index.md").read_text("utf-8")
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert all(f"({stem}.md)" in index and f": learn/{stem}.md" in nav for stem in STEMS)
    front = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert "(learn/index.md)" in front
