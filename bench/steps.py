"""The time of a step that carries its state: python -m bench.steps

Decoders, agents and streams take one step at a time, I = H, mostly B = 1. All are called in short
bursts in turn, each with the state of its own last step: fastrnn's states, a frozen layer,
torch.nn's layer and its cell with hx, and ONNX Runtime with h_0 and c_0; and the same on weights of
8 bits. Training is a hundred steps, the sum of all outputs and backward: fastrnn's states, and
torch.nn's cell in a loop. Ratios are medians over the rounds. At last, latency: percentiles of
single steps.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

from . import bursts, onnx_model
from .bursts import Call
from .cases import GATES, Case
from .peers import ONNXRuntime
from .results import Row
from .table import align
from .worker import Worker

SIZES = (64, 128, 256, 512, 1024, 2048)
TRAINED = (64, 256)
STEPS = 100  # of training
INT8 = {"LSTM": (512, 1024, 2048), "GRU": (512, 1024, 2048)}  # those that torch.ao has, too
INT8_ROWS = (1, 32)
ROUNDS = 20
LATENCY = 1_000_000
LATENCY_SIZE = 64
PERCENTILES = (50, 99, 99.9)


class Steps(NamedTuple):
    """What a row is about."""

    cell: str
    mode: str
    B: int
    H: int

    @property
    def name(self) -> str:
        return f"{self.cell} {self.mode} B={self.B} H={self.H}"


ROWS = [Steps(cell, "inference", 1, hidden) for cell in GATES for hidden in SIZES]
ROWS += [Steps(cell, "training", 1, hidden) for cell in GATES for hidden in TRAINED]
ROWS += [
    Steps(cell, "int8", rows, hidden)
    for cell, sizes in INT8.items()
    for rows in INT8_ROWS
    for hidden in sizes
]
LATENCY_ROW = Steps("LSTM", "latency", 1, LATENCY_SIZE)

# The goals: what a step takes at most, in us, in the middle of many; and its peers' times over its
# own at least.
US_GOALS = {LATENCY_ROW: 4.0}
GOALS: dict[Steps, dict[str, float]] = {
    Steps("LSTM", "inference", 1, 64): {"torch.nn": 5.0, "ONNX Runtime": 1.0},
    Steps("LSTM", "inference", 1, 512): {"ONNX Runtime": 1.3},
    **{row: {"torch.nn cell": 3.0} for row in ROWS if row[:2] == ("LSTM", "training")},
    **{row: {"torch.ao int8": 1.0, "ONNX Runtime int8": 1.0} for row in ROWS if row[1] == "int8"},
}
GOALS[Steps("LSTM", "int8", 1, 2048)]["float32"] = 2.5


def carrying(step: Callable[[Any], Any], state: Any) -> Call:
    """A call that takes the step from where the last one has ended."""

    def call() -> None:
        nonlocal state
        state = step(state)

    return call


def models_of(row: Steps, count: int) -> tuple[Any, list[Any]]:
    """torch.nn's layer, and so many of fastrnn with its weights."""
    import torch

    import fastrnn

    torch.manual_seed(0)
    theirs = getattr(torch.nn, row.cell)(row.H, row.H).eval()
    ours = [getattr(fastrnn, row.cell)(row.H, row.H).eval() for _ in range(count)]
    for model in ours:
        model.load_state_dict(theirs.state_dict())
    return theirs, ours


def add_input(model: Any, x: Any) -> Call:
    import torch

    with torch.no_grad():
        state = model.initial_state(batch=len(x))
    return carrying(lambda s: s.add_input(x), state)


