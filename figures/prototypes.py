"""Which positions of the images read which prototypes of a memory.

Each image's strongest prototypes (`fired`), each prototype's best patches (`prototype_patches`).
What is counted are the addressing weights that the memory itself reads with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse

from model import OUTPUT_STRIDE, TwoStreamNet

PATCH_CELLS = 3  # width and height of a drawn patch in positions of the map
BEYOND = 200  # grey level of a patch beyond the image's edge
MODALITIES = ("visible", "infrared")


@dataclass(frozen=True, eq=False)
class Fired:
    """The prototypes of one level that each of n images addresses most.

    Attributes:
        size: Prototypes in the level's bank.
        numbers: (n, k) the prototypes, strongest first; -1 where an image addresses fewer.
        maps: (n, k, h, w) their weights in the reads of the image's positions, 0 to 1.
    """

    size: int
    numbers: np.ndarray
    maps: np.ndarray


@dataclass(frozen=True, eq=False)
class Patches:
    """The image patches that address one prototype most.

    Attributes:
        name: A few words in lines.
        visible: (a, p, p, 3) uint8 patches of visible images around the position, best first.
        infrared: (b, p, p, 3) likewise.
        visible_weights: (a,) the prototype's weights in those positions' reads.
        infrared_weights: (b,) likewise.
    """

    name: str
    visible: np.ndarray
    infrared: np.ndarray
    visible_weights: np.ndarray
    infrared_weights: np.ndarray


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
) -> tuple[dict[str, sparse.csr_matrix], tuple[int, int]]:
    """Reads the memory at every position of a batch's maps.

    Args:
        net: In evaluation mode.
        images: (n, 3, H, W), normalised.
        modality: "visible" or "infrared".

    Returns:
        By level the addressing weights (n*h*w positions, prototypes); (h, w).

    Raises:
        ValueError: The network has no memory.
    """
    require_memory(net)
    inputs = (images, None) if modality == "visible" else (None, images)
    x = net.feature_map(*inputs)
    read = net.memory(x)
    dense = {level: weights.to_dense().float() for level, weights in read.weights.items()}
    weights = {level: sparse.csr_matrix(own.cpu().numpy()) for level, own in dense.items()}
    return weights, tuple(x.shape[2:])


def fired(weights: sparse.csr_matrix, shape: tuple[int, int], top: int) -> Fired:
    """Returns each image's most addressed prototypes of a level, and where it addresses them.

    Args:
        weights: Of one level, (n*h*w, prototypes).
        shape: (h, w).
        top: Prototypes an image.
    """
    size, positions = weights.shape[1], shape[0] * shape[1]
    by_image = weights.toarray().reshape(-1, positions, size)
    totals = by_image.sum(axis=1, dtype=np.float64)
    numbers = np.argsort(-totals, axis=1, kind="stable")[:, :top]
    maps = np.take_along_axis(by_image, numbers[:, None], axis=2).swapaxes(1, 2)
    addressed_at_all = np.take_along_axis(totals, numbers, axis=1) > 0
    numbers = np.where(addressed_at_all, numbers, -1)
    return Fired(size, numbers, maps.reshape(*numbers.shape, *shape))


def level_weights(
    net: TwoStreamNet, batches: Iterable[torch.Tensor], modality: str, level: str
) -> tuple[sparse.csc_matrix, tuple[int, int]]:
    """Returns the addressing weights of one level over batches of one modality, as `addressed`.

    Raises:
        ValueError: The network has no memory, or none with this level.
    """
    found, shape = [], (0, 0)
    for images in batches:
        weights, shape = addressed(net, images, modality)
        if level not in weights:
            raise ValueError(f"the memory has no {level} level, expected {' or '.join(weights)}")
        found.append(weights[level])
    return sparse.vstack(found).tocsc(), shape


def best_positions(
    weights: sparse.csc_matrix, number: int, positions: int, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of the positions that address a prototype most, one an image, and weights.

    Args:
        weights: (n * positions, prototypes).
        number: The prototype.
        positions: Of an image.
        top: Rows at most; best first, the first ones of those alike.
    """
    column = weights[:, [number]].tocoo()
    order = np.argsort(-column.data, kind="stable")
    rows, values = column.row[order], column.data[order]
    first_of_image = np.sort(np.unique(rows // positions, return_index=True)[1])[:top]
    return rows[first_of_image], values[first_of_image]


def cut_patch(image: np.ndarray, position: int, shape: tuple[int, int]) -> np.ndarray:
    """Cuts out the square around a position, `PATCH_CELLS` positions wide; grey beyond the edge.

    Args:
        image: (H, W, 3) uint8, at most 16 h x 16 w.
        position: In the map, counted row by row.
        shape: (h, w) of the map.

    Returns:
        (p, p, 3) uint8, the position itself in the middle.
    """
    cell, side = OUTPUT_STRIDE, OUTPUT_STRIDE * PATCH_CELLS
    margin = (side - cell) // 2
    padded = np.full((*(cell * n + 2 * margin for n in shape), 3), BEYOND, np.uint8)
    padded[margin : margin + image.shape[0], margin : margin + image.shape[1]] = image
    row, column = divmod(position, shape[1])
    return padded[row * cell : row * cell + side, column * cell : column * cell + side]


def prototype_patches(
    weights: Mapping[str, sparse.csc_matrix],
    images: Mapping[str, np.ndarray],
    shape: tuple[int, int],
    *,
    level: str,
    numbers: Sequence[int] | None,
    count: int,
    top: int,
) -> list[Patches]:
    """Returns prototypes with the patches of both modalities that address them most.

    Args:
        weights: By modality the level's addressing weights, from `level_weights`.
        images: By modality the images that were looked through, (n, H, W, 3).
        shape: (h, w) of the maps.
        level: Its name.
        numbers: Prototypes to show; None takes the `count` most addressed ones.
        count: How many.
        top: Patches a prototype and modality.

    Raises:
        ValueError: A number that is no prototype, or a level of which nothing is ever read.
    """
    visible, infrared = (
        np.asarray(weights[m].sum(axis=0, dtype=np.float64)).ravel() for m in MODALITIES
    )
    both = visible + infrared
    if not both.sum():
        raise ValueError(
            f"no position of the images reads any {level} prototype (all weights are at or below "
            "lambda): look at `visualize.py health`, or train longer"
        )
    if numbers is None:
        numbers = [n for n in np.argsort(-both, kind="stable")[:count].tolist() if both[n]]
    elif max(numbers) >= len(both):
        raise ValueError(f"--numbers {max(numbers)}: the {level} bank has 0 to {len(both) - 1}")
    positions = shape[0] * shape[1]
    found = []
    for number in numbers:
        patches, values = {}, {}
        for m in MODALITIES:
            rows, values[m] = best_positions(weights[m], number, positions, top)
            cut = [cut_patch(images[m][r // positions], r % positions, shape) for r in rows]
            patches[m] = np.array(cut)
        share = 100 * both[number] / both.sum()
        seen = 100 * visible[number] / max(both[number], 1e-12)
        name = f"{level} {number}\n{share:.2g} % of reads\n{seen:.0f} % visible"
        found.append(Patches(name, *patches.values(), *values.values()))
    return found
