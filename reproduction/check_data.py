"""What `reproduce.py check` finds in a data folder: counts, lists, images, and how to fix it.

Every list is read as training and evaluation will read it, so that what passes here runs there.
Expected counts are the data set's own (`DataSet.expected`); of stand-in data none is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    checked_folder,
    data_name,
    eval_set,
    train_set,
)
from datasets.folders import IMAGE_SUFFIXES
from utils import read_json

MIN_SIDE = 16  # pixels; a smaller image of a person is no use
SHOWN = 8  # findings of a kind that are listed; the others are counted


class Findings:
    """What a check found."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: dict[str, tuple[int, ...]] = {}  # the numbers by what they count
        self.wrong: dict[str, str] = {}  # what was expected in place of some of them
        self.problems: list[str] = []  # what else is wrong and how to fix it

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
        lines.append("all is well" if self.good else f"findings that need a look: {wrong}")
        return "\n".join(lines) + "\n"


def check(dataset: str, data_path: Path, *, open_images: bool = True) -> Findings:
    """Looks the folder of one of `DATASETS` through."""
    data = DATASETS[dataset]
    findings = Findings(f"{data_name(dataset, data_path)} in {data_path}")
    trials, expected, marker = 10, data.expected, data_path / STAND_IN_MARKER
    if marker.exists():
        trials, expected = findings.attempt(_stand_in_trials, marker) or trials, {}
    root = findings.attempt(checked_folder, dataset, data_path)
    if root is None:
        return findings
    files: set[Path] = set()
    for split in range(1, min(data.splits, trials) + 1):
        files |= _check_split(findings, data, root, split, trials, expected)
    if open_images:
        for folder in data.folders:
            files |= {p for p in (root / folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES}
        _open_all(findings, sorted(files))
    return findings


def _stand_in_trials(marker: Path) -> int:
    """Returns how many splits or gallery draws stand-in data has, at most 10."""
    try:
        return min(read_json(marker, {"trials": int})["trials"], 10)
    except ValueError as error:
        raise DataError(f"{error}: draw the data anew") from error


def _check_split(
    findings: Findings, data: DataSet, root: Path, split: int, trials: int, expected: dict[str, Any]
) -> set[Path]:
    """Counts one split's training and test images; returns the files that its lists name."""
    prefix = f"trial {split} " if data.splits > 1 else ""
    sizes = None
    train = findings.attempt(train_set, data.name, root, trial=split, use_cache=False)
    if train is not None:
        sizes = train.num_ids, *map(len, (train.visible, train.infrared))
        what = f"{prefix}train: identities, visible, infrared"
        findings.count(what, sizes, expected.get("train"))
    cached = findings.attempt(data.train_from_cache, root)
    if cached is not None:
        numbers = cached.num_ids, *map(len, (cached.visible, cached.infrared))
        findings.count("caches: identities, visible, infrared", numbers, sizes)
    test = findings.attempt(data.images, root, "test", split) or ()
    if test:
        people = np.union1d(test[0].pids, test[1].pids)
        what = f"{prefix}test: identities, visible, infrared"
        findings.count(what, (len(people), *map(len, test)), expected.get("test"))
    for key, options in data.protocols.items():
        draws = {"trial": split, "trials": trials, **options}
        found = findings.attempt(eval_set, data.name, root, **draws)
        if found is not None and data.gallery_draws > 1:
            numbers = (len(found.query), max(map(len, found.gallery_trials)))
            what = f"test, {data.describe(EvalOptions(**options))}: queries, gallery"
            findings.count(what, numbers, expected.get(key))
    trained = () if train is None else (*train.visible.paths, *train.infrared.paths)
    tested = [path for images in test for path in images.paths]
    findings.several(
        sorted({*trained} & {*tested}),
        f"{prefix}images are in training and in test lists",
        "the lists are of different splits, or one was replaced; take all of them from one source",
    )
    return {root / path for path in (*trained, *tested)}


def _open_all(findings: Findings, files: list[Path]) -> None:
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

    with ThreadPoolExecutor() as pool:
        results = list(tqdm(pool.map(problem_of, files), "images", len(files), disable=None))
    texts = {kind: [x[1] for x in results if x and x[0] == kind] for kind in ("broken", "odd")}
    what = "images that open, of all"
    findings.count(what, (len(files) - len(texts["broken"]), len(files)), [len(files)] * 2)
    fix = "fetch them again, and check the free space"
    findings.several(texts["broken"], "images cannot be read", fix)
    what = f"images of an odd size (expected upright, {MIN_SIDE} pixels or more a side)"
    fix = "look at them: thumbnails and whole scenes are no crops of a person"
    findings.several(texts["odd"], what, fix)
