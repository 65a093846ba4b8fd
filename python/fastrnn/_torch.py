"""What fastrnn uses of torch's private interface: a new torch can break this file and no other.

Its last names are torch's own recurrent classes, as they were when fastrnn was imported: a program
may have put ours in their place since.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

__all__ = [
    "WATCHERS",
    "Gru",
    "GruCell",
    "Lstm",
    "LstmCell",
    "Rnn",
    "RnnCell",
    "add_to_each",
    "assert_async",
    "assume_constant",
    "below_autograd",
    "bind_apply",
    "by_sample",
    "graph_task",
    "has_forward_ad",
    "is_batched",
    "is_expanded",
    "is_exporting_to_onnx",
    "is_intercepted",
    "is_tracing",
    "is_transforming",
    "library_file",
    "no_value",
    "symbolic_node",
    "trace_pointwise",
    "tracing_state",
    "unwrap_dead_wrappers",
    "unwrapped",
    "version_of",
    "wrap_quantizers",
]

F = TypeVar("F", bound=Callable[..., Any])


def has_forward_ad() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


# Each says whether something is at work that wants to see every operation: a dispatch mode, a
# trace, a transform of torch.func, the profiler, autocast (of any device: to ask for one takes
# twice as long).
WATCHERS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._get_tracing_state,
    torch._C._are_functorch_transforms_active,
    torch._C._autograd._profiler_enabled,
    torch._C._is_any_autocast_enabled,
    has_forward_ad,
)

# Inside `with below_autograd():` operators run as if no tensor required a gradient.
below_autograd = torch._C._AutoDispatchBelowAutograd


def library_file() -> str:
    """The file of torch's Python extension."""
    return torch._C.__file__


tracing_state = torch._C._get_tracing_state  # None, unless torch.jit.trace is at work


def is_tracing() -> bool:
    """Whether torch.jit.trace is at work."""
    return tracing_state() is not None


def is_intercepted() -> bool:
    """Whether a dispatch mode, a trace or a transform has to see operations that change results."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


def is_transforming() -> bool:
    """Whether torch.func or forward-mode AD is at work, which no tensor shows by requires_grad."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor behind those of torch.func; under vmap it holds the values of all samples."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_expanded(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one of them is an Expanded Weight, which only torch's own operators know."""
    module = sys.modules.get("torch.nn.utils._expanded_weights.expanded_weights_impl")
    return module is not None and any(isinstance(t, module.ExpandedWeight) for t in tensors)


def assume_constant(function: F) -> F:
    """torch.compiler.assume_constant_result, which imports the compiler: that takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@assume_constant
def is_exporting_to_onnx() -> bool:
    """Whether torch.onnx.export is at work, by either of its ways."""
    onnx = sys.modules.get("torch.onnx")  # not to be imported for the question
    return onnx is not None and onnx.is_in_onnx_export()


def symbolic_node(
    name: str,
    inputs: Sequence[Tensor | None],
    attributes: dict[str, Any],
    shapes: Sequence[Sequence[Any]],
) -> Sequence[Tensor]:
    """A node of ONNX in an exported program. torch has it since 2.8."""
    ops = getattr(torch.onnx, "ops", None)
    if ops is None:
        raise RuntimeError("torch.onnx.export(dynamo=True): needs torch 2.8; use dynamo=False")
    dtypes = [inputs[0].dtype] * len(shapes)  # type: ignore[union-attr]
    return ops.symbolic_multi_out(name, inputs, attributes, dtypes=dtypes, shapes=shapes)


def no_value(graph: Any) -> Any:
    """What stands for an input that is not given, in a graph of the exporter by a trace."""
    value = graph.op("prim::Constant")
    value.setType(torch._C.OptionalType.ofTensor())
    return value


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; -1 where torch does not count, in inference mode."""
    return -1 if tensor.is_inference() else tensor._version


def wrap_quantizers(wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts wrapper(f) in the place of what torch's quantizers run on a model, eager and by fx.

    Their own functions call these by name, so that it does not matter who has imported what.
    """
    try:
        quantize = import_module("torch.ao.quantization.quantize")
        quantize_fx = import_module("torch.ao.quantization.quantize_fx")
    except ImportError:  # a torch that has them no more
        return
    for module, names in (
        (quantize, ("propagate_qconfig_", "_add_observer_", "convert")),
        (quantize_fx, ("_prepare_fx", "_convert_fx")),
    ):
        for name in names:
            setattr(module, name, wrapper(getattr(module, name)))
    for name in ("propagate_qconfig_", "convert"):
        setattr(torch.ao.quantization, name, getattr(quantize, name))


def is_batched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether torch.autograd.grad(is_grads_batched=True) runs over one of the tensors, with a vmap
    that is older than that of torch.func."""
    return any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)


def by_sample(
    function: Callable[..., Sequence[Tensor | None]], tensors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """What that vmap makes of the function, sample by sample."""
    level = max(1, torch._C._vmapmode_increment_nesting() - 1)
    torch._C._vmapmode_decrement_nesting()
    batched = [is_batched([t]) for t in tensors]
    inner = [
        torch._remove_batch_dim(t, level, 0, 0) if is_in and t is not None else t
        for t, is_in in zip(tensors, batched)
    ]
    count = next(len(t) for t, is_in in zip(inner, batched) if is_in and t is not None)
    runs = [
        function(*(t[i] if is_in and t is not None else t for t, is_in in zip(inner, batched)))
        for i in range(count)
    ]
    return [
        None if each[0] is None else torch._add_batch_dim(torch.stack(each), 0, level)
        for each in zip(*runs)
    ]


def assert_async(condition: Tensor, message: str) -> None:
    """An assertion that does not make the host wait for the device."""
    torch._assert_async(condition, message)


def add_to_each(sums: list[Tensor], values: list[Tensor]) -> None:
    """sums[i] += values[i], on a GPU in one launch."""
    torch._foreach_add_(sums, values)


# The number of the backward pass that this thread is in.
graph_task = torch._C._current_graph_task_id


def bind_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply outside torch.func, which no argument may have outlived.

    Without torch's look at the signature of forward, which takes as long as a small step.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


# A trace sets what torch keeps for the whole process, and puts back what it found: two traces at
# once may leave torch believing for good that it is traced.
_tracing = threading.Lock()


def trace_pointwise(
    function: Callable[..., Any], arguments: tuple[Any, ...], composite: tuple[Any, ...]
) -> torch.fx.Graph:
    """The graph of what a function does to tensors, in torch's core operators.

    composite: operators that are to be taken apart, too.
    """
    from torch._decomp import core_aten_decompositions, get_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    table: Any = {**core_aten_decompositions(), **get_decompositions(composite)}
    functional = torch.func.functionalize(function, remove="mutations_and_views")
    with _tracing:
        graph: torch.fx.Graph = make_fx(functional, decomposition_table=table)(*arguments).graph
    return graph


Lstm, Gru, Rnn = nn.LSTM, nn.GRU, nn.RNN
LstmCell, GruCell, RnnCell = nn.LSTMCell, nn.GRUCell, nn.RNNCell
