"""Taking up an interrupted run: which checkpoint, whether it fits, and how its states come back.

A checkpoint may come from anywhere: each entry is checked before it is used, and what does not fit
is refused with a `CheckpointError` naming the file.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.fit import LAST, PREVIOUS, Progress
from engine.train import EpochProgress
from eval_metrics import METRICS
from model import TwoStreamNet
from utils import CheckpointError, load_checkpoint

log = logging.getLogger(__name__)

BEST = "best.pt"
DAMAGED = "last.damaged.pt"
ENTRIES = ("net", "config", "optimizer", "epoch", "best", "last", "log", "underway", "options")
OPTIMIZER_STATE = {"SGD": {"momentum_buffer"}, "Adam": {"step", "exp_avg", "exp_avg_sq"}}
COUNTERS = ("rows", "zero_rows", "survivors", "entropy", "used")  # of memory.MemoryHealth


def read(path: Path, *, fall_back: bool) -> dict[str, Any]:
    """Reads the checkpoint of an interrupted run.

    Args:
        path: The checkpoint.
        fall_back: Whether a damaged or missing ``last.pt`` may be replaced by ``last.previous.pt``.

    Returns:
        Its entries, and ``path``, where they come from.

    Raises:
        CheckpointError: When it cannot be read, nor its predecessor, or is no such checkpoint.
    """
    try:
        content = load_checkpoint(path)
    except CheckpointError as error:
        previous = path.with_name(PREVIOUS)
        if not (fall_back and path.name == LAST and previous.is_file()):
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


def set_damaged_aside(content: Mapping[str, Any], folder: Path) -> None:
    """Renames the ``last.pt`` that was not readable, so that no save puts it over a good file."""
    last = folder / LAST
    if content["path"] == folder / PREVIOUS and last.exists():
        os.replace(last, folder / DAMAGED)


def carry_best(content: Mapping[str, Any], folder: Path) -> None:
    """Brings ``best.pt`` along when a run goes on in another folder; warns when it is lost."""
    path, best = content["path"], content["best"]
    if best is None or (folder / BEST).exists():
        return
    source = path.with_name(BEST)
    try:
        fits = load_checkpoint(source).get("epoch") == best["epoch"]
    except CheckpointError as error:
        log.warning("%s", error)
        fits = False
    if fits:
        shutil.copyfile(source, folder / f".{BEST}.tmp")
        os.replace(folder / f".{BEST}.tmp", folder / BEST)
    else:
        log.warning("the best epoch so far, %d, has no %s in %s", best["epoch"], BEST, path.parent)


def restore(
    content: Mapping[str, Any],
    net: TwoStreamNet,
    optimizer: torch.optim.Optimizer,
    *,
    steps_per_epoch: int,
    identities: Sequence[int],
) -> Progress:
    """Loads the states of network, optimiser and generators.

    Args:
        content: From `read`.
        net: As the flags describe it.
        optimizer: Of its parameters; keeps its own settings and takes over the state alone.
        steps_per_epoch: Steps an epoch has now.
        identities: Raw identity of each label.

    Raises:
        CheckpointError: When it belongs to another network, other data, or is damaged.
    """
    path = content["path"]
    config = content["config"] if isinstance(content["config"], dict) else {}
    differing = [
        f"{key} {repr(config.get(key))[:40]} there, {value!r} here"
        for key, value in net.config.items()
        if not _same(config.get(key), value)
    ]
    if differing:
        raise CheckpointError(
            f"{path} belongs to another network ({'; '.join(differing)}); to start from its "
            f"weights use --weights"
        )
    if not _same(content.get("identities"), list(identities)):
        raise CheckpointError(
            f"{path} was trained on other identities than this data set and split hold: go on with "
            f"the same --data-path, --trial and --select-on, or use --weights {path}"
        )
    try:
        net.load_state_dict(content["net"])
        _load_optimizer(optimizer, content["optimizer"])
        progress = _progress(content, steps_per_epoch, _bank_sizes(net))
        _set_generators(content)
    except Exception as error:  # a stranger's dictionary makes torch raise nearly anything
        reason = " ".join(str(error).split())[:300] or repr(error)
        raise CheckpointError(
            f"{path} does not hold a run's state as expected: {reason}"
        ) from error
    return progress


def _same(theirs: Any, ours: Any) -> bool:
    """Whether a stranger's value, of any type, equals a plain one of ours or a list of such."""
    if isinstance(ours, list):
        alike = isinstance(theirs, list) and len(theirs) == len(ours)
        return alike and all(map(_same, theirs, ours))
    return isinstance(theirs, str | int | float | None) and theirs == ours


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(what)


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Any) -> None:
    """Takes over the state alone: rates, decay and momentum are the flags'."""
    ours = optimizer.state_dict()["param_groups"]
    _require(isinstance(saved, dict), "the optimiser's state is no dictionary")
    groups = saved["param_groups"]
    _require(all(isinstance(group, dict) for group in groups), "the optimiser's groups are broken")
    theirs = [group["params"] for group in groups]
    _require(
        _same(theirs, [group["params"] for group in ours]), "the optimiser's parameters differ"
    )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": ours})
    names = OPTIMIZER_STATE[type(optimizer).__name__]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for parameter, state in optimizer.state.items():
        _require(id(parameter) in held, f"the optimiser's state has an entry {parameter!r}")
        _require(set(state) <= names, f"the optimiser's state holds {sorted(state)}")
        for name, value in state.items():
            shape = () if name == "step" else parameter.shape
            fits = torch.is_tensor(value) and value.shape == shape and value.is_floating_point()
            absent = value is None and name == "momentum_buffer"
            _require(fits or absent, f"the optimiser's {name} does not fit its parameter")


