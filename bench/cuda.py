"""fastrnn against torch.nn on cuDNN, and FlashRNN where it is installed, on one GPU.

All run in one process in turn (A B, B A, ...). Ours and torch's results, on the same input and
weights, are compared first. A time is the median of CUDA events around bursts of calls. The whole
grid of --all takes hours; without it most rows are of one layer in one direction.

--rehearse runs all of it without a GPU: tiny layers on the kernels as the tests compile them for
the CPU. Its times mean nothing.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

import fastrnn

STEPS, BATCHES = (128, 1024), (1, 16, 64, 128)
HIDDEN = (64, 128, 256, 512, 768, 1024, 2048)
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
MODES = ("forward", "training")
BURST_S = 0.02  # a sample is at least this long
SAMPLES = 7
AGREEMENT = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 6e-2}

DEVICE = "cuda"  # or cpu, in a rehearsal

Step = Callable[[], object]


class Row(NamedTuple):
    cell: str
    dtype: str
    T: int
    B: int
    H: int
    layers: int
    directions: int
    ragged: bool
    mode: str


def rows(everything: bool) -> Iterator[Row]:
    """The grid: everything, or each of depth, directions and raggedness alone, at some sizes."""
    sizes = list(itertools.product(("LSTM", "GRU", "RNN"), DTYPES, STEPS, BATCHES, HIDDEN))
    shapes = list(itertools.product((1, 2), (1, 2), (False, True)))
    for cell, dtype, T, B, H in sizes:
        for layers, directions, ragged in shapes:
            plain = (layers, directions, ragged) == (1, 1, False)
            one = (layers, directions, ragged) in ((2, 1, False), (1, 2, False), (1, 1, True))
            some = T == 128 and B in (16, 64) and H in (128, 512, 1024) and dtype != "tf32"
            if everything or plain or (one and some):
                for mode in MODES:
                    yield Row(cell, dtype, T, B, H, layers, directions, ragged, mode)


def set_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def make_layers(row: Row) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor | None]:
    """Both libraries' layers with the same weights, an input, and lengths, longest first."""
    options = {"num_layers": row.layers, "bidirectional": row.directions == 2, "device": DEVICE}
    torch.manual_seed(0)
    dtype = DTYPES[row.dtype]
    theirs = getattr(torch.nn, row.cell)(row.H, row.H, dtype=dtype, **options)
    ours = getattr(fastrnn, row.cell)(row.H, row.H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(row.T, row.B, row.H, device=DEVICE, dtype=dtype)
    lengths = None
    if row.ragged:
        lengths = torch.randint(row.T // 4, row.T + 1, (row.B,)).sort(descending=True).values
        lengths[0] = row.T
    return {"fastrnn": ours, "torch": theirs}, x, lengths


def make_step(row: Row, layer: Any, x: torch.Tensor, lengths: torch.Tensor | None) -> Step:
    """One call; training adds the backward pass. Ragged rows are a PackedSequence for both."""
    given: Any = x
    if lengths is not None:
        given = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)

    def run() -> torch.Tensor:
        output = layer(given)[0]
        return output if lengths is None else output.data

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return run()

    if row.mode == "forward":
        return forward
    leaf = x if lengths is None else given.data
    leaf.requires_grad_()
    torch.manual_seed(1)  # both libraries' gradients are compared
    incoming = torch.randn_like(forward())
    wanted = [leaf, *layer.parameters()]
    return lambda: torch.autograd.grad(run(), wanted, incoming)


def make_flashrnn(row: Row, x: torch.Tensor) -> Step | None:
    """The same layer by FlashRNN, its input product included, where it can run it."""
    if importlib.util.find_spec("flashrnn") is None:
        return None
    if (row.layers, row.directions, row.ragged) != (1, 1, False) or row.dtype in ("fp32", "tf32"):
        return None
    from flashrnn import flashrnn

    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[row.cell]
    function = {"LSTM": "lstm", "GRU": "gru", "RNN": "elman"}[row.cell]
    name = {"fp16": "float16", "bf16": "bfloat16"}[row.dtype]

    def randn(*shape: int) -> torch.Tensor:
        scale = row.H**-0.5
        return (torch.randn(shape, device="cuda", dtype=x.dtype) * scale).requires_grad_()

    w, r, b = (randn(gates * row.H, row.H), randn(gates, 1, row.H, row.H), randn(gates, 1, row.H))
    rows_first = x.detach().transpose(0, 1).contiguous().requires_grad_()

    def run() -> torch.Tensor:
        projected = torch.nn.functional.linear(rows_first, w)
        projected = projected.view(row.B, row.T, gates, 1, row.H)
        options = {"function": function, "backend": "cuda_fused", "dtype": name}
        return flashrnn(projected, r, b, **options)[0][0]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return run()

    if row.mode == "forward":
        return forward
    incoming = torch.randn_like(forward())
    return lambda: torch.autograd.grad(run(), [rows_first, w, r, b], incoming)


def timed(step: Step, calls: int) -> float:
    """Seconds per call on the GPU."""
    if DEVICE == "cpu":
        began = perf_counter()
        for _ in range(calls):
            step()
        return (perf_counter() - began) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def sample(steps: dict[str, Step]) -> dict[str, list[float]]:
    calls = {}
    for name, step in steps.items():
        step()  # loads kernels, makes plans
        calls[name] = max(1, math.ceil(BURST_S / timed(step, 1)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(SAMPLES):
        for name in list(steps)[:: 1 if i % 2 == 0 else -1]:
            times[name].append(timed(steps[name], calls[name]))
    return times


def disagreement(results: list[Any]) -> float:
    a, b = (r if isinstance(r, torch.Tensor) else r[0] for r in results)
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def measure(row: Row) -> dict[str, Any]:
    set_tf32(row.dtype == "tf32")
    layers, x, lengths = make_layers(row)
    steps = {name: make_step(row, layer, x, lengths) for name, layer in layers.items()}
    error = disagreement([step() for step in steps.values()])
    notes = [] if error <= AGREEMENT[row.dtype] else [f"results differ by {error:.1e}"]
    try:
        if (flash := make_flashrnn(row, x)) is not None:
            flash()
            steps["flashrnn"] = flash
    except Exception as reason:  # it compiles at run time, for some sizes only
        notes.append(f"flashrnn: {str(reason).splitlines()[0] if str(reason) else type(reason)}")
    times = sample(steps)
    found: dict[str, Any] = {**row._asdict(), "error": error, "notes": notes}
    for name, seconds in times.items():
        found[f"{name}_us_per_step"] = 1e6 * statistics.median(seconds) / row.T
        found[f"{name}_spread"] = max(seconds) / min(seconds)
    pairs = zip(times["fastrnn"], times["torch"])
    found["speedup"] = statistics.median(b / a for a, b in pairs)
    return found


def profile(row: Row) -> None:
    set_tf32(row.dtype == "tf32")
    layers, x, lengths = make_layers(row)
    step = make_step(row, layers["fastrnn"], x, lengths)
    for _ in range(2):
        step()
    print(row, flush=True)


def describe_machine() -> dict[str, Any]:
    if DEVICE == "cpu":
        return {"device": "rehearsal without a GPU", "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(0)
    query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader --id=0"
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver": subprocess.getoutput(query).strip(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastrnn": fastrnn.__version__,
        "commit": os.environ.get("COMMIT")  # where the tree comes without its history
        or subprocess.getoutput("git describe --always --dirty --abbrev=12 2>/dev/null"),
    }


def line(row: dict[str, Any]) -> str:
    kind = f"{row['layers']} x {row['directions']}" + (", ragged" if row["ragged"] else "")
    shape = f"{row['T']}, {row['B']}, {row['H']}"
    numbers = [row.get(f"{name}_us_per_step") for name in ("fastrnn", "torch", "flashrnn")]
    times = " | ".join(f"{'' if n is None else f'{n:.2f}':>8}" for n in numbers)
    return (
        f"| {row['cell']:4} | {row['dtype']} | {shape:13} | {kind:13} | {row['mode']:8} | {times} "
        f"| {row['speedup']:6.2f}x | {'; '.join(row['notes'])} |"
    )


HEAD = (
    "| cell | type | T, B, H       | layers x dirs | mode     |  fastrnn |    torch | FlashRNN | "
    "speedup | notes |\n"
    "| ---- | ---- | ------------- | ------------- | -------- | -------: | -------: | -------: | "
    "------: | ----- |"
)


def geometric_means(found: list[dict[str, Any]]) -> str:
    lines = []
    for mode in MODES:
        for cell, dtype in itertools.product(("LSTM", "GRU", "RNN"), DTYPES):
            chosen = [
                r["speedup"]
                for r in found
                if (r["cell"], r["dtype"], r["mode"]) == (cell, dtype, mode)
            ]
            if chosen:
                mean = math.exp(statistics.mean(map(math.log, chosen)))
                lines.append(
                    f"{mode:8} {cell:4} {dtype}: {mean:.2f}x, least {min(chosen):.2f}x, "
                    f"{len(chosen)} rows"
                )
    return "\n".join(lines)


def rehearse() -> None:
    """The kernels, compiled for the CPU, in place of the GPU."""
    global DEVICE, BURST_S, SAMPLES
    DEVICE, BURST_S, SAMPLES = "cpu", 0.0, 1
    sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "cuda")]
    from backends import h100
    from fastrnn._backends import register
    from harness import build

    register("cpu", h100(build.load()))


def made_small(row: Row) -> Row:
    return row._replace(T=4, B=min(row.B, 3), H=min(row.H, 9))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--all", action="store_true", help="the whole grid")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after as many")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="rows with these values, e.g. cell=LSTM,GRU or H=768 or ragged=True",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/cuda-*")
    parser.add_argument("--rehearse", action="store_true", help="tiny layers, without a GPU")
    parser.add_argument(
        "--profile", action="store_true", help="run ours twice and time nothing, for a profiler"
    )
    args = parser.parse_args()
    if args.rehearse:
        rehearse()
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU")
    wanted = dict(each.split("=") for each in args.only)
    machine = describe_machine()
    name = "".join(c if c.isalnum() else "-" for c in machine["device"].lower())
    target = args.json or Path(__file__).parent / "results" / f"cuda-{name}.json"
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"\nMicroseconds per step:\n\n{HEAD}")
    found = []
    start = perf_counter()
    for row in rows(args.all):
        values = {key: str(value) for key, value in row._asdict().items()}
        if any(values[key] not in chosen.split(",") for key, chosen in wanted.items()):
            continue
        if perf_counter() - start > 60 * args.minutes:
            print("stopped: no more time")
            break
        if args.rehearse:
            row = made_small(row)
        if args.profile:
            profile(row)
            continue
        try:
            found.append(measure(row))
        except torch.cuda.OutOfMemoryError:
            print(f"{row}: out of memory")
            continue
        print(line(found[-1]), flush=True)
        target.write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n")
    if not found and not args.profile:
        raise SystemExit("no such rows")
    print(f"\n{geometric_means(found)}")


if __name__ == "__main__":
    main()
