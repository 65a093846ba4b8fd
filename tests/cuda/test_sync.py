"""The host never waits for the device: no value is read back, so that a CUDA graph takes all of it.

On a GPU, test_layers asks torch. Without one: the backend, run on the harness, and the layers, on
fake CUDA tensors, call nothing of torch that would wait.
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from backends import ENGINES, Target, h100
from fastrnn._backends import register
from fastrnn._cuda_backend import _Rounding
from helpers import make
from test_scan import ROWS, Case, assert_right, make_case, run_on

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2}
INDEXED = {aten.index, aten.index_put, aten.index_put_}


class NoReads(TorchDispatchMode):
    """Fails at what would wait for a GPU; collects the calls of fastrnn's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.scans: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        assert packet not in READS, f"{func} waits"
        if packet in INDEXED:
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as index waits"
        if func.namespace == "fastrnn":
            self.scans.append(func._opname)
        result = func(*args, **(kwargs or {}))
        if packet in (aten._to_copy, aten.copy_):
            source = args[0 if packet == aten._to_copy else 1]
            assert not (source.is_cuda and result.is_cpu), "a copy to the host waits"
        return result


@pytest.mark.parametrize("engine", ["f32", "bf16"], indirect=True)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("proj", [0, 4])
def test_backend(target, cell, engine, rows, proj, monkeypatch):
    if proj and cell != "LSTM":
        pytest.skip("LSTM only")
    resets, ragged = ROWS[rows]
    every = len(rows) % 3  # 0: no segments
    case = make_case(cell, 4, 5, 3, 6, resets=resets, ragged=ragged, proj=proj)
    case = case._replace(layer=case.layer._replace(checkpoint_every=every))
    original = Case.run

    def watched(operator):
        def call(*args):
            with NoReads():
                return operator(*args)

        return call

    def run(self, forward, backward):
        return original(self, watched(forward), watched(backward))

    monkeypatch.setattr(Case, "run", run)
    run_on(case, target, engine)


@pytest.fixture
def fake_cuda(harness):
    """As if there were kernels."""
    before = register("cuda", h100(harness))
    yield
    register("cuda", before)


@pytest.mark.parametrize("kind", ["plain", "mask", "lengths", "reset"])
@torch.no_grad()  # this torch may have no autograd for CUDA
def test_layers(fake_cuda, cell, kind):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = make(fastrnn, cell, 3, 5, 2, bidirectional=True, device="meta")

    def on_cuda(t: Tensor) -> Tensor:
        return FakeTensor(mode, t.detach().to("meta"), torch.device("cuda:0"))

    T, B = 4, 3
    marks = on_cuda(torch.ones(T, B, dtype=torch.bool))
    lengths = on_cuda(torch.ones(B, dtype=torch.int64))
    x = on_cuda(torch.zeros(T, B, 3))
    options = {
        "mask": {"mask": marks},
        "lengths": {"lengths": lengths},
        "reset": {"reset": marks},
    }
    weights = {name: on_cuda(p) for name, p in model.named_parameters()}
    with mode, NoReads() as calls:
        torch.func.functional_call(model, weights, (x,), options.get(kind, {}))
    assert calls.scans == ["scan_forward"] * 2


class Watched(TorchDispatchMode):
    """The calls of torch, and whether cuBLAS may round to TF32 in its products."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.rounds: set[bool] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        if func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
            self.rounds.add(torch.backends.cuda.matmul.allow_tf32)
        return func(*args, **(kwargs or {}))


def watch(case: Case, backend) -> list[Watched]:
    """Of forward and of backward."""
    watched = []
    original = case.to(lambda t: t.float())

    def each(operator):
        def call(*args):
            with Watched() as calls:
                result = operator(*args)
            watched.append(calls)
            return result

        return call

    original.run(each(backend.forward), each(backend.backward))
    return [watched[0], watched[-1]]


def test_few_calls_of_torch(harness):
    """Each takes some microseconds on the host, as long as a step or more on the GPU."""
    target = Target("harness", harness, "cpu")
    for cell, states, most in [
        ("LSTM", True, 19),
        ("LSTM", False, 16),
        ("GRU", True, 21),
        ("GRU", False, 18),
    ]:
        case = make_case(cell, 4, 5, 3, 6, 1, states=states)
        forward, backward = watch(case, target.backend(ENGINES["f32"]))
        assert len(forward.calls) <= 10
        assert len(backward.calls) <= most
        assert not any("cat" in call for call in backward.calls)


@pytest.mark.parametrize("batch", [5, 5500])
def test_large_gradients_are_not_written_twice(harness, batch):
    """Two thirds of a GRU's gradients of W_hh h are those of W_ih x. While they are few, they are
    written a second time, for one product instead of two."""
    target = Target("harness", harness, "cpu")
    case = make_case("GRU", 2, batch, 2, 32, 1)
    assert_right(run_on(case, target, ENGINES["f64"]), case, ENGINES["f64"])
    _, backward = watch(case, target.backend(ENGINES["f64"]))
    products = [call for call in backward.calls if call.startswith("aten.mm.")]
    assert len(products) == (3 if batch == 5 else 4)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("products", [False, True])
def test_large_products_round_where_cudnn_would(harness, scan, products):
    """nn.LSTM on cuDNN knows one setting, for all products of a layer."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    engine = ENGINES["tf32" if scan else "f32"]
    case = make_case("GRU", 3, 2, 4, 8)
    try:
        matmul.allow_tf32 = products
        found = watch(case, Target("harness", harness, "cpu").backend(engine))
        assert matmul.allow_tf32 == products
    finally:
        matmul.allow_tf32 = before
    assert [calls.rounds for calls in found] == [{scan}] * 2


def test_calls_at_the_same_time_share_the_setting_of_products():
    """The one that ends first leaves it to the other."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        rounding = _Rounding()
        first, second = rounding(True), rounding(True)
        with first:
            second.__enter__()
            assert matmul.allow_tf32
        assert matmul.allow_tf32
        second.__exit__(None, None, None)
        assert not matmul.allow_tf32
        with rounding(False):
            assert not matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="an older torch"
)
def test_the_setting_of_products_comes_back_as_it_was(harness):
    before = torch.backends.cuda.matmul.fp32_precision
    watch(make_case("GRU", 3, 2, 4, 8), Target("harness", harness, "cpu").backend(ENGINES["tf32"]))
    assert torch.backends.cuda.matmul.fp32_precision == before
