"""Tensors for grad_scale=: backpropagation through time that is cut, in one call over all steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["fixed", "randomised"]


def _check_sizes(steps: Any, batch: Any) -> None:
    for name, size in (("T", steps), ("B", batch)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(f"{name}: expected an integer of at least 0, got {size!r}")


def fixed(T: int, B: int, every: int, *, offset: int = 0, device: Any = None) -> Tensor:
    """Truncation after every so many steps: 0 at steps offset, offset + every, ..., else 1.

    Nothing flows back from such a step to the one before it: as if the sequence had been cut there
    and the states detached. With the offset, the cuts of one call need not be those of the next.

    Args:
        T: the steps.
        B: the batch rows.
        every: the steps of a part, at least 1.
        offset: the first cut, in [0, every). At 0, nothing flows into the initial states.
        device: of the tensor.

    Returns:
        float32 [T, B], for grad_scale= of a layer. Transpose it for batch_first.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from fastrnn import truncation
        >>> truncation.fixed(6, 1, every=3).squeeze(1)
        tensor([0., 1., 1., 0., 1., 1.])
        >>> rnn = fastrnn.GRU(8, 16)
        >>> output, h_n = rnn(torch.randn(100, 4, 8), grad_scale=truncation.fixed(100, 4, every=20))
    """
    _check_sizes(T, B)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every: expected an integer above 0, got {every!r}")
    if not isinstance(offset, int) or isinstance(offset, bool) or not 0 <= offset < every:
        raise ValueError(f"offset: expected an integer in [0, {every}), got {offset!r}")
    scale = torch.ones(T, B, device=device)
    scale[offset::every] = 0
    return scale


def randomised(
    T: int,
    B: int,
    mean: float,
    *,
    alpha: float = 6.0,
    generator: torch.Generator | None = None,
    device: Any = None,
) -> Tensor:
    """Truncation at random steps, with a gradient that is right on average: ARTBP.

    Tallec and Ollivier, "Unbiasing Truncated Backpropagation Through Time" (arXiv:1705.08209): a
    step is cut with probability c, and else what flows back from it is multiplied by 1 / (1 - c).
    c depends on l = 1, 2, ..., the place of the step in its part, as in their experiments:

        c = alpha / ((alpha - 1) * mean + l)

    so that the mean length of a part is `mean`, and long parts are rare but not too rare. With the
    limit alpha = inf, c = 1 / mean: lengths are geometric.

    Args:
        T: the steps.
        B: the batch rows, each with cuts of its own.
        mean: the mean length of a part, above 1.
        alpha: above 1. The smaller it is, the more frequent are long parts, and the more slowly
            the factors grow; above 2 the variance of the lengths is finite.
        generator: of the random numbers; torch's default one, if not given.
        device: of the tensor.

    Returns:
        float32 [T, B], for grad_scale= of a layer. Transpose it for batch_first.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from fastrnn import truncation
        >>> rnn = fastrnn.GRU(8, 16)
        >>> scale = truncation.randomised(100, 4, mean=20)
        >>> output, h_n = rnn(torch.randn(100, 4, 8), grad_scale=scale)
    """
    _check_sizes(T, B)
    if isinstance(mean, bool) or not isinstance(mean, (int, float)) or not mean > 1:
        raise ValueError(f"mean: expected a number above 1, got {mean!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not alpha > 1:
        raise ValueError(f"alpha: expected a number above 1, got {alpha!r}")
    draws = torch.rand(T, B, generator=generator, device=device)
    scale, length = torch.empty_like(draws), draws.new_zeros(B)
    for t in range(T):
        if alpha == float("inf"):
            c = torch.full_like(length, 1 / mean)
        else:
            c = alpha / ((alpha - 1) * mean + 1 + length)
        cut = draws[t] < c
        scale[t] = torch.where(cut, 0, 1 / (1 - c))
        length = torch.where(cut, 0, length + 1)
    return scale
