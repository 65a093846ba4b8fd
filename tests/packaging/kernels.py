"""Layers of every cell and dtype on the extension in a folder of installed packages, for builds by
other compilers: results and gradients against torch.nn's in float64.

    python tests/packaging/kernels.py FOLDER
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

folder = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(folder))
sys.meta_path[:] = [f for f in sys.meta_path if isinstance(f, type)]  # no editable install

import torch  # noqa: E402

import fastrnn  # noqa: E402

assert Path(fastrnn.__file__).is_relative_to(folder), fastrnn.__file__

CELLS = {
    "LSTM": {},
    "GRU": {},
    "RNN": {},
    "RNN relu": {"nonlinearity": "relu"},
    "LSTM projected": {"proj_size": 7},
}
SIZES = (3, 2, 5, 19), (4, 9, 33, 64), (5, 1, 40, 130)  # T, B, I, H: tiles, tails, few rows
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def results(model: torch.nn.RNNBase, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    output, _ = model(x)
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"output": output.detach(), "x": x.grad} | gradients


def check(what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{fastrnn.cpu_variant()}, {what}: error {error:.2g}"


def main() -> None:
    torch.manual_seed(0)
    layers = 0
    for (name, options), (T, B, I, H), dtype in product(CELLS.items(), SIZES, TOLERANCE):  # noqa: E741
        cell = name.split()[0]
        ours = getattr(fastrnn, cell)(I, H, bidirectional=True, dtype=dtype, **options)
        theirs = getattr(torch.nn, cell)(I, H, bidirectional=True, dtype=torch.float64, **options)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(T, B, I).to(dtype)
        what = f"{name} {dtype} {T, B, I, H}"
        expected = results(theirs, x.double())
        for key, value in results(ours, x).items():
            check(f"{what}, {key}", value, expected[key], TOLERANCE[dtype])
        layers += 1
        if dtype is torch.float32 and name != "LSTM projected":
            for weights, tolerance in ((torch.bfloat16, 3e-2), (torch.int8, 5e-2)):
                frozen = fastrnn.freeze(ours.eval(), weights=weights)
                with torch.no_grad():
                    check(f"{what}, {weights}", frozen(x)[0], expected["output"], tolerance)
                fastrnn.unfreeze(frozen)
                layers += 1
    print(f"{fastrnn.cpu_variant()}: {layers} layers are right")


if __name__ == "__main__":
    main()
