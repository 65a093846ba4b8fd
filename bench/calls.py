"""The time of one call: python -m bench.calls

One step at a time, what stands around a kernel takes longer than the kernel itself. So all peers
are called in one process here, in short bursts in turn, on one step of H = 64: layers without
an initial state, and cells with one. Training is forward, sum and backward with respect to the
weights. Ratios are medians over the rounds of one burst's time over the other's.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from . import onnx_model
from .cases import GATES, MODES, Case
from .compare import warn
from .machine import Usage, cores, describe
from .peers import ONNXRuntime
from .results import DIRECTORY, Row, medians_of_ratios, write
from .table import align
from .worker import settle

H = 64
CELL_ROWS = (1, 64)
CALLS, ROUNDS = 200, 40
WARM_UP = 20  # calls before each burst, for the caches and the clock

# The goals: fastrnn's time over torch.nn's at most that, and never above the others'.
GOALS = {
    ("LSTM", "inference"): 0.12,
    ("GRU", "inference"): 0.30,
    ("RNN", "inference"): 0.40,
    ("LSTM", "training"): 0.40,
    ("GRU", "training"): 0.50,
    ("RNN", "training"): 0.70,
}
CELL_GOAL = OTHERS_GOAL = 1.0
NOISE = 0.03  # as far apart are two calls of the same function

Call = Callable[[], Any]


@dataclass(frozen=True)
class Step:
    """One step of I = H = 64 by a layer or by a cell."""

    cell: str
    mode: str
    rows: int
    is_cell: bool = False

    @property
    def name(self) -> str:
        return f"{self.cell}Cell" if self.is_cell else self.cell

    @property
    def goal(self) -> float:
        return CELL_GOAL if self.is_cell else GOALS[self.cell, self.mode]


STEPS = [Step(cell, mode, 1) for mode in MODES for cell in GATES] + [
    Step(cell, mode, rows, is_cell=True) for mode in MODES for cell in GATES for rows in CELL_ROWS
]


def torch_call(library: Any, step: Step) -> Call:
    """A call of torch.nn's or of fastrnn's class, as a user writes it."""
    import torch

    torch.manual_seed(0)
    model = getattr(library, step.name)(H, H)
    parameters = list(model.parameters())
    if step.is_cell:
        state = torch.randn(step.rows, H)
        arguments = torch.randn(step.rows, H), (state, state) if step.cell == "LSTM" else state
    else:
        arguments = (torch.randn(1, step.rows, H),)
    has_pair = not step.is_cell or step.cell == "LSTM"  # output and states, or h and c

    def infer() -> Any:
        return model(*arguments)

    def train() -> Any:
        for parameter in parameters:
            parameter.grad = None
        result = model(*arguments)
        (result[0] if has_pair else result).sum().backward()
        return result

    return train if step.mode == "training" else infer


def onnx_call(step: Step, threads: int) -> Call:
    """InferenceSession.run on the same layer, whose initial state the model has as zeros."""
    import onnxruntime

    case = Case(step.cell, step.mode, 1, step.rows, H)
    data = case.data()
    model = onnx_model.build(case, data, stateless=True)
    session = onnxruntime.InferenceSession(
        model, ONNXRuntime.options(threads), ["CPUExecutionProvider"]
    )
    names, feeds = [output.name for output in session.get_outputs()], {"x": data.x}
    return lambda: session.run(names, feeds)


def peers_of(step: Step, threads: int) -> dict[str, Call]:
    import torch

    import fastrnn

    calls = {"fastrnn": torch_call(fastrnn, step), "torch": torch_call(torch.nn, step)}
    if not step.is_cell and step.mode == "inference" and not ONNXRuntime.missing():
        calls["onnxruntime"] = onnx_call(step, threads)
    return calls


def burst(call: Call, calls: int) -> float:
    """Seconds per call, after the threads of whoever came before have gone to sleep."""
    settle()
    for _ in range(WARM_UP):
        call()
    start = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - start) / calls


def measure(step: Step, threads: int, calls: int, rounds: int) -> Row:
    import torch

    peers = peers_of(step, threads)
    samples: dict[str, list[float]] = {peer: [] for peer in peers}
    start = Usage.now()
    with torch.inference_mode(step.mode == "inference"):
        for k in range(rounds):
            first = k % len(peers)
            for peer in [*peers][first:] + [*peers][:first]:
                samples[peer].append(burst(peers[peer], calls))
    load = start.load_until(Usage.now())
    ratios = medians_of_ratios({"fastrnn": samples["fastrnn"]} | samples, "fastrnn")
    return {
        "name": step.name,
        "mode": step.mode,
        "rows": step.rows,
        "us": {peer: 1e6 * statistics.median(times) for peer, times in samples.items()},
        # fastrnn's time over the peer's
        "of": {peer: 1 / ratio for peer, ratio in ratios.items() if peer != "fastrnn"},
        "goal": step.goal,
        "others": load.others,
        "steal": load.steal,
        "busy": load.busy,
    }


def missed(row: Row) -> bool:
    """Whether a ratio is above its goal; "never slower" is asked for up to the noise."""
    goals = {"torch": row["goal"]}
    return any(
        ratio > goal + NOISE * (goal == 1)
        for peer, ratio in row["of"].items()
        for goal in [goals.get(peer, OTHERS_GOAL)]
    )


def render(rows: list[Row]) -> str:
    titles = ["one step", "mode", "B", "fastrnn us", "torch.nn us", "ONNX Runtime us"]
    titles += ["of torch.nn", "goal", "of ONNX Runtime", "reached"]
    lines = []
    for row in rows:
        us, of = row["us"], row["of"]
        lines.append([row["name"], row["mode"] + "*" * row["busy"], str(row["rows"])])
        lines[-1] += [
            f"{us[p]:.1f}" if p in us else "" for p in ("fastrnn", "torch", "onnxruntime")
        ]
        lines[-1] += [f"{of['torch']:.2f}", f"{row['goal']:.2f}"]
        lines[-1] += [f"{of['onnxruntime']:.2f}" if "onnxruntime" in of else ""]
        lines[-1] += ["no" if missed(row) else "yes"]
    return align(titles, lines, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.calls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--calls", type=int, default=CALLS, help="of a burst, %(default)s")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=cores(), help="default: %(default)s")
    parser.add_argument("--only", metavar="TEXT", default="", help="those in whose name it is")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=DIRECTORY / "latest-calls.json"
    )
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    steps = [step for step in STEPS if args.only in f"{step.name} {step.mode} {step.rows}"]
    if not steps:
        sys.exit(f"--only {args.only!r} is in no name")
    rows = []
    for step in (bar := tqdm(steps, unit="row", leave=False, disable=None)):
        bar.set_postfix_str(f"{step.name} {step.mode}")
        rows.append(measure(step, args.threads, args.calls, args.rounds))
    packages = ("torch", "fastrnn", *ONNXRuntime.packages)
    write({"machine": describe(packages), "threads": args.threads, "rows": rows}, args.json)
    print(f"{render(rows)}\n\nWritten to {args.json}")
    if any(row["busy"] for row in rows):
        warn("rows marked * were measured while others used the machine. Run this again alone.")


if __name__ == "__main__":
    main()
