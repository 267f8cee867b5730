import math

import pytest
import torch
from small_training import Loader, small

from engine import train as engine
from engine.train import (
    NonFiniteLossError,
    Schedule,
    check_finite,
    make_optimizer,
    set_learning_rate,
    train_epoch,
)
from loss import Criterion


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
