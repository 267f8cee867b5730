"""The training epoch, feature extraction, evaluation, and the loop that ties them together.

Nothing here knows the command line: networks, criteria, data and numbers come in as arguments.
"""

import functools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import distributed
import re_rank
from eval_metrics import eval_llcm, eval_regdb, eval_sysu, mean_and_std, summarize
from loss import TRIPLET_TERMS, Criterion, weighted_total
from memory import MemoryHealth, MemoryRead
from utils import (
    Interrupted,
    StopSignals,
    remove_temporary_files,
    save_checkpoint,
    write_json,
    write_json_lines,
)

log = logging.getLogger(__name__)

STOPPING = "stopping"  # travels with a step's numbers: which processes were asked to stop
STRIPE_ORDER_STREAM = 3  # names this module's random stream beside the loader's
COLLAPSED_SPREAD = 0.02  # below it, features of different images are as good as identical
METRICS = ("rank1", "rank5", "rank10", "rank20", "mAP", "mINP")
LAST, PREVIOUS = "last.pt", "last.previous.pt"
RE_RANKINGS = ("no", "k_reciprocal", "random_walk")


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
        self._pending: dict[str, Tensor] = {}
        self._total = math.nan
        self._started = time.perf_counter() - underway.seconds
        if health is not None and distributed.is_main():  # the counters are all processes' sums
            health.load_state_dict(underway.health)

    def note(self, numbers: dict[str, Tensor], *, images: int) -> None:
        """Takes a step's numbers in, and the former step's to account."""
        self._collect()
        self._pending = numbers
        self.underway.images += images * distributed.size()

    def _collect(self) -> None:
        if not self._pending:
            return
        underway = self.underway
        values = {name: float(value) for name, value in self._pending.items()}
        self._pending = {}
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


