"""fastrnn.truncation, and the example that shows what it is for."""

import re

import pytest
import torch

import fastrnn
import truncation as example
from fastrnn import truncation


@pytest.mark.parametrize(("every", "offset"), [(1, 0), (3, 0), (3, 2), (20, 0), (20, 15)])
def test_fixed(every, offset):
    scale = truncation.fixed(10, 2, every, offset=offset)
    cuts = [t for t in range(10) if t >= offset and (t - offset) % every == 0]
    assert scale.shape == (10, 2)
    assert [t for t in range(10) if scale[t, 0] == 0] == cuts
    assert torch.equal(scale[:, 0], scale[:, 1])
    assert set(scale.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("alpha", [3.0, 6.0, float("inf")])
def test_randomised_is_unbiased(alpha):
    """The product of the scales of l steps, what flows back over them, is 1 on average."""
    torch.manual_seed(0)
    scale = truncation.randomised(6, 200_000, 8, alpha=alpha).double()
    assert torch.equal((scale == 0) | (scale > 1), torch.ones_like(scale).bool())
    products = scale.cumprod(0)
    error = (products.mean(1) - 1).abs()
    assert (error < 4 * products.std(1) / 200_000**0.5).all()


@pytest.mark.parametrize("alpha", [6.0, float("inf")])
def test_randomised_mean_length(alpha):
    torch.manual_seed(0)
    mean = 5
    scale = truncation.randomised(4000, 200, mean, alpha=alpha)
    assert (scale == 0).double().mean().item() == pytest.approx(1 / mean, rel=0.01)


def test_randomised_takes_a_generator():
    a, b, c = (
        truncation.randomised(9, 3, 4, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: truncation.fixed(-1, 2, 3), "T: expected an integer of at least 0, got -1"),
        (lambda: truncation.fixed(1, 2.0, 3), "B: expected an integer of at least 0, got 2.0"),
        (lambda: truncation.fixed(1, 2, 0), "every: expected an integer above 0, got 0"),
        (
            lambda: truncation.fixed(1, 2, 3, offset=3),
            "offset: expected an integer in [0, 3), got 3",
        ),
        (lambda: truncation.randomised(1, 2, 1), "mean: expected a number above 1, got 1"),
        (
            lambda: truncation.randomised(1, 2, 3, alpha=1),
            "alpha: expected a number above 1, got 1",
        ),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        call()


def test_unbiased_gradients():
    """Of a layer whose state matters for long: the mean over many rows is that of the whole."""
    torch.manual_seed(0)
    rows = 20_000
    model = fastrnn.RNN(1, 1, bias=False, nonlinearity="relu").double()
    with torch.no_grad():
        model.weight_ih_l0.fill_(1)
        model.weight_hh_l0.fill_(0.9)
    x = torch.ones(12, rows, 1, dtype=torch.float64)

    def gradient(scale):
        model.zero_grad()
        model(x, grad_scale=scale)[0][-1].sum().backward()
        return model.weight_hh_l0.grad.item() / rows

    whole = gradient(None)
    assert gradient(truncation.randomised(12, rows, 10)) == pytest.approx(whole, rel=0.05)
    assert gradient(truncation.fixed(12, rows, 3)) < 0.7 * whole


def test_example(tmp_path, capsys):
    """Truncated, it diverges; cut at random, it learns as from the whole."""
    picture = tmp_path / "truncation.png"
    assert example.main(["--updates", "60", f"--plot={picture}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    endings = [line.strip() for line in lines if line.strip().startswith(("loss", "diverged"))]
    assert endings[0].startswith("diverged")
    losses = [float(line.split()[1]) for line in endings[1:]]
    assert losses[0] > 1
    assert losses[1] < 0.01
    assert losses[2] < 0.01
    assert picture.stat().st_size > 1000
