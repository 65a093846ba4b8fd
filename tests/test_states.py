"""fastrnn.State: one step at a time equals forward, in branches too, with and without gradients."""

import gc
import resource
import weakref

import pytest
import torch
from torch import nn

import fastrnn
from fastrnn import _states
from helpers import CELLS, TOLERANCE, inputs, make, pack, pair, seeded, unpack

T, B, F, H = 7, 3, 5, 19  # 19 units end in a vector that is not full


def is_packed(state: fastrnn.State) -> bool:
    return state._core is not None


def walk(state, xs, **options):
    """The states after each of xs, by add_input."""
    states = []
    for t, x in enumerate(xs):
        state = state.add_input(x, **{name: value[t] for name, value in options.items()})
        states.append(state)
    return states


@pytest.fixture(params=[True, False], ids=["gradients", "packed"])
def with_gradients(request):
    with torch.set_grad_enabled(request.param):
        yield request.param


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_steps_are_forward(cell, dtype, layers, bias, with_gradients):
    ours, theirs = pair(cell, F, H, num_layers=layers, bias=bias, dtype=dtype)
    x, hx = inputs(ours, T, B)
    expected, final = theirs(x, hx)
    first = ours.initial_state(hx)
    if x.is_cpu and ours.mode in fastrnn._layer.BUILT_IN and not with_gradients:
        assert is_packed(first) or fastrnn._backends.backend("cpu").packs is False
    states = walk(first, x)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for t, state in enumerate(states):
        torch.testing.assert_close(state.output(), expected[t], **close)
    for own, right in zip(unpack(states[-1].hx), unpack(final), strict=True):
        torch.testing.assert_close(own, right, **close)
    torch.testing.assert_close(first.transduce(x), expected, **close)
    every = first.add_inputs(x)
    assert all(torch.equal(a.output(), b.output()) for a, b in zip(every, states, strict=True))
    # What it gives goes into forward again.
    again, _ = theirs(x, states[-1].hx)
    torch.testing.assert_close(states[-1].transduce(x), again, **close)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(5, 19), (64, 64), (33, 300)])
@pytest.mark.parametrize("batch", [1, 2, 3, 9, 40])
def test_steps_are_the_frozen_forward_bit_for_bit(cell, sizes, batch):
    model = make(fastrnn, cell, *sizes, num_layers=2).eval()
    x, hx = inputs(model, T, batch)
    states = walk(model.initial_state(hx), x)
    by_scan = model.initial_state(hx).transduce(x)
    fastrnn.freeze(model)
    output, final = model(x, hx)
    assert torch.equal(torch.stack([s.output() for s in states]), output)
    assert torch.equal(by_scan, output)
    assert all(map(torch.equal, unpack(states[-1].hx), unpack(final)))


@torch.no_grad()
def test_steps_are_forward_bit_for_bit_where_it_packs(cell):
    """With more rows than 3/4 of the depth forward packs, too, and sums in the same order."""
    model = make(fastrnn, cell, 64, 64)
    x, hx = inputs(model, 100, 4)
    states = walk(model.initial_state(hx), x)
    assert torch.equal(torch.stack([s.output() for s in states]), model(x, hx)[0])


def test_projections(dtype, with_gradients):
    model = make(fastrnn, "LSTM", F, H, num_layers=2, proj_size=4, dtype=dtype)
    x, hx = inputs(model, T, B)
    states = walk(model.initial_state(hx), x)
    expected, final = model(x, hx)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(torch.stack([s.output() for s in states]), expected, **close)
    torch.testing.assert_close(states[-1].hx, final, **close)
    assert [tuple(s.shape) for s in states[-1].s()] == [(B, H)] * 2 + [(B, 4)] * 2


def test_unbatched(cell, with_gradients):
    model = make(fastrnn, cell, F, H, num_layers=2)
    x = torch.randn(T, F)
    expected, final = model(x)
    first = model.initial_state()
    assert not first.is_batched
    assert first.batch is None
    states = walk(first, x)
    torch.testing.assert_close(torch.stack([s.output() for s in states]), expected)
    torch.testing.assert_close(states[-1].hx, final)
    torch.testing.assert_close(model.initial_state(final).transduce(x), model(x, final)[0])
    assert states[0].h()[0].shape == (H,)


