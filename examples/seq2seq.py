"""Sequence to sequence: learns from pairs of texts to turn the first into the second.

  seq2seq.py                                     write numbers out: 407 -> four hundred seven
  seq2seq.py --ask 1984 123456789                ... these too
  seq2seq.py --ask 1984 --beam 4                 ... by beam search
  seq2seq.py --data pairs.tsv --hidden 128       a file of lines SOURCE<tab>TARGET in UTF-8

A bidirectional GRU reads the source, another GRU writes the target character by character. In
training it reads the true target (teacher forcing), in one call; afterwards what it has just
written, one step of its state for each character. With --beam it goes on from the likeliest few
beginnings at a time, else from the likeliest alone. Every tenth pair, always the same ones, is
held out.
--backend torch runs the same program on torch.nn: the same numbers at another speed; --backend
both compares them. Needs torch and tqdm, and _common.py beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
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
    begin,
    execute,
    make_models,
    ragged,
    read_text,
    report,
    train,
)

Pair: TypeAlias = "tuple[str, str]"  # source and target
Memory: TypeAlias = "tuple[Tensor, Tensor]"  # what the encoder made of a source, and where it ends

HELD_OUT = 10  # one pair in so many
DIGITS = 9  # of the largest number
EDGE = 0  # the code that stands before a target and ends it
PADDING = -1  # the code behind that
SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SMALL += ["eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"]
SMALL += ["seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SCALES = {1_000_000: "million", 1_000: "thousand", 100: "hundred"}


def written_out(number: int) -> str:
    """A number below 10 ** 9 in words."""
    if number < 20:
        return SMALL[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{SMALL[number % 10]}" if number % 10 else "")
    scale = next(scale for scale in SCALES if number >= scale)
    words = f"{written_out(number // scale)} {SCALES[scale]}"
    return f"{words} {written_out(number % scale)}" if number % scale else words


def number_pairs(count: int, seed: int) -> list[Pair]:
    """Up to ``count`` different numbers, nearly as many of one length as of another."""
    dice = random.Random(seed)
    numbers = {dice.randrange(10 ** dice.randint(1, DIGITS)) for _ in range(count)}
    return [(str(number), written_out(number)) for number in sorted(numbers)]


def read_pairs(file: str) -> list[Pair]:
    pairs = set()
    for number, line in enumerate(read_text(file).splitlines(), 1):
        source, tab, target = line.partition("\t")
        if not source or not tab:
            raise UserError(f"{file}, line {number}: expected SOURCE<tab>TARGET")
        pairs.add((source, target))
    return sorted(pairs)


def is_held_out(source: str) -> bool:
    """Depends on the source alone, so that one with several targets is not on both sides."""
    return hashlib.sha256(source.encode()).digest()[0] * HELD_OUT < 256


def encode(text: str, codes: dict[str, int]) -> Tensor:
    return torch.tensor([codes.get(char, 0) for char in text])


class Translator(nn.Module):
    """An encoder, a decoder that starts from its final state, and attention between the two."""

    def __init__(self, library: ModuleType, training: list[Pair], args: argparse.Namespace) -> None:
        super().__init__()
        sources, targets = (sorted(set("".join(texts))) for texts in zip(*training))
        self.sources = {char: code for code, char in enumerate(sources, 1)}  # 0: any other
        self.targets = {char: code for code, char in enumerate(targets, 1)}  # 0: EDGE
        self.longest = max(len(target) for _, target in training)
        width = 2 * args.hidden
        self.source_vectors = nn.Embedding(1 + len(sources), args.embed)
        self.target_vectors = nn.Embedding(1 + len(targets), args.embed)
        self.encoder = library.GRU(args.embed, args.hidden, args.layers, bidirectional=True)
        self.decoder = library.GRU(args.embed, width, args.layers)
        self.mix = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 1 + len(targets))

    def read(self, sources: list[str]) -> tuple[Memory, Tensor]:
        """What attention looks at, and the decoder's first state."""
        lengths = [len(source) for source in sources]
        x = self.source_vectors(pad_sequence([encode(s, self.sources) for s in sources]))
        output, h = ragged(self.encoder, x, lengths)
        padding = torch.arange(len(output)) >= torch.tensor(lengths)[:, None]
        # Of each layer both directions' final states, side by side.
        return (output, padding), torch.cat((h[0::2], h[1::2]), dim=-1)

    def scores(self, memory: Memory, output: Tensor) -> Tensor:
        """For each of the decoder's outputs ``[T, B, H]`` the scores of all characters."""
        read, padding = memory
        fit = torch.einsum("tbh,sbh->bts", output, read)
        attention = fit.masked_fill(padding[:, None], -torch.inf).softmax(dim=-1)
        seen = torch.einsum("bts,sbh->tbh", attention, read)
        return self.head(self.mix(torch.cat((output, seen), dim=-1)).tanh())

    def loss(self, batch: list[Pair]) -> Tensor:
        """Teacher forcing: the mean over the targets' real characters, each after the true ones."""
        sources, targets = zip(*batch)
        memory, state = self.read(list(sources))
        codes = [encode(target, self.targets) for target in targets]
        edge = torch.tensor([EDGE])
        before = pad_sequence([torch.cat((edge, code)) for code in codes])
        after = pad_sequence([torch.cat((code, edge)) for code in codes], padding_value=PADDING)
        lengths = [1 + len(code) for code in codes]
        output, _ = ragged(self.decoder, self.target_vectors(before), lengths, state)
        scores = self.scores(memory, output)
        return cross_entropy(scores.flatten(0, 1), after.flatten(), ignore_index=PADDING)

    @torch.no_grad()
    def forward(self, sources: list[str]) -> list[str]:
        """Greedy decoding: always the likeliest character, then the next, until all have ended."""
        memory, h = self.read(sources)
        state = begin(self.decoder, h)
        codes = torch.full((len(sources),), EDGE)
        steps, ended = [], codes != EDGE
        while not ended.all() and len(steps) < 2 * self.longest:
            state = state.add_input(self.target_vectors(codes))
            codes = self.scores(memory, state.output()[None])[0].argmax(dim=-1)
            steps.append(codes)
            ended |= codes == EDGE
        return self.texts(torch.stack([*steps, torch.full_like(codes, EDGE)]))

    @torch.no_grad()
    def search(self, sources: list[str], beam: int) -> list[str]:
        """Beam search: the likeliest ``beam`` beginnings of each target, in each step one character
        longer, until all have ended; then the likeliest of them."""
        (read, padding), h = self.read(sources)
        first = beam * torch.arange(len(sources))[:, None]  # row of each source's first beginning
        rows = torch.arange(len(sources)).repeat_interleave(beam)
        memory = read[:, rows], padding[rows]
        state = begin(self.decoder, h).select(rows)
        likely = torch.full((len(sources), beam), -torch.inf)
        likely[:, 0] = 0  # they are all the same: one of them goes on
        codes = torch.full((len(rows),), EDGE)
        steps, ended = torch.empty(0, len(rows), dtype=torch.int64), codes != EDGE
        while not ended.all() and len(steps) < 2 * self.longest:
            state = state.add_input(self.target_vectors(codes))
            odds = self.scores(memory, state.output()[None])[0].log_softmax(dim=-1)
            odds[ended] = -torch.inf
            odds[ended, EDGE] = 0  # what has ended stays as it is
            all_odds = (likely[:, :, None] + odds.view(*likely.shape, -1)).flatten(1)
            likely, best = all_odds.topk(beam)
            codes = (best % odds.shape[-1]).flatten()
            rows = (first + best // odds.shape[-1]).flatten()  # the beginning that each goes on
            state = state.select(rows)
            steps, ended = torch.cat((steps[:, rows], codes[None])), ended[rows] | (codes == EDGE)
        end = torch.full((1, len(sources)), EDGE)
        return self.texts(torch.cat((steps[:, ::beam], end)))

    def texts(self, codes: Tensor) -> list[str]:
        """``[T, B]``, each row up to its first EDGE."""
        characters = ["", *self.targets]
        return [
            "".join(characters[code] for code in row[: row.index(EDGE)])
            for row in codes.t().tolist()
        ]


def translate(model: Translator, sources: list[str], beam: int) -> list[str]:
    model.eval()
    parts = (sources[i : i + 200] for i in range(0, len(sources), 200))
    return [t for part in parts for t in (model(part) if beam == 1 else model.search(part, beam))]


def make_parser() -> Parser:
    parser = Parser("seq2seq.py", __doc__)
    parser.group("pairs")
    parser.option("--data", "learn these pairs (default: numbers and words)", metavar="FILE")
    parser.number("--beam", 1, "beginnings of a target that are gone on with; 1: greedy")
    parser.number("--count", 20_000, "how many numbers to draw, if there is no file", 2)
    parser.option("--ask", "translate these in the end", metavar="SOURCE", nargs="+", default=[])

    parser.group("model")
    parser.choice("--backend", "whose layers", *BACKENDS, "both")
    parser.number("--layers", 1, "recurrent layers of encoder and decoder")
    parser.number("--hidden", 64, "units in each direction of the encoder, half the decoder's")
    parser.number("--embed", 32, "size of the vector that stands for a character")

    parser.training("pairs", batch=32, lr=0.004, epochs=5)
    return parser


def run(args: argparse.Namespace) -> None:
    if not all(args.ask):
        raise UserError("--ask: a source must not be empty")
    pairs = read_pairs(args.data) if args.data else number_pairs(args.count, args.seed)
    sides: tuple[list[Pair], list[Pair]] = [], []
    for pair in pairs:
        sides[is_held_out(pair[0])].append(pair)
    training, held_out = sides
    if not all(sides):
        raise UserError(f"{len(pairs)} pairs are too few")
    print(f"data: {len(training):,} pairs for training, {len(held_out):,} held out")
    models = make_models(lambda lib: Translator(lib, training, args), args)
    trained = train(models, training, args)

    sources = [source for source, _ in held_out]
    texts = {name: translate(model, sources, args.beam) for name, model in models.items()}
    exact = {
        name: sum(text == target for text, (_, target) in zip(some, held_out)) / len(held_out)
        for name, some in texts.items()
    }
    first = next(iter(texts))
    for (source, target), text in list(zip(held_out, texts[first]))[:: -(-len(held_out) // 8)]:
        print(f"{source} -> {text}" + ("" if text == target else f"  (not: {target})"))
    if args.ask:
        answers = translate(models[first], args.ask, args.beam)
        print("\n".join(map(" -> ".join, zip(args.ask, answers))))
    report(trained, "held-out exact match", exact)


def main(argv: list[str] | None = None) -> int:
    return execute(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
