"""Layers with weights of 8 bits, against sums of integers that are right by construction."""

import copy
import hashlib
import io
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import _cpu
from fastrnn._int8 import pack, quantize
from fastrnn._layer import CELLS, Layer

MODES = ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"]
# T, B, features, H: single ones; whole and broken groups of four, vectors and tiles
SIZES = [
    (2, 2, 1, 1),
    (5, 3, 7, 9),
    (4, 1, 64, 64),
    (3, 33, 65, 129),
    (1, 1, 300, 130),
    (300, 1, 6, 17),
]


def float_weights(mode: str, F: int, H: int, *, bias=True, directions=1, layers=1, proj=0):
    """Named as in torch.nn.RNNBase; rows of very different sizes, and one of zeros."""
    weights, G, P = {}, CELLS[mode].gates, proj or H
    for k in range(layers):
        for end in ("", "_reverse")[:directions]:
            features = F if k == 0 else directions * P
            shapes = {"weight_ih": (G * H, features), "weight_hh": (G * H, P)}
            if bias:
                shapes |= {"bias_ih": (G * H,), "bias_hh": (G * H,)}
            if proj:
                shapes |= {"weight_hr": (proj, H)}
            for name, shape in shapes.items():
                weight = torch.randn(shape) * shape[-1] ** -0.5
                if name.startswith("weight"):
                    weight *= torch.rand(shape[0], 1) * 2
                    weight[shape[0] // 2] *= shape[0] > 1
                weights[f"{name}_l{k}{end}"] = weight
    return weights


class Int8Layers:
    """The layers of an LSTM, GRU or RNN."""

    def __init__(self, mode: str, directions: int, layers: list[_cpu.Int8Layer]) -> None:
        self.mode, self.directions, self.layers = mode, directions, layers

    @classmethod
    def of(cls, mode: str, directions: int, count: int, weights: dict[str, Tensor]) -> "Int8Layers":
        """Of float weights, named and ordered as in torch.nn.RNNBase."""
        values, each = list(weights.values()), len(weights) // count
        parts = [values[k * each : (k + 1) * each] for k in range(count)]
        return cls(mode, directions, [pack(mode, directions, part) for part in parts])

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    def run(self, x, states, batch, batch_sizes=None, resets=None, all_states=False):
        """Output, final states, and of each layer, if asked for, the states of every step."""
        finals, sequences = [], []
        for k, layer in enumerate(self.layers):
            part = slice(k * self.directions, (k + 1) * self.directions)
            h_0, c_0 = (*(s[part].contiguous() for s in states or ()), None, None)[:2]
            own = x, h_0, c_0, (), batch_sizes, resets
            record = Layer.plain(self.mode, self.directions, batch, *own, all_c=all_states)
            x, h_n, c_n, extra, _ = layer.forward(record)
            finals.append((h_n,) if c_n is None else (h_n, c_n))
            if all_states:
                sequences.append(x if extra is None else extra)
        return x, tuple(map(torch.cat, zip(*finals))), sequences


def make(mode: str, F: int, H: int, *, layers=1, directions=1, **options) -> Int8Layers:
    weights = float_weights(mode, F, H, layers=layers, directions=directions, **options)
    return Int8Layers.of(mode, directions, layers, weights)


def states_of(layers: Int8Layers, B: int) -> tuple[Tensor, ...]:
    entries = layers.directions * len(layers.layers)
    h = torch.randn(entries, B, layers.layers[0].proj_size)
    c = torch.randn(entries, B, layers.layers[0].hidden_size)
    return (h, c) if CELLS[layers.mode].has_cell_state else (h,)


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bit for bit."""
    for i, (result, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(result, wanted), i


def run(layers: Int8Layers, x: Tensor, states=None, **options) -> list[Tensor]:
    """Output, final states and the states of every step."""
    batch = options.pop("batch", x.shape[1])
    output, final, sequences = layers.run(x, states, batch, all_states=True, **options)
    return [output, *final, *sequences]


# -- One step at a time, in integers ---------------------------------------------------------------


def product(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    most = rows.abs().amax(-1, keepdim=True)
    integers = torch.round(rows * torch.where(most == 0, most, 127 / most))
    sums = integers.long() @ weight.long().T
    return sums.float() * (most / 127) * scale


def step(layer, x: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """h and c after one step of a layer with a single direction."""
    weights, scales = layer.weights, layer.scales
    biases = weights[2:4] if len(weights) > 3 else (torch.zeros(()), torch.zeros(()))
    a = product(x, weights[0], scales[0]) + biases[0]
    r = product(h, weights[1], scales[1]) + biases[1]
    if layer.mode == "LSTM":
        i, f, g, o = (a + r).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (product(h, weights[-1], scales[-1]) if len(weights) % 2 else h), c
    if layer.mode == "GRU":
        (ar, az, an), (rr, rz, rn) = a.chunk(3, -1), r.chunk(3, -1)
        z = (az + rz).sigmoid()
        n = (an + (ar + rr).sigmoid() * rn).tanh()
        return n + z * (h - n), None
    return (torch.relu(a + r) if layer.mode == "RNN_RELU" else torch.tanh(a + r)), None


@pytest.mark.parametrize("with_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("mode", [*MODES, "projection"])
def test_each_step_is_that_of_integers(mode, sizes, bias, with_states):
    """From the states that the kernel left: so an error cannot hide behind rounding."""
    torch.manual_seed(0)
    T, B, F, H = sizes
    proj = max(1, H // 3) if mode == "projection" else 0
    layers = make("LSTM" if proj else mode, F, H, bias=bias, proj=proj)
    x = torch.randn(T, B, F)
    x[T // 2, B // 2] = 0
    given = states_of(layers, B) if with_states else None
    output, *final, every = run(layers, x, given)
    h, c = torch.zeros(B, proj or H), torch.zeros(B, H)
    if given is not None:
        h, c = given[0][0], given[-1][0]
    for t in range(T):
        expected_h, expected_c = step(layers.layers[0], x[t], h, c)
        if mode == "RNN_RELU":
            assert torch.equal(output[t], expected_h)
        elif proj:  # the h before it is only known up to rounding, which may move an integer
            torch.testing.assert_close(output[t], expected_h, atol=2e-2, rtol=0)
        else:
            torch.testing.assert_close(output[t], expected_h, atol=2e-6, rtol=2e-6)
        h = output[t]
        if expected_c is not None:
            torch.testing.assert_close(every[t], expected_c, atol=2e-6, rtol=2e-6)
            c = every[t]
    assert torch.equal(final[0][0], h)
    if len(final) > 1:
        assert torch.equal(final[1][0], c)


@pytest.mark.parametrize("depth", [8, 4096, 131072])
def test_the_largest_sums_are_exact(depth):
    """Every product is as large as can be: no instruction may saturate or wrap."""
    weight = torch.full((2, depth), 127, dtype=torch.int8)
    weight[1] = -127
    weights = weight, torch.zeros(2, 2, dtype=torch.int8)
    packed = _cpu.Int8Layer("RNN_RELU", 1, weights, (torch.ones(2), torch.zeros(2)))
    layer = Int8Layers("RNN_RELU", 1, [packed])
    for sign in (1, -1):
        for rows in (1, 2, 7):
            output, _, _ = layer.run(torch.full((1, rows, depth), sign * 127.0), None, rows)
            expected = torch.zeros(1, rows, 2)
            expected[..., 0 if sign > 0 else 1] = 127 * 127 * depth
            assert torch.equal(output, expected)


def test_rounding_is_to_even():
    weights = {"weight_ih_l0": torch.eye(6) * 127, "weight_hh_l0": torch.zeros(6, 6)}
    layers = Int8Layers.of("RNN_RELU", 1, 1, weights)
    x = torch.tensor([[[127.0, 0.5, 1.5, 2.5, 125.5, 3.49]]])
    output, _, _ = layers.run(x, None, 1)
    assert output[0, 0].tolist() == [127 * 127, 0, 2 * 127, 2 * 127, 126 * 127, 3 * 127]


# -- Rows, directions, layers ----------------------------------------------------------------------


@pytest.mark.parametrize("H", [5, 100])
@pytest.mark.parametrize("mode", [*MODES, "projection"])
def test_directions_and_layers_are_scans_of_their_own(mode, H):
    torch.manual_seed(1)
    proj, mode = (3, "LSTM") if mode == "projection" else (0, mode)
    weights = float_weights(mode, 6, H, directions=2, layers=2, proj=proj)
    both = Int8Layers.of(mode, 2, 2, weights)
    x, given = torch.randn(7, 4, 6), states_of(both, 4)
    output, *final, first, second = run(both, x, given)
    sequence, entry = x, 0
    for k, every in enumerate((first, second)):
        parts = []
        for end in ("", "_reverse"):
            own = {
                name.replace(f"_l{k}{end}", "_l0"): weight
                for name, weight in weights.items()
                if name.endswith(f"_l{k}{end}")
            }
            start = tuple(s[entry : entry + 1] for s in given)
            one = Int8Layers.of(mode, 1, 1, own)
            steps = sequence.flip(0) if end else sequence
            result, *last, states = run(one, steps, start)
            parts.append((result.flip(0), states.flip(0)) if end else (result, states))
            assert_same([s[entry : entry + 1] for s in final], last)
            entry += 1
        sequence, states = (torch.cat(p, -1) for p in zip(*parts))
        assert_same([every], [states])
    assert_same([output], [sequence])


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("mode", [*MODES, "projection"])
def test_rows_end_and_begin_anew_on_their_own(mode, directions):
    torch.manual_seed(2)
    proj, mode = (4, "LSTM") if mode == "projection" else (0, mode)
    layers = make(mode, 5, 20, directions=directions, proj=proj)
    lengths = [9, 9, 6, 3, 1, 0]
    B = len(lengths)
    x, given = torch.randn(9, B, 5), states_of(layers, B)
    starts = torch.rand(9, B) < 0.2
    batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(9)])
    valid = torch.arange(9)[:, None] < torch.tensor(lengths)
    output, *final, every = run(
        layers, x[valid], given, batch=B, batch_sizes=batch_sizes, resets=starts[valid]
    )
    # Back to [T, B, features].
    padded = [torch.zeros(9, B, s.shape[-1]) for s in (output, every)]
    for target, s in zip(padded, (output, every)):
        target[valid] = s
    for b, length in enumerate(lengths):
        own = [s[:, b : b + 1] for s in given]
        if length == 0:
            assert_same([s[:, b : b + 1] for s in final], own)
            continue
        row = x[:length, b : b + 1]
        marks = starts[:length, b : b + 1]
        output_b, *final_b, every_b = run(layers, row.contiguous(), own, resets=marks.contiguous())
        assert_same([p[:length, b : b + 1] for p in padded], [output_b, every_b])
        assert_same([s[:, b : b + 1] for s in final], final_b)
        # And segment by segment: the first from the initial states, the others from zeros.
        if directions == 1:
            cuts = [0, *(t for t in range(length) if marks[t] and t > 0), length]
            for begin, end in itertools.pairwise(cuts):
                start = own if begin == 0 and not marks[0] else None
                alone, *_ = run(layers, row[begin:end].contiguous(), start)
                assert_same([output_b[begin:end]], [alone])


@pytest.mark.parametrize("sizes", [(4, 40, 30, 70), (50, 3, 64, 256), (1, 9, 512, 512)], ids=str)
@pytest.mark.parametrize("mode", [*MODES, "projection"])
def test_no_bit_depends_on_batch_or_threads(mode, sizes):
    torch.manual_seed(3)
    T, B, F, H = sizes
    proj, mode = (H // 2, "LSTM") if mode == "projection" else (0, mode)
    layers = make(mode, F, H, directions=2, proj=proj)
    x, given = torch.randn(T, B, F), states_of(layers, B)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(layers, x, given)
        for count in (1, 2, 3, 4, 6):
            torch.set_num_threads(count)
            assert_same(run(layers, x, given), expected)
            for rows in (slice(0, 1), slice(1, 3), slice(2, B)):
                part = run(layers, x[:, rows].contiguous(), [s[:, rows] for s in given])
                assert_same(part, [s[:, rows] for s in expected])
            # A step at a time.
            states, outputs = given, []
            for t in range(T if mode == "GRU" else 0):
                one = Int8Layers.run(layers, x[t : t + 1], states, B)
                states, outputs = one[1], [*outputs, one[0][..., :H]]
            if outputs:
                assert torch.equal(torch.cat(outputs), expected[0][..., :H])
    finally:
        torch.set_num_threads(threads)


# -- Variants --------------------------------------------------------------------------------------


def results_hash() -> str:
    """Of layers that all variants must agree on."""
    digest = hashlib.sha256()
    torch.manual_seed(4)
    for mode in MODES:
        for sizes in [*SIZES, (6, 5, 200, 300)]:
            T, B, F, H = sizes
            layers = make(mode, F, H, directions=2, proj=2 if mode == "LSTM" and H > 2 else 0)
            for result in run(layers, torch.randn(T, B, F), states_of(layers, B)):
                digest.update(result.numpy().tobytes())
            for layer in layers.layers:
                for tensor in (*layer.weights, *layer.scales):
                    digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("variant", fastrnn.cpu_variants())
def test_all_variants_give_the_same_bits(variant):
    here = Path(__file__)
    code = "import test_int8; print(test_int8._cpu.int8_variant(), test_int8.results_hash())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=here.parent,
        env=os.environ | {"FASTRNN_CPU": variant},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    name, digest = done.stdout.split()
    assert name == ("avx512vnni" if variant == "avx512bf16" else variant)
    assert digest == results_hash()


@pytest.mark.parametrize("variant", fastrnn.cpu_variants())
def test_variant(variant):
    tests = "integers or exact or even or own"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-k",
            tests,
            __file__,
        ],
        env=os.environ | {"FASTRNN_CPU": variant},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# -- Numbers that are none, and errors -------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_bad_numbers_go_through_and_stay_in_their_row(mode, bad):
    torch.manual_seed(5)
    layers = make(mode, 40, 50)
    x = torch.randn(4, 5, 40)
    expected = run(layers, x)
    x[1, 2, 39] = bad
    output, *_ = run(layers, x)
    assert output[1:, 2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(output[:, others], expected[0][:, others])
    assert torch.equal(output[0], expected[0][0])


def test_tiny_rows_count_as_zero():
    layers = make("GRU", 9, 5)
    x = torch.full((1, 1, 9), 1e-38)
    assert_same(run(layers, x), run(layers, torch.zeros(1, 1, 9)))
    integers, scales = quantize("weight_ih_l0", torch.tensor([[1e-38, -1e-40], [2.0, -1.0]]))
    assert integers.tolist() == [[0, 0], [127, -64]]
    assert scales.tolist() == [0, torch.tensor(2 / 127).item()]


def parts(mode="LSTM", F=3, H=4, directions=1, proj=0):
    layers = make(mode, F, H, directions=directions, proj=proj)
    return [list(layers.layers[0].weights), list(layers.layers[0].scales)]


def with_part(index, i, value, **options):
    given = parts(**options)
    given[index][i] = value
    return given


@pytest.mark.parametrize(
    ("mode", "directions", "given", "words"),
    [
        ("MGU", 1, parts(), "mode: expected one of"),
        ("LSTM", 3, parts(), "directions: expected 1 or 2, got 3"),
        ("LSTM", 1, [None, []], "weights: expected a sequence"),
        ("LSTM", 1, [[], []], "weights: expected 2 to 5 tensors per direction, got 0"),
        ("LSTM", 2, parts(), "scales: expected 4 tensors, got 2"),
        ("LSTM", 1, with_part(0, 0, None), "weights: expected tensors, got None"),
        ("LSTM", 1, with_part(0, 0, torch.zeros(16, 3)), "weight_ih: expected a torch.int8"),
        (
            "LSTM",
            1,
            with_part(0, 0, torch.zeros(15, 3).char()),
            r"weight_ih: expected \[4 \* H, I\]",
        ),
        ("LSTM", 1, with_part(0, 1, torch.zeros(16, 5).char()), "weight_hh: expected a torch.int8"),
        ("LSTM", 1, with_part(0, 1, torch.full((16, 4), -128).char()), "weight_hh: .* got -128"),
        ("LSTM", 1, with_part(0, 2, torch.zeros(15)), "bias_ih: expected a torch.float32"),
        ("LSTM", 1, with_part(1, 0, torch.zeros(15)), "scales: expected a torch.float32"),
        ("LSTM", 1, with_part(1, 0, -torch.ones(16)), "scales: expected finite numbers, 0 or more"),
        ("LSTM", 1, [parts()[0], parts()[1][:1]], "scales: expected 2 tensors, got 1"),
        ("GRU", 1, parts(proj=2), "weight_hr: expected None for GRU"),
    ],
)
def test_errors_of_weights(mode, directions, given, words):
    with pytest.raises(ValueError, match=words):
        _cpu.Int8Layer(mode, directions, *given)


def test_too_deep():
    weights = [torch.zeros(1, 131073).char(), torch.zeros(1, 1).char()]
    with pytest.raises(ValueError, match="weight_ih: expected at most 131072 columns, got 131073"):
        _cpu.Int8Layer("RNN_TANH", 1, weights, [torch.ones(1), torch.ones(1)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "GRU"}, "mode: expected LSTM, got GRU"),
        ({"directions": 2}, "directions: expected 1, got 2"),
        ({"x": torch.zeros(2, 5, 3).double()}, "x: expected torch.float32, got torch.float64"),
        ({"x": torch.zeros(2, 5, 4)}, "x: expected 3 features"),
        ({"x": torch.zeros(2, 4, 3)}, r"x: expected \[T, 5, features\]"),
        ({"x": None}, "x: expected a tensor, got NoneType"),
        ({"h_0": torch.zeros(1, 5, 3)}, "h_0: expected a torch.float32 tensor of shape"),
        ({"c_0": torch.zeros(1, 4, 4)}, "c_0: expected a torch.float32 tensor of shape"),
        ({"keep": True}, "keep: expected False"),
        ({"batch_sizes": torch.tensor([5, 5])}, r"x: expected \[N, features\]"),
        ({"resets": torch.zeros(2, 4).bool()}, "resets: expected a torch.bool tensor"),
    ],
)
def test_errors_of_a_call(change, words):
    layer = make("LSTM", 3, 4).layers[0]
    record = Layer.plain("LSTM", 1, 5, torch.zeros(2, 5, 3), None, None, ())
    assert layer.forward(record)[0].shape == (2, 5, 4)
    with pytest.raises(ValueError, match=words):
        layer.forward(record._replace(**change))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_errors_of_quantize(bad):
    with pytest.raises(ValueError, match="weight_hh_l0: expected finite numbers"):
        quantize("weight_hh_l0", torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match="weight_hh_l0: expected a float tensor on cpu"):
        quantize("weight_hh_l0", torch.zeros(2, 2).long())


@pytest.mark.parametrize("mode", MODES)
def test_nothing_in_nothing_out(mode):
    layers = make(mode, 3, 4, directions=2)
    output, *final, every = run(layers, torch.zeros(2, 0, 3))
    assert output.shape == (2, 0, 8)
    assert every.shape == output.shape
    states = states_of(layers, 3)
    none = torch.zeros(0, dtype=torch.int64)
    output, *final, every = run(layers, torch.zeros(0, 3), states, batch=3, batch_sizes=none)
    assert output.shape == (0, 8)
    assert_same(final, states)


# -- Modules ---------------------------------------------------------------------------------------


def test_weights_take_a_quarter():
    model = fastrnn.LSTM(256, 512, 2)
    layers = Int8Layers.of("LSTM", 1, 2, dict(model.named_parameters()))
    floats = sum(p.nbytes for p in model.parameters())
    assert floats / 4 < layers.bytes < floats / 3.8


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_module_runs_on_them(name, batch_first):
    torch.manual_seed(9)
    T, B = 7, 4
    model = getattr(fastrnn, name)(5, 12, 2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(B, T, 5) if batch_first else torch.randn(T, B, 5)
    with torch.no_grad():
        floats = model(x)
        layers = Int8Layers.of(model.mode, 2, 2, dict(model.named_parameters()))
        fastrnn.freeze(model.eval(), torch.int8)
        output, final = model(x)
        by_step = x.transpose(0, 1) if batch_first else x
        expected, states, _ = layers.run(by_step, None, B)
        assert torch.equal(output.transpose(0, 1) if batch_first else output, expected)
        assert_same(final if name == "LSTM" else [final], states)
        # Lengths, masks, resets and packed sequences are the module's own, and rows stay what they
        # are alone.
        dim = 0 if batch_first else 1
        lengths = [7, 2, 0, 5]
        padded, last, _ = model(x, lengths=lengths, return_states=True)
        for b, length in enumerate(lengths):
            if length == 0:
                assert not padded.select(dim, b).any()
                continue
            row = x.select(dim, b)[:length]
            alone, last_alone = model(row)  # unbatched
            assert torch.equal(padded.select(dim, b)[:length], alone)
            firsts = last if name == "LSTM" else [last]
            alones = last_alone if name == "LSTM" else [last_alone]
            assert_same([s[:, b] for s in firsts], alones)
        reset = torch.zeros(x.shape[:2], dtype=torch.bool)
        reset.select(1 - dim, 3)[:] = True
        halves = [model(x.narrow(1 - dim, *part))[0] for part in ((0, 3), (3, T - 3))]
        assert torch.equal(model(x, reset=reset)[0], torch.cat(halves, 1 - dim))
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, [7, 5, 2, 1], batch_first=batch_first)
        unpacked, _ = torch.nn.utils.rnn.pad_packed_sequence(model(packed)[0], batch_first)
        assert torch.equal(unpacked, model(x, lengths=[7, 5, 2, 1])[0])
        # A wrong call has the words of torch.nn.
        with pytest.raises(RuntimeError, match=r"input\.size"):
            model(torch.randn(2, 2, 6))
        again = copy.deepcopy(model)
        assert torch.equal(again(x)[0], output)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x)[0], output)
        fastrnn.unfreeze(model)
        assert torch.equal(model(x)[0], floats[0])


def test_unpacked_weights_are_those_that_were_packed():
    torch.manual_seed(6)
    weights = float_weights("LSTM", 5, 7, directions=2, proj=3)
    layer = pack("LSTM", 2, list(weights.values()))
    scales = iter(layer.scales)
    for weight, stored in zip(weights.values(), layer.weights, strict=True):
        if weight.dim() == 1:
            assert torch.equal(stored, weight)
            continue
        scale = next(scales)
        assert stored.dtype == torch.int8
        assert ((stored * scale[:, None] - weight).abs() <= scale[:, None] * 0.501).all()
        assert torch.equal(scale, weight.abs().amax(1) / 127)


# -- Beside float32 --------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [64, 512])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_error_of_a_layer_with_initial_weights(name, hidden):
    torch.manual_seed(7)
    model = getattr(fastrnn, name)(hidden, hidden)
    layers = Int8Layers.of(model.mode, 1, 1, dict(model.named_parameters()))
    x = torch.randn(50, 4, hidden)
    with torch.no_grad():
        expected, _ = model(x)
    output, _, _ = layers.run(x, None, 4)
    error = (output - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-4 < error < 0.02


def text() -> tuple[Tensor, int]:
    """The project's own prose as numbers of characters, and how many there are."""
    root = Path(__file__).parents[1]
    prose = "".join(
        path.read_text(encoding="utf-8") for path in (root / "README.md", root / "CHANGELOG.md")
    )
    characters = sorted(set(prose))
    return torch.tensor([characters.index(c) for c in prose]), len(characters)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_loss_of_a_character_model_within_one_percent(name):
    torch.manual_seed(8)
    characters, count = text()
    T, B, H = 50, 32, 96
    held_out = characters[-T * 40 - 1 :]
    training = characters[: -T * 40 - 1]
    embed, head = torch.nn.Embedding(count, 32), torch.nn.Linear(H, count)
    model = getattr(fastrnn, name)(32, H, 2)
    parameters = [*embed.parameters(), *model.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    loss_of = torch.nn.functional.cross_entropy
    for _ in range(150):
        begin = torch.randint(len(training) - T - 1, (B,))
        window = training[begin + torch.arange(T + 1)[:, None]]
        output, _ = model(embed(window[:-1]))
        loss = loss_of(head(output).flatten(0, 1), window[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    layers = Int8Layers.of(model.mode, 1, 2, dict(model.named_parameters()))
    inputs, targets = held_out[:-1].view(40, T).t(), held_out[1:].view(40, T).t()
    losses = []
    with torch.no_grad():
        for forward in (model, partial(layers.run, states=None, batch=40)):
            output = forward(embed(inputs))[0]
            losses.append(loss_of(head(output).flatten(0, 1), targets.flatten()).item())
    assert losses[0] < 2.6  # it has learnt
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
