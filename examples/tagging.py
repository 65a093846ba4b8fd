"""Part-of-speech tagging: learns from tagged sentences which word is a noun, a verb, and so on.

  tagging.py --train en_ewt-ud-train.conllu --test en_ewt-ud-test.conllu
  tagging.py --train dev.conllu --test test.conllu --hidden 256 --dropout 0.6 --minutes 5

The files are CoNLL-U, as on universaldependencies.org. A word goes in as a vector of its own and
as what an LSTM read in its characters; two bidirectional LSTM layers read the sentence.
--backend torch runs the same program on torch.nn: the same numbers at another speed; --backend
both compares them. Needs torch and tqdm, and _common.py beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
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
)

Sentence: TypeAlias = "list[tuple[str, str]]"  # words with their tags

WORD, TAG = 1, 3  # columns of CoNLL-U: FORM and UPOS
NO_TAG = -1  # of what stands behind a sentence's end, or of a tag that training has not seen


def read_sentences(file: str) -> list[Sentence]:
    sentences: list[Sentence] = [[]]
    for number, line in enumerate(read_text(file).split("\n"), 1):
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


class Tagger(nn.Module):
    """Word and character inputs, recurrent layers over the sentence, and scores for each tag."""

    def __init__(
        self, library: ModuleType, training: list[Sentence], args: argparse.Namespace
    ) -> None:
        super().__init__()
        counts = Counter(word.lower() for sentence in training for word, _ in sentence)
        self.words = numbered(counts)
        self.characters = numbered(char for s in training for word, _ in s for char in word)
        self.tags = sorted({tag for sentence in training for _, tag in sentence})
        # The rarer a word, the more often it is hidden, so that the model learns to do without.
        hide = [0.0, *(args.hide / (args.hide + counts[word]) for word in self.words)]
        self.register_buffer("hide", torch.tensor(hide))

        self.word_vectors = nn.Embedding(1 + len(self.words), args.embed)
        self.character_vectors = nn.Embedding(1 + len(self.characters), args.char_embed)
        self.speller = library.LSTM(args.char_embed, args.char_hidden, bidirectional=True)
        width = args.embed + 2 * args.char_hidden
        self.reader = library.LSTM(width, args.hidden, args.layers, bidirectional=True)
        self.head = nn.Linear(2 * args.hidden, len(self.tags))
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, sentences: list[list[str]]) -> Tensor:
        """Scores ``[T, B, len(self.tags)]``, T words in the longest sentence."""
        different = numbered(word for sentence in sentences for word in sentence)
        spelt = [
            torch.tensor([self.characters.get(char, 0) for char in word]) for word in different
        ]
        letters = self.character_vectors(pad_sequence(spelt))
        _, (h, _) = ragged(self.speller, letters, [len(word) for word in different])
        spellings = torch.cat((h[-2], h[-1]), dim=1)

        rows = [[(self.words.get(w.lower(), 0), different[w] - 1) for w in s] for s in sentences]
        words, places = pad_sequence([torch.tensor(row) for row in rows]).unbind(-1)
        if self.training:
            words = words.masked_fill(torch.rand(words.shape) < self.hide[words], 0)
        x = torch.cat((self.word_vectors(words), spellings[places]), dim=-1)
        output, _ = ragged(self.reader, self.dropout(x), [len(s) for s in sentences])
        return self.head(self.dropout(output))

    def targets(self, sentences: list[Sentence]) -> Tensor:
        """The tags' numbers ``[T, B]``."""
        number = {tag: i for i, tag in enumerate(self.tags)}
        rows = [torch.tensor([number.get(tag, NO_TAG) for _, tag in s]) for s in sentences]
        return pad_sequence(rows, padding_value=NO_TAG)

    def loss(self, batch: list[Sentence]) -> Tensor:
        """The mean over real words only: what stands behind a sentence's end has NO_TAG."""
        scores, tags = self(untagged(batch)), self.targets(batch)
        return cross_entropy(scores.flatten(0, 1), tags.flatten(), ignore_index=NO_TAG)


def untagged(sentences: list[Sentence]) -> list[list[str]]:
    return [[word for word, _ in sentence] for sentence in sentences]


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


def make_parser() -> Parser:
    parser = Parser("tagging.py", __doc__)
    parser.group("files")
    parser.option("--train", "tagged sentences to learn from", metavar="FILE", required=True)
    parser.option("--test", "tagged sentences to be tested with", metavar="FILE", required=True)

    parser.group("model")
    parser.choice("--backend", "whose layers", *BACKENDS, "both")
    parser.number("--layers", 2, "recurrent layers over the sentence")
    parser.number("--hidden", 128, "units in each direction of such a layer")
    parser.number("--embed", 100, "size of the vector that stands for a word")
    parser.number("--char-hidden", 50, "units in each direction of the layer over characters")
    parser.number("--char-embed", 32, "size of the vector that stands for a character")
    help = "share of activations dropped before and after the layers"
    parser.number("--dropout", 0.5, help, 0, 1)
    parser.number("--hide", 0.5, "of the words seen c times, N / (N + c) are hidden in training", 0)

    parser.training("sentences", batch=16, lr=0.004, epochs=10)
    return parser


def run(args: argparse.Namespace) -> None:
    training, test = read_sentences(args.train), read_sentences(args.test)
    words, tags = ({pair[i] for sentence in training for pair in sentence} for i in (0, 1))
    print(
        f"data: {len(training):,} sentences for training, {len(test):,} for the test; "
        f"{len(words):,} different words, {len(tags)} tags"
    )
    models = make_models(lambda lib: Tagger(lib, training, args), args)
    trained = train(models, training, args)

    results = {name: evaluate(model, test) for name, model in models.items()}
    print(f"{'tag':6}  words  right")
    for tag, (count, right) in next(iter(results.values())).items():
        print(f"{tag:6} {count:6} {right / count:6.1%}")
    totals = {name: map(sum, zip(*result.values())) for name, result in results.items()}
    accuracy = {name: right / count for name, (count, right) in totals.items()}
    report(trained, "test accuracy", accuracy)


def main(argv: list[str] | None = None) -> int:
    return execute(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
