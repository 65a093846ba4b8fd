"""What a busy neighbour costs: python -m bench.contention

A repetition times some steps of a layer alone, and the same again beside a process that was started
for it and gets whatever core it gets. `busy` spins all the time. With n threads on n cores n + 1
threads then want to run, so the fair share is a slowdown of (n + 1) / n, and a layer that keeps
away from the neighbour's core runs n / (n - 1) times as long. `half` spins and sleeps in turn, as
programs with short work do: whoever keeps away from its core wastes half of that.
"""

import argparse
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from time import sleep
from typing import Any

from tqdm import tqdm

from .cases import Case
from .compare import BASE, Team, prepare, warn
from .machine import Load, cores, describe
from .results import DIRECTORY, write
from .table import align

CELLS = ("LSTM", "GRU")
SHAPES = ((90, 24, 144), (100, 1, 128))  # threads split the rows of one, the units of the other
SLICE_S = 0.002
NEIGHBOURS = {
    "busy": "pass",
    "half": f"""
    end = monotonic() + {SLICE_S}
    while monotonic() < end: pass
    sleep({SLICE_S})""",
}
REPETITIONS = 20
STEPS = 9
REST_S = 0.5  # before a repetition, so that none profits from what the one before it found out
AWAKE_S = 0.05  # what the scheduler has to get used to a neighbour, before anything is timed


class Neighbour:
    """A process that keeps a core busy from the beginning of `with` to its end, pinned nowhere."""

    def __init__(self, kind: str) -> None:
        # It never outlives this process.
        code = (
            "import os\nfrom time import monotonic, sleep\nprint(flush=True)\n"
            f"while os.getppid() == {os.getpid()}: {NEIGHBOURS[kind]}"
        )
        command = [sys.executable, "-I", "-S", "-c", code]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)

    def __enter__(self) -> "Neighbour":
        assert self._process.stdout is not None
        self._process.stdout.readline()  # written when it begins
        sleep(AWAKE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def mean_load(loads: list[Load]) -> Load:
    """A time of some milliseconds is too short for the clock ticks in which others are counted."""
    return Load(
        statistics.mean(load.others for load in loads),
        statistics.mean(load.steal for load in loads),
    )


def measure(team: Team, kind: str, case: Case, repetitions: int) -> dict[str, Any]:
    """Repetitions of each peer in turn, alone and then beside a neighbour of its own."""
    peers, _ = prepare(team, case)
    loads: list[Load] = []
    alone: dict[str, list[float]] = {peer: [] for peer in peers}
    slowdowns: dict[str, list[float]] = {peer: [] for peer in peers}
    for _ in range(repetitions):
        for peer in peers:
            sleep(REST_S)
            start = team.usage()
            alone[peer].append(team.call(peer, "mean_seconds", STEPS))
            loads.append(start.load_until(team.usage()))
            with Neighbour(kind):
                beside = team.call(peer, "mean_seconds", STEPS)
            slowdowns[peer].append(beside / alone[peer][-1])
    return {
        "case": asdict(case),
        "neighbour": kind,
        "alone_ms": {peer: 1e3 * statistics.median(alone[peer]) for peer in peers},
        "slowdown": {peer: statistics.median(slowdowns[peer]) for peer in peers},
        "worst": {peer: max(slowdowns[peer]) for peer in peers},
        "slowdowns": slowdowns,
        "busy": mean_load(loads).busy,
    }


def render(rows: list[dict[str, Any]]) -> str:
    peers = [("fastrnn", "fastrnn"), ("torch", "torch.nn")]
    titles = ["T, B, H", "layer", "mode", "neighbour"]
    for _, title in peers:
        titles += [f"{title} alone ms", "slowdown", "worst"]
    lines = []
    for row in rows:
        case = Case(**row["case"])
        line = [case.shape, case.layer, case.mode, row["neighbour"] + "*" * row["busy"]]
        for peer, _ in peers:
            line.append(f"{row['alone_ms'][peer]:.3g}")
            line += [f"{row[key][peer]:.2f}x" for key in ("slowdown", "worst")]
        lines.append(line)
    return align(titles, lines, left=4)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.contention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=cores(), help="default: %(default)s")
    parser.add_argument("--only", metavar="TEXT", help="rows whose name has TEXT: 'LSTM', 'half'")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=DIRECTORY / "latest-contention.json"
    )
    args = parser.parse_args()
    machine = describe()
    cells = [
        (kind, Case(cell, "training", *shape))
        for shape in SHAPES
        for cell in CELLS
        for kind in NEIGHBOURS
    ]
    rows = []
    with Team(BASE, args.threads) as team:
        for kind, case in (bar := tqdm(cells, unit="row", leave=False, disable=None)):
            name = f"{case.name} {kind}"
            if args.only and args.only not in name:
                continue
            bar.set_postfix_str(name)
            rows.append(measure(team, kind, case, args.repetitions))
    write({"machine": machine, "threads": args.threads, "rows": rows}, args.json)
    print(f"{render(rows)}\n\nWritten to {args.json}")
    if any(row["busy"] for row in rows):
        warn("rows marked * had other neighbours than ours. Run this again alone.")


if __name__ == "__main__":
    main()
