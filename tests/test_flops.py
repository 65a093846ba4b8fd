"""torch.utils.flop_counter counts of our layers what it counts of the reference implementation."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import reference
from helpers import CELLS, inputs, make

T, B, INPUT, H, P = 5, 3, 7, 11, 4

LAYERS = [
    pytest.param(cell, options, id=f"{cell}-{name}")
    for name, options in {
        "plain": {},
        "no bias": {"bias": False},
        "two directions": {"bidirectional": True},
        "two layers": {"num_layers": 2},
        "both": {"num_layers": 2, "bidirectional": True},
        "projection": {"proj_size": P},
        "all": {"num_layers": 2, "bidirectional": True, "proj_size": P},
    }.items()
    for cell in CELLS
    if cell == "LSTM" or "proj_size" not in options
]


def count(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def by_reference(model, x, hx):
    options = {"num_layers": model.num_layers, "bidirectional": model.bidirectional}
    return reference.rnn(model.mode, x, hx, model._flat_weights, **options)


def requires_grad(x, hx, wanted):
    states = hx if isinstance(hx, tuple) else (hx,)
    for name, tensors in (("x", (x,)), ("hx", states)):
        for t in tensors:
            t.requires_grad_(name in wanted)


@pytest.mark.parametrize(("cell", "options"), LAYERS)
def test_forward(cell, options):
    model = make(fastrnn, cell, INPUT, H, **options)
    x, hx = inputs(model, T, B)
    with torch.no_grad():
        expected = count(lambda: by_reference(model, x, hx))
        assert expected > 0
        assert count(lambda: model(x, hx)) == expected
        assert count(lambda: model(x)) == expected


@pytest.mark.parametrize("wanted", ["", "x", "hx", "x hx"], ids=lambda w: w or "weights alone")
@pytest.mark.parametrize(("cell", "options"), LAYERS)
def test_forward_and_backward(cell, options, wanted):
    model = make(fastrnn, cell, INPUT, H, **options)
    x, hx = inputs(model, T, B)
    requires_grad(x, hx, wanted.split())
    expected = count(lambda: by_reference(model, x, hx)[0].sum().backward())
    assert count(lambda: model(x, hx)[0].sum().backward()) == expected


def test_frozen_weights():
    """Neither side multiplies for a gradient that nobody asks for."""
    model = make(fastrnn, "LSTM", INPUT, H, proj_size=P).requires_grad_(False)
    x, hx = inputs(model, T, B)
    requires_grad(x, hx, ["x", "hx"])
    expected = count(lambda: by_reference(model, x, hx)[0].sum().backward())
    assert count(lambda: model(x, hx)[0].sum().backward()) == expected


def test_rows_without_padding():
    """Only valid steps count."""
    model = make(fastrnn, "GRU", INPUT, H)
    x, hx = inputs(model, T, B)
    lengths = torch.tensor([5, 1, 3])
    every = count(lambda: model(x, hx))
    assert count(lambda: model(x, hx, lengths=lengths)) * T * B == every * int(lengths.sum())


@pytest.mark.parametrize("first", ["fastrnn", "torch.utils.flop_counter"])
def test_counter_may_be_imported_later(first):
    """And is not imported by fastrnn: with Triton it takes most of a second."""
    program = f"""
import sys, torch
import {first}
if {first!r} == "fastrnn":
    assert "torch.utils.flop_counter" not in sys.modules
import fastrnn
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fastrnn.GRU({INPUT}, {H})(torch.zeros({T}, {B}, {INPUT}))
print(counter.get_total_flops())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.split() == [str(2 * T * B * 3 * H * (INPUT + H))], result.stderr


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("rows", [1, 64])
def test_cells(cell, rows):
    """Small steps are torch's operators, large ones scans of one step."""
    model = getattr(fastrnn, cell)(128, 128)
    x, h = torch.randn(rows, 128), torch.randn(rows, 128, requires_grad=True)

    def step():
        state = model(x, (h, h) if cell == "LSTMCell" else h)
        (state[0] if cell == "LSTMCell" else state).sum().backward()

    forward = 2 * rows * (model.weight_ih.numel() + model.weight_hh.numel())
    assert count(step) == 2 * forward + 2 * rows * model.weight_hh.numel()
