"""Steps with gradients that are taken on packed weights, as steps without.

A node of the autograd graph takes several times what a small step does. So a step leaves no node,
but its x, in a history. A node is made where a state is read. In backward it only notes the
gradient; the node of the history, which autograd runs after all of these, computes the steps again
as a sequence, and differentiates that. No x may require a gradient: then it cannot depend on what
was read of the same history.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._functions import run_layer
from ._layer import Layer
from ._torch import bind_apply, graph_task, version_of

__all__ = ["History", "begin", "read", "read_output"]

_MOST_STEPS = 256  # of a sequence; what it saves is dropped before the one in front of it

Gradients = list["Tensor | None"]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class _Pass:
    """What a backward pass has brought so far, by the steps' places."""

    __slots__ = ("last", "outputs", "states")

    def __init__(self) -> None:
        self.last: Any = None  # the latest state
        self.outputs: dict[int, Tensor | None] = {}  # of output()
        self.states: dict[int, Gradients] = {}  # of all states of all layers

    def note(self, state: Any) -> None:
        if self.last is None or state._place > self.last._place:
            self.last = state


class History:
    """Where a history begins, and what was read of it."""

    __slots__ = ("_marks", "_passes", "count", "layers", "mode", "states", "weights")

    def __init__(self, rnn: Any, states: Sequence[tuple[Tensor, ...]]) -> None:
        self.mode, self.layers = rnn.cell_mode, rnn.num_layers
        self.states = [t for each in states for t in each]  # of each layer h and, perhaps, c
        self.count = len(self.states)
        self.weights = list(rnn._weights())
        self._marks = [version_of(w) for w in self.weights]
        self._passes: dict[int, _Pass] = {}

    def of_pass(self) -> _Pass:
        return self._passes.setdefault(graph_task(), _Pass())

    def differentiate(self, wanted: Sequence[bool]) -> Gradients:
        """The gradients of the states and the weights in the pass that ends with this."""
        noted = self._passes.pop(graph_task(), None)
        found: Gradients = [None] * len(wanted)
        if noted is None:
            return found
        if [version_of(w) for w in self.weights] != self._marks:
            raise RuntimeError(
                "backward: a parameter has been changed in place since the steps whose gradients "
                "are computed"
            )
        chain = [noted.last]
        while chain[-1]._place > 1:
            chain.append(chain[-1]._prev)
        chain.reverse()
        end, flow = len(chain), found[: self.count]
        while end > 0:
            if end in noted.states:
                flow = list(map(_sum, flow, noted.states[end]))
            # In a sequence only outputs have gradients, besides the states at its end.
            begin = max(0, end - _MOST_STEPS, *(p for p in noted.states if p < end))
            outputs = [noted.outputs.get(place) for place in range(begin + 1, end + 1)]
            x = torch.cat([state._x_of_step() for state in chain[begin:end]])
            states = self.states
            if begin > 0:
                states = [t for each in chain[begin - 1]._tensors() for t in each]
            of_states = [True] * self.count if begin > 0 else wanted[: self.count]
            flow, gradients = self._of_sequence(
                x, states, outputs, flow, [*of_states, *wanted[self.count :]]
            )
            found[self.count :] = map(_sum, found[self.count :], gradients)
            end = begin
        return [*flow, *found[self.count :]]

    def _of_sequence(
        self,
        x: Tensor,
        states: Sequence[Tensor],
        of_outputs: Sequence[Tensor | None],
        of_finals: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> tuple[Gradients, Gradients]:
        """The gradients of the states before x, and of the weights."""
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            # Views, as the hooks of a tensor are to run once, on all of its gradient.
            inputs = [
                (t if t.requires_grad else t.detach().requires_grad_(want)).view_as(t)
                for t, want in zip([*states, *self.weights], wanted)
            ]
            output, finals = self._run(x, inputs[: self.count], inputs[self.count :])
        pairs = [(t, g) for t, g in zip(finals, of_finals) if g is not None]
        like = next((g for g in of_outputs if g is not None), None)
        if like is not None:
            zeros = torch.zeros_like(like)
            whole = torch.stack([zeros if g is None else g for g in of_outputs])
            pairs.append((output, whole.view_as(output)))
        asked = [t for t, want in zip(inputs, wanted) if want]
        if not pairs or not asked:
            return [None] * self.count, [None] * len(self.weights)
        results, gradients = zip(*pairs)
        create = torch.is_grad_enabled()
        made = iter(
            torch.autograd.grad(results, asked, gradients, create_graph=create, allow_unused=True)
        )
        found = [next(made) if want else None for want in wanted]
        return found[: self.count], found[self.count :]

    def _run(
        self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers over x [T, B, I]: the output and the final states."""
        own, each = self.count // self.layers, len(weights) // self.layers
        finals: list[Tensor] = []
        for k in range(self.layers):
            h_0, c_0 = (*states[k * own : (k + 1) * own], None)[:2]
            of_layer = tuple(weights[k * each : (k + 1) * each])
            layer = Layer.plain(self.mode, 1, x.shape[1], x, h_0, c_0, of_layer)
            x, final, _ = run_layer(layer)
            finals += final
        return x, finals


class _Begin(torch.autograd.Function):
    """A token, which all that is read takes without a gradient for it, so that autograd runs this
    one's backward after theirs."""

    @staticmethod
    def forward(ctx: Any, history: History, *tensors: Tensor) -> Tensor:
        ctx.history = history
        ctx.set_materialize_grads(False)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        return None, *ctx.history.differentiate(ctx.needs_input_grad[1:])


class _ReadOutput(torch.autograd.Function):
    """h of the top layer after a step, [B, P] or [P]."""

    @staticmethod
    def forward(ctx: Any, state: Any, token: Tensor) -> Any:
        ctx.state = state
        return state._core.h(state._rnn.num_layers - 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, None]:
        state = ctx.state
        noted = state._history.of_pass()
        noted.note(state)
        noted.outputs[state._place] = _sum(noted.outputs.get(state._place), gradients[0])
        return None, None


class _Read(torch.autograd.Function):
    """All states after a step, [1, B, features] of each layer."""

    @staticmethod
    def forward(ctx: Any, state: Any, token: Tensor) -> tuple[Tensor, ...]:
        ctx.state = state
        ctx.set_materialize_grads(False)
        return tuple(t.clone() for each in state._packed_tensors() for t in each)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        state = ctx.state
        noted = state._history.of_pass()
        noted.note(state)
        before = noted.states.get(state._place, gradients)
        if before is not gradients:
            gradients = tuple(map(_sum, before, gradients))
        noted.states[state._place] = list(gradients)
        return None, None


_begin, _read_output, _read = map(bind_apply, (_Begin, _ReadOutput, _Read))


def begin(rnn: Any, states: Sequence[tuple[Tensor, ...]]) -> tuple[History, Tensor]:
    """A history of a module from such states of its layers, and the token of what is read of it."""
    history = History(rnn, states)
    return history, _begin(history, *history.states, *history.weights)


def read_output(state: Any) -> Tensor:
    """output() of a state in a history."""
    return _read_output(state, state._token)


def read(state: Any) -> tuple[tuple[Tensor, ...], ...]:
    """Its states, of each layer."""
    flat = _read(state, state._token)
    own = len(flat) // state._rnn.num_layers
    return tuple(flat[i : i + own] for i in range(0, len(flat), own))
