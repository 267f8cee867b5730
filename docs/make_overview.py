"""Draws `docs/overview.png`, the method in one picture, for the README.

    python -m docs.make_overview

Run from the folder above. Lengths are pixels at the width a README is shown with; the file has
twice as many.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from datasets.pedestrians import camera_look, make_person, render
from figures.page import STYLE

OUTPUT = Path(__file__).with_name("overview.png")
WIDTH, SCALE = 900, 2
TOP, BOTTOM = 24, 610
POINT = 0.72  # points a pixel: the page is taken as 100 pixels an inch
TEXT, SMALL, HEADING = 12.5, 11.5, 14  # pixels
INK, FAINT, LINE = "#1a1a1a", "#555555", "#444444"
PERSON = {"seed": 0, "pid": 139}
STRIPES = 6
DASHES = (0, (4, 2.5))
Point = tuple[float, float]


@dataclass(frozen=True)
class Paint:
    """Colours of a kind of box."""

    fill: str
    edge: str


VISIBLE = Paint("#fce4b0", "#a86f00")
INFRARED = Paint("#d4eaf8", "#1f6f9f")
SHARED = Paint("#e8eaed", "#555555")
HEAD = Paint("#c9ebdf", "#00694e")
MEMORY = Paint("#f3deea", "#94466f")
LOSS = Paint("#3a3f45", "#3a3f45")
OUT = Paint("#ffffff", "#1a1a1a")


class Page:
    """What diagrams are made of, in pixels from the left and down."""

    def __init__(self) -> None:
        """Opens an empty page."""
        self.figure = Figure(figsize=(WIDTH / 100, (BOTTOM - TOP) / 100), dpi=100 * SCALE)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(BOTTOM, TOP))
        self.axes.set_axis_off()

    def text(self, x: float, y: float, words: str, size: float = TEXT, **options: Any) -> None:
        """Words centred at a point."""
        options = {"ha": "center", "va": "center", "color": INK, "linespacing": 1.3} | options
        self.axes.text(x, y, words, fontsize=size * POINT, **options)

    def box(
        self, corner: Point, size: Point, words: str, paint: Paint, *, training: bool = False
    ) -> None:
        """A step of the computation; dashed where it happens in training alone."""
        dashes = {"linestyle": DASHES if training else "-"}
        self._rounded(corner, size, 5, facecolor=paint.fill, edgecolor=paint.edge, **dashes)
        self.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, words)

    def panel(self, corner: Point, size: Point, paint: Paint, *, training: bool = False) -> None:
        """The ground on which the steps of one part stand."""
        dashes = {"linestyle": DASHES if training else "-"}
        ground = matplotlib.colors.to_rgba(paint.fill, 0.22)
        self._rounded(corner, size, 9, facecolor=ground, edgecolor=paint.edge, **dashes)

    def loss(self, x: float, y: float, words: str, width: float) -> None:
        """A loss, centred at a point."""
        size = (width, 20)
        corner = (x - width / 2, y - 10)
        self._rounded(corner, size, 10, facecolor=LOSS.fill, edgecolor=LOSS.edge)
        self.text(x, y, words, SMALL, color="white")

    def _rounded(self, corner: Point, size: Point, radius: float, **options: Any) -> None:
        shape = f"round,pad=0,rounding_size={radius}"
        patch = FancyBboxPatch(corner, *size, boxstyle=shape, linewidth=1, **options)
        self.axes.add_patch(patch)

    def arrow(self, *points: Point, training: bool = False, head: bool = True) -> None:
        """A line through points, with an arrow's head at the last."""
        line = {"color": LINE, "linewidth": 1, "linestyle": DASHES if training else "-"}
        along = np.array(points, float)
        if head:  # the line stops inside the head
            last = along[-1] - along[-2]
            along[-1] -= last / np.linalg.norm(last) * 4
        self.axes.plot(*along.T, solid_capstyle="butt", **line)
        if head:
            tip = {"arrowstyle": "-|>", "mutation_scale": 8, "shrinkA": 0, "shrinkB": 0}
            start = tuple(along[-1])
            self.axes.add_patch(FancyArrowPatch(start, points[-1], color=LINE, lw=0.5, **tip))

    def cells(
        self,
        corner: Point,
        shape: tuple[int, int],
        size: Point,
        paint: Paint,
        fills: Sequence[str],
    ) -> None:
        """A grid of (columns, rows); fills go row by row and repeat."""
        for row in range(shape[1]):
            for column in range(shape[0]):
                place = corner[0] + column * size[0], corner[1] + row * size[1]
                fill = fills[row % len(fills)]
                line = {"facecolor": fill, "edgecolor": paint.edge, "linewidth": 0.4}
                self.axes.add_patch(Rectangle(place, *size, **line))

    def save(self, path: Path) -> None:
        """Writes the page with a palette, a third of the bytes; flat colours stay as they are."""
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        page = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        page = page.quantize(256, Image.Quantize.MEDIANCUT, kmeans=3, dither=Image.Dither.NONE)
        page.save(path, optimize=True)


