"""Re-ranking of retrieval results: k-reciprocal encoding and a random walk over the gallery.

    distmat = k_reciprocal(q_feats, g_feats)

Both are transductive: a distance depends on the whole gallery, and for k-reciprocal on the other
queries too. Neither knows a camera rule. Results that used one must name it.
"""

from collections.abc import Callable, Iterator

import numpy as np
from scipy import linalg, sparse

BLOCK = 2048  # features of which all distances to as many others are held at a time
ROWS = 64  # rows treated at a time in between, about what a core's cache holds
REDONE = 256  # rows or pairs treated at a time where features are gathered again
PAIRS = 1 << 17  # pairs of weights treated at a time, about what a core's cache holds
# float32 may order squared distances wrongly that differ by less than this share of |a|^2 + |b|^2
UNDECIDED = 32 * 2.0**-23
TIE_DECIMALS = 12  # float64 distances equal to so many decimals tie, whatever the order of sums


def k_reciprocal(
    q_feats: np.ndarray,
    g_feats: np.ndarray,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> np.ndarray:
    """Distances after k-reciprocal encoding, (Q, G) float32.

    Args:
        q_feats: (Q, D) query features, float32 or float64, normalised or not.
        g_feats: (G, D) gallery features.
        k1: neighbours that are asked whether they are neighbours in return.
        k2: neighbours, the image itself among them, whose encodings are averaged; 1 for none.
        lambda_value: weight, 0..1, of the squared Euclidean distance (as a share of the query's
            largest one) against the Jaccard distance.

    Raises:
        ValueError: features that are empty, not finite, or not matrices of one width; k1 or k2
            below 1; a weight outside 0..1.

    Source: Zhong et al., CVPR 2017.
    Deviation: earlier releases compute in float16. Here float32, and float64 where that leaves a
        neighbour undecided; equal distances stay in order, queries before the gallery.
    """
    return KReciprocal(q_feats, k1, k2, lambda_value).distances(g_feats)


def random_walk(q_feats: np.ndarray, g_feats: np.ndarray, alpha: float = 0.95) -> np.ndarray:
    """Negative similarities after a random walk over the gallery, (Q, G) float64.

    Args:
        q_feats: (Q, D) query features.
        g_feats: (G, D) gallery features; takes 16 G^2 bytes of memory.
        alpha: probability of each further step, 0 <= alpha < 1.

    Raises:
        ValueError: features as for `k_reciprocal`, or alpha out of range.

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
    """

    def __init__(
        self, q_feats: np.ndarray, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
    ) -> None:
        """Find the neighbours of the queries among the queries."""
        if not all(isinstance(k, int | np.integer) and k >= 1 for k in (k1, k2)):
            raise ValueError(f"k1 is {k1} and k2 is {k2}, expected whole numbers from 1 on")
        if not 0 <= lambda_value <= 1:
            raise ValueError(f"lambda_value is {lambda_value}, expected 0..1")
        (self._q_feats,) = _checked(q_feats=q_feats)
        self._k1, self._k2, self._lambda = k1, k2, lambda_value
        # Moving and scaling the features leaves the result as it is. Centred and of order one,
        # their float32 errors are small beside a row's maximum, and nothing overflows.
        low, high = self._q_feats.min(axis=0), self._q_feats.max(axis=0)
        self._centre = np.clip(self._q_feats.mean(axis=0, dtype=np.float64), low, high)
        spread = max((high - self._centre).max(), (self._centre - low).max())
        self._scale = 2.0 ** -np.frexp(spread)[1]
        images = self._images(self._q_feats[:0])
        images.scan(0)
        self._among_queries = images.ids, images.squared, images.farthest

    def distances(self, g_feats: np.ndarray) -> np.ndarray:
        """Distances between the queries and a gallery (G, D): (Q, G) float32."""
        _, g_feats = _checked(q_feats=self._q_feats, g_feats=g_feats)
        count = len(self._q_feats)
        images = self._images(g_feats)
        if not np.isfinite(images.norms).all():
            raise ValueError("g_feats lie too far from q_feats for float32, expected one scale")
        images.ids[:count], images.squared[:count], images.farthest[:count] = self._among_queries
        result = images.scan(count)  # squared Euclidean until the end
        images.settle((self._k1 + 1, round(self._k1 / 2) + 1, self._k2))
        codes = _encode(images, self._k1, self._k2)
        for rows, shared in _shared_weight(codes[:count], codes[count:].tocsc()):
            result[rows] *= self._lambda / images.farthest[:count][rows, None]
            result[rows] += (1 - self._lambda) * (1 - shared / (2 - shared))
        return result

    def _images(self, g_feats: np.ndarray) -> "_Neighbours":
        count = len(self._q_feats)

        def exact(ids: np.ndarray) -> np.ndarray:  # ascending ids
            feats = [self._q_feats[ids[ids < count]], g_feats[ids[ids >= count] - count]]
            return (np.concatenate(feats) - self._centre) * self._scale

        return _Neighbours(exact, count + len(g_feats), max(self._k1 + 1, self._k2) + 1)


class _Neighbours:
    """The nearest points of each point, itself first, found from products a tile at a time.

    For point a, point b scores |b|^2 / 2 - ab: half the squared distance, but for |a|^2 / 2.
    """

    def __init__(self, exact: Callable[[np.ndarray], np.ndarray], count: int, size: int) -> None:
        self.exact = exact  # float64 points of ascending numbers
        self.points = np.empty((count, exact(np.arange(1)).shape[1]), np.float32)
        for rows in _blocks(0, count):
            self.points[rows] = exact(np.arange(rows.start, rows.stop))
        norms = np.einsum("nd,nd->n", self.points, self.points, dtype=np.float64)
        self.norms = norms.astype(np.float32)
        self.ids = np.zeros((count, size), np.int64)
        self.squared = np.full((count, size), np.inf, np.float32)  # scores until settled
        self.farthest = np.full(count, -np.inf, np.float32)  # likewise, of the last point

    def scan(self, first: int) -> np.ndarray:
        """Compare the points from `first` on with all; squared distances (first, n - first)."""
        across = np.empty((first, len(self.points) - first), np.float32)
        old, new = _blocks(0, first), _blocks(first, len(self.points))
        for i, columns in enumerate(new):
            for rows in old + new[: i + 1]:
                products = self.points[rows] @ self.points[columns].T
                self._compare(rows, columns, products)
                if rows != columns:
                    self._compare(columns, rows, products.T)
                if rows.stop <= first:
                    part = across[rows, columns.start - first : columns.stop - first]
                    np.add.outer(self.norms[rows], self.norms[columns], out=part)
                    part -= np.multiply(products, 2, out=products)
                    np.maximum(part, 0, out=part)
        return across

    def _compare(self, rows: slice, columns: slice, products: np.ndarray) -> None:
        size, half_norms = self.ids.shape[1], self.norms[columns] / 2
        for start in range(0, len(products), ROWS):
            chunk = products[start : start + ROWS]
            part = slice(rows.start + start, rows.start + start + len(chunk))
            scores = np.empty((len(chunk), size + chunk.shape[1]), np.float32)
            scores[:, :size] = self.squared[part]
            np.subtract(half_norms, chunk, out=scores[:, size:])
            np.maximum(self.farthest[part], scores[:, size:].max(axis=1), out=self.farthest[part])
            if rows == columns:
                np.fill_diagonal(scores[:, size + start :], -np.inf)  # itself first
            best = _smallest(scores, size)
            self.squared[part] = np.take_along_axis(scores, best, axis=1)
            earlier = np.take_along_axis(self.ids[part], np.minimum(best, size - 1), axis=1)
            self.ids[part] = np.where(best < size, earlier, best - size + columns.start)

    def settle(self, sizes: tuple[int, ...]) -> None:
        """Sort the neighbours; where any first `sizes` are undecided, from the exact points."""
        order = np.argsort(self.squared, axis=1)[:, : len(self.points)]
        self.ids = np.take_along_axis(self.ids, order, axis=1)
        self.squared = np.take_along_axis(self.squared, order, axis=1)
        self.squared = np.maximum(2 * self.squared + self.norms[:, None], 0)
        self.farthest = np.maximum(2 * self.farthest + self.norms, 0)
        self.farthest[self.farthest == 0] = 1  # all points are one
        undecided = np.zeros(len(self.points), bool)
        for size in sizes:
            if 1 < size < order.shape[1]:
                inside, outside = self.squared[:, size - 1], self.squared[:, size]
                undecided |= outside - inside <= UNDECIDED * (self.norms + outside)
        undecided = np.flatnonzero(undecided)
        for start in range(0, len(undecided), REDONE):
            rows = undecided[start : start + REDONE]
            squared = _exact_squared(self.exact, rows, len(self.points))
            squared[np.arange(len(rows)), rows] = -1
            self.ids[rows] = np.argsort(squared, axis=1, kind="stable")[:, : order.shape[1]]
            self.squared[rows] = np.take_along_axis(squared, self.ids[rows], axis=1)
        self.squared[:, 0] = 0


def _smallest(scores: np.ndarray, size: int) -> np.ndarray:
    """Columns of each row's `size` smallest numbers, in no order: (n, size)."""
    # Partitioned values and a comparison: twice as fast as partitioned indices.
    bound = np.partition(scores, size - 1, axis=1)[:, size - 1 : size]
    places = np.flatnonzero(scores <= bound)
    if len(places) > len(scores) * size:  # some row has ties at its bound
        return np.argpartition(scores, size - 1, axis=1)[:, :size]
    return places.reshape(-1, size) - scores.shape[1] * np.arange(len(scores))[:, None]


def _blocks(start: int, stop: int) -> list[slice]:
    edges = np.linspace(start, stop, -(-(stop - start) // BLOCK) + 1).astype(int).tolist()
    return [slice(*edge) for edge in zip(edges[:-1], edges[1:], strict=True)]


def _exact_squared(
    exact: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, count: int
) -> np.ndarray:
    """Squared distances (rows, count) in float64."""
    points = exact(rows)
    squared = np.empty((len(rows), count))
    for columns in _blocks(0, count):
        others = exact(np.arange(columns.start, columns.stop))
        squared[:, columns] = np.einsum("nd,nd->n", others, others) - 2 * (points @ others.T)
    squared += np.einsum("nd,nd->n", points, points)[:, None]
    return np.round(squared, TIE_DECIMALS, out=squared)


def _members(ids: np.ndarray) -> sparse.csr_array:
    """(n, n) matrix with ones where a row's `ids` (n, k) say."""
    starts = np.arange(0, ids.size + 1, ids.shape[1])
    ones = np.ones(ids.size, np.float32)
    return sparse.csr_array((ones, ids.ravel(), starts), (len(ids), len(ids)))


def _encode(images: _Neighbours, k1: int, k2: int) -> sparse.csr_array:
    """V of Zhong et al., the encodings: (n, n), rows sum to 1."""
    within = _members(images.ids[:, : k1 + 1])
    mutual = within.multiply(within.T).tocsr()
    within = _members(images.ids[:, : round(k1 / 2) + 1])
    closer = within.multiply(within.T).tocsr()
    overlap = (mutual @ closer.T).multiply(mutual).tocsr()
    overlap.data = (3 * overlap.data > 2 * np.diff(closer.indptr)[overlap.indices]).astype("f4")
    overlap.eliminate_zeros()
    expanded = mutual + overlap @ closer
    rows = np.repeat(np.arange(len(images.ids)), np.diff(expanded.indptr))
    weights = np.exp(-_squared_of(images, rows, expanded.indices) / images.farthest[rows])
    expanded.data = weights / np.bincount(rows, weights)[rows].astype(np.float32)
    nearest = images.ids[:, :k2]
    return _members(nearest) @ expanded / np.float32(nearest.shape[1])


def _squared_of(images: _Neighbours, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Squared distances of pairs of images, looked up among the nearest or else computed."""
    count = len(images.ids)
    order = np.argsort(images.ids, axis=1)
    pairs = rows * count + columns
    known = np.take_along_axis(images.ids, order, axis=1) + count * np.arange(count)[:, None]
    place = np.minimum(np.searchsorted(known.ravel(), pairs), known.size - 1)
    squared = np.take_along_axis(images.squared, order, axis=1).ravel()[place]
    unknown = np.flatnonzero(known.ravel()[place] != pairs)
    for start in range(0, len(unknown), REDONE):
        part = unknown[start : start + REDONE]
        apart = images.points[rows[part]] - images.points[columns[part]]
        squared[part] = np.einsum("pd,pd->p", apart, apart)
    return squared


def _shared_weight(
    queries: sparse.csr_array, gallery: sparse.csc_array
) -> Iterator[tuple[slice, np.ndarray]]:
    """Sums of elementwise minima of (Q, n) and (G, n) codes, as blocks (rows, (rows, G))."""
    width, per_column = gallery.shape[0], np.diff(gallery.indptr)
    pairs = np.concatenate([[0], np.cumsum(per_column[queries.indices])])[queries.indptr]
    work = pairs + width * np.arange(len(pairs))
    start, count = 0, queries.shape[0]
    while start < count:
        stop = max(start + 1, int(np.searchsorted(work, work[start] + PAIRS, side="right")) - 1)
        block = queries[start:stop]
        partners = per_column[block.indices]  # gallery images that share each weight's column
        ends = np.cumsum(partners)
        shift = gallery.indptr[block.indices] - (ends - partners)
        others = np.arange(pairs[stop] - pairs[start]) + np.repeat(shift, partners)
        smaller = np.minimum(np.repeat(block.data, partners), gallery.data[others])
        row = np.repeat(np.arange(stop - start) * width, np.diff(block.indptr))
        place = np.repeat(row, partners) + gallery.indices[others]
        sums = np.bincount(place, smaller, minlength=width * (stop - start))
        yield slice(start, stop), sums.reshape(-1, width)
        start = stop


def _checked(**features: np.ndarray) -> list[np.ndarray]:
    """The features as matrices of float32 or float64, of one width."""
    checked = {name: np.asarray(feats) for name, feats in features.items()}
    for name, feats in checked.items():
        if feats.ndim != 2 or 0 in feats.shape or feats.dtype.kind not in "fiu":
            raise ValueError(
                f"{name} is {feats.dtype} of shape {feats.shape}, expected real (images, width)"
            )
        if not (np.isfinite(feats.min()) and np.isfinite(feats.max())):
            raise ValueError(f"{name} holds NaN or infinity, expected finite features")
    widths = {name: feats.shape[1] for name, feats in checked.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"features have different widths: {widths}")
    return [
        f if f.dtype == np.float32 else f.astype(np.float64, copy=False) for f in checked.values()
    ]
