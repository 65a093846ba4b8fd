"""What pyproject.toml and the workflows say of Pythons, machines and files: each agrees with the
others, and what is named exists."""

import re
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="the workflows are not part of this tree")


def minors(pattern: str, text: str) -> list[int]:
    return [int(n) for n in re.findall(pattern, text)]


def test_pythons():
    project, wheels = PROJECT["project"], PROJECT["tool"]["cibuildwheel"]
    supported = minors(r"Python :: 3\.(\d+)", "\n".join(project["classifiers"]))
    assert supported == list(range(supported[0], supported[-1] + 1))
    assert project["requires-python"] == f">=3.{supported[0]}"
    numbers = re.fullmatch(r"cp31\{([\d,]+)\}-\*", wheels["build"])[1]
    assert [10 + int(n) for n in numbers.split(",")] == supported
    releasing = (ROOT / "RELEASING.md").read_text(encoding="utf-8")
    assert f"CPython 3.{supported[0]} to 3.{supported[-1]}" in " ".join(releasing.split())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["jobs"]
    triggers = workflow[True]  # which YAML makes of the key `on`
    paths = [p for event in triggers.values() if event for p in event.get("paths", [])]
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    # What is run of this repository, and the files by which a run is triggered.
    paths += [
        w for s in steps for w in s.get("run", "").split() if w.startswith((".ci/", "tests/"))
    ]
    assert paths, "the workflow names no file of ours"
    assert not [p for p in paths if not any(ROOT.glob(p))]
    # A version is named for each action of others.
    assert all(re.search(r"@v\d", step["uses"]) for step in steps if "uses" in step)


def test_wheels_are_tested():
    wheels = PROJECT["tool"]["cibuildwheel"]
    program = re.search(r"\{project\}/(\S+)", wheels["test-command"])[1]
    assert (ROOT / program).is_file()
    needed = wheels["test-requires"]
    assert all(re.search(rf"\b{n}\b", (ROOT / program).read_text(encoding="utf-8")) for n in needed)
