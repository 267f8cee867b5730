"""SYSU-MM01: its layout, training lists, caches, and gallery draws, the authors' own included."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
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
    groups_by_camera,
    image_list,
    seeded_draw,
)
from datasets.folders import find_images, path_inside, read_ids

log = logging.getLogger(__name__)

VISIBLE_CAMERAS = (1, 2, 4, 5)
INFRARED_CAMERAS = (3, 6)
GALLERY_CAMERAS = {"all": VISIBLE_CAMERAS, "indoor": (1, 2)}
SHOTS = {1: "single-shot", 10: "ten-shot"}
# By role: identities; identities at cameras 1..6; images at cameras 1..6.
COUNTS = {
    "train": (296, (194, 195, 293, 283, 294, 200), (4721, 5753, 5929, 4821, 4989, 4000)),
    "val": (99, (0, 0, 99, 99, 96, 0), (0, 0, 1980, 990, 984, 0)),
    "test": (96, (56, 56, 93, 94, 95, 96), (1374, 1565, 1883, 1918, 1918, 1920)),
}
PROTOCOLS = {
    f"{mode} {shots} {gallery}": {"mode": mode, "shots": shots, "gallery": gallery}
    for mode, shots, gallery in product(GALLERY_CAMERAS, SHOTS, ("seeded", "official"))
}
OFFICIAL_DRAW = "exp/rand_perm_cam.mat"
OFFICIAL_DRAW_LIMIT = 16 * 2**20  # bytes; the data set's own file has about 1 MB
CACHE_COMMAND = "python pre_process_sysu.py --data-path {} --overwrite"
CACHE_WORDS = {"visible": "rgb", "infrared": "ir"}
CACHE_KINDS = ("img", "label")
OFFICIAL_HELP = (
    "expected the variable rand_perm_cam, 6 x 1 cells (cameras) of cells (identities) of"
    " trials x images matrices, from the data set authors' evaluation repository"
    " (https://github.com/wuancong/SYSU-MM01); --gallery seeded needs no such file"
)


def _expected_counts() -> dict[str, tuple[int, ...]]:
    """Returns the counts that follow from `COUNTS`, as `DataSet.expected` has them."""

    def images(cameras: Sequence[int], *roles: str) -> int:
        return sum(COUNTS[role][2][camera - 1] for role, camera in product(roles, cameras))

    learned, cameras = ("train", "val"), (VISIBLE_CAMERAS, INFRARED_CAMERAS)
    expected = {
        "train": (
            sum(COUNTS[role][0] for role in learned),
            *(images(c, *learned) for c in cameras),
        ),
        "val": (COUNTS["val"][0],),
        "test": (COUNTS["test"][0], *(images(c, "test") for c in cameras)),
    }
    _, ids_at, images_at = COUNTS["test"]
    for camera in range(1, 7):
        modality = "visible" if camera in VISIBLE_CAMERAS else "infrared"
        numbers = (ids_at[camera - 1], images_at[camera - 1])
        expected[f"test {modality}, camera {camera}"] = numbers
    for key, options in PROTOCOLS.items():
        drawn = sum(ids_at[camera - 1] for camera in GALLERY_CAMERAS[options["mode"]])
        expected[key] = (images(INFRARED_CAMERAS, "test"), drawn * options["shots"])
    return expected


class Sysu(DataSet):
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
    expected = _expected_counts()

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

    def train(self, root: Path, trial: int) -> TrainSet:
        """Lists the training images; labels number the identities in ascending order."""
        return replace(super().train(root, trial), description=f"{self.title} (jpgs)")

    def held_out(self, root: Path, pids: np.ndarray) -> np.ndarray:
        """Returns which training labels, (L,) bool, are the data set's validation identities."""
        return np.isin(pids, sorted(read_ids(root, _ids("val"))))

    def evaluate(self, root: Path, options: EvalOptions) -> EvalSet:
        """Makes the infrared images the queries and draws the galleries from the visible ones."""
        cameras = GALLERY_CAMERAS[options.mode]
        visible, infrared = self.items(root, options.subset, 1)
        visible = [item for item in visible if item[2] in cameras]
        query = image_list(root, sorted(infrared, key=lambda item: item[2]), "infrared")
        places = [", ".join(f"cam{c}/" for c in each) for each in (INFRARED_CAMERAS, cameras)]
        people = f"the identities in {_ids(options.subset)} (mode {options.mode}: queries in"
        people += f" {places[0]}, gallery in {places[1]})"
        check_not_empty(query, image_list(root, visible, "visible"), people)
        trials = range(options.trials)
        if options.gallery == "seeded":
            draws = [seeded_draw(visible, trial, options.shots) for trial in trials]
        else:
            cells = _read_official_draw(root)
            draws = [_official_draw(root, cells, visible, t, options.shots) for t in trials]
        protocol = f"{self.describe(options)}, {len(draws)} trials"
        protocol += ", validation identities" if options.subset == "val" else ""
        return EvalSet(self.name, query, *drawn_gallery(root, draws, "visible"), "sysu", protocol)

    def train_from_cache(self, path: Path) -> TrainSet | None:
        """Takes `train_{rgb,ir}_resized_{img,label}.npy` where all four exist."""
        names = [
            f"train_{w}_resized_{k}.npy" for w, k in product(CACHE_WORDS.values(), CACHE_KINDS)
        ]
        found = [name for name in names if (path / name).exists()]
        if found and len(found) < len(names):
            log.warning("%s has only %s of the four caches; taking the jpgs", path, found)
        if len(found) < len(names):
            return None
        root = path.resolve()
        labels = {modality: _cached_labels(root, word) for modality, word in CACHE_WORDS.items()}
        # Caches without the rest of the data set are enough to train on.
        known = (root / "exp").is_dir()
        most = labels["visible"].max() + 1
        pids = np.array(_train_pids(root) if known else range(most), dtype=np.int64)
        lists = []
        for modality, values in labels.items():
            file = root / f"train_{CACHE_WORDS[modality]}_resized_img.npy"
            command = CACHE_COMMAND.format(root)
            found = np.unique(values)
            if not np.array_equal(found, np.arange(len(pids))):
                raise DataError(
                    f"the labels beside {file} are {len(found)} values in {found[0]}..{found[-1]};"
                    f" expected each of 0..{len(pids) - 1}, the training identities. Rebuild:"
                    f" {command}"
                )
            unknown = np.full(len(values), -1, np.int64)
            images = ImageList(root, (), pids[values], unknown, modality)
            lists.append(replace(images, cache=file, cache_command=command))
        return TrainSet(self.name, *lists, *labels.values(), pids, f"{self.title} (caches)")


