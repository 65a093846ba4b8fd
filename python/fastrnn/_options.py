"""The options of a module that torch.nn's classes have not, beside checkpoint_every.

A module keeps those that are on in its __dict__ under one name, so that a call finds out with one
look that there are none, and a module pickled before there was an option loads without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any, NamedTuple


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_probability(module: Any, name: str, value: Any) -> float:
    """A float in [0, 1)."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value!r}")
    return float(value)


def _read_of_recurrent(module: Any, name: str, value: Any) -> float:
    """The same, of cells that multiply h by a weight."""
    probability = read_probability(module, name, value)
    if probability and not module.has_recurrent_weight:
        raise ValueError(f"{name}: expected 0 for a cell without recurrent gates, got {value!r}")
    return probability


def _read_zoneout(module: Any, name: str, value: Any) -> float | tuple[float, float]:
    """One probability, or those of h and c."""
    if not isinstance(value, (tuple, list)):
        return read_probability(module, name, value)
    try:
        pair = [read_probability(module, name, p) for p in value]
    except ValueError:
        pair = []
    if module.mode != "LSTM" or len(pair) != 2:
        more = ", or those of h and c" if module.mode == "LSTM" else ""
        raise ValueError(f"{name}: expected a probability in [0, 1){more}, got {value!r}")
    return (pair[0], pair[1]) if any(pair) else 0.0


def _read_limit(module: Any, name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or not 0 < value < inf:
        raise ValueError(f"{name}: expected a number above 0 or None, got {value!r}")
    return float(value)


def _read_flag(module: Any, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected a bool, got {value!r}")
    return value


def _read_layer_norm(module: Any, name: str, value: Any) -> bool:
    """A bool; the gains that go with it are made with the module."""
    flag = _read_flag(module, name, value)
    if flag and not module.has_recurrent_weight:
        raise ValueError(f"{name}: expected False for a cell without recurrent gates, got True")
    if flag != module.has_gains:
        kind = "a module made without" if flag else "one made with it"
        raise ValueError(f"{name}: expected {not flag} for {kind}, got {flag}")
    return flag


class _Option(NamedTuple):
    off: Any  # its value where it is not given
    read: Callable[[Any, str, Any], Any]  # checks a value, and makes it uniform
    in_eval: bool = False  # whether it changes results in eval mode, too


OPTIONS: dict[str, _Option] = {
    "weight_dropout": _Option(0.0, _read_of_recurrent),
    "variational": _Option(False, _read_flag),
    "recurrent_dropout": _Option(0.0, _read_of_recurrent),
    "zoneout": _Option(0.0, _read_zoneout, in_eval=True),
    "grad_clip": _Option(None, _read_limit),
    "layer_norm": _Option(False, _read_layer_norm, in_eval=True),
}


def option(name: str) -> Any:
    """The option as a property of modules, which can be set later, too."""
    off, read, _ = OPTIONS[name]

    def get(module: Any) -> Any:
        return module._options.get(name, off)

    def put(module: Any, value: Any) -> None:
        value = read(module, name, value)
        others = {k: v for k, v in module._options.items() if k != name}
        on = others if value == off else {**others, name: value}
        # In one order, whatever was set first; a new dict, as a copy of the module may have this.
        vars(module)["_options"] = {k: on[k] for k in OPTIONS if k in on}

    return property(get, put)


def written(options: Mapping[str, Any]) -> str:
    """Options as they are given to the constructor."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
