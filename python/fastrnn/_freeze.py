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
        return INT8
    raise ValueError(
        "weights: expected None, or torch.bfloat16 or torch.int8 for layers of fastrnn in "
        f"torch.float32, got {weights} for a {type(module).__name__} in {dtype}"
    )


def freeze(model: M, weights: torch.dtype | None = None) -> M:
    """Makes a model ready for inference: each recurrent layer keeps its weights packed.

    In place: torch.nn's LSTM, GRU, RNN and their cells inside become ours, and all of ours pack
    their weights now instead of in each call. A frozen layer

    - is faster the fewer rows and steps a call has;
    - is batch-invariant: the result of a row is the same bit for bit alone and in any batch, over a
      sequence at once and step by step, and for any number of threads;
    - has no gradient. In training mode, with an input that requires a gradient, and after a change
      of its parameters it raises RuntimeError. Changes that torch does not count are not noticed:
      through `.data`, through NumPy, or of tensors made in inference mode.

    The parameters stay what they are, so that the state_dict is the same. A model that is saved by
    torch.save, or copied, is frozen again where it is loaded, for the processor that is there; and
    load_state_dict packs what it has loaded. torch.compile and torch.export take frozen layers as
    an operator of their own, fastrnn::scan_packed, which packs in its first call.

    Args:
        model: any module, in eval mode; itself a recurrent one, too. On the CPU.
        weights: what the weights are stored in. None: their own dtype, and the results are those of
            the layer. torch.bfloat16: half of that of float32, rounded to 8 bits of precision, for
            large layers whose weights do not fit in cache; products and sums stay float32.
            torch.int8: a quarter, each row of a weight with a scale of its own; inputs and states
            are rounded to 8 bits in the same way as they come, sums of products are exact, and
            gates and states float32. Not for cells made by fastrnn.cell.

    Returns:
        The model.

    Raises:
        ValueError: if the model is in training mode, a layer is on another device than the CPU or
            in a dtype without a kernel, or weights is none of these.

    Example:
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
    name = f"{path or 'model'}: {type(module).__name__}"
    if module.training:
        raise ValueError(f"{name} is in training mode; call eval() first")
    storage = _storage(module, weights)
    if not can_pack(module, is_frozen=True):
        w = weights_of(module)[0]
        raise ValueError(f"{name}: no kernel for packed weights in {w.dtype} on {w.device}")
    return storage


def unfreeze(model: M) -> M:
    """Takes back what freeze did: layers have gradients again, and torch.nn's are torch.nn's.

    Args:
        model: any module; itself a recurrent one, too.

    Returns:
        The model.
    """
    for module in list(model.modules()):
        if vars(module).pop("_frozen", None) is not None:
            forget(module)
        if vars(module).pop(_TURNED, False):
            restore(module)
    return model
