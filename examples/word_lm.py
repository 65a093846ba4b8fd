"""A word-level language model: perplexity of a text, and sentences of its own.

  word_lm.py --text novel.txt                              a plain model, some minutes
  word_lm.py --text novel.txt --recipe awd --averaging     with AWD-LSTM's regularisation
  word_lm.py --text novel.txt --backend both               fastrnn and torch.nn on the same batches
  word_lm.py --text novel.txt --checkpoint lm.pt --resume  go on where an earlier run stopped

The recipe is that of Merity et al., "Regularizing and Optimizing LSTM Language Models"
(arXiv:1708.02182): dropout on the recurrent weights, on words, and on inputs and outputs with one
mask for all steps, a penalty on large and on quickly changing activations, and averaged weights.
torch.nn's layers have no weight_dropout: with --backend torch or both, the recipe awd needs
--weight-dropout 0. Needs torch and tqdm, and _common.py beside it.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from itertools import pairwise
from math import exp
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, embedding

from _common import Parser, UserError, execute, make_models, read_text, writable

UNKNOWN, END = "<unk>", "<eos>"
# What --recipe awd sets, where the command line says nothing else.
AWD = {
    "dropout": 0.3,
    "input_dropout": 0.4,
    "output_dropout": 0.4,
    "embedding_dropout": 0.1,
    "weight_dropout": 0.5,
    "alpha": 2.0,
    "beta": 1.0,
}
FIXED = ("layers", "hidden", "embed", "batch", "vocabulary", "backend")  # by a checkpoint


def split(text: str) -> list[str]:
    """Words and punctuation in lower case, and the ends of lines."""
    words: list[str] = []
    for line in text.splitlines():
        found = re.findall(r"\w+(?:'\w+)?|[^\w\s]", line.lower())
        words += [*found, END] if found else []
    return words


def columns(codes: Tensor, batch: int) -> Tensor:
    """[N] cut into `batch` stretches, to be read side by side: [N // batch, batch]."""
    length = len(codes) // batch
    return codes[: length * batch].view(batch, length).t().contiguous()


def lock(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout on [T, B, features] with one mask for all steps."""
    return x * dropout(x.new_ones(1, *x.shape[1:]), p, training) if p and training else x


class WordLM(nn.Module):
    """Embedding, LSTM layers, and scores of all words by the same embedding."""

    def __init__(self, library: ModuleType, words: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.args = args
        self.embedding = nn.Embedding(words, args.embed)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        own = {"weight_dropout": args.weight_dropout} if args.weight_dropout else {}
        sizes = [args.embed, *[args.hidden] * (args.layers - 1), args.embed]
        # Layers of their own, as the last one has the embedding's size.
        self.layers = nn.ModuleList(library.LSTM(a, b, **own) for a, b in pairwise(sizes))
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, codes: Tensor, state: Any = None) -> tuple[Tensor, Tensor, Any]:
        """Words [T, B] to scores [T, B, words], the last layer's outputs, and the states."""
        args, weight = self.args, self.embedding.weight
        if self.training and args.embedding_dropout:  # whole words
            weight = weight * dropout(weight.new_ones(len(weight), 1), args.embedding_dropout)
        x = self._drop(embedding(codes, weight), args.input_dropout)
        finals = []
        for k, layer in enumerate(self.layers):
            if k:
                x = self._drop(x, args.dropout)
            x, final = layer(x, None if state is None else state[k])
            finals.append(final)
        dropped = self._drop(x, args.output_dropout)
        return dropped @ self.embedding.weight.t() + self.bias, x, finals

    def _drop(self, x: Tensor, p: float) -> Tensor:
        if self.args.variational:
            return lock(x, p, self.training)
        return dropout(x, p, self.training)


def score(model: WordLM, data: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
    """Nats per word of predicting data[1:] from data[:-1], the outputs, and the states."""
    scores, output, state = model(data[:-1], state)
    return cross_entropy(scores.flatten(0, 1), data[1:].flatten()), output, state


@torch.no_grad()
def perplexity(model: WordLM, data: Tensor, window: int = 64) -> float:
    """Of data [N, B], in windows that hand on their states."""
    model.eval()
    total, state = 0.0, None
    for start in range(0, len(data) - 1, window):
        part = data[start : start + window + 1]
        nats, _, state = score(model, part, state)
        total += nats.item() * (len(part) - 1)
    return exp(min(50.0, total / (len(data) - 1)))


class Trainer:
    """A model, its optimizer, its place in the data, and the mean of its weights."""

    def __init__(self, model: WordLM, data: Tensor, args: argparse.Namespace) -> None:
        self.model, self.data, self.args = model, data, args
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=args.lr, weight_decay=args.weight_decay
        )
        self.position, self.done, self.state = 0, 0, None
        self.average: dict[str, Tensor] = {}
        self.averaged = 0

    def step(self) -> float:
        """Learns from the next --steps words of each stretch; nats per word."""
        self.model.train()
        end = self.position + self.args.steps
        if end >= len(self.data):
            self.position, self.state, end = 0, None, self.args.steps
        nats, output, state = score(self.model, self.data[self.position : end + 1], self.state)
        loss = nats
        if self.args.alpha:  # activation regularisation: large ones, ...
            loss = loss + self.args.alpha * output.square().mean()
        if self.args.beta:  # ... and those that change quickly
            loss = loss + self.args.beta * (output[1:] - output[:-1]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.optimizer.step()
        self.position, self.done = end, self.done + 1
        self.state = [tuple(s.detach() for s in pair) for pair in state]
        return nats.item()

    def add_to_average(self) -> None:
        self.averaged += 1
        for name, p in self.model.named_parameters():
            mean = self.average.setdefault(name, torch.zeros_like(p))
            mean += (p.detach() - mean) / self.averaged

    def swap(self) -> None:
        """The model's weights and their mean change places."""
        for name, p in self.model.named_parameters() if self.averaged else ():
            p.data, self.average[name] = self.average[name], p.data

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "place": (self.position, self.done, self.state),
            "average": (self.average, self.averaged),
        }

    def load(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.position, self.done, self.state = content["place"]
        self.average, self.averaged = content["average"]


@torch.no_grad()
def write(model: WordLM, vocabulary: list[str], count: int, seed: int) -> str:
    """Words that the model draws one after the other."""
    model.eval()
    dice = torch.Generator().manual_seed(seed)
    word, state, words = torch.tensor([[vocabulary.index(END)]]), None, []
    for _ in range(count):
        scores, _, state = model(word, state)
        scores[..., vocabulary.index(UNKNOWN)] = -torch.inf
        word = torch.multinomial(torch.softmax(scores[-1] / 0.8, -1), 1, generator=dice)
        words.append(vocabulary[int(word)])
    return " ".join(words).replace(f" {END} ", "\n").replace(END, "")


def read(args: argparse.Namespace) -> tuple[list[str], list[Tensor]]:
    """The vocabulary, and the codes for training, validation and test: 80, 10 and 10 percent."""
    words = split(read_text(args.text))
    cuts = [0, len(words) * 8 // 10, len(words) * 9 // 10, len(words)]
    common = Counter(words[: cuts[1]]).most_common(args.vocabulary)
    vocabulary = [UNKNOWN, *sorted({END, *(word for word, _ in common)} - {UNKNOWN})]
    index = {word: i for i, word in enumerate(vocabulary)}
    codes = torch.tensor([index.get(word, 0) for word in words])
    parts = [codes[a:b] for a, b in pairwise(cuts)]
    if min(map(len, parts)) < 2 * args.batch or len(parts[0]) // args.batch <= args.steps:
        raise UserError(f"{len(words):,} words are too few for this --batch and --steps")
    return vocabulary, [columns(part, args.batch) for part in parts]


def run(args: argparse.Namespace) -> None:
    for name, value in AWD.items():
        if getattr(args, name) is None:
            setattr(args, name, value if args.recipe == "awd" else 0.0)
    args.variational = args.recipe == "awd"
    if args.backend != "fastrnn" and args.weight_dropout:
        raise UserError("--weight-dropout: torch.nn.LSTM has none")
    for file in (args.checkpoint, args.losses):
        writable(file)
    vocabulary, (training, validation, test) = read(args)
    print(f"text: {training.numel():,} words for training, {len(vocabulary):,} different ones")
    models = make_models(lambda library: WordLM(library, len(vocabulary), args), args)
    trainers = {name: Trainer(model, training, args) for name, model in models.items()}
    fixed = {name: getattr(args, name) for name in FIXED}
    if args.resume:
        if args.checkpoint is None:
            raise UserError("--resume needs --checkpoint FILE")
        try:
            content = torch.load(args.checkpoint, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--resume: {error}") from None
        if content["fixed"] != fixed or content["words"] != vocabulary:
            raise UserError("--resume: the checkpoint is of another text or model")
        torch.set_rng_state(content["random"])
        for name, trainer in trainers.items():
            trainer.load(content["trainers"][name])

    losses: dict[str, list[float]] = {name: [] for name in trainers}
    seconds = dict.fromkeys(trainers, 0.0)
    first = next(iter(trainers.values()))
    per_epoch = max(1, (len(training) - 1) // args.steps)
    while first.done < args.epochs * per_epoch:
        random = torch.get_rng_state()
        for name, trainer in trainers.items():
            torch.set_rng_state(random)  # the same dropout for each
            began = time.perf_counter()
            losses[name].append(trainer.step())
            seconds[name] += time.perf_counter() - began
        if first.done % per_epoch == 0:
            for name, trainer in trainers.items():
                if args.averaging and first.done >= args.epochs * per_epoch // 2:
                    trainer.add_to_average()
                trainer.swap()
                found = perplexity(trainer.model, validation)
                trainer.swap()
                speed = len(losses[name]) * args.steps * args.batch / seconds[name]
                epoch = first.done // per_epoch
                line = f"epoch {epoch}, {name}: validation perplexity {found:.1f}"
                print(f"{line}, {speed:,.0f} words/s", flush=True)
            if args.checkpoint:
                content = {name: t.content() for name, t in trainers.items()}
                state = {"trainers": content, "fixed": fixed, "words": vocabulary}
                new = Path(f"{args.checkpoint}.new")  # takes the old one's name when it is whole
                torch.save(state | {"random": torch.get_rng_state()}, new)
                new.replace(args.checkpoint)

    for name, trainer in trainers.items():
        trainer.swap()
        print(f"{name}: test perplexity {perplexity(trainer.model, test):.2f}")
    if args.losses:
        rows = [",".join(["step", *losses])]
        rows += [f"{i},{','.join(map(str, row))}" for i, row in enumerate(zip(*losses.values()))]
        Path(args.losses).write_text("\n".join(rows) + "\n")
    if args.write:
        print("\n" + write(first.model, vocabulary, args.write, args.seed))


def make_parser() -> Parser:
    parser = Parser("word_lm.py", __doc__)

    def regulariser(name: str, help: str, high: float = 1.0) -> None:
        def number(text: str) -> float:
            if not 0 <= (value := float(text)) < high:
                raise argparse.ArgumentTypeError(f"{text} is not in [0, {high})")
            return value

        parser.option(name, f"{help} (default: the recipe's)", type=number, metavar="N")

    parser.group("text")
    parser.option("--text", "UTF-8 text to learn", metavar="FILE", required=True)
    parser.number("--vocabulary", 8000, "different words at most; the others are unknown")
    parser.number("--batch", 32, "stretches of the text that are read side by side")
    parser.number("--steps", 35, "words that a gradient flows back through")
    parser.group("model")
    parser.choice("--backend", "whose layers", "fastrnn", "torch", "both")
    parser.number("--layers", 2, "LSTM layers")
    parser.number("--hidden", 256, "units of each layer but the last")
    parser.number("--embed", 128, "size of the vector that stands for a word")
    parser.group("regularisation")
    parser.choice("--recipe", "values of what follows", "plain", "awd")
    regulariser("--dropout", "between layers")
    regulariser("--input-dropout", "on the embedded words")
    regulariser("--output-dropout", "on the last layer's output")
    regulariser("--embedding-dropout", "on whole words")
    regulariser("--weight-dropout", "on the recurrent weights")
    regulariser("--alpha", "penalty on large activations", 1e9)
    regulariser("--beta", "penalty on activations that change", 1e9)
    parser.option("--averaging", "mean of the weights after each later epoch", action="store_true")
    parser.number("--weight-decay", 1e-6, "of Adam", 0, 1)
    parser.group("training")
    parser.number("--epochs", 8, "times that the text is read, earlier runs included")
    parser.number("--lr", 0.003, "Adam's learning rate", 0, 10)
    parser.number("--clip", 0.5, "largest norm of the gradient", 0)
    parser.number("--seed", 0, "seed of all random numbers", 0, 2**63)
    parser.group("files")
    parser.option("--checkpoint", "save the training here after each epoch", metavar="FILE")
    parser.option("--resume", "continue from there", action="store_true")
    parser.option("--losses", "write the loss of each step as CSV", metavar="FILE")
    parser.group("sample")
    parser.number("--write", 60, "words to write in the end", 0)
    return parser


def main(argv: list[str] | None = None) -> int:
    return execute(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
