"""eval_metrics.py against a per-query loop, golden numbers and the official SYSU evaluation."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import eval_metrics
from eval_metrics import eval_llcm, eval_regdb, eval_sysu, excluded, mean_and_std, summarize

GOLDEN = Path(__file__).parent / "golden" / "eval_cases.npz"
OFFICIAL = Path(__file__).resolve().parents[2] / "shared/golden/official_sysu"
CASES = ["small_f64", "unmatched_f32", "ties_f32", "ties_f64", "ties_f16"]
CASES += ["cam2_only", "few_ids", "gallery_lt_20"]


def naive_metrics(
    distmat, q_pids, g_pids, q_camids=None, g_camids=None, *, max_rank=20, count_identities
):
    """The protocol query by query, gallery image by gallery image (cameras given: SYSU's rule)."""
    cmcs, aps, inps = [], [], []
    for i, pid in enumerate(q_pids):
        order = np.argsort(distmat[i], kind="stable")
        if q_camids is not None and q_camids[i] == 3:
            order = [j for j in order if g_camids[j] != 2]
        ranked = [g_pids[j] for j in order]
        if pid not in ranked:
            continue
        found, precisions = 0, []
        for rank, other in enumerate(ranked, start=1):
            if other == pid:
                found += 1
                precisions.append(found / rank)
                last = rank
        aps.append(sum(precisions) / found)
        inps.append(found / last)
        listed = list(dict.fromkeys(ranked)) if count_identities else ranked
        hit = listed.index(pid)
        cmcs.append([float(hit <= rank) for rank in range(max_rank)])
    if not cmcs:
        raise ValueError("no valid query")
    return np.mean(cmcs, axis=0), np.mean(aps), np.mean(inps)


def naive_sysu(distmat, q_pids, g_pids, q_camids, g_camids, max_rank=20):
    return naive_metrics(
        distmat, q_pids, g_pids, q_camids, g_camids, max_rank=max_rank, count_identities=True
    )


def naive_regdb(distmat, q_pids, g_pids, max_rank=20):
    return naive_metrics(distmat, q_pids, g_pids, max_rank=max_rank, count_identities=False)


def assert_same(ours, expected, tolerance=1e-12):
    for value, wanted in zip(ours, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=tolerance)


def random_case(rng, queries, gallery, ids, levels=None, dtype=np.float64):
    """Distances (of few levels: ties), labels and cameras; some queries have no true match."""
    distmat = rng.random((queries, gallery))
    if levels:
        distmat = np.floor(distmat * levels)
    q_pids, g_pids = rng.integers(0, ids + 1, queries), rng.integers(0, ids, gallery)
    cameras = rng.choice([3, 6], queries), rng.choice([1, 2, 4, 5], gallery)
    g_pids[0], cameras[1][0], q_pids[0] = ids - 1, 1, ids - 1  # at least one valid query
    return distmat.astype(dtype), q_pids, g_pids, *cameras


@pytest.mark.parametrize("levels", [None, 1, 4, 50])
@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "longdouble", "int8", "uint16", "int64"]
)
def test_equal_to_the_loop(dtype, levels):
    rng = np.random.default_rng([levels or 0, *dtype.encode()])
    for queries, gallery, ids in [(40, 90, 25), (30, 200, 7), (25, 12, 30), (20, 150, 1)]:
        case = random_case(rng, queries, gallery, ids, levels, dtype)
        if levels is None and np.dtype(dtype).kind != "f":
            case = (np.floor(rng.random((queries, gallery)) * 120).astype(dtype), *case[1:])
        assert_same(eval_sysu(*case), naive_sysu(*case))
        assert_same(eval_regdb(*case[:3]), naive_regdb(*case[:3]))
        assert_same(eval_sysu(*case, max_rank=3), naive_sysu(*case, max_rank=3))


