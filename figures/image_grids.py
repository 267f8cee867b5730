"""Figures made of images: ranked lists, and where and by what a memory is addressed.

    ranked_lists("ranked.png", query_images=..., gallery_images=..., distmat=..., q_pids=...,
                 g_pids=..., title="RegDB, visible to infrared, not re-ranked")

Files, style and errors are as in `figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike
from PIL import Image

from figures.charts import (
    BLUE,
    COLUMN_WIDTH,
    DENSITY,
    FAINT,
    FONT,
    INK,
    LINE,
    MARGIN,
    ORANGE,
    PAGE_WIDTH,
    draw,
    heading,
    page,
    palette,
    text_width,
    write,
    write_heading,
)

IMAGE_COLORS = 48  # of one image
PAGE_HEIGHT = 640  # points; longer lists get smaller images, down to the least size
TILE_WIDTHS = (26, 48)  # points, least and largest width of an image
GAP, NOTE_WIDTH = 7, 66  # points
NAME_LINES = 4  # of a file's name beside a query
LEGEND_WIDTH = 122  # points, of each of its two entries
HEAD_WIDTH, PROTOTYPE_WIDTH, PATCH_GAP = 110, 80, 4  # points
SAME_WEIGHT = 1e-3  # weights that differ by less than this share of them are called the same
HEAT, HEAT_SHARE = "YlOrRd", 0.8  # colours that darken throughout; how far they cover an image
HEAT_START = 0.3  # what comes before is too light to be seen over an image
PALENESS = 0.3  # of an image below them: black becomes as light as 1 minus it


@dataclass(frozen=True)
class Frame:
    """How an answer of one kind is framed; each of the three marks suffices to tell it."""

    meaning: str
    color: str
    dashes: str | tuple[float, tuple[float, ...]]
    mark: str
    badge: str  # what the mark stands on
    ink: str  # colour of the mark


RIGHT = Frame("right: same identity", BLUE, "-", "\N{CHECK MARK}", BLUE, "white")
WRONG = Frame("wrong: other identity", ORANGE, (0, (2.6, 1.5)), "\N{BALLOT X}", "white", INK)


# ---------------------------------------------------------------------------------- ranked lists


def ranked_lists(
    path: str | Path,
    *,
    query_images: np.ndarray,
    gallery_images: np.ndarray,
    distmat: np.ndarray,
    q_pids: ArrayLike | None = None,
    g_pids: ArrayLike | None = None,
    excluded: np.ndarray | None = None,
    queries: Sequence[int] | None = None,
    query_names: Sequence[str] | None = None,
    num_queries: int = 8,
    top: int = 10,
    title: str = "",
    seed: int = 0,
) -> None:
    """Draws queries, each with its nearest gallery images, right and wrong answers told apart.

    Beside a query stand the rank of its first right answer and its average precision, over the
    whole gallery. Where `queries` is None they are drawn at random among those with a right answer
    to find, in the proportion of right and wrong nearest images, but a quarter or more of each kind
    where there are so many; the figure says how many there were to draw from.

    Without identities all answers are framed alike, and minus their distance stands below them.

    Args:
        path: File to write, .png or .pdf.
        query_images: (Q, H, W, 3) uint8.
        gallery_images: (G, H, W, 3) uint8.
        distmat: (Q, G), smaller is closer; ties keep gallery order.
        q_pids: (Q,) identities of the queries; None, as `g_pids`, where they are not known.
        g_pids: (G,) identities of the gallery.
        excluded: (Q, G) bool, True where the protocol ignores a gallery image for a query.
        queries: Rows to draw, in this order.
        query_names: (Q,) names to stand beside queries of unknown identity.
        num_queries: How many to draw at random otherwise.
        top: Gallery images a query.
        title: What was measured: data set, protocol, whether re-ranked.
        seed: Of the random choice.

    Raises:
        ValueError: Shapes or types that disagree, a distance that is not finite, a query that does
            not exist, none with a right answer to find, or another kind of file.
        OSError: When the file cannot be written.
    """
    if excluded is None:
        excluded = np.broadcast_to(False, np.shape(distmat))
    known = q_pids is not None and g_pids is not None
    if not known:
        q_pids, g_pids = (np.zeros(n, np.int64) for n in (*np.shape(distmat), 0, 0)[:2])
    given = (query_images, gallery_images, distmat, q_pids, g_pids, excluded)
    names = tuple(query_names or [""] * len(query_images))
    lists = _Lists(*map(np.asarray, given), names=names, known=known)
    if top < 1 or num_queries < 1:
        raise ValueError(f"top is {top}, num_queries {num_queries}, expected at least 1 of each")
    chosen, how = lists.draw(num_queries, seed) if queries is None else lists.named(queries)
    if lists.excluded.any():
        how += " Gallery images that the protocol ignores for a query are left out."
    draw(path, lambda: _ranked_lists(lists, chosen, min(top, len(lists.g_pids)), title, how))


@dataclass(frozen=True, eq=False)
class _Lists:
    """What `ranked_lists` was given, checked."""

    query_images: np.ndarray
    gallery_images: np.ndarray
    distmat: np.ndarray
    q_pids: np.ndarray
    g_pids: np.ndarray
    excluded: np.ndarray
    names: tuple[str, ...]
    known: bool  # whether identities are

    def __post_init__(self) -> None:
        """Holds every shape and type against the distances'."""
        distmat, shape = self.distmat, self.distmat.shape
        if distmat.ndim != 2 or 0 in shape or distmat.dtype.kind not in "fiu":
            raise ValueError(
                f"distmat has shape {shape} of {distmat.dtype}, expected numbers (Q, G), neither 0"
            )
        if not np.isfinite(distmat).all():
            row, column = np.argwhere(~np.isfinite(distmat))[0]
            value = distmat[row, column]
            raise ValueError(f"distmat[{row}, {column}] is {value}, expected a finite distance")
        size = self.query_images.shape[1:3] if self.query_images.ndim == 4 else ("H", "W")
        for name, expected, dtype in (
            ("q_pids", shape[:1], self.q_pids.dtype),
            ("g_pids", shape[1:], self.g_pids.dtype),
            ("query_images", (shape[0], *size, 3), np.uint8),
            ("gallery_images", (shape[1], *size, 3), np.uint8),
            ("excluded", shape, np.bool_),
        ):
            array = getattr(self, name)
            if array.shape != expected or 0 in array.shape or array.dtype != dtype:
                raise ValueError(
                    f"{name} has shape {array.shape} of {array.dtype}, expected "
                    f"{expected} of {np.dtype(dtype)} (distmat: {shape})"
                )
        if len(self.names) != shape[0]:
            raise ValueError(f"{len(self.names)} query_names, expected {shape[0]}, one a query")

    def ranking(self, query: int) -> np.ndarray:
        """Gallery rows that count for a query, nearest first."""
        order = np.argsort(self.distmat[query], kind="stable")
        return order[~self.excluded[query, order]]

    def named(self, queries: Sequence[int]) -> tuple[list[int], str]:
        """The rows that the caller named, and the figure's words for it."""
        chosen = np.asarray(queries)
        total = len(self.q_pids)
        if chosen.ndim != 1 or not len(chosen) or chosen.dtype.kind not in "iu":
            raise ValueError(f"queries is {queries!r}, expected row numbers, at least one")
        if chosen.min() < 0 or chosen.max() >= total:
            raise ValueError(f"queries is {queries!r}, expected row numbers from 0 to {total - 1}")
        return chosen.tolist(), f"Queries chosen by hand, {len(chosen)} of {total:,}."

    def draw(self, count: int, seed: int) -> tuple[list[int], str]:
        """Random rows, those with a right nearest image first, and the figure's words for it."""
        matches = self.q_pids[:, None] == self.g_pids
        rows = np.flatnonzero((matches & ~self.excluded).any(axis=1))
        if not len(rows):
            raise ValueError(
                f"none of {len(self.q_pids)} queries has its identity among the gallery images "
                "that count for it: do query and gallery share identities?"
            )
        rng = np.random.default_rng(seed)
        if not self.known:
            chosen = np.sort(rng.choice(rows, min(count, len(rows)), replace=False)).tolist()
            if len(chosen) == len(rows):
                return chosen, f"All {len(rows):,} queries."
            return chosen, f"{len(chosen)} of {len(rows):,} queries, drawn at random (seed {seed})."
        distances = np.where(self.excluded, np.inf, self.distmat)
        succeeds = matches[rows, distances[rows].argmin(axis=1)]
        kinds = rows[succeeds], rows[~succeeds]
        shares = _shares(min(count, len(rows)), len(kinds[0]), len(kinds[1]))
        chosen = [
            row
            for kind, share in zip(kinds, shares, strict=True)
            for row in np.sort(rng.choice(kind, share, replace=False)).tolist()
        ]
        how = (
            f"Queries drawn at random (seed {seed}): {shares[0]} of the {len(kinds[0]):,} whose "
            f"nearest image is right, {shares[1]} of the {len(kinds[1]):,} whose nearest is wrong."
        )
        return chosen, how