def test_dynets_order(with_gradients):
    """s() is all memory cells, then all h; set_h and set_s take the same order."""
    model = make(fastrnn, "LSTM", F, H, num_layers=2)
    _, (h, c) = inputs(model, T, B)
    state = model.initial_state((h, c))
    for own, right in zip(state.s(), (c[0], c[1], h[0], h[1]), strict=True):
        assert torch.equal(own, right)
    assert all(map(torch.equal, state.h(), h))
    other = state.set_h(state.h()[::-1])
    assert torch.equal(other.output(), h[0])
    assert torch.equal(other.s()[0], c[0])
    turned = state.set_s(state.s()[::-1])
    assert torch.equal(turned.hx[0][0], c[1])
    assert torch.equal(turned.hx[1][0], h[1])
    assert turned.prev() is state
    gru = make(fastrnn, "GRU", F, H, num_layers=2)
    state = gru.initial_state(h)
    assert all(map(torch.equal, state.s(), state.h()))
    assert torch.equal(state.set_s(state.s()[::-1]).output(), h[0])


@pytest.mark.parametrize("first_steps", [0, 8])
def test_branches(cell, dtype, first_steps, monkeypatch):
    """A tree of histories: every node's output, and gradients through all of its branches."""
    monkeypatch.setattr(fastrnn._states, "_FIRST_STEPS", first_steps)
    model = make(fastrnn, cell, F, H, num_layers=2, dtype=dtype)
    twin = make(nn, cell, F, H, num_layers=2, dtype=dtype)
    twin.load_state_dict(model.state_dict())
    x, hx = inputs(model, 6, B)
    paths = [(0, 1, 2), (0, 1, 3, 4), (0, 5), (0, 5, 5)]

    nodes = {(): model.initial_state(hx)}
    for path in paths:
        for end in range(1, len(path) + 1):
            if path[:end] not in nodes:
                nodes[path[:end]] = nodes[path[: end - 1]].add_input(x[path[end - 1]])
    loss = sum((i + 1) * nodes[path].output().sum() for i, path in enumerate(paths))
    by_hand = 0
    for i, path in enumerate(paths):
        output, _ = twin(x[list(path)], hx)
        torch.testing.assert_close(nodes[path].output(), output[-1])
        by_hand = by_hand + (i + 1) * output[-1].sum()
    loss.backward()
    by_hand.backward()
    tolerance = 1e3 * TOLERANCE[dtype]
    for own, right in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, right.grad, rtol=tolerance, atol=tolerance)
    assert nodes[(0, 5, 5)].prev() is nodes[(0, 5)]
    assert nodes[(0,)].prev() is nodes[()]


def test_gradcheck(cell):
    model = make(fastrnn, cell, 2, 3, num_layers=2, dtype=torch.float64)
    x, hx = inputs(model, 3, 2)
    leaves = [t.requires_grad_() for t in (x, *unpack(hx), *model.parameters())]
    mask = torch.tensor([True, False])

    def function(x, *others):
        states = others[: 1 + (cell == "LSTM")]
        s = model.initial_state(pack(tuple(states)))
        a = s.add_input(x[0]).add_input(x[1], mask=mask)
        b = a.select([1, 0, 0]).add_input(x[2][[0, 1, 1]])
        return (*a.s(), *b.s(), a.set_h(a.h()[::-1]).add_input(x[2]).output())

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_training_with_dropout():
    """Dropout draws for each step; gradients reach all parameters."""
    model = make(fastrnn, "LSTM", F, H, num_layers=2, dropout=0.5)
    x, _ = inputs(model, T, B)
    state = model.initial_state(batch=B)
    a, b = state.add_input(x[0]), state.add_input(x[0])
    assert torch.equal(a.h()[0], b.h()[0])
    assert not torch.equal(a.h()[1], b.h()[1])
    a.output().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_masks(cell, with_gradients):
    model = make(fastrnn, cell, F, H, num_layers=2)
    x, hx = inputs(model, T, B)
    mask = torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.6
    x[~mask] = torch.nan  # what stands there does not matter
    expected, final = model(x, hx, mask=mask)
    states = walk(model.initial_state(hx), x, mask=mask)
    torch.testing.assert_close(states[-1].hx, final)
    for t, state in enumerate(states):
        torch.testing.assert_close(state.output()[mask[t]], expected[t][mask[t]])
    every = model.initial_state(hx).add_inputs(x, mask=mask)
    assert torch.equal(every[-1].output(), states[-1].output())


