"""Layers of a user's own cell: fastrnn.cell, its kernels, its cache, check_cell."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import fastrnn
from fastrnn import _kernels, cells
from fastrnn._check import _compare, _differentiate
from fastrnn._generate import generate
from fastrnn._layer import CELLS

GALLERY = [getattr(cells, name) for name in cells.__all__]


@fastrnn.cell(gates=("i", "f", "g", "o"))
def OwnLSTM(x, r, h, c):
    c = torch.sigmoid(x.f + r.f) * c + torch.sigmoid(x.i + r.i) * torch.tanh(x.g + r.g)
    return torch.sigmoid(x.o + r.o) * torch.tanh(c), c


@fastrnn.cell(gates=("r", "z", "n"))
def OwnGRU(x, r, h):
    reset, z = torch.sigmoid(x.r + r.r), torch.sigmoid(x.z + r.z)
    n = torch.tanh(x.n + reset * r.n)
    return n + z * (h - n)


@fastrnn.cell(gates=("a", "b", "z"), recurrent=("z",), inputs=("k", "l"))
def Mixed(x, r, h, s, *, u, v=0.5):
    """Gates without recurrent rows, inputs, a second state, learned vectors, a comparison."""
    z = torch.sigmoid(x.z + r.z + x.k)
    s = torch.where(x.a > h, u * s, v * s + x.b) * F.softplus(x.l)
    return (1 - z) * h + z * torch.tanh(s), s


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """All that most tests need, side by side: one by one they take twice as long."""
    dtypes = torch.float32, torch.float64
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for cls, dtype in product([OwnLSTM, OwnGRU, Mixed, *GALLERY], dtypes):
            directory = _kernels.cache_directory()
            pool.submit(_kernels.compile_cell, cls.definition, dtype, directory)


def pair(own, theirs, *sizes, **options):
    """A layer and torch's with the same weights."""
    a, b = own(*sizes, **options), theirs(*sizes, **options)
    a.load_state_dict(b.state_dict())
    return a, b


# The decorator


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return torch.matmul(h, h)", "matmul is not pointwise"),
        ("h += 1", "cannot be changed in place"),
        ("return h.sum()", ".sum of a tensor"),
        ("return h * h.shape[0]", ".shape of a tensor"),
        ("return h[0]", "cannot be indexed"),
        ("return h if h > 0 else -h", "use torch.where"),
        ("return float(h)", "no single value"),
        ("return h * torch.ones(3)", "a tensor from outside"),
        ("return h ** x.a", "a number as its exponent"),
        ("return x.b", "x.b is unknown; there is x.a"),
        ("return torch.tensor(h)", "cannot be indexed"),
        ("return torch.sigmoid(h, out=h)", "cannot write to a tensor"),
        ("return torch.where(h, h, h)", "a comparison as its first argument"),
        ("return ~h", "combine comparisons only"),
    ],
)
def test_errors_name_the_function_and_the_line(tmp_path, body, message):
    source = (
        f"import torch\ndef Wrong(x, r, h):\n    y = torch.tanh(x.a)\n    {body}\n    return y\n"
    )
    namespace = {}
    exec(compile(source, str(tmp_path / "wrong.py"), "exec"), namespace)
    with pytest.raises(ValueError, match="A cell may use arithmetic") as error:
        fastrnn.cell(gates=("a",))(namespace["Wrong"])
    assert str(error.value).startswith("Wrong, line 4 of wrong.py: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("signature", "result", "message"),
    [
        ("x, r", "x.a", "at least one state"),
        ("x, r, *h", "x.a", r"\*h cannot be used"),
        ("x, r, h=1", "x.a", "h is a state"),
        ("x, r, h, *, w='a'", "x.a", "initial value of w"),
        ("x, r, h, c", "h", "the new h, c"),
        ("x, r, h", "1.0", "new states to be returned"),
        ("x, r, h", "h > 0", "new states to be returned"),
    ],
)
def test_errors_of_signatures_and_results(signature, result, message):
    namespace = {}
    exec(f"def Wrong({signature}):\n    return {result}", namespace)
    with pytest.raises(ValueError, match=message):
        fastrnn.cell(gates=("a",))(namespace["Wrong"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": ()}, "gates: expected at least one"),
        ({"gates": "ab"}, "gates: expected a sequence of names"),
        ({"gates": ("a", "a")}, "gates: expected different names"),
        ({"gates": ("for",)}, "gates: expected names of attributes"),
        ({"gates": ("a",), "recurrent": ("b",)}, "recurrent: expected some of the gates"),
        ({"gates": ("a",), "inputs": ("a",)}, "inputs: expected other names"),
    ],
)
def test_errors_of_names(options, message):
    def One(x, r, h):
        return x.a

    with pytest.raises(ValueError, match=message):
        fastrnn.cell(**options)(One)


