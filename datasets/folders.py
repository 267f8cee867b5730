"""Reading a data set's folder: its lists, identities and listings, each checked.

Every path read lies inside the data folder, links resolved; every error names file and line.
"""

import functools
import logging
import os
import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.base import DataError, ImageList, Item, TrainSet, image_list
from datasets.decode import FORMATS

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


def folder_images(folder: str | Path, modality: str) -> ImageList:
    """Lists the images in any folder and below it, by name; identities are unknown (-1).

    An image is told by its suffix or its first bytes; hidden files and folders are passed over.
    Logs how many files were taken, and which were not.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise DataError(f"image folder {root} does not exist, or is a file, not a folder")
    names, skipped = [], []
    for path in sorted(root.rglob("*")):
        below = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in below.parts):
            image = path.suffix.lower() in IMAGE_SUFFIXES or _is_image(path)
            (names if image else skipped).append(below.as_posix())
    if not names:
        raise DataError(f"{folder} holds no image, also below; expected {', '.join(FORMATS)}")
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


def path_inside(root: Path, relative: str) -> Path:
    """Returns `relative` below the data folder, which it must not leave, links resolved."""
    path = root / relative
    if not path.resolve().is_relative_to(root):
        raise DataError(
            f"{path} leads to {path.resolve()}, outside of the data folder {root}; only what lies"
            " inside is read: copy it there"
        )
    return path


def read_text(root: Path, relative: str) -> str:
    """Reads one of the data set's own lists; raises DataError where that fails."""
    path = path_inside(root, relative)
    if not path.is_file():
        raise DataError(f"{path} does not exist; it is one of the data set's own lists")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error


def files_in(root: Path, folder: str) -> set[str]:
    """Returns the paths of a folder's files, hidden ones left out; none where it is not there."""
    if not path_inside(root, folder).is_dir():
        return set()
    with os.scandir(root / folder) as entries:
        files = [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    for entry in files:
        if entry.is_symlink():
            path_inside(root, f"{folder}/{entry.name}")
    return {f"{folder}/{entry.name}" for entry in files}


def find_images(root: Path, pids: Iterable[int], cameras: Iterable[int], prefix: str) -> list[Item]:
    """Lists every image of these identities in these cameras: by identity, camera, then path.

    Of camera 1 and identity 7 those in `prefix`1/0007/ and in `prefix`1/7/, if there.
    """
    return [
        (path, pid, camera)
        for pid, camera in product(pids, cameras)
        for folder in sorted({f"{prefix}{camera}/{pid:04d}", f"{prefix}{camera}/{pid}"})
        for path in sorted(files_in(root, folder))
        if path.lower().endswith(IMAGE_SUFFIXES)
    ]


def read_ids(root: Path, name: str) -> set[int]:
    """Reads a file with one line of comma-separated identities."""
    words = read_text(root, name).strip().rstrip(",").split(",")
    try:
        return {int(word) for word in words}
    except ValueError as error:
        raise DataError(
            f"{root / name}: {error}; expected one line of comma-separated whole numbers, such as"
            " 1,2,4"
        ) from error


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
    legal = re.compile(rf"\s*({parent}/[^/\\]+?)\s+([0-9]{{1,9}})\s*")
    listing = functools.cache(functools.partial(files_in, root))
    items: dict[str, Item] = {}
    labels = []
    for number, line in enumerate(read_text(root, name).split("\n"), start=1):
        if not line.strip():
            continue
        found = legal.fullmatch(line)
        if not found:
            raise DataError(f"{name}:{number} of {root} is {line.strip()[:200]!r}; {expected}")
        path, pid, label = found.groups()
        if path not in listing(path.rpartition("/")[0]):
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
    labels = np.concatenate([visible[1], infrared[1]])
    numbered = np.stack([labels, np.concatenate([visible[0].pids, infrared[0].pids])], axis=1)
    pairs = np.unique(numbered, axis=0).tolist()  # [label, pid], ascending
    label_of = {pid: label for label, pid in pairs}
    for number, (label, pid) in enumerate(pairs):
        if label != number or label_of[pid] != label:
            raise DataError(
                f"identity {pid} has label {label} in the lists of {visible[0].root}; expected one"
                " label for each, 0, 1, ...: are all lists of one split, from one source?"
            )
    pids = np.array(list(label_of))
    return TrainSet(visible[0], infrared[0], visible[1], infrared[1], pids, description)
