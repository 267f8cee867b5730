"""Figures made of images: ranked lists, addressing maps and the patches of prototypes."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from figures import page
from figures.prototypes import MODALITIES, PATCH_CELLS, Fired, Patches, alike

NAME_CHARACTERS, NAME_LINES = 14, 4  # of a query's name beside it; of a longer one its end
# Heat over an image: colours that darken from yellow to red, and cover more the darker they are.
HEAT_COLORS = matplotlib.colormaps["YlOrRd"](np.linspace(0.3, 1, 256))
HEAT_COLORS[:, 3] = 0.8 * np.sqrt(np.linspace(0, 1, 256))
HEAT = ListedColormap(HEAT_COLORS)
PALE = {"cmap": "gray", "vmin": -600, "vmax": 255}  # black becomes a light grey below the heat


class Frame(NamedTuple):
    """How an answer of one kind is framed; colour, line and mark each suffice to tell it."""

    meaning: str  # begins with its mark
    color: str
    line: str


RIGHT = Frame("\N{CHECK MARK} right: same identity", page.BLUE, "-")
WRONG = Frame("\N{BALLOT X} wrong: other identity", page.ORANGE, "--")


@page.styled
def ranked_lists(
    *,
    query_images: np.ndarray,
    gallery_images: np.ndarray,
    distmat: np.ndarray,
    names: Sequence[str],
    same: np.ndarray | None = None,
    num_queries: int = 8,
    top: int = 10,
    title: str = "",
    seed: int = 0,
) -> Figure:
    """Draws random queries, each with its nearest gallery images, right and wrong told apart.

    Beside a query stand its name, the rank of its first right answer and its average precision,
    over the whole gallery. Images are (n, H, W, 3) uint8. Smaller `distmat` (Q, G) is closer;
    infinite ones are of gallery images that the protocol ignores for a query. `same` (Q, G) says
    where identities agree; None, where they are not known, leaves frames and scores out.

    Raises:
        ValueError: No query has a right answer to find.
    """
    counts = np.isfinite(distmat)
    rows = np.arange(len(distmat)) if same is None else np.flatnonzero((same & counts).any(axis=1))
    if not len(rows):
        error = f"none of {len(distmat)} queries has a gallery image of its identity that counts"
        raise ValueError(f"{error}: do query and gallery share identities?")
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(rows, min(num_queries, len(rows)), replace=False))
    note = f"Queries drawn at random (seed {seed}): {len(chosen)} of {len(rows):,}."
    if not counts.all():
        note += " Gallery images that the protocol ignores for a query are left out."
    height, width = query_images.shape[1:3]
    columns = [1.0] * (1 + min(top, distmat.shape[1]))
    figure, axes = page.image_grid(len(chosen), columns, height / width)
    for place, cell in enumerate(axes[0]):
        cell.set_title(place or "query", fontsize="medium")
    for cells, query in zip(axes, chosen, strict=True):
        order = np.argsort(distmat[query], kind="stable")
        ranking = order[counts[query, order]]
        cells[0].imshow(query_images[query])
        beside = textwrap.wrap(names[query], NAME_CHARACTERS)[-NAME_LINES:]
        for cell, row in zip(cells[1:], ranking, strict=False):
            cell.imshow(gallery_images[row])
            if same is not None:
                _frame(cell, RIGHT if same[query, row] else WRONG)
        if same is not None:
            found = np.flatnonzero(same[query, ranking]) + 1  # the ranks of right answers
            precision = 100 * np.mean(np.arange(1, len(found) + 1) / found)
            beside += [f"first hit: {found[0]:,}", f"AP: {precision:.1f} %"]
        page.write_left(cells[0], "\n".join(beside))
    if same is not None:
        look = {"fill": False, "lw": 1.8}
        marks = [Patch(ec=m.color, ls=m.line, label=m.meaning, **look) for m in (RIGHT, WRONG)]
        page.add_legend(figure, marks, columns=2)
    page.add_heading(figure, title, note)
    return figure


def _frame(cell: Axes, frame: Frame) -> None:
    """Frames an answer, with its mark in a badge at the top left."""
    cell.spines[:].set(visible=True, color=frame.color, linestyle=frame.line, linewidth=1.8)
    badge = {"facecolor": "white", "edgecolor": frame.color, "pad": 1}
    cell.text(0.03, 0.985, frame.meaning[0], transform=cell.transAxes, va="top", bbox=badge)


@page.styled
def addressing(
    images: np.ndarray, names: Sequence[str], levels: Mapping[str, Fired], *, title: str = ""
) -> Figure:
    """Draws where on each image the strongest prototypes of every granularity fire.

    Each level has a colour scale of its own, from 0 to its greatest weight, which is written above.
    `images` are (n, H, W, 3) uint8, with `names` before them; the finest of `levels` comes first.
    """
    count = max(fired.numbers.shape[1] for fired in levels.values())
    pad = max(0.15, (3.2 - count) / 2)  # on both sides of a level, whose head needs the room
    widths = [1.0, *[pad, *[1.0] * count, pad] * len(levels)]
    height, width = images.shape[1:3]
    extent, aspect = (0, width, height, 0), height / width
    figure, axes = page.image_grid(len(images), widths, aspect)
    for row, image, name in zip(axes, images, names, strict=True):
        row[0].imshow(image)
        page.write_left(row[0], name)
    for group, (level, fired) in enumerate(levels.items()):
        first = 2 + group * (count + 2)
        cells = axes[:, first : first + count]
        most, uniform = float(fired.maps.max()), alike(fired.maps)
        scale = f"weights from 0 to {100 * most:.3g} %" if most else "reads zero everywhere"
        scale = f"the same everywhere: {100 * most:.2g} %" if uniform else scale
        head = f"{level}, {fired.size:,} in all\n{scale}"
        cells[0, (count - 1) // 2].set_title(head, fontsize="medium")
        for row, image, numbers, maps in zip(cells, images, fired.numbers, fired.maps, strict=True):
            for cell, number, weights in zip(row, numbers, maps, strict=False):
                cell.set_box_aspect(aspect)
                if number < 0 or uniform:
                    page.write_middle(cell, "none" if number < 0 else "alike")
                else:
                    heat = {"cmap": HEAT, "vmin": 0, "vmax": most, "interpolation": "nearest"}
                    cell.imshow(image.mean(axis=2), extent=extent, **PALE)
                    cell.imshow(weights, extent=extent, **heat)  # clear where it is 0
                    cell.spines[:].set(visible=True, color=page.GREY, linewidth=0.6)
                    cell.set_xlabel(str(number))
    place = {"ax": axes, "location": "bottom", "shrink": 0.5, "aspect": 40, "pad": 0.01}
    scale = figure.colorbar(ScalarMappable(cmap=HEAT), ticks=[], **place)
    scale.set_label("weight, from 0 to the level's greatest in this figure")
    scale.solids.set_alpha(None)  # its colours have their own
    note = "Each image with the prototypes that its positions read most, strongest first: colour "
    note += "is the prototype's weight at a position, below stands the prototype's number."
    page.add_heading(figure, title, note)
    return figure


@page.styled
def prototypes(rows: Sequence[Patches], *, title: str = "", note: str = "") -> Figure:
    """Draws prototypes, one per row, with the patches of either modality that address it most."""
    count = max(1, *(len(weights) for row in rows for weights in row.weights.values()))
    figure, axes = page.image_grid(len(rows), [*[1.0] * count, 0.5, *[1.0] * count], aspect=1)
    for modality, side in zip(MODALITIES, (axes[:, :count], axes[:, count + 1 :]), strict=True):
        side[0, 0].set_title(modality, fontsize="medium")
        for row, cells in zip(rows, side, strict=True):
            if not len(row.patches[modality]):
                page.write_middle(cells[0], "none")
            pairs = zip(cells, row.patches[modality], row.weights[modality], strict=False)
            for cell, patch, weight in pairs:
                cell.imshow(patch, extent=(0, PATCH_CELLS, PATCH_CELLS, 0))  # 1 is a position
                for color, width in (("white", 1.8), ("black", 0.8)):
                    frame = {"fill": False, "ec": color, "lw": width}
                    cell.add_patch(Rectangle((PATCH_CELLS // 2, PATCH_CELLS // 2), 1, 1, **frame))
                cell.set_xlabel(f"{weight:.2f}")
    for row, cell in zip(rows, axes[:, 0], strict=True):
        page.write_left(cell, row.name)
    page.add_heading(figure, title, note)
    return figure
