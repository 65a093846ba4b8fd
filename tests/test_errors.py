"""Bad input: what torch.nn says, word for word, and ValueErrors that name both sides for masks."""

import ast
import re
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from helpers import inputs, make, make_mask

CLASSES = ["LSTM", "GRU", "RNN"]


def outcome(call) -> tuple[type, str] | None:
    """Type and text of the exception, or of the warning; older torch lets some calls pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:
            return type(error), str(error)
    return (caught[0].category, str(caught[0].message)) if caught else None


BAD_CONSTRUCTION = [
    {"dropout": 1.5},
    {"dropout": -0.1},
    {"dropout": True},
    {"dropout": "0.5"},
    {"dropout": 0.5},  # one layer: a warning
    {"bias": 1},
    {"batch_first": 0},
    {"input_size": 3.0},
    {"input_size": 0},
    {"hidden_size": "4"},
    {"hidden_size": -1},
    {"num_layers": 0},
    {"proj_size": -1},
    {"proj_size": 4},
    {"nonlinearity": "sigmoid"},
    {"dropout": 2, "bias": 1, "input_size": 0},  # the first check in torch's order wins
    {"batch_first": 0, "hidden_size": 0},
]


@pytest.mark.parametrize("options", BAD_CONSTRUCTION, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_construction(name, options):
    if "nonlinearity" in options and name != "RNN":
        pytest.skip("an option of RNN")
    sizes = {"input_size": 3, "hidden_size": 4} | options
    ours, theirs = (outcome(lambda lib=lib: getattr(lib, name)(**sizes)) for lib in (fastrnn, nn))
    assert ours == theirs


def zeros(*shape: int, dtype: torch.dtype = torch.float32):
    return torch.zeros(shape, dtype=dtype)


def state(model, *shape: int):
    return (zeros(*shape), zeros(*shape)) if model.mode == "LSTM" else zeros(*shape)


def packed(size: int = 3):
    return pack_padded_sequence(zeros(5, 2, size), [5, 2])


# for LSTM(3, 4, num_layers=1, bidirectional=True) and its kin; input [5, 2, 3]
BAD_CALLS = {
    "1-D input": lambda m: m(zeros(5)),
    "4-D input": lambda m: m(zeros(5, 2, 3, 1)),
    "input size": lambda m: m(zeros(5, 2, 7)),
    "input size, unbatched": lambda m: m(zeros(5, 7)),
    "no steps": lambda m: m(zeros(0, 2, 3)),
    "no steps, unbatched": lambda m: m(zeros(0, 3)),
    "no steps, hx": lambda m: m(zeros(0, 2, 3), state(m, 2, 2, 4)),
    "input dtype": lambda m: m(zeros(5, 2, 3, dtype=torch.float64)),
    "integer input": lambda m: m(zeros(5, 2, 3, dtype=torch.int64)),
    "input dtype and size": lambda m: m(zeros(5, 2, 7, dtype=torch.float64)),
    "2-D hx": lambda m: m(zeros(5, 2, 3), state(m, 2, 4)),
    "3-D hx, unbatched": lambda m: m(zeros(5, 3), state(m, 2, 1, 4)),
    "hx batch": lambda m: m(zeros(5, 2, 3), state(m, 2, 3, 4)),
    "hx layers": lambda m: m(zeros(5, 2, 3), state(m, 1, 2, 4)),
    "hx size": lambda m: m(zeros(5, 2, 3), state(m, 2, 2, 5)),
    "hx size, unbatched": lambda m: m(zeros(5, 3), state(m, 2, 5)),
    "input and hx size": lambda m: m(zeros(5, 2, 7), state(m, 2, 2, 5)),
}
BAD_LSTM_CALLS = {
    "one 3-D state": lambda m: m(zeros(5, 2, 3), zeros(2, 2, 4)),
    "2-D c_0": lambda m: m(zeros(5, 2, 3), (zeros(2, 2, 4), zeros(2, 4))),
    "c_0 size": lambda m: m(zeros(5, 2, 3), (zeros(2, 2, 4), zeros(2, 2, 3))),
    "c_0 batch": lambda m: m(zeros(5, 2, 3), (zeros(2, 2, 4), zeros(2, 1, 4))),
    "three states": lambda m: m(zeros(5, 2, 3), (zeros(2, 2, 4),) * 3),
}
# torch's LSTM leaves these to its kernels
BAD_PACKED_CALLS = {
    "input size": lambda m: m(packed(7)),
    "input dtype": lambda m: m(packed().double()),
    "hx batch": lambda m: m(packed(), state(m, 2, 3, 4)),
    "hx size": lambda m: m(packed(), state(m, 2, 2, 5)),
    "hx layers": lambda m: m(packed(), state(m, 1, 2, 4)),
}
CALLS = [(name, bad) for name in CLASSES for bad in BAD_CALLS.values()]
CALLS += [("LSTM", bad) for bad in BAD_LSTM_CALLS.values()]
CALLS += [(name, bad) for name in ("GRU", "RNN") for bad in BAD_PACKED_CALLS.values()]
IDS = [f"{name}: {bad}" for name in CLASSES for bad in BAD_CALLS]
IDS += [f"LSTM: {bad}" for bad in BAD_LSTM_CALLS]
IDS += [f"{name}, packed: {bad}" for name in ("GRU", "RNN") for bad in BAD_PACKED_CALLS]


@pytest.mark.parametrize(("name", "bad"), CALLS, ids=IDS)
def test_call(name, bad):
    ours, theirs = (getattr(lib, name)(3, 4, bidirectional=True) for lib in (fastrnn, nn))
    assert outcome(lambda: bad(ours)) == outcome(lambda: bad(theirs))


@pytest.mark.parametrize("bad", BAD_PACKED_CALLS.values(), ids=BAD_PACKED_CALLS)
def test_packed_lstm_is_checked_as_a_padded_one(bad):
    """torch's own LSTM skips the checks here and fails in a kernel, if it fails at all."""
    kind, text = outcome(lambda: bad(fastrnn.LSTM(3, 4, bidirectional=True)))
    expected, like = outcome(lambda: bad(nn.GRU(3, 4, bidirectional=True)))
    assert kind is expected
    assert text.replace("hidden[0]", "hidden") == like


