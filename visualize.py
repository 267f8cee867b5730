"""Figures: readable at print size and in grey, in one style (`mgmra.mplstyle`).

    ranked_lists("ranked.png", query_images=..., gallery_images=..., distmat=..., q_pids=...,
                 g_pids=..., title="RegDB, visible to infrared, not re-ranked")

A figure is a PNG or a PDF, by the suffix of its path. Nothing here touches pyplot's state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from numpy.typing import ArrayLike
from PIL import Image

from utils import write_atomic

STYLE = Path(__file__).with_name("mgmra.mplstyle")
POINTS = 72  # an inch
DENSITY = 2  # pixels a point; geometry in whole points lands on whole pixels
FORMATS = (".png", ".pdf")
IMAGE_COLORS, PAGE_COLORS = 48, 256  # of one image, of a whole PNG: a third of the bytes

PAGE_WIDTH = 516  # points; the text width of a two-column conference page
PAGE_HEIGHT = 640  # points; longer lists get smaller images, down to the least size
COLUMN_WIDTH = 252  # points; one column of such a page, which no figure is narrower than
TILE_WIDTHS = (26, 48)  # points, least and largest width of an image
MARGIN, GAP, NOTE_WIDTH, LINE = 5, 7, 66, 12  # points; LINE: from one line of text to the next
FONT, TITLE_FONT = 8, 9  # points
LEGEND_WIDTH = 122  # points, of each of its two entries
INK, FAINT = "#1a1a1a", "#555555"


@dataclass(frozen=True)
class Frame:
    """How an answer of one kind is framed; each of the three marks suffices to tell it."""

    meaning: str
    color: str
    dashes: str | tuple[float, tuple[float, ...]]
    mark: str
    badge: str  # what the mark stands on
    ink: str  # colour of the mark


RIGHT = Frame("right: same identity", "#0072B2", "-", "\N{CHECK MARK}", "#0072B2", "white")
WRONG = Frame("wrong: other identity", "#E69F00", (0, (2.6, 1.5)), "\N{BALLOT X}", "white", INK)


# ------------------------------------------------------------------------------------------ base


def _draw(path: str | Path, make: Callable[[], Figure]) -> None:
    """Writes the figure that `make` returns, made and saved in the project's style."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"cannot draw {path}: a figure is named {' or '.join(FORMATS)}")
    with matplotlib.rc_context(fname=STYLE):  # the reader's own settings do not count
        figure = make()
        save = _save_png if path.suffix.lower() == ".png" else _save_pdf
        write_atomic(path, lambda stream: save(figure, stream))


def _save_png(figure: Figure, stream: BinaryIO) -> None:
    """Writes a PNG with a palette."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    _palette(page, PAGE_COLORS).save(stream, "PNG", optimize=True, dpi=(figure.dpi, figure.dpi))


def _save_pdf(figure: Figure, stream: BinaryIO) -> None:
    """Writes a PDF without its date, so that the same figure is the same file."""
    figure.savefig(stream, format="pdf", metadata={"CreationDate": None})


def _palette(image: Image.Image, colors: int) -> Image.Image:
    """The image in so many colours; the choice keeps rare ones, such as a bag's or a frame's."""
    coverage = Image.Quantize.MAXCOVERAGE
    return image.quantize(colors, coverage, kmeans=2, dither=Image.Dither.NONE)


def _page(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty page, and axes over all of it in points with the origin at its top left."""
    figure = Figure(figsize=(width / POINTS, height / POINTS), dpi=DENSITY * POINTS)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def _write(axes: Axes, x: float, y: float, text: str, **options: Any) -> None:
    """Puts one line of text on a page, its top at y; dollars in it are dollars."""
    options = {"fontsize": FONT, "color": INK, "va": "top", "parse_math": False} | options
    axes.text(x, y, text, **options)


