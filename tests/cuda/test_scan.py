"""The CUDA backend against the reference implementation in float64, run in every way."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from backends import ENGINES
from fastrnn._backends import backend as backend_of
from fastrnn._functions import reference_layer
from fastrnn._layer import CELLS, Layer, Saved

# kind, units, rows, slices, cluster, resident; where only some weights stay, kept; and mbarrier
PLANS = {
    "step": ("STEP", 16, 16, 1, 1, False),
    "step-small": ("STEP", 8, 8, 3, 1, False),
    "grid": ("GRID", 16, 8, 2, 1, True),
    "grid-from-cache": ("GRID", 8, 16, 4, 1, False),
    "block": ("CLUSTER", 32, 16, 4, 1, True),
    "cluster": ("CLUSTER", 8, 8, 8, 4, True),
    "cluster-barrier": ("CLUSTER", 8, 8, 8, 4, True, 0, False),
}
LARGE = {
    "deep": ("GRID", 8, 8, 1, 1, True),
    "deep-from-cache": ("STEP", 16, 16, 1, 1, False),
    "more-parts-than-warps": ("GRID", 32, 32, 5, 1, True),
    "more-parts-of-float64": ("GRID", 32, 16, 5, 1, True),
    "odd-tile": ("STEP", 8, 16, 2, 1, False),
    "stay-one-of-each-slice": ("GRID", 8, 8, 2, 1, False, 1),
    "stay-some": ("GRID", 16, 16, 1, 1, False, 3),
    "stay-in-cluster": ("CLUSTER", 32, 8, 1, 8, False, 4),
    "cluster-of-8": ("CLUSTER", 32, 8, 8, 8, True),
    "cluster-of-16": ("CLUSTER", 16, 8, 8, 16, True),
}
ROWS = {
    "plain": (False, False),
    "resets": (True, False),
    "ragged": (False, True),
    "ragged-resets": (True, True),
    "mask": (False, "mask"),
    "mask-resets": (True, "mask"),
}


OPTIONS = ["zoneout", "mean", "h_mask", "grad_scale", "grad_clip", "all"]


def chooser(name: str, kernels, engine):
    kind, *numbers = (PLANS | LARGE)[name]

    def choose(problem, device):
        plan = kernels.Plan(kernels.Kind[kind], *numbers[:5], engine.tensor, *numbers[5:])
        if not kernels.is_possible(problem, device, plan):
            pytest.skip("this device cannot")
        return plan

    return choose


def assert_same_bits(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    if actual is None or expected is None:
        assert actual is expected, what
        return
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), what


class Case(NamedTuple):
    """A layer, and the incoming gradients of output, h_n, c_n and every c_t."""

    layer: Layer
    grads: tuple[Tensor | None, ...]

    @property
    def wanted(self) -> list[bool]:
        return [
            True,
            True,
            self.layer.cell.has_cell_state,
            False,
            *[True] * len(self.layer.weights),
        ]

    def to(self, change) -> "Case":
        def each(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(each(v) for v in value)
            return change(value) if isinstance(value, Tensor) else value

        return Case(Layer._make(map(each, self.layer)), each(self.grads))

    def run(self, forward, backward) -> dict[str, Tensor]:
        """Results and gradients by name."""
        layer = self.layer._replace(keep=True)
        results = forward(layer)
        kept = results.output, results.extra, results.saved
        has_c = layer.cell.has_cell_state
        again = forward(self.layer._replace(keep=False, all_c=has_c))
        for a, b in zip(results[:3], again):
            assert_same_bits(a, b, "without keep")
        if has_c and results.extra is not None:
            assert_same_bits(again.extra, results.extra, "c alone")
        copies = [t if t is None else t.clone() for t in kept]
        d = backward(layer, Saved(*kept, *self.grads, self.wanted))
        for a, b in zip(kept, copies):
            assert_same_bits(a, b, "what forward saved, after backward")
        names = ["output", "h_n", *(["c_n", "c"] if has_c else [])]
        found = dict(zip(names, (results.output, results.h_n, results.c_n, again.extra)))
        found |= {f"d_{name}": t for name, t in zip(self.names, d) if t is not None}
        return found

    @property
    def names(self) -> list[str]:
        """Of the tensors that have gradients."""
        weights = (f"weights[{i}]" for i in range(len(self.layer.weights)))
        return ["x", "h_0", "c_0", "inputs", *weights]

    def reference(self) -> dict[str, Tensor]:
        leaf = self.to(lambda t: t.detach().requires_grad_(t.is_floating_point()))
        layer = leaf.layer
        output = reference_layer(layer)
        pairs = [(o, g) for o, g in zip(output, leaf.grads) if g is not None]
        loss = sum((o * g).sum() for o, g in pairs)
        results = {n: o.detach() for n, o in zip(["output", "h_n", "c_n", "c"], output)}
        given = layer.x, layer.h_0, layer.c_0, layer.inputs, *layer.weights
        inputs = dict(zip(self.names, given))
        inputs = {name: t for name, t in inputs.items() if t is not None}
        grads = torch.autograd.grad(loss, list(inputs.values()))
        return results | {f"d_{name}": g for name, g in zip(inputs, grads)}


def make_case(
    mode: str,
    T: int,
    B: int,
    inputs: int,
    hidden: int,
    directions: int = 2,
    *,
    resets: bool = False,
    ragged: bool | str = False,
    states: bool = True,
    bias: bool = True,
    proj: int = 0,
    reverse: bool = False,
) -> Case:
    """In float64, with numbers that every dtype has; `proj` > 0 projects h."""
    torch.manual_seed(0)
    cell = CELLS[mode]
    width, features = cell.gates * hidden, proj or hidden

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(torch.bfloat16).double()

    batch_sizes = None
    steps: tuple[int, ...] = (T, B)
    if ragged == "mask":
        batch_sizes = torch.rand(T, B) < 0.6
        batch_sizes[:, 1:2] = False
    elif ragged:
        lengths = torch.randint(0, T + 1, (B,))
        lengths[0] = T
        batch_sizes = (lengths > torch.arange(T).unsqueeze(1)).sum(1)
        steps = (int(batch_sizes.sum()),)
    marks = torch.rand(steps) < 0.3 if resets else None
    if marks is not None and isinstance(batch_sizes, Tensor) and ragged == "mask":
        marks &= batch_sizes
    shapes = [(width, inputs), (width, features)] + [(width,)] * (2 if bias else 0)
    shapes += [(features, hidden)] if proj else []
    weights = tuple(randn(*s, scale=hidden**-0.5) for s in shapes * directions)
    has_c = cell.has_cell_state
    layer = Layer.plain(
        mode,
        directions,
        B,
        randn(*steps, inputs),
        randn(directions, B, features) if states else None,
        randn(directions, B, hidden) if states and has_c else None,
        weights,
        batch_sizes,
        marks,
        reverse=reverse,
        keep=True,
    )
    grads: tuple[Tensor | None, ...] = (None, None)
    if has_c:
        grads = randn(directions, B, hidden), randn(*steps, directions * hidden)
    grads = (randn(*steps, directions * features), randn(directions, B, features), *grads)
    return Case(layer, grads)


def with_options(case: Case, option: str) -> Case:
    """The same with one of OPTIONS on, or none if that is empty."""
    layer = case.layer
    rows, random = layer.x.shape[:-1], torch.Generator().manual_seed(1)

    def pick(shape: tuple[int, ...], values: list[float]) -> Tensor:
        return torch.tensor(values).double()[torch.randint(len(values), shape, generator=random)]

    values: dict[str, Any] = {
        "zoneout_h": 0.25,
        "zoneout_c": 0.375 if layer.cell.has_cell_state else 0.0,
        "seed": torch.tensor([-(2**61) - 12345]),
        "h_mask": pick((layer.directions, layer.batch, layer.proj), [0, 1.25, 2]),
        "grad_scale": pick(rows, [0, 0.5, 1, 1.5]),
        "grad_clip": 0.125,
    }
    names = {"zoneout": ["zoneout_h", "zoneout_c", "seed"], "mean": ["zoneout_h", "zoneout_c"]}
    names["all"] = list(values)
    own = names.get(option, [option] if option else [])
    if layer.has_projection:  # what the kernels know of them
        own = [name for name in own if name in ("zoneout_c", "seed", "grad_scale")]
    return case._replace(layer=layer._replace(**{name: values[name] for name in own}))


def run_on(case: Case, target, engine, choose=None) -> dict[str, Tensor]:
    backend = target.backend(engine, choose)

    def convert(t: Tensor) -> Tensor:
        if t.dtype == torch.int64:
            return t  # batch_sizes stay on the CPU
        t = t.to(engine.dtype) if t.is_floating_point() else t
        return t.to(target.device)

    def stated(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(layer.state_dtype)

    layer, (*grads, d_extra) = case.to(convert)
    seed = None if layer.seed is None else layer.seed.to(target.device)
    layer = layer._replace(grad_scale=stated(layer.grad_scale), seed=seed)
    return Case(layer, (*grads, stated(d_extra))).run(backend.forward, backend.backward)


def assert_right(actual: dict[str, Tensor], case: Case, engine) -> None:
    expected = case.reference()
    is_mean = case.layer.zoneout_h and case.layer.seed is None
    rounds = engine.tolerance > 1e-3 or is_mean
    if case.layer.h_0 is None:  # a gradient nobody can ask of the reference implementation
        actual = {name: t for name, t in actual.items() if name not in ("d_h_0", "d_c_0")}
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        if case.layer.mode == "RNN_RELU" and name.startswith("d_") and rounds:
            continue  # sums next to zero change sides by rounding
        got = actual[name].double().cpu()
        assert got.shape == want.shape, name
        error = ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()
        assert error <= engine.tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rows", ROWS)
def test_every_way(target, cell, engine, rows, plan):
    resets, ragged = ROWS[rows]
    if engine.tolerance > 4e-3 and engine != ENGINES["bf16"] and rows != "ragged-resets":
        pytest.skip("differs from bf16 in its product alone")
    # One direction, no initial state, and no bias each come up in some of the combinations.
    odd = (list(PLANS).index(plan) + list(ROWS).index(rows)) % 3
    case = make_case(
        cell,
        *(4, 9, 3, 18 if plan == "cluster" else 17),  # 16-bit states go by pairs, if they can
        1 if odd == 1 and not resets else 2,
        resets=resets,
        ragged=ragged,
        states=odd != 2,
        bias=odd != 0,
    )
    choose = chooser(plan, target.kernels, engine)
    assert_right(run_on(case, target, engine, choose), case, engine)


@pytest.mark.parametrize("engine", ["f64"], indirect=True)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(target, cell, engine, option, plan):
    """Each of them in each way; with each kind of rows in some of the combinations."""
    kind = list(PLANS).index(plan) + list(OPTIONS).index(option)
    resets, ragged = list(ROWS.values())[kind % len(ROWS)]
    more = {"resets": resets, "ragged": ragged, "states": kind % 4 != 1}
    directions = 1 if kind % 3 == 1 else 2
    case = make_case(
        cell, 5, 9, 3, 17, directions, **more, reverse=directions == 1 and kind % 2 == 0
    )
    case = with_options(case, option)
    actual = run_on(case, target, engine, chooser(plan, target.kernels, engine))
    assert_right(actual, case, engine)


@pytest.mark.parametrize("plan", ["step", "grid", "cluster-of-8"])
@pytest.mark.parametrize("option", ["mean", "all"])
def test_options_in_every_type(target, cell, engine, option, plan):
    """With more units than one group of random words has."""
    case = make_case(cell, 4, 9, 3, 70, resets=True, ragged="mask" if plan == "grid" else True)
    case = with_options(case, option)
    actual = run_on(case, target, engine, chooser(plan, target.kernels, engine))
    assert_right(actual, case, engine)


SIZES = [(1, 1, 1, 1), (3, 17, 1, 3), (2, 33, 5, 33), (1, 3, 2, 129), (17, 1, 3, 3), (2, 129, 1, 9)]
SIZES += [(3, 9, 1, 34)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("engine", ["f64", "bf16"], indirect=True)
@pytest.mark.parametrize("kind", ["STEP", "GRID", "CLUSTER"])
def test_odd_sizes(target, cell, engine, sizes, kind):
    """With the plan that each kind would choose."""

    def choose(problem, device):
        if target.name == "harness":
            device = target.kernels.DeviceInfo(132, 227 * 1024, device.capability)
        plan = target.kernels.make_plan(problem, device, target.kernels.Kind[kind])
        return plan if plan is not None else pytest.skip("too large for this kind")

    case = make_case(cell, *sizes, resets=True)
    assert_right(run_on(case, target, engine, choose), case, engine)


@pytest.mark.parametrize("plan", LARGE)
def test_long_products(target, cell, engine, plan):
    """More of the depth than is loaded at once, and more parts than warps."""
    case = make_case(cell, 2, 33, 3, 150, 1, states=True)
    choose = chooser(plan, target.kernels, engine)
    assert_right(run_on(case, target, engine, choose), case, engine)


@pytest.mark.parametrize("engine", ["f32", "f64"], indirect=True)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("option", ["", "all"])
def test_cpu_kernels_agree(target, cell, engine, rows, option):
    resets, ragged = ROWS[rows]
    case = make_case(cell, 6, 5, 4, 12, resets=resets, ragged=ragged)
    case = with_options(case, option)
    if ragged == "mask":
        pytest.skip("the CPU's take batch_sizes")
    actual = run_on(case, target, engine)
    cpu = backend_of("cpu")
    expected = case.run(cpu.forward, cpu.backward)
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        error = (actual[name].cpu().double() - want).abs().max() / want.abs().max().clamp(min=1)
        assert error <= engine.tolerance, name


@pytest.mark.parametrize("engine", ["f32", "f64", "bf16"], indirect=True)
def test_weights_that_stay_in_part_give_the_same_bits(target, engine, monkeypatch):
    """As if all did, in any order of threads."""
    case = make_case("GRU", 4, 9, 3, 150, 1)
    kind, *sizes = target.kernels.Kind.GRID, 16, 16, 1, 1

    def found(resident: bool, kept: int) -> dict[str, Tensor]:
        def choose(problem, device):
            plan = target.kernels.Plan(kind, *sizes, resident, engine.tensor, kept)
            assert target.kernels.is_possible(problem, device, plan)
            return plan

        return run_on(case, target, engine, choose)

    whole = found(True, 0)
    for seed, kept in enumerate((0, 1, 3, 4)):
        monkeypatch.setenv("FASTRNN_HARNESS_SEED", str(seed))
        for name, value in found(False, kept).items():
            assert torch.equal(value, whole[name]), (name, kept)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("engine", ["f32", "bf16"], indirect=True)
def test_same_bits_in_any_order_of_threads(target, engine, plan, monkeypatch):
    case = make_case("GRU", 4, 9, 3, 30, resets=True, ragged=True)
    choose = chooser(plan, target.kernels, engine)
    first = run_on(case, target, engine, choose)
    for seed in range(4):
        monkeypatch.setenv("FASTRNN_HARNESS_SEED", str(seed))
        again = run_on(case, target, engine, choose)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("engine", ["f32", "bf16"], indirect=True)
@pytest.mark.parametrize("plan", PLANS)
def test_rows_are_independent(target, cell, engine, plan):
    """Not even NaN goes from one row, or one segment, to another."""
    case = make_case(cell, 5, 9, 3, 17)
    x = case.layer.x.clone()
    x[2, 4] = float("nan")
    resets = torch.zeros(5, 9, dtype=torch.bool)
    resets[2:4, 4] = True
    choose = chooser(plan, target.kernels, engine)
    layer = case.layer._replace(resets=resets)
    clean = run_on(case._replace(layer=layer), target, engine, choose)
    dirty = run_on(case._replace(layer=layer._replace(x=x)), target, engine, choose)
    touched = torch.zeros(5, 9, dtype=torch.bool)
    touched[2, 4] = True
    for name in ("output", "d_x"):
        assert torch.equal(clean[name][~touched], dirty[name][~touched]), name
    assert dirty["output"][2, 4].isnan().all()
    for name in ("h_n", "d_h_0"):
        assert torch.equal(clean[name], dirty[name]), name


@pytest.mark.parametrize("engine", ["f32", "f64", "bf16"], indirect=True)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("proj", [2, 9])
@pytest.mark.parametrize("option", ["", "all"])
def test_projection(target, engine, rows, proj, option):
    resets, ragged = ROWS[rows]
    case = make_case("LSTM", 5, 7, 3, 9, resets=resets, ragged=ragged, proj=proj)
    case = with_options(case, option)
    assert_right(run_on(case, target, engine), case, engine)


@pytest.mark.parametrize("engine", ["f64"], indirect=True)
@pytest.mark.parametrize("proj", [0, 4])
@pytest.mark.parametrize("option", ["", "all"])
def test_what_is_masked_never_matters(target, cell, engine, proj, option):
    if proj and cell != "LSTM":
        pytest.skip("LSTM only")
    case = make_case(cell, 5, 7, 3, 9, resets=True, ragged="mask", proj=proj)
    case = with_options(case, option)
    masked = ~case.layer.batch_sizes
    marked = case.layer.x.clone(), case.grads[0].clone(), torch.ones(5, 7).double()
    if option:
        marked = (*marked[:2], case.layer.grad_scale.clone())
    for steps in marked:
        steps[masked] = float("nan")
    x, d_output, scale = marked
    layer = case.layer._replace(x=x, grad_scale=scale if option else None)
    dirty = Case(layer, (d_output, *case.grads[1:]))
    clean, actual = (run_on(c, target, engine) for c in (case, dirty))
    for name, want in clean.items():
        assert torch.equal(actual[name], want), name
    assert not clean["output"][masked].any()
    assert not clean["d_x"][masked].any()


@pytest.mark.parametrize("engine", ["f32"], indirect=True)
def test_no_steps(target, cell, engine):
    case = make_case(cell, 2, 3, 4, 5)
    d_output, d_h_n, d_c_n, d_extra = case.grads
    grads = d_output[:0], d_h_n, d_c_n, None if d_extra is None else d_extra[:0]
    empty = Case(case.layer._replace(x=case.layer.x[:0]), grads)
    results = run_on(empty, target, engine)
    assert torch.equal(results["h_n"].cpu(), case.layer.h_0.float())
    assert torch.equal(results["d_h_0"].cpu(), d_h_n.float())
    assert not results["d_weights[1]"].any()


@pytest.mark.parametrize("engine", ["f64", "bf16"], indirect=True)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("every", [1, 3, 6, 7])
@pytest.mark.parametrize("option", ["", "all"])
def test_segments(target, cell, engine, rows, every, option):
    """checkpoint_every = 7 is the plain scan."""
    resets, ragged = ROWS[rows]
    proj = 4 if CELLS[cell].has_cell_state and every == 3 else 0
    case = make_case(cell, 7, 5, 3, 9, resets=resets, ragged=ragged, proj=proj)
    case = with_options(case, option)
    case = case._replace(layer=case.layer._replace(checkpoint_every=every))
    assert_right(run_on(case, target, engine), case, engine)


@pytest.mark.parametrize("engine", ["f64"], indirect=True)
@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("rows", ROWS)
def test_a_single_direction_in_reverse(target, cell, engine, rows, every):
    resets, ragged = ROWS[rows]
    case = make_case(cell, 7, 5, 3, 9, 1, resets=resets, ragged=ragged, reverse=True)
    case = case._replace(layer=case.layer._replace(checkpoint_every=every))
    assert_right(run_on(case, target, engine), case, engine)


@pytest.mark.parametrize("engine", ["f32"], indirect=True)
def test_segments_keep_the_states_between_them(target, cell, engine):
    case = make_case(cell, 7, 5, 3, 9).to(lambda t: t.float())
    backend = target.backend(engine)
    layer = case.to(lambda t: t.to(target.device)).layer
    whole = backend.forward(layer)
    results = backend.forward(layer._replace(checkpoint_every=3))
    assert results.extra is None
    if not layer.cell.saves_gates:  # the output is all that backward needs
        assert results.saved is None
        return
    features = 9 + 9 * layer.cell.has_cell_state
    assert results.saved.shape == (2, 2, 5, features)
    for k, (last, first) in enumerate([(2, 3), (5, 6)]):  # of the steps beside a boundary
        kept = results.saved[k, :, :, :9]
        assert torch.equal(kept[0], whole.output[last, :, :9])
        assert torch.equal(kept[1], whole.output[first, :, 9:])


@pytest.mark.parametrize("engine", ["bf16", "f64"], indirect=True)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rows", ["plain", "ragged-resets", "mask-resets"])
@pytest.mark.parametrize("option", ["", "all"])
def test_segments_round_nothing(target, cell, engine, rows, plan, option):
    """Not even the states between them: the results are those of the whole scan, bit for bit."""
    resets, ragged = ROWS[rows]
    case = make_case(cell, 7, 9, 3, 17, resets=resets, ragged=ragged)
    case = with_options(case, option)
    choose = chooser(plan, target.kernels, engine)
    results = []
    for every in (0, 3):
        layer = case.layer._replace(checkpoint_every=every)
        results.append(run_on(case._replace(layer=layer), target, engine, choose))
    names = ["output", "h_n", "c_n", "c"]
    if engine.dtype == torch.float64:  # bfloat16 rounds the c that a gate's gradient takes
        names += ["d_h_0", "d_c_0"]
    for name in names:
        if name in results[0]:
            assert torch.equal(*(r[name] for r in results)), name
