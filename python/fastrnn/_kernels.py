"""Compiles the kernels of cells of the user's own, one cell and dtype at a time, and keeps them.

What is compiled once is kept in a directory, FASTRNN_CACHE or the platform's place for such things,
under a name that says all it depends on: the cell, the sources of fastrnn, the instruction set and
the dtype. So any number of processes may share it, and nothing in it is ever out of date.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from ._generate import generate
from ._load import _cpu
from ._trace import Definition

__all__ = ["add", "cache_directory", "compile_cell", "definition_of", "load", "source"]

# The element type and its name in csrc/scan.h.
_ELEMENTS = {
    torch.float32: ("float", "kFloat32"),
    torch.float64: ("double", "kFloat64"),
    torch.bfloat16: ("BFloat16", "kBFloat16"),
    torch.float16: ("Float16", "kFloat16"),
}
_PROGRESS_AFTER = 1.0  # seconds

_definitions: dict[str, Definition] = {}
_found: dict[tuple[str, torch.dtype], bool] = {}  # what load() has answered
_lock = threading.RLock()


def add(definition: Definition) -> None:
    """Makes a cell known by its mode."""
    _definitions[definition.mode] = definition


def definition_of(mode: str) -> Definition:
    return _definitions[mode]


def source(definition: Definition) -> str:
    """The C++ header of a cell, generated or by hand."""
    return definition.header if definition.header is not None else generate(definition)


def cache_directory() -> Path:
    """Where kernels are kept: FASTRNN_CACHE, or the platform's place for caches."""
    if own := os.environ.get("FASTRNN_CACHE"):
        return Path(own)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastrnn"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrnn"


def _check_owner(directory: Path) -> None:
    """RuntimeError for a directory that others may write to: code is loaded from it."""
    status = directory.stat()
    mine = status.st_uid in (0, os.getuid())
    if not mine or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RuntimeError(
            f"fastrnn's cache {directory}: expected a directory that only its owner may write to, "
            f"got mode {stat.S_IMODE(status.st_mode):o} of user {status.st_uid}; set FASTRNN_CACHE"
        )


@functools.cache
def _sources() -> tuple[Path, str]:
    """Where the headers of the scans lie, and a digest of them."""
    folder = Path(_cpu.__file__).parent / "csrc"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.*")):
        digest.update(path.read_bytes())
    return folder, digest.hexdigest()[:12]


def _key(definition: Definition, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{definition.mode}-{_cpu.cpu_variant()}-{name}-{_sources()[1]}"


def _compiler() -> list[str] | None:
    """The C++ compiler's command: CXX, or the first of the usual ones."""
    if own := os.environ.get("CXX"):
        command = shlex.split(own)
        return command if command and shutil.which(command[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


class CompileError(RuntimeError):
    """There is no kernel, and why."""


@contextmanager
def _progress(what: str) -> Iterator[None]:
    """Says what takes so long."""
    timer = threading.Timer(_PROGRESS_AFTER, lambda: print(what, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _compile_into(definition: Definition, dtype: torch.dtype, target: Path) -> None:
    """Compiles to a temporary name beside `target`, and moves it there in one step."""
    command = _compiler()
    if command is None:
        raise CompileError("there is no C++ compiler (CXX, c++, g++ or clang++)")
    folder, _ = _sources()
    element, name = _ELEMENTS[dtype]
    try:
        # In a thread of its own, which no mode or trace of torch's around the call can reach.
        with ThreadPoolExecutor(1) as pool:
            text = pool.submit(source, definition).result()
    except NotImplementedError as error:
        raise CompileError(str(error)) from error
    header = target.with_suffix(".h")
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as own:
        (Path(own) / "cell.h").write_text(text)
        made = Path(own) / "cell.so"
        arguments = [
            *command,
            "-std=c++20",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            "-w",
            *_cpu.cpu_variant_flags().split(),
            f"-DFASTRNN_GATES={len(definition.gates)}",
            f'-DFASTRNN_CELL_HEADER="{Path(own) / "cell.h"}"',
            f"-DFASTRNN_CELL={definition.name}",
            f'-DFASTRNN_MODE="{definition.mode}"',
            f"-DFASTRNN_ELEMENT={element}",
            f"-DFASTRNN_DTYPE={name}",
            *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []),
            str(folder / "cpu" / "cell_module.cc"),
            "-o",
            str(made),
        ]
        what = f"fastrnn: compiling {definition.name} for {str(dtype).removeprefix('torch.')} ..."
        try:
            with _progress(what):
                subprocess.run(arguments, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line]
            shown = "\n".join((lines or error.stderr.splitlines())[:5])
            raise CompileError(f"{' '.join(command)} failed:\n{shown}") from error
        except OSError as error:
            raise CompileError(f"{' '.join(command)} cannot be run: {error}") from error
        os.replace(Path(own) / "cell.h", header)  # to read
        os.replace(made, target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_cell(definition: Definition, dtype: torch.dtype, directory: Path) -> Path:
    """The kernel of a cell in a directory, compiled if it is not there.

    Raises:
        CompileError: if it cannot be compiled.
        OSError: if it cannot be kept there.
        RuntimeError: if others may write to the directory.
    """
    directory = directory.absolute()  # the compiler looks beside its source
    path = directory / f"{_key(definition, dtype)}.so"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(directory)
    if not path.exists():
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                _compile_into(definition, dtype, path)
    return path


def _load(definition: Definition, dtype: torch.dtype) -> None:
    try:
        path = compile_cell(definition, dtype, cache_directory())
    except OSError as error:
        # It cannot be kept: a full disk, or one that is only read.
        with tempfile.TemporaryDirectory(prefix="fastrnn-") as own:
            try:
                return _open(definition, compile_cell(definition, dtype, Path(own)))
            except OSError:
                raise CompileError(str(error)) from error
    try:
        _open(definition, path)
    except ImportError:  # half of a file, say
        path.unlink(missing_ok=True)
        _open(definition, compile_cell(definition, dtype, cache_directory()))


@functools.cache
def _show_extension() -> None:
    """Lets what is loaded from now on see the functions that the extension shares."""
    ctypes.CDLL(_cpu.__file__, mode=ctypes.RTLD_GLOBAL)


def _open(definition: Definition, path: Path) -> None:
    _show_extension()
    try:
        found = ctypes.c_char.in_dll(ctypes.CDLL(str(path)), "fastrnn_cell")
    except (OSError, ValueError) as error:
        raise ImportError(str(error)) from error
    _cpu.load_cell(definition.mode, ctypes.addressof(found))


def load(mode: str, dtype: torch.dtype) -> bool:
    """Whether the kernel of a cell for a dtype is there, compiled now if need be.

    Raises:
        RuntimeError: if the cache is a directory that others may write to.
    """
    found = _found.get((mode, dtype))
    if found is not None:
        return found
    with _lock:
        if (mode, dtype) in _found:
            return _found[mode, dtype]
        definition = _definitions[mode]
        try:
            _load(definition, dtype)
            _found[mode, dtype] = True
        except (CompileError, ImportError) as error:
            _found[mode, dtype] = False
            warnings.warn(
                f"fastrnn: {definition.name} has no kernel for {dtype} and runs step by step as "
                f"plain torch: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        return _found[mode, dtype]
