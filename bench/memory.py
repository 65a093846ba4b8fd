"""Peak extra memory of one training step: python -m bench.memory

Each figure comes from processes of their own, in which a tiny step loads the code and starts the
threads first. Then the kernel's mark of the largest resident size (VmHWM) is set back, one step
runs, and the figure is how far the mark has risen above the size before it. So everything that the
step touches counts, whoever allocated it: torch, the kernels' workspace, or a library's buffers.
ru_maxrss would not do: it cannot be set back and may still stand at a peak of the import. Counting
calls of malloc would miss what is mapped without it. Blocks come straight from the system and go
straight back, or else a step would hide in memory that was freed before.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .cases import GATES, Case
from .machine import cores, describe
from .peers import FastRNN, TorchNN
from .results import DIRECTORY
from .table import align

SHAPE = (100, 32, 256)
RUNS = 3
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
SMALL = 1 << 16

# What is compared: a peer and options of its layers.
VARIANTS: dict[str, tuple[type[TorchNN], dict[str, Any]]] = {
    "torch.nn": (TorchNN, {}),
    "fastrnn": (FastRNN, {}),
}


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def peak(variant: str, case: Case, threads: int) -> int:
    """Bytes; for a fresh process."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, SMALL)
    libc.mallopt(M_TRIM_THRESHOLD, SMALL)
    peer_class, options = VARIANTS[variant]
    peer = peer_class(threads, **options)
    peer.prepare(replace(case, T=2, B=2, H=32))
    peer.step()
    peer.prepare(case)
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    peer.step()
    return status("VmHWM") - before


def measure(variant: str, case: Case, threads: int, runs: int) -> int:
    """The median over fresh processes."""
    context = multiprocessing.get_context("spawn")
    peaks = []
    for _ in range(runs):
        with context.Pool(1) as pool:
            peaks.append(pool.apply(peak, (variant, case, threads)))
    return round(statistics.median(peaks))


def render(rows: list[dict[str, Any]]) -> str:
    names = [name for name in VARIANTS if name != "torch.nn"]
    titles = ["T, B, H", "layer", *(f"{name} MiB" for name in VARIANTS)]
    titles += [f"{name} / torch.nn" for name in names]
    lines = []
    for row in rows:
        case, peaks = Case(**row["case"]), row["bytes"]
        lines.append([case.shape, case.layer])
        lines[-1] += [f"{peaks[name] / 2**20:.1f}" for name in VARIANTS]
        lines[-1] += [f"{peaks[name] / peaks['torch.nn']:.2f}x" for name in names]
    return align(titles, lines, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", type=int, nargs=3, metavar=("T", "B", "H"), default=SHAPE)
    parser.add_argument("--runs", type=int, default=RUNS, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=cores(), help="default: %(default)s")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=DIRECTORY / "latest-memory.json"
    )
    args = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error("reads /proc, so it runs on Linux only")
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(GATES) * len(VARIANTS), leave=False, disable=None) as bar:
        for cell in GATES:
            case = Case(cell, "training", *args.shape)
            rows.append({"case": asdict(case), "bytes": {}})
            for variant in VARIANTS:
                bar.set_postfix_str(f"{cell} {variant}")
                rows[-1]["bytes"][variant] = measure(variant, case, args.threads, args.runs)
                bar.update()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": describe(), "threads": args.threads, "rows": rows}
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{render(rows)}\n\nWritten to {args.json}")


if __name__ == "__main__":
    main()
