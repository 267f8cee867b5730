"""What every figure shares: style, heading, grid of images, file.

A figure is a PNG or a PDF, by the suffix of its path, in one style (`mgmra.mplstyle`): readable at
print size, in greyscale and by colour-blind readers. Nothing here touches pyplot's state.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from utils import write_atomic

STYLE = Path(__file__).with_name("mgmra.mplstyle")
FORMATS = (".png", ".pdf")
PAGE_WIDTH, COLUMN_WIDTH = 7.16, 3.5  # inches; text and column of a two-column conference page
LINE = 0.165  # inches from one line of text to the next
TITLE_CHARACTERS, NOTE_CHARACTERS = 12.5, 16  # that fit into an inch
TILE_WIDTHS = (0.36, 0.66)  # inches, least and largest width of an image in a grid
MAX_HEIGHT = 8.6  # inches; longer grids get smaller images, down to the least width
GAP = 0.09  # inches between images
GREY, BLUE, ORANGE = "#555555", "#0072B2", "#E69F00"  # blue is dark in greyscale, orange light


def draw(path: str | Path, make: Callable[[], Figure]) -> None:
    """Writes the figure that `make` returns, made and saved in the project's style.

    Raises:
        ValueError: The path ends with neither .png nor .pdf.
        OSError: When the file cannot be written; an existing one is then left as it was.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"cannot draw {path}: a figure is named {' or '.join(FORMATS)}")
    save = _save_png if suffix == ".png" else _save_pdf
    with matplotlib.rc_context(fname=STYLE):  # the reader's own settings do not count
        figure = make()
        write_atomic(path, lambda stream: save(figure, stream))


def _save_png(figure: Figure, stream: BinaryIO) -> None:
    """Writes 256 colours, a quarter of the bytes; rare ones, such as a bag's, are kept."""
    full = io.BytesIO()
    figure.savefig(full, format="png")
    with Image.open(full) as page:
        rounded = page.convert("RGB").point(lambda value: round(value / 255 * 31) * 255 // 31)
        coverage = Image.Quantize.MAXCOVERAGE  # slow, were the colours not rounded first
        reduced = rounded.quantize(256, coverage, kmeans=2, dither=Image.Dither.NONE)
        reduced.save(stream, "PNG", optimize=True, dpi=page.info["dpi"])


def _save_pdf(figure: Figure, stream: BinaryIO) -> None:
    """Writes no creation date: the same figure is the same file."""
    figure.savefig(stream, format="pdf", metadata={"CreationDate": None})


def headed_figure(
    width: float, height: float, title: str, note: str = ""
) -> tuple[Figure, SubFigure]:
    """Returns a figure with a bold title and a grey note on top, and the space below them.

    Args:
        width: Inches.
        height: Inches, of the space below.
        title: Broken into lines that fit.
        note: Likewise.
    """
    title = wrapped(title, int(TITLE_CHARACTERS * width))
    note = wrapped(note, int(NOTE_CHARACTERS * width))
    lines = len(title.splitlines()) + len(note.splitlines())
    figure = Figure(figsize=(width, height + LINE * lines), layout="constrained")
    left = {"x": 0.05 / width, "ha": "left"}
    if title:
        figure.suptitle(title, fontweight="bold", **left)
    body = figure.subfigures()
    if note:
        body.suptitle(note, fontsize="medium", color=GREY, **left)
    return figure, body


def wrapped(text: str, characters: int) -> str:
    """Returns text in lines of at most so many characters; its own line ends stay."""
    return "\n".join(textwrap.fill(line, characters) for line in text.splitlines())


def tile_figure(
    title: str,
    note: str,
    *,
    rows: int,
    widths: Sequence[float],
    aspect: float,
    left: float,
    below: float = 0,
    around: float = 2 * LINE,
) -> tuple[Figure, SubFigure, np.ndarray]:
    """Returns a figure with rows of equally large, empty axes for images.

    Args:
        title: Of the figure.
        note: Below the title.
        rows: How many.
        widths: Of the columns; 1 is an image's.
        aspect: Height of an image / its width.
        left: Inches for the words to the left of each row.
        below: Inches for the words below each image.
        around: Inches for the heads of the columns and what stands below all images.

    Returns:
        The figure, the part of it below title and note, and its axes (rows, columns).
    """
    by_width = (PAGE_WIDTH - left - GAP * len(widths)) / sum(widths)
    by_height = (MAX_HEIGHT / rows - below - GAP) / aspect
    tile = float(np.clip(min(by_width, by_height), *TILE_WIDTHS))
    width = max(left + tile * sum(widths) + GAP * len(widths), COLUMN_WIDTH)
    height = rows * (tile * aspect + below + GAP) + around
    figure, body = headed_figure(width, height, title, note)
    axes = body.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for cell in axes.flat:
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_visible(False)
    return figure, body, axes


def write_left(cell: Axes, text: str) -> None:
    """Writes to the left of an image."""
    cell.set_ylabel(text, rotation=0, ha="right", va="center")


def write_middle(cell: Axes, text: str) -> None:
    """Writes into the middle of axes."""
    cell.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=cell.transAxes)
