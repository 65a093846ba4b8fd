"""torch.nn.LSTM = fastrnn.LSTM, and so on for all classes, in a process of its own."""

import copy
import io
import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from helpers import assert_close, assert_same_bits, seeded

LAYERS, CELLS = ["LSTM", "GRU", "RNN"], ["LSTMCell", "GRUCell", "RNNCell"]
ORIGINAL = {name: getattr(nn, name) for name in LAYERS + CELLS}
T, B, I, H = 6, 3, 4, 5  # noqa: E741


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(), dtype=torch.float64)


def options_of(name: str) -> list[dict]:
    if name in CELLS:
        return [{}, {"bias": False}]
    options = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}]
    return options + [{"proj_size": 2}] * (name == "LSTM")


def inputs_of(module: nn.Module) -> list[tuple]:
    """Arguments of forward: batched and not, with a state, packed."""
    if isinstance(module, nn.RNNCellBase):
        state = randn(B, H)
        hx = (state, state.cos()) if isinstance(module, ORIGINAL["LSTMCell"]) else state
        return [(randn(B, I),), (randn(I),), (randn(B, I), hx)]
    entries = module.num_layers * (1 + module.bidirectional)
    state = randn(entries, B, module.proj_size or H)
    hx = (state, randn(entries, B, H).cos()) if module.mode == "LSTM" else state
    x = randn(*((B, T) if module.batch_first else (T, B)), I)
    packed = pack_padded_sequence(x, [2, 6, 1], module.batch_first, enforce_sorted=False)
    return [(x,), (x[0],), (x, hx), (packed,), (pack_sequence([randn(T, I), randn(2, I)]),)]


def tensors_of(result: Any) -> list[Tensor]:
    """Of a packed sequence its data alone; not every torch knows how to take one apart."""
    leaves = tree_leaves(result, is_leaf=lambda leaf: isinstance(leaf, PackedSequence))
    return [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in leaves]


def results(module: nn.Module, args: tuple) -> dict[str, Tensor]:
    """Outputs and the gradients of all weights."""
    outputs = tensors_of(module(*args))
    loss = sum(t.sin().sum() for t in outputs)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return {str(i): t.detach() for i, t in enumerate((*outputs, *gradients))}


def train(module: nn.Module) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    args = inputs_of(module)[0]
    for _ in range(3):
        optimizer.zero_grad()
        sum(t.square().sum() for t in tensors_of(module(*args))).backward()
        optimizer.step()
    return dict(module.state_dict())


def saved_and_loaded(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def build(cls: type, options: dict) -> nn.Module:
    torch.manual_seed(0)
    return cls(I, H, dtype=torch.float64, **options)


def check(name: str, options: dict) -> None:
    ours, theirs = build(getattr(nn, name), options), build(ORIGINAL[name], options)
    assert type(ours) is getattr(fastrnn, name)
    assert isinstance(ours, getattr(nn, name))
    assert_same_bits(dict(ours.state_dict()), dict(theirs.state_dict()))
    all_args = inputs_of(theirs)
    for args in all_args:
        assert_close(results(ours, args), results(theirs, args))
        with torch.no_grad():
            outputs = [
                {str(i): t for i, t in enumerate(tensors_of(m(*args)))} for m in (ours, theirs)
            ]
        assert_close(*outputs)

    replaced = nn.ModuleList([build(ORIGINAL[name], options)])
    assert len(fastrnn.replace(replaced).swapped) == 1
    assert type(replaced[0]) is type(ours)
    expected = results(ours, all_args[0])
    loaded = saved_and_loaded(ours, weights_only=False)
    assert type(loaded) is type(ours)
    again = build(getattr(nn, name), options)
    again.load_state_dict(saved_and_loaded(theirs.state_dict()))
    for module in (replaced[0], loaded, again, copy.deepcopy(ours)):
        assert_same_bits(results(module, all_args[0]), expected)
    assert type(saved_and_loaded(theirs, weights_only=False)) is ORIGINAL[name]

    assert_close(train(ours), train(theirs), 1e-11)
    fastrnn.restore(replaced)
    assert type(replaced[0]) is ORIGINAL[name]


def substitute(is_used_before: bool) -> None:
    if is_used_before:
        for name in LAYERS + CELLS:
            module = build(getattr(fastrnn, name), {})
            results(module, inputs_of(module)[0])
    for name in LAYERS + CELLS:
        setattr(nn, name, getattr(fastrnn, name))
    for name in LAYERS + CELLS:
        for options in options_of(name):
            check(name, options)


@pytest.mark.parametrize("is_used_before", [False, True], ids=["before use", "after use"])
def test_all_classes(is_used_before):
    process = multiprocessing.get_context("spawn").Process(
        target=substitute, args=(is_used_before,)
    )
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        process.join()
        pytest.fail("still running")
    assert process.exitcode == 0  # its traceback is on stderr
