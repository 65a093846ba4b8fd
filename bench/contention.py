"""What a busy neighbour costs: python -m bench.contention

fastrnn and torch.nn alone, and beside one process that spins in a loop on whatever core it gets.
With n threads on n cores n + 1 threads then want to run, so the fair share is a slowdown of
(n + 1) / n. What is above that is waiting for a thread whose core was taken.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from time import sleep
from typing import Any

from tqdm import tqdm

from .cases import MODES, Case
from .compare import BASE, Team, prepare, warn
from .machine import Load, cores, describe
from .results import DIRECTORY
from .table import align

CELLS = ("LSTM", "GRU")
SHAPES = ((100, 32, 128), (50, 64, 512), (100, 1, 128))
BURST_S = 0.25  # a sample; many time slices of the scheduler
ROUNDS = 7
AWAKE_S = 0.05  # the neighbour's start, before anything is timed


class Neighbour:
    """A process that spins, pinned nowhere, inside `with`, and stands still outside."""

    def __init__(self) -> None:
        spin = (
            f"import os\nwhile os.getppid() == {os.getpid()}: pass"  # never outlives this process
        )
        self._process = subprocess.Popen([sys.executable, "-c", spin])
        self._process.send_signal(signal.SIGSTOP)

    def __enter__(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        sleep(AWAKE_S)

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(team: Team, neighbour: Neighbour, case: Case, rounds: int) -> dict[str, Any]:
    """Rounds of both alone and then both beside the neighbour; slowdowns are paired by round."""
    peers, _ = prepare(team, case)
    loads: list[Load] = []
    alone: dict[str, list[float]] = {peer: [] for peer in peers}
    beside: dict[str, list[float]] = {peer: [] for peer in peers}
    for _ in range(rounds):
        start = team.usage()
        for peer in peers:
            alone[peer].append(team.call(peer, "seconds", BURST_S))
        loads.append(start.load_until(team.usage()))
        with neighbour:
            for peer in peers:
                beside[peer].append(team.call(peer, "seconds", BURST_S))
    slowdown = {p: [slow / fast for slow, fast in zip(beside[p], alone[p])] for p in peers}
    return {
        "case": asdict(case),
        "alone_ms": {p: 1e3 * statistics.median(alone[p]) for p in peers},
        "beside_ms": {p: 1e3 * statistics.median(beside[p]) for p in peers},
        "slowdown": {p: statistics.median(slowdown[p]) for p in peers},
        "worst": {p: max(slowdown[p]) for p in peers},
        "busy": any(load.busy for load in loads),
    }


def render(rows: list[dict[str, Any]]) -> str:
    peers = [("fastrnn", "fastrnn"), ("torch", "torch.nn")]
    titles = ["T, B, H", "layer", "mode"]
    for _, title in peers:
        titles += [f"{title} alone ms", "beside ms", "slowdown", "worst"]
    lines = []
    for row in rows:
        case = Case(**row["case"])
        line = [case.shape, case.layer, case.mode + "*" * row["busy"]]
        for peer, _ in peers:
            line += [f"{row[key][peer]:.3g}" for key in ("alone_ms", "beside_ms")]
            line += [f"{row[key][peer]:.1f}x" for key in ("slowdown", "worst")]
        lines.append(line)
    return align(titles, lines, left=3)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.contention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=cores(), help="default: %(default)s")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=DIRECTORY / "latest-contention.json"
    )
    args = parser.parse_args()
    machine = describe()
    cases = [Case(cell, mode, *shape) for shape in SHAPES for cell in CELLS for mode in MODES]
    rows = []
    neighbour = Neighbour()
    try:
        with Team(BASE, args.threads) as team:
            for case in (bar := tqdm(cases, unit="row", leave=False, disable=None)):
                bar.set_postfix_str(case.name)
                rows.append(measure(team, neighbour, case, args.rounds))
    finally:
        neighbour.close()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "threads": args.threads, "rows": rows}
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{render(rows)}\n\nWritten to {args.json}")
    if any(row["busy"] for row in rows):
        warn("rows marked * had other neighbours than ours. Run this again alone.")


if __name__ == "__main__":
    main()
