"""Evaluation, the same for training, ``test.py``, own folders and figures: see `evaluate`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from data_loader import EvalLoader
from data_manager import EvalSet, ImageList
from eval_metrics import METRICS, evaluate_rule, mean_and_std, summarize
from re_rank import k_reciprocal, random_walk

Features = dict[str, dict[str, np.ndarray]]  # of "query" and "gallery", by kind: (n, D)


def evaluate(
    net: nn.Module,
    eval_set: EvalSet,
    images: Callable[[ImageList], np.ndarray],
    *,
    test_feats: Sequence[str],
    rankings: Sequence[str] = ("no",),
    batch_size: int = 64,
    amp: torch.dtype | None = None,
    progress: bool = False,
) -> tuple[Features, list[dict[str, Any]]]:
    """Embeds queries and gallery, each image once, and scores them under their protocol.

    `net` is a `TwoStreamNet` on its device; `images` gives the pixels of an image list, such as a
    `datasets.decode.ImageCache`; `test_feats` are names of `TwoStreamNet.embed`, `rankings` of
    `RE_RANKINGS`, none to embed without scoring; `amp` is autocast's precision, or None.

    Returns:
        The features, ``features[role][test_feat]`` (n, D) float32 with rows of norm 1; and a result
        (see `score`) with its ``test_feat`` and ``tta`` for each kind of feature and ranking.

    Raises:
        ValueError: When a feature is not finite.
    """
    features = {}
    how = {"amp": amp, "progress": progress, "flip": eval_set.tta == "flip"}
    device = next(net.parameters()).device
    for role in ("query", "gallery"):
        own = getattr(eval_set, role)
        batches = EvalLoader(images(own), batch_size=batch_size, device=device)
        features[role] = embed(net, batches, own.modality, test_feats, **how)
    return features, score_kinds(eval_set, features, rankings)


def score_kinds(
    eval_set: EvalSet, features: Features, rankings: Sequence[str]
) -> list[dict[str, Any]]:
    """Scores each kind of feature by each ranking, which the results (see `score`) name."""
    results = []
    for name, query in features["query"].items():
        for ranking in rankings:
            result = score(eval_set, query, features["gallery"][name], ranking)
            results.append({**result, "test_feat": name, "tta": eval_set.tta})
    return results


@torch.no_grad()
def embed(
    net: nn.Module,
    batches: Iterable[Tensor],
    modality: str,
    test_feats: Sequence[str],
    *,
    amp: torch.dtype | None = None,
    progress: bool = False,
    flip: bool = False,
) -> dict[str, np.ndarray]:
    """Embeds normalised images of one modality, batches of (n, 3, H, W), at least one.

    With `flip`, the features of an image and of its mirror image are summed and normalised.

    Returns (n, D) float32 with L2-normalised rows for each name in `test_feats`; raises ValueError
    when a feature is not finite.
    """
    net.eval()
    chunks: dict[str, list[Tensor]] = {name: [] for name in test_feats}
    hidden = None if progress else True
    for images in tqdm(batches, f"embed {modality}", disable=hidden, leave=False):
        views = []
        for view in (images, images.flip(3)) if flip else (images,):
            inputs = (view, None) if modality == "visible" else (None, view)
            with torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):
                views.append(net.embed(*inputs, test_feats))
        for name in test_feats:
            feats = sum(view[name].float() for view in views)
            chunks[name].append(normalize(feats) if flip else feats)  # on the device: no sync
    result = {name: torch.cat(feats).cpu().numpy() for name, feats in chunks.items()}
    for name, feats in result.items():
        if not np.isfinite(feats).all():
            raise ValueError(f"{modality} features {name!r} hold NaN or infinity: broken weights?")
    return result


def distances(query: np.ndarray, gallery: np.ndarray, ranking: str = "no") -> np.ndarray:
    """Distances (Q, G) of L2-normalised features (Q, D) and (G, D), smaller is closer.

    Minus the cosine similarity, or what a `ranking` of `eval_metrics.RE_RANKINGS` makes of it.
    """
    if ranking == "no":
        return -query @ gallery.T
    return {"k_reciprocal": k_reciprocal, "random_walk": random_walk}[ranking](query, gallery)


def score(
    eval_set: EvalSet, query: np.ndarray, gallery: np.ndarray, ranking: str = "no"
) -> dict[str, Any]:
    """Scores the features of a protocol's queries (Q, D) and of all its gallery images (G, D).

    Returns:
        ``rank1``, ``rank5``, ``rank10``, ``rank20``, ``mAP``, ``mINP`` as fractions, means over the
        trials; ``std`` and ``per_trial`` with the same keys; ``cmc``, the share of queries answered
        by ranks 1 to 20; ``re_rank``; ``protocol``.
    """
    q, g = eval_set.query, eval_set.gallery
    asking = eval_set.query_trials or (slice(None),) * len(eval_set.gallery_trials)
    per_trial, curves = [], []
    for own, rows in zip(asking, eval_set.gallery_trials, strict=True):
        distmat = distances(query[own], gallery[rows], ranking)
        people = q.pids[own], g.pids[rows], q.camids[own], g.camids[rows]
        result = evaluate_rule(eval_set.camera_rule, distmat, *people)
        per_trial.append(summarize(*result))
        curves.append(result[0])
    return {**average(per_trial, curves), "re_rank": ranking, "protocol": eval_set.protocol}


def average(trials: Sequence[Mapping[str, float]], curves: Sequence[Any]) -> dict[str, Any]:
    """Returns the means of trials' metrics, their spread ``std``, and the mean of their CMCs."""
    mean, std = mean_and_std(trials)
    return {**mean, "std": std, "per_trial": trials, "cmc": np.mean(curves, axis=0).tolist()}


def format_result(result: Mapping[str, Any]) -> str:
    """One line with a result's numbers in percent and what they were measured on."""
    numbers = "  ".join(f"{key.replace('rank', 'R')} {100 * result[key]:.2f}" for key in METRICS)
    ranking = "not re-ranked" if result["re_rank"] == "no" else f"re-ranked: {result['re_rank']}"
    return f"{numbers}  ({result['protocol']}; {ranking})"
