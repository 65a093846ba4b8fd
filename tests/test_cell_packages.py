"""fastrnn.cells against those of other packages: xlstm, SpeechBrain and DyNet, where they are."""

import pytest
import torch
from torch.nn.functional import linear

from fastrnn import cells

STEPS, BATCH, INPUT, HIDDEN = 12, 3, 5, 7


def make(cls):
    torch.manual_seed(0)
    rnn, x = cls(INPUT, HIDDEN), torch.randn(STEPS, BATCH, INPUT)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.normal_(0, 0.5)
        return rnn, x, rnn(x)[0]


@torch.no_grad()
def test_slstm_is_that_of_xlstm():
    vanilla = pytest.importorskip("xlstm.blocks.slstm.src.vanilla.slstm")
    rnn, x, output = make(cells.SLSTM)
    states = torch.zeros(4, BATCH, HIDDEN)  # h, c, n, m
    for x_t, h in zip(x, output):
        own = linear(x_t, rnn.weight_ih_l0, rnn.bias_ih_l0)
        recurrent = linear(states[0], rnn.weight_hh_l0, rnn.bias_hh_l0)
        states, _ = vanilla.slstm_forward_pointwise(own, recurrent, torch.zeros(1), states, {})
        torch.testing.assert_close(h, states[0])


@torch.no_grad()
def test_ligru_is_that_of_speechbrain():
    theirs = pytest.importorskip("speechbrain.nnet.RNN", exc_type=(ImportError, OSError))
    rnn, x, output = make(cells.LiGRU)
    layer = theirs.LiGRU_Layer(INPUT, HIDDEN, 1, BATCH).eval()

    def turned(t):  # their candidate comes first
        return torch.cat(t.chunk(2)[::-1])

    layer.u.weight.copy_(turned(rnn.weight_hh_l0))
    own = linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0 + rnn.bias_hh_l0)
    by_batch = torch.cat(own.chunk(2, -1)[::-1], -1).transpose(0, 1)
    expected = layer._ligru_cell(by_batch, torch.zeros(BATCH, HIDDEN))
    torch.testing.assert_close(output, expected.transpose(0, 1))


def test_coupled_lstm_is_that_of_dynet():
    """Without its matrices on the cell state, which are none of this form."""
    dy = pytest.importorskip("dynet")
    rnn, x, output = make(cells.CoupledLSTM)
    collection = dy.ParameterCollection()  # which the builder does not keep alive
    builder = dy.CoupledLSTMBuilder(1, INPUT, HIDDEN, collection)
    (parameters,) = builder.get_parameters()

    def gate(name):
        i, g, o = zip(*(p.detach().chunk(3) for p in rnn.all_weights[0]))
        w_ih, w_hh, b_ih, b_hh = {"i": i, "g": g, "o": o}[name]
        return w_ih, w_hh, b_ih + b_hh

    none = torch.zeros(HIDDEN, HIDDEN)
    (i_x, i_h, i_b), (o_x, o_h, o_b) = gate("i"), gate("o")
    values = [i_x, i_h, none, i_b, o_x, o_h, none, o_b, *gate("g")]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.set_value(value.double().numpy())
    for b in range(BATCH):
        dy.renew_cg()
        state = builder.initial_state()
        for x_t, h in zip(x[:, b], output[:, b]):
            state = state.add_input(dy.inputVector(x_t.tolist()))
            torch.testing.assert_close(h, torch.tensor(state.output().vec_value()))