# The class


def test_parameters():
    rnn = Mixed(6, 5, num_layers=2, bidirectional=True)
    shapes = {name: tuple(p.shape) for name, p in rnn.named_parameters()}
    first = {"weight_ih": (15, 6), "weight_hh": (5, 5), "bias_ih": (15,), "bias_hh": (5,)}
    first |= {"u": (5,), "v": (5,)}
    expected = {}
    for k, features in enumerate((6, 10)):
        for suffix in (f"_l{k}", f"_l{k}_reverse"):
            own = first | {"weight_ih": (15, features)}
            expected |= {name + suffix: shape for name, shape in own.items()}
    assert shapes == expected
    assert (rnn.v_l1_reverse == 0.5).all()
    assert rnn.u_l0.abs().max() <= 5**-0.5
    assert rnn.u_l0.std() > 0
    assert list(Mixed(6, 5, bias=False).state_dict()) == [
        "weight_ih_l0",
        "weight_hh_l0",
        "u_l0",
        "v_l0",
    ]
    assert list(cells.IndRNN(6, 5).state_dict()) == ["weight_ih_l0", "bias_ih_l0", "u_l0"]
    assert repr(rnn) == "Mixed(6, 5, num_layers=2, bidirectional=True)"


def test_bad_sizes_have_torchs_words():
    with pytest.raises(ValueError, match="hidden_size must be greater than zero"):
        OwnLSTM(3, 0)
    with pytest.raises(ValueError, match="checkpoint_every"):
        OwnLSTM(3, 2, checkpoint_every=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda rnn: pickle.loads(pickle.dumps(rnn))])
def test_copies(copied):
    rnn = OwnLSTM(3, 4, 2, batch_first=True, checkpoint_every=3)
    other, x = copied(rnn), torch.randn(2, 5, 3)
    assert torch.equal(other(x)[0], rnn(x)[0])
    assert (type(other), repr(other)) == (OwnLSTM, repr(rnn))


