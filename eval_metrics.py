"""CMC, mAP and mINP of a query x gallery distance matrix, exact and with stable ties.

    cmc, mAP, mINP = eval_sysu(distmat, q_pids, g_pids, q_camids, g_camids)

Every metric follows from the ranks of the true matches, and a rank is the number of smaller
distances: the values of a row are sorted (not its indices) and each true match is looked up among
them. Gallery order is consulted only where a true match ties with another image.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import ArrayLike

BLOCK_ENTRIES = 1 << 18  # distances treated at a time, about what a core's cache holds
MAX_THREADS = 4  # beyond, the interpreter's share of the work limits
REPORTED_RANKS = (1, 5, 10, 20)
METRICS = (*(f"rank{k}" for k in REPORTED_RANKS), "mAP", "mINP")  # of every result

Metrics = tuple[np.ndarray, float, float]
# Of a slice of queries: (queries, G), True where an image does not count; None where all do.
ExclusionRule = Callable[[slice], np.ndarray | None]


def eval_sysu(
    distmat: np.ndarray,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_camids: ArrayLike,
    g_camids: ArrayLike,
    max_rank: int = 20,
) -> Metrics:
    """Metrics of the SYSU-MM01 protocol.

    Queries of camera 3 ignore gallery images of camera 2, which watches the same place. The CMC
    counts each gallery identity once, at its first hit; AP and INP use every remaining image.
    Queries left without a true match are part of no mean.

    Args:
        distmat: (Q, G) real numbers of any type, smaller is closer; ties keep gallery order.
        q_pids: (Q,) query identities.
        g_pids: (G,) gallery identities.
        q_camids: (Q,) query cameras, 1..6.
        g_camids: (G,) gallery cameras, 1..6.
        max_rank: length of the CMC, which repeats its last value past the last identity.

    Returns:
        cmc (max_rank,) float64, mAP, mINP; all fractions.

    Raises:
        ValueError: shapes that disagree, an empty side, NaN, or no query with a true match.

    Source: the data set authors' evaluation (CMC and mAP); mINP as in AGW (arXiv 2001.04193).
    """
    return _evaluate_rule("sysu", distmat, q_pids, g_pids, q_camids, g_camids, max_rank)


def eval_llcm(
    distmat: np.ndarray,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_camids: ArrayLike,
    g_camids: ArrayLike,
    max_rank: int = 20,
) -> Metrics:
    """Metrics of the LLCM protocol.

    A query ignores gallery images of its own identity that its own camera took. The CMC counts
    each gallery identity once, at its first hit; AP and INP use every remaining image. Arguments
    (cameras 1..9), results and errors are those of `eval_sysu`.

    Source: the data set's protocol for the exclusion. The CMC is SYSU-MM01's, whose gallery of one
    image per identity and camera LLCM's repeats, and whose evaluation the field runs on it with
    another exclusion. RegDB's plain CMC could only be lower.
    """
    return _evaluate_rule("same", distmat, q_pids, g_pids, q_camids, g_camids, max_rank)


def excluded(
    rule: str, q_pids: ArrayLike, g_pids: ArrayLike, q_camids: ArrayLike, g_camids: ArrayLike
) -> np.ndarray | None:
    """Tell which gallery images do not count for which query.

    Args:
        rule: "none"; "sysu": camera-3 queries ignore camera 2; "same": queries ignore images of
            their own identity by their own camera.
        q_pids: (Q,) query identities.
        g_pids: (G,) gallery identities.
        q_camids: (Q,) query cameras.
        g_camids: (G,) gallery cameras.

    Returns:
        (Q, G) bool, True where an image does not count; None where all do.

    Raises:
        ValueError: an unknown rule.
    """
    q_camids, g_camids = np.asarray(q_camids)[:, None], np.asarray(g_camids)
    if rule == "sysu":
        return (q_camids == 3) & (g_camids == 2) if (q_camids == 3).any() else None
    if rule == "same":
        return (q_camids == g_camids) & (np.asarray(q_pids)[:, None] == np.asarray(g_pids))
    if rule == "none":
        return None
    raise ValueError(f"camera rule {rule!r}; expected none, sysu or same")


def _evaluate_rule(
    rule: str,
    distmat: np.ndarray,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_camids: ArrayLike,
    g_camids: ArrayLike,
    max_rank: int,
) -> Metrics:
    """Metrics under a rule of `excluded`, with a CMC that counts identities."""
    names = ("q_pids", "g_pids", "q_camids", "g_camids")
    arrays = [np.asarray(values) for values in (q_pids, g_pids, q_camids, g_camids)]
    _check_shapes(distmat, **dict(zip(names, arrays, strict=True)))
    pids, others, cameras, other_cameras = arrays

    def mask(queries: slice) -> np.ndarray | None:
        return excluded(rule, pids[queries], others, cameras[queries], other_cameras)

    return _evaluate(distmat, pids, others, max_rank, mask, count_identities=True)


def eval_regdb(
    distmat: np.ndarray, q_pids: ArrayLike, g_pids: ArrayLike, max_rank: int = 20
) -> Metrics:
    """Metrics of the RegDB protocol: no camera rule, and a CMC that counts every gallery image.

    Arguments, results and errors are those of `eval_sysu`.

    Source: the AGW family's evaluation of RegDB.
    """
    return _evaluate(distmat, q_pids, g_pids, max_rank, None, count_identities=False)


def summarize(cmc: ArrayLike, mAP: float, mINP: float) -> dict[str, float]:  # noqa: N803
    """Name the reported fractions: rank1, rank5, rank10, rank20, mAP, mINP.

    Raises:
        ValueError: the CMC is empty (a short one goes on with its last value).
    """
    cmc = np.asarray(cmc, np.float64)
    if cmc.ndim != 1 or not len(cmc):
        raise ValueError(f"cmc has shape {cmc.shape}, expected (max_rank,), at least one rank")
    ranks = {f"rank{k}": float(cmc[min(k, len(cmc)) - 1]) for k in REPORTED_RANKS}
    return {**ranks, "mAP": float(mAP), "mINP": float(mINP)}


def mean_and_std(
    results: Sequence[dict[str, float]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and population standard deviation of each number over trials (0 for one trial).

    Raises:
        ValueError: no trial, or trials that report different numbers.
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


def _check_shapes(distmat: np.ndarray, **labels: np.ndarray) -> None:
    """Hold labels named q_* against the rows of the distances, g_* against their columns."""
    shape = np.shape(distmat)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"distmat has shape {shape}, expected (queries, gallery), neither 0")
    for name, values in labels.items():
        expected = (shape[name.startswith("g_")],)
        if values.shape != expected:
            raise ValueError(f"{name} has shape {values.shape}, expected {expected} (distmat)")


def _evaluate(
    distmat: np.ndarray,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    max_rank: int,
    excluded: ExclusionRule | None,
    *,
    count_identities: bool,
) -> Metrics:
    """Metrics under any exclusion rule; the CMC counts gallery identities, or else images."""
    distmat, q_pids, g_pids = np.asarray(distmat), np.asarray(q_pids), np.asarray(g_pids)
    _check_shapes(distmat, q_pids=q_pids, g_pids=g_pids)
    if distmat.dtype.kind not in "fiu":
        raise ValueError(f"distmat holds {distmat.dtype}, expected floats or integers")
    if max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}, expected at least 1")
    ids, g_labels, counts = np.unique(g_pids, return_inverse=True, return_counts=True)
    of_id = np.split(np.argsort(g_labels, kind="stable"), np.cumsum(counts)[:-1])
    q_labels = np.minimum(np.searchsorted(ids, q_pids), len(ids) - 1)
    q_counts = np.where(ids[q_labels] == q_pids, counts[q_labels], 0)
    step = max(1, BLOCK_ENTRIES // len(g_pids))

    def measure(start: int) -> np.ndarray:
        queries = slice(start, start + step)
        exact = distmat[queries]
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(exact, np.float32)
        if np.isnan(values.min()):
            row, column = np.argwhere(np.isnan(values))[0]
            raise ValueError(f"distmat[{start + row}, {column}] is NaN, expected a distance")
        rows = np.repeat(np.arange(len(values)), q_counts[queries])
        matched = q_labels[queries][q_counts[queries] > 0]
        columns = np.concatenate([of_id[0][:0], *(of_id[label] for label in matched)])
        mask = excluded(queries) if excluded else None
        return _measure(exact, values, mask, rows, columns, g_labels if count_identities else None)

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        blocks = pool.map(measure, range(0, len(distmat), step))
        first_hits, ap, inp = np.concatenate(list(blocks), axis=1)
    valid = first_hits >= 0
    if not valid.any():
        raise ValueError(
            f"none of {len(q_pids)} queries has a true match among the gallery images that count "
            "for it, expected at least one: do query and gallery share identities?"
        )
    hits = np.bincount(np.minimum(first_hits[valid], max_rank).astype(int), minlength=max_rank)
    cmc = np.cumsum(hits[:max_rank]) / valid.sum()
    return cmc, float(ap[valid].mean()), float(inp[valid].mean())


def _measure(
    exact: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray | None,
    rows: np.ndarray,
    columns: np.ndarray,
    g_labels: np.ndarray | None,
) -> np.ndarray:
    """Per query what precedes its first hit (identities given `g_labels`), AP, INP: (3, queries).

    `values` are `exact` in float32: rounding reverses no order, it only makes more ties, and all
    ties are settled on `exact`. Queries without a true match (`rows`, `columns`) get -1.
    """
    if mask is not None:
        values = np.where(mask, np.float32(np.inf), values)  # infinity precedes nothing
        kept = ~mask[rows, columns]
        rows, columns = rows[kept], columns[kept]
    count, width = values.shape
    result = np.full((3, count), -1.0)
    if not len(rows):
        return result
    if np.can_cast(exact.dtype, np.float32):
        exact = values  # float16 comparisons are slow
    ranks, tied = _ranks(values, rows, columns)
    unsettled = np.flatnonzero(tied)
    for start in range(0, len(unsettled), count):
        part = unsettled[start : start + count]
        ahead = _precedes(exact, mask, rows[part], columns[part])
        ranks[part] = [np.count_nonzero(images) for images in ahead]

    order = np.argsort(rows * width + ranks)  # by query, then by rank
    ranks, columns, tied = ranks[order], columns[order], tied[order]
    counts = np.bincount(rows, minlength=count)
    queries = np.flatnonzero(counts)
    counts = counts[queries]
    firsts = np.cumsum(counts) - counts
    result[0, queries] = ranks[firsts]
    if g_labels is not None:
        nearest = columns[firsts]
        ahead = values[queries] < values[queries, nearest][:, None]
        again = np.flatnonzero(tied[firsts])
        ahead[again] = _precedes(exact, mask, queries[again], nearest[again])
        row, column = np.divmod(np.flatnonzero(ahead), width)  # nonzero() itself is slower
        seen = np.zeros((len(queries), g_labels.max() + 1), bool)
        seen[row, g_labels[column]] = True
        result[0, queries] = seen.sum(axis=1)
    found = np.arange(len(rows)) - np.repeat(firsts, counts) + 1
    result[1, queries] = np.add.reduceat(found / (ranks + 1), firsts) / counts
    result[2, queries] = counts / (ranks[firsts + counts - 1] + 1)
    return result


def _ranks(
    values: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Number of smaller values in the row of each entry, and whether it may have an equal."""
    width = values.shape[1]
    wanted = values[rows, columns]
    ordered = np.sort(values, axis=1).ravel()
    base = rows * width
    ranks = np.zeros_like(rows)
    step = 1 << (width.bit_length() - 1)
    while step:  # bisection of all entries at once
        further = np.minimum(ranks + step, width)
        ranks = np.where(ordered[base + further - 1] < wanted, further, ranks)
        step >>= 1
    following = np.minimum(ranks + 1, width - 1)
    return ranks, ordered[base + following] == wanted


def _precedes(
    exact: np.ndarray, mask: np.ndarray | None, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """For each entry, which counted images of its row the stable order puts before it."""
    candidates, own = exact[rows], exact[rows, columns][:, None]
    earlier = np.arange(exact.shape[1]) < columns[:, None]
    ahead = (candidates < own) | ((candidates == own) & earlier)
    return ahead if mask is None else ahead & ~mask[rows]
