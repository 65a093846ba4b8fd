"""The scan as torch operators: fastrnn::scan_forward and fastrnn::scan_backward.

They take tensors, check them, allocate the results and hand plain pointers to the kernels. Sizes and
layout are those of csrc/scan.h: N rows of features, T * B of them, or as many as batch_sizes adds up to.

Registered by define + impl + register_fake: an order of magnitude less time per call than the
custom_op decorator.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from . import _cpu
except ImportError as error:
    if "GOMP" in str(error) or "omp_" in str(error):
        raise ImportError(
            "fastrnn uses the OpenMP runtime that torch loads, and this torch "
            f"({torch.__version__}) has not made it visible: {error}"
        ) from error
    raise

CELLS = _cpu.cells
_DTYPES = {torch.float32: 0, torch.float64: 1}

_library = torch.library.Library("fastrnn", "DEF")
_library.define(
    "scan_forward(str mode, Tensor(a!)[] gates, Tensor[] weight_hh, Tensor[] bias_hh, Tensor? h_0, "
    "Tensor? c_0, Tensor? batch_sizes, SymInt steps, SymInt batch, bool keep) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor extra)"
)
_library.define(
    "scan_backward(str mode, Tensor[] gates, Tensor[] weight_hh, Tensor? h_0, Tensor? c_0, "
    "Tensor output, Tensor extra, Tensor? batch_sizes, SymInt steps, SymInt batch, "
    "Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_extra, bool want_d_h_0, "
    "bool want_d_c_0) -> (Tensor d_gates, Tensor d_gates_hh, Tensor d_h_0, Tensor d_c_0)"
)


def has_kernel(x: Tensor) -> bool:
    """Whether the scan has a compiled kernel for x's device and dtype."""
    return x.device.type == "cpu" and x.dtype in _DTYPES


def _check(name: str, tensor: Tensor | None, like: Tensor, *shape: int) -> int:
    """The address of a contiguous tensor of this shape and like's dtype; 0 for None."""
    if tensor is None:
        return 0
    if (
        tensor.shape != shape
        or tensor.dtype != like.dtype
        or tensor.device != like.device
        or not tensor.is_contiguous()
    ):
        raise ValueError(
            f"{name}: expected a contiguous {like.dtype} tensor of shape {list(shape)} on "
            f"{like.device}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            + ("" if tensor.is_contiguous() else ", not contiguous")
        )
    return tensor.data_ptr()


