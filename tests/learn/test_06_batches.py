"""Solutions to the exercises of docs/learn/06-batches.md."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn

LENGTHS = torch.tensor([5, 2, 7, 1])


def test_1_three_ways():
    gru, x = fastrnn.GRU(3, 4, num_layers=2, bidirectional=True), torch.randn(7, 4, 3)
    output, h_n = gru(x, lengths=LENGTHS)

    packed, packed_h = gru(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    torch.testing.assert_close(pad_packed_sequence(packed)[0], output)
    torch.testing.assert_close(packed_h, h_n)

    for b, length in enumerate(LENGTHS):
        alone, alone_h = gru(x[:length, b : b + 1])
        torch.testing.assert_close(output[:length, b], alone[:, 0])
        torch.testing.assert_close(h_n[:, b], alone_h[:, 0])
        assert (output[length:, b] == 0).all()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_2_by_indexing(bidirectional):
    """A forward layer has not read the padding yet; a reverse one begins with it."""
    gru, x = fastrnn.GRU(3, 4, bidirectional=bidirectional), torch.randn(7, 4, 3)
    right = gru(x, lengths=LENGTHS)[1]
    output, _ = gru(x)
    torch.testing.assert_close(output[LENGTHS - 1, range(4), :4], right[0])
    if bidirectional:
        full = LENGTHS == 7
        torch.testing.assert_close(output[0, full, 4:], right[1, full])
        assert not torch.isclose(output[0, ~full, 4:], right[1, ~full]).all(-1).any()


def test_3_nan_in_the_padding():
    gru, readout, x = fastrnn.GRU(3, 4), torch.nn.Linear(4, 2), torch.randn(7, 4, 3)
    mask = torch.arange(7).unsqueeze(1) < LENGTHS
    targets = torch.randint(2, (7, 4))
    poisoned = torch.where(mask.unsqueeze(-1), x, torch.nan)

    def gradients(x, **lengths):
        losses = cross_entropy(
            readout(gru(x, **lengths)[0]).transpose(1, 2), targets, reduction="none"
        )
        return torch.autograd.grad((losses * mask).sum() / mask.sum(), [*gru.parameters()])

    for ours, clean in zip(gradients(poisoned, lengths=LENGTHS), gradients(x, lengths=LENGTHS)):
        torch.testing.assert_close(ours, clean, rtol=0, atol=0)
    assert all(g.isnan().any() for g in gradients(poisoned))  # 0 * nan is nan
