"""python -m fastrnn: what runs here and why, whether it is right, and how fast.

python -m fastrnn compile MODULE[:CELL] -o DIR: the kernels of a user's own cells, ahead of time.

Exit code 1, with a line on stderr for each thing that is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn

from ._backends import DTYPES
from ._cell import CellLayer
from ._cuda_backend import Nvcc
from ._kernels import CPU, CompileError, Toolchain, compile_cell
from ._load import find_cuda, openmp_library

CELLS = "LSTM", "GRU", "RNN"
T, B, I, H = 32, 8, 64, 64  # noqa: E741
TOLERANCE = 1e-4  # relative to the largest entry, or to 1
SECONDS = 0.3  # of timing for each cell
PAIRS = 3, 40  # timings of each cell, at least and at most

Report = dict[str, Any]


def versions() -> Report:
    return {
        "fastrnn": fastrnn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
    }


def cpu() -> Report:
    wanted = os.environ.get("FASTRNN_CPU")
    return {
        "variant": fastrnn.cpu_variant(),
        "variants": fastrnn.cpu_variants(),
        "why": f"FASTRNN_CPU={wanted}" if wanted else "the best of this CPU",
    }


def openmp() -> Report:
    path = openmp_library()
    library = path and Path(path).name
    maps = Path("/proc/self/maps")  # Linux only
    loaded = (
        re.findall(r"/(lib(?:gomp|i?omp)[^/\n]*)$", maps.read_text(), re.M) if maps.exists() else ()
    )
    return {
        "library": library,
        "path": path,
        "others": sorted({*loaded} - {library}),  # two pools of threads slow each other down
        "threads": torch.get_num_threads(),
    }


def cuda() -> Report:
    _, library = find_cuda()
    count = torch.cuda.device_count()
    if library == "loaded" and not count:
        library += (
            ", but there is no device" if torch.version.cuda else ", but torch is without CUDA"
        )
    return {
        "torch": torch.version.cuda,
        "library": library,
        "devices": [torch.cuda.get_device_name(i) for i in range(count)],
    }


def run(model: nn.RNNBase, x: Tensor, incoming: Tensor) -> dict[str, Tensor]:
    """One forward and backward: the results by name."""
    output, state = model(x)
    states = (state,) if isinstance(state, Tensor) else state
    wanted = {"input": x, **dict(model.named_parameters())}
    loss = (output * incoming).sum() + sum(s.sum() for s in states)
    grads = torch.autograd.grad(loss, list(wanted.values()))
    results = {"output": output, **dict(zip(("h_n", "c_n"), states, strict=False))}
    return results | {f"grad of {name}": g for name, g in zip(wanted, grads, strict=True)}


def seconds(model: nn.RNNBase, *inputs: Tensor) -> float:
    start = time.perf_counter()
    run(model, *inputs)
    return time.perf_counter() - start


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check(cell: str) -> Report:
    """Compares ours with torch.nn's: the largest error, where it is, and the speed ratio."""
    theirs = getattr(nn, cell)(I, H)
    ours = getattr(fastrnn, cell)(I, H)
    ours.load_state_dict(theirs.state_dict())
    inputs = torch.randn(T, B, I, requires_grad=True), torch.randn(T, B, H)

    errors = {}
    actual = run(ours, *inputs)  # on all threads
    # The rest on one: torch.nn's spin while they wait, for seconds if the machine is busy.
    with one_thread():
        for name, want in run(theirs, *inputs).items():
            largest = (actual[name] - want).abs().max() / want.abs().max().clamp(min=1)
            errors[name] = largest.item()
        ratios: list[float] = []
        end = time.perf_counter() + SECONDS
        while len(ratios) < PAIRS[0] or (len(ratios) < PAIRS[1] and time.perf_counter() < end):
            ratios.append(seconds(theirs, *inputs) / seconds(ours, *inputs))
    worst = max(errors, key=lambda name: (not isfinite(errors[name]), errors[name]))
    error = errors[worst]
    return {
        "ok": error <= TOLERANCE,  # which NaN is not
        "error": error if isfinite(error) else None,  # JSON has no NaN
        "worst": worst,
        "speedup": round(median(ratios), 2),
    }


