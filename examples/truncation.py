"""Influence balancing: where truncated backpropagation through time goes the wrong way.

  truncation.py                          four ways to cut, two minutes at most
  truncation.py --updates 500 --plot truncation.png

The experiment of Tallec and Ollivier, "Unbiasing Truncated Backpropagation Through Time"
(arXiv:1705.08209). A linear system in which each unit takes half of the next one's state,

  s' = A s + theta * (1, ..., 1, -1, ..., -1),    loss = (s_1 - 1)^2 / 2,

has one parameter. At once, theta raises s_1, by the first units; in the long run it lowers it, as
there are more units of the other sign. A gradient that is cut too early has the wrong sign, and
theta runs away; cut at random, with the rest scaled up, it is right on average. The cuts are
grad_scale= of one call over all steps. Needs torch, and matplotlib for --plot; _common.py stands
beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import fastrnn
from _common import Parser, UserError, writable
from fastrnn import truncation

LIMIT = 1e3  # a loss beyond this has diverged


@fastrnn.cell(gates=("a",))
def Linear(x: Any, r: Any, h: Any) -> Any:
    """h' = W_ih x + W_hh h."""
    return x.a + r.a


def make_system(positive: int, negative: int) -> tuple[torch.nn.Module, Tensor]:
    """The system as a layer, and the signs [H] by which theta enters."""
    units = positive + negative
    layer: Any = Linear(1, units, bias=False)
    links = torch.eye(units) / 2 + torch.diag(torch.full((units - 1,), 0.5), 1)
    layer.weight_hh_l0.data.copy_(links)
    signs = torch.ones(units)
    signs[positive:] = -1
    return layer.requires_grad_(False), signs


def learn(
    make_scale: Callable[[int, int], Tensor] | None, args: Any, report: Callable[[str], None]
) -> list[float]:
    """The losses of all updates, up to one that is too large."""
    torch.manual_seed(args.seed)
    layer, signs = make_system(args.positive, args.negative)
    theta = torch.tensor(0.0, requires_grad=True)
    x = torch.ones(args.steps, args.rows, 1)
    state = torch.zeros(1, args.rows, len(signs))
    losses: list[float] = []
    for update in range(args.updates):
        scale = None if make_scale is None else make_scale(args.steps, args.rows)
        weights = {"weight_ih_l0": (theta * signs).unsqueeze(1), "weight_hh_l0": layer.weight_hh_l0}
        output, state = functional_call(layer, weights, (x, state), {"grad_scale": scale})
        state = state.detach()
        loss = (output[..., 0] - 1).square().mean() / 2
        losses.append(loss.item())
        if not losses[-1] < LIMIT:
            break
        (gradient,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            theta -= args.lr * gradient
        if update % max(1, args.updates // 5) == 0:
            report(f"update {update}: loss {losses[-1]:.4g}, theta {theta.item():.3f}")
    return losses


def plot(curves: dict[str, list[float]], file: str) -> None:
    """The losses of each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, losses in curves.items():
        axes.semilogy(losses, label=name, linewidth=1.2)
    axes.set_xlabel("update")
    axes.set_ylabel("loss")
    axes.set_ylim(1e-8, LIMIT)
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def make_parser() -> Parser:
    parser = Parser("truncation.py", __doc__)
    parser.group("system")
    parser.number("--positive", 10, "units by which theta raises the output at once")
    parser.number("--negative", 13, "units behind them, by which it lowers it")
    parser.group("training")
    parser.number("--steps", 400, "steps of a call")
    parser.number("--rows", 16, "sequences side by side, each with cuts of its own")
    parser.number("--updates", 300, "steps of gradient descent")
    parser.number("--lr", 0.003, "learning rate", 0, 10)
    parser.number("--mean", 16, "mean length of the parts between cuts at random", 2)
    parser.number("--seed", 0, "seed of all random numbers", 0, 2**63)
    parser.group("files")
    parser.option("--plot", "write the losses as a picture", metavar="FILE")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    ways: dict[str, Callable[[int, int], Tensor] | None] = {
        "cut every 10 steps": lambda T, B: truncation.fixed(T, B, 10),
        "cut every 100 steps": lambda T, B: truncation.fixed(T, B, 100),
        f"cut at random, {args.mean} steps on average": lambda T, B: truncation.randomised(
            T, B, args.mean
        ),
        "not cut": None,
    }
    try:
        writable(args.plot)
        curves = {}
        for name, make_scale in ways.items():
            print(f"{name}:")
            losses = curves[name] = learn(make_scale, args, lambda line: print("  " + line))
            ending = f"loss {losses[-1]:.2g}" if losses[-1] < LIMIT else "diverged"
            print(f"  {ending} after {len(losses)} updates", flush=True)
        if args.plot:
            plot(curves, args.plot)
    except (UserError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
