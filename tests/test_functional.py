"""fastrnn.functional: the functions equal the plain torch of their docstrings, and the modules."""

import inspect
import re

import pytest
import torch

import fastrnn
from fastrnn import functional as F
from helpers import CELLS, assert_close, inputs, make, make_mask, pack, unpack

T, B, I, H = 6, 4, 3, 5  # noqa: E741
FUNCTIONS = {"LSTM": F.lstm, "GRU": F.gru, "RNN_TANH": F.rnn_tanh, "RNN_RELU": F.rnn_relu}


def code_in(text: str) -> str:
    """The indented blocks of a docstring before its first section."""
    prose = re.split(r"\n(?:Args|Examples|Shapes):", inspect.cleandoc(text))[0]
    return "\n".join(line[4:] for line in prose.splitlines() if line.startswith("    "))


def documented(cell: str):
    """The function as the documentation has it: `run` of the module on its own step."""
    names: dict = {}
    for text in (F.__doc__, FUNCTIONS[cell].__doc__):
        exec(code_in(text), names)
    return lambda *args, **options: names["run"](names["step"], *args, **options)


def leaves(cell: str, **options):
    """A module, an input and states that want gradients, and its weights as a list."""
    model = make(fastrnn, cell, I, H, dtype=torch.float64, **options)
    x, hx = inputs(model, T, B)
    return x.requires_grad_(), tuple(s.requires_grad_() for s in unpack(hx)), [*model.parameters()]


