"""fastrnn.replace and restore: the class of a module changes, and nothing else does."""

import contextlib
import copy
import io
import pickle
from abc import ABC, abstractmethod

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn
from helpers import assert_close, seeded

PAIRS = {
    nn.LSTM: fastrnn.LSTM,
    nn.GRU: fastrnn.GRU,
    nn.RNN: fastrnn.RNN,
    nn.LSTMCell: fastrnn.LSTMCell,
    nn.GRUCell: fastrnn.GRUCell,
    nn.RNNCell: fastrnn.RNNCell,
}


class MyLSTM(nn.LSTM):
    pass


class Model(nn.Module):
    """Every class, in every place: an attribute, a Sequential, lists, and one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 5, 2, bidirectional=True))
        self.rnns = nn.ModuleList([nn.GRU(10, 6), nn.RNN(6, 6, nonlinearity="relu")])
        self.again = self.rnns[1]
        self.cells = nn.ModuleDict(
            {
                "lstm": nn.LSTMCell(6, 4),
                "gru": nn.GRUCell(4, 4),
                "rnn": nn.RNNCell(4, 4, nonlinearity="relu"),
            }
        )
        self.bare = [self.rnns[0]]  # a reference that no module tree shows

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.encoder(x)
        x, _ = self.bare[0](x)
        x, h = self.rnns[1](x)
        x, _ = self.again(x, h)
        h, _ = self.cells["lstm"](x[-1])
        return self.cells["rnn"](self.cells["gru"](h))


def build() -> Model:
    torch.manual_seed(0)
    return Model()


def data() -> Tensor:
    return torch.randn(4, 40, 3, generator=seeded(1))


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    output = model(x)
    output = output if isinstance(output, Tensor) else output[0]
    grads = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return {"output": output.detach(), **dict(zip(names, grads, strict=True))}


def classes(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}


def test_replace_and_restore():
    model, twin = build(), build()
    modules, parameters = list(model.modules()), list(model.parameters())
    state, before, x = model.state_dict(), classes(model), data()

    report = fastrnn.replace(model)
    assert classes(model) == {path: PAIRS.get(cls, cls) for path, cls in before.items()}
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert_close(run(model, x), run(twin, x))
    assert {s.path: (s.old, s.new) for s in report} == {
        path: (cls, PAIRS[cls]) for path, cls in before.items() if cls in PAIRS and path != "again"
    }
    assert report.swapped == list(report)
    assert not report.left
    assert "encoder.1: torch.nn.LSTM -> fastrnn.LSTM" in str(report).splitlines()

    after = classes(model)
    assert not fastrnn.replace(model)  # once more: nothing
    assert classes(model) == after

    back = fastrnn.restore(model)
    assert [(s.path, s.new, s.old) for s in back] == [(s.path, s.old, s.new) for s in report]
    assert classes(model) == before
    for module, original in zip(model.modules(), twin.modules(), strict=True):
        assert vars(module).keys() == vars(original).keys()
    assert_close(run(model, x), run(twin, x), 0)
    assert repr(fastrnn.restore(model)) == "nothing to swap"


@pytest.mark.parametrize("theirs", PAIRS, ids=lambda cls: cls.__name__)
def test_root(theirs):
    model = theirs(3, 4)
    twin, x = copy.deepcopy(model), torch.randn(2, 3)
    (swap,) = fastrnn.replace(model)
    assert (type(model), swap.path) == (PAIRS[theirs], "")
    assert str(swap).startswith("(the model): torch.nn.")
    assert_close(run(model, x), run(twin, x))
    # A swap runs no constructor, so ours may not hold anything that torch's does not.
    assert vars(PAIRS[theirs](3, 4)).keys() == vars(twin).keys()
    fastrnn.restore(model)
    assert type(model) is theirs


def test_our_own_stay():
    model = nn.Sequential(fastrnn.LSTM(3, 4), nn.LSTM(4, 4))
    assert [s.path for s in fastrnn.replace(model)] == ["1"]
    assert [s.path for s in fastrnn.restore(model)] == ["1"]
    assert type(model[0]) is fastrnn.LSTM


def test_left():
    overridden = nn.GRU(3, 4)
    overridden.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "subclass": MyLSTM(3, 4),
            "parametrized": parametrizations.weight_norm(MyLSTM(3, 4), "weight_hh_l0"),
            "overridden": overridden,
            "complex": nn.RNN(3, 4, dtype=torch.complex64),
            "base": nn.modules.rnn.RNNCellBase(3, 4, True, 1),
            "meta": nn.LSTM(3, 4, device="meta"),
        }
    )
    before = classes(model)
    report = fastrnn.replace(model)
    assert [s.path for s in report.swapped] == ["meta"]
    reasons = {s.path: s.reason for s in report.left}
    assert {path: type(model[path]) for path in reasons} == {p: before[p] for p in reasons}
    subclass = "a subclass of torch.nn.LSTM, whose own code may not work with fastrnn"
    assert reasons == {
        "subclass": subclass,
        "parametrized": subclass,
        "overridden": "its forward was overridden on the instance",
        "complex": "no kernel for torch.complex64 on cpu, torch.nn is faster there",
        "base": "not a class of torch.nn, whose own code may not work with fastrnn",
    }
    assert f"subclass: {MyLSTM.__module__}.MyLSTM left: {subclass}" in str(report)
    hints = {s.path: s.hint for s in report.left}
    assert hints["subclass"] == "replace(model, subclasses=True) converts it"
    assert all(hints.values())
    assert hints["overridden"] in str(report)


def test_changed_since():
    model = nn.LSTM(3, 4)
    fastrnn.replace(model)
    model.__class__ = type("FSDPLSTM", (type(model),), {})
    (swap,) = fastrnn.restore(model)
    assert swap.reason == "its class was changed after replace"


@pytest.mark.parametrize("when", ["before", "between"])
def test_optimizer(when):
    """Training goes on as that of a twin, whether the optimizer has state already or not."""
    models = build(), build()
    steps = 3
    if when == "before":
        fastrnn.replace(models[0])
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in models]
    for step in range(steps):
        if when == "between" and step == 1:
            fastrnn.replace(models[0])
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            model(data()).square().sum().backward()
            optimizer.step()
    ours, theirs = (dict(m.named_parameters()) for m in models)
    for name, start in build().encoder.named_parameters():
        assert (ours[f"encoder.{name}"] - start).abs().max() > 0.01, name
    assert_close(ours, theirs, 1e-4)


def test_training_mode_and_dropout():
    model, twin = (nn.LSTM(3, 4, 2, dropout=0.5).eval() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    fastrnn.replace(model)
    assert not model.training
    assert_close(run(model, data()), run(twin, data()))


def test_hooks():
    model, seen = nn.Sequential(nn.LSTM(3, 4)), []
    lstm = model[0]

    def hook(name):
        return lambda *_: seen.append(name)

    lstm.register_forward_pre_hook(hook("forward_pre"))
    lstm.register_forward_hook(hook("forward"))
    lstm.register_full_backward_hook(hook("backward"))
    lstm.register_state_dict_post_hook(hook("state_dict"))
    lstm.register_load_state_dict_post_hook(hook("load"))
    lstm.weight_hh_l0.register_post_accumulate_grad_hook(hook("grad"))
    for swap in (lambda _: None, fastrnn.replace, fastrnn.restore):
        swap(model)
        seen.clear()
        model(data().requires_grad_())[0].sum().backward()
        model.load_state_dict(model.state_dict())
        assert sorted(seen) == ["backward", "forward", "forward_pre", "grad", "load", "state_dict"]


def old_weight_norm(module: nn.Module, name: str) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(module, name)


REWEIGHT = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": old_weight_norm,
    "pruning": lambda module, name: prune.l1_unstructured(module, name, 0.5),
}


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRUCell], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("reweight", REWEIGHT)
def test_reweighted(reweight, cls):
    """What people do to a weight survives the swap, and its own removal works after it."""
    name = "weight_hh_l0" if cls is nn.LSTM else "weight_hh"
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(cls(3, 4)).eval())  # in training spectral_norm moves buffers
        REWEIGHT[reweight](models[-1][0], name)
    (model, twin), x, old = models, torch.randn(5, 3), type(models[0][0])
    # deepcopy lets both share a parametrization's class; torch copies no other weight it computes
    shared = copy.deepcopy(model) if parametrize.is_parametrized(model[0]) else twin
    (swap,) = fastrnn.replace(model)
    assert isinstance(shared[0], cls)
    assert (swap.old, swap.new) == (cls, PAIRS[cls])
    assert type(model[0]).__name__ == old.__name__
    assert isinstance(model[0], PAIRS[cls])
    assert list(model.state_dict()) == list(twin.state_dict())
    assert_close(run(model, x), run(twin, x))
    if parametrize.is_parametrized(model[0]):
        assert_close(run(copy.deepcopy(model), x), run(twin, x))
    fastrnn.restore(model)
    assert type(model[0]).__mro__[1:] == old.__mro__[1:]
    assert_close(run(model, x), run(twin, x), 0)

    fastrnn.replace(model)
    if parametrize.is_parametrized(model[0]):
        parametrize.remove_parametrizations(model[0], name)
        assert type(model[0]) is PAIRS[cls]
        fastrnn.restore(model)
        assert type(model[0]) is cls
        run(shared, x)


def save_and_load(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load],
    ids=["deepcopy", "pickle", "save"],
)  # fmt: skip
def test_copies(duplicate):
    """A copy of a replaced model is a replaced model of its own, and can be restored."""
    model, x = build(), data()
    fastrnn.replace(model)
    twin = duplicate(model)
    assert classes(twin) == classes(model)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert_close(run(twin, x), run(model, x), 0)
    fastrnn.restore(twin)
    assert classes(twin) == classes(build())
    assert type(model.again) is fastrnn.RNN
    assert_close(run(twin, x), run(model, x))


def test_state_dict_goes_both_ways():
    model, plain = build(), build()
    fastrnn.replace(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    plain.load_state_dict(model.state_dict())
    assert_close(run(model, data()), run(plain, data()))


# -- Modules that were built as ours ---------------------------------------------------------------

BUILT = [
    nn.Sequential(fastrnn.LSTM(3, 4, 2, bidirectional=True, proj_size=2), nn.Linear(4, 3)),
    nn.Sequential(parametrizations.weight_norm(fastrnn.GRU(3, 4), "weight_hh_l0")),
    nn.Sequential(fastrnn.RNN(3, 4, nonlinearity="relu", batch_first=True)),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("model", BUILT, ids=["LSTM", "GRU", "RNN"])
def test_restore_all(model):
    """The same module with the same parameters, of torch.nn's class; replace takes it back."""
    model = copy.deepcopy(model)
    layer, parameters = model[0], list(model.parameters())
    ours, x = type(layer), data()
    before = run(layer, x)
    assert not fastrnn.restore(model)  # only what replace did
    (swap,) = fastrnn.restore(model, all=True)
    assert model[0] is layer
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    theirs = swap.new
    assert theirs in PAIRS
    assert isinstance(layer, theirs)
    assert not isinstance(layer, ours.__mro__[0])
    assert not swap.reason
    assert vars(theirs(3, 4)).keys() <= vars(layer).keys()
    assert_close(run(layer, x), before)
    fastrnn.replace(model)
    assert isinstance(layer, swap.old)
    assert_close(run(layer, x), before, 0)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_restore_all_cells(name):
    model = getattr(fastrnn, name)(3, 4)
    fastrnn.restore(model, all=True)
    assert type(model) is getattr(nn, name)


