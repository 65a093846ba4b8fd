"""Any shape, cell, dtype and mask: fastrnn equals its reference, forward and backward."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastrnn
from fastrnn import reference
from helpers import CELLS, TOLERANCE, assert_close, inputs, make, make_mask, run


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    cell=st.sampled_from(list(CELLS)),
    dtype=st.sampled_from(list(TOLERANCE)),
    T=st.integers(1, 9),
    B=st.integers(0, 19),
    input_size=st.integers(1, 35),
    hidden_size=st.integers(1, 70),
    num_layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    hx=st.booleans(),
    kind=st.sampled_from([None, "full", "lengths", "left", "holes", "random"]),
    data=st.data(),
)
def test_equal_to_the_reference(
    cell, dtype, T, B, input_size, hidden_size, num_layers, bidirectional, bias, hx, kind, data
):
    options = {"bias": bias, "bidirectional": bidirectional, "dtype": dtype}
    model = make(fastrnn, cell, input_size, hidden_size, num_layers, **options)
    x, hx = inputs(model, T, B, hx=hx, seed=data.draw(st.integers(0, 999), "seed"))
    if kind is None:
        mask = None
    elif kind == "full":
        mask = torch.ones(T, B, dtype=torch.bool)
    elif kind == "random":
        bits = data.draw(st.integers(0, 2 ** (T * B) - 1), "mask bits")
        mask = torch.tensor([bool(bits >> k & 1) for k in range(T * B)], dtype=torch.bool)
        mask = mask.view(T, B)
    else:
        mask = make_mask(kind, T, B, seed=data.draw(st.integers(0, 999), "mask seed"))

    def by_reference(x, hx, mask):
        weights = model._flat_weights
        return reference.rnn(
            cell, x, hx, weights, num_layers=num_layers, bidirectional=bidirectional, mask=mask
        )

    actual = run(model, x, hx, mask=mask)
    assert_close(actual, run(model, x, hx, forward=by_reference, mask=mask))
