"""SYSU-MM01: its layout, training lists, caches, and gallery draws, the authors' own included."""

from __future__ import annotations

import logging
import os
import shlex
import struct
import zlib
from itertools import combinations, product
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from datasets.base import (
    DataError,
    DataSet,
    EvalOptions,
    EvalSet,
    ImageList,
    Item,
    TrainSet,
    check_not_empty,
    drawn_gallery,
    rows_by_camera,
    seeded_draw,
)
from datasets.folders import find_images, path_inside, read_ids

log = logging.getLogger(__name__)

VISIBLE_CAMERAS = (1, 2, 4, 5)
INFRARED_CAMERAS = (3, 6)
GALLERY_CAMERAS = {"all": VISIBLE_CAMERAS, "indoor": (1, 2)}
SHOTS = {1: "single-shot", 10: "ten-shot"}
PROTOCOLS = {
    f"{mode} {shots} {gallery}": {"mode": mode, "gallery": gallery, "shots": shots}
    for mode, shots, gallery in product(GALLERY_CAMERAS, SHOTS, ("seeded", "official"))
}
OFFICIAL_DRAW = "exp/rand_perm_cam.mat"
MAT_COMPRESSED = 15  # the type of a compressed variable in a .mat file
OFFICIAL_DRAW_LIMIT = 16 * 2**20  # bytes, also unpacked; the data set's own file has about 1 MB
OFFICIAL_HELP = (
    "expected the variable rand_perm_cam, 6 x 1 cells (cameras) of cells (identities) of"
    " trials x images matrices, from the data set authors' evaluation repository"
    " (https://github.com/wuancong/SYSU-MM01); --gallery seeded needs no such file"
)


