"""The operators as torch.library sees them: schema, mutation, fake shapes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from helpers import inputs, make, make_mask, run


class Calls(TorchDispatchMode):
    """Collects what a model passes to the operators of fastrnn."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastrnn":
            self.found.append((func, torch.utils._pytree.tree_map(self.copy, args)))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def copy(value):
        return value.detach().clone() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("masked", [False, True], ids=["full", "holes"])
def test_opcheck(cell, dtype, bidirectional, masked):
    model = make(fastrnn, cell, 2, 5, bidirectional=bidirectional, dtype=dtype)
    x, hx = inputs(model, 4, 3)
    with Calls() as calls:
        run(model, x, hx, mask=make_mask("holes", 4, 3) if masked else None)
    names = {func._schema.name for func, _ in calls.found}
    assert names == {"fastrnn::scan_forward", "fastrnn::scan_backward"}
    for func, args in calls.found:
        torch.library.opcheck(func, args)
