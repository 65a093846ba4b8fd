"""What the examples share: the command line, ragged batches on both libraries, and training.

With --backend both, the models of fastrnn and torch.nn learn in one process from the same batches,
with the same random numbers, in turn: so their losses and times can be compared batch by batch.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from tqdm import tqdm

T = TypeVar("T")

BACKENDS = {"fastrnn": "fastrnn", "torch": "torch.nn"}  # modules that define LSTM, GRU and RNN


class UserError(Exception):
    """What the user can put right: ends the program with one line and no traceback."""


class Parser(argparse.ArgumentParser):
    """Takes its help from the program's docstring, and its options group by group."""

    def __init__(self, name: str, doc: str | None) -> None:
        summary, _, examples = (doc or "").partition("\n\n")
        super().__init__(name, description=summary, epilog=examples)
        self.usage = argparse.SUPPRESS  # an error then is one line
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def group(self, title: str) -> None:
        """The options that follow belong to this group."""
        self.current: Any = self.add_argument_group(title)

    def either(self) -> None:
        """Only one of the options that follow may be given."""
        self.current = self.current.add_mutually_exclusive_group()

    def option(self, name: str, help: str, **how: Any) -> None:
        self.current.add_argument(name, help=help, **how)

    def choice(self, name: str, help: str, *choices: str) -> None:
        """An option with the first choice as its default."""
        help = f"{help} (default: {choices[0]})"
        self.option(name, help, choices=choices, default=choices[0])

    def number(
        self, name: str, default: float, help: str, low: float = 1, high: float = inf
    ) -> None:
        """An option for a number of the default's type in ``[low, high)``."""

        def parse(text: str) -> float:
            value = type(default)(text)
            if not low <= value < high:
                raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")
            return value

        parse.__name__ = type(default).__name__  # for argparse's "invalid int value"
        self.option(name, f"{help} (default: {default})", type=parse, default=default, metavar="N")

    def training(self, items: str, *, batch: int, lr: float, epochs: int) -> None:
        """The options of ``train``; the arguments are the defaults."""
        self.group("training")
        self.number("--batch", batch, f"{items} in a batch")
        self.number("--lr", lr, "Adam's learning rate in the beginning; in the end it is 0", 0, 10)
        self.number("--seed", 0, "seed of all random numbers", 0, 2**63)
        self.either()
        self.number("--epochs", epochs, f"train so many times on all {items}")
        self.number("--minutes", 0.0, "... or for this time, if it is not 0", 0)


