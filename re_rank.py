"""Re-ranking of retrieval results: k-reciprocal encoding and a random walk over the gallery.

Both are transductive: a distance depends on the whole gallery, and for k-reciprocal on the other
queries too. Neither knows a camera rule. Results that used one must name it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import linalg, sparse

ROWS = 256  # points or pairs of points treated at a time
PAIRS = 1 << 17  # pairs of weights treated at a time, about what fits a core's cache
UNDECIDED = 32 * 2.0**-23  # float32 errors of a row's squared distances, in its largest ones
TIE_DECIMALS = 12  # float64 distances equal to so many decimals tie, whatever the order of sums


def k_reciprocal(
    q_feats: np.ndarray, g_feats: np.ndarray, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> np.ndarray:
    """Returns distances after k-reciprocal encoding, (Q, G) float32.

    Args:
        q_feats: (Q, D) query features, float32 or float64, normalised or not.
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
    return KReciprocal(q_feats, k1, k2, lambda_value).distances(g_feats)


def random_walk(q_feats: np.ndarray, g_feats: np.ndarray, alpha: float = 0.95) -> np.ndarray:
    """Returns negative similarities after a random walk over the gallery, (Q, G) float64.

    Args:
        q_feats: (Q, D) query features.
        g_feats: (G, D) gallery features; takes 16 G^2 bytes of memory.
        alpha: Probability of each further step, 0 <= alpha < 1.

    Source: the earlier releases' random walk.
    """
    q_feats, g_feats = _checked(q_feats=q_feats, g_feats=g_feats)
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}, expected 0 <= alpha < 1")
    gallery = g_feats.astype(np.float64)
    affinity = gallery @ gallery.T  # (G, G)
    np.fill_diagonal(affinity, 0)
    np.exp(affinity - affinity.max(axis=1, keepdims=True), out=affinity)
    affinity *= -alpha / affinity.sum(axis=1, keepdims=True)
    np.fill_diagonal(affinity, 1 + affinity.diagonal())  # I - alpha A
    similarity = gallery @ q_feats.astype(np.float64).T  # (G, Q)
    return (alpha - 1) * linalg.solve(affinity, similarity, overwrite_a=True, overwrite_b=True).T


class Neighbours(NamedTuple):
    """The nearest of each of n points, itself first and the others in any order until sorted."""

    ids: np.ndarray  # (n, size)
    squared: np.ndarray  # (n, size) their squared distances; -1 to itself
    farthest: np.ndarray  # (n,) squared distance of the farthest point


