"""Which images, which labels: the layouts, splits and protocols of the data sets.

`train_set` and `eval_set` read the lists of a data set, check all that can be checked without
decoding an image, and answer with `ImageList`s: relative paths, identities, cameras and where each
path was named. The on-disk words (Thermal, rgb, ir) stop here; the rest of the project says visible
and infrared. A data set is one class in `DATASETS`: its layout, training lists and protocol.
"""

from __future__ import annotations

import logging
import os
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

logger = logging.getLogger(__name__)

TRIALS = range(1, 11)  # RegDB's splits; SYSU-MM01's and LLCM's gallery draws
VALIDATION_STEP = 5  # without a validation list every fifth training label is held out
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
CACHE_COMMAND = "python pre_process_sysu.py --data-path {} --overwrite"
STAND_IN = (
    "To try everything without it, write stand-in data: python stand_in.py --layout {} --out DIR"
    " --train-ids 150 --test-ids 40 --images-per-id 10 --seed 0"
)


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
        _check_choice("trial", self.trial, TRIALS)
        _check_choice("direction", self.direction, ("v2i", "i2v"))
        _check_choice("mode", self.mode, tuple(GALLERY_CAMERAS))
        _check_choice("gallery", self.gallery, ("seeded", "official"))
        _check_choice("shots", self.shots, (1, 10))
        _check_choice("trials", self.trials, TRIALS)
        _check_choice("subset", self.subset, ("test", "val"))


def train_set(
    dataset: str,
    data_path: str | Path,
    *,
    trial: int = 1,
    subset: str = "all",
    use_cache: bool = True,
) -> TrainSet:
    """List and check the training images of a data set.

    Args:
        dataset: a name in `DATASETS`.
        data_path: the data folder.
        trial: RegDB's split, 1..10; no meaning for the others.
        subset: "all" identities, or "fit": without those that `eval_set(subset="val")` asks for.
        use_cache: take SYSU-MM01's `train_{rgb,ir}_resized_{img,label}.npy` where all four exist.

    Raises:
        DataError: a folder, list, label or image is missing or wrong; found before any decoding.
    """
    _check_choice("subset", subset, ("all", "fit"))
    _check_choice("trial", trial, TRIALS)
    source, path = _source(dataset), Path(data_path)
    result = source.train(path, trial, use_cache)
    if subset == "fit":
        result = _narrow(result, ~source.held_out(path, result.pids))
    found = f"{len(result.visible)} visible and {len(result.infrared)} infrared images"
    words = f"{result.description}: {result.num_ids} identities, {found}"
    return replace(result, description=words)


def eval_set(dataset: str, data_path: str | Path, **options: int | str) -> EvalSet:
    """List and check the query and gallery images of a protocol.

    Args:
        dataset: a name in `DATASETS`.
        data_path: the data folder.
        **options: the fields of `EvalOptions`.

    Raises:
        DataError: a folder, list, label or image is missing or wrong; found before any decoding.
    """
    return _source(dataset).evaluate(Path(data_path), EvalOptions(**options))


