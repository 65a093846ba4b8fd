"""What people do to a recurrent module, done to ours and to torch.nn's: the same comes out."""

import copy
import io
import itertools
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune, rnn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import fastrnn
import helpers
from fastrnn import _cells
from fastrnn._layer import Layer
from helpers import assert_close, make_mask, pack, pair, seeded, unpack

LAYERS, CELLS = ["LSTM", "GRU", "RNN"], ["LSTMCell", "GRUCell", "RNNCell"]
ROWS = (2, 5)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "LSTM with projections is not supported with oneDNN",
        r"`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
        r"(?s).*use of fork\(\) may lead to deadlocks:DeprecationWarning",
    )
]


@pytest.fixture(params=LAYERS + CELLS)
def name(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def cells_both_ways(monkeypatch):
    """Of ROWS, torch's operator takes the first in a cell, and the fused layer the second."""
    for least in ("_INFERENCE", "_TRAINING"):
        monkeypatch.setattr(_cells, least, (ROWS[1], 1, 0))


def twins(name: str, **options) -> list[nn.Module]:
    """Ours and the original, built from the same seed."""
    if name in LAYERS:
        options = {"num_layers": 2, "bidirectional": True} | options
    models = []
    for library in (fastrnn, nn):
        torch.manual_seed(0)
        models.append(getattr(library, name)(3, 4, **{"dtype": torch.float64} | options))
    return models


def is_layer(model: nn.Module) -> bool:
    return isinstance(model, nn.RNNBase)


def arguments(model: nn.Module, rows: int = ROWS[1]):
    """The same input and state for every model and dtype; all want gradients."""
    generator = seeded(rows)
    dtype = next(model.parameters()).dtype

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    x = leaf(6, rows, 3) if is_layer(model) else leaf(rows, 3)
    entries = (model.num_layers * (1 + model.bidirectional),) if is_layer(model) else ()
    count = 2 if "LSTM" in type(model).__name__ else 1
    return x, pack(tuple(leaf(*entries, rows, 4) for _ in range(count)))


def backward(outputs: list[Tensor], **options) -> None:
    incoming = [torch.linspace(-1, 1, t.numel()).view_as(t).to(t.dtype) for t in outputs]
    torch.autograd.backward(outputs, incoming, **options)


def run(model: nn.Module, call=None) -> dict[str, Tensor]:
    """Outputs and all gradients that there are, of two calls."""
    results = {}
    for rows in ROWS:
        x, hx = arguments(model, rows)
        leaves = {f"arg {i}": t for i, t in enumerate((x, *unpack(hx)))}
        leaves |= dict(model.named_parameters())
        model.zero_grad()
        outputs = tree_leaves((call or model)(x, hx))
        backward(outputs)
        named = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        named |= {f"grad {k}": t.grad.clone() for k, t in leaves.items() if t.grad is not None}
        results |= {f"{rows} rows, {k}": t for k, t in named.items()}
    return results


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    dtypes = {t.dtype for t in expected.values()}
    assert_close(actual, expected, 1e-12 if dtypes == {torch.float64} else None)


def outcome(call) -> tuple:
    """Type and text of the exception, if any, and of all warnings."""
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as e:
            error = type(e), str(e)
    return error, [(w.category, str(w.message)) for w in caught]


# -- Changes of a module that was called before ---------------------------------------------------


def target(model: nn.Module, kind: str = "weight_hh") -> str:
    return f"{kind}_l0" if is_layer(model) else kind


def old_weight_norm_removed(model):
    nn.utils.remove_weight_norm(nn.utils.weight_norm(model, target(model)), target(model))


def parametrization_removed(model):
    parametrizations.weight_norm(model, target(model))
    parametrize.remove_parametrizations(model, target(model))


def pruning_removed(model):
    prune.remove(prune.l1_unstructured(model, target(model), 0.5), target(model))


def weight_drop(model):
    """The weight moves to another name; before each call a plain tensor takes its place."""
    name = target(model)
    raw = model._parameters.pop(name)
    model.register_parameter(f"{name}_raw", raw)

    def drop(*_):
        torch.manual_seed(1)
        setattr(model, name, nn.functional.dropout(raw, 0.5))

    model.register_forward_pre_hook(drop)


def tied(model):
    setattr(model, target(model, "bias_hh"), getattr(model, target(model, "bias_ih")))


def through_file(value, weights_only: bool):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def new_state(model):
    return {name: 2 * p.detach() for name, p in model.state_dict().items()}


def meta_and_back(model):
    state = new_state(model)
    model.to("meta").to_empty(device="cpu").load_state_dict(state)


def meta_and_assigned(model):
    state = new_state(model)
    model.to("meta").load_state_dict(state, assign=True)


def new_parameter(model):
    setattr(model, target(model), nn.Parameter(getattr(model, target(model)).detach() * 2))


def deleted_and_set(model):
    value = getattr(model, target(model)).detach() * 2
    delattr(model, target(model))
    model.register_parameter(target(model), nn.Parameter(value))


def new_data(model):
    for p in model.parameters():
        p.data = p.data * 2


def in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)


