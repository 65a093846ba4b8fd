"""Ragged batches: the valid steps of every row, without the padding.

A masked step leaves the state as it is, so a row with holes is the same recurrence as that row with
its valid steps moved together. Every mask, lengths and PackedSequence therefore takes one form:
rows sorted by their number of steps, longest first, step after step, N rows of features in all. No
CPU kernel ever sees a masked step; those on CUDA take the mask, see Backend.takes_mask.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._backends import backend_of
from ._torch import (
    assert_async,
    bind_apply,
    is_batched,
    is_intercepted,
    is_tracing,
    is_transforming,
    unwrap_dead_wrappers,
    unwrapped,
)

_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
_INTEGERS = (*_SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


class Ragged(NamedTuple):
    """Where the rows of a ragged batch lie in a padded one."""

    rows: Tensor  # int64 [N]: row of the padded [T*B, ...] features
    batch_sizes: Tensor  # int64 CPU [T]: rows alive at each step
    sorted_indices: Tensor  # int64 [B]: rows, longest first
    unsorted_indices: Tensor  # int64 [B]: the way back


def from_mask(mask: Tensor, batch_first: bool, lengths: Tensor | None) -> Ragged | None:
    """The ragged form of mask [T, B], or None if every step is valid.

    `batch_first` says how the padded features lie in memory; mask is always [T, B]. lengths: those
    it was made of, if it was, which takes half of the time.
    """
    steps, batch = mask.shape
    if lengths is not None:
        return _from_lengths(lengths, steps, batch_first)
    t, b = mask.nonzero(as_tuple=True)
    if _are_all(t, steps * batch):
        return None
    counts = mask.sum(0)
    sorted_indices = torch.argsort(counts, descending=True, stable=True)
    unsorted_indices = torch.argsort(sorted_indices)
    batch_sizes = (counts > torch.arange(steps, device=mask.device).unsqueeze(1)).sum(1)
    # The k-th valid step of a row stands at its sorted place within the k-th group.
    starts = batch_sizes.cumsum(0) - batch_sizes
    order = mask.cumsum(0)[t, b] - 1
    index = torch.empty_like(t)
    index[starts[order] + unsorted_indices[b]] = b * steps + t if batch_first else t * batch + b
    return Ragged(index, batch_sizes.cpu(), sorted_indices, unsorted_indices)


def _from_lengths(lengths: Tensor, steps: int, batch_first: bool) -> Ragged | None:
    sorted_lengths, sorted_indices = torch.sort(lengths, descending=True, stable=True)
    alive = torch.arange(steps, device=lengths.device).unsqueeze(1) < sorted_lengths
    t, row = alive.nonzero(as_tuple=True)  # in the order of packed rows
    batch = lengths.shape[0]
    if _are_all(t, steps * batch):
        return None
    b = sorted_indices[row]
    index = b * steps + t if batch_first else t * batch + b
    return Ragged(index, alive.sum(1).cpu(), sorted_indices, torch.argsort(sorted_indices))


def _are_all(valid: Tensor, count: int) -> bool:
    """Whether that many steps are valid; False where nobody may look."""
    return not (torch.compiler.is_compiling() or is_tracing()) and len(valid) == count


def segment_starts(mask: Tensor, reset: Tensor) -> Tensor:
    """[T, B]: the valid steps of mask that begin a segment.

    A reset on a masked step counts for the row's next valid one.
    """
    segment = reset.cumsum(0)
    last = torch.where(mask, segment, 0).cummax(0).values  # of the valid steps so far
    before = torch.cat((torch.zeros_like(last[:1]), last[:-1]))
    return mask & (segment > before)


def mask_from_batch_sizes(batch_sizes: Tensor, batch: int, device: torch.device) -> Tensor:
    """bool [T, B] of the padded form, rows in sorted order."""
    return torch.arange(batch, device=device) < batch_sizes.to(device).unsqueeze(1)


def row_of_each(batch_sizes: Tensor, x: Tensor, order: Tensor | None) -> Tensor:
    """int64 [N]: the caller's row of each packed row of x [N, features]."""
    sizes = batch_sizes.to(x.device)
    starts = sizes.cumsum(0) - sizes
    count = x.shape[0]
    begins = torch.repeat_interleave(starts, sizes, output_size=count)
    row = torch.arange(count, device=x.device) - begins
    return row if order is None else order[row]


def is_per_sample(mask: Tensor) -> bool:
    """Whether vmap runs over the mask, so that every sample has a number of steps of its own."""
    return not torch.compiler.is_compiling() and unwrapped(mask).dim() > mask.dim()


