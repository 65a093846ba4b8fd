"""The CUDA backend: the large products by torch, what must be sequential by our kernels.

forward:  gates = x W_ih^T + b_ih of all steps, in one product per direction; then the scan, which
          turns them into activated gates in place.
backward: the scan, which leaves the gradients of the gates of all steps; then all other gradients
          as products with them.

A projected h = W_hr m runs as the same scan, over m, with W_hh W_hr for W_hh.

Nothing here waits for the device or takes memory from anyone but torch, so that a call can be
captured in a CUDA graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._backends import DTYPES, Backend, register
from ._cuda_rows import Rows, rows_at
from ._kernels import Toolchain, find_compiler, load
from ._layer import BUILT_IN, TENSORS, Layer, Results, Saved
from ._load import _cpu, _cuda
from ._segments import Part, backward_in_segments, forward_in_segments


def allows_tf32() -> bool:
    """Whether torch would let nn.LSTM round float32 on CUDA."""
    precision = getattr(_cudnn_rnn, "fp32_precision", None)
    return torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"


_cudnn_rnn = getattr(torch.backends.cudnn, "rnn", None)  # to find it takes longer than to ask it


class _Rounding:
    """Lets torch's own products round float32 to TF32, or not, as the scan does.

    torch has a setting for cuDNN, which is for all products of a layer, and another for cuBLAS, off
    by default. No product can be told by itself, and the setting is one for all threads. So it is
    changed only where the two differ: by the first of the calls that run at the same time, until
    the last of them ends. A product that the user's own threads start meanwhile follows it, too.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._calls = 0
        self._before: tuple[bool, str | None] | None = None  # where it was changed

    def __call__(self, allowed: bool) -> _Rounded:
        return _Rounded(self, allowed)

    def begin(self, allowed: bool) -> None:
        with self._lock:
            self._calls += 1
            if self._calls == 1:
                self._change(allowed)

    def end(self) -> None:
        with self._lock:
            self._calls -= 1
            if self._calls == 0:
                self._restore()

    def _change(self, allowed: bool) -> None:
        matmul = torch.backends.cuda.matmul
        new = getattr(matmul, "fp32_precision", None)
        before = matmul.allow_tf32 if new is None else new == "tf32"
        if before != allowed:
            self._before = before, new
            matmul.allow_tf32 = allowed  # sets what a newer torch has beside it, too

    def _restore(self) -> None:
        if self._before is None:
            return
        matmul = torch.backends.cuda.matmul
        matmul.allow_tf32, new = self._before
        if new is not None:
            matmul.fp32_precision = new
        self._before = None


class _Rounded:
    """A call, as a context."""

    __slots__ = ("_allowed", "_rounding")

    def __init__(self, rounding: _Rounding, allowed: bool) -> None:
        self._rounding, self._allowed = rounding, allowed

    def __enter__(self) -> None:
        self._rounding.begin(self._allowed)

    def __exit__(self, *_: object) -> None:
        self._rounding.end()


_rounding = _Rounding()


class Weights(NamedTuple):
    """The weights of one direction, or their gradients."""

    ih: Any
    hh: Any = None
    bias_ih: Any = None
    bias_hh: Any = None
    hr: Any = None
    norms: Sequence[Any] = ()  # of layer normalisation, see Layer.weights
    parameters: Sequence[Any] = ()

    @classmethod
    def of(cls, given: Sequence[Any], count: int, parameters: int, is_recurrent: bool) -> Weights:
        """Of those of a direction, in the order of Layer.weights: `count` matrices and biases,
        those of layer normalisation, and learned vectors."""
        first = len(given) - parameters
        matrices, norms, own = given[:count], given[count:first], given[first:]
        if not is_recurrent:
            ih, bias_ih = (*matrices, None)[:2]
            return cls(ih, bias_ih=bias_ih, parameters=own)
        bias_ih, bias_hh = matrices[2:4] if len(matrices) > 3 else (None, None)
        hr = matrices[-1] if len(matrices) % 2 else None
        return cls(matrices[0], matrices[1], bias_ih, bias_hh, hr, norms, own)


def _by_direction(layer: Layer, each: Sequence[Any]) -> list[Weights]:
    """What there is of each weight, direction by direction."""
    cell, count = layer.cell, len(layer.weights) // layer.directions
    numbers = layer.matrices, cell.parameters, cell.recurrent > 0
    return [Weights.of(each[i : i + count], *numbers) for i in range(0, len(each), count)]


