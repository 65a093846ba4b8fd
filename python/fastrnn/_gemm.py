"""The dense products around the backward scan, on the fastest routine that torch has for them.

In float32 on the CPU that is oneDNN, reached as a 1x1 convolution over channels-last data, which is
the same product on the same memory: torch.mm goes to MKL, which on AMD processors leaves half of
the machine unused (measured on a Zen 5 with AVX-512: 520 against 230 GFLOP/s on two cores).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this many multiply-adds a convolution gains nothing, and its sums over N are less exact.
_SMALL = 1 << 24


def _use_convolution(x: Tensor, rows: int, columns: int, depth: int) -> bool:
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and rows * columns * depth >= _SMALL
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def _as_image(rows: Tensor) -> Tensor:
    """[N, C] -> [1, C, N, 1], channels last, on the same memory."""
    return rows.contiguous().unsqueeze(0).unsqueeze(2).permute(0, 3, 1, 2)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, which: list[bool]) -> tuple[Tensor, ...]:
    """The gradients of a 1x1 convolution's input, weight and bias."""
    images, filters = (_as_image(grad), _as_image(x)), weight.contiguous()[:, :, None, None]
    ones, zeros = [1, 1], [0, 0]
    result: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        *images, filters, None, ones, zeros, ones, False, zeros, 1, which
    )
    return result


def grad_input(grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The gradient of a projection's input x [N, I]: grad [N, O] @ weight [O, I]."""
    if not _use_convolution(grad, len(grad), *weight.shape):
        return grad.mm(weight)
    image = _backward(grad, x, weight, [True, False, False])[0]  # reads only the shape of x
    return image.permute(0, 2, 3, 1).reshape(x.shape)


def grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a projection's weight: grad [N, O].T @ x [N, I] -> [O, I]."""
    if not _use_convolution(grad, len(grad), grad.shape[1], x.shape[1]):
        return grad.t().mm(x)
    weight = grad.new_empty(grad.shape[1], x.shape[1])  # only its shape is read
    return _backward(grad, x, weight, [False, True, False])[1][:, :, 0, 0]
