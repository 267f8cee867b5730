"""Charts: results, distances, embeddings, and what the log of a run holds.

    cmc_curves("cmc.png", {"MG-MRA": (cmc, mAP)}, title="RegDB, visible to infrared")

All raise what `page.draw` raises for a path that cannot be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from numpy.typing import ArrayLike

from figures.page import (
    BLUE,
    COLUMN_WIDTH,
    GREY,
    LINE,
    ORANGE,
    PAGE_WIDTH,
    draw,
    headed_figure,
    wrapped,
    write_middle,
)
from networks.settings import LEVELS

LABEL_CHARACTERS = 40  # of a line in the legend of a column-wide figure
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # beside the style file's colours and dashes
MAX_CURVES = len(MARKERS)  # that can be told apart
HISTOGRAM_BINS = 60


def _check_count(what: str, count: int) -> None:
    if not 1 <= count <= MAX_CURVES:
        raise ValueError(f"{count} {what}, expected 1 to {MAX_CURVES}, which can be told apart")


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
        ValueError: No run, too many to tell apart, or a curve that is no CMC.
    """
    _check_count("runs", len(runs))
    curves = {name: np.asarray(cmc, np.float64) for name, (cmc, _) in runs.items()}
    for name, cmc in curves.items():
        rising = cmc.ndim == 1 and len(cmc) and (np.diff(cmc) >= -1e-9).all()
        if not rising or not (cmc[0] >= 0 and cmc[-1] <= 1 + 1e-9):
            raise ValueError(f"{name}: expected a CMC, fractions that never fall; got {cmc}")
    labels = []
    for name, cmc in curves.items():
        label = f"{name}: Rank-1 {100 * cmc[0]:.1f}, mAP {100 * runs[name][1]:.1f}"
        label = f" {label}" if label.startswith("_") else label  # matplotlib hides a leading _
        labels.append(wrapped(label, LABEL_CHARACTERS))

    def make() -> Figure:
        lines = sum(len(label.splitlines()) for label in labels)
        figure, body = headed_figure(COLUMN_WIDTH, 2.4 + LINE * lines, title)
        axes = body.subplots()
        for cmc, label, marker in zip(curves.values(), labels, MARKERS, strict=False):
            ranks = np.arange(1, len(cmc) + 1)
            axes.plot(ranks, 100 * cmc, marker=marker, markersize=3.5, label=label)
        longest = max(map(len, curves.values()))
        axes.set(xlabel="rank", ylabel="matching rate (%)")
        axes.set_xticks([rank for rank in (1, 5, 10, 15, 20, 30, 40, 50) if rank <= longest])
        lowest = min(100 * cmc[0] for cmc in curves.values())
        axes.set_ylim(max(0, 10 * np.floor(lowest / 10 - 0.3)), 101)
        body.legend(loc="outside lower left", handlelength=3.5)
        return figure

    draw(path, make)


