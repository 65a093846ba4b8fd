"""Compiles the kernels of cells of the user's own, one cell and dtype at a time, and keeps them.

What is compiled once is kept in a directory, FASTRNN_CACHE or the platform's place for such things,
under a name that says all it depends on: the cell, the sources of fastrnn, the instruction set or
GPUs, and the dtype. So any number of processes may share it, and nothing in it is ever out of date.
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
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from ._generate import generate
from ._load import _cpu
from ._trace import Definition

__all__ = ["CPU", "CompileError", "Toolchain", "add", "cache_directory", "compile_cell"]
__all__ += ["definition_of", "find_compiler", "load", "source"]

# The element type and its name in csrc/scan.h.
_ELEMENTS = {
    torch.float32: ("float", "kFloat32"),
    torch.float64: ("double", "kFloat64"),
    torch.bfloat16: ("BFloat16", "kBFloat16"),
    torch.float16: ("Float16", "kFloat16"),
}
_PROGRESS_AFTER = 1.0  # seconds

_definitions: dict[str, Definition] = {}
_found: dict[tuple[str, torch.dtype, Toolchain], bool] = {}  # what load() has answered
_lock = threading.RLock()


class CompileError(RuntimeError):
    """There is no kernel, and why."""


class Toolchain(ABC):
    """How kernels are compiled, and taken up, for one type of device."""

    @property
    @abstractmethod
    def name(self) -> str:
        """In the names of files: what the kernels run on."""

    @abstractmethod
    def command(self, csrc: Path) -> list[str]:
        """The compiler with its flags and sources; all but the cell's own.

        Raises:
            CompileError: without a compiler.
        """

    @abstractmethod
    def add(self, mode: str, address: int) -> None:
        """Takes up the CellModule at an address."""


class _Cpu(Toolchain):
    @property
    def name(self) -> str:
        return _cpu.cpu_variant()

    def command(self, csrc: Path) -> list[str]:
        command = find_compiler("C++ compiler", "CXX", "c++", "g++", "clang++")
        flags = ["-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", "-w"]
        flags += _cpu.cpu_variant_flags().split()
        return [*command, *flags, str(csrc / "cpu" / "cell_module.cc")]

    def add(self, mode: str, address: int) -> None:
        _cpu.load_cell(mode, address)


CPU: Toolchain = _Cpu()


def find_compiler(what: str, variable: str, *usual: str) -> list[str]:
    """A compiler's command, as an environment variable has it, or the first of the usual ones."""
    if own := os.environ.get(variable):
        command = shlex.split(own)
        if command and shutil.which(command[0]):
            return command
    else:
        for name in usual:
            if shutil.which(name):
                return [name]
    names = ", ".join([variable, *usual[:-1]])
    raise CompileError(f"there is no {what} ({names} or {usual[-1]})")


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


def _key(definition: Definition, dtype: torch.dtype, toolchain: Toolchain) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{definition.mode}-{toolchain.name}-{name}-{_sources()[1]}"


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


def _compile_into(
    definition: Definition, dtype: torch.dtype, toolchain: Toolchain, target: Path
) -> None:
    """Compiles to a temporary name beside `target`, and moves it there in one step."""
    command = toolchain.command(_sources()[0])
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
            f"-DFASTRNN_GATES={len(definition.gates)}",
            f'-DFASTRNN_CELL_HEADER="{Path(own) / "cell.h"}"',
            f"-DFASTRNN_CELL=fastrnn::{definition.name}",
            f'-DFASTRNN_MODE="{definition.mode}"',
            f"-DFASTRNN_ELEMENT={element}",
            f"-DFASTRNN_DTYPE={name}",
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
            raise CompileError(f"{command[0]} failed:\n{shown}") from error
        except OSError as error:
            raise CompileError(f"{command[0]} cannot be run: {error}") from error
        os.replace(Path(own) / "cell.h", header)  # to read
        os.replace(made, target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_cell(
    definition: Definition, dtype: torch.dtype, directory: Path, toolchain: Toolchain = CPU
) -> Path:
    """The kernel of a cell in a directory, compiled if it is not there.

    Raises:
        CompileError: if it cannot be compiled.
        OSError: if it cannot be kept there.
        RuntimeError: if others may write to the directory.
    """
    directory = directory.absolute()  # the compiler looks beside its source
    path = directory / f"{_key(definition, dtype, toolchain)}.so"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(directory)
    if not path.exists():
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                _compile_into(definition, dtype, toolchain, path)
    return path


def _load(definition: Definition, dtype: torch.dtype, toolchain: Toolchain) -> None:
    def compiled(directory: Path) -> Path:
        return compile_cell(definition, dtype, directory, toolchain)

    try:
        path = compiled(cache_directory())
    except OSError as error:
        # It cannot be kept: a full disk, or one that is only read.
        with tempfile.TemporaryDirectory(prefix="fastrnn-") as own:
            try:
                return _open(definition, compiled(Path(own)), toolchain)
            except OSError:
                raise CompileError(str(error)) from error
    try:
        _open(definition, path, toolchain)
    except ImportError:  # half of a file, say
        path.unlink(missing_ok=True)
        _open(definition, compiled(cache_directory()), toolchain)


def _open(definition: Definition, path: Path, toolchain: Toolchain) -> None:
    try:
        found = ctypes.c_char.in_dll(ctypes.CDLL(str(path)), "fastrnn_cell")
    except (OSError, ValueError) as error:
        raise ImportError(str(error)) from error
    toolchain.add(definition.mode, ctypes.addressof(found))


def load(mode: str, dtype: torch.dtype, toolchain: Toolchain = CPU) -> bool:
    """Whether the kernel of a cell for a dtype is there, compiled now if need be.

    Raises:
        RuntimeError: if the cache is a directory that others may write to.
    """
    key = mode, dtype, toolchain
    found = _found.get(key)
    if found is not None:
        return found
    with _lock:
        if key in _found:
            return _found[key]
        definition = _definitions[mode]
        try:
            _load(definition, dtype, toolchain)
            _found[key] = True
        except (CompileError, ImportError) as error:
            _found[key] = False
            warnings.warn(
                f"fastrnn: {definition.name} has no kernel for {dtype} on {toolchain.name} and "
                f"runs step by step as plain torch: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        return _found[key]