def one_vector(model):
    vector = nn.utils.parameters_to_vector(model.parameters()) * 2
    nn.utils.vector_to_parameters(vector, model.parameters())


def reset(model):
    torch.manual_seed(1)
    model.apply(lambda m: m.reset_parameters())


def averaged(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    in_place(model)
    average.update_parameters(model)
    average.update_parameters(model)
    return average.module


def doubled_gradients(model, grad_input, grad_output):
    return tuple(None if g is None else 2 * g for g in grad_input)


CHANGES = {
    # In eval: torch's layers read a weight several times a call, each a step of power iteration.
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, target(m)).eval(),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m, target(m)).eval(),
    "weight_norm": lambda m: parametrizations.weight_norm(m, target(m)),
    "weight_norm of two": lambda m: parametrizations.weight_norm(
        parametrizations.weight_norm(m, target(m)), target(m, "weight_ih")
    ),
    "orthogonal": lambda m: parametrizations.orthogonal(m, target(m)),
    "parametrization removed": parametrization_removed,
    "old weight_norm": lambda m: nn.utils.weight_norm(m, target(m)),
    "old weight_norm removed": old_weight_norm_removed,
    "pruning": lambda m: prune.l1_unstructured(m, target(m), 0.5),
    "structured pruning": lambda m: prune.ln_structured(m, target(m), 0.5, n=2, dim=0),
    "pruned bias": lambda m: prune.l1_unstructured(m, target(m, "bias_hh"), 0.5),
    "pruning removed": pruning_removed,
    "WeightDrop": weight_drop,
    "tied": tied,
    "share_memory": lambda m: m.share_memory(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "saved whole": lambda m: through_file(m, weights_only=False),
    "averaged": averaged,
    "load_state_dict": lambda m: m.load_state_dict(through_file(new_state(m), weights_only=True)),
    "load_state_dict assign": lambda m: m.load_state_dict(new_state(m), assign=True),
    "meta and to_empty": meta_and_back,
    "meta and assign": meta_and_assigned,
    "float": lambda m: m.float(),
    "float and double": lambda m: m.float().double(),
    "to dtype and device": lambda m: m.to("cpu", torch.float32, non_blocking=True),
    "new parameter": new_parameter,
    "deleted and set": deleted_and_set,
    "data": new_data,
    "in place": in_place,
    "optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.1).step(),
    "one vector": one_vector,
    "reset": reset,
    "one frozen": lambda m: getattr(m, target(m)).requires_grad_(False),
    "all frozen": lambda m: m.requires_grad_(False),
    "eval": lambda m: m.eval(),
    "tensor hook": lambda m: getattr(m, target(m)).register_hook(lambda g: 2 * g),
    "forward_pre_hook": lambda m: m.register_forward_pre_hook(lambda m, a: (2 * a[0], *a[1:])),
    "forward_hook": lambda m: m.register_forward_hook(
        lambda m, a, outputs: tree_map(lambda t: 2 * t, outputs)
    ),
    "full_backward_hook": lambda m: m.register_full_backward_hook(doubled_gradients),
    "full_backward_pre_hook": lambda m: m.register_full_backward_pre_hook(
        lambda m, grads: tuple(None if g is None else 2 * g for g in grads)
    ),
    "flatten_parameters": lambda m: m.flatten_parameters() if is_layer(m) else None,
    "swapped on conversion": lambda m: swapped(lambda: m.float()),
}