def folder_images(folder: str | Path, modality: str) -> ImageList:
    """List the images in a folder of one's own and below it, by name; identities are unknown (-1).

    Args:
        folder: any folder; hidden files and folders are passed over.
        modality: "visible" or "infrared".

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"image folder {root} does not exist; expected a folder of images")
    root = root.resolve()
    below = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    names = [
        path.as_posix()
        for path in below
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.parts)
    ]
    if not names:
        raise DataError(
            f"{folder} holds no image, nor do the folders in it; expected files named"
            f" {', '.join(IMAGE_SUFFIXES)}"
        )
    unknown = np.full(len(names), -1, dtype=np.int64)
    return ImageList(root, tuple(sorted(names)), unknown, unknown, modality)


# --- What the data sets share ---------------------------------------------------------------------


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


def _check_choice(name: str, value: object, legal: Sequence[object]) -> None:
    if isinstance(value, bool) or value not in legal:
        span = isinstance(legal, range)
        words = f"{legal[0]}..{legal[-1]}" if span else " or ".join(map(str, legal))
        raise DataError(f"{name} is {value!r}; expected {words}")


def _source(dataset: str) -> Source:
    _check_choice("dataset", dataset, tuple(DATASETS))
    return DATASETS[dataset]


def _narrow(full: TrainSet, kept: np.ndarray) -> TrainSet:
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


def _data_root(path: Path, source: Source) -> Path:
    """Return the data folder with links resolved, after checking that its layout is `source`'s."""

    def lacking(folder: Path, kind: Source) -> list[str]:
        return [f"{name}/" for name in kind.folders if not os.path.isdir(folder / name)]

    expected = f"{source.title} is a folder with {', '.join(f'{f}/' for f in source.folders)} in it"
    hint = f"{source.how_to_get} {STAND_IN.format(source.name)}"
    if not path.is_dir():
        raise DataError(f"data folder {path} does not exist. {expected}. {hint}")
    missing = lacking(path, source)
    if not missing:
        return path.resolve()
    below = sorted(path.iterdir()) if os.access(path, os.R_OK) else []
    for other in [path.resolve().parent, *below]:  # one folder too high or too deep: usual slips
        if not lacking(other, source):
            hint = f"It is in {other}: pass --data-path {other}"
    for other in DATASETS.values():
        if not lacking(path, other):
            hint = f"It looks like {other.title}: pass --dataset {other.name}"
    if missing == [f"{source.folders[0]}/"] and hasattr(source, "lists_hint"):
        hint = f"The images are there, the lists are not: {source.lists_hint}"
    raise DataError(f"{path} has no {', '.join(missing)}. {expected}. {hint}")


def _inside(root: Path, relative: str) -> str:
    """Return the real path of `relative`, which must not leave the data folder by a link."""
    real = os.path.realpath(root / relative)
    if not Path(real).is_relative_to(root):
        raise DataError(
            f"{root / relative} is a link to {real}, outside of the data folder {root}; only what"
            " lies inside is read: copy it there"
        )
    return real


def _read_text(root: Path, relative: str) -> str:
    real = _inside(root, relative)
    if not os.path.isfile(real):
        raise DataError(f"{root / relative} does not exist; it is one of the data set's own lists")
    try:
        return Path(real).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{root / relative} can't be read as text: {error}") from error


def _files(root: Path, folder: str) -> dict[str, bool]:
    """List a folder's regular files ({} when it is not there): name -> lies inside the root."""
    try:
        with os.scandir(_inside(root, folder)) as entries:
            return {
                entry.name: not entry.is_symlink()
                or Path(os.path.realpath(entry.path)).is_relative_to(root)
                for entry in entries
                if entry.is_file()
            }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DataError(f"{root / folder} can't be listed: {error.strerror}") from error


# --- RegDB ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """One line of a RegDB or LLCM list."""

    path: str
    pid: int
    label: int
    origin: str


class Regdb:
    """RegDB: ten splits of 412 identities in halves, 10 visible and 10 infrared images of each.

    `idx/{train,test}_{visible,thermal}_{trial}.txt` hold lines `Visible/<pid>/<file> <label>`;
    labels are 0..L-1 per split and shared by the two modalities. No camera rule, one gallery.
    """

    name = "regdb"
    title = "RegDB"
    folders = ("idx", "Visible", "Thermal")
    how_to_get = (
        "RegDB is given out by its authors against a signed form (http://dm.dongguk.edu/link.html,"
        " 'Dongguk Body-based Person Recognition Database (DBPerson-Recog-DB1)')."
    )
    lists_hint = "idx/ with the ten splits comes apart from the images; put it beside Visible/"

    def train(self, path: Path, trial: int, use_cache: bool = False) -> TrainSet:
        """Read a split's two training lists; 8,240 small images need no cache."""
        return self._split(path, "train", trial)

    def held_out(self, path: Path, pids: np.ndarray) -> np.ndarray:
        """Tell which labels ((L,) bool) are kept for validation: 0, 5, 10, ..."""
        return _held_out_labels(pids)

    def evaluate(self, path: Path, options: EvalOptions) -> EvalSet:
        """Make one modality the query and the other the gallery."""
        if options.subset == "test":
            people = self._split(path, "test", options.trial)
        else:
            people = self._split(path, "train", options.trial)
            people = _narrow(people, self.held_out(path, people.pids))
        return _one_against_other(people, options, people.description)

    def _split(self, path: Path, split: str, trial: int) -> TrainSet:
        """Read both lists of a split and check them against each other."""
        root = _data_root(path, self)
        names = [f"idx/{split}_{word}_{trial}.txt" for word in ("visible", "thermal")]
        lists = [
            _read_list(root, name, folder)
            for name, folder in zip(names, ("Visible", "Thermal"), strict=True)
        ]
        return _pair(self, root, names, lists, (1, 2), f"RegDB trial {trial}")