def test_select(cell, with_gradients):
    model = make(fastrnn, cell, F, H, num_layers=2)
    x, hx = inputs(model, T, B)
    state = model.initial_state(hx).add_input(x[0])
    for rows in ([2, 0, 0, 1], torch.tensor([1]), [], torch.tensor([True, False, True])):
        index = torch.as_tensor(rows)
        index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index.long()
        some = state.select(rows)
        assert some.batch == len(index)
        for own, whole in zip(some.s(), state.s(), strict=True):
            assert torch.equal(own, whole[index])
        after = some.add_input(x[1][index])
        torch.testing.assert_close(after.output(), state.add_input(x[1]).output()[index])


def test_cells_of_ones_own(with_gradients):
    model = fastrnn.cells.PeepholeLSTM(F, H, num_layers=2)
    x, _ = inputs(make(fastrnn, "GRU", F, H), T, B)
    hx = torch.randn(2, B, H), torch.randn(2, B, H)
    expected, final = model(x, hx)
    first = model.initial_state(hx)
    assert is_packed(first) is not with_gradients
    states = walk(first, x)
    torch.testing.assert_close(torch.stack([s.output() for s in states]), expected)
    torch.testing.assert_close(states[-1].hx, final)
    torch.testing.assert_close(first.transduce(x), expected)


@fastrnn.cell(gates=("a",), recurrent=(), inputs=("z",))
def Gated(x, r, h, *, u):
    return torch.relu(x.a + u * h) * x.z


def test_cells_with_inputs(with_gradients):
    model = Gated(F, H)
    x, z = torch.randn(T, B, F), torch.rand(T, B, H)
    expected, _ = model(x, inputs={"z": z})
    state = model.initial_state(batch=B)
    outputs = []
    for t in range(T):
        state = state.add_input(x[t], inputs={"z": z[t]})
        outputs.append(state.output())
    torch.testing.assert_close(torch.stack(outputs), expected)
    with pytest.raises(ValueError, match="inputs: expected a dict of z"):
        state.add_input(x[0])


# -- Weights that change ---------------------------------------------------------------------------


def change_in_place(model):
    model.weight_hh_l0.add_(1)


def change_by_data(model):
    model.weight_hh_l0.data = model.weight_hh_l0.data + 1


def change_parameter(model):
    model.weight_hh_l0 = nn.Parameter(model.weight_hh_l0 + 1)


def change_by_state_dict(model):
    state = model.state_dict()
    model.load_state_dict(state | {"weight_hh_l0": state["weight_hh_l0"] + 1})


def change_bias(model):
    model.bias_ih_l0.mul_(3)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [change_in_place, change_by_data, change_parameter, change_by_state_dict, change_bias],
)
def test_changed_weights_are_packed_again(cell, change):
    model = make(fastrnn, cell, F, H)
    x, hx = inputs(model, T, B)
    state = model.initial_state(hx)
    before = state.add_input(x[0]).output()
    change(model)
    after = state.add_input(x[0]).output()
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model(x[:1], hx)[0][0])
    assert torch.equal(model.initial_state(hx).add_input(x[0]).output(), after)


@torch.no_grad()
def test_packed_once(monkeypatch):
    model = make(fastrnn, "LSTM", F, H)
    states = [model.initial_state(batch=B) for _ in range(3)]
    x = torch.randn(B, F)
    packed = model._packed
    assert all(s.add_input(x).add_input(x)._core is not None for s in states)
    assert model._packed is packed


def test_a_packed_state_and_gradients():
    """What requires a gradient gets it, also from a state of packed weights."""
    model = make(fastrnn, "GRU", F, H).requires_grad_(False)
    x = torch.randn(B, F, requires_grad=True)
    state = model.initial_state(batch=B)
    assert is_packed(state)
    after = state.add_input(x)
    assert not is_packed(after)
    (gradient,) = torch.autograd.grad(after.add_input(x.detach()).output().sum(), x)
    y = x.detach().requires_grad_()
    output, _ = model(torch.stack((y, x.detach())))
    (expected,) = torch.autograd.grad(output[1].sum(), y)
    torch.testing.assert_close(gradient, expected)


