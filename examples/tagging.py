"""Part-of-speech tagging: learns from tagged sentences which word is a noun, a verb, and so on.

  tagging.py --train en_ewt-ud-train.conllu --test en_ewt-ud-test.conllu
  tagging.py --train dev.conllu --test test.conllu --hidden 256 --dropout 0.6 --minutes 5

The files are CoNLL-U, as on universaldependencies.org. A word goes in as a vector of its own and
as what an LSTM read in its characters; two bidirectional LSTM layers read the sentence. With
--backend torch the same program runs on torch.nn: the same numbers at another speed. Needs torch
and tqdm.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from math import inf
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from tqdm import tqdm

Sentence: TypeAlias = "list[tuple[str, str]]"  # words with their tags

BACKENDS = {"fastrnn": "fastrnn", "torch": "torch.nn"}  # modules that define LSTM
WORD, TAG = 1, 3  # columns of CoNLL-U: FORM and UPOS
NO_TAG = -1  # of what stands behind a sentence's end, or of a tag that training has not seen


class UserError(Exception):
    """What the user can put right: ends the program with one line and no traceback."""


def read_sentences(file: str) -> list[Sentence]:
    sentences: list[Sentence] = [[]]
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text") from error
    for number, line in enumerate(text.split("\n"), 1):
        columns = line.rstrip("\r").split("\t")
        if columns == [""]:
            sentences.append([])
        # Neither a comment, nor what is no word: 3-4 for a word that is two, 5.1 for one left out.
        elif not line.startswith("#"):
            if len(columns) != 10 or not columns[WORD]:
                raise UserError(f"{file}, line {number}: expected 10 columns, none of them empty")
            if columns[0].isdecimal():
                sentences[-1].append((columns[WORD], columns[TAG]))
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise UserError(f"{file}: no sentences")
    return sentences


def numbered(items: Iterable[str]) -> dict[str, int]:
    """A number for each different item; 0 is for any other."""
    return {item: number for number, item in enumerate(sorted(set(items)), 1)}


def read(rnn: nn.Module, x: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Outputs and the last layer's final h, of rows ``x [T, B, I]`` of different lengths."""
    if isinstance(rnn, nn.LSTM):
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        packed_output, (h, _) = rnn(packed)
        output, _ = pad_packed_sequence(packed_output)
    else:
        output, (h, _) = rnn(x, lengths=lengths)
    return output, torch.cat((h[-2], h[-1]), dim=1)


class Tagger(nn.Module):
    """Word and character inputs, recurrent layers over the sentence, and scores for each tag."""

    def __init__(self, training: list[Sentence], args: argparse.Namespace) -> None:
        super().__init__()
        try:
            LSTM = importlib.import_module(BACKENDS[args.backend]).LSTM
        except (ImportError, RuntimeError) as error:
            raise UserError(f"--backend {args.backend} cannot be imported: {error}") from error
        counts = Counter(word.lower() for sentence in training for word, _ in sentence)
        self.words = numbered(counts)
        self.characters = numbered(char for s in training for word, _ in s for char in word)
        self.tags = sorted({tag for sentence in training for _, tag in sentence})
        # The rarer a word, the more often it is hidden, so that the model learns to do without.
        hide = [0.0, *(args.hide / (args.hide + counts[word]) for word in self.words)]
        self.register_buffer("hide", torch.tensor(hide))

        self.word_vectors = nn.Embedding(1 + len(self.words), args.embed)
        self.character_vectors = nn.Embedding(1 + len(self.characters), args.char_embed)
        self.speller = LSTM(args.char_embed, args.char_hidden, bidirectional=True)
        width = args.embed + 2 * args.char_hidden
        self.reader = LSTM(width, args.hidden, args.layers, bidirectional=True)
        self.head = nn.Linear(2 * args.hidden, len(self.tags))
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, sentences: list[list[str]]) -> Tensor:
        """Scores ``[T, B, len(self.tags)]``, T words in the longest sentence."""
        different = numbered(word for sentence in sentences for word in sentence)
        spelt = [
            torch.tensor([self.characters.get(char, 0) for char in word]) for word in different
        ]
        letters = self.character_vectors(pad_sequence(spelt))
        _, spellings = read(self.speller, letters, [len(word) for word in different])

        rows = [[(self.words.get(w.lower(), 0), different[w] - 1) for w in s] for s in sentences]
        words, places = pad_sequence([torch.tensor(row) for row in rows]).unbind(-1)
        if self.training:
            words = words.masked_fill(torch.rand(words.shape) < self.hide[words], 0)
        x = torch.cat((self.word_vectors(words), spellings[places]), dim=-1)
        output, _ = read(self.reader, self.dropout(x), [len(sentence) for sentence in sentences])
        return self.head(self.dropout(output))

    def targets(self, sentences: list[Sentence]) -> Tensor:
        """The tags' numbers ``[T, B]``."""
        number = {tag: i for i, tag in enumerate(self.tags)}
        rows = [torch.tensor([number.get(tag, NO_TAG) for _, tag in s]) for s in sentences]
        return pad_sequence(rows, padding_value=NO_TAG)


def untagged(sentences: list[Sentence]) -> list[list[str]]:
    return [[word for word, _ in sentence] for sentence in sentences]


