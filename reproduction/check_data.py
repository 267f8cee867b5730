"""What `reproduce.py check` finds in a data folder: counts, lists, pictures, and the way out.

Every list is read as training and evaluation will read it, so that what passes here runs there.
Expected counts are the data set's own, or those that stand-in data was drawn with.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_manager import (
    DATASETS,
    STAND_IN_MARKER,
    DataError,
    EvalSet,
    ImageList,
    TrainSet,
    data_name,
    eval_set,
    train_set,
)
from datasets.base import TRIALS
from datasets.folders import IMAGE_SUFFIXES

REGDB_PER_IDENTITY = 10  # images of an identity in either modality
MIN_SIDE = 16  # pixels; a smaller picture of a person is no use
USUAL_SHARE = 0.9  # where so many images have one size, another size is odd
SHOWN = 8  # findings of a kind that are listed; the others are counted
SYSU_IDS = {"train": 296, "val": 99, "test": 96}
SYSU_TRAIN = (395, 22258, 11909)  # identities, visible images, infrared images
SYSU_TEST = {  # camera -> test identities, images
    1: (56, 1374),
    2: (56, 1565),
    3: (93, 1883),
    4: (94, 1918),
    5: (95, 1918),
    6: (96, 1920),
}
SYSU_QUERIES = 3803
SYSU_GALLERIES = {("all", 1): 301, ("all", 10): 3010, ("indoor", 1): 112, ("indoor", 10): 1120}
LLCM_TRAIN = (713, 16946, 13975)
LLCM_TEST_IDS = 351


@dataclass(frozen=True)
class Count:
    """Numbers found and expected; None where there is nothing to expect."""

    what: str
    found: tuple[int, ...]
    expected: tuple[int, ...] | None = None

    @property
    def right(self) -> bool:
        """Whether what was found was expected."""
        return self.expected in (None, self.found)


@dataclass
class Findings:
    """What a check found.

    Attributes:
        name: The data in words.
        counts: Numbers, found and expected.
        problems: What is wrong and the way out.
    """

    name: str
    counts: list[Count] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and all(count.right for count in self.counts)

    def count(self, what: str, found: Iterable[int], expected: Iterable[int] | None = None) -> None:
        """Notes a count."""
        expected = None if expected is None else tuple(expected)
        self.counts.append(Count(what, tuple(int(n) for n in found), expected))

    def attempt(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Result of a call; None, and a problem noted once, where the data does not allow it."""
        try:
            return call(*args, **options)
        except DataError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def report(self) -> str:
        """The findings as text."""
        width = max((len(count.what) for count in self.counts), default=0)
        lines = [self.name]
        for count in self.counts:
            numbers = " + ".join(f"{n:,}" for n in count.found)
            if not count.right:
                numbers += f"   expected {' + '.join(f'{n:,}' for n in count.expected)}"
            lines.append(f"  {'ok' if count.right else '!!'}  {count.what:<{width}}  {numbers}")
        lines += [f"  !!  {problem}" for problem in self.problems]
        wrong = len(self.problems) + sum(not count.right for count in self.counts)
        lines.append("all is well" if self.good else f"{wrong} of these findings need a look")
        return "\n".join(lines) + "\n"


def check(
    dataset: str,
    data_path: Path,
    *,
    workers: int = 4,
    open_images: bool = True,
    progress: bool = True,
) -> Findings:
    """Looks a data folder through.

    Args:
        dataset: A name in `data_manager.DATASETS`.
        data_path: The folder.
        workers: Threads that open images.
        open_images: Whether to open every image.
        progress: Whether to show a bar.
    """
    findings = Findings(f"{data_name(dataset, data_path)} in {data_path}")
    marker = findings.attempt(_marker, data_path)
    lists = {"regdb": _regdb, "sysu": _sysu, "llcm": _llcm}[dataset]
    images = lists(findings, data_path, marker)
    if open_images and images:
        _open_all(findings, sorted(images), workers=workers, progress=progress)
    return findings


def _marker(data_path: Path) -> dict[str, Any] | None:
    """Settings that stand-in data was drawn with; None for real data and at full size."""
    file = data_path / STAND_IN_MARKER
    if not file.exists():
        return None
    try:
        settings = json.loads(file.read_text())
        return None if settings["full"] else settings
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} can't be read ({error!r}): draw the data anew") from error


def _pictures(data_path: Path, folders: Iterable[str]) -> set[Path]:
    """Every image file below the folders."""
    found = (path for folder in folders for path in (data_path / folder).rglob("*"))
    return {path for path in found if path.suffix.lower() in IMAGE_SUFFIXES}


