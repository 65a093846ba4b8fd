"""A character language model: reads a text, learns to predict its next character, then writes.

  char_lm.py                                     two minutes on Python's standard library
  char_lm.py --text novel.txt --cell lstm --layers 2 --hidden 512 --dropout 0.2 --minutes 60
  char_lm.py --checkpoint lm.pt --max-steps 9000             stop it with Ctrl-C at any time ...
  char_lm.py --checkpoint lm.pt --max-steps 9000 --resume    ... and go on, bit for bit
  torchrun --nproc-per-node 2 char_lm.py --batch 64          two processes with half the batch each

With --backend torch the same program runs on torch.nn: the same losses at another speed. torchrun
shares the batch out over its processes: the same losses again, and a checkpoint fits any number
of them. Needs torch and tqdm, and _common.py beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Callable
from math import isfinite, log
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import _common
from _common import BACKENDS, Parser, UserError, begin, library, writable

State: TypeAlias = "Tensor | tuple[Tensor, Tensor]"  # h, or (h, c) of LSTM

RANK = int(os.environ.get("RANK", 0))  # torchrun says which of how many processes this is
WORLD = int(os.environ.get("WORLD_SIZE", 1))
works: deque[Any] = deque(maxlen=9)

STDLIB_LIMIT = 4_000_000  # characters of the default text
LR_DECAY = 300  # the learning rate falls with 1 / sqrt(1 + step / 300)
HELD_OUT = 20  # the last 1/20 of the text is for validation
SHAPE = ("cell", "layers", "hidden", "embed", "batch")  # options that a checkpoint fixes
THIS_RUN = ("checkpoint", "resume", "losses", "minutes", "max_steps")  # ... and those it omits


def say(line: str) -> None:
    if RANK == 0:
        tqdm.write(line)  # print, but above the progress bar
        sys.stdout.flush()


def together(operation: Callable[..., Any], *args: Any) -> None:
    """Runs a collective operation of torch.distributed."""
    work = operation(*args, async_op=True)
    work.wait()
    # Kept for a while: a process may crash at its end when torch's threads are the last to hold
    # the tensors.
    works.append(work)


def average(value: float) -> float:
    """The mean of all processes' values."""
    if WORLD == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    together(dist.all_reduce, total)
    return total.item() / WORLD


def own(whole: Tensor, dim: int) -> Tensor:
    """This process's part of a tensor that is shared out along ``dim``."""
    return whole.chunk(WORLD, dim)[RANK].contiguous()


def gather(part: Tensor, dim: int) -> Tensor:
    """The tensor of which ``part`` is this process's ``own``."""
    if WORLD == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(WORLD)]
    together(dist.all_gather, parts, part)
    return torch.cat(parts, dim)


def read_text(file: str | None) -> str:
    """The contents of ``file``, or of the standard library's modules one after another."""
    if file is None:
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return "".join(m.read_text("utf-8", "replace") for m in modules)[:STDLIB_LIMIT]
    return _common.read_text(file)


def encode(text: str, vocabulary: str) -> Tensor:
    """Each character as its index in ``vocabulary``, ``[len(text)]``."""
    index = {char: i for i, char in enumerate(vocabulary)}
    return torch.tensor([index[char] for char in text], dtype=torch.int64)


def streams(codes: Tensor, batch: int) -> Tensor:
    """``[N]`` cut into ``batch`` stretches, to be read side by side: ``[N // batch, batch]``."""
    length = len(codes) // batch
    return codes[: length * batch].view(batch, length).t().contiguous()


class CharLM(nn.Module):
    """Embedding, recurrent layers, and a linear layer that scores each possible next character."""

    def __init__(self, vocabulary: str, args: argparse.Namespace) -> None:
        super().__init__()
        layers = getattr(library(args.backend), args.cell.upper())
        between = args.dropout if args.layers > 1 else 0.0
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(len(vocabulary), args.embed)
        self.rnn = layers(args.embed, args.hidden, args.layers, dropout=between)
        self.head = nn.Linear(args.hidden, len(vocabulary))
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, chars: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Characters ``[T, B]`` to scores ``[T, B, len(vocabulary)]`` and the state after them."""
        hidden, state = self.rnn(self.dropout(self.embedding(chars)), state)
        return self.head(self.dropout(hidden)), state


def predict(model: nn.Module, chars: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """Bits per character of predicting ``chars[1:]`` from ``chars[:-1]``, and the state."""
    scores, state = model(chars[:-1], state)
    return cross_entropy(scores.flatten(0, 1), chars[1:].flatten()) / log(2), state


@torch.no_grad()
def evaluate(model: CharLM, data: Tensor, window: int = 256) -> float:
    """Bits per character of all processes' ``data [N, B]``, read in windows to bound the memory."""
    model.eval()
    total, state = 0.0, None
    for start in range(0, len(data) - 1, window):
        chars = data[start : start + window + 1]
        loss, state = predict(model, chars, state)
        total += loss.item() * (len(chars) - 1)
    return average(total / (len(data) - 1))


