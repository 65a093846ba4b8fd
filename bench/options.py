"""What the options of regularised recurrence cost in training: python -m bench.options

Each option against the plain layer, and against a loop of steps in torch that does the same: of
torch.lstm_cell and its like where these can do it, else of the cell's equations. Times are of
forward and backward, in short bursts in turn; peak memory as in bench.memory, each figure from a
process of its own.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from . import bursts
from .bursts import Call
from .cases import GATES, Case
from .memory import Subject
from .peers import FastRNN
from .results import Row
from .table import align
from .worker import Worker

SHAPE = (100, 32, 256)
ROUNDS = 15
RUNS = 3  # of memory
BURST_S = 0.1
LOOP_GOAL = 15.0  # the loop's time over the layer's, at least
P = 0.1  # of each random option
CLIP = 1.0
EPSILON = 1e-5  # of layer_norm


class Option(NamedTuple):
    """An option as arguments of a layer, and what it may cost at most of the plain layer."""

    arguments: dict[str, Any]
    time_goal: float
    memory_goal: float = 1.05
    plain: Mapping[str, Any] = MappingProxyType({})  # arguments that the plain layer has, too
    layers: int = 1


OPTIONS = {
    "zoneout": Option({"zoneout": P}, 1.15),
    "weight_dropout": Option({"weight_dropout": P}, 1.05),
    "variational": Option(
        {"dropout": P, "variational": True}, 1.10, plain={"dropout": P}, layers=2
    ),
    "recurrent_dropout": Option({"recurrent_dropout": P}, 1.10),
    "layer_norm": Option({"layer_norm": True}, 1.35, 1.30),
    "grad_scale": Option({}, 1.03),
    "grad_clip": Option({"grad_clip": CLIP}, 1.03),
}


def known(cell: str) -> list[str]:
    """The options that fastrnn's class takes."""
    import fastrnn

    layer = getattr(fastrnn, cell)
    found = []
    for name, option in OPTIONS.items():
        try:
            layer(2, 2, option.layers, **option.arguments)
        except (TypeError, ValueError):
            continue
        found.append(name)
    return found


class Optioned(FastRNN):
    """A layer with an option, in training; "": the plain layer that `beside` is compared with."""

    def __init__(self, threads: int, option: str = "", beside: str = "") -> None:
        chosen = OPTIONS[option or beside]
        super().__init__(threads, **(chosen.arguments if option else chosen.plain))
        self.option, self.layers = option, chosen.layers

    def prepare(self, case: Case) -> None:
        torch = self.torch
        torch.manual_seed(0)
        self.rnn = getattr(self.library, case.cell)(case.H, case.H, self.layers, **self.options)
        self.x = torch.randn(case.T, case.B, case.H, requires_grad=True)
        self.dy = torch.randn(case.T, case.B, case.H)
        self.scale = torch.rand(case.T, case.B) if self.option == "grad_scale" else None
        self.is_training = True

    def forward(self) -> Any:
        if self.scale is None:
            return self.rnn(self.x)
        return self.rnn(self.x, grad_scale=self.scale)


