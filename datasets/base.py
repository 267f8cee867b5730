"""Data-set types: image lists, training sets, query/gallery protocols, and the class of a data set.

Nothing here reads a folder: see `datasets.folders` for that, and `data_manager` for the data sets.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

TRIALS = range(1, 11)  # RegDB's splits; SYSU-MM01's and LLCM's gallery draws
VALIDATION_STEP = 5  # without a validation list every fifth training label is held out
DIRECTIONS = {"v2i": "visible to infrared", "i2v": "infrared to visible"}

Item = tuple[str, int, int]  # path relative to the data folder, pid, camid


class DataError(ValueError):
    """Invalid data; the message says what, where and how to fix it."""


@dataclass(frozen=True, eq=False)
class ImageList:
    """Which images, in order; nothing is decoded.

    Attributes:
        root: The data folder, links resolved.
        paths: n posix paths relative to `root`; () where `cache` is set.
        pids: (n,) int64 raw identities.
        camids: (n,) int64; RegDB 1 visible, 2 infrared; SYSU-MM01 1..6; LLCM 1..9; -1 unknown
            (caches, LLCM's training lists).
        modality: "visible" or "infrared".
        origins: Where each path was named ("idx/train_visible_1.txt:12"); () for listed folders.
        cache: A .npy file of (N, H, W, 3) uint8 that holds these images in place of `paths`.
        cache_rows: (n,) int64 rows of the cache; None means all, in order.
    """

    root: Path
    paths: tuple[str, ...]
    pids: np.ndarray
    camids: np.ndarray
    modality: str
    origins: tuple[str, ...] = ()
    cache: Path | None = None
    cache_rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pids)

    def take(self, indices: np.ndarray | Sequence[int]) -> ImageList:
        """Returns the images at `indices` ((m,) integers), in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        cached = np.arange(len(self)) if self.cache_rows is None else self.cache_rows
        return replace(
            self,
            paths=tuple(self.paths[i] for i in rows) if self.paths else (),
            pids=self.pids[rows],
            camids=self.camids[rows],
            origins=tuple(self.origins[i] for i in rows) if self.origins else (),
            cache_rows=None if self.cache is None else cached[rows],
        )

    def describe(self, index: int) -> str:
        """Names one image for an error text: its file and the line that asked for it."""
        file = self.root / self.paths[index]
        return f"{file} (named in {self.origins[index]})" if self.origins else str(file)


@dataclass(frozen=True, eq=False)
class TrainSet:
    """Training images of both modalities with shared labels 0..L-1.

    Attributes:
        visible: n_v visible images.
        infrared: n_i infrared images.
        visible_labels: (n_v,) int64, every label at least once.
        infrared_labels: (n_i,) int64, every label at least once.
        pids: (L,) int64 raw identity of each label.
        description: One line for the log.
    """

    visible: ImageList
    infrared: ImageList
    visible_labels: np.ndarray
    infrared_labels: np.ndarray
    pids: np.ndarray
    description: str

    @property
    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Labels of the visible and of the infrared images."""
        return self.visible_labels, self.infrared_labels

    @property
    def num_ids(self) -> int:
        """L, the number of training identities."""
        return len(self.pids)

    def narrow(self, kept: np.ndarray) -> TrainSet:
        """Returns the labels where `kept` (L,) is true, renumbered from 0."""
        if not kept.any():
            raise DataError(
                f"{self.description}: {self.num_ids} identities are too few to hold any out"
            )
        number = np.cumsum(kept) - 1
        visible, infrared = (np.flatnonzero(kept[labels]) for labels in self.labels)
        return replace(
            self,
            visible=self.visible.take(visible),
            infrared=self.infrared.take(infrared),
            visible_labels=number[self.visible_labels[visible]],
            infrared_labels=number[self.infrared_labels[infrared]],
            pids=self.pids[kept],
        )


@dataclass(frozen=True, eq=False)
class EvalSet:
    """A retrieval protocol: query images, gallery images, and which of them each trial uses.

    Attributes:
        dataset: Its name in `data_manager.DATASETS`.
        query: The query images.
        gallery: Every distinct image that any trial uses, once.
        gallery_trials: Per trial the row numbers into `gallery`, in the protocol's order.
        camera_rule: A rule of `eval_metrics.excluded`: "none", "sysu" (camera-3 queries ignore
            camera-2 gallery images) or "same" (queries ignore images of their person and camera).
        protocol: The protocol in words, for printed rows.
        query_trials: Per trial the row numbers into `query`; None: each trial asks all of them.
    """

    dataset: str
    query: ImageList
    gallery: ImageList
    gallery_trials: tuple[np.ndarray, ...]
    camera_rule: str
    protocol: str
    query_trials: tuple[np.ndarray, ...] | None = None


@dataclass(frozen=True)
class EvalOptions:
    """Options of a protocol; each data set reads the fields that concern it.

    Attributes:
        trial: RegDB's split, 1..10.
        direction: "v2i" (visible queries, infrared gallery) or "i2v"; not for SYSU-MM01.
        protocol: LLCM, v2i: the "paper" or the "repository" of its authors (see `Llcm`).
        mode: SYSU-MM01: "all" (gallery cameras 1, 2, 4, 5) or "indoor" (1, 2).
        gallery: SYSU-MM01: how the gallery is drawn, "seeded" or "official" (see `Sysu`).
        shots: SYSU-MM01: gallery images per identity and camera, 1 or 10.
        trials: SYSU-MM01, LLCM: number of gallery draws, 1..10.
        subset: "test", or "val": the training identities that `train_set(subset="fit")` leaves out.
    """

    trial: int = 1
    direction: str = "v2i"
    protocol: str = "paper"
    mode: str = "all"
    gallery: str = "seeded"
    shots: int = 1
    trials: int = 10
    subset: str = "test"

    def __post_init__(self) -> None:
        check_choice("trial", self.trial, TRIALS)
        check_choice("direction", self.direction, tuple(DIRECTIONS))
        check_choice("protocol", self.protocol, ("paper", "repository"))
        check_choice("mode", self.mode, ("all", "indoor"))
        check_choice("gallery", self.gallery, ("seeded", "official"))
        check_choice("shots", self.shots, (1, 10))
        check_choice("trials", self.trials, TRIALS)
        check_choice("subset", self.subset, ("test", "val"))


class DataSet:
    """A data set: the facts about it, its training images and its protocols.

    One whose test images of one modality are the queries, and of the other the gallery, says its
    `name`, `title` and `folders`, and lists its images in `items`; the rest is here.

    Attributes:
        name: Its name as a value of `--dataset`.
        title: Its name in print, and of its default folder below `data/`.
        folders: The folders it consists of; that of its lists, if any, first.
        how_to_get: Where it can be had, for the error when its folder is not there.
        lists_hint: Where `folders[0]` alone can be had.
        has_stand_in: Whether `stand_in.py` writes this layout.
        preset: Values of training options; the other options keep their defaults.
        preset_source: Where the preset comes from.
        splits: Splits into training and test identities, each with a training of its own.
        gallery_draws: Galleries drawn at random for one evaluation, at most; 1: nothing is drawn.
        protocols: Fields of `EvalOptions` for each of the published protocols, by a short key.
        expected: Counts of the complete data, for `reproduce.py check`; None is unknown. "train",
            "test": identities, visible, infrared images; a key of `protocols`: query, gallery.
    """

    name: str
    title: str
    folders: tuple[str, ...]
    how_to_get: str = ""
    lists_hint: str = ""
    has_stand_in: bool = False
    preset: Mapping[str, Any] = {}
    preset_source: str = "the defaults"
    splits: int = 1
    gallery_draws: int = 1
    protocols: Mapping[str, Mapping[str, Any]] = {
        direction: {"direction": direction} for direction in DIRECTIONS
    }
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

        Args:
            root: The data folder; it holds `folders`.
            role: "train" or "test".
            trial: The split, from 1.

        Returns:
            (path, pid, camid) of each image, paths relative to `root` and with `/`.
        """
        raise NotImplementedError

    def images(self, root: Path, role: str, trial: int) -> tuple[ImageList, ImageList]:
        """Lists the visible and the infrared images of the "train" or the "test" identities."""
        visible, infrared = self.items(root, role, trial)
        return image_list(root, visible, "visible"), image_list(root, infrared, "infrared")

    def train(self, root: Path, trial: int) -> TrainSet:
        """Lists the training images; labels number the identities in ascending order."""
        visible, infrared = self.images(root, "train", trial)
        pids = np.union1d(visible.pids, infrared.pids)
        for images in (visible, infrared):
            lacking = np.setdiff1d(pids, images.pids)
            if len(lacking):
                raise DataError(
                    f"training identity {lacking[0]} has no {images.modality} image in {root};"
                    " expected images in both modalities"
                )
        labels = [np.searchsorted(pids, images.pids) for images in (visible, infrared)]
        return TrainSet(visible, infrared, *labels, pids, self.title)

    def train_from_cache(self, path: Path) -> TrainSet | None:
        """Returns the training images as decoded before; None where there is no such cache."""
        return None

    def held_out(self, root: Path, pids: np.ndarray) -> np.ndarray:
        """Returns which training labels, (L,) bool, are kept for validation: 0, 5, 10, ..."""
        return np.arange(len(pids)) % VALIDATION_STEP == 0

    def evaluate(self, root: Path, options: EvalOptions) -> EvalSet:
        """Makes all images of one modality the queries and all of the other the gallery."""
        if options.subset == "test":
            visible, infrared = self.images(root, "test", options.trial)
        else:
            people = self.train(root, options.trial)
            people = people.narrow(self.held_out(root, people.pids))
            visible, infrared = people.visible, people.infrared
        forth = options.direction == "v2i"
        query, gallery = (visible, infrared) if forth else (infrared, visible)
        check_not_empty(query, gallery, f"the {options.subset} identities")
        title = f"{self.title} trial {options.trial}" if self.splits > 1 else self.title
        protocol = f"{title}, {self.describe(options)}"
        protocol += ", validation identities" if options.subset == "val" else ""
        rows = (np.arange(len(gallery)),)
        return EvalSet(self.name, query, gallery, rows, "none", protocol)


def check_choice(name: str, value: object, legal: Sequence[object]) -> None:
    """Raises DataError unless an option has one of its legal values."""
    if value not in legal:
        is_range = isinstance(legal, range)
        expected = f"{legal[0]}..{legal[-1]}" if is_range else " or ".join(map(str, legal))
        raise DataError(f"{name} is {value!r}; expected {expected}")


def check_not_empty(query: ImageList, gallery: ImageList, people: str) -> None:
    """Raises DataError when there is no query or no gallery image of the `people` asked for."""
    for role, images in (("query", query), ("gallery", gallery)):
        if not len(images):
            raise DataError(
                f"empty {role}: {images.root} has no {images.modality} image of {people}; is the"
                " data set complete, and the list its own?"
            )


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
    """Draws rows of a gallery: identities ascending, within each its cameras ascending.

    Args:
        gallery: All gallery images, sorted by identity, camera and path.
        trial: From 0; seeds a `random.Random`.
        shots: 1: one `choice` from each identity's and camera's images; else a `sample` of so many,
            or of all where there are fewer.

    Source: the AGW code base.
    """
    generator = random.Random(trial)
    drawn: list[int] = []
    for rows in rows_by_camera(gallery).values():
        if shots == 1:
            drawn.append(generator.choice(rows))
        else:
            drawn += generator.sample(rows, min(shots, len(rows)))
    return drawn


def drawn_gallery(
    gallery: ImageList, draws: Sequence[list[int]]
) -> tuple[ImageList, tuple[np.ndarray, ...]]:
    """Returns every image that was drawn, once, and the rows of each draw among these."""
    kept = np.unique(np.concatenate(draws))
    return gallery.take(kept), tuple(np.searchsorted(kept, rows) for rows in draws)
