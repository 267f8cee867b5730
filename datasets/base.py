"""What a data set is to the rest of the project: lists of images, and who is asked for among whom.

Nothing here reads a folder; see `data_folders` for that, and `data_manager` for the data sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

TRIALS = range(1, 11)  # RegDB's splits; SYSU-MM01's and LLCM's gallery draws
VALIDATION_STEP = 5  # without a validation list every fifth training label is held out


class DataError(ValueError):
    """Data that can't be used: what is wrong, where, what was expected and what mends it."""


@dataclass(frozen=True, eq=False)
class ImageList:
    """Which images, in order; nothing is decoded.

    Attributes:
        root: the data folder, links resolved.
        paths: n posix paths relative to `root`; () where `cache` is set.
        pids: (n,) int64 raw identities.
        camids: (n,) int64; RegDB 1 visible, 2 infrared; SYSU-MM01 1..6; LLCM 1..9; -1 unknown
            (caches, LLCM's training lists).
        modality: "visible" or "infrared".
        origins: where each path was named ("idx/train_visible_1.txt:12"); () for listed folders.
        cache: a .npy file of (N, H, W, 3) uint8 that holds these images in place of `paths`.
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
        """Number of images."""
        return len(self.pids)

    def take(self, indices: np.ndarray | Sequence[int]) -> ImageList:
        """Return the images at `indices` ((m,) integers), in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        held = np.arange(len(self)) if self.cache_rows is None else self.cache_rows
        return replace(
            self,
            paths=tuple(self.paths[i] for i in rows) if self.paths else (),
            pids=self.pids[rows],
            camids=self.camids[rows],
            origins=tuple(self.origins[i] for i in rows) if self.origins else (),
            cache_rows=None if self.cache is None else held[rows],
        )

    def describe(self, index: int) -> str:
        """Name one image for an error text: its file and the line that asked for it."""
        file = self.root / self.paths[index]
        return f"{file} (named in {self.origins[index]})" if self.origins else str(file)


@dataclass(frozen=True, eq=False)
class TrainSet:
    """Training images of both modalities with shared labels 0..L-1.

    Attributes:
        dataset: its name in `DATASETS`.
        visible: n_v visible images.
        infrared: n_i infrared images.
        visible_labels: (n_v,) int64, every label at least once.
        infrared_labels: (n_i,) int64, every label at least once.
        pids: (L,) int64 raw identity of each label.
        description: one line for the log.
    """

    dataset: str
    visible: ImageList
    infrared: ImageList
    visible_labels: np.ndarray
    infrared_labels: np.ndarray
    pids: np.ndarray
    description: str

    @property
    def num_ids(self) -> int:
        """L, the number of training identities."""
        return len(self.pids)


@dataclass(frozen=True, eq=False)
class EvalSet:
    """A retrieval protocol: who is asked for, among whom.

    Attributes:
        dataset: its name in `DATASETS`.
        query: the query images.
        gallery: every distinct image that any trial uses, once.
        gallery_trials: per trial the row numbers into `gallery`, in the protocol's order.
        camera_rule: a rule of `eval_metrics.excluded`: "none", "sysu" (camera-3 queries ignore
            camera-2 gallery images) or "same" (queries ignore images of their person and camera).
        protocol: the protocol in words, for printed rows.
    """

    dataset: str
    query: ImageList
    gallery: ImageList
    gallery_trials: tuple[np.ndarray, ...]
    camera_rule: str
    protocol: str


@dataclass(frozen=True)
class EvalOptions:
    """What a protocol is asked for; each data set reads the fields that concern it.

    Attributes:
        trial: RegDB's split, 1..10.
        direction: RegDB, LLCM: "v2i" (visible queries, infrared gallery) or "i2v".
        mode: SYSU-MM01: "all" (gallery cameras 1, 2, 4, 5) or "indoor" (1, 2).
        gallery: SYSU-MM01: how the gallery is drawn, "seeded" or "official" (see `Sysu`).
        shots: SYSU-MM01: gallery images per identity and camera, 1 or 10.
        trials: SYSU-MM01, LLCM: number of gallery draws, 1..10.
        subset: "test", or "val": the training identities that `train_set(subset="fit")` leaves out.
    """

    trial: int = 1
    direction: str = "v2i"
    mode: str = "all"
    gallery: str = "seeded"
    shots: int = 1
    trials: int = 10
    subset: str = "test"

    def __post_init__(self) -> None:
        """Check every field against its legal values."""
        check_choice("trial", self.trial, TRIALS)
        check_choice("direction", self.direction, ("v2i", "i2v"))
        check_choice("mode", self.mode, ("all", "indoor"))
        check_choice("gallery", self.gallery, ("seeded", "official"))
        check_choice("shots", self.shots, (1, 10))
        check_choice("trials", self.trials, TRIALS)
        check_choice("subset", self.subset, ("test", "val"))


class Source(Protocol):
    """A data set: its layout on disk, training lists and protocol."""

    name: str
    title: str
    folders: tuple[str, ...]  # that of the lists first
    how_to_get: str

    def train(self, path: Path, trial: int, use_cache: bool) -> TrainSet:
        """List the training images."""

    def held_out(self, path: Path, pids: np.ndarray) -> np.ndarray:
        """Tell which training labels ((L,) bool) are kept for validation."""

    def evaluate(self, path: Path, options: EvalOptions) -> EvalSet:
        """List query and gallery images."""


def check_choice(name: str, value: object, legal: Sequence[object]) -> None:
    """Raise DataError unless an option has one of its legal values."""
    if isinstance(value, bool) or value not in legal:
        span = isinstance(legal, range)
        words = f"{legal[0]}..{legal[-1]}" if span else " or ".join(map(str, legal))
        raise DataError(f"{name} is {value!r}; expected {words}")


def held_out_labels(pids: np.ndarray) -> np.ndarray:
    """Tell which labels ((L,) bool) are held out where there is no validation list: 0, 5, ..."""
    return np.arange(len(pids)) % VALIDATION_STEP == 0


def narrow(full: TrainSet, kept: np.ndarray) -> TrainSet:
    """Keep the labels where `kept` (L,) is true, renumbered from 0."""
    if not kept.any():
        raise DataError(
            f"{full.description}: {full.num_ids} identities are too few to hold any out"
        )
    number = np.cumsum(kept) - 1
    rows = [np.flatnonzero(kept[labels]) for labels in (full.visible_labels, full.infrared_labels)]
    return replace(
        full,
        visible=full.visible.take(rows[0]),
        infrared=full.infrared.take(rows[1]),
        visible_labels=number[full.visible_labels[rows[0]]],
        infrared_labels=number[full.infrared_labels[rows[1]]],
        pids=full.pids[kept],
    )


def one_against_other(people: TrainSet, options: EvalOptions, words: str) -> EvalSet:
    """Make all images of one modality the query and all of the other the gallery."""
    pair = (people.visible, people.infrared)
    query, gallery = pair if options.direction == "v2i" else pair[::-1]
    words += f", {query.modality} to {gallery.modality}"
    words += ", validation identities" if options.subset == "val" else ""
    return EvalSet(people.dataset, query, gallery, (np.arange(len(gallery)),), "none", words)


DATASETS: dict[str, Source] = {}  # by name; `data_manager` enters its own
