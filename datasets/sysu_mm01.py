"""SYSU-MM01: its layout, training lists, caches, and gallery draws, the authors' own included."""

import logging
from functools import partial
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
OFFICIAL_DRAW_LIMIT = 16 * 2**20  # bytes; the data set's own file has about 1 MB
OFFICIAL_HELP = (
    "expected the variable rand_perm_cam, 6 x 1 cells (cameras) of cells (identities) of"
    " trials x images matrices, from the data set authors' evaluation repository"
    " (https://github.com/wuancong/SYSU-MM01); --gallery seeded needs no such file"
)


class Sysu(DataSet):
    """SYSU-MM01: infrared queries (cameras 3, 6) against visible galleries, over several draws.

    Training lists are identity-major, then camera, then file name; labels are the sorted training
    and validation pids renumbered from 0. Queries: all of camera 3, then all of camera 6.
    """

    name = "sysu"
    title = "SYSU-MM01"
    folders = ("exp", "cam1", "cam2", "cam3", "cam4", "cam5", "cam6")
    how_to_get = (
        "SYSU-MM01 is given out by its authors against a signed form"
        " (http://isee.sysu.edu.cn/project/RGBIRReID.htm)."
    )
    lists_hint = "exp/ is part of the data set's download; put it beside cam1/"
    has_stand_in = True
    preset = {"batch_size": 6, "num_pos": 8, "gem_p": 3.0, "w_center": 1.0, "label_smooth": "off"}
    preset_source = "HCT's README for SYSU-MM01, rate of the first MG-MRA README"
    gallery_draws = 10
    protocols = PROTOCOLS
    expected = {"train": (395, 22258, 11909), "test": (96, 6775, 3803)} | {
        key: (3803, {"all": 301, "indoor": 112}[options["mode"]] * options["shots"])
        for key, options in PROTOCOLS.items()
    }

    def describe(self, options: EvalOptions) -> str:
        """Returns a protocol in words, without data set, split and number of draws."""
        return f"{options.mode}-search, {SHOTS[options.shots]}, {options.gallery} gallery"

    def items(self, root: Path, role: str, trial: int) -> tuple[list[Item], list[Item]]:
        """Lists the images of the "train" (validation included), "val" or "test" identities."""
        pids = _train_pids(root) if role == "train" else sorted(_read_ids(root, role))
        found = {}
        for modality, cameras in (("visible", VISIBLE_CAMERAS), ("infrared", INFRARED_CAMERAS)):
            found[modality] = find_images(root, pids, cameras, "cam")
            lacking = set(pids) - {pid for _, pid, _ in found[modality]}
            if role == "train" and lacking:
                raise DataError(
                    f"training identity {min(lacking)} has no {modality} image in the cameras"
                    f" {cameras} of {root}; expected images in both modalities"
                )
        return found["visible"], found["infrared"]

    def held_out(self, root: Path, pids: np.ndarray) -> np.ndarray:
        """Returns which training labels, (L,) bool, are the data set's validation identities."""
        return np.isin(pids, list(_read_ids(root, "val")))

    def evaluate(self, root: Path, options: EvalOptions) -> EvalSet:
        """Makes the infrared images the queries and draws the galleries from the visible ones."""
        cameras = GALLERY_CAMERAS[options.mode]
        visible, infrared = self.images(root, options.subset, 1)
        query = infrared.take(np.argsort(infrared.camids, kind="stable"))
        gallery = visible.take(np.flatnonzero(np.isin(visible.camids, cameras)))
        draw = seeded_draw
        if options.gallery == "official":
            draw = partial(_official_draw, _read_official_draw(root))
        draws = [draw(gallery, trial, options.shots) for trial in range(options.trials)]
        protocol = f"{self.describe(options)}, {len(draws)} trial{'s' * (len(draws) > 1)}"
        protocol += ", validation identities" if options.subset == "val" else ""
        return EvalSet(self.name, query, *drawn_gallery(gallery, draws), "sysu", protocol)

    def train_from_cache(self, path: Path, size: tuple[int, int] | None = None) -> TrainSet | None:
        """Takes `train_{rgb,ir}_resized_{img,label}.npy` where all four exist, of this size."""
        files = [*cache_files(path, "visible"), *cache_files(path, "infrared")]
        missing = [file for file in files if not file.exists()]
        for file in missing:
            beside = Path(f"{path.absolute()}{file.name}")  # AGW's scripts forget the slash
            if beside.exists():
                text = "a cache of an earlier release lies beside %s; to use it: mv '%s' '%s'"
                log.warning(text, path, beside, file)
        if 0 < len(missing) < len(files):
            log.warning("%s has only some of the four caches; taking the jpgs", path)
        if missing:
            return None
        root = path.resolve()
        pids, lists = np.array(_train_pids(root)), []
        for modality in ("visible", "infrared"):
            images = _cached_images(root, modality, pids)
            height, width = images.pixels.shape[1:3]
            if size not in (None, (height, width)):
                text = "the caches in %s are %d x %d, --img_h x --img_w is %d x %d: taking the jpgs"
                log.warning(text, path, height, width, *size)
                return None
            lists.append(images)
        return TrainSet(*lists, pids, f"{self.title} (caches, {height} x {width})")


