"""examples/tagging.py: both backends learn alike, and padding does not count."""

import importlib.util
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "tagging.py"
SPEC = importlib.util.spec_from_file_location("tagging", EXAMPLE)
tagging = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tagging)

BACKENDS = ["fastrnn", "torch"]
SIZES = ["--hidden=12", "--embed=12", "--char-hidden=6", "--char-embed=8"]
SMALL = [*SIZES, "--batch=8", "--lr=0.02", "--dropout=0.1"]
SENTENCE = [("the", "DET"), ("cat", "NOUN"), ("sits", "VERB"), ("!", "PUNCT")]


@pytest.fixture(autouse=True)
def one_thread():
    """Enough for models this small, and quick on a busy machine, where torch.nn's threads spin."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def conllu(sentences):
    """The sentences as a file's text, with lines that are no words among theirs."""
    text = ""
    for sentence in sentences:
        text += "# sent_id = 1\n1-2\tdon't" + "\t_" * 8 + "\n"
        for number, (word, tag) in enumerate(sentence, 1):
            text += "\t".join([str(number), word, "_", tag, *"______"]) + "\n"
        text += "1.1\tleft-out" + "\t_" * 8 + "\n\n"
    return text


@pytest.fixture
def files(tmp_path):
    """Two files of one language: its tag is in a word's ending or, for 'it', in the word before."""
    dice = random.Random(0)

    def sentence():
        words = []
        for _ in range(dice.randint(1, 7)):
            ending, tag = dice.choice([("ö", "NOUN"), ("ing", "VERB"), ("ly", "ADV")])
            words.append(("".join(dice.choices("bdgkmpt", k=dice.randint(1, 4))) + ending, tag))
            if dice.random() < 0.3:
                words.append(("it", "PRON" if tag == "VERB" else "X"))
        return words

    names = {"train": 120, "test": 40}
    for name, count in names.items():
        text = conllu(sentence() for _ in range(count))
        (tmp_path / f"{name}.conllu").write_text(text, encoding="utf-8")
    return [f"--{name}={tmp_path / name}.conllu" for name in names]


@pytest.fixture
def run(files, capsys):
    """Runs the program on `files` and returns (last loss, test accuracy, output)."""

    def run(*options):
        assert tagging.main([*files, *SMALL, *options]) == 0
        output = capsys.readouterr().out
        loss = re.search(r"last loss ([\d.]+)\n", output)[1]
        accuracy = re.search(r"test accuracy: ([\d.]+)%\n", output)[1]
        return float(loss), float(accuracy) / 100, output

    return run


def parse(files, *options):
    return tagging.make_parser().parse_args([*files, *SMALL, *options])


def losses_of(files, *options):
    """The loss of each training step."""
    args = parse(files, "--epochs=2", *options)
    sentences = tagging.read_sentences(args.train)
    torch.manual_seed(0)
    return tagging.train(tagging.Tagger(sentences, args), sentences, args)