def test_no_grad_inside_of_a_history_with_gradients():
    model = make(fastrnn, "GRU", F, H)
    x = torch.randn(B, F)
    state = model.initial_state(batch=B).add_input(x)
    with torch.no_grad():
        assert not state.add_input(x).output().requires_grad
    assert state.output().requires_grad


# -- Memory ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_old_states_stay(cell):
    model = make(fastrnn, cell, F, H)
    x, hx = inputs(model, T, B)
    state = model.initial_state(hx)
    before = [t.clone() for t in state.s()]
    output = state.output()
    output.zero_()  # the user's own
    walk(state, x)
    assert all(map(torch.equal, state.s(), before))


@torch.no_grad()
def test_many_steps_take_no_memory():
    """A tenth of a million here; a million were run once."""
    model = make(fastrnn, "LSTM", 8, 16, num_layers=2)
    x = torch.randn(1, 8)
    state = model.initial_state(batch=1)
    for _ in range(2000):
        state = state.add_input(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100_000):
        state = state.add_input(x)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 4096
    assert torch.isfinite(state.output()).all()


@torch.no_grad()
def test_prev_without_gradients():
    model = make(fastrnn, "GRU", F, H)
    first = model.initial_state()
    second = first.add_input(torch.zeros(F))
    assert second.prev() is first
    del first
    with pytest.raises(RuntimeError, match="prev: the state before this one is gone"):
        second.prev()
    with pytest.raises(RuntimeError, match="prev: this is an initial state"):
        model.initial_state().prev()


def test_long_chains():
    """100,000 states with gradients: made, differentiated and freed without recursion."""
    model = make(fastrnn, "RNN_TANH", 1, 1)
    x = torch.zeros(1, 1)
    first = state = model.initial_state(batch=1)
    gone = weakref.ref(first)
    del first
    for _ in range(100_000):
        state = state.add_input(x)
    assert gone() is not None
    state.output().sum().backward()
    assert model.weight_hh_l0.grad is not None
    del state
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_a_kept_chain_is_freed():
    model = make(fastrnn, "RNN_TANH", 1, 1)
    state = model.initial_state(batch=1)
    kept = [state := state.add_input(torch.zeros(1, 1)) for _ in range(100_000)]
    gone = weakref.ref(kept[0])
    assert kept[1].prev() is kept[0]
    del kept, state
    assert gone() is None


# -- Histories: steps with gradients on packed weights ---------------------------------------------


@pytest.fixture
def at_once(monkeypatch):
    """Histories begin with the first step."""
    monkeypatch.setattr(fastrnn._states, "_FIRST_STEPS", 0)


def in_history(state: fastrnn.State) -> bool:
    return state._core is not None and state._history is not None


