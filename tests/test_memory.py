import math

import numpy as np
import pytest
import torch
from recipe import GOLDEN

from memory import (
    SHRINK,
    MemoryRead,
    MultiGranularityMemory,
    SingleGranularityMemory,
    read,
)
from networks.memory_health import MemoryHealth
from networks.settings import VARIANTS
from networks.sparse_read import sparse_read

GOLDEN_NAMES = {
    "sg": None,
    "mg_cascade_grouped": "paper",
    "mg_cascade_interleaved": "first",
    "mg_parallel_interleaved": "released",
}
GATES = {"part_gate": "reweight_layer_part", "instance_gate": "reweight_layer_ins"}


def golden_memory(golden, name, shrink):
    ids, instances, parts, dim = golden["dims_L_T_P_C"]
    variant = GOLDEN_NAMES[name]
    sizes = (int(ids), int(instances), int(parts), int(dim), shrink)
    state = {"part_bank": torch.tensor(golden[f"{name}/param.weight"])}
    if variant is None:
        memory = SingleGranularityMemory(*sizes)
    else:
        memory = MultiGranularityMemory(*sizes, variant=variant)
        for ours, theirs in GATES.items():
            for leaf in ("weight", "bias"):
                state[f"{ours}.{leaf}"] = torch.tensor(golden[f"{name}/param.{theirs}.{leaf}"])
    memory.double().load_state_dict(state)
    return memory


@pytest.mark.parametrize("shrink", ["0.0025", "0.02"])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_agrees_with_the_released_memory(name, shrink):
    golden = np.load(GOLDEN / "memory.npz")
    memory = golden_memory(golden, name, float(shrink))
    x = torch.tensor(golden["input.x"]).requires_grad_()
    result = memory(x)
    total, compared = 0.0, 0
    for level in ("part", "instance", "semantic", "semantic_bank"):
        key = f"{name}/lambda={shrink}/out.{level}"
        if key not in golden:
            continue
        out = memory.banks()[1] if level == "semantic_bank" else getattr(result, level)
        torch.testing.assert_close(out, torch.tensor(golden[key]), rtol=0, atol=1e-7)
        total = total + (torch.tensor(golden[f"weight_of_output.{level}.{name}"]) * out).sum()
        compared += 1
    assert compared == (1 if name == "sg" else 3)
    total.backward()
    grads = {"x": x.grad, "weight": memory.part_bank.grad}
    if name != "sg":
        for ours, theirs in GATES.items():
            for leaf in ("weight", "bias"):
                grads[f"{theirs}.{leaf}"] = getattr(getattr(memory, ours), leaf).grad
    for key, grad in grads.items():
        expected = torch.tensor(golden[f"{name}/lambda={shrink}/grad.{key}"])
        assert (grad - expected).abs().max() <= 1e-5 * expected.abs().max(), key


def naive_read(x, bank, shrink):
    """One position after the other, as the method says it."""
    batch, _, height, width = x.shape
    out = torch.zeros_like(x)
    for b in range(batch):
        for h in range(height):
            for w in range(width):
                scores = bank @ x[b, :, h, w]
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                kept = [i for i in range(len(bank)) if weights[i] > shrink]
                if kept:
                    total = sum(weights[i] for i in kept)
                    out[b, :, h, w] = sum(weights[i] / total * bank[i] for i in kept)
    return out


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("shrink", [0.0, 0.02, 0.05, 0.5, 0.999])
def test_read_equals_a_loop_over_positions(scale, shrink):
    gen = torch.Generator().manual_seed(1)
    x = scale * torch.randn(2, 7, 3, 2, generator=gen, dtype=torch.float64)
    bank = torch.randn(30, 7, generator=gen, dtype=torch.float64)
    values, weights = read(x, bank, shrink)
    torch.testing.assert_close(values, naive_read(x, bank, shrink), atol=1e-7, rtol=0)
    assert weights.shape == (12, 30)
    assert ((weights.sum(1) - 1).abs().lt(1e-9) | (weights.sum(1) == 0)).all()
    if shrink:
        assert ((weights > 0).sum(1) <= 1 / shrink).all()