def _held_out_labels(pids: np.ndarray) -> np.ndarray:
    """Tell which labels ((L,) bool) are held out where there is no validation list: 0, 5, ..."""
    return np.arange(len(pids)) % VALIDATION_STEP == 0


def _one_against_other(people: TrainSet, options: EvalOptions, words: str) -> EvalSet:
    """Make all images of one modality the query and all of the other the gallery."""
    pair = (people.visible, people.infrared)
    query, gallery = pair if options.direction == "v2i" else pair[::-1]
    words += f", {query.modality} to {gallery.modality}"
    words += ", validation identities" if options.subset == "val" else ""
    return EvalSet(people.dataset, query, gallery, (np.arange(len(gallery)),), "none", words)


def _pair(
    source: Source,
    root: Path,
    names: Sequence[str],
    lists: Sequence[list[_Line]],
    cameras: tuple[int, int],
    description: str,
) -> TrainSet:
    """Check a visible and an infrared list against each other; both number the same people."""
    where = f"{names[0]} and {names[1]} of {root}"
    owner: dict[int, _Line] = {}
    for line in (*lists[0], *lists[1]):
        first = owner.setdefault(line.label, line)
        if first.pid != line.pid:
            raise DataError(
                f"{line.origin} gives label {line.label} to identity {line.pid}, {first.origin}"
                f" to {first.pid}; expected one identity per label in {where}: are all lists of"
                " one split, from one source?"
            )
    pids = np.array([owner[label].pid for label in sorted(owner)], dtype=np.int64)
    if len(set(pids.tolist())) < len(pids):
        raise DataError(f"an identity has two labels in {where}; expected one label each")
    gaps = set(range(len(pids))) - set(owner)
    if gaps:
        raise DataError(
            f"{len(pids)} labels up to {max(owner)}, and label {min(gaps)} is not among them;"
            f" expected 0..{len(pids) - 1} without gaps in {where}"
        )
    for lines, others in (lists, lists[::-1]):
        alone = {line.label for line in lines} - {line.label for line in others}
        if alone:
            raise DataError(
                f"identity {owner[min(alone)].pid} ({owner[min(alone)].origin}) has images in"
                f" one modality only; expected images in both of {where}"
            )
    images = [
        ImageList(
            root,
            tuple(line.path for line in lines),
            np.array([line.pid for line in lines], dtype=np.int64),
            np.full(len(lines), camera, dtype=np.int64),
            modality,
            tuple(line.origin for line in lines),
        )
        for lines, camera, modality in zip(lists, cameras, ("visible", "infrared"), strict=True)
    ]
    labels = [np.array([line.label for line in lines], dtype=np.int64) for lines in lists]
    return TrainSet(source.name, *images, *labels, pids, description)


def _read_list(root: Path, name: str, folder: str | None = None) -> list[_Line]:
    """Read a list; each line names an image (RegDB: in `folder`) that is there, and no other does.

    Without `folder` an image may be anywhere, and its label stands for the unknown raw identity.
    """
    expected = f"expected `{f'{folder}/<pid>' if folder else '<folder>'}/<file> <label>`"
    listings: dict[str, dict[str, bool]] = {}  # folders seen so far
    lines: dict[str, _Line] = {}
    for number, text in enumerate(_read_text(root, name).split("\n"), start=1):
        if not text.strip():
            continue
        line = _parse_line(text, f"{name}:{number}", folder, root, expected)
        if line.path in lines:
            raise DataError(
                f"{line.origin} names {line.path}, as {lines[line.path].origin} does; expected each"
                " image once"
            )
        parent, file = line.path.rsplit("/", 1)
        if parent not in listings:
            listings[parent] = _files(root, parent)
        if file not in listings[parent]:
            raise DataError(
                f"{line.origin} names {line.path}, and there is no such file in {root}; is the data"
                " set complete, and the list its own?"
            )
        if not listings[parent][file]:
            _inside(root, line.path)  # raises
        lines[line.path] = line
    if not lines:
        raise DataError(f"{root / name} is empty; {expected} lines")
    return list(lines.values())


