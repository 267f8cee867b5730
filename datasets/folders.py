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

    An image is told by its suffix or its first bytes; hidden files and folders are skipped.
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
    if not os.path.isdir(path_inside(root, folder)):  # False for too long a name as well
        return set()
    with os.scandir(root / folder) as entries:
        files = [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    for entry in files:
        if entry.is_symlink():
            path_inside(root, f"{folder}/{entry.name}")
    return {f"{folder}/{entry.name}" for entry in files}


def find_images(root: Path, pids: Iterable[int], cameras: Iterable[int], prefix: str) -> list[Item]:
    """Lists every image of these identities in these cameras: by identity, camera, then path.

    Camera 1, identity 7: those of `prefix`1/0007/ and of `prefix`1/7/, whichever are there.
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


def read_list(root: Path, name: str, folder: str | None = None) -> dict[str, tuple[int, int]]:
    """Reads a list of RegDB or LLCM: lines of an image's path, a space and its label.

    With a `folder`, images lie in `folder/<pid>/`; without, anywhere, and the label also serves as
    the identity, which the list does not name.

    Returns:
        (pid, label) of each path; every path is a file in the data folder and listed once.
    """
    expected = f"expected `{f'{folder}/<pid>' if folder else '<folder>'}/<file> <label>`"
    parent = rf"{folder}/([0-9]{{1,9}})" if folder else "([^\0]+)"
    legal = re.compile(rf"\s*({parent}/[^/\\]+?)\s+([0-9]{{1,9}})\s*")
    listing = functools.cache(functools.partial(files_in, root))
    found: dict[str, tuple[int, int]] = {}
    for number, line in enumerate(read_text(root, name).split("\n"), start=1):
        if not line.strip():
            continue
        match = legal.fullmatch(line)
        if not match:
            raise DataError(f"{name}:{number} of {root} is {line.strip()[:200]!r}; {expected}")
        path, pid, label = match.groups()
        if path not in listing(path.rpartition("/")[0]):
            raise DataError(
                f"{name}:{number} names {path}, and there is no such file in {root}; is the data"
                " set complete, and the list its own?"
            )
        if path in found:
            raise DataError(f"{name}:{number} names {path} again; expected each image once")
        found[path] = int(pid if folder else label), int(label)
    if not found:
        raise DataError(f"{root / name} is empty; {expected} lines")
    return found


def paired_lists(
    root: Path,
    names: tuple[str, str],
    description: str,
    *,
    folders: tuple[str | None, str | None] = (None, None),
    camids: tuple[int, int] = (-1, -1),
) -> TrainSet:
    """Reads a visible and an infrared list (see `read_list`) that label the same identities.

    Raises:
        DataError: A label stands for two identities, an identity for two labels, labels have gaps,
            or an identity lacks a modality.
    """
    lists = [read_list(root, name, folder) for name, folder in zip(names, folders, strict=True)]
    pairs = sorted({(label, pid) for one in lists for pid, label in one.values()})
    label_of = {pid: label for label, pid in pairs}
    for number, (label, pid) in enumerate(pairs):
        if label != number or label_of[pid] != label:
            raise DataError(
                f"identity {pid} has label {label} in the lists of {root}; expected one label for"
                " each, 0, 1, ... without gaps: are all lists of one split, from one source?"
            )
    visible, infrared = (
        image_list(root, [(path, pid, camid) for path, (pid, _) in one.items()], modality)
        for one, camid, modality in zip(lists, camids, ("visible", "infrared"), strict=True)
    )
    return TrainSet(visible, infrared, np.array(list(label_of)), description)
