"""CMC, mAP and mINP of a query x gallery distance matrix, exact and with stable ties.

    cmc, mAP, mINP = eval_sysu(distmat, q_pids, g_pids, q_camids, g_camids)

All three follow from the ranks of the true matches, and a rank is a count of smaller distances. So
the values of a row are sorted, not its indices, and each true match is looked up among them. The
gallery's order matters only in ties.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import ArrayLike

BLOCK_ENTRIES = 1 << 18  # distances per block, about what fits a core's cache
MAX_THREADS = 4  # NumPy holds the interpreter lock too often for more to help
REPORTED_RANKS = (1, 5, 10, 20)
METRICS = (*(f"rank{k}" for k in REPORTED_RANKS), "mAP", "mINP")  # of every result
RESULT = {**dict.fromkeys(METRICS, float), "re_rank": str, "protocol": str}  # as `utils.parse_json`
EVALUATED = {"epoch": int, **dict.fromkeys(METRICS, float)}
LOG_LINE = {"epoch": int, "eval?": EVALUATED, "*": float}  # of log.jsonl
RE_RANKINGS = ("no", "k_reciprocal", "random_walk")  # what an evaluation may ask for; see `re_rank`

Ids = ArrayLike  # one identity or camera for each image
Metrics = tuple[np.ndarray, float, float]  # cmc (max_rank,), mAP, mINP


def eval_sysu(
    distmat: np.ndarray, q_pids: Ids, g_pids: Ids, q_camids: Ids, g_camids: Ids, max_rank: int = 20
) -> Metrics:
    """Returns the metrics of the SYSU-MM01 protocol.

    The CMC counts each gallery identity once, at its first hit; AP and INP use every image that
    counts. Queries left without a true match are part of no mean.

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
    distmat: np.ndarray, q_pids: Ids, g_pids: Ids, q_camids: Ids, g_camids: Ids, max_rank: int = 20
) -> Metrics:
    """Returns the metrics of the LLCM protocol: as `eval_sysu`, with LLCM's camera rule.

    Source: the data set's protocol for the exclusion; the CMC is SYSU-MM01's, as the field runs it.
    """
    return evaluate_rule("same", distmat, q_pids, g_pids, q_camids, g_camids, max_rank)


def eval_regdb(distmat: np.ndarray, q_pids: Ids, g_pids: Ids, max_rank: int = 20) -> Metrics:
    """Returns the metrics of the RegDB protocol: as `eval_sysu`, but every image counts.

    Source: the AGW family's evaluation of RegDB.
    """
    # Identities in place of cameras, which this rule does not read.
    return evaluate_rule("none", distmat, q_pids, g_pids, q_pids, g_pids, max_rank)


