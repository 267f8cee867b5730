import pytest
import torch
from small_training import Loader, small

from benchmarks.plain import term_weights
from engine import train
from engine.train import (
    Schedule,
    TrainSettings,
    make_optimizer,
    set_learning_rate,
    train_epoch,
    training_step,
)
from loss import Criterion
from memory import LEVELS


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


SETTINGS = [
    {"memory": kind, "memory_levels": levels, "memory_variant": variant}
    for kind, levels, variant in [
        (None, None, "paper"),
        ("sg", None, "paper"),
        ("sg", "none", "paper"),
        *(("mg", levels, "paper") for levels in (None, "none", *LEVELS)),
        ("mg", None, "first"),
        ("mg", None, "released"),
        ("mg", "part", "released"),
    ]
]


@pytest.mark.parametrize("head", ["pcb", "global", "agw"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_trained_parameter_has_a_gradient(head, settings):
    """What lets DistributedDataParallel do without a search of the graph in each step."""
    net = small(head=head, shrink_scale=0.5, **settings).train()
    weights = term_weights(net)
    if settings["memory_levels"] == "none":
        weights.pop("alignment", None)
    order, (batch, *_) = [3, 1, 4, 0, 5, 2], Loader().epoch(0)
    optimizer = make_optimizer(net)
    training_step(
        net, Criterion(weights, head=net.head), optimizer, batch, order=order, weights=weights
    )
    without = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("overflow", [False, True])
def test_a_scaled_overflow_skips_the_step_and_nothing_else(overflow):
    """Also in the first one, where torch would leave the momentum uninitialised."""
    net = small()
    weights, scaler = term_weights(net), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = make_optimizer(net)
    set_learning_rate(optimizer, 0.01)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    if overflow:
        net.part_classifier.weight.register_hook(lambda grad: grad * torch.inf)
    batch, *_ = Loader().epoch(0)
    settings = {"order": [3, 1, 4, 0, 5, 2], "weights": weights, "amp": torch.float16}
    terms, *_ = training_step(net, Criterion(weights), optimizer, batch, scaler=scaler, **settings)
    assert all(term.isfinite() for term in terms.values())
    same = [torch.equal(before[name], p) for name, p in net.named_parameters()]
    assert all(same) if overflow else not any(same)
    assert scaler.get_scale() == 2.0 ** (9 if overflow else 10)
    if overflow:
        assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())


def test_frozen_parameters_are_in_no_group():
    net = small(head="agw")
    optimizer = make_optimizer(net)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert id(net.neck.bias) not in held


def one_epoch(net, loader=None, epoch=0, weights=None, **schedule):
    """Trains an epoch of `small` network; its numbers."""
    weights = term_weights(net) if weights is None else weights
    return train_epoch(
        net,
        Criterion(weights),
        make_optimizer(net),
        loader or Loader(),
        epoch=epoch,
        schedule=Schedule(**{"lr": 0.01, **schedule}),
        settings=TrainSettings(progress=False),
    )


def test_an_epoch_reports_means_and_health():
    net = small(memory="mg")
    numbers, weights = one_epoch(net), term_weights(net)
    total = sum(weights[k] * numbers[k] for k in weights) - 0.01
    assert numbers["total"] == pytest.approx(total, rel=1e-5)
    assert numbers["lr"] == pytest.approx(0.001)
    assert 0 <= numbers["memory/part/zero_reads"] <= 1
    assert {name.split("/")[1] for name in numbers if "/" in name} == set(LEVELS)
    assert numbers["images_per_second"] > 0
    assert numbers["feature_spread"] > 0


def test_an_epoch_s_means_are_those_of_its_steps(monkeypatch):
    """Also over more steps than lie between two looks at the losses."""
    seen = []
    step = train.training_step

    def recorded(*args, **kwargs):
        seen.append(step(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(train, "training_step", recorded)
    monkeypatch.setattr(train, "CHECK_EVERY", 2)
    numbers = one_epoch(small(), Loader(steps=5))
    assert len(seen) == 5
    for name in ("id", "triplet", "center_triplet", "total"):
        mean = sum(terms[name].item() for terms, _ in seen) / 5
        assert numbers[name] == pytest.approx(mean, rel=1e-6), name


def test_the_memory_is_looked_at_in_every_tenth_step(monkeypatch):
    looks = []
    monkeypatch.setattr(train.MemoryHealth, "update", lambda self, weights: looks.append(weights))
    monkeypatch.setattr(train, "HEALTH_EVERY", 3)
    one_epoch(small(memory="mg"), Loader(steps=5))
    assert len(looks) == 2


def test_terms_of_weight_0_are_not_computed():
    weights = {"id": 1.0, "triplet": 0.0}
    numbers = one_epoch(small(memory="mg"), weights=weights)
    assert "triplet" not in numbers
    assert numbers["total"] == pytest.approx(numbers["id"])
    assert numbers["memory/part/survivors"] >= 0  # the memory is watched all the same


@pytest.mark.parametrize(("step", "steps"), [(0, 2), (1, 2), (1, 4), (2, 5)])
def test_a_loss_that_is_not_finite_stops_with_term_epoch_and_step(step, steps, monkeypatch):
    monkeypatch.setattr(train, "CHECK_EVERY", 3)
    done = []
    run_step = train.training_step
    monkeypatch.setattr(train, "training_step", lambda *a, **k: done.append(1) or run_step(*a, **k))
    with pytest.raises(ValueError, match=f"'id' is nan in epoch 4, step {step};"):
        one_epoch(small(), Loader(poison_step=step, steps=steps), epoch=3)
    assert len(done) == min(3, steps)  # no later than the next look


def test_the_ramp_scales_triplets_and_nothing_else(monkeypatch):
    seen = []
    step = train.training_step
    monkeypatch.setattr(
        train, "training_step", lambda *a, **k: seen.append(k["weights"]) or step(*a, **k)
    )
    net = small()
    for epoch in (0, 2):
        one_epoch(net, epoch=epoch, lr=1e-3, triplet_ramp=(1, 3))
    assert (seen[0]["triplet"], seen[0]["center_triplet"], seen[0]["id"]) == (0, 0, 1)
    assert seen[-1]["center_triplet"] == pytest.approx(2 * 2 / 3)
    assert seen[-1]["id"] == 1


def test_the_stripes_order_follows_from_seed_epoch_and_step(monkeypatch):
    orders = []

    def step(*_, order, **__):
        orders.append(tuple(order))
        return {"total": torch.tensor(0.0)}, torch.ones(2, 2)

    monkeypatch.setattr(train, "training_step", step)
    net = small()

    def drawn(seed, epoch):
        orders.clear()
        settings = {"schedule": Schedule(lr=0.01), "settings": TrainSettings(seed, progress=False)}
        rest = (Criterion(term_weights(net)), make_optimizer(net), Loader(steps=3))
        train_epoch(net, *rest, epoch=epoch, **settings)
        return list(orders)

    first = drawn(seed=0, epoch=0)
    assert first == drawn(seed=0, epoch=0)
    assert all(sorted(order) == list(range(6)) for order in first)
    assert len({*first, *drawn(seed=0, epoch=1), *drawn(seed=1, epoch=0)}) == 9
