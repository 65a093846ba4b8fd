"""The register tiles against the multiply-add rate: python -m bench.tiles

A layer cannot be faster than the tile that its products are made of. For each instruction set that
this processor can run, in a process of its own on one thread: the tallest tile of each width, on
data in L1, as a fraction of what the core does in nothing but multiply-adds.
"""

import argparse
import os
import statistics
from typing import Any

from .table import align
from .worker import Worker

WIDTHS = (1, 2, 3, 4)  # vectors: 3 in a GRU's products, 4 in the others
DEPTHS = (32, 128, 256)
ROUNDS = 5


class Tiles:
    def __init__(self, threads: int) -> None:
        from fastrnn import _cpu

        self._cpu = _cpu

    def variants(self) -> list[str]:
        return self._cpu.cpu_variants()

    def fraction(self, vectors: int, depth: int, transposed: bool) -> float:
        """The median over rounds of one rate over the other, each right after the other."""

        def one() -> float:
            rate = self._cpu.multiply_add_rate(1)
            return self._cpu.tile_rate(vectors, depth, transposed) / rate

        return statistics.median(one() for _ in range(ROUNDS))


def measure(variant: str) -> list[list[str]]:
    os.environ["FASTRNN_CPU"] = variant  # the worker inherits it
    worker = Worker(Tiles, 1)
    lines = []
    try:
        for transposed in (False, True):
            for vectors in WIDTHS:
                cells: list[Any] = [worker.call("fraction", vectors, k, transposed) for k in DEPTHS]
                what = "weight gradients" if transposed else "rows times a weight"
                lines.append([variant, what, str(vectors), *(f"{cell:.2f}" for cell in cells)])
    finally:
        worker.close()
    return lines


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.tiles", description=__doc__).parse_args()
    os.environ.pop("FASTRNN_CPU", None)
    worker = Worker(Tiles, 1)
    variants = worker.call("variants")
    worker.close()
    lines = [line for variant in variants for line in measure(variant)]
    titles = ["instructions", "product", "vectors", *(f"depth {depth}" for depth in DEPTHS)]
    print(align(titles, lines, left=2))


if __name__ == "__main__":
    main()
