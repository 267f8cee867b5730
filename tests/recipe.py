"""Weights and inputs behind the golden files; how each file was made stands in golden/README.md.

Everything is drawn from `numpy.random.RandomState`, whose stream is frozen for ever, seeded with
the CRC-32 of a name: a 100 MB state dict follows from its names and shapes alone.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
METHODS = {  # golden name: (released method, GeM p, memory variant)
    "HCT": ("HCT", 10.0, "paper"),
    "SGMRA": ("SGMRA", 10.0, "paper"),
    "MGMRA_paper": ("MGMRA", 10.0, "paper"),
    "MGMRA_released": ("MGMRA", 3.0, "released"),
    "AGW": ("AGW", 3.0, "paper"),
}


def stream(name: str) -> np.random.RandomState:
    """Random stream of a name."""
    return np.random.RandomState(zlib.crc32(name.encode()))  # noqa: NPY002


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Value of the state-dict entry that the earlier releases call `name`, float64."""
    if not shape:  # num_batches_tracked
        return np.zeros(())
    draw = stream(name).standard_normal(shape)
    if name.endswith("running_mean"):
        return 0.1 * draw
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(draw)
    if len(shape) == 4:
        fan_in = np.prod(shape[1:])
        return draw * (0.1 * np.sqrt(1 / fan_in) if name.startswith("NL_") else np.sqrt(2 / fan_in))
    if len(shape) == 3:  # the two gates of the memory
        return 0.5 * draw
    if name == "mem_rep.memory.weight":
        return 0.7 * draw
    if len(shape) == 2:
        return 0.05 * draw
    return 1 + 0.1 * draw if name.endswith("weight") else 0.1 * draw


def released_shapes(method: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released method's state dict (206 identities)."""
    shapes = json.loads((GOLDEN / f"released_keys_{method}.json").read_text())
    return {name: tuple(shape) for name, shape in shapes.items()}


def released_file(path: Path, method: str, num_ids: int, legacy: bool = False) -> dict:
    """Writes a file as the release's trainings do; its network's entries share one storage.

    Whatever `num_ids`, the number of training identities, the memory's bank has 206 identities.
    """
    shapes = released_shapes(method)
    for name in shapes:
        if name.startswith(("fc_list", "classifier")):
            shapes[name] = (num_ids, *shapes[name][1:])
    numbers = torch.full((max(map(math.prod, shapes.values())),), 1e-3)
    state = {name: numbers[: math.prod(shape)].view(shape) for name, shape in shapes.items()}
    state |= {name: value.long() for name, value in state.items() if name.endswith("tracked")}
    content = {"net": state, "cmc": np.ones(20), "mAP": np.float64(0.5), "mINP": 0.4, "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return state


def released_state_dict(method: str) -> dict[str, torch.Tensor]:
    """A released method's state dict, float64."""
    return {k: torch.tensor(parameter(k, shape)) for k, shape in released_shapes(method).items()}


def numbered(method: str) -> dict[str, torch.Tensor]:
    """The same names and shapes, each entry filled with its number: tells whence values come."""
    shapes = released_shapes(method).values()
    full = [torch.full(shape, i, dtype=torch.int32) for i, shape in enumerate(shapes)]
    return dict(zip(released_shapes(method), full, strict=True))


def images(name: str, count: int) -> torch.Tensor:
    """Normal noise (count, 3, 96, 48), float64, of a stream's name."""
    return torch.tensor(stream(name).standard_normal((count, 3, 96, 48)))
