"""The recurrent models with which torch tests its tools, as far as they are installed with it: each
tool gives on our layers what it gives on torch's."""

import copy
import io
import warnings

import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import (
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    prepare,
    quantize_dynamic,
)
from torch.nn.utils import prune
from torch.testing._internal import common_pruning, common_quantization

import fastrnn

CELLS = ["LSTMCell", "GRUCell", "RNNTanh", "RNNReLU"]
MODELS = {
    **{m: (lambda m=m: common_quantization.RNNDynamicModel(m), (5, 3, 2)) for m in ("LSTM", "GRU")},
    **{m: (lambda m=m: common_quantization.RNNCellDynamicModel(m), (3, 2)) for m in CELLS},
    "linear": (lambda: common_pruning.LSTMLinearModel(8, 9, 4, 2), (5, 3, 8)),
    "layer norm": (lambda: common_pruning.LSTMLayerNormLinearModel(8, 9, 4, 2), (5, 3, 8)),
    "hidden": (common_quantization.LSTMwithHiddenDynamicModel, (5, 3, 2)),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(params=MODELS)
def models(request):
    """Ours, torch's, and what they are called with."""
    make, shape = MODELS[request.param]
    torch.manual_seed(0)
    theirs = make().eval()
    ours = copy.deepcopy(theirs)
    assert fastrnn.replace(ours).swapped
    x = torch.randn(shape)
    hidden = (torch.randn(1, 3, 2), torch.randn(1, 3, 2))
    return ours, theirs, (x, hidden) if request.param == "hidden" else (x,)


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected)


def test_fx(models):
    ours, theirs, args = models
    graph, expected = fx.symbolic_trace(ours), fx.symbolic_trace(theirs)
    assert [n.format_node() for n in graph.graph.nodes] == [
        n.format_node() for n in expected.graph.nodes
    ]
    assert_same(graph(*args), expected(*args))


def test_script(models):
    ours, theirs, args = models
    wrong = None
    try:
        torch.jit.script(theirs)
    except RuntimeError as error:  # two of the models are not written for it
        wrong = str(error).splitlines()[:2]
    if wrong:
        with pytest.raises(RuntimeError) as ours_too:
            torch.jit.script(ours)
        assert str(ours_too.value).splitlines()[:2] == wrong
        return
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(ours), buffer)
    buffer.seek(0)
    assert_same(torch.jit.load(buffer)(*args), theirs(*args))


def test_trace(models):
    ours, theirs, args = models
    assert_same(torch.jit.trace(ours, args)(*args), theirs(*args))


def test_export(models):
    ours, theirs, args = models
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own
        program = torch.export.export(ours, args).module()
    assert_same(program(*args), theirs(*args))


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_quantize_dynamic(models, dtype):
    """As torch's checkDynamicQuantizedLSTM asks: the modules are torch's, of that dtype."""
    ours, theirs, args = models
    config = default_dynamic_qconfig if dtype == torch.qint8 else float16_dynamic_qconfig
    for model in (ours, theirs):
        model.qconfig = config
    actual, expected = (quantize_dynamic(m, dtype=dtype) for m in (ours, theirs))
    for (name, a), (same, b) in zip(actual.named_modules(), expected.named_modules(), strict=True):
        assert (name, type(a)) == (same, type(b))
    assert_same(actual(*args), expected(*args))


def test_prepare(models):
    ours, theirs, args = models
    actual, expected = prepare(ours), prepare(theirs)
    assert [*dict(actual.named_modules())] == [*dict(expected.named_modules())]
    assert_same(actual(*args), expected(*args))


def test_prune(models):
    """Masks on the entries of weights."""
    ours, theirs, args = models
    for model in (ours, theirs):
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
                name = next(n for n in dict(module.named_parameters()) if n.startswith("weight_hh"))
                prune.random_unstructured(module, name, 0.5)
    assert_same(ours(*args), theirs(*args))
