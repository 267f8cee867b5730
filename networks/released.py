"""Checkpoints of the earlier releases, and starting from another network's weights."""

import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from networks.checkpoint_file import CheckpointError
from networks.settings import INSTANCES_PER_ID, PARTS_PER_INSTANCE

log = logging.getLogger(__name__)

RENAMED = (  # how a released name begins, and what replaces that
    (r"visible_module\.visible\.(conv1|bn1)\.", r"visible.stem.\1."),
    (r"visible_module\.visible\.layer(\d)\.", r"visible.layer\1.blocks."),
    (r"thermal_module\.thermal\.(conv1|bn1)\.", r"infrared.stem.\1."),
    (r"thermal_module\.thermal\.layer(\d)\.", r"infrared.layer\1.blocks."),
    (r"base_resnet\.base\.layer(\d)\.", r"shared.layer\1.blocks."),
    (r"NL_(\d)\.(\d+)\.(theta|phi)\.", r"shared.layer\1.non_local.\2.\3."),
    (r"NL_(\d)\.(\d+)\.g\.0\.", r"shared.layer\1.non_local.\2.g."),
    (r"NL_(\d)\.(\d+)\.W\.0\.", r"shared.layer\1.non_local.\2.project."),
    (r"NL_(\d)\.(\d+)\.W\.1\.", r"shared.layer\1.non_local.\2.norm."),
    (r"mem_rep\.memory\.weight$", r"memory.part_bank"),
    (r"mem_rep\.memory\.reweight_layer_part\.", r"memory.part_gate."),
    (r"mem_rep\.memory\.reweight_layer_ins\.", r"memory.instance_gate."),
)


def load_matching(net: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Starts a network from another one's weights: every entry of the same name and shape.

    Classifiers and memories for another number of identities keep their random start, which the log
    says. `state` has this project's or an earlier release's names; `origin` is its file.

    Raises:
        CheckpointError: When less than half of the network's entries are there.
    """
    if is_released(state):
        state = convert_released_state_dict(state)
    own = net.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if len(fitting) < len(own) / 2:
        raise CheckpointError(
            f"{origin} fits only {len(fitting)} of the network's {len(own)} entries; it belongs to "
            f"another network (--arch, --method, --share_net)"
        )
    net.load_state_dict(fitting, strict=False)
    kept = [k for k in own if k not in fitting]
    if kept or len(fitting) < len(state):
        log.warning(
            "%s: took %d of its %d entries; in the network %d entries start afresh: %s",
            *(origin, len(fitting), len(state), len(kept), ", ".join(kept[:8]) or "none"),
        )


def is_released(state: Iterable[str]) -> bool:
    """Whether a state dict carries an earlier release's names."""
    return any(k.startswith("base_resnet.base.") for k in state)


def convert_released_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Maps an AGW, HCT, SG-MRA or MG-MRA checkpoint to the `TwoStreamNet` of `released_config`.

    Names may have DataParallel's ``module.`` prefix. Entries the releases never use (AGW's second
    copies of the residual stages, the memory methods' second batch norm) are dropped.

    Raises:
        ValueError: When it is no such checkpoint.
    """
    state = {k.removeprefix("module."): v for k, v in state_dict.items()}
    config = released_config(state)
    of_memory = "memory_" if config["memory"] else ""  # whose neck and classifier they are
    necks = ((r"bottleneck\.", f"{of_memory}neck."), (r"classifier\.", f"{of_memory}classifier."))
    converted = _stacked_stripes(state, config["num_strips"]) if config["head"] == "pcb" else {}
    for name, value in state.items():
        own_stage = re.match(r"(visible|thermal)_module\.\w+\.layer(\d)\.", name)
        if own_stage and int(own_stage[2]) >= config["share_net"]:
            continue  # AGW's second copy of a shared stage, which is never run
        for old, new in (*RENAMED, *necks):
            if re.match(old, name):
                converted[re.sub(old, new, name, count=1)] = value
    return converted


def _stacked_stripes(state: dict[str, Tensor], stripes: int) -> dict[str, Tensor]:
    """The released per-stripe convolutions, batch norms and classifiers, stacked."""

    def column(template: str) -> list[Tensor]:
        return [state[template.format(i)] for i in range(stripes)]

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


def released_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of the `TwoStreamNet` that a released checkpoint belongs to.

    All releases train a ResNet-50. The GeM exponent and the memory variant are not stored in such a
    file: the caller names them.

    Raises:
        ValueError: When it is no such checkpoint.
    """
    if not is_released(state):
        raise ValueError("not a checkpoint of the earlier releases: no base_resnet.base.* in it")
    shared = re.findall(r"\bbase_resnet\.base\.layer(\d)", " ".join(state))
    config = {"arch": "resnet50", "share_net": min(map(int, shared)), "memory": None}
    if "fc_list.0.weight" in state:
        config["head"] = "pcb"
        config["num_strips"] = len([k for k in state if re.match(r"fc_list\.\d+\.bias$", k)])
        config["local_feat_dim"] = len(state["local_conv_list.0.0.weight"])
        config["num_ids"] = len(state["fc_list.0.weight"])
    else:  # AGW by its non-local blocks, without these HCT's baseline
        config["head"] = "agw" if any(name.startswith("NL_") for name in state) else "global"
        config["num_ids"] = len(state["classifier.weight"])
    if "mem_rep.memory.weight" in state:
        config["memory"], t, r = "sg", INSTANCES_PER_ID, PARTS_PER_INSTANCE
        if "mem_rep.memory.reweight_layer_part.bias" in state:
            t = len(state["mem_rep.memory.reweight_layer_ins.bias"])
            r = len(state["mem_rep.memory.reweight_layer_part.bias"])
            config |= {"memory": "mg", "instances_per_id": t, "parts_per_instance": r}
        config["memory_ids"] = len(state["mem_rep.memory.weight"]) // (t * r)
    return config
