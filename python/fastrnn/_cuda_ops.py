"""The scan operators on CUDA: the large products by torch, what must be sequential by our kernels.

forward:  gates = x W_ih^T + b_ih of all steps, in one product per direction; then the scan, which
          turns them into activated gates in place.
backward: the scan, which leaves the gradients of the gates of all steps; then all other gradients
          as products with them.

A projected h = W_hr m runs as the same scan, over m, with W_hh W_hr for W_hh.

`batch_sizes` may also be a mask: bool [T, B] on the device, for x [T, B, I]; steps that are not
real show zeros. Nothing here waits for the device or takes memory from anyone but torch, so that a
call can be captured in a CUDA graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._ops import (
    _DTYPES,
    CELLS,
    _address,
    _backward_outputs,
    _forward_outputs,
    _layout,
    _Sizes,
    _sizes,
    _state_dtype,
    filled,
)

# In a table of the steps before: the initial state, and zeros; see csrc/cuda/scan.h.
_INITIAL, _CUT = -1, -2


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _expect(
    like: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
    **given: Tensor | list[Tensor] | None,
) -> None:
    """ValueError unless each is of this shape, of like's device, and of its dtype or `dtype`.

    To the kernels they are addresses.
    """
    dtype = like.dtype if dtype is None else dtype
    for name, tensors in given.items():
        for t in tensors if isinstance(tensors, list) else [tensors]:
            if t is None or (t.shape == shape and t.dtype == dtype and t.device == like.device):
                continue
            raise ValueError(
                f"{name}: expected a {dtype} tensor of shape {list(shape)} on {like.device}, got "
                f"{t.dtype} {list(t.shape)} on {t.device}"
            )


def _check(
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
) -> _Sizes:
    """What both passes are given."""
    directions, hidden, shown, wide = sizes = _sizes(mode, weight_hh)
    for name, each in (("weight_ih", weight_ih), ("weight_hr", weight_hr or weight_hh)):
        if len(each) != directions:
            raise ValueError(f"{name}: expected one tensor per direction, got {len(each)}")
    if reverse and directions == 2:
        raise ValueError("reverse: expected a single direction, got 2")
    if c_0 is not None and not CELLS[mode].has_cell_state:
        raise ValueError(f"c_0: expected None for {mode}, which has no cell state")
    if not weight_hr and shown != hidden:
        raise ValueError(f"weight_hh: expected {hidden} columns, got {shown}")
    _expect(x, (wide, x.shape[-1]), weight_ih=weight_ih)
    _expect(x, (wide, shown), weight_hh=weight_hh)
    _expect(x, (shown, hidden), weight_hr=weight_hr)
    _expect(x, (directions, batch, shown), h_0=h_0)
    _expect(x, (directions, batch, hidden), c_0=c_0)
    _expect(x, x.shape[:-1], torch.bool, resets=resets)
    if batch_sizes is not None and batch_sizes.dtype == torch.bool:
        _expect(x, (*x.shape[:-2], batch), torch.bool, mask=batch_sizes)
        return sizes
    _layout(x, batch_sizes, batch)
    if batch_sizes is not None:
        alive = batch_sizes.tolist()
        most = [batch, *alive]
        if sum(alive) != len(x) or min(most) < 0 or any(a > b for a, b in zip(alive, most)):
            raise ValueError(
                f"batch_sizes: expected not to increase, to lie in [0, {batch}] and to add up to "
                f"{len(x)}, got {alive if len(alive) < 9 else f'{len(alive)} steps'}"
            )
    return sizes


class _Rows:
    """Where the steps of each row lie among all N, and what comes before each.

    The tables are those of Places in csrc/cuda/scan.h, None where every row lives, unbroken, for
    all steps.
    """

    place: Tensor | None = None  # int64 [T, B]
    before: list[Tensor] | None = None  # int64 [T, B], one per direction
    lengths: Tensor | None = None  # int64 [B]
    mask: Tensor | None = None  # bool [T, B]

    def __init__(
        self,
        x: Tensor,
        real: Tensor | None,
        resets: Tensor | None,
        batch: int,
        directions: int,
        reverse: bool,
    ) -> None:
        self.batch, self.count, self.device = batch, x.shape[:-1].numel(), x.device
        self.reverse = (True,) if reverse else (False, True)[:directions]  # of each direction
        self.steps = len(x if real is None else real)
        if real is None and resets is None:
            return
        if real is not None and real.dtype != torch.bool:
            sizes = real.unsqueeze(1)
            row = torch.arange(batch, device=x.device)
            place = torch.where(row < sizes, sizes.cumsum(0) - sizes + row, -1)
            self.lengths = (row < sizes).sum(0)
        else:
            place = torch.arange(self.count, device=x.device).view(-1, batch)
            if real is not None:
                self.mask = real = real.contiguous()  # whose strides the tables take
                self.lengths = torch.where(real, place // batch + 1, 0).amax(0)
                place = torch.where(real, place, -1)
        self.place = place
        self.before = [self._find_before(place, resets, reverse) for reverse in self.reverse]

    def _find_before(self, place: Tensor, resets: Tensor | None, reverse: bool) -> Tensor:
        if reverse:
            place = place.flip(0)
        t = torch.arange(len(place), device=self.device).unsqueeze(1)
        last = torch.where(place >= 0, t, -1).cummax(0).values
        last = torch.cat((torch.full_like(last[:1], -1), last[:-1]))
        before = torch.where(last >= 0, place.gather(0, last.clamp(min=0)), _INITIAL)
        if resets is not None:
            # A boundary belongs to the later of the two steps beside it.
            later = before if reverse else place
            cut = resets.flatten()[later.clamp(min=0)] & (later >= 0)
            before = torch.where(cut, _CUT, before)
        return (before.flip(0) if reverse else before).contiguous()

    def addresses(self) -> tuple[int, list[int], int]:
        # Without lengths, steps lie in their plain order.
        place = None if self.lengths is None else self.place
        before = [table.data_ptr() for table in self.before or ()]
        return _address(place), before, _address(self.lengths)

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
        """[N, H]: what went into each step, of output [N, H] and h_0 [B, H] or None for zeros."""
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


def _rows_at(table: Tensor, index: Tensor, other: Tensor | None) -> Tensor:
    """Rows of [N, features] at index [B]; where that is N, the row of `other`, or zeros."""
    found = table.index_select(0, index.clamp(max=len(table) - 1))
    return torch.where((index < len(table)).unsqueeze(1), found, 0 if other is None else other)


def _allows_tf32() -> bool:
    """Whether torch would let nn.LSTM round float32 on CUDA."""
    precision = getattr(getattr(torch.backends.cudnn, "rnn", None), "fp32_precision", None)
    return torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"


class Scan:
    """fastrnn::scan_forward and scan_backward on compiled kernels.

    `kernels` is the extension, fastrnn._cuda, or the one that the tests build for a CPU, where
    `device` is the compute capability to stand in for. `choose` may replace the kernels' make_plan,
    and FASTRNN_CUDA_PLAN=step|grid|cluster in the environment prefers a kind where it can run.
    """

    def __init__(
        self,
        kernels: ModuleType,
        choose: Callable[[Any, Any], Any] | None = None,
        device: int = 0,
    ) -> None:
        self._kernels, self._device = kernels, device
        self._choose = choose or self._make_plan
        kind = os.environ.get("FASTRNN_CUDA_PLAN", "").upper()
        if kind and kind not in kernels.Kind.__members__:
            names = "|".join(kernels.Kind.__members__).lower()
            raise ValueError(f"FASTRNN_CUDA_PLAN: expected {names}, got {kind.lower()}")
        self._kind = kernels.Kind[kind] if kind else None
        self._plan = lru_cache(maxsize=1024)(self._find_plan)

    def _make_plan(self, problem: Any, device: Any) -> Any:
        plan = self._kernels.make_plan(problem, device, self._kind)
        return plan or self._kernels.make_plan(problem, device)

    def _find_plan(self, device: int, *numbers: Any) -> tuple[Any, Any, int]:
        """Problem, plan and the bytes of workspace."""
        problem = self._kernels.Problem(*numbers)
        plan = self._choose(problem, self._kernels.device_info(device))
        return problem, plan, plan.workspace(problem)

    def _where(self, device: torch.device) -> tuple[int, int]:
        """Its number and stream."""
        if device.type != "cuda":
            return self._device, 0
        stream = torch.cuda.current_stream(device)
        return stream.device_index, stream.cuda_stream

    def upload(self, values: Tensor, device: torch.device) -> Tensor:
        """A copy of the CPU's int64 values, by arguments of launches: nothing waits, and a CUDA
        graph keeps what stands in them."""
        values = values.contiguous()
        copy = torch.empty_like(values, device=device)
        with torch.cuda.device(device) if copy.is_cuda else nullcontext():
            numbers = values.data_ptr(), values.numel(), copy.data_ptr()
            self._kernels.upload(*self._where(copy.device), *numbers)
        return copy

    def _rows(
        self,
        x: Tensor,
        real: Tensor | None,
        resets: Tensor | None,
        batch: int,
        directions: int,
        reverse: bool,
    ) -> _Rows:
        if real is not None and real.dtype != torch.bool:
            real = self.upload(real, x.device)
        return _Rows(x, real, resets, batch, directions, reverse)

    def _run(
        self,
        backward: bool,
        mode: str,
        x: Tensor,
        rows: _Rows,
        sizes: _Sizes,
        weight_hh: list[Tensor],
        *addresses: Any,
    ) -> None:
        """The scan alone; `addresses` are what its pass takes after weight_hh."""
        device, stream = self._where(x.device)
        cell = CELLS[mode].index
        reverse = sizes.directions == 1 and rows.reverse[0]
        numbers = _DTYPES[x.dtype], rows.steps, rows.batch, sizes.hidden, sizes.directions, reverse
        problem, plan, size = self._plan(device, backward, cell, *numbers, _allows_tf32())
        workspace = x.new_empty(size, dtype=torch.uint8)
        (self._kernels.backward if backward else self._kernels.forward)(
            cell,
            problem,
            plan,
            device,
            stream,
            workspace.data_ptr(),
            rows.count,
            *rows.addresses(),
            [w.data_ptr() for w in weight_hh],
            *addresses,
        )

    def forward(
        self,
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
    ) -> tuple[Tensor, ...]:
        batch = x.shape[1] if batch_sizes is None else batch  # a trace knows only the number
        weights = weight_ih, weight_hh, weight_hr
        sizes = _check(mode, x, *weights, h_0, c_0, batch_sizes, resets, batch, reverse)
        _expect(x, (sizes.wide,), bias_ih=bias_ih, bias_hh=bias_hh)
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            x, h_0, c_0 = x.contiguous(), _contiguous(h_0), _contiguous(c_0)
            results = _forward_outputs(mode, x, weight_hh, batch, keep, all_c)
            output, h_n, c_n, extra, gates = results
            inputs = x.view(-1, x.shape[-1])
            if not len(inputs):  # nothing to do but to hand the states on
                for last, first in ((h_n, h_0), (c_n, c_0)):
                    if last is not None:
                        last.zero_() if first is None else last.copy_(first)
                return filled(x, results)
            rows = self._rows(x, batch_sizes, resets, batch, sizes.directions, reverse)
            keeps_gates = gates is not None
            if gates is None:
                gates = x.new_empty(sizes.directions, rows.count, sizes.wide)
            for d in range(sizes.directions):
                if bias_ih:
                    torch.addmm(bias_ih[d], inputs, weight_ih[d].t(), out=gates[d])
                else:
                    torch.mm(inputs, weight_ih[d].t(), out=gates[d])
            if rows.mask is not None:
                output.zero_()
                if extra is not None:
                    extra.zero_()
            shown, last, own_h_0 = output, h_n, h_0
            if weight_hr:
                shown = x.new_zeros(*x.shape[:-1], sizes.directions * sizes.hidden)
                assert c_n is not None  # an LSTM
                last, own_h_0 = torch.empty_like(c_n), None
                self._add_initial(gates, rows, weight_hh, h_0)
                weight_hh = [hh @ hr for hh, hr in zip(weight_hh, weight_hr)]
            # Held here until the kernels are in the stream.
            weight_hh = [w.contiguous() for w in weight_hh]
            bias_hh = [b.contiguous() for b in bias_hh]
            self._run(
                False,
                mode,
                x,
                rows,
                sizes,
                weight_hh,
                [b.data_ptr() for b in bias_hh],
                _address(own_h_0),
                _address(c_0),
                gates.data_ptr(),
                keeps_gates,
                shown.data_ptr(),
                last.data_ptr(),
                _address(c_n),
                _address(extra),
            )
            if weight_hr:
                every = output.view(rows.count, sizes.directions, sizes.shown)
                unprojected = shown.view(rows.count, sizes.directions, sizes.hidden)
                for d in range(sizes.directions):
                    every[:, d] = unprojected[:, d] @ weight_hr[d].t()
                    initial = None if h_0 is None else h_0[d]
                    h_n[d] = _rows_at(every[:, d], rows.last(d), initial)
        return filled(x, results)

    @staticmethod
    def _add_initial(
        gates: Tensor, rows: _Rows, weight_hh: list[Tensor], h_0: Tensor | None
    ) -> None:
        """Adds W_hh h_0 to the gates of the steps that h_0 goes into."""
        if h_0 is None:
            return
        for d, weight in enumerate(weight_hh):
            index = rows.first(d)
            change = torch.where((index < rows.count).unsqueeze(1), h_0[d] @ weight.t(), 0)
            gates[d].index_add_(0, index.clamp(max=rows.count - 1), change)

    def backward(
        self,
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
    ) -> tuple[Tensor, ...]:
        weights = weight_ih, weight_hh, weight_hr
        sizes = _check(mode, x, *weights, h_0, c_0, batch_sizes, resets, batch, reverse)
        directions, hidden, shown, wide = sizes
        cell, steps, count = CELLS[mode], x.shape[:-1], x.shape[:-1].numel()
        _expect(x, (*steps, directions * shown), output=output, d_output=d_output)
        _expect(x, (directions, batch, shown), d_h_n=d_h_n)
        _expect(x, (directions, batch, hidden), d_c_n=d_c_n)
        if cell.saves_gates:
            _expect(x, (directions, count, wide), gates=gates)
        every = (*steps, directions * hidden)
        _expect(x, every, _state_dtype(x), extra=extra if cell.has_extra else None, d_extra=d_extra)
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            x, h_0, c_0 = x.contiguous(), _contiguous(h_0), _contiguous(c_0)
            d_output, d_extra = _contiguous(d_output), _contiguous(d_extra)
            d_h_n, d_c_n = _contiguous(d_h_n), _contiguous(d_c_n)
            output, extra, gates = (t.contiguous() for t in (output, extra, gates))
            results = _backward_outputs(mode, x, weight_hh, batch, wanted)
            d_x, d_h_0, d_c_0, d_w_ih, d_w_hh, _, d_b_ih, d_b_hh = results
            inputs = x.view(-1, x.shape[-1])
            if not len(inputs):
                for d_result, given in zip(results, (None, d_h_n, d_c_n, *[None] * 5)):
                    if given is None or not d_result.numel():
                        d_result.zero_()
                    else:
                        d_result.copy_(given)
                return results
            rows = self._rows(x, batch_sizes, resets, batch, directions, reverse)
            new = x.new_empty if rows.mask is None else x.new_zeros
            d_gates = new((directions, rows.count, wide))
            splits = self._kernels.splits_gradient(CELLS[mode].index)
            d_recurrent = new((directions, rows.count, hidden) if splits else 0)
            scanned = _Scanned(weight_hh, h_0, output, d_output, d_h_n, d_h_0)
            if weight_hr:
                scanned = _unproject(scanned, rows, sizes, weight_hr, gates, extra)
            hh = [w.contiguous() for w in scanned.weight_hh]
            self._run(
                True,
                mode,
                x,
                rows,
                sizes,
                hh,
                _address(scanned.h_0),
                _address(c_0),
                scanned.output.data_ptr(),
                _address(gates),
                _address(extra),
                _address(scanned.d_output),
                _address(scanned.d_h_n),
                _address(d_c_n),
                _address(d_extra),
                d_gates.data_ptr(),
                _address(d_recurrent),
                _address(scanned.d_h_0),
                _address(d_c_0),
            )
            if rows.mask is not None:  # 0 * NaN
                inputs = inputs.masked_fill(~rows.mask.view(-1, 1), 0)
            states = output.view(rows.count, directions, shown)
            for d in range(directions):
                # The gradients of W_hh h: those of W_ih x, but for the last gate of some cells.
                own = wide - hidden if splits else wide
                parts = [d_gates[d, :, :own]] + ([d_recurrent[d]] if splits else [])
                if d_x.numel():
                    torch.mm(d_gates[d], weight_ih[d], out=d_x[d].view_as(inputs))
                if d_w_ih.numel():
                    torch.mm(d_gates[d].t(), inputs, out=d_w_ih[d])
                if d_w_hh.numel():
                    initial = None if h_0 is None else h_0[d]
                    d_w_hh[d] = _recurrent_product(parts, states[:, d], initial, rows, d)
                if d_b_ih.numel():
                    torch.sum(d_gates[d], 0, out=d_b_ih[d])
                    d_b_hh[d] = d_b_ih[d]
                    if splits:
                        torch.sum(d_recurrent[d], 0, out=d_b_hh[d, own:])
            if weight_hr:
                _project_gradients(
                    results, scanned, rows, sizes, weight_hh, d_gates, d_output, d_h_n
                )
        return results


def _recurrent_product(
    parts: list[Tensor], output: Tensor, h_0: Tensor | None, rows: _Rows, direction: int
) -> Tensor:
    """[sum of columns, H]: parts^T, each [N, columns], times the states before each step."""
    before = rows.states_before(output, h_0, direction)
    return torch.cat([part.t() @ before for part in parts])


# Projections (LSTM): h = W_hr m, where the scan runs over m.


class _Scanned:
    """What the scan over h, or over m in its place, reads."""

    def __init__(
        self,
        weight_hh: list[Tensor],
        h_0: Tensor | None,
        output: Tensor,
        d_output: Tensor | None,
        d_h_n: Tensor | None,
        d_h_0: Tensor | None,
    ) -> None:
        self.weight_hh, self.h_0, self.output = weight_hh, h_0, output
        self.d_output, self.d_h_n, self.d_h_0 = d_output, d_h_n, d_h_0


def _unproject(
    given: _Scanned,
    rows: _Rows,
    sizes: _Sizes,
    weight_hr: list[Tensor],
    gates: Tensor,
    extra: Tensor,
) -> _Scanned:
    """The scan over m: m = o * tanh(c) again, and gradients of h times W_hr."""
    directions, hidden, shown, _ = sizes
    cells = extra.view(rows.count, directions, hidden)
    m = torch.stack([gates[d, :, -hidden:] * cells[:, d].tanh() for d in range(directions)], 1)
    if rows.mask is not None:
        m = m.masked_fill(~rows.mask.view(-1, 1, 1), 0)
    d_output, d_h_n = given.d_output, given.d_h_n
    if d_output is not None:
        steps = d_output.view(rows.count, directions, shown)
        parts = [steps[:, d] @ weight_hr[d] for d in range(directions)]
        d_output = torch.stack(parts, 1)
    if d_h_n is not None:
        d_h_n = torch.stack([d_h_n[d] @ weight_hr[d] for d in range(directions)])
    weight_hh = [hh @ hr for hh, hr in zip(given.weight_hh, weight_hr)]
    return _Scanned(weight_hh, None, m.to(gates.dtype), d_output, d_h_n, None)


def _project_gradients(
    results: tuple[Tensor, ...],
    scanned: _Scanned,
    rows: _Rows,
    sizes: _Sizes,
    weight_hh: list[Tensor],
    d_gates: Tensor,
    d_output: Tensor | None,
    d_h_n: Tensor | None,
) -> None:
    """The gradients of W_hr, from every h_t that it made, and of h_0."""
    _, d_h_0, _, _, _, d_w_hr, *_ = results
    directions, hidden, shown, _ = sizes
    m = scanned.output.view(rows.count, directions, hidden)
    for d in range(directions):
        if d_w_hr.numel():
            before = _recurrent_product([d_gates[d]], m[:, d], None, rows, d)
            d_w_hr[d] = weight_hh[d].t() @ before
            if d_output is not None:
                steps = d_output.view(rows.count, directions, shown)[:, d]
                if rows.mask is not None:
                    steps = steps.masked_fill(~rows.mask.view(-1, 1), 0)
                d_w_hr[d] += steps.t() @ m[:, d]
            if d_h_n is not None:
                d_w_hr[d] += d_h_n[d].t() @ _rows_at(m[:, d], rows.last(d), None)
        if d_h_0.numel():
            first = _rows_at(d_gates[d], rows.first(d), None) @ weight_hh[d]
            if rows.lengths is not None and d_h_n is not None:  # rows without steps hand it through
                first += torch.where((rows.lengths == 0).unsqueeze(1), d_h_n[d], 0)
            d_h_0[d] = first
