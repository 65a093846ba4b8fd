"""The figures with which README and the site begin: python -m bench.headline [FILE]

Geometric means over the rows that have all their steps; ragged batches, which torch.nn packs first,
stand for themselves.
"""

import argparse
from pathlib import Path

from .cases import GATES, MODES
from .results import DIRECTORY, Result, Row, best_peer, case_of, geometric_mean, load
from .table import align

FILE = DIRECTORY / "cpu-zen4.json"  # the whole grid


def groups(result: Result) -> dict[tuple[str, str], list[Row]]:
    """(mode, cell) -> rows."""
    found: dict[tuple[str, str], list[Row]] = {(m, c): [] for m in MODES for c in GATES}
    for row in result["rows"]:
        case = case_of(row)
        if not case.ragged:
            found[case.mode, case.cell].append(row)
    return {group: rows for group, rows in found.items() if rows}


def means(result: Result) -> dict[tuple[str, str], tuple[float, float]]:
    """(mode, cell) -> speedup over torch.nn, and over the fastest other library of each row."""
    return {
        group: (
            geometric_mean(row["times_fastrnn"]["torch"] for row in rows),
            geometric_mean(best_peer(row)[1] for row in rows),
        )
        for group, rows in groups(result).items()
    }


def frozen_means(result: Result) -> dict[str, float]:
    """cell -> speedup of frozen layers' inference over the fastest other library of each row."""
    return {
        cell: geometric_mean(best_peer(row)[1] / row["times_fastrnn"]["frozen"] for row in rows)
        for (mode, cell), rows in groups(result).items()
        if mode == "inference" and all("frozen" in row["times_fastrnn"] for row in rows)
    }


def sentence(result: Result) -> str:
    """For instance "1.6x as fast for LSTM, 3.1x for GRU and 2.8x for RNN", of training."""
    over_torch = {
        cell: mean for (mode, cell), (mean, _) in means(result).items() if mode == "training"
    }
    first, *others = [f"{mean:.1f}x for {cell}" for cell, mean in over_torch.items()]
    first = first.replace(" for", " as fast for")
    return f"{', '.join([first, *others[:-1]])} and {others[-1]}"


def render(result: Result) -> str:
    found = means(result)
    lines = [
        [f"{mode}, {name}", *(f"{found[mode, cell][i]:.2f}x" for cell in GATES)]
        for i, name in enumerate(("over torch.nn", "over the fastest other library"))
        for mode in reversed(MODES)
    ]
    frozen = frozen_means(result)
    if len(frozen) == len(GATES):
        name = "inference, frozen, over the fastest other library"
        lines.append([name, *(f"{frozen[cell]:.2f}x" for cell in GATES)])
    return align(["geometric means", *GATES], lines, left=1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.headline", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=FILE, metavar="FILE")
    result = load(parser.parse_args().file)
    print(sentence(result), render(result), sep="\n\n")


if __name__ == "__main__":
    main()
