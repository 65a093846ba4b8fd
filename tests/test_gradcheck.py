"""Gradients against finite differences in float64: input, initial state and every parameter."""

import pytest
import torch
from torch.func import functional_call

import fastrnn
from helpers import inputs, make, make_mask, pack, unpack


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("mask", [None, "lengths", "holes"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_gradcheck(cell, num_layers, bidirectional, mask, hx):
    model = make(fastrnn, cell, 2, 2, num_layers, bidirectional=bidirectional, dtype=torch.float64)
    x, hx = inputs(model, 3, 3, hx=hx)
    if mask == "lengths":
        masks = {"lengths": [2, 0, 3]}
    else:
        masks = {} if mask is None else {"mask": make_mask(mask, 3, 3)}
    states, params = unpack(hx), dict(model.named_parameters())

    def forward(x, *rest):
        hx = pack(rest[: len(states)])
        weights = dict(zip(params, rest[len(states) :], strict=True))
        output, h_n = functional_call(model, weights, (x, hx), masks)
        return output, *unpack(h_n)

    leaves = (t.detach().requires_grad_() for t in (x, *states, *params.values()))
    assert torch.autograd.gradcheck(forward, tuple(leaves))