def _bank_sizes(net: TwoStreamNet) -> dict[str, int]:
    """Prototypes at each level of the memory."""
    semantic = net.config["num_ids"]
    instance = semantic * net.config["instances_per_id"]
    part = instance * net.config["parts_per_instance"]
    return {"part": part, "instance": instance, "semantic": semantic}


def _progress(
    content: Mapping[str, Any], steps_per_epoch: int, bank_sizes: Mapping[str, int]
) -> Progress:
    epoch, lines = content["epoch"], content["log"]
    _require(type(epoch) is int and epoch >= 0, f"its epoch is {epoch!r}")
    json.dumps([lines, content["best"], content["last"]])  # plain values only
    numbers = [line["epoch"] for line in lines]
    _require(numbers == list(range(1, epoch + 1)), f"its log has the epochs {numbers[:5]}...")
    for name in ("best", "last"):
        _check_result(content[name], name, epoch)
    underway = EpochProgress(**content["underway"])
    steps = underway.steps
    _require(
        type(steps) is int and 0 <= steps <= steps_per_epoch,
        f"{steps!r} steps of an epoch's {steps_per_epoch}",
    )
    if steps == 0:
        return Progress(epoch, content["best"], content["last"], list(lines))
    numbers = [*underway.sums.values(), underway.images, underway.seconds]
    plain = all(type(v) in (int, float) and math.isfinite(v) for v in numbers)
    _require(plain and {"total", "feature_spread"} <= set(underway.sums), "its sums are broken")
    for level, counters in underway.health.items():
        _check_counters(counters, bank_sizes[level])
    return Progress(epoch, content["best"], content["last"], list(lines), underway)


def _check_result(result: Any, name: str, epoch: int) -> None:
    if result is None:
        return
    numbers = [result[metric] for metric in METRICS]
    _require(all(type(v) is float and math.isfinite(v) for v in numbers), f"{name} is broken")
    texts = [result[key] for key in ("selection", "protocol", "re_rank")]
    _require(all(type(v) is str for v in texts), f"{name} is broken")
    at = result["epoch"]
    _require(type(at) is int and 1 <= at <= epoch, f"{name} is of epoch {at!r}")


def _check_counters(counters: Mapping[str, Tensor], size: int) -> None:
    _require(set(counters) == set(COUNTERS), f"the memory's counters are {sorted(counters)}")
    for name, value in counters.items():
        shape = (size,) if name == "used" else ()
        types = {"used": (torch.bool,), "entropy": (torch.float64, torch.float32)}
        fits = value.shape == shape and value.dtype in types.get(name, (torch.int64,))
        _require(fits, f"the memory's counter {name} is {value.dtype} {tuple(value.shape)}")
    _require(int(counters["rows"]) > 0, "the memory has counted no row")


def _set_generators(content: Mapping[str, Any]) -> None:
    """Restores torch's global generators; nothing in training draws from them today."""
    if "torch_generator" in content:
        torch.set_rng_state(content["torch_generator"])
    states = content.get("cuda_generators", [])
    if torch.cuda.is_available() and len(states) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states)
