"""examples/tagging.py: padding does not count, rare words are hidden, and files are read right."""

import pytest
import torch

import _common
import tagging
from example_data import conllu, write_sentences

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ["fastrnn", "torch"]
SMALL = ["--hidden=12", "--embed=12", "--char-hidden=6", "--char-embed=8"]
SENTENCE = [("the", "DET"), ("cat", "NOUN"), ("sits", "VERB"), ("!", "PUNCT")]


def tagger(sentences, *options, backend="fastrnn"):
    args = tagging.make_parser().parse_args(["--train=none", "--test=none", *SMALL, *options])
    return tagging.Tagger(_common.library(backend), sentences, args)


def test_output(tmp_path, capsys):
    write_sentences(tmp_path)
    files = [f"--{name}={tmp_path / name}.conllu" for name in ("train", "test")]
    tagging.main([*files, *SMALL, "--epochs=1"])
    output = capsys.readouterr().out
    assert "data: 120 sentences for training, 40 for the test" in output
    for tag in ["NOUN", "VERB", "ADV", "PRON", "X"]:
        assert f"\n{tag} " in output


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_read_sentences(tmp_path, end):
    file = tmp_path / "a.conllu"
    file.write_bytes(conllu([SENTENCE, [("Ünal", "PROPN")]]).replace("\n", end).encode())
    assert tagging.read_sentences(file) == [SENTENCE, [("Ünal", "PROPN")]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sentence_has_its_scores_in_any_batch(backend):
    model = tagger([SENTENCE], backend=backend).eval()
    sentences = [["the", "cat"], ["unheard-of", "Ünal", "!", "sits", "the"], ["!"]]
    scores = model(sentences)
    assert scores.shape == (5, 3, 4)
    for column, sentence in enumerate(sentences):
        alone = model([sentence])[:, 0]
        torch.testing.assert_close(scores[: len(sentence), column], alone, rtol=1e-5, atol=1e-5)


def test_targets():
    model = tagger([SENTENCE])
    unseen = [("o", "INTJ"), ("cat", "NOUN")]
    targets = model.targets([SENTENCE, unseen])
    assert model.tags == ["DET", "NOUN", "PUNCT", "VERB"]
    assert targets.tolist() == [[0, -1], [1, 1], [3, -1], [2, -1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_does_not_count(backend):
    """The loss of a batch is the mean over its words, however long its longest sentence is."""
    model = tagger([SENTENCE], backend=backend).eval()
    long, short = SENTENCE, SENTENCE[:1]
    whole, *alone = (model.loss(batch).item() for batch in ([long, short], [long], [short]))
    assert whole == pytest.approx((4 * alone[0] + alone[1]) / 5, rel=1e-5)


def test_evaluate():
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


def test_hidden_words():
    """In training rare words are hidden more often than frequent ones, in the test none."""
    model = tagger([SENTENCE, *[SENTENCE[:1]] * 8], "--hide=1", "--dropout=0")
    assert model.hide[0] == 0
    assert model.hide[model.words["the"]] == pytest.approx(1 / 10)
    assert model.hide[model.words["cat"]] == pytest.approx(1 / 2)

    def shown(times):
        return sum(torch.equal(model([["the"]]), seen) for _ in range(times))

    torch.manual_seed(0)
    seen = model.eval()([["the"]])
    assert shown(50) == 50
    model.train()
    assert 40 <= shown(50) < 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# nothing\n\n", "no sentences"),
        (b"1\tcat\t_\tNOUN\n", "line 1: expected 10 columns"),
        (b"\n1\t\t" + b"\t_" * 7, "line 2: expected 10 columns, none of them empty"),
    ],
)
def test_bad_files(tmp_path, capsys, content, message):
    file = tmp_path / "bad.conllu"
    file.write_bytes(content)
    with pytest.raises(SystemExit):
        tagging.main([f"--train={file}", f"--test={file}"])
    assert message in capsys.readouterr().err
