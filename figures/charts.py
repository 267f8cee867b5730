"""Charts: results, distances, embeddings, and what the log of a run holds."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from numpy.typing import ArrayLike

from figures import page
from networks.settings import LEVELS

Log = Sequence[Mapping[str, Any]]  # the lines of a run's ``log.jsonl``
LABEL_CHARACTERS = 40  # of a line in the legend of a column-wide figure
PANEL_CHARACTERS = 36  # of a line above one of two panels side by side
MAX_CURVES = 7  # that can be told apart: the style file's colours and dashes
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")  # a log may have more curves


@page.styled
def cmc_curves(runs: Sequence[tuple[str, Mapping[str, Any]]], *, title: str = "") -> Figure:
    """Draws cumulative matching curves; `runs` are names and contents of ``results.json`` files.

    Raises:
        ValueError: Too many runs to tell apart.
    """
    if len(runs) > MAX_CURVES:
        raise ValueError(f"{len(runs)} runs, expected 1 to {MAX_CURVES}, which can be told apart")
    figure = Figure(figsize=(page.COLUMN_WIDTH, 2.4), layout="constrained")
    axes = figure.subplots()
    for (name, result), marker in zip(runs, MARKERS, strict=False):
        cmc, mean_ap = 100 * np.asarray(result["cmc"], np.float64), 100 * result["mAP"]
        name += "" if result["re_rank"] == "no" else f", {result['re_rank']}"
        scores = f"Rank-1\xa0{cmc[0]:.1f}, mAP\xa0{mean_ap:.1f}"  # never torn apart
        label = page.wrapped(f"{name}: {scores}", LABEL_CHARACTERS)
        axes.plot(range(1, len(cmc) + 1), cmc, marker=marker, markersize=3.5, label=label)
    axes.set(xlabel="rank", ylabel="matching rate (%)")
    axes.set_xticks([rank for rank in (1, 5, 10, 15, 20) if rank <= axes.dataLim.x1])
    axes.set_ylim(max(0, 10 * np.floor(axes.dataLim.y0 / 10 - 0.3)), 101)
    page.add_legend(figure, axes.lines)
    page.add_heading(figure, title)
    return figure


def misordered(within: ArrayLike, between: ArrayLike) -> float:
    """Returns the share of (within, between) pairs whose between-distance is smaller; ties half."""
    within = np.sort(within)
    below, upto = (np.searchsorted(within, between, side) for side in ("left", "right"))
    return float(1 - (below + upto).mean() / 2 / len(within))


@page.styled
def distance_histograms(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = "", note: str = ""
) -> Figure:
    """Draws distances across modalities, within and between identities, on one common x axis.

    `panels` maps a name ("after training", ...) to distances within (n,) and between (m,) them.
    """
    everything = [values for pair in panels.values() for values in pair]
    everything = np.concatenate(everything, dtype=np.float64)  # tells nearly equal edges apart
    edges = np.histogram_bin_edges(everything, bins=60)
    figure = Figure(figsize=(page.COLUMN_WIDTH, 1.6 * len(panels) + 0.2), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for chart, (name, (within, between)) in zip(axes, panels.items(), strict=True):
        other = {"fc": "#F7DDA6", "ec": page.ORANGE, "ls": "--", "label": "different identities"}
        same = {"fc": "none", "ec": page.BLUE, "hatch": "////", "label": "same identity"}
        for values, look in ((between, other), (within, same)):
            shares = 100 * np.histogram(values, edges)[0] / len(values)
            chart.stairs(shares, edges, fill=True, linewidth=1.2, **look)
        order = f"{name}\nin wrong order: {100 * misordered(within, between):.1f} %"
        chart.set_title(order, loc="left", fontsize="medium")
    axes[-1].set_xlabel("cosine distance")
    figure.supylabel("share of the pairs (%)", fontsize="medium")
    page.add_legend(figure, axes[0].patches, columns=2)
    note += " In wrong order: how often a random pair of different identities is closer than a "
    note += "random pair of the same identity (50 % is chance)."
    note += " The vertical scales differ." if len(panels) > 1 else ""
    page.add_heading(figure, title, note)
    return figure


@page.styled
def differences(panels: Mapping[str, Sequence[Any]], *, title: str = "") -> Figure:
    """Draws differences between methods, one panel a protocol, with their intervals.

    `panels` maps a protocol's name to its `reproduction.paired.differences`; not all are empty.
    """
    names = {each.name for found in panels.values() for each in found}
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    height = rows * (0.6 + 0.24 * len(names))
    figure = Figure(figsize=(page.PAGE_WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for chart, (panel, found) in zip(axes, panels.items(), strict=False):
        chart.axvline(0, color=page.GREY, linewidth=0.8)
        for each in found:
            chart.plot(each.values, [each.name] * len(each.values), "o", color=page.ORANGE, ms=3)
            chart.errorbar(each.mean, each.name, xerr=each.half_width, fmt="D", color=page.BLUE)
        chart.set(title=page.wrapped(panel, PANEL_CHARACTERS), xlabel="difference (points)")
    for chart in axes[len(panels) :]:
        chart.set_visible(False)
    axes[0].invert_yaxis()
    note = "Circles: single splits. Diamonds: their mean, from three on with its 95 % interval."
    note += " The scales differ." if len(panels) > 1 else ""
    page.add_heading(figure, title, note)
    return figure


@page.styled
def embedding(
    points: np.ndarray,
    pids: np.ndarray,
    infrared: np.ndarray,
    *,
    axis_names: tuple[str, str],
    title: str = "",
    note: str = "",
) -> Figure:
    """Draws features in the plane: identity by colour and marker, visible filled, infrared hollow.

    A line joins the centres of an identity's modalities. `points` are (n, 2), `pids` and `infrared`
    (n,); at most `MAX_CURVES` identities, each in both modalities.
    """
    figure = Figure(figsize=(page.COLUMN_WIDTH, 3.0), layout="constrained")
    axes = figure.subplots()
    dots = {"linestyle": "none", "markersize": 5, "markeredgewidth": 0.9}
    colors = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    identities = []
    for pid, color, marker in zip(np.unique(pids), colors, MARKERS, strict=False):
        visible, other = points[(pids == pid) & ~infrared], points[(pids == pid) & infrared]
        look = {"color": color, "marker": marker, **dots}
        identities += axes.plot(*visible.T, **look, label=str(pid))
        axes.plot(*other.T, **look, markerfacecolor="none")
        centers = np.array([visible.mean(axis=0), other.mean(axis=0)])
        axes.plot(*centers.T, color=color, linestyle="-", linewidth=1)
    kinds = [
        *axes.plot([], [], "o", color=page.GREY, **dots, label="visible"),
        *axes.plot([], [], "o", color=page.GREY, **dots, mfc="none", label="infrared"),
        *axes.plot([], [], "-", color=page.GREY, linewidth=1, label="their centres"),
    ]
    axes.set(xlabel=axis_names[0], ylabel=axis_names[1], xticks=[], yticks=[])
    figure.legend(handles=identities, title="identity", loc="outside right center", handlelength=1)
    page.add_legend(figure, kinds, columns=3)
    page.add_heading(figure, title, note)
    return figure


@page.styled
def training_curves(epochs: Log, *, title: str) -> Figure:
    """Draws a run's loss terms, evaluations, learning rate and feature spread."""
    figure = Figure(figsize=(page.PAGE_WIDTH, 4.3), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    losses = upper.subplots()
    keys = list(epochs[-1])
    terms = keys[keys.index("lr") + 1 : keys.index("total") + 1]
    _plot(losses, epochs, {term: term for term in terms}, "loss")
    losses.set_yscale("log", nonpositive="mask")
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter(LogFormatter())
    upper.legend(loc="outside right upper", handlelength=3)
    results, rate, spread = lower.subplots(1, 3, sharex=True)
    evaluated = [line["eval"] for line in epochs if line.get("eval")]
    metrics = {"Rank-1": "rank1", "mAP": "mAP", "mINP": "mINP"}
    _plot(results, evaluated, metrics, "evaluation (%)", scale=100)
    results.legend(handlelength=1.7)
    _plot(rate, epochs, {"": "lr"}, "learning rate")
    rate.ticklabel_format(axis="y", scilimits=(-2, 2))
    _plot(spread, epochs, {"": "feature_spread"}, "feature spread")
    spread.set_ylim(0, 1.08 * max(1e-3, spread.dataLim.y1))
    note = "Loss terms are unweighted means over an epoch; the total is their weighted sum."
    page.add_heading(figure, title, note)
    return figure


@page.styled
def memory_health(epochs: Log, *, title: str) -> Figure:
    """Draws how a memory's levels were addressed, epoch by epoch.

    Raises:
        ValueError: No line has a memory's usage statistics.
    """
    levels = [level for level in LEVELS if any(f"memory/{level}/used" in line for line in epochs)]
    if not levels:
        raise ValueError("no line has memory/... numbers: the run has no memory, or no epoch yet")
    figure = Figure(figsize=(page.PAGE_WIDTH, 4.0), layout="constrained")
    charts = figure.subplots(2, 2).ravel()
    labels = {
        "zero_reads": "zero reads (% of positions)",
        "survivors": "survivors per position",
        "used": "prototypes used (%)",
        "entropy": "entropy of a read (nats)",
    }
    for chart, (number, label) in zip(charts, labels.items(), strict=True):
        keys = {level: f"memory/{level}/{number}" for level in levels}
        _plot(chart, epochs, keys, label, scale=100 if "%" in label else 1)
    for chart in charts[::2]:
        chart.set_ylim(-4, 104)
    charts[1].set_yscale("symlog", linthresh=0.1)  # a few of a bank or all of it, often none
    charts[1].margins(y=0.1)
    charts[1].set_ylim(bottom=-0.02)
    charts[1].yaxis.set_major_formatter("{x:g}")
    page.add_legend(figure, charts[0].lines, columns=3)
    note = "Zero reads: positions at which no prototype is above lambda. Survivors: prototypes "
    note += "above it at a position. Used: addressed at least once in the steps looked at. "
    note += "Entropy: of the positions that read something."
    page.add_heading(figure, title, note)
    return figure


def _plot(chart: Axes, lines: Log, keys: Mapping[str, str], label: str, scale: float = 1) -> None:
    """Plots the numbers that lines have under some keys, by name, times `scale`, over epochs."""
    for (name, key), marker in zip(keys.items(), cycle(MARKERS), strict=False):
        points = [(line["epoch"], scale * line[key]) for line in lines if line.get(key) is not None]
        look = {"marker": marker, "markersize": 3.5, "markevery": max(1, len(points) // 12)}
        chart.plot(*np.reshape(points, (-1, 2)).T, label=name, linewidth=1.1, **look)
    if not any(len(line.get_xdata()) for line in chart.lines):
        page.write_middle(chart, "nothing logged")
    chart.set(xlabel="epoch", ylabel=label)
    chart.xaxis.get_major_locator().set_params(integer=True)
