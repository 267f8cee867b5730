"""Resume an interrupted run: find its checkpoint, check that it fits, load its states."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.fit import LAST, PREVIOUS, Progress
from model import TwoStreamNet
from utils import CheckpointError, load_checkpoint

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
        previous = path.with_name(path.name.removesuffix(LAST) + PREVIOUS)
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


def restore(
    content: Mapping[str, Any],
    net: TwoStreamNet,
    optimizer: torch.optim.Optimizer,
    *,
    identities: Sequence[int],
) -> Progress:
    """Loads the states of network, optimiser, which keeps its settings, and generators.

    Raises:
        CheckpointError: When it belongs to another network or other `identities`, or is damaged.
    """
    try:
        differing = [
            f"{key} {content['config'].get(key)!r} there, {value!r} here"
            for key, value in net.config.items()
            if content["config"].get(key) != value
        ]
        if differing:
            raise ValueError(f"it belongs to another network ({'; '.join(differing)})")
        if list(content["identities"]) != list(identities):
            raise ValueError(
                "it was trained on other identities than this data set and split hold: go on with "
                "the same --data-path, --trial and --select-on"
            )
        net.load_state_dict(content["net"])
        load_optimizer(optimizer, content["optimizer"])
        torch.set_rng_state(content["torch_generator"])
        for device, state in enumerate(content["cuda_generators"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
        names = ("epoch", "best", "last", "log")
        return Progress(*(content[name] for name in names), content.get("scaler", {}))
    except Exception as error:  # a damaged dictionary makes torch raise nearly anything
        reason = " ".join(str(error).split())[:500] or repr(error)
        raise CheckpointError(
            f"{content['path']} cannot be resumed here: {reason}; to start from its weights use "
            f"--weights"
        ) from error


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Takes over the state alone: rates, decay and momentum are the flags'."""
    ours = optimizer.state_dict()["param_groups"]
    if [g["params"] for g in saved["param_groups"]] != [g["params"] for g in ours]:
        raise ValueError("the optimiser's parameters differ")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": ours})
    for parameter, state in optimizer.state.items():
        for value in filter(torch.is_tensor, state.values()):
            value.expand_as(parameter)  # raises where the shapes do not fit
