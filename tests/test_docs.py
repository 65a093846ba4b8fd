"""The documentation is true: its code runs, its errors are the real ones, its paths exist.

Examples in docstrings run, too, and public classes and functions have one.

A ```python block runs in the namespace of its page, one after the other. If a ```text block titled
with the name of an exception or warning follows, the code must end in exactly that; titled
"prints", it must print exactly that. A ```sh block runs in a shell, unless NOT_RUN names it;
followed by a block titled "fails", it must, and that is the last line it says. … is any text.
"""

import ast
import contextlib
import doctest
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastrnn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if p.exists()]
PAGES += sorted(DOCS.rglob("*.md"))
COURSE = DOCS / "learn"  # whose programs tests/learn runs
WALKTHROUGH = DOCS / "new-cell.md"

# Programs whose commands are not run here, only checked: that their targets and options exist.
NOT_RUN = {
    "pip": "needs a network",
    "make": "builds an environment, or runs this test again",
    "python examples/": "takes minutes, and a file of the reader's",
    "python docs/": "writes to the clone",
}

needs_docs = pytest.mark.skipif(not DOCS.exists(), reason="the docs are not part of this tree")


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of code
    language: str
    title: str
    source: str
    follower: "Block | None"  # a block that stands right after it

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fence = r'^( *)```([a-z]+)(?: title="([^"]+)")?\n(.*?)^\1```\n'
    found: list[Block] = []
    start = None  # of the block after
    for match in reversed(list(re.finditer(fence, text, re.DOTALL | re.MULTILINE))):
        line = text.count("\n", 0, match.start(4)) + 1
        source = re.sub(f"^{match[1]}", "", match[4], flags=re.MULTILINE)
        is_followed = start is not None and not text[match.end() : start].strip()
        follower = found[0] if is_followed else None
        found.insert(0, Block(page, line, match[2], match[3] or "", source, follower))
        start = match.start()
    return found


def blocks_in(language: str) -> list[Block]:
    return [b for page in PAGES for b in blocks(page) if b.language == language]


