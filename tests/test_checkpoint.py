"""checkpoint_every: the same numbers from less memory."""

import copy
import pickle
import re

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn._backends import backend
from fastrnn._cpu_backend import CpuBackend
from helpers import (
    CELLS,
    TOLERANCE,
    assert_close,
    assert_same_bits,
    inputs,
    make,
    make_mask,
    run,
    seeded,
    unpack,
)

T, B = 9, 4


def assert_same(actual: dict, expected: dict) -> None:
    """Bit for bit on the CPU, the weights' gradients apart: they are sums over steps, which are
    added up segment by segment."""
    sums = {name for name in expected if re.match(r"grad (weight|bias)_", name)}
    if not isinstance(backend("cpu"), CpuBackend) or not expected["output"].is_cpu:
        sums = set(expected)
    exact = expected.keys() - sums
    assert_same_bits({k: actual[k] for k in exact}, {k: expected[k] for k in exact})
    dtype = expected["output"].dtype
    close = ({k: values[k] for k in sorted(sums)} for values in (actual, expected))
    assert_close(*close, TOLERANCE.get(dtype, 0.05))


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
        assert_same(run(model, x, hx, **given), run(plain, x, hx, **given))


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("kind", ["full", "holes", "reset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [*CELLS, "projection"])
def test_projection_and_dtypes(form, bidirectional, dtype, kind, every):
    cell = "LSTM" if form == "projection" else form
    options = {"bidirectional": bidirectional, "dtype": dtype}
    options |= {"proj_size": 2} if form == "projection" else {}
    plain = make(fastrnn, cell, 3, 5, 2, **options)
    model = make(fastrnn, cell, 3, 5, 2, checkpoint_every=every, **options)
    x, hx = inputs(model, T, B)
    given = {
        "full": {},
        "holes": {"mask": make_mask("holes", T, B)},
        "reset": {"reset": torch.rand(T, B, generator=seeded()) < 0.4},
    }[kind]
    assert_same(run(model, x, hx, **given), run(plain, x, hx, **given))


def test_blocks_and_threads(cell, bidirectional):
    """More rows and units than a block of any kernel has, more steps than a chunk of backward."""
    options = {"bidirectional": bidirectional}
    plain = make(fastrnn, cell, 20, 70, **options)
    model = make(fastrnn, cell, 20, 70, checkpoint_every=33, **options)
    x, hx = inputs(model, 100, 37)
    assert_same(run(model, x, hx), run(plain, x, hx))


@pytest.mark.parametrize("every", [1, 2, 4])
def test_packed_and_states(cell, bidirectional, every):
    options = {"bidirectional": bidirectional, "dtype": torch.float64}
    results = []
    for more in ({}, {"checkpoint_every": every}):
        model = make(fastrnn, cell, 3, 5, 2, **options, **more)
        x, hx = inputs(model, T, B)
        wanted = {"input": x.requires_grad_()} | dict(model.named_parameters())
        packed = pack_padded_sequence(x, [5, 9, 1, 7], enforce_sorted=False)
        output, h_n, states = model(packed, hx, return_states=True)
        found = {"output": output.data} | {f"h {i}": h for i, h in enumerate(unpack(h_n))}
        found |= {f"states {i}": s.data for i, s in enumerate(states)}
        loss = sum((t.sin() * (i + 1)).sum() for i, t in enumerate(found.values()))
        grads = torch.autograd.grad(loss, list(wanted.values()))
        results.append(found | {f"grad {name}": g for name, g in zip(wanted, grads)})
    assert_same(*results)


@pytest.mark.parametrize("kind", ["full", "holes"])
def test_double_backward(cell, bidirectional, kind):
    options = {"bidirectional": bidirectional, "dtype": torch.float64}
    mask = make_mask("holes", 6, 3) if kind == "holes" else None
    results = []
    for more in ({}, {"checkpoint_every": 2}):
        model = make(fastrnn, cell, 2, 3, **options, **more)
        x, hx = inputs(model, 6, 3)
        wanted = [x.requires_grad_(), *model.parameters()]
        output, _ = model(x, hx, mask=mask)
        grads = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
        results.append(dict(enumerate((*grads, *twice))))
    assert_close(*results, 1e-12)


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
    """What is packed for backward, beside the output, falls with the number of steps between."""
    totals = []
    for every in (None, 50, 10):
        model = make(fastrnn, cell, 16, 16, checkpoint_every=every)
        x = torch.randn(100, 8, 16)
        packed = {}

        def pack(t, packed=packed):
            storage = t.untyped_storage()
            packed[storage.data_ptr()] = storage.nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            result = model(x)
        own = {t.untyped_storage().data_ptr() for t in (x, result[0], *model.parameters())}
        totals.append(sum(size for address, size in packed.items() if address not in own))
    if cell.startswith("RNN"):  # an Elman layer saves nothing but its output
        assert totals == [0, 0, 0]
    else:
        assert max(totals[1:]) < 0.05 * totals[0]


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
