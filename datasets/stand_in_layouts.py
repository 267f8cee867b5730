"""What stand-in data consists of: its settings, and each layout's images and lists.

`stand_in.py` draws the images (`datasets.pedestrians`) and writes the folder.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, field, replace
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from scipy.io import savemat

from datasets.llcm import CAMERAS as LLCM_CAMERAS
from datasets.pedestrians import LLCM_INFRARED, make_person

# Default (height, width), pixels.
SIZES = {"regdb": (128, 64), "sysu": (160, 72), "llcm": (160, 72)}
ROLES = ("train", "test")
SEEN_EVERYWHERE = 0.6  # share of SYSU's identities
LLCM_SEEN_BY = 4  # cameras that see an identity
# The last word of (seed, 0, 0, stream): one stream of random numbers for each purpose.
REGDB_SPLITS, SYSU_ROLES, SYSU_CAMERAS, LLCM_ROLES = range(1, 5)


def _setting(meaning: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"help": meaning})


def flag(name: str) -> str:
    """Returns a setting's flag."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Settings:
    """Everything the written files depend on; each field is a flag, whose `help` explains it."""

    layout: str = _setting("regdb, sysu or llcm")
    train_ids: int = _setting("identities to train on; SYSU: 1/4 of them for validation", 150)
    test_ids: int = _setting("other identities", 40)
    images_per_id: int = _setting("per modality (RegDB, LLCM), per camera that sees it (SYSU)", 10)
    seed: int = _setting("of everything", 0)
    trials: int = _setting("RegDB's splits, SYSU's official gallery draws", 10)
    img_h: int | None = _setting("largest height, pixels; default RegDB 128, others 160", None)
    img_w: int | None = _setting("largest width, pixels; default RegDB 64, others 72", None)

    @property
    def val_ids(self) -> int:
        """SYSU's validation identities."""
        return max(1, round(self.train_ids / 4)) if self.layout == "sysu" else 0

    def resolved(self) -> Settings:
        """Returns these settings with every default filled in.

        Raises:
            ValueError: A value makes no data; names the flag.
        """
        if self.layout not in SIZES:
            raise ValueError(f"--layout {self.layout}: expected one of {', '.join(SIZES)}")
        size = zip(("img_h", "img_w"), SIZES[self.layout], strict=True)
        s = replace(self, **{name: n for name, n in size if getattr(self, name) is None})
        least = {"train_ids": 2 if s.layout == "sysu" else 1, "test_ids": 1, "images_per_id": 1}
        least |= {"seed": 0, "trials": 1, "img_h": 32, "img_w": 16}
        for name, minimum in least.items():
            if getattr(s, name) < minimum:
                raise ValueError(f"{flag(name)} {getattr(s, name)}: expected {minimum} or more")
        splits = math.comb(s.train_ids + s.test_ids, s.train_ids)
        if s.layout == "regdb" and s.trials > splits:
            raise ValueError(
                f"--trials {s.trials}: expected {splits} or fewer, the ways to split"
                f" {s.train_ids} + {s.test_ids} identities"
            )
        return s


class Drawing(NamedTuple):
    """An image to write: its path in the folder, the camera, and its number there from 1 on."""

    path: str
    camera: int
    number: int


Drawings = dict[int, list[Drawing]]  # of each identity


def _roles(settings: Settings, stream: int) -> dict[str, list[int]]:
    """Returns the identities for "train", "val" and "test", each ascending."""
    total = settings.train_ids + settings.test_ids
    order = np.random.default_rng((settings.seed, 0, 0, stream)).permutation(total) + 1
    cuts = [settings.train_ids - settings.val_ids, settings.train_ids]
    groups = zip(("train", "val", "test"), np.split(order, cuts), strict=True)
    return {role: sorted(pids.tolist()) for role, pids in groups}


def _numbered(pids: Iterable[int], drawings: Drawings, part_of_path: str) -> bytes:
    """Returns a list: each image whose path has a part, and its identity's number from 0."""
    images = [(d.path, n) for n, pid in enumerate(sorted(pids)) for d in drawings[pid]]
    return "".join(f"{path} {n}\n" for path, n in images if part_of_path in path).encode()


def _comma_separated(pids: Iterable[int]) -> bytes:
    return (",".join(map(str, pids)) + "\n").encode()


def _regdb_drawings(settings: Settings) -> Drawings:
    drawings: Drawings = defaultdict(list)
    for pid in range(1, settings.train_ids + settings.test_ids + 1):
        style = make_person(settings.seed, pid).style
        for camera, folder in ((1, "Visible"), (2, "Thermal")):
            start = np.random.default_rng((settings.seed, pid, camera)).integers(1, 90_000)
            name = f"{folder}/{pid}/{style['gender']}_{style['view']}_{folder[0].lower()}"
            drawings[pid] += [
                Drawing(f"{name}_{start + 7 * number:05d}_{pid}.bmp", camera, number)
                for number in range(1, settings.images_per_id + 1)
            ]
    return drawings