def _parse_line(text: str, origin: str, folder: str | None, root: Path, expected: str) -> _Line:
    words = text.rsplit(maxsplit=1)
    if len(words) == 1:
        raise DataError(f"{origin} has no label: {words[0]!r}; {expected}")
    path, label = PurePosixPath(words[0].strip()), words[1]
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{origin} names {str(path)!r}, which leaves {root}; {expected}")
    if not re.fullmatch(r"[0-9]{1,9}", label):
        raise DataError(f"{origin} has the label {label!r}, not a whole number; {expected}")
    legal = rf"{folder}/[0-9]{{1,9}}/[^/]+" if folder else r"[^\\]+/[^/\\]+"
    if not re.fullmatch(legal, str(path)):
        raise DataError(f"{origin} names {str(path)!r}; {expected}")
    return _Line(str(path), int(path.parts[1] if folder else label), int(label), origin)


# --- SYSU-MM01 ------------------------------------------------------------------------------------

VISIBLE_CAMERAS = (1, 2, 4, 5)
INFRARED_CAMERAS = (3, 6)
GALLERY_CAMERAS = {"all": VISIBLE_CAMERAS, "indoor": (1, 2)}
SYSU_FOLDER = "cam{}/{:04d}"  # of a camera and an identity
OFFICIAL_DRAW = "exp/rand_perm_cam.mat"
CACHE_WORDS = {"visible": "rgb", "infrared": "ir"}
MAT_MATRIX, MAT_COMPRESSED, MAT_CELL = 14, 15, 1  # element types and a class of MATLAB 5 files
MAT_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}
MAT_NUMBERS |= {12: "<i8", 13: "<u8"}  # element type -> dtype
MAT_LIMIT = 1 << 28  # bytes after decompression; the data set's own file has about 1 MB

_Item = tuple[int, int, str]  # pid, camera, relative path
_Index = dict[tuple[int, int], list[str]]  # (pid, camera) -> sorted relative paths


