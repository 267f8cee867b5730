"""What `stand_in.py` draws and writes: its settings, and each layout's images and lists."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, default_rng
from scipy.io import savemat

from datasets.llcm import CAMERAS as LLCM_CAMERAS
from datasets.pedestrians import LLCM_INFRARED, make_person

SIZES = {"regdb": (128, 64), "sysu": (160, 72), "llcm": (160, 72)}  # default height and width
SEEN_EVERYWHERE = 0.6  # share of SYSU's identities
LLCM_SEEN_BY = 4  # cameras that see an identity
# The last word of (seed, 0, 0, stream): one stream of random numbers for each purpose.
REGDB_SPLITS, SYSU_ROLES, SYSU_CAMERAS, LLCM_ROLES = range(1, 5)


@dataclass
class Settings:
    """Everything the written files depend on: the flags of ``stand_in.py``."""

    layout: str  # a key of `SIZES`
    train_ids: int = 150
    test_ids: int = 40
    images_per_id: int = 10  # per modality (RegDB, LLCM), per camera that sees it (SYSU)
    seed: int = 0
    trials: int = 10  # RegDB's splits, SYSU's official gallery draws
    img_h: int | None = None  # largest height, pixels; None becomes the layout's
    img_w: int | None = None  # largest width
    val_ids: int = field(default=0, init=False)  # SYSU's, a quarter of those to train on

    def __post_init__(self) -> None:
        height, width = SIZES[self.layout]
        self.img_h, self.img_w = self.img_h or height, self.img_w or width
        if self.layout == "sysu":
            if self.train_ids < 2:
                raise ValueError("--train-ids 1: SYSU's layout takes 2, one of them for validation")
            self.val_ids = max(1, round(self.train_ids / 4))


class Drawing(NamedTuple):
    """An image to write: its path in the folder, the camera, and its number there from 1 on."""

    path: str
    camera: int
    number: int


Drawings = dict[int, list[Drawing]]  # of each identity
Lists = dict[str, bytes]  # the other files' contents, by their names


def _roles(settings: Settings, rng: Generator) -> list[tuple[str, list[int]]]:
    """Returns "train", "val" (SYSU only) and "test", each with its identities, ascending."""
    order = rng.permutation(settings.train_ids + settings.test_ids) + 1
    cuts = [settings.train_ids - settings.val_ids, settings.train_ids]
    groups = zip(("train", "val", "test"), np.split(order, cuts), strict=True)
    return [(role, sorted(pids.tolist())) for role, pids in groups if pids.size]


def _numbered(pids: list[int], drawings: Drawings, part_of_path: str) -> bytes:
    """Returns a list: each image whose path has a part, and its identity's number from 0."""
    images = [(d.path, n) for n, pid in enumerate(pids) for d in drawings[pid]]
    return "".join(f"{path} {n}\n" for path, n in images if part_of_path in path).encode()


def regdb(settings: Settings) -> tuple[Drawings, Lists]:
    """Each trial's idx lists split the identities anew."""
    drawings, lists = defaultdict(list), {}
    for pid in range(1, settings.train_ids + settings.test_ids + 1):
        style = make_person(settings.seed, pid).style
        for camera, folder in ((1, "Visible"), (2, "Thermal")):
            start = default_rng((settings.seed, pid, camera)).integers(1, 90_000)
            name = f"{folder}/{pid}/{style['gender']}_{style['view']}_{folder[0].lower()}"
            drawings[pid] += [
                Drawing(f"{name}_{start + 7 * number:05d}_{pid}.bmp", camera, number)
                for number in range(1, settings.images_per_id + 1)
            ]
    rng = default_rng((settings.seed, 0, 0, REGDB_SPLITS))
    for trial in range(1, settings.trials + 1):
        for role, pids in _roles(settings, rng):
            for folder in ("Visible", "Thermal"):
                name = f"idx/{role}_{folder.lower()}_{trial}.txt"
                lists[name] = _numbered(pids, drawings, f"{folder}/")
    return drawings, lists


def sysu(settings: Settings) -> tuple[Drawings, Lists]:
    """Cameras 3, 4 and 5 see everybody; 1, 2 and 6 only some, about as in the real data."""
    drawings, lists = {}, {}
    rng = default_rng((settings.seed, 0, 0, SYSU_CAMERAS))
    for role, pids in _roles(settings, default_rng((settings.seed, 0, 0, SYSU_ROLES))):
        lists[f"exp/{role}_id.txt"] = f"{','.join(map(str, pids))}\n".encode()
        everywhere = rng.permutation(pids)[: math.ceil(SEEN_EVERYWHERE * len(pids))]
        for pid in pids:
            drawings[pid] = [
                Drawing(f"cam{camera}/{pid:04d}/{number:04d}.jpg", camera, number)
                for camera in (range(1, 7) if pid in everywhere else (3, 4, 5))
                for number in range(1, settings.images_per_id + 1)
            ]
    buffer = BytesIO()
    savemat(buffer, {"rand_perm_cam": _rand_perm_cam(settings, drawings)})
    header = b"MATLAB 5.0 MAT-file, stand-in data".ljust(116)  # scipy's own holds the time of day
    lists["exp/rand_perm_cam.mat"] = header + buffer.getvalue()[len(header) :]
    return drawings, lists


def _rand_perm_cam(settings: Settings, drawings: Drawings) -> np.ndarray:
    """Returns the official gallery draws: cells (cameras) of cells (identities) of (trials, n)."""
    cameras = np.empty((6, 1), object)
    for camera in range(1, 7):
        cameras[camera - 1, 0] = cell = np.empty((len(drawings), 1), object)
        for pid, own in drawings.items():
            count = sum(drawing.camera == camera for drawing in own)
            rng = default_rng((settings.seed, pid, camera, 0, 1))
            rows = np.tile(np.arange(1.0, count + 1), (settings.trials if count else 0, 1))
            cell[pid - 1, 0] = rng.permuted(rows, axis=1)
    return cameras


def llcm(settings: Settings) -> tuple[Drawings, Lists]:
    """A few cameras see each identity, in turn; visible and infrared begin with another one."""
    drawings, lists = defaultdict(list), {}
    for role, pids in _roles(settings, default_rng((settings.seed, 0, 0, LLCM_ROLES))):
        for pid in pids:
            rng = default_rng((settings.seed, pid, 0, 4))
            seen = rng.permutation(LLCM_CAMERAS["nir"])[:LLCM_SEEN_BY]
            cameras = {"vis": seen, "nir": np.roll(seen, 1)}
            if rng.random() < 0.5:
                cameras["vis"][-1] = 3  # the camera without infrared images
            for word, own in cameras.items():
                in_turn = np.resize(own, settings.images_per_id).tolist()  # repeats the cameras
                for number, camera in enumerate(in_turn, start=1):
                    folder = f"test_{word}/cam{camera}" if role == "test" else word
                    path = f"{folder}/{pid:04d}/{pid:04d}_c{camera:02d}_{number:04d}_{word}.jpg"
                    look = camera + (LLCM_INFRARED if word == "nir" else 0)
                    drawings[pid].append(Drawing(path, look, number))
        lists[f"idx/{role}_id.txt"] = f"{','.join(map(str, pids))}\n".encode()
        for word in LLCM_CAMERAS:
            lists[f"idx/{role}_{word}.txt"] = _numbered(pids, drawings, f"_{word}.jpg")
    return drawings, lists


LAYOUTS = {"regdb": regdb, "sysu": sysu, "llcm": llcm}  # all images and lists of each
