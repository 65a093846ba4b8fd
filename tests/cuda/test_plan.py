"""The choice of a plan: a pure function of numbers, so tested for GPUs that are not here."""

import pytest
import torch

from fastrnn._cuda_backend import CudaBackend
from test_scan import make_case

DTYPES = {"f32": 0, "f64": 1, "bf16": 2, "f16": 3}


@pytest.fixture
def gpus(harness):
    """Multiprocessors, shared memory of a block, compute capability."""
    kinds = [(40, 64, 75), (108, 163, 80), (84, 99, 86), (132, 227, 90), (148, 227, 100)]
    kinds += [(170, 99, 120), (1, 48, 75)]
    return [harness.DeviceInfo(count, kib * 1024, cc) for count, kib, cc in kinds]


def problem(harness, cell, dtype, *, backward=False, T=100, B=16, H=128, D=1, tf32=False):
    return harness.Problem(backward, cell, DTYPES[dtype], T, B, H, D, False, tf32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True])
def test_every_size_has_a_plan(harness, gpus, cell, dtype, backward):
    for gpu in gpus:
        for H in (1, 17, 128, 1024, 5000):
            for B in (1, 9, 128, 3000):
                given = problem(harness, cell, dtype, backward=backward, B=B, H=H, D=2, tf32=True)
                plan = harness.make_plan(given, gpu)
                assert plan is not None
                assert harness.is_possible(given, gpu, plan)
                assert plan.shared(given) <= gpu.shared
                if plan.kind == harness.Kind.GRID:  # all blocks run at once
                    assert plan.blocks(given) <= gpu.processors
                if plan.kind == harness.Kind.CLUSTER:
                    assert plan.cluster == 1 or gpu.clusters[plan.cluster.bit_length() - 2] > 0
                    assert plan.cluster * plan.units >= H


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"H": 0}, "hidden: expected at least 1, got 0"),
        ({"T": -1}, "steps: expected at least 0, got -1"),
        ({"B": -2}, "batch: expected at least 0, got -2"),
        ({"D": 3}, "directions: expected 1 to 2, got 3"),
    ],
)
def test_sizes_out_of_range(harness, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        problem(harness, "GRU", "f32", **options)


def test_other_numbers_out_of_range(harness):
    with pytest.raises(ValueError, match=r"^mode: expected one of RNN_TANH, .*, got UGRNN$"):
        harness.Problem(False, "UGRNN", 0, 1, 1, 1, 1, False, False)
    with pytest.raises(ValueError, match=r"^dtype: expected 0 to 3, got 4$"):
        harness.Problem(False, "GRU", 4, 1, 1, 1, 1, False, False)
    with pytest.raises(ValueError, match=r"^reverse: expected False with directions=2, got True$"):
        harness.Problem(False, "GRU", 0, 1, 1, 1, 2, True, False)


def test_the_kind_asked_for(harness, gpus):
    hopper = gpus[3]
    for kind in harness.Kind.__members__.values():
        given = problem(harness, "LSTM", "bf16", H=256)
        assert harness.make_plan(given, hopper, kind).kind == kind
    large = problem(harness, "LSTM", "bf16", B=4096, H=4096)
    assert harness.make_plan(large, hopper, harness.Kind.GRID) is None
    assert harness.make_plan(large, hopper, harness.Kind.CLUSTER) is None
    assert harness.make_plan(large, hopper).kind == harness.Kind.STEP


def test_small_layers_stay_on_one_chip(harness, gpus):
    for gpu in gpus[1:-1]:
        plan = harness.make_plan(problem(harness, "LSTM", "bf16", H=64), gpu)
        assert plan.resident
        assert plan.kind != harness.Kind.STEP


def test_weights_that_do_not_fit_stay_in_part(harness, gpus):
    hopper = gpus[3]
    for backward in (False, True):
        given = problem(harness, "LSTM", "bf16", H=2048, backward=backward)
        plan = harness.make_plan(given, hopper)
        assert plan.kind == harness.Kind.GRID
        assert not plan.resident
        blocks = 2048 * (4 if backward else 1) * 2 // 64 // plan.slices
        assert blocks / 2 < plan.kept < blocks
        sizes = plan.kind, plan.units, plan.rows, plan.slices, plan.cluster
        one_more = harness.Plan(*sizes, False, True, plan.kept + 1)
        assert not harness.is_possible(given, hopper, one_more)


def test_a_part_of_the_weights_is_no_more_than_all(harness):
    device = harness.DeviceInfo(132, 227 * 1024, 90)
    given = problem(harness, "LSTM", "bf16", H=256)  # 8 blocks of the depth
    grid = harness.Kind.GRID

    def is_possible(kind, slices, resident, kept):
        plan = harness.Plan(kind, 16, 8, slices, 1, resident, True, kept)
        return harness.is_possible(given, device, plan)

    assert is_possible(grid, 2, False, 3)
    assert not is_possible(grid, 2, False, 4)
    assert not is_possible(grid, 2, True, 3)
    assert not is_possible(grid, 2, False, -1)
    assert not is_possible(harness.Kind.STEP, 2, False, 3)


def test_tensor_cores(harness, gpus):
    turing, ampere = gpus[:2]
    for dtype, tf32, gpu, expected in [
        ("bf16", False, ampere, True),
        ("f16", False, turing, False),
        ("f32", False, ampere, False),
        ("f32", True, ampere, True),
        ("f32", True, turing, False),
        ("f64", True, ampere, False),
    ]:
        given = problem(harness, "GRU", dtype, tf32=tf32)
        assert harness.make_plan(given, gpu).tensor == expected, (dtype, tf32)


def test_clusters_are_those_that_the_device_grants(harness):
    """A slice of a GPU may have none, a whole one clusters of 16."""
    given = problem(harness, "LSTM", "bf16", H=256)
    sizes = 132, 227 * 1024, 90
    for clusters, largest in [([0] * 4, 1), ([66, 32, 0, 0], 4), ([66, 32, 16, 8], 16)]:
        device = harness.DeviceInfo(*sizes, clusters)
        options = {"rows": 8, "slices": 1, "resident": False, "tensor": True}
        for cluster in (2, 4, 8, 16):
            plan = harness.Plan(harness.Kind.CLUSTER, 128, cluster=cluster, **options)
            wide = problem(harness, "RNN_TANH", "bf16", H=128)
            assert harness.is_possible(wide, device, plan) == (cluster <= largest)
        assert harness.make_plan(given, device) is not None


def test_clusters_that_must_take_turns_cost_a_scan_each(harness):
    """Where few run at once, other plans take less time."""
    given = problem(harness, "LSTM", "bf16", B=64, H=128)
    clusters = [
        harness.make_plan(given, harness.DeviceInfo(132, 227 * 1024, 90, at_once)).cluster
        for at_once in ([66, 32, 16, 0], [1, 1, 1, 0])
    ]
    assert clusters[0] > 1
    assert clusters[1] == 1


def test_impossible_plans(harness, gpus):
    given = problem(harness, "GRU", "f32", H=100)
    right = {"kind": harness.Kind.STEP, "units": 16, "rows": 8, "slices": 1, "cluster": 1}
    right |= {"resident": False, "tensor": False}
    assert harness.is_possible(given, gpus[3], harness.Plan(**right))
    for wrong in (
        {"units": 24},
        {"units": 0},
        {"rows": 12},
        {"rows": 128},
        {"slices": 0},
        {"cluster": 2},
        {"tensor": True},
        {"kind": harness.Kind.CLUSTER},
    ):
        assert not harness.is_possible(given, gpus[3], harness.Plan(**{**right, **wrong})), wrong


@pytest.mark.parametrize("wanted", ["", "step", "grid", "cluster", "cluster-barrier"])
def test_the_environment_prefers_a_kind(harness, gpus, monkeypatch, wanted):
    monkeypatch.setenv("FASTRNN_CUDA_PLAN", wanted)
    small = problem(harness, "LSTM", "bf16")
    plan = CudaBackend(harness).make_plan(small, gpus[3])
    kind, _, barrier = wanted.partition("-")
    assert plan.kind.name.lower() == (kind or "cluster")
    assert plan.mbarrier is not bool(barrier)
    # An mbarrier for each buffer of states, where the blocks of a cluster have them.
    has_two = plan.cluster > 1 and not barrier
    odd = problem(harness, "LSTM", "bf16", H=127)
    numbers = plan.kind, plan.units, plan.rows, plan.slices, plan.cluster, plan.resident, True, 0
    with_them, without = (harness.Plan(*numbers, mbarrier) for mbarrier in (plan.mbarrier, False))
    assert with_them.shared(small) - without.shared(small) == 16 * has_two
    assert with_them.shared(odd) == without.shared(odd)


def test_the_environment_names_no_such_kind(harness, monkeypatch):
    monkeypatch.setenv("FASTRNN_CUDA_PLAN", "block")
    with pytest.raises(ValueError, match=r"FASTRNN_CUDA_PLAN: expected .*cluster.*, got block"):
        CudaBackend(harness)


def test_a_wrong_plan_is_refused(harness):
    plan = harness.Plan(harness.Kind.CLUSTER, 8, 8, 1, 1, False, False)
    layer = make_case("GRU", 3, 2, 5, 100).to(lambda t: t.float()).layer
    results = layer.make_results()
    gates = torch.empty(2, 6, 300)
    with pytest.raises(ValueError, match="this plan cannot run this problem"):
        harness.forward(90, plan, layer, None, None, gates, results, (None, [], None))
