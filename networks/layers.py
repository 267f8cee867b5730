"""Pooling, stripe-wise linear layers, necks, classifiers.

Shapes: ``N`` images, ``S`` stripes, ``L`` training identities.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

GEM_EPSILON = 1e-12
CLASSIFIER_STD = 0.001  # initialisation of every linear classifier


def at_least_float32(x: Tensor) -> Tensor:
    """Returns half precision as float32, and anything else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gem(x: Tensor, p: float, dims: tuple[int, ...]) -> Tensor:
    """Generalised-mean pooling over `dims`, ``(mean(x^p) + 1e-12)^(1/p)``, in at least float32.

    Each pooled region is divided by its maximum first, which cancels out: in float32, 7200^10 would
    overflow, and an untrained network's evaluation reaches such activations. `x` is not negative.
    The backward pass recomputes what half precision would have to keep in float32.
    """
    if x.requires_grad and x.dtype.itemsize < 4:
        how = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(lambda x: gem(x.float(), p, dims), x, **how)
    x = at_least_float32(x)
    scale = x.detach().amax(dim=dims, keepdim=True).clamp_min(1)
    mean = (x / scale).pow(p).mean(dim=dims, keepdim=True)
    return ((mean + GEM_EPSILON / scale.pow(p)).pow(1 / p) * scale).squeeze(dims)


class StripeLinear(nn.Module):
    """One linear layer per stripe, computed as one batched product: (N, S, in) -> (N, S, out).

    Weights start from Kaiming's normal distribution, those of a classifier near zero.
    """

    def __init__(
        self, num_strips: int, in_features: int, out_features: int, *, classifies: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_strips, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_strips, out_features))
        std = CLASSIFIER_STD if classifies else math.sqrt(2 / in_features)
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Applies stripe s's layer to x[:, s]."""
        out = torch.baddbmm(self.bias.unsqueeze(1), x.transpose(0, 1), self.weight.mT)
        return out.transpose(0, 1)


def neck_norm(dim: int, *, train_bias: bool = False) -> nn.BatchNorm1d:
    """Batch norm before a classifier; AGW's BNNeck has no trained bias, the memory's has."""
    neck = nn.BatchNorm1d(dim)
    nn.init.normal_(neck.weight, 1.0, 0.01)
    neck.bias.requires_grad_(train_bias)
    return neck


def linear_classifier(dim: int, num_ids: int) -> nn.Linear:
    """Bias-free linear classifier."""
    classifier = nn.Linear(dim, num_ids, bias=False)
    nn.init.normal_(classifier.weight, std=CLASSIFIER_STD)
    return classifier