def _regdb_lists(settings: Settings, drawings: Drawings) -> Iterator[tuple[str, bytes]]:
    """Yields names and contents of the idx lists; each trial splits the identities another way."""
    splits: dict[frozenset[int], None] = {}
    rng = np.random.default_rng((settings.seed, 0, 0, REGDB_SPLITS))
    while len(splits) < settings.trials:
        pids = rng.permutation(len(drawings))[: settings.train_ids] + 1
        splits[frozenset(pids.tolist())] = None
    for trial, train in enumerate(splits, start=1):
        for role, pids in (("train", train), ("test", drawings.keys() - train)):
            for folder in ("Visible", "Thermal"):
                name = f"idx/{role}_{folder.lower()}_{trial}.txt"
                yield name, _numbered(pids, drawings, f"{folder}/")


def _sysu_drawings(settings: Settings) -> Drawings:
    """Cameras 3, 4 and 5 see everybody; 1, 2 and 6 only some, about as in the real data."""
    drawings: Drawings = {}
    rng = np.random.default_rng((settings.seed, 0, 0, SYSU_CAMERAS))
    for pids in _roles(settings, SYSU_ROLES).values():
        everywhere = rng.permutation(pids)[: math.ceil(SEEN_EVERYWHERE * len(pids))]
        for pid in pids:
            drawings[pid] = [
                Drawing(f"cam{camera}/{pid:04d}/{number:04d}.jpg", camera, number)
                for camera in (range(1, 7) if pid in everywhere else (3, 4, 5))
                for number in range(1, settings.images_per_id + 1)
            ]
    return drawings


def _rand_perm_cam(settings: Settings, drawings: Drawings) -> np.ndarray:
    """Returns the official gallery draws: cells (cameras) of cells (identities) of (trials, n)."""
    cameras = np.empty((6, 1), object)
    for camera in range(1, 7):
        cameras[camera - 1, 0] = cell = np.empty((len(drawings), 1), object)
        for pid, own in drawings.items():
            count = sum(drawing.camera == camera for drawing in own)
            rng = np.random.default_rng((settings.seed, pid, camera, 0, 1))
            rows = np.tile(np.arange(1.0, count + 1), (settings.trials if count else 0, 1))
            cell[pid - 1, 0] = rng.permuted(rows, axis=1)
    return cameras


def _sysu_lists(settings: Settings, drawings: Drawings) -> Iterator[tuple[str, bytes]]:
    """Yields names and contents of the identity lists and of the official gallery draws."""
    for role, pids in _roles(settings, SYSU_ROLES).items():
        yield f"exp/{role}_id.txt", _comma_separated(pids)
    buffer = BytesIO()
    savemat(buffer, {"rand_perm_cam": _rand_perm_cam(settings, drawings)})
    header = b"MATLAB 5.0 MAT-file, stand-in data".ljust(116)  # scipy's own holds the time of day
    yield "exp/rand_perm_cam.mat", header + buffer.getvalue()[len(header) :]


def _llcm_drawings(settings: Settings) -> Drawings:
    """A few cameras see each identity, in turn; visible and infrared begin with another one."""
    drawings: Drawings = defaultdict(list)
    for role, pids in _roles(settings, LLCM_ROLES).items():
        for modality, word in enumerate(LLCM_CAMERAS):
            for pid in pids:
                rng = np.random.default_rng((settings.seed, pid, 0, 4))
                seen = np.roll(rng.permutation(LLCM_CAMERAS["nir"])[:LLCM_SEEN_BY], modality)
                if word == "vis" and rng.random() < 0.5:
                    seen[-1] = 3  # the camera without infrared images
                for number in range(1, settings.images_per_id + 1):
                    camera = int(seen[(number - 1) % len(seen)])
                    folder = f"test_{word}/cam{camera}" if role == "test" else word
                    path = f"{folder}/{pid:04d}/{pid:04d}_c{camera:02d}_{number:04d}_{word}.jpg"
                    look = camera + modality * LLCM_INFRARED
                    drawings[pid].append(Drawing(path, look, number))
    return drawings


def _llcm_lists(settings: Settings, drawings: Drawings) -> Iterator[tuple[str, bytes]]:
    """Yields names and contents of the idx lists; test lists number the test identities from 0."""
    roles = _roles(settings, LLCM_ROLES)
    for role in ROLES:
        for word in LLCM_CAMERAS:
            yield f"idx/{role}_{word}.txt", _numbered(roles[role], drawings, f"_{word}.jpg")
        yield f"idx/{role}_id.txt", _comma_separated(roles[role])


DRAWINGS = {"regdb": _regdb_drawings, "sysu": _sysu_drawings, "llcm": _llcm_drawings}
LISTS = {"regdb": _regdb_lists, "sysu": _sysu_lists, "llcm": _llcm_lists}
