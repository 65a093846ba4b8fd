"""No argument crashes an operator or a function of the extension.

A process of its own makes random calls, right ones and wrong ones, and prints each before it runs;
what fails runs alone by

    python tests/test_fuzz.py NUMBER
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import mmap
import os
import random
import re
import resource
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from operator import index
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastrnn
from fastrnn._functions import FUSED, FUSED_STACK
from fastrnn._layer import BUILT_IN, CELLS, CONSTANTS, OPTIONS, TENSORS, Layer, Results
from fastrnn._load import _cpu, set_torch
from fastrnn._torch import WATCHERS

CASES = 2000  # with each way to exchange tensors
MEMORY = 1 << 30  # bytes that a wrong size may ask for

Random = random.Random


# -- Right calls ----------------------------------------------------------------------------------


def has_memory(value: Any) -> bool:
    """Whether torch itself can read it."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
        return False
    if value.is_quantized or value.is_nested:
        return False
    try:
        return value.numel() == 0 or value.data_ptr() != 0
    except RuntimeError:
        return False


def guarded(t: Tensor) -> Tensor:
    """A copy that ends where memory ends: to read beyond it is a crash."""
    if t.numel() == 0 or sys.platform != "linux":
        return t
    size = t.numel() * t.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages
    no_access = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, no_access) == 0
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=pages - size)
    return copy.view(t.shape).copy_(t)


