"""re_rank.py against set-by-set loops, golden numbers and its own invariances."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import re_rank
from re_rank import k_reciprocal, random_walk

GOLDEN = Path(__file__).parent / "golden" / "rerank_cases.npz"
SETTINGS = [(20, 6, 0.3), (13, 1, 0.1), (8, 3, 0.5), (1, 1, 0.0), (5, 40, 0.7), (100, 2, 1.0)]


def naive_k_reciprocal(q_feats, g_feats, k1=20, k2=6, lambda_value=0.3):
    """The definition with sets and loops, in float64."""
    feats = np.concatenate([q_feats, g_feats]).astype(np.float64)
    count, queries = len(feats), len(q_feats)
    distance = np.array([((feats - own) ** 2).sum(axis=1) for own in feats])
    farthest = distance.max(axis=1, keepdims=True)
    distance = np.divide(distance, farthest, out=np.zeros_like(distance), where=farthest > 0)
    ranked = []
    for i in range(count):
        others = [j for j in range(count) if j != i]
        ranked.append([i, *sorted(others, key=lambda j: distance[i, j])])  # stable  # noqa: B023

    def reciprocal(i, k):
        return {j for j in ranked[i][: k + 1] if i in ranked[j][: k + 1]}

    codes = np.zeros((count, count))
    for i in range(count):
        near = reciprocal(i, k1)
        expanded = set(near)
        for j in near:
            half = reciprocal(j, round(k1 / 2))
            if 3 * len(half & near) > 2 * len(half):
                expanded |= half
        expanded = sorted(expanded)
        weights = np.exp(-distance[i, expanded])
        codes[i, expanded] = weights / weights.sum()
    codes = np.array([codes[ranked[i][:k2]].mean(axis=0) for i in range(count)])
    result = np.empty((queries, count - queries))
    for i in range(queries):
        for g in range(queries, count):
            shared = np.minimum(codes[i], codes[g]).sum()
            jaccard = 1 - shared / (2 - shared)
            result[i, g - queries] = (1 - lambda_value) * jaccard + lambda_value * distance[i, g]
    return result


def naive_random_walk(q_feats, g_feats, alpha=0.95):
    """The same walk as a series: (1 - alpha) sum of alpha^t A^t."""
    count = len(g_feats)
    walk = np.zeros((count, count))
    for i in range(count):
        row = [0.0 if i == j else g_feats[i] @ g_feats[j] for j in range(count)]
        weights = np.exp(np.array(row) - max(row))
        walk[i] = weights / weights.sum()
    total, power = np.zeros((count, count)), np.eye(count)
    for _ in range(2000):
        total += (1 - alpha) * power
        power = alpha * power @ walk
    return -(q_feats @ g_feats.T) @ total.T


def clustered(rng, queries, gallery, ids=6, width=8, noise=0.7, dtype=np.float64):
    """Features around identity centres, unit length."""
    centres = rng.standard_normal((ids, width))
    sides = []
    for count in (queries, gallery):
        side = centres[rng.integers(0, ids, count)] + noise * rng.standard_normal((count, width))
        sides.append((side / np.linalg.norm(side, axis=1, keepdims=True)).astype(dtype))
    return sides


def assert_close(ours, expected, tolerance=2e-6):
    assert ours.shape == expected.shape
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("setting", SETTINGS)
def test_k_reciprocal_equals_the_loop(setting, dtype):
    rng = np.random.default_rng(setting[:2])
    for queries, gallery in [(25, 40), (40, 12), (1, 30), (30, 1), (1, 1), (3, 4)]:
        q_feats, g_feats = clustered(rng, queries, gallery, dtype=dtype)
        ours = k_reciprocal(q_feats, g_feats, *setting)
        assert ours.dtype == np.float32
        assert_close(ours, naive_k_reciprocal(q_feats, g_feats, *setting))


@pytest.mark.parametrize("seed", range(4))
def test_duplicates_keep_their_order(seed):
    """Equal distances, many of them at a boundary, are ordered queries first, then as given."""
    rng = np.random.default_rng(seed)
    few = rng.integers(-2, 3, (12, 3)).astype(np.float32)  # exact distances
    q_feats, g_feats = few[rng.integers(0, 12, 25)], few[rng.integers(0, 12, 40)]
    for setting in SETTINGS:
        ours = k_reciprocal(q_feats, g_feats, *setting)
        assert_close(ours, naive_k_reciprocal(q_feats, g_feats, *setting))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e20, np.pi * 1e-20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_identical_features_are_at_distance_zero(value, dtype):
    q_feats, g_feats = np.full((7, 5), value, dtype), np.full((9, 5), value, dtype)
    for k1 in (2, 20):
        ours = k_reciprocal(q_feats, g_feats, k1, 3)
        assert_close(ours, naive_k_reciprocal(q_feats * 0, g_feats * 0, k1, 3))
    assert_close(k_reciprocal(q_feats, g_feats, 20, 1), np.zeros((7, 9)))


@pytest.mark.parametrize("scale", [1e-25, 1.0, 300.0, 1e25])
def test_scale_and_place_of_features_do_not_matter(scale):
    rng = np.random.default_rng(4)
    q_feats, g_feats = clustered(rng, 30, 35)
    offset = 50 * rng.standard_normal(q_feats.shape[1])
    expected = naive_k_reciprocal(q_feats, g_feats, 8, 3)
    assert_close(k_reciprocal(q_feats * scale, g_feats * scale, 8, 3), expected)
    moved = (q_feats + offset) * scale, (g_feats + offset) * scale
    assert_close(k_reciprocal(*moved, 8, 3), expected)


def test_collapsed_features_are_told_apart():
    """float32 features that differ in their last digits only."""
    rng = np.random.default_rng(5)
    sides = [(1 + 1e-4 * side).astype(np.float32) for side in clustered(rng, 30, 35)]
    assert_close(k_reciprocal(*sides, 8, 3), naive_k_reciprocal(*sides, 8, 3))


def test_undecided_neighbours_are_decided_in_float64(monkeypatch):
    """Points of a lattice, moved by less than float32 can tell."""
    rng = np.random.default_rng(6)
    lattice = np.stack(np.meshgrid(*[np.arange(5.0)] * 3), axis=-1).reshape(-1, 3)
    feats = rng.permutation(lattice)[:70] + 1e-8 * rng.standard_normal((70, 3))
    expected = naive_k_reciprocal(feats[:30], feats[30:], 6, 3)
    assert_close(k_reciprocal(feats[:30], feats[30:], 6, 3), expected)
    monkeypatch.setattr(re_rank, "UNDECIDED", -1.0)
    assert abs(k_reciprocal(feats[:30], feats[30:], 6, 3) - expected).max() > 1e-3


def test_float32_decides_only_what_it_can():
    """The margin for a second look exceeds the largest error of a float32 distance."""
    rng = np.random.default_rng(7)
    for width, noise in [(3, 1.0), (256, 0.3), (1536, 0.3), (2048, 3.0)]:
        feats = np.concatenate(clustered(rng, 100, 100, 20, width, noise / width**0.5))
        points = feats - feats[0]
        near, _ = re_rank._neighbours(points, 100, 22)
        true = ((points[:, None] - points[near.ids]) ** 2).sum(axis=2)
        error = np.abs(np.maximum(near.squared, 0) - true) / (near.farthest[:, None] + true)
        assert error.max() < re_rank.UNDECIDED / 2


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_block_sizes_do_not_matter(rows, monkeypatch):
    q_feats, g_feats = clustered(np.random.default_rng(8), 23, 31)
    g_feats[::3] = g_feats[0]
    expected = naive_k_reciprocal(q_feats, g_feats)
    monkeypatch.setattr(re_rank, "ROWS", rows)
    assert_close(k_reciprocal(q_feats, g_feats), expected)


def test_order_of_images_does_not_matter():
    rng = np.random.default_rng(10)
    q_feats, g_feats = clustered(rng, 50, 60, dtype=np.float32)
    rows, columns = rng.permutation(50), rng.permutation(60)
    ours = k_reciprocal(q_feats[rows], g_feats[columns])
    assert_close(ours, k_reciprocal(q_feats, g_feats)[np.ix_(rows, columns)])


def test_results_lie_between_zero_and_one_and_inputs_stay():
    q_feats, g_feats = clustered(np.random.default_rng(11), 50, 60, dtype=np.float32)
    before = q_feats.copy(), g_feats.copy()
    ours = k_reciprocal(q_feats, g_feats)
    assert ours.min() >= 0
    assert ours.max() <= 1 + 1e-6
    random_walk(q_feats, g_feats)
    np.testing.assert_array_equal(np.concatenate([q_feats, g_feats]), np.concatenate(before))


def test_other_number_types_and_layouts():
    q_feats, g_feats = (np.round(8 * side) for side in clustered(np.random.default_rng(12), 9, 14))
    expected = naive_k_reciprocal(q_feats, g_feats, 4, 2)
    for dtype in (np.int8, np.int64, np.float16, np.longdouble):
        assert_close(k_reciprocal(q_feats.astype(dtype), g_feats.astype(dtype), 4, 2), expected)
    assert_close(k_reciprocal(q_feats.tolist(), np.asfortranarray(g_feats), 4, 2), expected)


def test_memory_stays_below_one_distance_matrix():
    q_feats, g_feats = clustered(np.random.default_rng(13), 400, 5600, 300, 16, dtype=np.float32)
    tracemalloc.start()
    k_reciprocal(q_feats, g_feats)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6000**2 * 4 * 0.6, f"{peak / 1e6:.0f} MB"


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_random_walk_equals_the_series(alpha, dtype):
    rng = np.random.default_rng(14)
    for queries, gallery in [(12, 17), (1, 5), (4, 1)]:
        q_feats, g_feats = clustered(rng, queries, gallery, dtype=dtype)
        ours = random_walk(q_feats, g_feats, alpha)
        expected = naive_random_walk(q_feats.astype(float), g_feats.astype(float), alpha)
        assert_close(ours, expected, 1e-12)
        if alpha == 0:
            assert_close(ours, -(q_feats @ g_feats.T), 1e-6)


def test_random_walk_survives_large_similarities():
    q_feats, g_feats = clustered(np.random.default_rng(15), 5, 8)
    expected = naive_random_walk(40 * q_feats, 40 * g_feats)
    assert_close(random_walk(40 * q_feats, 40 * g_feats), expected, 1e-8)


FEATS = np.arange(12.0).reshape(4, 3)
BAD_FEATURES = [
    pytest.param(FEATS[0], FEATS, r"q_feats is of shape \(3,\)", id="vector"),
    pytest.param(FEATS, FEATS[None], r"g_feats is .* shape \(1, 4, 3\)", id="cube"),
    pytest.param(FEATS[:0], FEATS, r"q_feats is .* shape \(0, 3\)", id="no query"),
    pytest.param(FEATS, FEATS[:0], r"g_feats is .* shape \(0, 3\)", id="no gallery"),
    pytest.param(FEATS[:, :0], FEATS[:, :0], r"q_feats is .* \(4, 0\)", id="no width"),
    pytest.param(FEATS, FEATS[:, :2], "widths: .*3.*2", id="widths"),
    pytest.param(FEATS * np.nan, FEATS, "q_feats holds NaN", id="nan"),
    pytest.param(FEATS, FEATS - [0, 0, np.inf], "g_feats holds NaN or inf", id="infinity"),
]


@pytest.mark.parametrize("function", [k_reciprocal, random_walk])
@pytest.mark.parametrize(("q_feats", "g_feats", "message"), BAD_FEATURES)
def test_bad_features(function, q_feats, g_feats, message):
    with pytest.raises(ValueError, match=message):
        function(q_feats, g_feats)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k1": 0}, "k1 is 0"),
        ({"k1": -3}, "k1 is -3"),
        ({"k2": 0}, "k2 is 0"),
        ({"lambda_value": -0.1}, "lambda_value is -0.1"),
        ({"lambda_value": 1.1}, "lambda_value is 1.1"),
        ({"lambda_value": float("nan")}, "lambda_value is nan"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        k_reciprocal(FEATS, FEATS, **changes)


@pytest.mark.parametrize("alpha", [-0.1, 1.0, float("nan")])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match="alpha is"):
        random_walk(FEATS, FEATS, alpha)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as data:
        return dict(data)


@pytest.mark.parametrize("name", ["norm_d64", "norm_d128_hard", "unnorm_d32", "tiny"])
def test_golden(name, golden):
    """The release's algorithm with float32 in place of float16; its random walk as it is."""
    q_feats, g_feats = golden[f"{name}/q"], golden[f"{name}/g"]
    checked = 0
    for key, expected in golden.items():
        case, setting, *_ = key.split("/")
        if case != name or setting in "qg":
            continue
        if setting.startswith("random_walk"):
            ours = random_walk(q_feats, g_feats, float(setting.removeprefix("random_walk_")))
            assert_close(ours, expected, 1e-10)
        else:
            k1, k2, lambda_value = setting.removeprefix("k").split("_")
            ours = k_reciprocal(q_feats, g_feats, int(k1), int(k2), float(lambda_value))
            assert_close(ours, expected, 1e-5)
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("size", [1, 4, 9])
@pytest.mark.parametrize("distinct", [2, 5, 10**6])
def test_smallest_of_rows_with_and_without_ties(size, distinct):
    rng = np.random.default_rng(8)
    scores = rng.integers(0, distinct, (20, 9)).astype(np.float32)
    scores[3, :5], scores[4, 2] = np.inf, -np.inf
    columns = re_rank._nearest(scores, size)
    assert columns.shape == (20, size)
    assert all(len(set(row)) == size for row in columns.tolist())
    found = np.sort(np.take_along_axis(scores, columns, axis=1), axis=1)
    assert np.array_equal(found, np.sort(scores, axis=1)[:, :size])