class Nvcc(Toolchain):
    """nvcc, for the GPUs of some compute capabilities, 10 * major + minor; else for all there are.

    kernels: the extension that runs what is compiled.
    """

    def __init__(self, kernels: ModuleType | None, capabilities: Sequence[int] = ()) -> None:
        self._kernels, self._capabilities = kernels, capabilities

    @property
    def capabilities(self) -> list[int]:
        found = self._capabilities or [
            10 * major + minor
            for major, minor in map(
                torch.cuda.get_device_capability, range(torch.cuda.device_count())
            )
        ]
        return sorted(set(found))

    @property
    def name(self) -> str:
        return "-".join(f"sm_{capability}" for capability in self.capabilities)

    def command(self, csrc: Path) -> list[str]:
        flags = ["-std=c++20", "-O3", "-shared", "-w", "--expt-relaxed-constexpr", "-cudart=static"]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags += [f"-gencode=arch=compute_{c},code=sm_{c}" for c in self.capabilities]
        sources = [str(csrc / "cuda" / name) for name in ("cell_module.cu", "device.cu")]
        return [*find_compiler("CUDA compiler", "CUDACXX", "nvcc"), *flags, *sources]

    def add(self, mode: str, address: int) -> None:
        assert self._kernels is not None
        _cpu.define_cell(address)
        self._kernels.load_cell(mode, address)


_GIVEN = 4  # the gradients before those of the weights: of x, h_0, c_0 and inputs


def _places(layer: Layer) -> list[Weights]:
    """Where the gradients of each direction's weights stand among all gradients."""
    return _places_of(layer.mode, layer.layer_norm, len(layer.weights), layer.directions)


@lru_cache
def _places_of(mode: str, layer_norm: bool, count: int, directions: int) -> list[Weights]:
    weights = tuple(range(_GIVEN, _GIVEN + count))
    none = (None,) * TENSORS
    options = mode, directions, 0, False, 0, False, False, 0.0, 0.0, 0.0, layer_norm
    return _by_direction(Layer._make((*options, *none, weights)), weights)


