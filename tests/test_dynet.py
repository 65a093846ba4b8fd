"""States against DyNet's own builders: the same numbers, in branches too."""

import numpy as np
import pytest
import torch

import fastrnn

dynet = pytest.importorskip("dynet")

LAYERS, F, H = 2, 3, 4
PARAMETERS = dynet.ParameterCollection()  # which a builder does not keep alive
PATHS = [(0, 1, 2), (0, 1, 3, 4), (0, 5), (0, 5, 5)]


def lstm():
    """An LSTM of both, with the same weights. DyNet's gates are i, f, o, g, its f with 1 added."""
    theirs = dynet.VanillaLSTMBuilder(LAYERS, F, H, PARAMETERS)
    ours = fastrnn.LSTM(F, H, LAYERS)
    with torch.no_grad():
        for k, (x, h, b) in enumerate(theirs.get_parameters()):
            for name, given in (("weight_ih", x), ("weight_hh", h), ("bias_ih", b)):
                i, f, o, g = torch.from_numpy(given.as_array()).clone().chunk(4)
                own = torch.cat((i, f + (name == "bias_ih"), g, o))
                getattr(ours, f"{name}_l{k}").copy_(own)
            getattr(ours, f"bias_hh_l{k}").zero_()
    return theirs, ours


def rnn():
    theirs = dynet.SimpleRNNBuilder(LAYERS, F, H, PARAMETERS)
    ours = fastrnn.RNN(F, H, LAYERS)
    with torch.no_grad():
        for k, (x, h, b) in enumerate(theirs.get_parameters()):
            for name, given in (("weight_ih", x), ("weight_hh", h), ("bias_ih", b)):
                getattr(ours, f"{name}_l{k}").copy_(torch.from_numpy(given.as_array()))
            getattr(ours, f"bias_hh_l{k}").zero_()
    return theirs, ours


def tree(first, inputs):
    """The states after each path, each step taken once."""
    nodes = {(): first}
    for path in PATHS:
        for end in range(1, len(path) + 1):
            if path[:end] not in nodes:
                nodes[path[:end]] = nodes[path[: end - 1]].add_input(inputs[path[end - 1]])
    return nodes


@pytest.mark.parametrize("make", [lstm, rnn])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_states(make, with_gradients):
    theirs, ours = make()
    x = np.random.default_rng(0).normal(size=(6, F)).astype(np.float32)
    dynet.renew_cg()
    given = [dynet.inputVector(row) for row in x]
    expected = tree(theirs.initial_state(), given)
    xs = torch.from_numpy(x).requires_grad_(with_gradients)
    with torch.set_grad_enabled(with_gradients):
        actual = tree(ours.initial_state(), xs)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for path in expected:
        if not path:
            continue
        own, right = actual[path], expected[path]
        np.testing.assert_allclose(own.output().detach(), right.output().npvalue(), **close)
        for mine, dynets in ((own.h(), right.h()), (own.s(), right.s())):
            for one, other in zip(mine, dynets, strict=True):
                np.testing.assert_allclose(one.detach(), other.npvalue(), **close)
        before = right.prev()
        if len(path) > 1:
            np.testing.assert_allclose(
                own.prev().output().detach(), before.output().npvalue(), **close
            )
    row = expected[(0,)].transduce(given)
    np.testing.assert_allclose(
        actual[(0,)].transduce(xs).detach(), [each.npvalue() for each in row], **close
    )
    if not with_gradients:
        return
    total = dynet.esum([dynet.squared_norm(expected[path].output()) for path in PATHS])
    total.value()
    total.backward(full=True)
    sum(actual[path].output().square().sum() for path in PATHS).backward()
    np.testing.assert_allclose(xs.grad, [each.gradient() for each in given], **close)


@pytest.mark.parametrize("make", [lstm, rnn])
def test_set_states(make):
    theirs, ours = make()
    dynet.renew_cg()
    count = len(theirs.initial_state().add_input(dynet.inputVector([0.0] * F)).s())
    values = np.random.default_rng(1).normal(size=(count, H)).astype(np.float32)
    x = np.ones(F, np.float32)
    right = theirs.initial_state().add_input(dynet.inputVector(x))
    right = right.set_s([dynet.inputVector(v) for v in values]).add_input(dynet.inputVector(x))
    own = ours.initial_state().add_input(torch.from_numpy(x))
    own = own.set_s(list(torch.from_numpy(values))).add_input(torch.from_numpy(x))
    np.testing.assert_allclose(own.output().detach(), right.output().npvalue(), rtol=1e-5)
