"""examples/visualise.py: the right values, the right cells, and the text as it is, in colours."""

import html
import re

import pytest
import torch

import char_lm
import visualise

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = ["lstm", "gru", "rnn"]
BACKENDS = ["fastrnn", "torch"]
TEXT = "f(x) = \"<b>&amp; 'é' 李\"\n\n  # Ab cd\t[1]\n" * 40
ESCAPE = re.compile(r"\x1b\[[\d;]*m")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8", newline="\n")
    return file


@pytest.fixture
def checkpoint(text, tmp_path, capsys):
    """A file made by char_lm.py."""

    def train(cell="lstm"):
        file = tmp_path / "lm.pt"
        options = ["--batch=4", "--steps=8", "--embed=6", "--hidden=10", "--layers=2", "--sample=0"]
        options += [f"--text={text}", f"--cell={cell}", f"--checkpoint={file}", "--max-steps=30"]
        assert char_lm.main(options) == 0
        capsys.readouterr()
        return file

    return train


def load(file, backend):
    return visualise.load_model(
        visualise.make_parser().parse_args([f"--checkpoint={file}", f"--backend={backend}"])
    )


@pytest.mark.parametrize("cell", CELLS)
def test_values(checkpoint, cell):
    """Those of torch.nn, and their last ones are its final states."""
    file = checkpoint(cell)
    ours, theirs = (load(file, backend) for backend in BACKENDS)
    codes = char_lm.encode(TEXT[:70], ours.vocabulary)
    values = visualise.values(ours, codes)
    torch.testing.assert_close(values, visualise.values(theirs, codes), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        _, state = theirs(codes[:, None])
    last = state[1].tanh() if cell == "lstm" else state
    torch.testing.assert_close(values[:, -1], last[:, 0], rtol=1e-5, atol=1e-5)
    assert values.shape == (2, 70, 10)


def test_features():
    text = 'Ab ("c D") #e\n  f(\n\n"gH'
    known = visualise.features(text)

    def marks(name):
        return "".join("x" if yes else "." for yes in known[name].tolist())

    assert marks("inside quotes") == "....xxxx............xxx"
    assert marks("inside brackets") == "...xxxxxx........xx...."
    assert marks("after #") == "...........xx.........."
    assert marks("in a capitalised word") == "xx.....x..............."
    assert known["letters since the word began"].tolist()[:4] == [1, 2, 0, 0]
    assert known["characters since the line began"].tolist()[12:17] == [13, 0, 1, 2, 3]
    assert known["indentation"].tolist()[12:18] == [0, 0, 1, 2, 2, 2]


def test_interpretable():
    """Finds the cells that follow a feature, also upside down; none for what never varies."""
    torch.manual_seed(0)
    text = 'he said "no" and (then "yes") left\n' * 9
    known = visualise.features(text)
    cells = torch.randn(2, len(text), 5)
    cells[1, :, 3] = 0.2 - 0.5 * known["inside quotes"]
    cells[0, :, 4] = known["inside brackets"] + 0.5 * torch.randn(len(text))
    first, second, *rest = visualise.interpretable(cells, known)
    assert first[:3] == (1, 3, "inside quotes")
    assert first.correlation == pytest.approx(-1, abs=1e-4)
    assert second[:3] == (0, 4, "inside brackets")
    assert second.correlation > 0.5
    assert str(first) == "cell 2.3: inside quotes (r = -1.00)"
    assert not {"after #", "in a capitalised word"} & {cell.feature for cell in rest}
    shown = [abs(cell.correlation) for cell in rest]
    assert shown == sorted(shown, reverse=True)


def test_runs():
    value = torch.tensor([1.0, 0.99, -1.0, 0.01, 0.0])
    assert list(visualise.runs("abcde", value)) == [(16, "ab"), (-16, "c"), (0, "de")]


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_black_is_legible_on_every_shade():
    shades = [visualise.colour(shade) for shade in range(-visualise.SHADES, visualise.SHADES + 1)]
    assert shades[visualise.SHADES] == (255, 255, 255)
    assert len(set(shades)) == 2 * visualise.SHADES + 1
    assert all((luminance([c / 255 for c in rgb]) + 0.05) / 0.05 > 7 for rgb in shades)


@pytest.mark.parametrize("colours", ["24bit", "256"])
def test_on_terminal(colours):
    text = "a<b>\x1b[2Jü\n\nc"
    value = torch.linspace(-1, 1, len(text))
    painted = visualise.on_terminal(text, value, colours)
    assert re.sub(" \n", "\n", ESCAPE.sub("", painted)) == "a<b>�[2Jü\n\nc"
    last = {"24bit": "2;245;135;90", "256": "5;209"}[colours]
    assert painted.endswith(f"\x1b[30;48;{last}mc\x1b[0m")
    for line in painted.split("\n"):
        assert line.endswith("\x1b[0m")


@pytest.mark.parametrize(
    ("tty", "environment", "expected"),
    [
        (True, {"COLORTERM": "truecolor"}, "24bit"),
        (True, {}, "256"),
        (True, {"NO_COLOR": "1", "COLORTERM": "truecolor"}, "none"),
        (True, {"TERM": "dumb"}, "none"),
        (False, {"COLORTERM": "truecolor"}, "none"),
    ],
)
def test_terminal_colours(monkeypatch, tty, environment, expected):
    for name in ("COLORTERM", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(visualise.sys.stdout, "isatty", lambda: tty, raising=False)
    assert visualise.terminal_colours("auto") == expected
    assert visualise.terminal_colours("24bit") == "24bit"


def test_html():
    text = "\n<script>\"&amp;\x07'</script>\t李\n"
    value = torch.linspace(-1, 1, len(text))
    cells = [visualise.Cell(0, 1, "<f>", 0.5), visualise.Cell(1, 2)]
    page = visualise.as_html(text, cells, torch.stack((value, -value)), "a & b")
    assert re.findall("<h2>(.*)</h2>", page) == ["cell 1.1: &lt;f&gt; (r = +0.50)", "cell 2.2"]
    _, *parts = re.findall("<pre>(.*?)</pre>", page, re.DOTALL)
    for part in parts:  # whose first newline a browser leaves out
        assert html.unescape(re.sub("</?i[^>]*>", "", part)) == "\n" + text.replace("\x07", "�")
    assert "<i class=n16>\n</i>" in parts[0]
    assert "<i class=p16>\n</i>" in parts[1]
    assert set(re.findall("class=(\\w+)", page)) == set(re.findall("\\.(\\w+){b", page))
    assert not re.search("script>|https?:|url\\(|src=", page)


@pytest.mark.parametrize("backend", BACKENDS)
def test_run(checkpoint, text, tmp_path, capsys, backend):
    page = tmp_path / "cells.html"
    file = checkpoint()
    options = [f"--checkpoint={file}", f"--text={text}", f"--backend={backend}"]
    options += [f"--html={page}", "--length=50", "--colours=24bit"]
    assert visualise.main(options) == 0
    painted, *cells = re.split("^(?=cell )", capsys.readouterr().out, flags=re.MULTILINE)
    assert ESCAPE.sub("", painted).replace(" \n", "\n").rstrip("\n") == (TEXT[-50:].rstrip("\n"))
    assert len(cells) > 4
    assert [f"cell {c}" for c in re.findall("<h2>cell (.*)</h2>", page.read_text("utf-8"))] == [
        cell.strip() for cell in cells
    ]

    visualise.main([*options, "--cells", "2.9", "1.0"])
    model = load(file, backend)
    values = visualise.values(model, char_lm.encode(TEXT, model.vocabulary))[1, -50:, 9]
    painted = visualise.on_terminal(TEXT[-50:], values, "24bit")
    assert capsys.readouterr().out == f"{painted}\ncell 2.9\ncell 1.0\n"
    assert page.read_text("utf-8").count("<h2>") == 2

    visualise.main([*options, "--cells=1.0", "--colours=none"])
    assert capsys.readouterr().out == "cell 1.0\n"


def test_trains_without_a_checkpoint(tmp_path, capsys):
    file = tmp_path / "long.txt"
    file.write_text(TEXT * 3, encoding="utf-8")
    assert visualise.main([f"--text={file}", "--minutes=0.002"]) == 0
    output = capsys.readouterr().out
    assert "model: 1 x 256 lstm of fastrnn" in output
    assert "\ncell 1." in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cells=3.1"], "--cells 3.1: the model has 2 layers of 10 units, from 0"),
        (["--cells=1.10"], "--cells 1.10: the model has 2 layers"),
        (["--cells=0.1"], "0.1 is not LAYER.UNIT, such as 1.117"),
        (["--cells=x"], "x is not LAYER.UNIT"),
        (["--html=missing/a.html"], "cannot write missing/a.html: no such directory"),
        (["--checkpoint=missing.pt"], "No such file or directory: 'missing.pt'"),
        (["--checkpoint={}/text.txt"], "is not a checkpoint"),
        (["--text={}/other.txt"], "the model has not learnt the character 'q'"),
        (["--text={}/uniform.txt"], "too uniform to choose a cell by: use --cells"),
        (["--text={}/empty.txt"], "empty.txt is empty"),
    ],
)
def test_bad_arguments(checkpoint, text, tmp_path, capsys, options, message):
    for name, content in {"other": "q", "uniform": "=", "empty": ""}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    files = [f"--checkpoint={checkpoint()}", f"--text={text}"]
    with pytest.raises(SystemExit) as exit:
        visualise.main([*files, *(option.format(tmp_path) for option in options)])
    assert exit.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("visualise.py: error: ")
    assert line.count("\n") == 1
    assert message in line
