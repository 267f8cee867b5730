"""A training step and an epoch of them, with optimiser, learning rate and the books kept.

Nothing here knows the command line: networks, criteria, data and numbers come in as arguments.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import distributed
from loss import TRIPLET_TERMS, Criterion, weighted_total
from memory import MemoryHealth, MemoryRead

STOPPING = "stopping"  # travels with a step's numbers: which processes were asked to stop
STRIPE_ORDER_STREAM = 3  # names this module's random stream beside the loader's


class NonFiniteLossError(ValueError):
    """A loss term or a weight is NaN or infinite; the message names it, epoch and step."""


@dataclass
class EpochProgress:
    """An epoch under way: what is needed to go on inside it and to report it in full.

    Attributes:
        steps: Steps done.
        sums: Of each reported number over these steps.
        health: Counters of `MemoryHealth`.
        images: Images trained on.
        seconds: What they took.
    """

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    health: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0


class Checkpoints:
    """When `train_epoch` breaks off to save, and how; this one never does."""

    def due(self, steps: int, stopping: bool) -> bool:
        """Whether to save after so many steps of the epoch.

        Args:
            steps: Steps done.
            stopping: Whether a process was asked to stop; alike in all processes.
        """
        return False

    def stop_requested(self) -> bool:
        """Whether this process was asked to stop."""
        return False

    def save(self, *, stopping: bool) -> None:
        """Saves what is under way; raises `Interrupted` then if it is to stop."""


def make_optimizer(
    net: nn.Module,
    *,
    name: str = "sgd",
    backbone_lr_scale: float = 0.1,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Optimiser with two groups: the head at the base rate, all else at a share of it.

    Args:
        net: A `TwoStreamNet`.
        name: "sgd" (Nesterov) or "adam".
        backbone_lr_scale: The share, `lr_scale` of the second group.
        weight_decay: On every parameter.
        momentum: SGD's.

    Returns:
        An optimiser whose rates are zero until `set_learning_rate`.

    Raises:
        ValueError: When `name` is unknown.
    """
    head = net.head_parameters()
    in_head = {id(p) for p in head}
    rest = [p for p in net.parameters() if p.requires_grad and id(p) not in in_head]
    groups = [
        {"params": head, "lr_scale": 1.0},
        {"params": rest, "lr_scale": backbone_lr_scale},
    ]
    if name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=0.0,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=momentum > 0,
            fused=True,
        )
    if name == "adam":
        return torch.optim.Adam(groups, lr=0.0, weight_decay=weight_decay, fused=True)
    raise ValueError(f"the optimiser must be sgd or adam, got {name!r}")


@dataclass(frozen=True)
class Schedule:
    """Learning rate and triplet ramp as functions of the epoch (counted from 0).

    Attributes:
        lr: Base rate.
        epochs: Epochs in all.
        warmup_epochs: Epoch e below it has ``lr * (e + 1) / warmup_epochs``.
        milestones: From each of these epochs on the rate is a tenth (``kind`` "step").
        kind: "step", or "cosine": after the warm-up down to zero along half a cosine.
        triplet_ramp: (start, end): triplet terms are off before epoch `start`, fully on from `end`,
            linear between; (0, 0) has them on from the beginning.
    """

    lr: float
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


def _float32(value: Any) -> Any:
    """Casts a training output out of autocast's half precision, leaving wider types."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    if isinstance(value, MemoryRead):  # of which the losses take the part read alone
        return value._replace(part=_float32(value.part))
    return value


def training_step(
    net: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    *,
    visible: Tensor,
    infrared: Tensor,
    labels: Tensor,
    order: Sequence[int],
    weights: Mapping[str, float],
    amp: bool = False,
    health: MemoryHealth | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimisation step.

    Args:
        net: In training mode.
        criterion: Gives the loss terms.
        optimizer: Rates already set.
        visible: (PK, 3, H, W).
        infrared: (PK, 3, H, W).
        labels: (2PK,), visible rows first.
        order: Random order of the stripes.
        weights: Weight of each term in the total.
        amp: Whether the network runs under bf16 autocast; the losses never do.
        health: Counts how the memory is addressed.

    Returns:
        Detached terms, with their ``total``, and the feature (N, D) that the triplet acts on.
    """
    optimizer.zero_grad(set_to_none=True)  # their memory serves the forward pass
    with torch.autocast(visible.device.type, dtype=torch.bfloat16, enabled=amp):
        out = net(visible, infrared, health)
    out = {name: _float32(value) for name, value in out.items()}
    # Triplets and decorrelation are no means over rows: they need the whole batch.
    whole_read = bool(criterion.weights["decorrelation"])
    out, labels = distributed.gather_output(out, labels, whole_read=whole_read)
    terms = criterion(out, labels, order)
    total = weighted_total(terms, weights)
    feat = out["feat"].detach()
    del out  # its maps go as soon as the backward pass needs them no more
    total.backward()
    optimizer.step()
    terms = {name: term.detach() for name, term in terms.items()}
    return {**terms, "total": total.detach()}, feat


def feature_spread(feat: Tensor) -> Tensor:
    """Mean distance of features (N, D) from their mean, relative to their mean norm: a scalar.

    Near 0 every image has the same feature: the network has collapsed.
    """
    center = feat.mean(dim=0)
    return (feat - center).norm(dim=1).mean() / feat.norm(dim=1).mean().clamp_min(1e-12)


def check_finite(terms: Mapping[str, float], *, epoch: int, step: int) -> None:
    """Raises `NonFiniteLossError` naming the first term that is not finite."""
    for name, value in terms.items():
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"loss term {name!r} is {value} in epoch {epoch}, step {step}; the last checkpoint "
                f"is untouched. A smaller --lr or a longer --warmup-epochs usually helps"
            )


