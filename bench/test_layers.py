"""fastrnn and torch.nn under pytest-benchmark, one group per cell, mode and shape."""

import pytest

from compare import BACKENDS, GATES, MODES, SHAPES, make_step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("shape", SHAPES, ids="T{0[0]}-B{0[1]}-H{0[2]}".format)
def test_layer(benchmark, shape, cell, mode, backend):
    benchmark.group = f"{cell} {mode} (T, B, H) = {shape}"
    benchmark.pedantic(make_step(backend, cell, shape, mode), rounds=20, warmup_rounds=2)
