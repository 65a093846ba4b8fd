"""fastrnn.check_cell: a cell's kernel against its function."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._cell import CellLayer

__all__ = ["check_cell"]

_INPUT, _HIDDEN = 6, 19  # 19 units end in a vector that is not full
_SIZES, _FEW = (7, 5), (4, 3)  # steps and rows; finite differences take few
_KINDS = ("no mask", "lengths", "holes", "resets", "lengths and resets", "holes and resets")
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative to the largest entry, or to 1


def _marks(kind: str, sizes: tuple[int, int], device: Any) -> dict[str, Tensor]:
    """The options of a call."""
    steps, batch = sizes
    generator = torch.Generator().manual_seed(1)
    if kind == "lengths":
        return {"lengths": torch.tensor([steps - 1, 0, steps, 1, 3][:batch], device=device)}
    if kind in ("holes", "resets"):
        marks = torch.rand(steps, batch, generator=generator) < 0.6
        name = "mask" if kind == "holes" else "reset"
        return {name: (marks if kind == "holes" else ~marks).to(device)}
    if kind.endswith(" and resets"):
        first = kind.removesuffix(" and resets")
        return {**_marks(first, sizes, device), **_marks("resets", sizes, device)}
    return {}


def _by_function(
    rnn: CellLayer, x: Tensor, states: tuple[Tensor, ...], inputs: list[Any], marks: dict[str, Any]
) -> list[Tensor]:
    """Output and final states, by the reference implementation."""
    mask = marks.get("mask")
    if "lengths" in marks:
        mask = torch.arange(len(x), device=x.device).unsqueeze(1) < marks["lengths"]
    directions = 2 if rnn.bidirectional else 1
    finals = []
    for k in range(rnn.num_layers):
        own = slice(k * directions, (k + 1) * directions)
        weights = rnn.all_weights[own]
        z = rnn._merge_inputs(x, inputs[k]) if inputs else None
        given = tuple(s[own] for s in states)
        x, final, _ = reference.layer(
            rnn.mode, x, given, weights, mask, marks.get("reset"), False, z
        )
        finals.append(final)
    return [x, *map(torch.cat, zip(*finals))]


def _arguments(rnn: CellLayer, sizes: tuple[int, int], dtype: torch.dtype, device: Any) -> Any:
    """x, the states and the inputs of each layer, all rounded to dtype."""
    generator = torch.Generator().manual_seed(0)

    own: Any = rnn.weight_ih_l0

    def new(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).to(own.dtype).requires_grad_()

    directions = 2 if rnn.bidirectional else 1
    d, hidden = rnn.definition, rnn.hidden_size
    x = new(*sizes, rnn.input_size)
    entries = rnn.num_layers * directions
    states = [new(entries, sizes[1], hidden) for _ in d.states]
    inputs = [
        {name: new(*sizes, directions * hidden) for name in d.inputs}
        for _ in range(rnn.num_layers if d.inputs else 0)
    ]
    return x, states, inputs


def _run(rnn: CellLayer, x: Tensor, states: Any, inputs: Any, marks: Any) -> list[Tensor]:
    hx = states[0] if len(states) == 1 else tuple(states)
    output, final = rnn(x, hx, inputs=inputs or None, **marks)
    return [output, *(final if isinstance(final, tuple) else (final,))]


def _values(run: Callable[..., Any], rnn: CellLayer, dtype: Any, marks: Any) -> dict[str, Tensor]:
    """Results and gradients by name, of arguments that are rounded to dtype."""
    x, states, inputs = _arguments(rnn, _SIZES, dtype, rnn.weight_ih_l0.device)
    names = ["x", *rnn.definition.states, *(n for each in inputs for n in each)]
    names += [name for name, _ in rnn.named_parameters()]
    leaves = [x, *states, *(z for each in inputs for z in each.values()), *rnn.parameters()]
    results = run(rnn, x, tuple(states), inputs, marks)
    weights = [torch.linspace(-1, 2, r.numel(), dtype=torch.float64).view_as(r) for r in results]
    loss = torch.stack([(r * w.to(r)).sum() for r, w in zip(results, weights)]).sum()
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    named = dict(zip(["output", *(f"final {s}" for s in rnn.definition.states)], results))
    named |= {f"gradient of {n}": g for n, g in zip(names, gradients)}
    return {name: value.detach() for name, value in named.items()}


def _compare(cls: type[CellLayer], dtype: torch.dtype, device: Any, layers: int, d: int) -> str:
    """Values and gradients of the kernel and of the function, of all masks."""
    torch.manual_seed(0)
    rnn = cls(_INPUT, _HIDDEN, layers, bidirectional=d == 2, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in rnn.parameters():  # constants as initial values would hide much
            parameter.add_(0.3 * torch.randn_like(parameter))
    exact = copy.deepcopy(rnn).double()
    worst = 0.0
    for kind in _KINDS:
        marks = _marks(kind, _SIZES, device)
        own = _values(_run, rnn, dtype, marks)
        function = _values(_by_function, rnn, dtype, marks)
        right = function if dtype == torch.float64 else _values(_by_function, exact, dtype, marks)
        for what, value in right.items():
            size = value.abs().max().clamp(min=1)
            errors = [(t[what].double() - value).abs().max() / size for t in (own, function)]
            error, of_function = (float(e.nan_to_num(torch.inf)) for e in errors)
            worst = max(worst, error)
            # Some cells, dividing by what may be small, lose much of float32 either way.
            if not error <= max(_TOLERANCE[dtype], 10 * of_function):
                raise AssertionError(
                    f"{cls.__name__}: {what} differs by {error:.2g} from the function's, with "
                    f"{dtype}, {layers} layers, {d} directions, {kind}, on {device}"
                )
    return f"{worst:.1e}"


def _differentiate(cls: type[CellLayer], device: Any, layers: int, directions: int) -> None:
    """gradcheck and gradgradcheck, of all masks."""
    torch.manual_seed(0)
    rnn = cls(2, 3, layers, bidirectional=directions == 2, device=device, dtype=torch.float64)
    names = [name for name, _ in rnn.named_parameters()]
    weights = tuple(p.detach().clone().requires_grad_() for p in rnn.parameters())
    for kind in _KINDS:
        x, states, inputs = _arguments(rnn, _FEW, torch.float64, device)
        marks = _marks(kind, _FEW, device)
        loose = [z for each in inputs for z in each.values()]

        def function(x: Tensor, *others: Tensor, marks: Any = marks, inputs: Any = inputs) -> Any:
            given = iter(others)
            own = [next(given) for _ in rnn.definition.states]
            hx = own[0] if len(own) == 1 else tuple(own)
            again = [{name: next(given) for name in each} for each in inputs] or None
            parameters = dict(zip(names, given))
            call = {"hx": hx, "inputs": again, **marks}
            output, final = torch.func.functional_call(rnn, parameters, (x,), call)
            return (output, *(final if isinstance(final, tuple) else (final,)))

        leaves = (x, *states, *loose, *weights)
        torch.autograd.gradcheck(function, leaves, fast_mode=True)
        torch.autograd.gradgradcheck(function, leaves, fast_mode=True, atol=1e-4)


def check_cell(cls: type[CellLayer], print: Callable[[str], Any] = print) -> None:
    """Compares the kernels of a cell with its function, and prints what it has compared.

    It compares values and all gradients in float32 and float64, with initial states, one and two
    layers and directions, without masks, and with lengths, holes and resets. In float64, it also
    compares the first and second derivatives with finite differences. This is done on the CPU, and
    on a GPU if there is one. The C++ of the cell may be generated or written by hand.

    Args:
        cls: a class that fastrnn.cell has made.
        print: a function that receives each line.

    Raises:
        AssertionError: if two values differ; it names them, and by how much they differ.
        TypeError: if fastrnn.cell has not made cls.

    Examples:
        >>> import fastrnn
        >>> fastrnn.check_cell(fastrnn.cells.MinGRU)  # doctest: +SKIP
        MinGRU on cpu, float32: values and gradients within 1.3e-06
        ...
    """
    if not (isinstance(cls, type) and issubclass(cls, CellLayer)):
        raise TypeError(f"cls: expected a class made by fastrnn.cell, got {cls!r}")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for dtype in _TOLERANCE:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                errors = [
                    _compare(cls, dtype, device, layers, directions)
                    for layers, directions in ((1, 1), (1, 2), (2, 1), (2, 2))
                ]
            missing = [str(w.message) for w in caught if "has no kernel" in str(w.message)]
            name = str(dtype).removeprefix("torch.")
            worst = max(errors, key=float)
            print(f"{cls.__name__} on {device}, {name}: values and gradients within {worst}")
            for message in missing:
                print(message)
        for layers, directions in ((1, 1), (2, 2)):
            _differentiate(cls, device, layers, directions)
        print(f"{cls.__name__} on {device}, float64: gradcheck and gradgradcheck")