class _Gather(torch.autograd.Function):
    """x[index] for an index without repetitions, whose gradient is then a plain copy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, index = inputs
        ctx.rows = x.shape[0]
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return scatter(grad, index, ctx.rows), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (index,) = ctx.saved_tensors
        return tangent.index_select(0, index)


class _Scatter(torch.autograd.Function):
    """Zeros with the rows of x at index: the inverse of _Gather."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, rows: int) -> Tensor:
        # In place, as index_copy would copy the zeros first; index_copy_ has no rule for vmap.
        return x.new_zeros(rows, *x.shape[1:]).index_put_((index,), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, ctx.rows = inputs
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gather(grad, index), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (index,) = ctx.saved_tensors
        return tangent.new_zeros(ctx.rows, *tangent.shape[1:]).index_copy(0, index, tangent)


def _apply(function: type[_Gather | _Scatter], x: Tensor, *args: Any) -> Tensor:
    """function.apply, with no more around it than the call needs."""
    result: Tensor
    if is_transforming():
        result = function.apply(x, *args)  # type: ignore[no-untyped-call]
    elif x.requires_grad and torch.is_grad_enabled():
        result = bind_apply(function)(*unwrap_dead_wrappers((x, *args)))
    else:
        result = function.forward(x, *args)
    return result


def _in_plain_torch(x: Tensor) -> bool:
    """Whether torch's own operators are wanted: by a compiler, by a trace, which would keep the
    sizes, and by the vmap that knows no autograd.Function."""
    return torch.compiler.is_compiling() or is_tracing() or is_batched([x])


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of x; no row twice."""
    if _in_plain_torch(x):
        return x.index_select(0, index)
    return _apply(_Gather, x, index)


def scatter(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """`rows` rows of zeros, with the rows of x at index."""
    if _in_plain_torch(x):
        return x.new_zeros(rows, *x.shape[1:]).index_copy(0, index, x)
    return _apply(_Scatter, x, index, rows)


def check_steps(name: str, steps: Any, shape: Sequence[int]) -> Tensor:
    """Marks laid out as the input's first dimensions, as a bool tensor; ValueError for any others.

    They may be bool or integers, of torch or NumPy; what is not zero is marked.
    """
    if isinstance(steps, np.ndarray):
        steps = torch.as_tensor(steps)
    if not isinstance(steps, Tensor):
        got = type(steps).__name__
    elif steps.dtype not in (torch.bool, *_INTEGERS):
        # Of a float mask nobody knows whether it is one of 0 and 1, or one to be added, of -inf.
        got = f"{steps.dtype} {list(steps.shape)}; write {name} != 0 if zero means no"
    elif steps.shape != tuple(shape):
        got = f"{steps.dtype} {list(steps.shape)}"
    else:
        return steps if steps.dtype == torch.bool else steps != 0
    raise ValueError(f"{name}: expected a bool or integer tensor of shape {list(shape)}, got {got}")


def check_scale(name: str, given: Any, shape: Sequence[int]) -> Tensor:
    """Numbers laid out as the input's first dimensions, as a floating tensor, without gradient."""
    scale = torch.as_tensor(given) if isinstance(given, np.ndarray) else given
    if isinstance(scale, Tensor) and scale.is_floating_point() and scale.shape == tuple(shape):
        return scale.detach()
    is_tensor = isinstance(scale, Tensor)
    got = f"{scale.dtype} {list(scale.shape)}" if is_tensor else type(scale).__name__
    raise ValueError(f"{name}: expected a floating tensor of shape {list(shape)}, got {got}")


def check_lengths(lengths: Any, batch: int, steps: int, device: torch.device) -> Tensor:
    """lengths as an int64 tensor [B] on `device`; ValueError unless B integers in [0, T].

    A tensor or array of any integer type, or a sequence of integers of any kind.
    """
    lengths = as_lengths(lengths, batch, steps)
    compiling = torch.compiler.is_compiling()
    values = lengths if compiling else unwrapped(lengths)
    if compiling or lengths.is_cuda:  # to look at them, the host would have to wait
        inside = ((values >= 0) & (values <= steps)).all()
        assert_async(inside, "lengths: expected integers in [0, T]")
        return lengths.to(device)
    low, high = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
    if low < 0 or high > steps:
        raise _wrong_lengths(batch, steps, str(low if low < 0 else high))
    backend = None if is_intercepted() else backend_of(device.type)
    return lengths.to(device) if backend is None else backend.upload(lengths, device)


def as_lengths(lengths: Any, batch: int, steps: int) -> Tensor:
    """The first half of check_lengths, which looks at no value: an int64 tensor [B]."""
    if isinstance(lengths, np.ndarray):
        lengths = torch.as_tensor(lengths)
    if not isinstance(lengths, Tensor):
        if not isinstance(lengths, Sequence) or isinstance(lengths, (str, bytes)):
            raise _wrong_lengths(batch, steps, type(lengths).__name__)
        wrong = [n for n in lengths if isinstance(n, bool) or not hasattr(n, "__index__")]
        if wrong:
            raise _wrong_lengths(batch, steps, f"{wrong[0]!r} ({type(wrong[0]).__name__})")
        lengths = torch.tensor([operator.index(n) for n in lengths], dtype=torch.int64)
    if lengths.dtype not in _INTEGERS or lengths.shape != (batch,):
        raise _wrong_lengths(batch, steps, f"{lengths.dtype} {list(lengths.shape)}")
    return lengths.to(torch.int64)


def _wrong_lengths(batch: int, steps: int, got: str) -> ValueError:
    # Built only to be raised: sizes in a text are constants to torch.compile.
    return ValueError(f"lengths: expected {batch} integers in [0, {steps}], got {got}")
