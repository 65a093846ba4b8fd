"""Scans of every cell and dtype by the extension alone, for processors that torch does not run on.

    python scan.py EXTENSION OPENMP

Needs nothing but Python. Prints the CPU variants and a digest of the results of each scan as JSON.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import struct
import sys
from ctypes import CDLL, RTLD_GLOBAL, addressof, c_char
from itertools import product

DTYPES = "f", "d", "bf16", "e"  # in the order of DType in csrc/scan.h, as struct names them
SIZES = (3, 2, 5, 19), (4, 9, 33, 64)  # T, B, I, H
DIRECTIONS = 2


def load(extension: str, openmp: str):
    CDLL(openmp, RTLD_GLOBAL)  # as torch would
    spec = importlib.util.spec_from_file_location("_cpu", extension)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pack(values: list[float], dtype: str) -> bytes:
    if dtype != "bf16":
        return struct.pack(f"{len(values)}{dtype}", *values)
    return b"".join(struct.pack("<f", v)[2:] for v in values)


class Buffers:
    """Tensors as far as the extension sees them: addresses of memory."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.random = random.Random(0)
        self.results = []
        self.memory = []

    def _keep(self, data: bytes):
        self.memory.append((c_char * len(data)).from_buffer_copy(data))
        return self.memory[-1]

    def given(self, count: int) -> int:
        values = [self.random.uniform(-0.5, 0.5) for _ in range(count)]
        return addressof(self._keep(pack(values, self.dtype)))

    def wanted(self, count: int, dtype: str = "") -> int:
        self.results.append(self._keep(pack([0.0], dtype or self.dtype) * count))
        return addressof(self.results[-1])

    def digest(self) -> str:
        return hashlib.sha256(b"".join(r.raw for r in self.results)).hexdigest()


def scan(cpu, mode: str, dtype: str, sizes: tuple[int, int, int, int], threads: int) -> str:
    """Forward and backward of one layer of both directions."""
    T, B, I, H = sizes  # noqa: E741
    D, N = DIRECTIONS, T * B
    cell, memory = cpu.cells[mode], Buffers(dtype)
    given, wanted = memory.given, memory.wanted
    wide = cell.gates * H
    state = "f" if dtype in ("bf16", "e") else dtype  # what is carried from step to step

    def each(make, count):
        return [make(count) for _ in range(D)]

    # Named and ordered as in python/fastrnn/_cpu.pyi.
    shape = (cell.index, DTYPES.index(dtype), (T, B, H, H, D), N, 0, 0, False, I)
    x = given(N * I)
    weights = each(given, wide * I), each(given, wide * H), []
    biases = each(given, wide), each(given, wide)
    states = given(D * B * H), given(D * B * H) if cell.has_cell_state else 0
    output, h_n = wanted(N * D * H), wanted(D * B * H)
    c_n = wanted(D * B * H) if cell.has_cell_state else 0
    gates = each(wanted, N * wide) if cell.saves_gates else []
    extra = wanted(N * D * H, state) if cell.has_extra else 0
    cpu.forward(*(*shape, x, *weights, *biases, *states, output, h_n, c_n, gates, extra), threads)

    incoming = given(N * D * H), given(D * B * H), given(D * B * H) if cell.has_cell_state else 0, 0
    outgoing = wanted(D * N * I), wanted(D * B * H), wanted(D * B * H) if cell.has_cell_state else 0
    d_weights = each(wanted, wide * I), each(wanted, wide * H), []
    d_biases = each(wanted, wide), each(wanted, wide)
    cpu.backward(
        *(*shape, x, *weights, *states, output, gates, extra, *incoming, *outgoing),
        *(*d_weights, *d_biases),
        threads,
    )
    return memory.digest()


def main(extension: str, openmp: str) -> None:
    cpu = load(extension, openmp)
    scans = {
        f"{mode} {dtype} {sizes} {threads} threads": scan(cpu, mode, dtype, sizes, threads)
        for mode, dtype, sizes, threads in product(cpu.cells, DTYPES, SIZES, (1, 2))
    }
    print(json.dumps({"variants": cpu.cpu_variants(), "scans": scans}))


if __name__ == "__main__":
    main(*sys.argv[1:])