def inference(row: Steps, threads: int) -> dict[str, Call]:
    import torch

    import fastrnn

    theirs, (ours, frozen, small) = models_of(row, 3)
    alone = getattr(torch.nn, f"{row.cell}Cell")(row.H, row.H).eval()
    fastrnn.freeze(frozen)
    fastrnn.freeze(small, torch.bfloat16)
    row_of_x = torch.randn(row.B, row.H)
    x = row_of_x[None]
    with torch.no_grad():
        start = ours.initial_state(batch=row.B)
        hx, theirs_hx, alone_hx = frozen(x)[1], theirs(x)[1], alone(row_of_x)
    return {
        "add_input": add_input(ours, row_of_x),
        "add_input and output": carrying(
            lambda s: (s[0].add_input(row_of_x), s[0].output()), (start, None)
        ),
        "bfloat16": add_input(small, row_of_x),
        "frozen": carrying(lambda hx: frozen(x, hx)[1], hx),
        "torch.nn": carrying(lambda hx: theirs(x, hx)[1], theirs_hx),
        "torch.nn cell": carrying(lambda hx: alone(row_of_x, hx), alone_hx),
    }


def int8(row: Steps, threads: int) -> dict[str, Call]:
    import torch

    import fastrnn

    theirs, (small, ours) = models_of(row, 2)
    fastrnn.freeze(small, torch.int8)
    small_torch = torch.ao.quantization.quantize_dynamic(theirs, {type(theirs)}, torch.qint8)
    if isinstance(small_torch, type(theirs)):  # a layer that is itself the model stays as it is
        model = torch.nn.Sequential(theirs)
        small_torch = torch.ao.quantization.quantize_dynamic(model, {type(theirs)}, torch.qint8)[0]
    x = torch.randn(row.B, row.H)
    with torch.no_grad():
        hx = small_torch(x[None])[1]
    return {
        "add_input": add_input(small, x),
        "float32": add_input(ours, x),
        "torch.ao int8": carrying(lambda hx: small_torch(x[None], hx)[1], hx),
    }


