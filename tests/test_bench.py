"""The parts of the benchmark that could be wrong without anyone noticing."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fastrnn

pytest.importorskip("bench", reason="the benchmarks are not part of this tree")

from bench import (
    __main__ as main,
)
from bench import (
    bursts,
    calls,
    cases,
    compare,
    deep,
    floor,
    headline,
    heatmap,
    machine,
    onnx_model,
    options,
    own,
    results,
    steps,
    table,
    tiles,
)
from bench.cases import Case
from bench.peers import JAX, PEERS, ONNXRuntime, OpenVINO, check
from bench.variants import VARIANTS
from bench.worker import Worker, WorkerError

ROOT = Path(__file__).parents[1]
needs_docs = pytest.mark.skipif(
    not (ROOT / "docs").exists(), reason="the docs are not part of this tree"
)
SMALL = Case("GRU", "training", 3, 2, 4)
RUNNABLE = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name, peer in PEERS.items()
    for cell in cases.GATES
    for mode in cases.MODES
    for case in (
        Case(cell, mode, 3, 2, 4),
        Case(cell, mode, 3, 2, 4, layers=2, directions=2),
        Case(cell, mode, 30, 2, 4, ragged=True),
    )
    if name != "torch" and peer.takes(case)
]


def make_row(case: Case, ms: dict[str, float], busy: bool = False) -> results.Row:
    samples = {peer: [time / 1e3] * 3 for peer, time in ms.items()}
    row = {
        "case": asdict(case),
        "rounds": 3,
        "ms": ms,
        "times_torch": results.medians_of_ratios(samples, "torch"),
        "times_fastrnn": results.medians_of_ratios(samples, "fastrnn"),
        "failed": {},
        "others": 0.0,
        "steal": 0.0,
        "busy": busy,
    }
    compare.add_fractions(row, 1e9, dict.fromkeys(floor.sizes_to_read([case]), 1e9))
    return row


@pytest.fixture
def result() -> results.Result:
    shape = (100, 32, 64)
    rows = [
        make_row(Case("LSTM", "inference", *shape), {"fastrnn": 1.0, "torch": 4.0, "jax": 2.0}),
        make_row(Case("LSTM", "training", *shape), {"fastrnn": 2.0, "torch": 1.0}, busy=True),
        make_row(Case("GRU", "training", *shape, ragged=True), {"fastrnn": 1.0, "torch": 9.0}),
    ]
    return {
        "schema": results.SCHEMA,
        "machine": {
            "cpu": "abacus",
            "cores": 2,
            "variant": "beads",
            "commit": None,
            "versions": {"torch": "2.6.0"},
        },
        "threads": 2,
        "limits": {"multiply_add_flops_per_s": 1e9, "read_bytes_per_s": {"65536": 1e9}},
        "load": {"busy_rows": 1, "rate_spread": 1.1, "waiting": 0.0},
        "rows": rows,
    }


# Instruction sets


@pytest.mark.parametrize("variant", VARIANTS)
def test_libraries_are_held_to_a_variant(variant, monkeypatch):
    for name in VARIANTS[variant]:
        monkeypatch.setenv(name, "")  # taken back after the test
    peers = main.hold(list(PEERS), variant)
    assert "onnxruntime" not in peers
    assert {"fastrnn", "torch"} <= set(peers)
    if variant not in fastrnn.cpu_variants():
        pytest.skip("this processor does not have it")
    worker = Worker(held, 1)
    try:
        assert worker.call("variant") == variant
        expected = {"avx2": "AVX2", "avx512": "AVX512"}[variant]
        assert worker.call("capability") == expected
    finally:
        worker.close()


class held:
    """What a worker's libraries say of themselves."""

    def __init__(self, threads: int) -> None:
        pass

    def variant(self) -> str:
        return fastrnn.cpu_variant()

    def capability(self) -> str:
        return torch.backends.cpu.get_cpu_capability()


def test_tiles_are_near_the_rate():
    fraction = tiles.Tiles(1).fraction(2, 64, False)
    assert 0.05 < fraction < 1.3


# Ratios


