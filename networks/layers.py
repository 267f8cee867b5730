"""Layers of the network: non-local blocks, pooling, stripe-wise linear layers, necks, classifiers.

Shapes: ``N`` images, ``S`` stripes, ``L`` training identities.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.sparse_read import at_least_float32

GEM_EPSILON = 1e-12
GEM_CHUNK = 4  # images pooled at a time on the CPU: 5 MB of a ResNet-50's last map
MAX_MULTIPLIED_POWER = 32  # GeM exponents up to it are multiplied out
CLASSIFIER_STD = 0.001  # initialisation of every linear classifier


class NonLocal(nn.Module):
    """AGW's non-local block: one inner channel, scores divided by the number of positions.

    With a single inner channel the attended value factorises: ``sum_j theta_i phi_j g_j / n`` is
    ``theta_i`` times the mean of ``phi * g``, so no (n x n) score matrix is needed.

    Source: AGW (arXiv 2001.04193). The residual path starts at zero.
    """

    def __init__(self, channels: int) -> None:
        """Builds the block for maps of `channels`."""
        super().__init__()
        self.theta = nn.Conv2d(channels, 1, 1)
        self.phi = nn.Conv2d(channels, 1, 1)
        self.g = nn.Conv2d(channels, 1, 1)
        self.project = nn.Conv2d(1, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over the positions of x (N, C, H, W); same shape."""
        attended = self.theta(x) * (self.phi(x) * self.g(x)).mean(dim=(2, 3), keepdim=True)
        return x + self.norm(self.project(attended))


class Stage(nn.Module):
    """One residual stage: its blocks, the last of them followed by non-local blocks."""

    def __init__(self, blocks: nn.Sequential, channels: int, num_non_local: int = 0) -> None:
        """Wraps torchvision blocks whose output has `channels`."""
        super().__init__()
        self.blocks = blocks
        count = min(num_non_local, len(blocks))
        self.non_local = nn.ModuleList(NonLocal(channels) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x through the stage."""
        first = len(self.blocks) - len(self.non_local)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= first:
                x = self.non_local[i - first](x)
        return x


def gem(x: Tensor, p: float, dims: tuple[int, ...]) -> Tensor:
    """Generalised-mean pooling over `dims`, ``(mean(x^p) + 1e-12)^(1/p)``, in at least float32.

    Args:
        x: At least two dimensions, the first of them not pooled.
        p: Exponent.
        dims: Dimensions that are pooled and left out of the result.
    """
    return _GeneralizedMean.apply(x, p, dims)


class _GeneralizedMean(torch.autograd.Function):
    """GeM that keeps nothing for its backward but input and result.

    Each pooled region is scaled by its maximum first, which cancels out: in float32, 7200^10 would
    overflow, and an untrained network's evaluation reaches such activations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, dims: tuple[int, ...]) -> Tensor:
        pooled = []
        for part in _chunks(x):
            part = part.to(at_least_float32(x))
            scale = part.amax(dim=dims, keepdim=True).clamp_min_(1)
            mean = _power_(part / scale, p).mean(dim=dims)
            scale = scale.view_as(mean)
            pooled.append((mean + GEM_EPSILON / scale.pow(p)).pow(1 / p) * scale)
        pooled = torch.cat(pooled)
        ctx.save_for_backward(x, pooled)
        ctx.p, ctx.dims = p, dims
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, pooled = ctx.saved_tensors
        for dim in sorted(ctx.dims):
            grad, pooled = grad.unsqueeze(dim), pooled.unsqueeze(dim)
        grad = grad * (pooled.numel() / x.numel())
        # d pooled / d x = (x / pooled)^(p - 1) / positions, whatever the scale.
        result = torch.empty_like(x)
        parts = zip(*map(_chunks, (x, pooled, grad, result)), strict=True)
        for part, mean, grad_part, out in parts:
            out.copy_(_power_(part / mean, ctx.p - 1).mul_(grad_part))
        return result, None, None


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Rows of x a few at a time on the CPU, whose cache then holds what is computed from them."""
    return x.split(GEM_CHUNK if x.device.type == "cpu" else len(x))


def _power_(x: Tensor, p: float) -> Tensor:
    """x^p, in place or not; integral powers by multiplication, underflow to zero.

    Powers below the type's smallest normal number, which are slow to compute with and vanish beside
    the region's maximum of about 1, are zeros.
    """
    if p > 1:
        x = F.hardshrink(x, torch.finfo(x.dtype).tiny ** (1 / p))
    if p != int(p) or not 1 <= p <= MAX_MULTIPLIED_POWER:
        return x.pow_(p)
    result = None
    for bit in reversed(f"{int(p):b}"):  # x^(2^i), from the lowest bit on
        if bit == "1":
            result = x.clone() if result is None else result.mul_(x)
        x = x.mul_(x)
    return result


class StripeLinear(nn.Module):
    """One linear layer a stripe, all in one batched product: (N, S, in) -> (N, S, out)."""

    def __init__(self, num_strips: int, in_features: int, out_features: int) -> None:
        """Builds S weights (S, out, in) and biases (S, out)."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_strips, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_strips, out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Applies stripe s's layer to x[:, s]."""
        out = torch.baddbmm(self.bias.unsqueeze(1), x.transpose(0, 1), self.weight.mT)
        return out.transpose(0, 1)


def neck_norm(dim: int, *, train_bias: bool = False) -> nn.BatchNorm1d:
    """Batch norm before a classifier; AGW's BNNeck keeps its bias, the memory's trains it."""
    neck = nn.BatchNorm1d(dim)
    nn.init.normal_(neck.weight, 1.0, 0.01)
    neck.bias.requires_grad_(train_bias)
    return neck


def linear_classifier(dim: int, num_ids: int) -> nn.Linear:
    """Bias-free linear classifier."""
    classifier = nn.Linear(dim, num_ids, bias=False)
    nn.init.normal_(classifier.weight, std=CLASSIFIER_STD)
    return classifier