def test_restore_all_says_what_is_lost():
    model = nn.Sequential(fastrnn.LSTM(3, 4, checkpoint_every=2), fastrnn.GRU(4, 4))
    report = fastrnn.restore(model, all=True)
    assert str(report).splitlines() == [
        "0: fastrnn.LSTM -> torch.nn.LSTM: without checkpoint_every=2, "
        "which torch.nn.LSTM does not have",
        "1: fastrnn.GRU -> torch.nn.GRU",
    ]
    assert vars(model[0]).keys() == vars(nn.LSTM(3, 4)).keys()


class Ours(fastrnn.LSTM):
    pass


def test_restore_all_leaves_subclasses():
    model = nn.Sequential(Ours(3, 4))
    (swap,) = fastrnn.restore(model, all=True)
    assert (type(model[0]), swap.new) == (Ours, None)
    assert swap.reason == "a subclass of fastrnn.LSTM, whose own code may need fastrnn"
    assert swap.hint == "derive it from torch.nn.LSTM"


# -- Subclasses ------------------------------------------------------------------------------------


class Mixin(ABC):
    @abstractmethod
    def kind(self): ...


class Abstract(Mixin, nn.RNNBase):
    """As pytorch-forecasting's: the forward above calls that of the class below."""

    def forward(self, x, hx=None):
        output, last = super().forward(x, hx)
        return output + 1, last


