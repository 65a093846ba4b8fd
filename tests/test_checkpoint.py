"""checkpoint_every: the same numbers from less memory."""

import copy
import pickle

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from helpers import assert_close, inputs, make, make_mask, run, seeded

T, B = 9, 4


@pytest.mark.parametrize("every", [1, 4, 20])
@pytest.mark.parametrize("kind", ["full", "lengths", "holes", "reset", "reset and holes"])
def test_same_numbers(cell, bidirectional, kind, every):
    options = {"bidirectional": bidirectional, "dtype": torch.float64}
    plain = make(fastrnn, cell, 3, 5, 2, **options)
    model = make(fastrnn, cell, 3, 5, 2, checkpoint_every=every, **options)
    for hx in (True, False):
        x, hx = inputs(model, T, B, hx=hx)
        given = {}
        if "reset" in kind:
            given["reset"] = torch.rand(T, B, generator=seeded()) < 0.4
        if kind != "full" and kind != "reset":
            given["mask"] = make_mask(kind.split()[-1], T, B)
        assert_close(run(model, x, hx, **given), run(plain, x, hx, **given))


def test_projection_and_half():
    for options in ({"proj_size": 2, "dtype": torch.float64}, {"dtype": torch.bfloat16}):
        plain = make(fastrnn, "LSTM", 3, 5, bidirectional=True, **options)
        model = make(fastrnn, "LSTM", 3, 5, bidirectional=True, checkpoint_every=4, **options)
        x, hx = inputs(model, T, B)
        tolerance = 0.05 if options["dtype"] == torch.bfloat16 else None
        assert_close(run(model, x, hx), run(plain, x, hx), tolerance)


def test_packed_and_states(cell):
    plain = make(fastrnn, cell, 3, 5, bidirectional=True, dtype=torch.float64)
    model = make(fastrnn, cell, 3, 5, bidirectional=True, checkpoint_every=2, dtype=torch.float64)
    x, _ = inputs(model, T, B)
    packed = pack_padded_sequence(x, [5, 9, 1, 7], enforce_sorted=False)
    actual, expected = (m(packed, return_states=True) for m in (model, plain))
    assert_close({"": actual[0].data.detach()}, {"": expected[0].data.detach()})
    assert_close({"": actual[2][0].data.detach()}, {"": expected[2][0].data.detach()})


def test_second_gradients(cell):
    model = make(fastrnn, cell, 2, 3, checkpoint_every=2, dtype=torch.float64)
    x, hx = inputs(model, 5, 2)
    x.requires_grad_()

    def call(x):
        return model(x, hx)[0]

    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


def test_compile(cell):
    model = make(fastrnn, cell, 3, 5, bidirectional=True, checkpoint_every=3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, hx = inputs(model, 7, 2)
    assert_close(run(model, x, hx, forward=compiled.__call__), run(model, x, hx))


def test_it_saves_less(cell):
    """What is packed for backward falls with the number of steps between."""
    totals = []
    for every in (None, 50, 10):
        model = make(fastrnn, cell, 16, 16, checkpoint_every=every)
        x = torch.randn(100, 8, 16)
        kept = {t.untyped_storage().data_ptr(): 0 for t in (x, *model.parameters())}

        def pack(t, kept=kept):
            storage = t.untyped_storage()
            kept.setdefault(storage.data_ptr(), storage.nbytes())
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            result = model(x)
        totals.append(sum(kept.values()))
        del result
    assert totals[1] < 0.2 * totals[0]
    assert totals[2] < 0.2 * totals[0]


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "4"])
def test_wrong_value(wrong):
    with pytest.raises(ValueError, match="checkpoint_every: expected an integer above 0 or None"):
        fastrnn.GRU(3, 5, checkpoint_every=wrong)


def test_repr_and_copies(cell):
    model = make(fastrnn, cell, 3, 5, checkpoint_every=7)
    assert "checkpoint_every=7" in repr(model)
    assert "checkpoint_every" not in repr(make(fastrnn, cell, 3, 5))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.checkpoint_every == 7
