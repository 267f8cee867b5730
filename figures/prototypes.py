"""Which positions of the images read which prototypes, by the memory's own addressing weights."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse

from model import OUTPUT_STRIDE, TwoStreamNet

PATCH_CELLS = 3  # width and height of a drawn patch in positions of the map
BEYOND = 200  # grey level of a patch beyond the image's edge
MODALITIES = ("visible", "infrared")
SAME_WEIGHT = 1e-3  # weights that differ by less than this share of them are called alike


class Fired(NamedTuple):
    """The prototypes of one level that each of n images addresses most."""

    size: int  # prototypes in the level's bank
    numbers: np.ndarray  # (n, k) the prototypes, strongest first; -1 where an image reads fewer
    maps: np.ndarray  # (n, k, h, w) their weights in the reads of the image's positions, 0 to 1


class Patches(NamedTuple):
    """The image patches that address one prototype most, best first, by modality."""

    name: str  # beside the row, three lines
    patches: Mapping[str, np.ndarray]  # (a, p, p, 3) uint8, the position in the middle
    weights: Mapping[str, np.ndarray]  # (a,) the prototype's weights in those positions' reads


@torch.no_grad()
def addressing_weights(
    net: TwoStreamNet, batches: Iterable[torch.Tensor], modality: str
) -> tuple[dict[str, sparse.csr_matrix], tuple[int, int]]:
    """Reads the memory at every position of the maps of n images, batches of (b, 3, H, W).

    Returns:
        The addressing weights of each level, (n*h*w, m) sparse; the size (h, w) of the maps.

    Raises:
        ValueError: The network has no memory, or one that returns no weights.
    """
    if net.memory is None:
        raise ValueError("the network has no memory: take one of train_SGMRA.py or train_MGMRA.py")
    found: dict[str, list[sparse.csr_matrix]] = {}
    for images in batches:
        x = net.feature_map(**{modality: images})
        for level, weights in net.memory(x).weights.items():
            dense = weights.to_dense().float().cpu().numpy()
            found.setdefault(level, []).append(sparse.csr_matrix(dense))
    if not found:
        name = type(net.memory).__name__
        raise ValueError(f"{name} does not say how it is addressed: give its MemoryRead `weights`")
    return {level: sparse.vstack(own, "csr") for level, own in found.items()}, x.shape[2:]


def alike(weights: np.ndarray | sparse.csr_matrix) -> bool:
    """Returns whether weights, some of them above zero, are all the same."""
    return bool(weights.max() - weights.min() < SAME_WEIGHT * weights.max())


def fired(weights: sparse.csr_matrix, shape: tuple[int, int], top: int) -> Fired:
    """Returns each image's `top` prototypes by weights (n*h*w, prototypes) on maps (h, w)."""
    size, positions = weights.shape[1], shape[0] * shape[1]
    by_image = weights.toarray().reshape(-1, positions, size)
    totals = by_image.sum(axis=1, dtype=np.float64)  # (n, prototypes)
    numbers = np.argsort(-totals, axis=1, kind="stable")[:, :top]
    maps = np.take_along_axis(by_image, numbers[:, None], axis=2).swapaxes(1, 2)  # (n, k, h*w)
    numbers[np.take_along_axis(totals, numbers, axis=1) == 0] = -1
    return Fired(size, numbers, maps.reshape(*numbers.shape, *shape))


def best_positions(
    weights: sparse.csc_matrix, number: int, positions: int, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows where a prototype is addressed most, at most one per image, and the weights.

    `weights` are (n * positions, m). Best first, ties in the order of rows.
    """
    column = weights[:, [number]].tocoo()
    order = np.argsort(-column.data, kind="stable")
    rows, values = column.row[order], column.data[order]
    first_of_image = np.sort(np.unique(rows // positions, return_index=True)[1])[:top]
    return rows[first_of_image], values[first_of_image]


def cut_patch(image: np.ndarray, position: int, shape: tuple[int, int]) -> np.ndarray:
    """Cuts the square (p, p, 3) around a position out of an image (H, W, 3); grey beyond its edge.

    Positions of the map, whose `shape` is (h, w), are counted row by row.
    """
    cell, side = OUTPUT_STRIDE, OUTPUT_STRIDE * PATCH_CELLS
    margin = (side - cell) // 2
    padded = np.pad(image, [(margin, side), (margin, side), (0, 0)], constant_values=BEYOND)
    top, left = (cell * place for place in divmod(position, shape[1]))
    return padded[top : top + side, left : left + side]


def prototype_patches(
    weights: Mapping[str, sparse.csr_matrix],
    images: Mapping[str, np.ndarray],
    shape: tuple[int, int],
    *,
    level: str,
    count: int,
    top: int,
) -> list[Patches]:
    """Returns `count` most addressed prototypes with the `top` patches of each modality for them.

    `weights` maps a modality to the `level`'s weights of its `images` (n, H, W, 3) uint8, see
    `addressing_weights`; the maps are of `shape` (h, w).

    Raises:
        ValueError: Nothing of the level is ever read.
    """
    columns = {modality: own.tocsc() for modality, own in weights.items()}
    totals = {m: np.asarray(own.sum(axis=0, dtype=np.float64))[0] for m, own in columns.items()}
    both = totals["visible"] + totals["infrared"]
    if not both.sum():
        hint = "look at `visualize.py health`, or train longer"
        raise ValueError(f"no position of the images reads any {level} prototype: {hint}")
    numbers = [n for n in np.argsort(-both, kind="stable")[:count].tolist() if both[n]]
    positions = shape[0] * shape[1]
    rows = []
    for number in numbers:
        patches, values = {}, {}
        for m in MODALITIES:
            best, values[m] = best_positions(columns[m], number, positions, top)
            cut = [cut_patch(images[m][r // positions], r % positions, shape) for r in best]
            patches[m] = np.array(cut)
        share = 100 * both[number] / both.sum()
        visible = 100 * totals["visible"][number] / both[number]
        name = f"{level} {number}\n{share:.2g} % of reads\n{visible:.0f} % visible"
        rows.append(Patches(name, patches, values))
    return rows
