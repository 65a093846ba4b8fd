"""What a result file holds, and the figures that are read off it."""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .cases import Case
from .peers import OURS

Row = dict[str, Any]
Result = dict[str, Any]

SCHEMA = 3
DIRECTORY = Path(__file__).parent / "results"
LATEST = DIRECTORY / "latest.json"  # not kept by git

# What must be there, and of what type; {} where the keys are peers.
FIELDS = {
    "schema": int,
    "machine": dict,
    "threads": int,
    "limits": dict,
    "load": dict,
    "rows": list,
}
ROW_FIELDS = {
    "case": dict,
    "rounds": int,
    "ms": dict,  # median time of a call of each peer
    "times_torch": dict,  # median over the rounds of that peer's time / torch.nn's in the round
    "times_fastrnn": dict,  # the same over fastrnn's time
    "failed": dict,  # peers that could not run it, or whose numbers were wrong: why
    "floor_ms": float,
    "of_floor": float,
    "others": float,  # share of the cores that other processes used meanwhile
    "steal": float,
    "busy": bool,  # measured under load: not to be trusted
}


def check(result: Result) -> Result:
    """The result itself; ValueError if it is none of this version."""
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"not a result of schema {SCHEMA}: measure again with `make bench`")
    parts = [("result", result, FIELDS)]
    parts += [(f"row {i}", row, ROW_FIELDS) for i, row in enumerate(result["rows"])]
    for name, part, fields in parts:
        for field, kind in fields.items():
            if not isinstance(part.get(field), kind):
                raise ValueError(
                    f"{name}: {field} is {part.get(field)!r}, expected {kind.__name__}"
                )
    return result


def load(file: Path) -> Result:
    try:
        return check(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{file}: {error}") from None


def save(result: Result, file: Path) -> None:
    """Whoever is killed meanwhile leaves the old file or the new one."""
    write(check(result), file.with_name(file.name + ".part"))
    file.with_name(file.name + ".part").replace(file)


def write(result: Result, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def case_of(row: Row) -> Case:
    return Case(**row["case"])


def medians_of_ratios(samples: dict[str, list[float]], base: str) -> dict[str, float]:
    """Each peer's time over the base's, paired round by round: what drifts, drifts for both."""
    return {
        peer: statistics.median(mine / its for mine, its in zip(times, samples[base], strict=True))
        for peer, times in samples.items()
    }


def best_peer(row: Row) -> tuple[str, float]:
    """The fastest other library, and its time over fastrnn's."""
    others = {peer: times for peer, times in row["times_fastrnn"].items() if peer not in OURS}
    return min(others.items(), key=lambda item: item[1])


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))