class Sysu(DataSet):
    """SYSU-MM01: infrared queries (cameras 3, 6) against visible galleries, over several draws.

    Training lists are identity-major, then camera, then file name; labels are the sorted training
    and validation pids renumbered from 0. Queries: all of camera 3, then all of camera 6.

    Galleries are drawn by `seeded_draw`, or as the data set's authors drew them, `_official_draw`.
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
    has_stand_in = True
    # The MG-MRA release itself keeps w_center 2.0 with smoothing; the authors' later README says
    # 0.01 for the rate.
    preset = {
        "batch_size": 6,
        "num_pos": 8,
        "gem_p": 3.0,
        "w_center": 1.0,
        "label_smooth": "off",
    }
    preset_source = "HCT's README for SYSU-MM01, rate of the first MG-MRA README"
    gallery_draws = 10
    protocols = PROTOCOLS
    expected = {
        "train": (395, 22258, 11909),
        "test": (96, 6775, 3803),
    } | {
        key: (3803, {"all": 301, "indoor": 112}[options["mode"]] * options["shots"])
        for key, options in PROTOCOLS.items()
    }

    def describe(self, options: EvalOptions) -> str:
        """Returns a protocol in words, without data set, split and number of draws."""
        return f"{options.mode}-search, {SHOTS[options.shots]}, {options.gallery} gallery"

    def items(self, root: Path, role: str, trial: int) -> tuple[list[Item], list[Item]]:
        """Lists the images of the "train" (validation included), "val" or "test" identities."""
        pids = _train_pids(root) if role == "train" else sorted(read_ids(root, _ids(role)))
        found = []
        for modality, cameras in (("visible", VISIBLE_CAMERAS), ("infrared", INFRARED_CAMERAS)):
            found.append(find_images(root, pids, cameras, "cam{camera}/{pid:04d}"))
            lacking = sorted(set(pids) - {pid for _, pid, _ in found[-1]})
            if lacking and role == "train":
                places = ", ".join(f"cam{camera}/{lacking[0]:04d}/" for camera in cameras)
                raise DataError(
                    f"training identity {lacking[0]} has no {modality} image: none in {places} of"
                    f" {root}; expected images in both modalities"
                )
        return found[0], found[1]

    def held_out(self, root: Path, pids: np.ndarray) -> np.ndarray:
        """Returns which training labels, (L,) bool, are the data set's validation identities."""
        return np.isin(pids, list(read_ids(root, _ids("val"))))

    def evaluate(self, root: Path, options: EvalOptions) -> EvalSet:
        """Makes the infrared images the queries and draws the galleries from the visible ones."""
        cameras = GALLERY_CAMERAS[options.mode]
        visible, infrared = self.images(root, options.subset, 1)
        query = infrared.take(np.argsort(infrared.camids, kind="stable"))
        gallery = visible.take(np.flatnonzero(np.isin(visible.camids, cameras)))
        places = ", ".join(f"cam{camera}/" for camera in cameras)
        people = f"the identities in {_ids(options.subset)} (mode {options.mode}: queries in"
        people += f" cam3/, cam6/, gallery in {places})"
        check_not_empty(query, gallery, people)
        trials, shots = range(options.trials), options.shots
        if options.gallery == "seeded":
            draws = [seeded_draw(gallery, trial, shots) for trial in trials]
        else:
            cells = _read_official_draw(root)
            draws = [_official_draw(cells, gallery, trial, shots) for trial in trials]
        protocol = f"{self.describe(options)}, {len(draws)} trial{'s' * (len(draws) > 1)}"
        protocol += ", validation identities" if options.subset == "val" else ""
        return EvalSet(self.name, query, *drawn_gallery(gallery, draws), "sysu", protocol)

    def train_from_cache(self, path: Path, size: tuple[int, int] | None = None) -> TrainSet | None:
        """Takes `train_{rgb,ir}_resized_{img,label}.npy` where all four exist, of this size."""
        files = [*cache_files(path, "visible"), *cache_files(path, "infrared")]
        found = [file.name for file in files if file.exists()]
        if found and len(found) < len(files):
            log.warning("%s has only %s of the four caches; taking the jpgs", path, found)
        if len(found) < len(files):
            beside = os.path.abspath(path)  # AGW's and HCT's pre-processing forgets the slash
            moves = [
                shlex.join(("mv", beside + file.name, str(file)))
                for file in files
                if os.path.exists(beside + file.name) and not file.exists()
            ]
            if moves:
                log.warning(
                    "caches of an earlier release lie beside %s, not in it; to use them: %s",
                    *(path, "; ".join(moves)),
                )
            return None
        root = path.resolve()
        cached = [_cached_labels(root, modality) for modality in ("visible", "infrared")]
        labels, sizes = zip(*cached, strict=True)
        found = " and ".join(f"{height} x {width}" for height, width in dict.fromkeys(sizes))
        if size and set(sizes) != {size}:
            text = "the caches in %s are %s, --img_h x --img_w is %d x %d: taking the jpgs"
            log.warning(text, path, found, *size)
            return None
        # Caches without the rest of the data set are enough to train on.
        known = _train_pids(root) if (root / "exp").is_dir() else range(labels[0].max() + 1)
        pids = np.array(known, dtype=np.int64)
        lists = []
        for modality, own in zip(("visible", "infrared"), labels, strict=True):
            file, values = cache_files(root, modality)[0], np.unique(own)
            if not np.array_equal(values, np.arange(len(pids))):
                raise DataError(
                    f"the labels beside {file} are {len(values)} values in"
                    f" {values[0]}..{values[-1]}; expected each of 0..{len(pids) - 1}, the training"
                    f" identities. {_rebuild(root)}"
                )
            unknown = np.full(len(own), -1, np.int64)
            lists.append(ImageList(root, (), pids[own], unknown, modality, cache=file))
        return TrainSet(*lists, *labels, pids, f"{self.title} (caches, {found})")


def _ids(role: str) -> str:
    return f"exp/{role}_id.txt"


def _train_pids(root: Path) -> list[int]:
    """Returns the sorted training and validation identities; no test identity is among them."""
    roles = ("train", "val", "test") if (root / _ids("test")).exists() else ("train", "val")
    ids = {role: read_ids(root, _ids(role)) for role in roles}
    for one, other in combinations(roles, 2):
        shared = ids[one] & ids[other]
        if shared:
            raise DataError(
                f"identity {min(shared)} is in {_ids(one)} and in {_ids(other)} of {root}; expected"
                " lists that share none"
            )
    return sorted(ids["train"] | ids["val"])


