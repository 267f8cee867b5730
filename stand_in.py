"""Stand-in data: procedural pedestrians in the layouts of RegDB, SYSU-MM01 and LLCM.

None of the data sets may be redistributed, so tests, demo and benchmarks run on these drawings. An
identity is a structure (body, hair, patterned garments, things carried) that shows in both
modalities; its colours do not. A finished folder holds `stand_in.json`, which the real data lack.

    python stand_in.py --layout regdb --out data/regdb --train-ids 150 --test-ids 40 --seed 0
    python stand_in.py --layout sysu --out data/sysu --full
    python stand_in.py --layout llcm --out data/llcm --train-ids 60 --test-ids 20 --images-per-id 8
    python stand_in.py --layout regdb --sheet sheet.png
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.io import savemat
from tqdm import tqdm

from datasets.pedestrians import LLCM_INFRARED, camera_look, make_person, render

logger = logging.getLogger(__name__)

MARKER = "stand_in.json"
# Default (height, width), pixels.
SIZES = {"regdb": (128, 64), "sysu": (160, 72), "llcm": (160, 72)}
FULL = {
    "regdb": {"train_ids": 206, "test_ids": 206, "images_per_id": 10},
    "sysu": {"train_ids": 395, "val_ids": 99, "test_ids": 96, "images_per_id": 20},
    "llcm": {"train_ids": 713, "test_ids": 351, "images_per_id": 22},
}
# Identities, then identities and images at cameras 1..6, of the real SYSU-MM01 by role: the full
# layout has just these, smaller ones keep the proportions.
SYSU_COUNTS = {
    "train": (296, (194, 195, 293, 283, 294, 200), (4721, 5753, 5929, 4821, 4989, 4000)),
    "val": (99, (0, 0, 99, 99, 96, 0), (0, 0, 1980, 990, 984, 0)),
    "test": (96, (56, 56, 93, 94, 95, 96), (1374, 1565, 1883, 1918, 1918, 1920)),
}

LLCM_IMAGES = {"vis": 16946, "nir": 13975}  # of the real LLCM's training identities
LLCM_CAMERAS = {"vis": range(1, 10), "nir": (1, 2, 4, 5, 6, 7, 8, 9)}
LLCM_SEEN_BY = 4  # cameras that see an identity
SHEET_CAMERAS = {  # of the columns of a contact sheet, visible first
    "regdb": (1, 1, 1, 1, 2, 2, 2, 2),
    "sysu": (1, 2, 4, 5, 3, 3, 6, 6),
    "llcm": (1, 2, 4, 5, 11, 12, 14, 15),
}

# --------------------------------------------------------------------------------------- layouts


def _setting(meaning: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Settings:
    """Everything the written files depend on, kept by the finished folder in its marker.

    Each field is a flag as well; its `help` says what it means. None: see `resolved`.
    """

    layout: str = _setting("regdb, sysu or llcm")
    train_ids: int = _setting("identities to train on, SYSU's validation ones included", 150)
    test_ids: int = _setting("other identities", 40)
    images_per_id: int = _setting("per modality (RegDB, LLCM), per camera that sees it (SYSU)", 10)
    seed: int = _setting("of everything", 0)
    val_ids: int | None = _setting("SYSU's validation identities; default 1/4 of --train-ids", None)
    trials: int = _setting("RegDB's splits, SYSU's official gallery draws", 10)
    img_h: int | None = _setting("largest height, pixels; default RegDB 128, others 160", None)
    img_w: int | None = _setting("largest width, pixels; default RegDB 64, others 72", None)
    tone_correlation: float = _setting("of infrared and visible tones of cloth, 0 to 1", 0.5)
    full: bool = _setting("the counts of the real data set in place of those above", False)

    def resolved(self) -> Settings:
        """These settings with every default filled in.

        Raises:
            ValueError: naming the flag whose value makes no data.
        """
        if self.layout not in SIZES:
            raise ValueError(f"--layout {self.layout}: expected one of {', '.join(SIZES)}")
        s = replace(self, **FULL[self.layout]) if self.full else self
        val_ids = max(1, round(s.train_ids / 4)) if s.val_ids is None else s.val_ids
        height, width = SIZES[s.layout]
        s = replace(
            s,
            val_ids=val_ids if s.layout == "sysu" else 0,
            img_h=height if s.img_h is None else s.img_h,
            img_w=width if s.img_w is None else s.img_w,
        )
        least = {"train_ids": 2 if s.layout == "sysu" else 1, "test_ids": 1, "images_per_id": 1}
        least |= {"seed": 0, "trials": 1, "img_h": 32, "img_w": 16}
        for name, minimum in least.items():
            if getattr(s, name) < minimum:
                raise ValueError(f"{_flag(name)} {getattr(s, name)}: expected {minimum} or more")
        if s.layout == "sysu" and not 1 <= s.val_ids < s.train_ids:
            raise ValueError(f"--val-ids {s.val_ids}: expected 1 to {s.train_ids - 1}, as some of "
                             f"the --train-ids {s.train_ids} must remain")  # fmt: skip
        if not 0 <= s.tone_correlation <= 1:
            raise ValueError(f"--tone-correlation {s.tone_correlation}: expected 0 to 1")
        splits = math.comb(s.train_ids + s.test_ids, s.train_ids)
        if s.layout == "regdb" and s.trials > splits:
            raise ValueError(f"--trials {s.trials}: expected {splits} or fewer, the ways to split "
                             f"{s.train_ids} + {s.test_ids} identities")  # fmt: skip
        return s


@dataclass(frozen=True)
class Shot:
    """An image to write: its path in the folder, the camera, and its number there from 1 on."""

    path: str
    camera: int
    number: int


Shots = dict[int, list[Shot]]  # of each identity


def _regdb_shots(settings: Settings) -> Shots:
    shots: Shots = {}
    for pid in range(1, settings.train_ids + settings.test_ids + 1):
        style = make_person(settings.seed, pid).style
        for camera, folder in ((1, "Visible"), (2, "Thermal")):
            start = np.random.default_rng((settings.seed, pid, camera)).integers(1, 90_000)
            for number in range(1, settings.images_per_id + 1):
                name = f"{style['gender']}_{style['view']}_{folder[0].lower()}"
                name += f"_{start + 7 * number:05d}_{pid}.bmp"
                shots.setdefault(pid, []).append(Shot(f"{folder}/{pid}/{name}", camera, number))
    return shots


def _regdb_lists(settings: Settings, shots: Shots) -> Iterator[tuple[str, str]]:
    """Names and contents of the idx lists; every trial splits the identities another way."""
    seen: set[frozenset[int]] = set()
    rng = np.random.default_rng((settings.seed, 0, 0, 1))
    while len(seen) < settings.trials:
        train = frozenset((rng.permutation(len(shots))[: settings.train_ids] + 1).tolist())
        if train in seen:
            continue
        seen.add(train)
        for role, pids in (("train", train), ("test", shots.keys() - train)):
            for camera, modality in ((1, "visible"), (2, "thermal")):
                lines = [
                    f"{shot.path} {label}\n"
                    for label, pid in enumerate(sorted(pids))
                    for shot in shots[pid]
                    if shot.camera == camera
                ]
                yield f"idx/{role}_{modality}_{len(seen)}.txt", "".join(lines)


def _sysu_roles(settings: Settings) -> dict[str, list[int]]:
    total = settings.train_ids + settings.test_ids
    order = np.random.default_rng((settings.seed, 0, 0, 2)).permutation(total) + 1
    cuts = [settings.train_ids - settings.val_ids, settings.train_ids]
    parts = zip(SYSU_COUNTS, np.split(order, cuts), strict=True)
    return {role: sorted(pids.tolist()) for role, pids in parts}


def _sysu_counts(settings: Settings, role: str, n: int) -> np.ndarray:
    """Images of `n` identities at each camera, (n, 6), with absences as in the real data.

    Cameras 1, 2 and 6 see the head of one random order; 3, 4 and 5 each miss a few others of that
    head: so nobody lacks a modality.
    """
    real_ids, present, images = SYSU_COUNTS[role]
    rng = np.random.default_rng((settings.seed, 0, 0, 3, real_ids))
    order, missed = rng.permutation(n), 0
    counts = np.zeros((n, 6), np.int64)
    for camera in range(6):
        seen = round(n * present[camera] / real_ids)
        rows = order[:seen]
        if camera in (2, 3, 4):
            rows = np.delete(order, slice(missed, missed + n - seen))
            missed += n - seen
        counts[rows, camera] = settings.images_per_id
        if settings.full and seen:  # the real total, spread at random above a least
            least = images[camera] // seen // (2 if camera < 2 else 1)  # 1 and 2 vary most
            spare = images[camera] - least * seen
            counts[rows, camera] = least + rng.multinomial(spare, np.full(seen, 1 / seen))
    return counts


def _sysu_shots(settings: Settings) -> Shots:
    shots: Shots = {}
    for role, pids in _sysu_roles(settings).items():
        for pid, row in zip(pids, _sysu_counts(settings, role, len(pids)).tolist(), strict=True):
            shots[pid] = [
                Shot(f"cam{camera}/{pid:04d}/{number:04d}.jpg", camera, number)
                for camera, count in enumerate(row, start=1)
                for number in range(1, count + 1)
            ]
    return shots


def _rand_perm_cam(settings: Settings, shots: Shots) -> np.ndarray:
    """The official gallery draws: a cell per camera of a cell per identity of (trials, images)."""
    cameras = np.empty((6, 1), object)
    for camera in range(1, 7):
        cameras[camera - 1, 0] = cell = np.empty((max(shots), 1), object)
        for pid in range(1, max(shots) + 1):
            count = sum(shot.camera == camera for shot in shots[pid])
            rng = np.random.default_rng((settings.seed, pid, camera, 0, 1))
            rows = np.tile(np.arange(1.0, count + 1), (settings.trials if count else 0, 1))
            cell[pid - 1, 0] = rng.permuted(rows, axis=1)
    return cameras


def _llcm_roles(settings: Settings) -> dict[str, list[int]]:
    total = settings.train_ids + settings.test_ids
    order = np.random.default_rng((settings.seed, 0, 0, 4)).permutation(total) + 1
    parts = zip(("train", "test"), np.split(order, [settings.train_ids]), strict=True)
    return {role: sorted(pids.tolist()) for role, pids in parts}


def _llcm_shots(settings: Settings) -> Shots:
    """A few cameras see each identity, in turn; visible and infrared begin with another one."""
    shots: Shots = {}
    for role, pids in _llcm_roles(settings).items():
        for modality, word in enumerate(LLCM_CAMERAS):
            counts = np.full(len(pids), settings.images_per_id)
            if settings.full and role == "train":  # the real total, half of it spread at random
                least, total = LLCM_IMAGES[word] // (2 * len(pids)), LLCM_IMAGES[word]
                rng = np.random.default_rng((settings.seed, 0, 0, 5, modality))
                spread = rng.multinomial(total - least * len(pids), [1 / len(pids)] * len(pids))
                counts = least + spread
            for pid, count in zip(pids, counts.tolist(), strict=True):
                rng = np.random.default_rng((settings.seed, pid, 0, 4))
                seen = np.roll(rng.permutation(LLCM_CAMERAS["nir"])[:LLCM_SEEN_BY], modality)
                if word == "vis" and rng.random() < 0.5:
                    seen[-1] = 3  # the camera without infrared images
                for number in range(1, count + 1):
                    camera = int(seen[(number - 1) % len(seen)])
                    folder = f"test_{word}/cam{camera}" if role == "test" else word
                    path = f"{folder}/{pid:04d}/{pid:04d}_c{camera:02d}_{number:04d}_{word}.jpg"
                    shot = Shot(path, camera + modality * LLCM_INFRARED, number)
                    shots.setdefault(pid, []).append(shot)
    return shots


def _llcm_lists(settings: Settings, shots: Shots) -> Iterator[tuple[str, str]]:
    """Names and contents of the idx lists; the test lists number the test identities from 0."""
    for role, pids in _llcm_roles(settings).items():
        for word in LLCM_CAMERAS:
            lines = [
                f"{shot.path} {label}\n"
                for label, pid in enumerate(pids)
                for shot in shots[pid]
                if shot.path.endswith(f"_{word}.jpg")
            ]
            yield f"idx/{role}_{word}.txt", "".join(lines)
        yield f"idx/{role}_id.txt", ",".join(map(str, pids)) + "\n"


def _write_lists(folder: Path, settings: Settings, shots: Shots) -> None:
    lists = folder / ("exp" if settings.layout == "sysu" else "idx")
    lists.mkdir(exist_ok=True)
    if settings.layout != "sysu":
        write = _regdb_lists if settings.layout == "regdb" else _llcm_lists
        for name, text in write(settings, shots):
            (folder / name).write_text(text, encoding="ascii")
        return
    for role, pids in _sysu_roles(settings).items():
        (lists / f"{role}_id.txt").write_text(",".join(map(str, pids)) + "\n", encoding="ascii")
    buffer = BytesIO()
    savemat(buffer, {"rand_perm_cam": _rand_perm_cam(settings, shots)})
    header = b"MATLAB 5.0 MAT-file, stand-in data".ljust(116)  # scipy's own holds the time of day
    (lists / "rand_perm_cam.mat").write_bytes(header + buffer.getvalue()[len(header) :])


# ------------------------------------------------------------------------------------ generation


def _draw_identity(settings: Settings, pid: int, shots: list[Shot], folder: Path) -> int:
    """Writes those images of an identity that are not there yet; returns how many it has."""
    person = make_person(settings.seed, pid, settings.tone_correlation)
    for shot in shots:
        path = folder / shot.path
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng((settings.seed, pid, shot.camera, shot.number))
        look = camera_look(settings.layout, shot.camera, settings.seed)
        image = render(person, look, rng, (settings.img_h, settings.img_w))
        part = path.with_suffix(".part")
        image.save(part, format="JPEG" if path.suffix == ".jpg" else "BMP", quality=92)
        part.replace(path)
    return len(shots)


def _draw_all(settings: Settings, shots: Shots, folder: Path, workers: int, progress: bool) -> None:
    total = sum(map(len, shots.values()))
    with tqdm(total=total, unit="image", desc="drawing", disable=None if progress else True) as bar:
        if workers == 1:
            for pid, own in shots.items():
                bar.update(_draw_identity(settings, pid, own, folder))
            return
        # spawn: the caller may run threads (torch), which a fork would not survive
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        try:
            jobs = [pool.submit(_draw_identity, settings, *item, folder) for item in shots.items()]
            for job in as_completed(jobs):
                bar.update(job.result())
        finally:
            pool.shutdown(cancel_futures=True)


def generate(
    out: Path,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Path:
    """Writes stand-in data to the folder `out`.

    It is drawn in a folder beside `out` that is renamed when complete; a run that was stopped is
    continued by the same call. The files do not depend on `workers`.

    Args:
        out: must not exist, or be empty, unless `overwrite`.
        workers: processes.
        overwrite: replaces `out` if it holds stand-in data, and leftovers of a stopped run.
        progress: shows a bar.
        **settings: the fields of `Settings`.

    Returns:
        `out`.

    Raises:
        ValueError: a setting out of range, or an `out` that must not be replaced.
    """
    out, resolved = Path(out), Settings(**settings).resolved()
    if workers < 1:
        raise ValueError(f"--workers {workers}: expected 1 or more")
    partial = _open_partial(out, resolved, overwrite)
    shots = {"regdb": _regdb_shots, "sysu": _sysu_shots, "llcm": _llcm_shots}[resolved.layout](
        resolved
    )
    _draw_all(resolved, shots, partial, workers, progress)
    _write_lists(partial, resolved, shots)
    (partial / f"{MARKER}.part").rename(partial / MARKER)
    target, old = out.resolve(), partial.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    logger.info("%d images of %d identities: %s", sum(map(len, shots.values())), len(shots), out)
    return out


def _open_partial(out: Path, settings: Settings, overwrite: bool) -> Path:
    """The folder to draw in, with what a stopped run of the same settings has left there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; expected a new folder's name")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise ValueError(f"--out {out}: holds something that is not stand-in data (it has no "
                             f"{MARKER}); expected a new folder's name")  # fmt: skip
        if not overwrite:
            raise ValueError(f"--out {out}: holds stand-in data already; add --overwrite to "
                             "replace it, or give another name")  # fmt: skip
    target = out.resolve()
    partial = target.with_name(f".{target.name}.partial")
    note, text = partial / f"{MARKER}.part", json.dumps(asdict(settings), indent=1) + "\n"
    if partial.exists() and not (note.is_file() and note.read_text(encoding="utf-8") == text):
        if not overwrite:
            raise ValueError(f"{partial}: left by a stopped run with other settings; repeat those, "
                             "or add --overwrite to drop it")  # fmt: skip
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    note.write_text(text, encoding="utf-8")
    return partial


