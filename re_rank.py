"""Re-ranking of retrieval results: k-reciprocal encoding and a random walk over the gallery.

Both are transductive: a distance depends on the whole gallery, and for k-reciprocal on the other
queries too. Neither knows a camera rule. Results that used one must name it.
"""

from typing import NamedTuple

import numpy as np
from scipy import linalg, sparse

ROWS = 256  # points, or pairs of points, per block
UNDECIDED = 32 * 2.0**-23  # bound on a squared distance's float32 error, in the row's largest
TIE_DECIMALS = 12  # float64 distances equal to so many decimals tie, whatever the order of sums


def k_reciprocal(
    q_feats: np.ndarray, g_feats: np.ndarray, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> np.ndarray:
    """Returns distances after k-reciprocal encoding, (Q, G) float32.

    Args:
        q_feats: (Q, D) query features, normalised or not.
        g_feats: (G, D) gallery features.
        k1: Neighbours among which reciprocal ones are looked for.
        k2: Neighbours, the image itself among them, whose encodings are averaged; 1 for none.
        lambda_value: Weight, 0..1, of the squared Euclidean distance (divided by the query's
            largest one) against the Jaccard distance.

    Raises:
        ValueError: Features are empty, not finite, or not matrices of one width; k1 or k2 is below
            1; the weight is outside 0..1.

    Source: Zhong et al., CVPR 2017.
    Deviation: earlier releases compute in float16. Here float32, and float64 where that leaves a
        neighbour undecided; equal distances stay in order, queries before the gallery.
    """
    if min(k1, k2) < 1:
        raise ValueError(f"k1 is {k1} and k2 is {k2}, expected whole numbers from 1 on")
    if not 0 <= lambda_value <= 1:
        raise ValueError(f"lambda_value is {lambda_value}, expected 0..1")
    points, count = np.concatenate(_checked(q_feats, g_feats)), len(q_feats)  # (n, D)
    # Shifting and scaling all points changes no result, and keeps float32's errors small.
    points -= points[0]
    points *= 2.0 ** -np.frexp(max(points.max(), -points.min()))[1]
    bounds = k1 + 1, round(k1 / 2) + 1, k2  # neighbours in R(i, k1), R(j, k1 / 2), means
    near, distances = _neighbours(points, count, max(bounds) + 1)
    _decide(near, points, bounds)
    codes = _codes(near, points, bounds)  # (n, n)
    gallery = codes[count:].tocsc()  # (G, n)
    for rows in _blocks(np.arange(count)):
        shared = _shared_weight(codes[rows], gallery)
        distances[rows] *= lambda_value / near.farthest[rows, None]
        distances[rows] += (1 - lambda_value) * (1 - shared / (2 - shared))
    return distances


def random_walk(q_feats: np.ndarray, g_feats: np.ndarray, alpha: float = 0.95) -> np.ndarray:
    """Returns negative similarities after a random walk over the gallery, (Q, G) float64.

    Args:
        q_feats: (Q, D) query features.
        g_feats: (G, D) gallery features; takes 16 G^2 bytes of memory.
        alpha: Probability of each further step, 0 <= alpha < 1.

    Source: the earlier releases' random walk.
    """
    q_feats, g_feats = _checked(q_feats, g_feats)
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}, expected 0 <= alpha < 1")
    q_feats, g_feats = q_feats.astype(np.float64), g_feats.astype(np.float64)
    affinity = g_feats @ g_feats.T  # (G, G)
    np.fill_diagonal(affinity, 0)
    np.exp(affinity - affinity.max(axis=1, keepdims=True), out=affinity)
    affinity *= -alpha / affinity.sum(axis=1, keepdims=True)
    np.fill_diagonal(affinity, 1 + affinity.diagonal())  # I - alpha A
    similarity = g_feats @ q_feats.T  # (G, Q)
    return (alpha - 1) * linalg.solve(affinity, similarity, overwrite_a=True, overwrite_b=True).T


class Neighbours(NamedTuple):
    """The nearest of each of n points, ascending, itself first."""

    ids: np.ndarray  # (n, size)
    squared: np.ndarray  # (n, size) their squared distances
    farthest: np.ndarray  # (n,) squared distance of the farthest point


def _neighbours(points: np.ndarray, count: int, size: int) -> tuple[Neighbours, np.ndarray]:
    """Finds neighbours of points (n, D), of which the first `count` are queries, in float32.

    Also returns the squared distances between queries and gallery, (Q, G).
    """
    points = points.astype(np.float32, copy=False)
    lengths, n = _lengths(points), len(points)
    size = min(size, n)
    ids, near = np.empty((n, size), np.intp), np.empty((n, size), np.float32)
    farthest, between = np.empty(n, np.float32), np.empty((count, n - count), np.float32)
    for rows in _blocks(np.arange(count)) + _blocks(np.arange(count, n)):
        others = slice(0 if rows[0] < count else count, n)  # the rest is known from the queries
        squared = (-2 * points[rows]) @ points[others].T
        squared += lengths[rows, None]
        squared += lengths[others]
        np.maximum(squared, 0, out=squared)
        if rows[0] < count:
            between[rows] = squared[:, count:]
        else:
            squared = np.hstack([between[:, rows - count].T, squared])  # (rows, n)
        squared[np.arange(len(rows)), rows] = -1  # itself first
        found = _nearest(squared, size)
        values = np.take_along_axis(squared, found, axis=1)
        order = np.argsort(values, axis=1)
        ids[rows] = np.take_along_axis(found, order, axis=1)
        near[rows] = np.take_along_axis(values, order, axis=1)
        farthest[rows] = squared.max(axis=1)
    farthest[farthest <= 0] = 1  # all points are one
    return Neighbours(ids, near, farthest), between


