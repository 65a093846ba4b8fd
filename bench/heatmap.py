"""A result as a coloured table of HTML: python -m bench.heatmap [FILE] [PAGE].

One row per shape, one column per mode and cell; colour and number are the best peer's time over
fastrnn's.
"""

import argparse
import math
from html import escape
from pathlib import Path

from .cases import GATES, MODES, Case
from .peers import OURS, PEERS
from .results import LATEST, Result, best_peer, case_of, load

PAGE = Path(__file__).parents[1] / "build" / "heatmap.html"
RANGE = 4  # the colours end at this ratio and at its inverse
# From 1 outwards by the ratio's logarithm; the colour-blind can tell them apart.
FASTER = ((247, 247, 247), (146, 197, 222), (33, 102, 172))
SLOWER = ((247, 247, 247), (244, 165, 130), (178, 24, 43))
DARK = 0.7  # of the range: from here the number is white


def label(case: Case) -> str:
    kind = "ragged " * case.ragged + "bi, 2 layers " * (case.directions == 2)
    return kind + case.shape


def grid(result: Result) -> dict[str, dict[tuple[str, str], tuple[float, bool]]]:
    """Shape -> (mode, cell) -> speedup over the best peer, and whether the machine was busy."""
    shapes: dict[str, dict[tuple[str, str], tuple[float, bool]]] = {}
    for row in result["rows"]:
        case = case_of(row)
        figures = shapes.setdefault(label(case), {})
        figures[case.mode, case.cell] = best_peer(row)[1], row["busy"]
    return shapes


def colours(ratio: float) -> tuple[str, str]:
    """Of a cell of the table, and of the number in it."""
    place = min(abs(math.log(ratio, RANGE)), 1)
    stops = FASTER if ratio > 1 else SLOWER
    k, part = divmod(place * (len(stops) - 1), 1)
    low, high = stops[int(k)], stops[min(int(k) + 1, len(stops) - 1)]
    mixed = (round(a + (b - a) * part) for a, b in zip(low, high))
    return f"#{bytes(mixed).hex()}", "#fff" if place > DARK else "#1b1b1b"


def render(result: Result) -> str:
    columns = [(mode, cell) for mode in MODES for cell in GATES]
    heads = "".join(f'<th colspan="{len(GATES)}">{mode}</th>' for mode in MODES)
    cells = "".join(f"<th>{cell}</th>" for _, cell in columns)
    lines = [f"<tr><td></td>{heads}</tr>", f"<tr><th>T, B, H</th>{cells}</tr>"]
    for shape, figures in grid(result).items():
        line = f"<tr><th>{escape(shape)}</th>"
        for column in columns:
            if column not in figures:
                line += "<td></td>"
                continue
            ratio, busy = figures[column]
            back, front = colours(ratio)
            text = f"{ratio:.3g}" if ratio >= 10 else f"{ratio:.2f}"
            line += f'<td style="background:{back};color:{front}">{text}{"*" * busy}</td>'
        lines.append(line + "</tr>")
    used = {peer for row in result["rows"] for peer in row["ms"]}
    names = [PEERS[peer].title for peer in PEERS if peer in used and peer not in OURS]
    machine, busy = result["machine"], any(row["busy"] for row in result["rows"])
    about = (
        "The time of the fastest other library over fastrnn's: fastrnn is faster where it is blue. "
        f"Compared: {', '.join(names)}. float32, {result['threads']} threads, {machine['cpu']}, "
        f"{machine['variant']}, torch {machine['versions']['torch']}."
        + " *: measured while others used the machine."
        * busy
    )
    rows = "\n".join(lines)
    return f'<table class="heatmap">\n<caption>{escape(about)}</caption>\n{rows}\n</table>'


STYLE = """body { font: 13px system-ui, sans-serif; }
table { border-collapse: collapse; }
caption { caption-side: bottom; padding: 1em; max-width: 40em; text-align: left; }
td, th { padding: .2em .6em; text-align: right; }"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.heatmap", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=LATEST, metavar="FILE")
    parser.add_argument("page", type=Path, nargs="?", default=PAGE, metavar="PAGE")
    args = parser.parse_args()
    head = f'<!doctype html>\n<meta charset="utf-8">\n<style>{STYLE}</style>'
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(f"{head}\n{render(load(args.file))}\n", encoding="utf-8")
    print(args.page)


if __name__ == "__main__":
    main()
