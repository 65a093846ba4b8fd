"""examples/cell_search.py: the tasks, what is compared, and what is wrong on the command line."""

import pytest
import torch

import cell_search

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--hidden=8", "--batch=8", "--lr=0.02"]


def test_adding():
    x, target = cell_search.adding(50, 9, torch.Generator().manual_seed(0))
    values, marks = x.unbind(-1)
    assert (marks.sum(0) == 2).all()
    assert (marks[:4].sum(0) == 1).all()
    torch.testing.assert_close((values * marks).sum(0), target)


def test_copying():
    x, target = cell_search.copying(7, 5, torch.Generator().manual_seed(0))
    codes = x.argmax(-1)
    assert codes.shape == (25, 7)
    assert (codes[:10] == target).all()
    assert (codes[10:15] == 8).all()
    assert (codes[15] == 9).all()
    assert (codes[16:] == 8).all()


@pytest.mark.parametrize(("task", "nothing"), [("adding", 0.1), ("copy", 1.9)])
def test_learns(task, nothing, capsys):
    options = [f"--task={task}", "--cells", "GRU", "Decay", "--steps=4", "--updates=400"]
    assert cell_search.main([*SMALL, *options]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["GRU", "Decay"]
    assert all(float(line.split()[2]) < nothing for line in lines)


def test_all_cells_get_the_same_batches(monkeypatch):
    seen = []
    draw = cell_search.adding

    def watched(*args):
        batch = draw(*args)
        seen.append(batch.x.double().sum().item())
        return batch

    task = cell_search.TASKS["adding"]._replace(draw=watched)
    monkeypatch.setitem(cell_search.TASKS, "adding", task)
    options = ["--cells", "LSTM", "GRU", "--steps=6", "--updates=3"]
    assert cell_search.main([*SMALL, *options]) == 0
    assert seen[:4] == seen[4:]
    assert len(set(seen)) == 4


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "cells.png"
    options = ["--cells", "LSTM", "GRU", "--steps=6", "--updates=30", f"--plot={file}"]
    assert cell_search.main([*SMALL, *options]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cells", "LSTMM"], "there is no LSTMM; there are LSTM, GRU, RNN, JANET"),
        (["--cells", "Model"], "there is no Model"),
        (["--plot=nowhere/a.png"], "no such directory"),
        (["--steps=1"], "1 is not in [2, inf)"),
    ],
)
def test_errors(options, message, capsys):
    with pytest.raises(SystemExit):
        cell_search.main(options)
    assert message in capsys.readouterr().err
