"""Surname classification: reads names of many languages, learns to tell which one a name is from.

  surnames.py --data names                       a folder with one file per language
  surnames.py --data names --cell lstm --layers 2 --hidden 256 --minutes 5
  surnames.py --data names --picture confusion.png

Each file, such as Polish.txt, has one name per line in UTF-8. Every tenth name, always the same
ones, is held out. --backend torch runs the same program on torch.nn: the same numbers at another
speed; --backend both compares them. Needs torch and tqdm, _common.py beside it, and matplotlib for
the picture.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import unicodedata
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from _common import (
    BACKENDS,
    Parser,
    UserError,
    execute,
    make_models,
    ragged,
    read_text,
    report,
    train,
    writable,
)

Names: TypeAlias = "list[tuple[str, int]]"  # a name and its language's number

HELD_OUT = 10  # one name in so many


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
        # Once each: the data has some names many times, and that would count them many times.
        for name in sorted({normal(line) for line in read_text(file).splitlines()} - {""}):
            sides[is_held_out(name)].append((name, number))
    if not all(sides):
        raise UserError(f"{folder}: too few names")
    return [file.stem for file in files], *sides


class Classifier(nn.Module):
    """Embedding, recurrent layers in both directions, and scores from their final states."""

    def __init__(
        self, library: ModuleType, characters: str, languages: int, args: argparse.Namespace
    ) -> None:
        super().__init__()
        layers = getattr(library, args.cell.upper())
        self.codes = {char: code for code, char in enumerate(characters, 1)}  # 0: any other
        self.embedding = nn.Embedding(1 + len(characters), args.embed)
        self.rnn = layers(args.embed, args.hidden, args.layers, bidirectional=True)
        self.dropout = nn.Dropout(args.dropout)
        self.head = nn.Linear(2 * args.hidden, languages)

    def forward(self, names: list[str]) -> Tensor:
        """Scores ``[len(names), languages]``."""
        rows = [torch.tensor([self.codes.get(char, 0) for char in name]) for name in names]
        x = self.dropout(self.embedding(pad_sequence(rows)))
        _, state = ragged(self.rnn, x, [len(name) for name in names])
        h = state[0] if isinstance(state, tuple) else state  # of an LSTM without c
        return self.head(self.dropout(torch.cat((h[-2], h[-1]), dim=1)))

    def loss(self, batch: Names) -> Tensor:
        names, languages = zip(*batch)
        return cross_entropy(self(list(names)), torch.tensor(languages))


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


def make_parser() -> Parser:
    parser = Parser("surnames.py", __doc__)
    parser.group("files")
    parser.option("--data", "folder of LANGUAGE.txt", metavar="FOLDER", required=True)
    help = "draw the confusion matrix here (default: print it)"
    parser.option("--picture", help, metavar="FILE")

    parser.group("model")
    parser.choice("--backend", "whose layers", *BACKENDS, "both")
    parser.choice("--cell", "kind of layer", "gru", "lstm", "rnn")
    parser.number("--layers", 1, "recurrent layers")
    parser.number("--hidden", 128, "units in each direction of a layer")
    parser.number("--embed", 64, "size of the vector that stands for a character")
    help = "share of activations dropped before and after the layers"
    parser.number("--dropout", 0.3, help, 0, 1)

    parser.training("names", batch=64, lr=0.004, epochs=10)
    return parser


def run(args: argparse.Namespace) -> None:
    writable(args.picture)
    languages, training, held_out = read_names(args.data)
    characters = "".join(sorted({char for name, _ in training for char in name}))
    print(
        f"data: {len(languages)} languages, {len(characters)} characters, "
        f"{len(training):,} names for training, {len(held_out):,} held out"
    )
    models = make_models(lambda lib: Classifier(lib, characters, len(languages), args), args)
    trained = train(models, training, args)

    counts = {name: confusion(m, held_out, len(languages)) for name, m in models.items()}
    first = next(iter(counts.values()))
    if args.picture:
        try:
            draw(first, languages, args.picture)
        except ImportError:
            print("no matplotlib, so no picture but a table:")
            args.picture = None
    if not args.picture:
        print(table(first, languages))
    accuracy = {name: (c.trace() / c.sum()).item() for name, c in counts.items()}
    report(trained, "held-out accuracy", accuracy)


def main(argv: list[str] | None = None) -> int:
    return execute(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
