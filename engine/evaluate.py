"""From images to results: features, distances, and scores under a protocol.

Networks, images and protocols come in as arguments; nothing here knows the command line.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import re_rank
from engine import distributed
from eval_metrics import METRICS, eval_llcm, eval_regdb, eval_sysu, mean_and_std, summarize

RE_RANKINGS = ("no", "k_reciprocal", "random_walk")


@torch.no_grad()
def extract_features(
    net: nn.Module,
    batches: Iterable[Tensor],
    *,
    modality: str,
    test_feats: Sequence[str],
    amp: bool = False,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Embeds images once for every kind of retrieval feature asked for.

    Args:
        net: A `TwoStreamNet`; put into evaluation mode.
        batches: Normalised images (n, 3, H, W), such as a `data_loader.EvalLoader`.
        modality: "visible" or "infrared".
        test_feats: Names of `TwoStreamNet.embed`.
        amp: bf16 autocast.
        progress: Whether to show a bar.

    Returns:
        (n, D) float32 arrays by name, rows L2-normalised.

    Raises:
        ValueError: When there are no images, or a feature is not finite.
    """
    net.eval()
    parts: dict[str, list[Tensor]] = {name: [] for name in test_feats}
    hidden = None if progress else True
    for images in tqdm(batches, f"embed {modality}", disable=hidden, leave=False):
        inputs = (images, None) if modality == "visible" else (None, images)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=amp):
            for name, feat in net.embed_all(*inputs, test_feats).items():
                parts[name].append(feat.float().cpu())
    if not all(parts.values()):
        raise ValueError(f"no {modality} images to embed")
    result = {name: torch.cat(feats).numpy() for name, feats in parts.items()}
    for name, feats in result.items():
        if not np.isfinite(feats).all():
            raise ValueError(f"{modality} features {name!r} hold NaN or infinity: broken weights?")
    return result


def extract_shared(
    net: nn.Module,
    count: int,
    batches: Callable[[int, int], Iterable[Tensor]],
    *,
    batch_size: int,
    test_feats: Sequence[str],
    **settings: Any,
) -> dict[str, np.ndarray]:
    """`extract_features` with several processes, each of which embeds a share of the images.

    Batches stay whole, so that the result has the bits of a single process's.

    Args:
        net: Alike in all processes.
        count: Images in all.
        batches: From first and last + 1 image to their batches; asked for the own share alone.
        batch_size: Images a batch.
        test_feats: See `extract_features`, as for the other settings.
        **settings: For `extract_features`.

    Returns:
        All images' features, in every process.
    """
    first, last = distributed.share_of(count, batch_size)
    own = None
    if first < last or distributed.size() == 1:
        own = extract_features(net, batches(first, last), test_feats=test_feats, **settings)
    if distributed.size() == 1:
        return own
    shares = [share for share in distributed.gather_objects(own) if share is not None]
    return {name: np.concatenate([share[name] for share in shares]) for name in test_feats}


def distances(query: np.ndarray, gallery: np.ndarray, ranking: str = "no") -> np.ndarray:
    """Distances (Q, G) of L2-normalised features, smaller is closer.

    Args:
        query: (Q, D).
        gallery: (G, D).
        ranking: "no": negative cosine similarity; "k_reciprocal"; "random_walk".

    Raises:
        ValueError: When `ranking` is unknown.
    """
    return _measure(query, ranking)(gallery)


def _measure(query: np.ndarray, ranking: str) -> Callable[[np.ndarray], np.ndarray]:
    """`distances` of one set of queries to any gallery; what is the queries' own is done once."""
    if ranking == "no":

        def negative_similarity(gallery: np.ndarray) -> np.ndarray:
            similarity = query @ gallery.T
            return np.negative(similarity, out=similarity)  # in place: it may take gigabytes

        return negative_similarity
    if ranking == "k_reciprocal":
        return re_rank.KReciprocal(query).distances
    if ranking == "random_walk":
        return functools.partial(re_rank.random_walk, query)
    raise ValueError(f"re-ranking must be one of {', '.join(RE_RANKINGS)}, got {ranking!r}")


def score(
    eval_set: Any, query: np.ndarray, gallery: np.ndarray, ranking: str = "no"
) -> dict[str, Any]:
    """Scores features under a protocol.

    Args:
        eval_set: A `data_manager.EvalSet`.
        query: Features of its query images, (Q, D).
        gallery: Features of all its gallery images, (G, D).
        ranking: See `distances`.

    Returns:
        ``rank1``, ``rank5``, ``rank10``, ``rank20``, ``mAP``, ``mINP`` as fractions, means over the
        trials; ``std`` and ``per_trial`` with the same keys; ``cmc``, the share of queries answered
        by ranks 1 to 20; ``re_rank``; ``protocol``.
    """
    q, g = eval_set.query, eval_set.gallery
    measure = _measure(query, ranking)
    # Trials share images: all distances once, unless a ranking depends on the gallery.
    whole = measure(gallery) if ranking == "no" and len(eval_set.gallery_trials) > 1 else None
    per_trial, curves = [], []
    for rows in eval_set.gallery_trials:
        distmat = measure(gallery[rows]) if whole is None else whole[:, rows]
        if eval_set.camera_rule == "none":
            result = eval_regdb(distmat, q.pids, g.pids[rows])
        else:
            evaluate = {"sysu": eval_sysu, "same": eval_llcm}[eval_set.camera_rule]
            result = evaluate(distmat, q.pids, g.pids[rows], q.camids, g.camids[rows])
        per_trial.append(summarize(*result))
        curves.append(result[0])
    mean, std = mean_and_std(per_trial)
    return {
        **mean,
        "std": std,
        "per_trial": per_trial,
        "cmc": np.mean(curves, axis=0).tolist(),
        "re_rank": ranking,
        "protocol": eval_set.protocol,
    }


def format_result(result: Mapping[str, Any]) -> str:
    """One line with a result's numbers in percent and what they were measured on."""
    names = {"rank1": "R1", "rank5": "R5", "rank10": "R10", "rank20": "R20"}
    numbers = "  ".join(f"{names.get(key, key)} {100 * result[key]:.2f}" for key in METRICS)
    ranking = "not re-ranked" if result["re_rank"] == "no" else f"re-ranked: {result['re_rank']}"
    return f"{numbers}  ({result['protocol']}; {ranking})"
