"""Layers on the CUDA kernels: what users call. On the harness the layers run on CPU tensors."""

import subprocess
import sys

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import _functions
from fastrnn._backends import backend as backend_of
from fastrnn._backends import register
from fastrnn._cuda_backend import CudaBackend
from fastrnn._functions import FUNCTIONS
from fastrnn._layer import BUILT_IN as MODES
from fastrnn._layer import Layer
from helpers import (
    CELLS,
    MASKS,
    assert_close,
    inputs,
    make,
    make_mask,
    pack,
    pair,
    run,
    seeded,
    unpack,
)

F64 = pytest.mark.parametrize("engine", ["f64"], indirect=True)


@pytest.fixture
def device(target, engine):
    """Where to put tensors so that a layer runs on the kernels."""
    before = backend_of("cpu")
    if target.name == "harness":
        register("cpu", target.backend(engine))
    yield target.device
    register("cpu", before)


@pytest.fixture
def cpu():
    """The CPU's own backend."""
    return backend_of("cpu")


def on(device: str, model, x, hx):
    hx = None if hx is None else pack(tuple(h.to(device) for h in unpack(hx)))
    return model.to(device), x.to(device), hx


@F64
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": True}], ids=str)
def test_as_torch_nn(device, cell, bidirectional, options):
    ours, theirs = pair(cell, 3, 9, 2, bidirectional=bidirectional, dtype=torch.float64, **options)
    x, hx = inputs(ours, 5, 4)
    assert_close(run(*on(device, ours, x, hx)), run(*on(device, theirs, x, hx)), 1e-11)


@F64
def test_projection_as_torch_nn(device, bidirectional):
    sizes, options = (3, 9, 2), {"proj_size": 4, "bidirectional": bidirectional}
    ours, theirs = pair("LSTM", *sizes, dtype=torch.float64, **options)
    x, hx = inputs(ours, 5, 4)
    assert_close(run(*on(device, ours, x, hx)), run(*on(device, theirs, x, hx)), 1e-11)


@F64
@pytest.mark.parametrize("kind", MASKS)
def test_checkpoints_under_a_mask(device, cell, kind):
    options = {"mask": make_mask(kind, 6, 4), "reset": make_mask("holes", 6, 4, seed=1)}
    options = {name: t.to(device) for name, t in options.items()}
    results = []
    for every in (None, 2):
        model = make(fastrnn, cell, 3, 9, checkpoint_every=every, dtype=torch.float64)
        results.append(run(*on(device, model, *inputs(model, 6, 4)), **options))
    assert_close(*results, 1e-11)


@F64
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("resets", [False, True])
def test_masks_as_on_the_cpu(cpu, device, cell, bidirectional, kind, resets):
    T, B = 5, 4
    model = make(fastrnn, cell, 3, 9, 2, bidirectional=bidirectional, dtype=torch.float64)
    x, hx = inputs(model, T, B)
    options = {"mask": make_mask(kind, T, B)}
    if resets:
        options["reset"] = torch.rand(T, B, generator=seeded()) < 0.3
    here = {name: t.to(device) for name, t in options.items()}
    actual = run(*on(device, model, x, hx), **here)
    register("cpu", cpu)
    expected = run(*on("cpu", model, x, hx), **options)
    assert_close({name: t.cpu() for name, t in actual.items()}, expected, 1e-11)


@F64
def test_packed_as_torch_nn(device, cell, bidirectional):
    ours, theirs = pair(cell, 3, 9, bidirectional=bidirectional, dtype=torch.float64)
    x, hx = inputs(ours, 5, 4)
    results = []
    for model in (ours, theirs):
        model, x, hx = on(device, model, x, hx)
        packed = pack_padded_sequence(x, [2, 5, 1, 3], enforce_sorted=False)
        output, h_n = model(packed, hx)
        grads = torch.autograd.grad(output.data.sin().sum(), list(model.parameters()))
        results.append(dict(enumerate((output.data, *unpack(h_n), *grads))))
    assert_close(*results, 1e-11)


@F64
def test_gradcheck(device, cell, bidirectional):
    model = make(fastrnn, cell, 2, 3, bidirectional=bidirectional, dtype=torch.float64)
    x, hx = inputs(model, 3, 2)
    model, x, hx = on(device, model, x, hx)
    states = tuple(h.requires_grad_() for h in unpack(hx))
    params = tuple(model.parameters())

    def layer(x, *rest):
        named = dict(zip((n for n, _ in model.named_parameters()), rest[len(states) :]))
        args = (x, pack(rest[: len(states)]))
        output, h_n = torch.func.functional_call(model, named, args)
        return (output, *unpack(h_n))

    torch.autograd.gradcheck(layer, (x.requires_grad_(), *states, *params))


@F64
def test_double_backward(device, cell, bidirectional):
    model = make(fastrnn, cell, 2, 3, bidirectional=bidirectional, dtype=torch.float64)
    model, x, hx = on(device, model, *inputs(model, 3, 2))
    states = tuple(h.requires_grad_() for h in unpack(hx))

    def layer(x, *states):
        output, h_n = model(x, pack(states))
        return (output, *unpack(h_n))

    torch.autograd.gradgradcheck(layer, (x.requires_grad_(), *states))