class Sysu:
    """SYSU-MM01: infrared queries (cameras 3, 6) against visible galleries, over several draws.

    Training lists are identity-major, then camera, then file name; labels are the sorted training
    and validation pids renumbered from 0. Queries: all of camera 3, then all of camera 6.

    Gallery draws, over the sorted file list of each identity and camera:
        seeded: trial t has a `random.Random(t)`; ids ascending, within an id cameras ascending, one
            `choice` each (single-shot) or `sample` of min(10, n) (ten-shot).
        official: the first 1 or 10 entries of row t of `exp/rand_perm_cam.mat`; cameras ascending,
            within a camera ids ascending, then permutation order.

    Source: the AGW code base (seeded), the data set authors' evaluation (official).
    """

    name = "sysu"
    title = "SYSU-MM01"
    folders = ("exp", "cam1", "cam2", "cam3", "cam4", "cam5", "cam6")
    how_to_get = (
        "SYSU-MM01 is given out by its authors against a signed form"
        " (http://isee.sysu.edu.cn/project/RGBIRReID.htm)."
    )
    lists_hint = (
        "exp/ with train_id.txt, val_id.txt and test_id.txt is part of the data set's download; put"
        " it beside cam1/"
    )

    def train(self, path: Path, trial: int, use_cache: bool = True) -> TrainSet:
        """List the training images, or take the caches that hold them; there is one split."""
        caches = [f"train_{w}_resized_{k}.npy" for w in ("rgb", "ir") for k in ("img", "label")]
        found = [name for name in caches if (path / name).exists()]
        if use_cache and len(found) == len(caches):
            return self._cached(path.resolve())
        if use_cache and found:
            logger.warning("%s has only %s of the four caches; taking the jpgs", path, found)
        root = _data_root(path, self)
        pids = self._train_pids(root)
        lists, labels = [], []
        for modality, cameras in (("visible", VISIBLE_CAMERAS), ("infrared", INFRARED_CAMERAS)):
            index = _index(root, pids, cameras)
            items = [(*key, name) for key, names in index.items() for name in names]
            lists.append(_image_list(root, items, modality))
            labels.append(np.searchsorted(pids, lists[-1].pids))
            lacking = np.setdiff1d(pids, lists[-1].pids)
            if len(lacking):
                folders = ", ".join(f"cam{camera}/{lacking[0]:04d}/" for camera in cameras)
                raise DataError(
                    f"training identity {lacking[0]} has no {modality} image: none in {folders} of"
                    f" {root}; expected images in both modalities"
                )
        return TrainSet(self.name, *lists, *labels, pids, f"{self.title} (jpgs)")

    def held_out(self, path: Path, pids: np.ndarray) -> np.ndarray:
        """Tell which labels ((L,) bool) are the data set's own validation identities."""
        return np.isin(pids, sorted(_read_ids(path.resolve(), "val")))

    def evaluate(self, path: Path, options: EvalOptions) -> EvalSet:
        """List the probes and draw the galleries."""
        root, cameras = _data_root(path, self), GALLERY_CAMERAS[options.mode]
        pids = np.array(sorted(_read_ids(root, options.subset)), dtype=np.int64)
        probes, index = _index(root, pids, INFRARED_CAMERAS), _index(root, pids, cameras)
        asked = f"exp/{options.subset}_id.txt (mode {options.mode})"
        folders = [[f"cam{camera}/" for camera in each] for each in (INFRARED_CAMERAS, cameras)]
        sides = {"query": (probes, folders[0]), "gallery": (index, folders[1])}
        _check_not_empty(root, len(pids), asked, sides)
        query = [
            (pid, camera, name)
            for camera, pid in product(INFRARED_CAMERAS, pids.tolist())
            for name in probes.get((pid, camera), ())
        ]
        draw = _seeded_draw if options.gallery == "seeded" else _official_draw(root)
        draws = [draw(index, trial, options.shots) for trial in range(options.trials)]
        shots = "single-shot" if options.shots == 1 else "ten-shot"
        words = f"{options.mode}-search, {shots}, {options.gallery} gallery, {len(draws)} trials"
        words += ", validation identities" if options.subset == "val" else ""
        query = _image_list(root, query, "infrared")
        return EvalSet(self.name, query, *_gallery(root, draws, "visible"), "sysu", words)

    def _train_pids(self, root: Path) -> np.ndarray:
        """Return the sorted training and validation identities; no test identity is among them."""
        ids = {split: _read_ids(root, split) for split in ("train", "val")}
        if (root / "exp/test_id.txt").exists():
            ids["test"] = _read_ids(root, "test")
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            shared = ids[one] & ids.get(other, set())
            if shared:
                raise DataError(
                    f"identity {min(shared)} is in exp/{one}_id.txt and in exp/{other}_id.txt of"
                    f" {root}; expected lists that share none"
                )
        return np.array(sorted(ids["train"] | ids["val"]), dtype=np.int64)

    def _cached(self, root: Path) -> TrainSet:
        """Take AGW's caches; without exp/ raw identities aren't known and labels stand for them."""
        files, labels = zip(*(_open_cache(root, w) for w in CACHE_WORDS.values()), strict=True)
        known = (root / "exp").is_dir()
        pids = self._train_pids(root) if known else np.arange(labels[0].max() + 1)
        for file, values in zip(files, labels, strict=True):
            found = np.unique(values)
            if not np.array_equal(found, np.arange(len(pids))):
                raise DataError(
                    f"the labels beside {file} are {len(found)} values in {found[0]}..{found[-1]};"
                    f" expected each of 0..{len(pids) - 1}, the training identities. Rebuild:"
                    f" {CACHE_COMMAND.format(root)}"
                )
        lists = [
            ImageList(root, (), pids[v], np.full(len(v), -1, np.int64), modality, cache=file)
            for modality, file, v in zip(CACHE_WORDS, files, labels, strict=True)
        ]
        return TrainSet(self.name, *lists, *labels, pids, f"{self.title} (caches)")


