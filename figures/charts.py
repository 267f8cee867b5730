"""Charts, and the page, style and file that every figure of the project shares.

    cmc_curves("cmc.png", {"MG-MRA": (cmc, mAP)}, title="RegDB, visible to infrared")

A figure is a PNG or a PDF, by the suffix of its path, in one style (`mgmra.mplstyle`): readable at
print size, without colour and to colour-blind readers. Nothing here touches pyplot's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path
from numpy.typing import ArrayLike
from PIL import Image

from memory import LEVELS
from utils import write_atomic

STYLE = Path(__file__).with_name("mgmra.mplstyle")
POINTS = 72  # an inch
DENSITY = 2  # pixels a point; geometry in whole points lands on whole pixels
FORMATS = (".png", ".pdf")
PAGE_COLORS = 256  # of a whole PNG: a third of the bytes

PAGE_WIDTH = 516  # points; the text width of a two-column conference page
COLUMN_WIDTH = 252  # points; one column of such a page, which no figure is narrower than
LABEL = (24, 11)  # points that the number of an identity takes, width and height
LABEL_SHIFTS = ((0, 3.5), (14, 0), (-14, 0), (0, -14), (22, -5), (-22, -5))  # the best first
MARGIN, LINE = 5, 12  # points; LINE: from one line of text to the next
FONT, TITLE_FONT = 8, 9  # points
INK, FAINT = "#1a1a1a", "#555555"
BLUE, ORANGE = "#0072B2", "#E69F00"  # dark and light in grey

MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # beside the style file's colours and dashes
MOST_CURVES = len(MARKERS)  # that can be told apart
HISTOGRAM_BINS = 50
TERMS = {  # loss terms of the log, as a figure names them
    "total": "total",
    "id": "identity",
    "triplet": "triplet",
    "center_triplet": "stripes' triplets",
    "memory_id": "memory identity",
    "memory_triplet": "memory triplet",
    "alignment": "alignment",
    "decorrelation": "decorrelation",
}


# ------------------------------------------------------------------------------------------ base


def draw(path: str | Path, make: Callable[[], Figure]) -> None:
    """Writes the figure that `make` returns, made and saved in the project's style.

    Raises:
        ValueError: The path is named neither .png nor .pdf.
        OSError: When the file cannot be written; a former one is then untouched.
    """
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
    palette(page, PAGE_COLORS).save(stream, "PNG", optimize=True, dpi=(figure.dpi, figure.dpi))


def _save_pdf(figure: Figure, stream: BinaryIO) -> None:
    """Writes a PDF without its date, so that the same figure is the same file."""
    figure.savefig(stream, format="pdf", metadata={"CreationDate": None})


def palette(image: Image.Image, colors: int) -> Image.Image:
    """The image in so many colours; the choice keeps rare ones, such as a bag's or a frame's."""
    coverage = Image.Quantize.MAXCOVERAGE
    return image.quantize(colors, coverage, kmeans=2, dither=Image.Dither.NONE)


def page(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty page, and axes over all of it in points with the origin at its top left."""
    figure = Figure(figsize=(width / POINTS, height / POINTS), dpi=DENSITY * POINTS)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def write(axes: Axes, x: float, y: float, text: str, **options: Any) -> None:
    """Puts one line of text on a page, its top at y; dollars in it are dollars."""
    options = {"fontsize": FONT, "color": INK, "va": "top", "parse_math": False} | options
    axes.text(x, y, text, **options)


def text_width(text: str, font: FontProperties) -> float:
    """Width of a line of text, points."""
    return text_to_path.get_text_width_height_descent(text, font, False)[0]


