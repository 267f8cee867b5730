"""Tests of addressing.py: the read against loops, its routes against one another."""

import math

import pytest
import torch

from memory import MemoryHealth, MultiGranularityMemory, SingleGranularityMemory
from networks.sparse_read import (
    Survivors,
    _DenseRead,
    _image_sums,
    address,
    position_sum,
    read,
    select,
    sparse_read,
)


def naive_read(x, bank, shrink):
    """One position after the other, as the method says it."""
    batch, _, height, width = x.shape
    out = torch.zeros_like(x)
    for b in range(batch):
        for h in range(height):
            for w in range(width):
                logits = bank @ x[b, :, h, w]
                weights = torch.exp(logits - logits.max())
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
    torch.testing.assert_close(
        read(x, bank, shrink), naive_read(x, bank, shrink), atol=1e-7, rtol=0
    )


def test_address_is_a_softmax_over_the_survivors_alone():
    gen = torch.Generator().manual_seed(2)
    x = torch.randn(50, 8, generator=gen, dtype=torch.float64)
    bank = torch.randn(40, 8, generator=gen, dtype=torch.float64)
    logits = x @ bank.t()
    full = logits.softmax(1)
    assert ((full - 0.02).abs() > 1e-5).all(), "no weight so near the threshold that epsilon shows"
    expected = logits.masked_fill(full <= 0.02, -math.inf).softmax(1)
    weights = address(x, bank, 0.02)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    assert ((weights > 0).sum(1) <= 1 / 0.02).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(50, dtype=torch.float64))


def test_uniform_weights_under_the_threshold_read_zero_and_back_propagate():
    bank = torch.zeros(401, 4, requires_grad=True)  # uniform weight 1/401 < 0.0025
    x = torch.ones(2, 4, 1, 1, requires_grad=True)
    out = read(x, bank, 0.0025)
    assert not out.any()
    out.sum().backward()
    assert not x.grad.any()
    assert not bank.grad.any()
    assert read(x, torch.ones(399, 4), 0.0025).allclose(torch.tensor(1.0))  # 1/399 is above


def test_the_threshold_itself_does_not_survive():
    x = torch.zeros(1, 4, 1, 1)
    assert not read(x, torch.ones(4, 4), 0.25).any()
    assert read(x, torch.ones(4, 4), 0.2499).all()


def masked_softmax_read(x, bank, shrink):
    """Softmax over the survivors by masking, without the releases' epsilon; who survives."""
    logits = x @ bank.t()
    survive = logits.softmax(1) > shrink
    none = ~survive.any(1, keepdim=True)
    weights = logits.masked_fill(~survive & ~none, -math.inf).softmax(1)
    return weights.masked_fill(none, 0) @ bank, survive