def _read_ids(root: Path, split: str, folder: str = "exp") -> set[int]:
    """Read exp/{split}_id.txt: one line of comma-separated identities."""
    name = f"{folder}/{split}_id.txt"
    words = [word.strip() for word in _read_text(root, name).strip().rstrip(",").split(",")]
    for word in words:
        if not re.fullmatch(r"[0-9]{1,6}", word):
            raise DataError(
                f"{root / name} holds {word[:40]!r}; expected one line of comma-separated whole"
                " numbers, such as 1,2,4"
            )
    ids = {int(word) for word in words}
    if len(ids) < len(words):
        raise DataError(f"{root / name} names an identity twice; expected {len(ids)} numbers")
    return ids


def _index(
    root: Path, pids: np.ndarray, cameras: Iterable[int], layout: Sequence[str] = (SYSU_FOLDER,)
) -> _Index:
    """List every image of these identities in these cameras; empty pairs are left out."""
    index: _Index = {}
    for pid, camera in product(pids.tolist(), cameras):
        names = []
        for folder in dict.fromkeys(pattern.format(camera, pid) for pattern in layout):
            for name, inside in _files(root, folder).items():
                if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                    names.append(f"{folder}/{name}")
                    if not inside:
                        _inside(root, names[-1])  # raises
        if names:
            index[pid, camera] = sorted(names)
    return index


def _check_not_empty(
    root: Path, count: int, asked: str, sides: dict[str, tuple[_Index, Sequence[str]]]
) -> None:
    """Raise DataError when a side's folders have no image of the `count` people asked for."""
    for what, (index, folders) in sides.items():
        if not index:
            raise DataError(
                f"empty {what}: {', '.join(folders)} of {root} have no image of the {count}"
                f" identities in {asked}; is the data set complete, and the list its own?"
            )


def _gallery(
    root: Path, draws: Sequence[list[_Item]], modality: str
) -> tuple[ImageList, tuple[np.ndarray, ...]]:
    """List every image that was drawn once, and the rows of each draw."""
    rows = {item: row for row, item in enumerate(sorted({i for items in draws for i in items}))}
    trials = tuple(np.array([rows[item] for item in items], dtype=np.int64) for items in draws)
    return _image_list(root, list(rows), modality), trials


def _image_list(root: Path, items: Sequence[_Item], modality: str) -> ImageList:
    pids, cameras = (np.array([item[i] for item in items], dtype=np.int64) for i in (0, 1))
    return ImageList(root, tuple(item[2] for item in items), pids, cameras, modality)


def _seeded_draw(index: _Index, trial: int, shots: int) -> list[_Item]:
    generator, items = random.Random(trial), []
    for (pid, camera), names in sorted(index.items()):
        single = shots == 1
        drawn = (
            [generator.choice(names)] if single else generator.sample(names, min(shots, len(names)))
        )
        items += [(pid, camera, name) for name in drawn]
    return items