def results(output, final, wanted):
    outputs = output, *unpack(final)
    loss = sum((t.sin() * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in outputs)
    return dict(enumerate((*outputs, *torch.autograd.grad(loss, wanted))))


SHAPES = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_the_documented_program(cell, options, masked):
    x, states, weights = leaves(cell, **options)
    mask = make_mask("holes", T, B) if masked else None
    given = {name: value for name, value in options.items() if name != "bias"}
    actual = FUNCTIONS[cell](x, pack(states), weights, mask=mask, **given)
    expected = documented(cell)(x, states, weights, mask=mask, **given)
    wanted = [x, *states, *weights]
    assert_close(results(*actual, wanted), results(*expected, wanted), 1e-11)


@pytest.mark.parametrize("bias", [False, True])
def test_projection(bias):
    x, states, weights = leaves("LSTM", bias=bias, proj_size=2, bidirectional=True)
    actual = F.lstm(x, states, weights, bidirectional=True)
    expected = documented("LSTM")(x, states, weights, bidirectional=True)
    wanted = [x, *states, *weights]
    assert_close(results(*actual, wanted), results(*expected, wanted), 1e-11)


CALLS = {
    "lengths": {"lengths": [4, 0, 6, 1]},
    "mask": {"mask": make_mask("left", T, B)},
    "reset": {"reset": torch.arange(T * B).view(T, B) % 3 == 1},
    "both": {"mask": make_mask("holes", T, B), "reset": torch.arange(T * B).view(T, B) % 3 == 1},
}


@pytest.mark.parametrize("checkpoint_every", [None, 2])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_as_the_module(cell, call, batch_first, checkpoint_every):
    layout = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    every = {} if cell.startswith("RNN") else {"checkpoint_every": checkpoint_every}
    model = make(fastrnn, cell, I, H, **layout, **every)
    x, hx = inputs(model, T, B)
    marks = {k: v.t() if batch_first and k != "lengths" else v for k, v in CALLS[call].items()}
    expected, final = model(x, hx, **marks)
    actual, own_final = FUNCTIONS[cell](x, hx, [*model.parameters()], **layout, **every, **marks)
    for ours, theirs in zip((actual, *unpack(own_final)), (expected, *unpack(final))):
        assert torch.equal(ours, theirs)
    gradients = [
        torch.autograd.grad(output.square().sum(), [*model.parameters()])
        for output in (actual, expected)
    ]
    assert all(map(torch.equal, *gradients))


def test_without_states():
    x, states, weights = leaves("GRU")
    zeros = pack(tuple(torch.zeros_like(s) for s in states))
    assert torch.equal(F.gru(x, None, weights)[0], F.gru(x, zeros, weights)[0])


def test_dropout():
    x, _, weights = leaves("RNN_TANH", num_layers=2)
    torch.manual_seed(0)
    dropped, _ = F.rnn_tanh(x, None, weights, num_layers=2, dropout=0.5)
    torch.manual_seed(0)
    model = fastrnn.RNN(I, H, 2, dropout=0.5, dtype=torch.float64)
    model.load_state_dict(dict(zip(model.state_dict(), weights)))
    torch.manual_seed(0)
    assert torch.equal(dropped, model(x)[0])
    assert not torch.equal(dropped, F.rnn_tanh(x, None, weights, num_layers=2)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell):
    model = make(fastrnn, cell, I, H)
    x, _ = inputs(model, T, B)
    with torch.autocast("cpu", torch.bfloat16):
        output, final = FUNCTIONS[cell](x, None, [*model.parameters()])
        expected, _ = model(x)
    assert output.dtype == unpack(final)[0].dtype == torch.bfloat16
    torch.testing.assert_close(output, expected.to(torch.bfloat16))


@pytest.mark.parametrize("cell", CELLS)
def test_compile(cell):
    """In one graph, with lengths too."""
    x, states, weights = leaves(cell)
    compiled = torch.compile(FUNCTIONS[cell], backend="eager", fullgraph=True)
    lengths = torch.tensor([4, 0, 6, 1])
    actual = compiled(x, pack(states), weights, lengths=lengths)
    expected = FUNCTIONS[cell](x, pack(states), weights, lengths=lengths)
    wanted = [x, *states, *weights]
    assert_close(results(*actual, wanted), results(*expected, wanted), 1e-11)


def test_weights_of_every_sample():
    """vmap over the weights, as of an ensemble, with a mask of each sample."""
    x, _, weights = leaves("GRU")
    stacked = [torch.stack([w, w / 2]).detach() for w in weights]
    masks = torch.stack([make_mask("holes", T, B, seed) for seed in (1, 2)])

    def run(mask, *weights):
        return F.gru(x, None, weights, mask=mask)[0]

    actual = torch.func.vmap(run)(masks, *stacked)
    for i in range(2):
        torch.testing.assert_close(actual[i], run(masks[i], *(w[i] for w in stacked)))


x = torch.zeros(T, B, I)
w = [torch.zeros(4 * H, I), torch.zeros(4 * H, H)]
ERRORS = [
    (lambda: F.lstm(x[0], None, w), r"x: expected a tensor \[T, B, I\], got \[4, 3\]"),
    (lambda: F.lstm(x[0], None, w, batch_first=True), r"x: expected a tensor \[B, T, I\]"),
    (lambda: F.lstm(x[:0], None, w), r"x: expected at least one step, got \[0, 4, 3\]"),
    (lambda: F.lstm(x, x, w), r"hx: expected \(h_0, c_0\) or None, got \[6, 4, 3\]"),
    (lambda: F.gru(x, (x,), [w[0][:15], w[1][:15]]), r"hx: expected h_0 .*, got a tuple of 1"),
    (lambda: F.lstm(x, (x, x), w), r"hx: expected h_0 of shape \[1, 4, 5\], got \[6, 4, 3\]"),
    (
        lambda: F.lstm(x, (torch.zeros(1, B, H), x), w),
        r"hx: expected c_0 of shape \[1, 4, 5\], got \[6, 4, 3\]",
    ),
    (lambda: F.lstm(x, None, w * 3), r"weights: expected 2 to 5 tensors for each of 1 .*, got 6"),
    (lambda: F.gru(x, None, [*w, w[0]]), r"weights: expected 2 or 4 tensors .*, got 3 in all"),
    (lambda: F.lstm(x, None, w, num_layers=2), r"weights: expected 2 to 5 .* 2 layers .*, got 2"),
    (lambda: F.lstm(x, None, [w[0], None]), r"weights\[1\]: expected a tensor, got NoneType"),
    (
        lambda: F.lstm(x, None, w * 2, num_layers=2),
        r"weights\[2\]: expected w_ih of shape \[20, 5\], got \[20, 3\]",
    ),
    (
        lambda: F.lstm(x, None, [*w, w[0]]),
        r"weights\[1\]: expected w_hh of shape \[20, 20\], got \[20, 5\]",
    ),
    (lambda: F.lstm(x, None, w, num_layers=0), "num_layers: expected an integer above 0, got 0"),
    (lambda: F.lstm(x, None, w, dropout=2), r"dropout: expected a number in \[0, 1\], got 2"),
    (lambda: F.lstm(x, None, w, checkpoint_every=-1), "checkpoint_every: expected .*, got -1"),
    (lambda: F.lstm(x, None, w, lengths=[7] * B), r"lengths: expected 4 integers .*, got 7"),
    (lambda: F.lstm(x, None, w, mask=x), r"mask: expected a bool or integer tensor"),
    (lambda: F.lstm(x, None, w, reset=x[0]), r"reset: expected a bool or integer tensor"),
    (
        lambda: F.lstm(x, None, w, lengths=[1] * B, mask=torch.ones(T, B).bool()),
        "lengths, mask: expected one of them, got both",
    ),
    (lambda: F.lstm(x.double(), None, w), r"weight_ih: expected a torch.float64 tensor"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[text[:30] for _, text in ERRORS])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
