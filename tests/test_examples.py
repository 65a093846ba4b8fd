"""What the programs in examples/ have in common: both backends learn alike, and are compared."""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import _common
import cell_search
import char_lm
import policy
import seq2seq
import stream
import surnames
import tagging
import truncation
import visualise
import word_lm
from example_data import write_names, write_pairs, write_sentences

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ["fastrnn", "torch"]
PROGRAMS = [cell_search, char_lm, policy, seq2seq, stream, surnames, tagging, truncation]
PROGRAMS += [visualise, word_lm]
MODULES = {module.__name__: module for module in PROGRAMS}
DATA = {
    "seq2seq": (write_pairs, ["--data={}/pairs.tsv"]),
    "surnames": (write_names, ["--data={}"]),
    "tagging": (write_sentences, ["--train={}/train.conllu", "--test={}/test.conllu"]),
}
SMALL = {
    "seq2seq": ["--hidden=12", "--embed=12", "--batch=16"],
    "surnames": ["--hidden=8", "--embed=8", "--batch=16"],
    "tagging": ["--hidden=12", "--embed=12", "--char-hidden=6", "--batch=8", "--dropout=0.1"],
}
ENOUGH = {"seq2seq": 25, "surnames": 4, "tagging": 8}  # epochs to learn the task
VARIANTS = [  # all that can be chosen about the layers
    ("seq2seq", "--layers=1"),
    ("seq2seq", "--layers=2"),
    ("surnames", "--cell=lstm"),
    ("surnames", "--cell=gru"),
    ("surnames", "--cell=rnn"),
    ("surnames", "--layers=2"),
    ("tagging", "--layers=1"),
    ("tagging", "--layers=2"),
]


