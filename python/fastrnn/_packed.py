"""Weights that are packed once for many calls: for states, for cells and for frozen modules.

A module keeps what was packed of it in its __dict__, as _packed. Copies and pickled files of the
module leave it out: it is made for this processor, and for these parameters.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _int8
from ._backends import DTYPES, INT8, OWN, backend_of, runs_cell
from ._layer import Layer
from ._torch import is_intercepted, version_of


def stored(weights: tuple[Tensor, ...], storage: str) -> tuple[Tensor, ...]:
    """The values that weights have where they are stored so: what a reference implementation of a
    packed layer runs on. Biases and vectors stay what they are."""
    if storage == OWN:
        return weights
    if storage == INT8:
        return tuple(_int8.rounded(w) if w.dim() == 2 else w for w in weights)
    return tuple(w.bfloat16().to(w.dtype) if w.dim() == 2 else w for w in weights)


class _Known(NamedTuple):
    weights: list[Any]  # weak references to them
    marks: list[tuple[int, int]]  # of each, where it lies and its version
    packed: Any


_known: dict[tuple[Any, ...], _Known] = {}


def packed_layer(layer: Layer, storage: str) -> Any:
    """The layer's weights, packed: once, as long as they are the same tensors, unchanged. For the
    operator, which knows no module."""
    weights = layer.weights
    key = storage, layer.mode, layer.directions, layer.layer_norm, *map(id, weights)
    marks = [(w.data_ptr(), version_of(w)) for w in weights]
    known = _known.get(key)
    if (
        known is not None
        and known.marks == marks
        and all(ref() is w for ref, w in zip(known.weights, weights))
    ):
        return known.packed

    def drop(_: Any) -> None:
        _known.pop(key, None)

    packed = _pack(layer.mode, layer.directions, tuple(weights), storage, layer.layer_norm)
    _known[key] = _Known([weakref.ref(w, drop) for w in weights], marks, packed)
    return packed


def _pack(
    mode: str, directions: int, weights: tuple[Tensor, ...], storage: str, layer_norm: bool
) -> Any:
    w = weights[0]
    x = w.new_empty(0, 1, w.shape[1])  # of the weights alone, for calls of any rows
    own = [w.detach() for w in weights]
    layer = Layer.plain(mode, directions, 1, x, None, None, own, layer_norm=layer_norm)
    if layer.cell.inputs:
        width = directions * layer.cell.inputs * layer.hidden
        layer = layer._replace(inputs=x.new_empty(0, 1, width))
    found = backend_of(w.device.type)
    assert found is not None
    return found.pack(layer, storage)


def weights_of(module: Any) -> list[Tensor]:
    """The weights of a layer or a cell, in the order of Layer.weights."""
    if hasattr(module, "_weights"):
        return list(module._weights())
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [w for name in names if (w := getattr(module, name)) is not None]


def _has_own_weights(module: Any) -> bool:
    """Whether its weights are its parameters, rather than made of them."""
    names = getattr(module, "_flat_weights_names", None) or ("weight_ih", "weight_hh")
    return all(name in module._parameters for name in names)


def can_pack(module: Any, is_frozen: bool = False) -> bool:
    """Whether there are kernels for packed weights of a layer or a cell. Weights that are computed
    at each access, by a parametrization, can be packed of a frozen module alone."""
    if is_intercepted() or torch.compiler.is_compiling():
        return False
    if not (is_frozen or module._frozen or _has_own_weights(module)):
        return False
    weights = weights_of(module)
    w = weights[0]
    found = backend_of(w.device.type)
    return (
        found is not None
        and found.packs
        and all(type(each) in (Tensor, nn.Parameter) for each in weights)
        and all(each.device == w.device and each.dtype == w.dtype for each in weights)
        and w.dtype in DTYPES
        and runs_cell(module.cell_mode, w)
    )


def _pack_module(module: Any, storage: str) -> Any:
    weights = weights_of(module)
    count = getattr(module, "num_layers", 1)
    directions = 2 if getattr(module, "bidirectional", False) else 1
    each = len(weights) // count
    parts = [tuple(weights[k * each : (k + 1) * each]) for k in range(count)]
    norm = getattr(module, "layer_norm", False)
    layers = [_pack(module.cell_mode, directions, part, storage, norm) for part in parts]
    found = backend_of(weights[0].device.type)
    assert found is not None
    return found.keep(layers, vars(module), list(module.parameters()))


def packed(module: Any) -> Any:
    """What is packed of a layer or a cell that can_pack(), made if there is none of its parameters
    as they are now.

    Raises:
        RuntimeError: if the module is frozen and its parameters have changed since.
    """
    own = vars(module)
    model = own.get("_packed")
    if model is not None and model.is_current(own):
        return model
    frozen = module._frozen
    if model is not None and frozen is not None:
        raise RuntimeError(
            f"{type(module).__name__}: its parameters have changed since it was frozen; call "
            "fastrnn.freeze again, or fastrnn.unfreeze"
        )
    with torch.no_grad():
        model = own["_packed"] = _pack_module(module, frozen or OWN)
    return model


def pack_again(module: Any) -> Any:
    """What packed() makes, for whoever may not miss a change that torch does not count."""
    with torch.no_grad():
        return _pack_module(module, OWN)


def forget(module: nn.Module) -> None:
    """Drops what is packed of a module."""
    vars(module).pop("_packed", None)


def check_frozen(module: Any, *tensors: Tensor | None) -> None:
    """Raises RuntimeError where a frozen module is not for the call: in training, or with a tensor
    that requires a gradient."""
    name = type(module).__name__
    if module.training:
        raise RuntimeError(
            f"{name}: it is frozen, but in training mode; call eval(), or fastrnn.unfreeze"
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{name}: it is frozen, so it has no gradient, but input or hx requires one; use "
            "torch.no_grad(), or fastrnn.unfreeze"
        )
