"""fastrnn.freeze: packed weights, bit for bit the same in any batch, saved, compiled, exported."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastrnn
from fastrnn._layer import Layer
from helpers import TOLERANCE, inputs, make, make_mask, pair, unpack

T, B, F, H = 7, 5, 12, 37
CELLS_OF_ONE_STEP = [
    (fastrnn.LSTMCell, {}),
    (fastrnn.GRUCell, {}),
    (fastrnn.RNNCell, {"nonlinearity": "tanh"}),
    (fastrnn.RNNCell, {"nonlinearity": "relu"}),
]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def results(result):
    output, final = result[0], result[1]
    return [output, *unpack(final)]


def assert_equal(actual, expected):
    for own, right in zip(actual, expected, strict=True):
        assert torch.equal(own, right)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch_first", [False, True])
def test_frozen_is_forward(cell, dtype, bidirectional, layers, batch_first):
    options = {"bidirectional": bidirectional, "num_layers": layers, "batch_first": batch_first}
    ours, theirs = pair(cell, F, H, dtype=dtype, **options)
    x, hx = inputs(ours, T, B)
    expected = results(theirs(x, hx))
    assert fastrnn.freeze(ours.eval()) is ours
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for own, right in zip(results(ours(x, hx)), expected, strict=True):
        torch.testing.assert_close(own, right, **close)
    for own, right in zip(results(ours(x)), results(theirs(x)), strict=True):
        torch.testing.assert_close(own, right, **close)


@pytest.mark.parametrize("kind", ["lengths", "left", "holes"])
def test_masks_and_resets(cell, bidirectional, kind):
    model = make(fastrnn, cell, F, H, num_layers=2, bidirectional=bidirectional).eval()
    x, hx = inputs(model, T, B)
    mask, reset = make_mask(kind, T, B), torch.rand(T, B) < 0.3
    options = {"mask": mask, "reset": reset, "return_states": True}
    expected = model(x, hx, **options)
    actual = fastrnn.freeze(model)(x, hx, **options)
    for own, right in zip(results(actual), results(expected), strict=True):
        torch.testing.assert_close(own, right)
    for own, right in zip(actual[2], expected[2], strict=True):
        torch.testing.assert_close(own, right)


def test_packed_sequences(cell):
    model = make(fastrnn, cell, F, H, bidirectional=True).eval()
    x, _ = inputs(model, T, B)
    packed = nn.utils.rnn.pack_padded_sequence(x, [3, 7, 1, 5, 2], enforce_sorted=False)
    expected = model(packed)
    actual = fastrnn.freeze(model)(packed)
    torch.testing.assert_close(actual[0].data, expected[0].data)


def test_projections():
    model = make(fastrnn, "LSTM", F, H, 2, proj_size=8).eval()
    x, hx = inputs(model, T, B)
    expected = results(model(x, hx))
    for own, right in zip(results(fastrnn.freeze(model)(x, hx)), expected, strict=True):
        torch.testing.assert_close(own, right)


def test_cells_of_ones_own():
    model = fastrnn.cells.PeepholeLSTM(F, H, num_layers=2).eval()
    x = torch.randn(T, B, F)
    expected = results(model(x))
    fastrnn.freeze(model)
    for own, right in zip(results(model(x)), expected, strict=True):
        torch.testing.assert_close(own, right)
    alone = results(model(x[:, 2:3]))
    assert_equal(alone, [t[:, 2:3] for t in results(model(x))])


# -- Batch-invariant -------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [None, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(5, 19), (64, 64), (130, 257)])
def test_a_row_is_the_same_in_any_batch(cell, sizes, storage):
    model = make(fastrnn, cell, *sizes, num_layers=2, bidirectional=True).eval()
    fastrnn.freeze(model, storage)
    x, _ = inputs(model, 4, 70)
    hx = tuple(torch.randn(4, 70, sizes[1]) for _ in range(1 + (cell == "LSTM")))
    whole = results(model(x, hx if len(hx) == 2 else hx[0]))
    for rows in ([0], [69], [3, 4], [7, 1, 5], list(range(9)), list(range(60))):
        some = tuple(t[:, rows] for t in hx)
        part = results(model(x[:, rows], some if len(hx) == 2 else some[0]))
        assert_equal(part, [t[:, rows] for t in whole])
    # What the rows beside it hold does not matter either.
    x[:, 1:] = torch.inf
    assert torch.equal(model(x, hx if len(hx) == 2 else hx[0])[0][:, 0], whole[0][:, 0])


def test_any_number_of_threads(cell):
    model = fastrnn.freeze(make(fastrnn, cell, 130, 257).eval())
    x, _ = inputs(model, 4, 9)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append([*results(model(x)), *results(model(x[:, :1]))])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert_equal(other, found[0])


PROGRAM = """
import torch, fastrnn
torch.manual_seed(0)
model = fastrnn.freeze(fastrnn.LSTM(33, 70, 2).eval())
with torch.no_grad():
    x = torch.randn(6, 30, 33)
    whole = model(x)[0]
    for b in (0, 7, 29):
        assert torch.equal(model(x[:, b:b + 1])[0], whole[:, b:b + 1])
        state = model.initial_state(batch=1)
        for t in range(6):
            state = state.add_input(x[t, b:b + 1])
            assert torch.equal(state.output(), whole[t, b:b + 1])