def wrap(text: str, width: float, font: FontProperties) -> list[str]:
    """Breaks text between words into lines of at most `width` points, where a word allows it."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and text_width(longer, font) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def heading(title: str, note: str, width: float) -> list[tuple[str, FontProperties, str]]:
    """Lines above a figure, each with its font and colour: a bold title, a fainter note."""
    bold, plain = FontProperties(size=TITLE_FONT, weight="bold"), FontProperties(size=FONT)
    head = [(line, bold, INK) for line in wrap(title, width, bold)]
    return head + [(line, plain, FAINT) for line in wrap(note, width, plain)]


def write_heading(axes: Axes, head: Sequence[tuple[str, FontProperties, str]]) -> None:
    """Puts the lines of `heading` at the top of a page."""
    for number, (line, font, color) in enumerate(head):
        write(axes, MARGIN, MARGIN + LINE * number, line, fontproperties=font, color=color)


def _charts(
    shape: tuple[int, int], size: tuple[float, float], title: str, note: str, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A page with a heading and, below it, rows x columns of charts that take `size` points."""
    head = heading(title, note, size[0] - 2 * MARGIN)
    height = size[1] + LINE * len(head) + 2 * MARGIN
    figure, words = page(size[0], height)
    write_heading(words, head)
    pad = MARGIN / POINTS
    figure.set_layout_engine("constrained", w_pad=pad, h_pad=pad, rect=(0, 0, 1, size[1] / height))
    axes = figure.subplots(*shape, squeeze=False, **options)
    for chart in axes.flat:
        _plain_chart(chart)
    return figure, axes


def _plain_chart(chart: Axes) -> Axes:
    """Thin ticks and a faint grid behind what is drawn."""
    chart.tick_params(width=0.6, length=3)
    chart.grid(color="#dddddd", linewidth=0.5)
    chart.set_axisbelow(True)
    return chart


def _check_count(what: str, count: int) -> None:
    if not 1 <= count <= MOST_CURVES:
        raise ValueError(f"{count} {what}, expected 1 to {MOST_CURVES}, which can be told apart")


# ---------------------------------------------------------------------------------------- results


def cmc_curves(
    path: str | Path, runs: Mapping[str, tuple[ArrayLike, float]], *, title: str = ""
) -> None:
    """Draws the cumulative matching curves of several runs.

    Args:
        path: File to write, .png or .pdf.
        runs: By name the CMC (ranks from 1 on) and the mAP, fractions.
        title: What was measured.

    Raises:
        ValueError: No run or too many to tell apart, or a curve that is none.
        OSError: When the file cannot be written.
    """
    _check_count("runs", len(runs))
    curves = {name: np.asarray(cmc, np.float64) for name, (cmc, _) in runs.items()}
    for name, cmc in curves.items():
        rising = cmc.ndim == 1 and len(cmc) and (np.diff(cmc) >= -1e-9).all()
        if not rising or not (cmc[0] >= 0 and cmc[-1] <= 1 + 1e-9):
            raise ValueError(f"{name}: expected a CMC, fractions that never fall; got {cmc}")

    def make() -> Figure:
        size = (COLUMN_WIDTH, 180 + LINE * len(runs))
        figure, ((axes,),) = _charts((1, 1), size, title, "")
        for (name, cmc), marker in zip(curves.items(), MARKERS, strict=False):
            label = f"{name}: Rank-1 {100 * cmc[0]:.1f}, mAP {100 * runs[name][1]:.1f}"
            ranks = np.arange(1, len(cmc) + 1)
            axes.plot(ranks, 100 * cmc, marker=marker, markersize=3.5, label=_plain(label))
        longest = max(map(len, curves.values()))
        axes.set(xlabel="rank", ylabel="queries answered (%)")
        axes.set_xticks([r for r in (1, 5, 10, 15, 20, 30, 40, 50) if r <= max(longest, 1)])
        lowest = min(100 * cmc[0] for cmc in curves.values())
        axes.set_ylim(max(0, 10 * np.floor(lowest / 10 - 0.3)), 101)
        figure.legend(loc="outside lower left", handlelength=3.5)
        return figure

    draw(path, make)


