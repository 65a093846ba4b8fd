"""fastrnn.replace and restore: torch.nn's recurrent modules in a model become ours, and back.

A swap changes nothing but the module's class. Its parameters, buffers, hooks, training mode and
everything that refers to it, such as optimizers, stay the very same objects.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from inspect import unwrap
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils import parametrize

from ._backends import DTYPES, has_kernel
from ._cells import GRUCell, LSTMCell, RNNCell
from ._drop_in import DropIn, rebased
from ._modules import GRU, LSTM, RNN
from ._torch import Gru, GruCell, Lstm, LstmCell, Rnn, RnnCell, wrap_quantizers

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
        new: its class now, or None if it was left unchanged.
        reason: why it was left; or, if it was converted, what was lost.
        hint: a remedy.
    """

    path: str
    old: Class
    new: Class | None
    reason: str = ""
    hint: str = ""

    def __str__(self) -> str:
        result = "left" if self.new is None else f"-> {_name(self.new)}"
        why = f": {self.reason}" if self.reason else ""
        hint = f"; {self.hint}" if self.hint else ""
        return f"{self.path or '(the model)'}: {_name(self.old)} {result}{why}{hint}"


class Report(tuple[Swap, ...]):
    """What replace or restore did: a tuple of Swap. It prints as one line for each module."""

    @property
    def swapped(self) -> list[Swap]:
        """Those whose class was changed."""
        return [swap for swap in self if swap.new is not None]

    @property
    def left(self) -> list[Swap]:
        """Those that were left unchanged, each with its reason."""
        return [swap for swap in self if swap.new is None]

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "nothing to swap"


def _name(cls: Class) -> str:
    if isinstance(cls, _Rebased):
        return f"{_name(cls.__bases__[0])} on {_name(_OURS[_base(cls)])}"
    package = "torch.nn" if cls in _OURS else "fastrnn" if cls in _THEIRS else cls.__module__
    return f"{package}.{cls.__qualname__}"


def _class(module: nn.Module) -> Class:
    """The module's class, below the one that a parametrization has put over it."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _set_class(module: nn.Module, new: Class) -> None:
    module.__class__ = rebased(module, new)


def _base(cls: Class) -> Any:
    """The class of torch.nn that a subclass is derived from; cls itself where there is none."""
    return next((c for c in cls.__mro__ if c in _OURS), cls)


# -- Subclasses ------------------------------------------------------------------------------------


class _Rebased(type):
    """The class of a module whose class was derived from torch.nn's, and now is from fastrnn's.

    It is derived from that class and from one, `_Between`, that is derived from ours and torch's in
    this order. So the method that the class calls by super() is ours, and isinstance of the class
    and of torch.nn's holds as before.
    """


def _rebased_reduce(module: nn.Module, protocol: Any) -> Any:
    """Pickles a module of such a class by the class it was made from."""
    cls = _class(module)
    if cls is not type(module):  # parametrized, which torch refuses to pickle
        return object.__reduce_ex__(module, protocol)
    getstate = getattr(module, "__getstate__", None)  # all objects have one since Python 3.11
    return _rebuilt, (cls.__bases__[0],), getstate() if getstate else vars(module)


def _rebuilt(cls: Class) -> nn.Module:
    new: Any = _on_ours(cls)  # type: ignore[arg-type]  # a class can be hashed
    return new.__new__(new)


@cache
def _on_ours(cls: Any) -> Any:
    """The class that is derived from fastrnn's class as cls is from torch.nn's."""
    between = _between(_base(cls))
    own: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    own |= {"__reduce_ex__": _rebased_reduce}
    kind = type(cls)  # an ABCMeta, perhaps
    if kind is not type:
        return type(kind.__name__, (_Rebased, kind), {})(cls.__name__, (cls, between), own)
    return _Rebased(cls.__name__, (cls, between), own)


@cache
def _between(base: Any) -> Any:
    return type(f"_{base.__name__}", (_OURS[base], base), {})


def _may_be_rebased(cls: Class) -> bool:
    """Whether the class runs torch's forward: it has no other, or one that calls it by super()."""
    for each in cls.__mro__:
        if each in _OURS:
            return True
        forward = vars(each).get("forward")
        if forward is None:
            continue
        code = getattr(unwrap(forward), "__code__", None)
        if code is None or not {"super", "forward"} <= {*code.co_names}:
            return False
    return False


# -- Both ways -------------------------------------------------------------------------------------


def _why_leave(module: nn.Module, subclasses: bool) -> tuple[str, str]:
    """Why replace leaves a recurrent module that is not ours, and what could be done about it; ""
    if it does not."""
    cls = _class(module)
    base = _base(cls)
    if base not in _OURS:
        reason = "not a class of torch.nn, whose own code may not work with fastrnn"
        return reason, "build it on fastrnn's layers"
    if "forward" in vars(module):
        hint = "delete the attribute, or make it a hook"
        return "its forward was overridden on the instance", hint
    if cls is not base:
        reason = f"a subclass of {_name(base)}, whose own code may not work with fastrnn"
        if not _may_be_rebased(cls):
            reason = f"a subclass of {_name(base)} with a forward of its own that does not call it"
            return reason, f"derive it from {_name(_OURS[base])}"
        if not subclasses:
            return reason, "replace(model, subclasses=True) converts it"
    weight = next(module.parameters(), None)
    if weight is not None and not weight.is_meta and not has_kernel(weight):
        reason = f"no kernel for {weight.dtype} on {weight.device.type}, torch.nn is faster there"
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return reason, f"kernels are for {names}, on the CPU and, where built, on CUDA"
    return "", ""


