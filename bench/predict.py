"""What a step on a GPU should take, term by term, by the planner's own estimate.

python -m bench.predict [--ghz 1.755] [--processors 132] [--clusters 66,32,16,8]

No GPU is needed, and nothing is measured: these are the numbers by which csrc/cuda/plan.cc chooses,
for an LSTM of bfloat16 on an H100 unless told otherwise.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

SHAPES = ((128, 32), (256, 16), (512, 64), (768, 16), (1024, 64), (2048, 16))  # H, B
TERMS = ("states", "product", "sums", "cells", "hand_over")


def load_kernels() -> Any:
    """The extension, or else the tests' build of the same sources for the CPU."""
    from fastrnn._load import _cuda

    if _cuda is not None:
        return _cuda
    sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "cuda")]
    from harness import build

    return build.load()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ghz", type=float, default=1.755, help="the clock")
    parser.add_argument("--processors", type=int, default=132)
    parser.add_argument("--clusters", default="66,32,16,8", help="of 2, 4, 8, 16 blocks at once")
    parser.add_argument("--cell", default="LSTM")
    args = parser.parse_args()

    from fastrnn._layer import CELLS

    kernels = load_kernels()
    clusters = [int(n) for n in args.clusters.split(",")]
    device = kernels.DeviceInfo(args.processors, 227 * 1024, 90, clusters)
    titles = ["H, B", "pass", "plan", *(t.replace("_", "-") for t in TERMS), "turns", "us a step"]
    print("| " + " | ".join(titles) + " |")
    print("| --- | --- | --- |" + " ---: |" * (len(titles) - 3))
    for hidden, batch in SHAPES:
        for backward in (False, True):
            problem = kernels.Problem(backward, args.cell, 2, 100, batch, hidden, 1, False, False)
            plan = kernels.make_plan(problem, device)
            terms = kernels.step_terms(problem, device, plan)
            us = 1e-3 / args.ghz
            kind = plan.kind.name.lower() + (f" of {plan.cluster}" if plan.cluster > 1 else "")
            where = "" if plan.resident else ", weights from L2"
            if plan.kept:
                depth = hidden * (CELLS[args.cell].gates if backward else 1)
                where = f", {plan.kept * plan.slices * 32 / depth:.0%} of weights stay"
            row = [f"{hidden}, {batch}", "backward" if backward else "forward"]
            row += [f"{kind}, {plan.units} units x {plan.rows} rows{where}"]
            row += [f"{getattr(terms, term) * us:.2f}" for term in TERMS]
            print(
                "| " + " | ".join([*row, f"{terms.turns:.0f}", f"{terms.cycles * us:.2f}"]) + " |"
            )


if __name__ == "__main__":
    main()
