"""The compiled kernels; see csrc/cpu/bind/. `layer` is a fastrnn._layer.Layer or its fields."""

from collections.abc import Callable, Sequence
from typing import Any, final

from torch import Tensor

class CellInfo:
    @property
    def index(self) -> int: ...
    @property
    def gates(self) -> int: ...
    @property
    def recurrent(self) -> int: ...
    @property
    def states(self) -> int: ...
    @property
    def extras(self) -> int: ...
    @property
    def saves(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    @property
    def parameters(self) -> int: ...
    @property
    def norms(self) -> int: ...
    @property
    def has_cell_state(self) -> bool: ...
    @property
    def has_extra(self) -> bool: ...
    @property
    def saves_gates(self) -> bool: ...
    @property
    def splits_gradient(self) -> bool: ...

cells: dict[str, CellInfo]
layer_fields: tuple[str, ...]

def add_cell(
    mode: str, gates: int, recurrent: int, states: int, inputs: int, parameters: int, /
) -> CellInfo:
    """Makes a cell known. Its traits are complete when a kernel of it was loaded."""

def load_cell(mode: str, address: int, /) -> None:
    """Takes up the kernel of a cell for one dtype: the address of a CellModule, see
    csrc/cpu/cell_module.h."""

def define_cell(address: int, /) -> None:
    """Completes a cell's traits by those that a kernel for another device begins with."""

def int8_variant() -> str:
    """How integers are multiplied: the best of "avx512vnni", "avx512", "avxvnni", "avx2",
    "dotprod" and "baseline" that this processor can run and FASTRNN_CPU, if it is set, allows."""

def cpu_variant() -> str:
    """The variant of the CPU kernels in use: the best that this processor can run, or the one that
    FASTRNN_CPU in the environment names at import.

    Examples:
        >>> import fastrnn
        >>> fastrnn.cpu_variant() in fastrnn.cpu_variants()
        True
    """

def cpu_variants() -> list[str]:
    """The variants that this processor can run, best first: "avx512bf16", "avx512", "avx2" and
    "baseline", as far as it can run them.

    Examples:
        >>> import fastrnn
        >>> fastrnn.cpu_variants()[-1]
        'baseline'
    """

def cpu_variant_flags() -> str:
    """The compiler's flags of that variant, separated by spaces."""

def multiply_add_rate(threads: int, /) -> float:
    """Floating-point operations per second in float32 of threads that do nothing but multiply-adds
    on registers: the limit of the variant in use, the best of several short bursts."""

def tile_rate(vectors: int, depth: int, transposed: bool, /) -> float:
    """The same of one thread that does nothing but the tallest register tile of 1 to 4 vectors, on
    sums of `depth` products; transposed: the tile of weight gradients."""

def set_torch(
    tensor_type: type,
    parameter_type: type,
    watchers: tuple[Callable[[], Any], ...],
    is_grad_enabled: Callable[[], bool],
    get_num_threads: Callable[[], int],
    /,
) -> None:
    """Tells the extension of torch, once; each watcher says whether something watches each
    operation."""

def exchange() -> str:
    """How tensors come and go: "dlpack", by a table of C functions, or "attributes", in Python.
    FASTRNN_EXCHANGE=attributes in the environment forces the second."""

class PackedLayer:
    """The weights of one layer in all its directions, packed: see csrc/cpu/bind/packed.h."""

    def __init__(self, layer: tuple[Any, ...], storage: str, /) -> None: ...
    @property
    def bytes(self) -> int: ...
    @property
    def mode(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def proj_size(self) -> int: ...
    def forward(self, layer: tuple[Any, ...], /) -> tuple[Tensor | None, ...]:
        """As the function of this name; the record's own weights are not read."""

class Int8Layer(PackedLayer):
    """The same with weights of 8 bits; see csrc/cpu/bind/int8_layer.h."""

    def __init__(
        self, mode: str, directions: int, weights: Sequence[Tensor], scales: Sequence[Tensor], /
    ) -> None:
        """weights: as in a Layer, matrices as torch.int8 in [-127, 127] and biases as
        torch.float32; scales: of the rows of each matrix."""

    @property
    def weights(self) -> tuple[Tensor, ...]: ...
    @property
    def scales(self) -> tuple[Tensor, ...]: ...

class PackedModel:
    """The packed layers of a module, and what its parameters were then."""

    def __init__(
        self, layers: list[PackedLayer], module: dict[str, Any], parameters: list[Tensor], /
    ) -> None: ...
    @property
    def layers(self) -> list[PackedLayer]: ...
    @property
    def bytes(self) -> int: ...
    def is_current(self, module: dict[str, Any], /) -> bool:
        """Whether the module's parameters are what they were."""

    def step(
        self, module: dict[str, Any], x: Any, h: Any, c: Any, /
    ) -> tuple[Tensor, Tensor | None] | None:
        """One step of the first layer; None where the call is more than that, or wrong."""

    def run(
        self, module: dict[str, Any], x: Any, h: Any, c: Any, /
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """All layers over all steps; None where the call is more than that, or wrong."""

    def start(
        self,
        module: dict[str, Any],
        batch: int,
        is_batched: bool,
        h: Tensor | None,
        c: Tensor | None,
        /,
    ) -> PackedState: ...

@final
class PackedState:
    """The states of all layers between two steps."""

    @property
    def batch(self) -> int: ...
    @property
    def is_batched(self) -> bool: ...
    def step(self, x: Any, mask: Any, /) -> PackedState | None:
        """The state after x; None where the call is more than that, or wrong."""

    def run(self, x: Any, /) -> tuple[Tensor, PackedState] | None:
        """The top layer's outputs over x [T, B, I], and the state after it."""

    def tensors(self) -> tuple[Tensor, Tensor | None]: ...
    def h(self, layer: int, /) -> Tensor: ...

def inspect(layer: tuple[Any, ...], others: tuple[Tensor | None, ...], /) -> int:
    """What an eager call on these tensors is: a fastrnn._operators.Call."""

def run_module(
    module: dict[str, Any],
    input: Any,
    hx: Any,
    checkpoint_every: int,
    functions: dict[str, Callable[..., tuple[Tensor, ...]]],
    stack: Callable[..., tuple[Tensor, ...]],
    /,
) -> Any:
    """fastrnn._backends.Backend.run_module"""

def check(layer: tuple[Any, ...], /) -> None:
    """Raises ValueError, naming the field, for a record that does not fit together."""

def is_contiguous(record: tuple[Any, ...], /) -> bool:
    """Whether all tensors in it are, and in sequences in it."""

def check_saved(layer: tuple[Any, ...], saved: tuple[Any, ...], /) -> None:
    """The same for a fastrnn._layer.Saved."""

def forward(layer: tuple[Any, ...], /) -> tuple[Tensor | None, ...]:
    """The fields of fastrnn._layer.Results."""

def backward(layer: tuple[Any, ...], saved: tuple[Any, ...], /) -> list[Tensor | None]:
    """The gradients of x, h_0, c_0, inputs and each weight."""

least_stack_steps: int  # with fewer, it is not worth a question

def plan_stack(stack: tuple[Any, ...], layers: int, /) -> tuple[int, int, int]:
    """How the layers of a stack run side by side: threads, 1 if they do not; parts of the rows;
    steps of a chunk. See csrc/cpu/schedule.h."""

def forward_stack(
    stack: tuple[Any, ...], layers: int, dropout: Tensor | None, /
) -> tuple[Tensor, ...]:
    """fastrnn._backends.Backend.forward_stack"""

def record(ctx: Any, options: tuple[Any, ...], /, *tensors: Any) -> tuple[Tensor, ...]:
    """fastrnn._backends.Backend.record"""

def replay(ctx: Any, /, *gradients: Tensor | None) -> tuple[Tensor | None, ...] | None:
    """fastrnn._backends.Backend.replay"""

def record_stack(
    ctx: Any, layers: int, options: tuple[Any, ...], dropout: Tensor | None, /, *tensors: Any
) -> tuple[Tensor, ...]:
    """fastrnn._backends.Backend.record_stack"""

def replay_stack(ctx: Any, /, *gradients: Tensor | None) -> tuple[Tensor | None, ...] | None:
    """Its backward, as replay is that of record."""