def test_ratios_are_taken_round_by_round():
    """Slow rounds hit all, and one sample of torch.nn alone is far off: no ratio may move."""
    drift = np.array([1, 1, 1, 3, 3])
    samples = {"fastrnn": list(2 * drift), "torch": [*(5 * drift[:4]), 900]}
    assert results.medians_of_ratios(samples, "fastrnn") == {"fastrnn": 1.0, "torch": 2.5}
    assert results.medians_of_ratios(samples, "torch") == {"fastrnn": 0.4, "torch": 1.0}


def test_ratios_need_every_peer_in_every_round():
    with pytest.raises(ValueError, match="zip"):
        results.medians_of_ratios({"fastrnn": [1.0], "torch": [1.0, 2.0]}, "torch")


def test_best_peer(result):
    assert [results.best_peer(row) for row in result["rows"]] == [
        ("jax", 2.0),
        ("torch", 0.5),
        ("torch", 9.0),
    ]


def test_geometric_mean():
    assert results.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)


# The grid and its numbers


def test_grid_is_what_its_rule_says():
    assert len(set(cases.GRID)) == 30
    for axis, (values, least) in enumerate(
        [(cases.T_GRID, 5), (cases.B_GRID, 3), (cases.H_GRID, 2)]
    ):
        counts = {value: sum(shape[axis] == value for shape in cases.GRID) for value in values}
        assert sum(counts.values()) == 30
        assert min(counts.values()) >= least, counts
    for t, others in cases.SHAPES.items():
        rows, sizes = zip(*others)
        assert min(rows) == 1
        assert max(rows) == 256
        assert min(sizes) <= 64
        assert max(sizes) >= 512
        assert all(t * b * h * h <= cases.LARGEST for b, h in others)


@pytest.mark.parametrize("level", ["quick", "default"])
def test_smaller_runs_measure_rows_of_the_full_one(level):
    chosen, full = (cases.make_cases(name) for name in (level, "full"))
    assert len(chosen) < len(full)
    assert set(chosen) <= set(full)


def test_data_is_the_same_in_every_process():
    one, two = SMALL.data(), replace(SMALL).data()
    assert np.array_equal(one.x, two.x)
    assert all(np.array_equal(one.weights[name], two.weights[name]) for name in one.weights)


def test_lengths_are_uniform_from_a_tenth():
    lengths = Case("RNN", "inference", 100, 4000, 1, ragged=True).lengths()
    assert (lengths.min(), lengths.max()) == (10, 100)
    assert lengths.mean() == pytest.approx(55, abs=1.5)


# The floor


def test_flops():
    T, B, H = 3, 5, 7
    layer = 2 * T * B * 4 * H * (H + H)
    assert floor.flops(Case("LSTM", "inference", T, B, H)) == layer
    assert floor.flops(Case("LSTM", "training", T, B, H)) == 3 * layer
    second = 2 * T * B * 4 * H * (2 * H + H)
    deep = Case("LSTM", "inference", T, B, H, layers=2, directions=2)
    assert floor.flops(deep) == 2 * (layer + second)
    ragged = Case("LSTM", "inference", T, B, H, ragged=True)
    assert floor.flops(ragged) * T * B == layer * ragged.lengths().sum()


@pytest.mark.parametrize("options", [{}, {"layers": 2, "directions": 2}], ids=["plain", "deep"])
def test_weights_are_those_of_the_data(options):
    case = Case("GRU", "inference", 3, 2, 5, **options)
    sizes = {"ih": 0, "hh": 0}
    for name, weight in case.data().weights.items():
        if name.startswith("weight"):
            sizes[name[7:9]] += weight.size
    assert floor.weights(case) == (sizes["ih"], sizes["hh"])


def test_weights_are_read_at_every_step():
    case = Case("RNN", "inference", 11, 1, 8)
    recurrent = 4 * 8 * 8
    reads = {2 * recurrent: 100.0, recurrent: 50.0}
    assert floor.sizes_to_read([case]) == sorted(reads)
    seconds = 2 * recurrent / 100 + 10 * recurrent / 50
    assert floor.floor_seconds(case, math.inf, reads) == pytest.approx(seconds)
    training = replace(case, mode="training")
    assert floor.floor_seconds(training, math.inf, reads) == pytest.approx(2 * seconds)


