"""examples/surnames.py: names in any script, and what is told of the result."""

import sys
import unicodedata

import pytest
import torch

import _common
import surnames
from example_data import ALPHABETS, write_names

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ["fastrnn", "torch"]
SMALL = ["--hidden=8", "--embed=8"]


@pytest.fixture
def data(tmp_path):
    write_names(tmp_path)
    return tmp_path


def classifier(characters, backend="fastrnn"):
    args = surnames.make_parser().parse_args(["--data=none", *SMALL])
    return surnames.Classifier(_common.library(backend), characters, 3, args)


def test_output(data, capsys):
    surnames.main([f"--data={data}", *SMALL, "--epochs=1"])
    output = capsys.readouterr().out
    assert "data: 3 languages, " in output
    for language in ALPHABETS:
        assert f"\n{language} " in output


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


def test_unicode():
    names = ["Żółć", "żółć", "İnönü", "Straße", "Ngũgĩ", "李", "O'Neál-Müller"]
    for name in names:
        composed, apart = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
        assert surnames.normal(f" {composed}\r") == surnames.normal(apart) == apart
    assert len({surnames.normal(name) for name in names}) == len(names)  # nothing is thrown away
    assert classifier("abc")(["abc", "李", "b"]).shape == (3, 3)  # a character it has never seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_name_has_its_scores_in_any_batch(backend):
    model, names = classifier("abcd", backend).eval(), ["a", "abcdabcd", "dcb", "bb"]
    alone = torch.cat([model([name]) for name in names])
    torch.testing.assert_close(model(names), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_weight_counts(backend):
    model = classifier("abc", backend)
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


@pytest.fixture
def picture(data, tmp_path):
    """Runs the program with --picture; returns the file that is asked for."""

    def run():
        file = tmp_path / "confusion.png"
        surnames.main([f"--data={data}", *SMALL, "--epochs=1", f"--picture={file}"])
        return file

    return run


def test_picture(picture):
    pytest.importorskip("matplotlib")
    assert picture().read_bytes().startswith(b"\x89PNG")


def test_no_matplotlib(picture, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not picture().exists()
    output = capsys.readouterr().out
    assert "no matplotlib" in output
    assert "\nPolish " in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cell=gnu"], "invalid choice: 'gnu'"),
        (["--data=missing"], "missing: expected two or more files"),
        (["--picture=missing/a.png"], "cannot write missing/a.png: no such directory"),
    ],
)
def test_bad_arguments(data, capsys, options, message):
    with pytest.raises(SystemExit):
        surnames.main([f"--data={data}", *options])
    assert message in capsys.readouterr().err


def test_no_names(tmp_path, capsys):
    for name in ("A.txt", "B.txt"):
        (tmp_path / name).write_bytes(b"\n")
    with pytest.raises(SystemExit):
        surnames.main([f"--data={tmp_path}"])
    assert "too few names" in capsys.readouterr().err
