"""examples/seq2seq.py: numbers in words, teacher forcing, and decoding step by step."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import _common
import seq2seq

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ["fastrnn", "torch"]
PAIRS = [("ab", "BAAB"), ("a", "A"), ("bcaab", "CB"), ("ccc", "ABCABCC")]
SOURCES = [source for source, _ in PAIRS]


def translator(backend="fastrnn", layers=1):
    options = ["--hidden=6", "--embed=5", f"--layers={layers}"]
    torch.manual_seed(0)
    args = seq2seq.make_parser().parse_args(options)
    return seq2seq.Translator(_common.library(backend), PAIRS, args)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (15, "fifteen"),
        (18, "eighteen"),
        (20, "twenty"),
        (42, "forty-two"),
        (100, "one hundred"),
        (407, "four hundred seven"),
        (1000, "one thousand"),
        (300_000_099, "three hundred million ninety-nine"),
        (987_654_001, "nine hundred eighty-seven million six hundred fifty-four thousand one"),
    ],
)
def test_written_out(number, words):
    assert seq2seq.written_out(number) == words


def test_number_pairs():
    pairs = seq2seq.number_pairs(2000, seed=0)
    assert pairs == seq2seq.number_pairs(2000, seed=0) != seq2seq.number_pairs(2000, seed=1)
    assert len(dict(pairs)) == len(pairs) > 1000
    assert {len(source) for source, _ in pairs} == set(range(1, seq2seq.DIGITS + 1))
    assert len({target for _, target in pairs}) == len(pairs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layers", [1, 2])
def test_teacher_forcing_is_one_step_at_a_time(backend, layers):
    """The batch's loss, and what the decoder gives for each pair alone, character by character."""
    model = translator(backend, layers)
    losses = []
    with torch.no_grad():
        for source, target in PAIRS:
            memory, state = model.read([source])
            before = seq2seq.EDGE
            for after in [*(model.targets[char] for char in target), seq2seq.EDGE]:
                x = model.target_vectors(torch.tensor([[before]]))
                output, state = model.decoder(x, state)
                scores = model.scores(memory, output)[0]
                losses.append(cross_entropy(scores, torch.tensor([after])).item())
                before = after
    assert model.loss(PAIRS).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_has_its_translation_in_any_batch(backend):
    model = translator(backend)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(80):  # until it knows these by heart
        optimizer.zero_grad()
        model.loss(PAIRS).backward()
        optimizer.step()
    assert model(SOURCES) == [target for _, target in PAIRS]
    assert [model([source]) for source in SOURCES] == [[target] for _, target in PAIRS]
    for beam in (1, 3):
        assert model.search(SOURCES, beam) == [target for _, target in PAIRS]


def test_decoding_ends():
    """At the character that says so, else at twice the longest target."""
    model = translator()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()[model.targets["B"]] = 1
        assert model(SOURCES) == ["B" * 14] * 4
        model.head.bias[seq2seq.EDGE] = 2
        assert model(SOURCES) == [""] * 4


def test_attention_sees_no_padding():
    model = translator()
    memory, _ = model.read(["a", "bcaab"])
    output = torch.randn(3, 2, 12)
    scores = model.scores(memory, output)
    memory[0][1:, 0] = 1e6
    assert torch.equal(model.scores(memory, output), scores)
    memory[0][4, 1] = 1e6
    assert not torch.equal(model.scores(memory, output)[:, 1], scores[:, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_weight_counts(backend):
    model = translator(backend)
    model.loss(PAIRS).backward()
    for name, weight in model.named_parameters():
        assert weight.grad.any(), name


def test_unknown_characters():
    assert len(translator()(["Ж", "a李b"])) == 2


def test_read_pairs(tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_bytes("ż\tZ\r\na\tb c\nże\t\nż\tZ\n".encode())
    assert seq2seq.read_pairs(file) == [("a", "b c"), ("ż", "Z"), ("że", "")]


def test_ask(capsys):
    options = ["--count=60", "--hidden=4", "--epochs=1", "--batch=9"]
    assert seq2seq.main([*options, "--ask", "1984", "7"]) == 0
    output = capsys.readouterr().out
    assert "\n1984 -> " in output
    assert "\n7 -> " in output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tb\nc d\n", "line 2: expected SOURCE<tab>TARGET"),
        ("\tb\n", "line 1: expected SOURCE<tab>TARGET"),
        ("a\tb\n", "1 pairs are too few"),
        ("", "0 pairs are too few"),
    ],
)
def test_bad_files(tmp_path, capsys, content, message):
    file = tmp_path / "pairs.tsv"
    file.write_text(content)
    with pytest.raises(SystemExit):
        seq2seq.main([f"--data={file}"])
    assert message in capsys.readouterr().err


def test_nothing_asked(capsys):
    with pytest.raises(SystemExit):
        seq2seq.main(["--ask", ""])
    assert "--ask: a source must not be empty" in capsys.readouterr().err
