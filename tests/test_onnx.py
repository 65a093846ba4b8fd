"""torch.onnx.export, both exporters: ONNX's own nodes, run in ONNX Runtime against the model."""

import io
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from helpers import inputs, make, seeded, unpack

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the exporter by a trace is
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # in onnxscript
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name. B will not be used"),
    pytest.mark.filterwarnings("ignore:# ONNX model has different number of inputs"),
]

SIZES = [(5, 2), (9, 6), (3, 1), (1, 2)]  # T and B; the export has seen the first


@pytest.fixture(params=["program", "trace"])
def dynamo(request) -> bool:
    """Which exporter."""
    return request.param == "program"


def export(model: nn.Module, arguments: dict, dynamo: bool, dynamic: dict | None = None):
    """The bytes of an ONNX model; `dynamic` names the dimensions of an input that may change."""
    names = [name for name, value in arguments.items() if value is not None]
    values, file = tuple(arguments.values()), io.BytesIO()
    model.eval()
    with torch.no_grad():
        if dynamo:
            sizes = {n: torch.export.Dim(n, min=2) for n in "TB"}
            shapes = dynamic and {
                name: None if value is None else {d: sizes[n] for n, d in dynamic[name].items()}
                for name, value in arguments.items()
            }
            program = torch.onnx.export(
                model, (), kwargs=arguments, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
            program.save(file)
        else:
            axes = {name: {dim: n for n, dim in of.items()} for name, of in (dynamic or {}).items()}
            torch.onnx.export(
                model, values, file, dynamo=False, input_names=names, dynamic_axes=axes
            )
    return file.getvalue()


def nodes(content: bytes, *operators: str) -> list:
    graph = onnx.load_from_string(content).graph
    return [node for node in graph.node if node.op_type in operators]


def check(session, model: nn.Module, arguments: dict) -> None:
    feeds = dict(zip((i.name for i in session.get_inputs()), map(Tensor.numpy, arguments.values())))
    with torch.no_grad():
        expected = tree_leaves(model(**arguments))
    actual = session.run(None, feeds)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)


class Model(nn.Module):
    """A layer behind positional arguments, as an exporter wants them."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x, h_0=None, c_0=None, lengths=None):
        hx = h_0 if c_0 is None else (h_0, c_0)
        options = {} if lengths is None else {"lengths": lengths}
        return self.rnn(x, hx, **options)


class Ragged(Model):
    def forward(self, x, lengths):
        return self.rnn(x, lengths=lengths)


OPTIONS = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True},
    "no-bias": {"num_layers": 2, "bias": False, "batch_first": True},
}


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layers(cell, options, hx, dynamo):
    """For any T and B, from one export."""
    model = Model(make(fastrnn, cell, 3, 4, **options)).eval()

    def arguments(T: int, B: int, seed: int = 0) -> dict:
        x, states = inputs(model.rnn, T, B, hx=hx, seed=seed)
        return {"x": x} | dict(zip(("h_0", "c_0"), unpack(states), strict=False))

    first = arguments(*SIZES[0])
    t, b = (1, 0) if model.rnn.batch_first else (0, 1)
    dynamic = {"x": {"T": t, "B": b}} | {name: {"B": 1} for name in first if name != "x"}
    content = export(model, first, dynamo, dynamic)
    found = nodes(content, "LSTM", "GRU", "RNN")
    assert [n.op_type for n in found] == [cell.split("_")[0]] * model.rnn.num_layers
    session = onnxruntime.InferenceSession(content)
    for T, B in SIZES:
        check(session, model, arguments(T, B, seed=1))


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
def test_lengths(cell, hx, dynamo):
    """They are the node's sequence_lens, in any order, zero too."""
    rnn = make(fastrnn, cell, 3, 4, 2, bidirectional=True, batch_first=True).eval()
    model = (Model if hx else Ragged)(rnn).eval()

    def arguments(T: int, B: int) -> dict:
        x, states = inputs(rnn, T, B, hx=hx, seed=T)
        lengths = torch.randint(0, T + 1, (B,), generator=seeded(B))
        lengths[-1] = 0 if B > 1 else T
        named = dict(zip(("h_0", "c_0"), unpack(states), strict=False))
        if hx and "c_0" not in named:
            named["c_0"] = None
        return {"x": x} | named | {"lengths": lengths}

    first = arguments(*SIZES[0])
    dynamic = {"x": {"T": 1, "B": 0}, "lengths": {"B": 0}}
    dynamic |= {name: {"B": 1} for name in ("h_0", "c_0") if first.get(name) is not None}
    content = export(model, first, dynamo, dynamic)
    found = nodes(content, "LSTM", "GRU", "RNN")
    assert len(found) == 2
    assert all(node.input[4] for node in found)
    session = onnxruntime.InferenceSession(content)
    for T, B in SIZES:
        feeds = {n: v for n, v in arguments(T, B).items() if v is not None}
        check(session, model, feeds)


