"""What `reproduce.py check` finds in a data folder: counts, lists, images, and how to fix it.

Lists and their images are read as training and evaluation read them: what passes here runs there.
Expected counts are the data set's own (`DataSet.expected`); of stand-in data none is expected.
"""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

import data_manager
from datasets.base import DataError, DataSet, EvalOptions, ImageList
from datasets.decode import FORMATS
from utils import read_json

MIN_SIDE = 16  # pixels; a smaller image of a person is no use
SHOWN = 8  # findings of a kind that are listed; the others are counted
WIDTH = 64  # of the report's first column


class Findings:
    """What a check found."""

    def __init__(self, name: str) -> None:
        self.lines = [name]  # what it is, and what was counted and is as expected
        self.problems: list[str] = []  # what is wrong and how to fix it

    def count(self, what: str, numbers: Sequence[int], expected: Sequence[int | None] = ()) -> None:
        """Adds numbers and compares them with those expected, if any; None is unknown."""
        line = f"{what:<{WIDTH}}  {' + '.join(f'{number:,}' for number in numbers)}"
        pairs = zip(numbers, expected or numbers, strict=True)
        if all(wanted in (None, number) for number, wanted in pairs):
            self.lines.append(f"  ok  {line}")
        else:
            wanted = " + ".join("?" if n is None else f"{n:,}" for n in expected)
            self.problems.append(f"{line}   expected {wanted}")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Makes a `DataError` inside a problem, each once; what follows is checked all the same."""
        try:
            yield
        except DataError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))

    def several(self, items: Sequence[str], what: str, fix: str) -> None:
        """Adds a problem that several things share; nothing where there are none."""
        if items:
            more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
            named = ", ".join(items[:SHOWN])
            self.problems.append(f"{len(items)} {what}: {named}{more}; {fix}")

    def report(self) -> str:
        """Returns the findings as text."""
        problems = [f"  !!  {problem}" for problem in self.problems]
        end = f"findings that need a look: {len(problems)}" if problems else "all is well"
        return "\n".join([*self.lines, *problems, end]) + "\n"


def check(dataset: str, data_path: Path, *, open_images: bool = True) -> Findings:
    """Checks the folder of one of `DATASETS`."""
    data = data_manager.DATASETS[dataset]
    findings = Findings(f"{data_manager.data_name(dataset, data_path)} in {data_path}")
    trials, expected, marker = 10, data.expected, data_path / data_manager.STAND_IN_MARKER
    if marker.exists():
        expected = {}
        try:
            trials = min(max(1, read_json(marker, {"trials": int})["trials"]), 10)
        except ValueError as error:
            findings.problems.append(f"{error}: draw the data anew")
    files: set[Path] = set()
    with findings.reading():
        root = data_manager.checked_folder(dataset, data_path)
        for split in range(1, min(data.splits, trials) + 1):
            files |= _check_split(findings, data, root, split, trials, expected)
        if open_images:
            _open_all(findings, sorted(files))
    return findings


def _check_split(
    findings: Findings, data: DataSet, root: Path, split: int, trials: int, expected: dict[str, Any]
) -> set[Path]:
    """Counts one split's training and test images; returns the files that its lists name."""
    prefix = f"trial {split} " if data.splits > 1 else ""

    def count_images(what: str, visible: ImageList, infrared: ImageList, role: str) -> list[str]:
        numbers = len(np.union1d(visible.pids, infrared.pids)), len(visible), len(infrared)
        findings.count(f"{what}: identities, visible, infrared", numbers, expected.get(role, ()))
        return [*visible.paths, *infrared.paths]

    trained, tested = [], []
    with findings.reading():
        train = data_manager.train_set(data.name, root, trial=split, use_cache=False)
        trained = count_images(f"{prefix}train", train.visible, train.infrared, "train")
    with findings.reading():
        cached = data.train_from_cache(root)
        if cached is not None:
            count_images("caches", cached.visible, cached.infrared, "train")
    with findings.reading():
        tested = count_images(f"{prefix}test", *data.images(root, "test", split), "test")
    for key, options in data.protocols.items():
        with findings.reading():
            draws = {"trial": split, "trials": trials, **options}
            found = data_manager.eval_set(data.name, root, **draws)
            if data.gallery_draws > 1:
                what = f"test, {data.describe(EvalOptions(**options))}: queries, gallery"
                queries = found.query_trials or (found.query.pids,)
                numbers = max(map(len, queries)), max(map(len, found.gallery_trials))
                findings.count(what, numbers, expected.get(key, ()))
    findings.several(
        sorted({*trained} & {*tested}),
        f"{prefix}images are in training and in test lists",
        "the lists are of different splits, or one was replaced; take all of them from one source",
    )
    return {root / path for path in (*trained, *tested)}


def _open_all(findings: Findings, files: list[Path]) -> None:
    """Decodes every image; reports those that cannot be read, and those of an odd size."""
    broken, odd = [], []

    def look_at(path: Path) -> None:
        try:
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                width, height = image.size
        except Exception as error:  # a damaged image makes Pillow raise nearly anything
            broken.append(f"{path} ({type(error).__name__}: {error})")
            return
        if width < MIN_SIDE or height < MIN_SIDE or width > height:
            odd.append(f"{path} ({width} x {height})")

    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(look_at, files), "images", len(files), disable=None))
    opened = len(files) - len(broken), len(files)
    findings.count("images that open, of all", opened, [len(files)] * 2)
    fix = "fetch them again, and check the free space"
    findings.several(sorted(broken), "images cannot be read", fix)
    what = f"images of an odd size (expected upright, {MIN_SIDE} pixels or more a side)"
    fix = "look at them: thumbnails and whole scenes are no crops of a person"
    findings.several(sorted(odd), what, fix)