def misordered(within: ArrayLike, between: ArrayLike) -> float:
    """Returns the share of (within, between) pairs whose between-distance is smaller; ties half."""
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
    """Draws distances across modalities, within and between identities, on one common x axis.

    Args:
        path: File to write, .png or .pdf.
        panels: By name ("before training", ...) the distances between images of the same identity
            and between those of different identities, one-dimensional.
        title: What was measured.
        note: How the distances were made.

    Raises:
        ValueError: No panel, or distances that are missing or not finite.
    """
    _check_count("panels", len(panels))
    for name, pair in panels.items():
        for kind, values in zip(("same", "different"), pair, strict=True):
            if not values.size or not np.isfinite(values).all():
                raise ValueError(
                    f"{name}: {values.size} distances of {kind} identities, expected finite ones"
                )
    everything = [values for pair in panels.values() for values in pair]
    least, most = min(map(np.min, everything)), max(map(np.max, everything))
    text = note if len(panels) == 1 else f"{note} The vertical scales differ."
    edges = np.linspace(least, max(most, least + 1e-6), HISTOGRAM_BINS + 1)

    def make() -> Figure:
        figure, body = headed_figure(COLUMN_WIDTH, 1.6 * len(panels) + 0.6, title, text)
        axes = body.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for chart, (name, (within, between)) in zip(axes, panels.items(), strict=True):
            for label, values, look in (
                # told apart in greyscale: filled and dashed, hatched and solid
                ("different identities", between, {"facecolor": "#F7DDA6", "edgecolor": ORANGE}),
                ("same identity", within, {"facecolor": "none", "edgecolor": BLUE}),
            ):
                look |= {"linestyle": "-", "hatch": "////"} if values is within else {"ls": "--"}
                shares = 100 * np.histogram(values, edges)[0] / values.size
                chart.stairs(shares, edges, fill=True, linewidth=1.2, label=label, **look)
            order = f"in wrong order: {100 * misordered(within, between):.1f} %"
            chart.set_title(f"{name}\n{order}", loc="left", fontsize="medium")
        axes[-1].set_xlabel("cosine distance")
        body.supylabel("share of the pairs (%)", fontsize="medium")
        body.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure

    draw(path, make)


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
    """Draws features in the plane: identity by colour and marker, visible filled, infrared hollow.

    A line joins the centres of an identity's two modalities. Which identity is which stands in the
    legend, beside the points.

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
        figure, body = headed_figure(COLUMN_WIDTH, 3.0, title, note)
        axes = body.subplots()
        dots = {"linestyle": "none", "markersize": 5, "markeredgewidth": 0.9}
        colors = [entry["color"] for entry in matplotlib.rcParams["axes.prop_cycle"]]
        handles = []
        for pid, color, marker in zip(identities, colors, MARKERS, strict=False):
            visible, other = points[(pids == pid) & ~infrared], points[(pids == pid) & infrared]
            look = {"color": color, "marker": marker, **dots}
            axes.plot(*visible.T, **look)
            axes.plot(*other.T, **look, markerfacecolor="white")
            if len(visible) and len(other):
                centers = np.array([visible.mean(axis=0), other.mean(axis=0)])
                axes.plot(*centers.T, color=color, linestyle="-", linewidth=1)
            handles += axes.plot([], [], **look, label=str(pid))
        kinds = [
            *axes.plot([], [], "o", color=GREY, **dots, label="visible"),
            *axes.plot([], [], "o", color=GREY, **dots, mfc="white", label="infrared"),
            *axes.plot([], [], "-", color=GREY, linewidth=1, label="their centres"),
        ]
        axes.set(xlabel=axis_names[0], ylabel=axis_names[1], xticks=[], yticks=[])
        body.legend(handles=handles, title="identity", loc="outside right center")
        body.legend(handles=kinds, loc="outside lower left", ncols=3, columnspacing=1.2)
        return figure

    draw(path, make)


# ------------------------------------------------------------------------------------- a run's log


def training_curves(path: str | Path, epochs: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Draws a run's loss terms, learning rate, feature spread and evaluations over its epochs.

    Args:
        path: File to write, .png or .pdf.
        epochs: A run's ``log.jsonl``, one mapping an epoch.
        title: Which run.

    Raises:
        ValueError: No epoch.
    """
    if not epochs:
        raise ValueError("no epoch to draw, expected at least one line of log.jsonl")
    note = "Loss terms are unweighted means over an epoch; the total is their weighted sum."
    metrics = {"Rank-1": "rank1", "mAP": "mAP", "mINP": "mINP"}

    def make() -> Figure:
        figure, body = headed_figure(PAGE_WIDTH, 4.3, title, note)
        upper, lower = body.subfigures(2, 1)
        losses = {name: _series(epochs, name) for name in _loss_terms(epochs)}
        _plot_series(upper.subplots(), losses, "loss", log=True)
        upper.legend(loc="outside right upper", handlelength=3)
        results, rate, spread = lower.subplots(1, 3, sharex=True)
        evaluated = [{"epoch": line["epoch"], **(line.get("eval") or {})} for line in epochs]
        by_name = {name: _series(evaluated, key) for name, key in metrics.items()}
        _plot_series(results, by_name, "evaluation (%)", scale=100)
        results.legend(handlelength=1.7)
        _plot_series(rate, {"": _series(epochs, "lr")}, "learning rate")
        rate.ticklabel_format(axis="y", scilimits=(-2, 2))
        _plot_series(spread, {"": _series(epochs, "feature_spread")}, "feature spread")
        spread.set_ylim(0, 1.08 * max(1e-3, spread.dataLim.y1))
        return figure

    draw(path, make)


