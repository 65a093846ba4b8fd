"""Sizes around the register tiles: every tail of units and rows. Also run once per CPU variant."""

import os

import pytest

import fastrnn
from helpers import assert_close, inputs, make_mask, pair, row_by_row, run


def test_variant_is_the_one_forced():
    assert fastrnn.cpu_variant() in fastrnn.cpu_variants()
    forced = os.environ.get("FASTRNN_CPU")
    assert not forced or fastrnn.cpu_variant() == forced


@pytest.mark.parametrize("H", [1, 3, 15, 16, 17, 33, 65, 129])
def test_tails(cell, dtype, H):
    models = pair(cell, 3, H, dtype=dtype)
    for B in range(1, 20):
        x, hx = inputs(models[0], 3, B)
        actual, expected = (run(model, x, hx) for model in models)
        assert_close(actual, expected)


@pytest.mark.parametrize(
    "sizes",
    [(130, 1, 5, 65), (90, 2, 70, 130), (1, 1, 130, 70), (1, 7, 70, 130), (2, 9, 64, 128)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_few_rows(cell, dtype, sizes):
    """T, B, I, H where blocks share a tile, and where weights are read as they lie."""
    T, B, *features = sizes
    for options in [{}, {"proj_size": 20}] if cell == "LSTM" else [{}]:
        models = pair(cell, *features, dtype=dtype, **options)
        x, hx = inputs(models[0], T, B)
        actual, expected = (run(model, x, hx) for model in models)
        assert_close(actual, expected)


def test_many_rows(cell, dtype):
    """More rows a step than a weight's gradient multiplies at once, with any set of registers."""
    models = pair(cell, 3, 5, dtype=dtype)
    x, hx = inputs(models[0], 2, 300)
    actual, expected = (run(model, x, hx) for model in models)
    assert_close(actual, expected)


@pytest.mark.parametrize("kind", ["lengths", "holes"])
@pytest.mark.parametrize("H", [1, 15, 17, 33])
def test_masked_tails(cell, dtype, H, kind):
    ours, theirs = pair(cell, 3, H, bidirectional=True, dtype=dtype)
    for B in (1, 4, 9, 17):
        x, hx = inputs(ours, 4, B)
        mask = make_mask(kind, 4, B)
        expected = run(theirs, x, hx, forward=row_by_row(theirs), mask=mask)
        assert_close(run(ours, x, hx, mask=mask), expected)


@pytest.mark.parametrize("scale", [30.0, 1e4, 1e30])
def test_saturated_gates(cell, dtype, scale):
    """Large pre-activations: exp must neither overflow to NaN nor lose the limits."""
    models = pair(cell, 1, 17, bidirectional=True, dtype=dtype)  # one input: nothing cancels
    x, hx = inputs(models[0], 4, 5)
    actual, expected = (run(model, scale * x, hx) for model in models)
    for results in (actual, expected):
        results["grad weight_ih_l0"] /= scale
        results["grad weight_ih_l0_reverse"] /= scale
    assert_close(actual, expected)