def naive_llcm(distmat, q_pids, g_pids, q_camids, g_camids, max_rank=20):
    """Each query with its own person's images by its own camera struck out of the gallery."""
    rows = []
    for i, (pid, camera) in enumerate(zip(q_pids, q_camids, strict=True)):
        kept = [j for j in range(len(g_pids)) if not (g_pids[j] == pid and g_camids[j] == camera)]
        if pid in [g_pids[j] for j in kept]:
            others = [g_pids[j] for j in kept]
            rows.append(
                naive_metrics(
                    distmat[i : i + 1, kept],
                    [pid],
                    others,
                    max_rank=max_rank,
                    count_identities=True,
                )
            )
    return tuple(np.mean([row[k] for row in rows], axis=0) for k in range(3))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("levels", [None, 3, 40])
def test_llcm_equals_the_loop(dtype, levels):
    rng = np.random.default_rng([9, levels or 0, *dtype.encode()])
    for queries, gallery, ids in [(40, 90, 25), (30, 120, 7), (25, 12, 30)]:
        distmat, q_pids, g_pids, *_ = random_case(rng, queries, gallery, ids, levels, dtype)
        cameras = rng.integers(1, 10, queries), rng.integers(1, 10, gallery)
        cameras[0][0], cameras[1][0] = 1, 2  # the one sure match stays
        case = distmat, q_pids, g_pids, *cameras
        assert_same(eval_llcm(*case), naive_llcm(*case))
        assert_same(eval_llcm(*case, max_rank=3), naive_llcm(*case, max_rank=3))


def test_llcm_ignores_only_images_of_the_same_person_and_camera():
    distmat = np.array([[0.0, 1.0, 2.0, 3.0]])
    g_pids, g_camids = [1, 2, 2, 1], [4, 4, 4, 5]
    cmc, average, inverse = eval_llcm(distmat, [1], g_pids, [4], g_camids, max_rank=3)
    assert cmc.tolist() == [0, 1, 1]  # identity 2 counts once, though it has two images
    assert average == inverse == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="none of 1 queries has a true match"):
        eval_llcm(distmat[:, :1], [1], [1], [4], [4])


def test_excluded_images_by_rule():
    q_pids, g_pids, q_camids, g_camids = [1, 2], [1, 2, 2], [3, 2], [2, 2, 3]
    case = q_pids, g_pids, q_camids, g_camids
    assert excluded("none", *case).tolist() == [[False] * 3] * 2
    assert excluded("sysu", *case).tolist() == [[True, True, False], [False] * 3]
    assert excluded("same", *case).tolist() == [[False] * 3, [False, True, False]]
    assert excluded("sysu", q_pids, g_pids, [6, 6], g_camids).tolist() == [[False] * 3] * 2
    with pytest.raises(ValueError, match="camera rule 'all'; expected one of none, sysu, same"):
        excluded("all", *case)


@pytest.mark.parametrize("entries", [1, 300, 1 << 18])
@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_and_threads_do_not_matter(entries, threads, monkeypatch):
    monkeypatch.setattr(eval_metrics, "BLOCK_ENTRIES", entries)
    monkeypatch.setattr(eval_metrics, "MAX_THREADS", threads)
    monkeypatch.setattr(eval_metrics.os, "cpu_count", lambda: 8)
    case = random_case(np.random.default_rng(3), 70, 60, 15, levels=9)
    assert_same(eval_sysu(*case), naive_sysu(*case))
    assert_same(eval_regdb(*case[:3]), naive_regdb(*case[:3]))


def test_ties_keep_gallery_order():
    distmat = np.zeros((1, 4))
    cmc, average, inverse = eval_regdb(distmat, [7], [1, 7, 2, 7], max_rank=4)
    assert cmc.tolist() == [0, 1, 1, 1]
    assert average == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert inverse == pytest.approx(2 / 4)