def swapped(call):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return call()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("change", CHANGES)
def test_changed(name, change):
    models = twins(name)
    for i, model in enumerate(models):
        run(model)  # whatever a model remembers of a call, it does so now
        torch.manual_seed(1)
        result = CHANGES[change](model)
        models[i] = result if isinstance(result, nn.Module) else model
    ours, theirs = models
    assert isinstance(ours, getattr(fastrnn, name))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    same(run(ours), run(theirs))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_swap_tensors(name):
    """Where torch refuses, as a layer has weak references to its parameters, ours does so too."""

    def swap(model):
        parameter = getattr(model, target(model))
        torch.utils.swap_tensors(parameter, nn.Parameter(2 * parameter.detach()))

    def load(model):
        swapped(lambda: model.load_state_dict(new_state(model)))

    for do in (swap, load):
        ours, theirs = twins(name)
        (error, _), (expected, _) = outcome(lambda: do(ours)), outcome(lambda: do(theirs))  # noqa: B023
        assert error == expected
        same(run(ours), run(theirs))


@pytest.mark.parametrize("name", LAYERS)
def test_lists_of_weights(name):
    for model in twins(name):
        new = nn.Parameter(torch.zeros_like(model.weight_hh_l0))
        model.weight_hh_l0 = new
        run(model)
        assert model._flat_weights[1] is model.all_weights[0][1] is new
        named = dict(model.named_parameters())
        assert len(named) == len(model._flat_weights) == 16
        assert all(named[n] is w for n, w in zip(model._flat_weights_names, model._flat_weights))
        assert all(a is b for a, b in zip(itertools.chain(*model.all_weights), named.values()))


def test_two_modules_with_one_weight(name):
    results = []
    for first in twins(name):
        second = copy.deepcopy(first)
        setattr(second, target(first), getattr(first, target(first)))

        def call(x, hx, first=first, second=second):
            return first(x, hx), second(-x, hx)

        results.append(run(first, call))
    same(*results)


def test_meta(name):
    """Shapes without values, from a model made on meta, by an argument or by a context."""
    results = []
    for model, like in zip(twins(name, device="meta"), twins(name)):
        assert all(p.is_meta for p in model.parameters())
        with torch.device("meta"):
            assert all(p.is_meta for p in type(like)(3, 4).parameters())
        outputs = tree_leaves(model(*(tree_map(lambda t: t.to("meta"), arguments(like)))))
        assert all(t.is_meta for t in outputs)
        results.append([(t.shape, t.stride(), t.dtype) for t in outputs])
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_functional_call(name, dtype):
    """Other weights for one call; after it, everything is as it was."""
    ours, theirs = twins(name)
    before = run(ours)
    args = tree_map(lambda t: t.detach().to(dtype), arguments(ours))
    results = []
    for model in (ours, theirs):
        weights = {n: (2 * p.detach()).to(dtype) for n, p in model.named_parameters()}
        weights = {n: w.requires_grad_() for n, w in weights.items()}
        outputs = tree_leaves(functional_call(model, weights, args))
        backward(outputs)
        results.append({n: w.grad for n, w in weights.items()} | dict(enumerate(outputs)))
    same(*results)
    helpers.assert_same_bits(run(ours), before)


# -- Checkpoints of other times -------------------------------------------------------------------