def mix(paint: Paint, share: float) -> str:
    """A tone between a paint's fill (0) and its edge (1)."""
    fill, edge = (np.array(matplotlib.colors.to_rgb(c)) for c in (paint.fill, paint.edge))
    return matplotlib.colors.to_hex(fill + share * (edge - fill))


MIDDLE = 163  # height of the main path
MAP, CELL = (270, 109), 6  # top left corner of the last map, size of one of its positions


def draw_streams(page: Page) -> None:
    """Images, the private and the shared stages, the last map."""
    page.panel((78, 34), (272, 262), SHARED)
    page.text(90, 52, "Two-stream ResNet-50", HEADING, fontweight="bold", ha="left")
    person = make_person(**PERSON)
    for camera, view, y, name, paint in (
        (1, 8, 44, "visible", VISIBLE),
        (2, 3, 178, "infrared", INFRARED),
    ):
        rng = np.random.default_rng(view)
        look = camera_look("regdb", camera, PERSON["seed"])
        image = render(person, look, rng, (104 * SCALE, 52 * SCALE))
        page.axes.imshow(image, extent=(14, 66, y + 104, y), aspect="auto", zorder=2)
        frame = {"fill": False, "edgecolor": paint.edge, "linewidth": 1.2, "zorder": 3}
        page.axes.add_patch(Rectangle((14, y), 52, 104, **frame))
        page.text(40, y + 115, name)
        page.arrow((67, y + 52), (90, y + 52))
        page.box((90, y + 24), (68, 56), "stem\nlayer1", paint)
        page.arrow((158, y + 52), (182, y + 52))
    page.text(124, MIDDLE, "a copy for\neach modality", SMALL, color=FAINT)
    page.box((182, 73), (60, 180), "layer2\nlayer3\nlayer4", SHARED)
    page.text(212, 241, "shared", SMALL, color=FAINT)
    page.arrow((242, MIDDLE), (MAP[0], MIDDLE))
    tones = [mix(SHARED, 0.05 if stripe % 2 else 0.3) for stripe in range(STRIPES)]
    page.cells(MAP, (9, 18), (CELL, CELL), SHARED, [tone for tone in tones for _ in range(3)])
    page.text(MAP[0] + 27, 86, "map x\n18 × 9 × 2048", SMALL)


def draw_head(page: Page) -> None:
    """Stripes to the retrieval feature, and the losses on the way."""
    page.panel((364, 34), (522, 262), HEAD)
    page.text(376, 52, "HCT head", HEADING, fontweight="bold", ha="left")
    top, bottom = MIDDLE - 72, MIDDLE + 72
    page.arrow((MAP[0] + 9 * CELL, MIDDLE), (380, MIDDLE))
    columns = ((432, 48, "GeM"), (496, 74, "1×1 conv\nto 256"), (586, 52, "BN\nReLU"))
    for x, width, words in columns:
        page.box((x, top), (width, bottom - top), words, HEAD)
    for stripe in range(STRIPES):
        y = top + 12 + 24 * stripe
        tone = mix(SHARED, 0.05 if stripe % 2 else 0.3)
        page.cells((380, y - 9), (9, 3), (4, 6), SHARED, [tone])
        page.cells((654, y - 6), (1, 1), (40, 12), HEAD, [mix(HEAD, 0.35)])
        for start, end in ((416, 432), (480, 496), (570, 586), (638, 654), (694, 734)):
            page.arrow((start, y), (end, y))
        page.cells((734, top + 24 * stripe), (1, 1), (14, 24), HEAD, [mix(HEAD, 0.35)])
    page.text(535, bottom + 14, "own weights for each stripe", SMALL, color=FAINT)
    page.text(398, bottom + 14, "6 stripes", SMALL, color=FAINT)
    page.text(741, bottom + 14, "concat", SMALL, color=FAINT)
    page.arrow((748, MIDDLE), (774, MIDDLE))
    page.box((774, MIDDLE - 36), (100, 72), "", OUT)
    page.text(824, MIDDLE - 17, "retrieval\nfeature", fontweight="bold")
    page.text(824, MIDDLE + 17, "1536-d,\nL2-normalised", SMALL)

    page.loss(632, 62, "w × HC triplet, each stripe", 172)
    page.arrow((674, top + 6), (674, 72), training=True)
    page.loss(768, 62, "HC triplet", 78)
    page.arrow((741, top), (741, 72), training=True)
    page.arrow((674, bottom - 6), (674, 261), training=True)
    page.box((636, 261), (76, 26), "classifier", HEAD, training=True)
    page.arrow((636, 274), (608, 274), training=True)
    page.loss(540, 274, "identity, each stripe", 136)


READS, BANKS = 446, 526  # heights of the memory's two rows
PARTS, INSTANCES, SEMANTIC = 390, 520, 650  # its columns
POOLED = 814


