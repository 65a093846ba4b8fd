"""The measurement: all peers in turn, round by round, on one row after another.

A round takes one sample of each peer, so whatever the machine does happens to all of them; ratios
are medians over the rounds. No two libraries share a process, and none runs while another does.
"""

import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from time import perf_counter
from typing import Any

from tqdm import tqdm

from .cases import Array, Case
from .floor import FEW_ROWS, floor_seconds, sizes_to_read
from .machine import Usage, describe, load_of
from .peers import PEERS, check
from .results import SCHEMA, Result, Row, case_of, medians_of_ratios
from .worker import Worker, WorkerError

BURST_S = 0.02  # a sample is at least that long, so that the timer and cold caches do not count
BASE = ("torch", "fastrnn")  # always there: numbers are checked, and ratios taken, against them
BEFORE_S = 1.0
WAITING_LIMIT = 0.02  # CPU share of a worker that has nothing to do
SPREAD_LIMIT = 1.25  # slow over fast samples of one loop; on a quiet machine about 1.0


class Team:
    """The workers of one run."""

    def __init__(self, peers: Iterable[str], threads: int) -> None:
        self.peers = [*BASE, *(peer for peer in peers if peer not in BASE)]
        self._threads = threads
        self._workers = {name: Worker(name, threads) for name in (*self.peers, "limits")}
        self._gone_cpu_s = 0.0

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        worker = self._workers[name]
        try:
            return worker.call(method, *arguments)
        except WorkerError:
            if not worker.process.is_alive():
                self._gone_cpu_s += worker.cpu_s
                self._workers[name] = Worker(name, self._threads)
            raise

    def usage(self) -> Usage:
        return Usage.now(self._gone_cpu_s + sum(w.cpu_s for w in self._workers.values()))

    def waiting_share(self) -> float:
        return max(worker.waiting_share() for worker in self._workers.values())

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()


def prepare(team: Team, case: Case) -> tuple[list[str], dict[str, str]]:
    """Those whose numbers are torch.nn's, ready to be timed, and what is wrong with the others."""
    expected: dict[str, Array] | None = None
    ready, failed = [], {}
    for peer in team.peers:
        if not PEERS[peer].takes(case):
            continue
        try:
            team.call(peer, "prepare", case)
            values = team.call(peer, "run")
            if expected is None:
                expected = values
            check(values, expected)
        except (WorkerError, ValueError) as error:
            if peer in BASE:
                raise
            failed[peer] = str(error)
        else:
            ready.append(peer)
    return ready, failed


def sample(team: Team, peers: list[str], seconds: float, least: int) -> dict[str, list[float]]:
    """Seconds per call, one sample a round and peer, for that long and at least that often."""
    samples: dict[str, list[float]] = {peer: [] for peer in peers}
    start, done = perf_counter(), 0
    while done < least or perf_counter() - start < seconds:
        first = done % len(peers)
        for peer in peers[first:] + peers[:first]:
            samples[peer].append(team.call(peer, "seconds", BURST_S))
        done += 1
    return samples


def measure(team: Team, case: Case, seconds: float, least: int) -> Row:
    """A row without the fractions of the floor, which is known when the run ends."""
    ready, failed = prepare(team, case)
    start = team.usage()
    samples = sample(team, ready, seconds, least)
    load = start.load_until(team.usage())
    return {
        "case": asdict(case),
        "rounds": len(samples["torch"]),
        "ms": {peer: 1e3 * statistics.median(times) for peer, times in samples.items()},
        "times_torch": medians_of_ratios(samples, "torch"),
        "times_fastrnn": medians_of_ratios(samples, "fastrnn"),
        "failed": failed,
        "others": load.others,
        "steal": load.steal,
        "busy": load.busy,
    }


def add_fractions(row: Row, multiply_adds: float, reads: dict[int, float]) -> None:
    """The rates in operations per second and, by bytes read, in bytes per second."""
    case, seconds = Case(**row["case"]), row["ms"]["fastrnn"] / 1e3
    floor = floor_seconds(case, multiply_adds, reads)
    row["floor_ms"] = 1e3 * floor
    row["of_floor"] = floor / seconds


