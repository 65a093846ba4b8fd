"""docs/architecture.md is true: who imports and includes whom, and what is used of torch's insides.

The page's tables are read, and held against the sources in both directions: nothing may be in the
code that is not on the page, and nothing on the page that is not in the code.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "python" / "fastrnn"
CSRC = ROOT / "csrc"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the docs are not part of this tree")


def table(*head: str) -> list[list[str]]:
    """The cells of the page's table with this head, row by row."""
    lines = iter(PAGE.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if cells(line) == [*head]:
            next(lines)
            rows = []
            for row in lines:
                if not row.startswith("|"):
                    break
                rows.append(cells(row))
            return rows
    raise AssertionError(f"{PAGE.name} has no table with the head {head}")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []


def names(cell: str) -> set[str]:
    return {*re.findall(r"`([^`]+)`", cell)}


# -- Python ----------------------------------------------------------------------------------------

SOURCES = {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}
# Compiled modules, with what the package knows of them.
COMPILED = {"_cpu", "_cuda"}


def imports(path: Path) -> Iterator[str]:
    """The package's modules that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            inside = node.level == 1 or (node.module or "").split(".")[0] == "fastrnn"
            assert node.level < 2, path
            module = (node.module or "").removeprefix("fastrnn").removeprefix(".")
            if inside and module:
                yield module
            elif inside:  # from . import a module, or a name of the package
                known = {*SOURCES, *COMPILED}
                yield from (n.name if n.name in known else "__init__" for n in node.names)
        elif isinstance(node, ast.Import):
            for name in node.names:
                first, _, rest = name.name.partition(".")
                if first == "fastrnn":
                    yield rest or "__init__"
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = called.id if isinstance(called, ast.Name) else called
            if called in ("import_module", "__import__"):
                text = getattr(node.args[0], "value", "")
                assert text, f"{path.name}: an import that cannot be read"
                if text.split(".")[0] == "fastrnn":
                    yield text.partition(".")[2] or "__init__"


def listed() -> dict[str, set[str]]:
    rows = table("module", "imports")
    return {row[0].split("`")[1]: names(row[1]) for row in rows}


def test_every_module_is_listed():
    assert {*listed()} == {*SOURCES, *COMPILED}


@pytest.mark.parametrize("module", SOURCES)
def test_imports(module):
    assert listed()[module] == {*imports(SOURCES[module])}


def test_imports_go_down():
    """A module imports what stands below it: so there is no circle."""
    order = [*listed()]
    for module, imported in listed().items():
        above = {other for other in imported if order.index(other) <= order.index(module)}
        assert not above, module


# -- The private interface of torch ----------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.AST) -> Iterator[str]:
    """What a module calls names of its own: functions, classes, attributes that it sets."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


# Of a NamedTuple, of ctypes, and of sys.
STANDARD = {"_asdict", "_fields", "_fields_", "_getframe", "_make", "_replace"}
# Set or defined here, but torch's.
TORCHS = {
    "_all_weights",
    "_flat_weights_names",
    "_flat_weights",
    "_flat_weight_refs",
    "_slow_forward",
}


def root(node: ast.expr) -> str:
    """Of a.b.c: "a"."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def private_names(path: Path, own: set[str]) -> Iterator[str]:
    """Private names of torch: all that are not the package's own."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    from_torch = set()  # what the module calls parts of torch
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            if getattr(node, "level", 0) or module.startswith("fastrnn"):
                continue
            for name in node.names:
                parts = [*module.split("."), *name.name.split(".")]
                yield from filter(is_private, parts)
                if "torch" in parts:
                    from_torch.add(name.asname or parts[-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own or root(node) in from_torch:
                yield node.attr
        elif isinstance(node, ast.Call) and root(node.func) == "getattr":
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and is_private(name) and name not in own:
                yield name


def test_private_names_of_torch():
    """All of them in _torch.py, but for those that the page lists."""
    expected = {row[0].strip("`"): names(row[1]) for row in table("file", "private names", "why")}
    assert expected.pop("python/fastrnn/_torch.py") == set()  # whatever it needs
    own = {n for p in SOURCES.values() for n in own_names(ast.parse(p.read_text("utf-8")))}
    own |= STANDARD | COMPILED | {*SOURCES}
    found = {
        f"python/fastrnn/{path.name}": {*private_names(path, own - TORCHS)}
        for path in SOURCES.values()
        if path.stem != "_torch"
    }
    for path in sources():
        text = path.read_text(encoding="utf-8")
        used = {*re.findall(r'"(_[a-z]\w*)"', text)}
        found[str(path.relative_to(ROOT))] = used - (own - TORCHS)
    assert expected == {name: private for name, private in found.items() if private}


# -- C++ -------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    return sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cc", ".cu"})


def place(path: Path) -> str:
    """The folder, or the file where that stands beside the folders."""
    relative = path.relative_to(ROOT)
    return str(relative) if path.parent == CSRC else f"{relative.parent}/"


def includes(path: Path) -> Iterator[str]:
    """The places outside its own that a source includes something from."""
    for name in re.findall(r'^ *# *include "(.*)"', path.read_text(encoding="utf-8"), re.MULTILINE):
        file = (path.parent / name).resolve()
        if not file.exists():  # found by the compiler's search path
            file = ROOT / "tests" / "cuda" / "harness" / name
        assert file.exists(), f"{path}: {name}"
        if place(file) != place(path):
            yield place(file)


def test_includes():
    rows = {names(row[0]).pop(): names(row[1]) for row in table("source", "includes", "libraries")}
    found: dict[str, set[str]] = {row: set() for row in rows}
    for path in sources():
        own = str(path.relative_to(ROOT))
        row = own if own in rows else place(path)
        assert row in rows, f"{row} is not on the page"
        found[row] |= {*includes(path)}
    assert rows == found


LIBRARIES = {"CUDA": r"<cuda\w*[./]", "OpenMP": r"<omp\.h", "pybind11": r"<(pybind11|Python\.h)"}
LIBRARIES["torch"] = r'["<](torch|ATen|c10)/'


def test_libraries():
    rows = table("source", "includes", "libraries")
    expected = {names(row[0]).pop(): names(row[2]) for row in rows}
    found: dict[str, set[str]] = {row: set() for row in expected}
    for path in sources():
        text, own = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        row = own if own in expected else place(path)
        used = (n for n, pattern in LIBRARIES.items() if re.search(f"# *include {pattern}", text))
        found[row] |= {*used}
    assert expected == found
