"""The record of a layer call: what one layer runs on, in all its directions.

A new option is a field of Layer here, a field of LayerCall in csrc/python/layer.h, and the code
that uses it. Everything between the modules and the kernels hands the record on as it is: the
operators' schemas are made from its fields, and csrc/python/layer.cc checks it, for every device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._load import _cpu

CELLS = _cpu.cells  # mode -> traits of the cell
BUILT_IN = tuple(CELLS)  # not of the user's own

OPTIONS = 11  # the fields of Layer before its first tensor
TENSORS = 9  # those that are tensors, before the weights
CONSTANTS = range(3, 8)  # the places among the tensors of those that have no gradient


Record = TypeVar("Record", bound=tuple[Any, ...])


def replaced(record: Record, **fields: Any) -> Record:
    """A NamedTuple with other values of some fields. torch.compile of torch 2.6 can follow neither
    _replace nor _make."""
    cls = type(record)
    names: tuple[str, ...] = cls._fields  # type: ignore[attr-defined]
    return cls(*[fields.get(name, value) for name, value in zip(names, record)])


LEAST_STACK_STEPS = _cpu.least_stack_steps  # with fewer, layers do not run side by side


class Layer(NamedTuple):
    """One layer in all its directions.

    T steps, B batch rows, I input features, H hidden units, P features of h (H unless projected),
    D directions, G gates. Rows may end at different steps: with batch_sizes, x is [N, I] without
    padding, the rows of one step after the other, longest row first, as PackedSequence.data.
    """

    mode: str  # as torch.nn.RNNBase.mode
    directions: int  # D; the second one runs from each row's last step to its first,
    batch: int  # B; rows without any step exist only here and in the states
    reverse: bool  # ... or a single one does
    checkpoint_every: int  # steps of a segment that backward computes again; 0: keeps everything
    keep: bool  # what backward reads
    all_c: bool  # the other states of every step
    grad_clip: float  # the most that flows back from a step to another, elementwise; 0: anything
    # The probabilities that a unit keeps its h, and its other states, in a step; without a seed
    # the state is what that makes on average.
    zoneout_h: float
    zoneout_c: float
    layer_norm: bool  # normalises what the cell takes; see fastrnn.reference.Options
    x: Tensor  # [T, B, I] or [N, I]
    h_0: Tensor | None  # [D, B, P]; None: zeros
    # [D, B, C*H], of cells with C states beside h; None: zeros
    c_0: Tensor | None
    batch_sizes: Tensor | None  # int64 [T] on the CPU; or, if the backend takes it, a mask [T, B]
    resets: Tensor | None  # bool, laid out as x: True where a segment of a row begins
    # Of state_dtype, laid out as x: what flows back from this step to the one before it in the
    # order of the direction is multiplied by it, and then clipped.
    grad_scale: Tensor | None
    h_mask: Tensor | None  # [D, B, P], multiplies the h that W_hh multiplies
    seed: Tensor | None  # int64 [1], of zoneout's random numbers
    # Laid out as x, with D * Z * H features: what a cell takes in each step beside x, of each
    # direction one after the other.
    inputs: Tensor | None
    # Direction by direction w_ih [G*H, I], w_hh [R*H, P], b_ih [G*H], b_hh [R*H] and w_hr [P, H],
    # as in torch.nn.RNNBase; with layer_norm the gains of W_ih x [G*H] and W_hh h [R*H], and of an
    # LSTM gain and bias [H] of c; and Q learned vectors [H]. Biases and w_hr may be absent. Without
    # recurrent gates, R = 0, there is neither w_hh nor b_hh.
    weights: Sequence[Tensor]

    @property
    def options(self) -> tuple[Any, ...]:
        """What is not a tensor."""
        return self[:OPTIONS]

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The rest, the weights one by one."""
        return *self[OPTIONS:-1], *self.weights

    @classmethod
    def of(cls, options: Sequence[Any], tensors: Sequence[Any]) -> Layer:
        """The layer of such options and tensors."""
        fields: tuple[Any, ...] = (*options, *tensors[:TENSORS], tensors[TENSORS:])
        return cls(*fields)

    @classmethod
    def plain(
        cls,
        mode: str,
        directions: int,
        batch: Any,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None = None,
        resets: Tensor | None = None,
        *,
        reverse: bool = False,
        checkpoint_every: int = 0,
        keep: bool = False,
        all_c: bool = False,
        layer_norm: bool = False,
    ) -> Layer:
        """The layer with all options off that leave its weights as they are."""
        kept = checkpoint_every, keep, all_c
        options = mode, directions, batch, reverse, *kept, 0.0, 0.0, 0.0, layer_norm
        return cls(
            *options, x, h_0, c_0, batch_sizes, resets, None, None, None, None, tuple(weights)
        )

    def keeping(self, keep: bool) -> Layer:
        """The layer with another `keep`."""
        return replaced(self, keep=keep)

    @property
    def cell(self) -> Any:
        """The traits of its cell."""
        return CELLS[self.mode]

    @property
    def by_direction(self) -> list[Sequence[Tensor]]:
        """The weights of each direction."""
        each = len(self.weights) // self.directions
        return [self.weights[i : i + each] for i in range(0, len(self.weights), each)]

    @property
    def has_projection(self) -> bool:
        return self.mode in BUILT_IN and len(self.weights) // self.directions % 2 == 1

    @property
    def matrices(self) -> int:
        """The weights of a direction before its learned vectors: w_hr is the last, if there is."""
        vectors = self.cell.parameters + (self.cell.norms if self.layer_norm else 0)
        return len(self.weights) // self.directions - int(vectors)

    @property
    def steps(self) -> int:
        """T."""
        return (self.x if self.batch_sizes is None else self.batch_sizes).shape[0]

    @property
    def saves(self) -> int:
        """K: the values that forward saves of a unit and step for backward alone."""
        return int(self.cell.recurrent if self.layer_norm else self.cell.saves)

    @property
    def segments(self) -> int:
        """S, of checkpoint_every steps; 1 where backward has nothing to compute again."""
        every = self.checkpoint_every
        if not every or not self.saves:
            return 1
        return max(1, (self.steps + every - 1) // every)

    @property
    def proj(self) -> int:
        """P."""
        return self.weights[1].shape[1] if self.cell.recurrent else self.hidden

    @property
    def hidden(self) -> int:
        """H."""
        return self.weights[0].shape[0] // int(self.cell.gates)

    @property
    def state_dtype(self) -> torch.dtype:
        """In what states are carried from step to step, and kept for backward."""
        return torch.float32 if self.x.dtype.itemsize == 2 else self.x.dtype

    def check(self) -> None:
        """Raises ValueError, naming the field, what was expected and what came."""
        _cpu.check(self)

    def make_results(self) -> Results:
        """New, empty tensors for all that forward makes."""
        steps, new, cell = self.x.shape[:-1], self.x.new_empty, self.cell
        directions, batch, hidden, proj = self.directions, self.batch, self.hidden, self.proj
        rows = steps[0] if len(steps) == 1 else steps[0] * steps[1]
        segments = self.segments
        keeps_steps = self.keep and segments == 1
        extra = saved = None
        if cell.has_extra and ((self.all_c and cell.has_cell_state) or keeps_steps):
            extra = new((*steps, directions * cell.extras * hidden), dtype=self.state_dtype)
        if self.keep and segments > 1:
            features = proj + cell.states * hidden
            saved = new((segments - 1, directions, batch, features), dtype=self.state_dtype)
        elif keeps_steps and self.saves:
            saved = new((directions, rows, self.saves * hidden))
        return Results(
            new((*steps, directions * proj)),
            new((directions, batch, proj)),
            new((directions, batch, cell.states * hidden)) if cell.has_cell_state else None,
            extra,
            saved,
        )

    def make_gradients(self, wanted: Sequence[bool]) -> list[Tensor | None]:
        """New, empty tensors for the gradients of x, h_0, c_0, inputs and each weight, as many as
        `wanted` has entries; None: not wanted."""
        new = self.x.new_empty
        return [new(size) if want else None for want, size in zip(wanted, self._gradient_sizes())]

    def _gradient_sizes(self) -> Iterator[Sequence[int]]:
        states = self.directions, self.batch
        yield self.x.shape
        yield (*states, self.proj)
        yield (*states, self.cell.states * self.hidden)
        yield self.x.shape if self.inputs is None else self.inputs.shape
        for weight in self.weights:
            yield weight.shape


class Results(NamedTuple):
    """What forward makes, None for what there is not."""

    output: Tensor  # every h_t: laid out as x, with D * P features
    h_n: Tensor  # [D, B, P], after each row's last step
    c_n: Tensor | None  # [D, B, C*H]
    # For each step D * E * H values beside h: every c_t, or a GRU's W_hn h + b_hn.
    extra: Tensor | None
    # For backward alone: the gates [D, N, K*H], or with layer_norm W_hh h; with checkpoint_every
    # the states between the S segments, [S-1, D, B, P + C*H].
    saved: Tensor | None


class Saved(NamedTuple):
    """What backward is given beside the layer."""

    output: Tensor
    extra: Tensor | None
    saved: Tensor | None
    d_output: Tensor | None  # gradients; None: zero
    d_h_n: Tensor | None
    d_c_n: Tensor | None
    d_extra: Tensor | None
    wanted: Sequence[bool]  # which gradients, of x, h_0, c_0, inputs and each weight

    def check(self, layer: Layer) -> None:
        """Checks the layer, and this against it, as Layer.check."""
        _cpu.check_saved(layer, self)


assert Layer._fields.index("x") == OPTIONS
assert Layer._fields[OPTIONS:][CONSTANTS[0]] == "batch_sizes"
assert Layer._fields[OPTIONS:][CONSTANTS[-1] + 1] == "inputs"
assert Layer._fields == _cpu.layer_fields, "the extension is of another version than the package"


def add_cell(
    mode: str, gates: int, recurrent: int, states: int, inputs: int, parameters: int
) -> None:
    """Makes a cell known that is not built in: G, R, C, Z and Q."""
    CELLS[mode] = _cpu.add_cell(mode, gates, recurrent, states, inputs, parameters)