def draw_memory(page: Page) -> None:
    """The cascade of reads, its banks, and the branch's losses."""
    page.panel((262, 322), (624, 278), MEMORY, training=True)
    page.text(332, 342, "Memory branch", HEADING, fontweight="bold", ha="left")
    page.text(874, 342, "training only", SMALL, ha="right", color=FAINT, fontstyle="italic")
    x = MAP[0] + 27
    page.arrow((x, MAP[1] + 18 * CELL), (x, READS), (PARTS - 42, READS), training=True)
    page.text(x - 10, READS - 8, "x", fontstyle="italic")
    names = ((PARTS, "part\nread"), (INSTANCES, "instance\nread"), (SEMANTIC, "semantic\nread"))
    for column, words in names:
        page.box((column - 42, READS - 20), (84, 40), words, MEMORY, training=True)
    page.arrow((PARTS + 42, READS), (INSTANCES - 42, READS), training=True)
    page.arrow((INSTANCES + 42, READS), (SEMANTIC - 42, READS), training=True)
    page.arrow((SEMANTIC + 42, READS), (719, READS), training=True)
    page.arrow((x, 362), (730, 362), (730, READS - 11), training=True)
    page.axes.add_patch(Circle((730, READS), 11, facecolor="white", edgecolor=MEMORY.edge))
    page.text(730, READS, "+", HEADING)
    page.arrow((741, READS), (POOLED - 48, READS), training=True)
    page.text(752, READS - 9, "y", fontstyle="italic")
    draw_banks(page)

    page.loss(PARTS, 382, "0 × decorrelation", 118)
    page.loss(PARTS, 404, "0.1 × alignment", 118)
    page.arrow((PARTS, READS - 20), (PARTS, 414), training=True)
    page.box((POOLED - 48, READS - 20), (96, 40), "mean over\npositions", MEMORY, training=True)
    page.arrow((POOLED, READS - 20), (POOLED, 404), training=True)
    page.loss(POOLED, 394, "HC triplet", 78)
    page.arrow((POOLED, READS + 20), (POOLED, 484), training=True)
    page.box((POOLED - 48, 484), (96, 40), "BN\nclassifier", MEMORY, training=True)
    page.arrow((POOLED, 524), (POOLED, 546), training=True)
    page.loss(POOLED, 556, "0.1 × identity", 100)


def draw_banks(page: Page) -> None:
    """A card an identity: T instances of R parts, their means, the means of these."""
    cards = ((PARTS, (5, 6), (10, 9)), (INSTANCES, (5, 1), (10, 18)), (SEMANTIC, (1, 1), (18, 18)))
    for column, shape, size in cards:
        width, height = shape[0] * size[0], shape[1] * size[1]
        for depth in (2, 1, 0):
            corner = column - width / 2 + 4 * depth, BANKS - height / 2 - 4 * depth
            page.cells(corner, shape, size, MEMORY, [mix(MEMORY, 0.25 if depth else 0.08)])
        page.arrow((column, BANKS - height / 2 - 9), (column, READS + 20), training=True)
    for start, end, count in (
        (PARTS + 37, INSTANCES - 29, "R"),
        (INSTANCES + 37, SEMANTIC - 13, "T"),
    ):
        page.arrow((start, BANKS), (end, BANKS), training=True)
        page.text((start + end) / 2, BANKS - 9, "gate", SMALL)
        page.text((start + end) / 2, BANKS + 10, f"mean of {count}", SMALL)
    for column, name, size in (
        (PARTS, "part bank", "L·T·R, learned"),
        (INSTANCES, "instance bank", "L·T"),
        (SEMANTIC, "semantic bank", "L"),
    ):
        page.text(column, 570, name)
        page.text(column, 586, size, SMALL, color=FAINT)


def draw_key(page: Page) -> None:
    """What the shapes and letters mean."""
    y = 334
    page.box((14, y - 9), (34, 18), "", SHARED)
    page.text(56, y, "training and retrieval", SMALL, ha="left")
    page.box((14, y + 17), (34, 18), "", SHARED, training=True)
    page.text(56, y + 26, "training only", SMALL, ha="left")
    page.loss(31, y + 52, "", 34)
    page.text(56, y + 52, "loss, weight where not 1", SMALL, ha="left")
    letters = (
        ("L", "training identities"),
        ("T", "= 5 instances an identity"),
        ("R", "= 6 parts an instance"),
        ("w", "= 2 for RegDB, 1 for SYSU-MM01"),
    )
    for number, (letter, words) in enumerate(letters):
        page.text(16, y + 86 + 18 * number, letter, SMALL, ha="left", fontweight="bold")
        page.text(34, y + 86 + 18 * number, words, SMALL, ha="left")
    notes = (
        "HC (hetero-centre) triplet: over the\nmean features of each identity in\neach modality",
        "Read: softmax over a bank, weights\nup to 0.0025 set to zero, the others\n"
        "renormalised; their weighted sum",
    )
    for place, note in zip((160, 214), notes, strict=True):
        page.text(16, y + place, note, SMALL, ha="left", va="top")


def main() -> None:
    """Draws the picture."""
    with matplotlib.rc_context(fname=STYLE):
        page = Page()
        for draw in (draw_streams, draw_head, draw_memory, draw_key):
            draw(page)
        page.save(OUTPUT)


if __name__ == "__main__":
    main()
