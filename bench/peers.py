"""The libraries compared: each builds a case, runs one step of it, and shows its numbers.

A peer is used in a process of its own (see worker.py); its library is imported there only.
"""

from importlib.util import find_spec
from time import perf_counter
from typing import Any, ClassVar

import numpy as np

from . import onnx_model
from .cases import Array, Case, Data

TOLERANCE = 1e-4  # of the largest entry; a gate in the wrong place is off by as much as that entry
# Before each burst, for the caches, the clock, and a machine that gives woken threads a core of
# their own only when they have worked for some milliseconds.
WARM_UP_S = 0.02
LONG_S = 0.05  # a call longer than this needs none before it


class Peer:
    """What all have: prepare, step and values."""

    title: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    training: ClassVar[bool] = False
    ragged: ClassVar[bool] = False
    has_variants: ClassVar[bool] = True  # whether it can be held to one of VARIANTS

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def prepare(self, case: Case) -> None:
        """Gets ready to run `case`, and drops the case before it."""
        raise NotImplementedError

    def step(self) -> Any:
        """One call, which is what is timed: all results are there when it returns."""
        raise NotImplementedError

    def values(self, result: Any) -> dict[str, Array]:
        """What a step returned: output, h_n and c_n, and in training the gradients: x.grad, ..."""
        raise NotImplementedError

    def run(self) -> dict[str, Array]:
        return self.values(self.step())

    def seconds(self, burst: float) -> float:
        """The time of a call, the mean over a burst of them that lasts at least that long."""
        start = perf_counter()
        self.step()
        first = perf_counter() - start
        if first > LONG_S:
            return first
        while perf_counter() - start < WARM_UP_S:
            self.step()
        calls, start = 0, perf_counter()
        while (elapsed := perf_counter() - start) < burst:
            self.step()
            calls += 1
        return elapsed / calls

    def mean_seconds(self, steps: int) -> float:
        """The mean time of so many calls, the first one and its cold caches included."""
        start = perf_counter()
        for _ in range(steps):
            self.step()
        return (perf_counter() - start) / steps

    @classmethod
    def missing(cls) -> list[str]:
        return [package for package in cls.packages if find_spec(package) is None]

    @classmethod
    def takes(cls, case: Case) -> bool:
        return (cls.training or not case.training) and (cls.ragged or not case.ragged)


class TorchNN(Peer):
    """torch.nn, by whose numbers all others are checked."""

    title = "torch.nn"
    packages = ("torch",)
    training = ragged = True

    def __init__(self, threads: int, **options: Any) -> None:
        super().__init__(threads)
        import torch

        torch.set_num_threads(threads)
        self.torch, self.library, self.options = torch, torch.nn, options

    def prepare(self, case: Case) -> None:
        data, tensor = case.data(), self.torch.from_numpy
        options = {"bidirectional": case.directions == 2, **self.options}
        self.rnn = getattr(self.library, case.cell)(case.H, case.H, case.layers, **options)
        self.rnn.load_state_dict({name: tensor(value) for name, value in data.weights.items()})
        self.x, self.dy = tensor(data.x).requires_grad_(case.training), tensor(data.dy)
        states = tuple(map(tensor, data.states))
        self.hx = states if case.cell == "LSTM" else states[0]
        self.lengths = None if data.lengths is None else tensor(data.lengths)
        self.is_training = case.training

    def step(self) -> Any:
        if not self.is_training:
            with self.torch.inference_mode():
                return self.forward()
        self.rnn.zero_grad()
        self.x.grad = None
        result = self.forward()
        result[0].backward(self.dy)
        return result

    def forward(self) -> Any:
        if self.lengths is None:
            return self.rnn(self.x, self.hx)
        return self.forward_ragged(self.lengths)

    def forward_ragged(self, lengths: Any) -> Any:
        """From a padded batch to a padded batch, as users have it."""
        of = self.torch.nn.utils.rnn
        packed = of.pack_padded_sequence(self.x, lengths, enforce_sorted=False)
        output, final = self.rnn(packed, self.hx)
        return of.pad_packed_sequence(output, total_length=len(self.x))[0], final

    def values(self, result: Any) -> dict[str, Array]:
        output, final = result
        named = {"output": output}
        named |= zip(("h_n", "c_n"), final if isinstance(final, tuple) else (final,))
        if self.is_training:
            named |= {"x.grad": self.x.grad}
            named |= {f"{name}.grad": value.grad for name, value in self.rnn.named_parameters()}
        return {name: value.detach().numpy() for name, value in named.items()}


class FastRNN(TorchNN):
    title = "fastrnn"
    packages = ("torch", "fastrnn")

    def __init__(self, threads: int, **options: Any) -> None:
        super().__init__(threads, **options)
        import fastrnn

        self.library = fastrnn

    def forward_ragged(self, lengths: Any) -> Any:
        return self.rnn(self.x, self.hx, lengths=lengths)


class Frozen(FastRNN):
    """The same layers after fastrnn.freeze: as ONNX Runtime and OpenVINO do, it packs once."""

    title = "frozen"
    training = False

    def prepare(self, case: Case) -> None:
        super().prepare(case)
        import fastrnn

        fastrnn.freeze(self.rnn.eval())


