"""Tests of layers.py: each against a plain rendering."""

import pytest
import torch

from networks.backbone import NonLocal
from networks.layers import gem


def plain_gem(x, p, dims):
    return (x.pow(p).mean(dims) + 1e-12).pow(1 / p)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 3.7, 6.5, 10.0])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 40.0])
def test_gem_equals_the_plain_one_gradients_included(p, scale):
    gen = torch.Generator().manual_seed(0)
    x = scale * torch.randn(9, 3, 2, 3, 4, generator=gen, dtype=torch.float64).relu()
    x[0, 0] = 0
    x.requires_grad_()
    toward = torch.randn(9, 3, 2, generator=gen, dtype=torch.float64)
    expected = plain_gem(x, p, (3, 4))
    (truth,) = torch.autograd.grad((expected * toward).sum(), x)
    for cast, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        near = x.detach().to(cast).to(memory_format=torch.preserve_format).requires_grad_()
        ours = gem(near, p, dims=(3, 4))
        torch.testing.assert_close(ours.double(), expected, rtol=rtol, atol=1e-12)
        (gradient,) = torch.autograd.grad((ours * toward.to(ours.dtype)).sum(), near)
        assert gradient.dtype == cast
        rtol = 10 * rtol
        torch.testing.assert_close(gradient.double(), truth, rtol=rtol, atol=rtol * 1e-3)


def test_gem_gradcheck():
    gen = torch.Generator().manual_seed(1)
    x = 0.1 + torch.rand(6, 2, 3, 2, generator=gen, dtype=torch.float64)
    for p in (1.0, 3.0, 4.5):
        assert torch.autograd.gradcheck(lambda x, p=p: gem(x, p, (2, 3)), x.requires_grad_())


def test_gem():
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    expected = ((x**3).mean(dim=(2, 3)) + 1e-12) ** (1 / 3)
    torch.testing.assert_close(gem(x, 3.0, dims=(2, 3)), expected)
    zero = torch.zeros(1, 1, 2, 2, requires_grad=True)
    gem(zero, 10.0, dims=(2, 3)).sum().backward()
    assert zero.grad.isfinite().all()
    assert gem(torch.rand(1, 1, 2, 2).bfloat16(), 3.0, dims=(2, 3)).dtype == torch.float32
    large = 1e5 * torch.rand(2, 2, 3, 4)
    expected = ((large.double() ** 10).mean(dim=(2, 3)) + 1e-12) ** 0.1
    torch.testing.assert_close(gem(large, 10.0, dims=(2, 3)).double(), expected)


def test_non_local_block_equals_its_score_matrix():
    block = NonLocal(6)
    torch.nn.init.ones_(block.norm.weight)
    block.eval()
    x = torch.randn(2, 6, 3, 4)
    theta, phi, g = (layer(x).flatten(2) for layer in (block.theta, block.phi, block.g))
    scores = theta.transpose(1, 2) @ phi / 12  # (N, positions, positions)
    attended = (scores @ g.transpose(1, 2)).transpose(1, 2).view(2, 1, 3, 4)
    expected = x + block.norm(block.project(attended))
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(NonLocal(6)(x), x)  # starts as the identity