def _read_ids(root: Path, role: str) -> set[int]:
    return read_ids(root, f"exp/{role}_id.txt")


def _train_pids(root: Path) -> list[int]:
    """Returns the sorted training and validation identities; no test identity is among them."""
    trained = _read_ids(root, "train") | _read_ids(root, "val")
    if (root / "exp/test_id.txt").exists():
        shared = trained & _read_ids(root, "test")
        if shared:
            raise DataError(
                f"identity {min(shared)} is in exp/test_id.txt of {root} and in exp/train_id.txt or"
                " exp/val_id.txt; expected lists that share none"
            )
    return sorted(trained)


def _read_official_draw(root: Path) -> dict[int, np.ndarray]:
    """Reads the authors' permutations: by camera, an identity's (trials, n) 1-based numbers."""
    file = path_inside(root, OFFICIAL_DRAW)
    try:
        if file.stat().st_size > OFFICIAL_DRAW_LIMIT:  # before scipy takes memory for it
            raise ValueError(f"{file.stat().st_size} bytes, over {OFFICIAL_DRAW_LIMIT}")
        cells = loadmat(file, variable_names=["rand_perm_cam"])["rand_perm_cam"].ravel()
        return {camera: cells[camera - 1].ravel() for camera in VISIBLE_CAMERAS}
    except Exception as error:  # a damaged file makes scipy raise nearly anything
        raise DataError(f"{file} cannot be read ({error!r}); {OFFICIAL_HELP}") from error


def _official_draw(
    cells: dict[int, np.ndarray], gallery: ImageList, trial: int, shots: int
) -> list[int]:
    """Takes the first `shots` numbers of each permutation's row `trial`: 1-based sorted files.

    Source: the data set authors' evaluation.
    """
    drawn: list[int] = []
    groups = rows_by_camera(gallery)
    for pid, camera in sorted(groups, key=lambda pair: pair[::-1]):  # by camera, then identity
        rows = groups[pid, camera]
        count = min(shots, len(rows))
        try:
            numbers = cells[camera][pid - 1][trial, :count].tolist()
            legal = set(range(1, len(rows) + 1)).intersection(numbers)
        except (IndexError, TypeError):  # no such identity or trial, or no numbers
            numbers, legal = [], set()
        if len(legal) != count:
            raise DataError(
                f"{gallery.root / OFFICIAL_DRAW} has {numbers} for camera {camera}, identity {pid},"
                f" trial {trial + 1}; expected {count} different numbers in 1..{len(rows)}, the"
                f" images in {gallery.root}/cam{camera}/{pid:04d}; {OFFICIAL_HELP}"
            )
        drawn += [rows[int(number) - 1] for number in numbers]
    return drawn


def cache_files(folder: Path, modality: str) -> tuple[Path, Path]:
    """Returns where one modality's cache is: its images' file and its labels'."""
    stem = f"train_{'rgb' if modality == 'visible' else 'ir'}_resized"
    return folder / f"{stem}_img.npy", folder / f"{stem}_label.npy"


def _cached_images(root: Path, modality: str, pids: np.ndarray) -> ImageList:
    """Maps one modality's cache, whose labels number `pids` (L,); changes are not written to it.

    Its files may be links to faster storage: no list names them, and loading executes nothing.
    """
    files = cache_files(root, modality)
    try:
        pixels, labels = (np.load(file, mmap_mode="c", allow_pickle=False) for file in files)
        if pixels.dtype != np.uint8 or pixels.shape != (*labels.shape, *pixels.shape[1:3], 3):
            raise ValueError(f"{pixels.dtype} {pixels.shape}, labels {labels.shape}")
        if not np.array_equal(np.unique(labels), np.arange(len(pids))):
            raise ValueError(f"labels from {labels.min()} to {labels.max()}")
    except Exception as error:  # a damaged header makes numpy raise nearly anything
        raise DataError(
            f"{files[0]} and {files[1].name} cannot be used: {error}; expected uint8 (n, H, W, 3),"
            f" and integers (n,), all of 0..{len(pids) - 1}, the training identities. Rebuild:"
            f" python pre_process_sysu.py --data-path {root} --overwrite"
        ) from error
    camids = np.full(len(labels), -1)
    return ImageList(root, (), pids[labels.astype(np.int64)], camids, modality, pixels)
