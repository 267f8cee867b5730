"""The losses: identity, the three triplets, part alignment, part decorrelation.

Triplet losses take features (N, D) and labels (N,), give a scalar, and raise ValueError where the
shapes disagree. Without any negative (a single identity) the hinges are 0 and AGW's triplet is
softplus(d+); all terms still back-propagate.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.layers import at_least_float32
from networks.settings import MARGIN

MIN_SQUARED_DISTANCE = 1e-12
WEIGHT_EPSILON = 1e-6  # weighted regularised triplet: keeps the weights' denominator above zero
DECORRELATION_OFF_DIAGONAL = 0.051  # released setting, a Barlow-Twins-like balance
DECORRELATION_SCALE = 200.0  # released setting
ALIGNMENT_OFFSET = 0.1  # released: subtracted from the alignment in the total; has no gradient

Output = Mapping[str, Any]  # of `model.TwoStreamNet` in training mode
CLASSIFYING_TERMS = ("id", "memory_id")  # without one of them its classifier has no gradient
TRIPLET_TERMS = ("triplet", "center_triplet", "memory_triplet")
WHOLE_BATCH_TERMS = ("decorrelation",)  # no means over rows: they need all processes' reads


def pairwise_distance(features: Tensor) -> Tensor:
    """Euclidean distances between rows: (..., N, D) -> (..., N, N), at least 1e-6 everywhere.

    Deviation: from differences, not from scalar products, which in float32 lose the distance of
    features that are close together.
    """
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.clamp_min(MIN_SQUARED_DISTANCE**0.5)


def _check(features: Tensor, labels: Tensor) -> None:
    if labels.ndim != 1 or len(labels) != len(features):
        raise ValueError(
            f"labels must be one per row of features, got {tuple(labels.shape)} for "
            f"features of shape {tuple(features.shape)}"
        )


def _hardest(distance: Tensor, same_identity: Tensor) -> tuple[Tensor, Tensor]:
    """Hardest positive and negative of each row: two (..., N); infinite where there is none."""
    positive = distance.masked_fill(~same_identity, -torch.inf).amax(dim=-1)
    negative = distance.masked_fill(same_identity, torch.inf).amin(dim=-1)
    return positive, negative


class HeteroCenterTripletLoss(nn.Module):
    """Hetero-centre triplet: batch-hard triplet over the identities' centres in each modality.

    A centre is the mean of one identity's features in one modality. For each of the 2P centres:
    ``relu(margin + hardest positive - hardest negative)``; the mean over centres is the loss. The
    positive is the same identity's centre in the other modality.

    Source: Liu, Tan, Zhou, arXiv 2008.06223.
    Deviation: centres come from labels and modality, not from a row's position in the batch.
    """

    def __init__(self, margin: float = MARGIN, images_per_id: int = 1) -> None:
        """With `images_per_id` K, the K rows of each centre are adjacent in a batch."""
        super().__init__()
        self.margin, self.images_per_id = margin, images_per_id

    def forward(self, features: Tensor, labels: Tensor, modality: Tensor | None = None) -> Tensor:
        """Computes the loss of features (N, D), or of S stripes (N, S, D) the sum of theirs.

        `modality` (N,) says which rows are infrared. None: the second half of them, and a
        ValueError where N is odd.
        """
        _check(features, labels)
        if modality is None:
            size = len(labels)
            if size % 2:
                raise ValueError(f"without `modality` the batch must have an even size, got {size}")
            modality = torch.arange(size, device=labels.device) >= size // 2
        if features.ndim == 2:
            features = features.unsqueeze(1)  # (N, 1, D)
        same_identity = labels[:, None] == labels  # (N, N)
        same_center = same_identity & (modality[:, None] == modality)  # (N, N)
        weight = 1 / same_center.sum(dim=1, dtype=features.dtype)  # (N,) 1/K for a centre's K rows
        rows = slice(None, None, self.images_per_id)  # n: one of each centre if K is given, or all
        centers = torch.einsum("nm,msd->snd", same_center[rows] * weight, features)  # (S, n, D)
        same_identity = same_identity[rows, rows]
        positive, negative = _hardest(pairwise_distance(centers), same_identity)  # (S, n) each
        hinge = F.relu(self.margin + positive - negative)
        return (hinge * weight[rows]).sum() / weight[rows].sum()


class BatchHardTripletLoss(nn.Module):
    """Batch-hard triplet: every row an anchor with its hardest positive and hardest negative.

    Source: Hermans et al., arXiv 1703.07737; the anchor counts among its own positives.
    """

    def __init__(self, margin: float = MARGIN) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Computes the loss."""
        _check(features, labels)
        positive, negative = _hardest(pairwise_distance(features), labels[:, None] == labels)
        return F.relu(self.margin + positive - negative).mean()