class Result(NamedTuple):
    losses: dict[str, list[float]]  # of each step, by backend
    scores: dict[str, float]  # in the end, on what was held out
    output: str


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs a program on tiny data."""

    def run(name, *options):
        module, (write, files) = MODULES[name], DATA[name]
        write(tmp_path)
        seen = {}

        def report(trained, what, scores):
            seen.update(losses={k: t.losses for k, t in trained.items()}, scores=scores)
            _common.report(trained, what, scores)

        monkeypatch.setattr(module, "report", report)
        files = [file.format(tmp_path) for file in files]
        assert module.main([*files, *SMALL[name], "--lr=0.02", *options]) == 0
        return Result(**seen, output=capsys.readouterr().out)

    return run


@pytest.mark.parametrize(("name", "option"), VARIANTS)
def test_backends_agree(run, name, option):
    result = run(name, option, "--epochs=2", "--backend=both")
    ours, theirs = (result.losses[backend] for backend in BACKENDS)
    assert len(ours) > 20
    assert ours == pytest.approx(theirs, rel=0, abs=1e-4)
    assert result.scores["fastrnn"] == pytest.approx(result.scores["torch"], abs=0.03)


@pytest.mark.parametrize("name", DATA)
def test_both_are_what_each_is_alone(run, name):
    both = run(name, "--epochs=1", "--backend=both")
    for backend in BACKENDS:
        alone = run(name, "--epochs=1", f"--backend={backend}")
        assert alone.losses == {backend: both.losses[backend]}
        assert alone.scores == {backend: both.scores[backend]}
    lines = both.output.splitlines()[-3:]
    for line, backend in zip(lines, BACKENDS):
        assert re.match(rf"{backend}: \d+ steps in [\d.]+ seconds, last loss [\d.]+, ", line)
    assert re.fullmatch(r"a training step takes torch.nn [\d.]+ times as long .*", lines[2])


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("backend", BACKENDS)
def test_learns(run, name, backend):
    result = run(name, f"--epochs={ENOUGH[name]}", f"--backend={backend}")
    losses = result.losses[backend]
    assert sum(losses[-5:]) < sum(losses[:5]) / 3
    assert result.scores[backend] > 0.9
    assert "times as long" not in result.output


@pytest.mark.parametrize("name", DATA)
def test_same_again(run, name):
    once, again, other = (run(name, "--epochs=1", f"--seed={seed}") for seed in (0, 0, 1))
    assert once[:2] == again[:2]
    assert once.losses != other.losses


@pytest.mark.parametrize("name", DATA)
def test_minutes(run, name):
    result = run(name, "--layers=2", "--backend=torch", "--minutes=0.002")
    assert result.losses["torch"]


def test_training_is_in_turn():
    """Each batch goes to both models, which go first alternately and draw the same numbers."""
    calls = []

    class Model(torch.nn.Linear):
        def loss(self, batch):
            calls.append((self.name, batch, torch.rand(()).item()))
            return self(torch.ones(1)).sum()

    models = {}
    for name in BACKENDS:
        models[name] = Model(1, 1)
        models[name].name = name
    parser = _common.Parser("example.py", "")
    parser.training("items", batch=2, lr=0.1, epochs=2)
    trained = _common.train(models, list("abcd"), parser.parse_args([]))
    assert [name for name, *_ in calls] == ["fastrnn", "torch", "torch", "fastrnn"] * 2
    for (_, *one), (_, *other) in zip(calls[0::2], calls[1::2]):
        assert one == other
    assert len({drawn for *_, drawn in calls}) == 4
    assert sorted(calls[0][1] + calls[2][1]) == list("abcd")
    assert all(len(part) == 4 for training in trained.values() for part in training)


def test_report(capsys):
    """The ratio is that of the usual batch: one held up by something else does not count."""
    times = {"fastrnn": [1.0, 2.0, 3.0], "torch": [2.0, 90.0, 7.5]}
    trained = {name: _common.Training([0.5], seconds) for name, seconds in times.items()}
    _common.report(trained, "accuracy", {"fastrnn": 0.5, "torch": 0.25})
    assert capsys.readouterr().out.splitlines() == [
        "fastrnn: 1 steps in 6.0 seconds, last loss 0.500000, accuracy 50.00%",
        "torch: 1 steps in 99.5 seconds, last loss 0.500000, accuracy 25.00%",
        "a training step takes torch.nn 2.50 times as long as fastrnn (median)",
    ]


@pytest.mark.parametrize("name", MODULES)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as exit:
        MODULES[name].main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert text.isascii()  # for every terminal
    assert text.startswith(MODULES[name].__doc__.partition("\n")[0][:40])
    for action in MODULES[name].make_parser()._actions:
        assert action.help
        assert f"\n  {action.option_strings[-1]}" in text or action.dest == "help"


def test_stands_alone():
    """Without pytest's search path, and without a warning."""
    command = [sys.executable, "-Werror", visualise.__file__, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def refused(capsys, name, *options):
    """The one line on stderr with which a program refuses its arguments."""
    with pytest.raises(SystemExit) as exit:
        MODULES[name].main(list(options))
    assert exit.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"{name}.py: error: ")
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden=0"], "--hidden: 0 is not in [1, inf)"),
        (["--lr=nan"], "--lr: nan is not in [0, 10)"),
        (["--backend=jax"], "invalid choice: 'jax'"),
        (["--minutes=-1"], "--minutes: -1 is not in [0, inf)"),
        (["--minutes=1", "--epochs=2"], "not allowed with argument"),
    ],
)
def test_bad_arguments(capsys, name, options, message):
    assert message in refused(capsys, name, *options)


@pytest.mark.parametrize("name", DATA)
def test_missing_backend(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "fastrnn", None)
    write, files = DATA[name]
    write(tmp_path)
    line = refused(capsys, name, *(file.format(tmp_path) for file in files))
    assert "--backend fastrnn cannot be imported" in line


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe", "is not UTF-8 text"), (None, "No such file")]
)
def test_bad_files(tmp_path, capsys, name, content, message):
    write, files = DATA[name]
    write(tmp_path)
    file = min(tmp_path.iterdir())
    if content is None:
        file.unlink()
        file.symlink_to("missing")
    else:
        file.write_bytes(content)
    line = refused(capsys, name, *(f.format(tmp_path) for f in files))
    assert message in line
    assert file.name in line


def test_all_are_tested():
    here = Path(_common.__file__).parent
    assert {file.stem for file in here.glob("*.py")} == {*MODULES, "_common"}