@F64
def test_backward_in_eval(device, cell):
    ours, theirs = pair(cell, 3, 9, dtype=torch.float64)
    x, hx = inputs(ours, 5, 4)
    actual = run(*on(device, ours.eval(), x, hx))
    assert_close({n: t.cpu() for n, t in actual.items()}, run(theirs, x, hx), 1e-11)


@F64
def test_one_direction_backwards(device, cell):
    """As the second direction of a bidirectional layer."""
    model = make(fastrnn, cell, 3, 9, bidirectional=True, dtype=torch.float64)
    model, x, _ = on(device, model, *inputs(model, 5, 4, hx=False))
    mask = make_mask("holes", 5, 4).to(device)
    weights = [getattr(model, name) for name in model._all_weights[1]]
    for given in ({}, {"batch_sizes": mask}):
        rows = given.get("batch_sizes")
        layer = FUNCTIONS[model.mode]
        output, h_n, *_ = layer.apply(model.mode, 1, 4, rows, None, True, x, None, None, *weights)
        both, states = model(x, **({} if rows is None else {"mask": mask}))
        expected = both[..., 9:], unpack(states)[0][1:]
        for actual, want in zip((output, h_n), expected):
            assert torch.equal(actual, want)
        grads = torch.autograd.grad(output.sin().sum(), weights)
        wanted = torch.autograd.grad(expected[0].sin().sum(), weights)
        assert_close(dict(enumerate(grads)), dict(enumerate(wanted)), 1e-12)


BAD = {
    "dtype of a state": lambda x, h, w: (x, h.float(), w),
    "shape of a state": lambda x, h, w: (x, h[:, :1], w),
    "dtype of a weight": lambda x, h, w: (x, h, [w[0].float(), *w[1:]]),
    "shape of a bias": lambda x, h, w: (x, h, [*w[:3], w[3][:1]]),
    "device of a state": lambda x, h, w: (x, h.to("meta"), w),
}


@F64
@pytest.mark.parametrize("bad", BAD)
def test_what_the_kernels_cannot_read_is_refused(device, bad):
    """To them a tensor is an address: another dtype would be read as a wrong number."""
    model = make(fastrnn, "GRU", 3, 9, dtype=torch.float64)
    model, x, h = on(device, model, *inputs(model, 5, 4))
    x, h, weights = BAD[bad](x, h.detach(), [w.detach() for w in model.parameters()])
    layer = Layer.plain("GRU", 1, 4, x, h, None, weights, keep=True)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        backend_of(device).forward(layer)


@F64
@pytest.mark.parametrize("wrong", [[3, 4, 1], [4, 2], [4, 3, 2], [4, 4, -1]], ids=str)
def test_wrong_batch_sizes(device, wrong):
    model = make(fastrnn, "GRU", 3, 9, dtype=torch.float64)
    model = model.to(device)
    weights = tuple(w.detach() for w in model.parameters())
    x, sizes = torch.zeros(8, 3, dtype=torch.float64, device=device), torch.tensor(wrong)
    layer = Layer.plain("GRU", 1, 4, x, None, None, weights, sizes, keep=True)
    with pytest.raises(ValueError, match="batch_sizes"):
        backend_of(device).forward(layer)


@F64
def test_states_of_every_step(device, bidirectional):
    model = make(fastrnn, "LSTM", 3, 9, 2, bidirectional=bidirectional, dtype=torch.float64)
    model, x, hx = on(device, model, *inputs(model, 5, 4))
    results = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            _, (_, c_n), states = model(x, hx, return_states=True)
        assert torch.equal(states[0][-1, :, :9], c_n[0])
        results.append(states)
    for a, b in zip(*results):
        assert torch.equal(a, b)


OPTIONS = {"zoneout": 0.3, "recurrent_dropout": 0.4, "grad_clip": 0.05}


@F64
@pytest.mark.parametrize("name", ["all", *OPTIONS, "grad_scale", "zoneout of c"])
@pytest.mark.parametrize("proj_size", [0, 4])
def test_options_as_the_reference(device, cell, name, proj_size, monkeypatch):
    if (proj_size or name == "zoneout of c") and cell != "LSTM":
        pytest.skip("LSTM only")
    own = {"all": OPTIONS, "grad_scale": {}, "zoneout of c": {"zoneout": (0.0, 0.3)}}
    own = own[name] if name in own else {name: OPTIONS[name]}
    sizes = {"proj_size": proj_size} if proj_size else {}
    model = make(fastrnn, cell, 3, 70, 2, bidirectional=True, dtype=torch.float64, **own, **sizes)
    x, hx = inputs(model, 5, 4)
    call = {"grad_scale": torch.rand(5, 4)} if name in ("all", "grad_scale") else {}
    call = {name: t.to(device) for name, t in call.items()}
    scans, forward = [], CudaBackend.forward

    def counted(self, layer):
        scans.append(layer)
        return forward(self, layer)

    monkeypatch.setattr(CudaBackend, "forward", counted)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(run(*on(device, model, x, hx), **call))
        monkeypatch.setattr(_functions, "runs_cell", lambda mode, x: False)
    assert_close(*results, 1e-11)
    # The kernels know no h that is projected.
    assert len(scans) == (0 if proj_size and name not in ("grad_scale", "zoneout of c") else 2)