class WeightedRegularizedTripletLoss(nn.Module):
    """AGW's weighted regularised triplet: softmax-weighted distances, no margin.

    ``softplus(d+ - d-)``, mean over rows, with ``d+`` the average distance to the positives, far
    ones weighing more, and ``d-`` the average to the negatives, near ones weighing more. Gradient
    flows through the weights too.

    Source: Ye et al., arXiv 2001.04193; the anchor counts among its own positives.
    """

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Computes the loss."""
        _check(features, labels)
        distance = pairwise_distance(features)
        same = (labels[:, None] == labels).to(distance.dtype)
        positive = (distance * _softmax_over(same, distance)).sum(dim=1)
        negative = (distance * _softmax_over(1 - same, -distance)).sum(dim=1)
        return F.softplus(positive - negative).mean()


def _softmax_over(mask: Tensor, score: Tensor) -> Tensor:
    """Softmax of `score` (N, N) over the ones of `mask`; rows sum to just under 1, or to 0."""
    peak = (score * mask).amax(dim=1, keepdim=True)
    weights = (score - peak).exp() * mask
    return weights / (weights.sum(dim=1, keepdim=True) + WEIGHT_EPSILON)


def identity_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy against ``(1 - e) * onehot + e / L``, e the label smoothing.

    Mean over the rows of logits (N, L) with labels (N,); of S stripes (N, S, L), the stripes' sum.
    """
    _check(logits, labels)
    stripes = logits.unbind(dim=1) if logits.ndim == 3 else (logits,)  # S of (N, L)
    return sum(F.cross_entropy(x, labels, label_smoothing=label_smoothing) for x in stripes)


def part_alignment_loss(part_read: Tensor, order: Sequence[int]) -> Tensor:
    """Part alignment: mean squared difference of the part reads of two halves of the stripes.

    `order` is a random order of the S stripes, fresh each step: in it, the first S // 2 stripes of
    the part read (N, C, H, W) are compared with the next S // 2.

    Raises:
        ValueError: When H does not divide into the stripes, or there are fewer than two.

    Source: the figure's "instance loss"; for the released total's constant see `weighted_total`.
    """
    count, height = len(order), part_read.shape[2]
    if count < 2 or height % count:
        raise ValueError(f"a map of height {height} does not divide into {count} >= 2 stripes")
    stripes = part_read.unflatten(2, (count, -1)).unbind(dim=2)  # S of (N, C, H/S, W)
    half = count // 2
    pairs = zip(order[:half], order[half:], strict=False)  # an odd stripe is left over
    return sum(F.mse_loss(stripes[i], stripes[j]) for i, j in pairs) / half


def part_decorrelation_loss(part_read: Tensor, num_strips: int) -> Tensor:
    """Part decorrelation ("prototype loss"): the stripes' mean part reads should be orthonormal.

    With z (N, C, S) the stripe averages of the part read (N, C, H, W), of which S must divide H,
    and ``G = z^T z / N`` (N, S, S): ``(sum (diag - 1)^2 + 0.051 * sum offdiag^2) / 200``.

    Source: the release's first upload, which computes it and leaves it out of the total.

    Deviation: this is what was meant. The upload computes in place on views of G, which adds
    ``0.051 * sum ((diag - 1)^4 - (diag - 1)^8) / 200``: with diag in 0..2 its value is up to 2 %
    larger, and its gradient up to 10 % off.
    """
    stripes = part_read.unflatten(2, (num_strips, -1)).mean(dim=(3, 4))  # (N, C, S)
    gram = torch.einsum("ncs,nct->nst", stripes, stripes) / len(stripes)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    norms = (diagonal - 1).square().sum()
    products = gram.square().sum() - diagonal.square().sum()
    return (norms + DECORRELATION_OFF_DIAGONAL * products) / DECORRELATION_SCALE