def evaluate_rule(
    rule: str,
    distmat: np.ndarray,
    q_pids: Ids,
    g_pids: Ids,
    q_camids: Ids,
    g_camids: Ids,
    max_rank: int = 20,
) -> Metrics:
    """Returns the metrics under a rule of `excluded`; the rest is as for `eval_sysu`."""
    distmat, q_pids, g_pids = np.asarray(distmat), np.asarray(q_pids), np.asarray(g_pids)
    q_camids, g_camids = np.asarray(q_camids), np.asarray(g_camids)
    pids, camids = q_pids.shape + g_pids.shape, q_camids.shape + g_camids.shape
    if not distmat.size or not distmat.shape == pids == camids:
        raise ValueError(
            f"distmat has shape {distmat.shape}, expected (queries, gallery), neither 0, as the "
            f"identities {pids} and the cameras {camids}"
        )
    _, labels = np.unique(np.concatenate([q_pids, g_pids]), return_inverse=True)
    labels = labels.astype(np.min_scalar_type(labels.max()))  # identities as small numbers
    q_labels, g_labels = np.split(labels, [len(q_pids)])  # (Q,), (G,)
    dtype = np.promote_types(distmat.dtype, np.float32)  # float16 compares slowly
    block_size = max(1, BLOCK_ENTRIES // len(g_pids))

    def evaluate_block(start: int) -> np.ndarray:
        block = slice(start, start + block_size)
        values = distmat[block].astype(dtype, copy=False)  # (n, G)
        if np.isnan(values.min()):
            row, column = np.argwhere(np.isnan(values))[0]
            raise ValueError(f"distmat[{start + row}, {column}] is NaN, expected a distance")
        matches = q_labels[block, None] == g_labels  # (n, G)
        mask = excluded(rule, q_pids[block], g_pids, q_camids[block], g_camids)
        if mask.any():
            values = np.where(mask, np.nan, values)  # NaN is sorted last and precedes nothing
            matches &= ~mask
        counted = None if rule == "none" else g_labels  # RegDB's CMC counts images
        return _query_metrics(values, matches, counted)

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        blocks = pool.map(evaluate_block, range(0, len(distmat), block_size))
        first_hits, ap, inp = np.concatenate(list(blocks), axis=1)  # of each query with a hit
    if not len(first_hits):
        error = f"none of {len(q_pids)} queries has a true match among the images that count"
        raise ValueError(f"{error}: do query and gallery share identities?")
    cmc = (first_hits[:, None] <= np.arange(max_rank)).mean(axis=0)
    return cmc, float(ap.mean()), float(inp.mean())


def excluded(rule: str, q_pids: Ids, g_pids: Ids, q_camids: Ids, g_camids: Ids) -> np.ndarray:
    """Returns where a gallery image does not count for a query by a camera rule, (Q, G) bool.

    Raises:
        ValueError: The rule is unknown.
    """
    q_pids, q_camids = np.asarray(q_pids)[:, None], np.asarray(q_camids)[:, None]  # (Q, 1) each
    g_pids, g_camids = np.asarray(g_pids), np.asarray(g_camids)  # (G,) each
    if rule == "none":  # RegDB: all count
        return np.zeros((len(q_pids), len(g_pids)), bool)
    if rule == "sysu":  # queries of camera 3 ignore camera 2, which watches the same place
        return (q_camids == 3) & (g_camids == 2)
    if rule == "same":  # LLCM: queries ignore images of their own identity by their own camera
        return (q_camids == g_camids) & (q_pids == g_pids)
    raise ValueError(f"camera rule {rule!r}; expected one of none, sysu, same")


def summarize(cmc: ArrayLike, mAP: float, mINP: float) -> dict[str, float]:
    """Names the reported fractions as in `METRICS`; a short CMC goes on with its last value."""
    ranks = {f"rank{k}": float(cmc[min(k, len(cmc)) - 1]) for k in REPORTED_RANKS}
    return {**ranks, "mAP": float(mAP), "mINP": float(mINP)}


def mean_and_std(results: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Returns mean and population standard deviation over trials of each number."""
    trials = {name: [result[name] for result in results] for name in results[0]}
    mean = {name: float(np.mean(values)) for name, values in trials.items()}
    std = {name: float(np.std(values)) for name, values in trials.items()}
    return mean, std


def _query_metrics(
    values: np.ndarray, matches: np.ndarray, g_labels: np.ndarray | None
) -> np.ndarray:
    """Returns what precedes the first hit, AP and INP of the V queries with a hit: (3, V).

    `values` (n, G) are distances, NaN where an image does not count; `matches` (n, G) tells hits.
    Identities `g_labels` (G,), 0, 1, ..., are counted, or images where it is None.
    """
    num_images = values.shape[1]
    rows, columns = np.divmod(np.flatnonzero(matches), num_images)  # (M,) each, true matches
    ranks = _ranks(values, rows, columns)  # (M,)
    order = np.argsort(rows * num_images + ranks)  # by query, then by rank
    ranks, columns = ranks[order], columns[order]
    queries, firsts, counts = np.unique(rows, return_index=True, return_counts=True)  # (V,) each
    found = np.arange(len(rows)) - np.repeat(firsts, counts) + 1  # (M,) 1, 2, ... in each query
    ap = np.add.reduceat(found / (ranks + 1), firsts) / counts
    inp = counts / (ranks[firsts + counts - 1] + 1)
    first_hits = ranks[firsts]
    if g_labels is not None:
        ahead = _precede(values, queries, columns[firsts])  # (V, G)
        row, column = np.divmod(np.flatnonzero(ahead), num_images)
        seen = np.zeros((len(queries), int(g_labels.max()) + 1), bool)  # (V, identities)
        seen[row, g_labels[column]] = True
        first_hits = seen.sum(axis=1)
    return np.stack([first_hits, ap, inp])


def _ranks(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Returns the ranks 0, 1, ... of M entries in a stable sort of their rows: (M,)."""
    height, width = values.shape
    wanted = values[rows, columns]  # (M,)
    ordered = np.sort(values, axis=1).ravel()  # (n * G,)
    base = rows * width  # (M,) start of each entry's row in `ordered`
    ranks = np.zeros_like(rows)  # how many values of the row are smaller
    step = 1 << (width.bit_length() - 1)
    while step:  # binary search of all entries at once
        further = np.minimum(ranks + step, width)
        ranks = np.where(ordered[base + further - 1] < wanted, further, ranks)
        step >>= 1
    following = np.minimum(ranks + 1, width - 1)
    tied = np.flatnonzero(ordered[base + following] == wanted)  # or last of their rows
    for start in range(0, len(tied), height):  # (at most n, G) at a time
        some = tied[start : start + height]
        ahead = _precede(values, rows[some], columns[some])
        ranks[some] = [np.count_nonzero(row) for row in ahead]  # faster than ahead.sum(axis=1)
    return ranks


def _precede(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Tells which images a stable sort of its row puts before each of m entries: (m, G) bool."""
    candidates, own = values[rows], values[rows, columns][:, None]  # (m, G), (m, 1)
    earlier = np.arange(values.shape[1]) < columns[:, None]  # (m, G)
    return (candidates < own) | ((candidates == own) & earlier)
