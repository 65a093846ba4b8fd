"""What fastrnn must do where it was installed from a wheel, run by that environment's Python:

    python tests/packaging/smoke.py

It needs fastrnn and tqdm. Each program that it starts has an empty PATH, so no compiler, and runs
in an empty folder, so that it sees the installed package and not this source tree.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import files
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "char_lm.py"

IMPORTS = """
import {}
import fastrnn, torch
from fastrnn.__main__ import openmp
model = fastrnn.LSTM(8, 64)
model(torch.randn(20, 32, 8))[0].sum().backward()  # a scan on several threads
assert model.weight_hh_l0.grad.isfinite().all()
assert not openmp()["others"], openmp()  # it has not brought an OpenMP runtime of its own
"""

ERRORS = """
import fastrnn, torch
from fastrnn import _cpu
x, weights = torch.zeros(2, 1, 3), [torch.zeros(4, 3), torch.zeros(4, 4)]
for wrong in range(3):  # more than once: an exception that C++ threw is released
    try:
        options = "ESN", 1, 1, False, 0, False, False, 0.0, 0.0, 0.0, False
        _cpu.forward((*options, x, *[None] * 8, weights))
    except ValueError as error:
        assert str(error).startswith("mode: expected one of "), error
    else:
        raise AssertionError("an unknown cell was taken")
"""


def python(*args: str, fails: bool = False, **env: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *args],
            cwd=folder,
            env={"PATH": folder, "HOME": folder, **env},
            capture_output=True,
            text=True,
            timeout=300,
        )
    if (done.returncode != 0) is not fails:
        sys.exit(f"{' '.join(args)}\nended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def check_files() -> None:
    installed = files("fastrnn") or []
    libraries = {f"{f.parent}/{f.name.partition('.')[0]}" for f in installed if ".so" in f.name}
    assert {"fastrnn/_cpu"} <= libraries <= {"fastrnn/_cpu", "fastrnn/_cuda"}, libraries
    missing = {"LICENSE", "py.typed", "_cpu.pyi", "__main__.py"} - {f.name for f in installed}
    assert not missing, missing


def check_imports() -> None:
    for names in ("torch, fastrnn", "fastrnn, torch"):
        python("-c", IMPORTS.format(names))


def check_errors() -> None:
    python("-c", ERRORS)


def check_diagnosis() -> None:
    report = json.loads(python("-m", "fastrnn", "--json"))
    assert report["ok"] is True, report
    assert not report["openmp"]["others"], report["openmp"]
    print(python("-m", "fastrnn"))
    python("-m", "fastrnn", fails=True, FASTRNN_CPU="pentium")


def check_demo() -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("a rose is a rose is a rose. " * 400)
        options = ["--hidden", "32", "--max-steps", "50", "--sample", "60"]
        print(python(str(EXAMPLE), "--text", str(text), *options))


def main() -> None:
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            print(f"-- {name.removeprefix('check_')}", flush=True)
            check()
    print("-- all right")


if __name__ == "__main__":
    main()
