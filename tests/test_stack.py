"""Deep models whose layers run side by side, a few steps apart: csrc/cpu/forward_stack.h."""

import pytest
import torch

import fastrnn
from fastrnn._layer import Layer
from fastrnn._load import _cpu
from helpers import assert_same_bits

# Steps, rows, features, units and layers.
SHAPES = [
    (200, 1, 20, 64, 4),
    (61, 4, 128, 128, 2),
    (101, 3, 7, 33, 3),
    (64, 2, 40, 200, 5),
]
MODELS = {"LSTM": fastrnn.LSTM, "GRU": fastrnn.GRU, "RNN": fastrnn.RNN}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def plan(model, steps: int, batch: int) -> tuple[int, int, int]:
    weights = tuple(model.all_weights[-1])
    x = torch.zeros(steps, batch, model.hidden_size, dtype=weights[0].dtype)
    layer = Layer.plain(model.mode, 1, batch, x, None, None, weights, keep=False, all_c=False)
    return _cpu.plan_stack(layer, model.num_layers)


def run(model, *args) -> dict[str, torch.Tensor]:
    output, states = model(*args)
    states = states if isinstance(states, tuple) else (states,)
    return dict(zip(("output", "h_n", "c_n"), (output, *states)))


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", MODELS)
def test_same_bits_as_one_after_the_other(cell, shape, dtype, count):
    steps, batch, features, hidden, layers = shape
    torch.manual_seed(0)
    model = MODELS[cell](features, hidden, layers, dtype=dtype)
    x = torch.randn(steps, batch, features, dtype=dtype)
    states = [torch.randn(layers, batch, hidden, dtype=dtype) for _ in range(1 + (cell == "LSTM"))]
    hx = tuple(states) if cell == "LSTM" else states[0]
    for args in ((x,), (x, hx)):
        with torch.no_grad():
            torch.set_num_threads(1)
            expected = run(model, *args)
            torch.set_num_threads(count)
            assert_same_bits(run(model, *args), expected)


@pytest.mark.skipif("avx512" not in _cpu.cpu_variant(), reason="figures of AVX-512")
@pytest.mark.parametrize("cell", MODELS)
def test_plan(cell):
    """Small models take it, with rows divided where there are more threads than layers; not those
    that keep all threads busy by themselves, nor single layers or short sequences."""
    torch.set_num_threads(2)
    model = MODELS[cell](64, 64, 2)
    assert plan(model, 400, 2)[:2] == (2, 1)
    assert plan(model, 24, 2)[0] == 1
    assert plan(MODELS[cell](64, 64), 400, 2)[0] == 1
    assert plan(MODELS[cell](512, 512, 2), 400, 64)[0] == 1
    torch.set_num_threads(8)
    assert plan(model, 400, 16)[:2] == (8, 4)
    torch.set_num_threads(1)
    assert plan(model, 400, 2)[0] == 1


def test_cell_of_the_users_own():
    torch.manual_seed(0)
    model = fastrnn.cells.MGU(16, 64, 3)
    x = torch.randn(120, 2, 16)
    torch.set_num_threads(2)
    with torch.no_grad():
        found = run(model, x)
        torch.set_num_threads(1)
        assert_same_bits(found, run(model, x))