def _files(images: ImageList) -> set[Path]:
    return {images.root / path for path in images.paths}


def _sizes(people: TrainSet) -> tuple[int, int, int]:
    return people.num_ids, len(people.visible), len(people.infrared)


def _overlap(findings: Findings, train: Iterable[int], test: Iterable[int], where: str) -> None:
    shared = sorted(set(map(int, train)) & set(map(int, test)))
    if shared:
        findings.problems.append(
            f"{where}: {len(shared)} identities are in training and in test lists, {shared[0]} "
            f"first; expected none: the lists are of different splits, or one was replaced; take "
            f"all of them from one source"
        )


def _regdb(findings: Findings, data_path: Path, marker: dict[str, Any] | None) -> set[Path]:
    """Ten splits of 412 identities, ten images of each in both modalities."""
    trials = TRIALS if marker is None else range(1, min(marker["trials"], TRIALS[-1]) + 1)
    ids = (206, 206) if marker is None else (marker["train_ids"], marker["test_ids"])
    each = REGDB_PER_IDENTITY if marker is None else marker["images_per_id"]
    for trial in trials:
        train = findings.attempt(train_set, "regdb", data_path, trial=trial)
        test = findings.attempt(eval_set, "regdb", data_path, trial=trial)
        for role, split, number in (("train", train, ids[0]), ("test", test, ids[1])):
            if split is None:
                continue
            pair = _regdb_pair(split)
            found = (len(set(pair[0].pids.tolist())), len(pair[0]), len(pair[1]))
            what = f"trial {trial} {role}: identities, visible, infrared"
            findings.count(what, found, (number, number * each, number * each))
        if train is not None and test is not None:
            _overlap(findings, train.pids, test.query.pids, f"trial {trial}")
    pictures = _pictures(data_path, ("Visible", "Thermal"))
    of_person = Counter(path.relative_to(data_path).parts[:2] for path in pictures)
    for folder in ("Visible", "Thermal"):
        numbers = {pid: n for (top, pid), n in of_person.items() if top == folder}
        if numbers:
            total = sum(ids)
            findings.count(
                f"{folder}: identities, images", (len(numbers), sum(numbers.values())),
                (total, total * each),
            )  # fmt: skip
        odd = sorted(f"{folder}/{pid} ({n})" for pid, n in numbers.items() if n != each)
        _note(findings, odd, f"folders with another number of images than {each}", "copy them anew")
    return pictures


def _regdb_pair(split: TrainSet | EvalSet) -> tuple[ImageList, ImageList]:
    if isinstance(split, TrainSet):
        return split.visible, split.infrared
    return split.query, split.gallery


def _sysu(findings: Findings, data_path: Path, marker: dict[str, Any] | None) -> set[Path]:
    """Six cameras; training, validation and test identities; both ways to draw a gallery."""
    real = marker is None
    train = findings.attempt(train_set, "sysu", data_path, use_cache=False)
    if train is not None:
        expected = SYSU_TRAIN if real else None
        findings.count("train + val: identities, visible, infrared", _sizes(train), expected)
        held = sum(DATASETS["sysu"].held_out(data_path, train.pids))
        ids = SYSU_IDS if real else {"train": marker["train_ids"] - marker["val_ids"]}
        ids = ids if real else {**ids, "val": marker["val_ids"]}
        found = {"train": train.num_ids - held, "val": held}
        for role in ("train", "val"):
            findings.count(f"{role}: identities", (found[role],), (ids[role],))
        for images in (train.visible, train.infrared):
            _spread(findings, "train + val", images)
    if len(list(data_path.glob("train_*_resized_*.npy"))) == 4:
        cached = findings.attempt(train_set, "sysu", data_path)
        if cached is not None:
            expected = None if train is None else _sizes(train)
            findings.count("caches: identities, visible, infrared", _sizes(cached), expected)
    _sysu_test(findings, data_path, marker)
    return _pictures(data_path, DATASETS["sysu"].folders[1:])


def _sysu_test(findings: Findings, data_path: Path, marker: dict[str, Any] | None) -> None:
    """Queries, galleries of every draw, and what each camera has of the test identities."""
    real = marker is None
    trials = TRIALS[-1] if real else min(marker["trials"], TRIALS[-1])
    for (mode, shots), size in SYSU_GALLERIES.items():
        for gallery in ("seeded", "official"):
            options = {"mode": mode, "shots": shots, "gallery": gallery, "trials": trials}
            test = findings.attempt(eval_set, "sysu", data_path, **options)
            if test is not None:
                what = f"test {mode}, {shots}-shot, {gallery}: queries, gallery"
                found = (len(test.query), max(map(len, test.gallery_trials)))
                findings.count(what, found, (SYSU_QUERIES, size) if real else None)
    for camera, expected in SYSU_TEST.items():
        numbers = _test_camera(data_path, camera)
        if numbers is not None:
            what = f"test, camera {camera}: identities, images"
            findings.count(what, numbers, expected if real else None)


