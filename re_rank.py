"""Re-ranking of retrieval results: k-reciprocal encoding and a random walk over the gallery.

Both are transductive: a distance depends on the whole gallery, and for k-reciprocal on the other
queries too. Neither knows a camera rule. Results that used one must name it.
"""

from collections.abc import Iterator
from copy import copy

import numpy as np
from scipy import linalg, sparse

TILE = 1024  # rows and columns of a tile of the distance matrix
EXACT_ROWS = 256  # rows or pairs of features treated at a time where distances are computed again
PAIRS = 1 << 17  # pairs of weights treated at a time, about what fits a core's cache
# float32 may order squared distances wrongly that differ by less than this times |a|^2 + |b|^2
UNDECIDED = 32 * 2.0**-23
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


class KReciprocal:
    """k-reciprocal re-ranking of one set of queries against several galleries, as trials have.

    What concerns queries alone is computed once. Arguments and errors are those of `k_reciprocal`.

    Attributes:
        points: (n, D) float32, the queries, and a gallery's images after them, centred and scaled.
        norms: (n,) float32, their squared lengths.
        ids: (n, size) int64, each point's nearest so far, itself first; in order once sorted.
        squared: (n, size) float32, scores of `ids`; squared distances once sorted. For point a,
            point b scores |b|^2 / 2 - ab: half the squared distance less |a|^2 / 2.
        farthest: (n,) float32, likewise of the farthest point.
    """

    def __init__(
        self, q_feats: np.ndarray, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
    ) -> None:
        if not all(isinstance(k, int | np.integer) and k >= 1 for k in (k1, k2)):
            raise ValueError(f"k1 is {k1} and k2 is {k2}, expected whole numbers from 1 on")
        if not 0 <= lambda_value <= 1:
            raise ValueError(f"lambda_value is {lambda_value}, expected 0..1")
        (q_feats,) = _checked(q_feats=q_feats)
        self._k1, self._k2, self._lambda = k1, k2, lambda_value
        # Moving and scaling the features leaves the result as it is. Centred and of order one,
        # their float32 errors are small beside a row's maximum, and nothing overflows.
        low, high = q_feats.min(axis=0), q_feats.max(axis=0)  # (D,) each
        self._centre = np.clip(q_feats.mean(axis=0, dtype=np.float64), low, high)
        spread = max((high - self._centre).max(), (self._centre - low).max())
        self._scale = 2.0 ** -np.frexp(spread)[1]
        size = max(k1 + 1, k2) + 1
        self._feats = q_feats[:0]
        self.ids, self.squared = np.empty((0, size), np.int64), np.empty((0, size), np.float32)
        self.farthest = np.empty(0, np.float32)
        self._append(q_feats)

    def distances(self, g_feats: np.ndarray) -> np.ndarray:
        """Returns the distances between the queries and a gallery (G, D): (Q, G) float32."""
        _, g_feats = _checked(q_feats=self._feats, g_feats=g_feats)
        count, images = len(self._feats), copy(self)
        result = images._append(g_feats)  # (Q, G) squared Euclidean, re-ranked in place below
        images.sort((self._k1 + 1, round(self._k1 / 2) + 1, self._k2))
        codes = _encode(images, self._k1, self._k2)  # (n, n)
        for rows, shared in _shared_weight(codes[:count], codes[count:].tocsc()):
            result[rows] *= self._lambda / images.farthest[:count][rows, None]
            result[rows] += (1 - self._lambda) * (1 - shared / (2 - shared))
        return result

    def exact(self, rows: slice | np.ndarray) -> np.ndarray:
        """Returns some of the points in float64, (rows, D)."""
        return (self._feats[rows] - self._centre) * self._scale

    def _append(self, feats: np.ndarray) -> np.ndarray:
        """Adds points and compares them with all, in products of a tile at a time.

        Returns:
            (first, n - first) float32, squared distances of the earlier points to them.
        """
        first, added, size = len(self._feats), len(feats), self.ids.shape[1]
        self._feats = np.concatenate([self._feats, feats])
        old, new = _tiles(0, first), _tiles(first, first + added)
        self.points = np.empty(self._feats.shape, np.float32)
        for rows in old + new:
            self.points[rows] = self.exact(rows)
        norms = np.einsum("nd,nd->n", self.points, self.points, dtype=np.float64)
        self.norms = norms.astype(np.float32)
        if not np.isfinite(self.norms).all():
            raise ValueError("g_feats lie too far from q_feats for float32, expected one scale")
        self.ids = np.concatenate([self.ids, np.zeros((added, size), np.int64)])
        infinite = np.full((added, size), np.inf, np.float32)
        self.squared = np.concatenate([self.squared, infinite])
        self.farthest = np.concatenate([self.farthest, -infinite[:, 0]])
        squared = np.empty((first, added), np.float32)
        for i, columns in enumerate(new):
            for rows in old + new[: i + 1]:  # each pair of tiles once
                products = self.points[rows] @ self.points[columns].T  # (rows, columns)
                self._update(rows, columns, products)
                if rows != columns:
                    self._update(columns, rows, products.T)
                if rows.stop <= first:
                    tile = squared[rows, columns.start - first : columns.stop - first]
                    np.add.outer(self.norms[rows], self.norms[columns], out=tile)
                    tile -= np.multiply(products, 2, out=products)
                    np.maximum(tile, 0, out=tile)
        return squared

    def _update(self, rows: slice, columns: slice, products: np.ndarray) -> None:
        """Merges a tile of products (rows, columns) into the nearest and farthest of `rows`."""
        size = self.ids.shape[1]
        scores = np.empty((len(products), size + products.shape[1]), np.float32)
        scores[:, :size] = self.squared[rows]  # the nearest so far, then the tile
        np.subtract(self.norms[columns] / 2, products, out=scores[:, size:])
        self.farthest[rows] = np.maximum(self.farthest[rows], scores[:, size:].max(axis=1))
        if rows == columns:
            np.fill_diagonal(scores[:, size:], -np.inf)  # itself first
        best = _smallest(scores, size)  # (rows, size)
        self.squared[rows] = np.take_along_axis(scores, best, axis=1)
        earlier = np.take_along_axis(self.ids[rows], np.minimum(best, size - 1), axis=1)
        self.ids[rows] = np.where(best < size, earlier, best - size + columns.start)

    def sort(self, sizes: tuple[int, ...]) -> None:
        """Sorts the neighbours and turns scores into squared distances.

        Where float32 does not decide which are the first k, for a k in `sizes`, all of the point's
        distances are computed in float64.
        """
        count = len(self.points)
        order = np.argsort(self.squared, axis=1)[:, :count]  # (n, kept), kept <= size
        kept = order.shape[1]
        self.ids = np.take_along_axis(self.ids, order, axis=1)
        self.squared = np.take_along_axis(self.squared, order, axis=1)
        self.squared = np.maximum(2 * self.squared + self.norms[:, None], 0)
        self.farthest = np.maximum(2 * self.farthest + self.norms, 0)
        self.farthest[self.farthest == 0] = 1  # all points are one
        undecided = np.zeros(count, bool)
        for size in sizes:
            if 1 < size < kept:
                inside, outside = self.squared[:, size - 1], self.squared[:, size]  # (n,) each
                undecided |= outside - inside <= UNDECIDED * (self.norms + outside)
        undecided = np.flatnonzero(undecided)
        for start in range(0, len(undecided), EXACT_ROWS):
            rows = undecided[start : start + EXACT_ROWS]
            points = self.exact(rows)  # (rows, D)
            squared = np.empty((len(rows), count))
            for columns in _tiles(0, count):
                others = self.exact(columns)
                squared[:, columns] = _lengths(others) - 2 * (points @ others.T)
            squared = np.round(squared + _lengths(points)[:, None], TIE_DECIMALS)
            squared[np.arange(len(rows)), rows] = -1  # itself first
            self.ids[rows] = np.argsort(squared, axis=1, kind="stable")[:, :kept]
            self.squared[rows] = np.take_along_axis(squared, self.ids[rows], axis=1)
        self.squared[:, 0] = 0


