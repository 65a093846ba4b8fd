"""What the machine can do: the rate of large products and the bandwidth of reading memory."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import perf_counter
from typing import Any

GEMM_SIZE = 2048
READ_BYTES = 1 << 29  # by each thread in a bandwidth sample: some milliseconds
READ_SAMPLES = 10


class Limits:
    """Measures in a worker of its own, as peers do."""

    def __init__(self, threads: int) -> None:
        import torch

        self._torch, self._threads = torch, threads
        torch.set_num_threads(threads)
        n = GEMM_SIZE
        self._a, self._w = torch.randn(n, n), torch.randn(n, n)
        # torch hands a convolution to oneDNN; a 1x1 one on channels_last is the same product.
        self._image = self._a.view(1, n, 1, n).permute(0, 3, 1, 2)
        self._kernel = self._w[:, :, None, None]
        self.gemm()

    def gemm(self) -> dict[str, float]:
        """Operations per second of one large float32 product, by torch.mm and by oneDNN."""
        torch = self._torch
        products = {
            "torch.mm": lambda: torch.mm(self._a, self._w),
            "oneDNN": lambda: torch.nn.functional.conv2d(self._image, self._kernel),
        }
        rates = {}
        with torch.inference_mode():
            for name, product in products.items():
                start = perf_counter()
                product()
                rates[name] = 2 * GEMM_SIZE**3 / (perf_counter() - start)
        return rates

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