def _official_draw(root: Path) -> Callable[[_Index, int, int], list[_Item]]:
    """Read the authors' permutations: camera x identity cells of (trials, n) 1-based matrices."""
    file = root / OFFICIAL_DRAW
    help_text = (
        "expected the variable rand_perm_cam, 6 x 1 cells (cameras) of cells (identities) of"
        " trials x images matrices, from the data set authors' evaluation repository"
        " (https://github.com/wuancong/SYSU-MM01); --gallery seeded needs no such file"
    )
    real = _inside(root, OFFICIAL_DRAW)
    if not os.path.isfile(real):
        raise DataError(f"{file} does not exist; {help_text}")
    try:
        cells = _read_mat(Path(real).read_bytes(), "rand_perm_cam").ravel()
        cameras = {camera: np.ravel(cells[camera - 1]) for camera in VISIBLE_CAMERAS}
    except Exception as error:  # a damaged file fails anywhere in the reader
        raise DataError(f"{file} can't be read ({error!r}); {help_text}") from error

    def draw(index: _Index, trial: int, shots: int) -> list[_Item]:
        items: list[_Item] = []
        for (pid, camera), names in sorted(index.items(), key=lambda pair: pair[0][::-1]):
            cell = cameras[camera][pid - 1] if 1 <= pid <= len(cameras[camera]) else None
            matrix, count = np.asarray(cell), min(shots, len(names))
            row = matrix[trial] if matrix.ndim == 2 and len(matrix) > trial else np.zeros(0)
            legal = row.dtype.kind in "iuf" and set(row.tolist()) <= set(range(1, len(names) + 1))
            if not legal or len(row) < count or len(np.unique(row)) < len(row):
                raise DataError(
                    f"{file} has {row[:12].tolist()} for camera {camera}, identity {pid}, trial"
                    f" {trial + 1}; expected at least {count} different numbers in 1..{len(names)},"
                    f" the images in {root}/cam{camera}/{pid:04d}; {help_text}"
                )
            items += [(pid, camera, names[int(number) - 1]) for number in row[:count]]
        return items

    return draw


def _read_mat(data: bytes, name: str) -> np.ndarray:
    """Read one numeric or cell array of a MATLAB 5 file (MATLAB's `save` up to -v7).

    Deviation: not scipy's reader, which a damaged file can make crash the whole process.
    """
    if data[124:128] != b"\x00\x01IM":
        raise ValueError("not a little-endian MATLAB 5 file; in MATLAB: save -v7")
    for kind, body in _mat_elements(data[128:]):
        if kind == MAT_MATRIX and [*islice(_mat_elements(body), 3)][2][1] == name.encode():
            return _mat_array(body)
    raise ValueError(f"no variable {name}")


def _mat_elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Split into elements: type and content."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from("<II", data, at)
        start = at + 8
        if kind >> 16:  # both in two bytes each, up to four bytes of content after them
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        content = data[start : start + size]
        if len(content) < size:
            raise ValueError(f"cut off: {size} bytes announced, {len(content)} found")
        if kind == MAT_COMPRESSED:
            yield from _mat_elements(zlib.decompressobj().decompress(content, MAT_LIMIT))
            at = start + size
        else:
            yield kind, content
            at = -(-(start + size) // 8) * 8


def _mat_array(body: bytes) -> np.ndarray:
    """Read the values of a matrix element; cells become an object array of arrays."""
    if not body:
        return np.zeros((0, 0))
    (_, flags), (_, shape), _, *parts = _mat_elements(body)
    if flags[0] == MAT_CELL:
        values = np.empty(len(parts), dtype=object)
        for i, (_, part) in enumerate(parts):
            values[i] = _mat_array(part)
    else:
        values = np.frombuffer(parts[0][1], MAT_NUMBERS[parts[0][0]])
    return values.reshape(np.frombuffer(shape, "<i4"), order="F")


def _open_cache(root: Path, word: str) -> tuple[Path, np.ndarray]:
    """Check one modality's cache; return the image file and the (n,) int64 labels.

    Caches may be links to faster storage: no list names them, and loading runs nothing in them.
    """
    files = [f"train_{word}_resized_{kind}.npy" for kind in ("img", "label")]
    where, rebuild = f"{root}/{files[0]} or {files[1]}", f"Rebuild: {CACHE_COMMAND.format(root)}"
    try:
        pixels, labels = (np.load(root / name, mmap_mode="r", allow_pickle=False) for name in files)
    except Exception as error:  # a damaged header makes numpy raise nearly anything
        raise DataError(f"{where} can't be read ({error}). {rebuild}") from error
    sized = pixels.ndim == 4 and pixels.shape[3] == 3 and labels.shape == pixels.shape[:1]
    if not sized or not labels.size or pixels.dtype != np.uint8 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where} is wrong: {pixels.dtype} {pixels.shape} and {labels.dtype} {labels.shape};"
            f" expected uint8 (n, H, W, 3) and integers (n,), n > 0. {rebuild}"
        )
    return root / files[0], np.asarray(labels, dtype=np.int64)