def right_layer(r: Random) -> list[Any]:
    """The fields of a Layer, the weights as a list."""
    mode, D = r.choice(BUILT_IN), r.choice((1, 2))
    T, B, I, H = (r.choice(sizes) for sizes in ((0, 1, 3, 9), (0, 1, 2, 5), (1, 3, 17), (1, 4, 33)))  # noqa: E741
    dtype = r.choice((torch.float32, torch.float64, torch.bfloat16, torch.float16))
    states = torch.float64 if dtype == torch.float64 else torch.float32
    is_guarded, is_ragged = r.random() < 0.5, r.random() < 0.4
    G, has_cell_state = CELLS[mode].gates, CELLS[mode].has_cell_state
    P = max(1, H // 2) if has_cell_state and r.random() < 0.3 else H

    def new(*shape: int) -> Tensor:
        t = torch.randn(shape).to(dtype)
        return guarded(t) if is_guarded else t

    sizes = torch.tensor(sorted((r.randint(0, B) for _ in range(T)), reverse=True)).long()
    steps = (int(sizes.sum()),) if is_ragged else (T, B)
    weights = []
    biases, layer_norm = r.random() < 0.7, r.random() < 0.3
    for _ in range(D):
        weights += [new(G * H, I), new(G * H, P)]
        weights += [new(G * H), new(G * H)] if biases else []
        weights += [new(P, H)] if P != H else []
        weights += [new(G * H), new(G * H)] if layer_norm else []
        weights += [new(H), new(H)] if layer_norm and has_cell_state else []
    return [
        mode,
        D,
        B,
        D == 1 and r.random() < 0.3,
        r.choice((0, 0, 2, 100)),
        r.random() < 0.5,
        r.random() < 0.5,
        r.choice((0.0, 0.0, 0.1)),
        r.choice((0.0, 0.0, 0.3)),
        r.choice((0.0, 0.0, 0.3)) if mode == "LSTM" else 0.0,
        layer_norm,
        new(*steps, I),
        new(D, B, P) if r.random() < 0.5 else None,
        new(D, B, H) if has_cell_state and r.random() < 0.5 else None,
        sizes if is_ragged else None,
        torch.rand(steps) < 0.3 if r.random() < 0.3 else None,
        torch.rand(steps, dtype=states) if r.random() < 0.3 else None,
        new(D, B, P) if r.random() < 0.3 else None,
        torch.randint(2**40, (1,)) if r.random() < 0.5 else None,
        None,
        weights,
    ]


def right_saved(r: Random, fields: list[Any]) -> list[Any]:
    """The fields of a Saved for it: numbers that forward could have made, and gradients."""
    layer = Layer(*fields)._replace(keep=True, all_c=True)
    results = [None if t is None else t.normal_() for t in layer.make_results()]
    output, h_n, c_n, extra, saved = results
    d_extra = None if c_n is None or extra is None else torch.randn_like(extra)
    given = [None if t is None else torch.randn_like(t) for t in (output, h_n, c_n)]
    incoming = [None if r.random() < 0.4 else t for t in (*given, d_extra)]
    wanted = [r.random() < 0.7 for _ in range(4 + len(layer.weights))]
    wanted[2] = wanted[2] and layer.cell.has_cell_state
    wanted[3] = False  # of inputs, which no built-in cell has
    return [output, extra, saved, *incoming, wanted]


class Context:
    """What record and replay use of an autograd Function's ctx."""

    def __init__(self, options: Any = (), saved: Any = (), needed: Any = ()) -> None:
        self.options, self.saved_tensors, self.needs_input_grad = options, saved, needed

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        assert value is False


def flat(fields: list[Any]) -> list[Any]:
    return [*fields[OPTIONS:-1], *fields[-1]]


def replayed(fields: list[Any], saved: list[Any]) -> list[Any]:
    wanted = saved[7]
    needed = [False, *wanted[:3], *(False for _ in CONSTANTS), *wanted[3:]]
    state = [fields[:OPTIONS], [*saved[:3], *flat(fields)], needed]
    gradients = saved[3:5] if not CELLS[fields[0]].has_cell_state else saved[3:7]
    return [state, *gradients]


def right_stack(r: Random) -> list[Any]:
    """The arguments of record_stack but for the first: layers, options, dropout and tensors."""
    name, dtype = r.choice(("LSTM", "GRU", "RNN")), r.choice((torch.float32, torch.bfloat16))
    options: dict[str, Any] = {"bias": r.random() < 0.7, "dtype": dtype}
    if name == "LSTM" and r.random() < 0.3:
        options["proj_size"] = 2
    module = getattr(fastrnn, name)(3, 5, r.choice((1, 2, 3)), **options)
    x = torch.randn(r.choice((0, 1, 40)), r.choice((0, 1, 3)), 3).to(dtype)
    states = [torch.randn(module.num_layers, x.shape[1], n) for n in (module.proj_size or 5, 5)]
    given = [None if r.random() < 0.4 else state.to(dtype) for state in states]
    if name != "LSTM":
        given[1] = None
    weights = [weight.detach() for weight in module._flat_weights]
    resets = None if r.random() < 0.5 else torch.rand(x.shape[:2]) < 0.3
    dropout = None
    if r.random() < 0.5:
        size = module.proj_size or 5
        dropout = torch.rand(module.num_layers - 1, *x.shape[:2], size).to(dtype)
    stack = Layer.plain(
        module.mode, 1, x.shape[1], x, *given, weights, None, resets, all_c=r.random() < 0.5
    )
    return [module.num_layers, stack.options, dropout, *stack.tensors]


def stack_args(r: Random) -> list[Any]:
    """Those of forward_stack: the record, layers and dropout."""
    layers, options, dropout, *tensors = right_stack(r)
    return [Layer.of(options, tensors), layers, dropout]


def replayed_stack(r: Random) -> list[Any]:
    context, arguments = Context(), right_stack(r)
    results = _cpu.record_stack(context, *arguments)
    tensors = arguments[3:]
    needed = [False] * 3 + [t is not None and r.random() < 0.7 for t in tensors]
    state = [list(context.options), list(context.saved_tensors), needed]
    return [state, *(None if r.random() < 0.4 else torch.randn_like(t) for t in results)]


def right_module(r: Random) -> list[Any]:
    """The arguments of run_module but for the last: these functions are ours alone."""
    name, dtype = r.choice(("LSTM", "GRU", "RNN")), r.choice((torch.float32, torch.bfloat16))
    options = {"bidirectional": r.random() < 0.5, "batch_first": r.random() < 0.5}
    options |= {"bias": r.random() < 0.7, "dtype": dtype}
    if name == "LSTM" and r.random() < 0.3:
        options["proj_size"] = 2
    module = getattr(fastrnn, name)(3, 5, r.choice((1, 2)), **options)
    entries = module.num_layers * (1 + module.bidirectional)
    x = torch.randn(r.choice((0, 1, 4)), r.choice((0, 1, 3)), 3).to(dtype)
    B = x.shape[0 if module.batch_first else 1]
    states = [torch.randn(entries, B, module.proj_size or 5).to(dtype)]
    states += [torch.randn(entries, B, 5).to(dtype)] if name == "LSTM" else []
    hx: Any = None
    if r.random() < 0.7:
        hx = states if name == "LSTM" else states[0]
    names = "mode num_layers bidirectional batch_first dropout training"
    names += " _parameters _flat_weights _flat_weights_names"
    values = {name: vars(module)[name] for name in names.split()}
    return [values | {"_parameters": dict(module._parameters)}, x, hx, r.choice((0, 2))]


# -- What can be wrong ----------------------------------------------------------------------------


class Rude:
    """Has every method that C++ may call, and each raises."""

    def _fail(self, *_: Any) -> Any:
        raise ZeroDivisionError("rude")

    __index__ = __bool__ = __len__ = __iter__ = __getitem__ = __call__ = __getattr__ = _fail


class Plain(Tensor):
    """A subclass that changes nothing."""


class Lying(Tensor):
    """Attributes that are not of torch's types."""

    shape: Any = property(lambda self: [2, "3"])
    dtype: Any = property(lambda self: None)
    is_cpu: Any = property(lambda self: None)
    data_ptr: Any = lambda self: None


class Wrapper(Tensor):
    """A tensor without memory, as those of tensor-parallel libraries."""

    @staticmethod
    def __new__(cls, t: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, storage_offset=5)

    def __init__(self, t: Tensor) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError("a wrapper")


def other_dtype(r: Random, t: Tensor) -> Tensor:
    names = "float32 float64 bfloat16 float16 bool uint8 int8 int16 int32 int64 uint16 uint64"
    names += " complex64 complex32 float8_e4m3fn float8_e5m2"
    return t.to(getattr(torch, r.choice(names.split())))


def other_shape(r: Random, t: Tensor) -> Tensor:
    shape = list(t.shape)
    shape[r.randrange(len(shape))] += r.choice((-1, 1, 16))
    return torch.zeros(shape, dtype=t.dtype)


def other_dims(r: Random, t: Tensor) -> Tensor:
    return r.choice((t[None], t[..., None], t[0], t.flatten(), t[(None,) * 5], t.sum()))


def no_elements(r: Random, t: Tensor) -> Tensor:
    return t.narrow(r.randrange(t.dim()), 0, 0)


def expanded(r: Random, t: Tensor) -> Tensor:
    return t.narrow(r.randrange(t.dim()), 0, 1).expand(t.shape)


def transposed(r: Random, t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(r: Random, t: Tensor) -> Tensor:
    return torch.stack((torch.full_like(t, 7), t), -1)[..., 1]


def offset(r: Random, t: Tensor) -> Tensor:
    return torch.stack((torch.full_like(t, 7), t))[1]


def overlapping(r: Random, t: Tensor) -> Tensor:
    return t.flatten()[: max(t.shape)].as_strided(t.shape, (0,) * (t.dim() - 1) + (1,))


def huge(r: Random, t: Tensor) -> Tensor:
    shape = list(t.shape)
    shape[r.randrange(len(shape))] = r.choice((1 << 31, 1 << 40, 1 << 60))
    return t.new_zeros(1).expand(shape)


def huge_without_elements(r: Random, t: Tensor) -> Tensor:
    shape = [r.choice((1 << 31, 1 << 62)) for _ in t.shape]
    shape[r.randrange(len(shape))] = 0
    return t.new_zeros(1).expand(shape)


def freed(r: Random, t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def with_gradient(r: Random, t: Tensor) -> Tensor:
    leaf = t.clone().requires_grad_()
    return r.choice((leaf, leaf * 2, torch.nn.Parameter(t.clone())))


def outlived(r: Random, t: Tensor) -> Tensor:
    """Of torch.func, whose transform is over."""
    inside = []
    torch.func.vmap(lambda v: inside.append(v) or v)(t)
    return inside[0]


WRONG_TENSORS: list[Callable[[Random, Tensor], Any]] = [
    other_dtype,
    other_shape,
    other_dims,
    no_elements,
    expanded,
    transposed,
    sliced,
    offset,
    overlapping,
    huge,
    huge_without_elements,
    freed,
    with_gradient,
    outlived,
    lambda r, t: guarded(t),
    lambda r, t: t.to("meta"),
    lambda r, t: t.to_sparse(),
    lambda r, t: t.to_sparse_csr(),
    lambda r, t: t.to_mkldnn(),
    lambda r, t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    lambda r, t: torch.nested.nested_tensor(list(t)),
    lambda r, t: torch._neg_view(t),
    lambda r, t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    lambda r, t: FakeTensorMode().from_tensor(t),
    lambda r, t: t.as_subclass(Plain),
    lambda r, t: t.as_subclass(Lying),
    lambda r, t: Wrapper(t),
    lambda r, t: torch.nn.UninitializedParameter(),
    lambda r, t: t.tolist() if t.numel() < 10**6 else [],
    lambda r, t: t.numpy(),
    lambda r, t: t.untyped_storage(),
]
WRONG_SIZES: list[Callable[[Random, Tensor], Any]] = [  # of rows alive
    lambda r, t: -t - 1,
    lambda r, t: t.flip(0),
    lambda r, t: t + r.choice((1, 1 << 31, 1 << 62)),
    lambda r, t: torch.full((4,), 1 << 62),  # adds up to nothing in 64 bits
    lambda r, t: torch.zeros(1 << 16, dtype=torch.int64),
    lambda r, t: torch.ones(3, 5, dtype=torch.bool),
    lambda r, t: t.repeat(2, 1),
]
INTS = [-(1 << 63), -(1 << 31), -3, -1, 0, 1, 2, 3, 7, 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1]
MODES = [*BUILT_IN, "lstm", "", "LSTM\0", "\ud800", "x" * 10_000, b"GRU"]
ANYTHING: list[Callable[[], Any]] = [
    lambda: None,
    lambda: True,
    lambda: 1.5,
    lambda: float("nan"),
    lambda: 1 << 70,
    lambda: "text",
    lambda: (),
    lambda: [[]],
    lambda: {},
    lambda: {"mode": "LSTM"},
    lambda: iter([torch.ones(2)]),
    lambda: np.ones((2, 3)),
    lambda: Rude(),
    lambda: Tensor,
    lambda: torch.empty(0),
    lambda: torch.ones(2, 3, device="meta"),
    lambda: torch.tensor(1),
]


def wrong(r: Random, value: Any) -> Any:
    """Something else in the place of a value."""
    try:
        if r.random() < 0.15:
            return r.choice(ANYTHING)()
        if has_memory(value) and value.dim() > 0:
            of_rows = [] if value.is_floating_point() else WRONG_SIZES * 3
            return r.choice(WRONG_TENSORS + of_rows)(r, value.detach())
        if isinstance(value, str):
            return r.choice(MODES)
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return r.choice(INTS)
        if isinstance(value, list):
            return wrong_list(r, value)
        return r.choice(ANYTHING)()
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
        return None  # there is no such tensor


def wrong_list(r: Random, values: list[Any]) -> Any:
    i = r.randrange(len(values) + 1)
    return r.choice(
        (
            values[:i],
            values[:i] + values[i + 1 :],
            [*values[:i], r.choice(ANYTHING)(), *values[i:]],
            values * 3,
            values + values[-1:],
            values[::-1],
            Fresh(values),
            dict(enumerate(values)),
        )
    )


class Fresh:
    """A sequence whose items nobody else keeps."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> Any:
        value = self.values[i]
        try:
            return guarded(value.detach().clone()) if has_memory(value) else value
        except RuntimeError:  # of a transform that is over
            return value


def mutate(r: Random, values: list[Any] | dict[str, Any]) -> None:
    """Puts something wrong at one place of a tree of lists and dicts."""
    places: list[Any] = list(values) if isinstance(values, dict) else list(range(len(values)))
    if not places:
        return
    place = r.choice(places)
    value = values[place]
    has_branches = isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, list) for item in value)
    )
    if isinstance(value, (list, dict)) and value and r.random() < (0.9 if has_branches else 0.4):
        mutate(r, value)
    elif isinstance(values, dict) and r.random() < 0.2:
        del values[place]
    else:
        values[place] = wrong(r, value)


def frozen(value: Any) -> Any:
    """With tuples for lists, as records are."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


# -- Calls ----------------------------------------------------------------------------------------


def same(actual: Tensor | None, expected: Tensor | None) -> bool:
    if actual is None or expected is None:
        return actual is expected
    return torch.allclose(actual.double(), expected.double(), 0, 0, equal_nan=True)


def copied(value: Any) -> Any:
    """The same numbers in memory of another layout."""
    if isinstance(value, tuple):
        return tuple(map(copied, value))
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, tuple):
        return [t for item in value for t in tensors_in(item)]
    return [value] if isinstance(value, Tensor) else []


def check_results(
    call: Callable[..., Any], args: tuple[Any, ...], results: Any, make: Callable[[], Any]
) -> None:
    """They have the right shapes, and do not depend on how the arguments lie in memory."""
    given = tensors_in(args)
    if any(type(t) is Lying for t in given):
        return
    for result, like in zip(results, make(), strict=True):
        if like is None:
            assert result is None or result.shape == (0,)
        else:
            assert (result.shape, result.dtype) == (like.shape, like.dtype)
    if any(t.is_meta or t.is_neg() or t._is_zerotensor() for t in given):
        return  # what stands in flags, torch resolves before the extension is called
    # Of states between segments, those of rows without a step are not written.
    boundaries = len(results) == len(Results._fields) and results[4] is not None
    boundaries = boundaries and results[4].dim() == 4
    assert all(map(same, results[: 4 if boundaries else None], call(*copied(args))))


def layer_of(fields: tuple[Any, ...]) -> Layer:
    """The record of accepted fields, in the types that it declares."""
    layer = Layer._make(fields)
    mode = layer.mode.decode() if isinstance(layer.mode, bytes) else layer.mode  # as torch does
    sizes = {name: index(getattr(layer, name)) for name in ("directions", "batch")}
    sizes["checkpoint_every"] = index(layer.checkpoint_every)
    return layer._replace(mode=mode, **sizes)


def of_operator(args: tuple[Any, ...]) -> Layer:
    """The tensors say what the batch is, where they can."""
    layer = layer_of(args[: len(Layer._fields)])
    if layer.batch_sizes is None:
        return layer._replace(batch=layer.x.shape[1])
    return layer if layer.h_0 is None else layer._replace(batch=layer.h_0.shape[1])


def check_scan_forward(args: tuple[Any, ...], results: Any) -> None:
    check_results(
        torch.ops.fastrnn.scan_forward,
        args,
        results,
        lambda: of_operator(args).make_results(),
    )


def check_scan_backward(args: tuple[Any, ...], results: Any) -> None:
    wanted = args[-1]
    check_results(
        torch.ops.fastrnn.scan_backward,
        args,
        results,
        lambda: of_operator(args).make_gradients(wanted),
    )


def check_forward(args: tuple[Any, ...], results: Any) -> None:
    check_results(_cpu.forward, args, results, lambda: layer_of(args[0]).make_results())


def check_backward(args: tuple[Any, ...], results: Any) -> None:
    wanted = args[1][-1]
    check_results(_cpu.backward, args, results, lambda: layer_of(args[0]).make_gradients(wanted))


def check_none(args: tuple[Any, ...], result: Any) -> None:
    assert result is None


def check_inspect(args: tuple[Any, ...], result: Any) -> None:
    assert result in (0, 1, 2)


def check_record(args: tuple[Any, ...], results: Any) -> None:
    if any(type(t) is Lying for t in tensors_in(args)):
        return
    first = 2 + TENSORS
    layer = layer_of((*args[1], *args[2:first], args[first:]))
    expected = layer.make_results()[: 2 + layer.cell.has_cell_state + bool(layer.all_c)]
    assert [t.shape for t in results] == [t.shape for t in expected if t is not None]


def check_replay(args: tuple[Any, ...], results: Any) -> None:
    if results is not None:
        assert len(results) == len(args[0].needs_input_grad)
        assert len(args) <= 5  # four gradients


def check_replay_stack(args: tuple[Any, ...], results: Any) -> None:
    if results is not None:
        assert len(results) == len(args[0].needs_input_grad)
        layers, (mode, *_, all_c, _, _, _, _) = args[0].options
        assert len(args) - 1 <= 2 + (mode == "LSTM") + 2 * layers * bool(all_c)


def check_stack(layers: int, stack: Layer, results: Any) -> None:
    finals = 2 + (stack.mode == "LSTM")
    states = layers - 1 + layers * (stack.mode == "LSTM") if stack.all_c else 0
    assert len(results) == finals + states
    assert results[0].shape[:-1] == stack.x.shape[:-1]


def check_forward_stack(args: tuple[Any, ...], results: Any) -> None:
    check_stack(args[1], Layer._make(args[0]), results)


def check_record_stack(args: tuple[Any, ...], results: Any) -> None:
    check_stack(args[1], Layer.of(args[2], args[4:]), results)


def check_plan_stack(args: tuple[Any, ...], plan: Any) -> None:
    threads, row_parts, _ = plan
    assert min(threads, row_parts) >= 1


def run_module(*args: Any) -> Any:
    return _cpu.run_module(*args, FUSED, FUSED_STACK)


def check_run_module(args: tuple[Any, ...], result: Any) -> None:
    if result is not None:
        output, hidden = result
        assert output.shape[:2] == args[1].shape[:2]
        assert isinstance(hidden, Tensor if args[0]["mode"] != "LSTM" else tuple)


def check_rate(args: tuple[Any, ...], result: Any) -> None:
    assert result > 0


def tile_args(r: Random) -> list[Any]:
    return [r.randint(1, 4), r.randint(1, 300), r.random() < 0.5]


def backward_args(r: Random) -> list[Any]:
    fields = right_layer(r)
    return [fields, right_saved(r, fields)]


def record_args(r: Random) -> list[Any]:
    fields = right_layer(r)
    return [[], fields[:OPTIONS], *flat(fields)]


def replay_args(r: Random) -> list[Any]:
    return replayed(*backward_args(r))


def inspect_args(r: Random) -> list[Any]:
    fields, saved = backward_args(r)
    return [fields, saved[3:7]]


def set_torch_args(r: Random) -> list[Any]:
    return [
        Tensor,
        torch.nn.Parameter,
        list(WATCHERS),
        torch.is_grad_enabled,
        torch.get_num_threads,
    ]


with torch.no_grad():  # else it has no packed weights
    STATE = fastrnn.LSTM(3, 4, 2).initial_state(batch=2)._core


def step_args(r: Random) -> list[Any]:
    return [torch.randn(2, 3), r.choice((None, torch.tensor([True, False])))]


def check_step(args: tuple[Any, ...], result: Any) -> None:
    if result is not None:
        assert all(t.shape == (2, 2, 4) for t in result.tensors())


def check_run(args: tuple[Any, ...], result: Any) -> None:
    if result is not None:
        assert result[0].shape == (len(args[0]), 2, 4)
        check_step(args, result[1])


def check_h(args: tuple[Any, ...], result: Any) -> None:
    assert result.shape == (2, 4)


def check_bool(args: tuple[Any, ...], result: Any) -> None:
    assert result in (True, False)


def no_args(r: Random) -> list[Any]:
    return []


# name -> function, right arguments, what must hold of its results, how often it is called
TARGETS: dict[str, tuple[Callable[..., Any], Any, Any, int]] = {
    "scan_forward": (torch.ops.fastrnn.scan_forward, right_layer, check_scan_forward, 20),
    "scan_backward": (
        torch.ops.fastrnn.scan_backward,
        lambda r: [item for record in backward_args(r) for item in record],
        check_scan_backward,
        20,
    ),
    "check": (_cpu.check, lambda r: [right_layer(r)], check_none, 10),
    "check_saved": (_cpu.check_saved, backward_args, check_none, 10),
    "forward": (_cpu.forward, lambda r: [right_layer(r)], check_forward, 20),
    "backward": (_cpu.backward, backward_args, check_backward, 20),
    "inspect": (_cpu.inspect, inspect_args, check_inspect, 10),
    "record": (_cpu.record, record_args, check_record, 10),
    "replay": (_cpu.replay, replay_args, check_replay, 10),
    "record_stack": (
        _cpu.record_stack,
        lambda r: [[], *right_stack(r)],
        check_record_stack,
        10,
    ),
    "forward_stack": (_cpu.forward_stack, stack_args, check_forward_stack, 10),
    "plan_stack": (_cpu.plan_stack, lambda r: stack_args(r)[:2], check_plan_stack, 5),
    "replay_stack": (_cpu.replay_stack, replayed_stack, check_replay_stack, 10),
    "run_module": (run_module, right_module, check_run_module, 20),
    "is_contiguous": (_cpu.is_contiguous, lambda r: [right_layer(r)], check_bool, 3),
    "state_step": (STATE.step, step_args, check_step, 10),
    "state_run": (STATE.run, lambda r: [torch.randn(r.randint(0, 4), 2, 3)], check_run, 5),
    "state_h": (STATE.h, lambda r: [r.randint(0, 1)], check_h, 3),
    "set_torch": (_cpu.set_torch, set_torch_args, check_none, 2),
    "multiply_add_rate": (_cpu.multiply_add_rate, lambda r: [1], check_rate, 3),
    "tile_rate": (_cpu.tile_rate, tile_args, check_rate, 3),
    "exchange": (_cpu.exchange, no_args, lambda *_: None, 0.5),
    "cpu_variant": (_cpu.cpu_variant, no_args, lambda *_: None, 0.5),
    "cpu_variants": (_cpu.cpu_variants, no_args, lambda *_: None, 0.5),
}


NAMES_ARGUMENTS = ("check", "check_saved", "forward", "backward", "record", "replay")
OF_CONTEXT = ("record", "replay", "record_stack", "replay_stack")
NO_RESULT = ("check", "check_saved", "set_torch")
# What is not for them, they hand back, or they take nothing; a wrong number of arguments is rare.
NEVER_REJECTED = ("inspect", "run_module", "state_step", "state_run")
NEVER_REJECTED += ("exchange", "cpu_variant", "cpu_variants")


def describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(describe, value))})"
    if type(value) is dict:
        return f"{{{', '.join(f'{k!r}: {describe(v)}' for k, v in value.items())}}}"
    if type(value) is Context:
        return f"Context{describe((value.options, value.saved_tensors, value.needs_input_grad))}"
    if has_memory(value):
        flags = " requires_grad" * value.requires_grad
        return f"<{value.dtype} {list(value.shape)}{flags}>"
    if isinstance(value, (bool, int, float, str, bytes)) or value is None:
        return ascii(value)[:80]
    return f"<{type(value).__name__}>"