def _shares(count: int, successes: int, failures: int) -> tuple[int, int]:
    """How many of `count` queries to take of either kind, `count` at most their sum."""
    least = count // 4
    wanted = min(max(round(count * successes / (successes + failures)), least), count - least)
    right = max(min(wanted, successes), count - failures)
    return right, count - right


def _note(lists: _Lists, query: int, ranking: np.ndarray) -> list[str]:
    """What stands beside a query: its identity, first right answer, average precision."""
    if not lists.known:
        return _folded(lists.names[query], NOTE_WIDTH)
    ranks = np.flatnonzero(lists.g_pids[ranking] == lists.q_pids[query]) + 1
    lines = [f"identity {lists.q_pids[query]}"]
    if not len(ranks):
        return [*lines, "no right answer"]
    precision = np.mean(np.arange(1, len(ranks) + 1) / ranks)
    return [*lines, f"first hit: {ranks[0]:,}", f"AP: {100 * precision:.1f} %"]


def _folded(name: str, width: float) -> list[str]:
    """A name broken anywhere into lines of so many points; of a long one its end."""
    font, lines = FontProperties(size=FONT), [""]
    for letter in name:
        if text_width(lines[-1] + letter, font) > width:
            lines.append("")
        lines[-1] += letter
    kept = lines[-NAME_LINES:]
    return kept if len(kept) == len(lines) else ["\N{HORIZONTAL ELLIPSIS}", *kept[1:]]