def test_the_slower_limit_holds():
    case = Case("RNN", "inference", 11, 1, 8)
    slow, fast = (dict.fromkeys(floor.sizes_to_read([case]), rate) for rate in (1.0, 1e30))
    assert floor.floor_seconds(case, 1.0, fast) == floor.flops(case)
    assert floor.floor_seconds(case, 1e30, slow) == floor.read_seconds(case, slow)
    few, many = (replace(case, B=floor.FEW_ROWS + extra) for extra in (0, 1))
    assert floor.sizes_to_read([few])
    assert floor.floor_seconds(few, math.inf, slow) > 0
    assert floor.sizes_to_read([many]) == []
    assert floor.floor_seconds(many, 1.0, {}) == floor.flops(many)


def test_fractions():
    case = Case("LSTM", "inference", 100, 32, 64)
    row = make_row(case, {"fastrnn": 1e3, "torch": 1e3})
    assert row["of_floor"] == pytest.approx(floor.flops(case) / 1e9)


# Peers


@pytest.mark.parametrize(("name", "case"), RUNNABLE)
def test_peers_agree_with_torch(name, case):
    if missing := PEERS[name].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    numbers = []
    for peer_class in (PEERS[name], PEERS["torch"]):
        peer = peer_class(1)
        peer.prepare(case)
        numbers.append(peer.run())
    check(*numbers)
    gradients = [key for key in numbers[0] if key.endswith(".grad")]
    assert len(gradients) == (1 + len(case.data().weights) if case.training else 0)


def test_what_runs_where():
    assert not any(peer.takes(SMALL) for peer in (ONNXRuntime, OpenVINO))
    assert JAX.takes(SMALL)
    assert not JAX.takes(replace(SMALL, ragged=True))


@pytest.mark.parametrize("cell", cases.GATES)
def test_model_without_states_starts_from_zeros(cell):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    case = Case(cell, "inference", 1, 3, 4)
    data = case.data()
    data = replace(data, states=tuple(np.zeros_like(state) for state in data.states))
    numbers = []
    for stateless in (False, True):
        model = onnx_model.build(case, data, stateless)
        session = onnxruntime.InferenceSession(model, ONNXRuntime.options(1))
        names = {value.name for value in session.get_inputs()}
        assert (names == {"x"}) is stateless
        feeds = {k: v for k, v in onnx_model.feeds(case, data).items() if k in names}
        numbers.append(session.run(["y"], feeds)[0])
    assert np.array_equal(*numbers)


@pytest.mark.parametrize("step", calls.STEPS, ids=lambda s: f"{s.name}-{s.mode}-{s.rows}")
def test_every_call_is_that_of_its_class(step):
    """Both libraries compute the same from the same seed; training differentiates."""
    outcomes = []
    for library in (torch.nn, fastrnn):
        with torch.inference_mode(step.mode == "inference"):
            outcomes.append(calls.torch_call(library, step)())
    torch.testing.assert_close(*outcomes)
    (first, *_), _ = torch.utils._pytree.tree_flatten(outcomes[1])
    assert first.requires_grad is (step.mode == "training")


def test_goals_of_calls():
    def row(**of):
        return {"goal": 0.3, "of": of}

    assert not calls.missed(row(torch=0.3, onnxruntime=1.0 + calls.NOISE / 2))
    assert calls.missed(row(torch=0.301))
    assert calls.missed(row(torch=0.1, onnxruntime=1.1))


# Bursts, and the programs that take them


def make_pair(case, threads):
    return {"one": lambda: sum(range(100)), "two": lambda: sum(range(10_000))}


def make_other(case, threads):
    return {"three": lambda: sum(range(1000))}


def test_bursts_are_interleaved_across_processes():
    row = bursts.measure([(make_pair, False), (make_other, None)], "case", 1, 3, 0.001)
    assert list(row["us"]) == ["one", "two", "three"]
    assert list(row["over"]) == ["two", "three"]
    assert row["over"]["two"] > row["over"]["three"] > 1


