"""The plain rendering of `benchmarks/plain.py` is the oracle of the fast code as a whole."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.plain import (
    PlainNet,
    plain_evaluate,
    plain_k_reciprocal,
    plain_training_step,
    term_weights,
)
from engine.train import make_optimizer, set_learning_rate, training_step
from eval_metrics import eval_regdb, eval_sysu
from loss import Criterion
from model import TwoStreamNet
from networks.memory_health import MemoryHealth
from re_rank import k_reciprocal

IDS = 150  # 4500 parts: the float32 reads take the sparse route
BANK_SCALE = {"none": 1e-3, "few": 20.0, "many": 3.0}  # of the bank, sets how many survive
SURVIVORS = {"none": (0, 0), "few": (1, 5), "many": (50, 400)}  # of 4500, per position


def pair(memory, survivors, dtype):
    """Our network, the plain one with its weights, and one batch."""
    torch.manual_seed(0)
    net = TwoStreamNet(IDS, memory=memory, arch="resnet18", gem_p=3.0).to(dtype)
    if memory is not None:
        with torch.no_grad():
            net.memory.part_bank.mul_(BANK_SCALE[survivors])
    net.train()
    batch = {
        "visible": torch.randn(8, 3, 96, 32, dtype=dtype),
        "infrared": torch.randn(8, 3, 96, 32, dtype=dtype),
        "labels": torch.tensor([3, 1, 149, 7]).repeat_interleave(2).repeat(2),
        "order": [4, 0, 5, 2, 1, 3],
        "weights": term_weights(net) | ({"decorrelation": 0.01} if memory == "mg" else {}),
    }
    return net, PlainNet(net), batch


def our_step(net, batch, health=None):
    """Terms and gradients of one step."""
    optimizer = make_optimizer(net)
    set_learning_rate(optimizer, 0.01)
    criterion = Criterion(batch["weights"], label_smoothing=0.1)
    images = SimpleNamespace(**{k: batch[k] for k in ("visible", "infrared", "labels")})
    settings = {k: batch[k] for k in ("order", "weights")}
    terms, _ = training_step(net, criterion, optimizer, images, health=health, **settings)
    return terms, {name: p.grad for name, p in net.named_parameters()}


def plain_step(plain, batch):
    """The same of the plain network."""
    optimizer = make_optimizer(plain)
    set_learning_rate(optimizer, 0.01)
    terms = plain_training_step(plain, optimizer, **batch, label_smoothing=0.1)
    return terms, plain.gradients()


def error(gradient, truth):
    """Relative error in the norm; gradients that no loss reaches are None or zero."""
    if truth is None:
        return 0.0 if gradient is None or not gradient.any() else float("inf")
    return ((gradient - truth).norm() / truth.norm().clamp_min(1e-6)).item()


@pytest.mark.parametrize("memory", [None, "sg", "mg"])
def test_float64_step_equals_the_plain_one(memory):
    net, plain, batch = pair(memory, "few", torch.float64)
    (terms, gradients), (expected_terms, expected) = our_step(net, batch), plain_step(plain, batch)
    assert terms.keys() == expected_terms.keys()
    for name, term in expected_terms.items():
        assert terms[name].item() == pytest.approx(term.item(), rel=1e-8), name
    assert gradients.keys() == expected.keys()
    for name, truth in expected.items():
        assert error(gradients[name], truth) < 1e-6, name


@pytest.mark.parametrize(
    ("memory", "survivors"),
    [(None, "few"), *((m, s) for m in ("sg", "mg") for s in BANK_SCALE)],
)
def test_float32_step_is_as_near_to_float64_as_the_plain_one(memory, survivors):
    """ReLUs of an untrained network switch on rounding errors: hence a wide margin."""
    net, plain, batch = pair(memory, survivors, torch.float32)
    doubled = {k: v.double() if k in ("visible", "infrared") else v for k, v in batch.items()}
    true_terms, truth = plain_step(copy.deepcopy(plain).double(), doubled)
    _, plain_gradients = plain_step(plain, batch)
    health = MemoryHealth()
    terms, gradients = our_step(net.to(memory_format=torch.channels_last), batch, health=health)
    for name, term in true_terms.items():
        assert terms[name].item() == pytest.approx(term.item(), rel=1e-3, abs=1e-6), name
    for name, true in truth.items():
        allowed = 3 * error(plain_gradients[name], true) + 0.02
        assert error(gradients[name], true) < allowed, name
    if memory is not None:
        low, high = SURVIVORS[survivors]
        assert low <= health.summary()["part/survivors"] <= high


def features(rng, pids, noise=1.0):
    """Unit features around one direction an identity."""
    directions = np.random.default_rng(0).standard_normal((pids.max() + 1, 32))
    feats = directions[pids] + noise * rng.standard_normal((len(pids), 32))
    return (feats / np.linalg.norm(feats, axis=1, keepdims=True)).astype(np.float32)


def test_plain_evaluators_equal_ours():
    rng = np.random.default_rng(1)
    q_pids, g_pids = rng.integers(0, 40, 90), np.repeat(np.arange(40), 6)
    q_camids, g_camids = rng.choice([3, 6], 90), np.tile([1, 2, 2, 4, 5, 5], 40)
    distmat = np.round(1 - features(rng, q_pids) @ features(rng, g_pids).T, 2)  # with ties
    for ours, plain in (
        (eval_regdb(distmat, q_pids, g_pids), plain_evaluate(distmat, q_pids, g_pids)),
        (
            eval_sysu(distmat, q_pids, g_pids, q_camids, g_camids),
            plain_evaluate(distmat, q_pids, g_pids, q_camids, g_camids),
        ),
    ):
        np.testing.assert_allclose(ours[0], plain[0], atol=1e-12)
        assert ours[1:] == pytest.approx(plain[1:], abs=1e-12)


@pytest.mark.parametrize("settings", [(20, 6, 0.3), (7, 1, 0.1)])
def test_plain_k_reciprocal_equals_ours(settings):
    rng = np.random.default_rng(2)
    pids = np.repeat(np.arange(12), 8)
    q_feats, g_feats = features(rng, pids), features(rng, pids)
    plain = plain_k_reciprocal(q_feats, g_feats, *settings)
    np.testing.assert_allclose(k_reciprocal(q_feats, g_feats, *settings), plain, atol=1e-5)