def diagnose() -> Report:
    """Everything, as what --json prints."""
    report: Report = {"versions": versions(), "cpu": cpu(), "openmp": openmp(), "cuda": cuda()}
    problems: list[str] = []
    checks: Report = {}
    if report["cuda"]["devices"] and report["cuda"]["library"].startswith("cannot"):
        problems.append(f"the CUDA library {report['cuda']['library']}")
    for cell in CELLS:
        try:
            result = checks[cell] = check(cell)
        except Exception as error:
            checks[cell] = {"ok": False}
            problems.append(f"{cell}: {type(error).__name__}: {error}")
            continue
        if not result["ok"]:
            size = "NaN or infinite" if result["error"] is None else f"{result['error']:.1e}"
            problems.append(
                f"{cell}: the {result['worst']} is wrong: its error against torch.nn is {size}, "
                f"allowed is {TOLERANCE:.0e}"
            )
    return {"ok": not problems, "problems": problems, **report, "checks": checks}


def show(report: Report) -> str:
    """The report for people."""
    versions, cpu, openmp, cuda = (report[k] for k in ("versions", "cpu", "openmp", "cuda"))
    others = f"; also loaded: {', '.join(openmp['others'])}" if openmp["others"] else ""
    lines = [
        f"fastrnn  {versions['fastrnn']}, torch {versions['torch']}, Python {versions['python']}",
        f"OS       {versions['os']}",
        f"CPU      {cpu['variant']}, {cpu['why']}; it can run {', '.join(cpu['variants'])}",
        f"OpenMP   {openmp['library'] or 'of unknown origin'}, {openmp['threads']} threads{others}",
        f"CUDA     torch is built for {cuda['torch'] or 'none'}; devices: "
        f"{', '.join(cuda['devices']) or 'none'}; fastrnn's library: {cuda['library']}",
        "",
        f"Forward and backward over {T} steps, {B} rows, {H} units in float32, against torch.nn:",
    ]
    for cell, result in report["checks"].items():
        if result["ok"]:
            error, speedup = result["error"], result["speedup"]
            lines.append(f"{cell:9}right (error {error:.0e}), {speedup:.2f}x as fast on one thread")
        else:
            lines.append(f"{cell:9}WRONG")
    return "\n".join(lines)


def capabilities(text: str) -> list[int]:
    """The compute capabilities, 10 * major + minor, that an argument lists."""
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) >= 75 for number in numbers):
        raise argparse.ArgumentTypeError(f"expected numbers from 75 on, such as 80,90, got {text}")
    return [int(number) for number in numbers]


def compile_ahead(argv: list[str]) -> int:
    """python -m fastrnn compile."""
    parser = argparse.ArgumentParser(
        "python -m fastrnn compile",
        description="Compiles the cells of a module for this processor or GPUs, so that machines "
        "like it need no compiler: set FASTRNN_CACHE to the directory there.",
    )
    parser.add_argument("cells", metavar="MODULE[:CELL]", help="all cells of a module, or one")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtype", action="append", choices=dtypes, help="default: all")
    parser.add_argument(
        "--cuda",
        action="append",
        type=capabilities,
        metavar="CC",
        help="in place of the processor: for GPUs of a compute capability, such as 90, "
        "or for machines that have several, such as 80,90",
    )
    args = parser.parse_args(argv)
    module, _, name = args.cells.partition(":")
    sys.path.insert(0, "")  # the working directory, as python -m has it
    namespace = vars(pkgutil.resolve_name(module))
    found = {
        n: c
        for n, c in namespace.items()
        if isinstance(c, type) and issubclass(c, CellLayer) and c is not CellLayer
    }
    if name and name not in found:
        parser.error(f"there is no cell {name} in {module}; it has {', '.join(found) or 'none'}")
    toolchains: list[Toolchain] = [Nvcc(None, each) for each in args.cuda or []]
    each = product(
        [found[name]] if name else found.values(), args.dtype or dtypes, toolchains or [CPU]
    )
    for cls, dtype, toolchain in each:
        try:
            path = compile_cell(cls.definition, getattr(torch, dtype), args.output, toolchain)
        except (CompileError, OSError) as error:
            print(f"python -m fastrnn: error: {cls.__name__}: {error}", file=sys.stderr)
            return 1
        print(f"{cls.__name__}, {dtype}: {path}", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compile"]:
        return compile_ahead(argv[1:])
    description = "Tells " + (__doc__ or "").partition(": ")[2].partition("\n")[0]
    parser = argparse.ArgumentParser("python -m fastrnn", description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args(argv)
    report = diagnose()
    print(json.dumps(report) if args.json else show(report), flush=True)
    for problem in report["problems"]:
        print(f"python -m fastrnn: error: {problem}", file=sys.stderr)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
