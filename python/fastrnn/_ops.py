"""The scan as torch operators: fastrnn::scan_forward and fastrnn::scan_backward.

They take tensors, check them, allocate the results and hand plain pointers to the kernels. Sizes
and layout are those of csrc/scan.h: N rows of features, T * B of them, or as many as batch_sizes
adds up to.

Registered by define + impl + register_fake: an order of magnitude less time per call than the
custom_op decorator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._load import _cpu, _cuda

CELLS = _cpu.cells
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_PLAIN = (Tensor, torch.nn.Parameter)

_library = torch.library.Library("fastrnn", "DEF")
_library.define(
    "scan_forward(str mode, Tensor x, Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] weight_hr, "
    "Tensor[] bias_ih, Tensor[] bias_hh, Tensor? h_0, Tensor? c_0, Tensor? batch_sizes, "
    "Tensor? resets, SymInt batch, bool reverse, bool keep, bool all_c) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor extra, Tensor gates)"
)
_library.define(
    "scan_backward(str mode, Tensor x, Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] weight_hr, "
    "Tensor? h_0, Tensor? c_0, Tensor? batch_sizes, Tensor? resets, SymInt batch, bool reverse, "
    "Tensor output, Tensor extra, Tensor gates, Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, "
    "Tensor? d_extra, bool[] wanted) -> (Tensor d_x, Tensor d_h_0, Tensor d_c_0, "
    "Tensor d_weight_ih, Tensor d_weight_hh, Tensor d_weight_hr, Tensor d_bias_ih, "
    "Tensor d_bias_hh)"
)


def has_kernel(x: Tensor) -> bool:
    """Whether the scan has a compiled kernel for x's device and dtype."""
    return (x.is_cpu or (x.is_cuda and _cuda is not None)) and x.dtype in _DTYPES


def takes_mask(x: Tensor) -> bool:
    """Whether its kernel takes a mask [T, B] in place of batch_sizes.

    To sort and pack the rows of a mask on a GPU, the host would have to wait for it.
    """
    return x.is_cuda and has_kernel(x)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """int64 values of the CPU on `device`; if that is a GPU with kernels, nothing waits for it."""
    watched = (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    )
    if device.type != "cuda" or _cuda is None or watched:
        return values.to(device)
    return _on_cuda.upload(values, device)


def is_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a call on these tensors means no more than its kernel.

    Then the operator can be left out, which takes as long as the whole of a small step.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
        or not x.is_cpu
    ):
        return False
    for t in (x, *others):
        # Negation and zeros may stand in a tensor's flags alone.
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or t._is_zerotensor()):
            return False
    return True


def _state_dtype(x: Tensor) -> torch.dtype:
    """In what the kernels carry states from step to step, and keep c_t for backward."""
    return torch.float32 if x.dtype.itemsize == 2 else x.dtype


class _Memory:
    """Addresses of tensors, and the contiguous copies that some of them needed."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.copies: list[Tensor] = []

    def at(
        self,
        name: str,
        tensor: Tensor | None,
        shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
    ) -> int:
        """The address of a CPU tensor of this shape and dtype, 0 for None."""
        if tensor is None:
            return 0
        if tensor.shape != shape or tensor.dtype is not (dtype or self.dtype) or not tensor.is_cpu:
            raise ValueError(
                f"{name}: expected a {dtype or self.dtype} tensor of shape {list(shape)} on cpu, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            self.copies.append(tensor)
        return tensor.data_ptr()

    def each(self, name: str, tensors: list[Tensor], shape: tuple[int, ...]) -> list[int]:
        return [self.at(name, tensor, shape) for tensor in tensors]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _parts(tensor: Tensor) -> list[int]:
    """The addresses of a tensor's parts by direction."""
    return [tensor.data_ptr()] if tensor.shape[0] == 1 else [part.data_ptr() for part in tensor]


def _layout(x: Tensor, batch_sizes: Tensor | None, batch: int) -> tuple[int, int, int]:
    """T, N and the address of batch_sizes, of a sequence [T, B, ...] or ragged [N, ...]."""
    if batch_sizes is None:
        if x.dim() != 3 or x.shape[1] != batch:
            raise ValueError(f"x: expected [T, {batch}, features], got {list(x.shape)}")
        return x.shape[0], x.shape[0] * batch, 0
    if (
        x.dim() != 2
        or batch_sizes.dtype != torch.int64
        or batch_sizes.dim() != 1
        or batch_sizes.device.type != "cpu"
        or not batch_sizes.is_contiguous()
    ):
        raise ValueError(
            "expected x [N, features] and batch_sizes as a contiguous int64 CPU tensor [T], got "
            f"{list(x.shape)} and {batch_sizes.dtype} {list(batch_sizes.shape)} on "
            f"{batch_sizes.device}"
        )
    return batch_sizes.shape[0], x.shape[0], batch_sizes.data_ptr()