def train_epoch(
    net: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    *,
    epoch: int,
    schedule: Schedule,
    seed: int,
    amp: bool = False,
    progress: bool = True,
    underway: EpochProgress | None = None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, float]:
    """Trains one epoch, or what is left of it.

    Args:
        net: The network, on the loader's device, or `distributed.parallel` of it.
        criterion: Gives the terms and, as `criterion.weights`, their weights.
        optimizer: With `lr_scale` in its groups.
        loader: A `data_loader.TrainLoader`.
        epoch: Counted from 0.
        schedule: Rate and triplet ramp.
        seed: Of the stripe orders.
        amp: bf16 autocast.
        progress: Whether to show a bar.
        underway: Where to go on; kept up to date whenever `checkpoints` is asked to save, and at
            the end.
        checkpoints: Asked after each step.

    Returns:
        Means over the steps: each loss term, ``total``, ``feature_spread``; ``lr``;
        ``images_per_second``; and the memory's health under ``memory/...``.

    Raises:
        NonFiniteLossError: Found at most one step after it happened, and before anything is saved.
        Interrupted: From `checkpoints`.
    """
    net.train()
    checkpoints = checkpoints or Checkpoints()
    lr, scale = schedule.learning_rate(epoch), schedule.triplet_scale(epoch)
    set_learning_rate(optimizer, lr)
    weights = {k: w * scale if k in TRIPLET_TERMS else w for k, w in criterion.weights.items()}
    health = MemoryHealth() if getattr(_plain(net), "memory", None) is not None else None
    ledger = _Ledger(underway or EpochProgress(), health, epoch)
    first = ledger.underway.steps
    bar = tqdm(
        loader.epoch(epoch, first),
        f"epoch {epoch}",
        len(loader),
        initial=first,
        disable=None if progress else True,
        leave=False,
    )
    for step, batch in enumerate(bar, first):
        order = np.random.default_rng((seed, epoch, step, STRIPE_ORDER_STREAM))
        terms, feat = training_step(
            net,
            criterion,
            optimizer,
            visible=batch.visible,
            infrared=batch.infrared,
            labels=batch.labels,
            order=order.permutation(criterion.num_strips).tolist(),
            weights=weights,
            amp=amp,
            health=health,
        )
        terms["feature_spread"] = feature_spread(feat)
        stopping = checkpoints.stop_requested()
        if distributed.size() > 1:  # learn of a request together, when its step is accounted for
            terms[STOPPING] = torch.full_like(terms["total"], stopping)
            stopping = ledger.stopping
        ledger.note(distributed.mean_of(terms), images=len(batch.labels))
        bar.set_postfix_str(ledger.summary(lr))
        if checkpoints.due(step + 1, stopping) and step + 1 < len(loader):
            ledger.settle()
            checkpoints.save(stopping=stopping or ledger.stopping)
    done = ledger.settle()
    distributed.share_buffers(net)
    means = {name: value / len(loader) for name, value in done.sums.items()}
    speed = done.images / max(done.seconds, 1e-9)
    counted = {f"memory/{k}": v for k, v in summarize_health(done.health).items()}
    return {"lr": lr, **means, "images_per_second": speed, **counted}


class _Ledger:
    """Keeps the books of an epoch, reading each step's numbers a step late.

    The device then always has the next step's work queued.
    """

    def __init__(self, underway: EpochProgress, health: MemoryHealth | None, epoch: int) -> None:
        self.underway, self.stopping = underway, False
        self._health, self._epoch = health, epoch
        self._pending: tuple[list[str], Tensor, torch.cuda.Event | None] | None = None
        self._total = math.nan
        self._started = time.perf_counter() - underway.seconds
        if health is not None and distributed.is_main():  # the counters are all processes' sums
            health.load_state_dict(underway.health)

    def note(self, numbers: dict[str, Tensor], *, images: int) -> None:
        """Takes a step's numbers in, and the former step's to account."""
        self._collect()
        # On its way before the next step is queued, behind which a later copy would have to wait.
        values = torch.stack(list(numbers.values()))
        arrived = torch.cuda.Event() if values.is_cuda else None
        values = values.to("cpu", non_blocking=True)
        if arrived is not None:
            arrived.record()
        self._pending = list(numbers), values, arrived
        self.underway.images += images * distributed.size()

    def _collect(self) -> None:
        if self._pending is None:
            return
        underway = self.underway
        (names, numbers, arrived), self._pending = self._pending, None
        if arrived is not None:
            arrived.synchronize()
        values = dict(zip(names, numbers.tolist(), strict=True))
        self.stopping = self.stopping or values.pop(STOPPING, 0.0) > 0
        check_finite(values, epoch=self._epoch, step=underway.steps)
        for name, value in values.items():
            underway.sums[name] = underway.sums.get(name, 0.0) + value
        underway.steps += 1
        self._total = values["total"]

    def settle(self) -> EpochProgress:
        """Accounts for every step so far; the result is complete and alike in all processes."""
        self._collect()
        self.underway.seconds = time.perf_counter() - self._started
        if self._health is not None:
            self.underway.health = distributed.sum_of(self._health.state_dict())
        return self.underway

    def summary(self, lr: float) -> str:
        """For the bar."""
        rate = self.underway.images / (time.perf_counter() - self._started)
        return f"loss={self._total:.3f}, lr={lr:.2g}, images_s={rate:.0f}"


def summarize_health(counters: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """`MemoryHealth.summary` of saved counters."""
    health = MemoryHealth()
    health.load_state_dict(counters)
    return health.summary()


def _plain(net: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, or itself."""
    return net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net
