"""Solutions to the exercises of docs/learn/09-own-functions.md."""

import torch
from torch.autograd import gradcheck, gradgradcheck

import fastrnn


class GeometricMean(torch.autograd.Function):
    """y = (x_1 ... x_n)^(1/n): log y is the mean of the logarithms, and dy/dx_i = y / (n x_i)."""

    @staticmethod
    def forward(ctx, *inputs):
        y = torch.stack(inputs).log().mean(0).exp()
        ctx.save_for_backward(y, *inputs)
        return y

    @staticmethod
    def backward(ctx, g):
        y, *inputs = ctx.saved_tensors
        return tuple(g * y / (len(inputs) * x) for x in inputs)


def test_1_of_many():
    for n in (1, 2, 5):
        inputs = [torch.rand(4).add(0.5).requires_grad_() for _ in range(n)]
        torch.testing.assert_close(
            GeometricMean.apply(*inputs), torch.stack(inputs).prod(0) ** (1 / n)
        )
        assert gradcheck(GeometricMean.apply, inputs)
        assert gradgradcheck(GeometricMean.apply, inputs)


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def test_2_straight_through():
    """gradcheck says no, rightly: the derivative of rounding is zero. But then nothing learns."""
    x = torch.tensor([0.2, 1.3, -0.4], requires_grad=True)
    assert not gradcheck(Round.apply, (x,), raise_exception=False)
    target = torch.tensor([3.0, -2.0, 1.0])
    for straight_through in (False, True):
        x = torch.tensor([0.2, 1.3, -0.4], requires_grad=True)
        for _ in range(100):
            rounded = Round.apply(x) if straight_through else x.round()
            loss = (rounded - target).pow(2).sum()
            (g,) = torch.autograd.grad(loss, x)
            x = (x - 0.05 * g).detach().requires_grad_()
        assert (loss == 0) == straight_through


class Elman(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h_0, w_ih, w_hh, b):
        h = [h_0]
        for x_t in x:
            h.append(torch.tanh(x_t @ w_ih.T + h[-1] @ w_hh.T + b))
        states = torch.stack(h)
        ctx.save_for_backward(x, states, w_ih, w_hh)
        return states[1:]

    @staticmethod
    def backward(ctx, g):
        x, h, w_ih, w_hh = ctx.saved_tensors
        deltas, from_later = [], torch.zeros_like(h[0])
        for t in reversed(range(len(x))):
            deltas.insert(0, (g[t] + from_later) * (1 - h[t + 1] ** 2))
            from_later = deltas[0] @ w_hh
        delta = torch.stack(deltas)
        d_ih = torch.einsum("tbh,tbi->hi", delta, x)  # two products for all steps at once
        d_hh = torch.einsum("tbh,tbk->hk", delta, h[:-1])
        return delta @ w_ih, from_later, d_ih, d_hh, delta.sum((0, 1))


def test_3_elman_scan():
    rnn = fastrnn.RNN(3, 4)
    w_ih, w_hh, b_ih, b_hh = rnn.parameters()
    x, h_0 = torch.randn(6, 2, 3, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    b = (b_ih + b_hh).detach().requires_grad_()
    arguments = [x, h_0, w_ih, w_hh, b]
    assert gradcheck(Elman.apply, arguments)
    ours, theirs = Elman.apply(*arguments), rnn(x, h_0.unsqueeze(0))[0]
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    mine = torch.autograd.grad((ours * g).sum(), arguments)
    for own, other in zip(
        mine, torch.autograd.grad((theirs * g).sum(), [x, h_0, w_ih, w_hh, b_ih])
    ):
        torch.testing.assert_close(own, other)
