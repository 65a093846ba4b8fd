"""A layer in segments of checkpoint_every steps, of which backward computes one at a time again.

For backends whose kernels know of no segments: each is a layer of its own, of fewer steps and one
direction, that begins with the states which the one before it left. Beside what the layer returns,
the states between segments are kept, and the rest of one segment at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._layer import Layer, Results, Saved
from ._torch import add_to_each

States = tuple[Tensor | None, Tensor | None]


class Part(NamedTuple):
    """What the scan over a segment is told beside its layer."""

    carried: Tensor  # from step to step, see _Direction.carried; the scan leaves what it ends with
    first: int  # the layer's first step in it
    direction: int  # and direction


Forward = Callable[[Layer, Part], Results]
Backward = Callable[[Layer, Saved, Part], Sequence[Tensor | None]]


class _Direction:
    """One direction of a layer, in segments: s counts them from the first step on."""

    def __init__(self, layer: Layer, d: int) -> None:
        self.layer, self.d = layer, d
        self.reverse = d == 1 or layer.reverse
        self.firsts = range(0, layer.steps, layer.checkpoint_every)
        self.order = self.firsts[::-1] if self.reverse else self.firsts
        sizes = layer.batch_sizes
        self.ends = None  # where each step of packed rows ends
        if sizes is not None and sizes.dtype != torch.bool:
            self.ends = [0, *sizes.cumsum(0).tolist()]
        self.entered_with_zeros = self._find_entered_with_zeros()

    def rows(self, sequence: Tensor, first: int) -> Tensor:
        """The segment of something laid out as x."""
        last = min(first + self.layer.checkpoint_every, self.layer.steps)
        if self.ends is not None:
            first, last = self.ends[first], self.ends[last]
        return sequence[first:last]

    def own(self, sequence: Tensor, first: int) -> Tensor:
        """The same of what has features of each direction: those of this one."""
        features = sequence.shape[-1] // self.layer.directions
        return self.rows(sequence, first).narrow(-1, self.d * features, features)

    def segment(self, first: int, h: Tensor | None, c: Tensor | None, keep: bool) -> Layer:
        """The segment as a layer that the states h and c [1, B, P or H] enter."""
        layer, sizes, resets = self.layer, self.layer.batch_sizes, self.layer.resets
        scale = layer.grad_scale
        return layer._replace(
            directions=1,
            reverse=self.reverse,
            checkpoint_every=0,
            keep=keep,
            all_c=layer.all_c and not keep,
            x=self.rows(layer.x, first),
            h_0=None if h is None else h.to(layer.x.dtype).contiguous(),
            c_0=None if c is None else c.to(layer.x.dtype).contiguous(),
            batch_sizes=None if sizes is None else sizes[first : first + layer.checkpoint_every],
            resets=None if resets is None else self.rows(resets, first),
            grad_scale=None if scale is None else self.rows(scale, first).contiguous(),
            h_mask=self.of(layer.h_mask),
            inputs=None if layer.inputs is None else self.own(layer.inputs, first).contiguous(),
            weights=layer.by_direction[self.d],
        )

    def zeroed(self, first: int, h: Tensor | None, c: Tensor | None) -> States:
        """h and c, or their gradients, with zeros where zeros enter the segment."""
        zeros = self.entered_with_zeros.get(first)
        if zeros is None:
            return h, c
        h, c = (None if s is None else torch.where(zeros, 0, s) for s in (h, c))
        return h, c

    def part(self, first: int, h: Tensor | None, c: Tensor | None) -> Part:
        """What the scan over the segment takes up: h and c, or their gradients."""
        return Part(self.carried(h, c), first, self.d)

    def carried(self, h: Tensor | None, c: Tensor | None) -> Tensor:
        """h and c, or their gradients, as a scan carries them: [1+C, 1, B, H], not rounded.

        A projected h is no state of the scan.
        """
        layer = self.layer
        size = 1 + layer.cell.states, 1, layer.batch, layer.hidden
        carried = layer.x.new_zeros(size, dtype=layer.state_dtype)
        if h is not None and not layer.has_projection:
            carried[0] = h
        if c is not None:
            carried[1:] = c.unflatten(-1, (-1, layer.hidden)).movedim(2, 0)
        return carried

    def states(self, carried: Tensor, h: Tensor | None) -> States:
        """What a scan has left of carried(), and a projected h."""
        h = h if self.layer.has_projection else carried[0]
        return h, carried[1:].movedim(0, 2).flatten(2) if self.layer.cell.has_cell_state else None

    def boundary(self, saved: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """h and c between this segment and the one that the direction enters after it."""
        k = first // self.layer.checkpoint_every - self.reverse
        states = saved[k, self.d : self.d + 1]
        return states[..., : self.layer.proj], states[..., self.layer.proj :]

    def entering(self, saved: Tensor, first: int) -> tuple[Tensor | None, Tensor | None]:
        """h and c that enter the segment."""
        if first == self.order[0]:
            return self.of(self.layer.h_0), self.of(self.layer.c_0)
        every = self.layer.checkpoint_every
        h, c = self.boundary(saved, first + every if self.reverse else first - every)
        return self.zeroed(first, h, c if self.layer.cell.has_cell_state else None)

    def of(self, states: Tensor | None) -> Tensor | None:
        """This direction's of [D, B, features]."""
        return None if states is None else states[self.d : self.d + 1]

    def _find_entered_with_zeros(self) -> dict[int, Tensor]:
        """By segment [B, 1]: the rows that enter it with zeros, since the step before it was reset.

        A reset lies before its step: only in reverse do its two sides lie in different segments
        with the mark in the one that comes first.
        """
        layer, found = self.layer, {}
        if layer.resets is None or not self.reverse:
            return {}
        pending = torch.zeros(layer.batch, 1, dtype=torch.bool, device=layer.x.device)
        for first in self.order:
            valid, begins = self._earliest(first, layer.resets)
            found[first] = pending & valid
            pending = torch.where(valid, begins, pending)
        return found

    def _earliest(self, first: int, resets: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1]: the rows with a valid step in the segment, and those whose earliest is reset."""
        layer, marks, sizes = self.layer, self.rows(resets, first), self.layer.batch_sizes
        if sizes is not None and self.ends is None:
            mask = self.rows(sizes, first)
            earliest = mask & (mask.cumsum(0) == 1)
            return mask.any(0).unsqueeze(1), (earliest & marks).any(0).unsqueeze(1)
        if self.ends is None:
            return torch.ones_like(marks[0]).unsqueeze(1), marks[0].unsqueeze(1)
        alive = self.ends[first + 1] - self.ends[first]
        begins = torch.nn.functional.pad(marks[:alive], (0, layer.batch - alive))
        row = torch.arange(layer.batch, device=marks.device)
        return (row < alive).unsqueeze(1), begins.unsqueeze(1)


def forward_in_segments(layer: Layer, forward: Forward) -> Results:
    """forward of the layer by forward of its segments."""
    results = layer.make_results()
    for d in range(layer.directions):
        direction = _Direction(layer, d)
        h, c = direction.of(layer.h_0), direction.of(layer.c_0)
        for first in direction.order:
            h, c = direction.zeroed(first, h, c)
            part = direction.part(first, h, c)
            output, h_n, c_n, extra, _ = forward(direction.segment(first, h, c, False), part)
            direction.own(results.output, first).copy_(output)
            if results.extra is not None and extra is not None:
                direction.own(results.extra, first).copy_(extra)
            h, c = direction.states(part.carried, h_n)
            if results.saved is not None and first != direction.order[-1]:
                for kept, state in zip(direction.boundary(results.saved, first), (h, c)):
                    if state is not None:
                        kept.copy_(state)
        results.h_n[d : d + 1] = h_n
        if results.c_n is not None and c_n is not None:
            results.c_n[d : d + 1] = c_n
    return results


def backward_in_segments(
    layer: Layer, saved: Saved, forward: Forward, backward: Backward
) -> list[Tensor | None]:
    """backward of the layer by forward and backward of its segments, from the last to the first."""
    gradients = layer.make_gradients(saved.wanted)
    d_x, d_h_0, d_c_0, d_inputs, *d_weights = gradients
    each = len(layer.weights) // layer.directions
    for d in range(layer.directions):
        direction = _Direction(layer, d)
        d_h, d_c = direction.of(saved.d_h_n), direction.of(saved.d_c_n)
        own = slice(d * each, (d + 1) * each)
        sums: list[Tensor] = []
        for first in reversed(direction.order):
            d_part, d_h, d_c, d_own, *parts = _backward_of_segment(
                direction, first, saved, d_h, d_c, saved.wanted[4:][own], forward, backward
            )
            if d_x is not None and d_part is not None:
                target = direction.rows(d_x, first)
                target.copy_(d_part) if d == 0 else target.add_(d_part)
            if d_inputs is not None and d_own is not None:
                direction.own(d_inputs, first).copy_(d_own)
            given = [part for part in parts if part is not None]
            if not sums:
                sums = [part.to(layer.state_dtype) for part in given]
            else:
                add_to_each(sums, given)
        for gradient, total in zip([g for g in d_weights[own] if g is not None], sums):
            gradient.copy_(total)
        for d_initial, d_state in ((d_h_0, d_h), (d_c_0, d_c)):
            if d_initial is not None and d_state is not None:
                d_initial[d : d + 1] = d_state
    return gradients


def _backward_of_segment(
    direction: _Direction,
    first: int,
    saved: Saved,
    d_h: Tensor | None,
    d_c: Tensor | None,
    wanted: Sequence[bool],
    forward: Forward,
    backward: Backward,
) -> Sequence[Tensor | None]:
    """The gradients of the segment's x, the states that entered it, and the weights."""
    assert saved.saved is not None
    h, c = direction.entering(saved.saved, first)
    segment = direction.segment(first, h, c, keep=True)
    output, _, _, extra, gates = forward(segment, direction.part(first, h, c))
    d_output, d_extra = (
        None if t is None else direction.own(t, first).contiguous()
        for t in (saved.d_output, saved.d_extra)
    )
    part = direction.part(first, d_h, d_c)
    d_h, d_c = (None if d is None else d.to(segment.x.dtype) for d in (d_h, d_c))
    wants = [saved.wanted[0], True, segment.cell.has_cell_state, saved.wanted[3], *wanted]
    again = Saved(output, extra, gates, d_output, d_h, d_c, d_extra, wants)
    gradients = list(backward(segment, again, part))
    gradients[1:3] = direction.zeroed(first, *direction.states(part.carried, gradients[1]))
    return gradients
