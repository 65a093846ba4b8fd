"""Cells of a user's own, by fastrnn.cell: python -m bench.own

The built-in cells, written by a user, against the built-in ones. Cells that are not built in
against a loop of steps in torch, as it is and under torch.compile: the whole loop, which is a graph
of all its steps, and the step alone; the time to compile is not counted, and whatever is not
compiled after some minutes is given up. And the first call of a new cell: with an empty cache, in a
later process, and in many processes at once. Calls are timed in short bursts in turn.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

from . import bursts
from .bursts import Call
from .cases import GATES, MODES
from .results import Row
from .table import align
from .worker import Worker, WorkerError

SHAPES = ((100, 1, 128), (100, 32, 128), (100, 64, 512))
LOOP_SHAPE = (100, 32, 128)
LOOP_CELLS = ("PeepholeLSTM", "SLSTM")
ROUNDS = 15
BURST_S = 0.05
PROCESSES = 16
GIVE_UP_S = 300  # for each thing that torch.compile is to compile

# The goals.
BUILT_IN = 1.15  # times the built-in cell's time, at most
LOOP, COMPILED = 15.0, 5.0  # times fastrnn's time that a loop takes, at least
FIRST_S, LATER_S = 15.0, 0.05  # of a first call, at most


def own_cells() -> dict[str, Any]:
    """The built-in cells as a user would write them."""
    import torch

    import fastrnn

    @fastrnn.cell(gates=("i", "f", "g", "o"))
    def OwnLSTM(x: Any, r: Any, h: Any, c: Any) -> Any:
        c = torch.sigmoid(x.f + r.f) * c + torch.sigmoid(x.i + r.i) * torch.tanh(x.g + r.g)
        return torch.sigmoid(x.o + r.o) * torch.tanh(c), c

    @fastrnn.cell(gates=("r", "z", "n"))
    def OwnGRU(x: Any, r: Any, h: Any) -> Any:
        reset, z = torch.sigmoid(x.r + r.r), torch.sigmoid(x.z + r.z)
        n = torch.tanh(x.n + reset * r.n)
        return (1 - z) * n + z * h

    @fastrnn.cell(gates=("a",))
    def OwnRNN(x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a)

    return {"LSTM": OwnLSTM, "GRU": OwnGRU, "RNN": OwnRNN}


class Beside(NamedTuple):
    """A user's cell beside the built-in one."""

    cell: str
    mode: str
    shape: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.cell} {self.mode} {', '.join(map(str, self.shape))}"


def training_step(model: Callable[[Any], Any], parameters: list[Any], x: Any) -> Call:
    """Forward, sum and backward. model returns the output first."""

    def step() -> Any:
        for parameter in parameters:
            parameter.grad = None
        output = model(x)[0]
        output.sum().backward()
        return output

    return step


def built_in_calls(case: Beside, threads: int) -> dict[str, Call]:
    import torch

    import fastrnn

    steps, rows, hidden = case.shape
    torch.manual_seed(0)
    built_in = getattr(fastrnn, case.cell)(hidden, hidden)
    own = own_cells()[case.cell](hidden, hidden)
    own.load_state_dict(built_in.state_dict())
    x = torch.randn(steps, rows, hidden)
    models = {"own": own, "built-in": built_in}
    if case.mode == "training":
        return {
            name: training_step(model, list(model.parameters()), x)
            for name, model in models.items()
        }
    return {name: partial(model, x) for name, model in models.items()}


def measure_beside(case: Beside, threads: int, rounds: int) -> Row:
    row = bursts.measure(
        [(built_in_calls, case.mode == "training")], case, threads, rounds, BURST_S
    )
    of = 1 / row["over"]["built-in"]
    return {"kind": "built-in", **case._asdict(), **row, "of_built_in": of}


class InLoop(NamedTuple):
    """A cell that is not built in, in training."""

    cell: str
    shape: tuple[int, int, int] = LOOP_SHAPE

    @property
    def name(self) -> str:
        return f"{self.cell} training {', '.join(map(str, self.shape))}"


