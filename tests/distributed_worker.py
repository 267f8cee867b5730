"""The processes of `test_distributed.py`: python distributed_worker.py FOLDER."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402
import short_run  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.plain import term_weights  # noqa: E402
from data_loader import Batch  # noqa: E402
from engine import distributed  # noqa: E402
from engine.train import (  # noqa: E402
    Schedule,
    TrainSettings,
    make_optimizer,
    set_learning_rate,
    train_epoch,
    training_step,
)
from loss import Criterion  # noqa: E402
from model import TwoStreamNet  # noqa: E402
from networks.memory_health import MemoryHealth  # noqa: E402

IDS, IMAGES = 6, 2  # P, K of the whole batch


def one_step(settings: dict) -> dict:
    """Terms, gradients and counters of one step in float64, batch statistics frozen."""
    torch.manual_seed(0)
    net = TwoStreamNet(6, arch="resnet18", num_strips=2, local_feat_dim=8, shrink=0.02, **settings)
    net.double().train()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    generator = torch.Generator().manual_seed(1)
    size = (IDS * IMAGES, 3, 32, 16)
    images = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2)]
    labels = torch.randperm(IDS, generator=generator).repeat_interleave(IMAGES)
    rows = len(labels) // distributed.size()
    own = slice(distributed.rank() * rows, (distributed.rank() + 1) * rows)
    weights = term_weights(net)
    if "memory" in settings:
        weights["decorrelation"] = 0.5
    criterion = Criterion(weights, label_smoothing=0.1, head=net.head)
    optimizer = make_optimizer(net)
    set_learning_rate(optimizer, 0.0)
    health = MemoryHealth()
    terms, _ = training_step(
        distributed.parallel(net),
        criterion,
        optimizer,
        Batch(images[0][own], images[1][own], labels[own].repeat(2)),
        order=[1, 0],
        weights=weights,
        health=health,
    )
    distributed.sum_in_place([*health.counters.values(), *health.used.values()])
    return {
        "terms": {k: v.double() for k, v in distributed.mean_of(terms).items()},
        "gradients": {k: p.grad for k, p in net.named_parameters() if p.grad is not None},
        "health": health.summary(),
    }


class OwnRows:
    """Two batches an epoch; every rank has other rows."""

    def __len__(self) -> int:
        return 2

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yields the batches."""
        generator = torch.Generator().manual_seed(distributed.rank())
        labels = torch.arange(2).repeat_interleave(2).repeat(2) + 2 * distributed.rank()
        for _ in range(2):
            images = [torch.randn(4, 3, 32, 16, generator=generator) for _ in range(2)]
            yield Batch(*images, labels)


def train_one_epoch() -> list[bool]:
    """Whether each rank ends an epoch with rank 0's states and numbers."""
    torch.manual_seed(0)
    net = TwoStreamNet(6, arch="resnet18", num_strips=2, local_feat_dim=8, memory="mg")
    numbers = train_epoch(
        distributed.parallel(net, unused_parameters=True),
        Criterion(term_weights(net) | {"memory_id": 0.0}),  # nothing trains its classifier
        make_optimizer(net),
        OwnRows(),
        epoch=0,
        schedule=Schedule(lr=0.1, warmup_epochs=0),
        settings=TrainSettings(num_strips=2, progress=False),
    )
    del numbers["images_per_second"]
    states = {k: v.numpy() for k, v in net.state_dict().items()} | numbers
    own = {k: np.asarray(v) for k, v in states.items()}
    states = [own] * distributed.size()
    if distributed.size() > 1:
        torch.distributed.all_gather_object(states, own)
    return [all((state[k] == states[0][k]).all() for k in state) for state in states]


def work(folder: Path) -> None:
    """One process's part; the main one writes FOLDER/report.pt."""
    torch.set_num_threads(1)
    with distributed.processes("cpu"):
        short_run.use_narrow_backbone()
        methods = {"HCT": one_step({}), "AGW": one_step({"head": "agw"})}
        methods |= {memory: one_step({"memory": memory}) for memory in ("sg", "mg")}
        alike = train_one_epoch()
        if distributed.is_main():
            report = {"methods": methods, "alike": alike}
            torch.save(report, folder / "report.pt")


def fork(count: int, rank: int, port: int, folder: Path) -> int:
    """Starts one process with torchrun's environment; returns its id."""
    child = os.fork()
    if child == 0:
        names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
        values = map(str, (count, rank, rank, port, "127.0.0.1"))
        os.environ.update(zip(names, values, strict=True))
        try:
            work(folder)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return child


def main() -> int:
    """Does the work with one, two and three processes; torch is imported only once for all."""
    root = Path(sys.argv[1])
    failed = 0
    for count in (1, 2, 3):
        folder = root / str(count)
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [fork(count, rank, port, folder) for rank in range(count)]
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
    return failed


if __name__ == "__main__":
    sys.exit(main())
