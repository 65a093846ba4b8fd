"""The dense products around a scan, each on the fastest routine that torch has for it.

In float32 on the CPU that is oneDNN, reached as a 1x1 convolution over channels-last data, which is
the same product on the same memory: torch.mm goes to MKL, which on AMD processors leaves half of the
machine unused (measured on a Zen 5 with AVX-512: 520 against 230 GFLOP/s on two cores). The weight
gradient's convolution also sums the bias gradient in the same pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this many multiply-adds the set-up of a convolution costs more than it saves.
_SMALL = 1 << 21


def _use_convolution(x: Tensor, rows: int, columns: int, depth: int) -> bool:
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and rows * columns * depth >= _SMALL
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled  # type: ignore[attr-defined]
    )


def _as_image(rows: Tensor) -> Tensor:
    """[N, C] -> [1, C, N, 1], channels last, on the same memory."""
    return rows.contiguous().unsqueeze(0).unsqueeze(2).permute(0, 3, 1, 2)


def _as_filter(weight: Tensor) -> Tensor:
    return weight.contiguous()[:, :, None, None]


def _as_rows(image: Tensor) -> Tensor:
    """[1, C, N, 1] -> [N, C]."""
    return image.permute(0, 2, 3, 1).reshape(image.shape[2], image.shape[1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, I] @ weight [O, I].T + bias [O] -> [N, O]."""
    if _use_convolution(x, len(x), *weight.shape):
        image = torch.mkldnn_convolution(
            _as_image(x), _as_filter(weight), bias, [0, 0], [1, 1], [1, 1], 1
        )
        return _as_rows(image)
    return torch.nn.functional.linear(x, weight, bias)


def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of linear's x: grad [N, O] @ weight [O, I] -> [N, I]."""
    if _use_convolution(grad, len(grad), *weight.shape):
        image = torch.mkldnn_convolution(
            _as_image(grad), _as_filter(weight.t()), None, [0, 0], [1, 1], [1, 1], 1
        )
        return _as_rows(image)
    return grad.mm(weight)


def grad_weight(grad: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of linear's weight, grad [N, O].T @ x [N, I] -> [O, I], and of its bias [O]."""
    if _use_convolution(grad, len(grad), grad.shape[1], x.shape[1]):
        _, d_weight, d_bias = torch.ops.aten.convolution_backward(
            _as_image(grad),
            _as_image(x),
            _as_filter(grad.new_empty(grad.shape[1], x.shape[1])),
            [grad.shape[1]] if bias else None,
            [1, 1],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [False, True, bias],
        )
        return d_weight[:, :, 0, 0], d_bias if bias else None
    return grad.t().mm(x), grad.sum(0) if bias else None