def _wrap(text: str, width: float, font: FontProperties) -> list[str]:
    """Breaks text between words into lines of at most `width` points, where a word allows it."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and text_to_path.get_text_width_height_descent(longer, font, False)[0] > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


# ---------------------------------------------------------------------------------- ranked lists


def ranked_lists(
    path: str | Path,
    *,
    query_images: np.ndarray,
    gallery_images: np.ndarray,
    distmat: np.ndarray,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    excluded: np.ndarray | None = None,
    queries: Sequence[int] | None = None,
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

    Args:
        path: File to write, .png or .pdf.
        query_images: (Q, H, W, 3) uint8.
        gallery_images: (G, H, W, 3) uint8.
        distmat: (Q, G), smaller is closer; ties keep gallery order.
        q_pids: (Q,) identities of the queries.
        g_pids: (G,) identities of the gallery.
        excluded: (Q, G) bool, True where the protocol ignores a gallery image for a query.
        queries: Rows to draw, in this order.
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
    given = (query_images, gallery_images, distmat, q_pids, g_pids, excluded)
    lists = _Lists(*map(np.asarray, given))
    if top < 1 or num_queries < 1:
        raise ValueError(f"top is {top}, num_queries {num_queries}, expected at least 1 of each")
    chosen, how = lists.draw(num_queries, seed) if queries is None else lists.named(queries)
    if lists.excluded.any():
        how += " Gallery images that the protocol ignores for a query are left out."
    _draw(path, lambda: _ranked_lists(lists, chosen, min(top, len(lists.g_pids)), title, how))


@dataclass(frozen=True, eq=False)
class _Lists:
    """What `ranked_lists` was given, checked."""

    query_images: np.ndarray
    gallery_images: np.ndarray
    distmat: np.ndarray
    q_pids: np.ndarray
    g_pids: np.ndarray
    excluded: np.ndarray

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
        distances = np.where(self.excluded, np.inf, self.distmat)
        succeeds = matches[rows, distances[rows].argmin(axis=1)]
        kinds = rows[succeeds], rows[~succeeds]
        shares = _shares(min(count, len(rows)), len(kinds[0]), len(kinds[1]))
        rng = np.random.default_rng(seed)
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
    ranks = np.flatnonzero(lists.g_pids[ranking] == lists.q_pids[query]) + 1
    lines = [f"identity {lists.q_pids[query]}"]
    if not len(ranks):
        return [*lines, "no right answer"]
    precision = np.mean(np.arange(1, len(ranks) + 1) / ranks)
    return [*lines, f"first hit: {ranks[0]:,}", f"AP: {100 * precision:.1f} %"]


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
    pitch = tile[0] + GAP, tile[1] + GAP
    first = MARGIN + GAP + tile[0] + NOTE_WIDTH + 2 * GAP  # left edge of the nearest image
    page_width = max(first + top * pitch[0] - GAP + MARGIN + 2, COLUMN_WIDTH)

    text_width = page_width - 2 * MARGIN
    bold, plain = FontProperties(size=TITLE_FONT, weight="bold"), FontProperties(size=FONT)
    head = [(line, bold, INK) for line in _wrap(title, text_width, bold)]
    head += [(line, plain, FAINT) for line in _wrap(how, text_width, plain)]
    below = MARGIN + LINE * (len(head) + 1) + 6  # top edge of the first image
    bottom = below + len(chosen) * pitch[1]

    figure, axes = _page(page_width, bottom + 12 + MARGIN)
    for number, (line, font, color) in enumerate(head):
        _write(axes, MARGIN, MARGIN + LINE * number, line, fontproperties=font, color=color)
    _write(axes, MARGIN + 2 + tile[0] / 2, below - 5, "query", va="baseline", ha="center")
    for place in range(top):
        x = first + place * pitch[0] + tile[0] / 2
        _write(axes, x, below - 5, str(place + 1), va="baseline", ha="center")
    for number, query in enumerate(chosen):
        y = below + number * pitch[1]
        _row(axes, lists, query, top, (first, y), tile)
    _legend(axes, bottom, first, page_width)
    return figure


def _row(
    axes: Axes, lists: _Lists, query: int, top: int, corner: tuple[int, int], tile: tuple[int, int]
) -> None:
    """Draws a query, what is said of it, and its nearest images, the first of them at corner."""
    (first, y), ranking = corner, lists.ranking(query)
    _picture(axes, lists.query_images[query], (MARGIN + 2, y), tile)
    for line, text in enumerate(_note(lists, query, ranking)):
        x, weight = MARGIN + 2 + tile[0] + GAP, "normal" if line else "bold"
        _write(axes, x, y + tile[1] / 2 + (line - 1.5) * LINE, text, fontweight=weight)
    for place, row in enumerate(ranking[:top].tolist()):
        x = first + place * (tile[0] + GAP)
        _picture(axes, lists.gallery_images[row], (x, y), tile)
        _frame(axes, RIGHT if lists.g_pids[row] == lists.q_pids[query] else WRONG, (x, y), tile)


def _picture(axes: Axes, image: np.ndarray, corner: tuple[int, int], tile: tuple[int, int]) -> None:
    """Puts an image (H, W, 3) on a page, with no more pixels than can be seen there."""
    (x, y), (width, height) = corner, tile
    pixels = (DENSITY * width, DENSITY * height)
    image = Image.fromarray(np.asarray(image)).resize(pixels, Image.Resampling.BILINEAR)
    image = _palette(image, IMAGE_COLORS).convert("RGB")
    axes.imshow(image, extent=(x, x + width, y + height, y), aspect="auto", interpolation="none")


def _frame(axes: Axes, frame: Frame, corner: tuple[float, float], tile: tuple[int, int]) -> None:
    """Frames what lies at a corner, with the answer's mark in a badge at its top left."""
    (x, y), (width, height) = corner, tile
    line = {"linewidth": 1.8, "edgecolor": frame.color, "linestyle": frame.dashes}
    axes.add_patch(Rectangle((x - 1.5, y - 1.5), width + 3, height + 3, fill=False, **line))
    badge = {"facecolor": frame.badge, "edgecolor": frame.color, "linewidth": 1}
    axes.add_patch(Rectangle((x - 2, y - 2), 9, 9, **badge))
    mark = {"ha": "center", "va": "center_baseline", "color": frame.ink, "fontweight": "bold"}
    _write(axes, x + 2.5, y + 2.5, frame.mark, **mark)


def _legend(axes: Axes, y: float, first: float, page_width: float) -> None:
    """Says what the frames mean, below the images, from the first of them on if there is room."""
    x = min(first, page_width - 2 * LEGEND_WIDTH)
    for frame in (RIGHT, WRONG):
        _frame(axes, frame, (x, y + 2), (20, 10))
        _write(axes, x + 27, y + 7, frame.meaning, va="center_baseline")
        x += LEGEND_WIDTH
