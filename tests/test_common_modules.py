"""torch's own list of cases for its modules, `module_db`, run with our classes in their place.

Each test asks of all cases what torch asks in its test/test_modules.py on the CPU; test_parity asks
for torch.nn's numbers too. torch leaves nothing out on the CPU, see test_torch_skips_nothing.
"""

import copy
import io
import itertools

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import fastrnn
from helpers import TOLERANCE, assert_close, assert_same_bits

profile = hypothesis.settings.get_current_profile_name()
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db  # noqa: E402
from torch.testing._internal.common_utils import noncontiguous_like  # noqa: E402

# What that import sets for torch's tests is not for ours.
hypothesis.settings.load_profile(profile)
torch.backends.__allow_nonbracketed_mutation_flag = True

NAMES = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
THEIRS = {i.module_cls.__name__: i for i in module_db if i.module_cls.__module__.endswith("rnn")}

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.fixture(params=NAMES)
def info(request):
    """torch's ModuleInfo, of our class."""
    ours = copy.copy(THEIRS[request.param])
    ours.module_cls = getattr(fastrnn, request.param)
    return ours


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def training(request) -> bool:
    return request.param


def cases(info, dtype=torch.float64, training=True, requires_grad=False, **options):
    torch.manual_seed(0)
    found = info.module_inputs_func(
        info, "cpu", dtype=dtype, requires_grad=requires_grad, training=training, **options
    )
    assert len(found) >= 2
    return found


def build(info, case, dtype=torch.float64, training=True, **options) -> nn.Module:
    torch.manual_seed(1)
    given = case.constructor_input
    model = info.module_cls(*given.args, **given.kwargs, **options)
    return model.to(dtype=dtype).train(training)


def call(model: nn.Module, case):
    return model(*case.forward_input.args, **case.forward_input.kwargs)


def tensors(tree) -> list[Tensor]:
    leaves = tree_leaves(tree, is_leaf=lambda t: isinstance(t, PackedSequence))
    return [t.data if isinstance(t, PackedSequence) else t for t in leaves]


def inputs(case) -> list[Tensor]:
    return tensors((case.forward_input.args, case.forward_input.kwargs))


def outputs(model: nn.Module, case) -> dict[str, Tensor]:
    return {f"output {i}": t.detach() for i, t in enumerate(tensors(call(model, case)))}


def run(model: nn.Module, case) -> dict[str, Tensor]:
    """Outputs and the gradients of all inputs and parameters."""
    results = tensors(call(model, case))
    incoming = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in results]
    grads = torch.autograd.grad(results, [*inputs(case), *model.parameters()], incoming)
    named = {f"output {i}": t.detach() for i, t in enumerate(results)}
    return named | {f"grad {i}": g for i, g in enumerate(grads)}


def test_torch_skips_nothing():
    """torch's decorators are for CUDA and MPS."""
    assert THEIRS.keys() == set(NAMES)
    tests = ("test_forward", "test_pickle", "test_grad", "test_gradgrad")
    tests += ("test_non_contiguous_tensors", "test_to", "test_to_empty", "test_errors")
    for name, test, dtype in itertools.product(NAMES, tests, TOLERANCE):
        assert dtype in THEIRS[name].supported_dtypes("cpu")
        found = THEIRS[name].get_decorators("TestModule", test, "cpu", dtype, {})
        assert all("skipMPS" in getattr(d, "__qualname__", "") for d in found)


def test_parity(info, dtype, training):
    """Outputs and all gradients of the original class, built from the same seed."""
    theirs = THEIRS[info.module_cls.__name__]
    options = {"requires_grad": True, "with_packed_sequence": True}
    for case in cases(info, dtype, training, **options):
        ours, original = (build(i, case, dtype, training) for i in (info, theirs))
        assert_same_bits(dict(ours.named_parameters()), dict(original.named_parameters()))
        assert_close(run(ours, case), run(original, case))


def test_forward(info, dtype, training):
    """The case's reference function: a sample alone is a batch of one."""
    for case in cases(info, dtype, training):
        model = build(info, case, dtype, training)
        expected = tensors(case.reference_fn(model, *case.forward_input.args))
        expected = {f"output {i}": t.detach() for i, t in enumerate(expected)}
        assert_close(outputs(model, case), expected)


def test_forward_reads_training_only_if_it_matters(info):
    for case in cases(info):
        model = build(info, case)
        del model.training
        try:
            call(model, case)
        except AttributeError as error:
            assert "'training'" in str(error)  # noqa: PT017
            assert info.train_and_eval_differ


def test_inputs_stay(info):
    """None of these modules works in place."""
    for case in cases(info, with_packed_sequence=True):
        model, before = build(info, case), [(t.clone(), t._version) for t in inputs(case)]
        assert not hasattr(model, "inplace")
        call(model, case)
        for t, (value, version) in zip(inputs(case), before):
            assert torch.equal(t, value)
            assert t._version == version


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_factory_kwargs(info, dtype, device):
    """device and dtype, by keyword and by torch's contexts, reach every parameter."""
    for case in cases(info, dtype):
        given, cls = case.constructor_input, info.module_cls
        made = [cls(*given.args, **given.kwargs, device=device, dtype=dtype)]
        with torch.device(device):
            made.append(cls(*given.args, **given.kwargs).to(dtype))
        for model in made:
            assert [*model.parameters()]
            assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, dtype)}


