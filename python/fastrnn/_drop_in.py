"""What layers and cells do where one of torch's tools knows torch.nn's classes by name.

Such a tool meets the class of torch.nn that a module stands for, on the same parameters, or is
shown a call that it can take as it takes torch.nn's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ._torch import is_expanded


def _items(given: Iterable[Any]) -> Iterator[Any]:
    """The arguments of a call, those in tuples and lists one by one."""
    for value in given:
        yield from value if isinstance(value, (tuple, list)) else (value,)


class DropIn(nn.Module):
    """A module of ours, which may stand for one of torch.nn."""

    # The class it stands for; None for a cell that torch.nn has not.
    _theirs: ClassVar[type[nn.Module] | None]
    _frozen: str | None = None  # what its weights are stored in, if it is frozen: see _packed
    _packed: Any = None  # its weights packed, if they are

    def _shown_frozen(self) -> str:
        storage = self._frozen
        return "" if storage is None else "frozen" if storage == "own" else f"frozen={storage}"

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script takes instead: torch.nn's twin, sharing all that this holds."""
        cls: Any = type(self).__bases__[0] if parametrize.is_parametrized(self) else type(self)
        own: Any = next(c for c in cls.__mro__ if "_theirs" in vars(c))
        if cls.forward is not own.forward:
            return self  # whose code is to be compiled as it stands
        if self._theirs is None:
            raise RuntimeError(
                f"{cls.__name__}: torch.jit.script compiles torch.nn's classes, which have no such "
                "cell; use torch.export or torch.jit.trace"
            )
        if lost := self._without_twin():
            raise RuntimeError(
                f"{lost}: torch.jit.script compiles torch.nn.{self._theirs.__name__}, which has no "
                "such option"
            )
        twin = rebased(self, self._theirs)
        module = twin.__new__(twin)
        object.__setattr__(module, "__dict__", self.__dict__)
        return module

    def _without_twin(self) -> str:
        """The options that torch.nn's class has not, as they are written; "" for none."""
        return ""

    @property
    def has_gains(self) -> bool:
        """Whether it has the parameters of layer normalisation, which torch.nn's class has not."""
        return False

    @property
    def is_torchs_in_eval(self) -> bool:
        """Whether torch.nn's class gives the same results in eval mode."""
        return True

    def drop_options(self) -> str:
        """Puts off these options, and says which there were."""
        return ""

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy | None:
        """The call as a node of a torch.fx graph, where one is being traced: this is a leaf of it,
        as torch.nn's modules are."""
        for proxy in _items((*args, *kwargs.values())):
            tracer: Any = proxy.tracer if isinstance(proxy, fx.Proxy) else None
            if tracer is not None and tracer.root is not self:
                path = tracer.path_of_module(self)
                return tracer.create_proxy("call_module", path, args, kwargs)
        return None

    def _is_torchs(self, *given: Any) -> bool:
        """Whether torch's own forward runs the call: objects that only behave like tensors, and
        Expanded Weights, know torch's operators and none of ours."""
        for item in _items(given):
            if not isinstance(item, Tensor) and hasattr(item, "__torch_function__"):
                return True
        return is_expanded(self._parameters.values())


def rebased(module: nn.Module, new: type[nn.Module]) -> type[nn.Module]:
    """`new`, below what a parametrization has put over the module's class."""
    if not parametrize.is_parametrized(module):
        return new
    # A parametrization makes each module a class of its own, which holds its properties.
    old = type(module)
    own = {k: v for k, v in vars(old).items() if k not in ("__dict__", "__weakref__")}
    return type(old.__name__, (new,), own)
