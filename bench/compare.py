"""fastrnn against torch.nn on this CPU: times, ratio, and fraction of the GEMM floor.

Both run in one process on one thread pool, in turn (A B, B A, ...), so that whatever the machine
does happens to both; the ratio is the median over those pairs. The floor of a row is the time that
its matrix products alone would take, at the rate of one large product measured during the same
run: `torch.mm`, and the best of torch.mm and oneDNN, which on some CPUs is far faster.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

import fastrnn

Step = Callable[[], object]
Shape = tuple[int, int, int]

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
MODES = ("inference", "training")
SHAPES: list[Shape] = [(100, 1, 128), (100, 32, 128), (50, 64, 512), (35, 20, 650)]  # T, B, H = I
BACKENDS: dict[str, Any] = {"fastrnn": fastrnn, "torch": torch.nn}

BURST_S = 0.005  # a sample is at least this long, so that the timer and cold caches do not count
GEMM_SIZE = 2048
SPREAD_LIMIT = 1.25  # slow over fast samples of one product; on a quiet machine about 1.1
QUEUE_LIMIT = 0.02  # share of the time in which threads waited for a core; quiet: about 0.004


def make_step(backend: str, cell: str, shape: Shape, mode: str) -> Step:
    """One call of a float32 layer; training adds the backward pass of the output's sum."""
    t, b, h = shape
    torch.manual_seed(0)
    layer = getattr(BACKENDS[backend], cell)(h, h)
    x = torch.randn(t, b, h)

    def inference() -> None:
        with torch.inference_mode():
            layer(x)

    def training() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x)[0].sum().backward()

    if mode == "inference":
        return inference
    x.requires_grad_()
    return training


def flops(cell: str, shape: Shape, mode: str) -> int:
    """Operations in the matrix products of one layer; the backward pass has twice the forward's."""
    t, b, h = shape
    return 2 * t * b * GATES[cell] * h * (h + h) * (3 if mode == "training" else 1)


def timed(step: Step, calls: int = 1) -> float:
    """Seconds per call."""
    start = perf_counter()
    for _ in range(calls):
        step()
    return (perf_counter() - start) / calls


def sample_pairs(steps: tuple[Step, Step], seconds: float, least: int) -> list[tuple[float, ...]]:
    """Times of both steps, measured in turn for that long and at least that often."""
    calls = []
    for step in steps:
        step()
        calls.append(max(1, round(BURST_S / timed(step))))
    pairs = []
    start = perf_counter()
    while len(pairs) < least or perf_counter() - start < seconds:
        pair = [0.0, 0.0]
        for i in (0, 1) if len(pairs) % 2 == 0 else (1, 0):
            pair[i] = timed(steps[i], calls[i])
        pairs.append(tuple(pair))
    return pairs


class Gemm:
    """The rate of a large float32 product, sampled now and then through the whole run."""

    def __init__(self) -> None:
        n = GEMM_SIZE
        a, w = torch.randn(n, n), torch.randn(n, n)
        # torch hands a convolution to oneDNN; a 1x1 one on channels_last is the same product.
        image, kernel = a.view(1, n, 1, n).permute(0, 3, 1, 2), w[:, :, None, None]
        self._steps: dict[str, Step] = {
            "torch.mm": lambda: torch.mm(a, w),
            "oneDNN": lambda: torch.nn.functional.conv2d(image, kernel),
        }
        self._seconds: dict[str, list[float]] = {name: [] for name in self._steps}
        with torch.inference_mode():
            for step in self._steps.values():
                step()

    def sample(self) -> None:
        with torch.inference_mode():
            for name, step in self._steps.items():
                self._seconds[name].append(timed(step))

    def rates(self) -> dict[str, float]:
        """Operations per second, each the best sample."""
        return {name: 2 * GEMM_SIZE**3 / min(s) for name, s in self._seconds.items()}

    def spread(self) -> float:
        """Slow over fast: the 90th percentile of the samples over the best one."""
        return max(sorted(s)[int(0.9 * (len(s) - 1))] / min(s) for s in self._seconds.values())


