"""fastrnn.replace and restore: torch.nn's recurrent modules in a model become ours, and back.

A swap changes nothing but the module's class. Its parameters, buffers, hooks, training mode and
everything that refers to it, such as optimizers, stay the very same objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils import parametrize

from ._backends import has_kernel
from ._cells import GRUCell, LSTMCell, RNNCell
from ._modules import GRU, LSTM, RNN
from ._torch import Gru, GruCell, Lstm, LstmCell, Rnn, RnnCell

Class = type[nn.Module]

_OURS: dict[Class, Class] = {
    Lstm: LSTM,
    Gru: GRU,
    Rnn: RNN,
    LstmCell: LSTMCell,
    GruCell: GRUCell,
    RnnCell: RNNCell,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_MARK = "_fastrnn_replaced"  # in the module's __dict__: restore takes back only what replace did


class Swap(NamedTuple):
    """What became of one module.

    Attributes:
        path: as in model.named_modules(); "" is the model itself.
        old: its class before.
        new: its class now, or None where it was left.
        reason: why it was left.
    """

    path: str
    old: Class
    new: Class | None
    reason: str = ""

    def __str__(self) -> str:
        result = f"left: {self.reason}" if self.new is None else f"-> {_name(self.new)}"
        return f"{self.path or '(the model)'}: {_name(self.old)} {result}"


class Report(tuple[Swap, ...]):
    """The modules that a replace or restore met, a tuple of Swap; printed, one line each."""

    @property
    def swapped(self) -> list[Swap]:
        """Those whose class was changed."""
        return [swap for swap in self if swap.new is not None]

    @property
    def left(self) -> list[Swap]:
        """Those that were left, each with its reason."""
        return [swap for swap in self if swap.new is None]

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "nothing to swap"


def _name(cls: Class) -> str:
    package = "torch.nn" if cls in _OURS else "fastrnn" if cls in _THEIRS else cls.__module__
    return f"{package}.{cls.__qualname__}"


def _class(module: nn.Module) -> Class:
    """The module's class, below the one that a parametrization has put over it."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _set_class(module: nn.Module, new: Class) -> None:
    if parametrize.is_parametrized(module):
        # A parametrization makes each module a class of its own, which holds its properties.
        old = type(module)
        own = {k: v for k, v in vars(old).items() if k not in ("__dict__", "__weakref__")}
        new = type(old.__name__, (new,), own)
    module.__class__ = new


def _why_leave(module: nn.Module) -> str:
    """Why replace leaves a recurrent module that is not ours, or "" if it does not."""
    cls = _class(module)
    if cls not in _OURS:
        base = next((c for c in cls.__mro__ if c in _OURS), None)
        what = "not a class of torch.nn" if base is None else f"a subclass of {_name(base)}"
        return f"{what}, whose own code may not work on ours"
    if "forward" in vars(module):
        return "its forward was overridden on the instance"
    weight = next(module.parameters(), None)
    if weight is not None and not weight.is_meta and not has_kernel(weight):
        return f"no kernel for {weight.dtype} on {weight.device.type}, torch.nn is faster there"
    return ""


def _walk(model: nn.Module, swap: Callable[[str, nn.Module], Swap | None]) -> Report:
    """The report of swap(path, module) over all distinct modules of the tree."""
    swaps = [swap(path, module) for path, module in model.named_modules()]
    return Report(s for s in swaps if s is not None)


def replace(model: nn.Module) -> Report:
    """Turns every torch.nn.LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell in model into ours.

    In place, the model itself included: each module stays the same object with the same Parameter
    objects, buffers, hooks, parametrizations and training mode, so that optimizers and all other
    references stay right, and only its class changes (isinstance(m, torch.nn.LSTM) no longer
    holds). Doing it again changes nothing.

    Left as they are: subclasses, modules whose forward was overridden on the instance, and those
    on a device or in a dtype without a kernel (meta tensors apart, which get theirs later).

    Args:
        model: any module; itself a recurrent one, too.

    Returns:
        A Swap for each module swapped or left. Modules that are ours already do not appear.
    """

    def swap(path: str, module: nn.Module) -> Swap | None:
        old = _class(module)
        if not isinstance(module, (RNNBase, RNNCellBase)) or issubclass(old, tuple(_THEIRS)):
            return None
        reason = _why_leave(module)
        if reason:
            return Swap(path, old, None, reason)
        _set_class(module, _OURS[old])
        vars(module)[_MARK] = True
        return Swap(path, old, _OURS[old])

    return _walk(model, swap)


def restore(model: nn.Module) -> Report:
    """Takes back what fastrnn.replace did in model, in place and with nothing else changed.

    Modules that were built as ours stay.

    Args:
        model: any module; itself a recurrent one, too.

    Returns:
        A Swap for each module that replace had swapped.
    """

    def swap(path: str, module: nn.Module) -> Swap | None:
        if _MARK not in vars(module):
            return None
        old = _class(module)
        if old not in _THEIRS:
            return Swap(path, old, None, "its class was changed after replace")
        del vars(module)[_MARK]
        _set_class(module, _THEIRS[old])
        return Swap(path, old, _THEIRS[old])

    return _walk(model, swap)
