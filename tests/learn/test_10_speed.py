"""Solutions to the exercises of docs/learn/10-speed.md."""

from math import ceil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastrnn

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def operations(cell, T, B, I, H, layers=1, directions=1):
    """An upper layer reads the outputs of both directions."""
    inputs = I + (layers - 1) * directions * H
    return 2 * T * B * GATES[cell] * H * directions * (inputs + layers * H)


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("directions", [1, 2])
def test_1_operations(cell, layers, directions):
    T, B, I, H = 7, 3, 5, 8
    rnn = getattr(fastrnn, cell)(I, H, num_layers=layers, bidirectional=directions == 2)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        rnn(torch.randn(T, B, I))
    assert counter.get_total_flops() == operations(cell, T, B, I, H, layers, directions)


def smallest_batch(P, M, bytes_of_weight=4):
    """A step's product with W_hh: 2 B operations for each weight."""
    return ceil(P / M * bytes_of_weight / 2)


def test_2_ridge():
    P, M = 100e9, 30e9
    for size in (4, 2):
        B = smallest_batch(P, M, size)
        seconds = [(2 * b / P, size / M) for b in (B - 1, B)]  # of a weight: arithmetic, reading
        assert seconds[0][0] < seconds[0][1]
        assert seconds[1][0] >= seconds[1][1]
    assert smallest_batch(P, M) == 7
    assert smallest_batch(P, M, 2) == 4  # half as much to read, so half the batch will do


def test_3_diagonals():
    T, B, H, L = 9, 2, 4, 3
    deep, x = fastrnn.GRU(H, H, num_layers=L), torch.randn(T, B, H)
    cells = [fastrnn.GRUCell(H, H) for _ in range(L)]
    for k, cell in enumerate(cells):
        cell.load_state_dict({name: getattr(deep, f"{name}_l{k}") for name in cell.state_dict()})
    h = {(k, -1): torch.zeros(B, H) for k in range(L)} | {(-1, t): x[t] for t in range(T)}
    diagonals = 0
    for d in range(T + L - 1):
        ready = [(k, d - k) for k in range(L) if 0 <= d - k < T]
        h |= {(k, t): cells[k](h[k - 1, t], h[k, t - 1]) for k, t in ready}  # none needs another
        diagonals += 1
    torch.testing.assert_close(torch.stack([h[L - 1, t] for t in range(T)]), deep(x)[0])
    assert diagonals == T + L - 1 < T * L
