"""A process of its own for each library, asked over a pipe, asleep when it is not asked.

Thread pools spin for a while after their work, each for its own time and by settings of its own.
Two that spin side by side take each other's cores. So a worker answers only when its threads have
gone to sleep, whatever they are, and says with each answer how much CPU time it used while it
waited: that has to be nothing.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from time import perf_counter, process_time, sleep
from typing import Any

from .limits import Limits
from .peers import PEERS

Make = Callable[[int], Any]  # of the number of threads
TARGETS: dict[str, Make] = {**PEERS, "limits": Limits}
Target = str | Make  # a name of these, or what can be pickled

SETTLE_S = 1.0  # at most; Intel's OpenMP spins for 0.2 s
# A thread that runs is charged for it only at ticks of the kernel, 4 ms apart, or 10.
PEEK_S = 0.025
ASLEEP = 0.05  # CPU time per second below which nothing spins


class WorkerError(Exception):
    """What went wrong in a worker, as it said it."""


def settle() -> None:
    """Returns when the threads of this process sleep."""
    end = perf_counter() + SETTLE_S
    while perf_counter() < end:
        before = process_time()
        sleep(PEEK_S)
        if process_time() - before < ASLEEP * PEEK_S:
            return


def serve(connection: Connection, target: Target, threads: int) -> None:
    """Calls the methods of what the target makes until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    if hasattr(os, "sched_setaffinity"):  # the only way to tell every library the same
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    served = None
    slept = process_time()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        woke = process_time()
        try:
            if served is None:
                make = TARGETS[target] if isinstance(target, str) else target
                served = make(threads)
            answer = True, getattr(served, method)(*arguments)
        except Exception:
            answer = False, traceback.format_exc().strip()
        settle()
        connection.send((*answer, woke - slept, process_time()))
        slept = process_time()


class Worker:
    """The parent's end."""

    def __init__(self, target: Target, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # no state of the parent, no threads
        self._connection, theirs = context.Pipe()
        arguments = (theirs, target, threads)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.cpu_s = 0.0  # in all
        self._waited_cpu_s = self._waited_s = 0.0
        self._answered = None

    def call(self, method: str, *arguments: Any) -> Any:
        """What the target's method returns; WorkerError if it raises or the process dies."""
        if self._answered is not None:
            self._waited_s += perf_counter() - self._answered
        try:
            self._connection.send((method, arguments))
            ok, answer, waited, self.cpu_s = self._connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise WorkerError(f"the process ended with {self.process.exitcode}") from None
        if self._answered is not None:
            self._waited_cpu_s += waited
        self._answered = perf_counter()
        if not ok:
            raise WorkerError(answer)
        return answer

    def waiting_share(self) -> float:
        """CPU seconds per second that it waited."""
        return self._waited_cpu_s / self._waited_s if self._waited_s else 0.0

    def close(self) -> None:
        self._connection.close()
        self.process.terminate()  # it may be in the middle of a call that nobody waits for
        self.process.join()
