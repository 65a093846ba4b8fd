"""Masked steps: rows run alone, padding that never matters, final states, packed sequences."""

import numpy
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from helpers import (
    MASKS,
    TOLERANCE,
    assert_close,
    assert_same_bits,
    from_lengths,
    inputs,
    make,
    make_mask,
    pair,
    row_by_row,
    run,
    unpack,
)

# T, B, I, H: a row, a few, more rows and units than one register tile
SIZES = [(5, 1, 2, 3), (7, 5, 3, 17), (9, 19, 4, 33)]


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_same_as_each_row_alone(cell, dtype, bidirectional, sizes, kind, hx):
    T, B, *features = sizes
    ours, theirs = pair(cell, *features, 2, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(ours, T, B, hx=hx)
    mask = make_mask(kind, T, B)
    actual = run(ours, x, hx, mask=mask)
    assert_close(actual, run(theirs, x, hx, forward=row_by_row(theirs), mask=mask))
    assert not actual["output"][~mask].any()
    assert not actual["grad input"][~mask].any()


def test_large_batch_same_as_each_row_alone(cell, dtype):
    ours, theirs = pair(cell, 65, 129, bidirectional=True, dtype=dtype)
    x, hx = inputs(ours, 20, 33)
    mask = make_mask("holes", 20, 33)
    actual = run(ours, x, hx, mask=mask)
    assert_close(actual, run(theirs, x, hx, forward=row_by_row(theirs), mask=mask))


@pytest.mark.parametrize("kind", MASKS)
def test_final_state_is_that_of_the_last_real_step(cell, dtype, bidirectional, kind):
    T, B, H = 6, 5, 4
    model = make(fastrnn, cell, 3, H, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, T, B)
    mask = make_mask(kind, T, B)
    output, h_n = model(x, hx, mask=mask)
    for b in range(B):
        steps = mask[:, b].nonzero().flatten().tolist()
        for d, h in enumerate(unpack(h_n)[0][:, b]):
            if steps:
                assert torch.equal(h, output[steps[-1 if d == 0 else 0], b, d * H : (d + 1) * H])
            else:
                assert torch.equal(h, unpack(hx)[0][d, b])


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_padding_changes_no_bit(cell, dtype, bidirectional, sizes, kind, garbage):
    T, B, *features = sizes
    model = make(fastrnn, cell, *features, 2, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, T, B)
    mask = make_mask(kind, T, B)
    clean, dirty = (x.masked_fill(~mask[..., None], value) for value in (0.0, garbage))
    assert_same_bits(run(model, dirty, hx, mask=mask), run(model, clean, hx, mask=mask))


@pytest.mark.parametrize("kind", MASKS)
def test_gradients_arriving_at_padding_change_no_bit(cell, dtype, bidirectional, kind):
    model = make(fastrnn, cell, 3, 17, 2, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, 7, 5)
    mask = make_mask(kind, 7, 5)

    def grads(value):
        output, _ = model(x.requires_grad_(), hx, mask=mask)
        incoming = torch.ones_like(output).masked_fill(~mask[..., None], value)
        wanted = dict(model.named_parameters()) | {"input": x}
        return dict(
            zip(wanted, torch.autograd.grad(output, [*wanted.values()], incoming), strict=True)
        )

    for value in (1.0, torch.nan, torch.inf):
        assert_same_bits(grads(value), grads(0.0))


def test_padding_changes_no_bit_without_gradients(cell, dtype, bidirectional):
    model = make(fastrnn, cell, 4, 33, 2, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, 9, 19)
    mask = make_mask("holes", 9, 19)
    results = []
    for value in (0.0, torch.nan):
        with torch.no_grad():
            output, h_n = model(x.masked_fill(~mask[..., None], value), hx, mask=mask)
        results.append(dict(enumerate((output, *unpack(h_n)))))
    assert_same_bits(*results)
    tracked, _ = model(x, hx, mask=mask)
    assert_same_bits({"output": tracked}, {"output": results[0][0]})


@pytest.mark.parametrize("batch_first", [True, False])
def test_forms_of_lengths(cell, dtype, bidirectional, batch_first):
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "dtype": dtype}
    model = make(fastrnn, cell, 3, 5, 2, **options)
    x, hx = inputs(model, 6, 4)
    lengths = [2, 0, 6, 3]
    mask = from_lengths(lengths, 6)
    mask = mask.T if batch_first else mask
    expected = run(model, x, hx, mask=mask)
    strided = torch.tensor(lengths).repeat_interleave(2)[::2]
    integers = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint64)
    forms = [lengths, tuple(lengths), torch.tensor(lengths), strided]
    forms += [torch.tensor(lengths, dtype=integer) for integer in integers]
    forms += [numpy.array(lengths), numpy.array(lengths, "uint16"), [*numpy.array(lengths)]]
    forms += [[*torch.tensor(lengths)]]
    for form in forms:
        assert_same_bits(run(model, x, hx, lengths=form), expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_forms_of_masks(cell, batch_first):
    """Bool or integers, of which any but zero marks; a tensor or an array. Resets too."""
    model = make(fastrnn, cell, 3, 5, 2, batch_first=batch_first, bidirectional=True)
    x, hx = inputs(model, 6, 4)
    marks = make_mask("holes", 6, 4)
    marks = marks.T if batch_first else marks
    for option in ("mask", "reset"):
        expected = run(model, x, hx, **{option: marks})
        numbers = marks.int() * torch.randint(1, 9, marks.shape, dtype=torch.int32)
        forms = [marks.contiguous(), marks.long(), marks.byte(), numbers, -numbers]
        forms += [f.cpu().numpy() for f in forms[:3]]
        for form in forms:
            assert_same_bits(run(model, x, hx, **{option: form}), expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched_mask(cell, dtype, bidirectional, batch_first):
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "dtype": dtype}
    ours, theirs = pair(cell, 3, 5, 2, **options)
    x = torch.randn(6, 3, dtype=dtype)
    mask = torch.tensor([False, True, True, False, True, False])
    output, h_n = ours(x, mask=mask)
    expected, expected_h = theirs(x[mask])
    assert not output[~mask].any()
    actual = (output[mask], *unpack(h_n))
    assert_close(dict(enumerate(actual)), dict(enumerate((expected, *unpack(expected_h)))))


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("masks", [{"lengths": [0, 0, 0]}, {"mask": torch.zeros(4, 3).bool()}])
def test_no_real_step_at_all(cell, dtype, bidirectional, masks, hx):
    model = make(fastrnn, cell, 3, 5, 2, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, 4, 3, hx=hx)
    results = run(model, x * torch.nan, hx, **masks)
    assert not results["output"].any()
    for name, start in zip(("h_n", "c_n"), unpack(hx), strict=False):
        assert torch.equal(results[name], start)
    if hx is None:
        assert not results["h_n"].any()
    for name, value in results.items():
        if name.startswith("grad ") and name not in ("grad h_0", "grad c_0"):
            assert not value.any(), name


@pytest.mark.parametrize("masks", [{"lengths": [6] * 5}, {"mask": torch.ones(6, 5).bool()}])
def test_full_rows_equal_no_mask(cell, dtype, bidirectional, masks):
    model = make(fastrnn, cell, 3, 17, 2, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, 6, 5)
    assert_close(run(model, x, hx, **masks), run(model, x, hx), TOLERANCE[dtype] / 10)


@pytest.mark.parametrize("masks", [{"lengths": []}, {"mask": torch.ones(4, 0).bool()}])
def test_empty_batch(cell, dtype, bidirectional, masks):
    model = make(fastrnn, cell, 3, 5, 2, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, 4, 0)
    assert_close(run(model, x, hx, **masks), run(model, x, hx), 0.0)


@pytest.mark.parametrize("lengths", [[6, 4, 4, 1], [2, 6, 1, 5]], ids=str)
def test_equal_to_a_packed_sequence(cell, dtype, bidirectional, lengths):
    ours, theirs = pair(cell, 3, 17, 2, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(ours, 6, 4)

    def packed(model):
        def forward(x, hx):
            output, h_n = model(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
            return pad_packed_sequence(output, total_length=6)[0], h_n

        return run(model, x, hx, forward=forward)

    actual = run(ours, x, hx, lengths=lengths)
    assert_close(actual, packed(ours))
    assert_close(actual, packed(theirs))


def test_rows_do_not_touch_each_other(cell, dtype, bidirectional):
    """NaN in a real step of one row stays in that row."""
    model = make(fastrnn, cell, 3, 17, 2, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, 6, 5)
    mask = make_mask("holes", 6, 5)
    poisoned = x.clone()
    poisoned[:, 2] = torch.nan
    others = [0, 1, 3, 4]
    for masks in ({}, {"mask": mask}):
        (got, got_h), (want, want_h) = (model(v, hx, **masks) for v in (poisoned, x))
        assert got[:, 2].isnan().any()
        assert torch.equal(got[:, others], want[:, others])
        for g, w in zip(unpack(got_h), unpack(want_h), strict=True):
            assert torch.equal(g[:, others], w[:, others])


def test_masks_are_not_modified_or_kept(cell):
    """The mask may change after forward without a change to the gradients."""
    model = make(fastrnn, cell, 3, 5, bidirectional=True, dtype=torch.float64)
    x, hx = inputs(model, 6, 4)
    masks = {"mask": make_mask("holes", 6, 4), "lengths": torch.tensor([2, 0, 6, 3])}
    for name, value in masks.items():
        original = value.clone()
        params = list(model.parameters())
        expected = torch.autograd.grad(model(x, hx, **{name: value})[0].sum(), params)
        assert torch.equal(value, original)
        output, _ = model(x, hx, **{name: value})
        value.zero_()
        try:
            actual = torch.autograd.grad(output.sum(), params)
        except RuntimeError as error:  # torch's version check is as good
            if "modified by an inplace operation" not in str(error):
                raise
        else:
            assert_same_bits(dict(enumerate(actual)), dict(enumerate(expected)))
