"""examples/char_lm.py: both backends learn alike, in one process or two, and what is interrupted
goes on bit for bit.
"""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

import char_lm

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = ["lstm", "gru", "rnn"]
BACKENDS = ["fastrnn", "torch"]
SMALL = ["--hidden=16", "--embed=8", "--batch=4", "--steps=16", "--lr=0.01", "--sample=40"]


@pytest.fixture
def text(tmp_path):
    """A file of sums: 2800 characters, read once in 41 steps of SMALL's size."""
    file = tmp_path / "sums.txt"
    file.write_text("".join(f"{i} + {i // 3} = {i + i // 3}\n" for i in range(100, 300))[:2800])
    return file


@pytest.fixture
def run(text, tmp_path, capsys):
    """Runs the program on `text` and returns (bits per character of each step, output)."""

    def run(*options, expect=0):
        losses = tmp_path / "losses.csv"
        assert char_lm.main([f"--text={text}", *SMALL, f"--losses={losses}", *options]) == expect
        return read_losses(losses), capsys.readouterr().out

    return run


def read_losses(file):
    header, *rows = file.read_text().splitlines()
    assert header == "step,bits_per_char"
    return [float(row.split(",")[1]) for row in rows]


@pytest.fixture
def run_two(text, tmp_path):
    """`run` under torchrun with two processes; what comes to stderr matters only on failure.

    At the line that has `interrupt_at` in it comes a Ctrl-C.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("a torch without gloo")

    def run(*options, interrupt_at=None):
        losses = tmp_path / "losses.csv"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        program = [char_lm.__file__, f"--text={text}", *SMALL, f"--losses={losses}", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        errors = tmp_path / "errors.txt"
        with (
            errors.open("w") as stderr,
            subprocess.Popen(
                [sys.executable, *torchrun, *program],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
                start_new_session=True,
            ) as process,
        ):
            limit = threading.Timer(60, process.terminate)  # which ends its workers too
            limit.start()
            output = ""
            for line in process.stdout:
                output += line
                if interrupt_at and interrupt_at in line:
                    os.killpg(process.pid, signal.SIGINT)
            code = process.wait()
            limit.cancel()
        assert (code == 0) == (interrupt_at is None), output + errors.read_text()
        return read_losses(losses), output

    return run


def small_model(*options):
    torch.manual_seed(0)
    args = char_lm.make_parser().parse_args([*SMALL, "--backend=torch", *options])
    return char_lm.CharLM("\nabcde", args), args


def leaves(content, path=""):
    """The leaves of a checkpoint, by their place in it."""
    if isinstance(content, (dict, list, tuple)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return {k: v for key, part in items for k, v in leaves(part, f"{path}/{key}").items()}
    return {path: content}


def assert_same_checkpoints(*files, rel=0.0, but=()):
    """Their numbers agree within `rel`, everything else exactly."""
    a, b = (leaves(char_lm.load_checkpoint(file)) for file in files)
    assert a.keys() == b.keys()
    for key in a.keys() - set(but):
        if torch.is_tensor(a[key]):
            torch.testing.assert_close(a[key], b[key], rtol=rel, atol=rel, msg=key)
        else:
            assert a[key] == b[key], key


@pytest.mark.parametrize("cell", CELLS)
def test_backends_agree(run, cell):
    ours, theirs = (run("--max-steps=100", f"--cell={cell}", f"--backend={b}")[0] for b in BACKENDS)
    assert len(ours) == 100
    assert ours == pytest.approx(theirs, rel=0, abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_learns(run, cell, backend):
    losses, output = run("--max-steps=100", f"--cell={cell}", f"--backend={backend}")
    assert sum(losses[-10:]) / 10 < 0.7 * losses[0]
    assert "step 100: validation " in output


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_resume_is_exact(run, tmp_path, cell, backend):
    # Two layers with dropout draw random numbers; 50 steps pass the end of the text.
    model = [f"--backend={backend}", f"--cell={cell}", "--layers=2", "--dropout=0.3"]
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    losses, output = run(*model, f"--checkpoint={whole}", "--max-steps=50")
    first, _ = run(*model, f"--checkpoint={parts}", "--max-steps=25")
    second, resumed = run("--resume", f"--checkpoint={parts}", "--max-steps=50")

    assert first + second == losses
    assert resumed.partition("step 50:")[2] == output.partition("step 50:")[2]  # the sample too
    assert_same_checkpoints(whole, parts)


def test_a_checkpoint_fits_both_backends(run, tmp_path):
    options = [f"--checkpoint={tmp_path / 'lm.pt'}", "--max-steps=20"]
    whole, _ = run("--backend=torch", "--max-steps=20")
    first, _ = run("--backend=torch", *options[:1], "--max-steps=10")
    second, _ = run("--backend=fastrnn", "--resume", *options)
    assert first + second == pytest.approx(whole, rel=0, abs=1e-4)


def test_two_processes_are_the_same_training_as_one(run, run_two, tmp_path):
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    options = ["--cell=lstm", "--layers=2", "--every=20"]
    whole, output = run(*options, f"--checkpoint={one}", "--max-steps=50")
    first, shared = run_two(*options, f"--checkpoint={two}", "--max-steps=50")
    assert first == pytest.approx(whole, rel=0, abs=1e-4)
    assert shared == output  # said once: sizes, validations and the sample
    assert_same_checkpoints(one, two, rel=1e-3, but=["/rng"])


def test_two_processes_resume_exactly(run, run_two, tmp_path):
    # Dropout, so that each process has random numbers of its own to save.
    options = ["--layers=2", "--dropout=0.3"]
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    losses, output = run_two(*options, f"--checkpoint={whole}", "--max-steps=50")
    first, _ = run_two(*options, f"--checkpoint={parts}", "--max-steps=25")
    between = parts.read_bytes()
    second, resumed = run_two("--resume", f"--checkpoint={parts}", "--max-steps=50")
    assert first + second == losses
    assert resumed.partition("step 50:")[2] == output.partition("step 50:")[2]
    assert_same_checkpoints(whole, parts)

    assert sum(losses[-10:]) / 10 < 0.9 * losses[0]
    rngs = char_lm.load_checkpoint(whole)["rng"].chunk(2)
    assert not torch.equal(*rngs)
    # One process goes on from there too, with other dropout.
    parts.write_bytes(between)
    alone, _ = run("--resume", f"--checkpoint={parts}", "--max-steps=50")
    assert alone == pytest.approx(second, rel=0.2)


def test_interrupt_stops_and_saves_two_processes(run, run_two, tmp_path):
    options = [f"--checkpoint={tmp_path / 'lm.pt'}", "--every=10"]
    first, output = run_two(*options, "--minutes=5", interrupt_at="step 10:")
    assert f"step {len(first)}: validation" in output
    assert len(output.split("bits/char\n")[-1]) > 40  # the sample
    steps = len(first) + 5
    second, _ = run(*options, "--resume", f"--max-steps={steps}")
    assert first + second == pytest.approx(run(f"--max-steps={steps}")[0], rel=0, abs=1e-3)


def test_validation_does_not_disturb_training(run):
    options = ["--backend=torch", "--dropout=0.3", "--max-steps=10"]
    assert run(*options, "--every=1")[0] == run(*options)[0]


def test_validation_counts_every_character_once():
    model, _ = small_model()
    data = torch.randint(6, (50, 3))
    expected = char_lm.predict(model, data)[0].item()
    assert char_lm.evaluate(model, data, window=7) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_state_is_carried_from_step_to_step(cell):
    model, args = small_model(f"--cell={cell}", "--lr=0")
    data = torch.randint(6, (49, 4))
    trainer = char_lm.Trainer(model, data, args)
    losses = [trainer.step() for _ in range(3)]
    assert sum(losses) / 3 == pytest.approx(char_lm.evaluate(model, data), rel=1e-5)


def test_interrupt_saves_and_samples(run, tmp_path, monkeypatch):
    options = ["--backend=torch", f"--checkpoint={tmp_path / 'lm.pt'}", "--max-steps=20"]
    whole, _ = run("--backend=torch", "--max-steps=20")
    clip = torch.nn.utils.clip_grad_norm_
    calls = iter(range(20))

    def interrupted_clip(*args):
        if next(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted_clip)
    before = signal.getsignal(signal.SIGINT)
    first, output = run(*options, expect=130)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(first) == 7
    assert "step 7: validation" in output
    assert len(output.split("bits/char\n", 1)[1]) > 40  # the sample
    assert first + run(*options, "--resume")[0] == whole


def test_failed_save_keeps_the_old_checkpoint(run, tmp_path, monkeypatch):
    file = tmp_path / "lm.pt"
    options = ["--backend=torch", f"--checkpoint={file}"]
    run(*options, "--max-steps=2")
    old = file.read_bytes()

    def fail(content, out):
        out.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(SystemExit) as exit:
        run(*options, "--max-steps=3")
    assert exit.value.code == 2
    assert file.read_bytes() == old


def test_a_broken_model_is_not_saved(run, tmp_path, monkeypatch, capsys):
    file = tmp_path / "lm.pt"
    monkeypatch.setattr(char_lm, "evaluate", lambda *_: float("nan"))
    with pytest.raises(SystemExit) as exit:
        run("--backend=torch", "--max-steps=1", f"--checkpoint={file}")
    assert exit.value.code == 2
    assert "lower --lr" in capsys.readouterr().err
    assert not file.exists()


def test_minutes(run):
    losses, output = run("--backend=torch", "--minutes=0.005")
    assert losses
    assert f"step {len(losses)}: validation" in output


def test_sample_is_reproducible(run):
    options = ["--backend=torch", "--max-steps=5", "--prime=10", "--sample=100"]
    (_, once), (_, again), (_, other) = run(*options), run(*options), run(*options, "--seed=1")
    written = once.rpartition("bits/char\n")[2].strip("\n")
    assert once == again
    assert once != other
    assert len(written) > 80
    assert written.startswith("10")


def test_temperature():
    model, _ = small_model()
    random_state = torch.get_rng_state()
    write = [char_lm.sample(model, "a", 60, t, seed) for t in (0, 1) for seed in (1, 2)]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert write[0] == write[1]  # nothing left to chance
    assert write[2] != write[3]
    assert all(len(text) == 61 and set(text) <= set(model.vocabulary) for text in write)


def test_streams_and_encode():
    codes = char_lm.encode("abcabcab", "abc")
    assert codes.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert char_lm.streams(codes, 3).tolist() == [[0, 2, 1], [1, 0, 2]]


def test_default_text():
    text = char_lm.read_text(None)
    assert len(text) > 1_000_000
    assert "class ArgumentParser" in text


def refused(capsys, *options):
    """The one line on stderr with which the program refuses its arguments."""
    with pytest.raises(SystemExit) as exit:
        char_lm.main([*SMALL, "--max-steps=1", "--backend=torch", *map(str, options)])
    assert exit.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("char_lm.py: error: ")
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden=0"], "--hidden: 0 is not in [1, inf)"),
        (["--hidden=x"], "--hidden: invalid int value: 'x'"),
        (["--dropout=1"], "--dropout: 1 is not in [0, 1)"),
        (["--lr=nan"], "--lr: nan is not in"),
        (["--cell=gnu"], "invalid choice: 'gnu'"),
        (["--minutes=1"], "--minutes: not allowed with argument --max-steps"),
        (["--prime=q"], "the text has no 'q'"),
        (["--batch=1000"], "2,800 characters are too few"),
        (["--steps=1000"], "2,800 characters are too few"),
        (["--resume"], "--resume needs --checkpoint"),
        (["--resume", "--checkpoint=missing.pt"], "No such file or directory: 'missing.pt'"),
        (["--checkpoint=missing/lm.pt"], "missing/lm.pt: no such directory"),
        (["--losses=missing/lm.csv"], "missing/lm.csv: no such directory"),
        (["--text=missing.txt"], "No such file or directory: 'missing.txt'"),
    ],
)
def test_bad_arguments(text, capsys, options, message):
    assert message in refused(capsys, "--max-steps=9", f"--text={text}", *options)


def test_a_batch_that_cannot_be_shared_out(text, capsys, monkeypatch):
    monkeypatch.setattr(char_lm, "WORLD", 3)
    monkeypatch.setattr(char_lm.dist, "init_process_group", lambda backend: None)
    assert "--batch 4 cannot be shared out over 3" in refused(capsys, f"--text={text}")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_bad_text(tmp_path, capsys, content):
    file = tmp_path / "text"
    file.write_bytes(content)
    message = "is not UTF-8 text" if content else "0 characters are too few"
    assert message in refused(capsys, f"--text={file}")


def test_missing_backend(text, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastrnn", None)
    assert "--backend fastrnn cannot" in refused(capsys, f"--text={text}", "--backend=fastrnn")


def test_bad_checkpoint(run, text, tmp_path, capsys):
    file = tmp_path / "lm.pt"
    resume = ["--resume", f"--checkpoint={file}"]
    run("--backend=torch", "--max-steps=1", f"--checkpoint={file}")

    assert "--hidden 17: the checkpoint has 16" in refused(capsys, *resume, "--hidden=17")
    assert "--cell rnn: the checkpoint has gru" in refused(capsys, *resume, "--cell=rnn")
    text.write_text(text.read_text().replace("1", "2"))
    assert "comes from another text" in refused(capsys, *resume)

    damaged = file.read_bytes()[:-100]
    for content in (b"", b"nonsense", damaged):
        file.write_bytes(content)
        assert "is not a checkpoint" in refused(capsys, *resume)
    torch.save({"weight": torch.zeros(3)}, file)
    assert "is not a checkpoint" in refused(capsys, *resume)
