"""What a checkpoint holds: its network, and what it says of its training."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model import MEMORIES, TwoStreamNet
from networks.released import convert_released_state_dict, released_config
from utils import CheckpointError, load_checkpoint, plain_entry, state_dict_of

log = logging.getLogger(__name__)

# Of the earlier releases, whose files do not say it: settings, and the size of training images.
RELEASED_DEFAULTS = {"gem_p": 3.0, "memory_variant": "released"}
RELEASED_SIZE = {"img_h": 288, "img_w": 144}


def load_network(
    path: str | Path,
    *,
    gem_p: float | None = None,
    memory_variant: str | None = None,
    memory: type[nn.Module] | None = None,
) -> tuple[TwoStreamNet, dict[str, Any]]:
    """Builds the network of a checkpoint, this project's or an earlier release's, on the CPU.

    Args:
        path: This project's checkpoint, or an earlier release's (dictionary with ``net``).
        gem_p: Pooling exponent in place of the stored one; an earlier release's file stores none,
            and takes 3.0 without it, with a warning.
        memory_variant: Likewise; an earlier release's file takes "released" without it.
        memory: The class of a memory of the user's own. Without it such a checkpoint is loaded
            without its memory, which the method's own retrieval feature does not need.

    Returns:
        The network, and the checkpoint's other entries.

    Raises:
        CheckpointError: When the file cannot be used.
    """
    content = load_checkpoint(path)
    state = state_dict_of(content, path)
    rest = {k: v for k, v in content.items() if k not in ("net", "state_dict", "optimizer")}
    given = {"gem_p": gem_p, "memory_variant": memory_variant}
    given = {k: v for k, v in given.items() if v is not None}
    try:
        if "config" in content:
            config = {**content["config"], **given}
        else:
            config = {**RELEASED_DEFAULTS, **released_config(state), **given}
            if gem_p is None:
                log.warning(
                    "%s stores no GeM exponent, as no earlier release's file does: taking %g; "
                    "HCT's and the first upload's trainings on RegDB have 10 (--gem-p 10)",
                    *(path, config["gem_p"]),
                )
            state = convert_released_state_dict(state)
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
            shapes = {k: v.shape for k, v in TwoStreamNet(**config).state_dict().items()}
        if shapes != {k: v.shape for k, v in state.items()}:
            raise ValueError("its configuration does not belong to its weights")
        net = TwoStreamNet(**config)
        net.load_state_dict(state)
    except Exception as error:  # a damaged dictionary makes torch raise nearly anything
        reason = (str(error) or repr(error)).splitlines()[0]
        raise CheckpointError(f"{path} holds no network of this project: {reason}") from error
    return net, rest


def trained_size(info: dict[str, Any]) -> tuple[int, int]:
    """Height and width, pixels, of the images that a checkpoint was trained on."""
    trained = plain_entry(info, "options", {}, "the checkpoint")
    sizes = RELEASED_SIZE.items()
    return tuple(plain_entry(trained, k, v, "the checkpoint's options") for k, v in sizes)