def test_state_dict_of_the_other_library(name):
    (ours, theirs), (our_new, their_new) = twins(name), twins(name)
    for model in (ours, theirs):
        in_place(model)
    our_new.load_state_dict(through_file(theirs.state_dict(), weights_only=True))
    their_new.load_state_dict(through_file(ours.state_dict(), weights_only=True))
    helpers.assert_same_bits(dict(our_new.state_dict()), dict(their_new.state_dict()))
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    same(run(our_new), run(their_new))


def names_as_all_weights(state):
    state["all_weights"] = state.pop("_all_weights")


def parameters_as_weights(state):
    parameters = state["_parameters"]
    state["_all_weights"] = [[parameters[n] for n in names] for names in state["_all_weights"]]
    del state["_flat_weights_names"], state["_flat_weights"]


@pytest.mark.parametrize(
    "age",
    [lambda s: None, lambda s: s.pop("proj_size"), names_as_all_weights, parameters_as_weights],
    ids=["today", "without proj_size", "names as all_weights", "parameters as _all_weights"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_pickle_of_an_old_torch(name, age):
    """What an old torch.nn wrote, read by torch's own __setstate__."""
    models = []
    for fresh in twins(name):
        _, theirs = twins(name)
        state = pickle.loads(pickle.dumps(theirs.__getstate__()))
        age(state)
        model = type(fresh).__new__(type(fresh))
        model.__setstate__(state)
        assert model.proj_size == 0
        assert model._flat_weights_names == fresh._flat_weights_names
        assert model._all_weights == fresh._all_weights
        models.append(model)
    same(run(models[0]), run(models[1]))


# -- Autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(name, use_reentrant):
    options = {"dropout": 0.5} if name in LAYERS else {}
    results = []
    for model in twins(name, **options):

        def flat(x, *states, model=model):  # with use_reentrant, torch takes no tensor in a tuple
            return (*tree_leaves(model(x, pack(states))),)

        def call(x, hx, flat=flat):
            torch.manual_seed(2)
            return checkpoint(flat, x, *unpack(hx), use_reentrant=use_reentrant)

        results.append(run(model, call))
    same(*results)


def test_hooks_see_the_same(name):
    logs = []
    for model in twins(name):
        log: dict[str, list[Tensor]] = {}

        def see(what, log=log):
            def hook(*args):
                tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
                log.setdefault(what, []).extend(t.detach().clone() for t in tensors)

            return hook

        model.register_forward_pre_hook(see("forward_pre"))
        model.register_forward_hook(see("forward"))
        model.register_full_backward_pre_hook(see("backward_pre"))
        model.register_full_backward_hook(see("backward"))
        for n, p in model.named_parameters():
            p.register_hook(see(f"hook of {n}"))
            p.register_post_accumulate_grad_hook(see(f"post_accumulate of {n}"))
        run(model, lambda x, hx, model=model, see=see: hooked(model(x, hx), see("output")))
        assert len(log) == 5 + 2 * len([*model.parameters()])
        logs.append({f"{what} {i}": t for what, seen in log.items() for i, t in enumerate(seen)})
    same(*logs)


def hooked(outputs, hook):
    for t in tree_leaves(outputs):
        t.register_hook(hook)
    return outputs


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("which", ["x", "h_0", "c_0", "weight_ih", "weight_hh"])
def test_changed_in_place_before_backward(name, which, rows):
    if which == "c_0" and "LSTM" not in name:
        pytest.skip("no cell state")
    for model in twins(name):
        x, hx = arguments(model, rows)
        outputs = tree_leaves(model(x, hx))
        changed = {"x": x, "h_0": unpack(hx)[0], "c_0": unpack(hx)[-1]}.get(which)
        changed = getattr(model, target(model, which)) if changed is None else changed
        with torch.no_grad():
            changed.add_(1)
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            backward(outputs)


@pytest.mark.parametrize("rows", ROWS)
def test_backward_in_eval_and_again(name, rows):
    results = []
    for model in twins(name):
        model.eval()
        x, hx = arguments(model, rows)
        outputs = tree_leaves(model(x, hx))
        backward(outputs, retain_graph=True)
        backward(outputs)  # into the same .grad
        leaves = dict(enumerate((x, *unpack(hx)))) | dict(model.named_parameters())
        results.append({n: t.grad for n, t in leaves.items()})
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            backward(outputs)
    same(*results)


class Scans(TorchDispatchMode):
    """The fused calls: whether each was to keep what backward reads, and the size of its results"""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[bool] = []
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func is torch.ops.fastrnn.scan_forward.default:
            self.kept.append(args[Layer._fields.index("keep")])
            self.entries += sum(t.untyped_storage().nbytes() // t.itemsize for t in results)
        return results


MODES = {
    "no_grad": torch.no_grad(),
    "inference_mode": torch.inference_mode(),
    "frozen": torch.enable_grad(),
    "training": torch.enable_grad(),
}


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_kept_without_gradients(name, mode):
    model, _ = twins(name)
    x, hx = arguments(model)
    expected = tree_leaves(model(x, hx))
    if mode == "frozen":
        model.requires_grad_(False)
        x, hx = tree_map(Tensor.detach, (x, hx))
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with Scans() as scans, hooks, MODES[mode]:
        outputs = tree_leaves(model(x, hx))
    training = mode == "training"
    assert scans.kept == [training] * (model.num_layers if is_layer(model) else 1)
    assert bool(saved) == training
    assert all((t.grad_fn is not None) == t.requires_grad == training for t in outputs)
    assert all(t.is_inference() == (mode == "inference_mode") for t in outputs)
    # the output and final states of each layer, and nothing else
    layers, directions = (2, 2) if is_layer(model) else (1, 1)
    steps = x.size(0) if is_layer(model) else 1
    least = layers * directions * ROWS[1] * 4 * (steps + len(unpack(hx)))
    assert scans.entries > least if training and "RNN" not in name else scans.entries == least
    same(*(dict(enumerate(t.detach() for t in each)) for each in (outputs, expected)))


# -- Processes ------------------------------------------------------------------------------------


def child(model: nn.Module) -> None:
    torch.set_num_threads(1)
    model(*arguments(model))
    in_place(model)


@pytest.mark.skipif(
    "fork" not in torch.multiprocessing.get_all_start_methods(), reason="this system cannot fork"
)
def test_weights_shared_with_a_child(name):
    """Another process changes shared weights, and this one computes with them."""
    ours, theirs = twins(name)
    run(ours)
    ours.share_memory()
    process = torch.multiprocessing.get_context("fork").Process(target=child, args=(ours,))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0
    in_place(theirs)
    same(run(ours), run(theirs))


# -- Words ----------------------------------------------------------------------------------------

REPRS = [
    {"bias": False},
    {"batch_first": True, "num_layers": 3, "dropout": 0.25},
    {"bidirectional": True},
    {"proj_size": 2},
    {"nonlinearity": "relu"},
]


@pytest.mark.parametrize("options", REPRS, ids=str)
def test_repr(name, options):
    if outcome(lambda: getattr(nn, name)(3, 4, **options))[0]:
        pytest.skip("not an option of this class")
    ours, theirs = (getattr(library, name)(3, 4, **options) for library in (fastrnn, nn))
    assert ours.extra_repr() == theirs.extra_repr()
    assert repr(nn.Sequential(ours)) == repr(nn.Sequential(theirs))
    parametrizations.weight_norm(ours, target(ours))
    parametrizations.weight_norm(theirs, target(theirs))
    assert repr(ours) == repr(theirs)


BAD_CONSTRUCTION = [
    ((), {}),
    ((3,), {}),
    ((3, -1), {}),
    ((-1, 4), {}),
    ((3.0, 4), {}),
    ((3, "4"), {}),
    ((3, 4, 1, True, False, 0.0, False, 0, None, None, 1), {}),
    ((3, 4, 1, "sigmoid"), {}),
    ((3, 4, 1, "tanh"), {"nonlinearity": "tanh"}),
    ((3, 4, 1, True, False, 0.5), {}),
    ((3, 4), {"input_size": 3}),
    ((3, 4), {"unknown": 1}),
    ((3, 4), {"dtype": torch.int64}),
    ((3, 4), {"dtype": "float32"}),
    ((3, 4), {"device": "nowhere"}),
    ((3, 4), {"dropout": float("nan")}),
    ((3, 4), {"dropout": None}),
    ((3, 4), {"dropout": [0.5]}),
    ((3, 4), {"dropout": 1}),
    ((3, 4), {"num_layers": -1}),
    ((3, 4), {"num_layers": 2.0}),
    ((3, 4), {"num_layers": None}),
    ((3, 4), {"bias": None}),
    ((3, 4), {"batch_first": None}),
    ((3, 4), {"proj_size": 0}),
    ((3, 4), {"proj_size": 2.0}),
    ((3, 4), {"proj_size": None}),
    ((3, 4), {"nonlinearity": None}),
    ((3, 4), {"nonlinearity": ["tanh"]}),
]


@pytest.mark.parametrize(("args", "options"), BAD_CONSTRUCTION, ids=str)
def test_construction(name, args, options):
    """Error and warnings, or none, as torch's."""
    ours, theirs = (
        outcome(lambda lib=lib: getattr(lib, name)(*args, **options)) for lib in (fastrnn, nn)
    )
    assert ours == theirs


def meta(t):
    return tree_map(lambda t: t.to("meta"), t)


# (model, x, hx) -> a call that fails, with a text of torch's own
BAD_CALLS = {
    "no input": lambda m, x, hx: m(),
    "input None": lambda m, x, hx: m(None),
    "input list": lambda m, x, hx: m([x]),
    "input array": lambda m, x, hx: m(x.detach().numpy()),
    "input complex": lambda m, x, hx: m(x.to(torch.complex128)),
    "input bool": lambda m, x, hx: m(x.bool()),
    "input on meta": lambda m, x, hx: m(meta(x), meta(hx)),
    "hx on meta": lambda m, x, hx: m(x, meta(hx)),
    "hx number": lambda m, x, hx: m(x, 3),
    "hx empty": lambda m, x, hx: m(x, ()),
    "hx Nones": lambda m, x, hx: m(x, (None, None)),
    "hx of the other kind": lambda m, x, hx: m(x, (hx,) if isinstance(hx, Tensor) else hx[0]),
    "third argument": lambda m, x, hx: m(x, hx, None),
    "unknown argument": lambda m, x, hx: m(x, hx, unknown=1),
    "state of no layer": lambda m, x, hx: m.load_state_dict({}),
    "state of another size": lambda m, x, hx: m.load_state_dict(
        {n: p[:2] for n, p in m.state_dict().items()}
    ),
    "weight set to a tensor": lambda m, x, hx: setattr(m, target(m), x),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_call(name, bad):
    ours, theirs = (outcome(lambda m=m: BAD_CALLS[bad](m, *arguments(m))) for m in twins(name))
    assert theirs[0] is not None
    if bad in ("no input", "third argument", "unknown argument"):  # Python's text, which names
        ours, theirs = ours[0][0], theirs[0][0]  # the class that defines forward
    assert ours == theirs


# -- Projections ----------------------------------------------------------------------------------

flags = pytest.mark.parametrize(
    ("bidirectional", "batch_first", "bias"), [*itertools.product([False, True], repeat=3)]
)


@flags
@pytest.mark.parametrize("num_layers", [1, 2])
def test_projection(dtype, num_layers, bidirectional, batch_first, bias):
    options = {"bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    models = pair("LSTM", 3, 5, num_layers, proj_size=2, dtype=dtype, **options)
    for B, with_hx in itertools.product((0, 1, 4), (False, True)):
        x, hx = helpers.inputs(models[0], 6, B, hx=with_hx)
        assert_close(*(helpers.run(m, x, hx) for m in models))
    x, hx = helpers.inputs(models[0], 6, 1)
    x, hx = x.squeeze(0 if batch_first else 1), tuple(h.squeeze(1) for h in hx)
    assert_close(*(helpers.run(m, x, hx) for m in models))


@pytest.mark.parametrize("lengths", [[6, 4, 4, 1], [2, 6, 1, 5]], ids=str)
@flags
def test_projection_packed(dtype, bidirectional, batch_first, bias, lengths):
    options = {"bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    models = pair("LSTM", 3, 5, 2, proj_size=2, dtype=dtype, **options)
    x, hx = helpers.inputs(models[0], 6, 4)
    results = []
    for model in models:

        def forward(x, hx, model=model):
            packed = rnn.pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
            output, h_n = model(packed, hx)
            return output.data, h_n

        results.append(helpers.run(model, x, hx, forward=forward))
    assert_close(*results)


@pytest.mark.parametrize("kind", [*helpers.MASKS, "by lengths"])
@flags
def test_projection_masked(dtype, bidirectional, batch_first, bias, kind):
    """Each row alone in torch's LSTM, on its real steps only."""
    options = {"bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    ours, theirs = pair("LSTM", 3, 5, 2, proj_size=2, dtype=dtype, **options)
    x, hx = helpers.inputs(ours, 6, 5)
    mask = make_mask(kind if kind in helpers.MASKS else "lengths", 6, 5)
    masks = {"mask": mask.T if batch_first else mask}
    if kind == "by lengths":
        masks = {"lengths": mask.sum(0)}

    def row_by_row(x, hx):
        outputs, finals = [], []
        for row, real in enumerate(mask.T):
            steps, last = x[row] if batch_first else x[:, row], tuple(h[:, row] for h in hx)
            output = x.new_zeros(6, 2 * (1 + bidirectional))
            if real.any():
                some, last = theirs(steps[real], last)
                output = output.index_put((real.nonzero()[:, 0],), some)
            outputs.append(output)
            finals.append(last)
        output = torch.stack(outputs, 0 if batch_first else 1)
        return output, tuple(torch.stack(f, 1) for f in zip(*finals))

    actual = helpers.run(ours, x, hx, **masks)
    assert_close(actual, helpers.run(theirs, x, hx, forward=row_by_row))


def test_projection_dropout(dtype):
    models = pair("LSTM", 3, 5, 3, proj_size=2, dropout=0.5, bidirectional=True, dtype=dtype)
    x, hx = helpers.inputs(models[0], 6, 4)
    for training in (True, False):
        results = []
        for model in models:
            torch.manual_seed(7)
            results.append(helpers.run(model.train(training), x, hx))
        assert_close(*results)


@pytest.mark.parametrize("hx", [(4, 4), (2, 2), (2, 4, 3)], ids=str)
def test_projection_errors(hx):
    """The sizes of h_0 and c_0, here h [1, 2, 2] and c [1, 2, 4], are told apart."""
    states = tuple(torch.zeros(1, 2, size) for size in hx)
    ours, theirs = (library.LSTM(3, 4, proj_size=2) for library in (fastrnn, nn))
    x = torch.zeros(5, 2, 3)
    expected = outcome(lambda: theirs(x, states))[0]
    assert expected is not None
    assert outcome(lambda: ours(x, states))[0] == expected


# -- Import ----------------------------------------------------------------------------------------


def test_import_is_light():
    """torch's compiler alone takes more than a second; the extension and ours a tenth of it."""
    program = (
        "import torch; before = {*sys.modules}; import fastrnn; print(*{*sys.modules} - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; {program}"], capture_output=True, text=True, check=True
    )
    heavy = {"torch._dynamo", "torch._inductor", "torch.onnx", "torch.ao", "sympy", "onnx"}
    assert "fastrnn._cpu" in result.stdout
    assert not heavy & {*result.stdout.split()}
