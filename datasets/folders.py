"""Reading a data set's folder: its layout, lists, identities and listings, each checked.

Every path read lies inside the data folder, links resolved; every error names file and line.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath

import numpy as np

from datasets.base import DATASETS, DataError, ImageList, Source, TrainSet

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
STAND_IN = (
    "To try everything without it, write stand-in data: python stand_in.py --layout {} --out DIR"
    " --train-ids 150 --test-ids 40 --images-per-id 10 --seed 0"
)
SYSU_FOLDER = "cam{}/{:04d}"  # of a camera and an identity

Item = tuple[int, int, str]  # pid, camera, relative path
Index = dict[tuple[int, int], list[str]]  # (pid, camera) -> sorted relative paths


def folder_images(folder: str | Path, modality: str) -> ImageList:
    """List the images in a folder of one's own and below it, by name; identities are unknown (-1).

    Args:
        folder: any folder; hidden files and folders are passed over.
        modality: "visible" or "infrared".

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"image folder {root} does not exist; expected a folder of images")
    root = root.resolve()
    below = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    names = [
        path.as_posix()
        for path in below
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.parts)
    ]
    if not names:
        raise DataError(
            f"{folder} holds no image, nor do the folders in it; expected files named"
            f" {', '.join(IMAGE_SUFFIXES)}"
        )
    unknown = np.full(len(names), -1, dtype=np.int64)
    return ImageList(root, tuple(sorted(names)), unknown, unknown, modality)


def data_root(path: Path, source: Source) -> Path:
    """Return the data folder with links resolved, after checking that its layout is `source`'s."""

    def lacking(folder: Path, kind: Source) -> list[str]:
        return [f"{name}/" for name in kind.folders if not os.path.isdir(folder / name)]

    expected = f"{source.title} is a folder with {', '.join(f'{f}/' for f in source.folders)} in it"
    hint = f"{source.how_to_get} {STAND_IN.format(source.name)}"
    if not path.is_dir():
        raise DataError(f"data folder {path} does not exist. {expected}. {hint}")
    missing = lacking(path, source)
    if not missing:
        return path.resolve()
    below = sorted(path.iterdir()) if os.access(path, os.R_OK) else []
    for other in [path.resolve().parent, *below]:  # one folder too high or too deep: usual slips
        if not lacking(other, source):
            hint = f"It is in {other}: pass --data-path {other}"
    for other in DATASETS.values():
        if not lacking(path, other):
            hint = f"It looks like {other.title}: pass --dataset {other.name}"
    if missing == [f"{source.folders[0]}/"] and hasattr(source, "lists_hint"):
        hint = f"The images are there, the lists are not: {source.lists_hint}"
    raise DataError(f"{path} has no {', '.join(missing)}. {expected}. {hint}")


def path_inside(root: Path, relative: str) -> str:
    """Return the real path of `relative`, which must not leave the data folder by a link."""
    real = os.path.realpath(root / relative)
    if not Path(real).is_relative_to(root):
        raise DataError(
            f"{root / relative} is a link to {real}, outside of the data folder {root}; only what"
            " lies inside is read: copy it there"
        )
    return real


def read_text(root: Path, relative: str) -> str:
    """Read one of the data set's own lists; raises DataError where that fails."""
    real = path_inside(root, relative)
    if not os.path.isfile(real):
        raise DataError(f"{root / relative} does not exist; it is one of the data set's own lists")
    try:
        return Path(real).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{root / relative} can't be read as text: {error}") from error


def files_in(root: Path, folder: str) -> dict[str, bool]:
    """List a folder's regular files ({} when it is not there): name -> lies inside the root."""
    try:
        with os.scandir(path_inside(root, folder)) as entries:
            return {
                entry.name: not entry.is_symlink()
                or Path(os.path.realpath(entry.path)).is_relative_to(root)
                for entry in entries
                if entry.is_file()
            }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DataError(f"{root / folder} can't be listed: {error.strerror}") from error


@dataclass(frozen=True)
class ListLine:
    """One line of a RegDB or LLCM list."""

    path: str
    pid: int
    label: int
    origin: str


def read_list(root: Path, name: str, folder: str | None = None) -> list[ListLine]:
    """Read a list; each line names an image (RegDB: in `folder`) that is there, and no other does.

    Without `folder` an image may be anywhere, and its label stands for the unknown raw identity.
    """
    expected = f"expected `{f'{folder}/<pid>' if folder else '<folder>'}/<file> <label>`"
    listings: dict[str, dict[str, bool]] = {}  # folders seen so far
    lines: dict[str, ListLine] = {}
    for number, text in enumerate(read_text(root, name).split("\n"), start=1):
        if not text.strip():
            continue
        line = _parse_line(text, f"{name}:{number}", folder, root, expected)
        if line.path in lines:
            raise DataError(
                f"{line.origin} names {line.path}, as {lines[line.path].origin} does; expected each"
                " image once"
            )
        parent, file = line.path.rsplit("/", 1)
        if parent not in listings:
            listings[parent] = files_in(root, parent)
        if file not in listings[parent]:
            raise DataError(
                f"{line.origin} names {line.path}, and there is no such file in {root}; is the data"
                " set complete, and the list its own?"
            )
        if not listings[parent][file]:
            path_inside(root, line.path)  # raises
        lines[line.path] = line
    if not lines:
        raise DataError(f"{root / name} is empty; {expected} lines")
    return list(lines.values())