def sheet(path: Path, settings: Settings, ids: int = 12) -> None:
    """Draws a contact sheet: a row per identity, visible images left, infrared ones right."""
    if ids < 1:
        raise ValueError(f"--sheet-ids {ids}: expected 1 or more")
    s, gap, margin = settings.resolved(), 4, 36
    cameras = SHEET_CAMERAS[s.layout]
    wide, high = s.img_w + gap, s.img_h + gap
    page = Image.new("RGB", (margin + len(cameras) * wide + 8, 20 + ids * high), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for pid in range(1, ids + 1):
        person, y = make_person(s.seed, pid, s.tone_correlation), 20 + (pid - 1) * high
        draw.text((3, y + high // 2), f"id {pid}", fill="black", font=font)
        for column, camera in enumerate(cameras):
            look = camera_look(s.layout, camera, s.seed)
            x = margin + column * wide + (8 if look.infrared else 0)
            if pid == 1:
                word = "infrared" if look.infrared else "visible"
                draw.text((x, 4), f"{word} {camera}", fill="black", font=font)
            rng = np.random.default_rng((s.seed, pid, camera, column + 1))
            page.paste(render(person, look, rng, (s.img_h, s.img_w)), (x, y))
    page.save(path)


# ------------------------------------------------------------------------------------------ main


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def build_parser() -> argparse.ArgumentParser:
    """The command line: a flag for each field of `Settings`, and how to run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for item in fields(Settings):
        flag, meaning = _flag(item.name), item.metadata["help"]
        if item.name == "full":
            add(flag, action="store_true", help=meaning)
        elif item.name == "layout":
            add(flag, required=True, help=meaning)
        else:
            kind = float if item.name == "tone_correlation" else int
            add(flag, type=kind, default=item.default, help=meaning)
    add("--out", type=Path, help="folder to make")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    add("--overwrite", action="store_true", help="replace stand-in data that is there")
    add("--sheet", type=Path, metavar="PNG", help="draw a contact sheet instead")
    add("--sheet-ids", type=int, default=12, help="identities on the sheet")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        0, or 130 when interrupted. Exits with status 2 on a value that cannot be honoured.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = {item.name: getattr(args, item.name) for item in fields(Settings)}
    try:
        if args.sheet is not None:
            sheet(args.sheet, Settings(**settings), args.sheet_ids)
            return 0
        if args.out is None:
            raise ValueError("--out is missing: expected the folder to make")
        generate(
            args.out, workers=args.workers, overwrite=args.overwrite, progress=True, **settings
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        logger.info("stopped; the same command continues")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