def test_rows_are_chosen_by_their_words():
    names = ["LSTM training 64", "LSTM inference 64", "GRU training 64"]
    assert bursts.chosen(names, [""]) == names
    assert bursts.chosen(names, ["LSTM 64"]) == names[:2]
    assert bursts.chosen(names, ["LSTM training", "GRU"]) == [names[0], names[2]]
    assert bursts.chosen(names, ["RNN"]) == []


def test_rows_are_kept(tmp_path, monkeypatch, capsys):
    """A second run adds its rows in the program's order, of the same machine only."""
    file = tmp_path / "rows.json"
    measured = []

    def run(*arguments):
        args = bursts.parser("rows", "", 1).parse_args([*arguments, "--json", str(file)])
        cases = {"b": 1, "a": 2, "c": 3}

        def measure(case):
            measured.append(case)
            return {"case": case, "busy": False}

        bursts.run(args, cases, measure, lambda rows: str(len(rows)))
        return [row["row"] for row in json.loads(file.read_text())["rows"]]

    assert run("--only", "c") == ["c"]
    assert run("--only", "a", "--keep") == ["a", "c"]
    assert run("--missing", "--keep") == ["b", "a", "c"]
    assert measured == [3, 2, 1]
    with pytest.raises(SystemExit, match="is in no name"):
        run("--only", "d")
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"threads": found["threads"] + 1}))
    with pytest.raises(SystemExit, match="another machine"):
        run("--keep")


@pytest.mark.parametrize("cell", cases.GATES)
def test_steps_are_those_of_their_class(cell):
    """Every peer takes the same step, from a state of its own."""
    row = steps.Steps(cell, "inference", 1, 8)
    with torch.inference_mode():
        for call in steps.inference(row, 1).values():
            assert call() is None
    training = steps.Steps(cell, "training", 2, 8)
    for call in steps.training(training, 1).values():
        assert call() is None


def test_goals_of_steps():
    row = {"row": "", "over": {"torch.nn": 5.0, "ONNX Runtime": 1.1}}
    row |= steps.Steps("LSTM", "inference", 1, 64)._asdict()
    assert steps.missed(row) == []
    assert len(steps.missed(row | {"over": {"torch.nn": 4.9, "ONNX Runtime": 0.9}})) == 2
    row = {"row": "", "p50": 3.9, **steps.LATENCY_ROW._asdict()}
    assert steps.missed(row) == []
    assert len(steps.missed(row | {"p50": 4.1})) == 1


OPTIONED = [
    (cell, name) for cell in cases.GATES for name in options.known(cell) if name != "zoneout"
]


@pytest.mark.parametrize(("cell", "name"), OPTIONED)
def test_loops_do_what_the_options_do(cell, name):
    """With the same random numbers; those of zoneout are the kernel's own."""
    outcomes = []
    for peer in (options.Optioned(1, name), options.Loop(1, name)):
        peer.prepare(Case(cell, "training", 5, 3, 4))
        torch.manual_seed(1)
        output, _ = peer.step()
        outcomes.append([output, peer.x.grad, *(w.grad for w in peer.rnn.parameters())])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", cases.GATES)
def test_the_loop_zones_out(cell, monkeypatch):
    """With probability 0 a loop is the plain layer; with 1 its states stay what they were."""
    case = Case(cell, "training", 4, 3, 5)
    plain, loop = options.Optioned(1, beside="zoneout"), options.Loop(1, "zoneout")
    plain.prepare(case)
    loop.prepare(case)
    monkeypatch.setattr(options, "P", 0.0)
    torch.testing.assert_close(loop.forward()[0], plain.forward()[0])
    monkeypatch.setattr(options, "P", 1.0)
    assert not loop.forward()[0].any()


def test_goals_of_options():
    time = {"row": "", "kind": "time", "option": "zoneout", "ratio": 1.15, "over": {"loop": 15.0}}
    assert options.missed(time) == []
    assert len(options.missed(time | {"ratio": 1.16, "over": {"loop": 14.9}})) == 2
    memory = {"row": "", "kind": "memory", "option": "layer_norm", "ratio": 1.30}
    assert options.missed(memory) == []
    assert len(options.missed(memory | {"option": "zoneout"})) == 1


