"""What nvcc makes of each CUDA kernel, for one architecture; no GPU is needed.

python -m bench.sass [--arch sm_90] [--cell Lstm] [--pass forward|backward] [--only bf16]
                     [--json FILE]

For each kernel: registers and bytes of spills, as ptxas reports them, and counts in the machine
code.

inst      instructions
hmma      products on tensor cores
ldg, lds  loads of 16 bytes: of global and of shared memory
copy      copies from global to shared memory that go on beside what follows
ld        generic loads, which first find out what memory they read
flight    the most loads of 16 bytes in a straight line of code before a result of one of them is
          used: so many are under way at once
bar       barriers of a block or cluster
fence     fences
mufu      approximate functions
call      calls of functions, as of divisions

It needs nvcc and nvdisasm; NVDISASM names one that is not on the PATH.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
COLUMNS = ("regs", "spill", "inst", "hmma", "ldg", "lds", "copy", "ld", "flight")
COLUMNS += ("bar", "fence", "mufu", "call")
COUNTED = {
    "hmma": r"HMMA",
    "ldg": r"LDG\.\S*128",
    "copy": r"LDGSTS",
    "lds": r"LDS\S*\.128",
    "ld": r"LD\.",
    "bar": r"BAR|UCGABAR",
    "fence": r"MEMBAR|FENCE|CCTL",
    "mufu": r"MUFU",
    "call": r"CALL",
}
INSTRUCTION = re.compile(
    r"^\.L_\w+:|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", re.M
)
NAME = re.compile(r"\d+(start|forward|backward)_kernel")


def compile_cubin(arch: str, cell: str, backward: bool, cubin: Path) -> str:
    """What ptxas says."""
    command = ["nvcc", "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-DFASTRNN_CELL={cell}"]
    command += ["-DFASTRNN_BACKWARD"] if backward else []
    code = arch.removeprefix("sm_")
    command += [f"-gencode=arch=compute_{code},code={arch}", "-cubin", "-Xptxas=-v"]
    done = subprocess.run(
        [*command, "-o", str(cubin), str(CUDA / "kernels.cu")], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stderr


def short_name(mangled: str) -> str | None:
    """'forward bf16 tensor Grid', of a mangled name of a scan."""
    if not (found := NAME.search(mangled)):
        return None
    kind = found[1]
    rest = mangled[found.end() :]
    types = {"8BFloat16": "bf16", "7Float16": "fp16", "dLb": "f64", "fLb": "f32"}
    dtype = next((short for long, short in types.items() if long in rest), "")
    if kind == "start":
        dtype = dtype or {"Id": "f64", "If": "f32"}.get(rest[:2], "")
        return f"start {dtype}"
    tensor = " tensor" if "Lb1E" in rest else ""
    exchange = "cluster" if "ClusterExchange" in rest else "grid"
    return f"{kind} {dtype}{tensor} {exchange}"


def resources(report: str) -> dict[str, dict[str, int]]:
    """Registers and bytes of spills of each kernel."""
    found = {}
    for name, text in re.findall(r"entry function '(\S+)'(.*?)(?=entry function|\Z)", report, re.S):
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", text)]
        [registers] = re.findall(r"Used (\d+) registers", text)
        found[name] = {"regs": int(registers), "spill": sum(spills)}
    return found


def registers_of(operand: str, wide: int = 1) -> set[int]:
    """The numbers of the registers in an operand, `wide` from each on."""
    return {int(n) + i for n in re.findall(r"\bR(\d+)", operand) for i in range(wide)}


def loads_in_flight(code: list[tuple[str, str]]) -> int:
    """The most 16-byte loads before a result of one of them is used, or code may jump there."""
    most = 0
    pending: list[set[int]] = []
    for name, operands in code:
        target, _, sources = operands.partition(",")
        used = registers_of(sources)
        if name.startswith("HMMA"):  # reads up to four registers from each that it names
            used = registers_of(sources, 4)
        if any(used & load for load in pending) or name in ("EXIT", "RET", "LABEL"):
            if not name.startswith("ST"):  # else they are copied, before the first step
                most = max(most, len(pending))
            pending = []
        if re.match(r"LD[GS]?\b.*\.128", name):
            pending.append(registers_of(target, 4))
    return most


def count(disassembly: str) -> dict[str, dict[str, int]]:
    """The instructions of each kernel."""
    found = {}
    for section in re.split(r"\n\.section\s+|\n\s*\.section\s+", disassembly):
        if not section.startswith(".text."):
            continue
        name = section[len(".text.") :].split(",")[0]
        lines = [(m[1] or "LABEL", m[2] or "") for m in INSTRUCTION.finditer(section)]
        code = [line for line in lines if line[0] not in ("NOP", "LABEL")]
        counts = {"inst": len(code), "flight": loads_in_flight(lines)}
        for key, pattern in COUNTED.items():
            counts[key] = sum(bool(re.match(pattern, each)) for each, _ in code)
        found[name] = counts
    return found


def measure(arch: str, cell: str, backward: bool) -> list[dict[str, Any]]:
    disassembler = os.environ.get("NVDISASM", "nvdisasm")
    if not (shutil.which("nvcc") and shutil.which(disassembler)):
        sys.exit("nvcc and nvdisasm are needed, on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        used = resources(compile_cubin(arch, cell, backward, cubin))
        text = subprocess.run(
            [disassembler, str(cubin)], capture_output=True, text=True, check=True
        )
    rows = []
    for mangled, counts in count(text.stdout).items():
        name = short_name(mangled)
        if name and counts["inst"] > 8:  # else not compiled for this architecture
            rows.append({"kernel": f"{cell} {name}", **used[mangled], **counts})
    return sorted(rows, key=lambda row: row["kernel"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--cell", action="append", help="as in csrc/cells/registry.h: Lstm, Gru")
    parser.add_argument("--pass", dest="passes", choices=["forward", "backward"])
    parser.add_argument("--only", default="", help="kernels whose line has this in it")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    found = []
    print(f"| {'kernel, ' + args.arch:30} | " + " | ".join(f"{c:>6}" for c in COLUMNS) + " |")
    print(f"| {'-' * 30} | " + " | ".join("-----:" for c in COLUMNS) + " |")
    for cell in args.cell or ["Lstm", "Gru"]:
        for name in ("forward", "backward"):
            if args.passes not in (None, name):
                continue
            for row in measure(args.arch, cell, name == "backward"):
                if args.only not in row["kernel"]:
                    continue
                found.append(row)
                numbers = " | ".join(f"{row[c]:6}" for c in COLUMNS)
                print(f"| {row['kernel']:30} | {numbers} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"arch": args.arch, "kernels": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