def check_words(words: str) -> None:
    assert re.match(r"\w+: expected .*, got ", words, re.DOTALL), words


def run(number: int) -> str:
    """One case: what was called, and what came of it."""
    print(number, end=" ", flush=True)
    r = Random(number)
    torch.manual_seed(number)
    weights = [weight for *_, weight in TARGETS.values()]
    [name] = r.choices(list(TARGETS), weights)
    function, make, check, _ = TARGETS[name]
    args = make(r)
    count = r.choice((0, 1, 1, 1, 2, 3))
    for _ in range(count):
        if name in OF_CONTEXT and r.random() < 0.5:  # of any number of arguments
            args = [args[0], *wrong_list(r, args[1:])]
        else:
            mutate(r, args)
    # Another number of arguments: pybind11 prints them all, which not every wrong tensor survives.
    if count == 0 and r.random() < 0.1:
        args, count = list(wrong_list(r, args)), 1
    if name in OF_CONTEXT and args and type(args[0]) is list and len(args[0]) <= 3:
        args[0] = Context(*frozen(args[0]))
    given = frozen(args)
    print(f"{name}{describe(given)}", flush=True)
    try:
        with torch.set_grad_enabled(r.random() < 0.3):
            result = function(*given)
    except SystemError:  # what C++ makes of an exception that it overlooked
        raise
    except Exception as error:
        if not count:
            raise  # the arguments are right
        words = error.args[0] if error.args else None
        if isinstance(words, str):  # not a tensor, which may not bear to be printed
            print(f"  {type(error).__name__}: {ascii(words)[:300]}")
        if type(error) is ValueError and name in NAMES_ARGUMENTS:
            check_words(words)
        return f"{name} rejected"
    else:
        check(given, result)
        return f"{name} {'accepted' if result is not None or name in NO_RESULT else 'declined'}"
    finally:
        set_torch(_cpu)


def main(first: int, count: int) -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    if sys.platform == "linux" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    counts = Counter(run(number) for number in range(first, first + count))
    print(json.dumps(counts))


@pytest.mark.parametrize("exchange", ["dlpack", "attributes"])
def test_no_call_crashes(exchange):
    done = subprocess.run(
        [sys.executable, __file__, "0", str(CASES)],
        env={**os.environ, "FASTRNN_EXCHANGE": exchange, "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    *lines, last = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join([*lines[-2:], last, done.stderr[-4000:]])
    counts = Counter(json.loads(last))
    assert sum(counts.values()) == CASES
    for name in TARGETS:  # neither are all calls right nor all wrong
        if name not in NEVER_REJECTED:
            assert counts[f"{name} rejected"] > 0, name
        assert counts[f"{name} accepted"] > 0, name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_run_module_takes_projections(num_layers, bias):
    model = fastrnn.LSTM(3, 5, num_layers, bias=bias, proj_size=2)
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        output, _ = _cpu.run_module(vars(model), x, None, 0, FUSED, FUSED_STACK)
    assert torch.equal(output, model(x)[0])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