def _tile_size(columns: int, rows: int, aspect: float) -> tuple[int, int]:
    """Width and height of an image, whole points; aspect is height / width."""
    room = PAGE_WIDTH - 2 * MARGIN - NOTE_WIDTH - 2 * GAP
    width = min(room / columns - GAP, (PAGE_HEIGHT / rows - GAP) / aspect)
    width = int(np.clip(width, *TILE_WIDTHS))
    return width, max(round(width * aspect), 1)


def _ranked_lists(lists: _Lists, chosen: Sequence[int], top: int, title: str, how: str) -> Figure:
    """The figure: words, column heads, a row per query, legend."""
    height, width = lists.query_images.shape[1:3]
    tile = _tile_size(top + 1, len(chosen), height / width)
    below_tile = GAP if lists.known else GAP + LINE - 2
    pitch = tile[0] + GAP, tile[1] + below_tile
    first = MARGIN + GAP + tile[0] + NOTE_WIDTH + 2 * GAP  # left edge of the nearest image
    page_width = max(first + top * pitch[0] - GAP + MARGIN + 2, COLUMN_WIDTH)
    head = heading(title, how, page_width - 2 * MARGIN)
    below = MARGIN + LINE * (len(head) + 1) + 6  # top edge of the first image
    bottom = below + len(chosen) * pitch[1]

    figure, axes = page(page_width, bottom + (12 + MARGIN if lists.known else 0))
    write_heading(axes, head)
    write(axes, MARGIN + 2 + tile[0] / 2, below - 5, "query", va="baseline", ha="center")
    for place in range(top):
        x = first + place * pitch[0] + tile[0] / 2
        write(axes, x, below - 5, str(place + 1), va="baseline", ha="center")
    for number, query in enumerate(chosen):
        y = below + number * pitch[1]
        _row(axes, lists, query, top, (first, y), tile)
    if lists.known:
        _legend(axes, bottom, first, page_width)
    return figure


