"""SYSU-MM01: its layout, training lists, caches, and gallery draws, the authors' own included."""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path

import numpy as np

from datasets.base import (
    DataError,
    EvalOptions,
    EvalSet,
    ImageList,
    TrainSet,
)
from datasets.folders import (
    Index,
    Item,
    check_not_empty,
    data_root,
    drawn_gallery,
    find_images,
    image_list,
    path_inside,
    read_ids,
    seeded_draw,
)

logger = logging.getLogger(__name__)

VISIBLE_CAMERAS = (1, 2, 4, 5)
INFRARED_CAMERAS = (3, 6)
GALLERY_CAMERAS = {"all": VISIBLE_CAMERAS, "indoor": (1, 2)}
OFFICIAL_DRAW = "exp/rand_perm_cam.mat"
CACHE_COMMAND = "python pre_process_sysu.py --data-path {} --overwrite"
CACHE_WORDS = {"visible": "rgb", "infrared": "ir"}
MAT_MATRIX, MAT_COMPRESSED, MAT_CELL = 14, 15, 1  # element types and a class of MATLAB 5 files
MAT_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}
MAT_NUMBERS |= {12: "<i8", 13: "<u8"}  # element type -> dtype
MAT_LIMIT = 1 << 28  # bytes after decompression; the data set's own file has about 1 MB


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
        root = data_root(path, self)
        pids = self._train_pids(root)
        lists, labels = [], []
        for modality, cameras in (("visible", VISIBLE_CAMERAS), ("infrared", INFRARED_CAMERAS)):
            index = find_images(root, pids, cameras)
            items = [(*key, name) for key, names in index.items() for name in names]
            lists.append(image_list(root, items, modality))
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
        return np.isin(pids, sorted(read_ids(path.resolve(), "val")))

    def evaluate(self, path: Path, options: EvalOptions) -> EvalSet:
        """List the probes and draw the galleries."""
        root, cameras = data_root(path, self), GALLERY_CAMERAS[options.mode]
        pids = np.array(sorted(read_ids(root, options.subset)), dtype=np.int64)
        probes, index = find_images(root, pids, INFRARED_CAMERAS), find_images(root, pids, cameras)
        asked = f"exp/{options.subset}_id.txt (mode {options.mode})"
        folders = [[f"cam{camera}/" for camera in each] for each in (INFRARED_CAMERAS, cameras)]
        sides = {"query": (probes, folders[0]), "gallery": (index, folders[1])}
        check_not_empty(root, len(pids), asked, sides)
        query = [
            (pid, camera, name)
            for camera, pid in product(INFRARED_CAMERAS, pids.tolist())
            for name in probes.get((pid, camera), ())
        ]
        draw = seeded_draw if options.gallery == "seeded" else _official_draw(root)
        draws = [draw(index, trial, options.shots) for trial in range(options.trials)]
        shots = "single-shot" if options.shots == 1 else "ten-shot"
        words = f"{options.mode}-search, {shots}, {options.gallery} gallery, {len(draws)} trials"
        words += ", validation identities" if options.subset == "val" else ""
        query = image_list(root, query, "infrared")
        return EvalSet(self.name, query, *drawn_gallery(root, draws, "visible"), "sysu", words)

    def _train_pids(self, root: Path) -> np.ndarray:
        """Return the sorted training and validation identities; no test identity is among them."""
        ids = {split: read_ids(root, split) for split in ("train", "val")}
        if (root / "exp/test_id.txt").exists():
            ids["test"] = read_ids(root, "test")
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


def _official_draw(root: Path) -> Callable[[Index, int, int], list[Item]]:
    """Read the authors' permutations: camera x identity cells of (trials, n) 1-based matrices."""
    file = root / OFFICIAL_DRAW
    help_text = (
        "expected the variable rand_perm_cam, 6 x 1 cells (cameras) of cells (identities) of"
        " trials x images matrices, from the data set authors' evaluation repository"
        " (https://github.com/wuancong/SYSU-MM01); --gallery seeded needs no such file"
    )
    real = path_inside(root, OFFICIAL_DRAW)
    if not os.path.isfile(real):
        raise DataError(f"{file} does not exist; {help_text}")
    try:
        cells = _read_mat(Path(real).read_bytes(), "rand_perm_cam").ravel()
        cameras = {camera: np.ravel(cells[camera - 1]) for camera in VISIBLE_CAMERAS}
    except Exception as error:  # a damaged file fails anywhere in the reader
        raise DataError(f"{file} can't be read ({error!r}); {help_text}") from error

    def draw(index: Index, trial: int, shots: int) -> list[Item]:
        items: list[Item] = []
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
