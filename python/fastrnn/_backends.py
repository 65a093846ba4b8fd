"""The seam between layers and kernels: what a backend is, and which one serves a tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._layer import BUILT_IN, Layer, Results, Saved
from ._torch import assume_constant

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

OWN = "own"  # what packed weights are stored in: the layer's dtype,
BFLOAT16 = "bfloat16"  # or, of float32 layers, this one,
INT8 = "int8"  # or integers of 8 bits: see _int8


class Backend(ABC):
    """Kernels for the tensors of one type of device.

    A layer is checked by its backend: ValueError, with layer.check()'s words, for a record that
    does not fit together.
    """

    # Whether it takes a mask [T, B] in place of batch_sizes. To sort and pack the rows of a mask on
    # a GPU, the host would have to wait for it.
    takes_mask = False

    def runs_cell(self, mode: str, dtype: torch.dtype) -> bool:
        """Whether it has the kernel of a cell that is not built in; it may have to be compiled."""
        return False

    def runs_options(self, layer: Layer, /) -> bool:
        """Whether its kernels run a layer with the options that this one has on."""
        return True

    @abstractmethod
    def forward(self, layer: Layer, /) -> Results:
        """Runs the layer."""

    @abstractmethod
    def backward(self, layer: Layer, saved: Saved, /) -> Sequence[Tensor | None]:
        """The gradients that saved.wanted names, None for the others."""

    def upload(self, values: Tensor, device: torch.device) -> Tensor:
        """int64 values of the CPU on `device`."""
        return values.to(device)

    # Whether it has pack() and keep().
    packs = False

    def pack(self, layer: Layer, storage: str, /) -> Any:
        """The layer's weights, packed once for many calls: an object with forward(layer), which is
        that of any layer of the same sizes, and `bytes`, their size.

        storage: OWN, BFLOAT16 or INT8.
        """
        raise NotImplementedError

    def keep(self, layers: list[Any], module: dict[str, Any], parameters: list[Tensor], /) -> Any:
        """The packed layers of a module: what runs its steps, see _cpu.PackedModel."""
        raise NotImplementedError

    # What follows makes small steps of plain CPU tensors fast, and may do without.

    def run_module(
        self,
        module: dict[str, Any],
        input: Any,
        hx: Any,
        checkpoint_every: int,
        functions: dict[str, Callable[..., tuple[Tensor, ...]]],
        stack: Callable[..., tuple[Tensor, ...]],
        /,
    ) -> Any:
        """All layers of an RNN module, by its __dict__, on plain tensors.

        functions: for each mode, record() as a differentiable function of options and tensors.
        stack: record_stack() as a differentiable function.

        Returns what the module's forward returns; None where the call is more than that, or where
        the arguments are wrong, so that the module's own checks raise the error.
        """
        return None

    def record(self, ctx: Any, options: tuple[Any, ...], /, *tensors: Any) -> tuple[Tensor, ...]:
        """forward of an autograd Function, on layer.options and layer.tensors.

        Returns output, h_n, and of cells with a cell state c_n and, if asked for, every c_t.
        """
        layer = Layer.of(options, tensors)
        output, h_n, c_n, extra, saved = self.forward(layer)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, extra, saved, *tensors)
        if c_n is None:
            return output, h_n
        if extra is None or not layer.all_c:
            return output, h_n, c_n
        return output, h_n, c_n, extra

    def replay(self, ctx: Any, /, *gradients: Tensor | None) -> tuple[Tensor | None, ...] | None:
        """Its backward; None where this one is not enough, since something watches or wants to
        differentiate it again."""
        return None

    # Several layers in one direction, each taking the output of the one before, times `dropout`
    # [L-1, ..., P] if that is given. Their record is that of one layer, with the states and weights
    # of all: h_0 and c_0 [L, B, features], and the weights layer by layer. It has none of reverse,
    # checkpoint_every, zoneout, layer_norm, h_mask, seed, inputs, and at most one state beside h.

    def runs_side_by_side(self, stack: Layer, layers: int, /) -> bool:
        """Whether it has the following, and they should be faster than layer by layer."""
        return False

    def forward_stack(
        self, stack: Layer, layers: int, dropout: Tensor | None, /
    ) -> tuple[Tensor, ...]:
        """Output, h_n, of cells with a cell state c_n, and with all_c the states of every step: the
        output of each layer but the last, and of such cells the others of each layer."""
        raise NotImplementedError

    def record_stack(
        self,
        ctx: Any,
        layers: int,
        options: tuple[Any, ...],
        dropout: Tensor | None,
        /,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        """forward_stack() as the forward of an autograd Function, as record() is of forward()."""
        raise NotImplementedError

    def replay_stack(
        self, ctx: Any, /, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...] | None:
        """Its backward, as replay() is that of record()."""
        return None


_backends: dict[str, Backend] = {}


def register(device_type: str, backend: Backend | None) -> Backend | None:
    """From now on `backend` runs the layers on tensors of that type of device; None: none does.

    Returns the one that did so far.
    """
    before = _backends.pop(device_type, None)
    if backend is not None:
        _backends[device_type] = backend
    return before


def backend_of(device_type: str) -> Backend | None:
    """The backend of a type of device, None without one."""
    return _backends.get(device_type)


def backend(device_type: str) -> Backend:
    """The backend of a type of device that has one."""
    return _backends[device_type]


def has_kernel(x: Tensor) -> bool:
    """Whether the scan has a compiled kernel for x's device and dtype."""
    return x.dtype in DTYPES and x.device.type in _backends


@assume_constant
def _runs_cell(mode: str, device_type: str, dtype: torch.dtype) -> bool:
    found = _backends.get(device_type)
    return found is not None and dtype in DTYPES and found.runs_cell(mode, dtype)


def runs_cell(mode: str, x: Tensor) -> bool:
    """Whether there is a kernel of this cell for x, if there is one for x at all."""
    return mode in BUILT_IN or _runs_cell(mode, x.device.type, x.dtype)


def runs_options(layer: Layer) -> bool:
    """Whether the kernel for the layer's tensors, if there is one, runs it with its options."""
    return not has_kernel(layer.x) or _backends[layer.x.device.type].runs_options(layer)


def takes_mask(x: Tensor) -> bool:
    """Whether the kernel for x takes a mask [T, B] in place of batch_sizes."""
    return has_kernel(x) and _backends[x.device.type].takes_mask
