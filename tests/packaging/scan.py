"""Scans of every cell and dtype by the extension alone, for processors that torch does not run on.

    python scan.py EXTENSION OPENMP [--values]

Needs nothing but Python. Prints the CPU variants and a digest of the results of each scan as JSON;
with --values, the results of each scan on one thread as well: the dtype and, in base64, the bytes
of each tensor.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import random
import struct
import sys
from ctypes import CDLL, RTLD_GLOBAL, addressof, c_char
from itertools import product
from math import prod

# T, B, I, H, and whether with layer normalisation
SIZES = (3, 2, 5, 19, False), (4, 9, 33, 64, False), (4, 5, 9, 40, True)
DIRECTIONS = 2


class DType:
    """A dtype; the extension knows it by its text."""

    def __init__(self, name: str, code: str) -> None:
        self.name, self.code = name, code  # as struct names it

    def __str__(self) -> str:
        return f"torch.{self.name}"

    def pack(self, values: list[float]) -> bytes:
        if self.code:
            return struct.pack(f"{len(values)}{self.code}", *values)
        return b"".join(struct.pack("<f", v)[2:] for v in values)


# float32 comes first: what a narrower dtype keeps in it is made of this object.
DTYPES = (
    DType("float32", "f"),
    DType("float64", "d"),
    DType("bfloat16", ""),
    DType("float16", "e"),
)


class Tensor:
    """As much of torch.Tensor as the extension asks for, see csrc/python/tensor.cc."""

    is_cpu = True

    def __init__(self, shape: tuple[int, ...], dtype: DType, values: list[float]) -> None:
        self.shape, self.dtype = shape, dtype
        data = dtype.pack(values)
        self.memory = (c_char * len(data)).from_buffer_copy(data)

    def data_ptr(self) -> int:
        return addressof(self.memory)

    def is_contiguous(self) -> bool:
        return True

    def new_empty(self, shape: tuple[int, ...], dtype: DType | None = None) -> Tensor:
        return Tensor(shape, dtype or self.dtype, [0.0] * prod(shape))

    # The two directions' gradients of x are added up by torch; here they are looked at as they are.
    def sum(self, dim: int) -> Tensor:
        return self

    def view_as(self, other: Tensor) -> Tensor:
        return self


def load(extension: str, openmp: str, threads: list[int]):
    """The extension; a scan runs on threads[0] threads."""
    CDLL(openmp, RTLD_GLOBAL)  # as torch would
    spec = importlib.util.spec_from_file_location("_cpu", extension)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_torch(Tensor, Tensor, (), lambda: False, lambda: threads[0])
    return module


def scan(cpu, mode: str, dtype: DType, sizes: tuple[int, int, int, int, bool]) -> list[Tensor]:
    """What forward and backward of one layer of both directions return."""
    T, B, I, H, layer_norm = sizes  # noqa: E741
    D, cell, source = DIRECTIONS, cpu.cells[mode], random.Random(0)

    def new(*shape: int) -> Tensor:
        return Tensor(shape, dtype, [source.uniform(-0.5, 0.5) for _ in range(prod(shape))])

    # The fields of Layer and Saved in python/fastrnn/_layer.py.
    G, has_cell_state = cell.gates * H, cell.has_cell_state
    options = mode, D, B, False, 0, True, False, 0.0, 0.0, 0.0, layer_norm
    x, h_0, c_0 = new(T, B, I), new(D, B, H), new(D, B, H) if has_cell_state else None
    shapes = [(G, I), (G, H), (G,), (G,)]
    shapes += [(G,), (G,), (H,), (H,)][: cell.norms] if layer_norm else []
    weights = [new(*shape) for _ in range(D) for shape in shapes]
    layer = *options, x, h_0, c_0, *[None] * 6, weights
    output, h_n, c_n, extra, saved = cpu.forward(layer)

    d_c_n = new(D, B, H) if has_cell_state else None
    wanted = [True, True, has_cell_state, False, *[True] * len(weights)]
    given = output, extra, saved, new(T, B, D * H), new(D, B, H), d_c_n, None, wanted
    results = [output, h_n, c_n, extra, saved, *cpu.backward(layer, given)]
    return [tensor for tensor in results if tensor is not None]


def main(extension: str, openmp: str, *options: str) -> None:
    threads = [1]
    cpu = load(extension, openmp, threads)
    scans, values = {}, {}
    for mode, dtype, sizes, threads[0] in product(cpu.cells, DTYPES, SIZES, (1, 2)):
        results, name = scan(cpu, mode, dtype, sizes), f"{mode} {dtype} {sizes}"
        digest = hashlib.sha256(b"".join(tensor.memory.raw for tensor in results))
        scans[f"{name} {threads[0]} threads"] = digest.hexdigest()
        if "--values" in options and threads[0] == 1:
            values[name] = [
                (t.dtype.name, base64.b64encode(t.memory.raw).decode()) for t in results
            ]
    print(json.dumps({"variants": cpu.cpu_variants(), "scans": scans, "values": values}))


if __name__ == "__main__":
    main(*sys.argv[1:])