def peephole_step(x: Any, r: Any, states: Any, of: Any) -> Any:
    import torch

    _, c = states
    (x_i, x_f, x_g, x_o), (r_i, r_f, r_g, r_o) = x.chunk(4, 1), r.chunk(4, 1)
    i = torch.sigmoid(x_i + r_i + of["w_i"] * c)
    f = torch.sigmoid(x_f + r_f + of["w_f"] * c)
    c = f * c + i * torch.tanh(x_g + r_g)
    o = torch.sigmoid(x_o + r_o + of["w_o"] * c)
    return o * torch.tanh(c), c


def slstm_step(x: Any, r: Any, states: Any, of: Any) -> Any:
    import torch

    _, c, n, m = states
    log_i, log_f, z, o = (x + r).chunk(4, 1)
    log_f = torch.nn.functional.logsigmoid(log_f) + m
    m = torch.where(n == 0, log_i, torch.maximum(log_f, log_i))
    i, f = torch.exp(log_i - m), torch.exp(torch.clamp(log_f - m, max=0))
    c = f * c + i * torch.tanh(z)
    n = f * n + i
    return torch.sigmoid(o) * c / n, c, n, m


STEPS = {"PeepholeLSTM": (peephole_step, 2), "SLSTM": (slstm_step, 4)}


def loop(step: Callable[..., Any], count: int, of: dict[str, Any], x: Any) -> Any:
    """All steps of a layer: the product with x of all at once, then one step after the other."""
    import torch

    linear = torch.nn.functional.linear
    inputs = linear(x, of["weight_ih"], of["bias_ih"])
    states = (x.new_zeros(x.shape[1], of["weight_hh"].shape[1]),) * count
    outputs = []
    for t in range(len(x)):
        states = step(inputs[t], linear(states[0], of["weight_hh"], of["bias_hh"]), states, of)
        outputs.append(states[0])
    return torch.stack(outputs), states


def models_of(case: InLoop) -> tuple[Any, dict[str, Any], Any]:
    """fastrnn's layer, its weights without the suffix of a layer, and x."""
    import torch

    import fastrnn

    steps, rows, hidden = case.shape
    torch.manual_seed(0)
    layer = getattr(fastrnn.cells, case.cell)(hidden, hidden)
    of = {name.removesuffix("_l0"): value for name, value in layer.named_parameters()}
    return layer, of, torch.randn(steps, rows, hidden)


def loop_calls(case: InLoop, threads: int) -> dict[str, Call]:
    layer, of, x = models_of(case)
    step, count = STEPS[case.cell]
    parameters = list(of.values())
    return {
        "fastrnn": training_step(layer, parameters, x),
        "loop": training_step(partial(loop, step, count, of), parameters, x),
    }


def compiled_step(case: InLoop, threads: int) -> dict[str, Call]:
    """The loop in Python, with the product and the cell of a step compiled together."""
    return _compiled(case, "step")


def compiled_loop(case: InLoop, threads: int) -> dict[str, Call]:
    return _compiled(case, "loop")


def _compiled(case: InLoop, what: str) -> dict[str, Call]:
    import torch

    _, of, x = models_of(case)
    step, count = STEPS[case.cell]
    if what == "step":

        @torch.compile
        def whole(x_t: Any, states: Any, of: Any) -> Any:
            r = torch.nn.functional.linear(states[0], of["weight_hh"], of["bias_hh"])
            return step(x_t, r, states, of)

        def run(x: Any) -> Any:
            inputs = torch.nn.functional.linear(x, of["weight_ih"], of["bias_ih"])
            states = (x.new_zeros(x.shape[1], of["weight_hh"].shape[1]),) * count
            outputs = []
            for x_t in inputs.unbind(0):
                states = whole(x_t, states, of)
                outputs.append(states[0])
            return torch.stack(outputs), states

    else:
        run = torch.compile(partial(loop, step, count, of))
    call = training_step(run, list(of.values()), x)
    for _ in range(3):
        call()  # which compiles
    return {f"compiled {what}": call}


