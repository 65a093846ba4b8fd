"""Deep models beside their layers one after the other: python -m bench.deep

The layers of a small deep model run side by side on different threads where that should be faster.
A model is called beside as many models of one layer, each on the output of the one before; and, for
some shapes, both on ragged batches, with resets, with the states of every step, and with dropout.
"""

from collections.abc import Callable
from functools import partial
from itertools import product, starmap
from typing import Any, NamedTuple

from . import bursts
from .bursts import Call
from .cases import MODES
from .results import Row
from .table import align

SHAPES = ((200, 1, 256), (200, 2, 128), (500, 4, 64), (1000, 1, 64))
LAYERS = (2, 4)
CELLS = ("LSTM", "GRU", "RNN")
KINDS = ("ragged", "reset", "states", "dropout")  # beside plain calls, of KIND_SHAPES
KIND_SHAPES, KIND_LAYERS, KIND_CELLS = SHAPES[2:], 4, ("LSTM", "GRU")
DROPOUT, RESETS = 0.2, 0.02
ROUNDS = 15
BURST_S = 0.03

GOAL = 1.5  # times as fast, of LSTM and GRU with four layers and all shapes but the last


class Deep(NamedTuple):
    cell: str
    mode: str
    shape: tuple[int, int, int]  # T, B, H
    layers: int
    kind: str = "plain"

    @property
    def name(self) -> str:
        kind = "" if self.kind == "plain" else f", {self.kind}"
        return f"{self.cell} {self.mode} {', '.join(map(str, self.shape))} x {self.layers}{kind}"


def calls(case: Deep, threads: int) -> dict[str, Call]:
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence

    import fastrnn

    steps, rows, hidden = case.shape
    cell = getattr(fastrnn, case.cell)
    dropout = DROPOUT if case.kind == "dropout" else 0.0
    model = cell(hidden, hidden, case.layers, dropout=dropout)
    layers = [cell(hidden, hidden) for _ in range(case.layers)]
    x: Any = torch.randn(steps, rows, hidden)
    options: dict[str, Any] = {}
    if case.kind == "ragged":  # packed once for all layers
        lengths = torch.linspace(steps / 2, steps, rows).round().long().flip(0)
        x = pack_padded_sequence(x, lengths)
    elif case.kind == "reset":
        options = {"reset": torch.rand(steps, rows) < RESETS}
    elif case.kind == "states":
        options = {"return_states": True}

    def one_after_the_other() -> Any:
        output = x
        for k, layer in enumerate(layers):
            output = layer(output, **options)[0]
            if dropout and k < len(layers) - 1:
                output = torch.nn.functional.dropout(output, dropout)
        return output

    forward: dict[str, Call] = {
        "deep": lambda: model(x, **options)[0],
        "layers": one_after_the_other,
    }
    if case.mode == "inference":
        return forward
    return {name: partial(train, call) for name, call in forward.items()}


def train(forward: Call) -> None:
    import torch

    output = forward()
    steps = output if isinstance(output, torch.Tensor) else output.data  # of a PackedSequence
    steps.backward(torch.ones_like(steps))


def measure(case: Deep, threads: int, rounds: int) -> Row:
    row = bursts.measure([(calls, case.mode == "training")], case, threads, rounds, BURST_S)
    return {**case._asdict(), **row}


def missed(row: Row) -> list[str]:
    faster = row["over"]["layers"]
    has_goal = row["cell"] != "RNN" and tuple(row["shape"]) in SHAPES[:-1]
    has_goal &= row["kind"] == "plain"
    if not has_goal or row["layers"] != max(LAYERS) or faster >= GOAL:
        return []
    return [f"{faster:.2f}x, goal {GOAL}x"]


def render(rows: list[Row]) -> str:
    lines = [
        [row["cell"], row["mode"] + "*" * row["busy"], ", ".join(map(str, row["shape"]))]
        + [str(row["layers"]), row["kind"]]
        + [f"{row['us'][peer] / 1e3:.3g}" for peer in ("deep", "layers")]
        + [f"{row['over']['layers']:.2f}x"]
        for row in rows
    ]
    titles = [
        "cell",
        "mode",
        "T, B, H",
        "layers",
        "call",
        "model ms",
        "layer by layer ms",
        "faster",
    ]
    misses = [f"{row['row']}: {why}" for row in rows for why in missed(row)]
    parts = [align(titles, lines, left=3)]
    return "\n\n".join([*parts, *(["\n".join(["Goals missed:", *misses])] if misses else [])])


def main() -> None:
    args = bursts.parser("deep", __doc__, ROUNDS).parse_args()
    plain = product(CELLS, MODES, SHAPES, LAYERS, ("plain",))
    others = product(KIND_CELLS, MODES, KIND_SHAPES, (KIND_LAYERS,), KINDS)
    cases: dict[str, Callable[[], Row]] = {}
    for case in sorted(starmap(Deep, (*plain, *others)), key=lambda c: SHAPES.index(c.shape)):
        cases[case.name] = partial(measure, case, args.threads, args.rounds)
    bursts.run(args, cases, lambda measured: measured(), render)


if __name__ == "__main__":
    main()