def _nearest(squared: np.ndarray, size: int) -> np.ndarray:
    """Returns the columns of the smallest of each row, (rows, size), in any order."""
    # np.partition and a comparison: twice as fast as np.argpartition.
    bound = np.partition(squared, size - 1, axis=1)[:, size - 1 : size]  # (rows, 1)
    ids = np.flatnonzero(squared <= bound) % squared.shape[1]
    if len(ids) > len(squared) * size:  # some row has ties at its bound
        return np.argpartition(squared, size - 1, axis=1)[:, :size]
    return ids.reshape(-1, size)


def _decide(near: Neighbours, points: np.ndarray, bounds: tuple[int, ...]) -> None:
    """Reorders neighbours, in place, in float64 where float32 leaves one of `bounds` undecided."""
    ids, squared, farthest = near
    undecided = np.zeros(len(ids), bool)
    for k in bounds:
        if 1 < k < ids.shape[1]:
            inside, outside = squared[:, k - 1], squared[:, k]  # (n,) each
            undecided |= outside - inside <= UNDECIDED * (farthest + outside)
    for rows in _blocks(np.flatnonzero(undecided)):
        own, exact = points[rows].astype(np.float64), np.empty((len(rows), len(ids)))
        for columns in _blocks(np.arange(len(ids))):
            others = points[columns].astype(np.float64)
            exact[:, columns] = _lengths(others) - 2 * (own @ others.T)
        exact = np.round(exact + _lengths(own)[:, None], TIE_DECIMALS)
        exact[np.arange(len(rows)), rows] = -1  # itself first
        ids[rows] = np.argsort(exact, axis=1, kind="stable")[:, : ids.shape[1]]
        squared[rows] = np.take_along_axis(exact, ids[rows], axis=1)
    squared[:, 0] = 0


def _codes(near: Neighbours, points: np.ndarray, bounds: tuple[int, ...]) -> sparse.csr_array:
    """Returns V of Zhong et al., the encodings: (n, n), rows sum to 1."""
    # R(i, k1) and R(j, k1 / 2), (n, n) each: 1 where two points are each other's neighbours.
    within = (_members(near.ids[:, :k]) for k in bounds[:2])
    nearest, half = (each.multiply(each.T).tocsr() for each in within)
    # For j in R(i, k1): |R(i, k1) and R(j, k1 / 2)|, then whether R(j, k1 / 2) joins.
    joins = (nearest @ half.T).multiply(nearest).tocsr()
    joins.data = (3 * joins.data > 2 * np.diff(half.indptr)[joins.indices]).astype(np.float32)
    joins.eliminate_zeros()
    expanded = (nearest + joins @ half).tocoo()  # R*(i): where it is not zero
    rows, columns = expanded.row, expanded.col  # (entries,) each
    # Squared distances are looked up among the nearest, the others computed: (entries,).
    known = sparse.csr_matrix(_members(near.ids, near.squared))
    squared = np.asarray(known[rows, columns]).ravel()
    for some in _blocks(np.flatnonzero((squared == 0) & (rows != columns))):
        squared[some] = _lengths(points[rows[some]] - points[columns[some]])
    weights = np.exp(-squared / near.farthest[rows])
    expanded.data = weights / np.bincount(rows, weights)[rows].astype(np.float32)
    averaged = near.ids[:, : bounds[2]]  # (n, k2)
    return _members(averaged) @ expanded / np.float32(averaged.shape[1])


def _shared_weight(queries: sparse.csr_array, gallery: sparse.csc_array) -> np.ndarray:
    """Returns the sums of elementwise minima of codes (Q, n) and (G, n): (Q, G)."""
    shape = queries.shape[0], gallery.shape[0]
    queries = queries.tocoo()
    met = gallery[:, queries.col]  # (G, weights): what the gallery has in each weight's column
    partners = np.diff(met.indptr)  # (weights,) how many gallery images that are
    smaller = np.minimum(np.repeat(queries.data, partners), met.data)  # (pairs,)
    places = np.repeat(queries.row, partners) * shape[1] + met.indices  # (pairs,)
    return np.bincount(places, smaller, minlength=shape[0] * shape[1]).reshape(shape)


def _members(ids: np.ndarray, values: np.ndarray | None = None) -> sparse.csr_array:
    """Returns (n, n): row i holds `values[i]`, or 1, in the columns `ids[i]`; both (n, k)."""
    values = np.ones(ids.shape, np.float32) if values is None else values
    starts = np.arange(0, ids.size + 1, ids.shape[1])
    return sparse.csr_array((values.ravel(), ids.ravel(), starts), (len(ids), len(ids)))


def _lengths(points: np.ndarray) -> np.ndarray:
    """Returns the squared lengths (n,) of points (n, D)."""
    return np.einsum("nd,nd->n", points, points)


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]


def _checked(*features: np.ndarray) -> list[np.ndarray]:
    """Returns the features of queries and gallery as float32 or float64 matrices of one width."""
    checked = [np.asarray(feats) for feats in features]
    if any(feats.dtype != np.float32 for feats in checked):
        checked = [feats.astype(np.float64) for feats in checked]
    for name, feats in zip(("q_feats", "g_feats"), checked, strict=True):
        if feats.ndim != 2 or 0 in feats.shape:
            raise ValueError(f"{name} is of shape {feats.shape}, expected (images, width)")
        if not np.isfinite(feats).all():
            raise ValueError(f"{name} holds NaN or infinity, expected finite features")
    if checked[0].shape[1] != checked[1].shape[1]:
        raise ValueError(f"features have different widths: {[x.shape[1] for x in checked]}")
    return checked