class KReciprocal:
    """k-reciprocal re-ranking of one set of queries against several galleries, as trials have.

    What concerns queries alone is computed once. Arguments and errors are those of `k_reciprocal`.
    """

    def __init__(
        self, q_feats: np.ndarray, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
    ) -> None:
        if not all(isinstance(k, int | np.integer) and k >= 1 for k in (k1, k2)):
            raise ValueError(f"k1 is {k1} and k2 is {k2}, expected whole numbers from 1 on")
        if not 0 <= lambda_value <= 1:
            raise ValueError(f"lambda_value is {lambda_value}, expected 0..1")
        (q_feats,) = _checked(q_feats=q_feats)
        self._feats, self._k1, self._k2, self._lambda = q_feats, k1, k2, lambda_value
        # Moving and scaling the features leaves the result as it is. Centred and of order one,
        # their float32 errors are small beside a row's maximum, and nothing overflows.
        low, high = q_feats.min(axis=0), q_feats.max(axis=0)  # (D,) each
        self._centre = np.clip(q_feats.mean(axis=0, dtype=np.float64), low, high)
        spread = max((high - self._centre).max(), (self._centre - low).max())
        self._scale = 2.0 ** -np.frexp(spread)[1]
        self._points = self._scaled(q_feats).astype(np.float32)
        self._size = max(k1 + 1, k2) + 1
        blocks = _squared_distances(self._points, self._points)
        self._known = _stacked([_nearest(squared, self._size) for _, squared in blocks])

    def _scaled(self, feats: np.ndarray) -> np.ndarray:
        return (feats - self._centre) * self._scale  # float64

    def distances(self, g_feats: np.ndarray) -> np.ndarray:
        """Returns the distances between the queries and a gallery (G, D): (Q, G) float32."""
        _, g_feats = _checked(q_feats=self._feats, g_feats=g_feats)
        gallery, (count, kept) = self._scaled(g_feats).astype(np.float32), self._known.ids.shape
        result = np.empty((count, len(gallery)), np.float32)  # squared distances, then re-ranked
        blocks = []
        for rows, squared in _squared_distances(self._points, gallery):
            result[rows] = squared
            known = Neighbours(*(each[rows] for each in self._known))  # and the gallery: (rows, G)
            found = _nearest(np.hstack([known.squared, squared]), self._size)
            ids = np.take_along_axis(known.ids, np.minimum(found.ids, kept - 1), axis=1)
            ids = np.where(found.ids < kept, ids, found.ids - kept + count)
            farthest = np.maximum(known.farthest, found.farthest)
            blocks.append(Neighbours(ids, found.squared, farthest))
        for rows, squared in _squared_distances(gallery, gallery):
            blocks.append(_nearest(np.hstack([result[:, rows].T, squared]), self._size))
        near, feats = _stacked(blocks), np.concatenate([self._feats, g_feats])
        near.farthest[near.farthest <= 0] = 1  # all points are one
        codes = self._codes(near, lambda rows: self._scaled(feats[rows]))  # (n, n)
        for rows, shared in _shared_weight(codes[:count], codes[count:].tocsc()):
            result[rows] *= self._lambda / near.farthest[:count][rows, None]
            result[rows] += (1 - self._lambda) * (1 - shared / (2 - shared))
        return result

    def _codes(self, near: Neighbours, points: Callable[..., np.ndarray]) -> sparse.csr_array:
        """Returns V of Zhong et al., the encodings: (n, n), rows sum to 1.

        `points` gives rows of the n points in float64, (rows, D).
        """
        bounds = self._k1 + 1, round(self._k1 / 2) + 1, self._k2
        near = _sorted(near, points, bounds)
        nearest, half = (_reciprocal(near.ids[:, :k]) for k in bounds[:2])  # R(i, k1), R(j, k1 / 2)
        # For j in R(i, k1): |R(i, k1) and R(j, k1 / 2)|, then whether R(j, k1 / 2) joins.
        joins = (nearest @ half.T).multiply(nearest).tocsr()
        joins.data = (3 * joins.data > 2 * np.diff(half.indptr)[joins.indices]).astype(np.float32)
        joins.eliminate_zeros()
        expanded = nearest + joins @ half  # R*(i): where it is not zero
        rows = np.repeat(np.arange(len(near.ids)), np.diff(expanded.indptr))  # (entries,)
        columns = expanded.indices  # (entries,)
        # Squared distances are looked up among the nearest, the others computed: (entries,).
        known = sparse.csr_matrix(_members(near.ids, near.squared))
        squared = np.asarray(known[rows, columns]).ravel()
        unknown = np.flatnonzero((squared == 0) & (rows != columns))
        for some in _blocks(unknown):
            squared[some] = _lengths(points(rows[some]) - points(columns[some]))
        weights = np.exp(-squared / near.farthest[rows])
        expanded.data = weights / np.bincount(rows, weights)[rows].astype(np.float32)
        averaged = near.ids[:, : self._k2]  # (n, k2)
        return _members(averaged) @ expanded / np.float32(averaged.shape[1])