@pytest.mark.parametrize("scale", [0.0, 0.02, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("shrink", [0.0, 0.002, 0.01, 0.1, 0.9])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_sparse_read_equals_the_dense_one_gradients_included(scale, shrink, chunk, monkeypatch):
    """From no survivor (uniform weights are 1/150) to all of them."""
    monkeypatch.setattr("networks.sparse_read.MIN_QUERIES_PER_CHUNK", 1)
    monkeypatch.setattr("networks.sparse_read.CHUNK_ENTRIES", chunk * 150)
    monkeypatch.setattr("networks.sparse_read.BAGS_PER_CHUNK", chunk)
    gen = torch.Generator().manual_seed(6)
    x = (scale * torch.randn(40, 9, generator=gen, dtype=torch.float64)).requires_grad_()
    bank = torch.randn(150, 9, generator=gen, dtype=torch.float64).requires_grad_()
    toward = torch.randn(40, 9, generator=gen, dtype=torch.float64)
    dense, survive = masked_softmax_read(x, bank, shrink)
    expected = torch.autograd.grad((toward * dense).sum(), (x, bank))
    survivors = select(x, bank, shrink)
    assert torch.equal(survivors.offsets.diff(), survive.sum(1))
    sparse, _ = sparse_read(x, bank, survivors)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad((toward * sparse).sum(), (x, bank)), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shrink", [0.005, 0.05])
def test_zero_queries_are_skipped_only_where_they_read_nothing(shrink, monkeypatch):
    """Uniform weights are 1/150."""
    monkeypatch.setattr("networks.sparse_read.MIN_QUERIES_PER_CHUNK", 1)
    monkeypatch.setattr("networks.sparse_read.CHUNK_ENTRIES", 7 * 150)
    gen = torch.Generator().manual_seed(10)
    x = torch.randn(40, 9, generator=gen, dtype=torch.float64)
    x[::3] = 0
    x[14:21] = 0  # a whole chunk
    bank = torch.randn(150, 9, generator=gen, dtype=torch.float64)
    dense, survive = masked_softmax_read(x, bank, shrink)
    assert survive[0].any() == (shrink < 1 / 150)
    survivors = select(x, bank, shrink)
    assert torch.equal(survivors.offsets.diff(), survive.sum(1))
    torch.testing.assert_close(sparse_read(x, bank, survivors)[0], dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shrink", [0.008, 0.05, 0.9])
def test_queries_too_short_to_reach_any_prototype_are_left_out(shrink, monkeypatch):
    """Rows of all lengths; uniform weights are 1/150."""
    gen = torch.Generator().manual_seed(11)
    x = torch.randn(300, 9, generator=gen, dtype=torch.float64)
    x *= torch.logspace(-3, 1, 300, dtype=torch.float64)[:, None]
    bank = torch.randn(150, 9, generator=gen, dtype=torch.float64)
    expected = select(x, bank, shrink)
    _, survive = masked_softmax_read(x, bank, shrink)
    assert torch.equal(expected.offsets.diff(), survive.sum(1))
    monkeypatch.setattr("networks.sparse_read.BOUND_FACTOR", math.inf)  # leaves out no row at all
    for ours, theirs in zip(select(x, bank, shrink), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_changed_map_is_summed_as_it_is():
    """Whoever changes a read finds the change in its sum."""
    gen = torch.Generator().manual_seed(15)
    values = read(torch.randn(2, 6, 3, 4, generator=gen), torch.randn(20, 6, generator=gen), 0.01)
    before = position_sum(values)
    torch.testing.assert_close(position_sum(2 * values), 2 * before)
    values.mul_(3)
    torch.testing.assert_close(position_sum(values), 3 * before)


@pytest.mark.parametrize("shrink", [0.0, 0.03, 0.3])
def test_a_constant_map_is_read_once_and_counted_in_full(shrink):
    gen = torch.Generator().manual_seed(13)
    vector = torch.randn(1, 6, 1, 1, generator=gen, requires_grad=True)
    bank = torch.randn(20, 6, generator=gen, requires_grad=True)
    toward = torch.randn(2, 6, 3, 4, generator=gen)
    results = []
    for x in (vector.expand(2, 6, 3, 4), vector.repeat(2, 1, 3, 4)):
        health = MemoryHealth()
        values = read(x, bank, shrink, level="part", health=health)
        grads = torch.autograd.grad((toward * values).sum(), (vector, bank))
        results.append((values, *grads, health.summary()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert results[0][0].stride()[0] == 0


def test_sparse_gradcheck():
    gen = torch.Generator().manual_seed(7)
    x = torch.randn(5, 4, generator=gen, dtype=torch.float64, requires_grad=True)
    bank = torch.randn(12, 4, generator=gen, dtype=torch.float64, requires_grad=True)
    call = lambda x, bank: sparse_read(x, bank, select(x, bank, 0.08))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, bank))


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
def test_float32_read_takes_the_sparse_route_and_agrees(scale, monkeypatch):
    gen = torch.Generator().manual_seed(8)
    x = scale * torch.randn(2, 16, 4, 3, generator=gen)
    bank = torch.randn(900, 16, generator=gen)
    expected = read(x.double(), bank.double(), 0.0025)
    torch.testing.assert_close(read(x, bank, 0.0025).double(), expected, rtol=1e-3, atol=1e-4)
    called = []
    monkeypatch.setattr("networks.sparse_read.DENSE_SHARE", 1.0)
    monkeypatch.setattr("networks.sparse_read.address", lambda *_: called.append(1))
    torch.testing.assert_close(read(x, bank, 0.0025).double(), expected, rtol=1e-3, atol=1e-4)
    assert not called


@pytest.mark.parametrize("scale", [0.0, 0.02, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("shrink", [0.0, 0.002, 0.01, 0.1, 0.9])
@pytest.mark.parametrize("toward", ["map", "sums", "both"])
def test_whole_products_equal_masking_gradients_included(scale, shrink, toward):
    """From no survivor (uniform weights are 1/150) to all of them."""
    gen = torch.Generator().manual_seed(16)
    x = (scale * torch.randn(40, 9, generator=gen, dtype=torch.float64)).requires_grad_()
    bank = torch.randn(150, 9, generator=gen, dtype=torch.float64).requires_grad_()
    toward_map = torch.randn(40, 9, generator=gen, dtype=torch.float64) * (toward != "sums")
    toward_sums = torch.randn(5, 9, generator=gen, dtype=torch.float64) * (toward != "map")
    expected, survive = masked_softmax_read(x, bank, shrink)
    expected = expected, _image_sums(expected, 5)
    values, sums, weights = _DenseRead.apply(x, bank, shrink, 5, torch.float64)
    torch.testing.assert_close((values, sums), expected, rtol=0, atol=1e-12)
    assert torch.equal(weights > 0, survive)
    grads = []
    for value, total in ((values, sums), expected):
        losses = {"map": (toward_map * value).sum(), "sums": (toward_sums * total).sum()}
        loss = losses.get(toward, sum(losses.values()))
        grads.append(torch.autograd.grad(loss, (x, bank)))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("needed", [0, 1])
def test_whole_products_give_the_gradients_asked_for(needed):
    gen = torch.Generator().manual_seed(17)
    inputs = [torch.randn(n, 4, generator=gen, dtype=torch.float64) for n in (6, 12)]
    inputs[needed].requires_grad_()
    call = lambda *inputs: _DenseRead.apply(*inputs, 0.08, 2, torch.float64)[:2]  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)


@pytest.fixture()
def elsewhere(monkeypatch):
    """What runs on devices other than the CPU, run on it."""
    monkeypatch.setattr("networks.sparse_read.ON_CPU", ())


@pytest.mark.parametrize("variant", [None, "paper", "released"])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("entries", [1 << 27, 1 << 12])
def test_every_device_reads_the_same(variant, scale, entries, elsewhere, monkeypatch):
    """Maps, gradients and health numbers, from no survivor to few, in one chunk and in several."""
    monkeypatch.setattr("networks.sparse_read.MIN_QUERIES_PER_CHUNK", 1)
    monkeypatch.setattr("networks.sparse_read.DENSE_ENTRIES", entries)
    torch.manual_seed(18)
    sizes = {"num_ids": 90, "instances_per_id": 5, "parts_per_instance": 4, "dim": 16}
    memory = SingleGranularityMemory(**sizes)
    if variant is not None:
        memory = MultiGranularityMemory(**sizes, variant=variant)
    with torch.no_grad():
        memory.part_bank.mul_(4)
    x = (scale * torch.randn(3, 16, 4, 2)).requires_grad_()
    toward = torch.randn(3, 16, 4, 2)
    results = []
    for on_cpu in ((), ("cpu",)):
        monkeypatch.setattr("networks.sparse_read.ON_CPU", on_cpu)
        health = MemoryHealth()
        maps = [m for m in memory(x, health) if m is not None]
        loss = sum((toward * m).sum() + position_sum(m).square().sum() for m in maps)
        grads = torch.autograd.grad(loss, [x, *memory.parameters()])
        results.append((maps, grads, health.summary()))
    (ours, our_grads, counted), (maps, grads, expected) = results
    torch.testing.assert_close(ours, maps, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(our_grads, grads, rtol=1e-3, atol=1e-4)
    assert counted == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_other_devices_read_in_half_precision_under_autocast(elsewhere):
    gen = torch.Generator().manual_seed(19)
    x = torch.randn(2, 16, 4, 3, generator=gen, requires_grad=True)
    bank = torch.randn(900, 16, generator=gen, requires_grad=True)
    toward = torch.randn(2, 16, 4, 3, generator=gen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = read(x, bank, 0.0025)
    assert out.dtype == torch.bfloat16
    assert position_sum(out).dtype == torch.float32
    grads = torch.autograd.grad((toward * out).sum() + position_sum(out).sum(), (x, bank))
    exact = read(x, bank, 0.0025)
    expected = torch.autograd.grad((toward * exact).sum() + position_sum(exact).sum(), (x, bank))
    for ours, theirs in zip((out, *grads), (exact, *expected), strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("common", [0.0, 20.0])
def test_a_part_common_to_all_prototypes_cancels_in_half_precision(common):
    """What is read shifts by it, and no derivative but by what the scores lose."""
    gen = torch.Generator().manual_seed(22)
    x = (0.02 * torch.randn(64, 512, generator=gen)).bfloat16()
    bank = (torch.randn(200, 512, generator=gen) + common).bfloat16().float()
    above = torch.randn(64, 512, generator=gen).bfloat16().float()
    survivors = select(x.double(), bank.double(), 0.0)
    results = []
    for queries in (x, x.double()):
        queries.requires_grad_()
        weights = survivors._replace(weights=survivors.weights.float())
        prototypes = bank
        if queries.dtype == torch.float64:
            weights, prototypes = survivors, bank.double()
        values = sparse_read(queries, prototypes, weights)[0]
        results.append(torch.autograd.grad((above * values).sum(), queries)[0])
    assert (results[0] - results[1]).norm() < 0.01 * results[1].norm()
    dense = _DenseRead.apply(x, bank, 0.0, 1, torch.bfloat16)[0]
    (ours,) = torch.autograd.grad((above * dense).sum(), x)
    assert (ours - results[1]).norm() < (0.02, 0.6)[common > 0] * results[1].norm()


@pytest.mark.parametrize("entries", [1 << 29, 0])
def test_second_derivatives_are_refused(entries, elsewhere, monkeypatch):
    monkeypatch.setattr("networks.sparse_read.DENSE_ENTRIES", entries)
    gen = torch.Generator().manual_seed(23)
    x = torch.randn(1, 16, 4, 3, generator=gen, requires_grad=True)
    out = read(x, torch.randn(900, 16, generator=gen), 0.0025)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_sparse_form_of_dense_weights():
    gen = torch.Generator().manual_seed(20)
    x, bank = torch.randn(30, 4, generator=gen), torch.randn(12, 4, generator=gen)
    survivors = Survivors.of(address(x, bank, 0.1))
    assert Survivors.of(survivors) is survivors
    for ours, theirs in zip(survivors, select(x, bank, 0.1), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("result", [0, 1])  # the map, its sums
def test_gradients_of_half_precision_queries_are_summed_in_float32(result):
    gen = torch.Generator().manual_seed(21)
    x = torch.randn(400, 64, generator=gen).bfloat16()
    bank = torch.randn(900, 64, generator=gen).bfloat16().float().requires_grad_()
    survivors = select(x, bank.bfloat16(), 0.0025)
    above = torch.randn((400, 5)[result], 64, generator=gen)
    results = []
    for queries in (x, x.float()):
        queries.requires_grad_()
        values = sparse_read(queries, bank, survivors, 5)[result]
        assert values.dtype == torch.float32
        results.append(torch.autograd.grad((above * values).sum(), (queries, bank)))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() < 0.01 * exact.norm()


def test_under_autocast_only_the_scores_are_half_precision():
    gen = torch.Generator().manual_seed(9)
    x = torch.randn(2, 16, 4, 3, generator=gen)
    bank = torch.randn(900, 16, generator=gen).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = read(x.bfloat16(), bank, 0.0025)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert bank.grad.dtype == torch.float32
    torch.testing.assert_close(out, read(x, bank, 0.0025), rtol=0.1, atol=0.1)


def test_whole_map_equals_stripe_by_stripe():
    gen = torch.Generator().manual_seed(3)
    memory = SingleGranularityMemory(4, 2, 3, dim=8, shrink=0.03)
    x = torch.randn(2, 8, 6, 3, generator=gen)
    stripes = [memory(part).part for part in x.split(2, dim=2)]
    torch.testing.assert_close(memory(x).part, torch.cat(stripes, dim=2))
