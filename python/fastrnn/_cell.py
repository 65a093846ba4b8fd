"""fastrnn.cell: layers of a cell that is a Python function for one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence

from . import _kernels, reference
from ._functions import add_function
from ._layer import add_cell
from ._modules import States, _RNNBase
from ._trace import Definition, define

__all__ = ["CellLayer", "cell"]

_GAINS = {"gain_ih", "gain_hh"}  # of layer normalisation
Inputs = Mapping[str, Tensor | PackedSequence]


class CellLayer(_RNNBase):
    """Layers of a user-defined cell: the base of the classes that fastrnn.cell makes.

    The parameters of layer k are weight_ih_l{k} [G * H, I or D * H], weight_hh_l{k} [R * H, H],
    bias_ih_l{k} [G * H] and bias_hh_l{k} [R * H], for G gates of which R have rows in W_hh, and a
    vector [H] for each keyword-only parameter of the function, such as w_i_l{k}; those of the
    second direction end in _reverse. Without recurrent gates there is neither weight_hh nor
    bias_hh. Weights and biases are drawn uniformly from (-1 / sqrt(H), 1 / sqrt(H)).

    Args:
        input_size: I, the features of a step of the input.
        hidden_size: H, the hidden units.
        num_layers: L; each layer takes the output of the one before.
        bias: whether there are b_ih and b_hh.
        batch_first: whether input and output are [B, T, features] instead of [T, B, features].
        dropout: probability of dropout on the output of every layer but the last, in training.
        bidirectional: whether each layer has a second direction, from the last step to the first.
        device: of the parameters.
        dtype: of the parameters.
        checkpoint_every: keep for backward only the output and the states between segments of so
            many steps, and compute the rest again, a segment at a time.
        weight_dropout, variational, recurrent_dropout, grad_clip: as those of fastrnn.LSTM.
        zoneout: the same, a single probability, of the first state alone.
        layer_norm: whether W_ih x and W_hh h are normalised, as those of fastrnn.GRU; gain_ih_l0 is
            then [G * H] and gain_hh_l0 [R * H]. For cells with recurrent gates.

    Raises:
        ValueError: if an argument is out of range. The messages are torch.nn's.
        TypeError: if a size is not an int, or dropout is not a number.

    Examples:
        >>> import torch, fastrnn
        >>> rnn = fastrnn.cells.PeepholeLSTM(8, 16)
        >>> [name for name, _ in rnn.named_parameters()][4:]
        ['w_i_l0', 'w_f_l0', 'w_o_l0']
        >>> output, (h, c) = rnn(torch.randn(5, 3, 8), lengths=[5, 0, 2])
        >>> h.shape, c.shape
        (torch.Size([1, 3, 16]), torch.Size([1, 3, 16]))
    """

    definition: ClassVar[Definition]
    _theirs = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        checkpoint_every: int | None = None,
        **options: Any,
    ) -> None:
        if options.get("layer_norm") and (clash := _GAINS & set(self.definition.parameters)):
            raise ValueError(
                f"layer_norm: expected False for {self._name}, which has a parameter {min(clash)} "
                f"of its own, got {options['layer_norm']!r}"
            )
        # torch's own checks, on a cell that it knows; its parameters never get memory.
        super().__init__(
            "RNN_TANH",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device="meta",
            dtype=dtype,
            checkpoint_every=checkpoint_every,
            **options,
        )
        for name in list(self._parameters):
            delattr(self, name)
        self.mode = self.definition.mode
        directions = 2 if bidirectional else 1
        own: list[list[str]] = []
        for k in range(num_layers):
            features = input_size if k == 0 else directions * hidden_size
            for suffix in (f"_l{k}", f"_l{k}_reverse")[:directions]:
                shapes = self._shapes(features)
                for name, shape in shapes.items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(name + suffix, parameter)
                own.append([name + suffix for name in shapes])
        self._all_weights = own
        self._flat_weights_names = [name for names in own for name in names]
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        self.reset_parameters()

    @property
    def has_gains(self) -> bool:
        return super().has_gains and not _GAINS & set(self.definition.parameters)

    @property
    def has_recurrent_weight(self) -> bool:
        return bool(self.definition.recurrent)

    def _shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        """The parameters of one direction of a layer, in the order of Layer.weights."""
        d, hidden = self.definition, self.hidden_size
        rows, recurrent = len(d.gates) * hidden, len(d.recurrent) * hidden
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, features)}
        if recurrent:
            shapes["weight_hh"] = (recurrent, hidden)
        if self.bias:
            shapes["bias_ih"] = (rows,)
            if recurrent:
                shapes["bias_hh"] = (recurrent,)
        if self.layer_norm:
            shapes |= {"gain_ih": (rows,), "gain_hh": (recurrent,)}
        return shapes | dict.fromkeys(d.parameters, (hidden,))

    def reset_parameters(self) -> None:
        """Sets the parameters to new initial values."""
        bound = self.hidden_size**-0.5
        for name, parameter in self.named_parameters():
            own = name.rpartition("_l")[0]
            initial = self.definition.parameters.get(own)
            if own in _GAINS and own not in self.definition.parameters:
                nn.init.ones_(parameter)
            elif initial is None:
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.constant_(parameter, initial)

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    def flatten_parameters(self) -> None:
        """Nothing: cuDNN has no such cell."""

    def _check_states(self, input: Tensor, states: States, batch_sizes: Tensor | None) -> None:
        self.check_input(input, batch_sizes)
        expected = self.get_expected_hidden_size(input, batch_sizes)
        others = () if len(states) == 1 else states[1].split(self.hidden_size, -1)
        message = "Expected hidden size {}, got {}"
        for i, state in enumerate((states[0], *others)):
            text = message if not others else message.replace("hidden", f"hidden[{i}]")
            self.check_hidden_size(state, expected, text)

    def _states_of(self, output: Tensor, others: Tensor | None) -> list[Tensor]:
        if others is None:
            return [output]
        directions = 2 if self.bidirectional else 1
        each = others.unflatten(-1, (directions, -1, self.hidden_size))
        return [output, *(s.flatten(-2) for s in each.unbind(-2))]

    def _read_states(self, hx: Any) -> States | None:
        """(h,), or h and the other states side by side."""
        names = self.definition.states
        if hx is None:
            return None
        if len(names) == 1:
            return (hx,)
        if not isinstance(hx, (tuple, list)) or len(hx) != len(names):
            got = f"{len(hx)}" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise RuntimeError(f"hx: expected ({', '.join(names)}), got {got}")
        for i, state in enumerate(hx):
            if state.shape != hx[0].shape:
                raise RuntimeError(
                    f"Expected hidden[{i}] size {tuple(hx[0].shape)}, got {list(state.shape)}"
                )
        return hx[0], torch.cat(tuple(hx[1:]), -1)

    def _read_inputs(self, input: Any, inputs: Any) -> tuple[Tensor, ...] | None:
        """For each layer its inputs without weights, in the order of Layer.inputs."""
        names = self.definition.inputs
        if not names:
            if inputs is not None:
                got = type(inputs).__name__
                raise ValueError(
                    f"inputs: expected None for {self._name}, which has none, got {got}"
                )
            return None
        given = [inputs] if isinstance(inputs, Mapping) else inputs
        if not isinstance(given, Sequence) or len(given) != self.num_layers:
            got = f"{len(given)}" if isinstance(given, Sequence) else type(given).__name__
            raise ValueError(
                f"inputs: expected a dict of {', '.join(names)} for each of {self.num_layers} "
                f"layers, got {got}"
            )
        return tuple(self._merge_inputs(input, each) for each in given)

    def _merge_inputs(self, input: Any, given: Inputs) -> Tensor:
        names = self.definition.inputs
        if not isinstance(given, Mapping) or set(given) != set(names):
            got = ", ".join(map(str, given)) if isinstance(given, Mapping) else given
            raise ValueError(f"inputs: expected {', '.join(names)}, got {got}")
        steps = (input.data if isinstance(input, PackedSequence) else input).shape[:-1]
        directions = 2 if self.bidirectional else 1
        tensors = []
        for name in names:
            z = given[name]
            z = z.data if isinstance(z, PackedSequence) else z
            expected = [*steps, directions * self.hidden_size]
            if not isinstance(z, Tensor) or list(z.shape) != expected:
                shown = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"inputs[{name!r}]: expected a tensor of {expected}, got {shown}")
            tensors.append(z)
        if len(tensors) == 1:
            return tensors[0]
        each = [z.unflatten(-1, (directions, self.hidden_size)) for z in tensors]
        return torch.stack(each, -2).flatten(-3)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        return_states: bool = False,
        grad_scale: Tensor | PackedSequence | None = None,
        inputs: Inputs | Sequence[Inputs] | None = None,
    ) -> Any:
        """Runs all layers over all steps.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
            hx: the initial states [L * D, B, H], without B if unbatched: a tensor, or a tuple of
                them if the cell has more than one state. None means zeros.
            lengths: int64 [B] or a list: the number of valid steps of each row, which come first.
            mask: bool, laid out as the input without its features; True where a step is valid. A
                masked step leaves the states as they are and outputs zeros. Not together with
                lengths.
            reset: bool, laid out as mask; True where a step begins a new segment of its row, which
                zero states enter.
            return_states: whether to return the states of every step too.
            grad_scale: a floating tensor, laid out as mask: the gradient that flows back from a
                step to the one before it, through all states, is multiplied by it.
            inputs: for a cell with inputs, a dict of tensors laid out as the output, one for each
                name; a list of such dicts, one for each layer, if there are several layers.

        Returns:
            output: laid out as input, with D * H features; a PackedSequence for a PackedSequence.
            h_n: the states after each row's last valid step, shaped like hx.
            states: with return_states only: a tuple with one entry per layer, the states of every
                step laid out as output: a tensor, or a tuple of them in the order of hx.

        Raises:
            ValueError: if lengths, mask, reset or inputs is of a wrong type, shape or range.
            RuntimeError: as torch.nn's, with its text, for input and hx of wrong shapes or devices.
        """
        is_plain = lengths is None and mask is None and reset is None and inputs is None
        if is_plain and not return_states:
            result = self._run_directly(input, hx)
            if result is not None:
                return result
        result = self._run_otherwise(
            input,
            hx,
            lengths=lengths,
            mask=mask,
            reset=reset,
            return_states=return_states,
            inputs=inputs,
        )
        if result is not None:
            return result
        own = self._read_inputs(input, inputs)
        states = self._read_states(hx)
        output, final, sequences = self._forward(
            input, states, lengths, mask, reset, return_states, grad_scale, own
        )
        count = len(self.definition.states)
        h_n: Any = final[0]
        if count > 1:
            h_n = final[0], *final[1].split(self.hidden_size, -1)
        if not return_states:
            return output, h_n
        if count > 1:
            sequences = tuple(
                tuple(sequences[k : k + count]) for k in range(0, len(sequences), count)
            )
        return output, h_n, sequences


def _step(definition: Definition) -> Callable[..., States]:
    """The step of the reference implementation: see reference.add_cell."""
    d, function = definition, definition.function
    expected = 1 + bool(d.recurrent) + len(d.parameters)  # weights, if there are no biases

    def step(
        x: Tensor,
        state: States,
        *weights: Tensor,
        inputs: Tensor | None,
        masked: Tensor | None = None,
        layer_norm: bool = False,
    ) -> States:
        given = iter(weights)
        has_bias = len(weights) > expected + 2 * layer_norm
        w_ih = next(given)
        w_hh = next(given) if d.recurrent else None
        b_ih = next(given) if has_bias else None
        b_hh = next(given) if has_bias and d.recurrent else None
        norms = reference.Norms(next(given), next(given)) if layer_norm else None
        recurrent: dict[str, Tensor] = {}
        if w_hh is None:
            of_x = linear(x, w_ih, b_ih)
        else:
            h = state[0] if masked is None else masked
            of_x, of_h = reference.products(x, h, w_ih, w_hh, b_ih, b_hh, norms)
            recurrent = dict(zip(d.recurrent, of_h.chunk(len(d.recurrent), -1)))
        own = dict(zip(d.gates, of_x.chunk(len(d.gates), -1)))
        if inputs is not None:
            own |= zip(d.inputs, inputs.chunk(len(d.inputs), -1))
        parameters = dict(zip(d.parameters, given))
        after = function(SimpleNamespace(**own), SimpleNamespace(**recurrent), *state, **parameters)
        return after if isinstance(after, tuple) else (after,)

    return step


def cell(
    *,
    gates: Sequence[str],
    recurrent: Sequence[str] | None = None,
    inputs: Sequence[str] = (),
    header: str | Path | None = None,
) -> Callable[[Callable[..., Any]], type[CellLayer]]:
    """Turns a function for one step of a cell into a class of layers.

    The function is called with x, r and the states before the step, and returns the states after
    it, in the same order. The first state is the output, and W_hh multiplies it. x and r have an
    attribute for each gate: W_ih x_t + b_ih and W_hh h_{t-1} + b_hh. Keyword-only parameters are
    learned vectors [H]. Their initial value is the default; without one, it is drawn like weights.

    The function runs once on symbolic values, to record what it computes. It may use arithmetic,
    comparisons, torch.where and torch's pointwise functions. Numbers from outside the function have
    the value of that moment. On tensors, the function is the reference implementation.

    Args:
        gates: the names of the gates, in the order of the rows of weight_ih and weight_hh.
        recurrent: the gates that have rows in weight_hh; all, if not given. Without any, (), there
            is no weight_hh.
        inputs: names of further inputs of each step and unit that no weight multiplies, which come
            as attributes of x.
        header: the path of a C++ header that you have written, in the form of
            csrc/cells/general.h, with a struct of the function's name in namespace fastrnn. Without
            it, one is generated.

    Returns:
        A decorator, which returns a subclass of fastrnn._cell.CellLayer.

    Raises:
        ValueError: if the names do not fit together, or the function does something that a kernel
            cannot do; the message has its name and the line.

    Examples:
        >>> import torch, fastrnn
        >>> @fastrnn.cell(gates=("z", "n"))
        ... def Minimal(x, r, h):
        ...     z = torch.sigmoid(x.z + r.z)
        ...     return (1 - z) * h + z * torch.tanh(x.n + r.n)
        >>> rnn = Minimal(input_size=8, hidden_size=16, bidirectional=True)
        >>> output, h_n = rnn(torch.randn(5, 3, 8))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 32]), torch.Size([2, 3, 16]))
    """

    def decorate(function: Callable[..., Any]) -> type[CellLayer]:
        text = None if header is None else Path(header).read_text()
        definition = define(function, gates, recurrent, inputs, text)
        mode, d = definition.mode, definition
        counts = len(d.gates), len(d.recurrent), len(d.states) - 1, len(d.inputs), len(d.parameters)
        add_cell(mode, *counts)
        add_function(mode, d.name)
        reference.add_cell(mode, len(d.gates), len(d.states), _step(d))
        _kernels.add(definition)
        attributes = {
            "__module__": function.__module__,
            "__qualname__": function.__qualname__,
            "__doc__": function.__doc__ or f"Layers of the cell {d.name}: see fastrnn.cell.",
            "definition": definition,
        }
        return type(d.name, (CellLayer,), attributes)

    return decorate
