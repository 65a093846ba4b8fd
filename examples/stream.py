"""Streaming: a small denoiser that takes audio in blocks, as they come from a microphone.

  stream.py                                blocks of 64 samples, 4 ms at 16 kHz
  stream.py --block 16 --seconds 60        ... shorter blocks, for a longer time
  stream.py --backend both                 the same on torch.nn, carrying hx by hand

It learns chords in noise, whole sequences at once, and is then frozen and given a stream block by
block. It prints by how much the noise falls, and what each block took: percentiles of the latency,
and the real-time factor, the time it took for a second of audio. Needs torch and tqdm, and
_common.py beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from math import log10, pi
from types import ModuleType

import torch
from torch import Tensor, nn

from _common import BACKENDS, Parser, UserError, begin, execute, make_models, train

RATE = 16_000  # samples a second
NOISE = 0.3  # its standard deviation; a chord has about 0.5
TRAINED = 0.5  # seconds of each sequence in training
PERCENTILES = (50, 90, 99, 99.9)
WARM_UP = 200  # blocks before the clock starts


def chords(count: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Chords of three tones, each with its loudness rising and falling: clean and noisy, both
    ``[count, samples]``."""
    dice = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 3, 1, generator=dice)

    t = torch.arange(samples) / RATE
    tones = torch.sin(2 * pi * (draw(100, 1200) * t + draw(0, 1)))
    loudness = 0.4 + 0.2 * torch.sin(2 * pi * (draw(1, 4) * t + draw(0, 1)))
    clean = (tones * loudness).sum(1)
    return clean, clean + NOISE * torch.randn(clean.shape, generator=dice)


class Denoiser(nn.Module):
    """A block of noisy samples in, the block of clean ones out."""

    def __init__(self, library: ModuleType, args: argparse.Namespace) -> None:
        super().__init__()
        self.block = args.block
        self.rnn = library.LSTM(args.block, args.hidden, args.layers)
        self.head = nn.Linear(args.hidden, args.block)

    def forward(self, noisy: Tensor) -> Tensor:
        """``[B, samples]``, all at once."""
        blocks = noisy.unflatten(1, (-1, self.block)).transpose(0, 1)  # [T, B, block]
        return self.head(self.rnn(blocks)[0]).transpose(0, 1).flatten(1)

    def loss(self, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        clean, noisy = (torch.stack(each) for each in zip(*batch))
        return (self(noisy) - clean).square().mean()


@torch.no_grad()
def stream(model: Denoiser, noisy: Tensor) -> tuple[Tensor, list[float]]:
    """``[samples]``, block by block: what comes out, and the seconds of each block."""
    state = begin(model.rnn)
    blocks, seconds = [], []
    for block in noisy.split(model.block):
        start = time.perf_counter()
        state = state.add_input(block[None])
        blocks.append(model.head(state.output())[0])
        seconds.append(time.perf_counter() - start)
    return torch.cat(blocks), seconds


def decibels(signal: Tensor, noise: Tensor) -> float:
    return 10 * log10(signal.square().mean() / noise.square().mean())


def make_parser() -> Parser:
    parser = Parser("stream.py", __doc__)
    parser.group("stream")
    parser.number("--block", 64, "samples of a block", 16, 513)
    parser.number("--seconds", 10.0, "of audio in the stream", 0.1)

    parser.group("model")
    parser.choice("--backend", "whose layers", *BACKENDS, "both")
    parser.number("--layers", 1, "recurrent layers")
    parser.number("--hidden", 128, "hidden units of each layer")

    parser.group("data")
    parser.number("--count", 400, "chords to learn from")
    parser.training("chords", batch=16, lr=0.01, epochs=12)
    return parser


def run(args: argparse.Namespace) -> None:
    samples = int(TRAINED * RATE) // args.block * args.block
    training = list(zip(*chords(args.count, samples, args.seed)))
    models = make_models(lambda lib: Denoiser(lib, args), args)
    train(models, training, args)

    samples = int(args.seconds * RATE) // args.block * args.block
    if not samples:
        raise UserError("--seconds: not a single block")
    (clean,), (noisy,) = chords(1, samples, args.seed + 1)
    print(f"noisy: {decibels(clean, noisy - clean):.1f} dB")
    for name, model in models.items():
        model.eval()
        if name == "fastrnn":
            import fastrnn

            fastrnn.freeze(model)
        stream(model, noisy[: WARM_UP * args.block])
        denoised, seconds = stream(model, noisy)
        micros = 1e6 * torch.tensor(seconds, dtype=torch.float64)
        marks = ", ".join(f"p{p:g} {micros.quantile(p / 100):.0f}" for p in PERCENTILES)
        print(
            f"{name}: {decibels(clean, denoised - clean):.1f} dB; latency of a block of "
            f"{1e6 * args.block / RATE:.0f} us, in us: {marks}; real-time factor "
            f"{sum(seconds) / (samples / RATE):.4f}"
        )


def main(argv: list[str] | None = None) -> int:
    return execute(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
