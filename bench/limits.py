"""What the machine can do: its rate of multiply-adds and the bandwidth of reading memory."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import perf_counter
from typing import Any

READ_BYTES = 1 << 29  # by each thread in a bandwidth sample: some milliseconds
READ_SAMPLES = 10


class Limits:
    """Measures in a worker of its own, as peers do."""

    def __init__(self, threads: int) -> None:
        import torch

        self._torch, self._threads = torch, threads
        torch.set_num_threads(threads)

    def multiply_adds(self) -> float:
        """Float32 operations per second in multiply-adds on registers, of all threads."""
        from fastrnn import _cpu

        return _cpu.multiply_add_rate(self._threads)

    def read(self, size: int) -> float:
        """Bytes per second when each thread reads its part of `size` bytes over and over."""
        torch, threads = self._torch, self._threads
        parts = [torch.zeros(max(1, size // 4 // threads)) for _ in range(threads)]
        nbytes = 4 * sum(part.numel() for part in parts)
        # The sum of a tensor that repeats itself by a stride of 0 is a loop over the same memory.
        repeats = max(1, READ_BYTES * threads // nbytes)
        barrier = Barrier(threads)

        def read(part: Any) -> float:
            best = float("inf")
            view = part.expand(repeats, -1)
            view.sum()
            for _ in range(READ_SAMPLES):
                barrier.wait()
                start = perf_counter()
                view.sum()
                barrier.wait()
                best = min(best, perf_counter() - start)
            return best

        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                return repeats * nbytes / max(pool.map(read, parts))
        finally:
            torch.set_num_threads(threads)
