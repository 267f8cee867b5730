"""Data-set types: image lists, training sets, query/gallery protocols, and the class of a data set.

Nothing here reads a folder: see `datasets.folders` for that, and `data_manager` for the data sets.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

VALIDATION_STEP = 5  # without a validation list every fifth training label is held out
TTA = {"no": "", "flip": ", flip averaging"}  # test-time augmentation, and its words in protocols
DIRECTIONS = {"v2i": "visible to infrared", "i2v": "infrared to visible"}

Item = tuple[str, int, int]  # path relative to the data folder, pid, camid


class DataError(ValueError):
    """Invalid data; the message says what, where and how to fix it."""


@dataclass(frozen=True, eq=False)
class ImageList:
    """n images in order: files that are not decoded yet, or `pixels` that were decoded before."""

    root: Path  # the data folder, links resolved
    paths: tuple[str, ...]  # n posix paths relative to `root`; () where `pixels` are set
    pids: np.ndarray  # (n,) int64 raw identities
    camids: np.ndarray  # (n,) int64; RegDB 1 visible, 2 infrared; -1 unknown, as in caches
    modality: str  # "visible" or "infrared"
    pixels: np.ndarray | None = None  # (n, H, W, 3) uint8, such as the memory map of a cache

    def __len__(self) -> int:
        return len(self.pids)

    def take(self, indices: np.ndarray | Sequence[int]) -> "ImageList":
        """Returns the images at `indices` ((m,) integers), in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            paths=tuple(self.paths[i] for i in rows) if self.paths else (),
            pids=self.pids[rows],
            camids=self.camids[rows],
            pixels=None if self.pixels is None else self.pixels[rows],
        )


