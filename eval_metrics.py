"""CMC, mAP and mINP of a query x gallery distance matrix, exact and with stable ties.

    cmc, mAP, mINP = eval_sysu(distmat, q_pids, g_pids, q_camids, g_camids)

All three follow from the ranks of the true matches, and a rank is the number of smaller distances
in the row. So the values of a row are sorted (not its indices), and each true match is looked up
among them. Gallery order matters only where a true match ties with another image.

`CAMERA_RULES` is the one place where a protocol's rule about cameras is entered.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

BLOCK_ENTRIES = 1 << 18  # distances per block, about what fits a core's cache
MAX_THREADS = 4  # NumPy holds the interpreter lock too often for more to help
REPORTED_RANKS = (1, 5, 10, 20)
METRICS = (*(f"rank{k}" for k in REPORTED_RANKS), "mAP", "mINP")  # of every result
RE_RANKINGS = ("no", "k_reciprocal", "random_walk")  # what an evaluation may ask for; see `re_rank`

Metrics = tuple[np.ndarray, float, float]  # cmc (max_rank,), mAP, mINP


@dataclass(frozen=True)
class CameraRule:
    """A protocol's rule about cameras, and how its CMC counts.

    Attributes:
        excludes: (q_pids (Q, 1), g_pids (G,), q_camids (Q, 1), g_camids (G,)) -> (Q, G) bool, True
            where a gallery image does not count for a query; None: all count.
        count_identities: Whether the CMC counts identities, at their first hit, or images.
    """

    excludes: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None
    count_identities: bool


CAMERA_RULES = {
    # RegDB: every gallery image counts.
    "none": CameraRule(None, count_identities=False),
    # SYSU-MM01: queries of camera 3 ignore camera 2, which watches the same place.
    "sysu": CameraRule(
        lambda q_pids, g_pids, q_camids, g_camids: (q_camids == 3) & (g_camids == 2),
        count_identities=True,
    ),
    # LLCM: queries ignore images of their own identity by their own camera.
    "same": CameraRule(
        lambda q_pids, g_pids, q_camids, g_camids: (q_camids == g_camids) & (q_pids == g_pids),
        count_identities=True,
    ),
}


def eval_sysu(
    distmat: np.ndarray,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_camids: ArrayLike,
    g_camids: ArrayLike,
    max_rank: int = 20,
) -> Metrics:
    """Returns the metrics of the SYSU-MM01 protocol.

    Queries of camera 3 ignore gallery images of camera 2, which watches the same place. The CMC
    counts each gallery identity once, at its first hit; AP and INP use every remaining image.
    Queries left without a true match are part of no mean.

    Args:
        distmat: (Q, G) real numbers of any type, smaller is closer; ties keep gallery order.
        q_pids: (Q,) query identities.
        g_pids: (G,) gallery identities.
        q_camids: (Q,) query cameras, 1..6.
        g_camids: (G,) gallery cameras, 1..6.
        max_rank: Length of the CMC, which repeats its last value past the last identity.

    Returns:
        cmc (max_rank,) float64, mAP, mINP; all fractions.

    Raises:
        ValueError: Shapes disagree, a side is empty, a distance is NaN, or no query has a true
            match.

    Source: the data set authors' evaluation (CMC and mAP); mINP as in AGW (arXiv 2001.04193).
    """
    return evaluate_rule("sysu", distmat, q_pids, g_pids, q_camids, g_camids, max_rank)


def eval_llcm(
    distmat: np.ndarray,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_camids: ArrayLike,
    g_camids: ArrayLike,
    max_rank: int = 20,
) -> Metrics:
    """Returns the metrics of the LLCM protocol.

    A query ignores gallery images of its own identity by its own camera (1..9). The rest is as for
    `eval_sysu`.

    Source: the data set's protocol for the exclusion. The CMC is SYSU-MM01's, whose gallery of one
    image per identity and camera LLCM's repeats, and whose evaluation the field runs on it with
    another exclusion. RegDB's plain CMC could only be lower.
    """
    return evaluate_rule("same", distmat, q_pids, g_pids, q_camids, g_camids, max_rank)


def eval_regdb(
    distmat: np.ndarray, q_pids: ArrayLike, g_pids: ArrayLike, max_rank: int = 20
) -> Metrics:
    """Returns the metrics of the RegDB protocol: no camera rule, a CMC that counts every image.

    Arguments, results and errors are those of `eval_sysu`.

    Source: the AGW family's evaluation of RegDB.
    """
    cameras = np.zeros(np.shape(q_pids)), np.zeros(np.shape(g_pids))  # no rule reads them
    return evaluate_rule("none", distmat, q_pids, g_pids, *cameras, max_rank)


def evaluate_rule(
    rule: str,
    distmat: np.ndarray,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_camids: ArrayLike,
    g_camids: ArrayLike,
    max_rank: int = 20,
) -> Metrics:
    """Returns the metrics under a rule of `CAMERA_RULES`; the rest is as for `eval_sysu`.

    Blocks of queries are evaluated in threads, so that no second array of distmat's size is needed.

    Raises:
        ValueError: The rule is unknown; otherwise as `eval_sysu`.
    """
    count_identities = _camera_rule(rule).count_identities
    distmat, q_pids, g_pids = np.asarray(distmat), np.asarray(q_pids), np.asarray(g_pids)
    q_camids, g_camids = np.asarray(q_camids), np.asarray(g_camids)
    _check_shapes(distmat, q_pids=q_pids, g_pids=g_pids, q_camids=q_camids, g_camids=g_camids)
    if distmat.dtype.kind not in "fiu":
        raise ValueError(f"distmat holds {distmat.dtype}, expected floats or integers")
    if max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}, expected at least 1")
    ids, g_labels, counts = np.unique(g_pids, return_inverse=True, return_counts=True)
    by_label = np.split(np.argsort(g_labels, kind="stable"), np.cumsum(counts)[:-1])
    columns_of = dict(zip(ids.tolist(), by_label, strict=True))  # identity -> its columns
    block_size = max(1, BLOCK_ENTRIES // len(g_pids))

    def evaluate_block(start: int) -> np.ndarray:
        block = slice(start, start + block_size)
        values = distmat[block]  # (n, G)
        if np.can_cast(values.dtype, np.float32):
            values = values.astype(np.float32, copy=False)  # exact, and float16 compares slowly
        if np.isnan(values.min()):
            row, column = np.argwhere(np.isnan(values))[0]
            raise ValueError(f"distmat[{start + row}, {column}] is NaN, expected a distance")
        matches = [columns_of.get(pid, by_label[0][:0]) for pid in q_pids[block].tolist()]
        rows = np.repeat(np.arange(len(matches)), list(map(len, matches)))
        mask = excluded(rule, q_pids[block], g_pids, q_camids[block], g_camids)
        labels = g_labels if count_identities else None
        return _query_metrics(values, mask, rows, np.concatenate(matches), labels)

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        blocks = pool.map(evaluate_block, range(0, len(distmat), block_size))
        first_hits, ap, inp = np.concatenate(list(blocks), axis=1)  # (Q,) each
    valid = first_hits >= 0
    if not valid.any():
        raise ValueError(
            f"none of {len(q_pids)} queries has a true match among the gallery images that count "
            "for it, expected at least one: do query and gallery share identities?"
        )
    hits = np.bincount(np.minimum(first_hits[valid], max_rank).astype(int), minlength=max_rank)
    cmc = np.cumsum(hits[:max_rank]) / valid.sum()
    return cmc, float(ap[valid].mean()), float(inp[valid].mean())


def excluded(
    rule: str, q_pids: ArrayLike, g_pids: ArrayLike, q_camids: ArrayLike, g_camids: ArrayLike
) -> np.ndarray | None:
    """Tells which gallery images do not count for which query.

    Args:
        rule: Name in `CAMERA_RULES`.
        q_pids: (Q,) query identities.
        g_pids: (G,) gallery identities.
        q_camids: (Q,) query cameras.
        g_camids: (G,) gallery cameras.

    Returns:
        (Q, G) bool, True where an image does not count; None where all count.

    Raises:
        ValueError: The rule is unknown.
    """
    excludes = _camera_rule(rule).excludes
    if excludes is None:
        return None
    queries = np.asarray(q_pids)[:, None], np.asarray(q_camids)[:, None]  # (Q, 1) each
    mask = excludes(queries[0], np.asarray(g_pids), queries[1], np.asarray(g_camids))  # (Q, G)
    return mask if mask.any() else None


def summarize(cmc: ArrayLike, mAP: float, mINP: float) -> dict[str, float]:  # noqa: N803
    """Names the reported fractions: rank1, rank5, rank10, rank20, mAP, mINP.

    Raises:
        ValueError: The CMC is empty (a short one goes on with its last value).
    """
    cmc = np.asarray(cmc, np.float64)
    if cmc.ndim != 1 or not len(cmc):
        raise ValueError(f"cmc has shape {cmc.shape}, expected (max_rank,), at least one rank")
    ranks = {f"rank{k}": float(cmc[min(k, len(cmc)) - 1]) for k in REPORTED_RANKS}
    return {**ranks, "mAP": float(mAP), "mINP": float(mINP)}


def mean_and_std(
    results: Sequence[dict[str, float]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns mean and population standard deviation of each number over trials (0 for one trial).

    Raises:
        ValueError: There is no trial, or trials that report different numbers.
    """
    results = list(results)
    if not results:
        raise ValueError("there are no trials to average, expected at least one")
    for trial, result in enumerate(results):
        if result.keys() != results[0].keys():
            raise ValueError(f"trial {trial} reports {sorted(result)}, not {sorted(results[0])}")
    table = {name: [result[name] for result in results] for name in results[0]}
    mean = {name: float(np.mean(column)) for name, column in table.items()}
    return mean, {name: float(np.std(column)) for name, column in table.items()}