def queued() -> float:
    """Seconds for which our threads have waited for a core that others had (0 if not on Linux)."""
    stats = Path("/proc/self/task").glob("*/schedstat")
    return sum(int(stat.read_text().split()[1]) for stat in stats) / 1e9


def describe_machine() -> dict[str, Any]:
    """Everything one needs to know to compare two result files."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    commit = subprocess.getoutput("git describe --always --dirty --abbrev=12 2>/dev/null")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastrnn": fastrnn.__version__,
        "variant": fastrnn.cpu_variant(),
        "commit": commit or None,
        "load_average": round(os.getloadavg()[0], 2),
    }


COLUMNS = (  # title, width, format of a row
    ("T, B, H", 12, "{shape[0]}, {shape[1]}, {shape[2]}"),
    ("cell", 4, "{cell}"),
    ("mode", 9, "{mode}"),
    ("fastrnn ms", 10, "{fastrnn_ms:.2f}"),
    ("torch ms", 8, "{torch_ms:.2f}"),
    ("speedup", 7, "{speedup:.2f}x"),
    ("of mm floor", 11, "{of_mm_floor:.0%}"),
    ("of peak GEMM", 12, "{of_peak_gemm:.0%}"),
)


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table that also reads well in a terminal."""
    lines = [[title for title, _, _ in COLUMNS], ["-" * width for _, width, _ in COLUMNS]]
    lines += [[form.format(**row) for _, _, form in COLUMNS] for row in rows]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, (_, width, _)) in enumerate(zip(line, COLUMNS, strict=True))
        )
        + " |"
        for line in lines
    )


def parse_args() -> argparse.Namespace:
    def names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := set(chosen) - set(known):
                raise argparse.ArgumentTypeError(f"{unknown.pop()!r}, choose from {known}")
            return chosen

        return parse

    cells = tuple(GATES)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", type=names(cells), default=cells, help="e.g. LSTM,GRU")
    parser.add_argument("--modes", type=names(MODES), default=MODES, help="e.g. training")
    parser.add_argument("--seconds", type=float, default=2.0, help="per row (default: 2)")
    parser.add_argument("--quick", action="store_true", help="two small shapes, three pairs each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))

    shapes, seconds, least = (SHAPES[:2], 0.0, 3) if args.quick else (SHAPES, args.seconds, 7)
    cases = [(s, c, m) for s in shapes for c in args.cells for m in args.modes]
    rows = []
    gemm = Gemm()
    start, queued_before = perf_counter(), queued()
    for shape, cell, mode in (bar := tqdm(cases, unit="row", leave=False, disable=None)):
        bar.set_postfix_str(f"{cell} {mode} {shape}")
        gemm.sample()
        steps = tuple(make_step(backend, cell, shape, mode) for backend in BACKENDS)
        pairs = sample_pairs(steps, seconds, least)
        ours, theirs = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
        rows.append(
            {
                "shape": shape,
                "cell": cell,
                "mode": mode,
                "fastrnn_ms": ours,
                "torch_ms": theirs,
                "speedup": statistics.median(b / a for a, b in pairs),
                "pairs": len(pairs),
            }
        )
    gemm.sample()
    queue = (queued() - queued_before) / (perf_counter() - start) / machine["threads"]

    rates = gemm.rates()
    for row in rows:
        rate = 1e3 * flops(row["cell"], row["shape"], row["mode"]) / row["fastrnn_ms"]
        row["of_mm_floor"] = rate / rates["torch.mm"]
        row["of_peak_gemm"] = rate / max(rates.values())

    print(f"\n{table(rows)}\n")
    print(", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
    if queue > QUEUE_LIMIT or gemm.spread() > SPREAD_LIMIT:
        print(
            f"warning: the machine is busy: threads waited for a core {queue:.0%} of the time, "
            f"the same product took {gemm.spread():.2f} times its best. Run this again alone.",
            file=sys.stderr,
        )
    if args.json:
        busy = {"queue": queue, "gemm_spread": gemm.spread()}
        result = {"machine": machine, "busy": busy, "gemm_flops_per_s": rates, "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
