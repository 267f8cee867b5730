"""Reading a data set's folder: its layout, lists, identities and listings, each checked.

Every path read lies inside the data folder, links resolved; every error names file and line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path, PurePosixPath

import numpy as np

from datasets.base import DataError, DataSet, ImageList, Item, TrainSet, image_list

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
STAND_IN_HINT = (
    " To try everything without it, write stand-in data: python stand_in.py --layout {} --out DIR"
    " --train-ids 150 --test-ids 40 --images-per-id 10 --seed 0"
)


def folder_images(folder: str | Path, modality: str) -> ImageList:
    """Lists the images in any folder and below it, by name; identities are unknown (-1).

    Hidden files and folders are passed over.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"image folder {root} does not exist; expected a folder of images")
    root = root.resolve()
    names = []
    for path in root.rglob("*"):
        below = path.relative_to(root)
        hidden = any(part.startswith(".") for part in below.parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file():
            names.append(below.as_posix())
    if not names:
        raise DataError(
            f"{folder} holds no image, nor do the folders in it; expected files named"
            f" {', '.join(IMAGE_SUFFIXES)}"
        )
    return image_list(root, [(name, -1, -1) for name in sorted(names)], modality)


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
        raise DataError(f"data folder {path} does not exist. {expected}. {hint}")
    missing = lacking(path, data)
    if not missing:
        return path.resolve()
    for folder in [path.resolve().parent, *sorted(path.iterdir())]:  # one too deep or too high
        if not lacking(folder, data):
            hint = f"It is in {folder}: pass --data-path {folder}"
    for other in others:
        if not lacking(path, other):
            hint = f"It looks like {other.title}: pass --dataset {other.name}"
    if missing == [f"{data.folders[0]}/"] and data.lists_hint:
        hint = f"The images are there, the lists are not: {data.lists_hint}"
    raise DataError(f"{path} has no {', '.join(missing)}. {expected}. {hint}")


def path_inside(root: Path, relative: str) -> str:
    """Returns the real path of `relative`, which must not leave the data folder by a link."""
    real = os.path.realpath(root / relative)
    if not Path(real).is_relative_to(root):
        raise DataError(
            f"{root / relative} is a link to {real}, outside of the data folder {root}; only what"
            " lies inside is read: copy it there"
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


def files_in(root: Path, folder: str) -> dict[str, bool]:
    """Lists a folder's regular files ({} when it is not there): name -> whether it is a link."""
    try:
        with os.scandir(path_inside(root, folder)) as entries:
            return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DataError(f"{root / folder} cannot be listed: {error.strerror}") from error


def find_images(
    root: Path, pids: Iterable[int], cameras: Iterable[int], *layout: str
) -> list[Item]:
    """Lists every image of these identities in these cameras: by identity, camera, then path.

    `layout`: folders to look into, such as "cam{camera}/{pid:04d}"; they need not exist.
    """
    items: list[Item] = []
    for pid, camera in product(pids, cameras):
        paths = []
        for folder in dict.fromkeys(f.format(camera=camera, pid=pid) for f in layout):
            for name, is_link in files_in(root, folder).items():
                if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                    paths.append(f"{folder}/{name}")
                    if is_link:
                        path_inside(root, paths[-1])
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
    listings: dict[str, dict[str, bool]] = {}  # folders seen so far
    origins: dict[str, str] = {}
    labels, pids = [], []
    for number, line in enumerate(read_text(root, name).split("\n"), start=1):
        if not line.strip():
            continue
        origin = f"{name}:{number}"
        path, label = _parse_line(line, origin, folder, root, expected)
        if path in origins:
            raise DataError(
                f"{origin} names {path}, as {origins[path]} does; expected each image once"
            )
        parent, file = path.rsplit("/", 1)
        if parent not in listings:
            listings[parent] = files_in(root, parent)
        if file not in listings[parent]:
            raise DataError(
                f"{origin} names {path}, and there is no such file in {root}; is the data set"
                " complete, and the list its own?"
            )
        if listings[parent][file]:
            path_inside(root, path)
        origins[path] = origin
        labels.append(label)
        pids.append(int(path.split("/")[1]) if folder else label)
    if not labels:
        raise DataError(f"{root / name} is empty; {expected} lines")
    items = [(path, pid, camid) for path, pid in zip(origins, pids, strict=True)]
    images = replace(image_list(root, items, modality), origins=tuple(origins.values()))
    return images, np.array(labels, dtype=np.int64)


def _parse_line(
    line: str, origin: str, folder: str | None, root: Path, expected: str
) -> tuple[str, int]:
    """Returns path and label of a list's line."""
    words = line.rsplit(maxsplit=1)
    if len(words) == 1:
        raise DataError(f"{origin} has no label: {words[0]!r}; {expected}")
    path, label = PurePosixPath(words[0].strip()), words[1]
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{origin} names {str(path)!r}, which leaves {root}; {expected}")
    if not re.fullmatch(r"[0-9]{1,9}", label):
        raise DataError(f"{origin} has the label {label!r}, not a whole number; {expected}")
    legal = rf"{folder}/[0-9]{{1,9}}/[^/]+" if folder else r"[^\\]+/[^/\\]+"
    if not re.fullmatch(legal, str(path)):
        raise DataError(f"{origin} names {str(path)!r}; {expected}")
    return str(path), int(label)


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
    first_of: dict[int, tuple[int, str]] = {}  # label -> identity, and where it is first named
    for images, labels in (visible, infrared):
        for label, pid, origin in zip(labels.tolist(), images.pids, images.origins, strict=True):
            known, first = first_of.setdefault(label, (pid, origin))
            if pid != known:
                raise DataError(
                    f"{origin} gives label {label} to identity {pid}, {first} to {known}; expected"
                    " one identity per label: are all lists of one split, from one source?"
                )
    names = [images.origins[0].rsplit(":", 1)[0] for images, _ in (visible, infrared)]
    where = f"{names[0]} and {names[1]} of {visible[0].root}"
    pids = np.array([first_of[label][0] for label in sorted(first_of)], dtype=np.int64)
    if len(np.unique(pids)) < len(pids):
        raise DataError(f"an identity has two labels in {where}; expected one label each")
    gaps = set(range(len(pids))) - set(first_of)
    if gaps:
        raise DataError(
            f"{len(pids)} labels up to {max(first_of)}, and label {min(gaps)} is not among them;"
            f" expected 0..{len(pids) - 1} without gaps in {where}"
        )
    alone = set(visible[1].tolist()) ^ set(infrared[1].tolist())
    if alone:
        pid, origin = first_of[min(alone)]
        raise DataError(
            f"identity {pid} ({origin}) has images in one modality only; expected images in both"
            f" of {where}"
        )
    return TrainSet(visible[0], infrared[0], visible[1], infrared[1], pids, description)
