"""The loop over epochs: training, evaluating, reporting and saving, so that nothing is lost.

Networks, criteria, data and numbers come in as arguments; nothing here knows the command line.
"""

import logging
import signal
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
from engine.train import Checkpoints, EpochProgress, NonFiniteLossError, Schedule, train_epoch
from eval_metrics import METRICS
from loss import Criterion
from utils import (
    Interrupted,
    StopSignals,
    remove_temporary_files,
    save_checkpoint,
    write_json,
    write_json_lines,
)

log = logging.getLogger(__name__)

COLLAPSED_SPREAD = 0.02  # below it, features of different images are as good as identical
LAST, PREVIOUS = "last.pt", "last.previous.pt"


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
