"""The stub of the extension: every name that it has, and as many arguments as each takes; and the
types that a user's type checker sees."""

import ast
import inspect
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn import _cpu
from fastrnn._options import OPTIONS

STUB = Path(fastrnn.__file__).with_name("_cpu.pyi")
# What pybind11 adds to a class that Python cannot make: a metaclass and a constructor that raises.
CLASSES = ["CellInfo"]
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


# -- What a user's type checker sees ---------------------------------------------------------------

USES = Path(__file__).with_name("typed_uses.py")


def test_uses_have_the_types_of_mypy():
    pytest.importorskip("mypy")
    config = Path(__file__).parents[1] / "pyproject.toml"
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), str(USES)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def test_uses_run(monkeypatch):
    """assert_type does nothing at run time, so the values are compared with the types here."""
    import typing_extensions

    checked = []

    def agrees(value, expected) -> bool:
        if isinstance(expected, types.UnionType):
            return any(agrees(value, part) for part in expected.__args__)
        parts = typing_extensions.get_args(expected)
        if not parts:
            return isinstance(value, expected)
        if parts[-1] is Ellipsis:
            return type(value) is tuple and all(agrees(v, parts[0]) for v in value)
        return type(value) is tuple and len(value) == len(parts) and all(map(agrees, value, parts))

    def assert_type(value, expected):
        checked.append(expected)
        assert agrees(value, expected), expected
        return value

    monkeypatch.setattr(typing_extensions, "assert_type", assert_type)
    runpy.run_path(str(USES))
    assert len(checked) > 15


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_typed_arguments_are_those_that_there_are(name):
    """The constructor's one overload has every argument, in its place and with its default."""
    tree = ast.parse(Path(inspect.getsourcefile(fastrnn.LSTM)).read_text(encoding="utf-8"))
    [cls] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    [shared] = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "_RNNBase"]
    typed = next(node for node in cls.body if getattr(node, "name", "") == "__init__").args
    own = next(node for node in shared.body if getattr(node, "name", "") == "__init__").args
    keywords = {a.arg for a in typed.kwonlyargs} - {"device", "dtype"}
    assert keywords == {a.arg for a in own.kwonlyargs} | {*OPTIONS}
    arguments = [a.arg for a in typed.args[3:]]
    defaults = [ast.literal_eval(value) for value in typed.defaults]
    other = {"bool": True, "int": 2, "float": 0.5}
    for count in range(1, len(arguments) + 1):
        given = [other.get(type(d).__name__, d) for d in defaults[:count]]
        if "nonlinearity" in arguments[:count]:
            given[arguments.index("nonlinearity")] = "relu"
        by_place = getattr(fastrnn, name)(3, 4, *given)
        by_name = getattr(fastrnn, name)(3, 4, **dict(zip(arguments, given)))
        assert repr(by_place) == repr(by_name)
        changed = repr(getattr(fastrnn, name)(3, 4)) != repr(by_place)
        assert changed
    default = getattr(fastrnn, name)(3, 4, **dict(zip(arguments, defaults)))
    assert repr(default) == repr(getattr(fastrnn, name)(3, 4))
    assert default.weight_ih_l0.dtype == torch.get_default_dtype()
