"""fastrnn.freeze and unfreeze: the recurrent layers of a model on weights that are packed once."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from ._backends import BFLOAT16, INT8, OWN
from ._cells import GRUCell, LSTMCell, RNNCell
from ._layer import BUILT_IN
from ._modules import _RNNBase
from ._packed import can_pack, forget, packed, weights_of
from ._replace import replace, restore

__all__ = ["freeze", "unfreeze"]

_LAYERS = (_RNNBase, LSTMCell, GRUCell, RNNCell)
_TURNED = "_fastrnn_turned"  # in the __dict__ of what freeze has made of torch.nn's
M = TypeVar("M", bound=nn.Module)


def _storage(module: nn.Module, weights: torch.dtype | None) -> str:
    """What the weights of a layer are to be stored in."""
    dtype = weights_of(module)[0].dtype
    if weights is None or weights is dtype:
        return OWN
    if weights is torch.bfloat16 and dtype is torch.float32:
        return BFLOAT16
    if weights is torch.int8 and dtype is torch.float32 and module.cell_mode in BUILT_IN:
        if getattr(module, "layer_norm", False):
            raise ValueError(
                f"weights: expected None or torch.bfloat16 for a {type(module).__name__} with "
                "layer_norm, got torch.int8"
            )
        return INT8
    raise ValueError(
        "weights: expected None, or torch.bfloat16 or torch.int8 for layers of fastrnn in "
        f"torch.float32, got {weights} for a {type(module).__name__} in {dtype}"
    )


def freeze(model: M, weights: torch.dtype | None = None) -> M:
    """Prepares a model for inference: each recurrent layer packs its weights once and keeps them.

    The model is changed in place: LSTM, GRU, RNN and cells of torch.nn become those of fastrnn, and
    every recurrent layer packs its weights now instead of in each call. A frozen layer

    - is faster, most of all if a call has few rows and steps;
    - is batch-invariant: a row has the same result, bit for bit, alone and in any batch, over a
      sequence at once and step by step, and for any number of threads;
    - has no gradient. It raises RuntimeError in training mode, for an input that requires a
      gradient, and after a change of its parameters. Changes that torch does not count go
      unnoticed: those through `.data` or NumPy, and those to tensors made in inference mode.

    The parameters do not change, so the state_dict stays the same. A model that is saved by
    torch.save, or copied, is frozen again when it is loaded, for the processor at hand, and
    load_state_dict packs the weights that it has loaded. torch.compile and torch.export see frozen
    layers as an operator, fastrnn::scan_packed, which packs in its first call.

    Args:
        model: any module in eval mode on the CPU; it may itself be recurrent.
        weights: the dtype in which weights are stored. None: their own dtype, which gives the same
            results as the layer. torch.bfloat16: half the memory of float32, rounded to 8 bits of
            precision, for large layers whose weights do not fit in cache; products and sums remain
            float32. torch.int8: a quarter of the memory, with one scale for each row of a weight;
            inputs and states are rounded to 8 bits in the same way, sums of products are exact, and
            gates and states are float32. The last is available neither for cells made by
            fastrnn.cell nor with layer_norm.

    Returns:
        The model.

    Raises:
        ValueError: if the model is in training mode, if a layer is not on the CPU or has a dtype
            without a kernel, or if weights is another value.

    Examples:
        >>> import torch, fastrnn
        >>> model = torch.nn.Sequential(torch.nn.LSTM(8, 16)).eval()
        >>> x = torch.randn(5, 3, 8)
        >>> fastrnn.freeze(model)[0]
        LSTM(8, 16, frozen)
        >>> with torch.no_grad():
        ...     whole, alone = model(x)[0], model(x[:, 1:2])[0]
        >>> torch.equal(whole[:, 1:2], alone)
        True
        >>> fastrnn.unfreeze(model)[0]
        LSTM(8, 16)
    """
    if weights is not None and not isinstance(weights, torch.dtype):
        raise ValueError(f"weights: expected a torch.dtype or None, got {type(weights).__name__}")
    turned = [swap.path for swap in replace(model).swapped]
    modules = dict(model.named_modules())
    layers: list[tuple[str, Any]] = [p for p in modules.items() if isinstance(p[1], _LAYERS)]
    try:
        storages = [_checked(path, module, weights) for path, module in layers]
    except ValueError:
        for path in turned:
            restore(modules[path])
        raise
    for path in turned:
        modules[path].__dict__[_TURNED] = True
    for (_, module), storage in zip(layers, storages):
        forget(module)
        module.__dict__["_frozen"] = storage
        packed(module)
    return model


def _checked(path: str, module: Any, weights: torch.dtype | None) -> str:
    name, kind = path or "model", type(module).__name__
    if module.training:
        raise ValueError(f"{name}: expected a layer after eval(), got {kind} in training mode")
    storage = _storage(module, weights)
    if not can_pack(module, is_frozen=True):
        w = weights_of(module)[0]
        raise ValueError(
            f"{name}: expected a layer whose weights can be packed, got {kind} in {w.dtype} on "
            f"{w.device}"
        )
    return storage


def unfreeze(model: M) -> M:
    """Undoes freeze: layers have gradients again, and those of torch.nn are torch.nn's again.

    Args:
        model: any module; it may itself be recurrent.

    Returns:
        The model.

    Examples:
        >>> import torch, fastrnn
        >>> model = fastrnn.freeze(torch.nn.GRU(8, 16).eval())
        >>> fastrnn.unfreeze(model)
        GRU(8, 16)
    """
    for module in list(model.modules()):
        if vars(module).pop("_frozen", None) is not None:
            forget(module)
        if vars(module).pop(_TURNED, False):
            restore(module)
    return model
