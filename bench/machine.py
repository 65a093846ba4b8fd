"""What the machine is, and how much of it others are using."""

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter, process_time, sleep
from typing import Any

# Shares of all cores above which a row counts as measured under load: what other processes used,
# and what the host took from a virtual machine.
OTHERS_LIMIT = 0.05
STEAL_LIMIT = 0.02
INSTRUCTIONS = ("avx2", "fma", "f16c", "avx512", "avx_vnni", "amx", "asimd", "sve", "bf16")


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _caches() -> dict[str, str]:
    """Size of each cache, per instance."""
    sizes = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = (cache / "type").read_text().strip()
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        sizes[f"L{(cache / 'level').read_text().strip()}{suffix}"] = (
            (cache / "size").read_text().strip()
        )
    return sizes


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe(packages: tuple[str, ...] = ("torch", "fastrnn")) -> dict[str, Any]:
    """Everything one needs to know to compare two result files."""
    import fastrnn

    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features", "")).split()
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=here,
        capture_output=True,
        text=True,
    )
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "caches": _caches(),
        "cores": cores(),
        "instructions": [flag for flag in flags if flag.startswith(INSTRUCTIONS)],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in packages},
        "variant": fastrnn.cpu_variant(),
        "commit": commit.stdout.strip() or None,
        "load_average": round(os.getloadavg()[0], 2),
    }


@dataclass(frozen=True)
class Load:
    """Shares of all cores."""

    others: float
    steal: float

    @property
    def busy(self) -> bool:
        return self.others > OTHERS_LIMIT or self.steal > STEAL_LIMIT


@dataclass(frozen=True)
class Usage:
    """CPU seconds of all cores up to now. Where there is no /proc/stat nobody is seen."""

    at: float
    busy: float
    steal: float
    ours: float

    @classmethod
    def now(cls, workers_cpu_s: float = 0.0) -> "Usage":
        stat = Path("/proc/stat")
        ticks = [0] * 8
        if stat.exists():
            ticks = [int(word) for word in stat.read_text().split("\n")[0].split()[1:9]]
        user, nice, system, _, _, irq, softirq, steal = (
            tick / os.sysconf("SC_CLK_TCK") for tick in ticks
        )
        busy = user + nice + system + irq + softirq
        return cls(perf_counter(), busy, steal, process_time() + workers_cpu_s)

    def load_until(self, end: "Usage") -> Load:
        capacity = (end.at - self.at) * (os.cpu_count() or 1)
        others = (end.busy - self.busy) - (end.ours - self.ours)
        return Load(max(0.0, others) / capacity, (end.steal - self.steal) / capacity)


def load_of(seconds: float) -> Load:
    """The load while this process sleeps that long."""
    start = Usage.now()
    sleep(seconds)
    return start.load_until(Usage.now())
