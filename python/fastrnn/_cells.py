"""fastrnn.LSTMCell, GRUCell and RNNCell: torch.nn's cells, on one step of the fused layer.

Parameters, initialisation, checks and state_dict are torch.nn's own. A step with few rows runs
torch's own cell operator, as does whatever the fused layer does not take: torch.compile, autocast,
a dtype or device without a kernel, and bad input, so that the errors are torch's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from ._backends import has_kernel
from ._drop_in import DropIn
from ._functions import run_layer, run_packed
from ._layer import CELLS, Layer
from ._onnx import run_layer as run_onnx_layer
from ._packed import can_pack, check_frozen, forget, packed
from ._torch import (
    GruCell,
    LstmCell,
    RnnCell,
    is_exporting_to_onnx,
    is_transforming,
    tracing_state,
)

# Where the fused layer won against torch's cell (Zen 5, one and two threads, H = 64 to 512): from
# so many rows, hidden units and B * G * H gate values.
_INFERENCE, _TRAINING = (4, 256, 4096), (32, 1, 32768)
_ELMAN = {"tanh": ("RNN_TANH", torch.rnn_tanh_cell), "relu": ("RNN_RELU", torch.rnn_relu_cell)}


class _CellBase(DropIn, RNNCellBase):
    """What the cells share."""

    _gates: int  # G
    _theirs: ClassVar[Any]

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), self._shown_frozen()]))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        forget(self)

    def _step_packed(self, input: Any, hx: Any) -> tuple[Any, ...] | None:
        """The new states, (h, c or None), on packed weights: of a plain step without gradients.
        None where it is more than that, or may be wrong."""
        if torch.compiler.is_compiling():
            return None
        h, c = hx if isinstance(hx, tuple) and len(hx) == 2 else (hx, None)
        if self._frozen is not None:
            check_frozen(self, input, h, c)
        elif torch.is_grad_enabled() and any(
            w is not None and (type(w) is not nn.Parameter or w.requires_grad)
            for w in self._parameters.values()
        ):
            return None
        own = self.__dict__
        model = own.get("_packed")
        if model is not None:
            final: tuple[Any, ...] | None = model.step(own, input, h, c)
            if final is not None or model.is_current(own):
                return final
        if type(input) is not Tensor or not can_pack(self):
            return None
        return packed(self).step(own, input, h, c)

    def _is_small(self, input: Tensor) -> bool:
        """Whether a batched step is for torch's operator at once: all that a small step pays."""
        if not isinstance(input, Tensor) or input.dim() != 2 or self._frozen is not None:
            return False
        if torch.compiler.is_compiling() or tracing_state() is not None:
            # A compiler fuses the operator itself; ONNX has nodes for layers only.
            if is_exporting_to_onnx():
                return False
            if torch.compiler.is_compiling():
                return True
        rows, hidden = input.size(0), self.hidden_size
        least_rows, least_hidden, least = _TRAINING if torch.is_grad_enabled() else _INFERENCE
        is_large = (
            rows >= least_rows and hidden >= least_hidden and rows * hidden * self._gates >= least
        )
        return not (is_large or is_transforming())  # torch's operators do not support all of these

    def _run_otherwise(self, input: Any, hx: Any) -> Any:
        """The call as one of torch's tools wants it; None if none of them is at work."""
        arguments = (input,) if hx is None else (input, hx)
        node = self._traced(arguments, {})
        if node is not None or not self._is_torchs(*arguments):
            return node
        return self._theirs.forward(self, input, hx)

    def _step(
        self, mode: str, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, ...] | None:
        """The new states from the fused layer, T = 1; None where torch's operator has to run."""
        frozen = self._frozen
        has_cell_state = CELLS[mode].has_cell_state
        to_onnx = is_exporting_to_onnx()
        if (
            not isinstance(input, Tensor)
            or input.dim() not in (1, 2)
            or (input.dim() == 1 and not (is_transforming() or to_onnx or frozen))
            or self._is_small(input)
            or not has_kernel(input)  # before autocast, which does not know every device
            or input.size(-1) != self.input_size
            or (torch.is_autocast_enabled(input.device.type) and not frozen)
            or (hx is not None and isinstance(hx, Tensor) is has_cell_state)
        ):
            return None
        states = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        batch = input.shape[:-1]
        shape = (*batch, self.hidden_size)
        if hx is not None and len(states) != 1 + has_cell_state:
            return None
        if not all(isinstance(s, Tensor) and s.shape == shape for s in states):
            return None
        weights = [self.weight_ih, self.weight_hh]
        if self.bias:
            weights += [self.bias_ih, self.bias_hh]
        if frozen and torch.is_autocast_enabled(input.device.type):
            dtype = self.weight_ih.dtype
            input, states = input.to(dtype), tuple(s.to(dtype) for s in states)
        if any(t.dtype != input.dtype or not has_kernel(t) for t in (input, *states, *weights)):
            return None
        rows = batch[0] if batch else 1  # numel() would fix it in an exported program
        x, *initial = (t.reshape(1, rows, t.size(-1)) for t in (input, *states))
        h_0, c_0 = (*initial, None, None)[:2]
        layer = Layer.plain(mode, 1, rows, x, h_0, c_0, weights)
        if to_onnx:
            final = run_onnx_layer(layer, None, self.hidden_size)[1]
        elif frozen:
            check_frozen(self, x, *initial)
            traced = torch.compiler.is_compiling() or tracing_state() is not None
            own = None if traced else packed(self).layers[0]
            final = run_packed(layer, None, frozen, own)[1]
        else:
            final = run_layer(layer)[1]
        return tuple(s.reshape(shape) for s in final)


