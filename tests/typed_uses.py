"""Uses of the public interface: test_types.py has mypy check them, and runs them.

A wrong use is marked with the error that mypy has to report; an unused mark is an error, too.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import fastrnn

Pair = tuple[Tensor, Tensor]

x = torch.randn(5, 3, 8)
packed = pack_sequence([torch.randn(4, 8), torch.randn(2, 8)])
valid = torch.ones(5, 3, dtype=torch.bool)

lstm = fastrnn.LSTM(8, 16, num_layers=2, batch_first=False, checkpoint_every=2)
h, c = torch.zeros(2, 3, 16), torch.zeros(2, 3, 16)
assert_type(lstm(x), tuple[Tensor, Pair])
assert_type(lstm(x, (h, c), mask=valid, reset=~valid), tuple[Tensor, Pair])
assert_type(lstm(x, lengths=[5, 0, 2], return_states=True), tuple[Tensor, Pair, tuple[Tensor, ...]])
assert_type(lstm(packed), tuple[PackedSequence, Pair])
assert_type(
    lstm(packed, return_states=True), tuple[PackedSequence, Pair, tuple[PackedSequence, ...]]
)

gru = fastrnn.GRU(8, 16, 2, True, bidirectional=True, dtype=torch.float32, device="cpu")
rnn = fastrnn.RNN(8, 16, 2, "relu", bias=False)
for layer in (gru, rnn):
    assert_type(layer(x), Pair)
    assert_type(
        layer.forward(x, None, return_states=True), tuple[Tensor, Tensor, tuple[Tensor, ...]]
    )
    assert_type(layer(packed), tuple[PackedSequence, Tensor])

for flag in (False, True):
    result = gru(x, return_states=flag)
    assert_type(result, Pair | tuple[Tensor, Tensor, tuple[Tensor, ...]])

assert_type(fastrnn.LSTMCell(8, 16)(x[0]), Pair)
assert_type(fastrnn.GRUCell(8, 16)(x[0]), Tensor)
assert_type(fastrnn.RNNCell(8, 16, nonlinearity="relu")(x[0]), Tensor)

weights = [torch.randn(64, 8), torch.randn(64, 16)]
assert_type(fastrnn.functional.lstm(x, None, weights, lengths=[5, 0, 2]), tuple[Tensor, Pair])
assert_type(fastrnn.functional.gru(x, None, [w[:48] for w in weights]), Pair)

state = lstm.initial_state(batch=3)
assert_type(state, fastrnn.State)
assert_type(state.add_input(x[0]).output(), Tensor)
assert_type(fastrnn.freeze(gru.eval()), fastrnn.GRU)
assert_type(fastrnn.cpu_variant(), str)


def wrong() -> None:
    """Never run."""
    fastrnn.LSTM(8, 16, checkpoint=2)  # type: ignore[call-overload]
    fastrnn.LSTM("8", 16)  # type: ignore[call-overload]
    fastrnn.GRU(8, 16, proj_size=4)  # type: ignore[call-overload]
    lstm(x, h)  # type: ignore[call-overload]
    gru(x, (h, c))  # type: ignore[call-overload]
    gru(x, lengths="5")  # type: ignore[arg-type]
    gru(x, return_states=1)  # type: ignore[call-overload]
    _output, _state, _states = gru(x)  # type: ignore[misc]
    fastrnn.functional.lstm(x, h, weights)  # type: ignore[arg-type]
