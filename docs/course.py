"""The programs and notebooks of the course in docs/learn: python docs/course.py --help

A page's ```python blocks, one after the other, are its program. A ```text block titled "prints"
right after one is what that block prints; titled "prints, on one machine", its numbers differ from
machine to machine. The program draws the picture img/PAGE.svg.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

LEARN = Path(__file__).parent / "learn"
PAGES = sorted(LEARN.glob("[0-9][0-9]-*.md"))
FENCE = re.compile(
    r"^```python\n(?P<code>.*?)^```\n"
    r'(?:\n```text title="(?P<title>[^"]+)"\n(?P<output>.*?)^```\n)?',
    re.DOTALL | re.MULTILINE,
)
ANY_MACHINE, ONE_MACHINE = "prints", "prints, on one machine"


class Block(NamedTuple):
    """A part of a program."""

    source: str
    line: int  # of its first line on the page
    title: str | None
    output: str  # what the page says that it prints


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["code"], text.count("\n", 0, m.start("code")) + 1, m["title"], m["output"] or "")
        for m in FENCE.finditer(text)
    ]


def program(page: Path) -> str:
    """The page's code as one file."""
    title = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    return f'"""{title}"""\n\n' + "\n".join(block.source for block in blocks(page))


def count_lines(page: Path) -> int:
    """Lines of code: not those that are empty or hold a comment alone."""
    lines = "".join(block.source for block in blocks(page)).splitlines()
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines)


@contextlib.contextmanager
def surroundings(folder: Path) -> Iterator[None]:
    """A folder to work in, pictures that are the same every time, and nothing left behind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch

    before, epoch = Path.cwd(), os.environ.get("SOURCE_DATE_EPOCH")
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    os.chdir(folder)
    torch.set_num_threads(1)  # enough for these, and quick beside other processes
    try:
        with matplotlib.rc_context({"svg.hashsalt": "course", "svg.fonttype": "none"}):
            yield
    finally:
        plt.close("all")
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        os.chdir(before)
        os.environ.pop("SOURCE_DATE_EPOCH")
        if epoch is not None:
            os.environ["SOURCE_DATE_EPOCH"] = epoch


def run(page: Path, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """What each block prints, and the names that the program leaves; its picture is in `folder`."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    outputs = []
    with surroundings(folder), warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in blocks(page):
            printed = io.StringIO()
            # Newlines in front: a traceback names the page's own line.
            code = compile("\n" * (block.line - 1) + block.source, str(page), "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
            outputs.append(printed.getvalue())
    return outputs, namespace


def without_numbers(text: str) -> str:
    """The text with every number, and the space before it, made the same."""
    return re.sub(r" *-?\d[\d.,]*(?:e[+-]?\d+)?", " 0", text)


def agrees(block: Block, printed: str) -> bool:
    """Whether a block printed what its page says."""
    if block.title == ONE_MACHINE:
        return without_numbers(printed) == without_numbers(block.output)
    return printed == block.output


def update(page: Path) -> None:
    """Puts into the page what its program prints, and its picture beside it."""
    with tempfile.TemporaryDirectory() as folder:
        outputs, _ = run(page, Path(folder))
        picture = Path(folder) / f"{page.stem}.svg"
        text = re.sub(r"[ \t]+$", "", picture.read_text(encoding="utf-8"), flags=re.MULTILINE)
        (LEARN / "img" / picture.name).write_text(text, encoding="utf-8")
    fill = iter(outputs)

    def block(match: re.Match[str]) -> str:
        printed, title = next(fill), match["title"] or ANY_MACHINE
        code = f"```python\n{match['code']}```\n"
        return code + (f'\n```text title="{title}"\n{printed}```\n' if printed else "")

    page.write_text(FENCE.sub(block, page.read_text(encoding="utf-8")), encoding="utf-8")


def notebook(page: Path) -> str:
    """The page as a notebook, without outputs: its text, and a cell for each block."""
    from nbformat import v4, writes

    def prose(text: str) -> Iterator[Any]:
        text = re.sub(r"^!\[[^]]*\]\([^)]*\)\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"\]\((\d\d-[\w-]+)\.md", r"](\1.ipynb", text)
        text = re.sub(r"\[([^]]*)\]\((?!https?:|\d\d-)[^)]*\)", r"\1", text)
        if text.strip():
            yield v4.new_markdown_cell(text.strip())

    cells, text, end = [], page.read_text(encoding="utf-8"), 0
    for match in FENCE.finditer(text):
        cells += [*prose(text[end : match.start()]), v4.new_code_cell(match["code"].rstrip())]
        end = match.end()
    cells += prose(text[end:])
    for number, cell in enumerate(cells):
        cell["id"] = f"{page.stem}-{number}"  # not drawn at random
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return writes(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}))


def main() -> None:
    parser = argparse.ArgumentParser(description="The programs and notebooks of the course.")
    parser.add_argument("--export", metavar="FOLDER", type=Path, help="write them to this folder")
    parser.add_argument(
        "--update", metavar="PAGE", nargs="*", help="run the pages' programs (all, or those whose "
        "names begin so), and put outputs and pictures in their places"
    )  # fmt: skip
    args = parser.parse_args()
    if args.export:
        args.export.mkdir(parents=True, exist_ok=True)
        for page in PAGES:
            (args.export / f"{page.stem}.py").write_text(program(page), encoding="utf-8")
            (args.export / f"{page.stem}.ipynb").write_text(notebook(page), encoding="utf-8")
    if args.update is not None:
        for page in PAGES:
            if not args.update or page.stem.startswith(tuple(args.update)):
                update(page)
                print(page.name, count_lines(page), "lines")
    if not args.export and args.update is None:
        parser.print_help(sys.stderr)


if __name__ == "__main__":
    main()
