"""What `make wheel` has left in dist/: pytest tests/packaging/check_dist.py, after it."""

import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_IN_SDIST = re.compile(r"\.|bench/results/|docs/|mkdocs\.yml")  # sdist.exclude in pyproject.toml
CPU_LIMIT = 5_000_000  # bytes of a wheel without the GPU part


def only(pattern: str) -> Path:
    (path,) = (ROOT / "dist").glob(pattern)
    return path


COMPILED = {"csrc/cpu/cell_module.cc", "csrc/cuda/cell_module.cu", "csrc/cuda/device.cu"}


def tracked(*folders: str) -> set[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listing.splitlines() if (ROOT / name).exists()}


def test_sdist():
    if not (ROOT / ".git").exists():
        pytest.skip("compares with what git lists, and this is no clone")
    with tarfile.open(only("fastrnn-*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == {n for n in tracked() if not NOT_IN_SDIST.match(n)} | {"PKG-INFO"}


def test_wheel():
    path = only("fastrnn-*.whl")
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    package = {name for name in names if name.startswith("fastrnn/")}
    extensions = {name for name in package if name.endswith(".so")}
    own = {n.partition("/")[2] for n in tracked("python/fastrnn")}
    # What cells of the user's own are compiled from.
    own_source = re.compile(r"csrc/(philox|scan|(cells|cpu|cuda)/\w+)\.h")
    headers = {n for n in tracked("csrc") if own_source.fullmatch(n)}
    own |= {f"fastrnn/{n}" for n in headers | COMPILED}
    assert package - extensions == own

    kinds = {name.partition(".")[0] for name in extensions}
    assert len(kinds) == len(extensions)
    assert {"fastrnn/_cpu"} <= kinds <= {"fastrnn/_cpu", "fastrnn/_cuda"}
    if "fastrnn/_cuda" not in kinds:
        assert path.stat().st_size < CPU_LIMIT

    # No library beside the extensions, an OpenMP runtime least of all.
    others = {name.partition("/") for name in names - package}
    assert {folder for folder, _, _ in others} == {
        "-".join(path.name.split("-")[:2]) + ".dist-info"
    }
    assert "licenses/LICENSE" in {name for _, _, name in others}
