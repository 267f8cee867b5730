"""Resume an interrupted run: find its checkpoint, check that it fits, load its states."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.fit import BEST, LAST, PREVIOUS, Progress, RunFiles
from model import TwoStreamNet
from utils import CheckpointError, load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)

ENTRIES = ("net", "config", "optimizer", "epoch", "best", "last", "log", "options", "identities")


def read(path: Path, *, fall_back: bool) -> dict[str, Any]:
    """Reads the checkpoint of an interrupted run; `path` is added to its entries.

    With `fall_back` a damaged or missing ``last.pt`` is replaced by ``last.previous.pt``.

    Raises:
        CheckpointError: When neither can be read, or it is no such checkpoint.
    """
    try:
        content = load_checkpoint(path)
    except CheckpointError as error:
        previous = beside(path, PREVIOUS)
        if not (fall_back and path.name.endswith(LAST) and previous.is_file()):
            raise
        log.warning("%s. Going on from the one before it, %s", error, previous)
        path, content = previous, load_checkpoint(previous)
    missing = [name for name in ENTRIES if name not in content]
    if missing:
        raise CheckpointError(
            f"{path} is no checkpoint of an interrupted run of this project (without "
            f"{', '.join(missing)}); to start from its weights use --weights {path}, to evaluate "
            f"it test.py --resume {path}"
        )
    return {**content, "path": path}


def beside(path: Path, name: str) -> Path:
    """Returns another checkpoint of the run that wrote `path`: `LAST`, `PREVIOUS`, `BEST`."""
    own = re.search(r"(last|last\.previous|best|epoch_\d+)\.pt$", path.name)
    return path.with_name((path.name[: own.start()] if own else "") + name)


def set_damaged_aside(content: Mapping[str, Any], files: RunFiles) -> None:
    """Renames a ``last.pt`` that was not readable, so that no save puts it over a good file."""
    last = files.checkpoint(LAST)
    if content["path"] == files.checkpoint(PREVIOUS) and last.exists():
        os.replace(last, files.checkpoint("last.damaged.pt"))


def carry_best(content: Mapping[str, Any], files: RunFiles) -> None:
    """Brings ``best.pt`` along when a run goes on in another folder; warns when it is lost."""
    path, best = beside(content["path"], BEST), content["best"]
    if best is None or files.checkpoint(BEST).exists():
        return
    try:
        found = load_checkpoint(path)
        if found.get("epoch") != best["epoch"]:
            raise CheckpointError(f"the best epoch so far, {best['epoch']}, is not that of {path}")
        save_checkpoint(files.checkpoint(BEST), found)
    except CheckpointError as error:
        log.warning("going on without the best checkpoint so far: %s", error)


def restore(
    content: Mapping[str, Any],
    net: TwoStreamNet,
    optimizer: torch.optim.Optimizer,
    *,
    identities: Sequence[int],
) -> Progress:
    """Loads the states of network, optimiser and generators.

    The network is as the flags describe it, the optimiser keeps its settings; `identities` has the
    raw identity of each label.

    Raises:
        CheckpointError: When it belongs to another network or other data, or is damaged.
    """
    path = content["path"]
    try:
        differing = [
            f"{key} {content['config'].get(key)!r} there, {value!r} here"
            for key, value in net.config.items()
            if content["config"].get(key) != value
        ]
        if differing:
            raise CheckpointError(
                f"{path} belongs to another network ({'; '.join(differing)}); to start from its "
                f"weights use --weights"
            )
        if list(content["identities"]) != list(identities):
            raise CheckpointError(
                f"{path} was trained on other identities than this data set and split hold: go on "
                f"with the same --data-path, --trial and --select-on, or use --weights {path}"
            )
        net.load_state_dict(content["net"])
        load_optimizer(optimizer, content["optimizer"])
        torch.set_rng_state(content["torch_generator"])
        for device, state in enumerate(content["cuda_generators"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
        return Progress(content["epoch"], content["best"], content["last"], content["log"])
    except CheckpointError:
        raise
    except Exception as error:  # a damaged dictionary makes torch raise nearly anything
        reason = " ".join(str(error).split())[:300] or repr(error)
        raise CheckpointError(
            f"{path} does not hold a run's state as expected: {reason}"
        ) from error


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Takes over the state alone: rates, decay and momentum are the flags'.

    Raises ValueError or RuntimeError when the state is not of this optimiser's parameters.
    """
    ours = optimizer.state_dict()["param_groups"]
    if [g["params"] for g in saved["param_groups"]] != [g["params"] for g in ours]:
        raise ValueError("the optimiser's parameters differ")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": ours})
    for parameter, state in optimizer.state.items():
        for value in filter(torch.is_tensor, state.values()):
            value.expand_as(parameter)  # raises where the shapes do not fit
