"""Figures made of images: ranked lists, addressing maps and the patches of prototypes.

    ranked_lists("ranked.png", query_images=..., gallery_images=..., distmat=..., q_pids=...,
                 g_pids=..., title="RegDB, visible to infrared, not re-ranked")

All raise what `page.draw` raises for a path that cannot be written.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import ArrayLike

from figures.page import BLUE, GREY, LINE, ORANGE, draw, tile_figure, write_left, write_middle
from figures.prototypes import PATCH_CELLS, Fired, Patches

NAME_CHARACTERS, NAME_LINES = 14, 4  # of a query's file name beside it
SAME_WEIGHT = 1e-3  # weights that differ by less than this share of them are called the same
# Heat over an image: colours that darken from yellow to red, and cover more the darker they are.
HEAT_COLORS = matplotlib.colormaps["YlOrRd"](np.linspace(0.3, 1, 256))
HEAT_COLORS[:, 3] = 0.8 * np.sqrt(np.linspace(0, 1, 256))
HEAT = ListedColormap(HEAT_COLORS)
PALE = {"cmap": "gray", "vmin": -600, "vmax": 255}  # black becomes a light grey below the heat


@dataclass(frozen=True)
class Frame:
    """How an answer of one kind is framed; colour, line and mark each suffice to tell it."""

    meaning: str
    color: str
    line: str
    mark: str


RIGHT = Frame("right: same identity", BLUE, "-", "\N{CHECK MARK}")
WRONG = Frame("wrong: other identity", ORANGE, "--", "\N{BALLOT X}")


def ranked_lists(
    path: str | Path,
    *,
    query_images: np.ndarray,
    gallery_images: np.ndarray,
    distmat: np.ndarray,
    q_pids: ArrayLike | None = None,
    g_pids: ArrayLike | None = None,
    excluded: np.ndarray | None = None,
    query_names: Sequence[str] | None = None,
    num_queries: int = 8,
    top: int = 10,
    title: str = "",
    seed: int = 0,
) -> None:
    """Draws random queries, each with its nearest gallery images, right and wrong told apart.

    Beside a query stand the rank of its first right answer and its average precision, over the
    whole gallery. Queries are drawn among those with a right answer to find, in the proportion of
    right and wrong nearest images, but a quarter or more of each kind where there are so many; the
    figure says how many there were to draw from.

    Without identities no answer is framed, and minus its distance stands below it.

    Args:
        path: File to write, .png or .pdf.
        query_images: (Q, H, W, 3) uint8.
        gallery_images: (G, H, W, 3) uint8.
        distmat: (Q, G), smaller is closer; ties keep gallery order.
        q_pids: (Q,) identities of the queries; None, as `g_pids`, where they are not known.
        g_pids: (G,) identities of the gallery.
        excluded: (Q, G) bool, True where the protocol ignores a gallery image for a query.
        query_names: (Q,) names to stand beside queries of unknown identity.
        num_queries: How many to draw.
        top: Gallery images a query.
        title: What was measured: data set, protocol, whether re-ranked.
        seed: Of the random choice.

    Raises:
        ValueError: Shapes or types that disagree, a distance that is not finite, or no query with
            a right answer to find.
    """
    distmat = np.asarray(distmat)
    _check_distances(distmat)
    if top < 1 or num_queries < 1:
        raise ValueError(f"top is {top}, num_queries {num_queries}, expected at least 1 of each")
    (q, g), size = distmat.shape, query_images.shape[1:3]
    excluded = np.zeros((q, g), bool) if excluded is None else np.asarray(excluded, bool)
    _check_shape("query_images", query_images, (q, *size, 3))
    _check_shape("gallery_images", gallery_images, (g, *size, 3))
    _check_shape("excluded", excluded, (q, g))
    if q_pids is None or g_pids is None:
        matches, names = None, [""] * q if query_names is None else list(query_names)
        _check_shape("query_names", names, (q,))
    else:
        _check_shape("q_pids", q_pids, (q,))
        _check_shape("g_pids", g_pids, (g,))
        matches = np.asarray(q_pids)[:, None] == np.asarray(g_pids)
        names = [f"identity {pid}" for pid in np.asarray(q_pids)]
    chosen, note = _choose_queries(distmat, excluded, matches, num_queries, seed)
    if excluded.any():
        note += " Gallery images that the protocol ignores for a query are left out."

    def make() -> Figure:
        figure, body, axes = tile_figure(
            title,
            note,
            rows=len(chosen),
            widths=[1.0] * (1 + min(top, g)),
            aspect=size[0] / size[1],
            left=0.95,
            below=LINE if matches is None else 0,
        )
        for place, cell in enumerate(axes[0]):
            cell.set_title(place or "query", fontsize="medium")
        for cells, query in zip(axes, chosen, strict=True):
            order = np.argsort(distmat[query], kind="stable")
            ranking = order[~excluded[query, order]]
            for cell, row in zip(cells[1:], ranking.tolist(), strict=False):
                cell.imshow(gallery_images[row])
            cells[0].imshow(query_images[query])
            if matches is None:
                write_left(cells[0], _last_lines(names[query]))
                _write_scores(cells[1:], -distmat[query, ranking])
            else:
                hits = matches[query, ranking]
                write_left(cells[0], f"{names[query]}\n{_summary(hits)}")
                _frame(cells[1:], hits)
        if matches is not None:
            marks = [
                Patch(fill=False, ec=f.color, ls=f.line, lw=1.8, label=f"{f.mark} {f.meaning}")
                for f in (RIGHT, WRONG)
            ]
            body.legend(handles=marks, loc="outside lower center", ncols=2)
        return figure

    draw(path, make)


def _check_shape(name: str, given: ArrayLike, expected: tuple[int, ...]) -> None:
    if np.shape(given) != expected or 0 in expected:
        raise ValueError(f"{name} has shape {np.shape(given)}, expected {expected}")


def _check_distances(distmat: np.ndarray) -> None:
    shape = distmat.shape
    if distmat.ndim != 2 or 0 in shape or distmat.dtype.kind not in "fiu":
        raise ValueError(
            f"distmat has shape {shape} of {distmat.dtype}, expected numbers (Q, G), neither 0"
        )
    if not np.isfinite(distmat).all():
        at = row, column = tuple(np.argwhere(~np.isfinite(distmat))[0])
        raise ValueError(f"distmat[{row}, {column}] is {distmat[at]}, expected a finite distance")


def _choose_queries(
    distmat: np.ndarray,
    excluded: np.ndarray,
    matches: np.ndarray | None,
    count: int,
    seed: int,
) -> tuple[list[int], str]:
    """Returns random rows, those with a right nearest image first, and what is said of the choice.

    Args:
        distmat: (Q, G).
        excluded: (Q, G) bool, gallery images that do not count.
        matches: (Q, G) bool, pairs of one identity; None where identities are not known.
        count: How many rows, fewer where fewer have a right answer to find.
        seed: Of the choice.
    """
    rng = np.random.default_rng(seed)

    def pick(rows: np.ndarray, number: int) -> list[int]:
        return np.sort(rng.choice(rows, number, replace=False)).tolist()

    total = len(distmat)
    if matches is None:
        if count >= total:
            return list(range(total)), f"All {total:,} queries."
        note = f"{count} of {total:,} queries, drawn at random (seed {seed})."
        return pick(np.arange(total), count), note
    hits = matches & ~excluded
    rows = np.flatnonzero(hits.any(axis=1))
    if not len(rows):
        raise ValueError(
            f"none of {total} queries has its identity among the gallery images that count for it: "
            "do query and gallery share identities?"
        )
    nearest = np.where(excluded, np.inf, distmat)[rows].argmin(axis=1)
    successes, failures = rows[hits[rows, nearest]], rows[~hits[rows, nearest]]
    right, wrong = _split(min(count, len(rows)), len(successes), len(failures))
    return pick(successes, right) + pick(failures, wrong), (
        f"Queries drawn at random (seed {seed}): {right} of the {len(successes):,} whose nearest "
        f"image is right, {wrong} of the {len(failures):,} whose nearest is wrong."
    )


def _split(count: int, successes: int, failures: int) -> tuple[int, int]:
    """Returns how many of `count` queries to take of either kind, `count` at most their sum."""
    least = count // 4
    wanted = min(max(round(count * successes / (successes + failures)), least), count - least)
    right = max(min(wanted, successes), count - failures)
    return right, count - right


def _summary(hits: np.ndarray) -> str:
    """Returns first right rank and average precision of a ranking; hits (n,) bool in its order."""
    ranks = np.flatnonzero(hits) + 1
    if not len(ranks):
        return "no right answer"
    precision = np.mean(np.arange(1, len(ranks) + 1) / ranks)
    return f"first hit: {ranks[0]:,}\nAP: {100 * precision:.1f} %"


def _last_lines(name: str) -> str:
    """Returns a name in lines; of a long one its end."""
    lines = textwrap.wrap(name, NAME_CHARACTERS)
    if len(lines) > NAME_LINES:
        lines = ["\N{HORIZONTAL ELLIPSIS}", *lines[1 - NAME_LINES :]]
    return "\n".join(lines)


def _frame(cells: Sequence[Axes], hits: np.ndarray) -> None:
    """Frames answers, each with its mark in a badge at the top left; hits (n,) bool."""
    for cell, hit in zip(cells, hits, strict=False):
        frame = RIGHT if hit else WRONG
        cell.spines[:].set(visible=True, color=frame.color, linestyle=frame.line, linewidth=1.8)
        badge = {"facecolor": "white", "edgecolor": frame.color, "pad": 1}
        cell.text(0.03, 0.985, frame.mark, transform=cell.transAxes, va="top", bbox=badge)


def _write_scores(cells: Sequence[Axes], scores: np.ndarray) -> None:
    for cell, score in zip(cells, scores, strict=False):
        cell.set_xlabel(f"{score:.2f}".replace("-", "\N{MINUS SIGN}"))


# -------------------------------------------------------------------------------------- the memory


def addressing(
    path: str | Path,
    *,
    images: np.ndarray,
    names: Sequence[str],
    levels: Mapping[str, Fired],
    title: str = "",
) -> None:
    """Draws where on each image the strongest prototypes of every granularity fire.

    Colours go from 0 to the greatest weight of that level in the figure, which is written above it.

    Args:
        path: File to write, .png or .pdf.
        images: (n, H, W, 3) uint8.
        names: What stands before each image.
        levels: By name, coarser ones to the right; all with as many prototypes k an image.
        title: Which network, which images.

    Raises:
        ValueError: No image, no level, or shapes that disagree.
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
    count = max(fired.numbers.shape[1] for fired in levels.values())
    pad = max(0.15, (3.2 - count) / 2)  # on both sides of a level, whose head needs the room
    note = (
        "Each image with the prototypes that its positions read most, strongest first: colour is "
        "the prototype's weight at a position, below stands the prototype's number."
    )

    def make() -> Figure:
        figure, body, axes = tile_figure(
            title,
            note,
            rows=len(images),
            widths=[1.0, *[pad, *[1.0] * count, pad] * len(levels)],
            aspect=images.shape[1] / images.shape[2],
            left=0.9,
            below=LINE,
            around=6 * LINE,
        )
        for row, image, name in zip(axes, images, names, strict=True):
            row[0].imshow(image)
            write_left(row[0], name)
        for group, (level, fired) in enumerate(levels.items()):
            first = 2 + group * (count + 2)
            head = f"{level}, {fired.size:,} in all\n{_weight_range(fired.maps)}"
            axes[0, first + (count - 1) // 2].set_title(head, fontsize="medium")
            for row, image, numbers, maps in zip(
                axes, images, fired.numbers, fired.maps, strict=True
            ):
                for cell, number, weights in zip(row[first:], numbers, maps, strict=False):
                    if number < 0 or _all_alike(fired.maps):
                        write_middle(cell, "none" if number < 0 else "alike")
                    else:
                        _heat_map(cell, image, weights, fired.maps.max())
                        cell.set_xlabel(str(number))
        place = {"ax": axes, "location": "bottom", "shrink": 0.5, "aspect": 40, "pad": 0.01}
        scale = body.colorbar(ScalarMappable(cmap=HEAT), ticks=[], **place)
        scale.set_label("weight, from 0 to the level's greatest in this figure")
        scale.solids.set_alpha(None)  # its colours have their own
        return figure

    draw(path, make)


def _all_alike(maps: np.ndarray) -> bool:
    """Returns whether a level is read with the same weights at every position."""
    return maps.max(initial=0) - maps.min(initial=1) < SAME_WEIGHT * maps.max(initial=0)


def _weight_range(maps: np.ndarray) -> str:
    """Returns what the colours of a level stand for, in words."""
    most = float(maps.max(initial=0))
    if not most:
        return "reads zero everywhere"
    if _all_alike(maps):
        return f"the same everywhere: {100 * most:.2g} %"
    return f"weights from 0 to {100 * most:.{0 if most >= 0.1 else 2}f} %"


def _heat_map(cell: Axes, image: np.ndarray, weights: np.ndarray, most: float) -> None:
    """Draws an image (H, W, 3) in pale grey, and weights (h, w) over it where they are not 0."""
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    cell.imshow(image.mean(axis=2), extent=extent, **PALE)
    cell.imshow(weights, extent=extent, cmap=HEAT, vmin=0, vmax=most, interpolation="nearest")
    cell.spines[:].set(visible=True, color=GREY, linewidth=0.6)


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
    """
    if not rows:
        raise ValueError("no prototype to draw, expected at least one")
    count = max(1, *(max(len(row.visible), len(row.infrared)) for row in rows))

    def make() -> Figure:
        figure, _, axes = tile_figure(
            title,
            note,
            rows=len(rows),
            widths=[*[1.0] * count, 0.5, *[1.0] * count],
            aspect=1,
            left=1.1,
            below=LINE,
        )
        axes[0, 0].set_title("visible", fontsize="medium")
        axes[0, count + 1].set_title("infrared", fontsize="medium")
        for cells, row in zip(axes, rows, strict=True):
            write_left(cells[0], row.name)
            _patch_row(cells[:count], row.visible, row.visible_weights)
            _patch_row(cells[count + 1 :], row.infrared, row.infrared_weights)
        return figure

    draw(path, make)


def _patch_row(cells: Sequence[Axes], patches: np.ndarray, weights: np.ndarray) -> None:
    """Draws patches (n, p, p, 3), the position itself framed, its weight below."""
    if not len(patches):
        write_middle(cells[0], "none")
    for cell, patch, weight in zip(cells, patches, weights, strict=False):
        side = len(patch) / PATCH_CELLS  # of the position
        middle = (len(patch) - side) / 2
        cell.imshow(patch, extent=(0, len(patch), len(patch), 0))
        for color, width in (("white", 1.8), ("black", 0.8)):
            cell.add_patch(Rectangle((middle, middle), side, side, fill=False, ec=color, lw=width))
        cell.set_xlabel(f"{weight:.2f}")