class LSTMCell(_CellBase):
    """One step of a long short-term memory: torch.nn.LSTMCell, fused where that is faster.

    Parameters, initial values and state_dict are those of torch.nn.LSTMCell; a state_dict goes both
    ways. The reference implementation is fastrnn.reference.lstm_cell.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the hidden units.
        bias: whether there are b_ih and b_hh.
        device: of the parameters.
        dtype: of the parameters.

    Examples:
        >>> import torch, fastrnn
        >>> cell = fastrnn.LSTMCell(8, 16)
        >>> h, c = cell(torch.randn(3, 8))
        >>> h, c = cell(torch.randn(3, 8), (h, c))
        >>> h.shape
        torch.Size([3, 16])
    """

    _theirs = LstmCell
    _gates = 4
    cell_mode = "LSTM"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, self._gates, device, dtype)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: [B, I], or [I] unbatched.
            hx: (h_0, c_0), each [B, H], or [H] unbatched. None means zeros.

        Returns:
            (h_1, c_1): shaped like hx.

        Raises:
            RuntimeError: if a shape or dtype is wrong; the message is that of torch.nn.LSTMCell.
            ValueError: if the number of dimensions is wrong; as above.
        """
        if (final := self._step_packed(input, hx)) is not None:
            return final[0], final[1]
        if (
            hx is not None
            and self._is_small(input)
            and len(hx) == 2
            and hx[0].dim() == hx[1].dim() == 2
        ):
            weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
            return torch.lstm_cell(input, hx, *weights)
        if (other := self._run_otherwise(input, hx)) is not None:
            return other
        final = self._step("LSTM", input, hx)
        if final is None:
            return LstmCell.forward(self, input, hx)  # type: ignore[arg-type]
        return final[0], final[1]

    if TYPE_CHECKING:
        __call__ = forward


class GRUCell(_CellBase):
    """One step of a gated recurrent unit: torch.nn.GRUCell, fused where that is faster.

    Parameters, initial values and state_dict are those of torch.nn.GRUCell; a state_dict goes both
    ways. The reference implementation is fastrnn.reference.gru_cell.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the hidden units.
        bias: whether there are b_ih and b_hh.
        device: of the parameters.
        dtype: of the parameters.

    Examples:
        >>> import torch, fastrnn
        >>> cell = fastrnn.GRUCell(8, 16)
        >>> h = cell(torch.randn(3, 8))
        >>> cell(torch.randn(3, 8), h).shape
        torch.Size([3, 16])
    """

    _theirs = GruCell
    _gates = 3
    cell_mode = "GRU"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, self._gates, device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: [B, I], or [I] unbatched.
            hx: h_0 [B, H], or [H] unbatched. None means zeros.

        Returns:
            h_1: shaped like hx.

        Raises:
            RuntimeError: if a shape or dtype is wrong; the message is that of torch.nn.GRUCell.
            ValueError: if the number of dimensions is wrong; as above.
        """
        if (final := self._step_packed(input, hx)) is not None:
            return final[0]
        if hx is not None and self._is_small(input) and hx.dim() == 2:
            weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
            return torch.gru_cell(input, hx, *weights)
        if (other := self._run_otherwise(input, hx)) is not None:
            return other
        final = self._step("GRU", input, hx)
        if final is None:
            return GruCell.forward(self, input, hx)  # type: ignore[arg-type]
        return final[0]

    if TYPE_CHECKING:
        __call__ = forward


class RNNCell(_CellBase):
    """One step of an Elman network: torch.nn.RNNCell, fused where that is faster.

    Parameters, initial values and state_dict are those of torch.nn.RNNCell; a state_dict goes both
    ways. The reference implementation is fastrnn.reference.elman_cell.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the hidden units.
        bias: whether there are b_ih and b_hh.
        nonlinearity: "tanh" or "relu".
        device: of the parameters.
        dtype: of the parameters.

    Examples:
        >>> import torch, fastrnn
        >>> cell = fastrnn.RNNCell(8, 16, nonlinearity="relu")
        >>> cell(torch.randn(8)).shape  # unbatched
        torch.Size([16])
    """

    _theirs = RnnCell
    _gates = 1
    __constants__ = RnnCell.__constants__
    nonlinearity: str

    @property
    def cell_mode(self) -> str:
        return f"RNN_{self.nonlinearity.upper()}"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, self._gates, device, dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: [B, I], or [I] unbatched.
            hx: h_0 [B, H], or [H] unbatched. None means zeros.

        Returns:
            h_1: shaped like hx.

        Raises:
            RuntimeError: if a shape or dtype is wrong; the message is that of torch.nn.RNNCell.
            ValueError: if the number of dimensions is wrong; as above.
        """
        if self.nonlinearity not in _ELMAN:
            return RnnCell.forward(self, input, hx)  # type: ignore[arg-type]  # which raises
        mode, operator = _ELMAN[self.nonlinearity]
        if (final := self._step_packed(input, hx)) is not None:
            return final[0]
        if hx is not None and self._is_small(input) and hx.dim() == 2:
            weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
            return operator(input, hx, *weights)
        if (other := self._run_otherwise(input, hx)) is not None:
            return other
        final = self._step(mode, input, hx)
        if final is None:
            return RnnCell.forward(self, input, hx)  # type: ignore[arg-type]
        return final[0]

    if TYPE_CHECKING:
        __call__ = forward
