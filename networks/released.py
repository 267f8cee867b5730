"""Checkpoints of the earlier releases, and starting from another network's weights.

`convert_released_state_dict` maps the names of AGW, HCT, SG-MRA and MG-MRA checkpoints to this
project's; `released_config` tells which network such a checkpoint belongs to.
"""

import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from utils import CheckpointError

log = logging.getLogger(__name__)

_STREAMS = {
    "visible_module.visible": "visible",
    "thermal_module.thermal": "infrared",
    "base_resnet.base": "shared",
}
_RENAMED = {
    "mem_rep.memory.weight": "memory.part_bank",
    "mem_rep.memory.reweight_layer_part": "memory.part_gate",
    "mem_rep.memory.reweight_layer_ins": "memory.instance_gate",
}
_NON_LOCAL = {"g.0": "g", "theta": "theta", "phi": "phi", "W.0": "project", "W.1": "norm"}
_RESNET_DEPTHS = {  # blocks a stage, and whether a block has a third convolution
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
}


def load_matching(net: nn.Module, state: dict[str, Tensor], origin: str) -> list[str]:
    """Starts a network from another one's weights: every entry of the same name and shape.

    Classifiers and memories of another number of identities stay as they are; the log names them.

    Args:
        net: The network to fill.
        state: Entries under this project's names, or an earlier release's.
        origin: File name, for messages.

    Returns:
        Names of the entries that stayed as they were.

    Raises:
        CheckpointError: When less than half of the network's entries are there.
    """
    if is_released(state):
        state = convert_released_state_dict(state)
    own = net.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    kept = [k for k in own if k not in fitting]
    if len(fitting) < len(own) / 2:
        raise CheckpointError(
            f"{origin} fits only {len(fitting)} of the network's {len(own)} entries; it belongs to "
            f"another network (--arch, --method, --share_net): its entries are "
            f"{', '.join(list(state)[:4])}, ..."
        )
    net.load_state_dict(fitting, strict=False)
    if kept:
        log.info("%s: %d entries start afresh: %s", origin, len(kept), ", ".join(kept[:8]))
    return kept


def is_released(state: Iterable[str]) -> bool:
    """Whether a state dict carries an earlier release's names."""
    return any(k.removeprefix("module.").startswith("base_resnet.base.") for k in state)


