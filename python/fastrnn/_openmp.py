"""The OpenMP runtime that torch runs on, and the kernels with it."""

from __future__ import annotations

import ctypes
import os

import torch


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
        process, needed = ctypes.CDLL(None), ctypes.CDLL(torch._C.__file__)
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


def show_openmp() -> None:
    """Makes it visible to extensions that are loaded later, which not every torch does."""
    if (path := openmp_library()) is not None:
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
