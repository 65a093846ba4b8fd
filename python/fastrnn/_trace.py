"""The user's function for one step of a cell, run once on symbols: what it computes, and whether a
kernel can be made of it."""

from __future__ import annotations

import hashlib
import inspect
import keyword
import operator
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["FUNCTIONS", "Definition", "Operation", "Symbol", "define"]

# The pointwise functions of torch that a cell may use, by the names under which torch has them: as
# functions, as methods of a tensor or in torch.nn.functional.
FUNCTIONS = (
    *("abs", "clamp", "cos", "elu", "erf", "exp", "expm1", "gelu", "hardtanh", "leaky_relu", "log"),
    *("log1p", "logsigmoid", "maximum", "minimum", "mish", "neg", "pow", "reciprocal", "relu"),
    *("relu6", "rsqrt", "sigmoid", "sign", "silu", "sin", "softplus", "softsign", "sqrt", "square"),
    *("tanh", "where"),
)
_ALLOWED = {
    function: name
    for name in FUNCTIONS
    for module in (torch, torch.Tensor, torch.nn.functional)
    if (function := getattr(module, name, None)) is not None
}
_ALLOWED |= {
    function: name
    for name, aliases in {
        "add": ("add",),
        "sub": ("sub", "subtract"),
        "mul": ("mul", "multiply"),
        "truediv": ("div", "divide", "true_divide"),
        "neg": ("negative",),
        "abs": ("absolute",),
        "and_": ("logical_and",),
        "or_": ("logical_or",),
        "invert": ("logical_not",),
        **{name: (name,) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    }.items()
    for alias in aliases
    for function in (getattr(torch, alias), getattr(torch.Tensor, alias))
}
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_LOGIC = ("and_", "or_", "invert")
_ARITHMETIC = ("add", "sub", "mul", "truediv", "neg", "pow")
_MEANS = (
    "arithmetic, comparison, torch.where, and torch's pointwise functions: "
    f"{', '.join(name for name in FUNCTIONS if name != 'where')}"
)


@dataclass(frozen=True)
class Operation:
    """One operation on symbols and numbers."""

    name: str  # of FUNCTIONS, or of the module operator
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def run(self, value_of: Callable[[Any], Any]) -> Tensor:
        """The operation on tensors."""
        args = [value_of(a) for a in self.args]
        kwargs = {name: value_of(a) for name, a in self.kwargs}
        own: Any = getattr(operator, self.name, None)
        if own is None or self.name in FUNCTIONS:
            own = getattr(torch, self.name, None) or getattr(torch.nn.functional, self.name)
        result: Tensor = own(*args, **kwargs)
        return result


class _Tracer:
    """Collects the operations of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.operations: list[Operation | None] = []  # None: an argument of the function
        self.names: list[str] = []

    def error(self, message: str) -> ValueError:
        """With the line of the function that runs now."""
        frame: Any = sys._getframe()
        while frame is not None and frame.f_code is not self.function.__code__:
            frame = frame.f_back
        line = self.function.__code__.co_firstlineno if frame is None else frame.f_lineno
        return self.error_at(line, message)

    def error_at(self, line: int, message: str) -> ValueError:
        code = self.function.__code__
        place = f"{self.function.__name__}, line {line} of {Path(code.co_filename).name}"
        return ValueError(f"{place}: {message}. A cell may use {_MEANS}.")

    def argument(self, name: str) -> Symbol:
        return self.add(None, name, False)

    def add(self, operation: Operation | None, name: str, is_bool: bool) -> Symbol:
        self.operations.append(operation)
        self.names.append(name)
        return Symbol(self, len(self.operations) - 1, is_bool)

    def apply(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Symbol:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Symbol) and value._tracer is not self:
                raise self.error("a value of another call of the function cannot be used")
            if isinstance(value, Tensor):
                raise self.error(
                    "a tensor from outside cannot be used; make it a keyword-only parameter"
                )
            if value is not None and not isinstance(value, (Symbol, int, float, str)):
                raise self.error(f"{name} of {type(value).__name__} cannot be used")
        if kwargs and name not in FUNCTIONS:
            raise self.error(f"{name} with {', '.join(kwargs)} cannot be used")
        if name == "pow" and (len(args) < 2 or isinstance(args[1], Symbol)):
            raise self.error("pow takes a number as its exponent")
        symbols = [a for a in (*args, *kwargs.values()) if isinstance(a, Symbol)]
        is_bool = name in _COMPARISONS or name in _LOGIC
        if name in _LOGIC and not all(s._is_bool for s in symbols):
            raise self.error("&, | and ~ combine comparisons only")
        if name == "where" and not (isinstance(args[0], Symbol) and args[0]._is_bool):
            raise self.error("torch.where takes a comparison as its first argument")
        return self.add(Operation(name, tuple(args), tuple(sorted(kwargs.items()))), "", is_bool)


def _operator(name: str, swaps: bool = False) -> Callable[..., Any]:
    def method(self: Symbol, *others: Any) -> Any:
        args = (self, *others)
        return self._tracer.apply(name, args[::-1] if swaps else args, {})

    return method


def _refuse(what: str) -> Callable[..., Any]:
    def method(self: Symbol, *args: Any) -> Any:
        raise self._tracer.error(what)

    return method


class Symbol:
    """A value that is not known yet."""

    __array_ufunc__ = None  # numpy's functions are not torch's

    def __init__(self, tracer: _Tracer, index: int, is_bool: bool) -> None:
        self._tracer, self._index, self._is_bool = tracer, index, is_bool

    def __repr__(self) -> str:
        return f"%{self._index}"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Symbol:
        def symbols(values: Any) -> Any:
            for value in values:
                if isinstance(value, Symbol):
                    yield value
                elif isinstance(value, (tuple, list)):
                    yield from symbols(value)

        tracer = next(symbols((*args, *(kwargs or {}).values())))._tracer
        name = _ALLOWED.get(function)
        if name is None:
            shown = getattr(function, "__name__", str(function))
            raise tracer.error(f"{shown} is not pointwise, or has no kernel")
        given = {
            k: v for k, v in (kwargs or {}).items() if k not in ("inplace", "out", "_stacklevel")
        }
        if (kwargs or {}).get("inplace") or (kwargs or {}).get("out") is not None:
            raise tracer.error(f"{name} cannot write to a tensor that is there")
        return tracer.apply(name, args, given)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        own = _ALLOWED.get(getattr(torch.Tensor, name, None))
        if own is None:
            raise self._tracer.error(f".{name} of a tensor cannot be used")
        return lambda *args, **kwargs: self._tracer.apply(own, (self, *args), kwargs)

    for _name in (*_ARITHMETIC, *_COMPARISONS, *_LOGIC):
        locals()[f"__{_name.strip('_')}__"] = _operator(_name)
    for _name in ("add", "sub", "mul", "truediv", "pow"):
        locals()[f"__r{_name}__"] = _operator(_name, swaps=True)
        locals()[f"__i{_name}__"] = _refuse("a tensor cannot be changed in place; use a = a + b")
    __abs__ = _operator("abs")
    __hash__ = object.__hash__
    __bool__ = _refuse("a condition on a tensor cannot choose what runs; use torch.where")
    __float__ = __int__ = __index__ = _refuse("a tensor has no single value here")
    __iter__ = __len__ = __getitem__ = __setitem__ = _refuse("a tensor cannot be indexed")


class _Gates:
    """x or r: a symbol for each gate."""

    def __init__(self, tracer: _Tracer, name: str, values: dict[str, Symbol]) -> None:
        self._tracer, self._name, self._values = tracer, name, values

    def __getattr__(self, name: str) -> Symbol:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._values:
            known = ", ".join(f"{self._name}.{gate}" for gate in self._values) or "nothing"
            raise self._tracer.error(f"{self._name}.{name} is unknown; there is {known}")
        return self._values[name]


@dataclass(frozen=True)
class Definition:
    """A cell, as its function says it."""

    function: Callable[..., Any]
    gates: tuple[str, ...]
    recurrent: tuple[str, ...]  # those with rows in W_hh, in the order of gates
    inputs: tuple[str, ...]
    states: tuple[str, ...]  # the first one is the output
    parameters: dict[str, float | None]  # by name their initial value; None: drawn
    arguments: tuple[str, ...]  # of the operations: each gate of x and of r, inputs, states, ...
    operations: tuple[Operation | None, ...]  # one by one; None for an argument
    results: tuple[int, ...]  # the operations that are the new states
    names: tuple[str, ...]  # those that the function gives its operations, for the header alone
    header: str | None = None  # by hand, in C++

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def text(self) -> str:
        """All that its kernel is made from."""
        lines = [
            repr((self.name, self.gates, self.recurrent, self.inputs, self.states)),
            repr((tuple(self.parameters), self.arguments, self.results, self.header)),
            *map(repr, self.operations),
        ]
        return "\n".join(lines)

    @property
    def mode(self) -> str:
        """The name under which fastrnn knows it: one for each definition."""
        return f"{self.name}_{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"

    def values(self, *arguments: Tensor) -> list[Tensor]:
        """Of each operation."""
        values: list[Any] = []
        given = iter(arguments)
        for operation in self.operations:
            values.append(
                next(given)
                if operation is None
                else operation.run(lambda a: values[a._index] if isinstance(a, Symbol) else a)
            )
        return values


def _check_names(what: str, names: Sequence[str], function: str) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what}: expected a sequence of names for {function}, got {names!r}")
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise ValueError(f"{what}: expected names of attributes for {function}, got {name!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"{what}: expected different names for {function}, got {names!r}")
    return tuple(names)


def define(
    function: Callable[..., Any],
    gates: Sequence[str],
    recurrent: Sequence[str] | None,
    inputs: Sequence[str],
    header: str | None = None,
) -> Definition:
    """What a function and the names of its gates define; ValueError for what is no cell."""
    name = function.__name__
    gates = _check_names("gates", gates, name)
    inputs = _check_names("inputs", inputs, name)
    chosen = gates if recurrent is None else _check_names("recurrent", recurrent, name)
    if not gates:
        raise ValueError(f"gates: expected at least one for {name}, got none")
    if not set(chosen) <= set(gates):
        extra = ", ".join(sorted(set(chosen) - set(gates)))
        raise ValueError(f"recurrent: expected some of the gates of {name}, got {extra}")
    if set(inputs) & set(gates):
        raise ValueError(f"inputs: expected other names than the gates of {name}, got {inputs!r}")
    own = tuple(gate for gate in gates if gate in chosen)
    tracer = _Tracer(function)
    states, parameters = _read_signature(tracer)
    by_gate = {gate: tracer.argument(f"x_{gate}") for gate in gates}
    by_recurrent = {gate: tracer.argument(f"r_{gate}") for gate in own}
    by_gate |= {z: tracer.argument(f"x_{z}") for z in inputs}
    before = [tracer.argument(state) for state in states]
    learned = {p: tracer.argument(p) for p in parameters}
    first, second = list(inspect.signature(function).parameters)[:2]
    x, r = _Gates(tracer, first, by_gate), _Gates(tracer, second, by_recurrent)
    results = _call(tracer, x, r, before, learned)
    return Definition(
        function,
        gates,
        own,
        inputs,
        states,
        parameters,
        tuple(n for n, operation in zip(tracer.names, tracer.operations) if operation is None),
        tuple(tracer.operations),
        tuple(result._index for result in results),
        tuple(
            "" if operation is None else n for n, operation in zip(tracer.names, tracer.operations)
        ),
        header,
    )


def _read_signature(tracer: _Tracer) -> tuple[tuple[str, ...], dict[str, float | None]]:
    """The names of the states; the learned vectors and their initial values."""
    names, parameters = [], {}
    kinds = inspect.Parameter
    line = tracer.function.__code__.co_firstlineno
    for name, parameter in inspect.signature(tracer.function).parameters.items():
        default = None if parameter.default is kinds.empty else parameter.default
        if parameter.kind is kinds.KEYWORD_ONLY:
            if default is not None and (
                isinstance(default, bool) or not isinstance(default, (int, float))
            ):
                raise tracer.error_at(line, f"the initial value of {name} is no number")
            parameters[name] = None if default is None else float(default)
        elif parameter.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD):
            raise tracer.error_at(line, f"*{name} cannot be used: a state has a name")
        elif parameter.default is not kinds.empty:
            raise tracer.error_at(line, f"{name} is a state, which has no default")
        else:
            names.append(name)
    if len(names) < 3:
        raise tracer.error_at(line, "expected x, r and at least one state as parameters")
    return tuple(names[2:]), parameters


def _call(
    tracer: _Tracer, x: _Gates, r: _Gates, states: list[Symbol], parameters: dict[str, Symbol]
) -> tuple[Symbol, ...]:
    """The new states."""
    function = tracer.function
    before = sys.getprofile()

    def keep_names(frame: Any, event: str, _: Any) -> None:
        if event == "return" and frame.f_code is function.__code__:
            for name, value in frame.f_locals.items():
                if isinstance(value, Symbol) and not tracer.names[value._index]:
                    tracer.names[value._index] = name

    sys.setprofile(keep_names)
    try:
        results = function(x, r, *states, **parameters)
    except ValueError:
        raise
    except (TypeError, NotImplementedError, RuntimeError) as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == function.__code__.co_filename and frame.name == function.__name__
        ]
        line = lines[-1] if lines else None
        raise tracer.error_at(line or function.__code__.co_firstlineno, str(error)) from error
    finally:
        sys.setprofile(before)
    results = results if isinstance(results, tuple) else (results,)
    line = function.__code__.co_firstlineno
    if len(results) != len(states):
        names = ", ".join(tracer.names[s._index] for s in states)
        raise tracer.error_at(
            line, f"expected the new {names} to be returned, got {len(results)} values"
        )
    for result in results:
        if not isinstance(result, Symbol) or result._is_bool:
            raise tracer.error_at(line, f"expected new states to be returned, got {result!r}")
    return results
