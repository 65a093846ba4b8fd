"""The least time a row can take: its matrix products and, for few rows, the reading of its weights.

The products take at least as long as their multiply-adds do on registers alone, at the rate that a
loop of nothing else shows. Everything else that a layer does counts as nothing, so no row is above
100% of its floor, but for what the clock does.
"""

from collections.abc import Iterable, Mapping

from .cases import GATES, Case

FEW_ROWS = (
    4  # up to here every weight that is read takes part in so few products that reading counts
)
FLOAT = 4  # bytes

Reads = Mapping[int, float]  # bytes of a working set -> bytes per second


def flops(case: Case) -> int:
    """Operations in the matrix products; a backward pass has twice as many as its forward."""
    lengths = case.lengths()
    rows = case.T * case.B if lengths is None else int(lengths.sum())
    return 2 * rows * sum(weights(case)) * (3 if case.training else 1)


def weights(case: Case) -> tuple[int, int]:
    """The number of input weights and of recurrent weights."""
    features, rows = case.directions * case.H, case.directions * GATES[case.cell] * case.H
    return rows * (case.H + (case.layers - 1) * features), rows * case.layers * case.H


def working_sets(case: Case) -> tuple[int, int]:
    """Bytes of all weights, which a call reads, and of W_hh of one layer, which a step reads."""
    ih, hh = weights(case)
    return FLOAT * (ih + hh), FLOAT * hh // case.layers


def read_seconds(case: Case, reads: Reads) -> float:
    """All weights once and W_hh again at every further step, each at the rate for its size.

    The backward pass reads them once more.
    """
    everything, recurrent = working_sets(case)
    again = case.layers * (case.T - 1) * recurrent
    seconds = everything / reads[everything] + again / reads[recurrent]
    return seconds * (2 if case.training else 1)


def floor_seconds(case: Case, flops_per_s: float, reads: Reads) -> float:
    products = flops(case) / flops_per_s
    return products if case.B > FEW_ROWS else max(products, read_seconds(case, reads))


def sizes_to_read(cases: Iterable[Case]) -> list[int]:
    """The working sets whose bandwidth the floors of these rows need."""
    few = (case for case in cases if case.B <= FEW_ROWS)
    return sorted({size for case in few for size in working_sets(case)})