def _plain(label: str) -> str:
    """A legend's text, in which dollars are dollars and a leading underscore hides nothing."""
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def misordered(within: ArrayLike, between: ArrayLike) -> float:
    """Share of (within, between) pairs in which the between-distance is the smaller; ties half."""
    within, between = np.sort(np.ravel(within)), np.ravel(between)
    below, upto = (np.searchsorted(within, between, side) for side in ("left", "right"))
    return float(1 - (below + upto).mean() / 2 / len(within))


def distance_histograms(
    path: str | Path,
    panels: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    title: str = "",
    note: str = "",
) -> None:
    """Draws distances across modalities, of one identity and of different ones, panel by panel.

    Args:
        path: File to write, .png or .pdf.
        panels: By name ("before training", ...) the distances between images of the same identity
            and between those of different identities, one-dimensional.
        title: What was measured.
        note: How the distances were made.

    Raises:
        ValueError: No panel, or distances that are missing or not finite.
        OSError: When the file cannot be written.
    """
    _check_count("panels", len(panels))
    for name, pair in panels.items():
        for kind, values in zip(("same", "different"), pair, strict=True):
            if not values.size or not np.isfinite(values).all():
                raise ValueError(
                    f"{name}: {values.size} distances of {kind} identities, expected finite ones"
                )

    def make() -> Figure:
        size = (COLUMN_WIDTH, 112 * len(panels) + 40)
        words = note if len(panels) == 1 else f"{note} Each panel has its own scales."
        figure, axes = _charts((len(panels), 1), size, title, words)
        for chart, (name, pair) in zip(axes.flat, panels.items(), strict=True):
            _histogram(chart, *pair)
            order = f"in wrong order: {100 * misordered(*pair):.1f} %"
            chart.set_title(f"{_plain(name)}\n{order}", loc="left", fontsize=FONT)
        axes[-1, 0].set_xlabel("cosine distance")
        figure.supylabel("share of the pairs (%)", fontsize=FONT)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return figure

    draw(path, make)


def _histogram(chart: Axes, within: np.ndarray, between: np.ndarray) -> None:
    """Two outlines over each other: one hatched and solid, one filled and dashed."""
    least, most = (edge([edge(within), edge(between)]) for edge in (np.min, np.max))
    edges = np.linspace(least, max(most, least + 1e-6), HISTOGRAM_BINS + 1)
    looks = (
        ("different identities", between, {"facecolor": "#F7DDA6", "edgecolor": ORANGE}, "--"),
        ("same identity", within, {"facecolor": "none", "edgecolor": BLUE, "hatch": "////"}, "-"),
    )
    for label, values, colors, line in looks:
        shares = 100 * np.histogram(values, edges)[0] / values.size
        look = {"fill": True, "linewidth": 1.2, "linestyle": line, **colors}
        chart.stairs(shares, edges, label=label, **look)
    chart.margins(x=0.02)
    chart.set_ylim(bottom=0)


