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


def _as_filter(weight: Tensor) -> Tensor:
    return weight.contiguous()[:, :, None, None]


def _as_rows(image: Tensor) -> Tensor:
    """[1, C, N, 1] -> [N, C]."""
    return image.permute(0, 2, 3, 1).reshape(image.shape[2], image.shape[1])


def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a projection's input: grad [N, O] @ weight [O, I] -> [N, I]."""
    if _use_convolution(grad, len(grad), *weight.shape):
        image = torch.mkldnn_convolution(
            _as_image(grad), _as_filter(weight.t()), None, [0, 0], [1, 1], [1, 1], 1
        )
        return _as_rows(image)
    return grad.mm(weight)


def grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a projection's weight: grad [N, O].T @ x [N, I] -> [O, I]."""
    if _use_convolution(grad, len(grad), grad.shape[1], x.shape[1]):
        _, d_weight, _ = torch.ops.aten.convolution_backward(
            _as_image(grad),
            _as_image(x),
            _as_filter(grad.new_empty(grad.shape[1], x.shape[1])),
            None,
            [1, 1],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [False, True, False],
        )
        return d_weight[:, :, 0, 0]
    return grad.t().mm(x)
