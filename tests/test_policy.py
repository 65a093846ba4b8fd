"""examples/policy.py: it acts and learns, and its states are those of the scan that learns."""

import pytest
import torch

import policy

gymnasium = pytest.importorskip("gymnasium")
pytestmark = pytest.mark.usefixtures("one_thread")


def make(envs=5):
    args = policy.make_parser().parse_args(["--hidden=8"])
    torch.manual_seed(0)
    made = gymnasium.make_vec(
        "CartPole-v1",
        num_envs=envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP},
    )
    model = policy.Policy(2, args)
    return model, policy.Player(model, made, seed=0)


@torch.no_grad()
def test_acting_is_what_it_learns_from():
    model, player = make()
    for _ in range(3):
        seen, begins, actions, rewards, h, value = player.play(40)
        assert seen.shape == (40, 5, 2)
        output, _ = model.rnn(seen, h, reset=begins)
        torch.testing.assert_close(player.state.output(), output[-1])
        assert (value[player.begins] == 0).all()
        assert set(actions.flatten().tolist()) == {0, 1}
        assert (rewards == 1).all()
    assert begins.any()


def test_it_learns(capsys):
    assert policy.main(["--steps=80000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.split(": ")[1].split(" ")[0]) for line in (lines[0], lines[-1]))
    assert last > 1.3 * first
