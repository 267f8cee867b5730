"""What every figure shares: style, heading, legend, grid of images, file.

A figure is a PNG or a PDF in one style (`mgmra.mplstyle`): readable at print size, in greyscale and
by colour-blind readers. Heading and legend lie outside the nominal figure size; a file is cropped
to what is drawn, so nothing is cut off. Nothing here touches pyplot's state.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from utils import write_atomic

STYLE = Path(__file__).with_name("mgmra.mplstyle")
FORMATS = (".png", ".pdf")
PAGE_WIDTH, COLUMN_WIDTH = 7.16, 3.5  # inches; text and column of a two-column conference page
PAGE_HEIGHT = 8.6  # inches; longer grids get smaller images
MAX_TILE = 0.7  # inches, the largest width of an image in a grid
CHARACTERS, BOLD_CHARACTERS = 16, 12.5  # that fit into an inch
GREY, BLUE, ORANGE = "#555555", "#0072B2", "#E69F00"  # blue is dark in greyscale, orange light
HEADING = "heading"  # gid of its texts, by which `save` finds them

styled = matplotlib.rc_context(fname=STYLE)  # decorates what makes a figure


@styled
def save(figure: Figure, path: str | Path, *, heading: bool = True) -> None:
    """Writes a PNG or a PDF atomically; without `heading`, title and note are left out of it."""
    form = Path(path).suffix[1:].lower()
    for text in figure.findobj(lambda artist: artist.get_gid() == HEADING):
        text.set_visible(heading)
    undated = {"CreationDate": None} if form == "pdf" else None  # same figure, same file
    write_atomic(Path(path), lambda file: figure.savefig(file, format=form, metadata=undated))


def drawn_box(figure: Figure) -> Bbox:
    """Returns the box around all that a figure shows, in its coordinates (0 to 1 is its size)."""
    figure.draw_without_rendering()
    inches = figure.get_tightbbox()
    return inches.transformed(figure.dpi_scale_trans + figure.transFigure.inverted())


def add_heading(figure: Figure, title: str, note: str = "") -> None:
    """Writes a grey note, and above it a bold title, above all that a figure shows so far."""
    bold = {"weight": "bold", "size": matplotlib.rcParams["figure.titlesize"]}
    texts = [(note, CHARACTERS, {"color": GREY}), (title, BOLD_CHARACTERS, bold)]
    for text, characters, look in texts:
        box, text = drawn_box(figure), wrapped(text, int(characters * figure.get_figwidth()))
        place = box.x0, box.y1 + 0.05 / figure.get_figheight()
        figure.text(*place, text, va="bottom", ha="left", gid=HEADING, **look)


def add_legend(figure: Figure, handles: Sequence[Artist], columns: int = 1) -> None:
    """Puts a legend below all that a figure shows so far."""
    look = {"loc": "upper left", "ncols": columns, "handlelength": 3}
    figure.legend(handles=handles, bbox_to_anchor=drawn_box(figure).p0, **look)


def wrapped(text: str, characters: int) -> str:
    """Returns text in lines of at most so many characters; its own line ends stay."""
    return "\n".join(textwrap.fill(line, characters) for line in text.splitlines())


def image_grid(rows: int, widths: Sequence[float], aspect: float) -> tuple[Figure, np.ndarray]:
    """Returns a figure of empty axes for images, and the axes (rows, columns).

    Width 1 of a column is an image's; `aspect` is the height of an image / its width.
    """
    width = min(PAGE_WIDTH, 1 + MAX_TILE * sum(widths))
    height = min(PAGE_HEIGHT, 1 + rows * (0.2 + aspect * width / sum(widths)))
    figure = Figure(figsize=(width, height), layout="compressed")  # gaps close up
    axes = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for cell in axes.flat:
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_visible(False)
    return figure, axes


def write_left(cell: Axes, text: str) -> None:
    """Writes to the left of an image."""
    cell.set_ylabel(text, rotation=0, ha="right", va="center")


def write_middle(cell: Axes, text: str) -> None:
    """Writes into the middle of axes."""
    cell.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=cell.transAxes)
