"""A training step on tensors that only claim to be on a GPU: shapes, types and devices, no numbers.

What mixes devices raises, as does a size or a condition that depends on data, for which the GPU
would be waited for; a wait of another kind, such as for a copy, does not show. `test_gpu.py`
compares the numbers where there is a GPU.
"""

import functools
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.plain import term_weights
from engine import distributed
from engine.train import feature_spread, make_optimizer, training_step
from loss import Criterion
from model import TwoStreamNet
from networks import sparse_read
from networks.memory_health import MemoryHealth

fake = pytest.importorskip("torch._subclasses.fake_tensor")
WAITS = (fake.DynamicOutputShapeException, fake.DataDependentOutputException)
CUDA = torch.device("cuda:0")
IDS, ROWS = 206, 16


def on_device(net: nn.Module, device: torch.device = CUDA) -> nn.Module:
    """The network with empty parameters and buffers on the pretended device."""
    for module in net.modules():
        for name, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device=device)
                module._parameters[name] = nn.Parameter(empty, value.requires_grad)
        for name, value in module._buffers.items():
            module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
    return net


def steps(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, amp: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Everything that two steps of an epoch compute, backward pass aside; what they report."""
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)  # it would look for CUDA
    monkeypatch.setattr(sparse_read, "_works_on", lambda device: True)
    net = on_device(net)
    make_optimizer(net)
    optimizer = SimpleNamespace(zero_grad=lambda set_to_none: None, step=lambda: None)
    images = [torch.randn(ROWS // 2, 3, 96, 48, device=CUDA) for _ in range(2)]
    labels = torch.zeros(ROWS, dtype=torch.int64, device=CUDA)
    batch = SimpleNamespace(visible=images[0], infrared=images[1], labels=labels)
    weights = term_weights(net) | ({"decorrelation": 0.01} if net.config["memory"] else {})
    criterion = Criterion(weights, head=net.head)
    order = [4, 0, 5, 2, 1, 3]
    health = MemoryHealth()
    for _ in range(2):  # the second adds to the first's counters
        how = {"order": order, "weights": weights, "amp": amp, "health": health}
        terms, feat = training_step(net, criterion, optimizer, batch, **how)
        terms["spread"] = feature_spread(feat)
    counters = {f"{level}/counters": value for level, value in health.counters.items()}
    return {**terms, **counters, **{f"{k}/used": v for k, v in health.used.items()}}


@pytest.mark.parametrize("head", ["pcb", "agw"])
@pytest.mark.parametrize(
    ("kind", "variant"), [(None, "paper"), ("sg", "paper"), ("mg", "paper"), ("mg", "released")]
)
def test_a_step_stays_on_the_gpu_and_never_waits_for_it(head, kind, variant, monkeypatch):
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    net = TwoStreamNet(IDS, head, kind, variant, arch="resnet18").train()
    with fake.FakeTensorMode():
        results = steps(net, monkeypatch)
        halves = steps(net, monkeypatch, torch.bfloat16)
    assert halves.keys() == results.keys()
    assert all(value.device == CUDA for value in results.values())
    assert {"total", "spread"} <= results.keys()
    assert ("part/used" in results) == (kind is not None)


def test_waiting_would_be_noticed(monkeypatch):
    net = TwoStreamNet(IDS, memory="mg", arch="resnet18").train()
    unbounded = functools.partial(sparse_read.sparse_read, bounded=False)
    monkeypatch.setattr(sparse_read, "sparse_read", unbounded)
    monkeypatch.setattr(sparse_read, "_works_on", lambda device: True)
    with fake.FakeTensorMode(), pytest.raises(WAITS):
        steps(net, monkeypatch)


def test_under_torchrun_a_process_joins_with_the_gpu_of_its_local_rank(monkeypatch):
    joined, levels, device = [], [], torch.device("cuda", 2)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "2", "RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logging.getLogger(), "setLevel", levels.append)
    monkeypatch.setattr(distributed, "resolve_device", lambda gpu, local_rank: device)
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda *a, **k: joined.append((a, k))
    )
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: joined.append("left"))
    with distributed.processes(None) as found:
        assert found == device
    assert joined == [(("nccl",), {"device_id": device}), "left"]
    assert levels == [logging.ERROR]
