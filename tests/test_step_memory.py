"""The memory of a training step, counted on tensors that have a shape and no numbers."""

import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from test_devices import on_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.plain import term_weights
from engine.train import make_optimizer, training_step
from loss import Criterion
from model import TwoStreamNet
from networks import sparse_read

fake = pytest.importorskip("torch._subclasses.fake_tensor")


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once, of storages made or used inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = WeakIdKeyDictionary()  # storage to bytes
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Callable, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves((args, kwargs, out))):
            storage = tensor.untyped_storage()
            if storage not in self.alive:
                self.alive[storage] = size = storage.nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.freed, size)
        return out

    def freed(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize(
    ("rows", "ids", "amp", "bound"),
    [
        (64, 206, None, 6.3),
        (64, 206, torch.bfloat16, 3.65),
        (96, 395, None, 9.6),
        (96, 395, torch.bfloat16, 5.8),
    ],
)
def test_mg_mra_s_step_needs_no_more_than(rows, ids, amp, bound, monkeypatch):
    """GiB for RegDB's and SYSU-MM01's batches of 288 x 144 images, ResNet-50, as on CUDA.

    The plain read would need 7.2, 4.9, 13.1 and 9.6. Parameters, momentum and images included; a
    card adds a context, libraries' workspaces (0.6 to 1.2 GiB) and what its allocator cannot use.
    """
    monkeypatch.setitem(sparse_read.MIN_SURVIVAL_ODDS, "cpu", sparse_read.MIN_SURVIVAL_ODDS["cuda"])
    monkeypatch.setattr(sparse_read, "HALF_ROWS", ("cpu",))
    read = sparse_read.sparse_read
    monkeypatch.setattr(sparse_read, "sparse_read", lambda *a: read(*a, bounded=True))
    with torch.device("meta"):
        net = TwoStreamNet(ids, memory="mg").train()
    peak = Peak()
    with fake.FakeTensorMode(), peak:
        on_device(net, torch.device("cpu"))
        optimizer = make_optimizer(net)  # holds the momentum
        optimizer.step = lambda: None
        weights = term_weights(net)
        criterion = Criterion(weights, images_per_id=4)
        images = [
            torch.empty(rows // 2, 3, 288, 144).contiguous(memory_format=torch.channels_last)
            for _ in range(2)
        ]
        labels = torch.zeros(rows, dtype=torch.int64)
        batch = SimpleNamespace(visible=images[0], infrared=images[1], labels=labels)
        how = {"order": [4, 0, 5, 2, 1, 3], "weights": weights, "amp": amp}
        training_step(net, criterion, optimizer, batch, **how)
    parameters = sum(p.numel() for p in net.parameters())
    assert 4 * 4 * parameters / 2**30 < peak.most / 2**30 < bound