@dataclass(frozen=True, eq=False)
class TrainSet:
    """Training images of both modalities with shared labels 0..L-1.

    Raises:
        DataError: A label has no image of a modality, or an image no label.
    """

    visible: ImageList
    infrared: ImageList
    pids: np.ndarray  # (L,) int64 raw identity of each label
    description: str  # one line for the log

    def __post_init__(self) -> None:
        for images in (self.visible, self.infrared):
            unknown = np.setdiff1d(images.pids, self.pids)
            if len(unknown):
                raise DataError(
                    f"a {images.modality} training image of {images.root} is of identity"
                    f" {unknown[0]}, which has no label; expected one of `pids`"
                )
            lacking = np.setdiff1d(self.pids, images.pids)
            if len(lacking):
                raise DataError(
                    f"training identity {lacking[0]} has no {images.modality} image in"
                    f" {images.root}; expected images in both modalities"
                )

    @property
    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Labels of the visible and of the infrared images, (n,) int64: places in `pids`."""
        visible = np.argmax(self.visible.pids[:, None] == self.pids, axis=1)
        infrared = np.argmax(self.infrared.pids[:, None] == self.pids, axis=1)
        return visible, infrared

    @property
    def num_ids(self) -> int:
        """L, the number of training identities."""
        return len(self.pids)

    def narrow(self, kept: np.ndarray) -> "TrainSet":
        """Returns the identities whose label is true in `kept` (L,), renumbered from 0."""
        pids = self.pids[kept]
        visible = self.visible.take(np.flatnonzero(np.isin(self.visible.pids, pids)))
        infrared = self.infrared.take(np.flatnonzero(np.isin(self.infrared.pids, pids)))
        return replace(self, visible=visible, infrared=infrared, pids=pids)


@dataclass(frozen=True, eq=False)
class EvalSet:
    """A retrieval protocol: query images, gallery images, and which of them each trial uses.

    Raises:
        DataError: There is no query image, or no gallery image.
    """

    dataset: str  # its name in `data_manager.DATASETS`
    query: ImageList
    gallery: ImageList  # every distinct image that any trial uses, once
    gallery_trials: tuple[np.ndarray, ...]  # rows of the gallery, in the protocol's order
    camera_rule: str  # as `eval_metrics.excluded` takes it
    protocol: str  # in words, for printed rows
    query_trials: tuple[np.ndarray, ...] | None = None  # rows of the queries; None: all
    tta: str = "no"  # a key of `TTA`

    def __post_init__(self) -> None:
        for role, images in (("query", self.query), ("gallery", self.gallery)):
            if not len(images):
                raise DataError(
                    f"empty {role}: {images.root} has no {images.modality} image for"
                    f" {self.protocol}; is the data set complete, and the list its own?"
                )


@dataclass(frozen=True)
class EvalOptions:
    """Options of a protocol; each data set reads the fields that concern it."""

    trial: int = 1  # RegDB's split
    direction: str = "v2i"  # a key of `DIRECTIONS`; not for SYSU-MM01
    protocol: str = "paper"  # LLCM, v2i: the paper's or the "repository"'s, see `llcm.Llcm`
    mode: str = "all"  # SYSU-MM01: all gallery cameras (1, 2, 4, 5), or the "indoor" ones (1, 2)
    gallery: str = "seeded"  # SYSU-MM01: "seeded" or "official" draws, see `sysu_mm01.Sysu`
    shots: int = 1  # SYSU-MM01: gallery images per identity and camera
    trials: int = 10  # SYSU-MM01, LLCM: number of gallery draws
    subset: str = "test"  # or "val": the training identities that `train_set(subset="fit")` omits
    tta: str = "no"  # or "flip": features of image and mirror image summed, then normalised


class DataSet:
    """A data set: the facts about it, its training images and its protocols.

    One that compares all test images of one modality with all of the other defines `name`, `title`,
    `folders` and `items` alone.
    """

    name: str  # as a value of `--dataset`
    title: str  # in print, and of its default folder below `data/`
    folders: tuple[str, ...]  # that must be there; the one with the lists, if any, first
    how_to_get: str = ""  # printed where the data folder is missing
    lists_hint: str = ""  # printed where `folders[0]`, the lists, alone is missing
    has_stand_in: bool = False  # whether `stand_in.py` writes this layout
    preset: Mapping[str, Any] = {}  # values of training options, in place of the defaults
    preset_source: str = "the defaults"
    train_pids_are_labels = False  # the training lists name no identities: labels stand for them
    splits: int = 1  # number of splits into training and test identities, each trained separately
    gallery_draws: int = 1  # random galleries of one evaluation, at most; 1: the gallery is fixed
    # Fields of `EvalOptions` for each of the published protocols, by a short key.
    protocols: Mapping[str, Mapping[str, Any]] = {
        direction: {"direction": direction} for direction in DIRECTIONS
    }
    # Counts of the complete data, for `reproduce.py check`; None is unknown. "train", "test":
    # identities, visible, infrared images; a key of `protocols`: query, gallery images.
    expected: Mapping[str, tuple[int | None, ...]] = {}

    @property
    def default_folder(self) -> Path:
        """Where the data set is looked for without `--data-path`."""
        return Path("data") / self.title

    def describe(self, options: EvalOptions) -> str:
        """Returns a protocol in words, without data set, split and number of draws."""
        return DIRECTIONS[options.direction]

    def items(self, root: Path, role: str, trial: int) -> tuple[Sequence[Item], Sequence[Item]]:
        """Lists the visible and the infrared images of the "train" or the "test" identities.

        Paths are relative to the data folder `root`, with `/`; `trial` is the split, from 1. A data
        set implements this method, or overrides `images`.
        """
        raise NotImplementedError(f"{type(self).__name__} lists no images: give it `items`")

    def images(self, root: Path, role: str, trial: int) -> tuple[ImageList, ImageList]:
        """Lists the visible and the infrared images of the "train" or the "test" identities."""
        visible, infrared = self.items(root, role, trial)
        return image_list(root, visible, "visible"), image_list(root, infrared, "infrared")

    def train(self, root: Path, trial: int) -> TrainSet:
        """Lists the training images; labels number the identities in ascending order."""
        visible, infrared = self.images(root, "train", trial)
        pids = np.union1d(visible.pids, infrared.pids)
        return TrainSet(visible, infrared, pids, self.title)

    def train_from_cache(self, path: Path, size: tuple[int, int] | None = None) -> TrainSet | None:
        """Returns the training images from caches of decoded images; None without such caches."""
        return None

    def held_out(self, root: Path, pids: np.ndarray) -> np.ndarray:
        """Returns which training labels, (L,) bool, are kept for validation: 0, 5, 10, ..."""
        return np.arange(len(pids)) % VALIDATION_STEP == 0

    def evaluate(self, root: Path, options: EvalOptions) -> EvalSet:
        """Makes all images of one modality the queries and all of the other the gallery."""
        title = f"{self.title} trial {options.trial}" if self.splits > 1 else self.title
        protocol = f"{title}, {self.describe(options)}"
        if options.subset == "test":
            query, gallery = self.images(root, "test", options.trial)
        else:
            people = self.train(root, options.trial)
            people = people.narrow(self.held_out(root, people.pids))
            query, gallery = people.visible, people.infrared
            protocol += ", validation identities"
        if options.direction == "i2v":
            query, gallery = gallery, query
        return EvalSet(self.name, query, gallery, (np.arange(len(gallery)),), "none", protocol)


def image_list(root: Path, items: Sequence[Item], modality: str) -> ImageList:
    """Returns the images of `items` in their order."""
    pids, camids = (np.array([item[i] for item in items], dtype=np.int64) for i in (1, 2))
    return ImageList(root, tuple(item[0] for item in items), pids, camids, modality)


def rows_by_camera(images: ImageList) -> dict[tuple[int, int], list[int]]:
    """Returns the rows of each (pid, camid), in the order of the list."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(images.pids.tolist(), images.camids.tolist(), strict=True)):
        groups.setdefault(key, []).append(row)
    return groups


def seeded_draw(gallery: ImageList, trial: int, shots: int) -> list[int]:
    """Draws rows of a gallery, which is sorted by identity, camera and path.

    `random.Random(trial)` samples `shots` images of each identity and camera in turn, all where
    there are fewer.

    Source: the AGW code base, which draws a single one by `choice`: the same draw.
    """
    generator = random.Random(trial)
    groups = rows_by_camera(gallery).values()
    return [row for rows in groups for row in generator.sample(rows, min(shots, len(rows)))]


def drawn_gallery(
    gallery: ImageList, draws: Sequence[list[int]]
) -> tuple[ImageList, tuple[np.ndarray, ...]]:
    """Drops images that no draw uses; returns the others, and the rows of each draw among them."""
    kept = np.unique(np.concatenate(draws))
    return gallery.take(kept), tuple(np.searchsorted(kept, rows) for rows in draws)
