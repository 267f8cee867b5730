"""A training step on tensors that only claim to be on a GPU: shapes, types and devices, no numbers.

What mixes devices raises, as does a size or a condition that depends on data, for which the GPU
would be waited for; a wait of another kind, such as for a copy, does not show. `test_gpu.py`
compares the numbers where there is a GPU.
"""

import pytest
import torch
from torch import nn

import loss
import memory
import model
from engine.train import _float32, feature_spread, make_optimizer
from networks import layers
from networks import sparse_read as addressing

fake = pytest.importorskip("torch._subclasses.fake_tensor")
WAITS = (fake.DynamicOutputShapeException, fake.DataDependentOutputException)
CUDA = torch.device("cuda:0")
IDS = 206
ROWS, CHANNELS = 16, 512


def on_gpu(net: nn.Module) -> nn.Module:
    """The network with empty parameters and buffers on the pretended device."""
    for module in net.modules():
        for name, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                module._parameters[name] = nn.Parameter(empty, value.requires_grad)
        for name, value in module._buffers.items():
            module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
    return net


def forward(net: nn.Module) -> dict[str, torch.Tensor]:
    """What a step computes before its backward pass; every number that it reports."""
    net = on_gpu(net)
    make_optimizer(net)
    images = [torch.randn(ROWS // 2, 3, 96, 48, device=CUDA) for _ in range(2)]
    labels = torch.zeros(ROWS, dtype=torch.int64, device=CUDA)
    health = memory.MemoryHealth()
    for _ in range(2):  # the second adds to the first's counters
        out = {k: _float32(v) for k, v in net(*images, health).items()}
    weights = {**loss.TERM_WEIGHTS, "decorrelation": 0.01}
    terms = loss.Criterion(weights=weights)(out, labels, [4, 0, 5, 2, 1, 3])
    terms["total"] = loss.weighted_total(terms, weights)
    terms["spread"] = feature_spread(out["feat"].detach())
    counters = {k: v for level in health._levels.values() for k, v in level.items()}
    return {**terms, **counters}


@pytest.mark.parametrize("head", ["pcb", "agw"])
@pytest.mark.parametrize(
    ("kind", "variant"), [(None, "paper"), ("sg", "paper"), ("mg", "paper"), ("mg", "released")]
)
def test_a_step_stays_on_the_gpu_and_never_waits_for_it(head, kind, variant):
    net = model.TwoStreamNet(IDS, head, kind, variant, arch="resnet18").train()
    with fake.FakeTensorMode():
        results = forward(net)
    assert all(value.device == CUDA for value in results.values())
    assert ("used" in results) == (kind is not None)


def test_waiting_would_be_noticed(monkeypatch):
    monkeypatch.setattr("networks.sparse_read.ON_CPU", ("cpu", "cuda"))
    net = model.TwoStreamNet(IDS, memory="mg", arch="resnet18").train()
    with fake.FakeTensorMode(), pytest.raises(WAITS):
        forward(net)


class Context:
    """Takes the place of a custom function's context."""

    def __init__(self, needs):
        self.needs_input_grad = needs

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass

    def set_materialize_grads(self, value):
        pass


def rows(width=CHANNELS):
    return torch.randn(ROWS * 18, width, device=CUDA)


def maps():
    return torch.randn(ROWS, CHANNELS, 6, 3, device=CUDA)


def entries():
    """Offsets, columns and weights of 700 survivors."""
    offsets = torch.zeros(ROWS * 18 + 1, dtype=torch.int64, device=CUDA)
    return offsets, torch.zeros(700, dtype=torch.int64, device=CUDA), torch.rand(700, device=CUDA)


def bank():
    return torch.randn(6180, CHANNELS, device=CUDA)


DENSE = (0.0025, ROWS, torch.bfloat16)
FUNCTIONS = {  # with what each is called, and which of its results have gradients
    "sparse": (addressing._SparseRead, lambda: (rows(), bank(), *entries(), ROWS), (0, 1)),
    "sparse map": (addressing._SparseRead, lambda: (rows(), bank(), *entries(), ROWS), (0,)),
    "dense": (addressing._DenseRead, lambda: (rows(), bank(), *DENSE), (0, 1)),
    "dense sums": (addressing._DenseRead, lambda: (rows(), bank(), *DENSE), (1,)),
    "constant": (addressing._OfAll, lambda: (maps()[:1, :, :1, :1].expand(ROWS, -1, 6, 3),), (0,)),
    "gates": (
        memory._GatedMean,
        lambda: (bank().view(-1, 6, CHANNELS), rows(6)[:6], rows(6)[0]),
        (0,),
    ),
    "gem": (layers._GeneralizedMean, lambda: (maps(), 10.0, (2, 3)), (0,)),
    "alignment": (loss._StripeDifferences, lambda: (maps(), 6, [(0, 1), (2, 4)]), (0,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_own_backward_passes_stay_on_the_gpu_and_never_wait(name):
    function, arguments, with_gradient = FUNCTIONS[name]
    with fake.FakeTensorMode(), torch.no_grad():
        arguments = arguments()
        tensors = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in arguments]
        context = Context(tensors)
        results = function.forward(context, *arguments)
        results = results if isinstance(results, tuple) else (results,)
        above = [torch.randn_like(r) if i in with_gradient else None for i, r in enumerate(results)]
        grads = function.backward(context, *above)
    grads = grads if isinstance(grads, tuple) else (grads,)
    assert len(grads) == len(arguments)
    for argument, grad in zip(arguments, grads, strict=True):
        if grad is not None:
            assert (grad.device, grad.shape, grad.dtype) == (CUDA, argument.shape, argument.dtype)
    assert any(grad is not None for grad in grads)
