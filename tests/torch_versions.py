"""Runs tests with other versions of torch, and prints the private names that each of them lacks.

    make wheel && python tests/torch_versions.py [VERSION ...] [-- ARGUMENTS OF PYTEST]

Without versions: the oldest that pyproject.toml admits, and the newest that pip finds. Each gets an
environment in build/. torch is installed without its CUDA libraries, and with them if it does not
load otherwise: those are gigabytes, which an index of torch's CPU builds saves.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = ROOT / "python" / "fastrnn" / "_torch.py"
# What torch and the tests import; pip would add CUDA's libraries to torch's own needs.
NEEDS = ["filelock", "fsspec", "jinja2", "networkx", "numpy", "setuptools", "sympy"]
NEEDS += ["typing-extensions", "expecttest", "hypothesis", "pytest>=8"]
SUITES = (
    "cells compile errors function interface masked parity_torch replace stack states transforms"
)
TESTS = [f"tests/test_{name}.py" for name in SUITES.split()]


def dotted(node: ast.AST) -> str:
    """torch.a.b of an expression that is one, else nothing."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


def private_names() -> list[str]:
    """What `_torch.py` takes from torch by a name that is private, or lies in a private module."""

    def found() -> Iterator[str]:
        tree = ast.parse(NAMES.read_text(encoding="utf-8"))
        modules = {"torch": "torch"}  # what a name of the file stands for
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                for name in node.names:
                    modules[name.asname or name.name] = f"{node.module}.{name.name}"
                    yield f"{node.module}.{name.name}"
        for node in ast.walk(tree):
            first, _, rest = dotted(node).partition(".")
            if rest and first in modules:
                yield f"{modules[first]}.{rest}"

    names = {name for name in found() if re.search(r"\._(?!_)", name)}
    return sorted(n for n in names if not any(other.startswith(f"{n}.") for other in names))


def exists(name: str) -> bool:
    parts, value = name.split("."), None
    for end in range(1, len(parts) + 1):
        try:
            value = getattr(value, parts[end - 1])
        except AttributeError:
            try:
                value = import_module(".".join(parts[:end]))
            except ImportError:
                return False
    return True


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)


def versions() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.search(r'"torch>=([0-9.]+)"', text)[1]
    found = run(sys.executable, "-m", "pip", "index", "versions", "torch").stdout
    newest = re.search(r"Available versions: ([^,\s]+)", found)
    return [f"{oldest}.*", *([newest[1]] if newest else [])]


def check(version: str, pytest: list[str]) -> bool:
    print(f"\n== torch {version}", flush=True)
    environment = ROOT / "build" / f"torch-{version.strip('.*')}"
    python = environment / "bin" / "python"
    wheels = sorted((ROOT / "dist").glob("fastrnn-*.whl"))
    if not wheels:
        sys.exit("dist: no wheel of fastrnn; `make wheel` builds one")
    for command in (
        [sys.executable, "-m", "venv", "--clear", environment],
        [python, "-m", "pip", "install", "--quiet", *NEEDS],
        [python, "-m", "pip", "install", "--quiet", "--no-deps", f"torch=={version}", wheels[-1]],
    ):
        done = run(*command)
        if done.returncode:
            print(f"cannot be installed: {done.stderr.strip().splitlines()[-1]}")
            return False
    show_version = python, "-c", "import torch; print(torch.__version__)"
    done = run(*show_version)
    if done.returncode:  # what torch needs, its libraries for CUDA among it
        installed = run(python, "-m", "pip", "install", "--quiet", f"torch=={version}")
        if installed.returncode:
            print(f"cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
            return False
        done = run(*show_version)
    if done.returncode:
        print(f"cannot be imported: {done.stderr.strip().splitlines()[-1]}")
        return False
    print(f"{done.stdout.strip()}: ", end="", flush=True)
    missing = json.loads(run(python, __file__, "--missing").stdout)
    print("missing private names: " + (", ".join(missing) or "none"), flush=True)
    tests = pytest or [*TESTS, "-q"]
    code = subprocess.run([python, "-m", "pytest", "-p", "no:cacheprovider", *tests], cwd=ROOT)
    return not missing and code.returncode == 0


def main(arguments: list[str]) -> int:
    if arguments == ["--missing"]:
        print(json.dumps([name for name in private_names() if not exists(name)]))
        return 0
    end = arguments.index("--") if "--" in arguments else len(arguments)
    right = [check(version, arguments[end + 1 :]) for version in arguments[:end] or versions()]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
