"""What is measured: the rows of the grid, and the numbers that go into each."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
MODES = ("inference", "training")

# The whole grid would have 192 shapes. The 30 chosen are those that people run (one step at a time,
# language models of 35 steps, sequences of 100, long ones of 1000), so that every T occurs at least
# five times, every B three and every H two times; each T comes with B = 1 and with B = 256, with
# H <= 64 and with H >= 512; and no shape is above LARGEST, about two seconds of LSTM training.
T_GRID = (1, 35, 100, 1000)
B_GRID = (1, 4, 20, 32, 64, 256)
H_GRID = (32, 64, 128, 256, 512, 650, 1024, 2048)
LARGEST = 1e10  # T·B·H²
# fmt: off
SHAPES = {  # T: (B, H), ...
    1: ((1, 32), (1, 128), (1, 512), (1, 2048), (4, 1024), (32, 256), (256, 128), (256, 1024)),
    35: ((1, 1024), (4, 64), (4, 2048), (20, 650), (20, 128), (32, 2048), (64, 650), (256, 256)),
    100: ((1, 128), (1, 512), (4, 256), (20, 32), (32, 128), (32, 256), (64, 512), (64, 1024),
          (256, 64)),
    1000: ((1, 64), (1, 256), (4, 512), (32, 512), (256, 32)),
}
# fmt: on
GRID = tuple((t, b, h) for t, others in SHAPES.items() for b, h in others)
BIDIRECTIONAL = ((100, 32, 128), (35, 20, 650), (1000, 4, 256))  # with two layers
RAGGED = ((100, 32, 256), (100, 64, 512), (1000, 32, 128))

DEFAULT_GRID = ((1, 1, 512), (100, 1, 128), (100, 32, 128), (35, 20, 650), (100, 64, 512))
QUICK_GRID = ((1, 1, 128), (100, 32, 128))


@dataclass(frozen=True)
class Data:
    """The same numbers for every peer, named and laid out as torch.nn's."""

    weights: dict[str, Array]
    x: Array  # [T, B, I]
    states: tuple[Array, ...]  # h_0 and, for an LSTM, c_0: [L*D, B, H]
    dy: Array  # [T, B, D*H], the gradient that a training step starts from
    lengths: Array | None  # int64 [B]


@dataclass(frozen=True)
class Case:
    """A float32 layer with I = H, given an initial state; training is one forward and backward."""

    cell: str
    mode: str
    T: int
    B: int
    H: int
    layers: int = 1
    directions: int = 1
    ragged: bool = False  # lengths uniform in [T/10, T]

    @property
    def layer(self) -> str:
        suffix = f" bi, {self.layers} layers" if self.directions == 2 else ""
        return self.cell + suffix + " ragged" * self.ragged

    @property
    def shape(self) -> str:
        return f"{self.T}, {self.B}, {self.H}"

    @property
    def name(self) -> str:
        return f"{self.layer} {self.mode} {self.shape}"

    @property
    def training(self) -> bool:
        return self.mode == "training"

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng((self.T, self.B, self.H))

    def lengths(self) -> Array | None:
        low = max(1, math.ceil(self.T / 10))
        return self._rng().integers(low, self.T + 1, self.B) if self.ragged else None

    def data(self) -> Data:
        rng, float32 = self._rng(), np.float32

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape, dtype=float32)

        def uniform(*shape: int) -> Array:  # as torch.nn initialises them
            return (2 * rng.random(shape, dtype=float32) - 1) * float32(self.H**-0.5)

        rows, features = GATES[self.cell] * self.H, self.directions * self.H
        weights = {}
        for layer, direction in itertools.product(range(self.layers), range(self.directions)):
            suffix = f"_l{layer}" + "_reverse" * direction
            weights["weight_ih" + suffix] = uniform(rows, features if layer else self.H)
            weights["weight_hh" + suffix] = uniform(rows, self.H)
            weights["bias_ih" + suffix] = uniform(rows)
            weights["bias_hh" + suffix] = uniform(rows)
        entries = self.layers * self.directions
        return Data(
            weights,
            x=normal(self.T, self.B, self.H),
            states=tuple(normal(entries, self.B, self.H) for _ in range(1 + (self.cell == "LSTM"))),
            dy=normal(self.T, self.B, features),
            lengths=self.lengths(),
        )


def make_cases(level: str) -> list[Case]:
    """The rows of the level "quick", "default" or "full", shape by shape."""
    levels = {"quick": (QUICK_GRID, 0), "default": (DEFAULT_GRID, 1), "full": (GRID, None)}
    grid, extras = levels[level]
    variants: list[tuple[tuple[int, int, int], dict[str, Any]]] = [
        *((shape, {}) for shape in grid),
        *((shape, {"layers": 2, "directions": 2}) for shape in BIDIRECTIONAL[:extras]),
        *((shape, {"ragged": True}) for shape in RAGGED[:extras]),
    ]
    return [
        Case(cell, mode, *shape, **options)
        for shape, options in variants
        for cell in GATES
        for mode in MODES
    ]
