"""The time of one call: python -m bench.calls

One step at a time, what stands around a kernel takes longer than the kernel itself. So peers are
called in short bursts in turn here, on one step of H = 64: layers without an initial state, and
cells with one. Training is forward, sum and backward with respect to the weights. Ratios are
medians over the rounds of one burst's time over the other's.
"""

from dataclasses import dataclass
from typing import Any

from . import bursts, onnx_model
from .bursts import Call
from .cases import GATES, MODES, Case
from .peers import ONNXRuntime
from .results import Row
from .table import align

H = 64
CELL_ROWS = (1, 64)
ROUNDS = 40

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


def torch_calls(step: Step, threads: int) -> dict[str, Call]:
    import torch

    import fastrnn

    return {"fastrnn": torch_call(fastrnn, step), "torch": torch_call(torch.nn, step)}


def onnx_calls(step: Step, threads: int) -> dict[str, Call]:
    return {"onnxruntime": onnx_call(step, threads)}


def measure(step: Step, threads: int, rounds: int) -> Row:
    makes: list[tuple[bursts.Make, bool | None]] = [(torch_calls, step.mode == "training")]
    if not step.is_cell and step.mode == "inference" and not ONNXRuntime.missing():
        makes.append((onnx_calls, None))
    row = bursts.measure(makes, step, threads, rounds)
    return {
        "name": step.name,
        "mode": step.mode,
        "rows": step.rows,
        # fastrnn's time over the peer's
        "of": {peer: 1 / ratio for peer, ratio in row.pop("over").items()},
        "goal": step.goal,
        **row,
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
    args = bursts.parser("calls", __doc__, ROUNDS).parse_args()
    packages = ("torch", "fastrnn", *ONNXRuntime.packages)
    cases = {f"{step.name} {step.mode} {step.rows}": step for step in STEPS}
    bursts.run(args, cases, lambda s: measure(s, args.threads, args.rounds), render, packages)


if __name__ == "__main__":
    main()