def gradients_of(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_gradients(model, loss, expected):
    """The gradients of all parameters, of steps and of forward."""
    for own, right in zip(gradients_of(model, loss), gradients_of(model, expected), strict=True):
        torch.testing.assert_close(own, right)


def test_a_history_begins_when_packing_pays(cell):
    model = make(fastrnn, cell, F, H)
    states = walk(model.initial_state(batch=B), torch.randn(20, B, F))
    begins = [in_history(state) for state in states].index(True)
    assert begins == fastrnn._states._FIRST_STEPS
    assert all(map(in_history, states[begins:]))
    assert states[-1].output().requires_grad
    assert states[-1].prev() is states[-2]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("steps", [20, 600])
def test_gradients_of_a_history(cell, layers, steps):
    """Outputs here and there, and other states between: in pieces of a long sequence, too."""
    model = make(fastrnn, cell, F, H, num_layers=layers, dtype=torch.float64)
    x, hx = inputs(model, steps, B)
    hx = pack(tuple(t.requires_grad_() for t in unpack(hx)))
    weights = torch.randn(steps, B, H, dtype=torch.float64)
    states = walk(model.initial_state(hx), x)
    assert in_history(states[-1])
    places = [0, 3, 9, 10, steps // 2, steps - 1]
    output, _, *rest = model(x, hx, return_states=True)
    of_forward = rest[0]
    loss = sum((weights[t] * states[t].output()).sum() for t in range(steps) if t % 3)
    expected = sum((weights[t] * output[t]).sum() for t in range(steps) if t % 3)
    for t in places:
        # All states but the top layer's h, which return_states has not of an LSTM.
        own = states[t].s()[:layers]
        loss = loss + sum(((k + 2) * s.square()).sum() for k, s in enumerate(own))
        right = [of_forward[k][t] for k in range(layers)]
        expected = expected + sum(((k + 2) * s.square()).sum() for k, s in enumerate(right))
    leaves = [*unpack(hx), *model.parameters()]
    found = torch.autograd.grad(loss, leaves)
    for own, right in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(own, right)


@pytest.mark.usefixtures("at_once")
def test_gradcheck_of_a_history(cell):
    model = make(fastrnn, cell, 2, 3, num_layers=2, dtype=torch.float64)
    x, hx = inputs(model, 4, 2)
    leaves = [t.requires_grad_() for t in (*unpack(hx), *model.parameters())]

    def function(*others):
        s = model.initial_state(pack(tuple(others[: 1 + (cell == "LSTM")])))
        a = s.add_input(x[0]).add_input(x[1])
        b = a.add_input(x[2])
        c = a.add_input(x[3]).add_input(x[2])  # another branch
        assert all(map(in_history, (a, b, c)))
        return (*a.s(), b.output(), *c.s(), c.output())

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    # In one pass.
    assert torch.autograd.gradcheck(lambda *given: sum(t.sum() for t in function(*given)), leaves)


@pytest.mark.usefixtures("at_once")
def test_a_history_goes_on_after_other_steps(cell):
    """x with a gradient, a mask, a step without gradients, options: no step of a history."""
    model = make(fastrnn, cell, F, H, dtype=torch.float64)
    x, hx = inputs(model, 7, B)
    z = x[2].clone().requires_grad_()
    state = walk(model.initial_state(hx), x[:2])[-1]
    assert in_history(state)
    with torch.no_grad():
        aside = state.add_input(x[6])
        assert not aside.output().requires_grad
    state = state.add_input(z * state.output().mean())
    assert not in_history(state)
    valid = torch.tensor([True, False, True])
    state = walk(state, x[3:5])[-1].add_input(x[5], mask=valid).add_input(x[6])
    y, states = model(x[:2], hx)
    y, states = model((z * y[1].mean())[None], states)
    y, states = model(x[3:5], states)
    mask = torch.ones(1, B, dtype=torch.bool)
    y, states = model(x[5:6], states, mask=valid & mask)
    y, states = model(x[6:], states)
    torch.testing.assert_close(state.output(), y[0])
    leaves = [z, *model.parameters()]
    found = torch.autograd.grad(state.output().square().sum(), leaves)
    for own, right in zip(found, torch.autograd.grad(y.square().sum(), leaves), strict=True):
        torch.testing.assert_close(own, right)


@pytest.mark.usefixtures("at_once")
def test_passes_over_a_history():
    """Again, for some of the leaves only, of batches of gradients; hooks run once."""
    model = make(fastrnn, "LSTM", F, H, dtype=torch.float64)
    x, _ = inputs(model, 5, B)
    states = walk(model.initial_state(batch=B), x)
    y = torch.stack([state.output() for state in states])
    expected, _ = model(x)
    w = model.weight_hh_l0
    (right,) = torch.autograd.grad(expected.sum(), w)
    for _ in range(2):
        (own,) = torch.autograd.grad(y.sum(), w, retain_graph=True)
        torch.testing.assert_close(own, right)
    (own,) = torch.autograd.grad(
        y, w, torch.ones(2, *y.shape, dtype=y.dtype), is_grads_batched=True, retain_graph=True
    )
    torch.testing.assert_close(own, torch.stack([right, right]))
    calls = []
    w.register_hook(lambda gradient: calls.append(gradient))
    y.sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(w.grad, right)


@pytest.mark.usefixtures("at_once")
def test_what_has_changed_since_is_not_differentiated():
    model = make(fastrnn, "GRU", F, H)
    x = torch.randn(B, F)
    output = model.initial_state(batch=B).add_input(x).output()
    x.add_(1)
    with pytest.raises(RuntimeError, match="x has been changed in place"):
        output.sum().backward()
    output = model.initial_state(batch=B).add_input(x).output()
    with torch.no_grad():
        model.weight_ih_l0.add_(1)
    with pytest.raises(RuntimeError, match="a parameter has been changed in place"):
        output.sum().backward()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "change",
    [change_in_place, change_by_data, change_parameter, change_by_state_dict, change_bias],
)
def test_a_history_begins_with_the_weights_as_they_are(change):
    """Changes through .data, too, of which training loops are full."""
    model = make(fastrnn, "LSTM", F, H)
    x, hx = inputs(model, T, B)
    before = walk(model.initial_state(hx), x)[-1].output()
    with torch.no_grad():
        change(model)
    state = walk(model.initial_state(hx), x)[-1]
    assert in_history(state)
    assert not torch.equal(before, state.output())
    torch.testing.assert_close(state.output(), model(x, hx)[0][-1])


@pytest.mark.usefixtures("at_once")
def test_outputs_of_a_history_are_the_callers_own():
    model = make(fastrnn, "GRU", F, H, dtype=torch.float64)
    x, _ = inputs(model, 3, B)
    states = walk(model.initial_state(batch=B), x)
    for state in states:
        with torch.no_grad():
            state.output().zero_()
            state.s()[0].zero_()
    expected, _ = model(x)
    output = states[-1].output()
    torch.testing.assert_close(output, expected[-1])
    assert_gradients(model, output.sum(), expected[-1].sum())


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("is_differentiated", [True, False])
def test_a_history_is_freed(is_differentiated):
    model = make(fastrnn, "LSTM", F, H)
    states = walk(model.initial_state(batch=B), torch.randn(4, B, F))
    gone = weakref.ref(states[0])
    output = states[-1].output()
    first = states[0].output()
    del states
    gc.disable()
    try:
        assert gone() is not None
        if is_differentiated:
            output.sum().backward()
        del output, first
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("at_once")
def test_a_history_of_other_weights():
    """torch.func.functional_call, whose weights are gone from the module before backward."""
    model = make(fastrnn, "LSTM", F, H, dtype=torch.float64)
    x, _ = inputs(model, 4, B)
    other = {k: (2 * v).detach().requires_grad_() for k, v in model.named_parameters()}

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = model

        def forward(self, x):
            return walk(self.rnn.initial_state(batch=B), x)[-1].output()

    given = {f"rnn.{k}": v for k, v in other.items()}
    output = torch.func.functional_call(Steps(), given, (x,))
    expected, _ = torch.func.functional_call(model, other, (x,))
    torch.testing.assert_close(output, expected[-1])
    found = torch.autograd.grad(output.sum(), list(other.values()))
    right = torch.autograd.grad(expected[-1].sum(), list(other.values()))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


# -- Errors ----------------------------------------------------------------------------------------


def test_bidirectional():
    model = fastrnn.GRU(F, H, bidirectional=True)
    with pytest.raises(
        ValueError, match=r"expected a unidirectional module, got a .* begins at the last"
    ):
        model.initial_state()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s, x: s.add_input(x[0, 0]), r"x: expected a tensor of \[3, 5\], got \[5\]"),
        (lambda m, s, x: s.add_input(x[0, :, :4]), r"x: expected a tensor of \[3, 5\]"),
        (lambda m, s, x: s.add_input(x[0, :2]), r"x: expected a tensor of \[3, 5\], got \[2, 5\]"),
        (lambda m, s, x: s.add_input(x[0].double()), "x: expected torch.float32"),
        (lambda m, s, x: s.add_input(None), r"x: expected a tensor of \[3, 5\], got NoneType"),
        (
            lambda m, s, x: s.add_input(x[0], mask=torch.ones(2).bool()),
            r"mask: expected torch.bool",
        ),
        (lambda m, s, x: s.add_input(x[0], mask=torch.ones(3)), r"mask: expected torch.bool \[3\]"),
        (lambda m, s, x: s.add_inputs(x, mask=torch.ones(2, 3)), "mask: expected 7 steps"),
        (lambda m, s, x: s.transduce(x[0]), r"xs: expected a tensor of \[T, 3, 5\]"),
        (lambda m, s, x: s.select([3]), r"rows: expected numbers in \[0, 3\)"),
        (lambda m, s, x: s.select([-1]), r"rows: expected numbers in \[0, 3\)"),
        (lambda m, s, x: s.select([0.5]), "rows: expected a list of integers"),
        (lambda m, s, x: s.select(torch.ones(2).bool()), r"rows: expected bool \[3\]"),
        (
            lambda m, s, x: m.initial_state().select([0]),
            "rows: expected a state of a batch, got ",
        ),
        (lambda m, s, x: s.set_h(s.h() * 2), "h: expected 1 tensors, got 2"),
        (lambda m, s, x: s.set_h([s.output()[:2]]), r"h\[0\]: expected .* \[3, 19\]"),
        (lambda m, s, x: s.set_s(None), "s: expected 2 tensors, got NoneType"),
        (lambda m, s, x: m.initial_state(s.h()[0]), r"hx: expected \(h_0, c_0\)"),
        (lambda m, s, x: m.initial_state((x, x)), r"hx: expected h_0 of \[1, 3, 19\]"),
        (lambda m, s, x: m.initial_state(s.hx, batch=4), "batch: expected that of hx, 3"),
        (lambda m, s, x: m.initial_state(batch=-1), "batch: expected an integer of at least 0"),
        (lambda m, s, x: m.initial_state(batch="2"), "batch: expected an integer of at least 0"),
        (lambda m, s, x: m.double().initial_state(s.hx), r"hx: expected h_0 in torch\.float64"),
    ],
)
def test_errors(call, message, with_gradients):
    model = make(fastrnn, "LSTM", F, H)
    x, hx = inputs(model, T, B)
    with pytest.raises(ValueError, match=message):
        call(model, model.initial_state(hx), x)