@pytest.mark.parametrize("cell", own.LOOP_CELLS)
def test_loops_do_what_the_cells_do(cell):
    calls_of = own.loop_calls(own.InLoop(cell, (4, 3, 5)), 1)
    torch.testing.assert_close(calls_of["loop"](), calls_of["fastrnn"]())


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("cell", cases.GATES)
def test_own_cells_are_the_built_in_ones(cell, mode):
    calls_of = own.built_in_calls(own.Beside(cell, mode, (4, 3, 5)), 1)
    results_of = [call() for call in calls_of.values()]
    if mode == "inference":
        results_of = [output for output, _ in results_of]
    torch.testing.assert_close(*results_of)


def test_the_compiler_is_counted(monkeypatch):
    monkeypatch.setenv("FASTRNN_CACHE", "before")
    with own.counted_compiler() as runs:
        assert os.environ["FASTRNN_CACHE"] != "before"
        command = os.environ["CXX"]
        subprocess.run([command, "--version"], check=True, capture_output=True)
        assert runs.read_text().split() == ["run"]
    assert os.environ["FASTRNN_CACHE"] == "before"
    assert os.environ.get("CXX") != command


def test_tables_say_what_is_missed():
    timed = {"us": {"own": 2e3, "built-in": 1e3}, "over": {"built-in": 0.5}, "busy": False}
    beside = own.Beside("LSTM", "training", (1, 1, 1))._asdict()
    row = {"row": "LSTM", "kind": "built-in", **beside, **timed, "of_built_in": 2.0}
    text = own.render([row])
    assert "Goals missed:\nLSTM: 2.000 of the built-in cell's time" in text
    assert "Goals missed" not in own.render([row | {"of_built_in": 1.1}])


def test_deep_models_beside_their_layers():
    for kind in ("plain", *deep.KINDS):
        case = deep.Deep("GRU", "training", (40, 2, 8), 4, kind)
        calls = deep.calls(case._replace(mode="inference"), 1)
        a, b = (call() for call in calls.values())
        assert a.data.shape == b.data.shape
        assert all(call() is None for call in deep.calls(case, 1).values())
    row = {**case._asdict(), "row": "", "kind": "plain", "shape": [200, 1, 256], "busy": False}
    row |= {"us": {"deep": 2e3, "layers": 2.2e3}, "over": {"layers": 1.1}}
    assert "1.10x, goal 1.5x" in deep.render([row])
    assert "Goals missed" not in deep.render([row | {"over": {"layers": 1.6}}])
    assert "Goals missed" not in deep.render([row | {"shape": [1000, 1, 64]}])


# Wrong numbers


class FakeTeam:
    """A team in this process: torch.nn, and peers made of it that do something to its numbers."""

    def __init__(self, **faults) -> None:
        self.peers = ["torch", *faults]
        self._faults = {"torch": lambda values: None, **faults}

    def call(self, name, method, *arguments):
        if method == "prepare":
            self.torch = PEERS["torch"](1)
            self.torch.prepare(*arguments)
            return None
        values = {key: value.copy() for key, value in self.torch.run().items()}
        self._faults[name](values)
        return values


def off(values):
    values["weight_hh_l0.grad"][0, 0] += 1e-3 * np.abs(values["weight_hh_l0.grad"]).max()


def rounding(values):
    values["output"] *= 1 + 1e-5


def swapped(values):
    values["output"][:] = values["output"][::-1]


def nan(values):
    values["h_n"][0, 0, 0] = np.nan


def transposed(values):
    values["output"] = values["output"].swapaxes(0, 1)


def incomplete(values):
    del values["x.grad"]


@pytest.mark.parametrize("fault", [off, swapped, nan, transposed, incomplete])
def test_wrong_numbers_are_not_timed(fault):
    ready, failed = compare.prepare(FakeTeam(jax=fault), SMALL)
    assert ready == ["torch"]
    assert list(failed) == ["jax"]


