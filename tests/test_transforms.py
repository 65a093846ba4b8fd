"""torch.func and autograd beyond one backward, against torch.nn or the reference implementation."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import fastrnn
from fastrnn import reference
from helpers import assert_close, from_lengths, inputs, make, make_mask, pack, unpack

T, B, H = 3, 2, 3
MASKS = {"full": None, "holes": make_mask("holes", T, B)}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(params=MASKS)
def mask(request):
    return MASKS[request.param]


@pytest.fixture
def model(cell, bidirectional):
    return make(fastrnn, cell, 2, H, 2, bidirectional=bidirectional, dtype=torch.float64)


def flat(model, mask=None):
    """(params, x, *states) -> (output, *final states), by the model and by the reference."""
    options = {"num_layers": model.num_layers, "bidirectional": model.bidirectional, "mask": mask}

    def ours(params, x, *states):
        output, hx = functional_call(model, params, (x, pack(states)), {"mask": mask})
        return output, *unpack(hx)

    def by_reference(params, x, *states):
        weights = list(params.values())
        output, hx = reference.rnn(model.mode, x, pack(states), weights, **options)
        return output, *unpack(hx)

    return ours, by_reference


def loss(forward):
    return lambda *args: sum(t.sin().sum() for t in forward(*args))


def arguments(model, samples: int = 0):
    """Parameters, x and states; with `samples`, that many of x and of the states."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    drawn = [inputs(model, T, B, seed=seed) for seed in range(max(samples, 1))]
    each = [(x, *unpack(hx)) for x, hx in drawn]
    return params, *(torch.stack(t) if samples else t[0] for t in zip(*each))


def same(actual, expected) -> None:
    leaves = [torch.utils._pytree.tree_leaves(t) for t in (actual, expected)]
    assert_close(*(dict(enumerate(t.detach() for t in each)) for each in leaves), 1e-12)


def test_gradcheck_and_gradgradcheck(model, mask):
    params, x, *states = arguments(model)
    ours, _ = flat(model, mask)
    leaves = [t.requires_grad_() for t in (x, *states, params["weight_hh_l0"])]

    def forward(x, *rest):
        return ours(params | {"weight_hh_l0": rest[-1]}, x, *rest[:-1])

    assert torch.autograd.gradcheck(forward, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(forward, leaves, fast_mode=True)


def test_gradgradcheck_of_all(cell):
    """Slow mode, every parameter: double backward has no tensor that it forgets."""
    model = make(fastrnn, cell, 2, 2, dtype=torch.float64)
    params, x, *states = arguments(model)

    def forward(*tensors):
        each = dict(zip(params, tensors))
        return flat(model)[0](each, *tensors[len(params) :])

    leaves = [t.requires_grad_() for t in (*params.values(), x, *states)]
    assert torch.autograd.gradgradcheck(forward, leaves)


def test_grad(model, mask):
    args = arguments(model)
    every = tuple(range(len(args)))
    same(*(grad(loss(f), every)(*args) for f in flat(model, mask)))


def test_vmap_over_inputs(model, mask):
    args = arguments(model, samples=3)
    dims = (None, *(0,) * (len(args) - 1))
    same(*(vmap(f, dims)(*args) for f in flat(model, mask)))


def test_vmap_along_another_dimension(model):
    """And with states that all samples share."""
    params, x, *_ = arguments(model, samples=3)
    _, _, *states = arguments(model)
    x = x.movedim(0, 2)
    dims = (None, 2, *(None,) * len(states))
    same(*(vmap(f, dims, out_dims=1)(params, x, *states) for f in flat(model)))


def test_gradient_of_vmap(model, mask):
    args = arguments(model, samples=3)
    dims = (None, *(0,) * (len(args) - 1))
    results = [grad(loss(vmap(f, dims)), (0, 1))(*args) for f in flat(model, mask)]
    same(*results)


def test_ensemble(cell, bidirectional, mask):
    options = {"bidirectional": bidirectional, "dtype": torch.float64}
    models = [make(fastrnn, cell, 2, H, 2, **options) for _ in range(3)]
    for scale, each in enumerate(models, 1):
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(each.parameters()) * scale, each.parameters()
        )
    stacked, _ = stack_module_state(models)
    _, x, *states = arguments(models[0])
    ours, _ = flat(models[0], mask)
    actual = vmap(ours, (0, None, *(None,) * len(states)))(stacked, x, *states)
    each = [ours(dict(m.named_parameters()), x, *states) for m in models]
    same(actual, tuple(torch.stack(t) for t in zip(*each)))


def test_per_sample_gradients(model, mask):
    args = arguments(model, samples=3)
    dims = (None, *(0,) * (len(args) - 1))
    same(*(vmap(grad(loss(f), (0, 1)), dims)(*args) for f in flat(model, mask)))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("by", ["mask", "lengths"])
