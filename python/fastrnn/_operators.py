"""The scan as torch operators: fastrnn::scan_forward and fastrnn::scan_backward.

Their arguments are the fields of the records Layer and Saved, one by one; each call goes to the
backend of its device. An operator returns an empty tensor for a result that there is not.

Registered by define + impl + register_fake: an order of magnitude less time per call than the
custom_op decorator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, get_type_hints

import torch
from torch import Tensor

from . import _cpu_backend, _cuda_backend  # noqa: F401  # which register themselves
from ._backends import backend, backend_of
from ._flops import register as register_flops
from ._layer import Layer, Results, Saved
from ._load import _cpu
from ._packed import packed_layer
from ._torch import below_autograd

_SCHEMA_TYPES = {
    str: "str",
    int: "SymInt",
    float: "float",
    bool: "bool",
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    Sequence[bool]: "bool[]",
}


def _schema(*records: type) -> str:
    fields = (field for record in records for field in get_type_hints(record).items())
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in fields)


_RESULTS = ", ".join(["Tensor"] * len(Results._fields))
library = torch.library.Library("fastrnn", "DEF")
library.define(f"scan_forward({_schema(Layer)}) -> ({_RESULTS})")
# The forward scan on packed weights, packed in the first call; of frozen layers, no gradient.
library.define(f"scan_packed(str storage, {_schema(Layer)}) -> ({_RESULTS})")
library.define(f"scan_backward({_schema(Layer, Saved)}) -> Tensor[]")


def _layer(args: tuple[Any, ...]) -> Layer:
    return with_batch(Layer._make(args[: len(Layer._fields)]))


def with_batch(layer: Layer) -> Layer:
    """The layer with B of its tensors: a trace knows only the number that there was when it was
    made. Of ragged rows the states tell, and without them the number has to do."""
    if layer.batch_sizes is None:
        return layer._replace(batch=layer.x.shape[1])
    return layer if layer.h_0 is None else layer._replace(batch=layer.h_0.shape[1])


def filled(x: Tensor, results: Iterable[Tensor | None]) -> list[Tensor]:
    """The results, with the empty tensors by which an operator says that there is none."""
    return [x.new_empty(0) if r is None else r for r in results]


def _register(device_type: str, key: str) -> None:
    def forward(*args: Any) -> tuple[Tensor, ...]:
        layer = _layer(args)
        return tuple(filled(layer.x, backend(device_type).forward(layer)))

    def backward(*args: Any) -> list[Tensor]:
        layer, saved = _layer(args), Saved._make(args[len(Layer._fields) :])
        return filled(layer.x, backend(device_type).backward(layer, saved))

    library.impl("scan_forward", forward, key)
    library.impl("scan_backward", backward, key)


for _device_type, _key in (("cpu", "CPU"), ("cuda", "CUDA")):
    if backend_of(_device_type) is not None:
        _register(_device_type, _key)


@torch.library.register_fake("fastrnn::scan_forward")
def _(*args):  # type: ignore[no-untyped-def]
    layer = _layer(args)
    return tuple(filled(layer.x, layer.make_results()))


@torch.library.register_fake("fastrnn::scan_packed")
def _(storage, *args):  # type: ignore[no-untyped-def]
    layer = _layer(args)
    return tuple(filled(layer.x, layer.make_results()))


def _scan_packed_cpu(storage: str, *args: Any) -> tuple[Tensor, ...]:
    layer = _layer(args)
    results = Results._make(packed_layer(layer, storage).forward(layer))
    return tuple(filled(layer.x, results))


def _scan_packed_autograd(storage: str, *args: Any) -> tuple[Tensor, ...]:
    with below_autograd():
        return tuple(_scan_packed(storage, *args))


library.impl("scan_packed", _scan_packed_cpu, "CPU")
library.impl("scan_packed", _scan_packed_autograd, "Autograd")


@torch.library.register_fake("fastrnn::scan_backward")
def _(*args):  # type: ignore[no-untyped-def]
    layer = _layer(args)
    return filled(layer.x, layer.make_gradients(args[-1]))


register_flops()

_scan_forward = torch.ops.fastrnn.scan_forward.default
_scan_backward = torch.ops.fastrnn.scan_backward.default
_scan_packed = torch.ops.fastrnn.scan_packed.default


class Call(IntEnum):
    """What a call on some tensors is, as _cpu.inspect numbers it."""

    # Something wants to see each operation, or a tensor is more than its memory.
    WATCHED = 0
    # No more than the CPU's kernel: the operator, which takes as long as a small step, is left out.
    PLAIN = 1
    # The same, with gradients.
    DIFFERENTIABLE = 2


def inspect(layer: Layer, *others: Tensor | None) -> Call:
    """What an eager call on the layer and `others` is."""
    return _CALLS[_cpu.inspect(layer, others)]


_CALLS = tuple(Call)


def scan_forward(layer: Layer) -> Results:
    """The layer on its kernel. Results are None, or empty, where there is none."""
    if not torch.compiler.is_compiling() and inspect(layer):
        return backend("cpu").forward(layer)
    return Results(*_scan_forward(*layer))


def scan_packed(layer: Layer, storage: str, packed: Any) -> Results:
    """The layer on its weights that are packed; None: which the operator packs, or finds."""
    if packed is not None and not torch.compiler.is_compiling() and inspect(layer):
        return Results._make(packed.forward(layer))
    return Results(*_scan_packed(storage, *layer))


def scan_backward(layer: Layer, saved: Saved) -> list[Tensor | None]:
    """The gradients of x, h_0, c_0 and each weight; None where not wanted."""
    if not torch.compiler.is_compiling() and inspect(layer, *saved[3:7]):
        return list(backend("cpu").backward(layer, saved))
    gradients = _scan_backward(*layer, *saved)
    return [g if want else None for g, want in zip(gradients, saved.wanted)]
