"""Weights of 8 bits, for inference on the CPU; see csrc/cpu/int8.h.

A row w of a weight is scale * q, with q = round(w * (127 / max |w|)) in [-127, 127] and scale =
max |w| / 127. Inputs and states are quantised in the same way as they come, row by row; products
are sums of integers, which are exact; biases, gates and states are float32. So a row's result is
the same bit for bit alone and in any batch, for any number of threads, on every processor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._load import _cpu


def quantize(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The integers of a float weight [R, K], torch.int8, and the scales of its rows [R].

    A row whose greatest magnitude is below 2**-100 counts as zero.

    Raises:
        ValueError: for a weight that is not float, not finite, or not on the CPU; says its name.
    """
    if not weight.is_floating_point() or weight.device.type != "cpu":
        raise ValueError(
            f"{name}: expected a float tensor on cpu, got {weight.dtype} on {weight.device}"
        )
    weight = weight.detach().float()
    most = weight.abs().amax(1)
    if not bool(torch.isfinite(most).all()):
        raise ValueError(f"{name}: expected finite numbers, got infinity or NaN")
    most = torch.where(most < 2.0**-100, torch.zeros_like(most), most)
    inverse = torch.where(most == 0, most, 127 / most)
    return torch.round(weight * inverse.unsqueeze(1)).to(torch.int8), most / 127


def pack(mode: str, directions: int, weights: Sequence[Tensor]) -> _cpu.Int8Layer:
    """A layer of float weights, in the order of Layer.weights."""
    stored: list[Tensor] = []
    scales: list[Tensor] = []
    for weight in weights:
        if weight.dim() == 2:
            integers, of_rows = quantize("weights", weight)
            stored.append(integers)
            scales.append(of_rows)
        else:
            stored.append(weight.detach())
    return _cpu.Int8Layer(mode, directions, stored, scales)


def rounded(weight: Tensor) -> Tensor:
    """The values that a float weight has in 8 bits."""
    integers, scales = quantize("weights", weight)
    return integers * scales.unsqueeze(1)
