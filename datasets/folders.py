"""Reading a data set's folder: its layout, lists, identities and listings, each checked.

Every path read lies inside the data folder, links resolved; every error names file and line.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.base import DataError, DataSet, ImageList, Item, TrainSet, image_list
from datasets.decode import FORMATS

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
STAND_IN_HINT = (
    " To try everything without it, write stand-in data: python stand_in.py --layout {} --out DIR"
    " --train-ids 150 --test-ids 40 --images-per-id 10 --seed 0"
)


def folder_images(folder: str | Path, modality: str) -> ImageList:
    """Lists the images in any folder and below it, by name; identities are unknown (-1).

    What is an image is told by a file's first bytes, or by its suffix; hidden files and folders are
    passed over. Logs how many files were taken, and which were not.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"image folder {root} {_not_a_folder(root)}; expected a folder of images")
    root = root.resolve()
    names, skipped = [], []
    for path in sorted(root.rglob("*")):
        below = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in below.parts):
            image = path.suffix.lower() in IMAGE_SUFFIXES or _is_image(path)
            (names if image else skipped).append(below.as_posix())
    if not names:
        raise DataError(
            f"{folder} holds no image, nor do the folders in it; expected {', '.join(FORMATS)}"
        )
    ending = f" ({', '.join(skipped[:5])}{', ...' if skipped[5:] else ''})" if skipped else ""
    text = "%s: %s images taken: %d; other files skipped: %d%s"
    log.info(text, folder, modality, len(names), len(skipped), ending)
    return image_list(root, [(name, -1, -1) for name in names], modality)


def _is_image(path: Path) -> bool:
    try:
        Image.open(path, formats=FORMATS).close()  # reads the header alone
    except Exception:  # a damaged header makes Pillow raise nearly anything
        return False
    return True


def _not_a_folder(path: Path) -> str:
    """Says why a path is no folder."""
    if path.is_file():
        return "is a file, not a folder"
    return "does not exist" + ("" if path.is_absolute() else f" in {Path.cwd()}")


def check_layout(path: Path, data: DataSet, others: Iterable[DataSet]) -> Path:
    """Returns the data folder with links resolved, after checking that its layout is `data`'s.

    Raises:
        DataError: The folder or a part of it is not there; says where it may be instead, or which
            of the `others` it is.
    """

    def lacking(folder: Path, kind: DataSet) -> list[str]:
        return [f"{name}/" for name in kind.folders if not os.path.isdir(folder / name)]

    expected = f"{data.title} is a folder with {', '.join(f'{f}/' for f in data.folders)} in it"
    hint = data.how_to_get + (STAND_IN_HINT.format(data.name) if data.has_stand_in else "")
    if not path.is_dir():
        raise DataError(f"data folder {path} {_not_a_folder(path)}. {expected}. {hint}")
    missing = lacking(path, data)
    if not missing:
        return path.resolve()
    for folder in [path.resolve().parent, *sorted(path.iterdir())]:  # one too deep or too high
        if not lacking(folder, data):
            hint = f"It is in {folder}: pass --data-path {folder}"
    for other in others:
        if not lacking(path, other):
            hint = f"It looks like {other.title}: pass {data.title}'s folder"
            hint += f", or --dataset {other.name} to a command that has this flag"
    if missing == [f"{data.folders[0]}/"] and data.lists_hint:
        hint = f"The images are there, the lists are not: {data.lists_hint}"
    raise DataError(f"{path} has no {', '.join(missing)}. {expected}. {hint}")


def path_inside(root: Path, relative: str) -> str:
    """Returns the real path of `relative`, which must not leave the data folder."""
    real = os.path.realpath(root / relative)
    if not Path(real).is_relative_to(root):
        raise DataError(
            f"{root / relative} leads to {real}, outside of the data folder {root}; only what lies"
            " inside is read: copy it there"
        )
    return real


def read_text(root: Path, relative: str) -> str:
    """Reads one of the data set's own lists; raises DataError where that fails."""
    real = path_inside(root, relative)
    if not os.path.isfile(real):
        raise DataError(f"{root / relative} does not exist; it is one of the data set's own lists")
    try:
        return Path(real).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{root / relative} cannot be read as text: {error}") from error


