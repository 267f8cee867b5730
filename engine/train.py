"""One training step, one epoch of them, the optimiser and the learning-rate schedule."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import distributed
from engine.devices import peak_memory
from loss import TRIPLET_TERMS, WHOLE_BATCH_TERMS, Criterion, weighted_total
from networks.memory_health import MemoryHealth

CHECK_EVERY = 10  # steps between copies of the losses to the host; each waits for the device
HEALTH_EVERY = 10  # steps between two updates of the memory's usage, from an epoch's first
REMEDY = "the last checkpoint is untouched; a smaller --lr or longer --warmup-epochs usually helps"
NO_SCALING = torch.amp.GradScaler(enabled=False)
STRIPE_ORDER_STREAM = 3  # tells this module's random numbers from the loader's


@dataclass(frozen=True)
class TrainSettings:
    """How to train, beside network, criterion, optimiser and schedule."""

    seed: int = 0  # for the stripe permutations
    num_strips: int = 6  # stripes S
    amp: torch.dtype | None = None  # autocast type of the network, not of the losses; None: float32
    compiled: bool = False  # whether the backbone's stages are compiled
    sync_bn: bool = False  # with several processes, batch statistics over all of them (CUDA only)
    progress: bool = True  # whether to show progress bars
    eval_start: int = 10  # first evaluated epoch, from 0 as in the releases; the last always is
    eval_every: int = 2
    save_every: int = 0  # epochs between numbered checkpoints; 0 keeps none
    save_last_every: int = 1  # epochs between saves of last.pt; the last epoch's always
    selection: str = "the test set"  # what is evaluated, written beside the best result

    def evaluates(self, epoch: int, epochs: int) -> bool:
        """Whether the network is evaluated after an epoch, counted from 1."""
        since_start = epoch - 1 - self.eval_start
        return epoch == epochs or (since_start >= 0 and since_start % self.eval_every == 0)


def parameter_groups(net: nn.Module, backbone_lr_scale: float) -> list[dict[str, Any]]:
    """Two groups: the head at the base rate, all else at `backbone_lr_scale` times it."""
    head = net.head_parameters()
    in_head = {id(p) for p in head}
    rest = [p for p in net.parameters() if p.requires_grad and id(p) not in in_head]
    return [{"params": head, "lr_scale": 1.0}, {"params": rest, "lr_scale": backbone_lr_scale}]


def make_optimizer(
    net: nn.Module,
    name: str = "sgd",
    backbone_lr_scale: float = 0.1,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """SGD (Nesterov) or Adam on the `parameter_groups`; rates are 0 until `set_learning_rate`."""
    groups = parameter_groups(net, backbone_lr_scale)
    settings = {"lr": 0.0, "weight_decay": weight_decay, "fused": True}
    if name == "adam":
        return torch.optim.Adam(groups, **settings)
    if name != "sgd":
        raise ValueError(f"the optimiser must be sgd or adam, got {name!r}")
    sgd = torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0, **settings)
    for group in groups if momentum else ():
        for parameter in group["params"]:
            # A fused first step that float16's overflow skips would leave it uninitialised.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


@dataclass(frozen=True)
class Schedule:
    """Learning rate and triplet ramp as functions of the epoch (counted from 0).

    The rate grows linearly in the warm-up, then falls to a tenth at each milestone (`kind` "step"),
    or to zero along half a cosine ("cosine"). Triplet terms are off before the first epoch of
    `triplet_ramp`, fully on from the second, linear between.
    """

    lr: float  # base rate
    epochs: int = 61
    warmup_epochs: int = 10
    milestones: tuple[int, ...] = (20, 50)
    kind: str = "step"
    triplet_ramp: tuple[int, int] = (0, 0)

    def learning_rate(self, epoch: int) -> float:
        """Base rate of an epoch."""
        if epoch < self.warmup_epochs:
            return self.lr * (epoch + 1) / self.warmup_epochs
        if self.kind == "cosine":
            done = (epoch - self.warmup_epochs + 1) / (self.epochs - self.warmup_epochs + 1)
            return self.lr * (1 + math.cos(math.pi * done)) / 2
        return self.lr * 0.1 ** sum(epoch >= m for m in self.milestones)

    def triplet_scale(self, epoch: int) -> float:
        """Factor of the triplet terms' weights in an epoch, 0 to 1."""
        start, end = self.triplet_ramp
        return 1.0 if epoch >= end else max(0.0, (epoch - start + 1) / (end - start + 1))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives each group its share of the base rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def training_step(
    net: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    *,
    order: Sequence[int],
    weights: Mapping[str, float],
    amp: torch.dtype | None = None,
    scaler: torch.amp.GradScaler = NO_SCALING,
    health: MemoryHealth | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimisation step, at the rates already set, on a `data_loader.Batch`.

    `order` is a random order of the stripes, `weights` are those of the terms in the total. With
    `amp` the network runs under autocast in that type, the losses never do. `health` accumulates
    the memory's usage statistics. With several processes the terms see the rows of all of them.

    Returns:
        Detached terms, with their ``total``; the feature (N, D) that the triplet acts on.
    """
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(batch.visible.device.type, dtype=amp, enabled=amp is not None):
        out = net(batch.visible, batch.infrared)
    if amp is not None:
        out = {k: v.float() if torch.is_tensor(v) else v for k, v in out.items()}
    whole_reads = any(criterion.weights.get(name) for name in WHOLE_BATCH_TERMS)
    out, labels = distributed.gather_output(out, batch.labels, whole_reads=whole_reads)
    terms = criterion(out, labels, order)
    terms["total"] = weighted_total(terms, weights)
    if health is not None and "memory_read" in out:
        health.update(out["memory_read"].weights)
    feat = out["feat"].detach()
    del out  # the addressing weights are large, and the backward pass needs the memory
    scaler.scale(terms["total"]).backward()
    scaler.step(optimizer)
    scaler.update()
    return {name: term.detach() for name, term in terms.items()}, feat


def feature_spread(feat: Tensor) -> Tensor:
    """Mean distance of features (N, D) from their mean, relative to their mean norm: a scalar."""
    center = feat.mean(dim=0)
    return (feat - center).norm(dim=1).mean() / feat.norm(dim=1).mean().clamp_min(1e-12)


def read_finite(
    waiting: Sequence[Mapping[str, Tensor]], *, epoch: int, first_step: int
) -> list[dict[str, float]]:
    """Reads the numbers of consecutive steps from the device; all must be finite."""
    rows = torch.stack([torch.stack(list(numbers.values())) for numbers in waiting]).tolist()
    steps = [dict(zip(waiting[0], row, strict=True)) for row in rows]
    for step, numbers in enumerate(steps, first_step):
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"loss term {name!r} is {value} in epoch {epoch}, step {step}; {REMEDY}"
                )
    return steps


def train_epoch(
    net: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    *,
    epoch: int,
    schedule: Schedule,
    settings: TrainSettings,
    scaler: torch.amp.GradScaler = NO_SCALING,
) -> dict[str, float]:
    """Trains one epoch, counted from 0, on the batches of a `data_loader.TrainLoader`.

    Returns:
        The epoch's line of the log: means over the steps of each loss term, ``total`` and
        ``feature_spread``; ``lr``; speed; a GPU's peak memory; ``memory/...`` usage statistics.

    Raises:
        ValueError: A loss is NaN or infinite; found at most `CHECK_EVERY` steps after it happened.
    """
    net.train()
    start = time.perf_counter()
    lr, scale = schedule.learning_rate(epoch), schedule.triplet_scale(epoch)
    set_learning_rate(optimizer, lr)
    weights = {k: w * scale if k in TRIPLET_TERMS else w for k, w in criterion.weights.items()}
    health = MemoryHealth()
    peak_memory(next(net.parameters()).device)  # resets the peaks
    waiting: list[dict[str, Tensor]] = []  # numbers of the steps since the last look
    steps: list[dict[str, float]] = []
    hidden = None if settings.progress else True
    name = f"epoch {epoch + 1}/{schedule.epochs}"
    bar = tqdm(loader.epoch(epoch), name, len(loader), disable=hidden, leave=False)
    for step, batch in enumerate(bar):
        rng = np.random.default_rng((settings.seed, epoch, step, STRIPE_ORDER_STREAM))
        terms, feat = training_step(
            net,
            criterion,
            optimizer,
            batch,
            order=rng.permutation(settings.num_strips).tolist(),
            weights=weights,
            amp=settings.amp,
            scaler=scaler,
            health=health if step % HEALTH_EVERY == 0 else None,
        )
        terms["feature_spread"] = feature_spread(feat)
        waiting.append(distributed.mean_of(terms))
        if len(waiting) == CHECK_EVERY or step + 1 == len(loader):
            steps += read_finite(waiting, epoch=epoch + 1, first_step=len(steps))
            waiting.clear()
            bar.set_postfix_str(f"loss={steps[-1]['total']:.3f}, lr={lr:.2g}")
    images = len(steps) * len(batch.labels) * distributed.size()
    distributed.sum_in_place([*health.counters.values(), *health.used.values()])
    distributed.share(net.buffers())  # running statistics differ by rank: rank 0's are kept
    return {
        "lr": lr,
        **{name: sum(numbers[name] for numbers in steps) / len(steps) for name in steps[0]},
        "images_per_second": images / (time.perf_counter() - start),
        **peak_memory(batch.visible.device),
        **{f"memory/{name}": value for name, value in health.summary().items()},
    }