def _row(
    axes: Axes, lists: _Lists, query: int, top: int, corner: tuple[int, int], tile: tuple[int, int]
) -> None:
    """Draws a query, what is said of it, and its nearest images, the first of them at corner."""
    (first, y), ranking = corner, lists.ranking(query)
    _picture(axes, lists.query_images[query], (MARGIN + 2, y), tile)
    note = _note(lists, query, ranking)
    for line, text in enumerate(note):
        x, weight = MARGIN + 2 + tile[0] + GAP, "normal" if line or not lists.known else "bold"
        write(axes, x, y + tile[1] / 2 + (line - len(note) / 2) * LINE, text, fontweight=weight)
    for place, row in enumerate(ranking[:top].tolist()):
        x = first + place * (tile[0] + GAP)
        _picture(axes, lists.gallery_images[row], (x, y), tile)
        if lists.known:
            right = lists.g_pids[row] == lists.q_pids[query]
            _frame(axes, RIGHT if right else WRONG, (x, y), tile)
        else:
            _outline(axes, (x, y), tile)
            score = f"{-lists.distmat[query, row]:.2f}".replace("-", "\N{MINUS SIGN}")
            write(axes, x + tile[0] / 2, y + tile[1] + 1, score, ha="center")


def _picture(axes: Axes, image: np.ndarray, corner: tuple[int, int], tile: tuple[int, int]) -> None:
    """Puts an image (H, W, 3) on a page, with no more pixels than can be seen there."""
    (x, y), (width, height) = corner, tile
    pixels = (DENSITY * width, DENSITY * height)
    image = Image.fromarray(np.asarray(image)).resize(pixels, Image.Resampling.BILINEAR)
    image = palette(image, IMAGE_COLORS).convert("RGB")
    axes.imshow(image, extent=(x, x + width, y + height, y), aspect="auto", interpolation="none")


def _frame(axes: Axes, frame: Frame, corner: tuple[float, float], tile: tuple[int, int]) -> None:
    """Frames what lies at a corner, with the answer's mark in a badge at its top left."""
    (x, y), (width, height) = corner, tile
    line = {"linewidth": 1.8, "edgecolor": frame.color, "linestyle": frame.dashes}
    axes.add_patch(Rectangle((x - 1.5, y - 1.5), width + 3, height + 3, fill=False, **line))
    badge = {"facecolor": frame.badge, "edgecolor": frame.color, "linewidth": 1}
    axes.add_patch(Rectangle((x - 2, y - 2), 9, 9, **badge))
    mark = {"ha": "center", "va": "center_baseline", "color": frame.ink, "fontweight": "bold"}
    write(axes, x + 2.5, y + 2.5, frame.mark, **mark)


def _legend(axes: Axes, y: float, first: float, page_width: float) -> None:
    """Says what the frames mean, below the images, from the first of them on if there is room."""
    x = min(first, page_width - 2 * LEGEND_WIDTH)
    for frame in (RIGHT, WRONG):
        _frame(axes, frame, (x, y + 2), (20, 10))
        write(axes, x + 27, y + 7, frame.meaning, va="center_baseline")
        x += LEGEND_WIDTH


def _outline(axes: Axes, corner: tuple[float, float], tile: tuple[int, int]) -> None:
    """A thin line around what lies at a corner, which says nothing of it."""
    axes.add_patch(Rectangle(corner, *tile, fill=False, linewidth=0.6, edgecolor=FAINT))


# ------------------------------------------------------------------------------ memory addressing


@dataclass(frozen=True, eq=False)
class Fired:
    """The prototypes of one level that each of n images addresses most.

    Attributes:
        size: Prototypes in the level's bank.
        numbers: (n, k) the prototypes, strongest first; -1 where an image addresses fewer.
        maps: (n, k, h, w) their weights in the reads of the image's positions, 0 to 1.
    """

    size: int
    numbers: np.ndarray
    maps: np.ndarray


def addressing(
    path: str | Path,
    *,
    images: np.ndarray,
    names: Sequence[str],
    levels: Mapping[str, Fired],
    title: str = "",
) -> None:
    """Draws where on each image every granularity's strongest prototypes fire.

    Colours go from 0 to the greatest weight of that level in the figure, which is written above it.

    Args:
        path: File to write, .png or .pdf.
        images: (n, H, W, 3) uint8.
        names: What stands before each image.
        levels: By name, coarser ones to the right; all with as many prototypes k an image.
        title: Which network, which images.

    Raises:
        ValueError: No image, no level, or shapes that disagree.
        OSError: When the file cannot be written.
    """
    images = np.asarray(images)
    if images.ndim != 4 or not len(images) or len(names) != len(images) or not levels:
        raise ValueError(
            f"images {images.shape}, {len(names)} names, {len(levels)} levels; expected "
            "(n, H, W, 3), n names, at least one level"
        )
    for level, fired in levels.items():
        shapes = fired.numbers.shape, fired.maps.shape
        if shapes[0] != shapes[1][:2] or len(fired.numbers) != len(images) or fired.maps.ndim != 4:
            raise ValueError(f"{level}: shapes are {shapes}, expected (n, k) and (n, k, h, w)")
    draw(path, lambda: _addressing(images, names, levels, title))