def _test_camera(data_path: Path, camera: int) -> tuple[int, int] | None:
    """Test identities and their images in a camera; None where the list can't be read."""
    try:
        words = (data_path / "exp/test_id.txt").read_text().strip().split(",")
        folders = [data_path / f"cam{camera}/{int(word):04d}" for word in words]
    except (OSError, ValueError):
        return None
    numbers = [len(_pictures(folder, (".",))) for folder in folders]
    return sum(n > 0 for n in numbers), sum(numbers)


def _llcm(findings: Findings, data_path: Path, marker: dict[str, Any] | None) -> set[Path]:
    """Two training lists, test images by camera, both directions."""
    real, images = marker is None, set()
    train = findings.attempt(train_set, "llcm", data_path)
    if train is not None:
        each = 0 if real else marker["train_ids"] * marker["images_per_id"]
        expected = LLCM_TRAIN if real else (marker["train_ids"], each, each)
        findings.count("train: identities, visible, infrared", _sizes(train), expected)
        images = _files(train.visible) | _files(train.infrared)
        inside = sorted(p for p in train.visible.paths + train.infrared.paths if "test_" in p)
        way_out = "take idx/ and the images from one download"
        _note(findings, inside, "training images that lie in test folders", way_out)
    for direction in ("v2i", "i2v"):
        test = findings.attempt(eval_set, "llcm", data_path, direction=direction)
        if test is None:
            continue
        side = test.query.modality
        found = (len(set(test.query.pids.tolist())), len(test.query))
        known = (LLCM_TEST_IDS,) if real else (marker["test_ids"],)
        findings.count(f"test {side}: identities", found[:1], known)
        findings.count(
            f"test {side}: images; drawn from the other side",
            (found[1], len(test.gallery_trials[0])),
        )
        for camera in np.unique(test.query.camids):
            rows = test.query.camids == camera
            numbers = (len(np.unique(test.query.pids[rows])), int(rows.sum()))
            findings.count(f"test {side}, camera {camera}: identities, images", numbers)
        _spread(findings, "test", test.query)
    return images | _pictures(data_path, DATASETS["llcm"].folders[1:])


def _spread(findings: Findings, role: str, images: ImageList) -> None:
    """Notes the least and the most images of an identity."""
    _, numbers = np.unique(images.pids, return_counts=True)
    what = f"{role} {images.modality}: least, most images of an identity"
    findings.count(what, (numbers.min(), numbers.max()))


def _note(findings: Findings, items: list[str], what: str, way_out: str) -> None:
    """Notes a problem that several things share; says nothing where there are none."""
    if items:
        more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
        named = ", ".join(items[:SHOWN])
        findings.problems.append(f"{len(items)} {what}: {named}{more}; {way_out}")


def _open_all(findings: Findings, files: list[Path], *, workers: int, progress: bool) -> None:
    """Decodes every image; notes those that can't be, and those of an odd size."""

    def look(path: Path) -> tuple[int, int] | str:
        try:
            with Image.open(path) as image:
                image.load()
                return image.size
        except Exception as error:  # a damaged picture makes the library raise nearly anything
            return f"{path} ({type(error).__name__}: {error})"

    with ThreadPoolExecutor(workers) as pool:
        bar = tqdm(pool.map(look, files), "images", len(files), disable=None if progress else True)
        results = list(bar)
    broken = [result for result in results if isinstance(result, str)]
    good = [(p, r) for p, r in zip(files, results, strict=True) if not isinstance(r, str)]
    findings.count("images that open, of all", (len(good), len(files)), (len(files), len(files)))
    _note(findings, broken, "images can't be read", "fetch them again, and check the free space")
    sizes = Counter(size for _, size in good)
    usual, number = sizes.most_common(1)[0] if sizes else ((0, 0), 0)
    uniform = number >= USUAL_SHARE * len(good)
    odd = [
        f"{path} ({width} x {height})"
        for path, (width, height) in good
        if min(width, height) < MIN_SIDE or width > height or (uniform and (width, height) != usual)
    ]
    expected = f"{usual[0]} x {usual[1]} like the others" if uniform else "a standing person"
    what = f"images of an odd size (expected {expected}, {MIN_SIDE} pixels or more a side)"
    _note(findings, odd, what, "look at them: thumbnails and whole scenes are no crops of a person")
