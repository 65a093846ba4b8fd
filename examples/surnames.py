"""Surname classification: reads names of many languages, learns to tell which one a name is from.

  surnames.py --data names                       a folder with one file per language
  surnames.py --data names --cell lstm --layers 2 --hidden 256 --minutes 5
  surnames.py --data names --picture confusion.png

Each file, such as Polish.txt, has one name per line in UTF-8. Every tenth name, always the same
ones, is held out. With --backend torch the same program runs on torch.nn: the same numbers at
another speed. Needs torch and tqdm, and matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
import time
import unicodedata
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence
from tqdm import tqdm

Names: TypeAlias = "list[tuple[str, int]]"  # a name and its language's number

BACKENDS = {"fastrnn": "fastrnn", "torch": "torch.nn"}  # modules that define LSTM, GRU and RNN
HELD_OUT = 10  # one name in so many


class UserError(Exception):
    """What the user can put right: ends the program with one line and no traceback."""


def normal(name: str) -> str:
    """Letters and accents apart: an é has an e's meaning and its own, and any script will do."""
    return unicodedata.normalize("NFD", name.strip())


def is_held_out(name: str) -> bool:
    """Depends on the name alone, so that no two files or runs have it on different sides."""
    return hashlib.sha256(name.encode()).digest()[0] * HELD_OUT < 256


def read_names(folder: str) -> tuple[list[str], Names, Names]:
    """The languages, and each one's different names, for training and held out."""
    files = sorted(Path(folder).glob("*.txt"))
    if len(files) < 2:
        raise UserError(f"{folder}: expected two or more files, named LANGUAGE.txt")
    sides: tuple[Names, Names] = [], []
    for number, file in enumerate(files):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text") from error
        # Once each: the data has some names many times, and that would count them many times.
        for name in sorted({normal(line) for line in lines} - {""}):
            sides[is_held_out(name)].append((name, number))
    if not all(sides):
        raise UserError(f"{folder}: too few names")
    return [file.stem for file in files], *sides


class Classifier(nn.Module):
    """Embedding, recurrent layers in both directions, and scores from their final states."""

    def __init__(self, characters: str, languages: int, args: argparse.Namespace) -> None:
        super().__init__()
        try:
            layers = getattr(importlib.import_module(BACKENDS[args.backend]), args.cell.upper())
        except (ImportError, RuntimeError) as error:
            raise UserError(f"--backend {args.backend} cannot be imported: {error}") from error
        self.codes = {char: code for code, char in enumerate(characters, 1)}  # 0: any other
        self.embedding = nn.Embedding(1 + len(characters), args.embed)
        self.rnn = layers(args.embed, args.hidden, args.layers, bidirectional=True)
        self.dropout = nn.Dropout(args.dropout)
        self.head = nn.Linear(2 * args.hidden, languages)

    def forward(self, names: list[str]) -> Tensor:
        """Scores ``[len(names), languages]``."""
        rows = [torch.tensor([self.codes.get(char, 0) for char in name]) for name in names]
        lengths = torch.tensor([len(name) for name in names])
        x = self.dropout(self.embedding(nn.utils.rnn.pad_sequence(rows)))
        if isinstance(self.rnn, (nn.LSTM, nn.GRU, nn.RNN)):
            _, state = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        else:
            _, state = self.rnn(x, lengths=lengths)
        h = state[0] if isinstance(state, tuple) else state  # of an LSTM without c
        return self.head(self.dropout(torch.cat((h[-2], h[-1]), dim=1)))


def batches(names: Names, size: int, generator: torch.Generator) -> Iterator[Names]:
    """The names in a new order, for ever; the last few of each pass make no batch."""
    size = min(size, len(names))
    while True:
        order = torch.randperm(len(names), generator=generator).tolist()
        for start in range(0, len(names) - size + 1, size):
            yield [names[i] for i in order[start : start + size]]