def test_ties_that_only_float32_makes():
    """Distances that differ by less than float32 can tell are ordered as they are."""
    step = 2.0**-40
    distmat = 1 + step * np.array([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    labels = [7, 7], [1, 1, 7, 2]
    assert_same(eval_regdb(distmat, *labels), naive_regdb(distmat, *labels))
    assert eval_regdb(np.array([[1e300, 1e290]]), [5], [1, 5])[0][0] == 1


def test_sparse_ties_in_long_rows():
    rng = np.random.default_rng(8)
    case = random_case(rng, 30, 3000, 40, levels=20_000, dtype=np.float32)
    assert_same(eval_sysu(*case), naive_sysu(*case))


def test_infinite_distances_rank_last_and_excluded_images_nowhere():
    inf = np.inf
    distmat = np.array([[inf, 1.0, inf, inf, inf], [-inf, inf, 2.0, -inf, 0.0]])
    case = distmat, [4, 4], [9, 8, 9, 4, 4], [3, 6], [2, 1, 1, 2, 5]
    assert_same(eval_sysu(*case), naive_sysu(*case))
    case = np.array([[1e30, 1e31, 1e32]]), [4], [9, 8, 4], [3], [2, 1, 1]
    assert_same(eval_sysu(*case), naive_sysu(*case))
    integers = np.array([[np.iinfo(np.int32).max, 1, np.iinfo(np.int32).max]], np.int32)
    case = integers, [4], [9, 8, 4], [3], [2, 1, 1]
    assert_same(eval_sysu(*case), naive_sysu(*case))


def test_cmc_counts_identities_on_sysu_and_images_on_regdb():
    distmat = np.arange(6.0)[None]
    g_pids = [1, 1, 1, 2, 2, 3]
    assert eval_sysu(distmat, [3], g_pids, [6], [1] * 6)[0].tolist() == [0, 0] + [1] * 18
    assert eval_regdb(distmat, [3], g_pids)[0].tolist() == [0] * 5 + [1] * 15


def test_camera_3_ignores_camera_2():
    distmat = np.array([[0.0, 1.0, 2.0]] * 2)
    g_pids, g_camids = [1, 2, 1], [2, 1, 4]
    cmc, average, inverse = eval_sysu(distmat, [1, 1], g_pids, [3, 6], g_camids, max_rank=2)
    assert cmc.tolist() == [0.5, 1]
    assert average == pytest.approx((1 / 2 + (1 + 2 / 3) / 2) / 2)
    assert inverse == pytest.approx((1 / 2 + 2 / 3) / 2)
    only_camera_2 = eval_sysu(distmat, [1, 1], g_pids, [3, 6], [2, 1, 2], max_rank=2)
    assert only_camera_2[0].tolist() == [1, 1]  # the camera-3 query counts in no mean


def test_cmc_ends_with_its_last_value():
    cmc, _, _ = eval_sysu(np.array([[1.0, 0.0]]), [1], [1, 2], [6], [1, 1], max_rank=5)
    assert cmc.tolist() == [0, 1, 1, 1, 1]
    assert cmc.dtype == np.float64


def test_identities_are_counted_whatever_their_number():
    rng = np.random.default_rng(4)
    for ids in (255, 256, 257):  # where the labels' type changes
        distmat, pids = rng.random((ids, ids)), np.arange(ids)
        case = distmat, rng.permutation(pids), pids, [6] * ids, [1] * ids
        assert_same(eval_sysu(*case), naive_sysu(*case))


def test_order_of_queries_does_not_matter():
    rng = np.random.default_rng(5)
    distmat, q_pids, g_pids, q_camids, g_camids = random_case(rng, 80, 70, 20, levels=30)
    order = rng.permutation(80)
    assert_same(
        eval_sysu(distmat[order], q_pids[order], g_pids, q_camids[order], g_camids),
        eval_sysu(distmat, q_pids, g_pids, q_camids, g_camids),
    )


def test_layout_and_lists_are_accepted_and_left_alone():
    case = random_case(np.random.default_rng(6), 30, 40, 9)
    before = case[0].copy()
    expected = eval_sysu(*case)
    assert_same(eval_sysu(np.asfortranarray(case[0]), *case[1:]), expected)
    assert_same(eval_sysu(*(value.tolist() for value in case)), expected)
    names = [np.array([f"id {pid}" for pid in pids]) for pids in case[1:3]]
    assert_same(eval_sysu(case[0], *names, *case[3:]), expected)
    np.testing.assert_array_equal(case[0], before)


def test_memory_stays_bounded():
    rng = np.random.default_rng(0)
    for levels in (None, 300):
        case = random_case(rng, 200, 40_000, 150, levels, np.float32)
        tracemalloc.start()
        eval_sysu(*case)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32e6, f"{peak / 1e6:.0f} MB beyond the distances"


def bad_calls():
    case = dict(
        zip(
            ["distmat", "q_pids", "g_pids", "q_camids", "g_camids"],
            random_case(np.random.default_rng(1), 5, 8, 3),
            strict=True,
        )
    )
    nan = case["distmat"].copy()
    nan[4, 2] = np.nan
    half = nan.astype(np.float16)
    changes = {
        "one-dimensional": ({"distmat": case["distmat"][0]}, r"shape \(8,\)"),
        "no query": ({"distmat": np.empty((0, 8))}, r"\(0, 8\)"),
        "no gallery": ({"distmat": np.empty((5, 0))}, r"\(5, 0\)"),
        "transposed": ({"distmat": case["distmat"].T}, r"shape \(8, 5\), .*identities \(5, 8\)"),
        "few q_pids": ({"q_pids": case["q_pids"][:4]}, r"shape \(5, 8\), .*identities \(4, 8\)"),
        "few g_pids": ({"g_pids": case["g_pids"][:4]}, r"identities \(5, 4\)"),
        "flat q_pids": ({"q_pids": case["q_pids"][:, None]}, r"identities \(5, 1, 8\)"),
        "nan": ({"distmat": nan}, r"distmat\[4, 2\] is NaN"),
        "nan in half": ({"distmat": half}, "NaN"),
        "unmatched": ({"q_pids": case["q_pids"] + 99}, "none of 5 queries has a true match"),
    }
    cameras = {
        "few q_camids": ({"q_camids": case["q_camids"][:4]}, r"cameras \(4, 8\)"),
        "few g_camids": ({"g_camids": case["g_camids"][:4]}, r"cameras \(5, 4\)"),
        "all excluded": ({"q_camids": [3] * 5, "g_camids": [2] * 8}, "none of 5 queries"),
    }
    for name, (change, message) in (changes | cameras).items():
        yield pytest.param(eval_sysu, case | change, message, id=f"sysu-{name}")
        if name != "all excluded":
            yield pytest.param(eval_llcm, case | change, message, id=f"llcm-{name}")
        if name in changes:
            regdb = {key: value for key, value in (case | change).items() if "camids" not in key}
            yield pytest.param(eval_regdb, regdb, message, id=f"regdb-{name}")


@pytest.mark.parametrize(("function", "arguments", "message"), list(bad_calls()))
def test_bad_input(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**arguments)


def test_nan_is_an_error_even_where_it_would_not_count():
    distmat = np.array([[np.nan, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="NaN"):
        eval_sysu(distmat, [1, 1], [1, 1], [3, 6], [2, 1])


def test_summarize():
    cmc = np.arange(1, 21) / 20
    summary = summarize(cmc, np.float64(0.5), 0.25)
    ranks = {"rank1": 0.05, "rank5": 0.25, "rank10": 0.5, "rank20": 1.0}
    assert summary == {**ranks, "mAP": 0.5, "mINP": 0.25}
    assert all(type(value) is float for value in summary.values())
    short = summarize([0.5, 0.75], 0, 0)
    assert [short[f"rank{k}"] for k in (1, 5, 10, 20)] == [0.5, 0.75, 0.75, 0.75]


def test_mean_and_std():
    mean, std = mean_and_std([{"mAP": 0.2, "rank1": 1.0}, {"mAP": 0.6, "rank1": 1.0}])
    assert mean == pytest.approx({"mAP": 0.4, "rank1": 1.0})
    assert std == pytest.approx({"mAP": 0.2, "rank1": 0.0})
    assert mean_and_std([{"mAP": 0.2}]) == ({"mAP": 0.2}, {"mAP": 0.0})


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as data:
        return dict(data)


def golden_case(golden, name):
    return [golden[f"{name}/{key}"] for key in ("dist", "q_pid", "g_pid", "q_cam", "g_cam")]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("function", [eval_sysu, eval_regdb])
def test_golden_means(name, function, golden):
    """The release's numbers with a stable sort; it fails on few identities, where we do not."""
    case = golden_case(golden, name)
    cmc, average, inverse = function(*(case if function is eval_sysu else case[:3]))
    stable = f"{name}/stable/{function.__name__}"
    if f"{stable}/cmc" in golden:
        expected = golden[f"{stable}/cmc"]  # float32 inside the release
        assert_same([cmc[: len(expected)]], [expected], 1e-6)
        assert_same([average, inverse], golden[f"{stable}/map_minp"], 1e-12)
    else:
        assert name in ("few_ids", "gallery_lt_20")
        assert len(np.unique(case[2])) < 20
        per_query = golden[f"{name}/stable/per_query_sysu"]
        first, _, ap, inp = per_query[~np.isnan(per_query[:, 2])].T
        assert_same([cmc], [(first[:, None] <= np.arange(20)).mean(axis=0)], 1e-12)
        assert_same([average, inverse], [ap.mean(), inp.mean()], 1e-12)


@pytest.mark.parametrize("name", ["unmatched_f32", "ties_f16", "cam2_only", "gallery_lt_20"])
@pytest.mark.parametrize("rule", ["sysu", "regdb"])
def test_golden_queries_one_by_one(name, rule, golden):
    distmat, q_pids, g_pids, q_camids, g_camids = golden_case(golden, name)
    for i, (ids_ahead, images_ahead, ap, inp) in enumerate(
        golden[f"{name}/stable/per_query_{rule}"]
    ):
        one = slice(i, i + 1)
        if rule == "sysu":
            arguments = eval_sysu, distmat[one], q_pids[one], g_pids, q_camids[one], g_camids
        else:
            arguments = eval_regdb, distmat[one], q_pids[one], g_pids
        function, *arguments = arguments
        if np.isnan(ap):
            with pytest.raises(ValueError, match="true match"):
                function(*arguments)
            continue
        cmc, average, inverse = function(*arguments, max_rank=400)
        assert np.argmax(cmc) == (ids_ahead if rule == "sysu" else images_ahead)
        assert_same([average, inverse], [ap, inp])


@pytest.fixture(scope="module")
def official():
    """Data of the SYSU-MM01 authors' evaluation: features, gallery draws, results."""
    if not OFFICIAL.is_dir():
        pytest.skip("the official evaluation's results are not part of this repository")
    with (
        np.load(OFFICIAL / "features.npz") as features,
        np.load(OFFICIAL / "split_test.npz") as split,
    ):
        data = {**features, **split}
    return data, json.loads((OFFICIAL / "expected.json").read_text())["results"]


@pytest.mark.parametrize("shots", [1, 10])
@pytest.mark.parametrize("mode", ["all_search", "indoor_search"])
@pytest.mark.parametrize("features", ["syn", "syntied"])
def test_official_sysu_evaluation(features, mode, shots, official):
    data, results = official
    expected = results[f"{features}/{mode}/{shots}shot"]
    feats = data["feat" if features == "syn" else "feat_tied"].astype(np.float64)
    cameras, pids = data["cam"].astype(int), data["pid"].astype(int)
    row_of = {key: i for i, key in enumerate(zip(cameras, pids, data["img"], strict=True))}
    query = np.flatnonzero(np.isin(cameras, (3, 6)))
    assert len(query) == expected["n_probe"]

    drawn = np.isin(data["gallery_cam"], (1, 2, 4, 5) if mode == "all_search" else (1, 2))
    for trial in range(10):
        gallery = [
            row_of[camera, pid, image]
            for camera, pid, images in zip(
                data["gallery_cam"][drawn],
                data["gallery_pid"][drawn],
                data["gallery_first10"][drawn, trial, :shots],
                strict=True,
            )
            for image in images
        ]
        assert len(gallery) == expected["n_gallery"]
        products = feats[query] @ feats[gallery].T  # exact integers for the tied features
        squares = np.einsum("nd,nd->n", feats, feats)
        distmat = squares[query][:, None] + squares[gallery] - 2 * products
        cmc, average, inverse = eval_sysu(
            distmat, pids[query], pids[gallery], cameras[query], cameras[gallery],
            max_rank=expected["n_gallery_ids"],
        )  # fmt: skip
        assert_same([cmc], [expected["cmc_all"][trial]], 1e-9)
        assert_same([average], [expected["map_all"][trial]], 1e-9)
        assert_same([inverse], [expected["minp_all_python"][trial]], 1e-9)
