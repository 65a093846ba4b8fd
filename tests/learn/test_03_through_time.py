"""Solutions to the exercises of docs/learn/03-through-time.md."""

from itertools import pairwise

import torch

import fastrnn


def test_1_by_hand():
    T, B, I, H = 9, 3, 4, 5
    rnn, x, g = fastrnn.RNN(I, H), torch.randn(T, B, I), torch.randn(T, B, H)
    output, _ = rnn(x)
    (output * g).sum().backward()  # g[t] is the gradient of step t's own loss

    h = output.detach()
    w_hh = rnn.weight_hh_l0.detach()
    from_later = torch.zeros(B, H)
    d_ih, d_hh, d_b = torch.zeros(H, I), torch.zeros(H, H), torch.zeros(H)
    for t in reversed(range(T)):
        delta = (1 - h[t] ** 2) * (g[t] + from_later)
        d_ih += delta.T @ x[t]
        d_hh += delta.T @ (h[t - 1] if t else torch.zeros(B, H))
        d_b += delta.sum(0)
        from_later = delta @ w_hh
    torch.testing.assert_close(rnn.weight_ih_l0.grad, d_ih)
    torch.testing.assert_close(rnn.weight_hh_l0.grad, d_hh)
    torch.testing.assert_close(rnn.bias_ih_l0.grad, d_b)
    torch.testing.assert_close(rnn.bias_hh_l0.grad, d_b)


def norms(rnn, x):
    """Of the gradient of the last output's sum with respect to the state 1, 2, ... steps before."""
    result = []
    for distance in range(1, len(x)):
        with torch.no_grad():
            state = rnn(x[:-distance])[1]
        loss = rnn(x[-distance:], state.requires_grad_())[0][-1].sum()
        result.append(torch.autograd.grad(loss, state)[0].norm().item())
    return result


def test_2_singular_values():
    rnn, x = fastrnn.RNN(3, 16), torch.randn(30, 1, 3)

    def scale(norm):
        with torch.no_grad():
            rnn.weight_hh_l0 *= norm / torch.linalg.matrix_norm(rnn.weight_hh_l0, 2)

    scale(0.9)
    found = norms(rnn, x)
    assert all(b <= 0.9 * a * (1 + 1e-12) for a, b in pairwise(found))

    # Units that saturate: 1 - h^2 is near zero.
    scale(2)
    with torch.no_grad():
        rnn.bias_ih_l0 += 20
    assert norms(rnn, x)[-1] < 1e-12
    # Or a matrix that maps each unit to the next one only, whose powers end in zero.
    with torch.no_grad():
        rnn.bias_ih_l0 -= 20
        rnn.weight_hh_l0.copy_(2 * torch.diag(torch.ones(15), 1))
    assert torch.linalg.matrix_norm(rnn.weight_hh_l0, 2) > 1.99
    assert norms(rnn, x)[-1] == 0


def test_3_checkpoints():
    T, k = 30, 7
    plain, saving = fastrnn.LSTM(4, 8), fastrnn.LSTM(4, 8, checkpoint_every=k)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(T, 2, 4)

    def gradients(rnn):
        return torch.autograd.grad(rnn(x)[0].pow(2).sum(), [*rnn.parameters()])

    def truncated(rnn):
        loss, state = torch.zeros(()), None
        for window in x.split(k):
            output, state = rnn(window, state)
            state = tuple(s.detach() for s in state)
            loss = loss + output.pow(2).sum()
        return torch.autograd.grad(loss, [*rnn.parameters()])

    full = gradients(plain)
    torch.testing.assert_close(gradients(saving), full)
    errors = [(a - b).norm() / b.norm() for a, b in zip(truncated(plain), full)]
    assert max(errors) > 0.01
