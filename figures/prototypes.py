"""Who addresses a memory: each image's strongest prototypes, each prototype's best patches.

What is recorded is what the memory itself reads: it hands its addressing weights to whatever takes
the place of its `memory.MemoryHealth`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from data_loader import EvalLoader
from figures import image_grids as pictures
from model import OUTPUT_STRIDE, TwoStreamNet
from networks.sparse_read import Survivors

PATCH_CELLS = 3  # width and height of a drawn patch in positions of the map
BEYOND = 200  # grey level of a patch beyond the image's edge


@dataclass
class Recorder:
    """Takes the place of a `memory.MemoryHealth`: keeps who is addressed, level by level."""

    levels: dict[str, tuple[Survivors, int]] = field(default_factory=dict)

    def update(
        self, level: str, weights: Survivors | torch.Tensor, num_prototypes: int, repeats: int = 1
    ) -> None:
        """Keeps one read of a batch."""
        self.levels[level] = (Survivors.of(weights).repeat(repeats), num_prototypes)


def require_memory(net: TwoStreamNet) -> None:
    """Raises ValueError when a network has no memory."""
    if net.memory is None:
        raise ValueError(
            "the network has no memory to look into: draw from a checkpoint of train_SGMRA.py or "
            "train_MGMRA.py"
        )


@torch.no_grad()
def addressed(
    net: TwoStreamNet, images: torch.Tensor, modality: str
) -> tuple[dict[str, tuple[Survivors, int]], tuple[int, int]]:
    """Reads the memory at every position of a batch's maps.

    Args:
        net: With a memory, in evaluation mode.
        images: (n, 3, H, W), normalised.
        modality: "visible" or "infrared".

    Returns:
        By level the addressing weights of the n*h*w positions and the size of the bank; (h, w).

    Raises:
        ValueError: The network has no memory.
    """
    require_memory(net)
    inputs = (images, None) if modality == "visible" else (None, images)
    x = net.feature_map(*inputs)
    recorder = Recorder()
    net.memory(x, recorder)
    return recorder.levels, tuple(x.shape[2:])


def fired(survivors: Survivors, size: int, shape: tuple[int, int], top: int) -> pictures.Fired:
    """Each image's most addressed prototypes of a level, and where it addresses them.

    Args:
        survivors: Of n*h*w positions.
        size: Prototypes in the bank.
        shape: (h, w).
        top: Prototypes an image.
    """
    positions, top = shape[0] * shape[1], min(top, size)
    images, places = np.divmod(survivors.rows().cpu().numpy(), positions)
    columns, weights = survivors.columns.cpu().numpy(), survivors.weights.float().cpu().numpy()
    count = (len(survivors.offsets) - 1) // positions
    numbers = np.full((count, top), -1)
    maps = np.zeros((count, top, positions), np.float32)
    for image in range(count):
        own = images == image
        totals = np.bincount(columns[own], weights[own], size)
        strongest = np.argsort(-totals, kind="stable")[:top]
        strongest = strongest[totals[strongest] > 0]
        numbers[image, : len(strongest)] = strongest
        for place, number in enumerate(strongest):
            entries = own & (columns == number)
            maps[image, place, places[entries]] = weights[entries]
    return pictures.Fired(size, numbers, maps.reshape(count, top, *shape))


@dataclass
class Addresses:
    """Who addresses one level's bank, over all images of a modality that were looked through.

    Attributes:
        images: (entries,) row of the image.
        places: (entries,) position in the map, h * w of them an image.
        columns: (entries,) prototype.
        weights: (entries,) its weight.
        shape: (h, w).
        size: Prototypes in the bank.
    """

    images: np.ndarray
    places: np.ndarray
    columns: np.ndarray
    weights: np.ndarray
    shape: tuple[int, int]
    size: int

    def totals(self) -> np.ndarray:
        """Sum of each prototype's weights, (size,)."""
        return np.bincount(self.columns, self.weights, self.size)

    def best(self, number: int, top: int) -> np.ndarray:
        """Entries that address a prototype most, best first, one an image."""
        entries = np.flatnonzero(self.columns == number)
        entries = entries[np.argsort(-self.weights[entries], kind="stable")]
        firsts = np.unique(self.images[entries], return_index=True)[1]
        return entries[np.sort(firsts)[:top]]


