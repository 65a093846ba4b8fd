"""The autograd.Functions: graph, versions, determinism, partial and double backward."""

import pytest
import torch

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
    pair,
    unpack,
)

T, B, H = 5, 4, 7


def graph(*outputs) -> set[str]:
    """Names of all nodes behind the outputs."""
    nodes, stack = set(), [t.grad_fn for t in outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack += [following for following, _ in node.next_functions]
    return {node.name() for node in nodes}


@pytest.mark.parametrize("name", ["ElmanFunction", "GRUFunction", "LSTMFunction"])
def test_new_style_function(name):
    function = getattr(fastrnn, name)
    assert issubclass(function, torch.autograd.Function)
    assert function.setup_context is not torch.autograd.Function.setup_context


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_one_layer_against_the_reference(cell, dtype, bidirectional, ragged, hx):
    """apply() itself, with every c_t of an LSTM as an output that has a gradient."""
    model = make(fastrnn, cell, 3, H, bidirectional=bidirectional, dtype=dtype)
    params = list(model.parameters())
    directions = 1 + bidirectional
    each = [params[i : i + 4] for i in range(0, len(params), 4)]
    B = 5  # ragged: the last row has no step
    x, hx = inputs(model, 4, B, hx=hx)
    states = tuple(h.requires_grad_() for h in unpack(hx))
    x.requires_grad_()
    mask = from_lengths([4, 3, 3, 1, 0], 4) if ragged else torch.ones(4, B).bool()

    rows = x[mask] if ragged else x
    sizes = mask.sum(1) if ragged else None
    h_0, c_0, *_ = *states, None, None
    output, h_n, c_n, cells, *_ = CELLS[cell][2].apply(
        cell, directions, B, sizes, None, False, rows, h_0, c_0, *params
    )
    start = states or (x.new_zeros(directions, B, H),) * (1 + (cell == "LSTM"))
    wanted, final, wanted_cells = reference.layer(cell, x, start, each, mask)
    actual, expected = {"output": output, "h_n": h_n}, {"output": wanted, "h_n": final[0]}
    if cell == "LSTM":
        actual |= {"c_n": c_n, "cells": cells}
        expected |= {"c_n": final[1], "cells": wanted_cells}
    if ragged:
        expected |= {name: expected[name][mask] for name in ("output", "cells") if name in expected}

    leaves = [x, *states, *params]
    results = []
    for tensors in (actual, expected):
        loss = sum(tensors[name].sin().sum() for name in tensors)
        results.append(tensors | dict(enumerate(torch.autograd.grad(loss, leaves))))
    assert_close(*results)


@pytest.mark.parametrize("masked", [False, True])
def test_modules_run_the_fused_function(cell, dtype, bidirectional, masked):
    """No quiet way round the kernels, which all other tests would not notice."""
    model = make(fastrnn, cell, 3, H, 2, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, T, B)
    output, _ = model(x, hx, mask=make_mask("holes", T, B) if masked else None)
    names = graph(output)
    assert any(CELLS[cell][2].__name__ in name for name in names), names
    assert not {"TanhBackward0", "SigmoidBackward0", "ReluBackward0"} & names


@pytest.mark.parametrize("masked", [False, True])
def test_backward_twice_and_run_to_run(cell, dtype, bidirectional, masked):
    model = make(fastrnn, cell, 3, H, 2, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, T, B)
    mask = make_mask("holes", T, B) if masked else None
    states = tuple(h.requires_grad_() for h in unpack(hx))
    wanted = [x.requires_grad_(), *states, *model.parameters()]

    def forward():
        output, h_n = model(x, pack(states), mask=mask)
        return output, sum([output.square().sum(), *(h.cos().sum() for h in unpack(h_n))])

    output, loss = forward()
    kept = output.detach().clone()
    first = dict(enumerate(torch.autograd.grad(loss, wanted, retain_graph=True)))
    assert_same_bits({"output": output}, {"output": kept})
    assert_same_bits(dict(enumerate(torch.autograd.grad(loss, wanted, retain_graph=True))), first)
    assert_same_bits(dict(enumerate(torch.autograd.grad(loss, wanted))), first)
    for _ in range(3):
        output, loss = forward()
        assert_same_bits({"output": output}, {"output": kept})
        assert_same_bits(dict(enumerate(torch.autograd.grad(loss, wanted))), first)


def test_gradients_accumulate(cell):
    model = make(fastrnn, cell, 3, H, dtype=torch.float64)
    x, hx = inputs(model, T, B)
    model(x, hx)[0].sum().backward()
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    model(x, hx)[0].sum().backward()
    twice = {name: p.grad / 2 for name, p in model.named_parameters()}
    assert_same_bits(twice, once)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"])
def test_weight_modified_before_backward(cell, dtype, bidirectional, name):
    model = make(fastrnn, cell, 3, H, 2, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, T, B)
    output, _ = model(x.requires_grad_(), hx)
    with torch.no_grad():
        getattr(model, name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("which", ["input", "h_0", "output", "h_n", "bias_hh_l0"])
def test_never_a_wrong_gradient_after_a_change_in_place(cell, bidirectional, which):
    """Either torch's version error or the gradients of the values that forward saw."""
    options = {"bidirectional": bidirectional, "dtype": torch.float64}
    ours, theirs = pair(cell, 3, H, **options)
    x, hx = inputs(ours, T, B)
    expected = torch.autograd.grad(theirs(x, hx)[0].sum(), [*theirs.parameters()])
    output, h_n = ours(x, hx)
    loss = output.sum()  # keeps no tensor of its own
    tensors = {"input": x, "h_0": unpack(hx)[0], "output": output, "h_n": unpack(h_n)[0]}
    with torch.no_grad():
        tensors.get(which, ours.bias_hh_l0).mul_(3).add_(1)
    try:
        actual = torch.autograd.grad(loss, [*ours.parameters()])
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    else:
        assert_close(dict(enumerate(actual)), dict(enumerate(expected)))


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_without_gradients(cell, dtype, bidirectional, inference):
    model = make(fastrnn, cell, 3, H, 2, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, T, B)
    expected = model(x, hx)
    with inference():
        actual = model(x, hx)
    results = []
    for output, h_n in (actual, expected):
        results.append({"output": output, **dict(enumerate(unpack(h_n)))})
    assert all(t.grad_fn is None for t in results[0].values())
    assert_same_bits(*results)
    frozen, _ = model.requires_grad_(False)(x, hx)
    assert not frozen.requires_grad
    assert torch.equal(frozen, expected[0])


@pytest.mark.parametrize("part", ["output", "forward half", "backward half", "h_n", "c_n", "step"])
def test_gradient_of_a_part(cell, dtype, part):
    """What is not used brings zeros, in an unused direction too, never None."""
    if part == "c_n" and cell != "LSTM":
        pytest.skip("no cell state")
    models = pair(cell, 3, H, 2, bidirectional=True, dtype=dtype)
    x, hx = inputs(models[0], T, B)
    results = []
    for model in models:
        leaf = x.clone().requires_grad_()
        states = tuple(h.clone().requires_grad_() for h in unpack(hx))
        output, h_n = model(leaf, pack(states))
        used = {
            "output": output,
            "forward half": output[..., :H],
            "backward half": output[..., H:],
            "h_n": unpack(h_n)[0],
            "c_n": unpack(h_n)[-1],
            "step": output[2],
        }[part]
        used.square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
        results[-1] |= {"input": leaf.grad} | dict(enumerate(h.grad for h in states))
        assert all(grad is not None for grad in results[-1].values())
    assert_close(*results)


@pytest.mark.parametrize("wanted", ["input", "h_0", "weight_ih_l0", "weight_hh_l1", "bias_ih_l0"])
def test_gradient_for_one_only(cell, dtype, wanted):
    models = pair(cell, 3, H, 2, bidirectional=True, dtype=dtype)
    x, hx = inputs(models[0], T, B)
    results = []
    for model in models:
        model.requires_grad_(False)
        leaf, states = x.clone(), tuple(h.clone() for h in unpack(hx))
        target = {"input": leaf, "h_0": states[0]}.get(wanted)
        target = getattr(model, wanted) if target is None else target
        target.requires_grad_()
        model(leaf, pack(states))[0].square().sum().backward()
        others = [p for p in (leaf, *states, *model.parameters()) if p is not target]
        assert all(p.grad is None for p in others)
        results.append({wanted: target.grad})
    assert_close(*results)


def test_truncated_backpropagation(cell, dtype):
    """State carried detached from chunk to chunk, and attached: both as torch does."""
    for detach in (True, False):
        models = pair(cell, 3, H, 2, dtype=dtype)
        x, hx = inputs(models[0], 9, B)
        for model in models:
            state, loss = hx, 0
            for chunk in x.split(3):
                output, state = model(chunk, state)
                loss = loss + output.square().sum()
                state = pack(tuple(h.detach() for h in unpack(state))) if detach else state
            loss.backward()
        ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in models)
        assert_close(ours, theirs)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_double_backward(cell, bidirectional, num_layers):
    options = {"bidirectional": bidirectional, "dtype": torch.float64}
    models = pair(cell, 3, H, num_layers, **options)
    x, hx = inputs(models[0], T, B)
    results = []
    for model in models:
        states = tuple(h.clone().requires_grad_() for h in unpack(hx))
        wanted = [x.clone().requires_grad_(), *states, *model.parameters()]
        output, h_n = model(wanted[0], pack(states))
        loss = output.square().sum() + sum(h.sin().sum() for h in unpack(h_n))
        grads = torch.autograd.grad(loss, wanted, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        results.append(dict(enumerate(torch.autograd.grad(penalty, wanted))))
    assert_close(*results, 1e-11)


def test_double_backward_under_a_mask(cell, bidirectional):
    model = make(fastrnn, cell, 2, 2, bidirectional=bidirectional, dtype=torch.float64)
    x, hx = inputs(model, 3, 3)
    mask = make_mask("holes", 3, 3)
    states = unpack(hx)

    def forward(x, *states):
        output, h_n = model(x, pack(states), mask=mask)
        return output, *unpack(h_n)

    leaves = [t.clone().requires_grad_() for t in (x, *states)]
    assert torch.autograd.gradgradcheck(forward, leaves)


def test_two_threads_at_once(cell):
    """The scan keeps no state between calls that two callers could share."""
    from concurrent.futures import ThreadPoolExecutor

    model = make(fastrnn, cell, 3, H, 2, bidirectional=True)
    x, hx = inputs(model, 20, 9)

    def call(_):
        output, _h = model(x, hx)
        grads = torch.autograd.grad(output.sum(), [*model.parameters()])
        return dict(enumerate((output, *grads)))

    expected = call(0)
    with ThreadPoolExecutor(2) as pool:
        for actual in pool.map(call, range(8)):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("flagged", [torch._neg_view, torch._efficientzerotensor], ids=str)
def test_states_in_flags(cell, flagged):
    """Negation and zeros that stand in a tensor's flags alone, not in its memory."""
    model = make(fastrnn, cell, 3, 7)
    x, hx = inputs(model, 4, 2)
    given = [
        flagged(h) if flagged is torch._neg_view else flagged(h.shape, dtype=h.dtype)
        for h in unpack(hx)
    ]
    results = []
    for states in (given, [h.clone() if h._is_zerotensor() else h.resolve_neg() for h in given]):
        output, _ = model(x, pack(tuple(states)))
        results.append([output, *torch.autograd.grad(output.sum(), list(model.parameters()))])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


def test_saved_tensors_of_other_strides(cell):
    """A hook may hand back what forward saved in another layout."""

    def restride(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    model = make(fastrnn, cell, 3, 7, bidirectional=True)
    x, hx = inputs(model, 4, 2)
    grads = []
    for unpack_saved in (lambda t: t, restride):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack_saved):
            output, _ = model(x, hx)
        grads.append(torch.autograd.grad(output.sum(), list(model.parameters())))
    for actual, expected in zip(*grads):
        assert torch.equal(actual, expected)


def test_no_c_0_without_a_cell_state():
    model = make(fastrnn, "GRU", 3, 7)
    c_0 = torch.zeros(1, 2, 7, requires_grad=True)
    x = torch.zeros(4, 2, 3)
    with pytest.raises(ValueError, match="c_0: expected None for GRU"):
        fastrnn.GRUFunction.apply("GRU", 1, 2, None, None, False, x, None, c_0, *model.parameters())


WRONG_MODES = [("LSTM", "GRU"), ("GRU", "LSTM"), ("Elman", "GRU"), ("LSTM", "lstm"), ("GRU", None)]


@pytest.mark.parametrize(("name", "mode"), WRONG_MODES)
def test_mode_of_another_class(name, mode):
    model = make(fastrnn, "GRU", 3, 7)
    x = torch.zeros(4, 2, 3)
    with pytest.raises(ValueError, match=rf"mode: expected .*{name[0]}.*, got {mode!r}"):
        getattr(fastrnn, f"{name}Function").apply(
            mode, 1, 2, None, None, False, x, None, None, *model.parameters()
        )


@pytest.mark.parametrize("requires_grad", [True, False])
def test_missing_weights(cell, requires_grad):
    model = make(fastrnn, cell, 3, 7, bidirectional=True).requires_grad_(requires_grad)
    weights = list(model.parameters())
    x = torch.zeros(4, 2, 3)

    def apply(*weights):
        CELLS[cell][2].apply(cell, 2, 2, None, None, False, x, None, None, *weights)

    apply(*weights)
    for count in (0, 1, 5, 7, 12):
        with pytest.raises(ValueError, match=rf"weights: expected 2 to 5 .*, got {count} for 2"):
            apply(*(weights * 2)[:count])
    for i in (0, 3, 7):
        with pytest.raises(ValueError, match=rf"weights\[{i}\]: expected a tensor, got NoneType"):
            apply(*weights[:i], None, *weights[i + 1 :])
    for i, name in ((1, "weight_hh"), (4, "weight_ih"), (6, "bias_ih")):
        with pytest.raises(ValueError, match=rf"{name}.*: expected .*, got "):
            apply(*weights[:i], torch.zeros(1, 1, 1), *weights[i + 1 :])
