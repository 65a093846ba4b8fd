"""Peers called in short bursts in turn, and the command line of the programs that do so.

The peers of a library share a process, and with it the library's pool of threads; no two libraries
do: for some tens of milliseconds after one pool was at work, a call of two threads of the other one
takes several times as long. Nor
does a burst begin before the threads of the last one sleep: see worker.py.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from .compare import warn
from .machine import Usage, cores, describe
from .peers import WARM_UP_S
from .results import DIRECTORY, Result, Row, medians_of_ratios, write
from .worker import Worker

WARM_UP = 20  # calls at least before each burst, and WARM_UP_S
MOST_CALLS = 500
BURST_S = 0.01

Call = Callable[[], Any]
# The peers of one library by their names, for what a row is about and so many threads.
Make = Callable[[Any, int], dict[str, Call]]


class Bursts:
    """The peers of one library, in a process of their own."""

    def __init__(self, make: Make, threads: int) -> None:
        self._make, self._threads = make, threads
        self._calls: dict[str, Call] = {}
        self._context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def prepare(self, case: Any, has_gradients: bool | None) -> list[str]:
        """The names of the peers. has_gradients: whether they run with them, None without torch."""
        self._calls = {}  # before there are others
        if has_gradients is not None:
            import torch

            torch.set_num_threads(self._threads)
            self._context = partial(torch.inference_mode, not has_gradients)
        self._calls = self._make(case, self._threads)
        return list(self._calls)

    def seconds(self, peer: str, calls: int) -> float:
        """Of one call, the mean over so many."""
        call = self._calls[peer]
        with self._context():
            warm = perf_counter() + WARM_UP_S
            for _ in range(min(WARM_UP, calls)):
                call()
            while perf_counter() < warm:
                call()
            start = perf_counter()
            for _ in range(calls):
                call()
            return (perf_counter() - start) / calls


def measure(
    makes: Sequence[tuple[Make, bool | None]],
    case: Any,
    threads: int,
    rounds: int,
    burst_s: float = BURST_S,
) -> Row:
    """Times of all peers, and over that of the first one: medians over the rounds.

    makes: for each library what makes its peers, and whether they run with gradients.
    """
    workers = [Worker(partial(Bursts, make), threads) for make, _ in makes]
    try:
        of: dict[str, Worker] = {}
        for worker, (_, has_gradients) in zip(workers, makes):
            of |= dict.fromkeys(worker.call("prepare", case, has_gradients), worker)
        peers = list(of)
        calls = {}
        for peer, worker in of.items():
            about = worker.call("seconds", peer, 3)
            calls[peer] = max(3, min(MOST_CALLS, int(burst_s / about)))
            if about > burst_s:
                calls[peer] = 1
        samples: dict[str, list[float]] = {peer: [] for peer in peers}
        start = Usage.now(sum(worker.cpu_s for worker in workers))
        for k in range(rounds):
            first = k % len(peers)
            for peer in peers[first:] + peers[:first]:
                samples[peer].append(of[peer].call("seconds", peer, calls[peer]))
        load = start.load_until(Usage.now(sum(worker.cpu_s for worker in workers)))
    finally:
        for worker in workers:
            worker.close()
    ratios = medians_of_ratios(samples, peers[0])
    return {
        "us": {peer: 1e6 * statistics.median(times) for peer, times in samples.items()},
        # Of the fastest round: what is left where others used the machine in the rest of them.
        "least_us": {peer: 1e6 * min(times) for peer, times in samples.items()},
        "over": {peer: ratio for peer, ratio in ratios.items() if peer != peers[0]},
        "others": load.others,
        "steal": load.steal,
        "busy": load.busy,
    }


def parser(name: str, description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all such programs have."""
    found = argparse.ArgumentParser(
        prog=f"python -m bench.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    found.add_argument("--threads", type=int, default=cores(), help="default: %(default)s")
    found.add_argument(
        "--only",
        metavar="TEXT",
        nargs="+",
        default=[""],
        help="rows in whose name all words of a TEXT are: 'LSTM training' RNN",
    )
    found.add_argument("--list", action="store_true", help="print the names of the rows")
    found.add_argument(
        "--json", type=Path, metavar="FILE", default=DIRECTORY / f"latest-{name}.json"
    )
    found.add_argument(
        "--keep",
        action="store_true",
        help="keep the rows in FILE that are not measured now, of the same machine",
    )
    found.add_argument(
        "--missing",
        action="store_true",
        help="with --keep: measure only rows that FILE has not, or has as busy",
    )
    return found


def chosen(names: Sequence[str], texts: Sequence[str]) -> list[str]:
    return [n for n in names if any(all(word in n for word in text.split()) for text in texts)]


def conditions(result: Result) -> dict[str, Any]:
    """What two results have to have in common for one table."""
    machine = {k: v for k, v in result["machine"].items() if k not in ("commit", "load_average")}
    return {"threads": result["threads"], **machine}


def run(
    args: argparse.Namespace,
    cases: Mapping[str, Any],
    measure_row: Callable[[Any], Row],
    render: Callable[[list[Row]], str],
    packages: tuple[str, ...] = ("torch", "fastrnn"),
) -> None:
    """Measures the rows asked for, by name, and writes FILE after each."""
    names = chosen(list(cases), args.only)
    if args.list:
        print("\n".join(names))
        return
    if not names:
        sys.exit(f"--only {' '.join(map(repr, args.only))} is in no name, see --list")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    found: Result = {"machine": describe(packages), "threads": args.threads, "rows": []}
    rows: dict[str, Row] = {}
    if args.keep and args.json.exists():
        earlier = json.loads(args.json.read_text())
        if conditions(earlier) != conditions(found):
            sys.exit(f"--keep: {args.json} was measured on another machine or by other versions")
        rows = {row["row"]: row for row in earlier["rows"]}
    if args.missing:
        names = [name for name in names if name not in rows or rows[name]["busy"]]
    found["rows"] = [rows[each] for each in cases if each in rows]
    for name in (bar := tqdm(names, unit="row", leave=False, disable=None)):
        bar.set_postfix_str(name)
        row = measure_row(cases[name])
        rows[name] = {"row": name, "commit": found["machine"]["commit"], **row}
        # In the order of the program, whatever was measured first.
        found["rows"] = [rows[each] for each in cases if each in rows]
        write(found, args.json)
    print(f"{render(found['rows'])}\n\nWritten to {args.json}")
    if any(row["busy"] for row in found["rows"]):
        warn("rows marked * were measured while others used the machine. Run this again alone.")
