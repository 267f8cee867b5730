"""Checkpoint files: tensors, and everything else as one JSON text.

Reading executes nothing that a file contains. A file of this project is a dictionary of ``format``,
``about`` (the JSON text), ``net``, ``optimizer`` and ``generators``, the last three with tensors by
name. Of any other, such as an earlier release's, the network's weights alone are taken.
"""

import codecs
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from torch import Tensor

from utils import CheckpointError, find_checkpoint, parse_json, write_atomic

FORMAT, FORMER = "mgmra-checkpoint-2", "mgmra-checkpoint-1"
ABOUT = {  # what the JSON text says, as `utils.parse_json` takes it
    "scaler?": {},  # state of float16's loss scaling
    "config?": {},  # keyword arguments of the network
    "options?": {
        **dict.fromkeys(("img_h?", "img_w?", "trial?"), int),
        **dict.fromkeys(("dataset?", "weights?", "data_path?"), str),
    },
    "epoch?": int,
    "identities?": [int],  # trained on
    "identities_before?": {"*": [int]},  # that the starting weights had seen, by data
    "log?": [{"epoch": int}],
    "optimizer?": {"param_groups": [{"params": [int]}], "state": {}},
    **dict.fromkeys(("method?", "run?", "data?", "selection?"), str),
}
OF_FORMER = ("config", "options", "epoch", "identities", "method", "data", "selection", "versions")
# The NumPy types in earlier releases' checkpoints: scalars and arrays beside the weights.
NUMPY_TYPES = [
    *(np.dtype, np.ndarray, multiarray.scalar, multiarray._reconstruct, codecs.encode),
    *(type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "bool")),
    (multiarray.scalar, "numpy.core.multiarray.scalar"),  # written under NumPy 1
    (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
]


def save_checkpoint(path: Path, content: Mapping[str, Any], *, keep: Path | None = None) -> None:
    """Saves a checkpoint atomically, with `keep` as `utils.write_atomic` takes it.

    `content` has ``net``, a dictionary of tensors; it may have ``generators``, another one, and
    ``optimizer``, a state dict. All else is plain JSON values.

    Raises:
        OSError: It cannot be written (disk full, read-only, ...).
    """
    about = dict(content)
    tensors = {name: about.pop(name) for name in ("net", "generators") if name in content}
    if "optimizer" in content:
        per_parameter = content["optimizer"]["state"].items()
        state = {f"{n}.{key}": value for n, own in per_parameter for key, value in own.items()}
        tensors["optimizer"] = {k: v for k, v in state.items() if torch.is_tensor(v)}
        plain = {k: v for k, v in state.items() if not torch.is_tensor(v)}
        about["optimizer"] = {**content["optimizer"], "state": plain}
    stored = io.BytesIO()  # into a file, torch.save replaces errors and signals by its own
    torch.save({"format": FORMAT, "about": json.dumps(about), **tensors}, stored)
    try:
        write_atomic(path, lambda stream: stream.write(stored.getbuffer()), keep=keep)
    except OSError as error:
        raise OSError(
            f"cannot write the checkpoint {path} ({error}); a former one is untouched. Make room "
            f"or mend the folder, then go on with --resume"
        ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU: what `save_checkpoint` was given; of other files ``net``.

    Raises:
        CheckpointError: There is no such file, or it is truncated, corrupt or no checkpoint.
    """
    path = Path(find_checkpoint(path))
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):  # torch.load compares no checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of its record {damaged} is wrong")
        with torch.serialization.safe_globals(NUMPY_TYPES):
            return _unpacked(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises a different type for each kind of damage
        text = str(error).strip() or repr(error)
        # torch's advice on unsafe loading comes before the reason: keep the reason only.
        reason = text.rpartition("WeightsUnpickler error: ")[2].splitlines()[0].split(" Please")[0]
        raise CheckpointError(
            f"{path} ({size} bytes) is not a readable checkpoint: it is truncated, corrupt, or "
            f"holds objects that are not loaded for safety ({reason[:300]})"
        ) from error


def _unpacked(content: Any) -> dict[str, Any]:
    """Returns what is taken of a file."""
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}, expected a dictionary")
    if content.get("format") == FORMER:
        about = json.dumps({name: content[name] for name in OF_FORMER if name in content})
        content = {"format": FORMAT, "about": about, "net": content["net"]}
    if content.get("format") == FORMAT:
        if "net" not in content:
            raise ValueError("no network weights")
        about = parse_json(content["about"], ABOUT)
        for name, value in about.get("config", {}).items():
            if isinstance(value, list):  # JSON has no tuples, and the network's arguments no lists
                about["config"][name] = tuple(value)
        tensors = {k: content[k] for k in ("net", "generators", "optimizer") if k in content}
        if "optimizer" in about:
            state: dict[int, dict[str, Any]] = {}
            for name, value in {**about["optimizer"]["state"], **tensors["optimizer"]}.items():
                number, _, key = name.partition(".")
                state.setdefault(int(number), {})[key] = value
            tensors["optimizer"] = {**about["optimizer"], "state": state}
        return {**about, **tensors}
    nested = (content.get(key) for key in ("net", "state_dict", "model"))
    state = next((each for each in nested if isinstance(each, dict)), content)
    net = {k: v for k, v in state.items() if isinstance(k, str) and torch.is_tensor(v)}
    if not net:
        raise ValueError(f"no network weights (found: {', '.join(map(str, content))[:200]})")
    return {"net": {k.removeprefix("module."): v for k, v in net.items()}}


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """Returns shapes and types of tensors by name, to be compared before anything is loaded."""
    return {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