class _Sizes(NamedTuple):
    """What the shapes of the weights say."""

    directions: int
    hidden: int  # H
    shown: int  # P, the features of h
    wide: int  # G * H


def _sizes(mode: str, weight_hh: list[Tensor]) -> _Sizes:
    wide, shown = weight_hh[0].shape
    return _Sizes(len(weight_hh), wide // CELLS[mode].gates, shown, wide)


def _forward_outputs(
    mode: str, x: Tensor, weight_hh: list[Tensor], batch: int, keep: bool, all_c: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    cell, (directions, hidden, shown, wide) = CELLS[mode], _sizes(mode, weight_hh)
    rows = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    steps, new = x.shape[:-1], x.new_empty
    keep_extra = cell.has_extra and (keep or (all_c and cell.has_cell_state))
    return (
        new((*steps, directions * shown)),
        new((directions, batch, shown)),
        new((directions, batch, hidden)) if cell.has_cell_state else None,
        new((*steps, directions * hidden), dtype=_state_dtype(x)) if keep_extra else None,
        new((directions, rows, wide)) if cell.saves_gates and keep else None,
    )


def _scan_forward(
    mode: str,
    x: Tensor,
    weight_ih: list[Tensor],
    weight_hh: list[Tensor],
    weight_hr: list[Tensor],
    bias_ih: list[Tensor],
    bias_hh: list[Tensor],
    h_0: Tensor | None,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    batch: int,
    reverse: bool,
    keep: bool,
    all_c: bool,
) -> tuple[Tensor | None, ...]:
    """fastrnn::scan_forward, with None for the results that there are not."""
    batch = x.shape[1] if batch_sizes is None else batch  # a trace knows only the number
    cell, (directions, hidden, shown, wide) = CELLS[mode], _sizes(mode, weight_hh)
    steps, rows, batch_sizes_address = _layout(x, batch_sizes, batch)
    inputs = x.shape[-1]
    memory = _Memory(x.dtype)
    x = x.contiguous()
    results = _forward_outputs(mode, x, weight_hh, batch, keep, all_c)
    output, h_n, c_n, extra, gates = results
    _cpu.forward(
        cell.index,
        _DTYPES[x.dtype],
        (steps, batch, hidden, shown, directions),
        rows,
        batch_sizes_address,
        memory.at("resets", resets, x.shape[:-1], torch.bool),
        reverse,
        inputs,
        x.data_ptr(),
        memory.each("weight_ih", weight_ih, (wide, inputs)),
        memory.each("weight_hh", weight_hh, (wide, shown)),
        memory.each("weight_hr", weight_hr, (shown, hidden)),
        memory.each("bias_ih", bias_ih, (wide,)),
        memory.each("bias_hh", bias_hh, (wide,)),
        memory.at("h_0", h_0, (directions, batch, shown)),
        memory.at("c_0", c_0, (directions, batch, hidden)),
        output.data_ptr(),
        h_n.data_ptr(),
        _address(c_n),
        [] if gates is None else _parts(gates),
        _address(extra),
        torch.get_num_threads(),
    )
    return results


def _gradient_shapes(
    mode: str, x: Tensor, weight_hh: list[Tensor], batch: int
) -> tuple[tuple[int, ...], ...]:
    """Of one direction: x, h_0, c_0, the three weights and the biases."""
    _, hidden, shown, wide = _sizes(mode, weight_hh)
    return (
        tuple(x.shape),
        (batch, shown),
        (batch, hidden),
        (wide, x.shape[-1]),
        (wide, shown),
        (shown, hidden),
        (wide,),
        (wide,),
    )


def _backward_outputs(
    mode: str, x: Tensor, weight_hh: list[Tensor], batch: int, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x (the part of each direction), h_0, c_0, the three weights and the biases.

    `wanted` says which of x, h_0, c_0, each weight and both biases; the others are empty.
    """
    directions = len(weight_hh)
    shapes = _gradient_shapes(mode, x, weight_hh, batch)
    return tuple(
        x.new_empty((directions, *shape) if w else 0)
        for shape, w in zip(shapes, (*wanted, wanted[-1]))
    )


def _separate_outputs(
    mode: str, x: Tensor, weight_hh: list[Tensor], batch: int, wanted: list[bool]
) -> tuple[Tensor | list[Tensor] | None, ...]:
    """The same with a list per direction for each weight, and None for what is not wanted.

    To cut a tensor into its parts takes longer than to make them.
    """
    each = range(len(weight_hh))
    shapes = _gradient_shapes(mode, x, weight_hh, batch)
    return (
        *(x.new_empty((len(each), *s)) if w else None for s, w in zip(shapes[:3], wanted)),
        *(
            [x.new_empty(s) for _ in each] if w else []
            for s, w in zip(shapes[3:], (*wanted[3:], wanted[-1]))
        ),
    )


def _scan_backward(
    outputs: Callable[..., tuple[Any, ...]],
    mode: str,
    x: Tensor,
    weight_ih: list[Tensor],
    weight_hh: list[Tensor],
    weight_hr: list[Tensor],
    h_0: Tensor | None,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    batch: int,
    reverse: bool,
    output: Tensor,
    extra: Tensor,
    gates: Tensor,
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    d_extra: Tensor | None,
    wanted: list[bool],
) -> tuple[Any, ...]:
    """fastrnn::scan_backward into what `outputs` allocates."""
    cell, (directions, hidden, shown, wide) = CELLS[mode], _sizes(mode, weight_hh)
    steps, rows, batch_sizes_address = _layout(x, batch_sizes, batch)
    inputs = x.shape[-1]
    memory = _Memory(x.dtype)
    sequence, states = (*x.shape[:-1], directions * shown), (directions, batch, shown)
    cells, cell_states = (*x.shape[:-1], directions * hidden), (directions, batch, hidden)
    x = x.contiguous()
    results = outputs(mode, x, weight_hh, batch, wanted)
    d_x, d_h_0, d_c_0, d_w_ih, d_w_hh, d_w_hr, d_b_ih, d_b_hh = results
    if cell.saves_gates:
        gates = gates.contiguous()
        memory.at("gates", gates, (directions, rows, wide))
    _cpu.backward(
        cell.index,
        _DTYPES[x.dtype],
        (steps, batch, hidden, shown, directions),
        rows,
        batch_sizes_address,
        memory.at("resets", resets, x.shape[:-1], torch.bool),
        reverse,
        inputs,
        x.data_ptr(),
        memory.each("weight_ih", weight_ih, (wide, inputs)),
        memory.each("weight_hh", weight_hh, (wide, shown)),
        memory.each("weight_hr", weight_hr, (shown, hidden)),
        memory.at("h_0", h_0, states),
        memory.at("c_0", c_0, cell_states),
        memory.at("output", output, sequence),
        _parts(gates),
        memory.at("extra", extra, cells, _state_dtype(x)) if cell.has_extra else 0,
        memory.at("d_output", d_output, sequence),
        memory.at("d_h_n", d_h_n, states),
        memory.at("d_c_n", d_c_n, cell_states),
        memory.at("d_extra", d_extra, cells, _state_dtype(x)),
        _address(d_x),
        _address(d_h_0),
        _address(d_c_0),
        [d.data_ptr() for d in d_w_ih],
        [d.data_ptr() for d in d_w_hh],
        [d.data_ptr() for d in d_w_hr],
        [d.data_ptr() for d in d_b_ih],
        [d.data_ptr() for d in d_b_hh],
        torch.get_num_threads(),
    )
    return results


def filled(x: Tensor, results: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """The results, with the empty tensors by which an operator says that there is none."""
    return tuple(x.new_empty(0) if r is None else r for r in results)


_library.impl(
    "scan_forward", lambda mode, x, *args: filled(x, _scan_forward(mode, x, *args)), "CPU"
)
_library.impl("scan_backward", partial(_scan_backward, _backward_outputs), "CPU")
if _cuda is not None:
    from ._cuda_ops import Scan

    _on_cuda = Scan(_cuda)
    _library.impl("scan_forward", _on_cuda.forward, "CUDA")
    _library.impl("scan_backward", _on_cuda.backward, "CUDA")


@torch.library.register_fake("fastrnn::scan_forward")
def _(  # type: ignore[no-untyped-def]
    mode, x, weight_ih, weight_hh, weight_hr, bias_ih, bias_hh, h_0, c_0, batch_sizes, resets,
    batch, reverse, keep, all_c,
):  # fmt: skip
    return filled(x, _forward_outputs(mode, x, weight_hh, batch, keep, all_c))


@torch.library.register_fake("fastrnn::scan_backward")
def _(  # type: ignore[no-untyped-def]
    mode, x, weight_ih, weight_hh, weight_hr, h_0, c_0, batch_sizes, resets, batch, reverse,
    output, extra, gates, d_output, d_h_n, d_c_n, d_extra, wanted,
):  # fmt: skip
    return _backward_outputs(mode, x, weight_hh, batch, wanted)


scan_forward = torch.ops.fastrnn.scan_forward.default
scan_backward = torch.ops.fastrnn.scan_backward.default
scan_forward_cpu = _scan_forward
scan_backward_cpu = partial(_scan_backward, _separate_outputs)
