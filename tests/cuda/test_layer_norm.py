"""Layer normalisation in the CUDA kernels, compared with the CPU's."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn._backends import register
from fastrnn._functions import runs_options

T, B, I, H = 6, 5, 3, 19  # noqa: E741


@fastrnn.cell(gates=("a", "b", "z"), recurrent=("z", "a"), inputs=("k",))
def Normalised(x, r, h, s, *, w):
    """Gates without recurrent rows, inputs, another state, a learned vector."""
    z = torch.sigmoid(x.z + r.z + x.k)
    s = w * s + torch.tanh(x.a + r.a) + x.b
    return (1 - z) * h + z * torch.tanh(s), s


@contextmanager
def runs_on(target, engine):
    """The target's tensors run on its kernels."""
    before = register(target.device, target.backend(engine))
    try:
        yield
    finally:
        register(target.device, before)


def results(cls, kind, options, dtype, device):
    """Output, states, every state and all gradients."""
    torch.manual_seed(0)
    rnn = cls(I, H, 2, bidirectional=True, layer_norm=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    rnn.to(device, dtype)

    def new(*size):
        return torch.randn(*size, dtype=torch.float64).to(device, dtype).requires_grad_()

    x, h = new(T, B, I), new(4, B, H)
    hx = h if cls in (fastrnn.GRU, fastrnn.RNN) else (h, new(4, B, H))
    call = {"return_states": True}
    if "holes" in kind:
        call["mask"] = (torch.rand(T, B) < 0.6).to(device)
    if "lengths" in kind:
        call["lengths"] = torch.tensor([4, 6, 0, 1, 3])
    if "resets" in kind:
        call["reset"] = (torch.rand(T, B) < 0.4).to(device)
    if "scale" in kind:
        scale = 2 * torch.rand(T, B)
        call["grad_scale"] = scale.to(device, torch.float64 if dtype.itemsize == 8 else None)
    inputs = [new(T, B, 2 * H) for _ in range(2 if cls is Normalised else 0)]
    if inputs:
        call["inputs"] = [{"k": z} for z in inputs]
    torch.manual_seed(1)
    output, final, every = rnn(x, hx, **call)
    final = final if isinstance(final, tuple) else (final,)
    made = [output, *final, *(t for e in every for t in (e if isinstance(e, tuple) else (e,)))]
    weights = [torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view_as(t) for t in made]
    loss = sum((t.double() * w.to(device)).sum() for t, w in zip(made, weights))
    leaves = [x, h, *inputs, *rnn.parameters()]
    return made + list(torch.autograd.grad(loss, leaves, materialize_grads=True))


KINDS = ["none", "lengths", "holes", "resets", "holes resets scale"]
OPTIONS = [
    {},
    {"bias": False},
    {"checkpoint_every": 2},
    {"recurrent_dropout": 0.4},
    {"grad_clip": 0.05},
    {"zoneout": 0.3},
]


def assert_equal(cls, kind, options, target, engine, monkeypatch):
    ran = []
    with runs_on(target, engine), monkeypatch.context() as patch:
        spy = lambda layer: ran.append(runs_options(layer)) or ran[-1]  # noqa: E731
        patch.setattr("fastrnn._functions.runs_options", spy)
        ours = results(cls, kind, options, engine.dtype, target.device)
    assert ran
    assert all(ran), "no kernel to compare"
    for a, b in zip(ours, results(cls, kind, options, engine.dtype, "cpu"), strict=True):
        a, b = a.detach().double().cpu(), b.detach().double()
        assert (a - b).abs().max() <= 5 * engine.tolerance * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("engine", ["f64", "f32"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN, Normalised])
def test_rows(target, engine, cls, kind, monkeypatch):
    assert_equal(cls, kind, {}, target, engine, monkeypatch)


@pytest.mark.parametrize("engine", ["f64"], indirect=True)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN, Normalised])
def test_options(target, engine, cls, options, monkeypatch):
    """With other options; the CPU sorts rows with a mask, and zoneout's draws depend on the row."""
    if target.name == "cuda" and not {"zoneout", "recurrent_dropout"}.isdisjoint(options):
        pytest.skip("a GPU has a random generator of its own")
    kind = "resets scale" if "zoneout" in options else "holes resets scale"
    assert_equal(cls, kind, options, target, engine, monkeypatch)


@pytest.mark.parametrize("engine", ["bf16", "bf16-plain", "f16"], indirect=True)
@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
def test_16_bits(target, engine, cls, monkeypatch):
    assert_equal(cls, "holes resets", {}, target, engine, monkeypatch)


@pytest.mark.parametrize("engine", ["f32"], indirect=True)
def test_packed_sequence(target, engine):
    torch.manual_seed(0)
    rnn = fastrnn.LSTM(I, H, layer_norm=True).to(target.device)
    packed = pack_padded_sequence(torch.randn(T, B, I), [6, 5, 5, 2, 1]).to(target.device)
    with runs_on(target, engine):
        ours, _ = rnn(packed)
    theirs, _ = rnn.cpu()(packed.cpu())
    torch.testing.assert_close(ours.data.cpu(), theirs.data, rtol=1e-4, atol=1e-5)
