"""The pictures of the documentation, as SVG: python docs/pictures.py FOLDER [NAME ...]

Drawn by hand rather than plotted, so that text stays text and colours follow the page: a shape
names a role ("state", "weight", ...), and docs/pictures.css gives the role its colour, light and
dark. The site's build inlines them; see docs/hooks.py. README's picture lies in the repository:
python docs/pictures.py docs/img speedup
"""

import re
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from bench import headline, results  # noqa: E402
from bench.cases import GATES, MODES  # noqa: E402

Point = tuple[float, float]
PICTURES: dict[str, Callable[[], "Picture"]] = {}


class Picture:
    """A canvas. Coordinates are pixels, y grows downwards."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def box(
        self, x: float, y: float, w: float, h: float, role: str, label: str = "", size: str = ""
    ) -> None:
        self.parts.append(
            f'<rect class="{role}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="2"/>'
        )
        if label:
            self.text(x + w / 2, y + h / 2, label, f"middle inside {size}")

    def text(self, x: float, y: float, text: str, role: str = "") -> None:
        """`role`: start (as without one), middle or end, and small, strong, code, quiet."""
        self.parts.append(
            f'<text class="{role.strip()}" x="{x:g}" y="{y:g}" dy=".35em">{escape(text)}</text>'
        )

    def line(self, *points: Point, role: str = "line") -> None:
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path class="{role}" d="M{path}"/>')

    def arrow(self, *points: Point, role: str = "line") -> None:
        """Along the points, with a head at the last."""
        (x0, y0), (x, y) = points[-2:]
        length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        dx, dy = (x - x0) / length, (y - y0) / length
        foot = (x - 6 * dx, y - 6 * dy)
        self.line(*points[:-1], foot, role=role)
        wings = [(foot[0] - s * 3.5 * dy, foot[1] + s * 3.5 * dx) for s in (1, -1)]
        head = "L".join(f"{a:.1f} {b:.1f}" for a, b in [(x, y), *wings])
        self.parts.append(f'<path class="head {role}" d="M{head}Z"/>')

    def arc(self, begin: Point, end: Point, height: float, role: str = "line") -> None:
        """An arrow that leaps from begin to end, both at the same y."""
        (x0, y), (x1, _) = begin, end
        side = 1 if x1 > x0 else -1
        top = y - height
        self.parts.append(
            f'<path class="{role}" d="M{x0:g} {y:g}C{x0 + side * 6:g} {top:g} {x1 - side * 6:g} '
            f'{top:g} {x1:g} {y - 5:g}"/>'
        )
        self.parts.append(
            f'<path class="head {role}" d="M{x1:g} {y:g}L{x1 - 3.5:g} {y - 7:g}L{x1 + 3.5:g} '
            f'{y - 7:g}Z"/>'
        )

    def legend(self, x: float, y: float, entries: list[tuple[str, str]]) -> None:
        for role, label in entries:
            self.box(x, y - 6, 12, 12, role)
            self.text(x + 18, y, label, "small")
            x += 18 + 6.6 * len(label) + 24

    def svg(self, alt: str = "") -> str:
        kind = 'class="narrow" ' if self.width < 460 else ""  # it fits a phone
        return (
            f'<svg {kind}xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" '
            f'aria-label="{alt}">{"".join(self.parts)}</svg>'
        )


def picture(draw: Callable[[], Picture]) -> Callable[[], Picture]:
    PICTURES[draw.__name__] = draw
    return draw


# -- Masks, lengths, resets ------------------------------------------------------------------------

CELL = 44


def steps_head(p: Picture, x: float, y: float, steps: int) -> None:
    for t in range(steps):
        p.text(x + (t + 0.5) * CELL, y, f"t = {t}" if t == 0 else str(t), "middle small quiet")


@picture
def lengths() -> Picture:
    steps, counts = 8, [8, 0, 3, 6]
    p = Picture(640, 228)
    left, top = 130, 34
    steps_head(p, left, 14, steps)
    for b, count in enumerate(counts):
        y = top + b * 40
        p.text(left - 12, y + 15, f"row {b}, length {count}", "end")
        for t in range(steps):
            valid = t < count
            label = f"h{t}" if valid else "0"
            p.box(left + t * CELL + 2, y, CELL - 4, 30, "state" if valid else "masked", label)
        x = left + count * CELL
        if count < steps:  # the final state is what the row has reached there
            p.line((x, y - 3), (x, y + 33), role="strong")
        p.arrow((left + steps * CELL + 6, y + 15), (left + steps * CELL + 40, y + 15))
        label = f"h after t = {count - 1}" if count else "the initial state"
        p.text(left + steps * CELL + 46, y + 15, label, "small")
    p.text(left + steps * CELL + 46, 14, "h_n", "small strong code")
    p.legend(
        left,
        212,
        [("state", "valid step"), ("masked", "masked: outputs 0, its input is never read")],
    )
    return p


@picture
def mask() -> Picture:
    valid = [True, True, False, True, False, False, True, True]
    p = Picture(640, 214)
    left = 130
    steps_head(p, left, 14, len(valid))
    p.text(left - 12, 51, "mask", "end code")
    p.text(left - 12, 115, "state", "end")
    p.text(left - 12, 175, "output", "end code")
    last = None
    for t, is_valid in enumerate(valid):
        x = left + t * CELL
        p.box(
            x + 2,
            36,
            CELL - 4,
            30,
            "state" if is_valid else "masked",
            "True" if is_valid else "False",
            "small",
        )
        p.box(
            x + 2,
            160,
            CELL - 4,
            30,
            "state" if is_valid else "masked",
            f"h{t}" if is_valid else "0",
        )
        if not is_valid:
            continue
        p.arrow((x + CELL / 2, 68), (x + CELL / 2, 100))
        p.box(x + 7, 100, CELL - 14, 30, "sum", f"h{t}")
        p.arrow((x + CELL / 2, 131), (x + CELL / 2, 159))
        if last is not None:
            p.arrow((left + (last + 1) * CELL - 7, 115), (x + 7, 115), role="strong")
        last = t
    end = left + len(valid) * CELL
    p.arrow((end - 7, 115), (end + 40, 115), role="strong")
    p.text(end + 46, 115, "h_n = h7", "code")
    return p


@picture
def reset() -> Picture:
    marks = [0, 0, 0, 1, 0, 0, 1, 0]
    p = Picture(640, 232)
    left = 130
    steps_head(p, left, 14, len(marks))
    p.text(left - 12, 51, "reset", "end code")
    p.text(left - 26, 117, "forward", "end")
    p.text(left - 26, 177, "reverse", "end")
    segment = 0
    for t, mark in enumerate(marks):
        x = left + t * CELL
        segment += mark
        role = ["state", "weight", "sum"][segment]
        p.box(
            x + 2,
            36,
            CELL - 4,
            30,
            "cut" if mark else "masked",
            "True" if mark else "False",
            "small",
        )
        for y in (102, 162):
            p.box(x + 7, y, CELL - 14, 30, role, f"h{t}")
        if t and mark:
            p.line((x, 72), (x, 206), role="cutline")
        elif t:
            p.arrow((x - 7, 117), (x + 7, 117), role="strong")
            p.arrow((x + 7, 177), (x - 7, 177), role="strong")
        if mark:
            p.text(x + CELL / 2, 88, "from 0", "middle small")
            p.text(x - CELL / 2, 206, "from 0", "middle small")
    end = left + len(marks) * CELL
    p.text(left + CELL / 2, 88, "from h_0", "middle small")
    p.arrow((end - 7, 117), (end + 30, 117), role="strong")
    p.text(end + 36, 117, "h_n[0]", "code")
    p.text(end - CELL / 2, 206, "from h_0", "middle small")
    p.arrow((left + 7, 177), (left - 20, 177), role="strong")
    p.text(left - 26, 197, "h_n[1]", "end code")
    return p


@picture
def packed() -> Picture:
    counts, size = [3, 1, 5, 2], 30
    roles = ["state", "weight", "sum", "other"]
    p = Picture(640, 250)
    p.text(20, 16, "as given: [T, B] with padding")
    for b, count in enumerate(counts):
        p.text(74, 52 + b * 38, f"row {b}", "end small")
        for t in range(max(counts)):
            role = roles[b] if t < count else "masked"
            label = f"{b}.{t}" if t < count else ""
            p.box(84 + t * (size + 4), 37 + b * 38, size, size, role, label, "small")
    order = sorted(range(len(counts)), key=lambda b: -counts[b])
    p.arrow((272, 106), (332, 106), role="strong")
    p.text(302, 90, "sort, pack", "middle small")
    p.text(350, 16, "as the kernels see it, step by step")
    sizes = [sum(c > t for c in counts) for t in range(max(counts))]
    for t, alive in enumerate(sizes):
        for i in range(alive):
            b = order[i]
            p.box(350 + t * (size + 16), 37 + i * 38, size, size, roles[b], f"{b}.{t}", "small")
        p.text(350 + t * (size + 16) + size / 2, 196, str(alive), "middle code")
    p.text(338, 196, "batch_sizes", "end small code")
    p.text(338, 232, "in memory", "end small")
    x = 350.0
    for alive in sizes:
        for i in range(alive):
            p.box(x, 223, 18, 18, roles[order[i]])
            x += 18
        x += 4
    return p


# -- How the kernels work --------------------------------------------------------------------------


def grid(
    p: Picture, x: float, y: float, rows: int, columns: int, size: float, role: str, gap: float = 2
) -> None:
    for r in range(rows):
        for c in range(columns):
            p.box(x + c * size, y + r * size, size - gap, size - gap, role)


@picture
def tile() -> Picture:
    rows, vectors, k, size = 6, 4, 9, 22
    p = Picture(700, 396)
    x, y = 316, 200
    p.text(x + vectors * 46 / 2, 14, "one block of packed W_hh", "middle strong")
    p.text(x + vectors * 46 / 2, 32, "a vector for each gate of the same units", "middle small")
    for v, gate in enumerate("ifgo"):
        p.text(x + v * 46 + 22, 50, gate, "middle code")
        for i in range(5):
            active = i == 2
            p.box(x + v * 46, 60 + i * size, 44, size - 2, "weight" if active else "weight faint")
    p.arrow((x - 12, 62), (x - 12, 60 + 5 * size), role="strong")
    p.text(x - 20, 60 + 2.5 * size, "k", "end code")
    p.text(40, 182, "h, a few batch rows", "strong")
    for r in range(rows):
        for i in range(k):
            active = i == 4
            p.box(
                40 + i * size,
                y + r * size,
                size - 2,
                size - 2,
                "state" if active else "state faint",
            )
    p.arrow((40, y + rows * size + 12), (40 + k * size, y + rows * size + 12), role="strong")
    p.text(40 + k * size / 2, y + rows * size + 28, "k", "middle code")
    for r in range(rows):
        for v in range(vectors):
            p.box(x + v * 46, y + r * size, 44, size - 2, "sum")
    p.text(x + vectors * 46 / 2, y + rows * size + 14, "sums, in registers", "middle strong")
    p.text(
        x + vectors * 46 / 2, y + rows * size + 32, "6 rows × 4 vectors = 24 of 32", "middle small"
    )
    p.arrow((244, y + 66), (308, y + 66), role="strong")
    p.text(276, y + 50, "broadcast", "middle small")
    p.arrow((x + 92, 60 + 5 * size + 4), (x + 92, y - 6), role="strong")
    p.text(x + 100, 60 + 5 * size + 16, "load", "small")
    p.arrow((x + vectors * 46 + 8, y + 66), (x + vectors * 46 + 62, y + 66), role="strong")
    p.text(x + vectors * 46 + 35, y + 50, "the cell", "middle small")
    p.box(x + vectors * 46 + 68, y, 52, rows * size - 2, "other", "c_t, h_t", "small")
    p.text(x + vectors * 46 + 94, y + rows * size + 14, "memory", "middle small")
    return p


@picture
def packing() -> Picture:
    gates, blocks, size = "ifgo", 4, 20
    roles = ["state", "weight", "sum", "other"]
    p = Picture(700, 350)
    p.text(124, 16, "torch's W_hh: [4 * H, K]", "middle strong")
    for g, gate in enumerate(gates):
        p.text(28, 48 + g * 80 - 3 + 20, gate, "middle code")
        for b in range(blocks):
            p.box(44, 34 + g * 74 + b * 17, 160, 15, roles[b] + ("" if b == 1 else " faint"))
    p.text(124, 340, "a row for each gate and unit", "middle small")
    p.arrow((224, 178), (284, 178), role="strong")
    p.text(254, 162, "pack", "middle small")
    p.text(480, 16, "packed: [block][k][gate][lane]", "middle strong")
    for i in range(10):
        y = 46 + i * (size + 4)
        for v, gate in enumerate(gates):
            if i == 0:
                p.text(350 + v * 78 + 37, y - 10, gate, "middle code")
            for lane in range(4):
                p.box(350 + v * 78 + lane * 18, y, 16, size, "weight" if i < 9 else "weight faint")
        p.text(338, y + size / 2, f"k = {i}" if i < 9 else "...", "end small")
    p.text(480, 306, "one block: a vector of units, all their gates", "middle small")
    p.text(480, 324, "read from the first byte to the last, as one stream", "middle small")
    p.text(480, 342, "(4 lanes drawn; 16 floats with AVX-512)", "middle small quiet")
    return p


@picture
def splits() -> Picture:
    p = Picture(730, 262)
    roles = ["state", "weight"]
    rows, units, size = 6, 8, 20
    titles = ["by rows", "by units", "by direction"]
    notes = [
        ("own batch rows, all steps", "no thread waits"),
        ("own hidden units and their weights", "one barrier a step"),
        ("half of the threads each", "rows or units within a half"),
    ]
    for n, (title, (what, waits)) in enumerate(zip(titles, notes)):
        x = 50 + n * 235
        p.text(x + units * size / 2, 14, title, "middle strong")
        if n < 2:
            for r in range(rows):
                for c in range(units):
                    own = r // 3 if n == 0 else c // 4
                    p.box(x + c * size, 44 + r * size, size - 2, size - 2, roles[own])
            p.text(x + units * size / 2, 33, "units", "middle small quiet")
            p.text(x - 8, 44 + rows * size / 2, "rows", "end small quiet")
            y = 44 + rows * size + 14
            for thread in range(2):
                px = x + (thread * 82)
                p.box(px, y, 12, 12, roles[thread])
                p.text(px + 18, y + 6, f"thread {thread}", "small")
        else:
            for d, role in enumerate(roles):
                y = 44 + d * 62
                for t in range(5):
                    p.box(x + t * 33, y, 28, 34, role, str(t if d == 0 else 4 - t), "small")
                p.arrow((x, y + 43), (x + units * size, y + 43), role="strong")
                p.text(x - 8, y + 17, ["→", "←"][d], "end")
            p.text(x + units * size / 2, 33, "steps, in order of time", "middle small quiet")
            for thread in range(2):
                p.box(x + thread * 82, 178, 12, 12, roles[thread])
                p.text(x + thread * 82 + 18, 184, f"thread {thread}", "small")
        p.text(x + units * size / 2, 222, what, "middle small")
        p.text(x + units * size / 2, 242, waits, "middle small")
    return p


@picture
def region() -> Picture:
    p = Picture(700, 286)
    left = 96
    p.text(20, 14, "A loop over operators: regions begin and end at every step", "strong")
    x = float(left)
    for _ in range(4):
        for role, length in (("state", 52), ("weight", 26)):
            p.box(x, 34, 30, 26, "masked", "")
            x += 32
            for thread in range(2):
                p.box(x, 34 + thread * 34, length - 2, 26, role)
            x += length
        x += 3
    for thread in range(2):
        p.text(left - 10, 47 + thread * 34, f"thread {thread}", "end small")
    p.legend(
        left,
        116,
        [("masked", "dispatch, allocation, start"), ("state", "product"), ("weight", "cell")],
    )
    p.text(20, 152, "One region: threads start once, with a barrier a step or none", "strong")
    for thread in range(2):
        y = 172 + thread * 34
        p.text(left - 10, y + 13, f"thread {thread}", "end small")
        p.box(left, y, 30, 26, "masked" if thread == 0 else "none")
        x = left + 32
        for _ in range(5):
            p.box(x, y, 58, 26, "state")
            p.box(x + 58, y, 18, 26, "weight")
            x += 81
    for step in range(4):
        p.line(
            (left + 32 + 78.5 + step * 81, 168), (left + 32 + 78.5 + step * 81, 236), role="cutline"
        )
    p.legend(
        left,
        258,
        [("state", "product"), ("weight", "cell, on the tile's registers"), ("cut", "barrier")],
    )
    return p


@picture
def chunks() -> Picture:
    p = Picture(700, 262)
    left, size, each = 70, 38, 5
    p.text(left, 14, "time", "small")
    p.arrow((left + 16 * size, 34), (left, 34), role="strong")
    p.text(left + 8 * size, 22, "the backward scan goes this way", "middle small")
    for t in range(15):
        x = left + t * size
        done = t >= 10
        now = 5 <= t < 10
        role = "sum" if now else "masked" if done else "none"
        p.box(x, 50, size - 3, 30, role, f"dG{t}" if now else "", "small")
    p.text(left + 12.5 * size, 100, "used and discarded", "middle small")
    p.text(left + 7.5 * size, 100, "one chunk, in cache", "middle small strong")
    p.text(left + 2.5 * size, 100, "to come", "middle small")
    targets = [
        ("dW_hh += dGᵀ h", "state"),
        ("dW_ih += dGᵀ x", "weight"),
        ("db += Σ dG", "other"),
        ("dx = dG W_ih", "sum"),
    ]
    for i, (label, role) in enumerate(targets):
        x = 60 + i * 152
        p.arrow((left + 7.5 * size, 114), (x + 66, 160))
        p.box(x, 162, 132, 34, role, label)
    p.text(
        320,
        226,
        "the weight gradients accumulate; dG of all steps is never stored",
        "middle small",
    )
    p.line((left + each * size - 1.5, 44), (left + each * size - 1.5, 88), role="cutline")
    p.line((left + 2 * each * size - 1.5, 44), (left + 2 * each * size - 1.5, 88), role="cutline")
    return p


@picture
def gpu() -> Picture:
    p = Picture(700, 290)
    kinds = [
        ("step", "a launch ends", ["weights come from L2", "any size"]),
        (
            "grid",
            "flags in global memory",
            ["weights may stay in shared memory", "all blocks run at once"],
        ),
        (
            "cluster",
            "the cluster's own barrier",
            ["states stay in the cluster", "sm_90 and newer, or one block"],
        ),
    ]
    for n, (name, barrier, notes) in enumerate(kinds):
        x = 20 + n * 232
        p.text(x + 98, 14, name, "middle strong code")
        for step in range(3):
            y = 36 + step * 56
            for block in range(4):
                p.box(x + block * 50, y, 44, 28, "state")
                if n and not step:
                    p.box(x + block * 50 + 6, y + 4, 32, 8, "weight")
                elif not n:
                    p.box(x + block * 50 + 6, y - 9, 32, 6, "weight")
            if step < 2:
                role = ["cutline", "", "cutline solid"][n]
                if n == 1:
                    p.box(x + 84, y + 37, 28, 10, "cut")
                    for block in range(4):
                        p.line((x + block * 50 + 22, y + 29), (x + 98, y + 37))
                else:
                    p.line((x, y + 37 + 3 * n), (x + 194, y + 37 + 3 * n), role=role)
        p.text(x + 98, 204, barrier, "middle")
        for i, note in enumerate(notes):
            p.text(x + 98, 226 + 18 * i, note, "middle small")
    p.legend(
        150,
        276,
        [
            ("state", "a block of threads, one step"),
            ("weight", "weights are read"),
            ("cut", "barrier"),
        ],
    )
    return p


# -- The course ------------------------------------------------------------------------------------


@picture
def arrangements() -> Picture:
    kinds = [
        ("one to one", [0], [0]),
        ("one to many", [0], [0, 1, 2]),
        ("many to one", [0, 1, 2], [2]),
        ("many to many", [0, 1, 2], [0, 1, 2]),
    ]
    p = Picture(680, 214)
    p.text(52, 52, "output", "end small")
    p.text(52, 109, "state", "end small")
    p.text(52, 166, "input", "end small")
    x, size, gap = 68, 28, 20
    for title, read, written in kinds:
        steps = max(*read, *written) + 1
        width = steps * size + (steps - 1) * gap
        for t in range(steps):
            left = x + t * (size + gap)
            middle = left + size / 2
            p.box(left, 95, size, size, "sum", f"h{t + 1}", "small")
            if t:
                p.arrow((left - gap, 109), (left - 1, 109), role="strong")
            if t in read:
                p.box(left, 152, size, size, "state", f"x{t + 1}", "small")
                p.arrow((middle, 152), (middle, 124))
            elif t - 1 in written:  # the output before is the input
                turn = left - gap / 2
                p.arrow((turn - gap / 2, 52), (turn, 52), (turn, 166), (middle, 166), (middle, 124))
            if t in written:
                p.box(left, 38, size, size, "weight", f"y{t + 1}", "small")
                p.arrow((middle, 95), (middle, 67))
        p.text(x + width / 2, 14, title, "middle strong")
        x += width + (58 if steps == 1 else 44)
    p.legend(68, 200, [("state", "input"), ("sum", "state"), ("weight", "output")])
    return p


@picture
def speedup() -> Picture:
    """README's picture: the geometric means over torch.nn."""
    result = results.load(headline.FILE)
    means = headline.means(result)
    left, unit, height = 54, 104, 17
    p = Picture(440, 226)
    p.text(left, 14, "Speed relative to torch.nn on a CPU", "strong")
    y = 34
    for cell in GATES:
        p.text(left - 14, y + height, cell, "end strong")
        for mode, role in zip(reversed(MODES), ("state", "weight")):
            mean, _ = means[mode, cell]
            p.box(left, y, unit * mean, height - 2, role)
            p.text(left + unit * mean + 8, y + height / 2 - 1, f"{mean:.1f}x", "small")
            y += height
        y += 14
    p.line((left + unit, 28), (left + unit, y - 8), role="cutline")
    p.text(left + unit, y + 2, "torch.nn", "middle small quiet")
    p.legend(left + 1.6 * unit, y + 2, [("state", "training"), ("weight", "inference")])
    about = result["machine"]
    shapes = sum(not results.case_of(row).ragged for row in result["rows"]) // len(means)
    text = f"Geometric means over {shapes} shapes, float32, "
    text += f"{result['threads']} threads, {about['cpu']}"
    p.text(left, y + 24, text, "small quiet")
    return p


def standalone(name: str) -> str:
    """A picture as a file of its own, in the colours that the reader's system asks for."""
    style = (DOCS / "pictures.css").read_text(encoding="utf-8")
    light, dark = re.findall(r"\{\n((?:  --.*\n)+)\}", style)
    rules = "\n".join(re.findall(r"^\.picture ((?!svg).*)$", style, re.MULTILINE))
    media = f"@media (prefers-color-scheme: dark) {{ svg {{\n{dark}}} }}\n"
    fonts = "text { font-family: system-ui, sans-serif; }\n"
    style = f"<style>\nsvg {{\n{light}}}\n{media}{fonts}{rules}\n</style>"
    return PICTURES[name]().svg().replace(">", f">{style}", 1) + "\n"


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or PICTURES:
        (folder / f"{name}.svg").write_text(standalone(name), encoding="utf-8")


if __name__ == "__main__":
    main()