# --- LLCM -----------------------------------------------------------------------------------------

LLCM_CAMERAS = {"vis": (1, 2, 3, 4, 5, 6, 7, 8, 9), "nir": (1, 2, 4, 5, 6, 7, 8, 9)}


class Llcm:
    """LLCM: nine cameras in low light; seven hundred identities to train on, one split.

    `idx/train_{vis,nir}.txt` hold lines `<folder>/<file> <label>` with labels 0..L-1 shared by the
    two modalities; they name no raw identity, and the label stands for it. Test images lie in
    `test_vis/cam1..cam9/<pid>/` and `test_nir/cam{1,2,4..9}/<pid>/`, of the identities in
    `idx/test_id.txt`; `<pid>` may have leading zeros or none. Queries are all images of one
    modality; the gallery has one seeded image of the other per identity and camera, drawn as
    SYSU-MM01's. Images of the query's own person and camera do not count.

    Deviation: the data set names no validation identities; every fifth training label is held out,
    and since the training lists name no cameras either, these are evaluated as RegDB's.
    """

    name = "llcm"
    title = "LLCM"
    folders = ("idx", "test_vis", "test_nir")
    how_to_get = (
        "LLCM is given out by its authors against a signed form (https://github.com/ZYK100/LLCM)."
    )
    lists_hint = "idx/ is part of the data set's download; put it beside test_vis/"

    def train(self, path: Path, trial: int, use_cache: bool = False) -> TrainSet:
        """Read the two training lists; there is one split and no cache."""
        root = _data_root(path, self)
        names = [f"idx/train_{word}.txt" for word in LLCM_CAMERAS]
        lists = [_read_list(root, name) for name in names]
        return _pair(self, root, names, lists, (-1, -1), self.title)

    def held_out(self, path: Path, pids: np.ndarray) -> np.ndarray:
        """Tell which labels ((L,) bool) are kept for validation: 0, 5, 10, ..."""
        return _held_out_labels(pids)

    def evaluate(self, path: Path, options: EvalOptions) -> EvalSet:
        """List the queries and draw the galleries."""
        if options.subset == "val":
            people = self.train(path, 1)
            people = _narrow(people, self.held_out(path, people.pids))
            return _one_against_other(people, options, f"{self.title}, whole gallery")
        root = _data_root(path, self)
        pids = np.array(sorted(_read_ids(root, "test", "idx")), dtype=np.int64)
        sides = {}
        for modality, (word, cameras) in zip(
            ("visible", "infrared"), LLCM_CAMERAS.items(), strict=True
        ):
            layout = (f"test_{word}/{SYSU_FOLDER}", f"test_{word}/cam{{}}/{{}}")
            sides[modality] = _index(root, pids, cameras, layout)
        asked, sought = list(sides) if options.direction == "v2i" else list(sides)[::-1]
        folders = [f"{folder}/" for folder in self.folders[1:]]
        both = {"query": (sides[asked], folders), "gallery": (sides[sought], folders)}
        _check_not_empty(root, len(pids), "idx/test_id.txt", both)
        query = [(*key, name) for key, names in sides[asked].items() for name in names]
        draws = [_seeded_draw(sides[sought], trial, 1) for trial in range(options.trials)]
        words = f"{self.title}, {asked} to {sought}, single-shot, seeded gallery"
        words += f", {len(draws)} trials"
        gallery = _gallery(root, draws, sought)
        return EvalSet(self.name, _image_list(root, query, asked), *gallery, "same", words)


DATASETS: dict[str, Source] = {source.name: source for source in (Regdb(), Sysu(), Llcm())}


STAND_IN_MARKER = "stand_in.json"  # written by stand_in.py; the real data sets lack it


def data_name(dataset: str, data_path: str | Path) -> str:
    """Name the data in printed rows, so that stand-in numbers are never taken for real ones."""
    name = DATASETS[dataset].title
    stand_in = (Path(data_path) / STAND_IN_MARKER).exists()
    return f"stand-in data in {name}'s layout" if stand_in else name
