"""Layers as ONNX's own LSTM, GRU and RNN nodes, while torch.onnx.export is at work.

Both of its exporters run a model's forward, one under torch.export, the other under
torch.jit.trace. Each layer then becomes one node, whose weights are ours in ONNX's order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._layer import CELLS, Layer
from ._torch import is_tracing, no_value, symbolic_node


class _Operator(NamedTuple):
    name: str
    gates: tuple[int, ...]  # which of torch's gates stand in ONNX's places
    attributes: dict[str, Any]
    activation: str = ""  # of each direction, where it has a choice


_OPERATORS = {
    "LSTM": _Operator("LSTM", (0, 3, 1, 2), {}),
    "GRU": _Operator("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "RNN_TANH": _Operator("RNN", (0,), {}, "Tanh"),
    "RNN_RELU": _Operator("RNN", (0,), {}, "Relu"),
}


def refuse(module: nn.RNNBase, **options: Any) -> None:
    """Raises RuntimeError for an option that ONNX's nodes cannot express."""
    if module.mode not in _OPERATORS:
        raise RuntimeError(f"{type(module).__name__}: ONNX has nodes for LSTM, GRU and RNN only")
    operator = _OPERATORS[module.mode].name
    why = {
        "mask": "lengths only; if the valid steps come first, pass lengths=",
        "reset": "no reset of the state within a row; call the layer once per segment",
        "return_states": "no cell state of every step; export a loop of fastrnn.LSTMCell",
        "grad_scale": "no gradient",
        "recurrent_dropout": "no dropout on h; export in eval mode",
        "zoneout": "no state that is kept",
        "layer_norm": "no layer normalisation",
        "proj_size": "no projection",
    }
    options["recurrent_dropout"] = (module.training and module.recurrent_dropout) or None
    options["zoneout"] = module.zoneout or None
    options["layer_norm"] = module.layer_norm
    given = [name for name, value in options.items() if value is not None and value is not False]
    if not CELLS[module.mode].has_cell_state and "return_states" in given:
        given.remove("return_states")  # the outputs of each node are its states
    given += ["proj_size"] if module.proj_size else []
    if given:
        raise RuntimeError(f"{given[0]}: ONNX's {operator} has {why[given[0]]}")


def run_layer(
    layer: Layer, lengths: Tensor | None, hidden: int
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """A layer as a node: its output, the final states, and None for the cell states.

    lengths: the valid steps of each row, or None for all. hidden: H as a number, which the layer
    has not in a trace.
    """
    operator, directions = _OPERATORS[layer.mode], layer.directions
    gates = [slice(i * hidden, (i + 1) * hidden) for i in operator.gates]
    each = [[torch.cat([w[gate] for gate in gates]) for w in ws] for ws in layer.by_direction]
    w_ih, w_hh = (torch.stack([weights[i] for weights in each]) for i in (0, 1))
    biases = None
    if len(each[0]) == 4:
        biases = torch.stack([torch.cat(weights[2:]) for weights in each])
    attributes: dict[str, Any] = operator.attributes | {"hidden_size": hidden}
    if operator.activation:
        attributes["activations"] = [operator.activation] * directions
    if directions == 2:
        attributes["direction"] = "bidirectional"
    states = [layer.h_0, layer.c_0] if CELLS[layer.mode].has_cell_state else [layer.h_0]
    ends = None if lengths is None else lengths.to(torch.int32)
    inputs = [layer.x, w_ih, w_hh, biases, ends, *states]
    if is_tracing():
        output, *finals = _TracedNode.apply(operator.name, attributes, *inputs)  # type: ignore[no-untyped-call]
    else:
        shapes = _shapes(layer.x, directions, hidden, len(states))
        output, *finals = symbolic_node(operator.name, inputs, attributes, shapes)
    if lengths is not None:  # a row without steps keeps its state, of which ONNX says nothing
        is_empty = (lengths == 0).unsqueeze(1)
        before = (0 if s is None else s for s in states)
        finals = [torch.where(is_empty, old, new) for old, new in zip(before, finals)]
    return output.transpose(1, 2).flatten(2), tuple(finals), None


def _shapes(x: Tensor, directions: int, hidden: int, states: int) -> list[tuple[Any, ...]]:
    """Of a node's outputs, as ONNX lays them out."""
    steps, batch, _ = x.shape
    return [(steps, directions, batch, hidden), *[(directions, batch, hidden)] * states]


class _TracedNode(torch.autograd.Function):
    """A node of ONNX in a graph of torch.jit.trace. It computes nothing: only the graph is kept."""

    @staticmethod
    def forward(ctx: Any, name: str, attributes: dict[str, Any], *inputs: Any) -> Any:
        x, weight, *_ = inputs
        shapes = _shapes(x, weight.shape[0], attributes["hidden_size"], len(inputs) - 5)
        return tuple(x.new_zeros(shape) for shape in shapes)

    @staticmethod
    def symbolic(g: Any, name: str, attributes: dict[str, Any], *inputs: Any) -> Any:
        kinds = {str: "s", int: "i", list: "s"}
        named = {f"{k}_{kinds[type(v)]}": v for k, v in attributes.items()}
        given = [no_value(g) if value is None else value for value in inputs]
        return g.op(name, *given, outputs=len(inputs) - 4, **named)
