"""Deep models beside their layers one after the other: python -m bench.deep

The layers of a small deep model run side by side on different threads where that should be faster.
A model is called beside as many models of one layer, each on the output of the one before.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from . import bursts
from .bursts import Call
from .cases import MODES
from .results import Row
from .table import align

SHAPES = ((200, 1, 256), (200, 2, 128), (500, 4, 64), (1000, 1, 64))
LAYERS = (2, 4)
CELLS = ("LSTM", "GRU", "RNN")
ROUNDS = 15
BURST_S = 0.03

GOAL = 1.5  # times as fast, of LSTM and GRU with four layers and all shapes but the last


class Deep(NamedTuple):
    cell: str
    mode: str
    shape: tuple[int, int, int]  # T, B, H
    layers: int

    @property
    def name(self) -> str:
        return f"{self.cell} {self.mode} {', '.join(map(str, self.shape))} x {self.layers}"


def calls(case: Deep, threads: int) -> dict[str, Call]:
    import torch

    import fastrnn

    steps, rows, hidden = case.shape
    cell = getattr(fastrnn, case.cell)
    model = cell(hidden, hidden, case.layers)
    layers = [cell(hidden, hidden) for _ in range(case.layers)]
    x, gradient = torch.randn(steps, rows, hidden), torch.ones(steps, rows, hidden)

    def one_after_the_other() -> Any:
        output = x
        for layer in layers:
            output = layer(output)[0]
        return output

    forward: dict[str, Call] = {
        "deep": lambda: model(x)[0],
        "layers": one_after_the_other,
    }
    if case.mode == "inference":
        return forward
    return {name: partial(train, call, gradient) for name, call in forward.items()}


def train(forward: Call, gradient: Any) -> None:
    forward().backward(gradient)


def measure(case: Deep, threads: int, rounds: int) -> Row:
    row = bursts.measure([(calls, case.mode == "training")], case, threads, rounds, BURST_S)
    return {**case._asdict(), **row}


def missed(row: Row) -> list[str]:
    faster = row["over"]["layers"]
    has_goal = row["cell"] != "RNN" and tuple(row["shape"]) in SHAPES[:-1]
    if not has_goal or row["layers"] != max(LAYERS) or faster >= GOAL:
        return []
    return [f"{faster:.2f}x, goal {GOAL}x"]


def render(rows: list[Row]) -> str:
    lines = [
        [row["cell"], row["mode"] + "*" * row["busy"], ", ".join(map(str, row["shape"]))]
        + [str(row["layers"])]
        + [f"{row['us'][peer] / 1e3:.3g}" for peer in ("deep", "layers")]
        + [f"{row['over']['layers']:.2f}x"]
        for row in rows
    ]
    titles = ["cell", "mode", "T, B, H", "layers", "model ms", "layer by layer ms", "faster"]
    misses = [f"{row['row']}: {why}" for row in rows for why in missed(row)]
    parts = [align(titles, lines, left=3)]
    return "\n\n".join([*parts, *(["\n".join(["Goals missed:", *misses])] if misses else [])])


def main() -> None:
    args = bursts.parser("deep", __doc__, ROUNDS).parse_args()
    cases: dict[str, Callable[[], Row]] = {}
    for shape in SHAPES:
        for layers in LAYERS:
            for cell in CELLS:
                for mode in MODES:
                    case = Deep(cell, mode, shape, layers)
                    cases[case.name] = partial(measure, case, args.threads, args.rounds)
    bursts.run(args, cases, lambda measured: measured(), render)


if __name__ == "__main__":
    main()