@needs_docs
def test_every_block_is_of_a_known_kind():
    """So that none is left out because of how it is written."""
    for page in PAGES:
        found = blocks(page)
        fences = re.findall(r"^ *```.", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(found) == len(fences), page.name
        for block in found:
            assert block.language in {"python", "text", "sh", "diff", "cpp"}, block
            assert block.language not in {"diff", "cpp"} or page == WALKTHROUGH, block


def is_like(got: str, shown: str) -> re.Match[str] | None:
    """Whether the text is that of a page, where … stands for anything."""
    parts = map(re.escape, re.split(" ?… ?", shown.strip()))
    return re.fullmatch(".*".join(parts), got.strip(), re.DOTALL)


def run_python(block: Block, namespace: dict) -> None:
    # Newlines in front: a traceback names the page's own line.
    code = compile("\n" * (block.line - 1) + block.source, str(block.page), "exec")
    expected = block.follower if block.follower and block.follower.language == "text" else None
    printed, raised = io.StringIO(), None
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.simplefilter("error")
        try:
            exec(code, namespace)
        except Exception as error:
            if expected is None or expected.title == "prints":
                raise
            raised = f"{type(error).__name__}: {error}"
    if expected is None:
        return
    got = printed.getvalue() if expected.title == "prints" else raised
    prefix = "" if expected.title == "prints" else f"{expected.title}: "
    assert got is not None, f"{block}: nothing was raised"
    assert is_like(got, prefix + expected.source), f"{block}: {got}"


def python_in(page: Path) -> list[Block]:
    return [b for b in blocks(page) if b.language == "python" and not b.title]


@pytest.mark.parametrize(
    "page", [p for p in PAGES if python_in(p) and p.parent != COURSE], ids=lambda page: page.name
)
def test_python(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict = {"__name__": page.stem}
    for block in python_in(page):
        run_python(block, namespace)


def check_command(command: str) -> None:
    """That the targets of make and the options of a program in this repository exist."""
    words = shlex.split(command)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= {*targets}, command
    for program in words:
        if program.endswith(".py"):
            source = (ROOT / program).read_text(encoding="utf-8")
            options = [word for word in words if word.startswith("--")]
            assert all(f'"{option}"' in source for option in options), command


@pytest.mark.parametrize("block", blocks_in("sh"), ids=str)
def test_shell(block, tmp_path):
    lines = re.sub(r"\s+#.*", "", block.source).splitlines()
    commands = [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line) for line in lines]
    others = [command for command in commands if command.startswith(tuple(NOT_RUN))]
    for command in others:
        check_command(command)
    if others:
        assert len(others) == len(commands), f"{block}: split what runs here from what does not"
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-ec", block.source],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    if block.follower and block.follower.title == "fails":
        assert result.returncode != 0
        assert is_like(result.stderr.splitlines()[-1], block.follower.source), result.stderr
    else:
        assert result.returncode == 0, result.stderr


WITHOUT_OPENMP = """
import importlib.abc, sys, torch
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "fastrnn._cpu":
            raise ImportError("_cpu.so: undefined symbol: GOMP_parallel")
sys.meta_path.insert(0, Missing())
import fastrnn
"""


@needs_docs
def test_error_without_openmp():
    """The FAQ's one error that no call can bring about."""
    result = subprocess.run([sys.executable, "-c", WITHOUT_OPENMP], capture_output=True, text=True)
    raised = result.stderr.splitlines()[-1].removeprefix("ImportError: ")
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    heads = [head for head in re.findall("^### (.*)", text, re.MULTILINE) if "OpenMP" in head]
    assert len(heads) == 1
    assert is_like(raised, heads[0]), raised


# -- Docstrings ------------------------------------------------------------------------------------


def docstrings() -> dict[str, tuple[Path, int, str]]:
    """Those of the package by name, such as _modules.LSTM.forward: file, line and text."""
    found = {}

    def visit(path: Path, node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                visit(path, child, f"{name}.{child.name}")
        text = ast.get_docstring(node) if not isinstance(node, ast.expr) else None
        if text:  # of overloads, the last has one
            found[name] = path, getattr(node, "lineno", 1), text

    folder = Path(fastrnn.__file__).parent
    for path in [*sorted(folder.glob("*.py")), folder / "_cpu.pyi"]:
        visit(path, ast.parse(path.read_text(encoding="utf-8")), path.stem)
    return found


DOCSTRINGS = docstrings()


@pytest.mark.parametrize("name", [n for n, (*_, text) in DOCSTRINGS.items() if ">>>" in text])
def test_docstring(name):
    path, line, text = DOCSTRINGS[name]
    names = {"__name__": "__main__", "torch": torch, "fastrnn": fastrnn}
    test = doctest.DocTestParser().get_doctest(text, names, name, str(path), line)
    torch.manual_seed(0)
    output: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)  # by default it looks for pytest's own -v
    runner.run(test, out=output.append)
    assert not output, "".join(output)


def public() -> list[str]:
    """Public classes and functions, as docstrings() names them."""
    found = []
    for module in (fastrnn, fastrnn.functional):
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                home = value.__module__.rpartition(".")[2]
                found.append(f"{home}.{getattr(value, '__name__', name)}")
    return found


@pytest.mark.parametrize("name", public())
def test_public_objects_have_examples(name):
    if name.endswith("Function"):  # their base class has the method that users call
        name = "_functions.LayerFunction.apply"
    assert "Examples:\n" in DOCSTRINGS[name][2], name


# -- What a page says of the sources ---------------------------------------------------------------


@needs_docs
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths(page):
    """Every path in `code` exists; so does every link's target."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    paths = re.findall(r"`([\w.-]+/[\w./*-]*|[\w-]+\.(?:md|toml|txt))(?:::\w+)?`", text)
    made = {"build/site"} | {b.title for b in blocks(WALKTHROUGH)}
    missing = [p for p in paths if p not in made and not any(ROOT.glob(p.rstrip("/")))]
    links = re.findall(r"\]\((?!https?://)([^)#\s]*)#?[^)]*\)", text)
    missing += [link for link in links if link and not link.endswith(".svg")
                and not (page.parent / link).exists()]  # fmt: skip
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_constants(page):
    """`kName` = 123 on a page is what the sources say."""
    sources = "".join(p.read_text() for p in sorted((ROOT / "csrc").rglob("*.[hc]*")))
    for name, value in re.findall(r"`(k[A-Z]\w+)` = ([\d ]+\d|\d)", page.read_text("utf-8")):
        values = re.findall(rf"\b{name} = ([\d']+)[,;]", sources)
        assert values, f"no {name} in csrc"
        assert int(value.replace(" ", "")) in {int(v.replace("'", "")) for v in values}, name


# -- The site --------------------------------------------------------------------------------------


@needs_docs
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs mkdocs")
def test_site(tmp_path):
    """It builds without a warning, twice the same, and fetches nothing from elsewhere."""
    built = []
    for name in ("once", "again"):
        command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
        result = subprocess.run(
            [*command, "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", tmp_path / name],
            env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        pages = sorted((tmp_path / name).rglob("*.html"))
        assert len(pages) > len(list(DOCS.rglob("*.md")))  # and the 404 page
        built.append([page.read_text(encoding="utf-8") for page in pages])
    assert built[0] == built[1]
    assert not [html for html in built[0] if "arithmatex" in html]  # all formulas are MathML
    assert sum(html.count("<math ") for html in built[0]) > 200
    index = (tmp_path / "once" / "search" / "search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index = {")  # for a site that is opened from a folder
    loads = r"<(?:script|img|link|iframe)\b[^>]*(?:src|href)=.?(?:https?:)?//[^>]*>"
    assert not [found for html in built[0] for found in re.findall(loads, html)]


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@needs_docs
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs mkdocs")
@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_search_from_a_folder(tmp_path):
    """In a real browser, without a server."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "HOME": str(tmp_path)}
    subprocess.run([*command, "-f", str(ROOT / "mkdocs.yml")], env=environment, check=True)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    page = f"file://{site}/learn/05-gates.html?q=checkpoint_every"
    result = subprocess.run(
        [str(BROWSER), *options, "--dump-dom", page],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    found = re.findall(r'href="([^"]*)" class="md-search-result__link"', result.stdout)
    assert any("api.html" in link for link in found), found


# -- The walk-through ------------------------------------------------------------------------------

PACKAGE = Path("python") / "fastrnn"
VARIANT = [
    "-DFASTRNN_VARIANT=baseline",
    "-DFASTRNN_VECTOR_BYTES=16",
    "-DFASTRNN_REGISTERS=16",
    '-DFASTRNN_FLAGS=""',
]
INT8 = ["-DFASTRNN_INT8=baseline", "-DFASTRNN_VARIANT=int8_baseline", *VARIANT[1:3]]
# Without the finder of an editable install, which would bring the sources of this tree.
PYTEST = """
import sys
sys.meta_path = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
sys.path.insert(0, "python")
import fastrnn, os, pytest
assert os.path.samefile(fastrnn.__path__[0], "python/fastrnn"), fastrnn.__path__
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir=.", "-c", *sys.argv[1:]]))
"""


def apply(block: Block, root: Path) -> None:
    """Makes the file that the block's title names, or the change to it."""
    file = root / block.title
    if block.language != "diff":
        assert not file.exists(), f"{block}: {block.title} exists already"
        file.write_text(block.source, encoding="utf-8")
        return
    lines = block.source.splitlines(keepends=True)
    old, new = ("".join(x[1:] or "\n" for x in lines if x[0] not in sign) for sign in ("+", "-"))
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{block}: {block.title} has not this text once"
    file.write_text(text.replace(old, new), encoding="utf-8")


def compile_baseline(root: Path) -> None:
    """The extension with one variant, unoptimised."""
    import pybind11

    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-std=c++20", "-O1", "-fPIC", "-fopenmp", "-fvisibility=hidden", *includes]
    compiler = os.environ.get("CXX", "c++")

    def compile_one(source: Path) -> str:
        target = root / f"{source.stem}.o"
        own = INT8 if source.stem == "int8" else VARIANT
        subprocess.run([compiler, *flags, *own, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = [f for part in ("python", "cpu") for f in (root / "csrc" / part).rglob("*.cc")]
        sources.remove(root / "csrc/cpu/cell_module.cc")  # is compiled for each cell of a user's
        objects = list(pool.map(compile_one, sources))
    library = root / PACKAGE / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library)], check=True)


@needs_docs
@pytest.mark.skipif(find_spec("pybind11") is None, reason="needs pybind11")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a compiler")
def test_new_cell(tmp_path):
    for folder in ("csrc", "python", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", ".*")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    changes = [b for b in blocks(WALKTHROUGH) if b.title]
    for change in changes:
        apply(change, tmp_path)
    compile_baseline(tmp_path)
    tests = [b.title for b in changes if b.title.startswith("tests/test_")]
    result = subprocess.run(
        [sys.executable, "-c", PYTEST, str(ROOT / "pyproject.toml"), *tests],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "FASTRNN_CPU"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
