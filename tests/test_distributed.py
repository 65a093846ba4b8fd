"""DistributedDataParallel and FSDP2 on two gloo processes train as one process does.

Each process trains twice, with its half of the batch and the other process, and alone with the
whole batch, and compares.
"""

import faulthandler
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastrnn
from helpers import CELLS, TOLERANCE, assert_close

if dist.is_available():
    try:
        from torch.distributed import fsdp as fsdp2

        fsdp2.fully_shard  # noqa: B018
    except AttributeError:
        from torch.distributed._composable import fsdp as fsdp2

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="a torch without gloo"
)
needs_cpu_fsdp = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch's FSDP2 needs a GPU"
)

WORLD, LIMIT = 2, 60  # processes; seconds for one job
T, B, INPUT, H, STEPS = 6, 4, 3, 5, 4
LENGTHS = [6, 0, 3, 4]
MODELS = {
    "one layer": {},
    "deep bidirectional": {"num_layers": 2, "bidirectional": True},
    "batch first": {"batch_first": True},
}


def _join(rank: int, rendezvous: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=rendezvous.as_uri(),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=LIMIT / 2),
    )


def _limited(job: Callable[..., None], *args) -> None:
    """Runs the job; past the limit, says where it hangs and ends the process."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    try:
        job(*args)
    finally:
        faulthandler.cancel_dump_traceback_later()


class Processes:
    """A gloo group that runs jobs. It starts with the first one, and again after a failed one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._starts = 0
        self._executors: list[ProcessPoolExecutor] = []

    def run(self, job: Callable[..., None], *args) -> None:
        """Runs job(*args) in all processes at once; an exception in one is raised here."""
        if not self._executors:
            self._starts += 1
            rendezvous = self._directory / f"rendezvous{self._starts}"
            context = multiprocessing.get_context("spawn")
            self._executors = [
                ProcessPoolExecutor(1, context, _join, (rank, rendezvous)) for rank in range(WORLD)
            ]
        futures = [executor.submit(_limited, job, *args) for executor in self._executors]
        failures = [error for future in futures if (error := future.exception()) is not None]
        if failures:
            self.stop()
            raise failures[0]

    def stop(self) -> None:
        for executor in self._executors:
            executor.shutdown()
        self._executors = []


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Iterator[Processes]:
    group = Processes(tmp_path_factory.mktemp("gloo"))
    yield group
    group.stop()


class Model(nn.Module):
    """Two recurrent layers, of which a call uses one, and a linear one."""

    def __init__(self, library, cell: str, dtype: torch.dtype, options: dict) -> None:
        super().__init__()
        torch.manual_seed(0)
        name, extra, _ = CELLS[cell]
        make = partial(getattr(library, name), INPUT, H, **extra, **options)
        self.rnns = nn.ModuleList([make(), make()])
        self.head = nn.Linear(H * (1 + self.rnns[0].bidirectional), 2)
        self.to(dtype)

    def forward(self, x: Tensor, index: int, **ragged) -> Tensor:
        return self.head(self.rnns[index](x, **ragged)[0]).square().mean()


def train(
    model: Model,
    forward: nn.Module | None = None,
    *,
    rows: slice = slice(None),
    turns: bool = False,
    ragged: bool = False,
    pieces: int = 1,
) -> dict[str, Tensor]:
    """Losses and parameters after some steps on `rows` of each batch.

    `forward` stands in for the model's own. With `turns` the layers take turns; a gradient comes
    from `pieces` batches.
    """
    forward = forward or model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    options = {"lengths": LENGTHS[rows]} if ragged else {}
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for piece in range(pieces):
            x = torch.randn(T, B, INPUT, generator=generator).to(dtype)[:, rows]
            x = x.transpose(0, 1) if model.rnns[0].batch_first else x
            last = piece == pieces - 1
            with nullcontext() if last or forward is model else forward.no_sync():
                loss = forward(x, step % 2 if turns else 0, **options)
                loss.backward()
            losses.append(loss.detach())
        optimizer.step()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return {"losses": torch.stack(losses), **parameters}


