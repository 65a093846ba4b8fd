"""Solutions to the exercises of docs/learn/08-attention.md."""

from itertools import product

import pytest
import torch
from torch import nn

import fastrnn


def search(first, second, width):
    """The best (p, symbols) that a beam finds in a model of two steps."""
    beams = sorted(((p, (a,)) for a, p in first.items()), reverse=True)[:width]
    longer = [(p * q, (*y, b)) for p, y in beams for b, q in second[y[0]].items()]
    return max(longer)


def test_1_greedy_is_caught():
    first = {"a": 0.5, "b": 0.4, "c": 0.1}
    second = {
        "a": {"x": 0.4, "y": 0.3, "z": 0.3},  # 0.20 at best
        "b": {"x": 0.9, "y": 0.05, "z": 0.05},  # 0.36
        "c": {"x": 1.0, "y": 0.0, "z": 0.0},  # 0.10
    }
    best = max((first[a] * second[a][b], (a, b)) for a, b in product("abc", "xyz"))
    assert search(first, second, 1)[1] == ("a", "x")
    assert search(first, second, 2) == best
    assert best[1] == ("b", "x")
    # No: what is not among the best two beginnings is lost, however well it would go on.
    first = {"a": 0.35, "b": 0.35, "c": 0.3}
    second = {"a": {"x": 0.5, "y": 0.5}, "b": {"x": 0.5, "y": 0.5}, "c": {"x": 1.0}}
    assert search(first, second, 2)[0] < search(first, second, 3)[0] == pytest.approx(0.3)


class Additive(nn.Module):
    """Bahdanau's: the state before a step, and the encoder's states, to the step's context."""

    def __init__(self, hidden, size):
        super().__init__()
        self.of_state = nn.Linear(hidden, size, bias=False)
        self.of_encoder = nn.Linear(hidden, size, bias=False)
        self.w = nn.Linear(size, 1, bias=False)

    def forward(self, h, states, mask):  # [B, H], [S, B, H], [S, B]
        scores = self.w(torch.tanh(self.of_state(h) + self.of_encoder(states))).squeeze(-1)
        weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), 0)
        return (weights.unsqueeze(-1) * states).sum(0), weights


def test_2_additive_attention():
    """A decoder that feeds the context into the step runs one step at a time."""
    S, T, B, H = 6, 4, 3, 8
    lengths = torch.tensor([6, 2, 4])
    mask = torch.arange(S).unsqueeze(1) < lengths
    states, h_n = fastrnn.GRU(5, H)(torch.randn(S, B, 5), lengths=lengths)
    attend, cell = Additive(H, 7), fastrnn.GRUCell(5 + H, H)
    h, outputs = h_n[0], []
    for y in torch.randn(T, B, 5):
        context, weights = attend(h, states, mask)
        torch.testing.assert_close(weights.sum(0), torch.ones(B))
        assert (weights[~mask] == 0).all()
        assert (weights[mask] > 0).all()
        h = cell(torch.cat([y, context], -1), h)
        outputs.append(h)
    torch.stack(outputs).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in attend.parameters())


def test_3_company(run_page):
    page = run_page("08-attention").names
    model, word = page.model, torch.tensor([3, 1, 4])
    longer = torch.tensor([7, 0, 2, 5, 6, 1])
    given = torch.tensor([[page.BOS, page.BOS], [4, 1], [1, 6]])

    def scores(words, mask_is_known=True, lengths_are_known=True):
        source = torch.nn.utils.rnn.pad_sequence(words)
        lengths = [len(w) if lengths_are_known else len(source) for w in words]
        (states, mask), h = model.encode(source, lengths)
        if mask_is_known:
            mask = torch.arange(len(source)).unsqueeze(1) < torch.tensor([len(w) for w in words])
        else:
            mask = torch.ones_like(mask)
        return model.decode(given[:, : len(words)], (states, mask), h)[0][:, 0]

    alone = scores([word])
    torch.testing.assert_close(scores([word, longer]), alone)
    assert not torch.allclose(scores([word, longer], mask_is_known=False), alone, atol=1e-3)
    assert not torch.allclose(scores([word, longer], lengths_are_known=False), alone, atol=1e-3)