def embedding(
    path: str | Path,
    points: np.ndarray,
    pids: np.ndarray,
    infrared: np.ndarray,
    *,
    axis_names: tuple[str, str] = ("", ""),
    title: str = "",
    note: str = "",
) -> None:
    """Draws features in the plane: identity by colour and number, modality by marker.

    A line joins the centres of an identity's two modalities.

    Args:
        path: File to write, .png or .pdf.
        points: (n, 2).
        pids: (n,) identities, as many as can be told apart.
        infrared: (n,) bool.
        axis_names: Of the two axes.
        title: What was embedded.
        note: How.

    Raises:
        ValueError: Shapes that disagree, points that are not finite, too many identities.
        OSError: When the file cannot be written.
    """
    points, pids, infrared = np.asarray(points), np.asarray(pids), np.asarray(infrared)
    shapes = (points.shape, pids.shape, infrared.shape)
    if points.ndim != 2 or shapes != ((len(points), 2), (len(points),), (len(points),)):
        raise ValueError(f"shapes are {shapes}, expected (n, 2), (n,) and (n,)")
    if not np.isfinite(points).all():
        raise ValueError("a point is not finite, expected finite numbers")
    identities = np.unique(pids)
    _check_count("identities", len(identities))

    def make() -> Figure:
        figure, ((axes,),) = _charts((1, 1), (COLUMN_WIDTH, 236), title, note)
        colors = [entry["color"] for entry in matplotlib.rcParams["axes.prop_cycle"]]
        for pid, color in zip(identities, colors, strict=False):
            _identity(axes, points, pids == pid, infrared, color)
        taken: list[np.ndarray] = []  # where labels stand, about in points of print
        size = np.array([0.9 * COLUMN_WIDTH, 180]) / np.maximum(np.ptp(points, axis=0), 1e-12)
        for pid in identities:
            own = points[pids == pid]
            away = np.linalg.norm(own - np.median(own, axis=0), axis=1)
            own = own[away <= np.median(away)]  # a label stands by the many, not by a stray point
            look = {"ha": "center", "va": "bottom", "fontweight": "bold", "color": INK, "zorder": 5}
            look["path_effects"] = [withStroke(linewidth=2, foreground="white")]
            top = own[own[:, 1].argmax()]
            free = (
                shift
                for shift in LABEL_SHIFTS
                if all((np.abs(top * size + shift - other) >= LABEL).any() for other in taken)
            )
            shift = next(free, LABEL_SHIFTS[0])
            taken.append(top * size + shift)
            axes.annotate(str(pid), top, xytext=shift, textcoords="offset points", **look)
        for marker, face, label in (("o", FAINT, "visible"), ("^", "white", "infrared")):
            look = {"markeredgecolor": FAINT, "markerfacecolor": face, "linestyle": "none"}
            axes.plot([], [], marker=marker, markersize=5, label=label, **look)
        axes.plot([], [], color=FAINT, linestyle="-", linewidth=1, label="their centres")
        axes.set(xlabel=axis_names[0], ylabel=axis_names[1], xticks=[], yticks=[])
        axes.margins(y=0.09)
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2, handletextpad=0.4)
        return figure

    draw(path, make)


def _identity(
    axes: Axes, points: np.ndarray, rows: np.ndarray, infrared: np.ndarray, color: str
) -> None:
    """Points of one identity, and the line between its modalities' centres."""
    sides = [points[rows & ~infrared], points[rows & infrared]]
    for side, marker, face in zip(sides, "o^", (color, "white"), strict=True):
        look = {"markeredgecolor": color, "markerfacecolor": face, "markeredgewidth": 0.9}
        axes.plot(*side.T, marker=marker, linestyle="none", markersize=4.5, **look)
    if all(map(len, sides)):
        centers = np.array([side.mean(axis=0) for side in sides])
        axes.plot(*centers.T, color=color, linestyle="-", linewidth=1)


# ------------------------------------------------------------------------------------- a run's log


