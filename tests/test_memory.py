import math

import numpy as np
import pytest
import torch
from recipe import GOLDEN

from memory import (
    SHRINK,
    MemoryHealth,
    MemoryRead,
    MultiGranularityMemory,
    SingleGranularityMemory,
    _gated_mean,
)
from networks.sparse_read import address, position_sum, read, select

GOLDEN_NAMES = {
    "sg": None,
    "mg_cascade_grouped": "paper",
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
    assert compared == {"sg": 1, "mg_cascade_grouped": 3, "mg_parallel_interleaved": 3}[name]
    total.backward()
    grads = {"x": x.grad, "weight": memory.part_bank.grad}
    if name != "sg":
        for ours, theirs in GATES.items():
            for leaf in ("weight", "bias"):
                grads[f"{theirs}.{leaf}"] = getattr(getattr(memory, ours), leaf).grad
    for key, grad in grads.items():
        expected = torch.tensor(golden[f"{name}/lambda={shrink}/grad.{key}"])
        assert (grad - expected).abs().max() <= 1e-5 * expected.abs().max(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", [None, "paper", "released"])
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])  # from no survivor to few
def test_sums_are_those_of_the_maps_gradients_included(variant, dtype, scale):
    torch.manual_seed(12)
    sizes = {"num_ids": 20, "instances_per_id": 5, "parts_per_instance": 8, "dim": 16}
    if variant is None:
        memory = SingleGranularityMemory(**sizes, shrink=0.005)
    else:
        memory = MultiGranularityMemory(**sizes, shrink=0.005, variant=variant)
    memory.to(dtype)
    with torch.no_grad():
        memory.part_bank.mul_(4)
    x = (scale * torch.randn(3, 16, 4, 2, dtype=dtype)).requires_grad_()
    maps = memory(x)
    sums = {
        level: position_sum(values)
        for level, values in maps._asdict().items()
        if values is not None
    }
    toward = torch.randn(3, 16, dtype=dtype)
    leaves = [x, *memory.parameters()]
    for level, total in sums.items():
        values = getattr(maps, level)
        torch.testing.assert_close(total, values.sum(dim=(2, 3)), rtol=1e-5, atol=1e-5)
        grads = [
            torch.autograd.grad((toward * s).sum(), leaves, retain_graph=True, allow_unused=True)
            for s in (total, values.sum(dim=(2, 3)))
        ]
        for ours, theirs in zip(*grads, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # Both at once, as in a loss on the map beside one on the mean.
    both = torch.autograd.grad(
        (toward * sums["part"]).sum() + maps.part.square().sum(), (x, memory.part_bank)
    )
    maps = memory(x)
    expected = torch.autograd.grad(
        (toward[:, :, None, None] * maps.part).sum() + maps.part.square().sum(),
        (x, memory.part_bank),
    )
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gated_mean_equals_the_plain_one_gradients_included(interleaved, monkeypatch):
    monkeypatch.setattr("memory.GROUPS_PER_CHUNK", 3)
    torch.manual_seed(14)
    gate = torch.nn.Conv1d(4, 4, kernel_size=1).double()
    groups = torch.randn(7, 9, 4, dtype=torch.float64) if interleaved else torch.randn(7, 4, 9)
    groups = groups.double().requires_grad_()
    x = groups.transpose(1, 2) if interleaved else groups
    toward = torch.randn(7, 9, dtype=torch.float64)
    leaves = (groups, gate.weight, gate.bias)
    ours, plain = _gated_mean(gate, x), (torch.sigmoid(gate(x)) * x).mean(dim=1)
    torch.testing.assert_close(ours, plain)
    grads = [torch.autograd.grad((toward * y).sum(), leaves) for y in (ours, plain)]
    torch.testing.assert_close(*grads)


def test_a_scaled_threshold_is_a_share_of_each_bank():
    torch.manual_seed(0)
    memory = MultiGranularityMemory(4, 2, 3, dim=8, shrink_scale=1.5).double()
    instance, semantic = memory.banks()
    for bank, count in ((memory.part_bank, 24), (instance, 8), (semantic, 4)):
        assert len(bank) == count
        assert memory.threshold(bank) == 1.5 / count
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    out = memory(x)
    torch.testing.assert_close(out.part, read(x, memory.part_bank, 1.5 / 24))
    torch.testing.assert_close(out.instance, read(out.part, instance, 1.5 / 8))
    torch.testing.assert_close(out.semantic, read(out.instance, semantic, 1.5 / 4))
    fixed = SingleGranularityMemory(4, 2, 3, dim=8)
    assert fixed.threshold(fixed.part_bank) == SHRINK
    assert SingleGranularityMemory(1, 1, 1, dim=8, shrink_scale=3).threshold(semantic[:1]) == 1.0


def test_a_scale_below_one_never_reads_zero_and_the_fixed_threshold_may():
    """The start of training: uniform weights lie under 0.0025."""
    torch.manual_seed(0)
    settings = {"num_ids": 206, "dim": 16}
    x = torch.randn(1, 16, 3, 3)
    fixed, scaled = MemoryHealth(), MemoryHealth()
    MultiGranularityMemory(**settings)(0.01 * x, fixed)
    MultiGranularityMemory(**settings, shrink_scale=0.5)(0.01 * x, scaled)
    assert fixed.summary()["part/zero_reads"] == 1.0
    assert fixed.summary()["semantic/zero_reads"] == 0.0
    for level in ("part", "instance", "semantic"):
        assert scaled.summary()[f"{level}/zero_reads"] == 0.0


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_gradcheck(variant):
    gen = torch.Generator().manual_seed(4)
    memory = MultiGranularityMemory(2, 2, 3, dim=4, shrink=0.06, variant=variant).double()
    torch.nn.init.normal_(memory.part_bank, generator=gen)
    x = torch.randn(1, 4, 2, 1, generator=gen, dtype=torch.float64, requires_grad=True)

    def outputs(x, *parameters):
        names = [name for name, _ in memory.named_parameters()]
        result = torch.func.functional_call(memory, dict(zip(names, parameters, strict=True)), x)
        return tuple(out for out in result if out is not None)

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


def test_interleaving_mixes_neighbouring_channels_of_one_part():
    memory = MultiGranularityMemory(1, 1, 2, dim=4, variant="released")
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
    assert all(out.shape == x.shape for out in paper)
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


def test_health_counts_what_a_loop_counts():
    gen = torch.Generator().manual_seed(5)
    health = MemoryHealth()
    rows = [torch.randn(20, 6, generator=gen), 0.01 * torch.randn(20, 6, generator=gen)]
    bank = torch.randn(60, 6, generator=gen)
    all_weights = torch.cat([address(x, bank, 0.03) for x in rows])
    for x in rows:
        health.update("part", select(x, bank, 0.03), len(bank))
    numbers = health.summary()
    survivors = [sum(w > 0 for w in row.tolist()) for row in all_weights]
    assert numbers["part/zero_reads"] == sum(s == 0 for s in survivors) / 40 > 0
    assert numbers["part/survivors"] == sum(survivors) / 40
    used = sum(any(w > 0 for w in column.tolist()) for column in all_weights.t())
    assert numbers["part/used"] == pytest.approx(used / 60)
    entropies = [-sum(w * math.log(w) for w in row.tolist() if w > 0) for row in all_weights]
    reading = [e for e, s in zip(entropies, survivors, strict=True) if s]
    assert numbers["part/entropy"] == pytest.approx(sum(reading) / len(reading), rel=1e-5)


def test_health_of_dense_weights_in_half_precision():
    health = MemoryHealth()
    weights = torch.full((5, 206), 1 / 206).bfloat16()
    weights[4] = 0
    health.update("semantic", weights, 206)
    assert health.summary() == pytest.approx(
        {
            "semantic/zero_reads": 0.2,
            "semantic/survivors": 0.8 * 206,
            "semantic/used": 1.0,
            "semantic/entropy": math.log(206),
        }
    )


def test_forward_changes_no_state():
    memory = MultiGranularityMemory(3, 2, 2, dim=8)
    before = set(vars(memory))
    memory(torch.randn(1, 8, 2, 2), MemoryHealth())
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
        ({"variant": "figure"}, "paper, released, got 'figure'"),
    ],
)
def test_illegal_sizes(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiGranularityMemory(**{"num_ids": 3, "dim": 8, **settings})
