"""examples/surnames.py: both backends learn alike, from names in any script."""

import importlib.util
import os
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "surnames.py"
SPEC = importlib.util.spec_from_file_location("surnames", EXAMPLE)
surnames = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(surnames)

BACKENDS = ["fastrnn", "torch"]
SMALL = ["--hidden=8", "--embed=8", "--batch=16", "--lr=0.02"]
ALPHABETS = {"Finnish": "aeiouyäö", "Greek": "αβγδεζηθ", "Polish": "śżłczwko"}


@pytest.fixture(autouse=True)
def one_thread():
    """Enough for models this small, and quick on a busy machine, where torch.nn's threads spin."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path):
    """A folder of three languages with letters of their own."""
    dice = random.Random(0)
    for language, letters in ALPHABETS.items():
        names = ("".join(dice.choices(letters, k=dice.randint(2, 9))) for _ in range(100))
        (tmp_path / f"{language}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(data, capsys):
    """Runs the program on `data` and returns (last loss, held-out accuracy, output)."""

    def run(*options):
        assert surnames.main([f"--data={data}", *SMALL, *options]) == 0
        output = capsys.readouterr().out
        loss = re.search(r"last loss ([\d.]+)\n", output)[1]
        accuracy = re.search(r"held-out accuracy: ([\d.]+)%\n", output)[1]
        return float(loss), float(accuracy) / 100, output

    return run


def losses_of(data, *options):
    """The loss of each training step."""
    args = surnames.make_parser().parse_args([f"--data={data}", *SMALL, "--epochs=2", *options])
    languages, training, _ = surnames.read_names(args.data)
    torch.manual_seed(0)
    model = surnames.Classifier("".join(ALPHABETS.values()), len(languages), args)
    return surnames.train(model, training, args)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_backends_agree(data, cell):
    ours, theirs = (losses_of(data, f"--cell={cell}", f"--backend={b}") for b in BACKENDS)
    assert len(ours) > 20
    assert ours == pytest.approx(theirs, rel=0, abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_learns(run, backend):
    loss, accuracy, output = run("--epochs=4", f"--backend={backend}")
    assert loss < 0.3
    assert accuracy > 0.9
    assert "data: 3 languages, " in output
    for language in ALPHABETS:
        assert f"\n{language} " in output


def test_same_again(run):
    once, again, other = run(), run(), run("--seed=1")
    assert once[:2] == again[:2]
    assert once[0] != other[0]


def test_minutes(run):
    assert "model: 2 x 8 gru of torch" in run("--layers=2", "--backend=torch", "--minutes=0.002")[2]


def test_split(data):
    languages, *sides = surnames.read_names(data)
    assert languages == sorted(ALPHABETS)
    training, held_out = ({name for name, _ in side} for side in sides)
    assert not training & held_out
    assert len(training) + len(held_out) == sum(map(len, sides))  # each name once
    assert 10 < len(held_out) < 50 < len(training)
    # Another file with the same names, twice each and in another order: the same side for each.
    lines = (data / "Greek.txt").read_text(encoding="utf-8").splitlines()
    (data / "Hellenic.txt").write_text("\n".join(sorted(lines * 2)), encoding="utf-8")
    for before, now in zip(sides, surnames.read_names(data)[1:]):
        assert [n for n, language in now if language == 2] == [n for n, i in before if i == 1]


def test_unicode(data):
    names = ["Żółć", "żółć", "İnönü", "Straße", "Ngũgĩ", "李", "O'Neál-Müller"]
    for name in names:
        composed, apart = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
        assert surnames.normal(f" {composed}\r") == surnames.normal(apart) == apart
    assert len({surnames.normal(name) for name in names}) == len(names)  # nothing is thrown away
    args = surnames.make_parser().parse_args([f"--data={data}", *SMALL])
    model = surnames.Classifier("abc", 3, args).eval()
    assert model(["abc", "李", "b"]).shape == (3, 3)  # a character it has never seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_name_has_its_scores_in_any_batch(data, backend):
    args = surnames.make_parser().parse_args([f"--data={data}", *SMALL, f"--backend={backend}"])
    model, names = surnames.Classifier("abcd", 3, args).eval(), ["a", "abcdabcd", "dcb", "bb"]
    alone = torch.cat([model([name]) for name in names])
    torch.testing.assert_close(model(names), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_weight_counts(data, backend):
    args = surnames.make_parser().parse_args([f"--data={data}", *SMALL, f"--backend={backend}"])
    model = surnames.Classifier("abc", 3, args)
    (model(["abc", "caab"]) * torch.arange(3.0)).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad.any(), name


def test_confusion(data):
    class Model(torch.nn.Module):
        def forward(self, names):
            return torch.eye(3)[[len(name) for name in names]]

    names = [("", 0), ("a", 0), ("b", 1), ("cc", 1), ("dd", 1)]
    counts = surnames.confusion(Model(), names, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 2], [0, 0, 0]]
    text = surnames.table(counts, ["Ay", "Bee", "Cee"]).splitlines()
    assert [line.split() for line in text] == [
        ["Ay", "Bee", "Cee", "names"],
        ["Ay", "50", "50", ".", "2"],
        ["Bee", ".", "33", "67", "3"],
        ["Cee", ".", ".", ".", "0"],
    ]


def test_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "confusion.png"
    run("--epochs=1", f"--picture={file}")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_no_matplotlib(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    *_, output = run("--epochs=1", f"--picture={tmp_path / 'confusion.png'}")
    assert "no matplotlib" in output
    assert "\nPolish " in output


def test_help():
    done = subprocess.run(
        [sys.executable, "-Werror", EXAMPLE, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert done.returncode == 0, done.stderr
    for option in ["--data", "--backend", "--minutes", "--epochs", "--picture"]:
        assert f"\n  {option} " in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden=0"], "--hidden: 0 is not in [1, inf)"),
        (["--cell=gnu"], "invalid choice: 'gnu'"),
        (["--minutes=-1"], "--minutes: -1 is not in [0, inf)"),
        (["--minutes=1", "--epochs=2"], "not allowed with argument"),
        (["--data=missing"], "missing: expected two or more files"),
        (["--picture=missing/a.png"], "cannot write missing/a.png: no such directory"),
    ],
)
def test_bad_arguments(data, capsys, options, message):
    with pytest.raises(SystemExit) as exit:
        surnames.main([f"--data={data}", *SMALL, *options])
    assert exit.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("surnames.py: error: ")
    assert line.count("\n") == 1
    assert message in line


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe", "is not UTF-8 text"), (b"\n", "too few names")]
)
def test_bad_files(tmp_path, capsys, content, message):
    for name in ("A.txt", "B.txt"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit):
        surnames.main([f"--data={tmp_path}"])
    assert message in capsys.readouterr().err


def test_missing_backend(data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastrnn", None)
    with pytest.raises(SystemExit):
        surnames.main([f"--data={data}"])
    assert "--backend fastrnn cannot" in capsys.readouterr().err
