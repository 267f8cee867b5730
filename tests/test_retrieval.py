"""Tests of retrieval.py: features, distances, scores, and how they are printed."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_training import small

from engine.evaluate import distances, extract_features, format_result, score
from eval_metrics import METRICS


def protocol(rule="none", trials=((0, 1, 2, 3), (3, 1, 0))):
    images = lambda pids, cams: SimpleNamespace(pids=np.array(pids), camids=np.array(cams))  # noqa: E731
    return SimpleNamespace(
        query=images([1, 2], [3, 6]),
        gallery=images([1, 2, 1, 3], [2, 1, 4, 2]),
        gallery_trials=tuple(np.array(t) for t in trials),
        camera_rule=rule,
        protocol="a test",
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


def test_distances_name_the_legal_rankings():
    feats = np.eye(4, dtype=np.float32)
    np.testing.assert_allclose(distances(feats, feats), -np.eye(4))
    for ranking in ("k_reciprocal", "random_walk"):
        assert distances(feats, feats, ranking).shape == (4, 4)
    with pytest.raises(ValueError, match="no, k_reciprocal, random_walk, got 'yes'"):
        distances(feats, feats, "yes")


def test_features_are_extracted_in_order_for_each_kind():
    net = small(memory="mg").eval()
    images = torch.randn(5, 3, 96, 32)
    batches = images.split(2)
    result = extract_features(net, batches, modality="infrared", test_feats=("pcb", "both"))
    with torch.no_grad():
        np.testing.assert_allclose(result["pcb"], net(None, images).numpy(), atol=1e-6)
    assert result["both"].shape == (5, 48 + 512)
    assert not net.training
    with pytest.raises(ValueError, match="no visible images"):
        extract_features(net, [], modality="visible", test_feats=("pcb",))
    with torch.no_grad():
        net.part_reduce.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        extract_features(net, batches, modality="visible", test_feats=("pcb",))


def test_printed_results_name_protocol_and_re_ranking():
    result = {**dict.fromkeys(METRICS, 0.25), "protocol": "p", "re_rank": "no"}
    assert "R1 25.00" in format_result(result)
    assert "(p; not re-ranked)" in format_result(result)
    assert "re-ranked: k_reciprocal" in format_result({**result, "re_rank": "k_reciprocal"})