@torch.no_grad()
def sample(model: CharLM, prime: str, length: int, temperature: float, seed: int) -> str:
    """``prime`` and the ``length`` characters that the model writes after it."""
    model.eval()
    dice = torch.Generator().manual_seed(seed)  # its own, so as not to disturb the training's
    text, chars, state = prime, encode(prime, model.vocabulary), begin(model.rnn)
    for _ in range(length):
        for char in chars:
            state = state.add_input(model.embedding(char)[None])
        scores = model.head(state.output())
        odds = torch.softmax(scores / max(temperature, 1e-6), dim=-1)
        chars = torch.multinomial(odds, 1, generator=dice)[0]
        text += model.vocabulary[int(chars)]
    return text


def each(function: Callable[[Tensor], Tensor], state: State | None) -> State | None:
    """The state with ``function`` applied to its tensors."""
    if isinstance(state, tuple):
        return function(state[0]), function(state[1])
    return None if state is None else function(state)


class Trainer:
    """A model, its optimizer and its place in the data ``[N, B]``: what a checkpoint must hold."""

    def __init__(self, model: CharLM, data: Tensor, args: argparse.Namespace) -> None:
        self.model, self.data, self.args = model, data, args
        self.parallel = DistributedDataParallel(model) if WORLD > 1 else model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
        self.done = 0  # steps so far
        self.position = 0  # row of data where the next step starts
        self.state: State | None = None  # what the rows before it left in the recurrent layers

    def step(self) -> float:
        """Learns from the next ``args.steps`` rows of data; returns their bits per character."""
        self.model.train()
        self.optimizer.param_groups[0]["lr"] = self.args.lr / (1 + self.done / LR_DECAY) ** 0.5
        end = self.position + self.args.steps
        if end >= len(self.data):
            self.position, self.state, end = 0, None, self.args.steps
        chars = self.data[self.position : end + 1]
        loss, state = predict(self.parallel, chars, self.state)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.optimizer.step()
        # Without its history: here backpropagation through time is truncated.
        self.position, self.state = end, each(Tensor.detach, state)
        self.done += 1
        return average(loss.item())

    def save(self, file: str, digest: str) -> None:
        content = {
            "args": {k: v for k, v in vars(self.args).items() if k not in THIS_RUN},
            "digest": digest,
            "vocabulary": self.model.vocabulary,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "position": self.position,
            "state": each(lambda part: gather(part, 1), self.state),
            "rng": gather(torch.get_rng_state(), 0),
        }
        if RANK > 0:
            return
        new = Path(f"{file}.new")  # takes the old one's name when it is whole
        with new.open("wb") as out:
            torch.save(content, out)
        new.replace(file)

    def load(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.done, self.position = content["done"], content["position"]
        self.state = each(lambda whole: own(whole, 1), content["state"])
        rngs = content["rng"].split(len(torch.get_rng_state()))
        if RANK < len(rngs):  # a process that the checkpoint does not know keeps its new one
            torch.set_rng_state(rngs[RANK].clone())  # torch misreads a view


def load_checkpoint(file: str) -> dict[str, Any]:
    with Path(file).open("rb") as source:
        try:
            content = torch.load(source, weights_only=True)
        except Exception:  # every kind of damage has its own
            content = None
    if not isinstance(content, dict) or not {"args", "digest", "done"} <= content.keys():
        raise UserError(f"{file} is not a checkpoint of this program")
    return content


def train(trainer: Trainer, check: Callable[[], None]) -> tuple[list[float], bool]:
    """Trains until the budget is spent or Ctrl-C; returns the losses and whether it was Ctrl-C."""
    args, interrupted = trainer.args, False
    losses: list[float] = []
    start, busy, printed = time.monotonic(), 0.0, 0.0
    budget = args.minutes * 60 if args.max_steps is None else args.max_steps

    def spent() -> float:
        return time.monotonic() - start if args.max_steps is None else trainer.done

    def interrupt(*_: object) -> None:  # lets the step finish: half of one must not be saved
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once

    layout = "{percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}"
    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        # disable=None: no bar without a terminal, but a line every ten seconds
        hidden = None if RANK == 0 else True
        with tqdm(total=budget, initial=spent(), bar_format=layout, disable=hidden) as bar:
            while average(spent() < budget and not interrupted) == 1:  # all stop when one does
                if losses and trainer.done % args.every == 0:
                    check()
                busy -= time.monotonic()
                losses.append(trainer.step())
                busy += time.monotonic()
                recent = losses[-50:]
                speed = len(losses) * args.batch * args.steps / busy
                news = f"{sum(recent) / len(recent):.3f} bits/char, {speed:,.0f} chars/s"
                bar.set_postfix_str(news, refresh=False)
                bar.update(min(spent(), budget) - bar.n)
                if bar.disable and busy > printed + 10:
                    say(f"step {trainer.done}: {news}")
                    printed = busy
    finally:
        signal.signal(signal.SIGINT, previous)
    return losses, interrupted


def make_parser() -> Parser:
    parser = Parser("char_lm.py", __doc__)
    parser.group("text")
    help = "UTF-8 text to learn (default: Python's standard library)"
    parser.option("--text", help, metavar="FILE")
    parser.number("--batch", 32, "stretches of the text that are read side by side")
    parser.number("--steps", 64, "characters that a gradient flows back through")

    parser.group("model")
    parser.choice("--backend", "whose layers", *BACKENDS)
    parser.choice("--cell", "kind of layer", "gru", "lstm", "rnn")
    parser.number("--layers", 1, "recurrent layers")
    parser.number("--hidden", 256, "units in each recurrent layer")
    parser.number("--embed", 64, "size of the vector that stands for a character")
    parser.number("--dropout", 0.0, "share of activations dropped before each layer", 0, 1)

    parser.group("training")
    parser.number("--lr", 0.003, "Adam's learning rate in the beginning", 0, 10)
    parser.number("--clip", 1.0, "largest norm of the gradient; a larger one is scaled down", 0)
    parser.number("--seed", 0, "seed of all random numbers", 0, 2**63)
    parser.either()
    parser.number("--minutes", 2.0, "train for this time", 0)
    help = "... or up to this step, earlier runs included"
    parser.option("--max-steps", help, type=int, metavar="N")

    parser.group("files")
    parser.option("--checkpoint", "save the training here, after each validation", metavar="FILE")
    help = "continue from there, with its options or new ones"
    parser.option("--resume", help, action="store_true")
    parser.number("--every", 500, "steps from one validation to the next")
    parser.option("--losses", "write the loss of each step of this run as CSV", metavar="FILE")

    parser.group("sample")
    parser.number("--sample", 500, "characters to write in the end", 0)
    help = "0: always the likeliest character; 1: as often as learnt"
    parser.number("--temperature", 0.7, help, 0)
    parser.option("--prime", "text that the sample continues (default: a new line)", metavar="TEXT")
    return parser


def run(args: argparse.Namespace, saved: dict[str, Any] | None) -> int:
    if args.batch % WORLD:
        raise UserError(f"--batch {args.batch} cannot be shared out over {WORLD} processes")
    for file in (args.checkpoint, args.losses):
        writable(file)
    text = read_text(args.text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if saved and saved["digest"] != digest:
        raise UserError(f"{args.checkpoint} comes from another text")
    vocabulary = "".join(sorted(set(text)))
    codes = encode(text, vocabulary)
    held_out = len(codes) // HELD_OUT
    training = own(streams(codes[: len(codes) - held_out], args.batch), 1)
    validation = own(streams(codes[len(codes) - held_out :], args.batch), 1)
    if len(training) <= args.steps or len(validation) < 2:
        raise UserError(f"{len(text):,} characters are too few for this --batch and --steps")
    prime = args.prime or ("\n" if "\n" in vocabulary else text[0])
    if strange := sorted(set(prime) - set(vocabulary)):
        raise UserError(f"--prime: the text has no {strange[0]!r}")

    torch.manual_seed(args.seed)
    model = CharLM(vocabulary, args)
    if RANK > 0:  # the same weights everywhere, but each its own dropout
        torch.manual_seed(args.seed + RANK)
    trainer = Trainer(model, training, args)
    if saved:
        trainer.load(saved)
    weights = sum(p.numel() for p in model.parameters())
    say(f"text: {len(text):,} characters, {len(vocabulary)} different ones")
    say(f"model: {args.layers} x {args.hidden} {args.cell} of {args.backend}, {weights:,} weights")

    def check() -> None:
        bits = evaluate(model, validation)
        if not isfinite(bits):  # before it replaces a good checkpoint
            raise UserError(f"validation gives {bits} bits/char at step {trainer.done}: lower --lr")
        say(f"step {trainer.done}: validation {bits:.3f} bits/char")
        if args.checkpoint:
            trainer.save(args.checkpoint, digest)

    first = trainer.done + 1
    losses, interrupted = train(trainer, check)
    check()
    if args.losses and RANK == 0:
        rows = (f"{step},{bits}\n" for step, bits in enumerate(losses, first))
        Path(args.losses).write_text("step,bits_per_char\n" + "".join(rows))
    if args.sample and RANK == 0:
        say("\n" + sample(model, prime, args.sample, args.temperature, args.seed))
    return 130 if interrupted else 0


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        saved = None
        if args.resume:
            if not args.checkpoint:
                raise UserError("--resume needs --checkpoint FILE")
            saved = load_checkpoint(args.checkpoint)
            parser.set_defaults(**saved["args"])
            args = parser.parse_args(argv)
            for key in SHAPE:
                if (value := getattr(args, key)) != saved["args"][key]:
                    raise UserError(f"--{key} {value}: the checkpoint has {saved['args'][key]}")
        if WORLD > 1:
            dist.init_process_group("gloo")
        return run(args, saved)
    except (UserError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
