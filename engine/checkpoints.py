"""What a checkpoint holds: its network, and what it says of its training."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_manager import DATASETS, EvalSet
from model import MEMORIES, TwoStreamNet
from networks.checkpoint_file import CheckpointError, load_checkpoint, shapes
from networks.released import convert_released_state_dict, released_config

log = logging.getLogger(__name__)

# Of the earlier releases, whose files do not say it: settings, and the size of training images.
RELEASED_DEFAULTS = {"gem_p": 3.0, "memory_variant": "released"}
RELEASED_SIZE = {"img_h": 288, "img_w": 144}
SEEN_BEFORE = "identities_before"  # entry: raw pids that starting weights had seen, by data


def load_network(
    path: str | Path,
    *,
    gem_p: float | None = None,
    memory_variant: str | None = None,
    memory: type[nn.Module] | None = None,
) -> tuple[TwoStreamNet, dict[str, Any]]:
    """Builds the network of a checkpoint, this project's or an earlier release's, on the CPU.

    `gem_p` and `memory_variant` override the stored values; an earlier release's file stores none,
    and takes 3.0, with a warning, and "released". A memory of the user's own needs its class;
    without it the checkpoint is loaded without memory, which the default retrieval features do not
    need. Returns the network, and the checkpoint's other entries.

    Raises:
        CheckpointError: When the file cannot be used.
        ValueError: When its network has no use for `memory_variant`.
    """
    content = load_checkpoint(path)
    state = content.pop("net")
    given = {"gem_p": gem_p, "memory_variant": memory_variant}
    given = {k: v for k, v in given.items() if v is not None}
    try:
        if "config" in content:
            config = {**content["config"], **given}
        else:
            config = {**RELEASED_DEFAULTS, **released_config(state), **given}
            state = convert_released_state_dict(state)
            if gem_p is None:
                log.warning(
                    "%s stores no GeM exponent, as no earlier release's file does: taking %g; "
                    "HCT's and the first upload's trainings on RegDB have 10 (--gem-p 10)",
                    *(path, config["gem_p"]),
                )
        if memory is not None:
            if config["memory"] != memory.__name__:
                raise ValueError(f"its memory is {config['memory']!r}, not {memory.__name__!r}")
            config["memory"] = memory
        elif config.get("memory") not in (None, *MEMORIES):
            log.warning(
                "%s has a memory of the class %s: loaded without it (--memory MODULE.CLASS)",
                *(path, config["memory"]),
            )
            state = {k: v for k, v in state.items() if not k.startswith("memory.")}
            config |= {"memory": "mg", "memory_levels": "none"}
        with torch.device("meta"):  # shapes first: a file may ask for any amount of memory
            expected = shapes(TwoStreamNet(**config).state_dict())
        if expected != shapes(state):
            raise ValueError("its configuration does not belong to its weights")
        net = TwoStreamNet(**config)
        net.load_state_dict(state)
    except Exception as error:  # a damaged dictionary makes torch raise nearly anything
        reason = (str(error) or repr(error)).splitlines()[0]
        raise CheckpointError(f"{path} holds no network of this project: {reason}") from error
    if memory_variant is not None and net.config["memory"] in (None, "sg"):
        raise ValueError(f"--memory-variant has no effect, since {path} has no memory of MG-MRA")
    return net, content


def open_network(
    path: str | Path, device: torch.device, img_h: int | None, img_w: int | None, **settings: Any
) -> tuple[TwoStreamNet, dict[str, Any], tuple[int, int]]:
    """Loads a network onto its device, in evaluation mode, with the `settings` of `load_network`.

    Returns the network, the checkpoint's other entries, and the height and width of its images:
    `img_h` and `img_w`, or where these are None what it was trained with.
    """
    net, info = load_network(path, **settings)
    trained = {**RELEASED_SIZE, **info.get("options", {})}
    size = img_h or trained["img_h"], img_w or trained["img_w"]
    net.check_image_height(size[0])
    return net.to(device, memory_format=torch.channels_last).eval(), info, size


class TrainedOn:
    """What a checkpoint says that it was trained on; an earlier release's file says nothing."""

    def __init__(self, path: str | Path, content: Mapping[str, Any] | None = None) -> None:
        """Reads a checkpoint's entries, from its file unless `content` has them."""
        content = load_checkpoint(path) if content is None else content
        self.path = path
        self.options: dict[str, Any] = content.get("options", {})  # of its training
        self.data: str = content.get("data", "")  # as `data_manager.data_name` calls it
        # Raw pids trained on, by data; by its starting weights too.
        self.seen = {name: set(pids) for name, pids in content.get(SEEN_BEFORE, {}).items()}
        self.seen.setdefault(self.data, set()).update(content.get("identities", ()))

    @property
    def defaults(self) -> dict[str, Any]:
        """Its data set, trial and, if it is here, data folder: what is evaluated unless told."""
        if self.options.get("dataset") not in DATASETS:
            return {}
        known = {"dataset": self.options["dataset"], "trial": self.options.get("trial", 1)}
        folder = self.options.get("data_path")
        if folder and Path(folder).is_dir():
            known["data_path"] = Path(folder)
        return known

    def admit(
        self, protocol: EvalSet, data: str, *, trial: int, subset: str, seen: bool
    ) -> tuple[EvalSet, str]:
        """Checks a protocol against the identities trained on, which are refused unless `seen`.

        Only those of the same `data`, as `data_manager.data_name` calls it, are compared. Returns
        the protocol, its words completed by a remark, and the remark ("": nothing to say).

        Raises:
            ValueError: Some of the identities were trained on.
        """
        pids = np.union1d(protocol.query.pids, protocol.gallery.pids).tolist()
        known = self.seen.get(data) or self.seen.get("", set())
        facts = DATASETS[protocol.dataset]
        comparable = subset == "val" or not facts.train_pids_are_labels
        count = len(known.intersection(pids)) if comparable else 0
        if count:
            people = "validation" if subset == "val" else "test"
            remark = f"{count} of {len(pids)} {people} identities were trained on"
            if not seen:
                own = self.defaults.get("trial", trial)
                other = facts.splits > 1 and own != trial
                hint = f"of trial {own}: pass --trial {own}" if other else "or its starting weights"
                raise ValueError(
                    f"{remark} by {self.path} ({hint}). With --seen-ids, test.py and visualize.py "
                    f"go on, and every result says so"
                )
        elif self.data not in ("", data):
            remark = f"trained on {self.data}"
        elif not known:
            remark = "training identities unknown"
        else:
            return protocol, ""
        return replace(protocol, protocol=f"{protocol.protocol}; {remark}"), remark


def describe(path: str, info: dict[str, Any], net: TwoStreamNet) -> dict[str, Any]:
    """Returns what a result says of its checkpoint: file, epoch, training data, open settings."""
    trained = info.get("options", {})
    names = ("preset", "erase", "channel_aug", "grey", "tone")
    recipe = ", ".join(f"{name} {trained[name]}" for name in names if trained.get(name))
    return {
        "checkpoint": str(path),
        "selection": info.get("selection", "unknown (checkpoint of an earlier release)"),
        "epoch": info.get("epoch"),
        "trained_on": info.get("data", "unknown"),
        "recipe": recipe,
        "gem_p": float(net.gem_p),
        "memory_variant": net.config["memory_variant"] if net.config["memory"] == "mg" else None,
    }