def _camera_rule(name: str) -> CameraRule:
    if name not in CAMERA_RULES:
        raise ValueError(f"camera rule {name!r}; expected one of {', '.join(CAMERA_RULES)}")
    return CAMERA_RULES[name]


def _check_shapes(distmat: np.ndarray, **labels: np.ndarray) -> None:
    """Compares labels named q_* with the rows of the distances, g_* with their columns."""
    shape = np.shape(distmat)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"distmat has shape {shape}, expected (queries, gallery), neither 0")
    for name, values in labels.items():
        expected = (shape[name.startswith("g_")],)
        if values.shape != expected:
            raise ValueError(f"{name} has shape {values.shape}, expected {expected} (distmat)")


def _query_metrics(
    values: np.ndarray,
    mask: np.ndarray | None,
    rows: np.ndarray,
    columns: np.ndarray,
    g_labels: np.ndarray | None,
) -> np.ndarray:
    """Returns the metrics of each of n queries.

    Args:
        values: (n, G) distances.
        mask: (n, G) bool, True where an image does not count; None where all count.
        rows: (M,) query of each true match, ascending.
        columns: (M,) gallery image of each true match.
        g_labels: (G,) identities 0, 1, ... to count identities; None to count images.

    Returns:
        (3, n): how many identities or images precede the first hit, AP, INP; -1 for queries without
        a true match.
    """
    if mask is not None:
        last = np.inf if values.dtype.kind == "f" else np.iinfo(values.dtype).max
        values = np.where(mask, values.dtype.type(last), values)
        kept = ~mask[rows, columns]
        rows, columns = rows[kept], columns[kept]
    num_queries, num_images = values.shape
    result = np.full((3, num_queries), -1.0)
    if not len(rows):
        return result
    ranks, tied = _ranks(values, rows, columns)  # (M,) each
    uncertain = np.flatnonzero(tied)
    for start in range(0, len(uncertain), num_queries):  # (at most n, G) at a time
        some = uncertain[start : start + num_queries]
        ahead = _precede(values, mask, rows[some], columns[some])
        ranks[some] = [np.count_nonzero(row) for row in ahead]  # faster than ahead.sum(axis=1)

    order = np.argsort(rows * num_images + ranks)  # by query, then by rank
    ranks, columns = ranks[order], columns[order]
    counts = np.bincount(rows, minlength=num_queries)
    queries = np.flatnonzero(counts)  # (V,) those with a true match
    counts = counts[queries]  # (V,) true matches of each
    ends = np.cumsum(counts)
    firsts = ends - counts  # (V,) place of each query's first hit in `ranks`
    result[0, queries] = ranks[firsts]
    if g_labels is not None:
        ahead = _precede(values, mask, queries, columns[firsts])  # (V, G)
        row, column = np.divmod(np.flatnonzero(ahead), num_images)  # faster than ahead.nonzero()
        seen = np.zeros((len(queries), g_labels.max() + 1), bool)  # (V, identities)
        seen[row, g_labels[column]] = True
        result[0, queries] = seen.sum(axis=1)
    found = np.arange(len(rows)) - np.repeat(firsts, counts) + 1  # (M,) 1, 2, ... in each query
    result[1, queries] = np.add.reduceat(found / (ranks + 1), firsts) / counts
    result[2, queries] = counts / (ranks[ends - 1] + 1)
    return result


def _ranks(
    values: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Looks M entries up among the values (n, G) of their rows.

    Returns:
        (M,) how many values of the row are smaller, and (M,) bool, whether another may be equal.
    """
    width = values.shape[1]
    wanted = values[rows, columns]  # (M,)
    ordered = np.sort(values, axis=1).ravel()  # (n * G,)
    base = rows * width  # (M,) start of each entry's row in `ordered`
    ranks = np.zeros_like(rows)
    step = 1 << (width.bit_length() - 1)
    while step:  # binary search of all entries at once
        further = np.minimum(ranks + step, width)
        ranks = np.where(ordered[base + further - 1] < wanted, further, ranks)
        step >>= 1
    following = np.minimum(ranks + 1, width - 1)
    return ranks, ordered[base + following] == wanted


def _precede(
    values: np.ndarray, mask: np.ndarray | None, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Tells which images a stable sort of its row puts before each of m entries: (m, G) bool."""
    candidates, own = values[rows], values[rows, columns][:, None]  # (m, G), (m, 1)
    earlier = np.arange(values.shape[1]) < columns[:, None]  # (m, G)
    ahead = (candidates < own) | ((candidates == own) & earlier)
    return ahead if mask is None else ahead & ~mask[rows]
