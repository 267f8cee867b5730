"""The loop over epochs: train, evaluate, report, save.

Networks, criteria, data and numbers come in as arguments; nothing here knows the command line.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from engine import distributed
from engine.evaluate import format_result
from engine.train import NonFiniteLossError, Schedule, TrainSettings, train_epoch
from eval_metrics import METRICS
from loss import Criterion
from utils import remove_temporary_files, save_checkpoint, write_json, write_json_lines

log = logging.getLogger(__name__)

COLLAPSED_SPREAD = 0.02  # below it, features of different images are as good as identical
LAST, PREVIOUS, BEST = "last.pt", "last.previous.pt", "best.pt"


@dataclass
class Progress:
    """How far a run is; saved in each checkpoint.

    Attributes:
        epoch: Epochs completed.
        best: Results of the best epoch so far, with its ``epoch``; None before an evaluation.
        last: Results of the latest evaluation, with its ``epoch``.
        log: The lines of ``log.jsonl``, one for each epoch completed.
    """

    epoch: int = 0
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)


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


def fit(
    net: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    *,
    schedule: Schedule,
    settings: TrainSettings,
    evaluate: Callable[[], dict[str, Any]],
    files: RunFiles,
    progress: Progress | None = None,
) -> Progress:
    """Trains to the last epoch, evaluating, logging and saving on the way.

    Writes ``last.pt`` after each epoch (its predecessor stays as ``last.previous.pt``), ``best.pt``
    when the evaluation's Rank-1 improves, ``epoch_NNN.pt`` every `settings.save_every` epochs,
    one JSON line an epoch to ``log.jsonl``, TensorBoard events, and ``training.json`` with the
    results of the last and the best epoch. Every random draw is a function of (seed, epoch, step):
    a run that ended anywhere and resumes from ``last.pt`` writes what an unbroken one does, times
    excepted, and on the CPU with the same bits.

    Args:
        net: On its device.
        criterion: See `train_epoch`.
        optimizer: See `train_epoch`.
        loader: See `train_epoch`.
        schedule: Rates, triplet ramp and number of epochs.
        settings: Seed, precision, processes; when to evaluate and save.
        evaluate: Returns the results of the present weights.
        files: Where to write.
        progress: Of an interrupted run whose states are loaded already.

    Returns:
        The final progress.

    Raises:
        NonFiniteLossError: See `train_epoch`; nothing broken is saved.
        OSError: A file cannot be written; the former ones are untouched.
    """
    progress = progress or Progress()
    writer = None
    if distributed.is_main():
        remove_temporary_files(files.checkpoint_dir)
        remove_temporary_files(files.output_dir)
        # Events of later epochs than the resumed one are hidden.
        writer = SummaryWriter(str(files.tensorboard_dir), purge_step=progress.epoch + 1)
    write_reports(files, progress)
    trained = distributed.parallel(net, sync_bn=settings.sync_bn)
    for epoch in range(progress.epoch, schedule.epochs):
        start = time.perf_counter()
        numbers = train_epoch(
            trained,
            criterion,
            optimizer,
            loader,
            epoch=epoch,
            schedule=schedule,
            settings=settings,
        )
        check_weights(net, epoch=epoch + 1)
        _warn_if_collapsed(numbers, epoch)
        progress.epoch = epoch + 1
        line: dict[str, Any] = {"epoch": progress.epoch, **numbers}
        improved = False
        if settings.evaluates(progress.epoch, schedule.epochs):
            improved = _record_result(progress, evaluate(), settings.selection)
            line["eval"] = progress.last
        line["seconds"] = time.perf_counter() - start
        progress.log.append(line)
        if writer is not None:
            _report(line, schedule.epochs, writer)
        _save(net, optimizer, progress, files, settings.save_every, improved=improved)
    if writer is not None:
        writer.close()
    return progress


def _record_result(progress: Progress, result: dict[str, Any], selection: str) -> bool:
    """Records an evaluation in the progress; returns whether it is the best so far."""
    result = {**result, "epoch": progress.epoch}
    progress.last = {**result, "selection": "last epoch"}
    if progress.best is not None and result["rank1"] <= progress.best["rank1"]:
        return False
    progress.best = {**result, "selection": f"best Rank-1 on {selection}"}
    return True


def _save(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    files: RunFiles,
    save_every: int,
    *,
    improved: bool,
) -> None:
    """Writes checkpoints and reports of a complete epoch, on rank 0."""
    if not distributed.is_main():
        return
    checkpoint = {
        **files.header,
        "net": net.state_dict(),
        "config": net.config,
        "optimizer": optimizer.state_dict(),
        "epoch": progress.epoch,
        "best": progress.best,
        "last": progress.last,
        "log": progress.log,
        "torch_generator": torch.get_rng_state(),
        "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }
    if improved:
        best = {**checkpoint, "selection": progress.best["selection"]}
        save_checkpoint(files.checkpoint_dir / BEST, best)
    if save_every and progress.epoch % save_every == 0:
        numbered = {**checkpoint, "selection": f"epoch {progress.epoch}, fixed beforehand"}
        save_checkpoint(files.checkpoint_dir / f"epoch_{progress.epoch:03d}.pt", numbered)
    # last.pt last: a resumed run never finds less than it claims.
    last = {**checkpoint, "selection": "last epoch"}
    save_checkpoint(files.checkpoint_dir / LAST, last, keep=files.checkpoint_dir / PREVIOUS)
    write_reports(files, progress)


def write_reports(files: RunFiles, progress: Progress) -> None:
    """Writes log.jsonl and training.json anew on rank 0: both follow from the progress."""
    if distributed.is_main():
        write_json_lines(files.output_dir / "log.jsonl", progress.log)
        results = {"last": progress.last, "best": progress.best}
        write_json(files.output_dir / "training.json", results)


def check_weights(net: nn.Module, *, epoch: int) -> None:
    """Raises `NonFiniteLossError` when an epoch has left a weight that is not finite."""
    for name, value in net.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise NonFiniteLossError(
                f"{name!r} holds NaN or infinity after epoch {epoch}; the last checkpoint is "
                f"untouched. A smaller --lr or a longer --warmup-epochs usually helps"
            )


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


def _report(line: Mapping[str, Any], epochs: int, writer: SummaryWriter) -> None:
    """Writes an epoch's numbers to the log and to TensorBoard."""
    numbers = {k: v for k, v in line.items() if isinstance(v, float)}
    for name, value in numbers.items():
        writer.add_scalar(name if "/" in name else f"train/{name}", value, line["epoch"])
    terms = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items() if "/" not in k)
    log.info("epoch %d/%d  %s", line["epoch"], epochs, terms)
    memory = {k.removeprefix("memory/"): v for k, v in numbers.items() if k.startswith("memory/")}
    if memory:
        log.info("  memory: %s", "  ".join(f"{k} {v:.3g}" for k, v in memory.items()))
    if "eval" in line:
        for name in METRICS:
            writer.add_scalar(f"eval/{name}", line["eval"][name], line["epoch"])
        log.info("  eval: %s", format_result(line["eval"]))