def convert_released_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Maps an earlier release's AGW, HCT, SG-MRA or MG-MRA checkpoint to this project's names.

    Args:
        state_dict: Entries as released, with or without DataParallel's ``module.`` prefix.

    Returns:
        Entries of a `TwoStreamNet` with the configuration `released_config` gives. Entries the
        releases never use (AGW's second copies of the residual stages, the memory methods' second
        batch norm) are dropped.

    Raises:
        ValueError: When it is no such checkpoint.
    """
    state = {k.removeprefix("module."): v for k, v in state_dict.items()}
    if not is_released(state):
        raise ValueError(
            f"not a checkpoint of the earlier releases: no base_resnet.base.* among "
            f"{', '.join(list(state)[:4])}, ..."
        )
    shared_from = _first_shared_stage(state)
    with_memory = "mem_rep.memory.weight" in state
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        new = _backbone_name(name, shared_from) or _head_name(name, with_memory)
        if new:
            converted[new] = value
    return converted | _stacked_stripes(state)


def _first_shared_stage(state: dict[str, Tensor]) -> int:
    """`share_net` of a released checkpoint: the lowest stage among the shared entries.

    AGW's shared module holds a whole ResNet, of which the stem is never run.
    """
    stages = {int(m[1]) for m in (re.match(r"base_resnet\.base\.layer(\d)", k) for k in state) if m}
    return min(stages, default=5)


def _backbone_name(name: str, shared_from: int) -> str | None:
    """New name of a released backbone or non-local entry; None for others and unused ones."""
    match = re.match(r"NL_(\d)\.(\d+)\.(g\.0|theta|phi|W\.0|W\.1)\.(\w+)$", name)
    if match:
        stage, index, part, leaf = match.groups()
        return f"shared.layer{stage}.non_local.{index}.{_NON_LOCAL[part]}.{leaf}"
    for old, new in _STREAMS.items():
        if not name.startswith(old + "."):
            continue
        rest = name[len(old) + 1 :]
        layer = re.match(r"layer(\d)\.(.*)", rest)
        stage = int(layer[1]) if layer else 0
        if (new == "shared") != (stage >= shared_from):
            return None  # a copy that is never run
        return f"{new}.layer{stage}.blocks.{layer[2]}" if layer else f"{new}.stem.{rest}"
    return None


def _head_name(name: str, with_memory: bool) -> str | None:
    """New name of a released neck, classifier or memory entry."""
    for old, new in _RENAMED.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    module, _, leaf = name.partition(".")
    prefix = "memory_" if with_memory else ""
    if module == "bottleneck":
        return f"{prefix}neck.{leaf}"
    if module == "classifier":
        return f"{prefix}classifier.{leaf}"
    return None


def _stacked_stripes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released per-stripe convolutions, batch norms and classifiers, stacked."""
    stripes = range(sum(bool(re.match(r"fc_list\.\d+\.bias$", k)) for k in state))
    if not stripes:
        return {}

    def column(template: str) -> list[Tensor]:
        return [state[template.format(i)] for i in stripes]

    stacked = {
        "part_reduce.weight": torch.stack(column("local_conv_list.{}.0.weight")).flatten(2),
        "part_reduce.bias": torch.stack(column("local_conv_list.{}.0.bias")),
        "part_classifier.weight": torch.stack(column("fc_list.{}.weight")),
        "part_classifier.bias": torch.stack(column("fc_list.{}.bias")),
        "part_norm.num_batches_tracked": state["local_conv_list.0.1.num_batches_tracked"],
    }
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        stacked[f"part_norm.{leaf}"] = torch.cat(column("local_conv_list.{}.1." + leaf))
    return stacked


def released_config(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of the `TwoStreamNet` that a released checkpoint belongs to.

    The GeM exponent and the memory variant are not stored in such a file: the caller names them.

    Raises:
        ValueError: When the entries are no released network's.
    """
    state = {k.removeprefix("module."): v for k, v in state_dict.items()}
    blocks = tuple(
        len({m[1] for m in (re.match(rf".*\.layer{i}\.(\d+)\.", k) for k in state) if m})
        for i in range(1, 5)
    )
    bottleneck = any(k.endswith("layer4.0.conv3.weight") for k in state)
    if (blocks, bottleneck) not in _RESNET_DEPTHS:
        raise ValueError(f"unknown backbone: {blocks} blocks in layers 1 to 4")
    config: dict[str, Any] = {
        "arch": _RESNET_DEPTHS[blocks, bottleneck],
        "share_net": _first_shared_stage(state),
        "head": "pcb" if "fc_list.0.weight" in state else "agw",
        "memory": None,
    }
    if config["head"] == "pcb":
        config["num_strips"] = sum(bool(re.match(r"fc_list\.\d+\.bias$", k)) for k in state)
        config["local_feat_dim"] = state["local_conv_list.0.0.weight"].shape[0]
        config["num_ids"] = state["fc_list.0.weight"].shape[0]
    if "classifier.weight" in state:
        config["num_ids"] = state["classifier.weight"].shape[0]
    if "mem_rep.memory.weight" in state:
        config["memory"] = "sg"
        if "mem_rep.memory.reweight_layer_part.weight" in state:
            config["memory"] = "mg"
            config["parts_per_instance"] = state["mem_rep.memory.reweight_layer_part.bias"].numel()
            config["instances_per_id"] = state["mem_rep.memory.reweight_layer_ins.bias"].numel()
    return config
