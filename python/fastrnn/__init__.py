"""Fast LSTM, GRU and Elman layers for PyTorch: torch.nn's interface on fused kernels."""

from importlib.metadata import version as _version

from . import cells, functional, reference, truncation
from ._cell import cell
from ._cells import GRUCell, LSTMCell, RNNCell
from ._check import check_cell
from ._cpu import cpu_variant, cpu_variants
from ._freeze import freeze, unfreeze
from ._functions import ElmanFunction, GRUFunction, LSTMFunction
from ._modules import GRU, LSTM, RNN
from ._replace import hook_quantization, replace, restore
from ._states import State

hook_quantization()

__version__ = _version("fastrnn")

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "ElmanFunction",
    "GRUCell",
    "GRUFunction",
    "LSTMCell",
    "LSTMFunction",
    "RNNCell",
    "State",
    "cell",
    "cells",
    "check_cell",
    "cpu_variant",
    "cpu_variants",
    "freeze",
    "functional",
    "reference",
    "replace",
    "restore",
    "truncation",
    "unfreeze",
]
