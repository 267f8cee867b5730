"""Tests of fit_loop.py; what survives an interruption is tested in test_resume.py."""

import json
import logging

import torch
from small_training import Loader, small

from engine import evaluate as retrieval
from engine import fit as fit_loop
from engine.fit import RunFiles, fit
from engine.train import (
    Schedule,
    feature_spread,
    make_optimizer,
)
from loss import Criterion


def test_collapse_is_detected_and_said(caplog):
    assert feature_spread(torch.ones(5, 3)) == 0
    assert feature_spread(torch.randn(50, 30)) > 0.5
    with caplog.at_level(logging.WARNING):
        fit_loop._warn_if_collapsed({"feature_spread": 0.3}, 0)
        assert not caplog.text
        fit_loop._warn_if_collapsed({"feature_spread": 0.001}, 0)
    assert "collapsed" in caplog.text
    assert "--preset scratch" in caplog.text


def test_fit_evaluates_logs_and_saves_when_due(tmp_path):
    net = small()
    results = iter([0.5, 0.7, 0.6])

    def evaluate():
        rank1 = next(results)
        metrics = dict.fromkeys(retrieval.METRICS, 0.1)
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
