"""fastrnn, plain and frozen, against torch.nn, ONNX Runtime, OpenVINO and JAX on this CPU.

Prints a table, and writes what it is made from, after every row: a run that was ended can be
continued with --resume. Each library runs in a process of its own.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from . import table
from .cases import Case, make_cases
from .compare import BASE, describe_with, run, warn, warnings
from .machine import cores
from .peers import PEERS
from .results import LATEST, Result, load, save
from .variants import VARIANTS

# level: (seconds, rounds at least) per row
EFFORT = {"quick": (0.0, 3), "default": (1.5, 5), "full": (3.0, 7)}


def parse_args() -> argparse.Namespace:
    def peers(text: str) -> list[str]:
        chosen = [name for name in text.split(",") if name]
        if unknown := set(chosen) - set(PEERS):
            raise argparse.ArgumentTypeError(f"{unknown.pop()!r}, choose from {', '.join(PEERS)}")
        return chosen

    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    level = parser.add_mutually_exclusive_group()
    for name, what in (("quick", "two shapes, three rounds"), ("full", "the whole grid")):
        level.add_argument(f"--{name}", dest="level", action="store_const", const=name, help=what)
    parser.set_defaults(level="default")
    parser.add_argument(
        "--peers",
        type=peers,
        metavar="A,B",
        default=list(PEERS),
        help=f"of {', '.join(PEERS)}; {' and '.join(BASE)} always run",
    )
    parser.add_argument(
        "--rows",
        type=table.pattern,
        metavar="REGEX",
        default=re.compile(""),
        help="rows in whose name it is found, e.g. 'GRU inference 1,' "
        "or 'LSTM.*training 100, 32, 128'",
    )
    parser.add_argument("--threads", type=int, default=cores(), help="default: %(default)s")
    parser.add_argument(
        "--variant",
        choices=VARIANTS,
        help="hold every library to this instruction set; ONNX Runtime, which cannot be, is left "
        "out. Default: each takes the best that it knows",
    )
    parser.add_argument("--seconds", type=float, help="per row, without preparation")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=LATEST,
        help="the results (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="measure what is missing in FILE, which a run with the same arguments left; rows of "
        "another commit stay, and say so",
    )
    args = parser.parse_args()
    if not 1 <= args.threads <= cores():
        parser.error(f"--threads is {args.threads}, expected 1 to {cores()}, the cores here")
    return args


def hold(peers: list[str], variant: str) -> list[str]:
    """Those that can be held to the variant, as every library loaded from now on is."""
    os.environ.update(VARIANTS[variant])
    return [peer for peer in peers if PEERS[peer].has_variants]


def installed(peers: list[str]) -> list[str]:
    """Those that can run; one line says how to get the others."""
    absent = [PEERS[peer].title for peer in peers if PEERS[peer].missing()]
    if absent:
        print(f"{', '.join(absent)} left out: install with  pip install '.[bench]'")
    return [peer for peer in peers if not PEERS[peer].missing()]


def choose(level: str, rows: re.Pattern[str]) -> list[Case]:
    cases = [case for case in make_cases(level) if rows.search(case.name)]
    if not cases:
        known = "\n  ".join(case.name for case in make_cases(level))
        sys.exit(f"--rows {rows.pattern!r} is in none of\n  {known}")
    return cases


def left_by(file: Path, threads: int, peers: list[str]) -> Result:
    """The result of an ended run, if it was one of the same machine, versions and threads."""
    earlier = load(file)

    def conditions(threads: int, machine: dict[str, Any]) -> dict[str, Any]:
        return {"threads": threads, **machine, "commit": None, "load_average": None}

    now = conditions(threads, describe_with(peers))
    for name, then in conditions(earlier["threads"], earlier["machine"]).items():
        if then != now[name]:
            sys.exit(f"--resume: {file} was measured with {name} {then}, here is {now[name]}")
    for row in earlier["rows"]:
        row.setdefault("commit", earlier["machine"]["commit"])
    return earlier


def main() -> None:
    args = parse_args()
    cases = choose(args.level, args.rows)
    seconds, least = EFFORT[args.level]
    seconds = seconds if args.seconds is None else args.seconds
    peers = installed(args.peers)
    if args.variant is not None:
        peers = hold(peers, args.variant)
    earlier = None
    if args.resume and args.json.exists():
        earlier = left_by(args.json, args.threads, peers)
        print(f"{len(earlier['rows'])} rows are in {args.json} already")

    def keep(result: Result) -> None:
        save(result, args.json)

    result = run(cases, peers, args.threads, seconds, least, keep, earlier)
    if not result["rows"]:
        sys.exit(1)
    save(result, args.json)
    print(f"\n{table.render(result)}\n\nWritten to {args.json}")
    for message in warnings(result):
        warn(message)


if __name__ == "__main__":
    main()
