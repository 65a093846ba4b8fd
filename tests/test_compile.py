"""torch.compile without a graph break and torch.export, both with dynamic T and B."""

import io
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastrnn
from fastrnn._layer import Layer
from helpers import assert_close, inputs, make, run, seeded, unpack

OLD = torch.__version__ < (2, 8)
SIZES = [(4, 3), (6, 7), (9, 2), (5, 8)]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def options_for(kind: str, T: int, B: int) -> dict:
    generator = seeded(T)
    if kind == "mask":
        return {"mask": torch.rand(T, B, generator=generator) < 0.6}
    if kind == "lengths":
        return {"lengths": torch.randint(0, T + 1, (B,), generator=generator)}
    return {}


def check(model, backend: str, kind: str, hx: bool = True) -> None:
    """Same results and gradients as without compile, and no new graph for a new T or B."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for count, (T, B) in enumerate(SIZES):
        x, states = inputs(model, T, B, hx=hx)
        options = options_for(kind, T, B)
        assert_close(
            run(model, x, states, forward=compiled.__call__, **options),
            run(model, x, states, **options),
        )
        # The first graph is for constant sizes, the second for any.
        assert counter.frame_count == min(count + 1, 2)


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
def test_full_graph_forward_and_backward(cell, hx):
    check(make(fastrnn, cell, 3, 5, 2, bidirectional=True), "aot_eager", "full", hx)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("kind", ["lengths", "mask"])
@pytest.mark.skipif(OLD, reason="sizes that depend on data need a newer torch.compile")
def test_full_graph_with_padding(cell, kind):
    check(make(fastrnn, cell, 3, 5, 2, bidirectional=True), "aot_eager", kind)


@pytest.mark.parametrize("kind", ["full", "mask"])
def test_inductor(kind):
    if OLD and kind == "mask":
        pytest.skip("sizes that depend on data need a newer torch.compile")
    check(make(fastrnn, "LSTM", 3, 5, 2, bidirectional=True), "inductor", kind)


def test_the_graph_calls_the_kernel():
    """And nothing else of weight: no trace of the reference implementation."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    model = make(fastrnn, "GRU", 3, 5, 2)
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(4, 3, 3))
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("scan_forward" in target for target in targets) == 2
    assert not [target for target in targets if "sigmoid" in target or "linear" in target]


@pytest.mark.skipif(OLD, reason="PackedSequence breaks the graph in an older torch.compile")
def test_packed():
    model = make(fastrnn, "LSTM", 3, 5)
    rows = [torch.randn(n, 3) for n in (2, 4)]
    with torch.device("cpu"):  # where the lengths belong
        packed = torch.nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (ours, states), (expected, expected_states) = compiled(packed), model(packed)
    assert_close(
        {"output": ours.data, **dict(enumerate(states))},
        {"output": expected.data, **dict(enumerate(expected_states))},
    )


@pytest.mark.skipif(OLD, reason="sizes that depend on data need a newer torch.compile")
@pytest.mark.parametrize("wrong", [[1, 2, 9], [1, -1, 2]])
def test_wrong_lengths_raise(wrong):
    compiled = torch.compile(make(fastrnn, "LSTM", 3, 5), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 3)
    compiled(x, lengths=torch.tensor([1, 0, 4]))
    with pytest.raises(RuntimeError, match="lengths"):
        compiled(x, lengths=torch.tensor(wrong))


def test_a_weight_changed_after_compiling():
    model = make(fastrnn, "LSTM", 3, 5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 3)
    before = compiled(x)[0].clone()
    with torch.no_grad():
        model.weight_hh_l0.mul_(2)
    assert torch.equal(compiled(x)[0], model(x)[0])
    assert not torch.equal(before, model(x)[0])


class Call(torch.nn.Module):
    """A model with lengths or a mask as its second input."""

    def __init__(self, model, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x, *given):
        output, hx = self.model(x, **dict(zip((self.kind,), given)))
        return output, *unpack(hx)


