"""Loads the extensions: _cpu on torch's OpenMP runtime, and _cuda or nothing in its place."""

from __future__ import annotations

import ctypes
import os
import warnings
from contextlib import suppress
from importlib import import_module
from types import ModuleType

import torch

from . import _torch

__all__ = ["_cpu", "_cuda", "find_cuda", "openmp_library", "set_torch"]


class _Symbol(ctypes.Structure):  # Dl_info of <dlfcn.h>
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def openmp_library() -> str | None:
    """The file that torch's OpenMP functions come from."""
    try:
        process, needed = ctypes.CDLL(None), ctypes.CDLL(_torch.library_file())
    except (OSError, TypeError):  # no dlopen on this system
        return None
    for name in ("GOMP_parallel", "__kmpc_fork_call"):  # what GCC's and LLVM's code calls
        found = _Symbol()
        if (
            (function := getattr(needed, name, None)) is not None
            and process.dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(found))
            and found.file
        ):
            return os.fsdecode(found.file)
    return None


def _show_openmp() -> None:
    """Makes it visible to extensions that are loaded later, which not every torch does."""
    if (path := openmp_library()) is not None:
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


def _driver_version() -> int:
    """The CUDA version that the driver is for, 0 without one; does not initialise CUDA."""
    version = ctypes.c_int(0)
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def find_cuda() -> tuple[ModuleType | None, str]:
    """The CUDA kernels, or None and why not."""
    try:
        library = import_module("fastrnn._cuda")
    except ModuleNotFoundError:
        return None, "not part of this installation"
    except ImportError as error:
        return None, f"cannot be loaded: {error}"
    built, driver = library.built_for // 1000, _driver_version() // 1000
    if 0 < driver < built:
        return None, f"cannot be used: built for CUDA {built}, the driver is for CUDA {driver}"
    return library, "loaded"


try:
    from . import _cpu
except ImportError as error:
    if not any(name in str(error) for name in ("GOMP", "omp_", "__kmpc")):
        raise
    _show_openmp()  # as this torch has not: that of 2.6 for aarch64, say
    try:
        from . import _cpu
    except ImportError:
        raise ImportError(
            "fastrnn uses the OpenMP runtime that torch loads, and this torch "
            f"({torch.__version__}) has not made it visible: {error}"
        ) from error


def set_torch(extension: ModuleType) -> None:
    """Tells an extension what it has to know of torch, before anything else is asked of it."""
    extension.set_torch(
        torch.Tensor,
        torch.nn.Parameter,
        _torch.WATCHERS,
        torch.is_grad_enabled,
        torch.get_num_threads,
    )


set_torch(_cpu)
_cuda, _why = find_cuda()
if _cuda is not None:
    set_torch(_cuda)
if _why.startswith("cannot") and _driver_version():
    warnings.warn(
        f"fastrnn's CUDA kernels: {_why}. CUDA tensors run on the reference implementation, in "
        "plain torch.",
        RuntimeWarning,
        stacklevel=2,
    )
