"""The operators on the CUDA kernels against the definition in float64, run in every way."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from backends import ENGINES
from fastrnn._functions import Spec, reference_layer
from fastrnn._ops import CELLS, scan_backward, scan_forward

# kind, units, rows, slices, cluster, resident
PLANS = {
    "step": ("STEP", 16, 16, 1, 1, False),
    "step-small": ("STEP", 8, 8, 3, 1, False),
    "grid": ("GRID", 16, 8, 2, 1, True),
    "grid-from-cache": ("GRID", 8, 16, 4, 1, False),
    "block": ("CLUSTER", 32, 16, 4, 1, True),
    "cluster": ("CLUSTER", 8, 8, 8, 4, True),
}
ROWS = {
    "plain": (False, False),
    "resets": (True, False),
    "ragged": (False, True),
    "ragged-resets": (True, True),
    "mask": (False, "mask"),
    "mask-resets": (True, "mask"),
}


def chooser(name: str, kernels, engine):
    kind, *numbers = PLANS[name]

    def choose(problem, device):
        plan = kernels.Plan(kernels.Kind[kind], *numbers, engine.tensor)
        if not kernels.is_possible(problem, device, plan):
            pytest.skip("this device cannot")
        return plan

    return choose


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), what


class Case(NamedTuple):
    """The arguments of both operators, but for what forward returns, and incoming gradients."""

    mode: str
    x: Tensor
    weights: list[list[Tensor]]  # w_ih, w_hh, w_hr, b_ih, b_hh; one list of each direction
    h_0: Tensor | None
    c_0: Tensor | None
    batch_sizes: Tensor | None
    resets: Tensor | None
    batch: int
    grads: list[Tensor | None]  # of output, h_n, c_n, every c_t

    @property
    def wanted(self) -> list[bool]:
        has_c = self.mode == "LSTM"
        return [True, True, has_c, *(bool(w) for w in self.weights[:3]), bool(self.weights[3])]

    def to(self, change) -> "Case":
        def each(value: Any) -> Any:
            if isinstance(value, list):
                return [each(v) for v in value]
            return change(value) if isinstance(value, Tensor) else value

        return Case(*map(each, self))

    def run(self, forward, backward) -> dict[str, Tensor]:
        """Results and gradients by name."""
        mode, x, weights, h_0, c_0, batch_sizes, resets, batch, grads = self
        rows = batch_sizes, resets, batch, False
        output, h_n, c_n, extra, gates = forward(mode, x, *weights, h_0, c_0, *rows, True, False)
        kept = output, extra, gates
        shown = forward(mode, x, *weights, h_0, c_0, *rows, False, mode == "LSTM")
        for a, b in zip((output, h_n, c_n), shown):
            assert_same_bits(a, b, "without keep")
        if mode == "LSTM":
            assert_same_bits(shown[3], extra, "c alone")
        saved = [t.clone() for t in kept]
        given = mode, x, *weights[:3], h_0, c_0, *rows, *kept, *grads
        d = backward(*given, self.wanted)
        for a, b in zip(kept, saved):
            assert_same_bits(a, b, "what forward saved, after backward")
        names = ["output", "h_n", *(["c_n", "c"] if mode == "LSTM" else [])]
        results = dict(zip(names, (output, h_n, c_n, extra)))
        results |= dict(
            zip(("d_x", "d_h_0", "d_c_0", "d_w_ih", "d_w_hh", "d_w_hr", "d_b_ih", "d_b_hh"), d)
        )
        return {name: t for name, t in results.items() if t.numel()}

    def definition(self) -> dict[str, Tensor]:
        leaf = self.to(lambda t: t.requires_grad_() if t.is_floating_point() else t)
        mode, x, (ih, hh, hr, b_ih, b_hh), h_0, c_0, batch_sizes, resets, batch, grads = leaf
        weights = [w for each in zip(*(k for k in (ih, hh, b_ih, b_hh, hr) if k)) for w in each]
        spec = Spec(mode, len(ih), batch, batch_sizes, resets)
        mask = None
        if batch_sizes is not None and batch_sizes.dtype == torch.bool:
            spec, mask = spec._replace(batch_sizes=None), batch_sizes
        output = reference_layer(spec, x, h_0, c_0, weights, mask)
        names = ["output", "h_n", "c_n", "c"][: len(output)]
        pairs = [(o, g) for o, g in zip(output, grads) if g is not None]
        loss = sum((o * g).sum() for o, g in pairs)
        inputs = {"x": [x], "h_0": [h_0], "c_0": [c_0]}
        inputs |= {"w_ih": ih, "w_hh": hh, "w_hr": hr, "b_ih": b_ih, "b_hh": b_hh}
        results = {name: o.detach() for name, o in zip(names, output)}
        for name, tensors in inputs.items():
            if tensors and tensors[0] is not None:
                found = torch.autograd.grad(loss, tensors, retain_graph=True)
                results[f"d_{name}"] = (
                    found[0] if name in ("x", "h_0", "c_0") else torch.stack(found)
                )
        return results


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
    shown: int = 0,
) -> Case:
    """In float64, with numbers that every dtype has; `shown` > 0 projects h."""
    torch.manual_seed(0)
    wide, features = CELLS[mode].gates * hidden, shown or hidden

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(torch.bfloat16).double()

    def each(*shape: int) -> list[Tensor]:
        return [randn(*shape, scale=hidden**-0.5) for _ in range(directions)]

    batch_sizes = None
    steps = (T, B)
    if ragged == "mask":
        batch_sizes = torch.rand(T, B) < 0.6
        batch_sizes[:, 1:2] = False
    elif ragged:
        lengths = torch.randint(0, T + 1, (B,))
        lengths[0] = T
        batch_sizes = (lengths > torch.arange(T).unsqueeze(1)).sum(1)
        steps = (int(batch_sizes.sum()),)
    marks = torch.rand(steps) < 0.3 if resets else None
    if resets and ragged == "mask":
        marks &= batch_sizes
    has_c = mode == "LSTM"
    weights = [each(wide, inputs), each(wide, features), each(features, hidden) if shown else []]
    weights += [each(wide), each(wide)] if bias else [[], []]
    grads = [randn(*steps, directions * features), randn(directions, B, features), None, None]
    if has_c:
        grads[2:] = randn(directions, B, hidden), randn(*steps, directions * hidden)
    return Case(
        mode,
        randn(*steps, inputs),
        weights,
        randn(directions, B, features) if states else None,
        randn(directions, B, hidden) if states and has_c else None,
        batch_sizes,
        marks,
        B,
        grads,
    )


def run_on(case: Case, backend, engine, choose=None) -> dict[str, Tensor]:
    scan = backend.scan(engine, choose)

    def convert(t: Tensor) -> Tensor:
        if t.dtype == torch.int64:
            return t  # batch_sizes stay on the CPU
        t = t.to(engine.dtype) if t.is_floating_point() else t
        return t.to(backend.device)

    converted = case.to(convert)
    if case.mode == "LSTM" and converted.grads[3].dtype.itemsize == 2:
        converted.grads[3] = converted.grads[3].float()
    return converted.run(scan.forward, scan.backward)


def assert_right(actual: dict[str, Tensor], case: Case, engine) -> None:
    expected = case.definition()
    if case.h_0 is None:  # a gradient nobody can ask of the definition
        actual = {name: t for name, t in actual.items() if name not in ("d_h_0", "d_c_0")}
    if case.grads and "d_x" in actual:
        actual["d_x"] = actual["d_x"].double().sum(0)
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        if case.mode == "RNN_RELU" and engine.tolerance > 1e-3 and name.startswith("d_"):
            continue  # sums next to zero change sides by rounding
        got = actual[name].double().cpu()
        assert got.shape == want.shape, name
        error = ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()
        assert error <= engine.tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rows", ROWS)
def test_every_way(backend, cell, engine, rows, plan):
    resets, ragged = ROWS[rows]
    if engine.tolerance > 4e-3 and engine != ENGINES["bf16"] and rows != "ragged-resets":
        pytest.skip("differs from bf16 in its product alone")
    # One direction, no initial state, and no bias each come up in some of the combinations.
    odd = (list(PLANS).index(plan) + list(ROWS).index(rows)) % 3
    case = make_case(
        cell,
        *(4, 9, 3, 17),
        1 if odd == 1 and not resets else 2,
        resets=resets,
        ragged=ragged,
        states=odd != 2,
        bias=odd != 0,
    )
    choose = chooser(plan, backend.kernels, engine)
    assert_right(run_on(case, backend, engine, choose), case, engine)


SIZES = [(1, 1, 1, 1), (3, 17, 1, 3), (2, 33, 5, 33), (1, 3, 2, 129), (17, 1, 3, 3), (2, 129, 1, 9)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("engine", ["f64", "bf16"], indirect=True)
@pytest.mark.parametrize("kind", ["STEP", "GRID", "CLUSTER"])
def test_odd_sizes(backend, cell, engine, sizes, kind):
    """With the plan that each kind would choose."""

    def choose(problem, device):
        if backend.name == "harness":
            device = backend.kernels.DeviceInfo(132, 227 * 1024, device.capability)
        plan = backend.kernels.make_plan(problem, device, backend.kernels.Kind[kind])
        return plan if plan is not None else pytest.skip("too large for this kind")

    case = make_case(cell, *sizes, resets=True)
    assert_right(run_on(case, backend, engine, choose), case, engine)


@pytest.mark.parametrize("engine", ["f32", "f64"], indirect=True)
@pytest.mark.parametrize("rows", ROWS)
def test_cpu_kernels_agree(backend, cell, engine, rows):
    resets, ragged = ROWS[rows]
    case = make_case(cell, 6, 5, 4, 12, resets=resets, ragged=ragged)
    if ragged == "mask":
        pytest.skip("the CPU's take batch_sizes")
    actual = run_on(case, backend, engine)
    expected = case.run(scan_forward, scan_backward)
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        error = (actual[name].cpu().double() - want).abs().max() / want.abs().max().clamp(min=1)
        assert error <= engine.tolerance, name


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("engine", ["f32", "bf16"], indirect=True)
def test_same_bits_in_any_order_of_threads(backend, engine, plan, monkeypatch):
    case = make_case("GRU", 4, 9, 3, 33, resets=True, ragged=True)
    choose = chooser(plan, backend.kernels, engine)
    first = run_on(case, backend, engine, choose)
    for seed in range(4):
        monkeypatch.setenv("FASTRNN_HARNESS_SEED", str(seed))
        again = run_on(case, backend, engine, choose)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("engine", ["f32", "bf16"], indirect=True)
@pytest.mark.parametrize("plan", PLANS)
def test_rows_do_not_meet(backend, cell, engine, plan):
    """Not even NaN goes from one row, or one segment, to another."""
    case = make_case(cell, 5, 9, 3, 17)
    x = case.x.clone()
    x[2, 4] = float("nan")
    resets = torch.zeros(5, 9, dtype=torch.bool)
    resets[2:4, 4] = True
    choose = chooser(plan, backend.kernels, engine)
    clean = run_on(case._replace(resets=resets), backend, engine, choose)
    dirty = run_on(case._replace(resets=resets, x=x), backend, engine, choose)
    touched = torch.zeros(5, 9, dtype=torch.bool)
    touched[2, 4] = True
    for name in ("output", "d_x"):
        a, b = (r[name] if name == "output" else r[name].sum(0) for r in (clean, dirty))
        assert torch.equal(a[~touched], b[~touched]), name
    assert dirty["output"][2, 4].isnan().all()
    for name in ("h_n", "d_h_0"):
        assert torch.equal(clean[name], dirty[name]), name


@pytest.mark.parametrize("engine", ["f32", "f64", "bf16"], indirect=True)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shown", [2, 9])
def test_projection(backend, engine, rows, shown):
    resets, ragged = ROWS[rows]
    case = make_case("LSTM", 5, 7, 3, 9, resets=resets, ragged=ragged, shown=shown)
    assert_right(run_on(case, backend, engine), case, engine)


@pytest.mark.parametrize("engine", ["f64"], indirect=True)
@pytest.mark.parametrize("shown", [0, 4])
def test_what_is_masked_never_matters(backend, cell, engine, shown):
    if shown and cell != "LSTM":
        pytest.skip("LSTM only")
    case = make_case(cell, 5, 7, 3, 9, resets=True, ragged="mask", shown=shown)
    assert isinstance(case.batch_sizes, Tensor)
    x, d_output = case.x.clone(), case.grads[0].clone()
    x[~case.batch_sizes] = float("nan")
    d_output[~case.batch_sizes] = float("nan")
    dirty = case._replace(x=x, grads=[d_output, *case.grads[1:]])
    clean, actual = (run_on(c, backend, engine) for c in (case, dirty))
    for name, want in clean.items():
        assert torch.equal(actual[name], want), name
    assert not clean["output"][~case.batch_sizes].any()
    assert not clean["d_x"][:, ~case.batch_sizes].any()


@pytest.mark.parametrize("engine", ["f32"], indirect=True)
def test_no_steps(backend, cell, engine):
    case = make_case(cell, 2, 3, 4, 5)
    empty = case.to(lambda t: t)._replace(x=case.x[:0])
    grads = [case.grads[0][:0], *case.grads[1:3], case.grads[3]]
    if grads[3] is not None:
        grads[3] = grads[3][:0]
    results = run_on(empty._replace(grads=grads), backend, engine)
    assert torch.equal(results["h_n"].cpu(), case.h_0.float())
    assert torch.equal(results["d_h_0"].cpu(), case.grads[1].float())
    assert not results["d_w_hh"].any()