def test_batch_first_messages():
    ours, theirs = (lib.GRU(3, 4, batch_first=True) for lib in (fastrnn, nn))
    for bad in (lambda m: m(zeros(2, 0, 3)), lambda m: m(zeros(2, 5, 3), zeros(1, 5, 4))):
        assert outcome(lambda: bad(ours)) == outcome(lambda: bad(theirs))  # noqa: B023


@pytest.mark.parametrize("name", CLASSES)
def test_state_of_another_dtype(name):
    """torch fails in its kernels, each with a text of its own; the type is RuntimeError."""
    model = getattr(fastrnn, name)(3, 4)
    hx = zeros(1, 2, 4, dtype=torch.float64)
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)dtype|float64|double"):
        model(zeros(5, 2, 3), (hx, hx) if name == "LSTM" else hx)


# keyword, value, what the message must name; T = 5, B = 2
BAD_MASKS = [
    ("lengths", [5, 2, 1], ["2", "3"]),
    ("lengths", torch.tensor([5]), ["2", "1"]),
    ("lengths", torch.tensor([[5, 2]]), ["2", r"\[1, 2\]|\(1, 2\)"]),
    ("lengths", torch.tensor(5), ["2", r"\[\]|\(\)|0-D"]),
    ("lengths", torch.tensor([5.0, 2.0]), ["integers", "float32"]),
    ("lengths", torch.tensor([True, True]), ["integers", "bool"]),
    ("lengths", [5.0, 2.5], ["integers", r"float|5\.0|2\.5"]),
    ("lengths", [5, True], ["integers", "bool"]),
    ("lengths", numpy.array([5.0, 2.0]), ["integers", "float64"]),
    ("lengths", numpy.array([5, 6], "int32"), ["6", "5"]),
    ("lengths", 5, ["2", "int|5"]),
    ("lengths", [5, -1], ["-1", "5"]),
    ("lengths", torch.tensor([-7, 5]), ["-7", "5"]),
    ("lengths", [6, 2], ["6", "5"]),
    ("lengths", torch.tensor([2, 999]), ["999", "5"]),
    ("mask", torch.ones(2, 5).bool(), [r"[\[(]5, 2[\])]", r"[\[(]2, 5[\])]"]),
    ("mask", torch.ones(5).bool(), [r"[\[(]5, 2[\])]", r"\[5\]|\(5,\)"]),
    ("mask", torch.ones(5, 2, 1).bool(), [r"[\[(]5, 2[\])]", r"[\[(]5, 2, 1[\])]"]),
    ("mask", torch.ones(5, 3).bool(), [r"[\[(]5, 2[\])]", r"[\[(]5, 3[\])]"]),
    ("mask", torch.ones(5, 2), ["bool", "float32", "write mask != 0"]),
    ("mask", numpy.ones((5, 2)), ["bool", "float64", "write mask != 0"]),
    ("mask", torch.ones(5, 3).int(), [r"[\[(]5, 2[\])]", r"[\[(]5, 3[\])]"]),
    ("mask", [[True] * 2] * 5, ["[tT]ensor", "list"]),
]


