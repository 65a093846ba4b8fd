"""How fastrnn and torch.nn scale over the cores of a CPU.

python -m bench.scaling [--json FILE]

Each row is one shape, inference or training, with 1, 2, 4, ... threads; both libraries run in one
process in turn. A speedup is over the same library with one thread.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import fastrnn

SHAPES = ((100, 1, 256), (100, 8, 128), (100, 32, 256), (35, 64, 650))  # T, B, H; I = H
ROUNDS = 5


def timed(layer: Any, x: torch.Tensor, training: bool) -> float:
    begin = perf_counter()
    if training:
        layer(x)[0].sum().backward()
    else:
        with torch.inference_mode():
            layer(x)
    return perf_counter() - begin


def measure(cell: str, shape: tuple[int, int, int], training: bool, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    T, B, H = shape
    x = torch.randn(T, B, H)
    layers = {lib.__name__: getattr(lib, cell)(H, H) for lib in (fastrnn, torch.nn)}
    times: dict[str, list[float]] = {name: [] for name in layers}
    for i in range(ROUNDS + 1):
        for name in list(layers)[:: 1 if i % 2 else -1]:
            seconds = timed(layers[name], x, training)
            if i > 0:  # the first warms up
                times[name].append(seconds)
    mode = "training" if training else "inference"
    row = {"cell": cell, "T": T, "B": B, "H": H, "mode": mode, "threads": threads}
    return row | {f"{name} ms": 1e3 * statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="at most as many")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first ones")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for cell in ("LSTM", "GRU"):
        for shape in SHAPES[: args.shapes]:
            for training in (False, True):
                threads, first = 1, len(rows)
                while threads <= args.threads:
                    rows.append(measure(cell, shape, training, threads))
                    row, one = rows[-1], rows[first]
                    print(
                        f"{cell:4} {shape} {row['mode']:9} {threads:3} threads:"
                        + "".join(
                            f"  {name[:-3]} {row[name]:8.2f} ms, {one[name] / row[name]:5.2f}x"
                            for name in row
                            if name.endswith(" ms")
                        ),
                        flush=True,
                    )
                    threads *= 2
                if args.json:
                    args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
