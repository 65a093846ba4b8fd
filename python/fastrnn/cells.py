"""Cells from the literature, each a few lines: layers with the arguments of fastrnn.cell's classes.

A cell multiplies matrices by its input and by its first state. So cells that multiply another state
(coRNN, LEM), or the product of a state and a gate (the original GRU), are not among them.

Examples:
    >>> import torch, fastrnn
    >>> rnn = fastrnn.cells.LiGRU(8, 16, bidirectional=True)
    >>> output, h_n = rnn(torch.randn(5, 3, 8))
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid

from ._cell import cell

__all__ = [
    "JANET",
    "MGU",
    "SLSTM",
    "SRU",
    "UGRNN",
    "CoupledLSTM",
    "IndRNN",
    "LeakyRNN",
    "LiGRU",
    "MinGRU",
    "MinLSTM",
    "PeepholeLSTM",
    "UnICORNN",
]


@cell(gates=("i", "f", "g", "o"))
def PeepholeLSTM(
    x: Any, r: Any, h: Any, c: Any, *, w_i: Any = 0.0, w_f: Any = 0.0, w_o: Any = 0.0
) -> Any:
    """An LSTM whose gates see the cell state (Gers and Schmidhuber, 2000)."""
    i = torch.sigmoid(x.i + r.i + w_i * c)
    f = torch.sigmoid(x.f + r.f + w_f * c)
    c = f * c + i * torch.tanh(x.g + r.g)
    o = torch.sigmoid(x.o + r.o + w_o * c)
    return o * torch.tanh(c), c


@cell(gates=("i", "g", "o"))
def CoupledLSTM(x: Any, r: Any, h: Any, c: Any) -> Any:
    """An LSTM that forgets as much as it takes in (Greff et al., arXiv:1503.04069, CIFG)."""
    i = torch.sigmoid(x.i + r.i)
    c = (1 - i) * c + i * torch.tanh(x.g + r.g)
    return torch.sigmoid(x.o + r.o) * torch.tanh(c), c


@cell(gates=("f", "g"))
def JANET(x: Any, r: Any, h: Any) -> Any:
    """An LSTM with a forget gate alone (van der Westhuizen and Lasenby, arXiv:1804.04849).

    With their beta = 1, by which new input counts for more.
    """
    s = x.f + r.f
    return torch.sigmoid(s) * h + torch.sigmoid(1 - s) * torch.tanh(x.g + r.g)


@cell(gates=("f", "n"))
def MGU(x: Any, r: Any, h: Any) -> Any:
    """A minimal gated unit (Zhou et al., arXiv:1603.09420), f after the product as in GRU."""
    f = torch.sigmoid(x.f + r.f)
    return (1 - f) * h + f * torch.tanh(x.n + f * r.n)


@cell(gates=("z", "n"))
def LiGRU(x: Any, r: Any, h: Any) -> Any:
    """A light GRU, without its batch norm (Ravanelli et al., arXiv:1803.10225)."""
    z = torch.sigmoid(x.z + r.z)
    return z * h + (1 - z) * torch.relu(x.n + r.n)


@cell(gates=("a",), recurrent=())
def IndRNN(x: Any, r: Any, h: Any, *, u: Any) -> Any:
    """Units that see their own state alone (Li et al., arXiv:1803.04831)."""
    return torch.relu(x.a + u * h)


@cell(gates=("u", "f", "r", "k"), recurrent=())
def SRU(x: Any, r: Any, h: Any, c: Any, *, v_f: Any, v_r: Any) -> Any:
    """A simple recurrent unit (Lei et al., arXiv:1709.02755), with a weight on its highway, k."""
    f = torch.sigmoid(x.f + v_f * c)
    reset = torch.sigmoid(x.r + v_r * c)
    c = f * c + (1 - f) * x.u
    return reset * c + (1 - reset) * x.k, c


@cell(gates=("z", "n"), recurrent=())
def MinGRU(x: Any, r: Any, h: Any) -> Any:
    """A GRU whose gates do not see the state (Feng et al., arXiv:2410.01201)."""
    z = torch.sigmoid(x.z)
    return (1 - z) * h + z * x.n


@cell(gates=("f", "i", "n"), recurrent=())
def MinLSTM(x: Any, r: Any, h: Any) -> Any:
    """The same of an LSTM, its two gates made to add up to one (Feng et al., arXiv:2410.01201)."""
    f, i = torch.sigmoid(x.f), torch.sigmoid(x.i)
    return (f * h + i * x.n) / (f + i)


@cell(gates=("i", "f", "z", "o"))
def SLSTM(x: Any, r: Any, h: Any, c: Any, n: Any, m: Any) -> Any:
    """An LSTM with exponential gates (Beck et al., arXiv:2405.04517): the sLSTM of xLSTM.

    n normalises c, and m is the logarithm by which both are scaled so that no exponential
    overflows. n = 0 marks a row's first step.
    """
    log_i = x.i + r.i
    log_f = logsigmoid(x.f + r.f) + m
    m = torch.where(n == 0, log_i, torch.maximum(log_f, log_i))
    i, f = torch.exp(log_i - m), torch.exp(torch.clamp(log_f - m, max=0))
    c = f * c + i * torch.tanh(x.z + r.z)
    n = f * n + i
    return torch.sigmoid(x.o + r.o) * c / n, c, n, m


@cell(gates=("a",))
def LeakyRNN(x: Any, r: Any, h: Any, *, a: Any = 0.0) -> Any:
    """A leaky integrator, or CTRNN by Euler's rule (Funahashi and Nakamura, 1993).

    sigmoid(a) is the step over the time constant of each unit, which is learned.
    """
    alpha = torch.sigmoid(a)
    return (1 - alpha) * h + alpha * torch.tanh(x.a + r.a)


@cell(gates=("g", "c"))
def UGRNN(x: Any, r: Any, h: Any) -> Any:
    """An update-gate RNN (Collins et al., arXiv:1611.09913)."""
    g = torch.sigmoid(x.g + r.g)
    return g * h + (1 - g) * torch.tanh(x.c + r.c)


@cell(gates=("a",), recurrent=())
def UnICORNN(x: Any, r: Any, y: Any, z: Any, *, w: Any, c: Any = 0.0) -> Any:
    """Undamped oscillators (Rusch and Mishra, arXiv:2103.05487), with dt = 0.1 and alpha = 1.

    y is the place of each unit, z its speed, w how it sees itself, and c its step in time.
    """
    dt = 0.1 * torch.sigmoid(c)
    z = z - dt * (torch.tanh(w * y + x.a) + y)
    return y + dt * z, z