"""


@pytest.mark.parametrize("variant", fastrnn.cpu_variants())
def test_every_variant(variant):
    subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, env=os.environ | {"FASTRNN_CPU": variant}
    )


# -- Smaller weights -------------------------------------------------------------------------------


def test_bfloat16_weights(cell):
    """The same as a layer whose weights were rounded; biases are not."""
    model = make(fastrnn, cell, 64, 96, num_layers=2).eval()
    x, hx = inputs(model, T, B)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        if parameter.dim() == 2:
            parameter.copy_(parameter.bfloat16())
    fastrnn.freeze(model, weights=torch.bfloat16)
    for own, right in zip(results(model(x, hx)), results(twin(x, hx)), strict=True):
        torch.testing.assert_close(own, right, rtol=1e-5, atol=1e-5)
    own = fastrnn.freeze(copy.deepcopy(twin))
    assert_equal(results(model(x, hx)), results(own(x, hx)))  # bit for bit
    assert model._packed.bytes * 2 == own._packed.bytes
    state = model.initial_state(hx).add_input(x[0])
    assert torch.equal(state.output(), own(x[:1], hx)[0][0])


def test_weights_of_no_kernel():
    with pytest.raises(
        ValueError, match=r"weights: expected None, or torch.bfloat16 .*float16 for"
    ):
        fastrnn.freeze(fastrnn.GRU(F, H).eval(), weights=torch.float16)
    with pytest.raises(ValueError, match=r"weights: expected .*torch\.int8 for a MinGRU"):
        fastrnn.freeze(fastrnn.cells.MinGRU(F, H).eval(), weights=torch.int8)
    with pytest.raises(ValueError, match=r"got torch\.bfloat16 for a GRU in torch\.float64"):
        fastrnn.freeze(fastrnn.GRU(F, H, dtype=torch.float64).eval(), weights=torch.bfloat16)
    with pytest.raises(ValueError, match=r"weights: expected a torch\.dtype or None, got str"):
        fastrnn.freeze(fastrnn.GRU(F, H).eval(), weights="int8")


# -- The model around it ---------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self, library=nn):
        super().__init__()
        self.rnn = library.LSTM(F, H, batch_first=True)
        self.cell = library.GRUCell(H, H)
        self.own = fastrnn.RNN(H, H)
        self.tags = nn.Linear(H, 4)

    def forward(self, x):
        h = self.cell(self.rnn(x)[0][:, -1])
        return self.tags(self.own(h[None])[0][0])


def test_a_model_and_back():
    torch.manual_seed(0)
    model = Tagger().eval()
    x = torch.randn(B, T, F)
    expected = model(x)
    names = {path: type(m) for path, m in model.named_modules()}
    parameters = list(model.parameters())
    state = model.state_dict()
    fastrnn.freeze(model)
    assert type(model.rnn) is fastrnn.LSTM
    assert repr(model.rnn) == "LSTM(12, 37, batch_first=True, frozen)"
    assert repr(model.cell) == "GRUCell(37, 37, frozen)"
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.state_dict(), state)
    assert fastrnn.unfreeze(model) is model
    assert {path: type(m) for path, m in model.named_modules()} == names
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))
    with torch.enable_grad():
        model(x).sum().backward()
    assert model.rnn.weight_ih_l0.grad is not None
    assert "_packed" not in vars(model.rnn)


def test_a_failure_changes_nothing():
    model = Tagger().eval()
    model.own.train()
    with pytest.raises(
        ValueError, match=r"own: expected a layer after eval\(\), got RNN in training mode"
    ):
        fastrnn.freeze(model)
    assert type(model.rnn) is nn.LSTM
    assert model.own._frozen is None


@pytest.mark.parametrize("storage", [None, torch.bfloat16])
def test_saved_and_loaded(storage, tmp_path):
    model = fastrnn.freeze(Tagger(fastrnn).eval(), storage)
    x = torch.randn(B, T, F)
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    whole = len(buffer.getvalue())
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(x), expected)
    assert "frozen" in repr(loaded.rnn)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), expected)
    # Nothing that is packed is in the file.
    buffer = io.BytesIO()
    torch.save(fastrnn.unfreeze(copied), buffer)
    assert whole < len(buffer.getvalue()) + 2000
    other = fastrnn.freeze(Tagger(fastrnn).eval(), storage)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = fastrnn.freeze(Tagger(fastrnn).eval())
    x = torch.randn(B, T, F)
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    other = fastrnn.freeze(Tagger(fastrnn).eval())
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), model(x))


# -- Compiled and exported -------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [None, torch.bfloat16])
def test_compiles_in_one_graph(storage):
    model = fastrnn.freeze(Tagger(fastrnn).eval(), storage)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for batch in (3, 6):
        x = torch.randn(batch, T, F)
        assert torch.equal(compiled(x), model(x))


def test_compiles_with_gradients_enabled():
    model = fastrnn.freeze(fastrnn.LSTM(F, H).eval())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(T, B, F)
    with torch.enable_grad():
        output = compiled(x)[0]
    assert not output.requires_grad
    assert torch.equal(output, model(x)[0])


def test_exports():
    model = fastrnn.freeze(Tagger(fastrnn).eval())
    x = torch.randn(B, T, F)
    batch, steps = torch.export.Dim("batch", min=2), torch.export.Dim("steps", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch, 1: steps},), strict=False)
    assert "scan_packed" in str(program.graph)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    x = torch.randn(3, 9, F)
    assert torch.equal(loaded(x), model(x))


def test_the_operator():
    weights = list(make(fastrnn, "LSTM", F, H).parameters())
    layer = Layer.plain("LSTM", 1, B, torch.randn(T, B, F), None, None, weights)
    for storage in ("own", "bfloat16"):
        torch.library.opcheck(
            torch.ops.fastrnn.scan_packed.default, (storage, *layer[:-1], weights)
        )


# -- What is not for a frozen layer ----------------------------------------------------------------


def test_training_mode(cell):
    model = fastrnn.freeze(make(fastrnn, cell, F, H).eval())
    x, _ = inputs(model, T, B)
    model.train()
    with pytest.raises(RuntimeError, match=r"it is frozen, but in training mode; call eval\(\)"):
        model(x)
    with pytest.raises(RuntimeError, match="in training mode"):
        model.initial_state()
    model.eval()(x)


def test_changed_parameters(cell):
    model = fastrnn.freeze(make(fastrnn, cell, F, H).eval())
    x, hx = inputs(model, T, B)
    state = model.initial_state(hx)
    model.bias_hh_l0.add_(1)
    for call in (
        lambda: model(x),
        model.initial_state,
        lambda: state.add_input(x[0]),
        lambda: state.transduce(x),
    ):
        with pytest.raises(RuntimeError, match="its parameters have changed since it was frozen"):
            call()
    changed = fastrnn.unfreeze(model)(x, hx)[0]
    torch.testing.assert_close(fastrnn.freeze(model)(x, hx)[0], changed)


def test_moved_parameters():
    model = fastrnn.freeze(fastrnn.GRU(F, H).eval()).double()
    with pytest.raises(RuntimeError, match="its parameters have changed since it was frozen"):
        model(torch.randn(T, B, F, dtype=torch.float64))


def test_gradients():
    model = fastrnn.freeze(fastrnn.GRU(F, H).eval())
    x = torch.randn(T, B, F, requires_grad=True)
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match="it is frozen, so it has no gradient"):
            model(x)
        with pytest.raises(RuntimeError, match="it is frozen, so it has no gradient"):
            model.initial_state(batch=B).add_input(x[0])
        assert not model(x.detach())[0].requires_grad
    model(x)


def test_autocast():
    """A frozen layer runs in its own dtype."""
    model = fastrnn.freeze(Tagger(fastrnn).eval())
    x = torch.randn(B, T, F)
    expected = model.rnn(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.rnn(x)[0], expected)
        assert model.rnn(x.bfloat16())[0].dtype == torch.float32
        assert model(x).dtype == torch.bfloat16
        assert model.cell(x[:, 0, :1].expand(B, H)).dtype == torch.float32


def test_vmap(cell):
    model = fastrnn.freeze(make(fastrnn, cell, F, H).eval())
    x = torch.randn(3, T, B, F)
    actual = torch.func.vmap(lambda x: model(x)[0])(x)
    torch.testing.assert_close(actual, torch.stack([model(each)[0] for each in x]))


# -- Cells -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("cls", "options"), CELLS_OF_ONE_STEP)
def test_cells(cls, options, frozen, dtype):
    torch.manual_seed(0)
    model = cls(F, H, dtype=dtype, **options).eval()
    theirs = getattr(nn, cls.__name__)(F, H, dtype=dtype, **options)
    theirs.load_state_dict(model.state_dict())
    if frozen:
        fastrnn.freeze(model)
    x = torch.randn(B, F, dtype=dtype)
    h = torch.randn(B, H, dtype=dtype)
    hx = (h, h.flip(0)) if cls is fastrnn.LSTMCell else h
    one = (h[0], h[-1]) if cls is fastrnn.LSTMCell else h[0]
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(model(x, hx), theirs(x, hx), **close)
    torch.testing.assert_close(model(x), theirs(x), **close)
    torch.testing.assert_close(model(x[0], one), theirs(x[0], one), **close)
    for own, whole in zip(unpack(model(x[:1], model(x[:1]))), unpack(model(x, model(x)))):
        assert torch.equal(own, whole[:1])
    assert model._packed is not None
    model.weight_hh.mul_(2)
    if frozen:
        with pytest.raises(RuntimeError, match="its parameters have changed since it was frozen"):
            model(x, hx)
        model.train()
        with pytest.raises(RuntimeError, match="it is frozen, but in training mode"):
            model(x, hx)
    else:
        theirs.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(x, hx), theirs(x, hx), **close)


@pytest.mark.parametrize(("cls", "options"), CELLS_OF_ONE_STEP)
def test_errors_of_frozen_cells(cls, options):
    """They are torch's."""
    model = fastrnn.freeze(cls(F, H, **options).eval())
    with pytest.raises(RuntimeError):
        model(torch.randn(B, F + 1))
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.randn(2, B, F))
