"""Resume an interrupted run: find its checkpoint, check that it fits, load its states."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.fit import Progress
from engine.run_files import LAST, PREVIOUS, RunFiles
from model import TwoStreamNet
from networks.checkpoint_file import CheckpointError, load_checkpoint
from options import INCIDENTAL, RESUME_LAST
from utils import find_checkpoint

log = logging.getLogger(__name__)

PROGRESS = ("epoch", "best", "last", "log")  # entries that are fields of `Progress`
ENTRIES = ("net", "config", "optimizer", "generators", "options", "identities", *PROGRESS)
# Options that may change silently on --resume, and that may not; any other change is logged.
FREE_ON_RESUME = (*INCIDENTAL, "data_path", "preset", "weights", "deterministic")
FIXED_ON_RESUME = ("dataset", "trial", "select_on", "method", "optim")


def find(given: str | None, files: RunFiles, *, train: bool) -> dict[str, Any]:
    """Reads the checkpoint that --resume names; without a value last.pt of the folder, if any.

    In training ``last.previous.pt`` replaces a damaged or missing ``last.pt``. Returns entries and
    ``path`` of the checkpoint, or {} to start from the beginning.

    Raises:
        CheckpointError: When neither can be read, or it is no such checkpoint.
    """
    if given is None:
        return {}
    folder = files.checkpoint_dir
    nothing_yet = not any(files.checkpoint(name).exists() for name in (LAST, PREVIOUS))
    if given == RESUME_LAST and nothing_yet and train:
        log.warning("--resume: no checkpoint in %s yet, starting from the beginning", folder)
        return {}
    path = Path(given or files.checkpoint(LAST))
    path = path / LAST if path.is_dir() else path
    try:
        path = Path(find_checkpoint(path, *([folder] if given else [])))
        content = load_checkpoint(path)
    except CheckpointError as error:
        previous = path.with_name(path.name.removesuffix(LAST) + PREVIOUS)
        if not (train and path.name.endswith(LAST) and previous.is_file()):
            raise
        log.warning("%s. Going on from the one before it, %s", error, previous)
        path, content = previous, load_checkpoint(previous)
    missing = [name for name in ENTRIES if name not in content]
    if missing:
        raise CheckpointError(
            f"{path} is no checkpoint that a run can go on from (without {', '.join(missing)}; "
            f"last.pt has them); to start from its weights use --weights {path}, to evaluate "
            f"it test.py --resume {path}"
        )
    return {**content, "path": path}


def changes(saved: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """Returns the options that changed since a run was saved: "lr 0.1 -> 0.05; ...".

    Raises:
        ValueError: When one of them cannot change.
    """
    changed = {
        name: f"{name} {saved[name]} -> {value}"
        for name, value in present.items()
        if name in saved and name not in FREE_ON_RESUME and saved[name] != value
    }
    refused = [text for name, text in changed.items() if name in FIXED_ON_RESUME]
    if refused:
        raise ValueError(
            f"a run cannot go on with a changed {'; '.join(refused)}: give the former value, or "
            f"start a new run from these weights with --weights and another --output-dir"
        )
    return "; ".join(changed.values())


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
        for name, here in net.config.items():
            there = content["config"].get(name)
            if there != here:
                values = f"{name} {there!r} there, {here!r} here"
                raise ValueError(f"it belongs to another network ({values})")
        if content["identities"] != list(identities):
            raise ValueError(
                "it was trained on other identities than this data set and split hold: go on with "
                "the same --data-path, --trial and --select-on"
            )
        net.load_state_dict(content["net"])
        load_optimizer(optimizer, content["optimizer"])
        for name, state in content["generators"].items():
            if name == "cpu":
                torch.set_rng_state(state)
            elif int(name) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, int(name))
        return Progress(*(content[name] for name in PROGRESS), content.get("scaler", {}))
    except Exception as error:  # a damaged dictionary makes torch raise nearly anything
        reason = " ".join(str(error).split())[:500] or repr(error)
        hint = "to start from its weights use --weights"
        raise CheckpointError(
            f"{content['path']} cannot be resumed here: {reason}; {hint}"
        ) from error


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Loads the state alone: rates, decay and momentum come from the flags."""
    ours = optimizer.state_dict()["param_groups"]
    if [g["params"] for g in saved["param_groups"]] != [g["params"] for g in ours]:
        raise ValueError("the optimiser's parameters differ")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": ours})
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                # A fused step would go beyond a tensor that is smaller, or not dense.
                if name != "step" and value.shape != parameter.shape:
                    raise ValueError(f"the optimiser's {name!r} has the shape {tuple(value.shape)}")
                state[name] = value.clone()