def batches(sentences: list[Sentence], size: int, seed: int) -> Iterator[list[Sentence]]:
    """The sentences in a new order, for ever; the last few of each pass make no batch."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(sentences))
    while True:
        order = torch.randperm(len(sentences), generator=generator).tolist()
        for start in range(0, len(sentences) - size + 1, size):
            yield [sentences[i] for i in order[start : start + size]]


def train(model: Tagger, sentences: list[Sentence], args: argparse.Namespace) -> list[float]:
    """Trains until the budget is spent, with a falling learning rate; returns the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    stream = batches(sentences, args.batch, args.seed)
    losses: list[float] = []
    start = time.monotonic()
    steps = args.epochs * max(1, len(sentences) // args.batch)
    budget = args.minutes * 60 or steps

    def spent() -> float:
        return time.monotonic() - start if args.minutes else len(losses)

    model.train()
    layout = "{percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=budget, bar_format=layout, disable=None) as bar:  # None: on a terminal
        while (now := spent()) < budget or not losses:
            optimizer.param_groups[0]["lr"] = args.lr * max(0, 1 - now / budget)
            batch = next(stream)
            scores, tags = model(untagged(batch)), model.targets(batch)
            # Over real words only: what stands behind a sentence's end has NO_TAG.
            loss = cross_entropy(scores.flatten(0, 1), tags.flatten(), ignore_index=NO_TAG)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
            bar.update(min(spent(), budget) - bar.n)
    return losses


@torch.no_grad()
def evaluate(model: Tagger, sentences: list[Sentence]) -> dict[str, tuple[int, int]]:
    """For each tag how many words have it, and how many of these got it."""
    model.eval()
    words: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for start in range(0, len(sentences), 100):
        some = sentences[start : start + 100]
        guesses = model(untagged(some)).argmax(dim=-1).t().tolist()
        for sentence, row in zip(some, guesses):
            for (_, tag), guess in zip(sentence, row):  # which ends with the sentence
                words[tag] += 1
                right[tag] += model.tags[guess] == tag
    return {tag: (count, right[tag]) for tag, count in words.most_common()}


def make_parser() -> argparse.ArgumentParser:
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("tagging.py", description=summary, epilog=examples)
    parser.usage = argparse.SUPPRESS  # an error then is one line
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def option(name: str, help: str, **how: Any) -> None:
        group.add_argument(name, help=help, **how)

    def number(name: str, default: float, help: str, low: float = 1, high: float = inf) -> None:
        """An option for a number of the default's type in ``[low, high)``."""

        def parse(text: str) -> float:
            value = type(default)(text)
            if not low <= value < high:
                raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")
            return value

        parse.__name__ = type(default).__name__  # for argparse's "invalid int value"
        option(name, f"{help} (default: {default})", type=parse, default=default, metavar="N")

    group = parser.add_argument_group("files")
    option("--train", "tagged sentences to learn from", metavar="FILE", required=True)
    option("--test", "tagged sentences to be tested with", metavar="FILE", required=True)

    group = parser.add_argument_group("model")
    option("--backend", "whose layers (default: fastrnn)", choices=[*BACKENDS], default="fastrnn")
    number("--layers", 2, "recurrent layers over the sentence")
    number("--hidden", 128, "units in each direction of such a layer")
    number("--embed", 100, "size of the vector that stands for a word")
    number("--char-hidden", 50, "units in each direction of the layer over a word's characters")
    number("--char-embed", 32, "size of the vector that stands for a character")
    number("--dropout", 0.5, "share of activations dropped before and after the layers", 0, 1)
    number("--hide", 0.5, "of the words seen c times, N / (N + c) are hidden in training", 0)

    group = parser.add_argument_group("training")
    number("--batch", 16, "sentences in a batch")
    number("--lr", 0.004, "Adam's learning rate in the beginning; in the end it is 0", 0, 10)
    number("--seed", 0, "seed of all random numbers", 0, 2**63)
    group = group.add_mutually_exclusive_group()
    number("--epochs", 10, "train so many times on each sentence")
    number("--minutes", 0.0, "... or for this time, if it is not 0", 0)
    return parser


def run(args: argparse.Namespace) -> None:
    training, test = read_sentences(args.train), read_sentences(args.test)
    torch.manual_seed(args.seed)
    model = Tagger(training, args)
    weights = sum(p.numel() for p in model.parameters())
    print(
        f"data: {len(training):,} sentences for training, {len(test):,} for the test; "
        f"{len(model.words):,} words, {len(model.characters)} characters, {len(model.tags)} tags"
    )
    print(f"model: {args.layers} x {args.hidden} LSTM of {args.backend}, {weights:,} weights")

    start = time.monotonic()
    losses = train(model, training, args)
    seconds = time.monotonic() - start
    result = evaluate(model, test)
    print(f"trained: {len(losses):,} steps in {seconds:.1f} seconds, last loss {losses[-1]:.6f}")
    print(f"{'tag':6}  words  right")
    for tag, (words, right) in result.items():
        print(f"{tag:6} {words:6} {right / words:6.1%}")
    words, right = map(sum, zip(*result.values()))
    print(f"test accuracy: {right / words:.2%}")


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
