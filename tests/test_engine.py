import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import engine
from engine import (
    NonFiniteLossError,
    RunFiles,
    Schedule,
    check_finite,
    distances,
    extract_features,
    feature_spread,
    fit,
    format_result,
    make_optimizer,
    score,
    set_learning_rate,
    train_epoch,
)
from loss import Criterion
from model import TwoStreamNet


def small(**settings):
    torch.manual_seed(0)
    return TwoStreamNet(**{"num_ids": 4, "arch": "resnet18", "local_feat_dim": 8, **settings})


class Loader:
    """Two fixed batches an epoch."""

    def __init__(self, poison_step=None):
        self.poison_step = poison_step

    def __len__(self):
        return 2

    def epoch(self, epoch, start_step=0):
        labels = torch.tensor([0, 0, 1, 1]).repeat(2)
        for step in range(start_step, 2):
            gen = torch.Generator().manual_seed(10 * epoch + step)
            images = [torch.randn(4, 3, 96, 32, generator=gen) for _ in range(2)]
            if step == self.poison_step:
                images[0][0, 0, 0, 0] = math.nan
            yield SimpleNamespace(visible=images[0], infrared=images[1], labels=labels)


def test_learning_rates_of_the_paper():
    schedule = Schedule(lr=0.1)
    expected = {
        0: 0.01,
        4: 0.05,
        9: 0.1,
        10: 0.1,
        19: 0.1,
        20: 0.01,
        49: 0.01,
        50: 0.001,
        60: 0.001,
    }
    for epoch, lr in expected.items():
        assert schedule.learning_rate(epoch) == pytest.approx(lr), epoch


def test_cosine_and_triplet_ramp():
    schedule = Schedule(lr=1.0, epochs=10, warmup_epochs=2, kind="cosine", triplet_ramp=(3, 5))
    rates = [schedule.learning_rate(e) for e in range(10)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert 0 < rates[-1] < 0.1
    scales = [schedule.triplet_scale(e) for e in range(7)]
    assert scales == pytest.approx([0, 0, 0, 1 / 3, 2 / 3, 1, 1])
    assert Schedule(lr=1.0).triplet_scale(0) == 1.0


def test_optimiser_groups():
    net = small(memory="mg")
    optimizer = make_optimizer(net, backbone_lr_scale=0.1)
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(net.part_reduce.weight)] == 0.5
    assert rates[id(net.part_norm.weight)] == 0.5
    for p in (net.memory.part_bank, net.memory_classifier.weight, net.visible.stem.conv1.weight):
        assert rates[id(p)] == pytest.approx(0.05)
    assert len(rates) == len(list(net.parameters()))
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)
    assert isinstance(make_optimizer(net, name="adam"), torch.optim.Adam)
    with pytest.raises(ValueError, match="sgd or adam, got 'lion'"):
        make_optimizer(net, name="lion")


def test_frozen_parameters_are_in_no_group():
    net = small(head="agw")
    optimizer = make_optimizer(net)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert id(net.neck.bias) not in held


def test_an_epoch_reports_means_and_health():
    net = small(memory="mg")
    numbers = train_epoch(
        net,
        Criterion(),
        make_optimizer(net),
        Loader(),
        epoch=0,
        schedule=Schedule(lr=0.01),
        seed=0,
        progress=False,
    )
    terms = ("id", "triplet", "center_triplet", "memory_id", "memory_triplet", "alignment")
    weights = Criterion().weights
    total = sum(weights[k] * numbers[k] for k in terms) - 0.01
    assert numbers["total"] == pytest.approx(total, rel=1e-5)
    assert numbers["lr"] == pytest.approx(0.001)
    assert 0 <= numbers["memory/part/zero_reads"] <= 1
    assert numbers["images_per_second"] > 0


@pytest.mark.parametrize("step", [0, 1])
def test_a_loss_that_is_not_finite_stops_with_term_epoch_and_step(step):
    net = small()
    with pytest.raises(NonFiniteLossError, match=f"'id' is nan in epoch 3, step {step}"):
        train_epoch(
            net,
            Criterion(),
            make_optimizer(net),
            Loader(poison_step=step),
            epoch=3,
            schedule=Schedule(lr=0.01),
            seed=0,
            progress=False,
        )
    with pytest.raises(NonFiniteLossError, match="'b' is inf"):
        check_finite({"a": 1.0, "b": math.inf}, epoch=0, step=0)


