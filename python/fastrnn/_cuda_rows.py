"""Where the steps of each row lie, in tables on the device: nothing here makes the host wait."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._layer import Layer

# In a table of the steps before: the initial state, and zeros; see csrc/cuda/scan.h.
_INITIAL, _RESET = -1, -2

Tables = tuple[Tensor | None, list[Tensor], Tensor | None]


class Rows:
    """Where the steps of each row lie among all N, and what comes before each.

    The tables are those of Places in csrc/cuda/scan.h, None where every row lives, unbroken, for
    all steps.
    """

    place: Tensor | None = None  # int64 [T, B]
    before: list[Tensor] | None = None  # int64 [T, B], one per direction
    lengths: Tensor | None = None  # int64 [B]
    mask: Tensor | None = None  # bool [T, B]

    def __init__(self, layer: Layer, upload: Callable[[Tensor, torch.device], Tensor]) -> None:
        self.batch, self.device = layer.batch, layer.x.device
        self.count = layer.x.shape[:-1].numel()  # N
        self.reverse = (True,) if layer.reverse else (False, True)[: layer.directions]
        sizes = layer.batch_sizes
        self.steps = layer.steps
        if sizes is None and layer.resets is None:
            return
        if sizes is None or sizes.dtype == torch.bool:
            place = torch.arange(self.count, device=self.device).view(-1, self.batch)
            if sizes is not None:
                self.mask = sizes.contiguous()  # whose strides the tables take
                self.lengths = torch.where(self.mask, place // self.batch + 1, 0).amax(0)
                place = torch.where(self.mask, place, -1)
        else:
            sizes = upload(sizes, self.device).unsqueeze(1)
            row = torch.arange(self.batch, device=self.device)
            place = torch.where(row < sizes, sizes.cumsum(0) - sizes + row, -1)
            self.lengths = (row < sizes).sum(0)
        self.place = place
        self.before = [self._find_before(place, layer.resets, reverse) for reverse in self.reverse]

    def _find_before(self, place: Tensor, resets: Tensor | None, reverse: bool) -> Tensor:
        if reverse:
            place = place.flip(0)
        t = torch.arange(len(place), device=self.device).unsqueeze(1)
        last = torch.where(place >= 0, t, -1).cummax(0).values
        last = torch.cat((torch.full_like(last[:1], -1), last[:-1]))
        before = torch.where(last >= 0, place.gather(0, last.clamp(min=0)), _INITIAL)
        if resets is not None:
            # A boundary belongs to the second, in time, of the two steps beside it.
            second = before if reverse else place
            begins = resets.flatten()[second.clamp(min=0)] & (second >= 0)
            before = torch.where(begins, _RESET, before)
        return (before.flip(0) if reverse else before).contiguous()

    @property
    def tables(self) -> Tables:
        # Without lengths, steps lie in their plain order.
        return (None if self.lengths is None else self.place), self.before or [], self.lengths

    def _edge(self, last: bool) -> Tensor:
        """[B]: the place of each row's first or last step in time; N for a row without any."""
        if self.place is None:
            begin = self.count - self.batch if last else 0
            return torch.arange(begin, begin + self.batch, device=self.device)
        if last:
            place = self.place.amax(0)
            return torch.where(place < 0, self.count, place)
        return torch.where(self.place < 0, self.count, self.place).amin(0)

    def first(self, direction: int) -> Tensor:
        """[B]: the place of the step that each row's initial state goes into; N for none."""
        edge = self._edge(last=self.reverse[direction])
        if self.before is None:
            return edge
        begins = (self.before[direction] == _INITIAL) & (self.place >= 0)  # type: ignore[operator]
        return torch.where(begins.any(0), edge, self.count)

    def last(self, direction: int) -> Tensor:
        """[B]: the place of each row's last step in the direction's order; N for none."""
        return self._edge(last=not self.reverse[direction])

    def states_before(self, output: Tensor, h_0: Tensor | None, direction: int) -> Tensor:
        """[N, P]: what went into each step, of output [N, P] and h_0 [B, P] or None for zeros."""
        if self.place is None or self.before is None:
            initial = output.new_zeros(self.batch, output.shape[1]) if h_0 is None else h_0
            if self.reverse[direction]:
                return torch.cat((output[self.batch :], initial))
            return torch.cat((initial, output[: -self.batch]))
        before = self.before[direction]
        zeros = output.new_zeros(1, output.shape[1])
        table = torch.cat((output, zeros) if h_0 is None else (output, zeros, h_0))
        source = torch.where(before >= 0, before, self.count)
        if h_0 is not None:
            row = torch.arange(self.batch, device=self.device) + self.count + 1
            source = torch.where(before == _INITIAL, row, source)
        target = torch.where(self.place >= 0, self.place, self.count).flatten()
        index = torch.full_like(target[:1], self.count).repeat(self.count + 1)
        index.scatter_(0, target, source.flatten())
        return table.index_select(0, index[:-1])

    def parts_before(
        self, output: Tensor, h_0: Tensor | None, direction: int
    ) -> list[tuple[slice | None, Tensor]]:
        """The same by parts: which of the N steps, None for all, and what went into each of them.

        Where every row lives for all steps, that is the output itself, one step off: it is not
        copied. Zeros that go into the first steps are left out.
        """
        if self.lengths is not None:
            return [(None, self.states_before(output, h_0, direction))]
        if self.count == self.batch and self.before is None:
            return [] if h_0 is None else [(None, h_0)]
        if self.reverse[direction]:
            edge, others = slice(-self.batch, None), slice(-self.batch)
            states = output[self.batch :]
        else:
            edge, others = slice(self.batch), slice(self.batch, None)
            states = output[: -self.batch]
        parts: list[tuple[slice | None, Tensor]] = [] if h_0 is None else [(edge, h_0)]
        if self.count > self.batch:
            parts.append((others, states))
        if self.before is None:
            return parts
        begins = self.before[direction].view(-1, 1) == _RESET
        return [(steps, before.masked_fill(begins[steps], 0)) for steps, before in parts]

    def times(self, steps: Tensor, factors: Tensor) -> Tensor:
        """steps [N, P], each times its row's factors [B, P]."""
        if self.place is None or self.count == self.place.numel():
            return (steps.view(-1, *factors.shape) * factors).view_as(steps)
        row = torch.arange(self.batch, device=self.device).expand_as(self.place).flatten()
        index = torch.where(self.place >= 0, self.place, self.count).flatten()
        rows = row.new_zeros(self.count + 1).scatter_(0, index, row)
        return steps * factors.index_select(0, rows[:-1])

    def zero_masked(self, steps: Tensor) -> Tensor:
        """[N, features], with zeros in masked steps: 0 * NaN would not be zero."""
        return steps if self.mask is None else steps.masked_fill(~self.mask.view(-1, 1), 0)


def rows_at(table: Tensor, index: Tensor, other: Tensor | None) -> Tensor:
    """Rows of [N, features] at index [B]; where that is N, the row of `other`, or zeros."""
    found = table.index_select(0, index.clamp(max=len(table) - 1))
    return torch.where((index < len(table)).unsqueeze(1), found, 0 if other is None else other)