def _smallest(scores: np.ndarray, size: int) -> np.ndarray:
    """Returns the columns of each row's `size` smallest numbers, in no order: (rows, size)."""
    # np.partition and a comparison: twice as fast as np.argpartition.
    bound = np.partition(scores, size - 1, axis=1)[:, size - 1 : size]  # (rows, 1)
    places = np.flatnonzero(scores <= bound)
    if len(places) > len(scores) * size:  # some row has ties at its bound
        return np.argpartition(scores, size - 1, axis=1)[:, :size]
    return places.reshape(-1, size) - scores.shape[1] * np.arange(len(scores))[:, None]


def _tiles(start: int, stop: int) -> list[slice]:
    return [slice(i, min(i + TILE, stop)) for i in range(start, stop, TILE)]


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


def _encode(images: KReciprocal, k1: int, k2: int) -> sparse.csr_array:
    """Returns V of Zhong et al., the encodings: (n, n), rows sum to 1."""
    near = _reciprocal(images.ids[:, : k1 + 1])  # R(i, k1)
    half = _reciprocal(images.ids[:, : round(k1 / 2) + 1])  # R(j, k1 / 2)
    # For j in R(i, k1): |R(i, k1) and R(j, k1 / 2)|, then whether R(j, k1 / 2) joins.
    joins = (near @ half.T).multiply(near).tocsr()
    joins.data = (3 * joins.data > 2 * np.diff(half.indptr)[joins.indices]).astype(np.float32)
    joins.eliminate_zeros()
    expanded = near + joins @ half  # R*(i): where it is not zero
    rows = np.repeat(np.arange(len(images.ids)), np.diff(expanded.indptr))  # (entries,)
    columns = expanded.indices  # (entries,)
    # Squared distances are looked up among the nearest, the others computed: (entries,).
    known = sparse.csr_matrix(_members(images.ids, images.squared))  # (n, n)
    squared = np.asarray(known[rows, columns]).ravel()  # 0 where not known
    unknown = np.flatnonzero((squared == 0) & (rows != columns))
    for start in range(0, len(unknown), EXACT_ROWS):
        some = unknown[start : start + EXACT_ROWS]
        squared[some] = _lengths(images.points[rows[some]] - images.points[columns[some]])
    weights = np.exp(-squared / images.farthest[rows])
    expanded.data = weights / np.bincount(rows, weights)[rows].astype(np.float32)
    nearest = images.ids[:, :k2]  # (n, k2)
    return _members(nearest) @ expanded / np.float32(nearest.shape[1])


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