def _squared_distances(
    points: np.ndarray, others: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields squared distances of points (n, D) to others (m, D), as blocks (rows, (rows, m))."""
    lengths = _lengths(others)
    if not np.isfinite(lengths).all():
        raise ValueError("g_feats lie too far from q_feats for float32, expected one scale")
    for start in range(0, len(points), ROWS):
        rows = slice(start, start + ROWS)
        squared = points[rows] @ others.T
        squared *= -2
        squared += _lengths(points[rows])[:, None]
        squared += lengths
        np.maximum(squared, 0, out=squared)
        if points is others:
            np.fill_diagonal(squared[:, rows], -1)  # itself first
        yield rows, squared


def _nearest(squared: np.ndarray, size: int) -> Neighbours:
    """Finds the nearest by squared distances (rows, m), at most m of them."""
    size = min(size, squared.shape[1])
    # np.partition and a comparison: twice as fast as np.argpartition.
    bound = np.partition(squared, size - 1, axis=1)[:, size - 1 : size]  # (rows, 1)
    ids = np.flatnonzero(squared <= bound) % squared.shape[1]
    if len(ids) > len(squared) * size:  # some row has ties at its bound
        ids = np.argpartition(squared, size - 1, axis=1)[:, :size]
    ids = ids.reshape(-1, size)
    return Neighbours(ids, np.take_along_axis(squared, ids, axis=1), squared.max(axis=1))


def _stacked(blocks: Sequence[Neighbours]) -> Neighbours:
    return Neighbours(*map(np.concatenate, zip(*blocks, strict=True)))


def _sorted(
    near: Neighbours, points: Callable[..., np.ndarray], bounds: Sequence[int]
) -> Neighbours:
    """Sorts the neighbours.

    Where float32 does not decide which are the first k, for a k in `bounds`, all distances of a
    point are computed in float64.
    """
    order = np.argsort(near.squared, axis=1)
    ids, squared = (np.take_along_axis(each, order, axis=1) for each in near[:2])
    undecided = np.zeros(len(ids), bool)
    for k in bounds:
        if 1 < k < ids.shape[1]:
            inside, outside = squared[:, k - 1], squared[:, k]  # (n,) each
            undecided |= outside - inside <= UNDECIDED * (near.farthest + outside)
    for rows in _blocks(np.flatnonzero(undecided)):
        own, exact = points(rows), np.empty((len(rows), len(ids)))
        for columns in _blocks(np.arange(len(ids))):
            others = points(columns)
            exact[:, columns] = _lengths(others) - 2 * (own @ others.T)
        exact = np.round(exact + _lengths(own)[:, None], TIE_DECIMALS)
        exact[np.arange(len(rows)), rows] = -1  # itself first
        ids[rows] = np.argsort(exact, axis=1, kind="stable")[:, : ids.shape[1]]
        squared[rows] = np.take_along_axis(exact, ids[rows], axis=1)
    squared[:, 0] = 0
    return Neighbours(ids, squared, near.farthest)


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]


def _lengths(points: np.ndarray) -> np.ndarray:
    """Returns the squared lengths (n,) of points (n, D)."""
    return np.einsum("nd,nd->n", points, points)


def _members(ids: np.ndarray, values: np.ndarray | None = None) -> sparse.csr_array:
    """Returns (n, n): row i holds `values[i]`, or 1, in the columns `ids[i]`; both (n, k)."""
    values = np.ones(ids.shape, np.float32) if values is None else values
    starts = np.arange(0, ids.size + 1, ids.shape[1])
    return sparse.csr_array((values.ravel(), ids.ravel(), starts), (len(ids), len(ids)))


def _reciprocal(ids: np.ndarray) -> sparse.csr_array:
    """Returns R(i, k), (n, n): 1 where two points are among each other's neighbours (n, k + 1)."""
    within = _members(ids)
    return within.multiply(within.T).tocsr()


def _shared_weight(
    queries: sparse.csr_array, gallery: sparse.csc_array
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields sums of elementwise minima of codes (Q, n) and (G, n), as blocks (rows, (rows, G)).

    Each weight of a query meets the weights that gallery images have in its column: its partners.
    """
    count, width = queries.shape[0], gallery.shape[0]
    per_column = np.diff(gallery.indptr)  # (n,) gallery images with a weight in a column
    work = per_column[queries.indices].sum() + count * width
    step = max(1, PAIRS * count // int(work))
    for start in range(0, count, step):
        block = queries[start : start + step]  # (rows, n)
        rows = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))  # (weights,)
        partners = per_column[block.indices]  # (weights,)
        ends = np.cumsum(partners)
        shift = gallery.indptr[block.indices] - (ends - partners)
        others = np.arange(ends[-1]) + np.repeat(shift, partners)  # (pairs,) into gallery.data
        smaller = np.minimum(np.repeat(block.data, partners), gallery.data[others])
        place = np.repeat(rows * width, partners) + gallery.indices[others]
        sums = np.bincount(place, smaller, minlength=width * block.shape[0])
        yield slice(start, start + block.shape[0]), sums.reshape(-1, width)


def _checked(**features: np.ndarray) -> list[np.ndarray]:
    """Returns the features as matrices of float32 or float64, of one width."""
    checked = []
    for name, values in features.items():
        feats = np.asarray(values)
        if feats.ndim != 2 or 0 in feats.shape or feats.dtype.kind not in "fiu":
            raise ValueError(
                f"{name} is {feats.dtype} of shape {feats.shape}, expected real (images, width)"
            )
        if not np.isfinite([feats.min(), feats.max()]).all():
            raise ValueError(f"{name} holds NaN or infinity, expected finite features")
        checked.append(feats if feats.dtype == np.float32 else feats.astype(np.float64, copy=False))
    widths = [feats.shape[1] for feats in checked]
    if len(set(widths)) > 1:
        raise ValueError(f"features have different widths: {widths}")
    return checked
