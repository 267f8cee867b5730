"""The loop over epochs: train, evaluate, report, save."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from engine import distributed
from engine.run_files import BEST, LAST, PREVIOUS, RunFiles
from engine.train import REMEDY, Schedule, TrainSettings, train_epoch
from eval_metrics import METRICS
from loss import CLASSIFYING_TERMS, Criterion
from memory import SingleGranularityMemory
from networks.checkpoint_file import save_checkpoint
from utils import naming, write_atomic, write_json

log = logging.getLogger(__name__)

COLLAPSED_SPREAD = 0.02  # below it, features of different images are as good as identical
RECENT = 4  # epochs whose mean time says how long the rest will take


@dataclass
class Progress:
    """How far a run is; saved in each checkpoint."""

    epoch: int = 0  # epochs completed
    best: dict[str, Any] | None = None  # results of the best epoch so far, with its ``epoch``
    last: dict[str, Any] | None = None  # results of the latest evaluation, with its ``epoch``
    log: list[dict[str, Any]] = field(default_factory=list)  # lines of log.jsonl, one an epoch
    scaler: dict[str, Any] = field(default_factory=dict)  # state of float16's loss scaling


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
    before_epoch: Callable[[int], None] | None = None,
) -> Progress:
    """Trains to the last epoch, evaluating, logging and saving on the way (rank 0 alone).

    `evaluate` returns the results of the current weights; `progress` is that of the run to resume,
    whose states are loaded; `before_epoch` is called with the number of the next epoch, from 0.
    Every random draw is a function of (seed, epoch, step). Returns the final progress.

    Raises:
        ValueError: A loss term or a weight is NaN or infinite; nothing broken is saved.
        OSError: A file cannot be written; the former ones are untouched.
    """
    progress = progress or Progress()
    writer = None
    if distributed.is_main():
        # Hides the events of epochs after the one resumed from.
        with naming(files.tensorboard_dir):
            writer = SummaryWriter(str(files.tensorboard_dir), purge_step=progress.epoch + 1)
    unused = any(criterion.weights.get(term) == 0 for term in CLASSIFYING_TERMS)
    trained = distributed.parallel(net, sync_bn=settings.sync_bn, unused_parameters=unused)
    device = next(net.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == torch.float16)
    if progress.scaler:
        scaler.load_state_dict(progress.scaler)
    if settings.compiled:
        _compile_backbone(net)
    for epoch in range(progress.epoch, schedule.epochs):
        start = time.perf_counter()
        if before_epoch is not None:
            before_epoch(epoch)
        how = {"epoch": epoch, "schedule": schedule, "settings": settings, "scaler": scaler}
        numbers = train_epoch(trained, criterion, optimizer, loader, **how)
        check_weights(net, epoch=epoch + 1)
        progress.epoch, progress.scaler = epoch + 1, scaler.state_dict()
        line: dict[str, Any] = {"epoch": progress.epoch, **numbers}
        if distributed.is_main() and settings.evaluates(progress.epoch, schedule.epochs):
            result = {**evaluate(), "epoch": progress.epoch}
            if progress.best is None or result["rank1"] > progress.best["rank1"]:
                progress.best = {**result, "selection": f"best Rank-1 on {settings.selection}"}
            progress.last = line["eval"] = {**result, "selection": "last epoch"}
        line["seconds"] = time.perf_counter() - start
        progress.log.append(line)
        if writer is not None:
            with naming(files.tensorboard_dir):
                _report(progress, schedule.epochs, writer)
            _warn(progress.log, net.memory)
            _save(net, optimizer, progress, files, settings, last=progress.epoch == schedule.epochs)
    if writer is not None:
        with naming(files.tensorboard_dir):
            writer.close()
        files.checkpoint(PREVIOUS).unlink(missing_ok=True)
    return progress


def _compile_backbone(net: nn.Module) -> None:
    """Has Inductor compile the stages when they first run; the state dict keeps its names."""
    log.info("compiling the backbone: the first steps and the first evaluation take minutes")
    torch._dynamo.config.recompile_limit = 32  # three parts; training, evaluation, its last batch
    for stages in (net.visible, net.infrared, net.shared):
        stages.compile(dynamic=False)


def _save(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    files: RunFiles,
    settings: TrainSettings,
    *,
    last: bool,
) -> None:
    """Writes the checkpoints and reports of a complete epoch: best.pt, epoch_NNN.pt, last.pt."""
    checkpoint = {**files.header, "net": net.state_dict(), "config": net.config, **vars(progress)}
    if progress.best is not None and progress.best["epoch"] == progress.epoch:
        checkpoint["selection"] = progress.best["selection"]
        save_checkpoint(files.checkpoint(BEST), checkpoint)
    if settings.save_every and progress.epoch % settings.save_every == 0:
        checkpoint["selection"] = f"epoch {progress.epoch}, fixed beforehand"
        save_checkpoint(files.checkpoint(f"epoch_{progress.epoch:03d}.pt"), checkpoint)
    # Written last: everything that last.pt mentions is on the disk by then.
    if last or progress.epoch % settings.save_last_every == 0:
        of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        generators = {"cpu": torch.get_rng_state(), **{str(i): s for i, s in enumerate(of_gpus)}}
        checkpoint |= {"optimizer": optimizer.state_dict(), "generators": generators}
        checkpoint["selection"] = "last epoch"
        save_checkpoint(files.checkpoint(LAST), checkpoint, keep=files.checkpoint(PREVIOUS))
    write_reports(files, progress)


def write_reports(files: RunFiles, progress: Progress) -> None:
    """Writes log.jsonl and training.json anew: both follow from the progress."""
    lines = "".join(json.dumps(line) + "\n" for line in progress.log)
    write_atomic(files.output_dir / "log.jsonl", lambda stream: stream.write(lines.encode()))
    write_json(files.output_dir / "training.json", {"last": progress.last, "best": progress.best})


def check_weights(net: nn.Module, *, epoch: int) -> None:
    """Raises ValueError when an epoch has left a weight that is not finite."""
    state = net.state_dict()
    finite = torch.stack([value.isfinite().all() for value in state.values()]).tolist()
    if not all(finite):
        name = list(state)[finite.index(False)]
        raise ValueError(f"{name!r} holds NaN or infinity after epoch {epoch}; {REMEDY}")


def _warn(lines: list[dict[str, Any]], memory: nn.Module | None) -> None:
    """Warns of collapsed features and of memory levels that read nothing, when that begins."""
    *earlier, line = lines
    collapsed = line["feature_spread"] < COLLAPSED_SPREAD
    if collapsed and not (earlier and earlier[-1]["feature_spread"] < COLLAPSED_SPREAD):
        log.warning(
            "epoch %d: the features have collapsed, all images look alike to the network (spread "
            "%.4f of the norm, healthy is above 0.1), and the triplet terms hold them there. An "
            "untrained network needs --preset scratch, or --triplet-ramp 4 9 with a smaller --lr",
            *(line["epoch"], line["feature_spread"]),
        )
    for key in [k for k in line if k.endswith("/zero_reads")]:
        if line[key] == 1 and all(former.get(key) != 1 for former in earlier):
            level, text = key.split("/")[1], "the memory's threshold"
            if isinstance(memory, SingleGranularityMemory):
                size = memory.bank_sizes()[level]
                remedy = "--shrink auto scales the threshold with the bank"
                if memory.shrink_scale is not None:
                    remedy = "a smaller --shrink-scale lowers the threshold"
                text = f"lambda {memory.threshold(level, size):.2g} (uniform weight {1 / size:.2g})"
                text += f"; {remedy}"
            log.warning("epoch %d: %s level: no read passed %s", line["epoch"], level, text)


def _report(progress: Progress, epochs: int, writer: SummaryWriter) -> None:
    """Writes an epoch's numbers to TensorBoard, and the most telling of them to the log."""
    line = progress.log[-1]
    for name, value in line.items():
        if isinstance(value, float):
            writer.add_scalar(name if "/" in name else f"train/{name}", value, line["epoch"])
    words = [f"epoch {line['epoch']}/{epochs}", f"loss {line['total']:.3g}"]
    best = f"{100 * progress.best['rank1']:.1f}" if progress.best else ""
    if "eval" in line:
        for name in METRICS:
            writer.add_scalar(f"eval/{name}", line["eval"][name], line["epoch"])
        rank1, mean_ap = (f"{100 * line['eval'][name]:.1f}" for name in ("rank1", "mAP"))
        words += [f"R1 {rank1} (best {best})", f"mAP {mean_ap}"]
    elif best:
        words.append(f"best R1 {best}")
    seconds = [each["seconds"] for each in progress.log[-RECENT:]]
    left = (epochs - line["epoch"]) * sum(seconds) / len(seconds)
    log.info("  ".join([*words, f"{tqdm.format_interval(left)} left"]))
