"""examples/word_lm.py: both backends learn alike, and it goes on where it stopped."""

import random
import re

import pytest
import torch

import word_lm

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--batch=4", "--steps=10", "--hidden=12", "--embed=8", "--layers=2"]


@pytest.fixture
def text(tmp_path):
    """Sentences in which each word says what comes next."""
    dice = random.Random(0)
    lines = []
    for _ in range(150):
        animal = dice.choice(["cat", "dog", "owl"])
        sound = {"cat": "purrs", "dog": "barks", "owl": "hoots"}[animal]
        lines.append(f"The {animal} {sound}, and nobody listens.")
    file = tmp_path / "text.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def losses(file) -> list[list[float]]:
    return [[float(v) for v in line.split(",")[1:]] for line in file.read_text().splitlines()[1:]]


def perplexities(output: str) -> dict[str, float]:
    return {n: float(p) for n, p in re.findall(r"(\w+): test perplexity ([\d.]+)", output)}


def test_words():
    assert word_lm.split("Don't go, Ann!\n\n  Why?") == [
        *("don't", "go", ",", "ann", "!", "<eos>", "why", "?", "<eos>")
    ]  # fmt: skip


def test_both_backends_learn_alike(text, tmp_path, capsys):
    file = tmp_path / "losses.csv"
    options = [f"--text={text}", "--backend=both", "--epochs=3", "--dropout=0.2"]
    assert word_lm.main([*options, *SMALL, f"--losses={file}", "--lr=0.02"]) == 0
    each = torch.tensor(losses(file))
    torch.testing.assert_close(each[:, 0], each[:, 1], rtol=1e-3, atol=1e-3)
    assert each[-1, 0] < 0.5 * each[0, 0]
    found = perplexities(capsys.readouterr().out)
    assert found.keys() == {"fastrnn", "torch"}
    assert max(found.values()) < 6


def test_it_goes_on(text, tmp_path, capsys):
    """With the whole recipe: two epochs at once, or one after the other."""
    results = []
    options = [f"--text={text}", *SMALL, "--recipe=awd", "--averaging", "--write=5"]
    for name, runs in (("whole", [2]), ("parts", [1, 2])):
        checkpoint = tmp_path / f"{name}.pt"
        for epochs in runs:
            resume = ["--resume"] if epochs > runs[0] else []
            more = [f"--epochs={epochs}", f"--checkpoint={checkpoint}", *resume]
            assert word_lm.main([*options, *more]) == 0
        results.append(torch.load(checkpoint, weights_only=True)["trainers"]["fastrnn"]["model"])
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    assert len(capsys.readouterr().out.splitlines()) > 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend=torch", "--recipe=awd"], "--weight-dropout: torch.nn.LSTM has none"),
        (["--batch=5000"], "too few"),
        ([*SMALL, "--resume"], "--resume needs --checkpoint FILE"),
        (["--dropout=1"], "1 is not in [0, 1.0)"),
    ],
)
def test_errors(text, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        word_lm.main([f"--text={text}", *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
