"""Cells of a user's own on the CUDA kernels, compiled as the user's machine would."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F

import fastrnn
from backends import ENGINES
from fastrnn import _kernels, cells
from fastrnn._backends import backend as backend_of
from fastrnn._backends import register
from fastrnn._check import _compare, _differentiate
from helpers import assert_close


@fastrnn.cell(gates=("a", "b", "z"), recurrent=("z", "a"), inputs=("k", "l"))
def Mixed(x, r, h, s, u, *, w, v=0.5):
    """Gates without recurrent rows and in another order, inputs, two more states, vectors."""
    z = torch.sigmoid(x.z + r.z + x.k)
    s = torch.where(x.a + r.a > h, w * s, v * s + x.b) * F.softplus(x.l)
    return (1 - z) * h + z * torch.tanh(s + u), s, torch.cos(u) * x.k


@fastrnn.cell(gates=("a", "b"), recurrent=())
def Everything(x, r, h, s):
    """All functions that a cell may use, and no weight_hh."""
    p, q = torch.abs(x.a) + 0.1, x.b
    a = F.softplus(q) + F.silu(q) + F.gelu(q) + F.elu(q) + torch.clamp(q, min=-1, max=0.5)
    a = a + q**2 + p**0.5 + p**1.7 + p**-2 + F.logsigmoid(q) + F.relu(q)
    a = a + torch.maximum(q, p) + torch.minimum(q, h) + torch.sign(q) * q
    a = a + torch.where((q > 0) & ~(p < q) | (q <= -1), q, 0.5) + torch.rsqrt(p)
    a = a + torch.sqrt(p) + torch.sin(q) + torch.cos(q) + torch.log1p(p) + torch.expm1(q)
    a = a + torch.log(p) + torch.erf(q) + 2 / p - q + torch.exp(q)
    return torch.tanh(0.1 * a + s), torch.sigmoid(h + q)


OWN = [Mixed, Everything, cells.PeepholeLSTM, cells.SLSTM, cells.IndRNN]
TYPES = {"f32": OWN, "f64": OWN, "bf16": [cells.PeepholeLSTM, cells.IndRNN]}


@pytest.fixture(autouse=True, scope="module")
def kernels(harness):
    """All kernels, side by side."""
    from harness import build

    toolchain, directory = build.Harness(harness), _kernels.cache_directory()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, each in TYPES.items():
            for cls in each:
                wanted = cls.definition, ENGINES[name].dtype, directory, toolchain
                pool.submit(_kernels.compile_cell, *wanted)


@contextlib.contextmanager
def runs_on(target, engine, kind=None):
    """The target's tensors run on its kernels, with plans of one kind."""

    def choose(problem, device):
        own = target.kernels.Kind[kind] if kind else None
        plan = target.kernels.make_plan(problem, device, own)
        return plan or target.kernels.make_plan(problem, device)

    backend = target.backend(engine, choose)
    before = register(target.device, backend)
    try:
        yield backend
    finally:
        register(target.device, before)


def assert_kernel(backend, cls, dtype):
    assert backend.runs_cell(cls.definition.mode, dtype), "there was no kernel to compare"


@pytest.mark.parametrize("engine", ["f32", "f64"], indirect=True)
@pytest.mark.parametrize("cls", OWN, ids=lambda cls: cls.__name__)
def test_kernel_equals_function(target, engine, cls):
    with runs_on(target, engine) as backend:
        _compare(cls, engine.dtype, target.device, 1, 2)
        _compare(cls, engine.dtype, target.device, 2, 1)
        assert_kernel(backend, cls, engine.dtype)


@pytest.mark.parametrize("engine", ["f64"], indirect=True)
@pytest.mark.parametrize("cls", [Mixed, cells.IndRNN], ids=lambda cls: cls.__name__)
def test_derivatives(target, engine, cls):
    with runs_on(target, engine):
        _differentiate(cls, target.device, 1, 2)


OPTIONS = [
    {},
    {"checkpoint_every": 3},
    {"zoneout": 0.3},
    {"zoneout": 0.3, "checkpoint_every": 3},
    {"recurrent_dropout": 0.4},
    {"grad_clip": 0.02},
    {"layer_norm": True},  # runs on the reference implementation
]


def some_cells(engine):
    """One with much, of which a comparison may come out another way in 16 bits, and one without
    weight_hh."""
    return (Mixed if engine.dtype.itemsize > 2 else cells.PeepholeLSTM), cells.IndRNN


