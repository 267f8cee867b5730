"""CPU against CUDA, in float32 and bf16: run on a machine with a GPU by ``pytest -m gpu``."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.first_run import no_synchronisation
from benchmarks.plain import PlainNet, plain_training_step, term_weights
from data_loader import IdentitySampler, ImageStore, TrainLoader
from datasets.transforms import Augmentation
from engine.evaluate import embed
from engine.train import feature_spread, make_optimizer, set_learning_rate, training_step
from loss import Criterion
from memory import plain_read, read
from model import TwoStreamNet
from networks.layers import gem
from networks.memory_health import MemoryHealth
from networks.sparse_read import sparse_read

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IDS = 150  # 4500 parts: of them few survive


@pytest.fixture(autouse=True)
def full_precision():
    """float32 products in float32, not in the card's shorter TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def relative(ours, truth):
    """Error in the norm."""
    ours, truth = ours.detach().double().cpu(), truth.detach().double().cpu()
    return ((ours - truth).norm() / truth.norm().clamp_min(1e-6)).item()


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("ids", [100, 900, 4500])
def test_read_and_its_gradients(ids, scale):
    """From no survivor to few; on the CPU large banks take the sparse form."""
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.randn(4, 32, 6, 3, generator=generator)
    bank = torch.randn(ids, 32, generator=generator)
    toward = torch.randn(4, 32, 6, 3, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        inputs = [t.to(device).requires_grad_() for t in (x, bank)]
        out, weights = read(*inputs, 0.0025)
        health = MemoryHealth()
        health.update({"part": weights})
        gradients = torch.autograd.grad((out * toward.to(device)).sum(), inputs)
        results.append(((out, *gradients), health.summary()))
    (expected, counted), (ours, counted_there) = results
    assert counted_there == pytest.approx(counted, rel=1e-3, abs=1e-3)
    for a, b in zip(ours, expected, strict=True):
        assert relative(a, b) < 1e-3


@pytest.mark.parametrize("p", [3.0, 6.5, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gem_and_its_gradient(p, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 8, 3, 4, generator=generator).relu().to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        images = x.to(device).requires_grad_()
        out = gem(images, p, (2, 3))
        results.append((out, *torch.autograd.grad(out.square().sum(), images)))
    for ours, expected in zip(results[1], results[0], strict=True):
        assert relative(ours, expected) < (1e-5 if dtype == torch.float32 else 1e-2)


def step(device, memory, amp=None, plain=False, optim="sgd", **settings):
    """Terms and gradients of one step from the same weights on the same images."""
    torch.manual_seed(0)
    net = TwoStreamNet(IDS, memory=memory, **{"arch": "resnet18", **settings}).train()
    if net.memory is not None:
        with torch.no_grad():
            net.memory.part_bank.mul_(3)
    images = {
        "visible": torch.randn(8, 3, 96, 48).to(device),
        "infrared": torch.randn(8, 3, 96, 48).to(device),
        "labels": torch.tensor([3, 1, 149, 7], device=device).repeat_interleave(2).repeat(2),
    }
    weights = term_weights(net)
    if settings.get("memory_levels") == "none":
        del weights["alignment"]
    how = {"order": [4, 0, 5, 2, 1, 3], "weights": weights}
    if plain:
        net = PlainNet(net).to(device)
        terms = plain_training_step(net, make_optimizer(net), **images, **how)
        return terms, net.gradients()
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(net, optim)
    set_learning_rate(optimizer, 0.01)
    criterion = Criterion(weights, head=net.head, images_per_id=2)
    scaler = torch.amp.GradScaler(device, enabled=amp == torch.float16, init_scale=256.0)
    batch = SimpleNamespace(**images)
    health = MemoryHealth()
    terms, _ = training_step(
        net, criterion, optimizer, batch, amp=amp, scaler=scaler, health=health, **how
    )
    assert all(math.isfinite(value) for value in health.summary().values())
    return terms, {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("memory", [None, "sg", "mg"])
@pytest.mark.parametrize("plain", [False, True])
def test_float32_step(memory, plain):
    expected_terms, expected = step("cpu", memory)
    terms, gradients = step("cuda", memory, plain=plain)
    for name, term in expected_terms.items():
        assert terms[name].item() == pytest.approx(term.item(), rel=1e-3, abs=1e-5), name
    for name, truth in expected.items():
        if truth is not None and truth.norm() > 1e-4:
            # An untrained network's ReLUs switch on rounding errors.
            assert relative(gradients[name], truth) < 0.05, name


@pytest.mark.parametrize("memory", [None, "sg", "mg"])
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_half_precision_step(memory, amp):
    expected_terms, expected = step("cpu", memory)
    terms, gradients = step("cuda", memory, amp)
    for name, term in expected_terms.items():
        # The triplets of few rows hang on single distances.
        error = 0.1 if "triplet" in name else 0.02
        assert terms[name].item() == pytest.approx(term.item(), rel=0.05, abs=error), name
    assert gradients.keys() == expected.keys()
    assert all(g is None or g.isfinite().all() for g in gradients.values())
    assert relative(gradients["part_classifier.weight"], expected["part_classifier.weight"]) < 0.1


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("memory", "settings"),
    [
        (None, {"head": "agw"}),
        (None, {"head": "global"}),
        ("mg", {"head": "agw"}),
        ("mg", {"memory_variant": "first"}),
        ("mg", {"memory_variant": "released"}),
        ("mg", {"memory_levels": "part"}),
        ("mg", {"memory_levels": "none"}),
        ("mg", {"shrink_scale": 3.0, "temperature": 0.05}),
        ("mg", {"arch": "resnet50"}),
        ("mg", {"optim": "adam"}),
    ],
)
def test_every_configuration_takes_a_step(memory, settings, amp):
    expected, _ = step("cpu", memory, **settings)
    terms, gradients = step("cuda", memory, amp, **settings)
    for name, term in expected.items():
        tolerance = {"rel": 1e-3, "abs": 1e-4} if amp is None else {"rel": 0.1, "abs": 0.05}
        assert terms[name].item() == pytest.approx(term.item(), **tolerance), name
    assert all(g is None or g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [None, "sg", "mg"])
def test_a_step_waits_for_nothing(memory, amp):
    """Three steps, all that an epoch does in each of them but the late look at the losses."""
    net = TwoStreamNet(206, memory=memory, arch="resnet18").train()
    net = net.to("cuda", memory_format=torch.channels_last)
    optimizer, weights, health = make_optimizer(net), term_weights(net), MemoryHealth()
    criterion = Criterion(weights, images_per_id=2)
    labels = torch.arange(4, device="cuda").repeat_interleave(2).repeat(2)
    images = [torch.randn(8, 3, 96, 48, device="cuda") for _ in range(2)]
    batch = SimpleNamespace(visible=images[0], infrared=images[1], labels=labels)
    scaler = torch.amp.GradScaler("cuda", enabled=amp == torch.float16)
    how = {"order": [4, 0, 5, 2, 1, 3], "weights": weights, "amp": amp, "scaler": scaler}
    how["health"] = health

    def one_step():
        _, feat = training_step(net, criterion, optimizer, batch, **how)
        feature_spread(feat)

    one_step()  # cuDNN and cuBLAS start up
    with no_synchronisation(torch.device("cuda")):
        for _ in range(3):
            one_step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 5.0])
def test_the_fast_read_is_the_plain_one(scale, dtype):
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(n, 64, generator=generator) for n in (500, 6000, 6000)]
    inputs = [x.to("cuda") * s for x, s in zip(inputs, (scale, 1, 1), strict=True)]
    toward = torch.randn(500, 64, generator=generator).to("cuda")
    inputs = [x.requires_grad_() for x in inputs]
    results = []
    for form in (plain_read, functools.partial(sparse_read, bounded=True)):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            values, weights = form(*inputs, 0.0025)
        gradients = torch.autograd.grad((values * toward).sum(), inputs)
        results.append((weights.to_dense(), values, *gradients))
    same = (results[0][0] > 0) == (results[1][0] > 0)  # but for weights at the threshold itself
    assert same.float().mean() > 0.9999
    for plain, fast in zip(*results, strict=True):
        assert relative(fast, plain) < (1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_features(amp):
    torch.manual_seed(0)
    net = TwoStreamNet(10, memory="mg", arch="resnet18")
    images = torch.randn(6, 3, 96, 48)
    feats = [
        embed(
            net.to(device),
            [images.to(device)],
            "visible",
            ("pcb", "memory"),
            amp=amp if device == "cuda" else None,
        )
        for device in ("cpu", "cuda")
    ]
    for name, expected in feats[0].items():
        cosine = (expected * feats[1][name]).sum(axis=1)
        assert cosine.min() > (0.99 if amp is not None else 0.99999), name


@pytest.mark.parametrize("resident", ["on", "off"])
def test_batches_are_the_cpu_s(resident):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 24, 12, 3), dtype=np.uint8)
    labels = np.arange(40) % 8
    epochs = []
    for device in ("cpu", "cuda"):
        device = torch.device(device)
        loader = TrainLoader(
            visible=ImageStore(images, device, resident=resident),
            infrared=ImageStore(images[::-1].copy(), device, resident=resident),
            sampler=IdentitySampler(labels, labels, ids_per_batch=4, images_per_id=2, seed=0),
            augmentation=Augmentation(pad=2, grey=0.5, erase=0.5),
        )
        epochs.append(list(loader.epoch(1)))
    for expected, ours in zip(*epochs, strict=True):
        assert torch.equal(ours.labels.cpu(), expected.labels)
        torch.testing.assert_close(ours.visible.cpu(), expected.visible)
        torch.testing.assert_close(ours.infrared.cpu(), expected.infrared)