def test_per_sample_gradients_with_a_length_of_each_sample(cell, by, batch_first):
    options = {"bidirectional": True, "batch_first": batch_first, "dtype": torch.float64}
    model = make(fastrnn, cell, 2, H, 2, **options)
    params = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(3, 4, 1, 2, dtype=torch.float64)
    lengths = torch.tensor([[4], [0], [2]])
    given = lengths if by == "lengths" else torch.stack([from_lengths(n, 4) for n in lengths])
    if batch_first:
        x = x.transpose(1, 2)
        given = given.transpose(1, 2) if by == "mask" else given

    def total(params, x, given):
        return functional_call(model, params, (x,), {by: given})[0].sin().sum()

    per_sample = grad(total)
    actual = vmap(per_sample, (None, 0, 0))(params, x, given)
    each = [per_sample(params, *sample) for sample in zip(x, given)]
    same(actual, {name: torch.stack([e[name] for e in each]) for name in params})
    if by == "lengths":
        with pytest.raises(ValueError, match=r"lengths: expected 1 .* in \[0, 4\], got 7"):
            vmap(per_sample, (None, 0, 0))(params, x, torch.tensor([[4], [7], [2]]))


def test_jvp(model, mask):
    args = arguments(model)
    tangents = torch.utils._pytree.tree_map(torch.randn_like, args)
    same(*(jvp(f, args, tangents) for f in flat(model, mask)))


@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_without_torch_func(model, mask, frozen):
    """No tensor requires a gradient here, and yet the tangent must arrive."""
    params, x, *states = arguments(model)
    if not frozen:
        params = dict(model.named_parameters())
    tangent = torch.randn_like(x)
    results = []
    for f in flat(model, mask):
        with torch.set_grad_enabled(not frozen), forward_ad.dual_level():
            outputs = f(params, forward_ad.make_dual(x, tangent), *states)
            results.append([forward_ad.unpack_dual(t).tangent for t in outputs])
    same(*results)


def test_jacobians(model, mask):
    args = arguments(model)
    results = [jacrev(f, (0, 1))(*args) for f in flat(model, mask)]
    same(*results)
    same(jacfwd(flat(model, mask)[0], (0, 1))(*args), results[1])


def test_hessian(model, mask):
    args = arguments(model)
    same(*(hessian(loss(f), 1)(*args) for f in flat(model, mask)))
    ours, by_reference = flat(model, mask)
    same(jacrev(jacrev(loss(ours), 1), 1)(*args), hessian(loss(by_reference), 1)(*args))


def test_per_sample_jvp(model):
    """Forward mode within vmap, as jacfwd has it, here with samples of their own."""
    params, x, *states = arguments(model, samples=3)
    rest = (0,) * (1 + len(states))

    def along(f):
        return lambda x, *states: jvp(lambda x: f(params, x, *states), (x,), (x.cos(),))

    same(*(vmap(along(f), rest)(x, *states) for f in flat(model)))


def test_backward_in_eval_and_retain_graph(model, mask):
    model.eval()
    params, x, *states = arguments(model)
    x.requires_grad_()
    ours, by_reference = flat(model, mask)
    expected = torch.autograd.grad(loss(by_reference)(params, x, *states), x)
    total = loss(ours)(params, x, *states)
    same(torch.autograd.grad(total, x, retain_graph=True), expected)
    same(torch.autograd.grad(total, x), expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, x)


# -- The vmap that is older than torch.func's ------------------------------------------------------

BATCHED = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "checkpoint": {"checkpoint_every": 2},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", BATCHED.values(), ids=BATCHED)
def test_batched_gradients(cell, options, masked):
    """torch.autograd.grad(is_grads_batched=True), and its own gradient."""
    model = make(fastrnn, cell, 3, 4, 2, dtype=torch.float64, **options)
    x, hx = inputs(model, 5, 3)
    leaves = [t.requires_grad_() for t in (x, *unpack(hx))]
    wanted = [*leaves, *model.parameters()]
    call = {"lengths": [5, 0, 2]} if masked else {}
    output, last = model(x, hx, **call)
    outputs = [output, *unpack(last)]
    along = [torch.randn(6, *t.shape, dtype=t.dtype) for t in outputs]

    def second(grads):
        return torch.autograd.grad(grads[0].sin().sum(), leaves, retain_graph=True)

    grad = partial(torch.autograd.grad, outputs, wanted, retain_graph=True)
    plain = grad(along, is_grads_batched=True)
    actual = grad(along, is_grads_batched=True, create_graph=True)
    each = [grad([v[i] for v in along], create_graph=True) for i in range(6)]
    expected = [torch.stack(g) for g in zip(*each)]
    for got in (plain, actual):
        assert_close(dict(enumerate(got)), dict(enumerate(expected)), 1e-12)
    assert_close(dict(enumerate(second(actual))), dict(enumerate(second(expected))), 1e-12)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_vectorized_jacobian_and_hessian(name):
    """torch.autograd.functional, as of the original classes."""
    results = []
    x = torch.randn(*([4] if "Cell" not in name else []), 2, 3, dtype=torch.float64)
    for library in (fastrnn, nn):
        torch.manual_seed(0)
        model = getattr(library, name)(3, 4, dtype=torch.float64)

        def output(x, model=model):
            result = model(x)
            return (result if isinstance(result, torch.Tensor) else result[0]).sin()

        jacobian = torch.autograd.functional.jacobian(output, x, vectorize=True)
        hessian = torch.autograd.functional.hessian(lambda x: output(x).sum(), x, vectorize=True)
        results.append({"jacobian": jacobian, "hessian": hessian})
    assert_close(*results)
