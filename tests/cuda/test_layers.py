"""Layers on the CUDA kernels: what users call. On the harness the layers run on CPU tensors."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import _functions, _modules
from helpers import CELLS, MASKS, assert_close, inputs, make, make_mask, pack, pair, run, unpack

F64 = pytest.mark.parametrize("engine", ["f64"], indirect=True)


@pytest.fixture
def device(backend, engine, monkeypatch) -> str:
    """Where to put tensors so that a layer runs on the kernels; counts the scans that do."""
    if backend.name == "harness":
        scan = backend.scan(engine)
        monkeypatch.setattr(_functions, "scan_forward_cpu", scan.forward)
        monkeypatch.setattr(_functions, "scan_backward_cpu", scan.backward)
        monkeypatch.setattr(_modules, "takes_mask", lambda x: True)
    return backend.device


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
def test_masks_as_on_the_cpu(device, cell, bidirectional, kind, resets, request):
    T, B = 5, 4
    model = make(fastrnn, cell, 3, 9, 2, bidirectional=bidirectional, dtype=torch.float64)
    x, hx = inputs(model, T, B)
    options = {"mask": make_mask(kind, T, B)}
    if resets:
        options["reset"] = torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.3
    here = {name: t.to(device) for name, t in options.items()}
    actual = run(*on(device, model, x, hx), **here)
    request.getfixturevalue("monkeypatch").undo()
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


@needs_gpu
def test_graph_capture(cell):
    model = make(fastrnn, cell, 8, 40, 2, bidirectional=True).cuda()
    x = torch.randn(12, 6, 8, device="cuda", requires_grad=True)
    mask = make_mask("holes", 12, 6).cuda()

    def step():
        for p in (x, *model.parameters()):
            p.grad = None
        model(x, mask=mask)[0].sin().sum().backward()
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
def test_no_host_synchronisation(cell):
    model = make(fastrnn, cell, 8, 40, bidirectional=True).cuda()
    x = torch.randn(12, 6, 8, device="cuda", requires_grad=True)
    mask, reset = (make_mask("holes", 12, 6, seed=s).cuda() for s in (0, 1))
    model(x)[0].sum().backward()  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x, mask=mask, reset=reset)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
    assert set(CELLS) == set(fastrnn._ops.CELLS)
