"""The compiled kernels; see csrc/cpu/bind.cc. An address is that of a contiguous tensor's data, 0 for
none."""

from collections.abc import Sequence

class CellInfo:
    @property
    def index(self) -> int: ...
    @property
    def gates(self) -> int: ...
    @property
    def has_cell_state(self) -> bool: ...
    @property
    def has_extra(self) -> bool: ...
    @property
    def saves_gates(self) -> bool: ...

cells: dict[str, CellInfo]

def cpu_variant() -> str:
    """The variant of the CPU kernels in use: the best that this processor can run, or the one that
    FASTRNN_CPU names in the environment at the time of the import."""

def cpu_variants() -> list[str]:
    """The variants that this processor can run, best first: of "avx512bf16", "avx512", "avx2" and
    "baseline"."""

def forward(
    cell: int,
    dtype: int,
    sizes: tuple[int, int, int, int, int],
    rows: int,
    batch_sizes: int,
    resets: int,
    reverse: bool,
    input: int,
    x: int,
    weight_ih: Sequence[int],
    weight_hh: Sequence[int],
    weight_hr: Sequence[int],
    bias_ih: Sequence[int],
    bias_hh: Sequence[int],
    h_0: int,
    c_0: int,
    output: int,
    h_n: int,
    c_n: int,
    gates: Sequence[int],
    extra: int,
    threads: int,
    /,
) -> None: ...
def backward(
    cell: int,
    dtype: int,
    sizes: tuple[int, int, int, int, int],
    rows: int,
    batch_sizes: int,
    resets: int,
    reverse: bool,
    input: int,
    x: int,
    weight_ih: Sequence[int],
    weight_hh: Sequence[int],
    weight_hr: Sequence[int],
    h_0: int,
    c_0: int,
    output: int,
    gates: Sequence[int],
    extra: int,
    d_output: int,
    d_h_n: int,
    d_c_n: int,
    d_extra: int,
    d_x: int,
    d_h_0: int,
    d_c_0: int,
    d_weight_ih: Sequence[int],
    d_weight_hh: Sequence[int],
    d_weight_hr: Sequence[int],
    d_bias_ih: Sequence[int],
    d_bias_hh: Sequence[int],
    threads: int,
    /,
) -> None: ...