def test_rounding_is_not_wrong():
    assert compare.prepare(FakeTeam(jax=rounding), SMALL) == (["torch", "jax"], {})


@pytest.mark.parametrize("fault", [off, nan])
def test_wrong_numbers_of_fastrnn_end_the_run(fault):
    with pytest.raises(ValueError, match=r"weight_hh_l0|h_n"):
        compare.prepare(FakeTeam(fastrnn=fault), SMALL)


class StubTeam:
    """A team of nobody, with a machine that is always the same."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, name, method, *arguments):
        return 1e9

    def waiting_share(self):
        return 0.0


def test_an_ended_run_is_continued(monkeypatch, result, tmp_path):
    """Ended while its third row was measured; each row is measured once, and none is lost."""
    chosen, file, measured = cases.make_cases("quick"), tmp_path / "result.json", []

    def measure(team, case, seconds, least):
        if len(measured) == 2 and not file.with_suffix(".ended").exists():
            file.with_suffix(".ended").touch()
            raise SystemExit
        measured.append(case)
        return make_row(case, {"fastrnn": 1.0, "torch": 2.0})

    monkeypatch.setattr(compare, "Team", StubTeam)
    monkeypatch.setattr(compare, "measure", measure)
    monkeypatch.setattr(compare, "describe_with", lambda peers: result["machine"])
    monkeypatch.setattr(compare, "load_of", lambda seconds: machine.Load(0.0, 0.0))

    def run(earlier):
        return compare.run(chosen, [], 2, 0.0, 1, lambda r: results.save(r, file), earlier)

    with pytest.raises(SystemExit):
        run(None)
    assert [results.case_of(row) for row in results.load(file)["rows"]] == chosen[:2]
    whole = run(results.load(file))
    assert measured == chosen
    assert [results.case_of(row) for row in whole["rows"]] == chosen
    assert whole == results.load(file)
    assert {int(size) for size in whole["limits"]["read_bytes_per_s"]} == set(
        floor.sizes_to_read(chosen)
    )


# Workers


def test_worker():
    worker = Worker("torch", threads=1)
    try:
        with pytest.raises(WorkerError, match="AttributeError"):
            worker.call("no_such_method")
        worker.call("prepare", SMALL)
        assert worker.call("seconds", 0.001) > 0
        assert worker.cpu_s > 0
        assert worker.call("run").keys() >= {"output", "h_n", "x.grad"}
        worker.process.kill()
        with pytest.raises(WorkerError, match="ended with -9"):
            worker.call("run")
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("others", "steal", "busy"),
    [(0, 0, False), (0.04, 0.01, False), (0.1, 0, True), (0, 0.1, True)],
)
def test_load(monkeypatch, others, steal, busy):
    """Ten seconds on four cores, of which this benchmark itself used twelve core seconds."""
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    start = machine.Usage(at=100.0, busy=500.0, steal=7.0, ours=30.0)
    end = machine.Usage(110.0, 512.0 + 40 * others, 7.0 + 40 * steal, 42.0)
    load = start.load_until(end)
    assert (load.others, load.steal) == (pytest.approx(others), pytest.approx(steal))
    assert load.busy is busy


# Results


def test_result_survives_its_file(result, tmp_path):
    file = tmp_path / "new" / "result.json"
    results.save(result, file)
    assert results.load(file) == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: result.update(schema=1), "schema"),
        (lambda result: result.pop("machine"), "machine"),
        (lambda result: result["rows"][1].pop("times_torch"), "row 1: times_torch"),
        (lambda result: result["rows"][2].update(of_floor="90%"), "row 2: of_floor"),
    ],
)
def test_what_is_no_result_is_refused(result, tmp_path, change, message):
    change(result)
    with pytest.raises(ValueError, match=message):
        results.check(result)
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match=message):
        results.load(file)


def test_table(result):
    text = table.render(result)
    assert "LSTM  " in text
    assert "GRU ragged" in text
    (busy,) = [line for line in text.splitlines() if "training*" in line]
    assert "0.50x" in busy
    overall = [line.split("|")[3:6] for line in text.splitlines() if "| all training" in line]
    assert [cell.strip() for cell in overall[0]] == ["2.12x", "2.12x", "0.50x"]


def test_warnings(result):
    assert any("1 of 3 rows" in message for message in compare.warnings(result))
    result["load"] = {"busy_rows": 0, "rate_spread": 1.1, "waiting": 0.0}
    assert compare.warnings(result) == []
    result["load"]["waiting"] = 0.5
    assert any("waiting" in message for message in compare.warnings(result))


def test_heatmap_shows_every_row(result):
    shapes = heatmap.grid(result)
    assert list(shapes) == ["100, 32, 64", "ragged 100, 32, 64"]
    assert shapes["100, 32, 64"] == {
        ("inference", "LSTM"): (2.0, False),
        ("training", "LSTM"): (0.5, True),
    }


def test_heatmap_is_coloured(result):
    text = heatmap.render(result)
    faster, slower = (heatmap.colours(ratio)[0] for ratio in (2.0, 0.5))
    assert f'background:{faster};color:#1b1b1b">2.00<' in text
    assert f'background:{slower};color:#1b1b1b">0.50*<' in text
    assert text.count("<tr>") == 2 + len(heatmap.grid(result))
    red, _, blue = bytes.fromhex(faster[1:])
    assert blue > red
    red, _, blue = bytes.fromhex(slower[1:])
    assert red > blue
    assert heatmap.colours(1.0)[0] == heatmap.colours(1.0001)[0] == "#f7f7f7"
    assert heatmap.colours(100.0) == heatmap.colours(heatmap.RANGE) == ("#2166ac", "#fff")


def test_headline(result):
    """Over the padded rows only, one figure per cell and mode."""
    assert headline.means(result) == {
        ("inference", "LSTM"): (pytest.approx(4.0), pytest.approx(2.0)),
        ("training", "LSTM"): (pytest.approx(0.5), pytest.approx(0.5)),
    }
    assert headline.frozen_means(result) == {}
    for row in result["rows"]:
        row["times_fastrnn"]["frozen"] = 0.8
    assert headline.frozen_means(result) == {"LSTM": pytest.approx(2.5)}


@needs_docs
def test_readme_has_the_measured_figures():
    """README, the front page and README's picture say what the result file says."""
    measured = results.load(headline.FILE)
    pages = {
        name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/index.md")
    }
    for text in pages.values():
        assert headline.sentence(measured) in " ".join(text.split())
    assert headline.render(measured) in pages["README.md"]