@pytest.mark.parametrize("layers", [1, 2])
def test_backends_agree(files, layers):
    ours, theirs = (losses_of(files, f"--layers={layers}", f"--backend={b}") for b in BACKENDS)
    assert len(ours) == 30
    assert ours == pytest.approx(theirs, rel=0, abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_learns(run, backend):
    loss, accuracy, output = run("--epochs=8", f"--backend={backend}")
    assert loss < 0.3
    assert accuracy > 0.95  # of words most of which training has not seen
    assert "data: 120 sentences for training, 40 for the test" in output
    for tag in ["NOUN", "VERB", "ADV", "PRON", "X"]:
        assert f"\n{tag} " in output


def test_same_again(run):
    once, again, other = (run("--epochs=1", f"--seed={seed}") for seed in (0, 0, 1))
    assert once[:2] == again[:2]
    assert once[0] != other[0]


def test_minutes(run):
    assert (
        "model: 3 x 12 LSTM of torch" in run("--layers=3", "--backend=torch", "--minutes=0.002")[2]
    )


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_read_sentences(tmp_path, end):
    file = tmp_path / "a.conllu"
    file.write_bytes(conllu([SENTENCE, [("Ünal", "PROPN")]]).replace("\n", end).encode())
    assert tagging.read_sentences(file) == [SENTENCE, [("Ünal", "PROPN")]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sentence_has_its_scores_in_any_batch(files, backend):
    model = tagging.Tagger([SENTENCE], parse(files, f"--backend={backend}")).eval()
    sentences = [["the", "cat"], ["unheard-of", "Ünal", "!", "sits", "the"], ["!"]]
    scores = model(sentences)
    assert scores.shape == (5, 3, 4)
    for column, sentence in enumerate(sentences):
        alone = model([sentence])[:, 0]
        torch.testing.assert_close(scores[: len(sentence), column], alone, rtol=1e-5, atol=1e-5)


def test_targets(files):
    model = tagging.Tagger([SENTENCE], parse(files))
    unseen = [("o", "INTJ"), ("cat", "NOUN")]
    targets = model.targets([SENTENCE, unseen])
    assert model.tags == ["DET", "NOUN", "PUNCT", "VERB"]
    assert targets.tolist() == [[0, -1], [1, 1], [3, -1], [2, -1]]


def test_padding_does_not_count(files):
    """The loss of a batch is the mean over its words, however long its longest sentence is."""
    args = parse(files, "--dropout=0", "--hide=0", "--batch=2", "--epochs=1")
    batch = [SENTENCE, SENTENCE[:1]]

    def loss(sentences):
        torch.manual_seed(0)
        return tagging.train(tagging.Tagger(batch, args), sentences, args)[0]

    whole, long, short = loss(batch), loss(batch[:1]), loss(batch[1:])
    assert whole == pytest.approx((4 * long + short) / 5, rel=1e-5)


def test_evaluate(files):
    class Model(torch.nn.Module):
        tags = ("DET", "NOUN", "VERB")

        def forward(self, sentences):  # every word is a noun
            return torch.tensor([0.0, 1.0, 0.0]).expand(9, len(sentences), 3)

    result = tagging.evaluate(Model(), [SENTENCE, SENTENCE[:2], [("o", "INTJ")]])
    assert result == {
        "DET": (2, 0),
        "NOUN": (2, 2),
        "VERB": (1, 0),
        "PUNCT": (1, 0),
        "INTJ": (1, 0),
    }


def test_hidden_words(files):
    """In training rare words are hidden more often than frequent ones, in the test none."""
    args = parse(files, "--hide=1")
    model = tagging.Tagger([SENTENCE, *[SENTENCE[:1]] * 8], args)
    assert model.hide[0] == 0
    assert model.hide[model.words["the"]] == pytest.approx(1 / 10)
    assert model.hide[model.words["cat"]] == pytest.approx(1 / 2)


def test_help():
    done = subprocess.run(
        [sys.executable, "-Werror", EXAMPLE, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert done.returncode == 0, done.stderr
    for option in ["--train", "--test", "--backend", "--minutes", "--epochs"]:
        assert f"\n  {option} " in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden=0"], "--hidden: 0 is not in [1, inf)"),
        (["--backend=jax"], "invalid choice: 'jax'"),
        (["--minutes=1", "--epochs=2"], "not allowed with argument"),
        (["--test=missing.conllu"], "No such file or directory: 'missing.conllu'"),
    ],
)
def test_bad_arguments(files, capsys, options, message):
    with pytest.raises(SystemExit) as exit:
        tagging.main([*files, *SMALL, *options])
    assert exit.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("tagging.py: error: ")
    assert line.count("\n") == 1
    assert message in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "is not UTF-8 text"),
        (b"# nothing\n\n", "no sentences"),
        (b"1\tcat\t_\tNOUN\n", "line 1: expected 10 columns"),
        (b"\n1\t\t" + b"\t_" * 7, "line 2: expected 10 columns, none of them empty"),
    ],
)
def test_bad_files(files, tmp_path, capsys, content, message):
    file = tmp_path / "bad.conllu"
    file.write_bytes(content)
    with pytest.raises(SystemExit):
        tagging.main([*files, f"--train={file}"])
    assert message in capsys.readouterr().err


def test_missing_backend(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastrnn", None)
    with pytest.raises(SystemExit):
        tagging.main(files)
    assert "--backend fastrnn cannot" in capsys.readouterr().err
