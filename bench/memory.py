"""Peak memory of a training step, and its time: python -m bench.memory

Each figure comes from a process of its own, as users have them: malloc is as it comes. A tiny step
loads the code and starts the threads; what the process holds then, with the weights, the input and
the gradient of the output, is where the figure begins. Then come warm-up steps of the shape itself,
so that malloc has settled on what it keeps; the kernel's mark of the largest resident size (VmHWM)
is set back, one more step runs, and the figure is how far the mark stands above the beginning. So
everything that a step touches counts, whoever allocated it and whether or not it came from an
earlier step: torch, the kernels' workspace, holes that nothing fits into. Steps are timed in the
same processes, in turn; ratios of time are medians over all pairs.

The long sequence for which checkpoint_every is made:

    python -m bench.memory --shape 4000 32 256 --cells LSTM --checkpoint-every 63 --without-torch
"""

import argparse
import gc
import math
import statistics
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .cases import GATES, Case
from .compare import warn
from .machine import Load, Usage, cores, describe
from .peers import FastRNN, TorchNN
from .results import DIRECTORY, Row, medians_of_ratios, write
from .table import align
from .worker import Worker

SHAPE = (100, 32, 256)
RUNS = 3
WARM_UP = 3  # steps
TIMED = 3  # steps of each process of a run
BURST_S = 0.1
TITLES = {"torch": "torch.nn", "fastrnn": "fastrnn", "checkpointed": "checkpoint_every"}

# What a step with checkpoint_every may take of one without.
MEMORY_GOAL, TIME_GOAL = 0.35, 1.30


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


class Subject:
    """One layer class and its options, for a fresh process."""

    def __init__(self, peer_class: type[TorchNN], options: dict[str, Any], threads: int) -> None:
        self._peer = peer_class(threads, **options)

    def peak(self, case: Case) -> int:
        """Bytes."""
        peer = self._peer
        peer.prepare(replace(case, T=2, B=2, H=32))
        peer.step()
        peer.prepare(case)
        gc.collect()
        before = status("VmRSS")
        for _ in range(WARM_UP):
            peer.step()
        Path("/proc/self/clear_refs").write_text("5")
        peer.step()
        return status("VmHWM") - before

    def seconds(self) -> float:
        return self._peer.seconds(BURST_S)


def variants(every: int) -> dict[str, Any]:
    """What makes each subject, given the number of threads."""
    return {
        "torch": partial(Subject, TorchNN, {}),
        "fastrnn": partial(Subject, FastRNN, {}),
        "checkpointed": partial(Subject, FastRNN, {"checkpoint_every": every}),
    }


def measure(case: Case, subjects: dict[str, Any], threads: int, runs: int) -> Row:
    """Medians over runs, each with a fresh process for each variant."""
    peaks: dict[str, list[int]] = {name: [] for name in subjects}
    samples: dict[str, list[float]] = {name: [] for name in peaks}
    others = steal = 0.0
    for _ in range(runs):
        workers = {name: Worker(make, threads) for name, make in subjects.items()}
        try:
            for name, worker in workers.items():
                peaks[name].append(worker.call("peak", case))
            start = Usage.now(sum(worker.cpu_s for worker in workers.values()))
            for _ in range(TIMED):
                for name, worker in workers.items():
                    samples[name].append(worker.call("seconds"))
            load = start.load_until(Usage.now(sum(worker.cpu_s for worker in workers.values())))
            others, steal = max(others, load.others), max(steal, load.steal)
        finally:
            for worker in workers.values():
                worker.close()
    return {
        "case": asdict(case),
        "bytes": {name: round(statistics.median(sizes)) for name, sizes in peaks.items()},
        "ms": {name: 1e3 * statistics.median(times) for name, times in samples.items()},
        "times_fastrnn": medians_of_ratios(samples, "fastrnn"),
        "others": others,
        "steal": steal,
        "busy": Load(others, steal).busy,
    }


def render(rows: list[Row]) -> str:
    titles = ["T, B, H", "layer"]
    titles += [f"{title} MiB" for title in TITLES.values()]
    titles += ["fastrnn / torch.nn", "every", "checkpoint_every / plain", "time / plain"]
    lines = []
    for row in rows:
        case, peaks = Case(**row["case"]), row["bytes"]
        line = [case.shape, case.layer + "*" * row["busy"]]
        line += [f"{peaks[name] / 2**20:.1f}" if name in peaks else "" for name in TITLES]
        line += [f"{peaks['fastrnn'] / peaks['torch']:.2f}x" if "torch" in peaks else ""]
        line += [str(row["checkpoint_every"])]
        line += [f"{peaks['checkpointed'] / peaks['fastrnn']:.2f}x"]
        line += [f"{row['times_fastrnn']['checkpointed']:.2f}x"]
        lines.append(line)
    return align(titles, lines, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", type=int, nargs=3, metavar=("T", "B", "H"), default=SHAPE)
    parser.add_argument("--cells", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument(
        "--checkpoint-every", type=int, metavar="K", help="default: the square root of T"
    )
    parser.add_argument(
        "--without-torch", action="store_true", help="whose steps of long sequences take minutes"
    )
    parser.add_argument("--runs", type=int, default=RUNS, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=cores(), help="default: %(default)s")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=DIRECTORY / "latest-memory.json"
    )
    args = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error("reads /proc, so it runs on Linux only")
    every = args.checkpoint_every or max(1, round(math.sqrt(args.shape[0])))
    subjects = variants(every)
    if args.without_torch:
        del subjects["torch"]
    rows: list[Row] = []
    for cell in (bar := tqdm(args.cells, unit="row", leave=False, disable=None)):
        bar.set_postfix_str(cell)
        case = Case(cell, "training", *args.shape)
        row = measure(case, subjects, args.threads, args.runs)
        rows.append({**row, "checkpoint_every": every})
    write({"machine": describe(), "threads": args.threads, "rows": rows}, args.json)
    print(f"{render(rows)}\n")
    print(
        f"Goals of checkpoint_every on long sequences: {MEMORY_GOAL:.2f} of the memory of a plain "
        f"step, {TIME_GOAL:.2f} of its time.\n\nWritten to {args.json}"
    )
    if any(row["busy"] for row in rows):
        warn("rows marked * were timed while others used the machine. Run this again alone.")


if __name__ == "__main__":
    main()
