"""Cell search: trains recurrent cells on one task, and compares how they learn and how fast.

  cell_search.py                                the adding problem over 50 steps, five cells
  cell_search.py --cells LSTM Decay JANET --steps 200 --plot cells.png
  cell_search.py --task copy --cells LSTM GRU SLSTM

A cell is a layer of fastrnn, one of fastrnn.cells, or one of this file, which begins with a cell of
its own: change it, or write another below it. The adding problem and the copy task are those of
Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997), and Arjovsky, Shah and Bengio, "Unitary
Evolution Recurrent Neural Networks" (2016). Needs _common.py, fastrnn and tqdm; --plot matplotlib.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastrnn
from _common import Parser, UserError, execute, writable


@fastrnn.cell(gates=("i", "g"))
def Decay(x: Any, r: Any, h: Any, c: Any, *, a: Any = 5.0) -> Any:
    """A memory that each unit forgets at a learned rate, whatever comes in."""
    i = torch.sigmoid(x.i + r.i)
    c = torch.sigmoid(a) * c + i * torch.tanh(x.g + r.g)
    return torch.tanh(c), c


class Batch(NamedTuple):
    x: Tensor  # [T, B, features]
    target: Tensor  # [B] of numbers, or [steps, B] of classes for the last steps


def adding(batch: int, steps: int, generator: torch.Generator) -> Batch:
    """Numbers in [0, 1), two of which are marked, one in each half: their sum is wanted."""
    values = torch.rand(steps, batch, generator=generator)
    marks = torch.zeros(steps, batch)
    half = steps // 2
    for first, end in ((0, half), (half, steps)):
        marks.scatter_(0, torch.randint(first, end, (1, batch), generator=generator), 1.0)
    return Batch(torch.stack([values, marks], -1), (values * marks).sum(0))


LETTERS, LENGTH = 8, 10  # of the copy task


def copying(batch: int, steps: int, generator: torch.Generator) -> Batch:
    """Ten letters, `steps` blanks, a mark: then the letters are wanted, in their order."""
    letters = torch.randint(LETTERS, (LENGTH, batch), generator=generator)
    codes = torch.full((steps + 2 * LENGTH, batch), LETTERS)  # a blank
    codes[:LENGTH] = letters
    codes[-LENGTH] = LETTERS + 1  # the mark
    return Batch(F.one_hot(codes, LETTERS + 2).float(), letters)


class Task(NamedTuple):
    draw: Callable[[int, int, torch.Generator], Batch]
    features: int
    outputs: int
    measure: str
    of_nothing: str  # what a model reaches that remembers nothing


TASKS = {
    "adding": Task(adding, 2, 1, "mean squared error", "0.167: always 1"),
    "copy": Task(copying, LETTERS + 2, LETTERS, "cross-entropy", "2.079: every letter alike"),
}


class Model(nn.Module):
    def __init__(self, layer: type[nn.Module], task: Task, hidden: int) -> None:
        super().__init__()
        self.rnn = layer(task.features, hidden)
        self.output = nn.Linear(hidden, task.outputs)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        states = self.rnn(batch.x)[0]
        if batch.target.is_floating_point():
            return F.mse_loss(self.output(states[-1]).squeeze(-1), batch.target)
        logits = self.output(states[-len(batch.target) :])
        return F.cross_entropy(logits.flatten(0, 1), batch.target.flatten())


class Result(NamedTuple):
    name: str
    weights: int
    losses: list[float]
    seconds: list[float]

    @property
    def final(self) -> float:
        """The mean loss of the last tenth."""
        return fmean(self.losses[-max(1, len(self.losses) // 10) :])


def find(name: str) -> type[nn.Module]:
    """The class of layers of that name."""
    for place in (sys.modules[__name__], fastrnn, fastrnn.cells):
        layer = getattr(place, name, None)
        if isinstance(layer, type) and issubclass(layer, nn.RNNBase):
            return layer
    known = ", ".join(fastrnn.cells.__all__)
    raise UserError(f"--cells: there is no {name}; there are LSTM, GRU, RNN, {known}")


def learn(name: str, args: argparse.Namespace) -> Result:
    """Trains one cell. All get the same batches."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    task = TASKS[args.task]
    model = Model(find(name), task, args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    weights = sum(p.numel() for p in model.parameters())
    result = Result(name, weights, [], [])
    model(task.draw(2, args.steps, torch.Generator())).backward()  # compiles the cell
    layout = name.ljust(12) + " {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}"
    for _ in tqdm(range(args.updates), bar_format=layout, disable=None):
        batch = task.draw(args.batch, args.steps, generator)
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        result.seconds.append(time.perf_counter() - began)
        result.losses.append(loss.item())
    return result


def report(results: Sequence[Result], task: Task) -> None:
    print(f"{task.measure}; a model that remembers nothing reaches {task.of_nothing}")
    print(f"{'cell':14}{'weights':>9}{'loss':>10}{'ms a step':>11}")
    for r in results:
        print(f"{r.name:14}{r.weights:9,}{r.final:10.4f}{1e3 * median(r.seconds):11.2f}")


def plot(results: Sequence[Result], task: Task, file: str) -> None:
    """Learning curves, each smoothed over a twentieth of it, and step times."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--plot needs matplotlib: {error}") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    for r in results:
        width = max(1, len(r.losses) // 20)
        means = torch.tensor(r.losses).unfold(0, width, 1).mean(-1)
        curves.plot(range(width, len(r.losses) + 1), means, label=r.name)
    curves.set(xlabel="update", ylabel=task.measure, yscale="log")
    curves.legend()
    names, times = zip(*((r.name, 1e3 * median(r.seconds)) for r in reversed(results)))
    bars.barh(names, times)
    bars.set(xlabel="ms a training step")
    figure.savefig(file, dpi=150)


def make_parser() -> Parser:
    parser = Parser("cell_search.py", __doc__)
    parser.group("the search")
    parser.choice("--task", "what is learned", *TASKS)
    cells = ["LSTM", "GRU", "Decay", "JANET", "MinGRU"]
    parser.option(
        "--cells", f"names of cells (default: {' '.join(cells)})", nargs="+", default=cells
    )
    parser.number("--steps", 50, "steps of the adding problem, or blanks of the copy task", 2)
    parser.number("--hidden", 64, "hidden units")
    parser.option("--plot", "write learning curves and step times to this file")
    parser.group("training")
    parser.number("--updates", 1500, "updates of the weights")
    parser.number("--batch", 32, "rows in a batch")
    parser.number("--lr", 0.003, "Adam's learning rate", 0, 10)
    parser.number("--seed", 0, "seed of all random numbers", 0, 2**63)
    return parser


def run(args: argparse.Namespace) -> None:
    writable(args.plot)
    for name in args.cells:
        find(name)  # before any of them takes its time
    results = [learn(name, args) for name in args.cells]
    report(results, TASKS[args.task])
    if args.plot:
        plot(results, TASKS[args.task], args.plot)


def main(argv: Sequence[str] | None = None) -> int:
    return execute(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