CELLS = {"LSTM": fastrnn.LSTMCell, "GRU": fastrnn.GRUCell, "RNN": fastrnn.RNNCell}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (3,)], ids=["batched", "unbatched"])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name, shape, bias, dynamo):
    torch.manual_seed(0)
    cell = CELLS[name](3, 4, bias=bias)
    states = [torch.randn(*shape[:-1], 4) for _ in range(1 + (name == "LSTM"))]
    hx = tuple(states) if name == "LSTM" else states[0]
    arguments = {"input": torch.randn(shape), "hx": hx}
    content = export(cell, arguments, dynamo)
    assert len(nodes(content, name)) == 1
    session = onnxruntime.InferenceSession(content)
    with torch.no_grad():
        expected = tree_leaves(cell(**arguments))
    feeds = dict(zip((i.name for i in session.get_inputs()),
                     (t.numpy() for t in (arguments["input"], *states))))  # fmt: skip
    for got, want in zip(session.run(None, feeds), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)


def test_a_layer_alone(cell, dynamo):
    """Not part of a model: its options stand in the signature that an exporter reads."""
    layer = make(fastrnn, cell, 3, 4)
    arguments = {"input": torch.randn(5, 2, 3)}
    content = export(layer, arguments, dynamo)
    assert len(nodes(content, "LSTM", "GRU", "RNN")) == 1
    check(onnxruntime.InferenceSession(content), layer, arguments)


def test_unbatched(cell, dynamo):
    layer = make(fastrnn, cell, 3, 4, bidirectional=True)
    arguments = {"input": torch.randn(5, 3)}
    content = export(layer, arguments, dynamo)
    check(onnxruntime.InferenceSession(content), layer, arguments)


class Packed(Model):
    def forward(self, x, lengths):
        output, last = self.rnn(pack_padded_sequence(x, lengths))
        return pad_packed_sequence(output)[0], last


def test_packed(cell):
    """By a trace, where torch finds the lengths again."""
    model = Packed(make(fastrnn, cell, 3, 4)).eval()
    arguments = {"x": torch.randn(5, 2, 3), "lengths": torch.tensor([5, 3])}
    with pytest.warns(UserWarning, match="variable length"):
        content = export(model, arguments, dynamo=False)
    (node,) = nodes(content, "LSTM", "GRU", "RNN")
    assert node.input[4]
    check(onnxruntime.InferenceSession(content), model, arguments)


class Refused(nn.Module):
    def __init__(self, option: str) -> None:
        super().__init__()
        proj_size = 2 if option == "proj_size" else 0
        self.lstm, self.option = fastrnn.LSTM(3, 4, proj_size=proj_size), option

    def forward(self, x: Tensor):
        marks = x[..., 0] > 0
        options = {"mask": {"mask": marks}, "reset": {"reset": marks}}
        options |= {"return_states": {"return_states": True}}
        return self.lstm(x, **options.get(self.option, {}))


@pytest.mark.parametrize("option", ["proj_size", "mask", "reset", "return_states"])
def test_options_without_a_word(option, dynamo):
    with pytest.raises(Exception, match=f"{option}: ONNX's LSTM has"):
        export(Refused(option), {"x": torch.randn(5, 2, 3)}, dynamo)


def test_nothing_is_left_on():
    """After an export, failed or not, layers run on their kernels again."""
    layer, x = fastrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = layer(x)[0]
    for model, dynamo in itertools.product((layer, Refused("mask")), (True, False)):
        try:
            export(model, {"input" if model is layer else "x": x}, dynamo)
        except Exception as error:
            assert "mask" in str(error)  # noqa: PT017
        assert torch.equal(layer(x)[0], expected)