def _addressing(
    images: np.ndarray, names: Sequence[str], levels: Mapping[str, Fired], title: str
) -> Figure:
    """The figure: words, level heads, a row per image, scale."""
    count = max(fired.numbers.shape[1] for fired in levels.values())
    aspect = images.shape[1] / images.shape[2]
    tile = _tile_size(1 + count * len(levels), len(images), aspect)
    group = max(count * (tile[0] + GAP) + GAP, HEAD_WIDTH)  # width of a level's columns
    pitch = tile[1] + LINE + 2
    first = MARGIN + NOTE_WIDTH + tile[0] + 2 * GAP
    width = max(first + group * len(levels) + MARGIN, COLUMN_WIDTH)
    note = (
        "Each image with the prototypes that its positions read most, strongest first: colour is "
        "the prototype's weight at a position, below stands the prototype's number."
    )
    head = heading(title, note, width - 2 * MARGIN)
    top = MARGIN + LINE * (len(head) + 2) + 4
    figure, axes = page(width, top + len(images) * pitch + LINE + 2 * MARGIN)
    write_heading(axes, head)
    for column, (level, fired) in enumerate(levels.items()):
        x = first + column * group
        words, scale = f"{level}, {fired.size:,} in all", _range(fired.maps)
        write(axes, x, top - 2 * LINE - 2, words, fontweight="bold")
        write(axes, x, top - LINE - 2, scale, color=FAINT)
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        y = top + number * pitch
        for line, text in enumerate(name.splitlines()):
            write(axes, MARGIN, y + LINE * line, text, fontweight="normal" if line else "bold")
        _picture(axes, image, (first - tile[0] - GAP - 2, y), tile)
        for column, fired in enumerate(levels.values()):
            corner = first + column * group, y
            _fired(axes, image, fired, number, corner, tile)
    _scale(axes, (first, top + len(images) * pitch + 2))
    return figure


def _alike(maps: np.ndarray) -> bool:
    """Whether a level is read with the same weights at every position."""
    return maps.max(initial=0) - maps.min(initial=1) < SAME_WEIGHT * maps.max(initial=0)


def _range(maps: np.ndarray) -> str:
    """What a level's colours stand for, in words."""
    most = float(maps.max(initial=0))
    if not most:
        return "reads zero everywhere"
    if _alike(maps):
        return f"the same everywhere: {100 * most:.2g} %"
    return f"weights from 0 to {100 * most:.{0 if most >= 0.1 else 2}f} %"


def _fired(
    axes: Axes,
    image: np.ndarray,
    fired: Fired,
    row: int,
    corner: tuple[float, float],
    tile: tuple[int, int],
) -> None:
    """An image's strongest prototypes of one level, as heat over it, from a corner to the right."""
    most = fired.maps.max(initial=0)
    for place, (number, weights) in enumerate(
        zip(fired.numbers[row], fired.maps[row], strict=True)
    ):
        x, y = corner[0] + place * (tile[0] + GAP), corner[1]
        middle = x + tile[0] / 2
        if number < 0 or _alike(fired.maps):
            words = "none" if number < 0 else "alike"
            write(axes, middle, y + tile[1] / 2 - FONT / 2, words, ha="center", color=FAINT)
            continue
        _picture(axes, _heated(image, weights / most), (x, y), tile)
        _outline(axes, (x, y), tile)
        write(axes, middle, y + tile[1] + 1, str(number), ha="center")


