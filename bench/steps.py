"""The time of a step that carries its state: python -m bench.steps

Decoders, agents and streams take one step at a time, B = 1, I = H. All are called in one process,
in short bursts in turn, each with the state of its own last step: fastrnn's states, a frozen layer,
torch.nn's layer and its cell with hx, and ONNX Runtime with h_0 and c_0. Training is a hundred
steps, the sum of all outputs and backward: fastrnn's states, and torch.nn's cell in a loop. Ratios
are medians over the rounds. At last, latency: percentiles of single steps.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from . import onnx_model
from .calls import burst
from .cases import GATES, Case
from .compare import warn
from .machine import Usage, cores, describe
from .peers import ONNXRuntime
from .results import DIRECTORY, Row, medians_of_ratios, write
from .table import align

SIZES = (64, 128, 256, 512, 1024, 2048)
TRAINED = (64, 256)
STEPS = 100  # of training
LATENCY = 1_000_000
PERCENTILES = (50, 99, 99.9)
SECONDS = 0.01  # a burst, about

Call = Callable[[], Any]


def carrying(step: Callable[[Any], Any], state: Any) -> Call:
    """A call that takes the step from where the last one has ended."""

    def call() -> None:
        nonlocal state
        state = step(state)

    return call


def inference(cell: str, hidden: int, threads: int) -> dict[str, Call]:
    import torch

    import fastrnn

    torch.manual_seed(0)
    theirs = getattr(torch.nn, cell)(hidden, hidden).eval()
    alone = getattr(torch.nn, f"{cell}Cell")(hidden, hidden).eval()
    ours, frozen, small = (getattr(fastrnn, cell)(hidden, hidden).eval() for _ in range(3))
    for model in (ours, frozen, small):
        model.load_state_dict(theirs.state_dict())
    fastrnn.freeze(frozen)
    fastrnn.freeze(small, torch.bfloat16)
    row = torch.randn(1, hidden)
    x = row[None]
    calls: dict[str, Call] = {
        "add_input": carrying(lambda s: s.add_input(row), ours.initial_state(batch=1)),
        "add_input and output": carrying(
            lambda s: (s[0].add_input(row), s[0].output()), (ours.initial_state(batch=1), None)
        ),
        "bfloat16": carrying(lambda s: s.add_input(row), small.initial_state(batch=1)),
        "frozen": carrying(lambda hx: frozen(x, hx)[1], frozen(x)[1]),
        "torch.nn": carrying(lambda hx: theirs(x, hx)[1], theirs(x)[1]),
        "torch.nn cell": carrying(lambda hx: alone(row, hx), alone(row)),
    }
    if not ONNXRuntime.missing():
        import onnxruntime

        case = Case(cell, "inference", 1, 1, hidden)
        data = case.data()
        session = onnxruntime.InferenceSession(
            onnx_model.build(case, data), ONNXRuntime.options(threads), ["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        given = [f"{state}0_0" for state in onnx_model.STATES[: len(data.states)]]

        def run(states: list[Any]) -> list[Any]:
            return session.run(names, {"x": data.x} | dict(zip(given, states)))[1:]

        calls["ONNX Runtime"] = carrying(run, list(data.states))
    return calls


def training(cell: str, hidden: int) -> dict[str, Call]:
    import torch

    import fastrnn

    torch.manual_seed(0)
    theirs = getattr(torch.nn, f"{cell}Cell")(hidden, hidden)
    ours = getattr(fastrnn, cell)(hidden, hidden)
    rows = list(torch.randn(STEPS, 1, hidden))
    has_pair = cell == "LSTM"

    def by_states() -> None:
        ours.zero_grad()
        state, outputs = ours.initial_state(batch=1), []
        for row in rows:
            state = state.add_input(row)
            outputs.append(state.output())
        torch.cat(outputs).sum().backward()

    def by_cell() -> None:
        theirs.zero_grad()
        hx, outputs = None, []
        for row in rows:
            hx = theirs(row, hx)
            outputs.append(hx[0] if has_pair else hx)
        torch.cat(outputs).sum().backward()

    return {"add_input": by_states, "torch.nn cell": by_cell}


def measure(name: str, mode: str, hidden: int, peers: dict[str, Call], rounds: int) -> Row:
    samples: dict[str, list[float]] = {peer: [] for peer in peers}
    start = Usage.now()
    count = {peer: max(3, min(500, int(SECONDS / burst(peers[peer], 3)))) for peer in peers}
    for k in range(rounds):
        first = k % len(peers)
        for peer in [*peers][first:] + [*peers][:first]:
            samples[peer].append(burst(peers[peer], count[peer]))
    load = start.load_until(Usage.now())
    ratios = medians_of_ratios(samples, "add_input")
    return {
        "name": name,
        "mode": mode,
        "H": hidden,
        "us": {peer: 1e6 * statistics.median(times) for peer, times in samples.items()},
        "over": {peer: ratio for peer, ratio in ratios.items() if peer != "add_input"},
        "busy": load.busy,
    }


def latency(hidden: int, steps: int) -> dict[str, float]:
    """Microseconds of single steps in a row, and by how many KiB the process grew."""
    import resource

    import torch

    import fastrnn

    row = torch.randn(1, hidden)
    state = fastrnn.LSTM(hidden, hidden).initial_state(batch=1)
    for _ in range(1000):
        state = state.add_input(row)
    times = torch.empty(steps, dtype=torch.float64)
    values = times.numpy()
    values[:] = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(steps):
        start = perf_counter()
        state = state.add_input(row)
        values[i] = perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    order = times.sort().values
    marks = {f"p{p:g}": 1e6 * float(order[int((steps - 1) * p / 100)]) for p in PERCENTILES}
    return {"H": hidden, "steps": steps, **marks, "grown KiB": grown}


def render(rows: list[Row]) -> str:
    peers = list(dict.fromkeys(peer for row in rows for peer in row["over"]))
    titles = ["B = 1", "mode", "H", "add_input us", *peers]
    lines = [
        [
            row["name"],
            row["mode"] + "*" * row["busy"],
            str(row["H"]),
            f"{row['us']['add_input']:.1f}",
        ]
        + [f"{row['over'][peer]:.2f}x" if peer in row["over"] else "" for peer in peers]
        for row in rows
    ]
    return align(titles, lines, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=LATENCY, help="of latency, %(default)s")
    parser.add_argument("--threads", type=int, default=cores(), help="default: %(default)s")
    parser.add_argument("--only", metavar="TEXT", default="", help="those in whose name it is")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=DIRECTORY / "latest-steps.json"
    )
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    cases = [(cell, "inference", hidden) for cell in GATES for hidden in SIZES]
    cases += [(cell, "training", hidden) for cell in GATES for hidden in TRAINED]
    cases = [case for case in cases if args.only in " ".join(map(str, case))]
    if not cases:
        sys.exit(f"--only {args.only!r} is in no name")
    rows = []
    for cell, mode, hidden in tqdm(cases, unit="row", leave=False, disable=None):
        with torch.set_grad_enabled(mode == "training"):
            peers = (
                training(cell, hidden)
                if mode == "training"
                else inference(cell, hidden, args.threads)
            )
            rows.append(measure(cell, mode, hidden, peers, args.rounds))
    with torch.no_grad():
        single = [latency(hidden, args.steps) for hidden in (64,)]
    packages = ("torch", "fastrnn", *ONNXRuntime.packages)
    found = {"machine": describe(packages), "threads": args.threads}
    write({**found, "rows": rows, "latency": single}, args.json)
    print(render(rows))
    for each in single:
        print(", ".join(f"{name} {value:.4g}" for name, value in each.items()))
    print(f"\nWritten to {args.json}")
    if any(row["busy"] for row in rows):
        warn("rows marked * were measured while others used the machine. Run this again alone.")


if __name__ == "__main__":
    main()
