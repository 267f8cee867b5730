"""CMC, mAP and mINP of a query x gallery distance matrix, exact and with stable ties.

    cmc, mAP, mINP = eval_sysu(distmat, q_pids, g_pids, q_camids, g_camids)

Of images at equal distance the first in the gallery ranks first.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

REPORTED_RANKS = (1, 5, 10, 20)
METRICS = (*(f"rank{k}" for k in REPORTED_RANKS), "mAP", "mINP")  # of every result
RESULT = {**dict.fromkeys(METRICS, float), "re_rank": str, "protocol": str}  # as `utils.parse_json`
LOG_LINE = {"epoch": int, "eval?": dict.fromkeys(METRICS, float), "*": float}  # of log.jsonl
RE_RANKINGS = ("no", "k_reciprocal", "random_walk")  # what an evaluation may ask for; see `re_rank`

Metrics = tuple[np.ndarray, float, float]  # cmc (max_rank,), mAP, mINP


# A protocol's rule about cameras: (q_pids (Q, 1), g_pids (G,), q_camids (Q, 1), g_camids (G,)) ->
# (Q, G) bool, True where a gallery image does not count for a query; None: all count.
CAMERA_RULES: dict[str, Callable[..., np.ndarray] | None] = {
    "none": None,  # RegDB
    # SYSU-MM01: queries of camera 3 ignore camera 2, which watches the same place.
    "sysu": lambda q_pids, g_pids, q_camids, g_camids: (q_camids == 3) & (g_camids == 2),
    # LLCM: queries ignore images of their own identity by their own camera.
    "same": lambda q_pids, g_pids, q_camids, g_camids: (q_camids == g_camids) & (q_pids == g_pids),
}
COUNT_IMAGES = ("none",)  # rules whose CMC counts images, the others' counts identities


def evaluate_rule(
    rule: str,
    distmat: np.ndarray,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_camids: ArrayLike,
    g_camids: ArrayLike,
    max_rank: int = 20,
) -> Metrics:
    """Returns the metrics under a rule of `CAMERA_RULES`.

    The CMC counts each gallery identity once, at its first hit, or under `COUNT_IMAGES` each image;
    AP and INP use every image that counts. Queries left without a true match are part of no mean.

    Args:
        rule: A name in `CAMERA_RULES`.
        distmat: (Q, G) real numbers of any type, smaller is closer; ties keep gallery order.
        q_pids: (Q,) query identities.
        g_pids: (G,) gallery identities.
        q_camids: (Q,) query cameras.
        g_camids: (G,) gallery cameras.
        max_rank: Length of the CMC, which repeats its last value past the last identity.

    Returns:
        cmc (max_rank,) float64, mAP, mINP; all fractions.

    Raises:
        ValueError: Shapes disagree, a side is empty, a distance is NaN, or no query has a true
            match.

    Source: the SYSU-MM01 authors' evaluation and the AGW family's of RegDB (CMC and mAP); mINP as
    in AGW (arXiv 2001.04193). LLCM's CMC is SYSU-MM01's, as the field runs it.
    """
    distmat, q_pids, g_pids = np.asarray(distmat), np.asarray(q_pids), np.asarray(g_pids)
    q_camids, g_camids = np.asarray(q_camids), np.asarray(g_camids)
    pids, camids = q_pids.shape + g_pids.shape, q_camids.shape + g_camids.shape
    if not distmat.size or not distmat.shape == pids == camids:
        raise ValueError(
            f"distmat has shape {distmat.shape}, expected (queries, gallery), neither 0, as the "
            f"identities {pids} and the cameras {camids}"
        )
    if np.isnan(distmat.min()):
        row, column = np.argwhere(np.isnan(distmat))[0]
        raise ValueError(f"distmat[{row}, {column}] is NaN, expected a distance")
    mask = excluded(rule, q_pids, g_pids, q_camids, g_camids)
    ahead, ap, inp = [], [], []  # of each query that has a true match
    for query, pid in enumerate(q_pids):
        order = np.argsort(distmat[query], kind="stable")  # (G,)
        order = order[~mask[query, order]]  # the images that count
        hits = np.flatnonzero(g_pids[order] == pid)  # (M,) places of the true matches, from 0
        if len(hits):
            before = g_pids[order[: hits[0]]]
            ahead.append(len(before) if rule in COUNT_IMAGES else len(np.unique(before)))
            ap.append(np.mean(np.arange(1, len(hits) + 1) / (hits + 1)))
            inp.append(len(hits) / (hits[-1] + 1))
    if not ahead:
        raise ValueError(
            f"none of {len(q_pids)} queries has a true match among the gallery images that count "
            "for it, expected at least one: do query and gallery share identities?"
        )
    cmc = np.mean(np.array(ahead)[:, None] <= np.arange(max_rank), axis=0)
    return cmc, float(np.mean(ap)), float(np.mean(inp))


eval_sysu = functools.partial(evaluate_rule, "sysu")
eval_llcm = functools.partial(evaluate_rule, "same")


def eval_regdb(
    distmat: np.ndarray, q_pids: ArrayLike, g_pids: ArrayLike, max_rank: int = 20
) -> Metrics:
    """Returns the metrics of the RegDB protocol, which knows no cameras; see `evaluate_rule`."""
    cameras = np.zeros(np.shape(q_pids)), np.zeros(np.shape(g_pids))
    return evaluate_rule("none", distmat, q_pids, g_pids, *cameras, max_rank)


def excluded(
    rule: str, q_pids: ArrayLike, g_pids: ArrayLike, q_camids: ArrayLike, g_camids: ArrayLike
) -> np.ndarray:
    """Returns where a gallery image does not count for a query, (Q, G) bool.

    Raises:
        ValueError: The rule is unknown.
    """
    if rule not in CAMERA_RULES:
        raise ValueError(f"camera rule {rule!r}; expected one of {', '.join(CAMERA_RULES)}")
    excludes = CAMERA_RULES[rule]
    if excludes is None:
        return np.zeros((len(q_pids), len(g_pids)), bool)
    q_pids, q_camids = np.asarray(q_pids)[:, None], np.asarray(q_camids)[:, None]  # (Q, 1) each
    return excludes(q_pids, np.asarray(g_pids), q_camids, np.asarray(g_camids))


def summarize(cmc: ArrayLike, mAP: float, mINP: float) -> dict[str, float]:  # noqa: N803
    """Names the reported fractions as in `METRICS`; a short CMC goes on with its last value."""
    ranks = {f"rank{k}": float(cmc[min(k, len(cmc)) - 1]) for k in REPORTED_RANKS}
    return {**ranks, "mAP": float(mAP), "mINP": float(mINP)}


def mean_and_std(results: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Returns mean and population standard deviation over trials of each number."""
    trials = {name: [result[name] for result in results] for name in results[0]}
    mean = {name: float(np.mean(values)) for name, values in trials.items()}
    std = {name: float(np.std(values)) for name, values in trials.items()}
    return mean, std