def train(model: Classifier, names: Names, args: argparse.Namespace) -> list[float]:
    """Trains until the budget is spent, with a falling learning rate; returns the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    stream = batches(names, args.batch, torch.Generator().manual_seed(args.seed))
    losses: list[float] = []
    start = time.monotonic()
    steps = args.epochs * max(1, len(names) // args.batch)
    budget = args.minutes * 60 or steps

    def spent() -> float:
        return time.monotonic() - start if args.minutes else len(losses)

    model.train()
    layout = "{percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=budget, bar_format=layout, disable=None) as bar:  # None: on a terminal
        while (now := spent()) < budget or not losses:
            optimizer.param_groups[0]["lr"] = args.lr * max(0, 1 - now / budget)
            batch, languages = zip(*next(stream))
            loss = cross_entropy(model(list(batch)), torch.tensor(languages))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
            bar.update(min(spent(), budget) - bar.n)
    return losses


@torch.no_grad()
def confusion(model: Classifier, names: Names, languages: int) -> Tensor:
    """How many names of each language (row) are taken for each one (column)."""
    model.eval()
    counts = torch.zeros(languages, languages, dtype=torch.int64)
    for start in range(0, len(names), 500):
        some, true = zip(*names[start : start + 500])
        guesses = model(list(some)).argmax(dim=1)
        counts.index_put_((torch.tensor(true), guesses), torch.tensor(1), accumulate=True)
    return counts


def table(counts: Tensor, languages: list[str]) -> str:
    """The matrix as text, in per cent of each row; a dot is none."""
    width = max(map(len, languages))
    lines = [" " * width + "".join(f"{name[:3]:>4}" for name in languages) + "  names"]
    for name, row in zip(languages, counts.tolist()):
        shares = (f"{100 * n / sum(row):4.0f}" if n else "   ." for n in row)
        lines.append(f"{name:{width}}{''.join(shares)}{sum(row):7}")
    return "\n".join(lines)


def draw(counts: Tensor, languages: list[str], file: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.add_subplot(xlabel="taken for", ylabel="language")
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.tolist(), vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(languages)), languages, rotation=90)
    axes.set_yticks(range(len(languages)), languages)
    figure.colorbar(image, label="share of the language's held-out names")
    figure.savefig(file, dpi=120)


def make_parser() -> argparse.ArgumentParser:
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("surnames.py", description=summary, epilog=examples)
    parser.usage = argparse.SUPPRESS  # an error then is one line
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def number(name: str, default: float, help: str, low: float = 1, high: float = inf) -> None:
        """An option for a number of the default's type in ``[low, high)``."""

        def parse(text: str) -> float:
            value = type(default)(text)
            if not low <= value < high:
                raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")
            return value

        parse.__name__ = type(default).__name__  # for argparse's "invalid int value"
        help = f"{help} (default: {default})"
        group.add_argument(name, help=help, type=parse, default=default, metavar="N")

    def choice(name: str, help: str, *choices: str) -> None:
        help = f"{help} (default: {choices[0]})"
        group.add_argument(name, help=help, choices=choices, default=choices[0])

    group = parser.add_argument_group("files")
    group.add_argument("--data", help="folder of LANGUAGE.txt", metavar="FOLDER", required=True)
    help = "draw the confusion matrix here (default: print it)"
    group.add_argument("--picture", help=help, metavar="FILE")

    group = parser.add_argument_group("model")
    choice("--backend", "whose layers", *BACKENDS)
    choice("--cell", "kind of layer", "gru", "lstm", "rnn")
    number("--layers", 1, "recurrent layers")
    number("--hidden", 128, "units in each direction of a layer")
    number("--embed", 64, "size of the vector that stands for a character")
    number("--dropout", 0.3, "share of activations dropped before and after the layers", 0, 1)

    group = parser.add_argument_group("training")
    number("--batch", 64, "names in a batch")
    number("--lr", 0.004, "Adam's learning rate in the beginning; in the end it is 0", 0, 10)
    number("--seed", 0, "seed of all random numbers", 0, 2**63)
    group = group.add_mutually_exclusive_group()
    number("--epochs", 10, "train so many times on each name")
    number("--minutes", 0.0, "... or for this time, if it is not 0", 0)
    return parser


def run(args: argparse.Namespace) -> None:
    if args.picture and not Path(args.picture).absolute().parent.is_dir():  # now, not in the end
        raise UserError(f"cannot write {args.picture}: no such directory")
    languages, training, held_out = read_names(args.data)
    characters = "".join(sorted({char for name, _ in training for char in name}))
    torch.manual_seed(args.seed)
    model = Classifier(characters, len(languages), args)
    weights = sum(p.numel() for p in model.parameters())
    print(
        f"data: {len(languages)} languages, {len(characters)} characters, "
        f"{len(training):,} names for training, {len(held_out):,} held out"
    )
    print(
        f"model: {args.layers} x {args.hidden} {args.cell} of {args.backend}, {weights:,} weights"
    )

    start = time.monotonic()
    losses = train(model, training, args)
    seconds = time.monotonic() - start
    counts = confusion(model, held_out, len(languages))
    accuracy = counts.trace().item() / counts.sum().item()
    print(f"trained: {len(losses):,} steps in {seconds:.1f} seconds, last loss {losses[-1]:.6f}")
    if args.picture:
        try:
            draw(counts, languages, args.picture)
        except ImportError:
            print("no matplotlib, so no picture but a table:")
            args.picture = None
    if not args.picture:
        print(table(counts, languages))
    print(f"held-out accuracy: {accuracy:.2%}")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        run(args)
    except (UserError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