def collect_addresses(
    net: TwoStreamNet, batches: EvalLoader, modality: str, level: str
) -> Addresses:
    """Looks through batches of one modality.

    Raises:
        ValueError: The network has no memory, or none with this level.
    """
    parts, seen, shape, size = [], 0, (0, 0), 0
    for images in batches:
        levels, shape = addressed(net, images, modality)
        if level not in levels:
            raise ValueError(f"the memory has no {level} level, expected {' or '.join(levels)}")
        survivors, size = levels[level]
        rows = survivors.rows().cpu().numpy()
        image, place = np.divmod(rows, shape[0] * shape[1])
        held = (t.cpu().numpy() for t in (survivors.columns, survivors.weights.float()))
        parts.append((image + seen, place, *held))
        seen += len(images)
    return Addresses(*map(np.concatenate, zip(*parts, strict=True)), shape, size)


def cut_patch(image: np.ndarray, place: int, shape: tuple[int, int]) -> np.ndarray:
    """The square around a position of the map, `PATCH_CELLS` positions wide; grey beyond the edge.

    Args:
        image: (H, W, 3) uint8, at most 16 h x 16 w.
        place: Number of the position, row by row.
        shape: (h, w) of the map.

    Returns:
        (p, p, 3) uint8, the position itself in the middle.
    """
    cell = OUTPUT_STRIDE
    margin = cell * (PATCH_CELLS // 2)
    padded = np.full((*(cell * n + 2 * margin for n in shape), 3), BEYOND, np.uint8)
    padded[margin : margin + image.shape[0], margin : margin + image.shape[1]] = image
    row, column = divmod(place, shape[1])
    side = cell * PATCH_CELLS
    return padded[row * cell : row * cell + side, column * cell : column * cell + side]


def prototype_patches(
    found: Mapping[str, Addresses],
    images: Mapping[str, np.ndarray],
    *,
    level: str,
    numbers: Sequence[int] | None,
    count: int,
    top: int,
) -> list[pictures.Patches]:
    """Prototypes with the patches of both modalities that address them most.

    Args:
        found: By modality who addresses the level.
        images: By modality the images looked through, (n, H, W, 3).
        level: Its name.
        numbers: Prototypes to show; None takes the `count` most addressed ones.
        count: How many.
        top: Patches a prototype and modality.

    Raises:
        ValueError: A number that is no prototype, or a level of which nothing is ever read.
    """
    totals = {modality: each.totals() for modality, each in found.items()}
    both = sum(totals.values())
    if not both.sum():
        raise ValueError(
            f"no position of the images reads any {level} prototype (all weights are at or below "
            "lambda): look at `visualize.py health`, or train longer"
        )
    if numbers is None:
        numbers = [n for n in np.argsort(-both, kind="stable")[:count].tolist() if both[n]]
    elif max(numbers) >= len(both):
        raise ValueError(f"--numbers {max(numbers)}: the {level} bank has 0 to {len(both) - 1}")
    rows = []
    for number in numbers:
        best = {m: each.best(number, top) for m, each in found.items()}
        patches = {
            m: [
                cut_patch(images[m][found[m].images[e]], found[m].places[e], found[m].shape)
                for e in entries
            ]
            for m, entries in best.items()
        }
        share = 100 * both[number] / both.sum()
        visible = 100 * totals["visible"][number] / max(both[number], 1e-12)
        rows.append(
            pictures.Patches(
                f"{level} {number}\n{share:.2g} % of reads\n{visible:.0f} % visible",
                *(np.array(patches[m]) for m in ("visible", "infrared")),
                *(found[m].weights[best[m]] for m in ("visible", "infrared")),
            )
        )
    return rows