@pytest.mark.parametrize(("keyword", "value", "named"), BAD_MASKS)
def test_wrong_mask(cell, keyword, value, named):
    model = make(fastrnn, cell, 3, 4)
    with pytest.raises(ValueError, match=keyword) as caught:
        model(zeros(5, 2, 3), **{keyword: value})
    for pattern in named:
        assert re.search(rf"(?<![\w-])(?:{pattern})(?!\w)", str(caught.value)), pattern


def test_wrong_mask_with_batch_first(cell):
    model = make(fastrnn, cell, 3, 4, batch_first=True)
    with pytest.raises(ValueError, match=r"mask.*[\[(]2, 5[\])].*[\[(]5, 2[\])]"):
        model(zeros(2, 5, 3), mask=torch.ones(5, 2).bool())
    with pytest.raises(ValueError, match=r"lengths.*[06].*5|lengths.*5.*6"):
        model(zeros(2, 5, 3), lengths=[5, 6])


def test_wrong_unbatched_mask(cell):
    model = make(fastrnn, cell, 3, 4)
    with pytest.raises(ValueError, match="mask"):
        model(zeros(5, 3), mask=torch.ones(5, 2).bool())
    with pytest.raises(ValueError, match="mask"):
        model(zeros(5, 3), mask=torch.ones(4).bool())


def test_lengths_and_mask_exclude_each_other(cell):
    model = make(fastrnn, cell, 3, 4)
    with pytest.raises(ValueError, match=r"lengths.*mask|mask.*lengths"):
        model(zeros(5, 2, 3), lengths=[5, 2], mask=torch.ones(5, 2).bool())


@pytest.mark.parametrize("masks", [{"lengths": [5, 2]}, {"mask": torch.ones(5, 2).bool()}], ids=str)
def test_masks_exclude_a_packed_sequence(cell, masks):
    with pytest.raises(ValueError, match="PackedSequence"):
        make(fastrnn, cell, 3, 4)(packed(), **masks)


def test_masks_are_keyword_only(cell):
    with pytest.raises(TypeError):
        make(fastrnn, cell, 3, 4)(zeros(5, 2, 3), None, [5, 2])


def test_input_is_checked_before_the_mask(cell):
    """A mask does not hide torch's own message about the input."""
    ours, theirs = (make(lib, cell, 3, 4) for lib in (fastrnn, nn))
    expected = outcome(lambda: theirs(zeros(5, 2, 7)))
    assert outcome(lambda: ours(zeros(5, 2, 7), lengths=[5, 2])) == expected
    expected = outcome(lambda: theirs(zeros(5)))
    assert outcome(lambda: ours(zeros(5), lengths=[5, 2])) == expected


def test_a_failed_call_leaves_the_model_usable(cell):
    model = make(fastrnn, cell, 3, 4)
    x, hx = inputs(model, 5, 3)
    mask = make_mask("holes", 5, 3)
    before, _ = model(x, hx, mask=mask)
    with pytest.raises(ValueError, match="mask"):
        model(x, hx, mask=mask[1:])
    after, _ = model(x, hx, mask=mask)
    assert torch.equal(before, after)


# -- The texts of ValueErrors, in the sources ------------------------------------------------------

PACKAGE = Path(__file__).parents[1] / "python" / "fastrnn"
OTHERS = (
    "Expected input to be 2D or 3D",  # torch's own
    "Unknown nonlinearity",
    "proj_size argument is only supported",
    "A cell may use",  # of a line of the user's function
)
# An argument's name, or an expression that gives it; what was expected; what came.
FORM = re.compile(r"[\w.{}\[\], ]+: expected .*\bgot\b.*", re.DOTALL)


def texts_of_value_errors() -> dict[str, str]:
    texts = {}
    for path in sorted(PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "ValueError":
                (text,) = node.args
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                texts[f"{path.name}:{node.lineno}"] = "".join(
                    part.value if isinstance(part, ast.Constant) else "{}" for part in parts
                )
    return texts


def test_value_errors_name_the_argument_and_both_sides():
    texts = texts_of_value_errors()
    assert len(texts) > 50
    ours = {w: text for w, text in texts.items() if not any(other in text for other in OTHERS)}
    assert not {where: text for where, text in ours.items() if not FORM.fullmatch(text)}
