"""A recurrent policy that acts in a gymnasium environment, one step of its state at a time.

  policy.py                                balance a pole whose speeds it cannot see
  policy.py --steps 400000 --hidden 64     ... for longer, with more units

From position and angle alone nobody can tell where the pole is going; the state has to remember.
It acts in some environments at once, on packed weights; where an episode ends, its row of the state
starts again from zeros. It learns from stretches of play by actor-critic with the discounted
returns, in one call over all steps, with reset= where episodes begin. Needs torch, gymnasium and
_common.py beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from _common import Parser, UserError, execute

DISCOUNT, ENTROPY, CLIP = 0.99, 0.01, 0.5
SEEN = [0, 2]  # of CartPole's observation: position and angle,
SCALE = torch.tensor([1.0, 20.0])  # which is small
REPORTS = 10


class Policy(nn.Module):
    """What is seen in, the odds of each action and the expected return out."""

    def __init__(self, actions: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.rnn = fastrnn.GRU(len(SEEN), args.hidden)
        self.odds = nn.Linear(args.hidden, actions)
        self.value = nn.Linear(args.hidden, 1)

    def forward(self, seen: Tensor, h: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """All steps ``[T, B]`` at once, for learning."""
        output, _ = self.rnn(seen, h, reset=begins)
        return self.odds(output), self.value(output)[..., 0]


class Player:
    """Some environments, the policy's state in them, and the lengths of the last episodes."""

    def __init__(self, policy: Policy, envs: Any, seed: int) -> None:
        self.policy, self.envs = policy, envs
        self.seen = self.look(envs.reset(seed=seed)[0])
        self.begins = torch.ones(len(self.seen), dtype=torch.bool)
        self.state = policy.rnn.initial_state(batch=len(self.seen))
        self.length = torch.zeros(len(self.seen))
        self.lengths: list[float] = []

    @staticmethod
    def look(observation: Any) -> Tensor:
        return torch.as_tensor(observation, dtype=torch.float32)[:, SEEN] * SCALE

    @torch.no_grad()
    def play(self, steps: int) -> tuple[Tensor, ...]:
        """What was seen ``[T, B, I]``, where episodes began, actions and rewards ``[T, B]``; the
        state before, and the value after."""
        h = self.state.hx
        rows: list[tuple[Tensor, ...]] = []
        for _ in range(steps):
            if self.begins.any():
                alive = ~self.begins[:, None]
                self.state = self.state.set_s([s * alive for s in self.state.s()])
            self.state = self.state.add_input(self.seen)
            odds = self.policy.odds(self.state.output()).softmax(-1)
            action = torch.multinomial(odds, 1)[:, 0]
            seen, begins = self.seen, self.begins
            observation, reward, ended, cut, _ = self.envs.step(action.numpy())
            self.seen = self.look(observation)
            self.begins = torch.as_tensor(ended | cut)
            rows.append((seen, begins, action, torch.as_tensor(reward, dtype=torch.float32)))
            self.length += 1
            self.lengths += self.length[self.begins].tolist()
            self.length[self.begins] = 0
        ahead = self.state.add_input(self.seen).output()
        value = self.policy.value(ahead)[:, 0] * ~self.begins
        return (*map(torch.stack, zip(*rows)), h, value)


def learn(policy: Policy, optimizer: torch.optim.Optimizer, played: tuple[Tensor, ...]) -> None:
    seen, begins, actions, rewards, h, value = played
    # A step after which another episode begins is the last of its own.
    lasts = torch.cat((begins[1:], torch.zeros_like(begins[:1])))
    returns = torch.empty_like(rewards)
    for t in reversed(range(len(rewards))):
        returns[t] = value = rewards[t] + DISCOUNT * value * ~lasts[t]
    odds, expected = policy(seen, h, begins)
    log_odds = odds.log_softmax(-1)
    chosen = log_odds.gather(-1, actions[..., None])[..., 0]
    better = (returns - expected).detach()
    better = (better - better.mean()) / (better.std() + 1e-6)
    entropy = -(log_odds.exp() * log_odds).sum(-1).mean()
    error = (returns - expected).square().mean() / 100
    optimizer.zero_grad()
    (error - (chosen * better).mean() - ENTROPY * entropy).backward()
    nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
    optimizer.step()


def make_parser() -> Parser:
    parser = Parser("policy.py", __doc__)
    parser.group("play")
    parser.number("--steps", 200_000, "of all environments together", 1)
    parser.number("--envs", 16, "environments at once")
    parser.number("--stretch", 64, "steps from which it learns at a time", 2)
    parser.group("policy")
    parser.number("--hidden", 32, "hidden units")
    parser.number("--lr", 0.01, "Adam's learning rate", 0, 10)
    parser.number("--seed", 0, "seed of all random numbers", 0, 2**31)
    return parser


def run(args: argparse.Namespace) -> None:
    try:
        import gymnasium
    except ImportError as error:
        raise UserError(f"pip install gymnasium: {error}") from error
    torch.manual_seed(args.seed)
    envs = gymnasium.make_vec(
        "CartPole-v1",
        num_envs=args.envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP},
    )
    policy = Policy(int(envs.single_action_space.n), args)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    player = Player(policy, envs, args.seed)
    rounds = max(1, args.steps // (args.envs * args.stretch))
    seconds = 0.0
    for i in range(1, rounds + 1):
        start = time.perf_counter()
        played = player.play(args.stretch)
        seconds += time.perf_counter() - start
        learn(policy, optimizer, played)
        if i % max(1, rounds // REPORTS) == 0 and player.lengths:
            last = player.lengths[-100:]
            print(
                f"{i * args.envs * args.stretch:,} steps: {sum(last) / len(last):.0f} steps an "
                f"episode, {1e6 * seconds / (i * args.stretch):.0f} us a step of all environments"
            )
    envs.close()


def main(argv: list[str] | None = None) -> int:
    return execute(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
