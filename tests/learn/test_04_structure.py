"""Solutions to the exercises of docs/learn/04-structure.md."""

import random
from itertools import combinations

import numpy as np
import pytest
import torch

import fastrnn


@pytest.fixture
def page(run_page):
    return run_page("04-structure").names


def ward(means):
    """The clusters, and the squared height of the merger, after each merger."""
    clusters = [[k] for k in range(len(means))]

    def increase(a, b):
        difference = means[a].mean(0) - means[b].mean(0)
        return len(a) * len(b) / (len(a) + len(b)) * (difference**2).sum()

    while len(clusters) > 1:
        a, b = min(combinations(clusters, 2), key=lambda pair: increase(*pair))
        height = increase(a, b)
        clusters = [c for c in clusters if c not in (a, b)] + [a + b]
        yield clusters, height


def by_class(page, clusters):
    """How many pairs of words of one class are in one cluster."""
    vocabulary = sorted({*page.stream})
    of = {
        word: n for n, cluster in enumerate(clusters) for word in (vocabulary[k] for k in cluster)
    }
    nouns = ("human", "animal", "beast", "object", "fragile", "food")
    pairs = [pair for name in nouns for pair in combinations(page.CLASSES[name].split(), 2)]
    return sum(of[a] == of[b] for a, b in pairs) / len(pairs)


def test_1_controls(page):
    """One-hot vectors are all equally far apart, and an untrained network knows little more."""
    heights = [height for _, height in ward(np.eye(27))]
    assert heights[0] == pytest.approx(1)  # any two: |e_a - e_b|^2 / 2
    vocabulary = sorted({*page.stream})
    columns = page.columns
    untrained = page.Predictor(fastrnn.RNN, {*vocabulary}, 64)
    states, words = untrained.states(columns).detach().flatten(0, 1), columns.flatten()
    means = np.stack([states[words == k].mean(0).numpy() for k in range(27)])
    without = next(c for c, _ in ward(means) if len(c) == 9)
    trained = next(c for c, _ in ward(page.means) if len(c) == 9)
    assert by_class(page, trained) == 1
    assert by_class(page, without) < 0.7


def test_2_without_a_network(page):
    """A word's successors show its class. They cannot show what came before it."""
    vocabulary = sorted({*page.stream})
    table = np.zeros((27, 27))
    for a, b in zip(page.stream, page.stream[1:]):
        table[vocabulary.index(a), vocabulary.index(b)] += 1
    table /= table.sum(1, keepdims=True)
    clusters = next(c for c, _ in ward(table) if len(c) == 9)
    assert by_class(page, clusters) > 0.9

    # What eats decides what may be eaten: after "eat" the table has one row, a state has several.
    model = page.Predictor(fastrnn.RNN, {*vocabulary}, 64)
    model.fit(list(page.columns.split(21))[:-1] * 25, lr=0.003)
    food, human = (model.numbers(page.CLASSES[c].split()) for c in ("food", "human"))
    for eater, can_eat_people in (("woman", False), ("dragon", True)):
        scores = model.readout(model.states(model.numbers([eater, "eat"]).unsqueeze(1))[-1, 0])
        p = torch.softmax(scores, 0)
        assert (p[human].sum() > 0.2) == can_eat_people
        assert p[food].sum() > (0.2 if can_eat_people else 0.8)


def test_3_elman_learns_agreement(page):
    """Smaller steps, and more of them."""
    rng = page.sentences.__globals__["rng"] = random.Random(0)
    words = {"the", "near", "behind", "on", "is", "are", *page.NOUNS[0], *page.NOUNS[1]}
    model = page.Predictor(fastrnn.RNN, words, 20)
    model.fit([page.sentences(model, rng.randrange(6), 32) for _ in range(600)], lr=0.005)
    test = page.sentences(model, 8, 200, opposed=True)
    verbs = model.numbers(["is", "are"])
    scores = model.readout(model.states(test[:-1])[-1])[:, verbs]
    assert (verbs[scores.argmax(1)] == test[-1]).double().mean() > 0.95