def test_uniform_weights_under_the_threshold_read_zero_and_back_propagate():
    bank = torch.zeros(401, 4, requires_grad=True)  # uniform weight 1/401 < 0.0025
    x = torch.ones(2, 4, 1, 1, requires_grad=True)
    out, _ = read(x, bank, 0.0025)
    assert not out.any()
    out.sum().backward()
    assert not x.grad.any()
    assert not bank.grad.any()
    assert read(x, torch.ones(399, 4), 0.0025)[0].allclose(torch.tensor(1.0))  # 1/399 is above


def test_the_threshold_itself_does_not_survive():
    x = torch.zeros(1, 4, 1, 1)
    assert not read(x, torch.ones(4, 4), 0.25)[0].any()
    assert read(x, torch.ones(4, 4), 0.2499)[0].all()


@pytest.mark.parametrize("common", [0.0, 20.0])
def test_a_part_common_to_all_prototypes_stays_out_of_half_precision(common):
    gen = torch.Generator().manual_seed(22)
    x = (0.05 * torch.randn(1, 256, 8, 4, generator=gen)).requires_grad_()
    bank = (torch.randn(100, 256, generator=gen) + common).requires_grad_()
    toward = torch.randn(1, 256, 8, 4, generator=gen)
    exact = read(x, bank, 0.005)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = read(x, bank, 0.005)[0]
    results = [
        (out, *torch.autograd.grad((toward * out).sum(), (x, bank))) for out in (ours, exact)
    ]
    for near, true in zip(*results, strict=True):
        assert (near - true).norm() < 0.05 * true.norm()


def test_whole_map_equals_stripe_by_stripe():
    gen = torch.Generator().manual_seed(3)
    memory = SingleGranularityMemory(4, 2, 3, dim=8, shrink=0.03)
    x = torch.randn(2, 8, 6, 3, generator=gen)
    stripes = [memory(part).part for part in x.split(2, dim=2)]
    torch.testing.assert_close(memory(x).part, torch.cat(stripes, dim=2))


def test_a_scaled_threshold_is_a_share_of_each_bank():
    torch.manual_seed(0)
    memory = MultiGranularityMemory(4, 2, 3, dim=8, shrink_scale=1.5).double()
    instance, semantic = memory.banks()
    for bank, count in ((memory.part_bank, 24), (instance, 8), (semantic, 4)):
        assert len(bank) == count
        assert memory.threshold("part", len(bank)) == 1.5 / count
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    out = memory(x)
    torch.testing.assert_close(out.part, read(x, memory.part_bank, 1.5 / 24)[0])
    torch.testing.assert_close(out.instance, read(out.part, instance, 1.5 / 8)[0])
    torch.testing.assert_close(out.semantic, read(out.instance, semantic, 1.5 / 4)[0])
    fixed = SingleGranularityMemory(4, 2, 3, dim=8)
    assert fixed.threshold("part", 24) == SHRINK
    assert SingleGranularityMemory(1, 1, 1, dim=8, shrink_scale=3).threshold("part", 1) == 1.0


def test_a_scale_below_one_never_reads_zero_and_the_fixed_threshold_may():
    """The start of training: uniform weights lie under 0.0025."""
    torch.manual_seed(0)
    settings = {"num_ids": 206, "dim": 16}
    x = torch.randn(1, 16, 3, 3)
    fixed, scaled = MemoryHealth(), MemoryHealth()
    fixed.update(MultiGranularityMemory(**settings)(0.01 * x).weights)
    scaled.update(MultiGranularityMemory(**settings, shrink_scale=0.5)(0.01 * x).weights)
    assert fixed.summary()["part/zero_reads"] == 1.0
    assert fixed.summary()["semantic/zero_reads"] == 0.0
    for level in ("part", "instance", "semantic"):
        assert scaled.summary()[f"{level}/zero_reads"] == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    gen = torch.Generator().manual_seed(4)
    memory = MultiGranularityMemory(2, 2, 3, dim=4, shrink=0.06, variant=variant).double()
    torch.nn.init.normal_(memory.part_bank, generator=gen)
    x = torch.randn(1, 4, 2, 1, generator=gen, dtype=torch.float64, requires_grad=True)

    def outputs(x, *parameters):
        names = [name for name, _ in memory.named_parameters()]
        result = torch.func.functional_call(memory, dict(zip(names, parameters, strict=True)), x)
        return tuple(out for out in result[:3] if out is not None)

    parameters = [p.detach().clone().requires_grad_() for p in memory.parameters()]
    assert torch.autograd.gradcheck(outputs, (x, *parameters))


