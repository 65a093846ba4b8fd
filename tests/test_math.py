"""The kernels' sigmoid and tanh, through the cells that use them, against 80-bit arithmetic."""

import numpy as np
import pytest
import torch

import fastrnn  # registers the operators
from fastrnn._layer import Layer

assert np.finfo(np.longdouble).nmant > 52, "this test needs an extended long double"


def gates_of(mode: str, x: torch.Tensor) -> torch.Tensor:
    """The activated gates, x being their sums: one step from zero states with identity weights."""
    wide = x.shape[1]
    weights = [torch.eye(wide, dtype=x.dtype), x.new_zeros(wide, 1)]
    layer = Layer.plain(mode, 1, len(x), x.unsqueeze(0), None, None, weights, keep=True)
    output, _, _, _, gates = torch.ops.fastrnn.scan_forward(*layer)
    return output[0] if mode.startswith("RNN") else gates[0]


def points(dtype: torch.dtype) -> torch.Tensor:
    limit = 100.0 if dtype == torch.float32 else 750.0
    small = torch.logspace(-30, 0, 20001, dtype=dtype)
    grid = torch.linspace(-limit, limit, 20001, dtype=dtype)
    near = torch.linspace(-12, 12, 200001, dtype=dtype)
    return torch.cat([grid, near, small, -small])


def error_in_ulp(value: torch.Tensor, exact: np.ndarray) -> float:
    v = value.numpy()
    ulp = np.spacing(np.abs(exact).astype(v.dtype)).astype(np.longdouble)
    return float(np.max(np.abs(v.astype(np.longdouble) - exact) / ulp))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_within_4_ulp(dtype):
    x = points(dtype)
    value = gates_of("RNN_TANH", x.unsqueeze(1)).squeeze(1)
    assert error_in_ulp(value, np.tanh(x.numpy().astype(np.longdouble))) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_is_within_4_ulp(dtype):
    x = points(dtype)
    # Below this the exact value leaves the normal numbers, where an ulp means nothing.
    x = x[x > (-86 if dtype == torch.float32 else -707)]
    value = gates_of("LSTM", x.unsqueeze(1).expand(-1, 4).contiguous())[:, 0]
    assert error_in_ulp(value, 1 / (1 + np.exp(-x.numpy().astype(np.longdouble)))) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits_and_nan(dtype):
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e30, -1e30, 0.0], dtype=dtype)
    tanh = gates_of("RNN_TANH", x.unsqueeze(1)).squeeze(1)
    others = torch.zeros(len(x), 3, dtype=dtype)  # an infinity times a zero weight would be NaN
    sigmoid = gates_of("LSTM", torch.cat([x.unsqueeze(1), others], 1))[:, 0]
    relu = gates_of("RNN_RELU", x.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(tanh, torch.tanh(x), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(sigmoid, torch.sigmoid(x), equal_nan=True, rtol=0, atol=1e-37)
    torch.testing.assert_close(relu, torch.relu(x), equal_nan=True, rtol=0, atol=0)
    assert fastrnn.cpu_variant() in fastrnn.cpu_variants()
