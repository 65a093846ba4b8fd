"""Cell visualisation: colours each character of a text by what one cell of a model holds there.

  visualise.py                                   learn Python's standard library, two minutes
  visualise.py --checkpoint lm.pt --html cells.html         a checkpoint of char_lm.py
  visualise.py --checkpoint lm.pt --text novel.txt --cells 1.117 2.40

After Karpathy, Johnson and Fei-Fei, "Visualizing and Understanding Recurrent Networks" (2015). A
cell's value is tanh(c) in an LSTM, else h. Without --cells it is those whose values go most with
something a reader sees, such as being inside quotes; the terminal shows the first of them, the
HTML file all. Needs char_lm.py, _common.py, torch and tqdm.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import char_lm
from _common import BACKENDS, Parser, UserError, execute, writable

CONTEXT = 20_000  # characters that are read, to correlate: many more than are shown
SHADES = 16  # of red for positive values, as many of blue for negative ones
RED, BLUE = (245, 135, 90), (105, 160, 250)  # of 1 and -1: black is legible on both
STEPS = (0, 95, 135, 175, 215, 255)  # of red, green and blue among a terminal's 256 colours


class Cell(NamedTuple):
    layer: int
    unit: int
    feature: str = ""  # what it was chosen for, and how it correlates with that
    correlation: float = 0.0

    def __str__(self) -> str:
        chosen = f": {self.feature} (r = {self.correlation:+.2f})" if self.feature else ""
        return f"cell {self.layer + 1}.{self.unit}{chosen}"


def features(text: str) -> dict[str, Tensor]:
    """What a reader knows at each character, from it and those before it."""
    column = indent = depth = place = 0
    quoted = comment = capital = False
    rows, before = [], "\n"
    for char in text:
        if char == "\n":
            column = indent = 0
            comment = False
            if before == "\n":  # an empty line: whatever was open, such as 5" or :-(
                depth, quoted = 0, False
        else:
            indent += char == " " and column == indent
            column += 1
        quoted ^= char == '"'
        comment |= char == "#"
        depth = max(0, depth + (char in "([{") - (char in ")]}"))
        place = place + 1 if char.isalpha() else 0
        capital = char.isupper() if place == 1 else capital and place > 1
        rows.append((quoted, depth > 0, comment, capital, place, column, indent))
        before = char
    names = ["inside quotes", "inside brackets", "after #", "in a capitalised word"]
    names += ["letters since the word began", "characters since the line began", "indentation"]
    return dict(zip(names, torch.tensor(rows, dtype=torch.float32).unbind(1)))


@torch.no_grad()
def values(model: char_lm.CharLM, codes: Tensor) -> Tensor:
    """Each cell's value after each of the characters ``[N]``: ``[layers, N, units]``."""
    x = model.embedding(codes[:, None])
    if isinstance(model.rnn, (nn.LSTM, nn.GRU, nn.RNN)):  # they tell the last states only
        steps, state = [], None
        for step in x.split(1):
            _, state = model.rnn(step, state)
            steps.append(state[1] if isinstance(state, tuple) else state)
        states = torch.cat(steps, dim=1)
    else:
        *_, layers = model.rnn(x, return_states=True)
        states = torch.stack(layers)[:, :, 0]
    return states.tanh() if model.rnn.mode == "LSTM" else states


def standard(x: Tensor) -> Tensor:
    """With mean 0 and variance 1 along the first dimension, or 0 where nothing varies."""
    x = x - x.mean(0)
    return x / x.square().mean(0).sqrt().clamp(min=1e-6)


def interpretable(cells: Tensor, known: dict[str, Tensor]) -> list[Cell]:
    """For each feature the cell that correlates most with it, the clearest first."""
    layers, length, units = cells.shape
    flat = standard(cells.transpose(0, 1).reshape(length, layers * units))
    found = []
    for name, feature in known.items():
        correlations = standard(feature) @ flat / length
        best = int(correlations.abs().argmax())
        if correlations[best]:  # else the text has nothing of the kind
            found.append(Cell(*divmod(best, units), name, correlations[best].item()))
    return sorted(found, key=lambda cell: -abs(cell.correlation))


def runs(text: str, value: Tensor) -> Iterator[tuple[int, str]]:
    """The text in stretches of one shade, from -SHADES to SHADES."""
    shades = (value * SHADES).round().int().tolist()
    for shade, pairs in groupby(zip(shades, text), key=lambda pair: pair[0]):
        yield shade, "".join(char for _, char in pairs)