def own_rows() -> slice:
    each = B // WORLD
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def assert_same_training(shared: dict[str, Tensor], alone: dict[str, Tensor]) -> None:
    dist.all_reduce(shared["losses"])
    shared["losses"] /= WORLD
    assert_close(shared, alone, 4 * TOLERANCE[alone["losses"].dtype])


def check_ddp(cell: str, dtype: torch.dtype, model: dict, wrapper: dict, how: dict) -> None:
    shared = Model(fastrnn, cell, dtype, model)
    if dist.get_rank() > 0:  # DDP sends everyone the first one's weights
        with torch.no_grad():
            shared.head.weight.add_(1)
    if not how.get("turns"):
        shared.rnns[1].requires_grad_(False)
    ddp = DistributedDataParallel(shared, **wrapper)
    alone = train(Model(fastrnn, cell, dtype, model), **how)
    assert_same_training(train(shared, ddp, rows=own_rows(), **how), alone)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_ddp(processes, cell, dtype, model, ragged):
    processes.run(check_ddp, cell, dtype, MODELS[model], {}, {"ragged": ragged})


@pytest.mark.parametrize(
    ("wrapper", "how"),
    [
        ({"find_unused_parameters": True}, {"turns": True}),
        ({"static_graph": True}, {}),
        ({"gradient_as_bucket_view": True}, {}),
        ({}, {"pieces": 2}),
        ({"static_graph": True, "gradient_as_bucket_view": True}, {"ragged": True}),
    ],
    ids=["unused", "static graph", "bucket views", "no_sync", "static ragged"],
)
def test_ddp_options(processes, cell, wrapper, how):
    deep = MODELS["deep bidirectional"]
    processes.run(check_ddp, cell, torch.float32, deep, wrapper, how)


def check_replaced() -> None:
    make = partial(Model, cell="LSTM", dtype=torch.float32, options={})
    theirs, ours = make(nn), make(nn)
    for model in (theirs, ours):
        model.rnns[1].requires_grad_(False)
    wrapped = [DistributedDataParallel(model) for model in (theirs, ours)]
    assert len(fastrnn.replace(wrapped[1]).swapped) == 2
    expected, actual = (train(d.module, d, rows=own_rows()) for d in wrapped)
    assert_close(actual, expected, 4 * TOLERANCE[torch.float32])


def test_replace_inside_ddp(processes):
    processes.run(check_replaced)


def shard(model: Model, **options) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    for module in (*model.rnns, model):
        fsdp2.fully_shard(module, mesh=mesh, **options)


def whole(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in results.items()}


def check_fsdp(cell: str, dtype: torch.dtype, model: dict, options: dict, how: dict) -> None:
    shared = Model(fastrnn, cell, dtype, model)
    shard(shared, **options)
    alone = train(Model(fastrnn, cell, dtype, model), **how)
    assert_same_training(whole(train(shared, rows=own_rows(), **how)), alone)


@needs_cpu_fsdp
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_fsdp(processes, cell, dtype, model, ragged):
    processes.run(check_fsdp, cell, dtype, MODELS[model], {}, {"ragged": ragged})


@needs_cpu_fsdp
@pytest.mark.parametrize("reshard", [False, True])
def test_fsdp_options(processes, cell, reshard):
    """Layers that take turns, with the weights gathered again for backward, and kept for it."""
    options = {"reshard_after_forward": reshard}
    processes.run(check_fsdp, cell, torch.float32, {}, options, {"turns": True})


def check_mixed_precision(cell: str) -> None:
    policy = fsdp2.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    results = []
    for library in (fastrnn, nn):
        model = Model(library, cell, torch.float32, MODELS["deep bidirectional"])
        shard(model, mp_policy=policy)
        results.append(whole(train(model, rows=own_rows())))
    ours, theirs = results
    assert ours["losses"].dtype == torch.bfloat16
    assert ours["losses"][-1] < ours["losses"][0]
    assert ours["head.weight"].dtype == torch.float32
    assert_close(ours, theirs, 0.02)


@needs_cpu_fsdp
def test_fsdp_mixed_precision(processes, cell):
    processes.run(check_mixed_precision, cell)