def onnx_calls(row: Steps, threads: int) -> dict[str, Call]:
    """A session's step, for int8 of the model that ONNX Runtime's own tool has quantised."""
    import onnxruntime

    case = Case(row.cell, "inference", 1, row.B, row.H)
    data = case.data()
    model = onnx_model.build(case, data)
    if row.mode == "int8":
        model = quantised(model)
    session = onnxruntime.InferenceSession(
        model, ONNXRuntime.options(threads), ["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    given = [f"{state}0_0" for state in onnx_model.STATES[: len(data.states)]]

    def run(states: list[Any]) -> list[Any]:
        return session.run(names, {"x": data.x} | dict(zip(given, states)))[1:]

    title = "ONNX Runtime int8" if row.mode == "int8" else "ONNX Runtime"
    return {title: carrying(run, list(data.states))}


def quantised(model: bytes) -> bytes:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder:
        given, made = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        given.write_bytes(model)
        quantize_dynamic(given, made, weight_type=QuantType.QInt8, per_channel=True)
        found = made.read_bytes()
    kinds = {node.op_type for node in onnx.load_from_string(found).graph.node}
    if "DynamicQuantizeLSTM" not in kinds:
        raise RuntimeError(f"expected a DynamicQuantizeLSTM, got {', '.join(sorted(kinds))}")
    return found


def training(row: Steps, threads: int) -> dict[str, Call]:
    import torch

    import fastrnn

    torch.manual_seed(0)
    theirs = getattr(torch.nn, f"{row.cell}Cell")(row.H, row.H)
    ours = getattr(fastrnn, row.cell)(row.H, row.H)
    rows = list(torch.randn(STEPS, row.B, row.H))
    has_pair = row.cell == "LSTM"

    def by_states() -> None:
        ours.zero_grad()
        state, outputs = ours.initial_state(batch=row.B), []
        for x in rows:
            state = state.add_input(x)
            outputs.append(state.output())
        torch.cat(outputs).sum().backward()

    def by_cell() -> None:
        theirs.zero_grad()
        hx, outputs = None, []
        for x in rows:
            hx = theirs(x, hx)
            outputs.append(hx[0] if has_pair else hx)
        torch.cat(outputs).sum().backward()

    return {"add_input": by_states, "torch.nn cell": by_cell}


MAKES: dict[str, bursts.Make] = {"inference": inference, "training": training, "int8": int8}


def measure(row: Steps, threads: int, rounds: int) -> Row:
    makes: list[tuple[bursts.Make, bool | None]] = [(MAKES[row.mode], row.mode == "training")]
    has_twin = row.mode == "inference" or (row.mode == "int8" and row.cell == "LSTM")
    if has_twin and not ONNXRuntime.missing():
        makes.append((onnx_calls, None))
    return {**row._asdict(), **bursts.measure(makes, row, threads, rounds)}


class Latency:
    """Steps in a row, in a process of their own."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def measure(self, hidden: int, steps: int) -> dict[str, float]:
        """Microseconds of single steps, and by how many KiB the process grew."""
        import resource

        import torch

        import fastrnn

        with torch.no_grad():
            row = torch.randn(1, hidden)
            state = fastrnn.LSTM(hidden, hidden).initial_state(batch=1)
            times = torch.empty(steps, dtype=torch.float64)
            values = times.numpy()
            values[:] = 0
            for _ in range(1000):
                state = state.add_input(row)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for i in range(steps):
                start = perf_counter()
                state = state.add_input(row)
                values[i] = perf_counter() - start
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            order = times.sort().values
        marks = {f"p{p:g}": 1e6 * float(order[int((steps - 1) * p / 100)]) for p in PERCENTILES}
        return {**marks, "grown_kib": grown}


def measure_latency(row: Steps, threads: int, steps: int) -> Row:
    worker = Worker(Latency, threads)
    try:
        found = worker.call("measure", row.H, steps)
    finally:
        worker.close()
    return {**row._asdict(), "steps": steps, **found, "busy": False}


def missed(row: Row) -> list[str]:
    """The goals that a row does not reach, in words."""
    steps = Steps(*(row[field] for field in Steps._fields))
    found = []
    most = US_GOALS.get(steps)
    if most is not None and row["p50"] > most:
        found.append(f"p50 {row['p50']:.1f} us, goal {most:.1f}")
    for peer, goal in GOALS.get(steps, {}).items():
        ratio = row["over"].get(peer)
        if ratio is not None and ratio < goal:
            found.append(f"{peer} {ratio:.2f}x, goal {goal:.2f}x")
    return found


def render(rows: list[Row]) -> str:
    parts = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        group = [row for row in rows if row["mode"] == mode]
        parts.append(render_latency(group) if mode == "latency" else render_steps(mode, group))
    misses = [f"{row['row']}: {why}" for row in rows for why in missed(row)]
    return "\n\n".join([*parts, "\n".join(["Goals missed:", *misses]) if misses else ""]).strip()


def render_steps(mode: str, rows: list[Row]) -> str:
    peers = list(dict.fromkeys(peer for row in rows for peer in row["over"]))
    unit = "us a step" if mode != "training" else f"us, {STEPS} steps"
    titles = [mode, "B", "H", unit, *peers]
    lines = [
        [row["cell"] + "*" * row["busy"], str(row["B"]), str(row["H"])]
        + [f"{row['us']['add_input']:.1f}"]
        + [f"{row['over'][peer]:.2f}x" if peer in row["over"] else "" for peer in peers]
        for row in rows
    ]
    return align(titles, lines, left=1)


def render_latency(rows: list[Row]) -> str:
    marks = [f"p{p:g}" for p in PERCENTILES]
    titles = ["latency", "B", "H", "steps", *(f"{mark} us" for mark in marks), "grown KiB"]
    lines = [
        [row["cell"], str(row["B"]), str(row["H"]), str(row["steps"])]
        + [f"{row[mark]:.1f}" for mark in marks]
        + [f"{row['grown_kib']:.0f}"]
        for row in rows
    ]
    return align(titles, lines, left=1)


def main() -> None:
    parser = bursts.parser("steps", __doc__, ROUNDS)
    parser.add_argument("--steps", type=int, default=LATENCY, help="of latency, %(default)s")
    args = parser.parse_args()
    cases = {row.name: partial(measure, row, args.threads, args.rounds) for row in ROWS}
    cases[LATENCY_ROW.name] = partial(measure_latency, LATENCY_ROW, args.threads, args.steps)
    packages = ("torch", "fastrnn", *ONNXRuntime.packages)
    bursts.run(args, cases, lambda measured: measured(), render, packages)


if __name__ == "__main__":
    main()
