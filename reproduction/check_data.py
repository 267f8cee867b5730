"""What `reproduce.py check` finds in a data folder: counts, lists, images, and how to fix it.

Every list is read as training and evaluation will read it, so that what passes here runs there.
Expected counts are the data set's own (`DataSet.expected`), or those of the stand-in data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
USUAL_FRACTION = 0.9  # where so many images have one size, another size is odd
SHOWN = 8  # findings of a kind that are listed; the others are counted


@dataclass(frozen=True)
class Count:
    """Numbers found and expected; None where there is nothing to expect."""

    what: str
    found: tuple[int, ...]
    expected: tuple[int | None, ...] | None = None

    @property
    def right(self) -> bool:
        """Whether what was found was expected."""
        pairs = zip(self.found, self.expected or self.found, strict=True)
        return all(expected in (None, found) for found, expected in pairs)


@dataclass
class Findings:
    """What a check found.

    Attributes:
        name: The data in words.
        counts: Numbers, found and expected.
        problems: What is wrong and how to fix it.
    """

    name: str
    counts: list[Count] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and all(count.right for count in self.counts)

    def count(
        self, what: str, found: Iterable[int], expected: tuple[int | None, ...] | None = None
    ) -> None:
        """Adds a count."""
        self.counts.append(Count(what, tuple(int(n) for n in found), expected))

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
        width = max((len(count.what) for count in self.counts), default=0)
        lines = [self.name]
        for count in self.counts:
            numbers = " + ".join(f"{n:,}" for n in count.found)
            if not count.right:
                expected = ("?" if n is None else f"{n:,}" for n in count.expected)
                numbers += f"   expected {' + '.join(expected)}"
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
) -> Findings:
    """Looks a data folder through.

    Args:
        dataset: A name in `data_manager.DATASETS`.
        data_path: The folder.
        workers: Threads that open images.
        open_images: Whether to open every image.
    """
    data = DATASETS[dataset]
    findings = Findings(f"{data_name(dataset, data_path)} in {data_path}")
    marker = findings.attempt(_stand_in_settings, data_path)
    each, trials, expected = data.images_per_id, 10, data.expected
    if marker is not None:
        trials = min(marker["trials"], trials)
        each = marker["images_per_id"] if each else None
        ids = {"train": marker["train_ids"], "test": marker["test_ids"]}
        expected = {role: (number, None, None) for role, number in ids.items()}
        if "val" in data.expected:
            expected["val"] = (marker["val_ids"],)
    root = findings.attempt(checked_folder, dataset, data_path)
    if root is None:
        return findings
    listed: dict[str, list[ImageList]] = {"train": [], "test": []}
    for split in range(1, min(data.splits, trials) + 1):
        for role, lists in _check_split(findings, data, root, split, trials, expected).items():
            listed[role] += lists
    _check_images_per_id(findings, listed, each)
    files = {
        images.root / path for lists in listed.values() for images in lists for path in images.paths
    }
    for folder in data.folders:
        files |= {p for p in (root / folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES}
    if open_images and files:
        _open_all(findings, sorted(files), workers)
    return findings


def _stand_in_settings(data_path: Path) -> dict[str, Any] | None:
    """Returns what stand-in data was drawn with; None for real data and at full size."""
    file = data_path / STAND_IN_MARKER
    if not file.exists():
        return None
    try:
        settings = json.loads(file.read_text())
        return None if settings["full"] else settings
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read ({error!r}): draw the data anew") from error


def _check_split(
    findings: Findings,
    data: DataSet,
    root: Path,
    split: int,
    trials: int,
    expected: Mapping[str, tuple[int | None, ...]],
) -> dict[str, tuple[ImageList, ...]]:
    """Counts one split's "train" and "test" images; returns the lists that could be read."""
    prefix = f"trial {split} " if data.splits > 1 else ""
    train = findings.attempt(train_set, data.name, root, trial=split, use_cache=False)
    if train is not None:
        what = f"{prefix}train: identities, visible, infrared"
        findings.count(what, _sizes(train), expected.get("train"))
        if "val" in expected:
            held_out = findings.attempt(data.held_out, root, train.pids)
            findings.count("of these val: identities", (sum(held_out),), expected["val"])
    cached = findings.attempt(data.train_from_cache, root)
    if cached is not None:
        what = "caches: identities, visible, infrared"
        findings.count(what, _sizes(cached), None if train is None else _sizes(train))
    test = findings.attempt(data.images, root, "test", split)
    if test is not None:
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
    lists = {"train": () if train is None else (train.visible, train.infrared), "test": test or ()}
    paths = [{path for images in lists[role] for path in images.paths} for role in lists]
    findings.several(
        sorted(paths[0] & paths[1]),
        f"{prefix}images are in training and in test lists",
        "expected none: the lists are of different splits, or one was replaced; take all of them"
        " from one source",
    )
    return lists


def _sizes(people: TrainSet) -> tuple[int, int, int]:
    return people.num_ids, len(people.visible), len(people.infrared)


def _check_images_per_id(
    findings: Findings, listed: Mapping[str, Sequence[ImageList]], expected: int | None
) -> None:
    """Counts the images of each identity, over all splits; `expected` in either modality."""
    for role, modality in product(listed, ("visible", "infrared")):
        distinct = {
            (path, int(pid))
            for images in listed[role]
            if images.modality == modality
            for path, pid in zip(images.paths, images.pids, strict=True)
        }
        numbers = Counter(pid for _, pid in distinct)
        if numbers:
            what = f"{role} {modality}: least, most images of an identity"
            findings.count(what, (min(numbers.values()), max(numbers.values())))
        odd = [f"{pid} ({n})" for pid, n in sorted(numbers.items()) if n != expected]
        what = f"{role} identities with another number of {modality} images than {expected}"
        findings.several(odd if expected else [], what, "copy them anew")


def _open_all(findings: Findings, files: list[Path], workers: int) -> None:
    """Decodes every image; reports those that cannot be read, and those of an odd size."""

    def size_of(path: Path) -> tuple[int, int] | str:
        try:
            with Image.open(path) as image:
                image.load()
                return image.size
        except Exception as error:  # a damaged image makes Pillow raise nearly anything
            return f"{path} ({type(error).__name__}: {error})"

    with ThreadPoolExecutor(workers) as pool:
        results = list(tqdm(pool.map(size_of, files), "images", len(files), disable=None))
    broken = [result for result in results if isinstance(result, str)]
    good = [(p, r) for p, r in zip(files, results, strict=True) if not isinstance(r, str)]
    findings.count("images that open, of all", (len(good), len(files)), (len(files), len(files)))
    findings.several(broken, "images cannot be read", "fetch them again, and check the free space")
    sizes = Counter(size for _, size in good)
    usual, number = sizes.most_common(1)[0] if sizes else ((0, 0), 0)
    uniform = number >= USUAL_FRACTION * len(good)
    odd = [
        f"{path} ({width} x {height})"
        for path, (width, height) in good
        if min(width, height) < MIN_SIDE or width > height or (uniform and (width, height) != usual)
    ]
    expected = f"{usual[0]} x {usual[1]} like the others" if uniform else "a standing person"
    findings.several(
        odd,
        f"images of an odd size (expected {expected}, {MIN_SIDE} pixels or more a side)",
        "look at them: thumbnails and whole scenes are no crops of a person",
    )