def export(model, kind: str, strict: bool = False):
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    args = (torch.randn(4, 3, 3), *options_for(kind, 4, 3).values())
    shapes = {"full": (), "mask": (({0: T, 1: B},),), "lengths": (({0: B},),)}[kind]
    return torch.export.export(
        Call(model, kind), args, dynamic_shapes=({0: T, 1: B}, *shapes), strict=strict
    )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["full", "mask", "lengths"])
def test_export(cell, kind, strict):
    if OLD and (strict or kind != "full"):
        pytest.skip("strict export and sizes that depend on data need a newer torch.export")
    model = make(fastrnn, cell, 3, 5, 2, bidirectional=True)
    exported = export(model, kind, strict).module()
    for T, B in SIZES[1:]:
        args = (torch.randn(T, B, 3), *options_for(kind, T, B).values())
        actual, expected = exported(*args), Call(model, kind)(*args)
        assert_close(dict(enumerate(actual)), dict(enumerate(expected)))


def test_an_exported_program_trains(cell):
    """Its graph holds the bare operator, whose gradient must be there too."""
    model = make(fastrnn, cell, 3, 5, 2, bidirectional=True)
    exported = export(model, "full").module()
    x = torch.randn(6, 4, 3)
    results = []
    for module in (exported, Call(model, "full")):
        loss = sum(t.sin().sum() for t in module(x))
        names, params = zip(*sorted(module.named_parameters()))
        results.append(dict(zip(names, torch.autograd.grad(loss, params))))
    assert_close(*results)


def test_loading_needs_only_the_import(tmp_path):
    model = make(fastrnn, "LSTM", 3, 5, 2, bidirectional=True)
    x = torch.randn(6, 4, 3)
    buffer = io.BytesIO()
    torch.export.save(export(model, "full"), buffer)
    (tmp_path / "program.pt2").write_bytes(buffer.getvalue())
    torch.save((x, model(x)[0]), tmp_path / "expected.pt")
    script = (
        "import sys, torch, fastrnn\n"
        "x, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "program = torch.export.load(sys.argv[1] + '/program.pt2')\n"
        "torch.testing.assert_close(program.module()(x)[0], expected)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def transforms(model, x):
    """Compiled transforms of torch.func: torch.compile follows them on the reference."""
    params = dict(model.named_parameters())

    def loss(params, x):
        return torch.func.functional_call(model, params, (x,))[0].sin().sum()

    return {
        "vmap": lambda: torch.vmap(lambda x: model(x)[0])(x),
        "grad": lambda: torch.func.grad(loss)(params, x[0])["weight_hh_l0"],
        "per-sample": lambda: torch.vmap(torch.func.grad(loss), (None, 0))(params, x)[
            "weight_ih_l0"
        ],
        "jvp": lambda: torch.func.jvp(lambda x: model(x)[0], (x[0],), (x[0],))[1],
    }


@pytest.mark.parametrize("name", ["vmap", "grad", "per-sample", "jvp"])
def test_compiled_transforms(name):
    model = make(fastrnn, "LSTM", 3, 5, dtype=torch.float64)
    call = transforms(model, torch.randn(4, 3, 2, 3, dtype=torch.float64))[name]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_close({name: compiled().detach()}, {name: call().detach()})


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck_with_gradients(cell, bidirectional, ragged, keep):
    """Of the bare operator, under AOT and with sizes that change."""
    model = make(fastrnn, cell, 3, 5, bidirectional=bidirectional)
    x, hx = inputs(model, 4, 3)
    h_0, c_0, *_ = *(h.requires_grad_() for h in unpack(hx)), None, None
    params = list(model.parameters())
    x, sizes = (x.flatten(0, 1)[:8], torch.tensor([3, 3, 2, 0])) if ragged else (x, None)
    resets = torch.rand(x.shape[:-1]) < 0.4
    x = x.detach().requires_grad_()
    own = x, h_0, c_0, params, sizes, resets
    layer = Layer.plain(cell, 1 + bidirectional, 3, *own, keep=keep, all_c=not keep)
    torch.library.opcheck(torch.ops.fastrnn.scan_forward, (*layer[:-1], params))