def _read_official_draw(root: Path) -> dict[int, np.ndarray]:
    """Reads the authors' permutations: by camera, an identity's (trials, n) 1-based numbers."""
    file = root / OFFICIAL_DRAW
    real = path_inside(root, OFFICIAL_DRAW)
    if not os.path.isfile(real):
        raise DataError(f"{file} does not exist; {OFFICIAL_HELP}")
    try:
        if os.path.getsize(real) > OFFICIAL_DRAW_LIMIT:  # before scipy takes memory for it
            raise ValueError(f"{os.path.getsize(real)} bytes, over {OFFICIAL_DRAW_LIMIT}")
        _check_unpacked(Path(real).read_bytes())
        cells = loadmat(real, variable_names=["rand_perm_cam"])["rand_perm_cam"].ravel()
        return {camera: np.ravel(cells[camera - 1]) for camera in VISIBLE_CAMERAS}
    except Exception as error:  # a damaged file makes scipy raise nearly anything
        raise DataError(f"{file} cannot be read ({error!r}); {OFFICIAL_HELP}") from error


def _check_unpacked(data: bytes) -> None:
    """Raises ValueError where a .mat file's variables are too large once they are unpacked."""
    order = "<" if data[126:128] == b"IM" else ">"
    at, left = 128, OFFICIAL_DRAW_LIMIT
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        at += 8
        if kind == MAT_COMPRESSED:
            left -= len(zlib.decompressobj().decompress(data[at : at + size], left + 1))
            if left < 0:
                raise ValueError(f"over {OFFICIAL_DRAW_LIMIT} bytes unpacked")
        at += size


def _official_draw(
    cells: dict[int, np.ndarray], gallery: ImageList, trial: int, shots: int
) -> list[int]:
    """Returns the first `shots` entries of each permutation's row `trial`: 1-based sorted files.

    Cameras ascend, within a camera identities, within these the order is the permutation's.

    Source: the data set authors' evaluation.
    """
    drawn: list[int] = []
    groups = rows_by_camera(gallery)
    for pid, camera in sorted(groups, key=lambda pair: pair[::-1]):
        rows = groups[pid, camera]
        matrix = np.asarray(cells[camera][pid - 1] if 1 <= pid <= len(cells[camera]) else None)
        order = matrix[trial] if matrix.ndim == 2 and len(matrix) > trial else np.zeros(0)
        count, different = min(shots, len(rows)), set(order.tolist())
        legal = order.dtype.kind in "iuf" and different <= set(range(1, len(rows) + 1))
        if not (legal and len(order) == len(different) >= count):
            raise DataError(
                f"{gallery.root / OFFICIAL_DRAW} has {order[:12].tolist()} for camera {camera},"
                f" identity {pid}, trial {trial + 1}; expected at least {count} different numbers"
                f" in 1..{len(rows)}, the images in {gallery.root}/cam{camera}/{pid:04d};"
                f" {OFFICIAL_HELP}"
            )
        drawn += [rows[int(number) - 1] for number in order[:count]]
    return drawn


def cache_files(folder: Path, modality: str) -> tuple[Path, Path]:
    """Returns where one modality's cache is: its images' file and its labels'."""
    stem = f"train_{'rgb' if modality == 'visible' else 'ir'}_resized"
    return folder / f"{stem}_img.npy", folder / f"{stem}_label.npy"


def _cached_labels(root: Path, modality: str) -> tuple[np.ndarray, tuple[int, int]]:
    """Checks one modality's cache; returns its (n,) int64 labels and its images' height and width.

    Caches may be links to faster storage: no list names them, and loading runs nothing in them.
    """
    files = cache_files(root, modality)
    where = f"{root}/{' or '.join(file.name for file in files)}"
    try:
        pixels, labels = (np.load(file, mmap_mode="r", allow_pickle=False) for file in files)
    except Exception as error:  # a damaged header makes numpy raise nearly anything
        raise DataError(f"{where} cannot be read ({error}). {_rebuild(root)}") from error
    sized = pixels.ndim == 4 and pixels.shape[3] == 3 and labels.shape == pixels.shape[:1]
    if not sized or not labels.size or pixels.dtype != np.uint8 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where} is wrong: {pixels.dtype} {pixels.shape} and {labels.dtype} {labels.shape};"
            f" expected uint8 (n, H, W, 3) and integers (n,), n > 0. {_rebuild(root)}"
        )
    return np.asarray(labels, dtype=np.int64), pixels.shape[1:3]


def _rebuild(root: Path) -> str:
    return f"Rebuild: python pre_process_sysu.py --data-path {root} --overwrite"