def _check_batch_sizes(batch_sizes: Tensor | None, steps: int) -> int:
    if batch_sizes is None:
        return 0
    if (
        batch_sizes.dtype != torch.int64
        or batch_sizes.shape != (steps,)
        or batch_sizes.device.type != "cpu"
        or not batch_sizes.is_contiguous()
    ):
        raise ValueError(
            f"batch_sizes: expected a contiguous int64 CPU tensor of shape [{steps}], got "
            f"{batch_sizes.dtype} {list(batch_sizes.shape)} on {batch_sizes.device}"
        )
    return batch_sizes.data_ptr()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward_outputs(
    mode: str, gates: list[Tensor], batch: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cell, directions = CELLS[mode], len(gates)
    rows, hidden = gates[0].shape[0], gates[0].shape[1] // cell.gates
    new = gates[0].new_empty
    return (
        new(rows, directions * hidden),
        new(directions, batch, hidden),
        new(directions, batch, hidden) if cell.has_cell_state else new(0),
        new(rows, directions * hidden) if cell.has_extra and keep else new(0),
    )


def _scan_forward(
    mode: str,
    gates: list[Tensor],
    weight_hh: list[Tensor],
    bias_hh: list[Tensor],
    h_0: Tensor | None,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    steps: int,
    batch: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cell, like, directions = CELLS[mode], gates[0], len(gates)
    rows, hidden = like.shape[0], like.shape[1] // cell.gates
    wide = cell.gates * hidden
    weight_hh = [w.contiguous() for w in weight_hh]
    bias_hh = [b.contiguous() for b in bias_hh]
    h_0, c_0 = _contiguous(h_0), _contiguous(c_0)
    results = _forward_outputs(mode, gates, batch, keep)
    output, h_n, c_n, extra = results
    _cpu.forward(
        cell.index,
        _DTYPES[like.dtype],
        (steps, batch, hidden, directions),
        rows,
        _check_batch_sizes(batch_sizes, steps),
        [_check("weight_hh", w, like, wide, hidden) for w in weight_hh],
        [_check("bias_hh", b, like, wide) for b in bias_hh],
        _check("h_0", h_0, like, directions, batch, hidden),
        _check("c_0", c_0, like, directions, batch, hidden),
        [_check("gates", g, like, rows, wide) for g in gates],
        output.data_ptr(),
        h_n.data_ptr(),
        c_n.data_ptr(),
        extra.data_ptr(),
        keep,
        torch.get_num_threads(),
    )
    return results


def _backward_outputs(
    mode: str, gates: list[Tensor], batch: int, want_d_h_0: bool, want_d_c_0: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cell, directions = CELLS[mode], len(gates)
    rows, wide = gates[0].shape
    hidden = wide // cell.gates
    new = gates[0].new_empty
    return (
        new(directions, rows, wide),
        new(directions, rows, wide) if cell.splits_gradient else new(0),
        new(directions, batch, hidden) if want_d_h_0 else new(0),
        new(directions, batch, hidden) if want_d_c_0 else new(0),
    )


def _scan_backward(
    mode: str,
    gates: list[Tensor],
    weight_hh: list[Tensor],
    h_0: Tensor | None,
    c_0: Tensor | None,
    output: Tensor,
    extra: Tensor,
    batch_sizes: Tensor | None,
    steps: int,
    batch: int,
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    d_extra: Tensor | None,
    want_d_h_0: bool,
    want_d_c_0: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cell, like, directions = CELLS[mode], gates[0], len(gates)
    rows, hidden = like.shape[0], like.shape[1] // cell.gates
    wide, features = cell.gates * hidden, directions * hidden
    weight_hh = [w.contiguous() for w in weight_hh]
    h_0, c_0 = _contiguous(h_0), _contiguous(c_0)
    d_output, d_extra = _contiguous(d_output), _contiguous(d_extra)
    d_h_n, d_c_n = _contiguous(d_h_n), _contiguous(d_c_n)
    results = _backward_outputs(mode, gates, batch, want_d_h_0, want_d_c_0)
    d_gates, d_gates_hh, d_h_0, d_c_0 = results
    d_x = [g.data_ptr() for g in d_gates]
    _cpu.backward(
        cell.index,
        _DTYPES[like.dtype],
        (steps, batch, hidden, directions),
        rows,
        _check_batch_sizes(batch_sizes, steps),
        [_check("weight_hh", w, like, wide, hidden) for w in weight_hh],
        _check("h_0", h_0, like, directions, batch, hidden),
        _check("c_0", c_0, like, directions, batch, hidden),
        [_check("gates", g, like, rows, wide) for g in gates],
        _check("output", output, like, rows, features),
        _check("extra", extra, like, rows, features) if cell.has_extra else 0,
        _check("d_output", d_output, like, rows, features),
        _check("d_h_n", d_h_n, like, directions, batch, hidden),
        _check("d_c_n", d_c_n, like, directions, batch, hidden),
        _check("d_extra", d_extra, like, rows, features),
        d_x,
        [g.data_ptr() for g in d_gates_hh] if cell.splits_gradient else d_x,
        d_h_0.data_ptr(),
        d_c_0.data_ptr(),
        torch.get_num_threads(),
    )
    return results


_library.impl("scan_forward", _scan_forward, "CPU")
_library.impl("scan_backward", _scan_backward, "CPU")


@torch.library.register_fake("fastrnn::scan_forward")
def _(  # type: ignore[no-untyped-def]
    mode, gates, weight_hh, bias_hh, h_0, c_0, batch_sizes, steps, batch, keep
):
    return _forward_outputs(mode, gates, batch, keep)


@torch.library.register_fake("fastrnn::scan_backward")
def _(  # type: ignore[no-untyped-def]
    mode, gates, weight_hh, h_0, c_0, output, extra, batch_sizes, steps, batch,
    d_output, d_h_n, d_c_n, d_extra, want_d_h_0, want_d_c_0,
):  # fmt: skip
    return _backward_outputs(mode, gates, batch, want_d_h_0, want_d_c_0)


scan_forward = torch.ops.fastrnn.scan_forward.default
scan_backward = torch.ops.fastrnn.scan_backward.default