def _parse_line(text: str, origin: str, folder: str | None, root: Path, expected: str) -> ListLine:
    words = text.rsplit(maxsplit=1)
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
    return ListLine(str(path), int(path.parts[1] if folder else label), int(label), origin)


def paired_lists(
    source: Source,
    root: Path,
    names: Sequence[str],
    lists: Sequence[list[ListLine]],
    cameras: tuple[int, int],
    description: str,
) -> TrainSet:
    """Check a visible and an infrared list against each other; both number the same people."""
    where = f"{names[0]} and {names[1]} of {root}"
    owner: dict[int, ListLine] = {}
    for line in (*lists[0], *lists[1]):
        first = owner.setdefault(line.label, line)
        if first.pid != line.pid:
            raise DataError(
                f"{line.origin} gives label {line.label} to identity {line.pid}, {first.origin}"
                f" to {first.pid}; expected one identity per label in {where}: are all lists of"
                " one split, from one source?"
            )
    pids = np.array([owner[label].pid for label in sorted(owner)], dtype=np.int64)
    if len(set(pids.tolist())) < len(pids):
        raise DataError(f"an identity has two labels in {where}; expected one label each")
    gaps = set(range(len(pids))) - set(owner)
    if gaps:
        raise DataError(
            f"{len(pids)} labels up to {max(owner)}, and label {min(gaps)} is not among them;"
            f" expected 0..{len(pids) - 1} without gaps in {where}"
        )
    for lines, others in (lists, lists[::-1]):
        alone = {line.label for line in lines} - {line.label for line in others}
        if alone:
            raise DataError(
                f"identity {owner[min(alone)].pid} ({owner[min(alone)].origin}) has images in"
                f" one modality only; expected images in both of {where}"
            )
    images = [
        ImageList(
            root,
            tuple(line.path for line in lines),
            np.array([line.pid for line in lines], dtype=np.int64),
            np.full(len(lines), camera, dtype=np.int64),
            modality,
            tuple(line.origin for line in lines),
        )
        for lines, camera, modality in zip(lists, cameras, ("visible", "infrared"), strict=True)
    ]
    labels = [np.array([line.label for line in lines], dtype=np.int64) for lines in lists]
    return TrainSet(source.name, *images, *labels, pids, description)


def read_ids(root: Path, split: str, folder: str = "exp") -> set[int]:
    """Read exp/{split}_id.txt: one line of comma-separated identities."""
    name = f"{folder}/{split}_id.txt"
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


def find_images(
    root: Path, pids: np.ndarray, cameras: Iterable[int], layout: Sequence[str] = (SYSU_FOLDER,)
) -> Index:
    """List every image of these identities in these cameras; empty pairs are left out."""
    index: Index = {}
    for pid, camera in product(pids.tolist(), cameras):
        names = []
        for folder in dict.fromkeys(pattern.format(camera, pid) for pattern in layout):
            for name, inside in files_in(root, folder).items():
                if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                    names.append(f"{folder}/{name}")
                    if not inside:
                        path_inside(root, names[-1])  # raises
        if names:
            index[pid, camera] = sorted(names)
    return index


def check_not_empty(
    root: Path, count: int, asked: str, sides: dict[str, tuple[Index, Sequence[str]]]
) -> None:
    """Raise DataError when a side's folders have no image of the `count` people asked for."""
    for what, (index, folders) in sides.items():
        if not index:
            raise DataError(
                f"empty {what}: {', '.join(folders)} of {root} have no image of the {count}"
                f" identities in {asked}; is the data set complete, and the list its own?"
            )


def drawn_gallery(
    root: Path, draws: Sequence[list[Item]], modality: str
) -> tuple[ImageList, tuple[np.ndarray, ...]]:
    """List every image that was drawn once, and the rows of each draw."""
    rows = {item: row for row, item in enumerate(sorted({i for items in draws for i in items}))}
    trials = tuple(np.array([rows[item] for item in items], dtype=np.int64) for items in draws)
    return image_list(root, list(rows), modality), trials


def image_list(root: Path, items: Sequence[Item], modality: str) -> ImageList:
    """Make a list of images out of items."""
    pids, cameras = (np.array([item[i] for item in items], dtype=np.int64) for i in (0, 1))
    return ImageList(root, tuple(item[2] for item in items), pids, cameras, modality)


def seeded_draw(index: Index, trial: int, shots: int) -> list[Item]:
    """Draw a gallery: `shots` images of each identity and camera; see `sysu_mm01.Sysu`."""
    generator, items = random.Random(trial), []
    for (pid, camera), names in sorted(index.items()):
        single = shots == 1
        drawn = (
            [generator.choice(names)] if single else generator.sample(names, min(shots, len(names)))
        )
        items += [(pid, camera, name) for name in drawn]
    return items