@pytest.mark.parametrize("checkpoint_every", [None, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("own", "theirs"), [(OwnLSTM, torch.nn.LSTM), (OwnGRU, torch.nn.GRU)])
def test_equals_torch(own, theirs, bias, checkpoint_every):
    a, b = pair(own, theirs, 6, 21, num_layers=2, bidirectional=True, bias=bias)
    a.checkpoint_every = checkpoint_every
    x = torch.randn(8, 5, 6)
    hx = torch.randn(4, 5, 21)
    hx = (hx, hx / 2) if own is OwnLSTM else hx
    for rnn in (a, b):
        rnn.zero_grad()
        output, final = rnn(x, hx)
        total = output.square().sum() + sum(f.sum() for f in final)
        total.backward()
    torch.testing.assert_close(a(x, hx), b(x, hx))
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_layouts():
    a, b = pair(OwnLSTM, torch.nn.LSTM, 6, 5, batch_first=True)
    x = torch.randn(3, 7, 6)
    torch.testing.assert_close(a(x), b(x))
    torch.testing.assert_close(a(x[0]), b(x[0]))
    packed = pack_sequence([x[0, :2], x[1, :7], x[2, :4]], enforce_sorted=False)
    for own, right in zip(a(packed)[1], b(packed)[1]):
        torch.testing.assert_close(own, right)
    own, lengths = pad_packed_sequence(a(packed)[0], batch_first=True)
    torch.testing.assert_close(own, a(x, lengths=lengths)[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_return_states(bidirectional):
    rnn = cells.SLSTM(6, 5, 2, bidirectional=bidirectional)
    x, lengths = torch.randn(7, 3, 6), torch.tensor([7, 2, 0])
    output, final, states = rnn(x, lengths=lengths, return_states=True)
    assert [len(layer) for layer in states] == [4, 4]
    torch.testing.assert_close(states[1][0], output)
    width = 10 if bidirectional else 5
    for i, name in enumerate(rnn.definition.states):
        assert states[1][i].shape == (7, 3, width), name
        forward = states[1][i][1, 1, :5]  # the last step of a row is its final state
        torch.testing.assert_close(forward, final[i][2 if bidirectional else 1, 1])
    one = OwnGRU(6, 5)(x, return_states=True)
    assert torch.equal(one[2][0], one[0])


@pytest.mark.parametrize("batch_first", [False, True])
def test_inputs(batch_first):
    rnn = Mixed(6, 5, 2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(4, 3, 6)
    given = [{name: torch.randn(4, 3, 10) for name in "kl"} for _ in range(2)]
    mask = torch.rand(4, 3) < 0.7
    expected = rnn(x, inputs=given, mask=mask)[0]
    for each in given:  # what stands in masked steps never matters
        for z in each.values():
            z[~mask] = torch.nan
    torch.testing.assert_close(rnn(x, inputs=given, mask=mask)[0], expected)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "expected a dict of k, l"),
        ({"k": torch.zeros(4, 3, 5)}, "expected k, l, got k"),
        (
            {"k": torch.zeros(4, 3, 5), "l": torch.zeros(4, 3, 4)},
            r"inputs\['l'\]: expected a tensor",
        ),
        ([{}, {}], "for each of 1 layers, got 2"),
    ],
)
def test_bad_inputs(inputs, message):
    with pytest.raises(ValueError, match=message):
        Mixed(6, 5)(torch.zeros(4, 3, 6), inputs=inputs)
    with pytest.raises(ValueError, match="expected None for OwnGRU"):
        OwnGRU(6, 5)(torch.zeros(4, 3, 6), inputs={})


def test_bad_states():
    rnn, x = OwnLSTM(6, 5), torch.zeros(4, 3, 6)
    with pytest.raises(RuntimeError, match=r"hx: expected \(h, c\), got 1"):
        rnn(x, (torch.zeros(1, 3, 5),))
    with pytest.raises(
        RuntimeError, match=r"Expected hidden\[0\] size \(1, 3, 5\), got \[2, 3, 5\]"
    ):
        rnn(x, (torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size"):
        rnn(x, (torch.zeros(1, 3, 5), torch.zeros(1, 3, 4)))


# The kernels


@pytest.mark.parametrize("cls", [Mixed, *GALLERY], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layers", [1, 2])
def test_derivatives(cls, layers, directions):
    """gradcheck and gradgradcheck, with every mask, with and without resets."""
    _differentiate(cls, "cpu", layers, directions)


@pytest.mark.parametrize("cls", [OwnLSTM, OwnGRU, Mixed, *GALLERY], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_equals_function(cls, dtype):
    _compare(cls, dtype, "cpu", 1, 2)
    _compare(cls, dtype, "cpu", 2, 1)
    assert _kernels._found[cls.definition.mode, dtype, _kernels.CPU], (
        "there was no kernel to compare"
    )


@fastrnn.cell(gates=("a", "b"), recurrent=("a",))
def Everything(x, r, h, s):
    """All functions that a cell may use."""
    p, q = torch.abs(x.a) + 0.1, x.b
    a = F.softplus(q) + F.silu(q) + F.gelu(q) + F.gelu(q, approximate="tanh") + F.elu(q)
    a = a + torch.clamp(q, min=-1, max=0.5) + q**2 + q**3 + p**0.5 + p**1.7 + p**-2
    a = a + F.logsigmoid(q) + F.relu(q) + F.relu6(q) + F.hardtanh(q) + F.leaky_relu(q, 0.1)
    a = a + torch.maximum(q, p) + torch.minimum(q, h) + F.softsign(q) + F.mish(q)
    a = a + torch.where((q > 0) & ~(p < q) | (q <= -1), q, 0.5) + abs(q) + torch.sign(q) * q
    a = a + torch.rsqrt(p) + torch.sqrt(p) + torch.sin(q) + torch.cos(q) + torch.log1p(p)
    a = a + torch.expm1(q) + torch.log(p) + torch.erf(q) + torch.reciprocal(p) + 2 / p - q
    a = a + torch.exp(q) + torch.square(q) + (1 - q) + (-q) + torch.neg(q) + r.a
    return torch.tanh(0.1 * a + s), torch.sigmoid(h + q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_functions(dtype):
    _compare(Everything, dtype, "cpu", 1, 2)
    assert _kernels._found[Everything.definition.mode, dtype, _kernels.CPU]


@fastrnn.cell(gates=("a",), recurrent=())
def Extremes(x, r, h):
    y = torch.exp(x.a) + torch.expm1(x.a)
    return torch.where(x.a > 0, torch.log(x.a) + torch.log1p(x.a), torch.log(-x.a)) + 0 * h - y


def test_functions_at_their_limits():
    rnn = Extremes(1, 1, bias=False)
    torch.nn.init.ones_(rnn.weight_ih_l0)
    values = [0.0, -0.0, 1e-40, -1e-40, 1e-30, 1e30, -1e30, 90, -90, -104, torch.inf, -torch.inf]
    values += [torch.nan, 1.0, 1 + 1e-6, 3e-8]
    x = torch.tensor(values).view(1, -1, 1)
    own = rnn(x)[0].flatten()
    space = type("Gates", (), {})()
    space.a = x.flatten()
    right = Extremes.definition.function(space, None, torch.zeros(len(values)))
    torch.testing.assert_close(own, right, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    rnn = Mixed(6, 21, bidirectional=True, dtype=dtype)
    x = torch.randn(5, 3, 6)
    inputs = {name: torch.randn(5, 3, 42) for name in "kl"}
    exact = copy.deepcopy(rnn).float()
    results = []
    for module, kind in ((rnn, dtype), (exact, torch.float32)):
        given = {name: z.to(kind) for name, z in inputs.items()}
        output, _ = module(x.to(kind), inputs=given)
        output.float().square().sum().backward()
        results.append((output, [p.grad for p in module.parameters()]))
    torch.testing.assert_close(results[0][0].float(), results[1][0], rtol=0.05, atol=0.05)
    for (name, _), own, right in zip(rnn.named_parameters(), results[0][1], results[1][1]):
        error = (own.float() - right).norm() / right.norm()
        assert error < 0.05, name


@pytest.mark.parametrize("threads", [1, 2])
def test_results_do_not_depend_on_threads(threads):
    torch.manual_seed(0)
    rnn, x = cells.PeepholeLSTM(64, 256), torch.randn(20, 32, 64)
    before = torch.get_num_threads()
    grads = []
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            rnn.zero_grad()
            rnn(x)[0].square().sum().backward()
            grads.append([p.grad.clone() for p in rnn.parameters()])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *grads))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_transforms():
    rnn = OwnGRU(3, 4, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in rnn.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(rnn, parameters, (x,))[0].square().sum()

    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(2):
        own = torch.func.grad(loss)(parameters, x[i])
        for name in parameters:
            torch.testing.assert_close(each[name][i], own[name])
    tangent = torch.randn_like(x[0])
    _, change = torch.func.jvp(lambda x: loss(parameters, x), (x[0],), (tangent,))
    gradient = torch.func.grad(loss, 1)(parameters, x[0])
    torch.testing.assert_close(change, (gradient * tangent).sum())


def test_compile():
    rnn, x = cells.PeepholeLSTM(6, 5), torch.randn(7, 3, 6)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    expected, own = rnn(x), compiled(x)
    torch.testing.assert_close(own, expected)
    own[0].sum().backward()
    grads = [p.grad.clone() for p in rnn.parameters()]
    rnn.zero_grad()
    expected[0].sum().backward()
    torch.testing.assert_close(grads, [p.grad for p in rnn.parameters()])


def test_autocast():
    rnn, x = OwnLSTM(6, 5), torch.randn(7, 3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = rnn(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), rnn(x)[0], rtol=0.05, atol=0.05)


# The header


def test_what_backward_saves():
    _kernels.load(OwnLSTM.definition.mode, torch.float32)
    _kernels.load(OwnGRU.definition.mode, torch.float32)
    assert CELLS[OwnLSTM.definition.mode].saves == CELLS["LSTM"].saves == 4
    assert CELLS[OwnGRU.definition.mode].saves == 4  # z, r, n and W_hn h + b_hn
    assert not CELLS[OwnLSTM.definition.mode].splits_gradient
    assert CELLS[OwnGRU.definition.mode].splits_gradient


def test_header_has_the_names_of_the_function():
    text = generate(cells.PeepholeLSTM.definition)
    assert "const V f = sigmoid(x_f + r_f + w_f * c_prev);" in text
    assert "saves = 4;" in text


def test_header_by_hand(tmp_path):
    right = generate(OwnGRU.definition).replace("OwnGRU", "ByHand")
    wrong = right.replace("dx_[1] = ", "dx_[1] = V(1.01) * ")
    assert wrong != right

    def ByHand(x, r, h):
        return OwnGRU.definition.function(x, r, h)

    for name, text in (("right.h", right), ("wrong.h", wrong)):
        (tmp_path / name).write_text(text)
    options = {"gates": ("r", "z", "n")}
    good = fastrnn.cell(**options, header=tmp_path / "right.h")(ByHand)
    bad = fastrnn.cell(**options, header=tmp_path / "wrong.h")(ByHand)
    lines = []
    fastrnn.check_cell(good, print=lines.append)
    assert [line.split(":")[0] for line in lines] == [
        "ByHand on cpu, float32",
        "ByHand on cpu, float64",
        "ByHand on cpu, float64",
    ]
    with pytest.raises(AssertionError, match="ByHand: gradient of x differs by"):
        fastrnn.check_cell(bad)


def test_check_cell_takes_cells_alone():
    with pytest.raises(TypeError, match=r"made by fastrnn\.cell"):
        fastrnn.check_cell(torch.nn.LSTM)


# Compiling, and the cache

PROGRAM = """
import sys, torch, fastrnn
@fastrnn.cell(gates=("a",))
def Cached(x, r, h):
    return torch.tanh(x.a + r.a) * {factor}
torch.manual_seed(0)
rnn = Cached(3, 4)
x = torch.randn(5, 2, 3)
own = rnn(x)[0]
h = torch.zeros(2, 4)
for t in range(5):
    a = x[t] @ rnn.weight_ih_l0.t() + rnn.bias_ih_l0 + h @ rnn.weight_hh_l0.t() + rnn.bias_hh_l0
    h = torch.tanh(a) * {factor}
    torch.testing.assert_close(own[t], h)
"""


def start(cache, factor=1.0, limit=None, **environment):
    """A process that uses a cell, compiled in a directory; limit: bytes that a file may have."""
    environment = {**os.environ, "FASTRNN_CACHE": str(cache), **environment}
    program = PROGRAM.format(factor=factor)
    if limit is not None:
        program = (
            f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)\n{program}"
        )
    arguments = [sys.executable, "-W", "always", "-c", program]
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


@pytest.fixture
def counting_compiler(tmp_path):
    """A compiler that writes a line each time, and the file with the lines."""
    log, script = tmp_path / "log", tmp_path / "c++"
    script.write_text(f'#!/bin/sh\necho run >> {log}\nexec c++ "$@"\n')
    script.chmod(0o700)
    return str(script), log


def test_many_processes_compile_once(tmp_path, counting_compiler):
    compiler, log = counting_compiler
    for process in [start(tmp_path / "cache", CXX=compiler) for _ in range(16)]:
        finish(process)
    assert log.read_text() == "run\n"
    finish(start(tmp_path / "cache", CXX=compiler))
    assert log.read_text() == "run\n", "a later process compiled again"
    finish(start(tmp_path / "cache", factor=2.0, CXX=compiler))
    assert log.read_text() == "run\nrun\n", "a changed cell took the kernel of another"
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    # What cannot be loaded is compiled again.
    for kernel in (tmp_path / "cache").glob("*.so"):
        kernel.write_bytes(kernel.read_bytes()[:100])
    finish(start(tmp_path / "cache", CXX=compiler))
    assert log.read_text() == "run\nrun\nrun\n"


def test_without_a_compiler(tmp_path):
    errors = finish(start(tmp_path / "cache", CXX="/nonexistent/c++"))
    assert errors.count("RuntimeWarning: fastrnn: Cached has no kernel") == 1
    assert "there is no C++ compiler" in errors
    assert "c++ failed" not in finish(start(tmp_path / "cache"))


def test_with_a_broken_compiler(tmp_path):
    errors = finish(start(tmp_path / "cache", CXX="false"))
    assert "false failed" in errors


def test_without_room_for_a_kernel(tmp_path):
    errors = finish(start(tmp_path / "cache", limit=2000))
    assert errors.count("RuntimeWarning: fastrnn: Cached has no kernel") == 1
    assert not list((tmp_path / "cache").glob("*.so"))
    assert "has no kernel" not in finish(start(tmp_path / "cache"))


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is read-only for root")
def test_read_only_cache(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    assert "has no kernel" not in finish(start(tmp_path / "cache"))


def test_cache_that_is_a_file(tmp_path):
    (tmp_path / "cache").write_text("")
    assert "has no kernel" not in finish(start(tmp_path / "cache"))


def test_refuses_a_directory_of_others(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    process = start(tmp_path / "cache")
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "expected a directory that only its owner may write to, got mode 777" in errors


def test_command_line(tmp_path):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        import torch, fastrnn
        @fastrnn.cell(gates=("a",))
        def Ahead(x, r, h):
            return torch.tanh(x.a + r.a)
        """)
    )
    command = [sys.executable, "-m", "fastrnn", "compile", "mine:Ahead", "-o", "out"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--dtype", "float32"], **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Ahead, float32: ")
    assert [path.suffix for path in sorted((tmp_path / "out").glob("Ahead*.so"))] == [".so"]
    wrong = subprocess.run([*command[:4], "mine:Nothing", "-o", "out"], **options)
    assert wrong.returncode == 2
    assert "there is no cell Nothing in mine" in wrong.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_command_line_for_gpus(tmp_path):
    """nvcc compiles what the generator writes; tests/cuda runs it."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        import torch, fastrnn
        @fastrnn.cell(gates=("a",), recurrent=())
        def Ahead(x, r, h, *, u):
            return torch.where(x.a > 0, torch.expm1(x.a) + 2**0.5, float("inf")) * u * h
        """)
    )
    command = [sys.executable, "-m", "fastrnn", "compile", "mine:Ahead", "-o", "out"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--dtype", "float64", "--cuda", "80,90"], **options)
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "out").glob("Ahead*-sm_80-sm_90-float64-*.so")
    assert b"fastrnn_cell" in made.read_bytes()
    wrong = subprocess.run([*command, "--cuda", "9.0"], **options)
    assert wrong.returncode == 2
    assert "expected numbers from 75 on, such as 80,90, got 9.0" in wrong.stderr


def test_no_warnings_with_a_kernel():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OwnLSTM(3, 4)(torch.randn(2, 1, 3))
    assert Path(_kernels.cache_directory()).exists()


# torch's tools


@pytest.mark.parametrize("tool", ["export", "trace", "symbolic_trace", "compile"])
def test_tools(tool, tmp_path, monkeypatch):
    """The first call of a cell, for which its kernel is made, is one of the tool's."""
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path))

    def step(x, r, h):
        return torch.tanh(x.a + r.a) - 0.1 * h

    step.__name__ = f"Under_{tool}"
    model = torch.nn.Sequential(fastrnn.cell(gates=("a",))(step)(3, 4))
    x = torch.randn(5, 2, 3)
    tools = {
        "export": lambda: torch.export.export(model, (x,)).module(),
        "trace": lambda: torch.jit.trace(model, x),
        "symbolic_trace": lambda: torch.fx.symbolic_trace(model),
        "compile": lambda: torch.compile(model, backend="aot_eager", fullgraph=True),
    }
    with warnings.catch_warnings():
        for category in (DeprecationWarning, torch.jit.TracerWarning):  # torch's own
            warnings.filterwarnings("ignore", category=category)
        made = tools[tool]()
    output, h_n = made(x)
    assert any(tmp_path.glob("*.so"))
    torch.testing.assert_close((output, h_n), model(x), rtol=0, atol=0)


def test_defined_again_after_its_kernel_was_loaded():
    """As in a notebook: what the kernel saves for backward is not forgotten."""

    def define():
        @fastrnn.cell(gates=("f", "n"))
        def Again(x, r, h, c, *, w=0.0):
            c = torch.sigmoid(x.f + r.f + w * c) * c + torch.tanh(x.n + r.n)
            return torch.tanh(c), c

        return Again

    first = define()
    rnn, x = first(3, 4).double(), torch.randn(6, 2, 3).double()
    rnn(x)[0].sum().backward()
    saves = CELLS[first.definition.mode].saves
    assert saves > 0
    second = define()
    assert second.definition.mode == first.definition.mode
    assert CELLS[second.definition.mode].saves == saves
    again = second(3, 4).double()
    again.load_state_dict(rnn.state_dict())
    again(x)[0].sum().backward()
    for a, b in zip(again.parameters(), rnn.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_torch_compiles_after_cells_were_generated_at_once():
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(generate, [OwnLSTM.definition, OwnGRU.definition] * 2):
            pass
    compiled = torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_what_torch_has_no_class_for():
    model = torch.nn.Sequential(cells.MinGRU(3, 4))
    with pytest.raises(RuntimeError, match=r"MinGRU: torch\.jit\.script compiles torch\.nn's"):
        torch.jit.script(model)
    assert not fastrnn.replace(model, subclasses=True)
    (left,) = fastrnn.restore(model, all=True)
    assert left.new is None
    assert left.reason == "torch.nn has no such cell"