def files_in(root: Path, folder: str) -> set[str]:
    """Returns the names of a folder's regular files, none when it is not there."""
    try:
        with os.scandir(path_inside(root, folder)) as entries:
            files = [entry for entry in entries if entry.is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise DataError(f"{root / folder} cannot be listed: {error.strerror}") from error
    for entry in files:
        if entry.is_symlink():
            path_inside(root, f"{folder}/{entry.name}")
    return {entry.name for entry in files}


def find_images(
    root: Path, pids: Iterable[int], cameras: Iterable[int], *layout: str
) -> list[Item]:
    """Lists every image of these identities in these cameras: by identity, camera, then path.

    `layout`: folders to look into, such as "cam{camera}/{pid:04d}"; they need not exist.
    """
    items: list[Item] = []
    for pid, camera in product(pids, cameras):
        paths = [
            f"{folder}/{name}"
            for folder in {each.format(camera=camera, pid=pid) for each in layout}
            for name in files_in(root, folder)
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
        items += [(path, pid, camera) for path in sorted(paths)]
    return items


def read_ids(root: Path, name: str) -> set[int]:
    """Reads a file with one line of comma-separated identities."""
    words = [word.strip() for word in read_text(root, name).strip().rstrip(",").split(",")]
    for word in words:
        if not re.fullmatch(r"[0-9]{1,6}", word):
            raise DataError(
                f"{root / name} holds {word[:40]!r}; expected one line of comma-separated whole"
                " numbers, such as 1,2,4"
            )
    ids = {int(word) for word in words}
    if len(ids) < len(words):
        raise DataError(f"{root / name} names an identity twice; expected {len(ids)} numbers")
    return ids


def read_list(
    root: Path, name: str, *, modality: str, camid: int, folder: str | None = None
) -> tuple[ImageList, np.ndarray]:
    """Reads a list of RegDB or LLCM: lines of an image, a space and its label.

    The images lie in `folder/<pid>/`; with None anywhere, and labels stand for the unknown
    identities.

    Returns:
        The images, each of which is there and named once, and their labels, (n,) int64.
    """
    expected = f"expected `{f'{folder}/<pid>' if folder else '<folder>'}/<file> <label>`"
    parent = rf"{folder}/([0-9]{{1,9}})" if folder else "(.+)"
    legal = re.compile(rf"\s*({parent}/([^/\\]+?))\s+([0-9]{{1,9}})\s*")
    listing = functools.cache(functools.partial(files_in, root))
    items: dict[str, Item] = {}
    labels = []
    for number, line in enumerate(read_text(root, name).split("\n"), start=1):
        if not line.strip():
            continue
        found = legal.fullmatch(line)
        if not found:
            raise DataError(f"{name}:{number} of {root} is {line.strip()[:200]!r}; {expected}")
        path, pid, file, label = found.groups()
        if file not in listing(path.removesuffix(f"/{file}")):
            raise DataError(
                f"{name}:{number} names {path}, and there is no such file in {root}; is the data"
                " set complete, and the list its own?"
            )
        if path in items:
            raise DataError(f"{name}:{number} names {path} again; expected each image once")
        items[path] = (path, int(pid if folder else label), camid)
        labels.append(int(label))
    if not labels:
        raise DataError(f"{root / name} is empty; {expected} lines")
    return image_list(root, list(items.values()), modality), np.array(labels, dtype=np.int64)


def paired_lists(
    visible: tuple[ImageList, np.ndarray],
    infrared: tuple[ImageList, np.ndarray],
    description: str,
) -> TrainSet:
    """Joins what `read_list` returned for either modality: both number the same people.

    Raises:
        DataError: A label stands for two identities, an identity for two labels, labels have gaps,
            or an identity lacks a modality.
    """
    pid_of: dict[int, int] = {}
    label_of: dict[int, int] = {}
    hint = "expected a label for each, 0, 1, ...: are all lists of one split, from one source?"
    for images, labels in (visible, infrared):
        for label, pid, path in zip(
            labels.tolist(), images.pids.tolist(), images.paths, strict=True
        ):
            known = pid_of.setdefault(label, pid), label_of.setdefault(pid, label)
            if known != (pid, label):
                raise DataError(
                    f"{images.root / path} has label {label} and identity {pid}, an image before it"
                    f" has label {known[1]} and identity {known[0]}; {hint}"
                )
    missing = set(range(len(pid_of))) - set(pid_of)
    if missing:
        raise DataError(
            f"{len(pid_of)} labels up to {max(pid_of)}, and label {min(missing)} is not among them"
            f" in {visible[0].root}; {hint}"
        )
    pids = np.array([pid_of[label] for label in range(len(pid_of))], dtype=np.int64)
    return TrainSet(visible[0], infrared[0], visible[1], infrared[1], pids, description)
