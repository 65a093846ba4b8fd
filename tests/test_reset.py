"""reset: a row of several segments is those segments, run one by one."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import reference
from helpers import (
    CELLS,
    assert_close,
    assert_same_bits,
    from_lengths,
    inputs,
    make,
    make_mask,
    pack,
    run,
    seeded,
    unpack,
)

T, B = 9, 4


def make_reset(T: int, B: int, seed: int = 0) -> torch.Tensor:
    """bool [T, B]: row 0 without any, row 1 begins anew at once and at the end, the others vary."""
    reset = torch.rand(T, B, generator=seeded(seed)) < 0.3
    reset[:, 0] = False
    reset[:, 1:2] = False
    reset[0, 1:2] = reset[-1, 1:2] = True
    return reset


def one_layer_by_segments(model: nn.RNNBase, x, states, real, reset):
    """One layer of torch.nn over one row x [T, I], segment by segment: output and final states."""
    real_steps = set(real.nonzero()[:, 0].tolist())
    segments: list[list[int]] = [[]]
    fresh = [False]
    pending = False
    for t in range(len(x)):
        pending |= bool(reset[t])
        if t not in real_steps:
            continue
        if pending and not segments[-1]:
            fresh[-1] = True
        elif pending:
            segments.append([])
            fresh.append(True)
        pending = False
        segments[-1].append(t)
    directions = 1 + model.bidirectional
    features = model.hidden_size
    output = x.new_zeros(len(x), directions * features)
    final = [list(s) for s in states]  # per state, per direction
    for number, steps in enumerate(segments):
        if not steps:
            continue
        enters = [s.clone() for s in states]
        for s in enters:
            if fresh[number]:
                s[0] = 0
            if directions == 2 and number < len(segments) - 1:
                s[1] = 0
        out, end = model(x[steps], pack(tuple(enters)))
        output = output.index_put((torch.tensor(steps),), out)
        for of_state, s in zip(final, unpack(end)):
            if number == len(segments) - 1:
                of_state[0] = s[0]
            if directions == 2 and number == 0:
                of_state[1] = s[1]
    return output, [torch.stack(s) for s in final]


def by_segments(model: nn.RNNBase):
    """What a reset means, with torch.nn: layer by layer, row by row, segment by segment."""

    def forward(x, hx, *, reset, mask=None):
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        directions = 1 + model.bidirectional
        finals = []
        for k in range(model.num_layers):
            own = slice(k * directions, (k + 1) * directions)
            layer = layer_of(model, k)
            rows = [
                one_layer_by_segments(
                    layer, x[:, b], [h[own, b] for h in unpack(hx)], mask[:, b], reset[:, b]
                )
                for b in range(x.size(1))
            ]
            x = torch.stack([output for output, _ in rows], 1)
            finals.append([torch.stack(s, 1) for s in zip(*(final for _, final in rows))])
        return x, pack(tuple(torch.cat(s) for s in zip(*finals)))

    return forward


def layer_of(model: nn.RNNBase, k: int) -> nn.RNNBase:
    """Layer k of a torch.nn model as a model that shares its parameters."""
    inputs = model.input_size if k == 0 else model.hidden_size * (1 + model.bidirectional)
    name, extra, _ = CELLS[model.mode]
    layer = getattr(nn, name)(inputs, model.hidden_size, bidirectional=model.bidirectional, **extra)
    for own in layer._flat_weights_names:
        setattr(layer, own, getattr(model, own.replace("_l0", f"_l{k}")))
    return layer


def both(cell: str, *sizes: int, **options):
    ours = make(fastrnn, cell, *sizes, **options)
    theirs = make(nn, cell, *sizes, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("masked", [None, "lengths", "left", "holes"])
@pytest.mark.parametrize("layers", [1, 2])
def test_against_single_segments(cell, dtype, bidirectional, layers, masked):
    ours, theirs = both(cell, 3, 17, layers, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(ours, T, B)
    options = {"reset": make_reset(T, B)}
    if masked:
        options["mask"] = make_mask(masked, T, B)
    actual = run(ours, x, hx, **options)
    assert_close(actual, run(theirs, x, hx, forward=by_segments(theirs), **options))


@pytest.mark.parametrize("sizes", [(1, 1, 3, 5), (2, 1, 3, 64), (30, 9, 33, 129)], ids=str)
def test_sizes_and_threads(cell, bidirectional, sizes):
    """Against the reference implementation: few rows, several tiles, several chunks of backward."""
    T, B, *features = sizes
    model = make(fastrnn, cell, *features, bidirectional=bidirectional, dtype=torch.float64)
    x, hx = inputs(model, T, B)
    reset = make_reset(T, B)

    def by_reference(x, hx, *, reset):
        params = list(model.parameters())
        return reference.rnn(cell, x, hx, params, bidirectional=bidirectional, reset=reset)

    expected = run(model, x, hx, forward=by_reference, reset=reset)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_close(run(model, x, hx, reset=reset), expected, 1e-12)
    finally:
        torch.set_num_threads(before)


def test_nothing_leaks(cell):
    """Neither values nor gradients, and not even NaN."""
    model = make(fastrnn, cell, 3, 5, bidirectional=True, dtype=torch.float64)
    x, hx = inputs(model, T, B)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[4] = True
    x[:4] = float("nan")
    clean = x[4:].clone().requires_grad_()
    output, _ = model(torch.cat((x[:4], clean)), hx, reset=reset)
    assert output[:4].isnan().all()
    assert not output[4:].isnan().any()
    output[4:].sum().backward()
    assert not clean.grad.isnan().any()
    entering = pack(tuple(torch.cat((torch.zeros_like(h[:1]), h[1:])) for h in unpack(hx)))
    assert_close({"": output[4:].detach()}, {"": model(clean, entering)[0].detach()})


def test_no_reset_is_bitwise_the_same(cell, dtype, bidirectional):
    model = make(fastrnn, cell, 3, 17, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, T, B)
    never = torch.zeros(T, B, dtype=torch.bool)
    assert_same_bits(run(model, x, hx, reset=never), run(model, x, hx))


@pytest.mark.parametrize("layout", ["batch_first", "unbatched", "packed"])
def test_layouts(cell, bidirectional, layout):
    options = {"batch_first": layout == "batch_first", "bidirectional": bidirectional}
    model = make(fastrnn, cell, 3, 5, 2, dtype=torch.float64, **options)
    plain = make(fastrnn, cell, 3, 5, 2, dtype=torch.float64, bidirectional=bidirectional)
    x, hx = inputs(plain, T, B)
    reset = make_reset(T, B)
    if layout == "batch_first":
        output, last = model(x.transpose(0, 1), hx, reset=reset.T)
        expected, wanted = plain(x, hx, reset=reset)
        output = output.transpose(0, 1)
    elif layout == "unbatched":
        output, last = model(x[:, 2], pack(tuple(h[:, 2] for h in unpack(hx))), reset=reset[:, 2])
        expected, wanted = plain(x, hx, reset=reset)
        expected, wanted = expected[:, 2], pack(tuple(h[:, 2] for h in unpack(wanted)))
    else:
        lengths = torch.tensor([5, 9, 1, 7])
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        marks = pack_padded_sequence(reset, lengths, enforce_sorted=False)
        output, last = model(packed, hx, reset=marks)
        again, _ = model(packed, hx, reset=marks.data)
        assert torch.equal(output.data, again.data)
        expected, wanted = plain(x, hx, reset=reset, mask=from_lengths(lengths, T))
        expected = pack_padded_sequence(expected, lengths, enforce_sorted=False).data
        output = output.data
    names = ("output", "h", "c")
    actual = dict(zip(names, (output, *unpack(last))))
    assert_close(actual, dict(zip(names, (expected, *unpack(wanted)))))


@pytest.mark.parametrize("packed", [False, True])
def test_wrong_reset(packed):
    model = make(fastrnn, "GRU", 3, 5)
    x = torch.randn(T, B, 3)
    if packed:
        x = pack_padded_sequence(x, [T] * B)
    for wrong in (torch.zeros(T, B), torch.zeros(B, T).bool(), [True] * T, torch.zeros(T).bool()):
        with pytest.raises(ValueError, match="reset: expected a bool or integer tensor of shape"):
            model(x, reset=wrong)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "sizes", [(9, 4, 3, 5, 2), (1, 2, 3, 64, 40), (30, 9, 33, 129, 70)], ids=str
)
def test_projection(bidirectional, sizes, masked):
    """Against the reference implementation, for every number of threads."""
    T, B, inputs_, hidden, shown = sizes
    options = {"bidirectional": bidirectional, "dtype": torch.float64}
    model = make(fastrnn, "LSTM", inputs_, hidden, proj_size=shown, **options)
    x, hx = inputs(model, T, B)
    options = {"reset": make_reset(T, B), "mask": make_mask("holes", T, B) if masked else None}

    def by_reference(x, hx, **options):
        params = list(model.parameters())
        return reference.rnn("LSTM", x, hx, params, bidirectional=bidirectional, **options)

    expected = run(model, x, hx, forward=by_reference, **options)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_close(run(model, x, hx, **options), expected, 1e-12)
    finally:
        torch.set_num_threads(before)


# States of every step.


@pytest.mark.parametrize("masked", [None, "lengths", "holes"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_return_states(cell, bidirectional, masked, batch_first):
    options = {"bidirectional": bidirectional, "batch_first": batch_first, "dtype": torch.float64}
    model = make(fastrnn, cell, 3, 5, 2, **options)
    x, hx = inputs(model, T, B)
    x.requires_grad_()
    mask = make_mask(masked, T, B) if masked else None
    laid_out = mask.T if masked and batch_first else mask
    plain = model(x, hx, mask=laid_out)
    output, _, states = model(x, hx, mask=laid_out, return_states=True)
    assert torch.equal(output, plain[0])
    assert len(states) == 2
    with torch.no_grad():
        for shown, wanted in zip(model(x, hx, mask=laid_out, return_states=True)[2], states):
            assert torch.equal(shown, wanted)

    steps = x.transpose(0, 1) if batch_first else x
    params = list(model.parameters())
    each = [params[i : i + 4] for i in range(0, len(params), 4)]
    directions = 1 + bidirectional
    actual, expected = list(states), []
    for k in range(2):
        own = slice(k * directions, (k + 1) * directions)
        start = tuple(h[own] for h in unpack(hx))
        steps, _, cells = reference.layer(cell, steps, start, each[own], mask)
        shown = steps if cells is None else cells
        expected.append(shown.transpose(0, 1) if batch_first else shown)
    results = []
    for tensors in (actual, expected):
        loss = sum(t.sin().sum() for t in tensors)
        grads = torch.autograd.grad(loss, [x, *params[: 4 * directions]])
        results.append(dict(enumerate((*(t.detach() for t in tensors), *grads))))
    assert_close(*results)


def test_return_states_layouts():
    model = make(fastrnn, "LSTM", 3, 5, 2)
    x = torch.randn(T, B, 3)
    lengths = torch.tensor([5, 9, 1, 7])
    _, _, padded = model(x, lengths=lengths, return_states=True)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    _, _, states = model(packed, return_states=True)
    for given, wanted in zip(states, padded):
        assert isinstance(given, PackedSequence)
        assert given.sorted_indices is packed.sorted_indices
        expected = pack_padded_sequence(wanted, lengths, enforce_sorted=False).data
        torch.testing.assert_close(given.data, expected)
    _, _, states = model(x[:, 0], return_states=True)
    assert [s.shape for s in states] == [(T, 5)] * 2


def test_final_cell_state_is_the_last_one():
    model = make(fastrnn, "LSTM", 3, 5, 2, bidirectional=True)
    x, hx = inputs(model, T, B)
    _, (_, c_n), states = model(x, hx, return_states=True)
    for k, c in enumerate(states):
        assert torch.equal(c[-1, :, :5], c_n[2 * k])
        assert torch.equal(c[0, :, 5:], c_n[2 * k + 1])