class Loop(Optioned):
    """The same by steps in Python, on the weights of such a layer."""

    state_count: ClassVar[dict[str, int]] = {"LSTM": 2, "GRU": 1, "RNN": 1}

    def prepare(self, case: Case) -> None:
        super().prepare(case)
        self.cell = case.cell
        hand = {"layer_norm": self._normalised_step, "recurrent_dropout": self._masked_step}
        self.make_step = hand.get(self.option, self._plain_step)

    def forward(self) -> Any:
        x: Any = self.x
        for k in range(self.layers):
            if k > 0:
                x = self._drop_between(x)
            x = self._layer(x, k)
        return x, None

    def _drop_between(self, x: Any) -> Any:
        dropout, p = self.torch.nn.functional.dropout, self.options["dropout"]
        return x * dropout(x.new_ones(x.shape[1:]), p) if self.option else dropout(x, p)

    def _weights(self, k: int) -> list[Any]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = [getattr(self.rnn, f"{name}_l{k}") for name in names]
        if self.option == "weight_dropout":
            weights[1] = self.torch.nn.functional.dropout(weights[1], P)
        return weights

    def _layer(self, x: Any, k: int) -> Any:
        torch, outputs = self.torch, []
        step = self.make_step(self._weights(k), k)
        zeros = x.new_zeros(x.shape[1], self.rnn.hidden_size)
        states = (zeros,) * self.state_count[self.cell]
        for t, x_t in enumerate(x.unbind(0)):
            if self.option == "grad_scale":
                # The value stays, and the gradient is scaled.
                s = self.scale[t].unsqueeze(1)
                states = tuple(s * state + ((1 - s) * state).detach() for state in states)
            elif self.option == "grad_clip" and t > 0:
                states = tuple(state.view_as(state) for state in states)
                for state in states:
                    state.register_hook(lambda grad: grad.clamp(-CLIP, CLIP))
            new = step(x_t, states)
            if self.option == "zoneout":
                new = tuple(
                    torch.where(torch.rand_like(old) < P, old, now) for old, now in zip(states, new)
                )
            states = new
            outputs.append(states[0])
        return torch.stack(outputs)

    def _plain_step(self, weights: list[Any], k: int) -> Callable[..., Any]:
        torch = self.torch
        if self.cell == "LSTM":
            return lambda x, states: torch.lstm_cell(x, states, *weights)
        function = torch.gru_cell if self.cell == "GRU" else torch.rnn_tanh_cell
        return lambda x, states: (function(x, states[0], *weights),)

    def _masked_step(self, weights: list[Any], k: int) -> Callable[..., Any]:
        """Only what W_hh multiplies is masked, not the h that a GRU mixes with its candidate."""
        torch, (w_ih, w_hh, b_ih, b_hh) = self.torch, weights
        linear = torch.nn.functional.linear
        ones = self.x.new_ones(self.x.shape[1], self.rnn.hidden_size)
        mask = torch.nn.functional.dropout(ones, P)
        if self.cell != "GRU":
            step = self._plain_step(weights, k)
            return lambda x, states: step(x, (states[0] * mask, *states[1:]))
        return lambda x, states: self._gates(
            linear(x, w_ih, b_ih), linear(states[0] * mask, w_hh, b_hh), states
        )

    def _normalised_step(self, weights: list[Any], k: int) -> Callable[..., Any]:
        """Both products are normalised, and the c that an LSTM's output reads."""
        functional, (w_ih, w_hh, b_ih, b_hh) = self.torch.nn.functional, weights
        linear = functional.linear
        gain_ih, gain_hh = (getattr(self.rnn, f"gain_{each}_l{k}") for each in ("ih", "hh"))
        of_c = []
        if self.cell == "LSTM":
            of_c = [getattr(self.rnn, f"{kind}_c_l{k}") for kind in ("gain", "bias")]

        def normalised(values: Any, gain: Any, bias: Any) -> Any:
            return functional.layer_norm(values, values.shape[-1:], gain, bias, EPSILON)

        return lambda x, states: self._gates(
            normalised(linear(x, w_ih), gain_ih, b_ih),
            normalised(linear(states[0], w_hh), gain_hh, b_hh),
            states,
            *([lambda c: normalised(c, *of_c)] if of_c else []),
        )

    def _gates(
        self, x: Any, r: Any, states: Any, of_c: Callable[[Any], Any] = lambda c: c
    ) -> tuple[Any, ...]:
        """The cell's equations on W_ih x + b_ih and W_hh h + b_hh."""
        torch = self.torch
        if self.cell == "RNN":
            return (torch.tanh(x + r),)
        if self.cell == "GRU":
            (x_r, x_z, x_n), (r_r, r_z, r_n) = x.chunk(3, 1), r.chunk(3, 1)
            z = torch.sigmoid(x_z + r_z)
            n = torch.tanh(x_n + torch.sigmoid(x_r + r_r) * r_n)
            return (n + z * (states[0] - n),)
        i, f, g, o = (x + r).chunk(4, 1)
        c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(of_c(c)), c


class Cost(NamedTuple):
    """What a row is about."""

    cell: str
    option: str
    kind: str  # time or memory
    shape: tuple[int, int, int] = SHAPE

    @property
    def name(self) -> str:
        return f"{self.cell} {self.option} {self.kind}"

    @property
    def case(self) -> Case:
        return Case(self.cell, "training", *self.shape)