def _ids(role: str) -> str:
    return f"exp/{role}_id.txt"


def _train_pids(root: Path) -> list[int]:
    """Returns the sorted training and validation identities; no test identity is among them."""
    ids = {role: read_ids(root, _ids(role)) for role in ("train", "val")}
    if (root / _ids("test")).exists():
        ids["test"] = read_ids(root, _ids("test"))
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = ids[one] & ids.get(other, set())
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
        size = os.path.getsize(real)
        if size > OFFICIAL_DRAW_LIMIT:
            raise ValueError(f"{size} bytes, over {OFFICIAL_DRAW_LIMIT}")
        cells = loadmat(real, variable_names=["rand_perm_cam"])["rand_perm_cam"].ravel()
        return {camera: np.ravel(cells[camera - 1]) for camera in VISIBLE_CAMERAS}
    except Exception as error:  # a damaged file makes scipy raise nearly anything
        raise DataError(f"{file} cannot be read ({error!r}); {OFFICIAL_HELP}") from error


def _official_draw(
    root: Path, cells: dict[int, np.ndarray], items: Sequence[Item], trial: int, shots: int
) -> list[Item]:
    """Draws one of the authors' galleries: cameras ascending, within each identities ascending."""
    drawn: list[Item] = []
    groups = groups_by_camera(items)
    for pid, camera in sorted(groups, key=lambda pair: pair[::-1]):
        group = groups[pid, camera]
        cell = cells[camera][pid - 1] if 1 <= pid <= len(cells[camera]) else None
        matrix, count = np.asarray(cell), min(shots, len(group))
        row = matrix[trial] if matrix.ndim == 2 and len(matrix) > trial else np.zeros(0)
        legal = row.dtype.kind in "iuf" and set(row.tolist()) <= set(range(1, len(group) + 1))
        if not legal or len(row) < count or len(np.unique(row)) < len(row):
            raise DataError(
                f"{root / OFFICIAL_DRAW} has {row[:12].tolist()} for camera {camera}, identity"
                f" {pid}, trial {trial + 1}; expected at least {count} different numbers in"
                f" 1..{len(group)}, the images in {root}/cam{camera}/{pid:04d}; {OFFICIAL_HELP}"
            )
        drawn += [group[int(number) - 1] for number in row[:count]]
    return drawn


def _cached_labels(root: Path, word: str) -> np.ndarray:
    """Checks one modality's cache; returns its (n,) int64 labels.

    Caches may be links to faster storage: no list names them, and loading runs nothing in them.
    """
    files = [f"train_{word}_resized_{kind}.npy" for kind in CACHE_KINDS]
    where, rebuild = f"{root}/{' or '.join(files)}", f"Rebuild: {CACHE_COMMAND.format(root)}"
    try:
        pixels, labels = (np.load(root / name, mmap_mode="r", allow_pickle=False) for name in files)
    except Exception as error:  # a damaged header makes numpy raise nearly anything
        raise DataError(f"{where} cannot be read ({error}). {rebuild}") from error
    sized = pixels.ndim == 4 and pixels.shape[3] == 3 and labels.shape == pixels.shape[:1]
    if not sized or not labels.size or pixels.dtype != np.uint8 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where} is wrong: {pixels.dtype} {pixels.shape} and {labels.dtype} {labels.shape};"
            f" expected uint8 (n, H, W, 3) and integers (n,), n > 0. {rebuild}"
        )
    return np.asarray(labels, dtype=np.int64)
