"""examples/stream.py: block by block is the same as all at once, and noise falls."""

import pytest
import torch

import _common
import fastrnn
import stream

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("backend", ["fastrnn", "torch"])
def test_blocks_are_the_whole(backend):
    args = stream.make_parser().parse_args(["--block=32", "--hidden=16", "--layers=2"])
    model = stream.Denoiser(_common.library(backend), args).eval()
    _, noisy = stream.chords(1, 320, 0)
    with torch.no_grad():
        expected = model(noisy)[0]
        output, seconds = stream.stream(model, noisy[0])
        torch.testing.assert_close(output, expected)
        if backend == "fastrnn":
            fastrnn.freeze(model)
            assert torch.equal(stream.stream(model, noisy[0])[0], output)
    assert len(seconds) == 10


def test_chords():
    clean, noisy = stream.chords(3, 1000, seed=1)
    assert clean.shape == noisy.shape == (3, 1000)
    assert torch.equal(clean, stream.chords(3, 1000, seed=1)[0])
    assert (noisy - clean).std().item() == pytest.approx(stream.NOISE, rel=0.1)


def test_it_learns(capsys):
    options = ["--count=150", "--epochs=12", "--hidden=32", "--seconds=1", "--backend=both"]
    assert stream.main(options) == 0
    output = capsys.readouterr().out
    before = float(output.split("noisy: ")[1].split(" dB")[0])
    for name in ("fastrnn", "torch"):
        after = float(output.split(f"\n{name}: ")[1].split(" dB")[0])
        assert after > before
    assert "p99.9" in output
    assert "real-time factor" in output


def test_no_block(capsys):
    with pytest.raises(SystemExit):
        stream.main(["--block=512", "--seconds=0.1", "--count=1", "--epochs=1", "--block=15"])
    assert "not in [16" in capsys.readouterr().err
