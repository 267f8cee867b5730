"""Figures of an evaluation: from features of the protocol's first trial to what is drawn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from data_manager import EvalSet, ImageList
from engine.evaluate import distances
from eval_metrics import excluded
from figures import charts, image_grids
from figures.page import FORMATS, save

Features = Mapping[str, np.ndarray]  # "query" (Q, D) and "gallery" (G, D), rows of norm 1
Load = Callable[[ImageList], np.ndarray]  # returns the images (n, H, W, 3) uint8 of a list
MAX_IMAGES = 20  # of an identity and modality in the plane


def first_trial(protocol: EvalSet) -> EvalSet:
    """Restricts a protocol to the images of its first trial, which its words then say."""
    asking, words = protocol.query_trials, protocol.protocol
    if len(protocol.gallery_trials) > 1:
        words += f"; first trial's {'queries' if asking else 'gallery'}"
    query = protocol.query.take(asking[0]) if asking else protocol.query
    gallery = protocol.gallery.take(protocol.gallery_trials[0])
    everyone = {"gallery_trials": (np.arange(len(gallery)),), "query_trials": None}
    return replace(protocol, query=query, gallery=gallery, protocol=words, **everyone)


def ignored(trial: EvalSet) -> np.ndarray:
    """Returns which gallery images the protocol ignores for a query: (Q, G) bool."""
    query, gallery = trial.query, trial.gallery
    return excluded(trial.camera_rule, query.pids, gallery.pids, query.camids, gallery.camids)


def pair_distances(trial: EvalSet, features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Returns cosine distances across modalities within identities, and between them."""
    distmat = 1 + distances(features["query"], features["gallery"])
    same, counts = trial.query.pids[:, None] == trial.gallery.pids, ~ignored(trial)
    return distmat[same & counts], distmat[~same & counts]


def chosen_identities(trial: EvalSet, count: int, seed: int) -> np.ndarray:
    """Returns random identities, ascending, among those with images in both modalities."""
    pids = np.intersect1d(trial.query.pids, trial.gallery.pids)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(pids, min(count, len(pids)), replace=False))


def project(points: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    """Returns features (n, D) on their first two principal components, (n, 2), and axis names."""
    centered = points.astype(np.float64) - points.mean(axis=0)
    _, scale, axes = np.linalg.svd(centered, full_matrices=False)
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    shares = 100 * scale**2 / max((scale**2).sum(), 1e-300)
    first, second = (f"component {i + 1} ({shares[i]:.0f} % of the variance)" for i in (0, 1))
    return centered @ axes[:2].T, (first, second)


def draw_ranked(
    trial: EvalSet, load: Load, features: Features, *, title: str, ranking: str, **choice: int
) -> Figure:
    """Draws ranked lists by a `ranking` of `distances`; `choice` goes on to `ranked_lists`."""
    kind = "not re-ranked" if ranking == "no" else f"re-ranked: {ranking}"
    distmat = distances(features["query"], features["gallery"], ranking)
    return image_grids.ranked_lists(
        query_images=load(trial.query),
        gallery_images=load(trial.gallery),
        distmat=np.where(ignored(trial), np.inf, distmat),
        names=[f"identity {pid}" for pid in trial.query.pids],
        same=trial.query.pids[:, None] == trial.gallery.pids,
        title=f"{title}; {kind}",
        **choice,
    )


def draw_distances(trial: EvalSet, features: Mapping[str, Features], *, title: str) -> Figure:
    """Draws distances across modalities, a panel for each of several features by name."""
    panels = {name: pair_distances(trial, own) for name, own in features.items()}
    note = f"Pairs of {trial.query.modality} queries and {trial.gallery.modality} gallery images."
    return charts.distance_histograms(panels, title=title, note=note)


def draw_embedding(
    trial: EvalSet, features: Features, *, title: str, ids: int = charts.MAX_CURVES, seed: int = 0
) -> Figure:
    """Draws a few identities' features in the plane of their principal components."""
    wanted = chosen_identities(trial, ids, seed)
    points, pids, infrared = [], [], []
    for role, images in (("query", trial.query), ("gallery", trial.gallery)):
        kept = np.concatenate([np.flatnonzero(images.pids == pid)[:MAX_IMAGES] for pid in wanted])
        points.append(features[role][kept])
        pids.append(images.pids[kept])
        infrared.append(np.full(len(kept), images.modality == "infrared"))
    plane, axis_names = project(np.concatenate(points))
    note = "Principal components of the features shown. "
    note += f"{len(wanted)} identities, drawn at random (seed {seed})."
    words = {"axis_names": axis_names, "title": title, "note": note}
    return charts.embedding(plane, np.concatenate(pids), np.concatenate(infrared), **words)


def evaluation_figures(
    folder: Path,
    protocol: EvalSet,
    load: Load,
    features: Features,
    results: Sequence[Mapping[str, Any]],
    *,
    heading: bool = True,
) -> list[str]:
    """Draws ranked lists, CMC, distances and an embedding of an evaluation, each as PNG and PDF.

    `features` are all images', of the last result's kind; `results` are as in ``results.json``. The
    ranked lists show the last one's ranking. `heading`: see `page.save`. Returns the files' names.
    """
    trial, asking = first_trial(protocol), protocol.query_trials
    query = features["query"][asking[0]] if asking else features["query"]
    features = {"query": query, "gallery": features["gallery"][protocol.gallery_trials[0]]}
    data, ranking = results[-1]["dataset"], results[-1]["re_rank"]
    title = f"{data}: {trial.protocol}"
    curves = [(each["test_feat"], each) for each in results]
    figures = {
        "ranked_lists": draw_ranked(trial, load, features, title=title, ranking=ranking),
        "cmc": charts.cmc_curves(curves, title=f"{data}: {protocol.protocol}"),
        "distances": draw_distances(trial, {"after training": features}, title=title),
        "embedding": draw_embedding(trial, features, title=title),
    }
    files = {f"{name}{form}": figure for name, figure in figures.items() for form in FORMATS}
    for name, figure in files.items():
        save(figure, folder / name, heading=heading)
    return list(files)