def compiles(make: bursts.Make, case: InLoop, threads: int, limit: float) -> str | float:
    """Seconds that torch.compile takes, or why it does not; what it made stays in its cache."""
    worker = Worker(partial(bursts.Bursts, make), threads)
    start = perf_counter()
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(worker.call, "prepare", case, True).result(timeout=limit)
        except TimeoutError:
            return f"not compiled after {limit:.0f} s"
        except WorkerError as error:
            return str(error).splitlines()[-1]
        finally:
            worker.close()
    return perf_counter() - start


def measure_loop(case: InLoop, threads: int, rounds: int, limit: float) -> Row:
    makes: list[tuple[bursts.Make, bool | None]] = [(loop_calls, True)]
    compiled: dict[str, str | float] = {}
    for make in (compiled_step, compiled_loop):
        name = make.__name__.replace("_", " ").replace("compiled ", "")
        compiled[name] = compiles(make, case, threads, limit) if limit > 0 else "left out"
        if isinstance(compiled[name], float):
            makes.append((make, True))
    row = bursts.measure(makes, case, threads, rounds, BURST_S)
    return {"kind": "loop", **case._asdict(), **row, "compile_s": compiled}


class Fresh:
    """A process that has not run the cell yet."""

    def __init__(self, threads: int) -> None:
        import torch

        import fastrnn

        torch.set_num_threads(threads)
        fastrnn.LSTM(2, 2)(torch.zeros(1, 1, 2))  # what is not the cell's is loaded
        self.layer = own_cells()["LSTM"](128, 128)
        self.x = torch.randn(100, 32, 128)

    def is_ready(self) -> bool:
        return True

    def first(self) -> tuple[float, float]:
        """Seconds of the first call and of the one after it; RuntimeError without a kernel."""
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            times = []
            for _ in range(2):
                start = perf_counter()
                self.layer(self.x)
                times.append(perf_counter() - start)
        return times[0], times[1]


@contextmanager
def counted_compiler() -> Iterator[Path]:
    """An empty cache, and a compiler that writes a line for each of its runs into the file."""
    real = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))
    names = ("CXX", "FASTRNN_CACHE")
    before = {name: os.environ.get(name) for name in names}
    with TemporaryDirectory() as folder:
        log, script = Path(folder, "runs"), Path(folder, "compiler")
        log.touch()
        script.write_text(f'#!/bin/sh\necho run >> "{log}"\nexec {real} "$@"\n')
        script.chmod(stat.S_IRWXU)
        os.environ.update(CXX=str(script), FASTRNN_CACHE=str(Path(folder, "cache")))
        try:
            yield log
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def first_calls(count: int, threads: int) -> list[tuple[float, float]]:
    """First calls of as many processes, which begin at the same time."""
    workers = [Worker(Fresh, threads) for _ in range(count)]
    try:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda worker: worker.call("is_ready"), workers))
            return list(pool.map(lambda worker: worker.call("first"), workers))
    finally:
        for worker in workers:
            worker.close()