def subjects(cost: Cost, threads: int) -> dict[str, Call]:
    """With the option, the plain layer, and the loop."""
    peers = {
        "option": Optioned(threads, cost.option),
        "plain": Optioned(threads, beside=cost.option),
        "loop": Loop(threads, cost.option),
    }
    for peer in peers.values():
        peer.prepare(cost.case)
    return {name: peer.step for name, peer in peers.items()}


def peak(cost: Cost, threads: int, runs: int, **which: str) -> float:
    """Bytes, the least of some processes: where malloc finds no hole that a buffer fits into, which
    is by chance, a whole buffer more is counted."""
    sizes = []
    for _ in range(runs):
        worker = Worker(partial(Subject, Optioned, which), threads)
        try:
            sizes.append(worker.call("peak", cost.case))
        finally:
            worker.close()
    return min(sizes)


def measure(cost: Cost, threads: int, rounds: int, runs: int = RUNS) -> Row:
    if cost.kind == "time":
        row = bursts.measure([(subjects, True)], cost, threads, rounds, BURST_S)
        return {**cost._asdict(), **row, "ratio": 1 / row["over"]["plain"]}
    option = peak(cost, threads, runs, option=cost.option)
    plain = peak(cost, threads, runs, beside=cost.option)
    sizes = {"option": option, "plain": plain}
    return {**cost._asdict(), "bytes": sizes, "ratio": option / plain, "busy": False}


def missed(row: Row) -> list[str]:
    """The goals that a row does not reach, in words."""
    option = OPTIONS[row["option"]]
    goal = option.time_goal if row["kind"] == "time" else option.memory_goal
    found = []
    if row["ratio"] > goal:
        found.append(f"{row['kind']} {row['ratio']:.3f} of the plain layer's, goal {goal:.2f}")
    if row["kind"] == "time" and row["over"]["loop"] < LOOP_GOAL:
        found.append(f"loop {row['over']['loop']:.1f}x, goal {LOOP_GOAL:.0f}x")
    return found


def render(rows: list[Row]) -> str:
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["cell"], row["option"]), {})[row["kind"]] = row
    titles = ["layer", "option", "ms", "plain ms", "of plain", "goal", "loop ms", "loop"]
    titles += ["MiB", "plain MiB", "of plain", "goal"]
    lines = []
    for (cell, name), of in found.items():
        option, time, memory = OPTIONS[name], of.get("time"), of.get("memory")
        line = [cell, name + "*" * (time is not None and time["busy"])]
        if time is not None:
            us = time["us"]
            line += [f"{us['option'] / 1e3:.2f}", f"{us['plain'] / 1e3:.2f}"]
            line += [f"{time['ratio']:.3f}", f"{option.time_goal:.2f}"]
            line += [f"{us['loop'] / 1e3:.0f}", f"{time['over']['loop']:.1f}x"]
        line += [""] * (8 - len(line))
        if memory is not None:
            line += [f"{memory['bytes'][each] / 2**20:.1f}" for each in ("option", "plain")]
            line += [f"{memory['ratio']:.3f}", f"{option.memory_goal:.2f}"]
        lines.append(line + [""] * (12 - len(line)))
    misses = [f"{row['row']}: {why}" for row in rows for why in missed(row)]
    text = align(titles, lines, left=2)
    return "\n\n".join([text, *(["\n".join(["Goals missed:", *misses])] if misses else [])])


def main() -> None:
    parser = bursts.parser("options", __doc__, ROUNDS)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("T", "B", "H"), default=SHAPE)
    parser.add_argument("--runs", type=int, default=RUNS, help="of memory, default: %(default)s")
    args = parser.parse_args()
    shape = tuple(args.shape)
    costs = [
        Cost(cell, option, kind, shape)
        for kind in ("time", "memory")
        for cell in GATES
        for option in known(cell)
    ]
    bursts.run(
        args,
        {cost.name: cost for cost in costs},
        lambda cost: measure(cost, args.threads, args.rounds, args.runs),
        render,
    )


if __name__ == "__main__":
    main()
