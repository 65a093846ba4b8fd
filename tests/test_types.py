"""The stub of the extension: every name that it has, and as many arguments as each takes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastrnn
from fastrnn import _cpu

STUB = Path(fastrnn.__file__).with_name("_cpu.pyi")
# What pybind11 adds to a class that Python cannot make: a metaclass and a constructor that raises.
CLASSES = ["CellInfo", "PackedState"]
NOT_IN_THE_STUB = [f"fastrnn._cpu.{name}{end}" for name in CLASSES for end in ("", ".__init__")]
NOT_IN_THE_STUB += [
    "fastrnn._cpu.PackedLayer",
    "fastrnn._cpu.PackedModel",
    "fastrnn._cpu.Int8Layer",
]


def test_names_and_kinds(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "allowed").write_text("\n".join(NOT_IN_THE_STUB))
    arguments = ["fastrnn._cpu", "--allowlist", "allowed", "--concise"]
    result = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "name",
    ["forward", "backward", "inspect", "run_module", "check_saved", "set_torch", "cpu_variant"],
)
def test_number_of_arguments(name):
    """stubtest cannot see it: a compiled function's signature stands in its docstring alone."""
    body = ast.parse(STUB.read_text(encoding="utf-8")).body
    [stub] = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
    taken = re.findall(r"\barg\d+: ", getattr(_cpu, name).__doc__)
    assert len(stub.args.posonlyargs + stub.args.args) == len(taken)
