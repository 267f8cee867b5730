"""The losses: identity, the three triplets, part alignment, part decorrelation.

Triplet-type losses take ``(features (N, D), labels (N,))`` and return a scalar. All use Euclidean
distances whose squares are clamped at 1e-12 before the root. A batch in which a term is undefined
(a single identity, say) gives 0 and still back-propagates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MARGIN = 0.3  # HCT and batch-hard triplet
LABEL_SMOOTHING = 0.1
MIN_SQUARED_DISTANCE = 1e-12
# Devices that are not asked how many centres a batch has, since the answer would keep them waiting:
# there is room for one centre a row then.
UNASKED = ("cuda",)
WEIGHT_EPSILON = 1e-6  # weighted regularised triplet: keeps the weights' denominator above zero
DECORRELATION_OFF_DIAGONAL = 0.051  # released setting, a Barlow-Twins-like balance
DECORRELATION_SCALE = 200.0  # released setting
ALIGNMENT_OFFSET = 0.1  # released: subtracted from the alignment in the total; has no gradient

# Weights of the terms in each method's total; every one is a flag. `center_triplet` is the sum of
# the stripes' own hetero-centre triplets.
TERM_WEIGHTS = {
    "id": 1.0,
    "triplet": 1.0,
    "center_triplet": 2.0,
    "memory_id": 0.1,
    "memory_triplet": 1.0,
    "alignment": 0.1,
    "decorrelation": 0.0,  # released: computed, left out; its note suggests 0.01
}
TRIPLET_TERMS = ("triplet", "center_triplet", "memory_triplet")


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

    def __init__(self, margin: float = MARGIN) -> None:
        """Sets the hinge's margin."""
        super().__init__()
        self.margin = margin

    def forward(self, features: Tensor, labels: Tensor, modality: Tensor | None = None) -> Tensor:
        """Computes the loss.

        Args:
            features: (N, D), or (N, S, D) for S stripes with a loss of their own each.
            labels: Identity of each row, (N,).
            modality: True (or 1) where a row is infrared, (N,). None: the first half of the rows is
                visible, the second infrared.

        Returns:
            A scalar; with stripes, their losses' sum.

        Raises:
            ValueError: When shapes disagree, or `modality` is None and N is odd.
        """
        _check(features, labels)
        rows = len(labels)
        if modality is None:
            if rows % 2:
                raise ValueError(f"without `modality` the batch must have an even size, got {rows}")
            modality = torch.arange(rows, device=labels.device) >= rows // 2
        _check(features, modality)
        if features.ndim == 2:
            features = features.unsqueeze(1)
        keys, order = (labels * 2 + modality.to(labels.dtype)).sort()
        index = torch.cat([keys.new_zeros(1), (keys.diff() != 0).cumsum(0)])  # of each key's centre
        room = rows if features.device.type in UNASKED else int(index[-1]) + 1
        membership = features.new_zeros(rows, room)
        membership[order, index] = membership.new_ones(())  # for a plain 1, CUDA would wait
        count = membership.sum(dim=0)  # rows of each centre, 0 where there is none
        centers = torch.einsum("nc,nsd->scd", membership / count.clamp_min(1), features)
        identity = keys.new_full((room,), -1).scatter_(0, index, keys // 2)
        there = count > 0
        same = identity[:, None] == identity
        distance = pairwise_distance(centers).masked_fill(~there & ~same, torch.inf)
        positive, negative = _hardest(distance, same)  # (S, centres)
        # With a single identity there is no negative: inf, hence a hinge of zero.
        hinge = F.relu(self.margin + positive - negative)
        return (hinge * there).sum() / there.sum()


class BatchHardTripletLoss(nn.Module):
    """Batch-hard triplet: every row an anchor with its hardest positive and hardest negative.

    Source: Hermans et al., arXiv 1703.07737; the anchor counts among its own positives.
    """

    def __init__(self, margin: float = MARGIN) -> None:
        """Sets the hinge's margin."""
        super().__init__()
        self.margin = margin

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Computes the loss of features (N, D) with labels (N,): a scalar.

        Raises:
            ValueError: When shapes disagree.
        """
        _check(features, labels)
        same = labels[:, None] == labels
        positive, negative = _hardest(pairwise_distance(features), same)
        return F.relu(self.margin + positive - negative).mean()


class WeightedRegularizedTripletLoss(nn.Module):
    """AGW's weighted regularised triplet: softmax-weighted distances, no margin.

    ``softplus(d+ - d-)``, mean over rows, with ``d+`` the average distance to the positives, far
    ones weighing more, and ``d-`` the average to the negatives, near ones weighing more. Gradient
    flows through the weights too.

    Source: Ye et al., arXiv 2001.04193; the anchor counts among its own positives.
    """

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Computes the loss of features (N, D) with labels (N,): a scalar.

        Raises:
            ValueError: When shapes disagree.
        """
        _check(features, labels)
        distance = pairwise_distance(features)
        same = (labels[:, None] == labels).to(distance.dtype)
        far = self._weights(distance, same)
        near = self._weights(-distance, 1 - same)
        gap = (distance * far).sum(dim=1) - (distance * near).sum(dim=1)
        return F.softplus(gap).mean()

    @staticmethod
    def _weights(score: Tensor, mask: Tensor) -> Tensor:
        """Softmax of `score` over the mask's ones; rows sum to just under 1, or are zero."""
        peak = (score * mask).amax(dim=1, keepdim=True)
        weights = (score - peak).exp() * mask
        return weights / (weights.sum(dim=1, keepdim=True) + WEIGHT_EPSILON)


def identity_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy against ``(1 - e) * onehot + e / L``.

    Args:
        logits: (N, L), or (N, S, L) for S stripes with a classifier each.
        labels: (N,) in 0..L-1.
        label_smoothing: e.

    Returns:
        A scalar, the mean over rows; with stripes, the stripes' sum.
    """
    _check(logits, labels)
    if logits.ndim == 2:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    stripes = logits.shape[1]
    rows = labels.repeat_interleave(stripes)
    return stripes * F.cross_entropy(logits.flatten(0, 1), rows, label_smoothing=label_smoothing)


def part_alignment_loss(part_read: Tensor, order: Sequence[int]) -> Tensor:
    """Part alignment: the part reads of half of the stripes against those of the other half.

    Args:
        part_read: The part bank's read of the map, (N, C, H, W).
        order: A random order of the S stripes, fresh each step; the first S // 2 stripes are
            compared with the next S // 2.

    Returns:
        Mean squared error over every entry, a scalar.

    Raises:
        ValueError: When H does not divide into the stripes, or there are fewer than two.

    Source: the figure's "instance loss"; for the released total's constant see `weighted_total`.
    """
    stripes = len(order)
    batch, channels, height, width = part_read.shape
    if stripes < 2 or height % stripes:
        raise ValueError(f"a map of height {height} does not divide into {stripes} >= 2 stripes")
    half = stripes // 2
    pairs = list(zip(order[:half], order[half:], strict=False))  # an odd stripe is left over
    compared = half * batch * channels * (height // stripes) * width
    return _StripeDifferences.apply(part_read, stripes, pairs) / compared


class _StripeDifferences(torch.autograd.Function):
    """Sum of squared differences between pairs of stripes of a map (N, C, H, W).

    Its derivative writes one map, in the layout of the read, and nothing else.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stripes: int, pairs: list[tuple[int, int]]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.stripes, ctx.pairs = stripes, pairs
        striped = x.permute(0, 2, 3, 1).unflatten(1, (stripes, -1))  # (N, S, H/S, W, C)
        return sum((striped[:, i] - striped[:, j]).square_().sum() for i, j in pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps = ctx.saved_tensors[0].permute(0, 2, 3, 1)
        striped = maps.unflatten(1, (ctx.stripes, -1))
        result = torch.empty_like(maps, memory_format=torch.contiguous_format)
        parts = result.unflatten(1, (ctx.stripes, -1)).unbind(dim=1)
        for i, j in ctx.pairs:
            torch.sub(striped[:, i], striped[:, j], out=parts[i]).mul_(2 * grad)
            torch.neg(parts[i], out=parts[j])
        for left_over in set(range(ctx.stripes)).difference(*ctx.pairs):
            parts[left_over].zero_()
        return result.permute(0, 3, 1, 2), None, None


def part_decorrelation_loss(part_read: Tensor, num_strips: int) -> Tensor:
    """Part decorrelation ("prototype loss"): the stripes' mean part reads should be orthonormal.

    With z (N, C, S) the stripe averages and ``G = z^T z / N`` (N, S, S):
    ``(sum (diag - 1)^2 + 0.051 * sum offdiag^2) / 200``.

    Args:
        part_read: The part bank's read of the map, (N, C, H, W); S must divide H.
        num_strips: S.

    Returns:
        A scalar.

    Source: the released code, which computes it and leaves it out of the total.
    """
    stripes = part_read.unflatten(2, (num_strips, -1)).mean(dim=(3, 4))  # (N, C, S)
    gram = torch.einsum("ncs,nct->nst", stripes, stripes) / len(stripes)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    on = (diagonal - 1).square().sum()
    off = gram.square().sum() - diagonal.square().sum()
    return (on + DECORRELATION_OFF_DIAGONAL * off) / DECORRELATION_SCALE


class Criterion(nn.Module):
    """Every loss term that a network's training output allows, by name and unweighted.

    A new term is one line in `forward` and one entry in `TERM_WEIGHTS`.

    Attributes:
        weights: The weight of each term in the total; terms of weight 0 are not computed.
    """

    def __init__(
        self,
        *,
        margin: float = MARGIN,
        label_smoothing: float = 0.0,
        num_strips: int = 6,
        weights: Mapping[str, float] = TERM_WEIGHTS,
    ) -> None:
        """Sets what the terms need.

        Args:
            margin: Margin of the hetero-centre triplets.
            label_smoothing: e of both identity terms.
            num_strips: Stripes S.
            weights: Weight of each term, as `TERM_WEIGHTS`.
        """
        super().__init__()
        self.label_smoothing = label_smoothing
        self.num_strips = num_strips
        self.weights = dict(weights)
        self.hetero_center = HeteroCenterTripletLoss(margin)
        self.weighted_triplet = WeightedRegularizedTripletLoss()

    def forward(
        self, out: Mapping[str, Tensor], labels: Tensor, order: Sequence[int]
    ) -> dict[str, Tensor]:
        """Computes the terms.

        Args:
            out: What `model.TwoStreamNet` returns in training mode, float32 or wider.
            labels: (N,), visible rows first, then infrared.
            order: This step's random order of the stripes.

        Returns:
            Scalars named as in `TERM_WEIGHTS`.
        """
        terms = {}
        if "part_logits" in out:  # HCT head
            terms["id"] = identity_loss(out["part_logits"], labels, self.label_smoothing)
            terms["triplet"] = self.hetero_center(out["feat"], labels)
            if self.weights["center_triplet"]:
                terms["center_triplet"] = self.hetero_center(out["part_feats"], labels)
        else:  # AGW head
            terms["id"] = identity_loss(out["logits"], labels, self.label_smoothing)
            terms["triplet"] = self.weighted_triplet(out["feat"], labels)
        if "memory_logits" in out:
            terms["memory_id"] = identity_loss(out["memory_logits"], labels, self.label_smoothing)
            terms["memory_triplet"] = self.hetero_center(out["memory_feat"], labels)
        read = out.get("memory_read")
        if read is not None and read.semantic is not None:  # MG-MRA
            if self.weights["alignment"]:
                terms["alignment"] = part_alignment_loss(read.part, order)
            if self.weights["decorrelation"]:
                terms["decorrelation"] = part_decorrelation_loss(read.part, self.num_strips)
        return terms


def weighted_total(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The loss to minimise: the weighted sum of the terms, a scalar.

    Source: the released total, which holds ``0.1 * (alignment - 0.1)``.
    """
    total = sum(weights[name] * term for name, term in terms.items())
    return total - weights["alignment"] * ALIGNMENT_OFFSET if "alignment" in terms else total