def training_curves(path: str | Path, lines: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Draws a run's loss terms, learning rate, feature spread and evaluations over its epochs.

    Args:
        path: File to write, .png or .pdf.
        lines: A run's ``log.jsonl``, one mapping an epoch.
        title: Which run.

    Raises:
        ValueError: No epoch.
        OSError: When the file cannot be written.
    """
    if not lines:
        raise ValueError("no epoch to draw, expected at least one line of log.jsonl")

    def make() -> Figure:
        note = "Loss terms are unweighted means over an epoch; the total is their weighted sum."
        figure, axes = _charts((2, 3), (PAGE_WIDTH, 310), title, note)
        grid = axes[0, 0].get_gridspec()
        for chart in axes[0]:
            chart.remove()
        top = _plain_chart(figure.add_subplot(grid[0, :]))
        losses = {TERMS.get(name, name): _series(lines, name) for name in _loss_terms(lines)}
        _lines(top, losses, "loss", log=True)
        top.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), handlelength=3)
        results = {
            label: _series(lines, "eval", key, scale=100)
            for label, key in (("Rank-1", "rank1"), ("mAP", "mAP"), ("mINP", "mINP"))
        }
        _lines(axes[1, 0], results, "evaluation (%)")
        place = {"loc": "lower center", "bbox_to_anchor": (0.42, 1.0), "ncols": 3}
        axes[1, 0].legend(**place, handlelength=1.7, columnspacing=0.7, handletextpad=0.3)
        _lines(axes[1, 1], {"": _series(lines, "lr")}, "learning rate")
        axes[1, 1].ticklabel_format(axis="y", scilimits=(-2, 2))
        _lines(axes[1, 2], {"": _series(lines, "feature_spread")}, "feature spread")
        axes[1, 2].set_ylim(0, 1.08 * max(1e-3, axes[1, 2].dataLim.y1))
        return figure

    draw(path, make)


def memory_health(path: str | Path, lines: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Draws how a memory's levels were addressed, epoch by epoch.

    Args:
        path: File to write, .png or .pdf.
        lines: A run's ``log.jsonl``, one mapping an epoch.
        title: Which run.

    Raises:
        ValueError: No line counts a memory's reads.
        OSError: When the file cannot be written.
    """
    levels = [level for level in LEVELS if any(f"memory/{level}/used" in line for line in lines)]
    if not levels:
        raise ValueError("no line has memory/... numbers: the run has no memory, or no epoch yet")

    def make() -> Figure:
        note = (
            "Zero reads: positions at which no prototype is above lambda. Survivors: prototypes "
            "above it at a position. Used: addressed at least once in the epoch. Entropy: of the "
            "positions that read something."
        )
        figure, axes = _charts((2, 2), (PAGE_WIDTH, 310), title, note)
        for chart, (number, label, scale, log) in zip(
            axes.flat,
            (
                ("zero_reads", "zero reads (% of positions)", 100, False),
                ("survivors", "survivors a position", 1, False),
                ("used", "prototypes used (%)", 100, False),
                ("entropy", "entropy of a read (nats)", 1, False),
            ),
            strict=True,
        ):
            series = {
                level: _series(lines, f"memory/{level}/{number}", scale=scale) for level in levels
            }
            _lines(chart, series, label, log=log)
            if scale == 100:
                chart.set_ylim(-4, 104)
            if number == "survivors":  # few of a bank or all of it, and often none
                chart.set_yscale("symlog", linthresh=0.1)
                chart.set_ylim(bottom=-0.02)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure

    draw(path, make)


def _loss_terms(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the terms in a log, those of this project first, a user's own after them."""
    names: dict[str, None] = {}
    for line in lines:  # terms stand before their total
        keys = list(line)
        terms = keys[: keys.index("total") + 1] if "total" in line else []
        names |= dict.fromkeys(key for key in terms if key not in ("epoch", "lr"))
    return [name for name in TERMS if name in names] + [n for n in names if n not in TERMS]


def _series(
    lines: Sequence[Mapping[str, Any]], *keys: str, scale: float = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Epochs, and a number of each, where the log has it."""
    pairs = []
    for line in lines:
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, (int, float)):
            pairs.append((line["epoch"], scale * value))
    epochs, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(epochs), np.array(values, np.float64)


def _lines(
    chart: Axes,
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    label: str,
    *,
    log: bool = False,
) -> None:
    """Curves over the epochs."""
    drawn = False
    markers = (*MARKERS, *MARKERS[3:], *MARKERS[:3])  # colours come again after seven curves
    for (name, (epochs, values)), marker in zip(series.items(), markers, strict=False):
        if log:
            values = np.where(values > 0, values, np.nan)  # a logarithm has no place for zero
        drawn |= bool(np.isfinite(values).any())
        every = max(1, len(epochs) // 12)
        look = {"marker": marker, "markersize": 3.5, "markevery": every, "linewidth": 1.1}
        chart.plot(epochs, values, label=_plain(name), **look)
    if not drawn:
        middle = {"ha": "center", "va": "center", "transform": chart.transAxes, "color": FAINT}
        chart.text(0.5, 0.5, "nothing logged", **middle)
    elif log:
        chart.set_yscale("log")
    chart.set(xlabel="epoch", ylabel=label)
    chart.xaxis.get_major_locator().set_params(integer=True)
