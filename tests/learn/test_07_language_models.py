"""Solutions to the exercises of docs/learn/07-language-models.md."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import fastrnn


def test_1_uniform_and_gibbs():
    V = 17
    p = torch.softmax(torch.randn(V), 0)  # the truth
    uniform = torch.full((V,), 1 / V)

    def expected(q):
        """Cross-entropy of q where p is true."""
        return -(p * q.log()).sum()

    assert expected(uniform).exp().item() == pytest.approx(V)
    for _ in range(100):
        q = torch.softmax(torch.randn(V), 0)
        # The difference is sum p log(p / q), which is at least 0, because log x <= x - 1.
        assert expected(q) > expected(p)


def test_2_documents_in_a_column():
    T, B, V = 12, 2, 5
    starts = {0: [0, 4, 9], 1: [0, 7]}  # of the documents of each column
    x, y = torch.randn(T, B, V), torch.randint(V, (T, B))
    lstm, readout = fastrnn.LSTM(V, 8), torch.nn.Linear(8, V)
    reset = torch.zeros(T, B, dtype=torch.bool)
    for b, first in starts.items():
        reset[first, b] = True

    def losses(x, y, **options):
        scores = readout(lstm(x, **options)[0])
        return cross_entropy(scores.transpose(1, 2), y, reduction="none")

    together = losses(x, y, reset=reset)
    for b, first in starts.items():
        for begin, end in zip(first, [*first[1:], T]):
            alone = losses(x[begin:end, b : b + 1], y[begin:end, b : b + 1])
            torch.testing.assert_close(together[begin:end, b], alone[:, 0])
    assert not torch.allclose(losses(x, y), together)


def test_3_temperature():
    scores = torch.randn(9)

    def p(temperature):
        return torch.softmax(scores / temperature, 0)

    best = torch.nn.functional.one_hot(scores.argmax(), 9).double()
    torch.testing.assert_close(p(1e-3), best)  # always the likeliest
    torch.testing.assert_close(p(1e9), torch.full((9,), 1 / 9))  # blindly
    entropies = [-(p(t) * p(t).log()).sum().item() for t in (0.2, 0.5, 1, 2, 5, 20)]
    assert entropies == sorted(entropies)
    assert len({*entropies}) == 6
