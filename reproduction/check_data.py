"""What `reproduce.py check` finds in a data folder: counts, lists, images, and how to fix it.

Every list is read as training and evaluation will read it, so that what passes here runs there.
Expected counts are the data set's own (`DataSet.expected`); of stand-in data none is expected.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_manager import (
    DATASETS,
    STAND_IN_MARKER,
    DataError,
    DataSet,
    EvalOptions,
    ImageList,
    TrainSet,
    checked_folder,
    data_name,
    eval_set,
    train_set,
)
from datasets.folders import IMAGE_SUFFIXES

MIN_SIDE = 16  # pixels; a smaller image of a person is no use
SHOWN = 8  # findings of a kind that are listed; the others are counted


class Findings:
    """What a check found.

    Attributes:
        counts: The numbers by what they count.
        wrong: What was expected in place of some of them, in words.
        problems: What else is wrong and how to fix it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: dict[str, tuple[int, ...]] = {}
        self.wrong: dict[str, str] = {}
        self.problems: list[str] = []

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not self.wrong

    def count(
        self, what: str, numbers: Iterable[int], expected: Sequence[int | None] | None = None
    ) -> None:
        """Adds numbers and compares them with those expected; None is unknown."""
        found = self.counts[what] = tuple(map(int, numbers))
        pairs = zip(found, expected or found, strict=True)
        if any(n not in (None, number) for number, n in pairs):
            self.wrong[what] = " + ".join("?" if n is None else f"{n:,}" for n in expected)

    def attempt(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Returns a call's result; None, with a problem added once, where the data is invalid."""
        try:
            return call(*args, **options)
        except DataError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def several(self, items: Sequence[str], what: str, fix: str) -> None:
        """Adds a problem that several things share; nothing where there are none."""
        if items:
            more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
            named = ", ".join(items[:SHOWN])
            self.problems.append(f"{len(items)} {what}: {named}{more}; {fix}")

    def report(self) -> str:
        """Returns the findings as text."""
        width = max(map(len, self.counts), default=0)
        lines = [self.name]
        for what, numbers in self.counts.items():
            line = f"{what:<{width}}  {' + '.join(f'{n:,}' for n in numbers)}"
            wrong = self.wrong.get(what)
            lines.append(f"  !!  {line}   expected {wrong}" if wrong else f"  ok  {line}")
        lines += [f"  !!  {problem}" for problem in self.problems]
        wrong = len(self.problems) + len(self.wrong)
        lines.append("all is well" if self.good else f"{wrong} of these findings need a look")
        return "\n".join(lines) + "\n"


def check(dataset: str, data_path: Path, *, workers: int = 4, open_images: bool = True) -> Findings:
    """Looks a data folder through.

    Args:
        dataset: A name in `data_manager.DATASETS`.
        data_path: The folder.
        workers: Threads that open images.
        open_images: Whether to open every image.
    """
    data = DATASETS[dataset]
    findings = Findings(f"{data_name(dataset, data_path)} in {data_path}")
    trials, each, expected = 10, data.images_per_id, data.expected
    if (data_path / STAND_IN_MARKER).exists():
        trials = findings.attempt(_stand_in_trials, data_path / STAND_IN_MARKER) or trials
        each, expected = None, {}
    root = findings.attempt(checked_folder, dataset, data_path)
    if root is None:
        return findings
    listed: dict[str, list[ImageList]] = {"train": [], "test": []}
    for split in range(1, min(data.splits, trials) + 1):
        for role, lists in _check_split(findings, data, root, split, trials, expected).items():
            listed[role] += lists
    _count_images_per_id(findings, listed, each)
    if open_images:
        files = {images.root / p for x in listed.values() for images in x for p in images.paths}
        for folder in data.folders:
            files |= {p for p in (root / folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES}
        _open_all(findings, sorted(files), workers)
    return findings


def _stand_in_trials(marker: Path) -> int:
    """Returns how many splits or gallery draws stand-in data has, at most 10."""
    try:
        return min(json.loads(marker.read_text())["trials"], 10)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{marker} cannot be read ({error!r}): draw the data anew") from error


def _check_split(
    findings: Findings,
    data: DataSet,
    root: Path,
    split: int,
    trials: int,
    expected: Mapping[str, Sequence[int | None]],
) -> dict[str, tuple[ImageList, ...]]:
    """Counts one split's "train" and "test" images; returns the lists that could be read."""
    prefix = f"trial {split} " if data.splits > 1 else ""
    train = findings.attempt(train_set, data.name, root, trial=split, use_cache=False)
    if train is not None:
        what = f"{prefix}train: identities, visible, infrared"
        findings.count(what, _sizes(train), expected.get("train"))
    if train is not None and "val" in data.expected:
        held_out = findings.attempt(data.held_out, root, train.pids)
        findings.count("of these val: identities", (sum(held_out),), expected.get("val"))
    cached = findings.attempt(data.train_from_cache, root)
    if cached is not None:
        what = "caches: identities, visible, infrared"
        findings.count(what, _sizes(cached), None if train is None else _sizes(train))
    test = findings.attempt(data.images, root, "test", split) or ()
    if test:
        people = np.union1d(test[0].pids, test[1].pids)
        what = f"{prefix}test: identities, visible, infrared"
        findings.count(what, (len(people), *map(len, test)), expected.get("test"))
    for images in test:
        cameras = np.unique(images.camids)
        for camera in cameras if len(cameras) > 1 else ():
            rows = images.camids == camera  # (n,) bool
            key = f"test {images.modality}, camera {camera}"
            numbers = (len(np.unique(images.pids[rows])), rows.sum())
            findings.count(f"{key}: identities, images", numbers, expected.get(key))
    for key, options in data.protocols.items():
        draws = {"trial": split, "trials": trials, **options}
        found = findings.attempt(eval_set, data.name, root, **draws)
        if found is not None and data.gallery_draws > 1:
            numbers = (len(found.query), max(map(len, found.gallery_trials)))
            what = f"test, {data.describe(EvalOptions(**options))}: queries, gallery"
            findings.count(what, numbers, expected.get(key))
    lists = {"train": () if train is None else (train.visible, train.infrared), "test": test}
    paths = [{path for images in lists[role] for path in images.paths} for role in lists]
    findings.several(
        sorted(paths[0] & paths[1]),
        f"{prefix}images are in training and in test lists",
        "the lists are of different splits, or one was replaced; take all of them from one source",
    )
    return lists


def _sizes(people: TrainSet) -> tuple[int, int, int]:
    return people.num_ids, len(people.visible), len(people.infrared)


def _count_images_per_id(
    findings: Findings, listed: Mapping[str, Sequence[ImageList]], expected: int | None
) -> None:
    """Counts the images of each identity, over all splits; `expected` in either modality."""
    for role, modality in product(listed, ("visible", "infrared")):
        lists = [images for images in listed[role] if images.modality == modality]
        distinct = {x for images in lists for x in zip(images.paths, images.pids, strict=True)}
        if distinct:
            numbers = Counter(pid for _, pid in distinct).values()
            what = f"{role} {modality}: least, most images of an identity"
            findings.count(what, (min(numbers), max(numbers)), expected and (expected, expected))


def _open_all(findings: Findings, files: list[Path], workers: int) -> None:
    """Decodes every image; reports those that cannot be read, and those of an odd size."""

    def problem_of(path: Path) -> tuple[str, str] | None:
        try:
            with Image.open(path) as image:
                image.load()
                width, height = image.size
        except Exception as error:  # a damaged image makes Pillow raise nearly anything
            return "broken", f"{path} ({type(error).__name__}: {error})"
        odd = width < MIN_SIDE or height < MIN_SIDE or width > height
        return ("odd", f"{path} ({width} x {height})") if odd else None

    with ThreadPoolExecutor(workers) as pool:
        results = list(tqdm(pool.map(problem_of, files), "images", len(files), disable=None))
    texts = {kind: [x[1] for x in results if x and x[0] == kind] for kind in ("broken", "odd")}
    what = "images that open, of all"
    findings.count(what, (len(files) - len(texts["broken"]), len(files)), [len(files)] * 2)
    fix = "fetch them again, and check the free space"
    findings.several(texts["broken"], "images cannot be read", fix)
    what = f"images of an odd size (expected upright, {MIN_SIDE} pixels or more a side)"
    fix = "look at them: thumbnails and whole scenes are no crops of a person"
    findings.several(texts["odd"], what, fix)