class Criterion(nn.Module):
    """The loss terms of a method, by name and unweighted, and their weights.

    A term is a method ``(out, labels, order) -> scalar`` named like its weight; a new term is one
    more method and one more weight. Terms of weight 0 are not computed. ``out`` is what
    `model.TwoStreamNet` returns in training mode, float32 or wider but for the maps of
    ``memory_read``; ``labels`` (N,) has visible rows first, then infrared; ``order`` is this step's
    random order of the S stripes.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        margin: float = MARGIN,
        label_smoothing: float = 0.0,
        head: str = "pcb",
        images_per_id: int = 1,
    ) -> None:
        """Sets the weights, by terms' names; with the head "agw" ``triplet`` is AGW's own.

        `images_per_id`: see `HeteroCenterTripletLoss`; the sampler's batches are so ordered.
        """
        super().__init__()
        for name in weights:
            if not hasattr(self, name):
                raise ValueError(f"there is no loss term {name!r}: expected a method of this name")
        self.weights = dict(weights)
        self.label_smoothing = label_smoothing
        self.hetero_center = HeteroCenterTripletLoss(margin, images_per_id)
        agw = WeightedRegularizedTripletLoss()
        self.feature_triplet = agw if head == "agw" else self.hetero_center

    def forward(self, out: Output, labels: Tensor, order: Sequence[int]) -> dict[str, Tensor]:
        """Computes the terms: scalars by name."""
        used = [name for name, weight in self.weights.items() if weight]
        return {name: getattr(self, name)(out, labels, order) for name in used}

    def id(self, out: Output, labels: Tensor, order: Sequence[int]) -> Tensor:
        """Identity: of each stripe, summed (without stripes: of the feature after the neck)."""
        logits = out["part_logits"] if "part_logits" in out else out["logits"]
        return identity_loss(logits, labels, self.label_smoothing)

    def triplet(self, out: Output, labels: Tensor, order: Sequence[int]) -> Tensor:
        """Hetero-centre triplet of the whole feature (AGW: its own triplet)."""
        return self.feature_triplet(out["feat"], labels)

    def center_triplet(self, out: Output, labels: Tensor, order: Sequence[int]) -> Tensor:
        """Hetero-centre triplets of the stripes, summed."""
        return self.hetero_center(out["part_feats"], labels)

    def memory_id(self, out: Output, labels: Tensor, order: Sequence[int]) -> Tensor:
        """Identity of the memory feature ("ID loss" of the figure's memory branch)."""
        return identity_loss(out["memory_logits"], labels, self.label_smoothing)

    def memory_triplet(self, out: Output, labels: Tensor, order: Sequence[int]) -> Tensor:
        """Hetero-centre triplet of the memory feature ("semantic loss" of the figure)."""
        return self.hetero_center(out["memory_feat"], labels)

    def alignment(self, out: Output, labels: Tensor, order: Sequence[int]) -> Tensor:
        """Part alignment ("instance loss" of the figure)."""
        return part_alignment_loss(at_least_float32(out["memory_read"].part), order)

    def decorrelation(self, out: Output, labels: Tensor, order: Sequence[int]) -> Tensor:
        """Part decorrelation ("prototype loss" of the figure)."""
        return part_decorrelation_loss(at_least_float32(out["memory_read"].part), len(order))


def weighted_total(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The loss to minimise: the weighted sum of the terms, a scalar.

    Source: the released total, which holds ``0.1 * (alignment - 0.1)``.
    """
    total = sum(weights[name] * term for name, term in terms.items())
    return total - weights["alignment"] * ALIGNMENT_OFFSET if "alignment" in terms else total
