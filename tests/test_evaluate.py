"""Evaluation: features, distances, scores, and how they are printed."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_training import small

from data_manager import EvalSet, ImageList
from engine.checkpoints import SEEN_BEFORE, TrainedOn
from engine.evaluate import distances, embed, evaluate, format_result, score
from eval_metrics import METRICS, RE_RANKINGS
from networks.checkpoint_file import save_checkpoint
from utils import CheckpointError


def protocol(rule="none", trials=((0, 1, 2, 3), (3, 1, 0)), asking=None):
    images = lambda pids, cams: SimpleNamespace(pids=np.array(pids), camids=np.array(cams))  # noqa: E731
    return SimpleNamespace(
        query=images([1, 2], [3, 6]),
        gallery=images([1, 2, 1, 3], [2, 1, 4, 2]),
        gallery_trials=tuple(np.array(t) for t in trials),
        query_trials=asking and tuple(np.array(t) for t in asking),
        camera_rule=rule,
        protocol="a test",
        tta="no",
    )


def test_scores_are_means_over_trials_and_follow_the_camera_rule():
    query = np.eye(3, dtype=np.float32)[:2]
    gallery = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.8, 0, 0.6]], dtype=np.float32)
    plain = score(protocol(), query, gallery)
    assert [t["rank1"] for t in plain["per_trial"]] == [1.0, 1.0]
    ruled = score(protocol("sysu", trials=((0, 1, 2, 3),)), query, gallery)
    # Query 0 (camera 3) may not use gallery 0 and 3 (camera 2): its one match is image 2.
    assert ruled["mAP"] <= plain["per_trial"][0]["mAP"]
    assert ruled["re_rank"] == "no"
    # No gallery image has person and camera of its query.
    assert score(protocol("same"), query, gallery)["mAP"] == pytest.approx(plain["mAP"])
    struck = protocol("same", trials=((0, 1, 2, 3),))
    struck.query.camids[0] = 2
    # Query 0 loses its nearest image, 0; 3 and 1 stay ahead of 2, its one match.
    assert score(struck, query, gallery)["rank1"] == 0.5
    expected = np.mean([t["mAP"] for t in plain["per_trial"]])
    assert plain["mAP"] == pytest.approx(expected)
    assert plain["std"]["mAP"] == pytest.approx(np.std([t["mAP"] for t in plain["per_trial"]]))


@pytest.mark.parametrize("ranking", RE_RANKINGS)
def test_each_trial_may_have_queries_of_its_own(ranking):
    rng = np.random.default_rng(0)
    query, gallery = (rng.normal(size=(n, 5)).astype(np.float32) for n in (2, 4))
    query, gallery = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, gallery))
    found = score(protocol(asking=((1,), (1, 0))), query, gallery, ranking)
    for number, own in enumerate(([1], [1, 0])):
        alone = protocol(trials=(protocol().gallery_trials[number],))
        alone.query = SimpleNamespace(pids=alone.query.pids[own], camids=alone.query.camids[own])
        expected = score(alone, query[own], gallery, ranking)
        assert found["per_trial"][number] == pytest.approx(expected["per_trial"][0])


def test_distances_by_each_ranking():
    feats = np.eye(4, dtype=np.float32)
    np.testing.assert_allclose(distances(feats, feats), -np.eye(4))
    for ranking in ("k_reciprocal", "random_walk"):
        assert distances(feats, feats, ranking).shape == (4, 4)


def test_features_are_extracted_in_order_for_each_kind():
    net = small(memory="mg")
    images = torch.randn(5, 3, 96, 32)
    batches = images.split(2)
    result = embed(net, batches, "infrared", ("pcb", "both"))
    assert not net.training
    with torch.no_grad():
        np.testing.assert_allclose(result["pcb"], net(None, images).numpy(), atol=1e-6)
    assert result["both"].shape == (5, 48 + 512)
    assert result["both"].dtype == np.float32
    with torch.no_grad():
        net.part_reduce.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="visible features 'pcb' hold NaN"):
        embed(net, batches, "visible", ("pcb",))


def test_flip_averaging_sums_the_features_of_image_and_mirror_image():
    net, images = small(), torch.randn(3, 3, 96, 32)
    plain = embed(net, [images], "visible", ("pcb",))["pcb"]
    mirrored = embed(net, [images.flip(3)], "visible", ("pcb",))["pcb"]
    found = embed(net, [images], "visible", ("pcb",), flip=True)["pcb"]
    total = plain + mirrored
    np.testing.assert_allclose(found, total / np.linalg.norm(total, axis=1, keepdims=True), 1e-5)
    assert not np.allclose(found, plain, atol=1e-4)


def image_list(modality, pids, camids):
    return ImageList(Path("nowhere"), (), np.array(pids), np.array(camids), modality)


def noise(images):
    """In place of the cache of decoded images: pixels that follow from person and camera."""
    seeds = zip(images.pids.tolist(), images.camids.tolist(), strict=True)
    drawn = [np.random.default_rng(s).integers(0, 256, (96, 32, 3), np.uint8) for s in seeds]
    return np.stack(drawn)


def small_eval_set():
    found = protocol()
    found.query = image_list("visible", [1, 2, 3], [1, 1, 2])
    found.gallery = image_list("infrared", [1, 2, 1, 3, 2], [3, 4, 5, 3, 6])
    return found


def test_an_evaluation_gives_features_and_a_result_for_each_feature_and_ranking():
    net, eval_set = small(memory="mg"), small_eval_set()
    features, results = evaluate(
        net,
        eval_set,
        noise,
        test_feats=("pcb", "memory"),
        rankings=RE_RANKINGS,
        batch_size=2,
    )
    assert {role: kinds.keys() for role, kinds in features.items()} == {
        role: {"pcb", "memory"} for role in ("query", "gallery")
    }
    assert features["query"]["pcb"].shape == (3, 48)
    assert features["gallery"]["memory"].shape == (5, 512)
    for kinds in features.values():
        for feats in kinds.values():
            np.testing.assert_allclose(np.linalg.norm(feats, axis=1), 1, rtol=1e-5)
    assert {result.pop("tta") for result in results} == {"no"}
    named = [(r["test_feat"], r["re_rank"]) for r in results]
    assert named == [(feat, ranking) for feat in ("pcb", "memory") for ranking in RE_RANKINGS]
    for result in results:
        feat = result.pop("test_feat")
        pair = features["query"][feat], features["gallery"][feat]
        assert result == score(eval_set, *pair, result["re_rank"])


def test_without_a_ranking_there_are_features_alone():
    net, eval_set = small(), small_eval_set()
    settings = {"test_feats": ("pcb",), "batch_size": 2}
    features, results = evaluate(net, eval_set, noise, rankings=(), **settings)
    assert results == []
    assert len(features["gallery"]["pcb"]) == len(eval_set.gallery)


def people(pids, dataset="regdb"):
    query, gallery = image_list("visible", pids, pids), image_list("infrared", pids, pids)
    return EvalSet(dataset, query, gallery, (np.arange(len(pids)),), "none", "a test")


SEEN = {  # a checkpoint's entries, the protocol's data set and subset -> what is said of it
    "others": ({"identities": [1, 2]}, "regdb", "test", ""),
    "some": ({"identities": [1, 7, 8]}, "regdb", "test", "2 of 3 test identities were trained on"),
    "before": (
        {SEEN_BEFORE: {"D": [9]}},
        "regdb",
        "test",
        "1 of 3 test identities were trained on",
    ),
    "long before": (
        {SEEN_BEFORE: {"D": [9]}, "identities": [7], "data": "SYSU"},
        *("regdb", "test", "1 of 3 test identities were trained on"),
    ),
    "other data": ({"identities": [7], "data": "SYSU"}, "regdb", "test", "trained on SYSU"),
    "nothing known": ({"data": ""}, "regdb", "test", "training identities unknown"),
    "labels": ({"identities": [7]}, "llcm", "test", ""),
    "labels of both": (
        {"identities": [7]},
        "llcm",
        "val",
        "1 of 3 validation identities were trained on",
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_identities_that_were_trained_on_are_refused_or_named(name):
    entries, dataset, subset, remark = SEEN[name]
    options = {"dataset": dataset, "trial": 3}
    trained = TrainedOn("a.pt", {"data": "D", "options": options, **entries})
    protocol = people([7, 8, 9], dataset)
    admitted, found = trained.admit(protocol, "D", trial=1, subset=subset, seen=True)
    assert found == remark
    assert admitted.protocol == (f"a test; {remark}" if remark else "a test")
    if "were trained on" not in remark:
        assert trained.admit(protocol, "D", trial=1, subset=subset, seen=False)[1] == remark
        return
    own = "of trial 3: pass --trial 3" if dataset == "regdb" else "or its starting weights"
    for trial, hint in {1: own, 3: "or its starting weights"}.items():
        with pytest.raises(ValueError, match=rf"^{remark} by a.pt \({hint}\). With --seen-ids"):
            trained.admit(protocol, "D", trial=trial, subset=subset, seen=False)


def test_a_checkpoint_s_own_data_are_its_defaults(tmp_path):
    def defaults(**entries):
        return TrainedOn("a.pt", {"options": entries}).defaults

    assert defaults() == {}  # an earlier release's file
    assert defaults(dataset="own", trial=2) == {}  # a data set that is not known here
    known = {"dataset": "sysu", "trial": 2}
    assert defaults(**known, data_path="not/there") == known
    assert defaults(**known, data_path=str(tmp_path)) == {**known, "data_path": tmp_path}
    for damaged in ({"dataset": ["regdb"]}, {"trial": "2"}, {"data_path": 3}):
        save_checkpoint(tmp_path / "a.pt", {"net": {}, "options": damaged})
        with pytest.raises(CheckpointError, match="a.pt"):
            TrainedOn(tmp_path / "a.pt")


def test_printed_results_name_protocol_and_re_ranking():
    result = {**dict.fromkeys(METRICS, 0.25), "protocol": "p", "re_rank": "no"}
    assert "R1 25.00" in format_result(result)
    assert "(p; not re-ranked)" in format_result(result)
    assert "re-ranked: k_reciprocal" in format_result({**result, "re_rank": "k_reciprocal"})