def test_the_ramp_scales_triplets_and_nothing_else(monkeypatch):
    seen = []
    step = engine.training_step
    monkeypatch.setattr(
        engine, "training_step", lambda *a, **k: seen.append(k["weights"]) or step(*a, **k)
    )
    net = small()
    for epoch in (0, 2):
        train_epoch(
            net,
            Criterion(),
            make_optimizer(net),
            Loader(),
            epoch=epoch,
            schedule=Schedule(lr=1e-3, triplet_ramp=(1, 3)),
            seed=0,
            progress=False,
        )
    assert (seen[0]["triplet"], seen[0]["center_triplet"], seen[0]["id"]) == (0, 0, 1)
    assert seen[-1]["center_triplet"] == pytest.approx(2 * 2 / 3)


def test_collapse_is_detected_and_said(caplog):
    assert feature_spread(torch.ones(5, 3)) == 0
    assert feature_spread(torch.randn(50, 30)) > 0.5
    with caplog.at_level(logging.WARNING):
        engine._warn_if_collapsed({"feature_spread": 0.3}, 0)
        assert not caplog.text
        engine._warn_if_collapsed({"feature_spread": 0.001}, 0)
    assert "collapsed" in caplog.text
    assert "--preset scratch" in caplog.text


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


def test_fit_evaluates_logs_and_saves_when_due(tmp_path):
    net = small()
    results = iter([0.5, 0.7, 0.6])

    def evaluate():
        rank1 = next(results)
        metrics = dict.fromkeys(engine.METRICS, 0.1)
        return {**metrics, "rank1": rank1, "re_rank": "no", "protocol": "p"}

    state = fit(
        net,
        Criterion(),
        make_optimizer(net),
        Loader(),
        schedule=Schedule(lr=0.001, epochs=6),
        files=RunFiles(tmp_path, tmp_path, tmp_path / "board", {"method": "m"}),
        seed=0,
        evaluate=evaluate,
        selection="the test set",
        eval_start=1,
        eval_every=2,
        save_epoch=4,
        progress=False,
    )
    # Epochs counted from 1: evaluation after 3, 5 and, being the last, 6.
    assert (state.best["epoch"], state.best["rank1"]) == (5, 0.7)
    assert (state.last["epoch"], state.last["rank1"]) == (6, 0.6)
    names = {p.name for p in tmp_path.iterdir()}
    checkpoints = {"last.pt", "last.previous.pt", "best.pt", "epoch_004.pt"}
    assert names == {*checkpoints, "log.jsonl", "training.json", "board"}
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (best["epoch"], best["selection"]) == (5, "best Rank-1 on the test set")
    assert best["method"] == "m"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "eval" in line] == [3, 5, 6]
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["best"]["rank1"] == 0.7


def test_printed_results_name_protocol_and_re_ranking():
    result = {**dict.fromkeys(engine.METRICS, 0.25), "protocol": "p", "re_rank": "no"}
    assert "R1 25.00" in format_result(result)
    assert "(p; not re-ranked)" in format_result(result)
    assert "re-ranked: k_reciprocal" in format_result({**result, "re_rank": "k_reciprocal"})


LAYERS = {  # project modules that each module may import: house map, imports point up only
    "utils": "",
    "eval_metrics": "",
    "re_rank": "",
    "loss": "",
    "addressing": "",
    "memory": "addressing",
    "data_manager": "",
    "options": "",
    "pedestrians": "",
    "weights": "utils",
    "data_loader": "data_manager",
    "model": "addressing memory utils weights",
    "distributed": "utils",
    "engine": "distributed eval_metrics loss memory re_rank utils",
    "resume": "engine model utils",
    "figures": "utils",
    "pictures": "figures",
    "addresses": "addressing data_loader model pictures",
    "tables": "eval_metrics",
    "data_check": "data_manager",
}
WITHOUT_TORCH = ("data_manager", "options", "eval_metrics", "re_rank", "pedestrians")
WITHOUT_TORCH += ("tables", "data_check")


def test_imports_point_up_only():
    import ast

    root = Path(engine.__file__).parent
    modules = {path.stem for path in root.glob("*.py")}
    for name, allowed in LAYERS.items():
        tree = ast.parse((root / f"{name}.py").read_text())
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        assert found & modules <= set(allowed.split()), name
        if name in WITHOUT_TORCH:
            assert "torch" not in found, name
        assert "argparse" not in found or name == "options", name
