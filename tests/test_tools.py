"""torch's tools that know torch.nn's classes by name: what they make of ours is what they make of
torch.nn's."""

import io
import subprocess
import sys

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import (
    QConfigMapping,
    default_dynamic_qconfig,
    get_default_qconfig_mapping,
    quantize_dynamic,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map

import fastrnn
from fastrnn import _cells
from helpers import assert_close, assert_same_bits, inputs, make, pack, pair, seeded, unpack

LAYERS, CELLS = ["LSTM", "GRU", "RNN"], ["LSTMCell", "GRUCell", "RNNCell"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.jit and torch.ao are
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]


class Model(nn.Module):
    """All six classes of a library, and a module that is none."""

    def __init__(self, library) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = library.LSTM(8, 16, 2, bidirectional=True)
        self.gru = library.GRU(32, 16)
        self.rnn = library.RNN(16, 16, nonlinearity="relu")
        self.linear = nn.Linear(16, 8)
        self.lstm_cell = library.LSTMCell(8, 16)
        self.gru_cell = library.GRUCell(16, 16)
        self.rnn_cell = library.RNNCell(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(x)
        x, h = self.gru(x)
        x, _ = self.rnn(x, h)
        h, _ = self.lstm_cell(self.linear(x)[0])
        return self.rnn_cell(self.gru_cell(h))


def models() -> list[Model]:
    """Ours and the original, with the same weights."""
    return [Model(fastrnn), Model(nn)]


def data() -> Tensor:
    return torch.randn(5, 2, 8, generator=seeded(1))


def original(cls: type) -> type:
    """torch.nn's class of one of ours; any other as it is."""
    ours = {getattr(fastrnn, name): getattr(nn, name) for name in LAYERS + CELLS}
    return ours.get(cls, cls)


def classes(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules() if path}


def same_models(ours: nn.Module, theirs: nn.Module) -> None:
    """The same tree, where ours stand in the places of torch.nn's, and the same numbers."""
    assert {p: original(c) for p, c in classes(ours).items()} == classes(theirs)
    actual, expected = ours(data()), theirs(data())
    assert_close({"output": actual}, {"output": expected}, 1e-6)


# -- torch.fx --------------------------------------------------------------------------------------


def test_fx_leaves():
    """The graph is that of the original model, node by node; it runs, and differentiates."""
    ours, theirs = models()
    traced = fx.symbolic_trace(ours)
    assert str(traced.graph) == str(fx.symbolic_trace(theirs).graph)
    results = []
    for model in (traced, theirs):
        output = model(data())
        grads = torch.autograd.grad(output.sum(), list(model.parameters()))
        results.append(dict(enumerate([output.detach(), *grads])))
    assert_close(*results)


@pytest.mark.parametrize("name", LAYERS)
def test_fx_options(name):
    """lengths= and the others stand in the graph, and are read when it runs."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = getattr(fastrnn, name)(3, 4)

        def forward(self, x, hx, lengths):
            return self.rnn(x, hx, lengths=lengths, return_states=True)[0]

    model = Wrapper()
    x, hx = inputs(model.rnn, 5, 3)
    traced = fx.symbolic_trace(model)
    (node,) = (n for n in traced.graph.nodes if n.op == "call_module")
    assert node.kwargs.keys() == {"lengths", "return_states"}
    for lengths in ([5, 1, 0], torch.tensor([2, 3, 4])):
        assert torch.equal(traced(x, hx, lengths), model(x, hx, lengths))


def test_fx_of_a_layer_alone():
    """As torch.nn's: a module is no leaf of its own graph."""
    for library in (fastrnn, nn):
        with pytest.raises(fx.proxy.TraceError):
            fx.symbolic_trace(library.LSTM(3, 4))


# -- Quantisation ----------------------------------------------------------------------------------

SPECS = {
    "default": None,
    "LSTM": {nn.LSTM},
    "others": {nn.GRU, nn.RNNCell},
    "Linear": {nn.Linear},
    "by name": {"lstm", "gru_cell"},
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_quantize_dynamic(spec, dtype, inplace):
    """Ours become what torch.nn's become; those that are left in float stay ours."""
    ours, theirs = models()
    made = [quantize_dynamic(m, spec, dtype=dtype, inplace=inplace) for m in (ours, theirs)]
    assert "torch.nn.modules.rnn" not in {c.__module__ for c in classes(made[0]).values()}
    assert any("quantized" in c.__module__ for c in classes(made[0]).values())
    same_models(*made)
    assert (made[0] is ours) == inplace
    if not inplace:
        assert classes(ours) == classes(Model(fastrnn))
    own = ("_fastrnn", "checkpoint")
    assert not [n for m in made[0].modules() for n in vars(m) if n.startswith(own)]


def test_quantize_dynamic_that_fails():
    """The classes are ours again after an error."""
    model = Model(fastrnn)
    with pytest.raises(AttributeError):
        quantize_dynamic(model, {nn.LSTM: "no qconfig"}, inplace=True)
    assert classes(model) == classes(Model(fastrnn))


def test_quantize_dynamic_saved():
    """A quantised model needs no fastrnn to load."""
    model = quantize_dynamic(nn.Sequential(fastrnn.LSTM(8, 16)))
    file = io.BytesIO()
    torch.save(model, file)
    assert b"fastrnn" not in file.getvalue()


@pytest.mark.filterwarnings("ignore:Please use quant_min")
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_fx_quantisation(kind):
    mapping = get_default_qconfig_mapping("x86")
    if kind == "dynamic":
        mapping = QConfigMapping().set_global(default_dynamic_qconfig)
    converted = []
    for model in models():
        prepared = prepare_fx(model.eval(), mapping, (data(),))
        prepared(data())
        converted.append(convert_fx(prepared))
    same_models(*converted)
    quantized = {p for p, c in classes(converted[0]).items() if "quantized" in c.__module__}
    assert "linear" in quantized
    assert {"lstm", "gru", "lstm_cell"} <= quantized or kind == "static"


# -- TorchScript -----------------------------------------------------------------------------------

WITHOUT_FASTRNN = """
import sys, torch
model, x, expected = torch.jit.load(sys.argv[1]), *torch.load(sys.argv[2])
assert "fastrnn" not in sys.modules
torch.testing.assert_close(model(x), expected)
"""


def test_script(tmp_path):
    """The twin stands on the same parameters, trains, and loads where there is no fastrnn."""
    model, twin = models()
    scripted = torch.jit.script(model)
    assert all(a is b for a, b in zip(scripted.parameters(), model.parameters(), strict=True))
    results = []
    for m in (scripted, twin):
        output = m(data())
        grads = torch.autograd.grad(output.sum(), list(m.parameters()))
        results.append(dict(enumerate([output.detach(), *grads])))
    assert_close(*results)
    scripted.save(str(tmp_path / "model.pt"))
    torch.save((data(), scripted(data()).detach()), tmp_path / "data.pt")
    command = [sys.executable, "-c", WITHOUT_FASTRNN, *map(str, sorted(tmp_path.iterdir())[::-1])]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", CELLS)
def test_script_of_a_cell_alone(name):
    """A layer alone, with a forward of two kinds, cannot be called once it is scripted: torch.nn's
    neither."""
    model = getattr(fastrnn, name)(8, 16)
    scripted = torch.jit.script(model)
    actual, expected = (dict(enumerate(tree_leaves(m(data()[0])))) for m in (scripted, model))
    assert_close(actual, expected, 1e-6)
    assert type(model) is getattr(fastrnn, name)


def test_script_leaves_twins_behind():
    """torch puts them into the model; replace takes them back, and what was held stays right."""
    model = nn.Sequential(fastrnn.LSTM(8, 16))
    held = model[0]
    torch.jit.script(model)
    assert type(model[0]) is nn.LSTM
    with torch.no_grad():
        model[0].weight_hh_l0.zero_()
    assert not held.weight_hh_l0.any()
    fastrnn.replace(model)
    assert type(model[0]) is fastrnn.LSTM


def test_script_of_an_option_without_twin():
    with pytest.raises(
        RuntimeError, match=r"checkpoint_every=2: torch\.jit\.script compiles torch\.nn\.GRU"
    ):
        torch.jit.script(nn.Sequential(fastrnn.GRU(3, 4, checkpoint_every=2)))

    class Lengths(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fastrnn.GRU(3, 4)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.rnn(x, lengths=lengths)[0]

    with pytest.raises(RuntimeError, match="lengths"):
        torch.jit.script(Lengths())


class Ragged(nn.Module):
    def __init__(self, cell: str, form: str) -> None:
        super().__init__()
        self.form = form
        self.rnn = make(fastrnn, cell, 3, 4, 2, bidirectional=True)

    def forward(self, x, lengths):
        if self.form == "packed":
            output, last = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
            return (output.data, *unpack(last))
        options = {"lengths": lengths}
        if self.form == "mask":
            options = {"mask": torch.arange(x.shape[0]).unsqueeze(1) >= lengths}
        output, last = self.rnn(x, **options)
        return (output, *unpack(last))


@pytest.mark.parametrize("form", ["packed", "lengths", "mask"])
def test_trace_of_ragged_rows(cell, form):
    """For a T, a B and lengths that the trace has not seen; all of full length when it was made."""
    model = Ragged(cell, form)
    for first in ([5, 5, 5], [2, 5, 4]):
        traced = torch.jit.trace(model, (torch.randn(5, 3, 3), torch.tensor(first)))
        for lengths in ([5, 1], [1, 7, 3, 3], [2, 5, 4], [4, 4], [6]):
            x, lengths = torch.randn(max(lengths), len(lengths), 3), torch.tensor(lengths)
            actual, expected = traced(x, lengths), model(x, lengths)
            assert_same_bits(dict(enumerate(actual)), dict(enumerate(expected)))


# -- Expanded Weights ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*batch_first")
@pytest.mark.parametrize("batch_first", [True, False])
def test_expanded_weights(cell, batch_first, monkeypatch):
    """Per-sample gradients, those of torch.nn's layers."""
    results = []
    for model in pair(cell, 3, 4, 2, bidirectional=True, batch_first=batch_first):
        x, hx = inputs(model, 5, 3)
        x.requires_grad_()  # else torch's LSTM takes an operator that Expanded Weights do not know
        call = call_for_per_sample_grads(
            model, batch_size=3, loss_reduction="sum", batch_first=batch_first
        )
        output, _ = call(x, hx)
        output.sin().sum().backward()
        results.append({name: p.grad_sample for name, p in model.named_parameters()})
        assert results[-1]["weight_hh_l1"].shape == (3, *model.weight_hh_l1.shape)
    assert_close(*results)


@pytest.mark.parametrize("name", CELLS)
def test_expanded_weights_of_cells(name):
    """torch's cells have none: the same error."""
    texts = []
    for library in (fastrnn, nn):
        model = getattr(library, name)(3, 4)
        with pytest.raises(RuntimeError) as caught:
            call_for_per_sample_grads(model, batch_size=2)(torch.randn(2, 3))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_expanded_weights_with_an_option():
    model = fastrnn.GRU(3, 4)
    call = call_for_per_sample_grads(model, batch_size=2)
    with pytest.raises(RuntimeError, match="lengths: expected none here"):
        call(torch.randn(2, 5, 3), lengths=[5, 2])


# -- _flat_weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["list", "item"])
def test_flat_weights_set_from_outside(cell, how):
    """Layers compute with them until a weight of that name changes, as torch.nn's do."""
    results = []
    for model in pair(cell, 3, 4, 2):
        x, hx = inputs(model, 5, 3)
        seen = [model(x, hx)[0]]
        if how == "list":
            model._flat_weights = [2 * w.detach() for w in model._flat_weights]
        else:
            model._flat_weights[1] = 2 * model._flat_weights[1].detach()
        seen += [model(x, hx)[0], model(x, hx)[0]]
        with torch.no_grad():
            model.weight_ih_l0.zero_()  # in place: the list stays as it is
            seen += [model(x, hx)[0], model(x)[0]]
        model.weight_hh_l0 = nn.Parameter(model.weight_hh_l0.detach() / 2)
        seen += [model(x, hx)[0], model(x, hx)[0]]
        seen += [model._flat_weights[1]]
        results.append({str(i): t.detach() for i, t in enumerate(seen)})
    assert not torch.equal(results[0]["0"], results[0]["1"])
    assert not torch.equal(results[0]["4"], results[0]["5"])
    assert_close(*results)


def test_flat_weights_are_renewed(cell):
    """By a weight put into _parameters behind the module's back, and by functional_call."""
    results = []
    for model in pair(cell, 3, 4):
        x, hx = inputs(model, 5, 3)
        seen = [model(x, hx)[0]]
        model._parameters["weight_hh_l0"] = nn.Parameter(model.weight_hh_l0.detach() * 2)
        seen += [model(x, hx)[0], model(x, hx)[0]]
        assert model._flat_weights[1] is model.weight_hh_l0
        changed = {name: p.detach() * 3 for name, p in model.named_parameters()}
        seen += [torch.func.functional_call(model, changed, (x, hx))[0], model(x, hx)[0]]
        assert model._flat_weights[1] is model.weight_hh_l0
        results.append({str(i): t.detach() for i, t in enumerate(seen)})
    assert_close(*results)


# -- Objects that only behave like tensors ---------------------------------------------------------


class Duck:
    """No tensor, but torch's functions take it as one, and say so."""

    def __init__(self, value: Tensor, seen: list) -> None:
        self.value, self.seen = value, seen

    def __getattr__(self, name: str):
        return getattr(self.value, name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        seen = next(d.seen for d in tree_leaves((args, kwargs)) if isinstance(d, Duck))
        seen.append(getattr(func, "__name__", str(func)))
        args, kwargs = tree_map(
            lambda d: d.value if isinstance(d, Duck) else d, (args, kwargs or {})
        )
        wrapped = func(*args, **kwargs)
        return tree_map(lambda t: cls(t, seen) if isinstance(t, Tensor) else t, wrapped)


@pytest.mark.parametrize("what", ["input", "hx"])
@pytest.mark.parametrize("tracked", [True, False])
def test_duck_tensors(cell, what, tracked):
    """What they see and return is what they do of torch.nn's layers."""
    results, calls = [], []
    for model in pair(cell, 3, 4, 2):
        x, hx = inputs(model, 5, 3)
        seen: list = []
        if what == "input":
            x = Duck(x, seen)
        else:
            hx = pack(tuple(Duck(h, seen) for h in unpack(hx)))
        with torch.set_grad_enabled(tracked):
            outputs = tree_leaves(model(x, hx))
        assert all(isinstance(t, Duck) for t in outputs)
        assert outputs[0].value.requires_grad == tracked
        results.append({str(i): t.value.detach() for i, t in enumerate(outputs)})
        calls.append(seen)
    assert calls[0] == calls[1]
    assert calls[0]
    assert_close(*results)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("rows", [2, 5])
def test_duck_tensors_in_cells(name, rows, monkeypatch):
    monkeypatch.setattr(_cells, "_TRAINING", (5, 1, 0))
    results, calls = [], []
    for library in (fastrnn, nn):
        torch.manual_seed(0)
        model, seen = getattr(library, name)(3, 4), []
        x = Duck(torch.randn(rows, 3, generator=seeded()), seen)
        outputs = tree_leaves(model(x))
        results.append({str(i): t.value.detach() for i, t in enumerate(outputs)})
        calls.append(seen)
    assert calls[0] == calls[1]
    assert_close(*results)
