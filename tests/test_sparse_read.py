"""The fast read of a large bank against the plain form, values and gradients."""

import math

import pytest
import torch

from memory import read
from networks import sparse_read
from networks.memory_health import MemoryHealth
from networks.sparse_read import pays_off


def masked_softmax_read(x, bank, shrink):
    """Softmax over the survivors by masking; who survives."""
    scores = x @ bank.t()
    survive = scores.softmax(1) > shrink
    none = ~survive.any(1, keepdim=True)
    weights = scores.masked_fill(~survive & ~none, -math.inf).softmax(1)
    return weights.masked_fill(none, 0) @ bank, survive


@pytest.mark.parametrize("scale", [0.0, 0.02, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("shrink", [0.0, 0.002, 0.01, 0.1, 0.9])
@pytest.mark.parametrize("chunk", [7, 1 << 20, None])
def test_equals_a_masked_softmax_gradients_included(scale, shrink, chunk, monkeypatch):
    """From no survivor (uniform weights are 1/150) to all of them."""
    bounded = chunk is None  # as in training on CUDA
    monkeypatch.setattr(sparse_read, "SCORES_AT_A_TIME", (chunk or 1) * 150)
    gen = torch.Generator().manual_seed(6)
    x = (scale * torch.randn(40, 9, generator=gen)).requires_grad_()
    bank = torch.randn(150, 9, generator=gen).requires_grad_()
    toward = torch.randn(40, 9, generator=gen)
    dense, survive = masked_softmax_read(x, bank, shrink)
    expected = torch.autograd.grad((toward * dense).sum(), (x, bank))
    values, weights = sparse_read.sparse_read(x, bank, bank, shrink, bounded=bounded)
    assert torch.equal(weights.offsets.diff(), survive.sum(1))
    assert torch.equal(weights.to_dense() > 0, survive)
    sparse, plain = MemoryHealth(), MemoryHealth()
    sparse.update({"part": weights})
    plain.update({"part": weights.to_dense()})
    assert sparse.summary() == pytest.approx(plain.summary(), rel=1e-6)
    torch.testing.assert_close(values, dense, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad((toward * values).sum(), (x, bank))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("needed", [0, 1])
def test_only_the_gradients_asked_for(needed):
    gen = torch.Generator().manual_seed(7)
    inputs = [torch.randn(n, 4, generator=gen) for n in (6, 12)]
    inputs[needed].requires_grad_()
    values, _ = sparse_read.sparse_read(inputs[0], *inputs[1:] * 2, 0.08, bounded=needed == 0)
    (grad,) = torch.autograd.grad(values.square().sum(), inputs[needed])
    expected, _ = masked_softmax_read(*inputs, 0.08)
    (expected,) = torch.autograd.grad(expected.square().sum(), inputs[needed])
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("temperature", [None, 0.1])
def test_the_memory_reads_the_same_either_way(scale, temperature, monkeypatch):
    gen = torch.Generator().manual_seed(8)
    x = (scale * torch.randn(2, 16, 4, 3, generator=gen)).requires_grad_()
    bank = torch.randn(900, 16, generator=gen).requires_grad_()
    toward = torch.randn(2, 16, 4, 3, generator=gen)
    results = []
    for fast in (True, False):
        monkeypatch.setattr(sparse_read, "pays_off", lambda *_, fast=fast: fast)
        values, weights = read(x, bank, 0.0025, temperature)
        grads = torch.autograd.grad((toward * values).sum(), (x, bank))
        results.append((values, weights.to_dense(), *grads))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_chosen_for_large_banks_and_never_in_float64(monkeypatch):
    queries = torch.zeros(5, 4)
    assert pays_off(queries, torch.zeros(6180, 4), 0.0025)
    assert not pays_off(queries, torch.zeros(206, 4), 0.0025)  # half of it may survive
    assert not pays_off(queries, torch.zeros(6180, 4), 0.0)
    assert not pays_off(queries.double(), torch.zeros(6180, 4), 0.0025)
    assert not pays_off(queries.to("meta"), torch.zeros(6180, 4), 0.0025)
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode():
        on_gpu = torch.zeros(5, 4, device="cuda")
    monkeypatch.setattr(sparse_read, "_works_on", lambda device: True)
    assert pays_off(on_gpu, torch.zeros(6180, 4), 0.0025)
    assert not pays_off(on_gpu, torch.zeros(1030, 4), 0.0025)  # dense products are faster there
    monkeypatch.setattr(sparse_read, "_works_on", lambda device: False)
    assert not pays_off(on_gpu, torch.zeros(6180, 4), 0.0025)


def test_under_autocast_only_the_scores_are_half_precision():
    gen = torch.Generator().manual_seed(9)
    x = torch.randn(2, 16, 4, 3, generator=gen)
    bank = torch.randn(900, 16, generator=gen).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights = read(x.bfloat16(), bank, 0.0025)
    assert out.dtype == weights.alpha.dtype == torch.float32
    out.sum().backward()
    assert bank.grad.dtype == torch.float32
    torch.testing.assert_close(out, read(x, bank, 0.0025)[0], rtol=0.1, atol=0.1)


def test_second_derivatives_are_refused():
    gen = torch.Generator().manual_seed(23)
    x = torch.randn(1, 16, 4, 3, generator=gen, requires_grad=True)
    out, _ = read(x, torch.randn(900, 16, generator=gen), 0.0025)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_half_precision_rows_give_the_same_but_for_rounding():
    """What is gathered under autocast on CUDA, here on the CPU."""
    gen = torch.Generator().manual_seed(10)
    inputs = [torch.randn(n, 16, generator=gen, requires_grad=True) for n in (30, 900, 900)]
    toward = torch.randn(30, 16, generator=gen)
    results = []
    for kind in (torch.float32, torch.bfloat16):
        halves = [x.to(kind) for x in inputs]
        values, _ = sparse_read.sparse_read(*halves, 0.0025, bounded=True)
        results.append((values.float(), *torch.autograd.grad((values * toward).sum(), inputs)))
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() < 0.03 * expected.norm()


class Context:
    """What autograd hands to a function."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_backward_on_a_gpu_wait_for_nothing(dtype):
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode(), torch.no_grad():  # a size that depends on numbers is an error
        queries, bank = (torch.randn(n, 16, device="cuda", dtype=dtype) for n in (30, 900))
        weights = sparse_read._survivors(queries, bank, 0.0025, True)
        context, function = Context(), sparse_read._WeightedSums
        values = function.forward(context, queries, bank, bank, weights)
        *grads, _ = function.backward(context, values)
    assert [g.shape for g in grads] == [(30, 16), (900, 16), (900, 16)]
    assert {(g.device.type, g.dtype) for g in (values, *grads)} == {("cuda", dtype)}
