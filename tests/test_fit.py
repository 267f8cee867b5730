"""The loop over epochs; what survives an interruption is tested in test_resume.py."""

import json
import logging
import re

import pytest
import torch
from small_training import Loader, small

from benchmarks.plain import term_weights
from engine import distributed
from engine import fit as fit_module
from engine.fit import RunFiles, fit
from engine.train import Schedule, TrainSettings, feature_spread, make_optimizer
from eval_metrics import METRICS
from loss import Criterion
from networks.checkpoint_file import load_checkpoint


def test_the_last_epoch_is_always_evaluated():
    for start, every, epochs, evaluated in (
        (1, 2, 6, [2, 4, 6]),
        (10, 2, 3, [3]),
        (0, 1, 3, [1, 2, 3]),
        (10, 2, 61, [*range(11, 62, 2)]),  # the releases': 10, 12, ..., 60 counted from 0
        (6, 7, 14, [7, 14]),  # the scratch preset's
    ):
        settings = TrainSettings(eval_start=start, eval_every=every)
        assert [e for e in range(1, epochs + 1) if settings.evaluates(e, epochs)] == evaluated


def short_fit(folder, weights=None, how=None, **settings):
    """Eight epochs of the small network, with these Rank-1 in its evaluations."""
    net = small(**settings)
    results = iter([0.5, 0.7, 0.7, 0.6])

    def evaluate():
        metrics = dict.fromkeys(METRICS, 0.1)
        return {**metrics, "rank1": next(results), "re_rank": "no", "protocol": "p"}

    return fit(
        net,
        Criterion(term_weights(net) | (weights or {})),
        make_optimizer(net),
        Loader(),
        schedule=Schedule(lr=0.001, epochs=8),
        settings=TrainSettings(
            progress=False, eval_start=2, eval_every=2, save_every=4, **(how or {})
        ),
        evaluate=evaluate,
        files=RunFiles(folder, folder, folder / "board", header={"method": "m"}),
    )


def test_fit_evaluates_logs_and_saves_as_scheduled(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        state = short_fit(tmp_path)
    epochs = [text for text in caplog.messages if text.startswith("epoch ")]
    assert len(epochs) == 8 and all(len("18:10 INFO ") + len(text) <= 80 for text in epochs)
    assert re.fullmatch(r"epoch 2/8  loss [\d.]+  [\d:]+ left", epochs[1])
    assert re.search(r"  R1 70.0 \(best 70.0\)  mAP [\d.]+  [\d:]+ left$", epochs[4])
    assert "  best R1 70.0  " in epochs[5]
    # Epochs counted from 1: evaluation after 3, 5, 7 and, being the last, 8.
    assert (state.best["epoch"], state.best["rank1"]) == (5, 0.7)  # the first of equals
    assert (state.last["epoch"], state.last["rank1"]) == (8, 0.6)
    names = {p.name for p in tmp_path.iterdir()}
    checkpoints = {"last.pt", "best.pt", "epoch_004.pt", "epoch_008.pt"}
    assert names == {*checkpoints, "log.jsonl", "training.json", "board"}
    best = load_checkpoint(tmp_path / "best.pt")
    assert (best["epoch"], best["selection"]) == (5, "best Rank-1 on the test set")
    assert best["method"] == "m"
    kept = {name: "optimizer" in load_checkpoint(tmp_path / name) for name in sorted(checkpoints)}
    assert list(kept.values()) == [False, False, False, True]  # last.pt's alone
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "eval" in line] == [3, 5, 7, 8]
    assert [line["epoch"] for line in lines] == list(range(1, 9))
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["best"]["rank1"] == 0.7
    assert report["last"]["selection"] == "last epoch"


def test_last_is_saved_as_often_as_asked_and_at_the_end(tmp_path, monkeypatch):
    saved = []

    def save(path, content, **_):
        saved.append((path.name, content["epoch"]))

    monkeypatch.setattr(fit_module, "save_checkpoint", save)
    short_fit(tmp_path, how={"save_last_every": 3})
    assert [epoch for name, epoch in saved if name == "last.pt"] == [3, 6, 8]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 8


def test_collapsed_features_are_said_after_the_epoch(tmp_path, caplog, monkeypatch):
    assert feature_spread(torch.ones(5, 3)) == 0
    assert feature_spread(torch.randn(50, 30)) > 0.5
    spreads = iter([0.3, 0.01, 0.01, 0.3] * 2)
    monkeypatch.setattr(
        fit_module, "train_epoch", lambda *a, **k: {"total": 1.0, "feature_spread": next(spreads)}
    )
    with caplog.at_level(logging.WARNING):
        short_fit(tmp_path)
    assert caplog.text.count("the features have collapsed") == 2
    assert "--preset scratch" in caplog.text


def test_a_full_disk_under_tensorboard_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fit_module.SummaryWriter, "add_scalar", full)
    with pytest.raises(OSError, match="No space left on device: .*board"):
        short_fit(tmp_path)


def test_a_level_that_read_nothing_is_said_once(tmp_path, caplog, monkeypatch):
    shares = iter([0.9, 1.0, 0.9, *[1.0] * 5])
    epoch = {"total": 1.0, "feature_spread": 0.5, "memory/part/zero_reads": 0.0}
    monkeypatch.setattr(
        *(fit_module, "train_epoch"),
        lambda *a, **k: {**epoch, "memory/instance/zero_reads": next(shares)},
    )
    with caplog.at_level(logging.WARNING):
        short_fit(tmp_path, memory="mg", memory_ids=80)
    assert caplog.messages == [
        "epoch 2: instance level: no read passed lambda 0.0025 (uniform weight 0.0025); --shrink "
        "auto scales the threshold with the bank"
    ]
    caplog.clear()
    shares = iter([1.0] * 8)
    with caplog.at_level(logging.WARNING):
        short_fit(tmp_path, memory="mg", shrink_scale=3.0)
    assert caplog.messages == [
        "epoch 1: instance level: no read passed lambda 0.15 (uniform weight 0.05); a smaller "
        "--shrink-scale lowers the threshold"
    ]


def test_the_backbone_is_compiled_in_place(tmp_path, monkeypatch):
    """The state dict keeps its names; other parts are left alone."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **how: compiled.append(how) or call)
    short_fit(tmp_path, how={"compiled": True})
    assert compiled == [{"dynamic": False}] * 3
    names = load_checkpoint(tmp_path / "last.pt")["net"].keys()
    assert names == small().state_dict().keys()


def test_the_streams_and_the_shared_part_are_one_graph_each(monkeypatch):
    graphs, compile_call = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda c, **how: compile_call(c, backend=backend, **how))
    net = small().train()
    fit_module._compile_backbone(net)
    net.feature_map(torch.randn(2, 3, 96, 32), torch.randn(2, 3, 96, 32))
    assert len(graphs) == 2  # both streams run the same one
    parts = [*net.visible.modules(), *net.shared.modules()]
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in parts)
    called = [node for g in graphs for node in g.graph.nodes if "conv2d" in str(node.target)]
    assert len(called) == convolutions  # none runs outside
    torch._dynamo.reset()


@pytest.mark.parametrize(("weight", "partly"), [(0.1, False), (0.0, True)])
def test_a_classifier_without_loss_is_looked_for(weight, partly, tmp_path, monkeypatch):
    asked = []
    parallel = distributed.parallel
    monkeypatch.setattr(distributed, "parallel", lambda net, **k: asked.append(k) or parallel(net))
    short_fit(tmp_path, memory="mg", weights={"memory_id": weight})
    assert [how["unused_parameters"] for how in asked] == [partly]