def execute(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None,
) -> int:
    """Runs a program and returns its exit code."""
    args = parser.parse_args(argv)
    try:
        run(args)
    except (UserError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def read_text(file: str | Path) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text") from error


def writable(file: str | None) -> None:
    """Complains now about what could not be written in the end."""
    if file and not Path(file).absolute().parent.is_dir():
        raise UserError(f"cannot write {file}: no such directory")


def library(backend: str) -> ModuleType:
    """The module whose LSTM, GRU and RNN a model is made of."""
    try:
        return importlib.import_module(BACKENDS[backend])
    except (ImportError, RuntimeError) as error:
        raise UserError(f"--backend {backend} cannot be imported: {error}") from error


def ragged(
    rnn: nn.RNNBase, x: Tensor, lengths: Sequence[int], state: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Outputs and final states of ``x [T, B, I]``, whose rows are only so long."""
    if not isinstance(rnn, (nn.LSTM, nn.GRU, nn.RNN)):
        return rnn(x, state, lengths=lengths)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    output, state = rnn(packed, state)
    return pad_packed_sequence(output)[0], state


class Carried(NamedTuple):
    """What fastrnn's states do, on a layer of torch.nn that carries ``hx`` by hand."""

    rnn: nn.RNNBase
    hx: Any
    top: Tensor | None = None  # [B, H]

    def add_input(self, x: Tensor) -> Carried:
        output, hx = self.rnn(x[None], self.hx)
        return Carried(self.rnn, hx, output[0])

    def output(self) -> Tensor:
        assert self.top is not None
        return self.top

    def select(self, rows: Tensor) -> Carried:
        hx = self.hx
        hx = tuple(s[:, rows] for s in hx) if isinstance(hx, tuple) else hx[:, rows]
        return Carried(self.rnn, hx, None if self.top is None else self.top[rows])


def begin(rnn: nn.RNNBase, hx: Any = None) -> Any:
    """The state of a layer, for one step of inputs ``[B, I]`` at a time; ``hx``: None for B = 1."""
    if isinstance(rnn, (nn.LSTM, nn.GRU, nn.RNN)):
        return Carried(rnn, hx)
    return rnn.initial_state(hx, batch=1 if hx is None else None)


class Training(NamedTuple):
    """What one model's training was like: the loss and the seconds of each step."""

    losses: list[float]
    seconds: list[float]


def make_models(
    make: Callable[[ModuleType], nn.Module], args: argparse.Namespace
) -> dict[str, nn.Module]:
    """The model for each backend asked for, with the same initial weights."""
    models = {}
    for backend in BACKENDS if args.backend == "both" else [args.backend]:
        torch.manual_seed(args.seed)
        models[backend] = make(library(backend))
    weights = sum(p.numel() for p in models[backend].parameters())
    print(f"model: {weights:,} weights; backend: {args.backend}")
    return models


def batches(items: list[T], size: int, seed: int) -> Iterator[list[T]]:
    """The items in a new order, for ever; the last few of each pass make no batch."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(items))
    while True:
        order = torch.randperm(len(items), generator=generator).tolist()
        for start in range(0, len(items) - size + 1, size):
            yield [items[i] for i in order[start : start + size]]


def train(
    models: Mapping[str, nn.Module], items: list[Any], args: argparse.Namespace
) -> dict[str, Training]:
    """Trains until the budget is spent, with a falling learning rate.

    A model's method ``loss`` takes a batch, a list of some of the items.
    """
    optimizers = {name: torch.optim.Adam(m.parameters(), lr=args.lr) for name, m in models.items()}
    trained = {name: Training([], []) for name in models}
    stream = batches(items, args.batch, args.seed)
    order = list(models)
    losses = trained[order[0]].losses
    budget = args.minutes * 60 or args.epochs * max(1, len(items) // args.batch)
    start = time.perf_counter()

    def spent() -> float:
        return time.perf_counter() - start if args.minutes else len(losses)

    def step(model: nn.Module, optimizer: torch.optim.Adam, batch: list[Any]) -> float:
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    for model in models.values():
        model.train()
    layout = "{percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=budget, bar_format=layout, disable=None) as bar:  # None: on a terminal
        while (now := spent()) < budget or not losses:
            batch = next(stream)
            random_state = torch.get_rng_state()
            for name in order:
                torch.set_rng_state(random_state)  # the same dropout for each model
                optimizers[name].param_groups[0]["lr"] = args.lr * max(0, 1 - now / budget)
                began = time.perf_counter()
                trained[name].losses.append(step(models[name], optimizers[name], batch))
                trained[name].seconds.append(time.perf_counter() - began)
            order.reverse()  # the second finds the caches as the first leaves them
            recent = losses[-50:]
            bar.set_postfix_str(f"loss {sum(recent) / len(recent):.3f}", refresh=False)
            bar.update(min(spent(), budget) - bar.n)
    return trained


def report(trained: Mapping[str, Training], what: str, scores: Mapping[str, float]) -> None:
    """A line for each backend, and how their times compare, batch by batch."""
    for name, (losses, seconds) in trained.items():
        print(
            f"{name}: {len(losses):,} steps in {sum(seconds):.1f} seconds, "
            f"last loss {losses[-1]:.6f}, {what} {scores[name]:.2%}"
        )
    if len(trained) == 2:
        ours, theirs = (trained[name].seconds for name in BACKENDS)
        # The median, as on a busy machine a single step may take any time.
        ratio = median(slow / fast for fast, slow in zip(ours, theirs))
        print(f"a training step takes torch.nn {ratio:.2f} times as long as fastrnn (median)")