def _heated(image: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """An image (H, W, 3), grey and pale, and over it the colours of shares (h, w), 0 to 1."""
    height, width = image.shape[:2]
    rows = np.arange(height) * shares.shape[0] // height
    columns = np.arange(width) * shares.shape[1] // width
    heat = shares[rows][:, columns]
    pale = 1 - PALENESS * (1 - image.mean(axis=2, keepdims=True) / 255)
    cover = (HEAT_SHARE * np.sqrt(heat))[..., None]
    colors = matplotlib.colormaps[HEAT](HEAT_START + (1 - HEAT_START) * heat)[..., :3]
    mixed = (1 - cover) * pale + cover * colors
    return (255 * mixed).round().astype(np.uint8)


def _scale(axes: Axes, corner: tuple[float, float]) -> None:
    """The colours of the heat, from none to a level's greatest weight."""
    (x, y), steps = corner, 80
    ramp = _heated(np.full((1, steps, 3), 128, np.uint8), np.linspace(0, 1, steps)[None])
    write(axes, x, y, "0")
    extent = (x + 10, x + 90, y + 10, y + 1)
    axes.imshow(ramp, extent=extent, aspect="auto")
    write(axes, x + 96, y, "a level's greatest weight in this figure")


@dataclass(frozen=True, eq=False)
class Patches:
    """What addresses one prototype most.

    Attributes:
        name: A few words in lines, the first of them bold.
        visible: (a, p, p, 3) uint8 patches of visible images around the position, best first.
        infrared: (b, p, p, 3) likewise.
        visible_weights: (a,) the prototype's weights in those positions' reads.
        infrared_weights: (b,) likewise.
    """

    name: str
    visible: np.ndarray
    infrared: np.ndarray
    visible_weights: np.ndarray
    infrared_weights: np.ndarray


def prototypes(
    path: str | Path, rows: Sequence[Patches], *, title: str = "", note: str = ""
) -> None:
    """Draws prototypes, each with the visible and the infrared patches that address it most.

    Args:
        path: File to write, .png or .pdf.
        rows: One prototype each.
        title: Which network, which level.
        note: Of which images the patches are.

    Raises:
        ValueError: No prototype.
        OSError: When the file cannot be written.
    """
    if not rows:
        raise ValueError("no prototype to draw, expected at least one")
    draw(path, lambda: _prototypes(rows, title, note))


def _prototypes(rows: Sequence[Patches], title: str, note: str) -> Figure:
    """The figure: words, heads, a row per prototype."""
    count = max(1, *(max(len(row.visible), len(row.infrared)) for row in rows))
    room = (PAGE_WIDTH - 2 * MARGIN - PROTOTYPE_WIDTH - 3 * GAP) / 2
    side = int(np.clip(room / count - PATCH_GAP, *TILE_WIDTHS))
    half = max(count * (side + PATCH_GAP), LEGEND_WIDTH)
    left = MARGIN + PROTOTYPE_WIDTH
    width = max(left + 2 * half + 2 * GAP + MARGIN, COLUMN_WIDTH)
    head = heading(title, note, width - 2 * MARGIN)
    top, pitch = MARGIN + LINE * (len(head) + 1) + 6, side + LINE + 5
    figure, axes = page(width, top + len(rows) * pitch + MARGIN)
    write_heading(axes, head)
    for x, words in ((left, "visible patches"), (left + half + 2 * GAP, "infrared patches")):
        write(axes, x, top - LINE - 3, words, fontweight="bold")
    for number, row in enumerate(rows):
        y = top + number * pitch
        for line, text in enumerate(row.name.splitlines()):
            write(axes, MARGIN, y + LINE * line, text, fontweight="normal" if line else "bold")
        _patches(axes, row.visible, row.visible_weights, (left, y), side)
        corner = left + half + 2 * GAP, y
        _patches(axes, row.infrared, row.infrared_weights, corner, side)
    return figure


def _patches(
    axes: Axes, patches: np.ndarray, weights: np.ndarray, corner: tuple[float, float], side: int
) -> None:
    """Patches from a corner to the right, the position itself framed, its weight below."""
    x, y = corner
    if not len(patches):
        write(axes, x, y + side / 2 - LINE / 2, "none addresses it", color=FAINT)
    for patch, weight in zip(patches, weights, strict=True):
        _picture(axes, patch, (x, y), (side, side))
        cell = (x + side / 3, y + side / 3), side / 3, side / 3
        axes.add_patch(Rectangle(*cell, fill=False, linewidth=1.8, edgecolor="white"))
        axes.add_patch(Rectangle(*cell, fill=False, linewidth=0.8, edgecolor=INK))
        write(axes, x + side / 2, y + side + 1, f"{weight:.2f}", ha="center")
        x += side + PATCH_GAP