def test_banks_by_hand():
    memory = MultiGranularityMemory(2, 2, 3, dim=4).double()
    instance, semantic = memory.banks()
    bank = memory.part_bank.detach().numpy()
    gate = memory.part_gate
    weight, bias = gate.weight.detach().numpy()[:, :, 0], gate.bias.detach().numpy()
    for i in range(4):
        parts = bank[3 * i : 3 * i + 3]
        expected = np.mean(parts / (1 + np.exp(-(weight @ parts + bias[:, None]))), axis=0)
        np.testing.assert_allclose(instance.detach().numpy()[i], expected, atol=1e-12)
    gate = memory.instance_gate
    weight, bias = gate.weight.detach().numpy()[:, :, 0], gate.bias.detach().numpy()
    for i in range(2):
        own = instance.detach().numpy()[2 * i : 2 * i + 2]
        expected = np.mean(own / (1 + np.exp(-(weight @ own + bias[:, None]))), axis=0)
        np.testing.assert_allclose(semantic.detach().numpy()[i], expected, atol=1e-12)


@pytest.mark.parametrize("variant", ["first", "released"])
def test_interleaving_mixes_neighbouring_channels_of_one_part(variant):
    memory = MultiGranularityMemory(1, 1, 2, dim=4, variant=variant)
    torch.nn.init.zeros_(memory.part_gate.weight)
    torch.nn.init.zeros_(memory.part_gate.bias)  # every gate is one half
    with torch.no_grad():
        memory.part_bank.copy_(torch.arange(8.0).view(2, 4))
    instance, _ = memory.banks()
    # The flat memory 0..7 seen as pairs (0, 1), (2, 3), ...: each pair's mean, halved by the gate.
    torch.testing.assert_close(instance, torch.tensor([[0.25, 1.25, 2.25, 3.25]]))


def test_variants_return_the_maps_they_promise():
    x = torch.randn(2, 8, 3, 2)
    paper = MultiGranularityMemory(3, 2, 2, dim=8)(x)
    released = MultiGranularityMemory(3, 2, 2, dim=8, variant="released")(x)
    single = SingleGranularityMemory(3, 2, 2, dim=8)(x)
    first = MultiGranularityMemory(3, 2, 2, dim=8, variant="first")(x)
    assert all(out.shape == x.shape for out in (*paper[:3], *first[:3]))
    assert list(paper.weights) == list(MultiGranularityMemory(3, dim=8).levels)
    assert list(released.weights) == ["part", "semantic"]
    assert (paper.coarsest(), single.coarsest()) == (paper.semantic, single.part)
    assert isinstance(single, MemoryRead)
    assert (released.instance, single.instance, single.semantic) == (None, None, None)


def test_an_all_zero_part_read_makes_the_semantic_read_one_constant_vector():
    memory = MultiGranularityMemory(100, 5, 6, dim=16)  # every softmax weight is below lambda
    torch.nn.init.normal_(memory.part_bank, std=1e-3)
    result = memory(torch.randn(2, 16, 2, 2))
    assert not result.part.any()
    constant = result.semantic[:1, :, :1, :1].expand_as(result.semantic)
    assert result.semantic.any()
    torch.testing.assert_close(result.semantic, constant)


@pytest.mark.parametrize("sparse", [False, True])
def test_health_counts_what_a_loop_counts(sparse):
    gen = torch.Generator().manual_seed(5)
    health = MemoryHealth()
    rows = [torch.randn(20, 6, generator=gen), 0.01 * torch.randn(20, 6, generator=gen)]
    bank = torch.randn(60, 6, generator=gen)
    per_batch = []
    for x in rows:
        if sparse:
            weights = sparse_read(x, bank, bank, 0.03)[1]
        else:
            weights = read(x[:, :, None, None], bank, 0.03)[1]
        health.update({"part": weights})
        per_batch.append(weights.to_dense())
    all_weights = torch.cat(per_batch)
    numbers = health.summary()
    survivors = [sum(w > 0 for w in row.tolist()) for row in all_weights]
    assert numbers["part/zero_reads"] == sum(s == 0 for s in survivors) / 40 > 0
    assert numbers["part/survivors"] == sum(survivors) / 40
    used = sum(any(w > 0 for w in column.tolist()) for column in all_weights.t())
    assert numbers["part/used"] == pytest.approx(used / 60)
    entropies = [-sum(w * math.log(w) for w in row.tolist() if w > 0) for row in all_weights]
    reading = [e for e, s in zip(entropies, survivors, strict=True) if s]
    assert numbers["part/entropy"] == pytest.approx(sum(reading) / len(reading), rel=1e-5)


