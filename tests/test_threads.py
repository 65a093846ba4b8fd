"""Threads and processes: forks, workers, several Python threads, and how many threads torch has."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastrnn
from helpers import CELLS, TOLERANCE, assert_close, assert_same_bits, inputs, make, run

SIZES = 16, 64  # with 10 steps of 32 rows, enough work for two threads
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def build(cell: str, library=fastrnn) -> tuple[nn.RNNBase, torch.Tensor]:
    model = make(library, cell, *SIZES, bidirectional=True)
    return model, inputs(model, 10, 32, hx=False)[0]


def fresh(job: Callable[..., None], *args, seconds: float = 60) -> None:
    """Runs job(*args) in a new process, which a time limit ends."""
    process = multiprocessing.get_context("spawn").Process(target=job, args=args)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        pytest.fail(f"still running after {seconds} seconds")
    assert process.exitcode == 0  # its traceback is on stderr


def fork(work: Callable[[], object], seconds: int = 20) -> bool:
    """Whether work() in a forked child comes to its end in time."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(seconds)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


# libgomp's threads do not survive a fork, and a child that uses more than one waits for them for
# ever. torch.nn's layers hang there too, so a child must set_num_threads(1), as DataLoader's
# workers do, or its parent must have used one thread.


def fork_before_use() -> None:
    torch.set_num_threads(2)
    for cell in CELLS:
        model, x = build(cell)
        assert fork(lambda model=model, x=x: run(model, x)), cell


def fork_after_use() -> None:
    torch.set_num_threads(2)

    def child() -> None:
        torch.set_num_threads(1)
        assert_close(run(model, x), expected, 4 * TOLERANCE[torch.float32])

    for cell in CELLS:
        model, x = build(cell)
        expected = run(model, x)
        assert fork(child), cell
        assert_same_bits(run(model, x), expected)  # the parent's threads are as they were


def fork_small() -> None:
    """A layer too small to be shared out needs no care, which torch.nn's LSTM and GRU do."""
    torch.set_num_threads(2)
    big, x = build("LSTM")
    run(big, x)
    for cell in CELLS:
        model = make(fastrnn, cell, 8, 8)
        small = inputs(model, 5, 2, hx=False)[0]
        assert fork(lambda model=model, small=small: run(model, small)), cell


@needs_fork
@pytest.mark.parametrize("job", [fork_before_use, fork_after_use, fork_small])
def test_fork(job):
    fresh(job)


class Runs(Dataset):
    """Items that are the results of a layer."""

    def __init__(self, cell: str) -> None:
        self.model, self.x = build(cell)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int):
        return run(self.model, self.x + i)

    def collate(self, items):
        """The items, and a run on top of them."""
        return items, run(self.model, self.x + len(items))


def load(cell: str) -> None:
    torch.set_num_threads(2)
    torch.multiprocessing.set_sharing_strategy("file_system")
    data = Runs(cell)
    here = [
        *map(data.__getitem__, range(4)),
        run(data.model, data.x + 2),
    ]  # with both threads, before the workers fork
    loader = DataLoader(
        data,
        batch_size=2,
        num_workers=2,
        collate_fn=data.collate,
        multiprocessing_context="fork",
        timeout=20,
    )
    tolerance = 4 * TOLERANCE[torch.float32]
    for start, (items, together) in zip((0, 2), loader, strict=True):
        for got, want in zip((*items, together), (*here[start : start + 2], here[4]), strict=True):
            assert_close(got, want, tolerance)


@needs_fork
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_data_loader_workers(cell):
    fresh(load, cell)


def in_worker(model: nn.RNNBase, x: torch.Tensor) -> dict:
    torch.set_num_threads(2)
    return {name: tensor.numpy() for name, tensor in run(model, x).items()}


def test_spawned_workers():
    model, x = build("LSTM")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap_async(in_worker, [(model, x + i) for i in range(4)]).get(60)
    for i, result in enumerate(results):
        got = {name: torch.from_numpy(array) for name, array in result.items()}
        assert_same_bits(got, run(model, x + i))


@pytest.mark.parametrize("same", [True, False], ids=["same module", "own modules"])
def test_python_threads(cell, same):
    count, rounds = 4, 5
    jobs = [build(cell) for _ in range(count)]
    jobs = [(jobs[0 if same else i][0], x + i) for i, (_, x) in enumerate(jobs)]
    expected = [run(*job) for job in jobs]
    start = threading.Barrier(count)

    def work(job):
        start.wait(20)
        return [run(*job) for _ in range(rounds)]

    with ThreadPoolExecutor(count) as pool:
        for results, want in zip(pool.map(work, jobs), expected, strict=True):
            for result in results:
                assert_same_bits(result, want)


def test_gradients_from_several_threads_add_up():
    model, x = build("GRU")
    model.double()
    parts = [x.double() + i for i in range(4)]
    torch.autograd.backward([model(part)[0].sum() for part in parts])
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: model(part)[0].sum().backward(), parts))
    actual = {name: p.grad for name, p in model.named_parameters()}
    assert_close(actual, expected, 4 * TOLERANCE[torch.float64])


