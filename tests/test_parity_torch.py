"""Drop-in for torch.nn: outputs, final states and all gradients of the original classes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fastrnn
from helpers import assert_close, assert_same_bits, inputs, make, pair, run, unpack

# T, B, I, H
SIZES = [
    (1, 1, 1, 1),
    (5, 3, 17, 129),
    (3, 17, 129, 3),
    (4, 129, 3, 17),
    (7, 1, 129, 17),
    (2, 129, 1, 3),
    (9, 17, 3, 1),
    (1, 17, 17, 17),
    (4, 3, 129, 129),
    (20, 33, 65, 129),  # GEMMs large enough for every way to multiply
]


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(map(str, s)))
def test_sizes(cell, dtype, num_layers, bidirectional, sizes):
    T, B, *features = sizes
    models = pair(cell, *features, num_layers, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(models[0], T, B)
    actual, expected = (run(model, x, hx) for model in models)
    assert_close(actual, expected)


# Weights of more than 8 MiB, read as they lie for few rows, and packed for others; sizes that are
# whole vectors and others.
@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 7), (3, 2), (1, 300)])
@pytest.mark.parametrize(("cell", "H"), [("LSTM", 1024), ("GRU", 1021), ("RNN_TANH", 2055)])
def test_large_weights(cell, H, T, B):
    models = pair(cell, 40, H, dtype=torch.float32)
    x, hx = inputs(models[0], T, B)
    actual, expected = (run(model, x, hx) for model in models)
    assert_close(actual, expected)


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_options(cell, dtype, bidirectional, batch_first, bias, hx):
    options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    models = pair(cell, 3, 5, 2, **options, dtype=dtype)
    x, hx = inputs(models[0], 6, 4, hx=hx)
    actual, expected = (run(model, x, hx) for model in models)
    assert_close(actual, expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(cell, dtype, bidirectional, batch_first):
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "dtype": dtype}
    models = pair(cell, 3, 5, 2, **options)
    x, hx = inputs(models[0], 6, 1)
    hx = hx[:, 0] if isinstance(hx, torch.Tensor) else tuple(h[:, 0] for h in hx)
    for state in (hx, None):
        actual, expected = (run(model, x[:, 0], state) for model in models)
        assert actual["output"].dim() == actual["h_n"].dim() == 2
        assert_close(actual, expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_empty_batch(cell, dtype, bidirectional, batch_first):
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "dtype": dtype}
    models = pair(cell, 3, 5, 2, **options)
    x, hx = inputs(models[0], 4, 0)
    actual, expected = (run(model, x, hx) for model in models)
    assert_close(actual, expected)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "wide rows": lambda t: torch.cat([t, t.new_full(t.shape, torch.nan)], -1)[..., : t.size(-1)],
    "offset": lambda t: torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(cell, dtype, bidirectional, layout):
    models = pair(cell, 3, 5, 2, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(models[0], 6, 4)
    states = tuple(LAYOUTS[layout](h) for h in unpack(hx))
    strided = states if cell == "LSTM" else states[0]
    actual, expected = (run(model, LAYOUTS[layout](x), strided) for model in models)
    assert_close(actual, expected)


def test_strided_weights_and_incoming_gradients(cell, dtype):
    models = pair(cell, 3, 5, bidirectional=True, dtype=dtype)
    x, hx = inputs(models[0], 6, 4)
    grads = []
    for model in models:
        with torch.no_grad():
            for p in model.parameters():
                p.set_(p.T.contiguous().T if p.dim() == 2 else p.repeat_interleave(2)[::2])
        output, h_n = model(x, hx)
        wide = torch.linspace(-1, 1, 4 * output.numel(), dtype=dtype).view(12, 4, 20)
        h = unpack(h_n)[0]
        loss = (output * wide[::2, :, ::2]).sum() + h.sum()  # h.sum(): an expanded gradient
        grads.append(dict(enumerate(torch.autograd.grad(loss, list(model.parameters())))))
    assert_close(*grads)


def test_lstm_takes_hx_as_list(dtype):
    ours, theirs = pair("LSTM", 3, 5, dtype=dtype)
    x, hx = inputs(ours, 6, 4)
    output, h_n = ours(x, list(hx))
    expected, _ = theirs(x, list(hx))
    assert isinstance(h_n, tuple)
    assert_close({"output": output}, {"output": expected})


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_from_the_same_seed(cell, dtype, bidirectional, batch_first, p):
    options = {"dropout": p, "batch_first": batch_first, "bidirectional": bidirectional}
    models = pair(cell, 3, 17, 3, **options, dtype=dtype)
    x, hx = inputs(models[0], 6, 4)

    def trained(model):
        torch.manual_seed(7)
        return run(model, x, hx)

    assert_close(trained(models[0]), trained(models[1]))
    assert_close(*(run(model.eval(), x, hx) for model in models))


def packed_run(model, x, lengths, enforce_sorted, hx):
    kwargs = {"batch_first": model.batch_first, "enforce_sorted": enforce_sorted}

    def forward(x, hx):
        packed = pack_padded_sequence(x, lengths, **kwargs)
        output, h_n = model(packed, hx)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            assert getattr(output, name) is getattr(packed, name)
        return output.data, h_n

    return run(model, x, hx, forward=forward)


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("lengths", [[6, 4, 4, 1], [2, 6, 1, 5], [3, 3, 3, 3]], ids=str)
def test_packed_sequence(cell, dtype, bidirectional, lengths, batch_first, hx):
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "dtype": dtype}
    models = pair(cell, 3, 5, 2, **options)
    x, hx = inputs(models[0], 6, 4, hx=hx)
    for enforce_sorted in {False, lengths == sorted(lengths, reverse=True)}:
        actual, expected = (packed_run(model, x, lengths, enforce_sorted, hx) for model in models)
        assert_close(actual, expected)


def test_packed_sequence_of_sequences(cell, dtype):
    models = pair(cell, 3, 5, bidirectional=True, dtype=dtype)
    rows = [torch.randn(n, 3, dtype=dtype) for n in (1, 4, 2)]
    results = []
    for model in models:
        with torch.device("cpu"):  # where the lengths belong
            packed = pack_sequence(rows, enforce_sorted=False)
        output, h_n = model(packed)
        results.append({"output": output.data, "h_n": unpack(h_n)[0]})
    assert_close(*results)


def test_state_dict_goes_both_ways(cell, dtype):
    ours = make(fastrnn, cell, 3, 5, 2, bidirectional=True, dtype=dtype)
    theirs = make(nn, cell, 3, 5, 2, bidirectional=True, dtype=dtype)
    for source, target in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for p in source.parameters():
                p.normal_()
        assert list(source.state_dict()) == list(target.state_dict())
        target.load_state_dict(source.state_dict())
        x, hx = inputs(ours, 4, 3)
        assert_close(run(ours, x, hx), run(theirs, x, hx), 100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_same_seed_same_weights(cell, dtype, bidirectional, bias):
    options = {"bias": bias, "bidirectional": bidirectional, "dtype": dtype}
    models = [make(library, cell, 3, 5, 2, **options) for library in (fastrnn, nn)]
    ours, theirs = (dict(model.named_parameters()) for model in models)
    assert list(ours) == list(theirs)
    assert_same_bits(ours, theirs)
    for name in ("mode", "_flat_weights_names", "_all_weights"):
        assert getattr(models[0], name) == getattr(models[1], name)
    assert models[0].extra_repr() == models[1].extra_repr()
    assert repr(models[0]) == repr(models[1])


def test_positional_arguments():
    assert fastrnn.RNN(3, 4, 2, "relu", False).bias is False
    assert fastrnn.LSTM(3, 4, 2, False, True).batch_first is True
    assert fastrnn.GRU(3, 4, 2, False, True).batch_first is True
    for name in ("LSTM", "GRU", "RNN"):
        model = getattr(fastrnn, name)(3, 4)
        assert isinstance(model, nn.RNNBase)
        assert not isinstance(model, getattr(nn, name))


def test_weights_by_keyword_copy_and_assignment(cell):
    """Weights are read at each call, however they came to the module."""
    ours, theirs = pair(cell, 3, 5, 2, dtype=torch.float64)
    x, hx = inputs(ours, 4, 3)
    ours(x, hx)
    new = make(nn, cell, 3, 5, 2, dtype=torch.float64)
    with torch.no_grad():
        for p in new.parameters():
            p.normal_()
    expected = run(new, x, hx)
    copied = copy.deepcopy(ours)
    copied.load_state_dict(new.state_dict(), assign=True)
    assert_close(run(copied, x, hx), expected)
    for name, p in new.named_parameters():
        setattr(ours, name, nn.Parameter(p.detach().clone()))
    assert_close(run(ours, x, hx), expected)
    with torch.no_grad():
        for p, old in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.copy_(old)
    assert_close(run(ours, x, hx), run(theirs, x, hx))
    assert_close(run(ours.float(), x.float(), None), run(theirs.float(), x.float(), None))


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("batch_first", [True, False])
def test_memory_of_the_results(cell, dtype, bidirectional, batch_first, T):
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "dtype": dtype}
    model = make(fastrnn, cell, 3, 5, 2, **options)
    x, hx = inputs(model, T, 4)
    before = [(t, t.clone(), t._version) for t in (x, *unpack(hx), *model.parameters())]
    for tracked in (False, True):
        with torch.set_grad_enabled(tracked):
            output, h_n = model(x, hx)
        tensors = (output, *unpack(h_n), x, *unpack(hx))
        storages = [t.untyped_storage().data_ptr() for t in tensors]
        assert len(set(storages)) == len(storages)
        assert all(h.is_contiguous() for h in unpack(h_n))
        assert (output.transpose(0, 1) if batch_first else output).is_contiguous()
        assert all(t.requires_grad == tracked for t in (output, *unpack(h_n)))
    for tensor, value, version in before:
        assert torch.equal(tensor, value)
        assert tensor._version == version


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_projections(dtype, bidirectional, num_layers, hx):
    """No kernel yet: the reference implementation, not an option quietly ignored."""
    options = {"proj_size": 2, "bidirectional": bidirectional, "dtype": dtype}
    models = pair("LSTM", 3, 5, num_layers, **options)
    x, hx = inputs(models[0], 6, 4, hx=hx)
    actual, expected = (run(model, x, hx) for model in models)
    assert_close(actual, expected)


def test_dtypes_without_kernels(cell):
    if cell == "RNN_RELU":
        pytest.skip("relu of a complex number: an error in torch too")
    dtype = torch.complex128
    models = pair(cell, 3, 5, 2, bidirectional=True, dtype=dtype)
    x, hx = inputs(models[0], 6, 4)
    actual, expected = (run(model, x, hx) for model in models)
    assert_close(actual, expected, 1e-13)


def test_float32_is_as_accurate_as_torch(cell, bidirectional):
    """Root mean square error against torch in float64, over several seeds."""
    ours, theirs = pair(cell, 17, 65, 2, bidirectional=bidirectional)
    exact = copy.deepcopy(theirs).double()
    totals: dict[str, torch.Tensor] = {}
    for seed in range(5):
        x, hx = inputs(ours, 30, 9, seed=seed)
        doubled = tuple(h.double() for h in unpack(hx))
        want = run(exact, x.double(), doubled if cell == "LSTM" else doubled[0])
        got, base = run(ours, x, hx), run(theirs, x, hx)
        for name, w in want.items():
            squares = [got[name] - w, base[name] - w, w]
            sums = torch.stack([v.square().mean() for v in squares])
            totals[name] = totals.get(name, 0) + sums
    for name, sums in totals.items():
        mine, torchs, scale = sums.sqrt().tolist()
        ulp = torch.finfo(torch.float32).eps * scale
        assert mine <= 1.5 * torchs + ulp, f"{name}: error {mine:.2e}, torch's {torchs:.2e}"
