"""The reference implementation itself: one step by hand, then whole models against torch.nn."""

import numpy as np
import pytest
import torch
from torch import nn

from fastrnn import reference
from helpers import (
    MASKS,
    assert_close,
    inputs,
    make,
    make_mask,
    pair,
    row_by_row,
    run,
    unpack,
)

B = 3


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def elman_by_hand(x, h, w_ih, w_hh, b_ih, b_hh):
    return np.tanh(x @ w_ih.T + b_ih + h @ w_hh.T + b_hh)


def relu_by_hand(x, h, w_ih, w_hh, b_ih, b_hh):
    return np.maximum(x @ w_ih.T + b_ih + h @ w_hh.T + b_hh, 0)


def gru_by_hand(x, h, w_ih, w_hh, b_ih, b_hh):
    x_r, x_z, x_n = np.split(x @ w_ih.T + b_ih, 3, axis=1)
    h_r, h_z, h_n = np.split(h @ w_hh.T + b_hh, 3, axis=1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = np.tanh(x_n + r * h_n)
    return n + z * (h - n)


def lstm_by_hand(x, h, c, w_ih, w_hh, b_ih, b_hh):
    i, f, g, o = np.split(x @ w_ih.T + b_ih + h @ w_hh.T + b_hh, 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def step(mode, x, hx, weights):
    if mode == "LSTM":
        return reference.lstm_cell(x, hx, *weights)
    if mode == "GRU":
        return reference.gru_cell(x, hx, *weights)
    return reference.elman_cell(x, hx, *weights, nonlinearity=mode.removeprefix("RNN_").lower())


BY_HAND = {
    "LSTM": lstm_by_hand,
    "GRU": gru_by_hand,
    "RNN_TANH": elman_by_hand,
    "RNN_RELU": relu_by_hand,
}


def test_one_step_by_hand(cell):
    model = make(nn, cell, 4, 5, dtype=torch.float64)
    x, hx = inputs(model, 1, B)
    weights = [p.detach() for p in model.parameters()]
    states = [h[0] for h in unpack(hx)]
    actual = unpack(step(cell, x[0], tuple(states) if cell == "LSTM" else states[0], weights))
    expected = BY_HAND[cell](*(t.numpy() for t in (x[0], *states, *weights)))
    np.testing.assert_allclose(np.stack([a.numpy() for a in actual]).squeeze(), expected, 1e-14)


def test_elman_cell_is_tanh_by_default():
    tensors = [torch.randn(2, 2) for _ in range(4)] + [torch.randn(2) for _ in range(2)]
    assert torch.equal(
        reference.elman_cell(*tensors), reference.elman_cell(*tensors, nonlinearity="tanh")
    )


def by_reference(model):
    def forward(x, hx, mask=None):
        return reference.rnn(
            model.mode,
            x,
            hx,
            model._flat_weights,
            num_layers=model.num_layers,
            bidirectional=model.bidirectional,
            mask=mask,
        )

    return forward


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_against_torch(cell, dtype, num_layers, bidirectional, bias, hx):
    options = {"bias": bias, "bidirectional": bidirectional, "dtype": dtype}
    model = make(nn, cell, 4, 5, num_layers, **options)
    x, hx = inputs(model, 6, B, hx=hx)
    assert_close(run(model, x, hx, forward=by_reference(model)), run(model, x, hx))


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("kind", MASKS)
def test_mask_against_rows_alone(cell, bidirectional, kind, hx):
    model = make(nn, cell, 4, 5, 2, bidirectional=bidirectional, dtype=torch.float64)
    x, hx = inputs(model, 6, B, hx=hx)
    mask = make_mask(kind, 6, B)
    actual = run(model, x, hx, forward=by_reference(model), mask=mask)
    assert_close(actual, run(model, x, hx, forward=row_by_row(model), mask=mask))


def test_padding_is_never_read(cell):
    model = make(nn, cell, 4, 5, 2, bidirectional=True, dtype=torch.float64)
    x, hx = inputs(model, 6, B)
    mask = make_mask("holes", 6, B)
    clean, dirty = (x.masked_fill(~mask[..., None], value) for value in (0.0, torch.nan))
    expected = run(model, clean, hx, forward=by_reference(model), mask=mask)
    assert_close(run(model, dirty, hx, forward=by_reference(model), mask=mask), expected, 0.0)


def test_runs_in_any_dtype(cell):
    _, model = pair(cell, 4, 5, 2, bidirectional=True, dtype=torch.bfloat16)
    x, hx = inputs(model, 6, B)
    actual, expected = run(model, x, hx, forward=by_reference(model)), run(model, x, hx)
    assert_close(actual, expected, 0.05)
