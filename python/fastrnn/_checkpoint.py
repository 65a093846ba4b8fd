"""A layer in segments of steps, of which backward recomputes one at a time.

What a layer keeps for backward is then the states between segments, and one segment's gates.
torch's own checkpointing does the bookkeeping; a segment is a layer of fewer steps that begins with
the states that the one before it left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._functions import Spec

Layer = Callable[..., tuple[Tensor, tuple[Tensor, ...], Tensor | None]]


def in_segments(
    run: Layer,
    every: int,
    spec: Spec,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    all_c: bool,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """What run(spec, x, h_0, c_0, weights, None, all_c) returns, `every` steps at a time."""
    each = len(weights) // spec.directions
    directions = []
    for d in range(spec.directions):
        own = slice(d, d + 1)
        states = tuple(None if s is None else s[own] for s in (h_0, c_0))
        reverse = d == 1 or spec.reverse
        own_weights = weights[d * each : (d + 1) * each]
        directions.append(_one_direction(run, every, spec, reverse, x, states, own_weights, all_c))
    outputs, finals, cells = zip(*directions)
    if len(directions) == 1:
        return directions[0]
    return (
        torch.cat(outputs, -1),
        tuple(torch.cat(s) for s in zip(*finals)),
        torch.cat(cells, -1) if all_c and cells[0] is not None else None,
    )


def _one_direction(
    run: Layer,
    every: int,
    spec: Spec,
    reverse: bool,
    x: Tensor,
    states: tuple[Tensor | None, ...],
    weights: Sequence[Tensor],
    all_c: bool,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    sizes, resets = spec.batch_sizes, spec.resets
    steps = len(x) if sizes is None else len(sizes)
    ends = None if sizes is None else [0, *sizes.cumsum(0).tolist()]

    def cut(sequence: Tensor, first: int, last: int) -> Tensor:  # the steps [first, last)
        return sequence[first:last] if ends is None else sequence[ends[first] : ends[last]]

    def segment(
        first: int, last: int, x: Tensor, h: Tensor | None, c: Tensor | None, *weights: Tensor
    ) -> Any:
        part = Spec(
            spec.mode,
            1,
            spec.batch,
            None if sizes is None else sizes[first:last],
            None if resets is None else cut(resets, first, last),
            reverse,
        )
        return run(part, x, h, c, weights, None, all_c)

    firsts = range(0, steps, every)
    parts: dict[int, tuple[Tensor, Tensor | None]] = {}
    for first in reversed(firsts) if reverse else firsts:
        last = min(first + every, steps)
        h, c = (*states, None)[:2]
        output, final, cells = checkpoint(
            segment, first, last, cut(x, first, last), h, c, *weights,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        parts[first] = output, cells
        states = final
        if reverse and resets is not None and first > 0:  # it stands in this segment, not the next
            marks = cut(resets, first, first + 1).flatten()
            marks = torch.nn.functional.pad(marks, (0, spec.batch - len(marks)))
            states = tuple(torch.where(marks.unsqueeze(-1), 0, s) for s in final)
    output = torch.cat([parts[first][0] for first in firsts])
    cells = [c for first in firsts if (c := parts[first][1]) is not None]
    return output, final, torch.cat(cells) if cells else None