def test_kernels_release_the_gil():
    torch.set_num_threads(1)
    model = make(fastrnn, "LSTM", 64, 128)
    x = inputs(model, 2000, 16, hx=False)[0]
    ticks, stop = [], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    def progress(work: Callable[[], object]) -> int:
        """How often another thread came to run in the middle half of work()."""
        begin = time.perf_counter()
        work()
        quarter = (time.perf_counter() - begin) / 4
        return sum(begin + quarter < t < begin + 3 * quarter for t in ticks)

    other = threading.Thread(target=tick)
    other.start()
    try:
        results = []
        assert progress(lambda: results.append(model(x)[0])) > 2
        incoming = torch.ones_like(results[0])
        assert progress(lambda: results[0].backward(incoming)) > 2
    finally:
        stop.set()
        other.join()


def test_number_of_threads_may_change(cell):
    model, x = build(cell)
    torch.set_num_threads(1)
    expected = run(model, x)
    for threads in (2, 4, 3, 1, 2):
        torch.set_num_threads(threads)
        result = run(model, x)
        assert_close(result, expected, 4 * TOLERANCE[torch.float32])
        assert_same_bits(run(model, x), result)

        torch.set_num_threads(5 - threads)  # between forward and backward
        x_grad = x.clone().requires_grad_()
        output = model(x_grad)[0]
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(1)
        output.backward(torch.randn(output.shape, generator=generator))
        assert torch.isfinite(x_grad.grad).all()


@pytest.mark.parametrize("batch", [1, 5, 100])
@pytest.mark.parametrize("ragged", [False, True])
def test_results_do_not_depend_on_threads(cell, batch, ragged):
    """Neither on how many there are nor on who takes which part; 8 are more than most machines'."""
    model = make(fastrnn, cell, *SIZES, bidirectional=True)
    x = inputs(model, 10, batch, hx=False)[0]
    options = {"lengths": torch.arange(batch) % 10 + 1} if ragged else {}
    torch.set_num_threads(1)
    expected = run(model, x, **options)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_same_bits(run(model, x, **options), expected)


@pytest.mark.parametrize("batch", [1, 40])
def test_many_threads(cell, batch):
    """More than report to one counter, and more than most machines have cores."""
    model = make(fastrnn, cell, 7, 300)
    x = inputs(model, 6, batch, hx=False)[0]
    torch.set_num_threads(1)
    expected = run(model, x)
    for threads in (9, 16):
        torch.set_num_threads(threads)
        for _ in range(5):
            assert_same_bits(run(model, x), expected)


def helpers() -> int:
    """Threads of this process that stand in for those of torch's pool."""
    names = (task.joinpath("comm") for task in Path("/proc/self/task").iterdir())
    return sum(name.read_text().strip() == "fastrnn" for name in names)


def beside_busy_neighbours() -> None:
    """As many spinning processes as cores: threads come late, and after some time helpers do."""
    torch.set_num_threads(2)
    models = [(cell, *build(cell)) for cell in CELLS]
    expected = {cell: run(model, x) for cell, model, x in models}
    spin = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    neighbours = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(os.cpu_count())]
    try:
        end = time.monotonic() + 30
        rounds = 0
        while rounds < 200:
            for cell, model, x in models:
                assert_same_bits(run(model, x), expected[cell])
            rounds += helpers() > 0
            assert time.monotonic() < end, f"{rounds} rounds"
        # A child has none of these threads, and does without.
        model, x = models[0][1:]
        assert fork(lambda: (torch.set_num_threads(1), run(model, x)))
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_busy_neighbours():
    fresh(beside_busy_neighbours)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_inter_op_threads():
    """torch.jit.fork runs the operator on threads of torch's other pool."""

    @torch.jit.script
    def both(x: torch.Tensor, weights: list[torch.Tensor], batch: int):
        options = ("LSTM", 1, batch, False, 0, False, False, 0.0, 0.0, 0.0, False)
        states = (None, None)
        others = (None, None, None, None, None, None)
        arguments = (*options, x, *states, *others, weights)
        other = torch.jit.fork(torch.ops.fastrnn.scan_forward, *arguments)
        own = torch.ops.fastrnn.scan_forward(*arguments)
        return own[0], torch.jit.wait(other)[0]

    model = make(fastrnn, "LSTM", *SIZES)
    x = inputs(model, 10, 32, hx=False)[0]
    with torch.no_grad():
        expected = model(x)[0]
        for output in both(x, list(model.parameters()), 32):
            assert torch.equal(output, expected)


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_leave_nothing_behind():
    model = make(fastrnn, "LSTM", 128, 128)
    x = inputs(model, 20, 64, hx=False)[0]

    def work() -> None:
        for _ in range(3):  # what a call keeps for the next one is in memory when that one uses it
            run(model, x)

    def short_lived(count: int) -> None:
        for _ in range(count):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    short_lived(20)
    memory, threads = resident(), len(os.listdir("/proc/self/task"))
    short_lived(200)
    assert resident() - memory < 40e6
    assert len(os.listdir("/proc/self/task")) < threads + 10