class Concrete(Abstract, nn.GRU):
    def kind(self):
        return "GRU"


class Explicit(nn.RNN):
    def forward(self, x):
        return super(Explicit, self).forward(x)[0]  # noqa: UP008


class MyCell(nn.LSTMCell):
    def forward(self, x, hx=None):
        return super().forward(2 * x, hx)


class Own(nn.LSTM):
    def forward(self, x):
        return x.cumsum(0), None


TAKEN = {MyLSTM: fastrnn.LSTM, Concrete: fastrnn.GRU, Explicit: fastrnn.RNN}
TAKEN |= {MyCell: fastrnn.LSTMCell}


@pytest.mark.parametrize("cls", TAKEN, ids=lambda cls: cls.__name__)
def test_subclasses(cls, monkeypatch):
    """The class's own forward runs, and calls ours; no other module of the class changes."""
    model, twin, other = (nn.Sequential(cls(3, 4)) for _ in range(3))
    twin.load_state_dict(model.state_dict())
    x = data()[0] if cls is MyCell else data()
    (swap,) = fastrnn.replace(model, subclasses=True)
    layer, ours = model[0], TAKEN[cls]
    assert (swap.old, swap.new) == (cls, type(layer))
    assert isinstance(layer, cls)
    assert isinstance(layer, ours)
    assert type(other[0]) is cls
    name = f"{cls.__module__}.{cls.__qualname__}"
    assert str(swap) == f"0: {name} -> {name} on fastrnn.{ours.__name__}"
    assert_close(run(layer, x), run(twin[0], x))
    assert not fastrnn.replace(model, subclasses=True)  # once more: nothing

    with monkeypatch.context() as context:
        calls = []
        context.setattr(ours, "forward", lambda self, *args: calls.append(args))
        with contextlib.suppress(TypeError):
            layer(x)
        assert calls

    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied[0]) is type(layer)
        assert_close(run(copied[0], x), run(layer, x), 0)
        fastrnn.restore(copied)
        assert type(copied[0]) is cls
    (back,) = fastrnn.restore(model)
    assert (type(layer), back.new) == (cls, cls)
    assert vars(layer).keys() == vars(twin[0]).keys()
    assert_close(run(layer, x), run(twin[0], x), 0)


def test_subclasses_with_a_forward_of_their_own():
    model = nn.Sequential(Own(3, 4))
    (swap,) = fastrnn.replace(model, subclasses=True)
    assert (type(model[0]), swap.new) == (Own, None)
    reason = "a subclass of torch.nn.LSTM with a forward of its own that does not call it"
    assert (swap.reason, swap.hint) == (reason, "derive it from fastrnn.LSTM")


def test_parametrized_subclass():
    model = nn.Sequential(parametrizations.weight_norm(MyLSTM(3, 4), "weight_hh_l0"))
    before = run(model[0], data())
    fastrnn.replace(model, subclasses=True)
    assert isinstance(model[0], fastrnn.LSTM)
    assert_close(run(model[0], data()), before)
    fastrnn.restore(model)
    assert not isinstance(model[0], fastrnn.LSTM)
    assert_close(run(model[0], data()), before, 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit itself is
def test_script_of_a_subclass():
    """It has torch's forward, so TorchScript takes torch's class: of a subclass it fails."""
    model = nn.Sequential(MyLSTM(3, 4))
    expected = model(data())[0]
    fastrnn.replace(model, subclasses=True)
    torch.testing.assert_close(torch.jit.script(model)(data())[0], expected)