def memory_health(path: str | Path, epochs: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Draws how a memory's levels were addressed, epoch by epoch.

    Args:
        path: File to write, .png or .pdf.
        epochs: A run's ``log.jsonl``, one mapping an epoch.
        title: Which run.

    Raises:
        ValueError: No line has a memory's usage statistics.
    """
    levels = [level for level in LEVELS if any(f"memory/{level}/used" in line for line in epochs)]
    if not levels:
        raise ValueError("no line has memory/... numbers: the run has no memory, or no epoch yet")
    note = (
        "Zero reads: positions at which no prototype is above lambda. Survivors: prototypes above "
        "it at a position. Used: addressed at least once in the epoch. Entropy: of the positions "
        "that read something."
    )

    def make() -> Figure:
        figure, body = headed_figure(PAGE_WIDTH, 4.3, title, note)
        charts = body.subplots(2, 2).ravel()
        for chart, (number, label, scale) in zip(
            charts,
            (
                ("zero_reads", "zero reads (% of positions)", 100),
                ("survivors", "survivors a position", 1),
                ("used", "prototypes used (%)", 100),
                ("entropy", "entropy of a read (nats)", 1),
            ),
            strict=True,
        ):
            values = {level: _series(epochs, f"memory/{level}/{number}") for level in levels}
            _plot_series(chart, values, label, scale=scale)
            if scale == 100:
                chart.set_ylim(-4, 104)
        charts[1].set_yscale("symlog", linthresh=0.1)  # a few of a bank or all of it, often none
        charts[1].set_ylim(bottom=-0.02)
        charts[1].yaxis.set_major_formatter("{x:g}")
        body.legend(*charts[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure

    draw(path, make)


def _loss_terms(epochs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of the loss terms in a log: those from after the rate to the total."""
    names: dict[str, None] = {}
    for line in epochs:
        keys = list(line)
        names |= dict.fromkeys(keys[: keys.index("total") + 1] if "total" in line else [])
    return [name for name in names if name not in ("epoch", "lr")]


def _series(epochs: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the epochs whose line of the log has a number, and the number."""
    pairs = [(line["epoch"], line[name]) for line in epochs if line.get(name) is not None]
    numbers = np.array(pairs, np.float64).reshape(-1, 2)
    return numbers[:, 0], numbers[:, 1]


def _plot_series(
    chart: Axes,
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    label: str,
    *,
    scale: float = 1,
    log: bool = False,
) -> None:
    """Plots numbers times `scale` over the epochs, one curve for each name."""
    anything = False
    markers = (*MARKERS, *MARKERS[3:], *MARKERS[:3])  # colours come again after seven curves
    for (name, (epochs, values)), marker in zip(series.items(), markers, strict=False):
        values = scale * np.where(values > 0, values, np.nan) if log else scale * values
        anything |= bool(np.isfinite(values).any())
        look = {"marker": marker, "markersize": 3.5, "markevery": max(1, len(epochs) // 12)}
        chart.plot(epochs, values, label=name, linewidth=1.1, **look)
    if not anything:
        write_middle(chart, "nothing logged")
    elif log:
        chart.set_yscale("log")
        chart.yaxis.set_major_formatter("{x:g}")
        chart.yaxis.set_minor_formatter(LogFormatter())
    chart.set(xlabel="epoch", ylabel=label)
    chart.xaxis.get_major_locator().set_params(integer=True)
