"""Solutions to the exercises of docs/learn/01-recurrence.md."""

from math import log

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

import fastrnn

INPUTS, TARGETS = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 2, 2, 3])  # hell, ello


def parameters(I, H, L=1):
    """W_ih, W_hh and two biases; above the first layer, H inputs."""
    return H * I + H * H + 2 * H + (L - 1) * (H * H + H * H + 2 * H)


@pytest.mark.parametrize(("I", "H", "L"), [(3, 5, 1), (1, 1, 1), (7, 4, 3)])
def test_1_parameters(I, H, L):
    rnn = fastrnn.RNN(I, H, num_layers=L)
    assert sum(p.numel() for p in rnn.parameters()) == parameters(I, H, L)


def test_2_letter_by_letter():
    rnn, readout = fastrnn.RNN(4, 8), torch.nn.Linear(8, 4)
    x = one_hot(INPUTS, 4).to(torch.float64).unsqueeze(1)
    whole = torch.softmax(readout(rnn(x)[0]), -1)
    state, parts = None, []
    for letter in x:
        output, state = rnn(letter.unsqueeze(0), state)
        parts.append(torch.softmax(readout(output), -1))
    torch.testing.assert_close(torch.cat(parts), whole)


def test_3_without_recurrence():
    """The two l have one answer, at best 1/2 for l and for o: two losses of log 2, two of 0."""
    rnn, readout = fastrnn.RNN(4, 8), torch.nn.Linear(8, 4)
    with torch.no_grad():
        rnn.weight_hh_l0.zero_()
    learned = [p for n, p in rnn.named_parameters() if n != "weight_hh_l0"]
    optimizer = torch.optim.Adam([*learned, *readout.parameters()], lr=0.05)
    x = one_hot(INPUTS, 4).to(torch.float64).unsqueeze(1)
    for _ in range(400):
        scores = readout(rnn(x)[0][:, 0])
        loss = cross_entropy(scores, TARGETS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = 2 * log(2) / 4
    assert best < loss.item() < best + 0.01
    p = torch.softmax(scores, 1)
    torch.testing.assert_close(p[2], p[3])
    assert p[3, 2].item() == pytest.approx(0.5, abs=0.02)
