"""Builds the CUDA kernels for a CPU, as a Python extension; see harness.h."""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from fastrnn._kernels import Toolchain, find_compiler
from fastrnn._load import _cpu, set_torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CUDA = ROOT / "csrc" / "cuda"
REGISTRY = ROOT / "csrc" / "cells" / "registry.h"
NAME = "fastrnn_harness"
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
FLAGS += [f"-Dfastrnn={NAME}"]  # the namespace: pybind11 has one register of types for all modules
# Misaligned vectors, too, are undefined behaviour.
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover",
    "-g1",
    "-O1",
]


class Harness(Toolchain):
    """Compiles the CUDA kernels of a user's cell for the harness."""

    name = "harness"

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = kernels

    def command(self, csrc: Path) -> list[str]:
        compiler = find_compiler("C++ compiler", "CXX", "c++")
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-w", f"-I{HERE}"]
        sources = [csrc / "cuda" / "cell_module.cu", HERE / "harness.cc"]
        return [*compiler, *flags, "-x", "c++", *map(str, sources)]

    def add(self, mode: str, address: int) -> None:
        _cpu.define_cell(address)
        self.kernels.load_cell(mode, address)


def cells() -> list[str]:
    """The cell types in the registry."""
    [found] = re.findall(r"using Cells = CellList<([^;]*)>;", REGISTRY.read_text(encoding="utf-8"))
    return re.split(r",\s*", found)


def load(sanitize: bool = False) -> ModuleType:
    """The extension, compiled if it or its compiler has changed."""
    import pybind11

    compiler = os.environ.get("CXX", "c++")
    sanitizers = SANITIZERS if sanitize else []
    flags = [*FLAGS, *sanitizers]
    includes = [str(HERE), pybind11.get_include(), sysconfig.get_path("include")]
    flags += [f"-I{path}" for path in includes]
    sources = sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file()) + sorted(HERE.iterdir())
    key = hashlib.sha256(repr((compiler, flags, sys.version)).encode())
    for path in sources:
        if path.is_file():
            key.update(path.read_bytes())
    folder = ROOT / "build" / "harness" / key.hexdigest()[:16]
    library = folder / f"{NAME}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [(CUDA / "bind.cc", [f"-DFASTRNN_MODULE={NAME}"])]
        shared = [ROOT / "csrc" / "python" / name for name in ("layer.cc", "tensor.cc")]
        plain = [*shared, CUDA / "plan.cc", CUDA / "upload.cu", CUDA / "layer_norm.cu"]
        plain.append(HERE / "harness.cc")
        jobs += [(source, []) for source in plain]
        for cell in cells():
            for extra in ([], ["-DFASTRNN_BACKWARD"]):
                jobs.append((CUDA / "kernels.cu", [f"-DFASTRNN_CELL={cell}", *extra]))
        # A preloaded sanitizer is not for the compiler.
        env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        objects = [str(folder / f"{i}.o") for i in range(len(jobs))]

        def compile_one(index: int) -> None:
            source, more = jobs[index]
            command = [compiler, *flags, *more, "-x", "c++", "-c", str(source)]
            subprocess.run([*command, "-o", objects[index]], env=env, check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, range(len(jobs))))
        part = f"{library}.{os.getpid()}"
        subprocess.run(
            [compiler, "-shared", *sanitizers, *objects, "-o", part], env=env, check=True
        )
        os.replace(part, library)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    set_torch(module)
    return module