def spread(samples: list[float]) -> float:
    """Of rates: the best one over the one that a tenth is slower than."""
    return max(samples) / sorted(samples)[(len(samples) - 1) // 10]


class Run:
    """The rows measured so far and what was found out about the machine meanwhile.

    `earlier` is what an ended run left of the same rows, which are not measured again.
    """

    def __init__(self, machine: dict[str, Any], threads: int, earlier: Result | None) -> None:
        self.machine, self._threads = machine, threads
        self.rows: list[Row] = [] if earlier is None else earlier["rows"]
        self.reads: dict[int, float] = {}
        self.rates: list[float] = []
        self._before = load_of(BEFORE_S)
        self._waiting = 0.0
        if earlier is not None:
            limits, self._waiting = earlier["limits"], earlier["load"]["waiting"]
            best = limits["multiply_add_flops_per_s"]
            self.rates = [best, best / earlier["load"]["rate_spread"]]
            self.reads = {int(size): rate for size, rate in limits["read_bytes_per_s"].items()}
        if self._before.busy:
            warn(
                f"the machine is busy already: {self._before.others:.0%} of it is used, "
                f"{self._before.steal:.0%} stolen"
            )

    def result(self, waiting: float) -> Result:
        """With the fractions of the floor, as far as it is known up to now."""
        best = max(self.rates)
        for row in self.rows:
            add_fractions(row, best, self.reads)
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "threads": self._threads,
            "limits": {
                "multiply_add_flops_per_s": best,
                "few_rows": FEW_ROWS,
                "read_bytes_per_s": {str(size): rate for size, rate in self.reads.items()},
            },
            "load": {
                "before": asdict(self._before),
                "busy_rows": sum(row["busy"] for row in self.rows),
                "rate_spread": spread(self.rates),
                "waiting": max(self._waiting, waiting),
            },
            "rows": self.rows,
        }


def describe_with(peers: Iterable[str]) -> dict[str, Any]:
    """The machine, with the versions of what these peers need."""
    packages = {package for peer in peers for package in PEERS[peer].packages}
    return describe(("torch", "fastrnn", *sorted(packages - {"torch", "fastrnn"})))


def run(
    cases: list[Case],
    peers: list[str],
    threads: int,
    seconds: float,
    least: int,
    keep: Callable[[Result], None] = lambda result: None,
    earlier: Result | None = None,
) -> Result:
    """Measures the rows that `earlier` has not, and gives `keep` all that there is after each.

    An interrupt ends the run early and keeps the rows measured so far.
    """
    state = Run(describe_with(peers), threads, earlier)
    done = {case_of(row) for row in state.rows}
    left = [case for case in cases if case not in done]
    with Team(peers, threads) as team:
        for size in sizes_to_read(left):
            if size not in state.reads:
                state.reads[size] = team.call("limits", "read", size)
        try:
            for case in (bar := tqdm(left, unit="row", leave=False, disable=None)):
                bar.set_postfix_str(case.name)
                state.rates.append(team.call("limits", "multiply_adds"))
                row = measure(team, case, seconds, least)
                state.rows.append({"commit": state.machine["commit"], **row})
                keep(state.result(team.waiting_share()))
                for peer, why in state.rows[-1]["failed"].items():
                    message = why.splitlines()[-1]
                    warn(f"{case.name}: {PEERS[peer].title} left out: {message}")
        except KeyboardInterrupt:
            warn("interrupted")
        state.rates.append(team.call("limits", "multiply_adds"))
        return state.result(team.waiting_share())


def warnings(result: Result) -> list[str]:
    """Why the figures should not be trusted."""
    load, found = result["load"], []
    if load["busy_rows"] or load["rate_spread"] > SPREAD_LIMIT:
        found.append(
            f"the machine was busy: others ran during {load['busy_rows']} of {len(result['rows'])} "
            f"rows (marked *), and the same loop ran up to {load['rate_spread']:.2f} times slower "
            f"than at best. Run this again alone."
        )
    if load["waiting"] > WAITING_LIMIT:
        found.append(f"a waiting library used {load['waiting']:.0%} of a core")
    return found


def warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)