class CudaBackend(Backend):
    """Compiled kernels as a Backend.

    `kernels` is the extension, fastrnn._cuda, or the one that the tests build for a CPU, where
    `device` is the compute capability to stand in for. `choose` replaces the kernels' make_plan,
    and `toolchain` is what compiles cells of the user's own.
    FASTRNN_CUDA_PLAN=step|grid|cluster in the environment prefers a kind where it can run;
    cluster-barrier: clusters whose blocks wait at the cluster's barrier, not for an mbarrier.
    """

    takes_mask = True

    def __init__(
        self,
        kernels: ModuleType,
        *,
        choose: Callable[[Any, Any], Any] | None = None,
        allows_tf32: Callable[[], bool] = allows_tf32,
        device: int = 0,
        toolchain: Toolchain | None = None,
    ) -> None:
        self._kernels, self._device, self._allows_tf32 = kernels, device, allows_tf32
        self._choose = choose or self.make_plan
        self._toolchain = toolchain or Nvcc(kernels)
        wanted = os.environ.get("FASTRNN_CUDA_PLAN", "").lower()
        kinds = {name.lower(): kind for name, kind in kernels.Kind.__members__.items()}
        kinds["cluster-barrier"] = kernels.Kind.CLUSTER
        if wanted and wanted not in kinds:
            raise ValueError(f"FASTRNN_CUDA_PLAN: expected {'|'.join(kinds)}, got {wanted}")
        self._kind, self._mbarrier = kinds.get(wanted), wanted != "cluster-barrier"
        self._plan = lru_cache(maxsize=1024)(self._find_plan)

    def make_plan(self, problem: Any, device: Any) -> Any:
        """The kernels' choice for a problem on a device."""
        plan = self._kernels.make_plan(problem, device, self._kind, self._mbarrier)
        return plan or self._kernels.make_plan(problem, device)

    def runs_cell(self, mode: str, dtype: torch.dtype) -> bool:
        return load(mode, dtype, self._toolchain)

    def runs_options(self, layer: Layer) -> bool:
        # The scan of a projected layer knows no h, see _unprojected.
        if not layer.has_projection:
            return True
        of_h = layer.zoneout_h or layer.grad_clip or layer.h_mask is not None
        return not (layer.layer_norm or of_h)

    def forward(self, layer: Layer) -> Results:
        layer.check()
        self._refuse(layer)
        with _on(layer.x.device), self._rounding(layer):
            layer = _contiguous(layer)
            if layer.segments > 1:
                return forward_in_segments(layer, self._forward)
            return self._forward(layer)

    def backward(self, layer: Layer, saved: Saved) -> list[Tensor | None]:
        saved.check(layer)
        self._refuse(layer)
        with _on(layer.x.device), self._rounding(layer):
            layer, saved = _contiguous(layer), _contiguous(saved)
            if layer.segments > 1:
                return backward_in_segments(layer, saved, self._forward, self._backward)
            return self._backward(layer, saved)

    def upload(self, values: Tensor, device: torch.device) -> Tensor:
        """A copy of the CPU's int64 values, by arguments of launches: nothing waits, and a CUDA
        graph keeps what stands in them."""
        values = values.contiguous()
        copy = torch.empty_like(values, device=device)
        with _on(copy.device):
            self._kernels.upload(self._index(copy.device), values, copy)
        return copy

    def _refuse(self, layer: Layer) -> None:
        if not self.runs_options(layer):
            raise NotImplementedError(
                "for projected layers layer_norm, zoneout of h, recurrent_dropout and grad_clip: "
                "the CUDA kernels do not have them"
            )

    def _forward(self, layer: Layer, part: Part | None = None) -> Results:
        """One scan. part.carried [1+C, D, B, H]: the states as they are computed, see
        csrc/cuda/scan.h."""
        results = layer.make_results()
        if not results.output.numel():  # nothing to do but to hand the states on
            for last, first in ((results.h_n, layer.h_0), (results.c_n, layer.c_0)):
                _hand_on(last, first)
            return results
        rows = Rows(layer, self.upload)
        gates = results.saved
        if gates is None or layer.saves != layer.cell.gates or layer.layer_norm:
            gates = layer.x.new_empty(layer.directions, rows.count, layer.weights[0].shape[0])
        _multiply_inputs(layer, gates)
        if rows.mask is not None:
            for steps in (results.output, results.extra):
                if steps is not None:
                    steps.zero_()
        if layer.has_projection:
            self._forward_projected(layer, gates, results, rows, part)
        else:
            self._run(False, layer, rows, gates, results, part=part)
        return results

    def _forward_projected(
        self, layer: Layer, gates: Tensor, results: Results, rows: Rows, part: Part | None
    ) -> None:
        """The scan over m, and h = W_hr m of it."""
        output, h_n, c_n, *_ = results
        assert c_n is not None
        _add_initial(layer, gates, rows)
        m = output.new_zeros(*output.shape[:-1], layer.directions * layer.hidden)
        scanned = results._replace(output=m, h_n=torch.empty_like(c_n))
        self._run(False, _unprojected(layer), rows, gates, scanned, part=part)
        every = output.view(rows.count, layer.directions, layer.proj)
        m = m.view(rows.count, layer.directions, layer.hidden)
        for d, weights in enumerate(_by_direction(layer, layer.weights)):
            every[:, d] = m[:, d] @ weights.hr.t()
            initial = None if layer.h_0 is None else layer.h_0[d]
            h_n[d] = rows_at(every[:, d], rows.last(d), initial)

    def _backward(
        self, layer: Layer, saved: Saved, part: Part | None = None
    ) -> list[Tensor | None]:
        """The same backward, where the gradients of h and c are carried."""
        if not saved.output.numel():
            gradients = layer.make_gradients(saved.wanted)
            handed_on = (None, saved.d_h_n, saved.d_c_n, None, *(None,) * len(layer.weights))
            for gradient, given in zip(gradients, handed_on):
                _hand_on(gradient, given)
            return gradients
        rows = Rows(layer, self.upload)
        scan = _GateGradients(layer, rows)
        targets = scan.targets(saved.wanted[3])
        if layer.has_projection:
            m = _scanned_output(layer, saved, rows)
            over_m = _over_m(layer, saved, m)
            if part is not None and over_m.d_h_n is not None:
                part.carried[0] = over_m.d_h_n
            made = self._run(True, _unprojected(layer), rows, over_m, targets, part=part)
        else:
            made = self._run(True, layer, rows, saved, targets, part=part, of=scan)
        d_gates, d_recurrent, *of_given = made  # of h_0, c_0 and inputs
        scan.take(d_gates, d_recurrent)
        gradients = [None, *of_given, *(None,) * len(layer.weights)]
        if layer.has_projection:
            scan.set_projected(gradients, saved, m)
        scan.set_products(gradients, saved.wanted, saved.output)
        return gradients

    def _run(
        self,
        backward: bool,
        layer: Layer,
        rows: Rows,
        *args: Any,
        part: Part | None = None,
        of: _GateGradients | None = None,
    ) -> Any:
        """The recurrence alone. `args`: W_ih x + b_ih and the results; in backward, what is saved
        and the targets, which are those `of` the gradients. Backward returns what it has written:
        d_gates, d_recurrent, d_h_0, d_c_0 and d_inputs."""
        device = self._index(layer.x.device)
        shape = rows.steps, rows.batch, layer.hidden, layer.directions, layer.reverse
        tf32 = layer.x.dtype == torch.float32 and self._allows_tf32()
        numbers = DTYPES.index(layer.x.dtype), *shape, tf32
        plan = self._plan(device, layer.layer_norm, backward, layer.mode, *numbers)
        parameters = None
        if layer.cell.parameters:  # [D, Q, H]
            each = [torch.stack(tuple(w.parameters)) for w in _by_direction(layer, layer.weights)]
            parameters = torch.stack(each)
        norm = _normalisation(layer, of) if layer.layer_norm else None
        run = self._kernels.backward if backward else self._kernels.forward
        return run(device, plan, layer, parameters, norm, *args, rows.tables, part)

    def _find_plan(self, device: int, layer_norm: bool, *numbers: Any) -> Any:
        problem, info = self._kernels.Problem(*numbers), self._kernels.device_info(device)
        if layer_norm:
            return self._kernels.make_plan(problem, info, self._kernels.Kind.STEP)
        return self._choose(problem, info)

    def _rounding(self, layer: Layer) -> AbstractContextManager[Any]:
        if layer.x.dtype != torch.float32:
            return nullcontext()
        return _rounding(self._allows_tf32())

    def _index(self, device: torch.device) -> int:
        return self._device if device.index is None else device.index


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _contiguous(record: Any) -> Any:
    """The record with contiguous tensors."""
    if _cpu.is_contiguous(record):
        return record

    def each(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.contiguous()
        return tuple(map(each, value)) if isinstance(value, (tuple, list)) else value

    return record._make(map(each, record))


def _hand_on(target: Tensor | None, source: Tensor | None) -> None:
    """Where there are no steps: the states as they came; all else is zero."""
    if target is not None:
        target.zero_() if source is None else target.copy_(source)


def _multiply_inputs(layer: Layer, gates: Tensor) -> None:
    """gates [D, N, G*H] = x W_ih^T + b_ih, or with layer_norm the product normalised."""
    inputs = layer.x.view(-1, layer.x.shape[-1])
    for out, at in zip(gates.unbind(), _places(layer)):
        w_ih = layer.weights[at.ih - _GIVEN].t()
        bias = None if at.bias_ih is None else layer.weights[at.bias_ih - _GIVEN]
        if layer.layer_norm:
            gain = layer.weights[at.norms[0] - _GIVEN]
            product = torch.mm(inputs, w_ih)
            out.copy_(torch.nn.functional.layer_norm(product, gain.shape, gain, bias, _EPSILON))
        elif bias is None:
            torch.mm(inputs, w_ih, out=out)
        else:
            torch.addmm(bias, inputs, w_ih, out=out)


_EPSILON = 1e-5  # of layer normalisation, as in csrc/cuda/layer_norm.h
_FEW = 1 << 20  # values that a GPU writes and reads again while the host launches a kernel


def _normalisation(layer: Layer, gradients: _GateGradients | None) -> tuple[Any, ...]:
    """Norm of csrc/cuda/bind.cc; backward has gradients."""
    each = [torch.cat(tuple(w.norms[1:])) for w in _by_direction(layer, layer.weights)]
    size = layer.directions, layer.batch, (layer.cell.recurrent + 3) * layer.hidden
    scratch = layer.x.new_empty(size, dtype=layer.state_dtype)
    if gradients is None:
        return torch.stack(each), scratch, None, None
    gates = layer.x.new_empty(gradients.gates_shape)
    _multiply_inputs(layer, gates)
    return torch.stack(each), scratch, gradients.norms, gates


class _GateGradients:
    """The gradients of the gates, which backward's scan writes, and all that follows from them."""

    each: Sequence[Tensor]  # of W_ih x + b_ih in one direction, [N, G*H]
    # Those of W_hh h + b_hh are the same in their first `same` columns. The others, if there are,
    # are here, [N, split*H].
    recurrent: Sequence[Tensor] | None

    def __init__(self, layer: Layer, rows: Rows) -> None:
        self.layer, self.rows = layer, rows
        cell, hidden = layer.cell, layer.hidden
        self.split = 0  # see RecurrenceBackward of csrc/cuda/scan.h
        if layer.layer_norm or (cell.splits_gradient and cell.recurrent):
            # Of a built-in cell one gate would do, but then each part takes a product of its own.
            values = layer.directions * rows.count * cell.gates * hidden
            one = layer.mode in BUILT_IN and not layer.layer_norm and values > _FEW
            self.split = 1 if one else cell.recurrent
        self.same = (cell.recurrent - self.split) * hidden
        self.norms: Tensor | None = None  # see LayerNormArgs of csrc/cuda/scan.h
        if layer.layer_norm:
            width = 2 * (cell.recurrent + 1) * hidden
            shape = layer.directions, layer.batch, width
            self.norms = layer.x.new_zeros(shape, dtype=layer.state_dtype)
        self.parameters: Tensor | None = None  # of the learned vectors, row by row
        if cell.parameters:
            size = layer.directions, cell.parameters, layer.batch, hidden
            self.parameters = layer.x.new_zeros(size, dtype=layer.state_dtype)

    @property
    def gates_shape(self) -> tuple[int, ...]:
        """Of W_ih x + b_ih."""
        return self.layer.directions, self.rows.count, self.layer.weights[0].shape[0]

    def targets(self, wants_inputs: bool) -> tuple[int | Tensor | None, ...]:
        """`split`, and what the scan writes: zeros where it must begin as such, and None for what
        the scan makes."""
        if self.rows.mask is None:
            return self.split, None, None, None, None, None, self.parameters
        new, shape, given = self.layer.x.new_zeros, self.gates_shape, self.layer.inputs
        recurrent = new((*shape[:2], self.split * self.layer.hidden)) if self.split else None
        inputs = None if given is None or not wants_inputs else torch.zeros_like(given)
        return self.split, new(shape), recurrent, None, None, inputs, self.parameters

    def take(self, gates: Tensor, recurrent: Tensor | None) -> None:
        """What the scan has written."""
        self.each = gates.unbind()
        self.recurrent = None if recurrent is None else recurrent.unbind()

    def set_products(
        self, gradients: list[Tensor | None], wanted: Sequence[bool], output: Tensor
    ) -> None:
        """Makes the gradients of x and of all weights but W_hr: no tensor is made beforehand."""
        layer, rows = self.layer, self.rows
        inputs = rows.zero_masked(layer.x.view(rows.count, -1))
        states: Sequence[Tensor] = [output.view(rows.count, -1)]
        if layer.directions > 1:
            states = output.view(rows.count, layer.directions, layer.proj).unbind(1)
        flat: Tensor | None = None
        for d, at in enumerate(_places(layer)):
            gates = self.each[d]
            if layer.layer_norm:
                self._differentiate_norms(d, inputs, gradients, wanted, at)
            if wanted[0]:
                w_ih = layer.weights[at.ih - _GIVEN]
                flat = torch.mm(gates, w_ih) if flat is None else flat.addmm_(gates, w_ih)
            turned = gates.t()
            if wanted[at.ih]:
                gradients[at.ih] = torch.mm(turned, inputs)
            if at.hh is not None and wanted[at.hh]:
                h_0 = None if layer.h_0 is None else layer.h_0[d]
                gradients[at.hh] = self._multiply_before(d, turned, states[d], h_0)
            for q, place in enumerate(at.parameters):
                if wanted[place] and self.parameters is not None:
                    gradients[place] = self.parameters[d, q].sum(0).to(output.dtype)
            self._sum_up(d, gradients, wanted, at)
        gradients[0] = None if flat is None else flat.view_as(layer.x)

    def _differentiate_norms(
        self,
        d: int,
        inputs: Tensor,
        gradients: list[Tensor | None],
        wanted: Sequence[bool],
        at: Weights,
    ) -> None:
        """Makes the gradients of W_ih x of those of the gates, and those of gains and biases."""
        layer, gates = self.layer, self.each[d]
        weights = _by_direction(layer, layer.weights)[d]
        product = torch.mm(inputs, weights.ih.t())
        gain, bias = weights.norms[0], weights.bias_ih
        _, mean, inverse = torch.native_layer_norm(product, gain.shape, gain, bias, _EPSILON)
        made = torch.ops.aten.native_layer_norm_backward(
            gates, product, gain.shape, mean, inverse, gain, bias, [True, True, bias is not None]
        )
        gates.copy_(made[0])
        assert self.norms is not None
        hidden, all_gates = layer.hidden, layer.cell.recurrent * layer.hidden
        sums = self.norms[d].sum(0).to(gates.dtype)
        of_hh, bias_hh, *of_c = sums.split([all_gates, all_gates, hidden, hidden])
        places = [at.norms[0], at.bias_ih, at.norms[1], at.bias_hh, *at.norms[2:]]
        for place, gradient in zip(places, [made[1], made[2], of_hh, bias_hh, *of_c]):
            if place is not None and wanted[place]:
                gradients[place] = gradient.clone()

    def _sum_up(
        self, d: int, gradients: list[Tensor | None], wanted: Sequence[bool], at: Weights
    ) -> None:
        """The gradients of the biases."""
        if self.norms is not None:
            return
        wants_ih = at.bias_ih is not None and wanted[at.bias_ih]
        wants_hh = at.bias_hh is not None and wanted[at.bias_hh]
        total = torch.sum(self.each[d], 0) if wants_ih or (wants_hh and self.same) else None
        if wants_ih:
            gradients[at.bias_ih] = total
        if wants_hh and self.recurrent is not None and not self.same:
            gradients[at.bias_hh] = torch.sum(self.recurrent[d], 0)
        elif wants_hh and total is not None:
            # Two results of an operator are not one tensor.
            own = gradients[at.bias_hh] = total.clone() if wants_ih else total
            if self.recurrent is not None:
                torch.sum(self.recurrent[d], 0, out=own[self.same :])

    def _multiply_before(self, d: int, gates: Tensor, states: Tensor, h_0: Tensor | None) -> Tensor:
        """[R*H, P]: the gradients of W_hh h + b_hh, gates [G*H, N] where these are the same, times
        the states before each step."""
        parts = self.rows.parts_before(states, h_0, d)
        if self.layer.h_mask is not None:
            mask = self.layer.h_mask[d]
            parts = [(steps, self.rows.times(part, mask)) for steps, part in parts]
        own = None if self.recurrent is None else self.recurrent[d].t()
        size = self.same + (0 if own is None else own.shape[0])
        if not parts:  # one step after zeros
            return states.new_zeros(size, states.shape[1])
        if own is None:
            return _multiply_parts(gates, parts)
        if not self.same:
            return _multiply_parts(own, parts)
        out = states.new_empty(size, states.shape[1])
        _multiply_parts(gates[: self.same], parts, out[: self.same])
        _multiply_parts(own, parts, out[self.same :])
        return out

    def set_projected(self, gradients: list[Tensor | None], saved: Saved, m: Tensor) -> None:
        """Makes the gradients of W_hr, from every h_t that it made, and of h_0."""
        layer, rows, d_h_n = self.layer, self.rows, saved.d_h_n
        size = layer.directions, layer.batch, layer.proj
        d_h_0 = gradients[1] = layer.x.new_empty(size) if saved.wanted[1] else None
        m = m.view(rows.count, layer.directions, layer.hidden)
        each = _by_direction(layer, layer.weights)
        for d, (weights, at) in enumerate(zip(each, _places(layer))):
            # Those that flow back through h, and not into W_hh.
            scaled = self._over_edges(self.each[d])
            if saved.wanted[at.hr]:
                before = self._multiply_before(d, scaled.t(), m[:, d], None)
                hr = gradients[at.hr] = torch.mm(weights.hh.t(), before)
                if saved.d_output is not None:
                    steps = saved.d_output.view(rows.count, layer.directions, layer.proj)[:, d]
                    hr.addmm_(rows.zero_masked(steps).t(), m[:, d])
                if d_h_n is not None:
                    hr.addmm_(d_h_n[d].t(), rows_at(m[:, d], rows.last(d), None))
            if d_h_0 is not None:
                first = rows_at(scaled, rows.first(d), None) @ weights.hh
                if rows.lengths is not None and d_h_n is not None:
                    # Rows without steps hand it through.
                    first += torch.where((rows.lengths == 0).unsqueeze(1), d_h_n[d], 0)
                d_h_0[d] = first

    def _over_edges(self, gates: Tensor) -> Tensor:
        """gates [N, G*H] times the scale of each step."""
        scale = self.layer.grad_scale
        if scale is None:
            return gates
        scale = self.rows.zero_masked(scale.view(-1, 1))
        return torch.where(scale == 0, 0, gates * scale).to(gates.dtype)


def _multiply_parts(
    gates: Tensor, parts: Sequence[tuple[slice | None, Tensor]], out: Tensor | None = None
) -> Tensor:
    """gates [G*H, N] times what went into the steps, see Rows.parts_before."""
    for i, (steps, states) in enumerate(parts):
        own = gates if steps is None else gates[:, steps]
        if i > 0 and out is not None:
            out.addmm_(own, states)
        else:
            out = torch.mm(own, states) if out is None else torch.mm(own, states, out=out)
    assert out is not None
    return out


# Projections: h = W_hr m, where the scan runs over m.


def _unprojected(layer: Layer) -> Layer:
    """The recurrence over m."""
    weights = []
    for w in _by_direction(layer, layer.weights):
        each = w._replace(hh=w.hh @ w.hr)
        weights += [t for t in each[:4] if t is not None]
    return layer._replace(h_0=None, weights=tuple(weights))


def _add_initial(layer: Layer, gates: Tensor, rows: Rows) -> None:
    """Adds W_hh h_0 to the gates of the steps that h_0 goes into."""
    if layer.h_0 is None:
        return
    for d, weights in enumerate(_by_direction(layer, layer.weights)):
        index = rows.first(d)
        change = torch.where((index < rows.count).unsqueeze(1), layer.h_0[d] @ weights.hh.t(), 0)
        gates[d].index_add_(0, index.clamp(max=rows.count - 1), change)


def _scanned_output(layer: Layer, saved: Saved, rows: Rows) -> Tensor:
    """m = o * tanh(c) of every step, again."""
    gates, extra, hidden = saved.saved, saved.extra, layer.hidden
    assert gates is not None
    assert extra is not None
    cells = list(extra.view(rows.count, layer.directions, hidden).unbind(1))
    if layer.zoneout_c:  # h is made of the cell state before units kept theirs
        cells = [_made(layer, d, gates[d], cells[d], rows) for d in range(layer.directions)]
    m = [gates[d, :, -hidden:] * cells[d].tanh() for d in range(layer.directions)]
    every = rows.zero_masked(torch.cat(m, -1))
    return every.to(gates.dtype).view(*layer.x.shape[:-1], -1)


def _made(layer: Layer, d: int, gates: Tensor, cells: Tensor, rows: Rows) -> Tensor:
    """f * c + i * g of every step in one direction, c being the cell state before it."""
    i, f, g, _ = gates.to(cells.dtype).chunk(4, -1)
    c_0 = None if layer.c_0 is None else layer.c_0[d].to(cells.dtype)
    return f * rows.states_before(cells, c_0, d) + i * g


def _over_m(layer: Layer, saved: Saved, m: Tensor) -> Saved:
    """What the scan over m is given: gradients of h times W_hr."""
    d_output, d_h_n = saved.d_output, saved.d_h_n
    projections = [w.hr for w in _by_direction(layer, layer.weights)]
    if d_output is not None:
        parts = d_output.unflatten(-1, (layer.directions, layer.proj)).unbind(-2)
        d_output = torch.cat([part @ hr for part, hr in zip(parts, projections)], -1)
    if d_h_n is not None:
        d_h_n = torch.stack([d @ hr for d, hr in zip(d_h_n, projections)])
    wanted = [False] * (_GIVEN + len(layer.weights) - layer.directions)
    wanted[2] = saved.wanted[2]
    return saved._replace(output=m, d_output=d_output, d_h_n=d_h_n, wanted=wanted)


if _cuda is not None:
    register("cuda", CudaBackend(_cuda))