def _walk(model: nn.Module, swap: Callable[[str, nn.Module], Swap | None]) -> Report:
    """The report of swap(path, module) over all distinct modules of the tree."""
    swaps = [swap(path, module) for path, module in model.named_modules()]
    return Report(s for s in swaps if s is not None)


def replace(model: nn.Module, *, subclasses: bool = False) -> Report:
    """Converts every torch.nn.LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell in model to fastrnn's.

    This happens in place, and includes the model itself. Each module remains the same object with
    the same Parameter objects, buffers, hooks, parametrizations and training mode, so optimizers
    and all other references remain valid. Only its class changes, so isinstance(m, torch.nn.LSTM)
    no longer holds. Calling it again changes nothing.

    Some modules are left unchanged: subclasses, modules whose forward was overridden on the
    instance, and modules on a device or in a dtype without a kernel. Those on the meta device are
    converted.

    Args:
        model: any module; it may itself be recurrent.
        subclasses: whether to convert also modules of subclasses whose forward is torch's own or
            calls it through super(). Such a module gets a class derived from its own class and, in
            place of torch's, from fastrnn's; isinstance gives the same answers as before. Other
            modules of the class do not change.

    Returns:
        A Swap for each module that was converted or left. Modules of fastrnn do not appear.

    Examples:
        >>> class Encoder(torch.nn.LSTM):
        ...     pass
        >>> model = torch.nn.Sequential(Encoder(3, 4))
        >>> print(fastrnn.replace(model, subclasses=True))
        0: __main__.Encoder -> __main__.Encoder on fastrnn.LSTM
    """

    def swap(path: str, module: nn.Module) -> Swap | None:
        old = _class(module)
        if not isinstance(module, (RNNBase, RNNCellBase)) or isinstance(module, DropIn):
            return None
        reason, hint = _why_leave(module, subclasses)
        if reason:
            return Swap(path, old, None, reason, hint)
        _set_class(module, _OURS[old] if old in _OURS else _on_ours(old))  # type: ignore[arg-type]
        vars(module)[_MARK] = True
        return Swap(path, old, _class(module))

    return _walk(model, swap)


def restore(model: nn.Module, *, all: bool = False) -> Report:
    """Undoes fastrnn.replace in model, in place; nothing else changes.

    Args:
        model: any module; it may itself be recurrent.
        all: whether to convert also modules that were built with fastrnn. An option that torch's
            class does not have, such as checkpoint_every, is lost, and the report names it.

    Returns:
        A Swap for each module that replace had converted, and with `all` for each of fastrnn's.

    Examples:
        >>> model = torch.nn.Sequential(fastrnn.GRU(3, 4))
        >>> print(fastrnn.restore(model, all=True))
        0: fastrnn.GRU -> torch.nn.GRU
    """

    def swap(path: str, module: nn.Module) -> Swap | None:
        old = _class(module)
        if _MARK not in vars(module) and not (all and isinstance(module, DropIn)):
            return None
        if isinstance(module, DropIn) and (module._theirs is None or module.has_gains):
            what = "such cell" if module._theirs is None else "layer normalisation"
            return Swap(path, old, None, f"torch.nn has no {what}", "keep it, or train another")
        new = old.__bases__[0] if isinstance(old, _Rebased) else _THEIRS.get(old)
        if new is None:
            if _MARK in vars(module):
                hint = "set the class that replace gave it, and restore again"
                return Swap(path, old, None, "its class was changed after replace", hint)
            base = next(c for c in old.__mro__ if c in _THEIRS)
            reason = f"a subclass of {_name(base)}, whose own code may need fastrnn"
            return Swap(path, old, None, reason, f"derive it from {_name(_THEIRS[base])}")
        vars(module).pop(_MARK, None)
        lost = module.drop_options() if isinstance(module, DropIn) else ""
        _set_class(module, new)
        reason = lost and f"without {lost}, which {_name(_base(new))} does not have"
        return Swap(path, old, new, reason)

    return _walk(model, swap)


# -- For the length of a call ----------------------------------------------------------------------

_LENT = "_fastrnn_lent"


def seen_as_torchs(function: Callable[..., Any]) -> Callable[..., Any]:
    """function(model, ...), to which the modules of the model that are ours are torch.nn's.

    Those that are still there when it is done are ours again, also in copies that it made. Modules
    with an option that torch.nn's results would lack stay ours, which the function does not know.
    """

    @wraps(function)
    def wrapper(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(model, nn.Module):
            return function(model, *args, **kwargs)
        for module in model.modules():
            if _class(module) in _THEIRS and module.is_torchs_in_eval:
                vars(module)[_LENT] = True
                _set_class(module, _THEIRS[_class(module)])
        result = None
        try:
            result = function(model, *args, **kwargs)
        finally:
            for tree in (model, result):
                for module in tree.modules() if isinstance(tree, nn.Module) else ():
                    if vars(module).pop(_LENT, False) and _class(module) in _OURS:
                        _set_class(module, _OURS[_class(module)])
        return result

    return wrapper


def hook_quantization() -> None:
    """Lets torch's quantizers, which know torch.nn's classes by name, treat ours as those."""
    wrap_quantizers(seen_as_torchs)
