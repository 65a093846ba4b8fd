"""What mkdocs does beside Markdown: pictures set into their pages, measured tables, formulas.

A line <!-- bench: NAME --> on a page becomes what the function of that name in TABLES returns, from
bench/results as it is at the time of the build. A formula in dollars becomes MathML, which browsers
show without a script. Pages of the course get their program and notebook.
"""

import html as markup
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

import course  # noqa: E402
from bench import (  # noqa: E402
    calls,
    contention,
    deep,
    headline,
    heatmap,
    memory,
    options,
    own,
    results,
    steps,
    table,
)
from pictures import PICTURES  # noqa: E402

# Tables of a bench.* program's own, by the end of its result file's name.
OTHERS: dict[str, Callable[[list[results.Row]], str]] = {
    "calls": calls.render,
    "contention": contention.render,
    "deep": deep.render,
    "memory": memory.render,
    "options": options.render,
    "own": own.render,
    "steps": steps.render,
}
WIDE = {"benchmarks.md", "contract.md"}  # whose tables need the place of the table of contents


def files(pattern: str, *other: str) -> Iterator[Path]:
    """Result files that git keeps, without those that match `other`."""
    for file in sorted(results.DIRECTORY.glob(pattern), key=lambda file: file.stem):
        if not file.name.startswith("latest") and not any(map(file.match, other)):
            yield file


def speed_files() -> list[Path]:
    return list(files("*.json", *(f"*-{name}.json" for name in OTHERS), "cuda-*.json"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, draw in PICTURES.items():
        if f"img/{name}.svg" in files.src_uris:  # README's
            continue
        files.append(File.generated(config, f"img/{name}.svg", content=draw().svg()))
    for page in course.PAGES:
        made = {"py": course.program(page), "ipynb": course.notebook(page)}
        for kind, content in made.items():
            files.append(File.generated(config, f"learn/{page.stem}.{kind}", content=content))
    return files


def mathml(tex: str, display: str) -> str:
    """A formula as MathML, with the spaces that latex2mathml leaves to a script."""
    known = re.sub(r"\\(begin|end)\{aligned\}", r"\\\1{align*}", tex)  # by the name it has for it
    try:
        math = convert(known, display=display)
    except Exception as error:  # of any class
        raise PluginError(f"no formula: {tex}") from error
    if "\\" in math or "<mi>&</mi>" in math:
        raise PluginError(f"latex2mathml does not know all of {tex}")
    math = re.sub(r"<mo>([A-Za-z]{2,})</mo>", r"<mi>\1</mi>", math)  # names of functions
    bare = r"(?<!<msu[bp]>)(<mi>(?:exp|log|tanh)</mi>)(?=<m[inu])"  # log x, not log^2 x
    return re.sub(bare, r'\1<mspace width=".17em"/>', math)


def formula(match: re.Match[str]) -> str:
    r"""The MathML of what arithmatex leaves: \(...\) in a span, \[...\] in a div.

    Formulas that stand side by side, with \qquad between them, go below each other where there is
    no room.
    """
    tex = markup.unescape(match[2]).strip()[2:-2]
    if match[1] == "span":
        return f'<span class="formula">{mathml(tex, "inline")}</span>'
    displayed = [
        mathml(part, "block").replace('display="block"', 'display="inline" displaystyle="true"')
        for part in tex.split(r"\qquad")
    ]
    return f'<div class="formula">{" ".join(displayed)}</div>'


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Puts a picture's SVG in the place of its <img>, so that it takes the page's colours."""

    def inline(match: re.Match[str]) -> str:
        return f'<figure class="picture">{PICTURES[match[2]]().svg(alt=match[1])}</figure>'

    names = "|".join(PICTURES)
    source = rf'src="(?:\.\./)?img/({names})\.svg"'
    html = re.sub(rf'<p><img alt="([^"]*)" {source} ?/?></p>', inline, html)
    html = re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', formula, html, flags=re.DOTALL)
    is_measured = page.file.src_uri == "benchmarks.md"
    return f'<div class="measured">{html}</div>' if is_measured else html


# -- Benchmarks ------------------------------------------------------------------------------------


def machine(result: dict[str, Any]) -> str:
    about = result["machine"]
    return f"{about['cpu']}, {about['variant']}, {result['threads']} threads"


def speed() -> str:
    parts = []
    for file in speed_files():
        result = results.load(file)
        parts += [f"### {machine(result)}", heatmap.render(result), *parts_of(result)]
    return "\n\n".join(parts)


def parts_of(result: results.Result) -> Iterator[str]:
    *_, means, notes = table.render(result).split("\n\n")
    for mode in ("inference", "training"):
        rows = [row for row in result["rows"] if results.case_of(row).mode == mode]
        yield f"**{mode.capitalize()}**"
        yield table.render(result | {"rows": rows}, summary=False).split("\n\n")[0]
    yield means
    yield notes.replace("\n", "\n\n")


def other(suffix: str, render: Callable[[list[dict[str, Any]]], str]) -> str:
    parts = []
    for file in files(f"*-{suffix}.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        parts += [f"{machine(result)}:", render(result["rows"])]
    return "\n\n".join(parts) or "Not measured yet."


def gpu() -> str:
    parts = []
    for file in files("cuda-*.json"):
        from bench import cuda  # which needs torch

        result = json.loads(file.read_text(encoding="utf-8"))
        about = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
        rows = "\n".join(map(cuda.line, result["rows"]))
        means = cuda.geometric_means(result["rows"]).replace("\n", "\n\n")
        parts += [f"{about}. Microseconds per step:", f"{cuda.HEAD}\n{rows}", means]
    return "\n\n".join(parts) or "No result of a GPU is in `bench/results` yet."


def notes() -> str:
    """bench/NOTES.md without its title, one level deeper."""
    text = (ROOT / "bench" / "NOTES.md").read_text(encoding="utf-8").partition("\n")[2]
    text = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"`bench/\1`", text)
    return re.sub("^#", "##", text, flags=re.MULTILINE)


TABLES: dict[str, Callable[[], str]] = {
    "headline": lambda: headline.render(results.load(headline.FILE)),
    "speed": speed,
    "gpu": gpu,
    **{name: partial(other, name, render) for name, render in OTHERS.items()},
    "notes": notes,
}


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    def fill(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise PluginError(f"{page.file.src_uri}: no table {match[1]!r}")
        return TABLES[match[1]]()

    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    stem = Path(page.file.src_uri).stem
    if stem in {page.stem for page in course.PAGES}:
        title, _, text = markdown.partition("\n")
        made = f"[Program]({stem}.py){{ download }} · [notebook]({stem}.ipynb){{ download }}"
        markdown = f"{title}\n\n{made}\n{text}"
    return re.sub(r"^<!-- bench: ([\w-]+) -->$", fill, markdown, flags=re.MULTILINE)
