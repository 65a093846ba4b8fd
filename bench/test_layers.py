"""fastrnn and torch.nn under pytest-benchmark, one group per cell, mode and shape."""

import pytest

from .cases import GATES, MODES, Case
from .compare import BASE
from .machine import cores
from .peers import PEERS

SHAPES = [(100, 1, 128), (100, 32, 128), (50, 64, 512), (35, 20, 650)]  # T, B, H = I


@pytest.mark.parametrize("name", BASE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("shape", SHAPES, ids="T{0[0]}-B{0[1]}-H{0[2]}".format)
def test_layer(benchmark, shape, cell, mode, name):
    case = Case(cell, mode, *shape)
    benchmark.group = case.name
    peer = PEERS[name](cores())
    peer.prepare(case)
    benchmark.pedantic(peer.step, rounds=20, warmup_rounds=2)