def results(cls, options, engine, device):
    """Output, states, every state and all gradients of a layer with masks and resets."""
    torch.manual_seed(0)
    rnn = cls(3, 19, 2, bidirectional=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(7, 5, 3, dtype=torch.float64)
    own = [
        {n: torch.randn(7, 5, 38, dtype=torch.float64) for n in cls.definition.inputs}
        for _ in range(2 if cls.definition.inputs else 0)
    ]
    mask, reset = torch.rand(7, 5) < 0.7, torch.rand(7, 5) < 0.3
    scale = 2 * torch.rand(7, 5, dtype=torch.float64)
    rnn, x = rnn.to(device, engine.dtype), x.to(device, engine.dtype).requires_grad_()
    own = [{n: z.to(device, engine.dtype).requires_grad_() for n, z in e.items()} for e in own]
    state = torch.float32 if engine.dtype.itemsize == 2 else engine.dtype
    marks = {"mask": mask.to(device), "reset": reset.to(device)}
    if "zoneout" in options:  # the CPU sorts rows with a mask, and a draw depends on the row
        del marks["mask"]
    marks["grad_scale"] = scale.to(device, state)
    if "zoneout" in options or "recurrent_dropout" in options:
        torch.manual_seed(1)  # the same draws on every device
    output, final, every = rnn(x, inputs=own or None, return_states=True, **marks)
    final = final if isinstance(final, tuple) else (final,)
    flat = [t for each in every for t in (each if isinstance(each, tuple) else (each,))]
    made = [output, *final, *flat]
    weights = [torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view_as(t) for t in made]
    loss = sum((t.double() * w.to(device)).sum() for t, w in zip(made, weights))
    leaves = [x, *(z for e in own for z in e.values()), *rnn.parameters()]
    return made + list(torch.autograd.grad(loss, leaves, materialize_grads=True))


def assert_equal(ours, expected, engine):
    for a, b in zip(ours, expected, strict=True):
        a, b = a.detach().double().cpu(), b.detach().double()
        assert (a - b).abs().max() <= engine.tolerance * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("engine", ["f64", "f32", "bf16"], indirect=True)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(target, engine, options):
    """As on the CPU's kernels, random numbers included."""
    if target.name == "cuda" and not {"zoneout", "recurrent_dropout"}.isdisjoint(options):
        pytest.skip("a GPU has a random generator of its own")
    for cls in some_cells(engine):
        if "layer_norm" in options and engine.dtype.itemsize == 2:
            continue  # two reference implementations, rounding after each operation
        of_hh = "layer_norm" in options or "recurrent_dropout" in options
        if of_hh and not cls.definition.recurrent:
            continue
        with runs_on(target, engine):
            ours = results(cls, options, engine, target.device)
        expected = results(cls, options, engine, "cpu")
        assert_equal(ours, expected, engine)


@pytest.mark.parametrize("engine", ["f32", "tf32", "f64", "bf16", "bf16-plain"], indirect=True)
@pytest.mark.parametrize("kind", ["STEP", "GRID", "CLUSTER"])
def test_plans(target, engine, kind):
    for cls in some_cells(engine):
        with runs_on(target, engine, kind) as backend:
            ours = results(cls, {}, engine, target.device)
            assert_kernel(backend, cls, engine.dtype)
        assert_equal(ours, results(cls, {}, engine, "cpu"), engine)


def test_without_a_compiler(harness, monkeypatch):
    """One warning, and the reference implementation."""

    @fastrnn.cell(gates=("a",))
    def Unknown(x, r, h):
        return torch.tanh(x.a + r.a + 0.25 * h)

    from harness import build

    class Missing(build.Harness):
        def command(self, csrc):
            return _kernels.find_compiler("CUDA compiler", "CUDACXX", "no-such-nvcc")

    from fastrnn._cuda_backend import CudaBackend

    monkeypatch.delenv("CUDACXX", raising=False)
    rnn, before = Unknown(3, 4), backend_of("cpu")
    x = torch.randn(5, 2, 3)
    expected, _ = rnn(x)
    register("cpu", CudaBackend(harness, device=90, toolchain=Missing(harness)))
    try:
        with pytest.warns(RuntimeWarning, match="there is no CUDA compiler"):
            output, _ = rnn(x)
    finally:
        register("cpu", before)
    assert_close({"output": output}, {"output": expected})