def colour(shade: int) -> tuple[int, ...]:
    """Red, green and blue, from 0 to 255; shade 0 is white."""
    return tuple(255 - (255 - c) * abs(shade) // SHADES for c in (RED if shade > 0 else BLUE))


def harmless(text: str) -> str:
    """Without characters that a terminal or browser obeys instead of showing them."""

    def replaced(char: str) -> bool:
        return unicodedata.category(char)[0] == "C" and char not in "\n\t"

    return "".join("�" if replaced(char) else char for char in text)


def on_terminal(text: str, value: Tensor, colours: str) -> str:
    lines = ""
    for shade, part in runs(text, value):
        rgb = colour(shade)
        code = "2;{};{};{}".format(*rgb)
        if colours == "256":
            r, g, b = (min(range(6), key=lambda i: abs(STEPS[i] - c)) for c in rgb)
            code = f"5;{16 + 36 * r + 6 * g + b}"
        # A line's end is shown as a space; no colour may run on to the terminal's edge.
        painted = harmless(part).replace("\n", " \x1b[0m\n\x1b[30;48;" + code + "m")
        lines += f"\x1b[30;48;{code}m{painted}\x1b[0m"
    return lines


def terminal_colours(wanted: str) -> str:
    """What the terminal can show, as far as the environment tells."""
    if wanted != "auto":
        return wanted
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return "none"
    return "24bit" if os.environ.get("COLORTERM") in ("truecolor", "24bit") else "256"


def as_html(text: str, cells: list[Cell], shown: Tensor, title: str) -> str:
    """One file that needs no other: a legend, and the text once for each of ``shown``'s rows."""

    def painted(text: str, value: Tensor) -> str:
        return "".join(
            f"<i class={'n' if shade < 0 else 'p'}{abs(shade)}>{html.escape(part)}</i>"
            if shade
            else html.escape(part)
            for shade, part in runs(text, value)
        )

    shades = [shade for shade in range(-SHADES, SHADES + 1) if shade]
    styles = "".join(
        f".{'n' if shade < 0 else 'p'}{abs(shade)}{{background:rgb{colour(shade)}}}\n"
        for shade in shades
    )
    legend = painted(" " * (2 * SHADES + 1), torch.linspace(-1, 1, 2 * SHADES + 1))
    sections = "".join(
        f"<h2>{html.escape(str(cell))}</h2>\n<pre>\n{painted(harmless(text), value)}</pre>\n"
        for cell, value in zip(cells, shown)
    )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 sans-serif;
  color: #000; background: #fff }}
h1, h2 {{ font-size: 1.1rem }}
pre {{ font: .85rem/1.5 monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
i {{ font-style: normal }}
{styles}</style>
<h1>{html.escape(title)}</h1>
<p>Each character's colour is the value of one cell after it:</p>
<pre>-1 {legend} 1</pre>
{sections}</html>
"""


def parse_cell(text: str) -> Cell:
    if not re.fullmatch(r"[1-9]\d*\.\d+", text):
        raise argparse.ArgumentTypeError(f"{text} is not LAYER.UNIT, such as 1.117")
    layer, unit = map(int, text.split("."))
    return Cell(layer - 1, unit)


def load_model(args: argparse.Namespace) -> char_lm.CharLM:
    """From the checkpoint, or from training now."""
    with tempfile.TemporaryDirectory() as folder:
        file = args.checkpoint
        if not file:
            file = str(Path(folder, "lm.pt"))
            options = ["--cell=lstm", "--sample=0", f"--checkpoint={file}"]
            options += [f"--{name}={getattr(args, name)}" for name in ("backend", "minutes")]
            char_lm.main([*options, f"--text={args.text}"] if args.text else options)
        saved = char_lm.load_checkpoint(file)
    options = argparse.Namespace(**saved["args"])
    options.backend = args.backend
    model = char_lm.CharLM(saved["vocabulary"], options)
    model.load_state_dict(saved["model"])
    return model.eval()


def make_parser() -> Parser:
    parser = Parser("visualise.py", __doc__)
    parser.group("model")
    help = "made by char_lm.py (default: train an LSTM now)"
    parser.option("--checkpoint", help, metavar="FILE")
    parser.number("--minutes", 2.0, "time to train, if there is no checkpoint", 0)
    parser.choice("--backend", "whose layers", *BACKENDS)

    parser.group("text")
    help = "UTF-8 text to show the end of, and to train on (default: Python's standard library)"
    parser.option("--text", help, metavar="FILE")
    parser.number("--length", 2000, "characters to show")

    parser.group("picture")
    help = "which ones, such as 1.117, of layer 1 (default: the most interpretable)"
    parser.option("--cells", help, nargs="+", type=parse_cell, metavar="LAYER.UNIT", default=[])
    parser.option("--html", "write the text, coloured by each of the cells", metavar="FILE")
    parser.choice("--colours", "of the terminal", "auto", "24bit", "256", "none")
    return parser


def run(args: argparse.Namespace) -> None:
    writable(args.html)
    text = char_lm.read_text(args.text)[-CONTEXT:]
    if not text:
        raise UserError(f"{args.text} is empty")
    model = load_model(args)
    if strange := sorted(set(text) - set(model.vocabulary)):
        raise UserError(f"the model has not learnt the character {strange[0]!r}")
    held = values(model, char_lm.encode(text, model.vocabulary))
    for cell in args.cells:
        if cell.layer >= len(held) or cell.unit >= held.shape[2]:
            shape = f"{len(held)} layers of {held.shape[2]} units, from 0"
            raise UserError(f"--cells {cell.layer + 1}.{cell.unit}: the model has {shape}")
    cells = args.cells or interpretable(held, features(text))
    if not cells:
        raise UserError("the text is too uniform to choose a cell by: use --cells")

    text = text[-args.length :]
    shown = torch.stack([held[cell.layer, -len(text) :, cell.unit] for cell in cells])
    colours = terminal_colours(args.colours)
    if colours != "none":
        print(on_terminal(text, shown[0], colours))
    print("\n".join(map(str, cells)))
    if args.html:
        mode = f"{len(held)} x {held.shape[2]} {model.rnn.mode}"
        Path(args.html).write_text(as_html(text, cells, shown, f"Cells of {mode}"), "utf-8")


def main(argv: list[str] | None = None) -> int:
    return execute(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
