"""Solutions to the exercises of docs/learn/05-gates.md."""

import torch

import fastrnn


def gru_step(x, h, w_ih, w_hh, b_ih, b_hh):
    (x_r, x_z, x_n), (h_r, h_z, h_n) = (
        (x @ w_ih.T + b_ih).chunk(3, -1),
        (h @ w_hh.T + b_hh).chunk(3, -1),
    )
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    return (1 - z) * torch.tanh(x_n + r * h_n) + z * h


def gru_step_of_2014(x, h, w_ih, w_hh, b_ih, b_hh):
    x_r, x_z, x_n = (x @ w_ih.T + b_ih).chunk(3, -1)
    (w_r, w_z, w_n), (b_r, b_z, b_n) = w_hh.chunk(3), b_hh.chunk(3)
    r, z = torch.sigmoid(x_r + h @ w_r.T + b_r), torch.sigmoid(x_z + h @ w_z.T + b_z)
    return (1 - z) * torch.tanh(x_n + (r * h) @ w_n.T + b_n) + z * h


def test_1_two_grus():
    gru, x, h = fastrnn.GRU(3, 5), torch.randn(1, 2, 3), torch.randn(2, 5)
    _, h_n = gru(x, h.unsqueeze(0))
    torch.testing.assert_close(h_n[0], gru_step(x[0], h, *gru.parameters()))
    assert not torch.allclose(h_n[0], gru_step_of_2014(x[0], h, *gru.parameters()))

    # They agree when r is the same number for all units, and for a b_hn of zero. Here r is 1/2.
    with torch.no_grad():
        gru.weight_ih_l0[:5] = gru.weight_hh_l0[:5] = gru.bias_ih_l0[:5] = gru.bias_hh_l0[:5] = 0
        gru.bias_hh_l0[10:] = 0
    _, h_n = gru(x, h.unsqueeze(0))
    torch.testing.assert_close(h_n[0], gru_step_of_2014(x[0], h, *gru.parameters()))


def test_2_carousel():
    """Otherwise c reaches later gates through h, which adds other paths."""
    T, H = 20, 4
    lstm, x = fastrnn.LSTM(3, H), torch.randn(T, 1, 3)
    h, c = torch.zeros(1, 1, H), torch.randn(1, 1, H, requires_grad=True)

    def carried():
        _, (_, c_n) = lstm(x, (h, c))
        return torch.stack([torch.autograd.grad(c_n[0, 0, k], c, retain_graph=True)[0][0, 0]
                            for k in range(H)])  # fmt: skip

    with torch.no_grad():
        lstm.weight_ih_l0[H : 2 * H] = lstm.weight_hh_l0[H : 2 * H] = 0
    f = torch.sigmoid(lstm.bias_ih_l0 + lstm.bias_hh_l0)[H : 2 * H].detach()
    assert not torch.allclose(carried(), torch.diag(f**T), rtol=1e-3)  # by way of h, i and g
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
    torch.testing.assert_close(carried(), torch.diag(f**T))


def test_3_counter():
    """i and f are always open; g is +1 for an opening bracket, -1 for a closing one, else 0."""
    text = "(a(b)((c)))()d((("
    kinds = ["(", ")"]
    x = torch.tensor([[float(c == kind) for kind in kinds] for c in text]).unsqueeze(1)
    lstm = fastrnn.LSTM(2, 1)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
        lstm.bias_ih_l0[:2] = 40  # i, f
        lstm.weight_ih_l0[2] = torch.tensor([40.0, -40.0])  # g
    _, _, (cells,) = lstm(x, return_states=True)
    depth, depths = 0, []
    for c in text:
        depth += (c == "(") - (c == ")")
        depths.append(depth)
    torch.testing.assert_close(cells[:, 0, 0], torch.tensor(depths, dtype=torch.float64))
