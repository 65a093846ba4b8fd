"""fastrnn.State: a recurrent module one step at a time, in DyNet's words."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._history import History, begin, read, read_output
from ._layer import BUILT_IN
from ._packed import can_pack, check_frozen, pack_again, packed
from ._torch import version_of

__all__ = ["State", "start"]

# So many steps with gradients are taken one by one, as packing the weights has to pay.
_FIRST_STEPS = 8

# h [1, B, P] of a layer and, of cells with other states, these [1, B, C*H].
Pair = tuple[Tensor, ...]


def _shown(value: Any) -> str:
    return f"{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


class State:
    """The states of all layers of an LSTM, a GRU, an RNN or a cell of your own, between two steps.

    `rnn.initial_state()` makes the first state, and each further state is made from another one. A
    state is immutable. You can continue from the same state several times, so histories branch into
    trees, and gradients flow back through all branches.

    There are two kinds, which differ in speed only. If gradients are enabled when initial_state is
    called, and a parameter or hx requires one, a state has gradients. Otherwise, on the CPU, it
    runs on weights that are packed once for the module. If a parameter is replaced, moved or
    changed in place, the next step notices it and packs again. Changes that torch itself does not
    count go unnoticed: those through `.data` or NumPy, and those to tensors made in inference mode.
    The packed weights take as much memory as the weights themselves.

    A state of the second kind keeps no history, so memory does not grow with the number of steps. A
    state of the first kind keeps what backward needs, as torch does, until the last state and the
    last result of its history are released. After some steps it runs on packed weights, too, for as
    long as no x requires a gradient: backward computes these steps again, as one sequence. If x or
    a parameter has been changed in place since the step, backward raises RuntimeError.

    Hooks of the module do not run for a step, and dropout draws a new mask for each step.

    Examples:
        >>> import torch, fastrnn
        >>> rnn = fastrnn.LSTM(8, 16)
        >>> s = rnn.initial_state(batch=3)
        >>> s = s.add_input(torch.randn(3, 8))
        >>> s.output().shape
        torch.Size([3, 16])
        >>> a, b = s.add_input(torch.zeros(3, 8)), s.add_input(torch.ones(3, 8))  # two branches
        >>> a.select([2, 0]).output().shape
        torch.Size([2, 16])
    """

    __slots__ = (
        "__weakref__",
        "_batch",
        "_core",
        "_history",
        "_layers",
        "_next_turn",
        "_place",
        "_prev",
        "_rnn",
        "_token",
        "_x",
        "_x_version",
    )

    _rnn: Any
    _core: Any  # of packed weights: a _cpu.PackedState. None: _layers holds the states
    _layers: tuple[Pair, ...]
    _batch: int | None  # B; None: unbatched
    _prev: Any  # None, a State, or a weak reference to one
    _history: History | None  # with a core: that of steps with gradients
    _token: Tensor  # of the history
    _next_turn: list[None]  # of one, until a step after this one has taken it
    _place: int  # in the history, from 1; without a core: how many steps there have been
    _x: Tensor  # of the last step, in a history, and its version then
    _x_version: int

    def __init__(self) -> None:
        raise TypeError("State: call initial_state() of a module, or add_input() of a state")

    # -- Steps -------------------------------------------------------------------------------------

    def add_input(self, x: Tensor, *, mask: Any = None, inputs: Any = None) -> State:
        """The state after one more step.

        Args:
            x: [B, I], or [I] of an unbatched state.
            mask: bool [B], or what torch.as_tensor turns into that; a row where it is False keeps
                its state, and its x has no effect.
            inputs: for a cell with inputs that no weight multiplies, as in its forward, without T.

        Raises:
            ValueError: if x, mask or inputs is of a wrong shape, dtype or device.
            RuntimeError: if the module is frozen and in training mode, or its parameters changed.
        """
        core = self._core
        if core is not None and inputs is None:
            history = self._history
            if history is None:
                core = core.step(x, mask)
                if core is not None:
                    state: State = _new(State)
                    state._rnn = self._rnn
                    state._core = core
                    state._batch = self._batch
                    state._history = None
                    state._prev = weakref.ref(self)
                    return state
            elif mask is None and torch.is_grad_enabled() and not self._rnn._options:
                core = core.step(x, None)
                if core is not None:
                    try:
                        self._next_turn.pop()  # by one thread alone
                    except IndexError:  # a history has no branches
                        return self._next(core, x, *begin(self._rnn, read(self)), 1)
                    return self._next(core, x, history, self._token, self._place + 1)
        if mask is not None or inputs is not None:
            return self._add_input(x, mask, inputs)
        if self._core is None and self._place == _FIRST_STEPS:
            begun = self._begin(x)
            if begun is not None:
                return begun
        if self._batch is not None and (self._core is None or self._history is not None):
            # A single layer has the states that its module takes and returns.
            rnn = self._rnn
            if rnn.num_layers == 1 and type(x) is Tensor:
                hx = self._tensors()[0]
                row = x.unsqueeze(1 if rnn.batch_first else 0)
                result = rnn._run_directly(row, hx[0] if len(hx) == 1 else hx)
                if result is not None:
                    state = _new(State)
                    state._rnn, state._core, state._batch = rnn, None, self._batch
                    state._layers = (result[1] if len(hx) > 1 else (result[1],),)
                    state._prev, state._place = self, self._steps() + 1
                    return state
        return self._add_input(x, mask, inputs)

    def add_inputs(self, xs: Tensor | Sequence[Tensor], *, mask: Any = None) -> list[State]:
        """The states after each of xs, [T, B, I], or [T, I] of an unbatched state, in T steps.

        mask: None or bool [T, B]. T comes first, also if the module has batch_first.
        """
        states, state = [], self
        masks = [None] * len(xs) if mask is None else mask
        if len(masks) != len(xs):
            raise ValueError(f"mask: expected {len(xs)} steps, as xs has, got {len(masks)}")
        for x, valid in zip(xs, masks):
            state = state.add_input(x, mask=valid)
            states.append(state)
        return states

    def transduce(self, xs: Tensor) -> Tensor:
        """The outputs of the top layer after each of xs, in one fused scan.

        Args:
            xs: [T, B, I], or [T, I] of an unbatched state; T comes first, also with batch_first.

        Returns:
            [T, B, P], or [T, P]: the output() of each of add_inputs(xs).
        """
        if not isinstance(xs, Tensor):
            xs = torch.stack(tuple(xs))
        if self._core is not None and self._history is None:
            result = self._core.run(xs)
            if result is not None:
                output: Tensor = result[0]
                return output
        self._check("xs", xs, ("T",))
        output = self._scan(xs if self.is_batched else xs.unsqueeze(1), None)[0]
        return output if self.is_batched else output.squeeze(1)

    # -- What there is -----------------------------------------------------------------------------

    def output(self) -> Tensor:
        """h of the top layer, [B, P], or [P] unbatched. P is H without a projection."""
        if self._core is not None:
            if self._history is not None:
                return read_output(self)
            h: Tensor = self._core.h(self._rnn.num_layers - 1)
            return h
        return self._shaped(self._layers[-1][0])

    def h(self) -> tuple[Tensor, ...]:
        """h of every layer, bottom to top, each [B, P] or [P]."""
        if self._core is not None and self._history is None:
            return tuple(map(self._core.h, range(self._rnn.num_layers)))
        return tuple(self._shaped(layer[0]) for layer in self._tensors())

    def s(self) -> tuple[Tensor, ...]:
        """All states: those other than h (c of an LSTM), bottom to top, followed by all h.

        As DyNet's s(). If there is no state but h, it is the same as h().
        """
        others = []
        for _, *rest in self._tensors():
            if rest:
                others += self._shaped(rest[0]).split(self._rnn.hidden_size, -1)
        return (*others, *self.h())

    def prev(self) -> State:
        """The state that this one was made from.

        Raises:
            RuntimeError: if this is an initial state, or a state on packed weights whose
                predecessor nothing else holds, since such a state keeps no history.
        """
        before = self._prev
        if before is None:
            raise RuntimeError("prev: this is an initial state")
        if isinstance(before, State):
            return before
        state: State | None = before()
        if state is None:
            raise RuntimeError(
                "prev: the state before this one is gone; without gradients a state keeps no "
                "history, so keep those that you go back to"
            )
        return state

    @property
    def hx(self) -> Any:
        """The states as forward takes them: h_n [L, B, P], for an LSTM (h_n, c_n), for a cell of
        your own with several states a tuple; without B if unbatched."""
        if self._core is not None and self._history is None:
            parts = [t for t in self._core.tensors() if t is not None]
        else:
            parts = [torch.cat(each) for each in zip(*self._tensors())]
            if not self.is_batched:
                parts = [t.squeeze(1) for t in parts]
        if len(parts) == 1:
            return parts[0]
        return parts[0], *parts[1].split(self._rnn.hidden_size, -1)

    @property
    def batch(self) -> int | None:
        """B; None of an unbatched state."""
        return self._batch

    @property
    def is_batched(self) -> bool:
        """Whether inputs are [B, I], rather than [I]."""
        return self._batch is not None

    def __repr__(self) -> str:
        kind = "unbatched" if self._batch is None else f"batch={self._batch}"
        return f"State({type(self._rnn).__name__}, {kind})"

    # -- Other states ------------------------------------------------------------------------------

    def set_h(self, h: Sequence[Tensor]) -> State:
        """This state with other h: one of each layer, bottom to top, shaped like those of h()."""
        own = self._checked("h", h, self.h())
        return self._after(
            tuple((self._kept(t), *layer[1:]) for t, layer in zip(own, self._tensors()))
        )

    def set_s(self, s: Sequence[Tensor]) -> State:
        """This state with other states, in the order and shapes of s()."""
        own = self._checked("s", s, self.s())
        count = self._rnn.num_layers
        h, others = own[-count:], own[:-count]
        each = len(others) // count
        layers: list[Pair] = []
        for k in range(count):
            layer: Pair = (self._kept(h[k]),)
            if each:
                rest = others[k * each : (k + 1) * each]
                layer += (self._kept(torch.cat(tuple(rest), -1)),)
            layers.append(layer)
        return self._after(tuple(layers))

    def select(self, rows: Any) -> State:
        """The state of some rows: reordered, repeated or dropped, as a beam search does.

        Args:
            rows: the numbers of the rows, integers, in any order; or bool [B], True for the rows to
                keep.

        Raises:
            ValueError: if the state is unbatched, or a number is not that of a row.
        """
        if self._batch is None:
            raise ValueError(
                f"rows: expected a state of a batch, got {rows!r} for an unbatched one, which has "
                "no rows to select"
            )
        index = torch.as_tensor(rows, device=self._tensors()[0][0].device)
        if index.dtype == torch.bool:
            if index.shape != (self._batch,):
                raise ValueError(f"rows: expected bool [{self._batch}], got {_shown(index)}")
            index = index.nonzero().squeeze(1)
        if index.numel() == 0:
            index = index.long()
        if index.dim() != 1 or index.is_floating_point() or index.is_complex():
            raise ValueError(
                f"rows: expected a list of integers, got {index.dtype} {_shown(index)}"
            )
        if len(index) and not (0 <= int(index.min()) and int(index.max()) < self._batch):
            raise ValueError(f"rows: expected numbers in [0, {self._batch}), got {index.tolist()}")
        layers = tuple(tuple(t.index_select(1, index) for t in layer) for layer in self._tensors())
        return self._after(layers, len(index))

    # -- Inside ------------------------------------------------------------------------------------

    def _tensors(self) -> tuple[Pair, ...]:
        """h and the other states of each layer."""
        if self._core is None:
            return self._layers
        return self._packed_tensors() if self._history is None else read(self)

    def _packed_tensors(self) -> tuple[Pair, ...]:
        """The same, without gradients."""
        parts = [t for t in self._core.tensors() if t is not None]
        if self._batch is None:
            parts = [t.unsqueeze(1) for t in parts]
        return tuple(zip(*(t.split(1) for t in parts)))

    def _steps(self) -> int:
        """The steps with gradients since weights were last packed."""
        return self._place if self._core is None else 0

    def _next(self, core: Any, x: Tensor, history: History, token: Tensor, place: int) -> State:
        """The state after a step in a history."""
        state: State = _new(State)
        state._rnn, state._core, state._batch, state._prev = self._rnn, core, self._batch, self
        state._history, state._token, state._place = history, token, place
        state._next_turn = [None]
        state._x, state._x_version = x, version_of(x)
        if state._x_version < 0:  # of inference mode, where changes are not counted
            state._x = x.clone()
            state._x_version = version_of(state._x)
        return state

    def _begin(self, x: Any) -> State | None:
        """The first state of a history; None where there can be none."""
        rnn, layers = self._rnn, self._layers
        weights = rnn._weights()
        if (
            not torch.is_grad_enabled()
            or not isinstance(x, Tensor)
            or x.requires_grad
            or rnn._options
            or rnn._frozen is not None
            or rnn.cell_mode not in BUILT_IN
            or weights[0].dtype not in (torch.float32, torch.float64)
            or layers[0][0].dtype != weights[0].dtype  # under autocast
            or torch.is_autocast_enabled(x.device.type)
            or not any(w.requires_grad for w in weights)
            or (rnn.training and rnn.dropout and rnn.num_layers > 1)
            or not can_pack(rnn)
        ):
            return None
        core = _core(pack_again(rnn), rnn, layers, self._batch).step(x, None)
        return None if core is None else self._next(core, x, *begin(rnn, layers), 1)

    def _x_of_step(self) -> Tensor:
        """x of the last step, [1, B, I]."""
        if version_of(self._x) != self._x_version:
            raise RuntimeError(
                "backward: x has been changed in place since the step whose gradient is computed"
            )
        return self._x.unsqueeze(0) if self.is_batched else self._x[None, None]

    def _shaped(self, state: Tensor) -> Tensor:
        """[1, B, features] as it is shown."""
        return state.squeeze(0) if self.is_batched else state.flatten()

    def _kept(self, state: Tensor) -> Tensor:
        """The reverse of it."""
        return state.unsqueeze(0) if self.is_batched else state[None, None]

    def _checked(self, name: str, given: Any, own: Sequence[Tensor]) -> list[Tensor]:
        tensors = list(given) if isinstance(given, (tuple, list, Tensor)) else given
        if not isinstance(tensors, list) or len(tensors) != len(own):
            got = f"{len(tensors)}" if isinstance(tensors, list) else type(given).__name__
            raise ValueError(f"{name}: expected {len(own)} tensors, got {got}")
        for i, (tensor, like) in enumerate(zip(tensors, own)):
            if (
                not isinstance(tensor, Tensor)
                or tensor.shape != like.shape
                or tensor.dtype != like.dtype
                or tensor.device != like.device
            ):
                got = (
                    f"{tensor.dtype} {_shown(tensor)} on {tensor.device}"
                    if isinstance(tensor, Tensor)
                    else _shown(tensor)
                )
                raise ValueError(
                    f"{name}[{i}]: expected {like.dtype} {_shown(like)} on {like.device}, got {got}"
                )
        return tensors

    def _check(self, name: str, x: Any, before: tuple[str, ...] = ()) -> None:
        rnn = self._rnn
        expected: list[Any] = [self._batch] if self.is_batched else []
        expected.append(rnn.input_size)
        if (
            isinstance(x, Tensor)
            and x.dim() == len(before) + len(expected)
            and list(x.shape[len(before) :]) == expected
        ):
            like = self._tensors()[0][0]
            is_cast = torch.is_autocast_enabled(x.device.type)
            if x.device == like.device and (x.dtype == like.dtype or is_cast):
                return
            raise ValueError(
                f"{name}: expected {like.dtype} on {like.device}, got {x.dtype} on {x.device}"
            )
        shape = ", ".join(map(str, (*before, *expected)))
        raise ValueError(f"{name}: expected a tensor of [{shape}], got {_shown(x)}")

    def _scan(self, x: Tensor, inputs: Any) -> tuple[Tensor, tuple[Pair, ...]]:
        """All layers over x [T, B, I]: the output, and the states after it."""
        rnn = self._rnn
        given = None
        if inputs is not None or getattr(rnn, "definition", None) is not None:
            given = rnn._read_inputs(x, inputs)
        output, layers = rnn._advance(x, self._tensors(), given)
        return output, tuple(layers)

    def _add_input(self, x: Any, mask: Any, inputs: Any) -> State:
        """add_input with all checks, for what the short way does not take."""
        rnn = self._rnn
        self._check("x", x)
        valid = None
        if mask is not None:
            valid = torch.as_tensor(mask, device=x.device)
            if not self.is_batched:
                got = f"{valid.dtype} {_shown(valid)}"
                raise ValueError(f"mask: expected None for an unbatched state, got {got}")
            if valid.dtype != torch.bool or valid.shape != (self._batch,):
                got = f"{valid.dtype} {_shown(valid)}"
                raise ValueError(f"mask: expected torch.bool [{self._batch}], got {got}")
        if rnn._frozen is not None:
            check_frozen(rnn, x)
        # The weights may have changed since they were packed.
        is_packed = self._core is not None and self._history is None
        if is_packed and inputs is None and not rnn._wants_gradient(x):
            again = _of(rnn, self._tensors(), self._batch, is_packed=True)
            core = None if again._core is None else again._core.step(x.detach(), valid)
            if core is not None:
                again._core, again._prev = core, weakref.ref(self)
                return again
        row = x[None] if self.is_batched else x[None, None]
        if isinstance(inputs, dict):
            inputs = {name: self._kept(z) for name, z in inputs.items()}
        elif inputs is not None:
            inputs = [{name: self._kept(z) for name, z in each.items()} for each in inputs]
        layers = self._scan(row, inputs)[1]
        if valid is not None:
            rows = valid[:, None]
            layers = tuple(
                tuple(torch.where(rows, t, old) for t, old in zip(layer, before))
                for layer, before in zip(layers, self._tensors())
            )
        state = self._after(layers)
        if state._core is None:
            state._place = self._steps() + 1
        return state

    def _after(self, layers: tuple[Pair, ...], batch: int | None = None) -> State:
        """A state of such tensors, whose prev() is this one."""
        rows = self._batch if batch is None else batch
        wants = any(t.requires_grad for layer in layers for t in layer)
        is_packed = self._core is not None and self._history is None
        state = _of(self._rnn, layers, rows, is_packed and not wants)
        state._prev = self if state._core is None else weakref.ref(self)
        return state


_new = object.__new__


def _core(model: Any, rnn: Any, layers: tuple[Pair, ...], batch: int | None) -> Any:
    """A state of packed weights."""
    parts = [torch.cat(each).detach() for each in zip(*layers)]
    h, c = parts[0], parts[1] if len(parts) > 1 else None
    return model.start(vars(rnn), 1 if batch is None else batch, batch is not None, h, c)


def _of(rnn: Any, layers: tuple[Pair, ...], batch: int | None, is_packed: bool) -> State:
    """A state of such tensors, with nothing before it."""
    state: State = _new(State)
    state._rnn, state._batch, state._core, state._prev = rnn, batch, None, None
    state._history = None
    if is_packed and can_pack(rnn):
        model = packed(rnn)
        if layers[0][0].dtype == next(rnn.parameters()).dtype:
            state._core = _core(model, rnn, layers, batch)
    if state._core is None:
        state._layers, state._place = layers, 0
    return state


def start(rnn: Any, hx: Any, batch: int | None) -> State:
    """initial_state() of a module."""
    if rnn.bidirectional:
        raise ValueError(
            "initial_state: expected a unidirectional module, got a bidirectional "
            f"{type(rnn).__name__}, whose second direction begins at the last step, before which "
            "no step can be taken"
        )
    if batch is not None and (
        isinstance(batch, bool) or not isinstance(batch, (int, np.integer)) or batch < 0
    ):
        raise ValueError(f"batch: expected an integer of at least 0, or None, got {batch!r}")
    w = next(rnn.parameters())
    sizes = rnn._state_sizes()
    states: Pair
    if hx is None:
        rows = 1 if batch is None else int(batch)
        states = tuple(w.new_zeros(rnn.num_layers, rows, size) for size in sizes)
        count = None if batch is None else rows
    else:
        states, count = _read_hx(rnn, hx, sizes, w, batch)
    if rnn._frozen is not None:
        check_frozen(rnn, *states)
    layers: tuple[Pair, ...] = tuple(zip(*(t.split(1) for t in states)))
    return _of(rnn, layers, count, not rnn._wants_gradient(*states))


def _read_hx(
    rnn: Any, hx: Any, sizes: Sequence[int], w: Tensor, batch: int | None
) -> tuple[Pair, int | None]:
    """hx as tensors [L, B, features], and B, or None if it has none."""
    given = hx if isinstance(hx, (tuple, list)) else (hx,)
    names = _names(rnn)
    if len(given) != len(names) or isinstance(hx, Tensor) is not (len(names) == 1):
        expected = f"({', '.join(names)})" if len(names) > 1 else "a tensor"
        raise ValueError(f"hx: expected {expected}, got {_shown(hx)} of {len(given)}")
    is_batched = isinstance(given[0], Tensor) and given[0].dim() == 3
    rows = int(given[0].shape[1]) if is_batched else None
    if batch is not None and rows != batch:
        raise ValueError(f"batch: expected that of hx, {rows}, or None, got {batch}")
    features = [sizes[0], *[rnn.hidden_size] * (len(names) - 1)]
    for name, state, size in zip(names, given, features):
        sizes_of = [rnn.num_layers, *([rows] if is_batched else []), size]
        if not isinstance(state, Tensor) or list(state.shape) != sizes_of:
            raise ValueError(f"hx: expected {name} of {sizes_of}, got {_shown(state)}")
        if state.dtype != w.dtype or state.device != w.device:
            got = f"{state.dtype} on {state.device}"
            raise ValueError(f"hx: expected {name} in {w.dtype} on {w.device}, got {got}")
    if not is_batched:
        given = [state.unsqueeze(1) for state in given]
    if len(given) > 2:
        given = [given[0], torch.cat(tuple(given[1:]), -1)]
    return tuple(given), rows


def _names(rnn: Any) -> tuple[str, ...]:
    """Those of the states in hx."""
    definition = getattr(rnn, "definition", None)
    if definition is not None:
        return tuple(definition.states)
    return ("h_0", "c_0") if rnn.mode == "LSTM" else ("h_0",)
