"""python -m fastrnn: tells what runs here, and ends with exit code 1 when a result is wrong."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastrnn
from fastrnn import __main__ as diagnostics
from helpers import wrapped

CELLS = ["LSTM", "GRU", "RNN"]


@pytest.fixture(autouse=True)
def few_timings(monkeypatch):
    monkeypatch.setattr(diagnostics, "SECONDS", 0.0)


@pytest.fixture
def run(capsys):
    """Runs the program: its exit code, what it printed, and its errors line by line."""

    def run(*options):
        code = diagnostics.main([*options])
        printed = capsys.readouterr()
        return code, printed.out, printed.err.splitlines()

    return run


def python(*args, variant=""):
    return subprocess.run(
        [sys.executable, *args],
        env=os.environ | {"FASTRNN_CPU": variant},
        capture_output=True,
        text=True,
        timeout=120,
    )


def in_result(change):
    """A forward whose output is changed."""

    def broken(forward):
        def wrong(self, *args):
            output, state = forward(self, *args)
            return change(output), state

        return wrong

    return broken


def in_gradient(forward):
    """A forward that is right, with a wrong backward."""

    def wrong(self, x):
        output, state = forward(self, x)
        if output.requires_grad:
            output.register_hook(lambda grad: grad * 1.01)
        return output, state

    return wrong


def crashing(forward):
    def wrong(self, *args):
        raise RuntimeError("no such kernel")

    return wrong


BUGS = {
    "result": (in_result(lambda y: y + 0.01), "the output is wrong: its error", "is 1.0e-02"),
    "nan": (in_result(lambda y: y * torch.nan), "is wrong: its error", "is NaN or infinite"),
    "gradient": (in_gradient, "the grad of ", "allowed is 1e-04"),
    "crash": (crashing, "RuntimeError: no such kernel"),
}


def test_program():
    done = python("-m", "fastrnn")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    words = [fastrnn.__version__, torch.__version__, platform.python_version(), *CELLS]
    for word in [*words, *fastrnn.cpu_variants(), "OpenMP", "CUDA", "right"]:
        assert word in done.stdout


@pytest.mark.parametrize("variant", ["", "baseline"])
def test_json(variant):
    done = python("-m", "fastrnn", "--json", variant=variant)
    report = json.loads(done.stdout, parse_constant=pytest.fail)  # NaN is not JSON
    assert done.returncode == 0
    assert report["ok"] is True
    assert report["problems"] == []
    assert report["cpu"] == {
        "variant": variant or fastrnn.cpu_variants()[0],
        "variants": fastrnn.cpu_variants(),
        "why": f"FASTRNN_CPU={variant}" if variant else "the best of this CPU",
    }
    assert report["cuda"]["torch"] == torch.version.cuda
    assert list(report["checks"]) == CELLS
    for result in report["checks"].values():
        assert result["ok"] is True
        assert 0 <= result["error"] <= diagnostics.TOLERANCE
        assert result["speedup"] > 0


def test_unknown_variant():
    done = python("-m", "fastrnn", variant="pentium")
    assert done.returncode == 1
    assert "FASTRNN_CPU: expected one of" in done.stderr.splitlines()[-1]


def test_threads_are_as_before(run):
    threads = torch.get_num_threads()
    run()
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc on this system")
def test_openmp():
    openmp = diagnostics.openmp()
    assert openmp["threads"] == torch.get_num_threads()
    assert openmp["library"] == Path(openmp["path"]).name
    # The one that the kernels' own file resolves to: it is loaded, and torch brought it.
    assert openmp["path"] in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("json_wanted", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("cell", CELLS)
def test_wrong_kernel(run, monkeypatch, cell, bug, json_wanted):
    broken, *messages = BUGS[bug]
    layer = getattr(fastrnn, cell)
    monkeypatch.setattr(layer, "forward", broken(layer.forward))
    code, output, errors = run(*(["--json"] if json_wanted else []))
    assert code == 1
    assert len(errors) == 1
    for word in [f"python -m fastrnn: error: {cell}: ", *messages]:
        assert word in errors[0]
    if json_wanted:
        report = json.loads(output, parse_constant=pytest.fail)
        assert report["ok"] is False
        assert errors[0].endswith(report["problems"][0])
        assert {c: r["ok"] for c, r in report["checks"].items()} == {c: c != cell for c in CELLS}
    else:
        assert output.count("WRONG") == 1
        assert output.count("right") == 2


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_wrong_scan(run, name):
    def wrong(results):
        first, *rest = results
        return first + 0.01, *rest

    with wrapped(**{name: wrong}):
        code, output, errors = run()
    assert code == 1
    assert output.count("WRONG") == len(errors) == len(CELLS)


@pytest.mark.parametrize("devices", [0, 1])
def test_cuda_library_that_does_not_load(run, monkeypatch, devices):
    def refuse(name):
        raise ImportError(f"{name}: libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(fastrnn._load, "import_module", refuse)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"device {i}")
    code, output, errors = run()
    assert "fastrnn's library: cannot be loaded: " in output
    assert code == devices  # without a device nobody misses it
    assert len(errors) == devices


@pytest.mark.parametrize(
    ("driver", "text"),
    [(12080, "cannot be used: built for CUDA 13, the driver"), (13010, "loaded"), (0, "loaded")],
)
def test_cuda_library_newer_than_the_driver(run, monkeypatch, driver, text):
    library = SimpleNamespace(built_for=13000)
    monkeypatch.setattr(fastrnn._load, "import_module", lambda name: library)
    monkeypatch.setattr(fastrnn._load, "_driver_version", lambda: driver)
    assert f"fastrnn's library: {text}" in run()[1]