@needs_docs
def test_readme_has_the_measured_picture():
    sys.path.insert(0, str(ROOT / "docs"))
    import pictures

    drawn = (ROOT / "docs" / "img" / "speedup.svg").read_text(encoding="utf-8")
    assert drawn == pictures.standalone("speedup"), "python docs/pictures.py docs/img speedup"


DAY = Path(main.__file__).with_name("gpu_day.sh")


def day(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_PYTHON": sys.executable}
    command = ["bash", str(DAY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_day_with_a_gpu_goes_on_where_it_stopped(tmp_path):
    """The script, whose stages a GPU's machine runs, in its rehearsal."""
    stages = dict(line.split() for line in day("--list").stdout.splitlines())
    assert max(map(int, stages.values())) <= 480
    names = list(stages)
    assert names[:3] == ["versions", "build", "plan-step"]
    done = [f"{name} 0 1" for name in names if name not in ("versions", "build")]
    (tmp_path / "summary.txt").write_text("\n".join(done) + "\n")
    found = day("--rehearse", str(tmp_path))
    assert found.returncode == 0, found.stdout
    assert re.findall("^== (.*):", found.stdout, re.M) == ["versions", "build"]
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[0] for line in summary[-2:]] == ["versions", "build"]
    assert "torch" in (tmp_path / "versions.log").read_text()
    assert (tmp_path / "all.tar.gz").stat().st_size > 0


def test_the_day_with_a_gpu_knows_its_stages(tmp_path):
    assert day().returncode == 2
    found = day(str(tmp_path), "no-such-stage")
    assert found.returncode == 2
    assert "no-such-stage" in found.stderr