class ONNXRuntime(Peer):
    title = "ONNX Runtime"
    packages = ("onnxruntime", "onnx")
    has_variants = False

    @staticmethod
    def options(threads: int) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        return options

    def prepare(self, case: Case) -> None:
        import onnxruntime

        data = case.data()
        model = onnx_model.build(case, data)
        options = self.options(self.threads)
        self.session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]
        self.feeds, self.case = onnx_model.feeds(case, data), case

    def step(self) -> Any:
        return self.session.run(self.names, self.feeds)

    def values(self, result: Any) -> dict[str, Array]:
        return onnx_model.values(self.case, dict(zip(self.names, result)))


class OpenVINO(Peer):
    title = "OpenVINO"
    packages = ("openvino", "onnx")

    def prepare(self, case: Case) -> None:
        import openvino

        data = case.data()
        model = openvino.Core().read_model(onnx_model.build(case, data))
        config = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",  # the default may be bfloat16
        }
        self.request = openvino.compile_model(model, "CPU", config).create_infer_request()
        self.feeds, self.case = onnx_model.feeds(case, data), case

    def step(self) -> Any:
        return self.request.infer(self.feeds, share_inputs=True, share_outputs=True)

    def values(self, result: Any) -> dict[str, Array]:
        named = {output.any_name: value for output, value in result.items()}
        return onnx_model.values(self.case, named)


class JAX(Peer):
    """lax.scan over steps, with the products of the whole input taken before it."""

    title = "JAX scan"
    packages = ("jax",)
    training = True

    def prepare(self, case: Case) -> None:
        import jax

        jax.clear_caches()
        data = case.data()
        layers = self._layers(case, data)
        arguments = jax.device_put((data.weights, data.x, data.states))

        def train(weights: Any, x: Any, states: Any, dy: Any) -> Any:
            output, pullback, final = jax.vjp(
                lambda weights, x: layers(weights, x, states), weights, x, has_aux=True
            )
            return output, final, pullback(dy)

        if case.training:
            arguments += (jax.device_put(data.dy),)
        function = jax.jit(train if case.training else layers)
        self.call = lambda: jax.block_until_ready(function(*arguments))

    @staticmethod
    def _layers(case: Case, data: Data) -> Any:
        import jax
        import jax.numpy as jnp
        from jax import lax

        sigmoid, tanh = jax.nn.sigmoid, jnp.tanh

        def lstm(state: Any, p: Any, w: Any, b: Any) -> Any:
            h, c = state
            i, f, g, o = jnp.split(p + h @ w.T + b, 4, axis=-1)
            c = sigmoid(f) * c + sigmoid(i) * tanh(g)
            return sigmoid(o) * tanh(c), c

        def gru(state: Any, p: Any, w: Any, b: Any) -> Any:
            (h,) = state
            (r, z, n), (r_h, z_h, n_h) = jnp.split(p, 3, -1), jnp.split(h @ w.T + b, 3, -1)
            z = sigmoid(z + z_h)
            return ((1 - z) * tanh(n + sigmoid(r + r_h) * n_h) + z * h,)

        def rnn(state: Any, p: Any, w: Any, b: Any) -> Any:
            return (tanh(p + state[0] @ w.T + b),)

        cell = {"LSTM": lstm, "GRU": gru, "RNN": rnn}[case.cell]

        def layers(weights: Any, x: Any, states: Any) -> Any:
            finals = []
            for k in range(case.layers):
                outputs = []
                for d in range(case.directions):
                    suffix = f"_l{k}" + "_reverse" * d
                    w, b = weights["weight_hh" + suffix], weights["bias_hh" + suffix]
                    p = x @ weights["weight_ih" + suffix].T + weights["bias_ih" + suffix]

                    def step(state: Any, p: Any, w: Any = w, b: Any = b) -> Any:
                        state = cell(state, p, w, b)
                        return state, state[0]

                    initial = tuple(s[k * case.directions + d] for s in states)
                    final, output = lax.scan(step, initial, p, reverse=d == 1)
                    finals.append(final)
                    outputs.append(output)
                x = outputs[0] if case.directions == 1 else jnp.concatenate(outputs, axis=-1)
            return x, tuple(map(jnp.stack, zip(*finals)))

        return layers

    def step(self) -> Any:
        return self.call()

    def values(self, result: Any) -> dict[str, Array]:
        output, final, *gradients = result
        named = {"output": output, **dict(zip(("h_n", "c_n"), final))}
        if gradients:
            ((weights, x),) = gradients
            named |= {"x.grad": x} | {f"{name}.grad": value for name, value in weights.items()}
        return {name: np.asarray(value) for name, value in named.items()}


PEERS: dict[str, type[Peer]] = {
    "fastrnn": FastRNN,
    "frozen": Frozen,
    "torch": TorchNN,
    "onnxruntime": ONNXRuntime,
    "openvino": OpenVINO,
    "jax": JAX,
}
OURS = ("fastrnn", "frozen")


def check(values: dict[str, Array], expected: dict[str, Array]) -> None:
    """Raises ValueError if a peer's numbers are not torch.nn's."""
    if values.keys() != expected.keys():
        raise ValueError(f"has {sorted(values)}, expected {sorted(expected)}")
    for name, value in values.items():
        wanted = expected[name]
        if value.shape != wanted.shape:
            raise ValueError(f"{name} has shape {value.shape}, expected {wanted.shape}")
        error, scale = np.abs(value - wanted).max(), np.abs(wanted).max()
        if not error <= TOLERANCE * scale:  # a NaN fails too
            raise ValueError(f"{name} is off by {error:.3g}, its largest entry is {scale:.3g}")
