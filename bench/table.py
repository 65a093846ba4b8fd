"""A result as a Markdown table that also reads well in a terminal: python -m bench.table [FILE]"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from .floor import FEW_ROWS
from .peers import PEERS
from .results import LATEST, Result, Row, best_peer, case_of, geometric_mean, load

Column = tuple[str, Callable[[Row], str]]


def align(titles: list[str], lines: list[list[str]], left: int) -> str:
    """A table whose first `left` columns are text and the rest numbers."""
    widths = [max(map(len, column)) for column in zip(titles, *lines)]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def line(cells: list[str]) -> str:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        )
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, [titles, rule, *lines]))


def _columns(rows: list[Row]) -> list[Column]:
    """Text first; the other peers' columns are their times over fastrnn's."""
    peers = [p for p in PEERS if p != "fastrnn" and any(p in row["ms"] for row in rows)]

    def times(peer: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            if peer in row["failed"]:
                return "failed"
            return f"{row['times_fastrnn'][peer]:.2f}x" if peer in row["ms"] else ""

        return cell

    return [
        ("T, B, H", lambda row: case_of(row).shape),
        ("layer", lambda row: case_of(row).layer),
        ("mode", lambda row: case_of(row).mode + "*" * row["busy"]),
        ("fastrnn ms", lambda row: f"{row['ms']['fastrnn']:.3g}"),
        *((PEERS[peer].title, times(peer)) for peer in peers),
        ("of floor", lambda row: f"{row['of_floor']:.0%}"),
    ]


def _means(rows: list[Row]) -> str:
    """Geometric means against torch.nn and against the best peer of each row."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        case = case_of(row)
        kind = "ragged" if case.ragged else "deep" if case.directions == 2 else case.cell
        groups.setdefault(f"{kind} {case.mode}", []).append(row)
        groups.setdefault(f"all {case.mode}", []).append(row)
    lines = [
        [
            name,
            str(len(group)),
            f"{geometric_mean(row['times_fastrnn']['torch'] for row in group):.2f}x",
            f"{geometric_mean(best_peer(row)[1] for row in group):.2f}x",
            f"{min(best_peer(row)[1] for row in group):.2f}x",
        ]
        for name, group in sorted(groups.items())
    ]
    titles = ["geometric means", "rows", "over torch.nn", "over the best peer", "worst row"]
    return align(titles, lines, left=1)


def _notes(result: Result) -> str:
    machine, limits = result["machine"], result["limits"]
    rate = limits["multiply_add_flops_per_s"] / 1e9
    reads = ", ".join(
        f"{int(size) / 2**20:.3g} MiB {rate / 1e9:.0f} GB/s"
        for size, rate in limits["read_bytes_per_s"].items()
    )
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    commits = sorted({str(row.get("commit", machine["commit"])) for row in result["rows"]})
    lines = [
        "Under a library's name: its time over fastrnn's. Floor: the matrix products at the "
        f"processor's multiply-add rate or, up to {FEW_ROWS} rows, reading the weights, whichever "
        "takes longer.",
        f"Multiply-adds: {rate:.0f} GFLOP/s." + f" Reading: {reads}." * bool(reads),
        f"{result['threads']} threads of {machine['cores']} cores, {machine['cpu']}; {versions}; "
        f"commit {' and '.join(commits)}.",
    ]
    if any(row["busy"] for row in result["rows"]):
        lines.append("*: measured while others used the machine.")
    return "\n".join(lines)


def render(result: Result, summary: bool = True) -> str:
    rows = result["rows"]
    columns = _columns(rows)
    lines = [[cell(row) for _, cell in columns] for row in rows]
    parts = [align([title for title, _ in columns], lines, left=3)]
    if summary:
        parts.append(_means(rows))
    return "\n\n".join([*parts, _notes(result)])


def pattern(text: str) -> re.Pattern[str]:
    """For argparse, which does not know re.error."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=LATEST, metavar="FILE")
    parser.add_argument(
        "--no-summary", dest="summary", action="store_false", help="without the geometric means"
    )
    parser.add_argument(
        "--rows",
        type=pattern,
        metavar="REGEX",
        default=re.compile(""),
        help="those in whose name it is found",
    )
    args = parser.parse_args()
    result = load(args.file)
    result["rows"] = [row for row in result["rows"] if args.rows.search(case_of(row).name)]
    if not result["rows"]:
        sys.exit(f"{args.file} has no such rows")
    print(render(result, args.summary))


if __name__ == "__main__":
    main()