def test_a_threshold_of_ones_own_for_each_level():
    class PerLevel(MultiGranularityMemory):
        def threshold(self, level, num_prototypes):
            return {"part": 0.5, "instance": 0.1, "semantic": 0.0}[level]

    torch.manual_seed(1)
    memory, x = PerLevel(4, 2, 3, dim=8), torch.randn(1, 8, 2, 2)
    out = memory(x)
    assert not out.part.any()  # uniform weights are 1/24
    torch.testing.assert_close(out.instance, read(out.part, memory.banks()[0], 0.1)[0])


def test_forward_changes_no_state():
    memory = MultiGranularityMemory(3, 2, 2, dim=8)
    before = set(vars(memory))
    memory(torch.randn(1, 8, 2, 2))
    assert set(vars(memory)) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_ids": 0}, "num_ids must be at least 1, got 0"),
        ({"instances_per_id": 0}, "instances_per_id"),
        ({"parts_per_instance": -1}, "parts_per_instance"),
        ({"dim": 0}, "dim"),
        ({"shrink": 1.0}, r"shrink must be in \[0, 1\), got 1.0"),
        ({"shrink": -0.1}, "shrink"),
        ({"variant": "figure"}, "paper, first, released, got 'figure'"),
    ],
)
def test_illegal_sizes(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiGranularityMemory(**{"num_ids": 3, "dim": 8, **settings})


def test_cosine_addressing_is_a_softmax_of_cosines_and_reads_the_prototypes_themselves():
    gen = torch.Generator().manual_seed(12)
    x = torch.randn(2, 8, 3, 2, generator=gen, dtype=torch.float64)
    bank = 5 * torch.rand(30, 8, generator=gen, dtype=torch.float64)
    values, weights = read(x, bank, 3 / 30, temperature=0.1)
    for b, row, column in np.ndindex(2, 3, 2):
        query = x[b, :, row, column]
        cosines = [float(query @ p / (query.norm() * p.norm())) for p in bank]
        alpha = np.exp(np.array(cosines) / 0.1)
        alpha = np.where(alpha / alpha.sum() > 0.1, alpha, 0)
        alpha = torch.tensor(alpha / alpha.sum())
        torch.testing.assert_close(values[b, :, row, column], alpha @ bank)
        torch.testing.assert_close(weights[6 * b + 2 * row + column], alpha)
    again, _ = read(100 * x, bank, 3 / 30, temperature=0.1)  # a query's norm is of no account
    torch.testing.assert_close(again, values)
    assert not read(0 * x, bank, 3 / 30, temperature=0.1)[0].any()  # uniform weights: none passes


def test_cosine_addressing_reads_selectively_at_every_level_of_an_untrained_memory():
    gen = torch.Generator().manual_seed(13)
    torch.manual_seed(13)
    memory = MultiGranularityMemory(40, 5, 6, 64, shrink_scale=3.0, temperature=0.02)
    weights = memory(torch.rand(1, 64, 6, 3, generator=gen)).weights
    for level, own in weights.items():
        dense = own.to_dense()
        survivors = (dense > 0).sum(dim=1).float()
        assert (survivors > 0).all(), level
        assert survivors.mean() < dense.shape[1] / 4, level


@pytest.mark.parametrize("amp", [False, True])
def test_large_plain_reads_are_computed_again_for_the_gradient(amp, monkeypatch):
    gen = torch.Generator().manual_seed(31)
    x = torch.randn(2, 16, 4, 3, generator=gen, requires_grad=True)
    bank = torch.randn(50, 16, generator=gen, requires_grad=True)
    toward = torch.randn(2, 16, 4, 3, generator=gen)
    results, kept = [], []
    for limit in (1200, 1199):  # 24 positions x 50 prototypes
        monkeypatch.setattr("memory.RECOMPUTED_ENTRIES", limit)
        saved = []

        def keep(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            values, weights = read(x, bank, 0.002)
        kept.append(sum(t.numel() for t in saved if t.shape == (24, 50)))
        results.append((values, weights, *torch.autograd.grad((toward * values).sum(), (x, bank))))
    assert kept[0] > kept[1] == 0
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
