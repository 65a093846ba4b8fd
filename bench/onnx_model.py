"""A case as an ONNX model, for the peers that run those."""

import numpy as np

from .cases import Array, Case, Data

OPSET = 17
IR_VERSION = 9  # what OPSET came with; the newest one would shut out older runtimes
# torch's gates in the order of ONNX: LSTM i f g o -> i o f c, GRU r z n -> z r h.
ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
STATES = ("h", "c")


def reordered(cell: str, weight: Array) -> Array:
    gates = np.split(weight, len(ORDER[cell]))
    return np.concatenate([gates[k] for k in ORDER[cell]])


def build(case: Case, data: Data, stateless: bool = False) -> bytes:
    """Inputs x and, unless zeros are meant, h0_{k}, c0_{k}; outputs y, h{k}, c{k} of layer k."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants, inputs, outputs = [], [], [], []

    def constant(name: str, value: Array) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def info(name: str, *shape: int):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    states = STATES[: len(data.states)]
    suffixes = ("", "_reverse")[: case.directions]
    features = case.directions * case.H
    inputs.append(info("x", case.T, case.B, case.H))
    shape = constant("shape", np.array([case.T, case.B, features]))
    source = "x"
    for k in range(case.layers):

        def stacked(kind: str, layer: int = k) -> Array:
            names = [f"{kind}_l{layer}{suffix}" for suffix in suffixes]
            return np.stack([reordered(case.cell, data.weights[name]) for name in names])

        bias = np.concatenate([stacked("bias_ih"), stacked("bias_hh")], axis=1)
        initial = [] if stateless else [f"{state}0_{k}" for state in states]
        final = [f"{state}{k}" for state in states]
        arguments = [
            source,
            constant(f"W{k}", stacked("weight_ih")),
            constant(f"R{k}", stacked("weight_hh")),
            constant(f"B{k}", bias),
            "",  # no lengths
            *initial,
        ]
        options = {
            "hidden_size": case.H,
            "direction": "bidirectional" if case.directions == 2 else "forward",
        }
        if case.cell == "GRU":
            options["linear_before_reset"] = 1
        nodes.append(helper.make_node(case.cell, arguments, [f"Y{k}", *final], **options))
        # [T, D, B, H] -> [T, B, D*H]
        nodes.append(helper.make_node("Transpose", [f"Y{k}"], [f"Z{k}"], perm=[0, 2, 1, 3]))
        source = "y" if k == case.layers - 1 else f"y{k}"
        nodes.append(helper.make_node("Reshape", [f"Z{k}", shape], [source]))
        inputs += [info(name, case.directions, case.B, case.H) for name in initial]
        outputs += [info(name, case.directions, case.B, case.H) for name in final]
    outputs.insert(0, info("y", case.T, case.B, features))
    graph = helper.make_graph(nodes, case.cell, inputs, outputs, constants)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    return model.SerializeToString()


def feeds(case: Case, data: Data) -> dict[str, Array]:
    """The model's inputs by name."""
    named = {"x": data.x}
    for state, value in zip(STATES, data.states):
        for k, part in enumerate(np.split(value, case.layers)):
            named[f"{state}0_{k}"] = part
    return named


def values(case: Case, outputs: dict[str, Array]) -> dict[str, Array]:
    """The model's outputs under the names that peers use."""
    named = {"output": outputs["y"]}
    for state in STATES[: 1 + (case.cell == "LSTM")]:
        parts = [outputs[f"{state}{k}"] for k in range(case.layers)]
        named[f"{state}_n"] = np.concatenate(parts)
    return named
