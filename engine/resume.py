"""Resume an interrupted run: find its checkpoint, check that it fits, load its states."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.fit import LAST, PREVIOUS, Progress
from eval_metrics import RESULT
from model import TwoStreamNet
from networks.checkpoint_file import CheckpointError, load_checkpoint, shapes
from utils import check_form

log = logging.getLogger(__name__)

RESULT_OF_RUN = {**RESULT, "epoch": int, "selection": str, "dataset": str}
ENTRIES = ("net", "config", "optimizer", "epoch", "best", "last", "log", "options", "identities")
ENTRIES += ("generators",)


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
            f"{path} is no checkpoint that a run can go on from (without {', '.join(missing)}; "
            f"last.pt has them); to start from its weights use --weights {path}, to evaluate "
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
        if shapes(content["net"]) != shapes(net.state_dict()):
            raise ValueError("its weights have other shapes or types")
        for name in ("best", "last"):
            check_form(content[name], (None, RESULT_OF_RUN), name)
        net.load_state_dict(content["net"])
        load_optimizer(optimizer, content["optimizer"])
        for name, state in content["generators"].items():
            if name == "cpu":
                torch.set_rng_state(state)
            elif int(name) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, int(name))
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
    parameters = [p for group in ours for p in group["params"]]
    if not saved["state"].keys() <= set(parameters):
        raise ValueError("the optimiser's state is of other parameters")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if not torch.is_tensor(value):
                    continue
                value.expand_as(parameter)  # raises where the shapes do not fit
                if value.shape == parameter.shape:  # in its memory format, too
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                elif group.get("fused") and name != "step":  # it would read beyond the tensor
                    raise ValueError(f"the optimiser's {name!r} has the shape {tuple(value.shape)}")
