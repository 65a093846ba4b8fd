"""Tensors come and go through DLPack's table, or through their attributes: the same bits."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn._load import _cpu
from helpers import CELLS, inputs, make, pack, unpack

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
HAS_TABLE = hasattr(Tensor, "__dlpack_c_exchange_api__")
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: torch.stack((t, -t), -1)[..., 1],
    "offset": lambda t: torch.cat((-t, t))[len(t) :],
    "expanded": lambda t: t[:1].expand(t.shape),
}
SIZES = (1, 1), (5, 3), (4, 0)  # T, B


def digest(*tensors: Tensor) -> str:
    code = hashlib.sha256()
    for t in tensors:
        code.update(repr((t.dtype, t.shape, t.is_contiguous())).encode())
        code.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return code.hexdigest()


def results(cell: str, dtype: torch.dtype, layout: str, T: int, B: int) -> list[str]:
    """Digests of inference, and of training with its gradients."""
    lay_out = LAYOUTS[layout]
    model = make(fastrnn, cell, 3, 7, 2, bidirectional=True, dtype=dtype)
    x, hx = inputs(model, T, B)
    x, states = lay_out(x), tuple(map(lay_out, unpack(hx)))
    for name in ("weight_ih_l0", "weight_hh_l1", "bias_hh_l1"):
        setattr(model, name, torch.nn.Parameter(lay_out(getattr(model, name).detach())))
    found = []
    with torch.no_grad():
        output, h_n = model(x, pack(states))
        found.append(digest(output, *unpack(h_n)))
    leaves = [x.detach().requires_grad_(), *(s.detach().requires_grad_() for s in states)]
    output, h_n = model(leaves[0], pack(tuple(leaves[1:])))
    gradient = lay_out(torch.ones_like(output))
    grads = torch.autograd.grad(output, [*leaves, *model.parameters()], gradient)
    return [*found, digest(output, *unpack(h_n), *grads)]


def main() -> None:
    cases = product(CELLS, DTYPES, LAYOUTS, SIZES)
    found = {str(case): results(*case[:3], *case[3]) for case in cases}
    print(json.dumps({"exchange": _cpu.exchange(), "found": found}))


def run(exchange: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "FASTRNN_EXCHANGE": exchange, "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(not HAS_TABLE, reason="this torch has no table")
def test_same_bits():
    runs = []
    for exchange in ("dlpack", "attributes"):
        done = run(exchange)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
        assert runs[-1]["exchange"] == exchange
    by_table, by_attributes = (r["found"] for r in runs)
    assert len(by_table) == len(CELLS) * len(DTYPES) * len(LAYOUTS) * len(SIZES)
    assert by_table == by_attributes


def test_wrong_name():
    done = run("numpy")
    assert done.returncode != 0
    assert "FASTRNN_EXCHANGE: expected dlpack or attributes, got 'numpy'" in done.stderr


if __name__ == "__main__":
    main()