@torch.no_grad()
def extract_features(
    net: nn.Module,
    batches: Iterable[Tensor],
    *,
    modality: str,
    test_feats: Sequence[str],
    amp: bool = False,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Embeds images once for every kind of retrieval feature asked for.

    Args:
        net: A `TwoStreamNet`; put into evaluation mode.
        batches: Normalised images (n, 3, H, W), such as a `data_loader.EvalLoader`.
        modality: "visible" or "infrared".
        test_feats: Names of `TwoStreamNet.embed`.
        amp: bf16 autocast.
        progress: Whether to show a bar.

    Returns:
        (n, D) float32 arrays by name, rows L2-normalised.

    Raises:
        ValueError: When there are no images, or a feature is not finite.
    """
    net.eval()
    parts: dict[str, list[Tensor]] = {name: [] for name in test_feats}
    hidden = None if progress else True
    for images in tqdm(batches, f"embed {modality}", disable=hidden, leave=False):
        inputs = (images, None) if modality == "visible" else (None, images)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=amp):
            for name, feat in net.embed_all(*inputs, test_feats).items():
                parts[name].append(feat.float().cpu())
    if not all(parts.values()):
        raise ValueError(f"no {modality} images to embed")
    result = {name: torch.cat(feats).numpy() for name, feats in parts.items()}
    for name, feats in result.items():
        if not np.isfinite(feats).all():
            raise ValueError(f"{modality} features {name!r} hold NaN or infinity: broken weights?")
    return result


def extract_shared(
    net: nn.Module,
    count: int,
    batches: Callable[[int, int], Iterable[Tensor]],
    *,
    batch_size: int,
    test_feats: Sequence[str],
    **settings: Any,
) -> dict[str, np.ndarray]:
    """`extract_features` with several processes, each of which embeds a share of the images.

    Batches stay whole, so that the result has the bits of a single process's.

    Args:
        net: Alike in all processes.
        count: Images in all.
        batches: From first and last + 1 image to their batches; asked for the own share alone.
        batch_size: Images a batch.
        test_feats: See `extract_features`, as for the other settings.
        **settings: For `extract_features`.

    Returns:
        All images' features, in every process.
    """
    first, last = distributed.share_of(count, batch_size)
    own = None
    if first < last or distributed.size() == 1:
        own = extract_features(net, batches(first, last), test_feats=test_feats, **settings)
    if distributed.size() == 1:
        return own
    shares = [share for share in distributed.gather_objects(own) if share is not None]
    return {name: np.concatenate([share[name] for share in shares]) for name in test_feats}


def distances(query: np.ndarray, gallery: np.ndarray, ranking: str = "no") -> np.ndarray:
    """Distances (Q, G) of L2-normalised features, smaller is closer.

    Args:
        query: (Q, D).
        gallery: (G, D).
        ranking: "no": negative cosine similarity; "k_reciprocal"; "random_walk".

    Raises:
        ValueError: When `ranking` is unknown.
    """
    return _measure(query, ranking)(gallery)


def _measure(query: np.ndarray, ranking: str) -> Callable[[np.ndarray], np.ndarray]:
    """`distances` of one set of queries to any gallery; what is the queries' own is done once."""
    if ranking == "no":

        def negative_similarity(gallery: np.ndarray) -> np.ndarray:
            similarity = query @ gallery.T
            return np.negative(similarity, out=similarity)  # in place: it may take gigabytes

        return negative_similarity
    if ranking == "k_reciprocal":
        return re_rank.KReciprocal(query).distances
    if ranking == "random_walk":
        return functools.partial(re_rank.random_walk, query)
    raise ValueError(f"re-ranking must be one of {', '.join(RE_RANKINGS)}, got {ranking!r}")


def score(
    eval_set: Any, query: np.ndarray, gallery: np.ndarray, ranking: str = "no"
) -> dict[str, Any]:
    """Scores features under a protocol.

    Args:
        eval_set: A `data_manager.EvalSet`.
        query: Features of its query images, (Q, D).
        gallery: Features of all its gallery images, (G, D).
        ranking: See `distances`.

    Returns:
        ``rank1``, ``rank5``, ``rank10``, ``rank20``, ``mAP``, ``mINP`` as fractions, means over the
        trials; ``std`` and ``per_trial`` with the same keys; ``cmc``, the share of queries answered
        by ranks 1 to 20; ``re_rank``; ``protocol``.
    """
    q, g = eval_set.query, eval_set.gallery
    measure = _measure(query, ranking)
    # Trials share images: all distances once, unless a ranking depends on the gallery.
    whole = measure(gallery) if ranking == "no" and len(eval_set.gallery_trials) > 1 else None
    per_trial, curves = [], []
    for rows in eval_set.gallery_trials:
        distmat = measure(gallery[rows]) if whole is None else whole[:, rows]
        if eval_set.camera_rule == "none":
            result = eval_regdb(distmat, q.pids, g.pids[rows])
        else:
            evaluate = {"sysu": eval_sysu, "same": eval_llcm}[eval_set.camera_rule]
            result = evaluate(distmat, q.pids, g.pids[rows], q.camids, g.camids[rows])
        per_trial.append(summarize(*result))
        curves.append(result[0])
    mean, std = mean_and_std(per_trial)
    return {
        **mean,
        "std": std,
        "per_trial": per_trial,
        "cmc": np.mean(curves, axis=0).tolist(),
        "re_rank": ranking,
        "protocol": eval_set.protocol,
    }


@dataclass
class Progress:
    """How far a run is; saved in each checkpoint.

    Attributes:
        epoch: Epochs completed.
        best: Results of the best epoch so far, with its ``epoch``; None before an evaluation.
        last: Results of the latest evaluation, with its ``epoch``.
        log: The lines of ``log.jsonl``, one for each epoch completed.
        underway: The epoch after these.
    """

    epoch: int = 0
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    underway: EpochProgress = field(default_factory=EpochProgress)


@dataclass
class RunFiles:
    """Where a run writes.

    Attributes:
        output_dir: Log lines and results.
        checkpoint_dir: Checkpoints.
        tensorboard_dir: TensorBoard events.
        header: Entries stored in each checkpoint beside the state (options, versions, ...).
    """

    output_dir: Path
    checkpoint_dir: Path
    tensorboard_dir: Path
    header: dict[str, Any] = field(default_factory=dict)


def write_reports(files: RunFiles, state: Progress) -> None:
    """Writes log.jsonl and training.json anew, in the main process: both follow from the state."""
    if distributed.is_main():
        write_json_lines(files.output_dir / "log.jsonl", state.log)
        results = {"last": state.last, "best": state.best}
        write_json(files.output_dir / "training.json", results)


class _Saver(Checkpoints):
    """Writes a run's checkpoints and reports, in the main process."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Progress,
        files: RunFiles,
        *,
        steps_per_epoch: int,
        every_steps: int,
        every_epochs: int,
        stop: StopSignals,
    ) -> None:
        self._net, self._optimizer, self._state, self._files = net, optimizer, state, files
        self._steps_per_epoch, self._every_steps = steps_per_epoch, every_steps
        self._every_epochs, self._stop = every_epochs, stop

    def due(self, steps: int, stopping: bool) -> bool:
        return stopping or bool(self._every_steps and steps % self._every_steps == 0)

    def stop_requested(self) -> bool:
        return self._stop.received is not None

    def save(self, *, stopping: bool) -> None:
        epoch, steps = self._state.epoch + 1, self._state.underway.steps
        self._write(
            {LAST: f"broken off: {steps} of {self._steps_per_epoch} steps of epoch {epoch}"}
        )
        if stopping:
            raise self.interruption()

    def save_epoch(self, *, improved: bool) -> None:
        """Saves after a complete epoch, last.pt last: what it promises is then there."""
        state, due = self._state, {}
        if improved:
            due["best.pt"] = state.best["selection"]
        if self._every_epochs and state.epoch % self._every_epochs == 0:
            due[f"epoch_{state.epoch:03d}.pt"] = f"epoch {state.epoch}, fixed beforehand"
        self._write({**due, LAST: "last epoch"})
        write_reports(self._files, state)

    def interruption(self) -> Interrupted:
        """What to raise once all is saved."""
        state, steps = self._state, self._state.underway.steps
        within = f" and {steps} of {self._steps_per_epoch} steps of the next" if steps else ""
        where = self._files.checkpoint_dir / LAST
        number = self._stop.received or signal.SIGTERM  # another process received it
        return Interrupted(number, f"{state.epoch} epochs{within} are saved in {where}")

    def _write(self, due: Mapping[str, str]) -> None:
        """Writes checkpoints: file name to how its epoch was chosen."""
        state = self._state
        check_weights(self._net, epoch=state.epoch, step=state.underway.steps)
        if not distributed.is_main():
            return
        cuda = torch.cuda.is_initialized()
        content = {
            **self._files.header,
            "net": self._net.state_dict(),
            "config": self._net.config,
            "optimizer": self._optimizer.state_dict(),
            "epoch": state.epoch,
            "underway": vars(state.underway),
            "best": state.best,
            "last": state.last,
            "log": state.log,
            "torch_generator": torch.get_rng_state(),
            "cuda_generators": torch.cuda.get_rng_state_all() if cuda else [],
        }
        for name, selection in due.items():
            keep = self._files.checkpoint_dir / PREVIOUS if name == LAST else None
            path = self._files.checkpoint_dir / name
            save_checkpoint(path, {**content, "selection": selection}, keep=keep)


def check_weights(net: nn.Module, *, epoch: int, step: int) -> None:
    """Raises `NonFiniteLossError` when a state that is about to be saved is broken."""
    for name, value in net.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise NonFiniteLossError(
                f"{name!r} holds NaN or infinity after {epoch} epochs and {step} steps; the last "
                f"checkpoint is untouched. A smaller --lr or a longer --warmup-epochs usually helps"
            )


def fit(
    net: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    *,
    schedule: Schedule,
    files: RunFiles,
    seed: int,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    selection: str = "test",
    eval_start: int = 10,
    eval_every: int = 2,
    save_epoch: int = 0,
    save_every_steps: int = 0,
    sync_bn: bool = False,
    amp: bool = False,
    resume_from: Progress | None = None,
    stop: StopSignals | None = None,
    progress: bool = True,
) -> Progress:
    """Trains from `resume_from` to the last epoch, evaluating, logging and saving on the way.

    Writes ``last.pt`` after each epoch (its predecessor stays as ``last.previous.pt``), ``best.pt``
    when the evaluation's Rank-1 improves, ``epoch_NNN.pt`` every `save_epoch` epochs, one JSON line
    an epoch to ``log.jsonl``, TensorBoard events, and ``training.json`` with the results of the
    last and the best epoch. A run that was broken off anywhere and is taken up from ``last.pt``
    writes what an unbroken one does, times excepted, and on the CPU with the same bits.

    Args:
        net: On its device.
        criterion: See `train_epoch`.
        optimizer: See `train_epoch`.
        loader: See `train_epoch`.
        schedule: Rates, triplet ramp and number of epochs.
        files: Where to write.
        seed: Of the stripe orders.
        evaluate: Gives the results of the present weights; None never evaluates.
        selection: What `evaluate` measures on, written beside each best result.
        eval_start: First epoch (counted from 1) after which to evaluate.
        eval_every: Epochs between evaluations; the last epoch is always evaluated.
        save_epoch: Epochs between numbered checkpoints; 0 keeps none.
        save_every_steps: Steps between saves of ``last.pt`` within an epoch; 0 saves after it only.
        sync_bn: With several processes, batch statistics over all of them.
        amp: bf16 autocast in training.
        resume_from: Progress of an interrupted run whose states are loaded already.
        stop: Signals that ask to save and leave.
        progress: Whether to show bars.

    Returns:
        The final progress.

    Raises:
        NonFiniteLossError: See `train_epoch`; nothing broken is saved.
        Interrupted: A signal came; everything is saved.
        OSError: A file cannot be written; the former ones are untouched.
    """
    state, stop = resume_from or Progress(), stop or StopSignals()
    saver = _Saver(
        net,
        optimizer,
        state,
        files,
        steps_per_epoch=len(loader),
        every_steps=save_every_steps,
        every_epochs=save_epoch,
        stop=stop,
    )
    if distributed.is_main():
        remove_temporary_files(files.checkpoint_dir)
        remove_temporary_files(files.output_dir)
    write_reports(files, state)
    writer = _board(files, state)
    trained = distributed.parallel(net, sync_bn=sync_bn)
    with stop.deferred():
        for epoch in range(state.epoch, schedule.epochs):
            start = time.perf_counter() - state.underway.seconds
            numbers = train_epoch(
                trained,
                criterion,
                optimizer,
                loader,
                epoch=epoch,
                schedule=schedule,
                seed=seed,
                amp=amp,
                progress=progress,
                underway=state.underway,
                checkpoints=saver,
            )
            _warn_if_collapsed(numbers, epoch)
            line: dict[str, Any] = {"epoch": epoch + 1, **numbers}
            done = epoch + 1
            due = done > eval_start and (done - eval_start) % eval_every == 0
            result = None
            if evaluate is not None and (due or done == schedule.epochs):
                result = _evaluate(evaluate, saver, stop)
            state.epoch, state.underway = done, EpochProgress()
            improved = result is not None and _note_results(state, result, selection)
            if result is not None:
                line["eval"] = state.last
            line["seconds"] = time.perf_counter() - start
            state.log.append(line)
            if writer is not None:
                _report(line, schedule.epochs, writer)
            saver.save_epoch(improved=improved)
            if done < schedule.epochs and distributed.any_of(saver.stop_requested()):
                raise saver.interruption()
    if writer is not None:
        writer.close()
    return state


def _board(files: RunFiles, state: Progress) -> SummaryWriter | None:
    """TensorBoard's writer, in the main process; later epochs of a broken-off run are hidden."""
    if not distributed.is_main():
        return None
    return SummaryWriter(str(files.tensorboard_dir), purge_step=state.epoch + 1)


def _evaluate(
    evaluate: Callable[[], dict[str, Any]], saver: _Saver, stop: StopSignals
) -> dict[str, Any]:
    """Evaluates; a signal breaks that off at once and saves the trained epoch before it."""
    try:
        with stop.deferred(False):
            return evaluate()
    except Interrupted:
        saver.save(stopping=True)
        raise


def _warn_if_collapsed(numbers: Mapping[str, float], epoch: int) -> None:
    """Logs a warning when all features of an epoch's batches were nearly the same."""
    if numbers["feature_spread"] < COLLAPSED_SPREAD:
        log.warning(
            "epoch %d: the features have collapsed, all images look alike to the network (spread "
            "%.4f of the norm, healthy is above 0.1), and the triplet terms hold them there. An "
            "untrained network needs --preset scratch, or --triplet-ramp 4 9 with a smaller --lr",
            epoch + 1,
            numbers["feature_spread"],
        )


def _note_results(state: Progress, result: dict[str, Any], selection: str) -> bool:
    """Records an evaluation in the progress; returns whether it is the best so far."""
    result = {**result, "epoch": state.epoch}
    state.last = {**result, "selection": "last epoch"}
    if state.best is not None and result["rank1"] <= state.best["rank1"]:
        return False
    state.best = {**result, "selection": f"best Rank-1 on {selection}"}
    return True


def _report(line: Mapping[str, Any], epochs: int, writer: SummaryWriter) -> None:
    """Logs an epoch's numbers in words and to TensorBoard."""
    numbers = {k: v for k, v in line.items() if isinstance(v, float)}
    for name, value in numbers.items():
        writer.add_scalar(name if "/" in name else f"train/{name}", value, line["epoch"])
    terms = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items() if "/" not in k)
    log.info("epoch %d/%d  %s", line["epoch"], epochs, terms)
    memory = "  ".join(f"{k[7:]} {v:.3g}" for k, v in numbers.items() if k.startswith("memory/"))
    if memory:
        log.info("  memory: %s", memory)
    if "eval" in line:
        result = line["eval"]
        for name in METRICS:
            writer.add_scalar(f"eval/{name}", result[name], line["epoch"])
        log.info("  eval: %s", format_result(result))


def format_result(result: Mapping[str, Any]) -> str:
    """One line with a result's numbers in percent and what they were measured on."""
    names = {"rank1": "R1", "rank5": "R5", "rank10": "R10", "rank20": "R20"}
    numbers = "  ".join(f"{names.get(key, key)} {100 * result[key]:.2f}" for key in METRICS)
    ranking = "not re-ranked" if result["re_rank"] == "no" else f"re-ranked: {result['re_rank']}"
    return f"{numbers}  ({result['protocol']}; {ranking})"