def measure_start(threads: int) -> Row:
    """First calls, in fresh processes."""
    with counted_compiler() as runs:
        first = first_calls(1, threads)[0]
        runs_of_first = len(runs.read_text().split())
        later = sorted(first_calls(1, threads)[0] for _ in range(5))
    with counted_compiler() as runs:
        together = first_calls(PROCESSES, threads)
        runs_together = len(runs.read_text().split())
    return {
        "kind": "start",
        "first_s": first[0],
        "compiler_runs_first": runs_of_first,
        "later_s": later[len(later) // 2][0],
        "later_warm_s": later[len(later) // 2][1],
        "processes": PROCESSES,
        "slowest_of_processes_s": max(time for time, _ in together),
        "compiler_runs_of_processes": runs_together,
        "busy": False,
    }


def missed(row: Row) -> list[str]:
    """The goals that a row does not reach, in words."""
    found = []
    if row["kind"] == "built-in":
        if row["of_built_in"] > BUILT_IN:
            found.append(f"{row['of_built_in']:.3f} of the built-in cell's time, goal {BUILT_IN}")
    elif row["kind"] == "loop":
        for peer, ratio in row["over"].items():
            goal = LOOP if peer == "loop" else COMPILED
            if ratio < goal:
                found.append(f"{peer} {ratio:.1f}x, goal {goal:.0f}x")
    else:
        for key, goal in (("first_s", FIRST_S), ("later_s", LATER_S)):
            if row[key] > goal:
                found.append(f"{key} {row[key]:.3g}, goal {goal}")
        for key in ("compiler_runs_first", "compiler_runs_of_processes"):
            if row[key] != 1:
                found.append(f"{key} {row[key]}, goal 1")
    return found


def render(rows: list[Row]) -> str:
    parts = []
    if group := [row for row in rows if row["kind"] == "built-in"]:
        lines = [
            [row["cell"], row["mode"] + "*" * row["busy"], ", ".join(map(str, row["shape"]))]
            + [f"{row['us'][peer] / 1e3:.3g}" for peer in ("own", "built-in")]
            + [f"{row['of_built_in']:.3f}"]
            for row in group
        ]
        titles = ["own cell", "mode", "T, B, H", "own ms", "built-in ms", "of built-in"]
        parts.append(align(titles, lines, left=3))
    if group := [row for row in rows if row["kind"] == "loop"]:
        peers = ("loop", "compiled step", "compiled loop")
        lines = [
            [row["cell"] + "*" * row["busy"], ", ".join(map(str, row["shape"]))]
            + [f"{row['us']['fastrnn'] / 1e3:.3g}"]
            + [f"{row['over'][peer]:.1f}x" if peer in row["over"] else "" for peer in peers]
            + [
                f"{taken:.0f} s" if isinstance(taken, float) else taken
                for taken in row["compile_s"].values()
            ]
            for row in group
        ]
        titles = ["training", "T, B, H", "fastrnn ms", *peers, "to compile a step", "the loop"]
        parts.append(align(titles, lines, left=2))
    if group := [row for row in rows if row["kind"] == "start"]:
        titles = ["first call", "compiler runs", "later process", "second call"]
        titles += ["processes at once", "slowest", "compiler runs"]
        lines = [
            [f"{row['first_s']:.1f} s", str(row["compiler_runs_first"])]
            + [f"{1e3 * row[key]:.1f} ms" for key in ("later_s", "later_warm_s")]
            + [str(row["processes"]), f"{row['slowest_of_processes_s']:.1f} s"]
            + [str(row["compiler_runs_of_processes"])]
            for row in group
        ]
        parts.append(align(titles, lines, left=0))
    misses = [f"{row['row']}: {why}" for row in rows for why in missed(row)]
    return "\n\n".join([*parts, *(["\n".join(["Goals missed:", *misses])] if misses else [])])


def main() -> None:
    parser = bursts.parser("own", __doc__, ROUNDS)
    parser.add_argument(
        "--give-up",
        type=float,
        default=GIVE_UP_S,
        metavar="SECONDS",
        help="for each thing that torch.compile compiles, %(default)s; 0 leaves it out",
    )
    args = parser.parse_args()
    threads, rounds = args.threads, args.rounds
    cases: dict[str, Callable[[], Row]] = {}
    for shape in SHAPES:
        for cell in GATES:
            for mode in MODES:
                beside = Beside(cell, mode, shape)
                cases[beside.name] = partial(measure_beside, beside, threads, rounds)
    for cell in LOOP_CELLS:
        looped = InLoop(cell)
        cases[looped.name] = partial(measure_loop, looped, threads, rounds, args.give_up)
    cases["first call"] = partial(measure_start, threads)
    bursts.run(args, cases, lambda measured: measured(), render)


if __name__ == "__main__":
    main()