def test_no_state_of_its_own():
    with pytest.raises(TypeError, match="call initial_state"):
        fastrnn.State()


def test_empty_batches(cell, with_gradients):
    model = make(fastrnn, cell, F, H)
    state = model.initial_state(batch=0).add_input(torch.zeros(0, F))
    assert state.output().shape == (0, H)
    assert state.transduce(torch.zeros(T, 0, F)).shape == (T, 0, H)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype, with_gradients):
    model = make(fastrnn, "LSTM", 16, 32, dtype=dtype)
    x, hx = inputs(model, T, B)
    states = walk(model.initial_state(hx), x)
    expected, _ = model(x, hx)
    actual = torch.stack([s.output() for s in states])
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.02)


@torch.no_grad()
def test_autocast():
    model = make(fastrnn, "LSTM", F, H)
    x, hx = inputs(model, T, B)
    state = model.initial_state(hx)
    with torch.autocast("cpu", torch.bfloat16):
        output = state.add_input(x[0]).output()
        assert output.dtype == model(x[:1], hx)[0].dtype
    torch.testing.assert_close(output.float(), model(x[:1], hx)[0][0], rtol=0.05, atol=0.02)


def test_transforms():
    """torch.func goes through steps as through forward."""
    model = make(fastrnn, "GRU", 2, 3)
    x = torch.randn(4, B, 2)

    def loss(x):
        state = model.initial_state(batch=B)
        for step in x:
            state = state.add_input(step)
        return state.output().square().sum()

    expected = torch.func.grad(lambda x: model(x)[0][-1].square().sum())(x)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)


def test_every_mode_is_tested():
    assert set(CELLS) == set(fastrnn._layer.BUILT_IN)


@pytest.mark.parametrize("begins", [0, 12])
def test_steps_with_gradients_under_autocast(cell, begins, monkeypatch):
    """Steps are taken one by one there, and the types are those of the module's calls."""
    results = []
    for first in (_states._FIRST_STEPS, 10**6):
        monkeypatch.setattr(_states, "_FIRST_STEPS", first)
        model, outputs = make(fastrnn, cell, 5, 7, 2), []
        state = model.initial_state(batch=3)
        for i, x in enumerate(torch.randn(20, 3, 5, generator=seeded())):
            with torch.autocast("cpu", torch.bfloat16, enabled=i >= begins):
                state = state.add_input(x)
                outputs.append(state.output())
        torch.stack([h.float() for h in outputs]).square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append({**dict(enumerate(outputs)), **grads})
    for actual, expected in zip(*(r.values() for r in results), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected)
