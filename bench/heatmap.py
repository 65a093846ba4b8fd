"""A result as a picture: python -m bench.heatmap [FILE] [PICTURE].

One row per shape, one column per mode and cell; colour and number are the best peer's time over
fastrnn's.
"""

import argparse
import math
from pathlib import Path

from .cases import GATES, MODES, Case
from .peers import PEERS
from .results import LATEST, Result, best_peer, case_of, load

PICTURE = Path(__file__).parents[1] / "docs" / "img" / "speedup.png"
RANGE = 4  # the colours end at this ratio and at its inverse
COLOURS = "RdBu"  # white at 1; told apart by the colour-blind too
DARK = 0.6  # of the range: from here the number is white


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


def draw(result: Result, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = grid(result)
    columns = [(mode, cell) for mode in MODES for cell in GATES]
    end = math.log2(RANGE)
    colours = [
        [math.log2(figures[column][0]) if column in figures else math.nan for column in columns]
        for figures in shapes.values()
    ]
    figure, axes = pyplot.subplots(figsize=(7.5, 2.4 + 0.27 * len(shapes)), layout="constrained")
    image = axes.imshow(colours, cmap=COLOURS, vmin=-end, vmax=end, aspect="auto")
    for y, figures in enumerate(shapes.values()):
        for x, column in enumerate(columns):
            if column in figures:
                ratio, busy = figures[column]
                dark = abs(math.log2(ratio)) > DARK * end
                text = f"{ratio:.3g}" if ratio >= 10 else f"{ratio:.2f}"
                axes.text(
                    x,
                    y,
                    text + "*" * busy,
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if dark else "black",
                )
    axes.set_xticks(range(len(columns)), [cell for _, cell in columns])
    axes.set_yticks(range(len(shapes)), shapes)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.annotate(
        "T, B, H", (0, 1), (-5, 7), xycoords="axes fraction", textcoords="offset points", ha="right"
    )
    for k, mode in enumerate(MODES):
        centre = (k + 0.5) * len(GATES) - 0.5
        axes.annotate(
            mode,
            (centre, 1),
            (0, 22),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            weight="bold",
        )
    axes.axvline(len(GATES) - 0.5, color="black", linewidth=1.5)
    axes.spines[:].set_visible(False)
    scale = [2.0**k for k in range(-int(end), int(end) + 1)]
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, pad=0.01)
    bar.set_ticks([math.log2(ratio) for ratio in scale], labels=[f"{r:g}x" for r in scale])
    used = {peer for row in result["rows"] for peer in row["ms"]}
    names = [PEERS[peer].title for peer in PEERS if peer in used and peer != "fastrnn"]
    machine, busy = result["machine"], any(row["busy"] for row in result["rows"])
    bar.set_label(
        "Time of the fastest other library over fastrnn's (blue: fastrnn is faster)\n"
        f"of {', '.join(names)}\n"
        f"float32, {result['threads']} threads, {machine['cpu']}, {machine['variant']}, "
        f"torch {machine['versions']['torch']}" + "\n*: measured under load" * busy
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.heatmap", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=LATEST, metavar="FILE")
    parser.add_argument("picture", type=Path, nargs="?", default=PICTURE, metavar="PICTURE")
    args = parser.parse_args()
    draw(load(args.file), args.picture)
    print(args.picture)


if __name__ == "__main__":
    main()