def saved(value, weights_only: bool):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def test_pickle(info, dtype, training):
    for case in cases(info, dtype, training, with_packed_sequence=True):
        model = build(info, case, dtype, training)
        expected = outputs(model, case)
        twin = saved(model, weights_only=False)
        assert type(twin) is info.module_cls
        assert twin.training == training
        assert_same_bits(outputs(twin, case), expected)


def test_save_and_load_state_dict(info, dtype):
    for case in cases(info, dtype):
        model, twin = build(info, case, dtype), build(info, case, dtype)
        twin.apply(lambda m: m.reset_parameters())
        twin.load_state_dict(saved(model.state_dict(), weights_only=True))
        assert_same_bits(outputs(twin, case), outputs(model, case))


def test_repr(info):
    theirs = THEIRS[info.module_cls.__name__]
    for case in cases(info):
        ours, original = (build(i, case) for i in (info, theirs))
        assert str(ours) == repr(ours) == repr(original)


def test_non_contiguous_tensors(info, training):
    """Inputs and incoming gradients in any strides."""
    for case in cases(info, training=training, requires_grad=True):
        model = build(info, case, training=training)
        incoming = [torch.randn_like(t) for t in tensors(call(model, case))]
        results = []
        for given, back in itertools.product((lambda t: t.detach(), noncontiguous_like), repeat=2):
            args = tree_map(lambda t: given(t).requires_grad_(), case.forward_input.args)  # noqa: B023
            out = tensors(model(*args))
            wanted = [*tensors(args), *model.parameters()]
            grads = torch.autograd.grad(out, wanted, [back(g) for g in incoming])
            results.append(dict(enumerate((*(t.detach() for t in out), *grads))))
        for strided in results[1:]:
            assert_close(strided, results[0])


# eval differs by dropout only, which no case has: once for the slow one
@pytest.mark.parametrize(
    ("check", "training"),
    [(gradcheck, True), (gradcheck, False), (gradgradcheck, True)],
    ids=["grad-train", "grad-eval", "gradgrad"],
)
def test_grad(info, check, training):
    """Of inputs and parameters, in the fast mode that is the default of torch's own tests."""
    assert info.supports_gradgrad
    for case in cases(info, training=training, requires_grad=True):
        model = build(info, case, training=training)
        params = dict(model.named_parameters())
        args, spec = tree_flatten(case.forward_input.args)

        def forward(*flat, model=model, params=params, spec=spec):
            weights, given = dict(zip(params, flat)), tree_unflatten(flat[len(params) :], spec)
            return tuple(tensors(functional_call(model, weights, given)))

        leaves = (*params.values(), *args)
        assert check(forward, leaves, fast_mode=True, nondet_tol=info.gradcheck_nondet_tol)


@pytest.fixture(params=[False, True], ids=["set data", "swap"])
def swap(request):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.usefixtures("swap")
def test_to(info, dtype):
    """To another dtype and back: the same Parameter objects, and torch.nn's numbers."""
    other = torch.float32 if dtype == torch.float64 else torch.float64
    theirs = THEIRS[info.module_cls.__name__]
    for case in cases(info, dtype, requires_grad=True):
        models = [build(i, case, dtype) for i in (info, theirs)]
        for model in models:
            parameters = [*model.parameters()]
            assert model.to(other) is model
            assert {p.dtype for p in model.parameters()} == {other}
            model.to(dtype)
            assert all(p is q for p, q in zip(parameters, model.parameters()))
        assert_close(*(run(model, case) for model in models), 1e-5)


def test_moves_to_where_it_is(info):
    """One device: to(), cpu() and back change nothing."""
    for case in cases(info):
        model = build(info, case)
        before, expected = [(p, p.data_ptr()) for p in model.parameters()], outputs(model, case)
        assert model.to("cpu").cpu().to("cpu", torch.float64) is model
        assert all(p is q and p.data_ptr() == at for p, (q, at) in zip(model.parameters(), before))
        assert_same_bits(outputs(model, case), expected)


@pytest.mark.usefixtures("swap")
def test_to_empty(info, dtype):
    """A model made on meta is given memory, then values."""
    for case in cases(info, dtype):
        model = build(info, case, dtype)
        empty = build(info, case, dtype, device="meta")
        parameters = [*empty.parameters()]
        assert empty.to_empty(device="cpu") is empty
        assert {p.device.type for p in empty.parameters()} == {"cpu"}
        same_objects = [p is q for p, q in zip(parameters, empty.parameters())]
        assert set(same_objects) == {torch.__future__.get_swap_module_params_on_conversion()}
        for p, value in zip(empty.parameters(), model.parameters()):
            p.data.copy_(value)
        assert_same_bits(outputs(empty, case), outputs(model, case))


def test_errors(info, dtype, training):
    """torch's list of what must fail, and with which words."""
    errors = info.module_error_inputs_func(
        info, "cpu", dtype=dtype, requires_grad=False, training=training
    )
    assert errors
    for error in errors:
        case = error.module_error_input
        expected = pytest.raises(error.error_type, match=error.error_regex)
        given = case.constructor_input
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with expected:
                info.module_cls(*given.args, **given.kwargs)
        else:
            # as torch does: the parameters take the dtype unless the case chose one
            model = info.module_cls(*given.args, **given.kwargs).to(dtype).train(training)
            with expected:
                call(model, case)