# On a GPU only: what is torch's own machinery around the operators.

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PARITY = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 6e-3}


@needs_gpu
@pytest.mark.parametrize("dtype", PARITY, ids=str)
@pytest.mark.parametrize("sizes", [(7, 5, 33, 65), (40, 16, 64, 128), (30, 64, 100, 512)], ids=str)
@pytest.mark.parametrize("tf32", [False, True])
def test_parity_with_cudnn(cell, dtype, bidirectional, sizes, tf32, monkeypatch):
    if tf32 and dtype != torch.float32:
        pytest.skip("float32 only")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    T, B, *features = sizes
    ours, theirs = pair(cell, *features, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(ours, T, B)
    actual, expected = (run(*on("cuda", model, x, hx)) for model in (ours, theirs))
    if cell == "RNN_RELU":  # sums next to zero change sides by rounding
        actual, expected = ({"output": r["output"]} for r in (actual, expected))
    assert_close(actual, expected, 2e-2 if tf32 else PARITY[dtype])


KINDS = ["plain", "mask", "lengths", "packed"]


def forward_of(model, x, kind):
    """A call of the model on x [12, 6, I] on a GPU, that returns the output."""
    if kind == "packed":

        def forward():
            sizes = torch.tensor([6, 5, 5, 4, 3, 3, 2, 1])  # gone when a graph replays
            return model(PackedSequence(x.flatten(0, 1)[: int(sizes.sum())], sizes))[0].data

        return forward
    options = {
        "plain": {},
        "mask": {"mask": make_mask("holes", 12, 6).cuda()},
        "lengths": {"lengths": torch.tensor([12, 0, 3, 7, 1, 12]).cuda()},
    }[kind]
    return lambda: model(x, **options)[0]


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graph_capture(cell, kind):
    model = make(fastrnn, cell, 8, 40, 2, bidirectional=True).cuda()
    x = torch.randn(12, 6, 8, device="cuda", requires_grad=True)
    forward = forward_of(model, x, kind)

    def step():
        for p in (x, *model.parameters()):
            p.grad = None
        forward().sin().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    expected = [g.clone() for g in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        for a, b in zip(captured, expected):
            assert torch.equal(a, b)


@needs_gpu
def test_streams_and_determinism(cell):
    model = make(fastrnn, cell, 8, 70, bidirectional=True).cuda()
    x = torch.randn(50, 16, 8, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        expected = model(x)[0]
        streams = [torch.cuda.Stream() for _ in range(4)]
        torch.cuda.synchronize()
        results = []
        for stream in streams * 2:
            with torch.cuda.stream(stream):
                results.append(model(x)[0])
        torch.cuda.synchronize()
    finally:
        torch.use_deterministic_algorithms(False)
    for result in results:
        assert torch.equal(result, expected)


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_no_host_synchronisation(cell, kind):
    model = make(fastrnn, cell, 8, 40, bidirectional=True).cuda()
    x = torch.randn(12, 6, 8, device="cuda", requires_grad=True)
    forward = forward_of(model, x, kind)
    forward().sum().backward()  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_wrong_lengths_on_a_gpu():
    """A device-side assertion ends all work on the device, so in a process of its own."""
    script = """
import torch, fastrnn
model = fastrnn.GRU(3, 5).cuda()
model(torch.zeros(4, 2, 3).cuda(), lengths=torch.tensor([4, 5]).cuda())
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "assert" in done.stderr


@needs_gpu
def test_compile(cell):
    model = make(fastrnn, cell, 8, 40, bidirectional=True).cuda()
    compiled = torch.compile(model, fullgraph=True)
    for T in (5, 9):
        x = torch.randn(T, 3, 8, device="cuda", requires_grad=True)
        results = []
        for layer in (model, compiled):
            output, h_n = layer(x)
            grads = torch.autograd.grad(output.sin().sum(), [x, *model.parameters()])
            results.append(dict(enumerate((output, *unpack(h_n), *grads))))
        assert_close(*results, 1e-5)


@needs_gpu
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(cell, half):
    ours, theirs = (m.cuda() for m in pair(cell, 8, 40, 2))
    x = torch.randn(12, 6, 8, device="cuda")
    with torch.autocast("cuda", half):
        a, b = (model(x)[0] for model in (ours, theirs))
    assert a.dtype == b.dtype
    assert (a.float() - b.float()).abs().max() < 0.03


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_tensors_own_device(cell):
    model = make(fastrnn, cell, 8, 40)
    x = torch.randn(12, 6, 8)
    expected = model(x)[0]
    output = model.to("cuda:1")(x.to("cuda:1"))[0]
    assert output.get_device() == 1
    torch.testing.assert_close(output.cpu(), expected, atol=1e-4, rtol=0)


def test_every_mode_has_a_test():
    assert set(CELLS) == set(MODES)
