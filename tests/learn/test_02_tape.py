"""Solutions to the exercises of docs/learn/02-tape.md."""

import numpy as np
import pytest
import torch


@pytest.fixture
def page(run_page):
    names = run_page("02-tape").names
    names.TAPE.clear()
    rng = np.random.default_rng(1)
    for variable in names.ours:  # untrained
        variable.value[...] = rng.normal(scale=0.5, size=variable.value.shape)
        variable.grad = np.zeros_like(variable.value)
    return names


def gated_step(page):
    """The two operations, and h = z * h + (1 - z) * n with z = sigmoid(a), n = tanh(b)."""

    @page.recorded
    def multiply(a, b):
        return a * b, lambda g: (g * b, g * a)

    @page.recorded
    def sigmoid(a):
        y = 1 / (1 + np.exp(-a))
        return y, lambda g: (g * y * (1 - y),)

    def step(a, b, h):
        z, minus = sigmoid(a), page.Variable(-np.ones_like(a.value))
        one = page.Variable(np.ones_like(a.value))
        rest = page.add(one, multiply(minus, z))
        return page.add(multiply(z, h), multiply(rest, page.tanh(b)))

    return multiply, sigmoid, step


def test_1_gated_step(page):
    multiply, sigmoid, step = gated_step(page)
    rng = np.random.default_rng(0)
    a, b, h = (page.Variable(rng.normal(size=(1, 5))) for _ in range(3))
    ones = page.Variable(np.ones((5, 1)))

    def gradients(f, *variables):
        """Of the sum of f, by the tape and by finite differences."""
        for variable in variables:
            variable.grad[...] = 0
        page.backward(page.product(f(*variables), ones))
        for variable in variables:
            for k in range(5):
                ends = []
                for epsilon in (1e-6, -1e-6):
                    variable.value[0, k] += epsilon
                    ends.append(f(*variables).value.sum())
                    variable.value[0, k] -= epsilon
                yield variable.grad[0, k], (ends[0] - ends[1]) / 2e-6

    for f, arguments in ((multiply, (a, b)), (sigmoid, (a,)), (step, (a, b, h))):
        for exact, estimate in gradients(f, *arguments):
            assert exact == pytest.approx(estimate, abs=1e-8)
    theirs = [torch.tensor(v.value, requires_grad=True) for v in (a, b, h)]
    z = torch.sigmoid(theirs[0])
    (z * theirs[2] + (1 - z) * torch.tanh(theirs[1])).sum().backward()
    for ours, other in zip((a, b, h), theirs):
        np.testing.assert_allclose(ours.grad, other.grad, rtol=1e-12)


def test_2_finite_differences(page):
    """The error falls with the square of epsilon, until rounding, which grows as 1 / epsilon."""
    page.backward(page.loss_of_tape())
    exact = page.w_hh.grad[0, 1]
    error = {}
    for exponent in (1, 2, 3, 5, 10, 12):
        epsilon, ends = 10.0**-exponent, []
        for sign in (1, -1):
            page.w_hh.value[0, 1] += sign * epsilon
            ends.append(page.loss_of_tape().value)
            page.w_hh.value[0, 1] -= sign * epsilon
        error[exponent] = abs((ends[0] - ends[1]) / (2 * epsilon) - exact)
    assert error[2] < error[1] / 50
    assert error[3] < error[2] / 50
    assert error[5] < 1e-8
    assert error[12] > 100 * error[5]


def test_3_assignment_for_sum(page):
    """What is assigned last wins, and backward comes to the first step last.

    A state is used by its own readout and then by the next step, so on the way back the readout's
    part replaces what came from later steps. What is left of b_hh's gradient is that of the first
    letter's loss; of W_hh's, nothing, because h_0 is zero.
    """
    loss = page.loss_of_tape()
    loss.grad += 1.0
    while page.TAPE:
        result, arguments, gradients = page.TAPE.pop()
        for argument, gradient in zip(arguments, gradients(result.grad)):
            argument.grad = gradient
    assert (page.w_hh.grad == 0).all()

    w_ih, _, b_ih, b_hh, w_hy, b_y = (torch.tensor(v.value) for v in page.ours)
    b_hh.requires_grad_()
    x, y = page.inputs[0], page.targets[0]
    h = torch.tanh(torch.eye(4)[x] @ w_ih + b_ih + b_hh)
    first = torch.nn.functional.cross_entropy(h @ w_hy + b_y, torch.tensor(y))
    torch.testing.assert_close(
        torch.from_numpy(page.b_hh.grad), torch.autograd.grad(first, b_hh)[0]
    )
