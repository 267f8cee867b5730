"""The released algorithms, rendered plainly: what the fast paths are timed and tested against.

Written from the method's description, one thing at a time: a list of layers for the stripes, the
memory read stripe by stripe with dense softmax, shrinking and renormalising, triplets in Python
loops over anchors, rankings in a loop over queries. `PlainNet` takes a `TwoStreamNet`'s weights and
gives back gradients under its names.
"""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loss import (
    ALIGNMENT_OFFSET,
    DECORRELATION_OFF_DIAGONAL,
    DECORRELATION_SCALE,
    MARGIN,
    MIN_SQUARED_DISTANCE,
)
from memory import EPSILON, MultiGranularityMemory, SingleGranularityMemory
from model import TwoStreamNet
from networks.layers import GEM_EPSILON

# The releases' totals on RegDB; SG-MRA's has the terms up to the memory's, HCT's the first three.
TERM_WEIGHTS = {
    "id": 1.0,
    "triplet": 1.0,
    "center_triplet": 2.0,
    "memory_id": 0.1,
    "memory_triplet": 1.0,
    "alignment": 0.1,
}


def term_weights(net: TwoStreamNet) -> dict[str, float]:
    """The releases' weights of a network's terms."""
    count = {None: 3, "sg": 5, "mg": 6}[net.config["memory"]]
    names = list(TERM_WEIGHTS)[:count]
    if net.head != "pcb":
        names.remove("center_triplet")
    return {name: TERM_WEIGHTS[name] for name in names}


# --- Network --------------------------------------------------------------------------------------


def plain_read(x: Tensor, bank: Tensor, shrink: float) -> Tensor:
    """Reads a bank at every position of a map (B, C, H, W), densely; same shape.

    Args:
        x: Queries.
        bank: Prototypes, (m, C).
        shrink: Weights at or below it are set to zero.
    """
    batch, channels, height, width = x.shape
    queries = x.permute(0, 2, 3, 1).reshape(-1, channels)
    weights = F.softmax(F.linear(queries, bank), dim=1)  # (B*H*W, m)
    excess = weights - shrink
    weights = F.relu(excess) * weights / (excess.abs() + EPSILON)
    weights = F.normalize(weights, p=1, dim=1)
    values = F.linear(weights, bank.t())
    return values.view(batch, height, width, channels).permute(0, 3, 1, 2)


class PlainMemory(nn.Module):
    """SG-MRA's memory, or MG-MRA's of the variant ``paper``, on one stripe at a time."""

    def __init__(self, memory: SingleGranularityMemory) -> None:
        """Copies a memory's weights.

        Raises:
            ValueError: When it is another variant of MG-MRA's.
        """
        super().__init__()
        self.multi = isinstance(memory, MultiGranularityMemory)
        if self.multi and memory.variant != "paper":
            raise ValueError(f"the plain memory is of variant 'paper', got {memory.variant!r}")
        self.sizes = (memory.num_ids, memory.instances_per_id, memory.parts_per_instance)
        self.shrink = memory.shrink
        self.part_bank = nn.Parameter(memory.part_bank.detach().clone())
        if self.multi:
            self.part_gate = copy.deepcopy(memory.part_gate)
            self.instance_gate = copy.deepcopy(memory.instance_gate)

    def banks(self) -> tuple[Tensor, Tensor]:
        """Returns the instance bank (L*T, C) and the semantic bank (L, C)."""
        ids, instances, parts = self.sizes
        bank = self.part_bank.view(ids * instances, parts, -1)
        instance = torch.mean(torch.sigmoid(self.part_gate(bank)) * bank, dim=1)
        bank = instance.view(ids, instances, -1)
        return instance, torch.mean(torch.sigmoid(self.instance_gate(bank)) * bank, dim=1)

    def forward(self, stripes: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Reads every stripe (B, C, H/S, W): the part reads, and the coarsest reads."""
        if not self.multi:
            parts = [plain_read(x, self.part_bank, self.shrink) for x in stripes]
            return parts, parts
        instance_bank, semantic_bank = self.banks()
        parts, semantics = [], []
        for x in stripes:
            part = plain_read(x, self.part_bank, self.shrink)
            instance = plain_read(part, instance_bank, self.shrink)
            parts.append(part)
            semantics.append(plain_read(instance, semantic_bank, self.shrink))
        return parts, semantics


class PlainStripe(nn.Module):
    """One stripe's head: GeM, 1x1 convolution, batch norm, ReLU, classifier."""

    def __init__(self, net: TwoStreamNet, index: int) -> None:
        """Copies the weights of stripe `index`."""
        super().__init__()
        width, channels = net.part_reduce.weight.shape[1:]
        own = slice(index * width, (index + 1) * width)
        self.gem_p = net.gem_p
        self.reduce = nn.Conv2d(channels, width, 1)
        self.norm = nn.BatchNorm1d(width)
        self.classifier = nn.Linear(width, net.part_classifier.weight.shape[1])
        self.to(net.part_reduce.weight)
        with torch.no_grad():
            self.reduce.weight.copy_(net.part_reduce.weight[index, :, :, None, None])
            self.reduce.bias.copy_(net.part_reduce.bias[index])
            self.norm.weight.copy_(net.part_norm.weight[own])
            self.norm.bias.copy_(net.part_norm.bias[own])
            self.classifier.weight.copy_(net.part_classifier.weight[index])
            self.classifier.bias.copy_(net.part_classifier.bias[index])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Feature (N, d) and logits (N, L) of a stripe (N, C, H/S, W)."""
        pooled = (x.pow(self.gem_p).mean(dim=(2, 3), keepdim=True) + GEM_EPSILON).pow(
            1 / self.gem_p
        )
        feature = F.relu(self.norm(self.reduce(pooled).flatten(1)))
        return feature, self.classifier(feature)


class PlainNet(nn.Module):
    """HCT, SG-MRA and MG-MRA in training mode, without channels_last or autocast."""

    def __init__(self, net: TwoStreamNet) -> None:
        """Copies the weights of a network with the ``pcb`` head."""
        super().__init__()
        self.num_strips = net.num_strips
        for name in ("visible", "infrared", "shared"):
            setattr(self, name, copy.deepcopy(getattr(net, name)))
        self.stripes = nn.ModuleList(PlainStripe(net, i) for i in range(net.num_strips))
        self.memory = None if net.memory is None else PlainMemory(net.memory)
        if net.memory is not None:
            self.memory_neck = copy.deepcopy(net.memory_neck)
            self.memory_classifier = copy.deepcopy(net.memory_classifier)
        self.to(memory_format=torch.contiguous_format)

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters trained at the full rate."""
        return list(self.stripes.parameters())

    def forward(self, visible: Tensor, infrared: Tensor) -> dict[str, Tensor | list[Tensor]]:
        """What `TwoStreamNet` returns; for the reads ``memory_parts``, a list of S (MG-MRA)."""
        x = self.shared(torch.cat([self.visible(visible), self.infrared(infrared)]))
        stripes = x.chunk(self.num_strips, dim=2)
        heads = [head(stripe) for head, stripe in zip(self.stripes, stripes, strict=True)]
        features, logits = zip(*heads, strict=True)
        out = {
            "feat": torch.cat(features, dim=1),
            "part_feats": torch.stack(features, dim=1),
            "part_logits": torch.stack(logits, dim=1),
        }
        if self.memory is not None:
            parts, coarsest = self.memory(stripes)
            y = x + torch.cat(coarsest, dim=2)
            feat = y.mean(dim=(2, 3))
            if self.memory.multi:
                out["memory_parts"] = parts
            out["memory_feat"] = feat
            out["memory_logits"] = self.memory_classifier(self.memory_neck(feat))
        return out

    def gradients(self) -> dict[str, Tensor]:
        """Gradients under the names, and in the shapes, of `TwoStreamNet`'s parameters."""
        named = self.named_parameters()
        own = {name: p.grad for name, p in named if not name.startswith("stripes.")}
        heads = self.stripes
        return {
            **own,
            "part_reduce.weight": torch.stack([s.reduce.weight.grad.flatten(1) for s in heads]),
            "part_reduce.bias": torch.stack([s.reduce.bias.grad for s in heads]),
            "part_norm.weight": torch.cat([s.norm.weight.grad for s in heads]),
            "part_norm.bias": torch.cat([s.norm.bias.grad for s in heads]),
            "part_classifier.weight": torch.stack([s.classifier.weight.grad for s in heads]),
            "part_classifier.bias": torch.stack([s.classifier.bias.grad for s in heads]),
        }


# --- Losses ---------------------------------------------------------------------------------------


def plain_identity(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of (N, L) against ``(1 - e) * onehot + e / L``."""
    targets = torch.full_like(logits, label_smoothing / logits.shape[1])
    targets[torch.arange(len(labels), device=labels.device), labels] += 1 - label_smoothing
    return (-targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def plain_hetero_center(features: Tensor, labels: Tensor, margin: float = MARGIN) -> Tensor:
    """Hetero-centre triplet of (N, D), visible rows first, in a loop over the 2P centres."""
    half = len(labels) // 2
    centers, owners = [], []
    for rows in (slice(0, half), slice(half, None)):
        for label in labels[rows].unique():
            centers.append(features[rows][labels[rows] == label].mean(dim=0))
            owners.append(label)
    centers, owners = torch.stack(centers), torch.stack(owners)
    norms = centers.square().sum(dim=1)
    squared = norms[:, None] + norms - 2 * centers @ centers.t()
    distance = squared.clamp_min(MIN_SQUARED_DISTANCE).sqrt()
    positives, negatives = [], []
    for i in range(len(owners)):
        same = owners == owners[i]
        positives.append(distance[i][same].max())
        negatives.append(distance[i][~same].min())
    return F.relu(margin + torch.stack(positives) - torch.stack(negatives)).mean()


def plain_decorrelation(parts: Sequence[Tensor]) -> Tensor:
    """Part decorrelation of S stripes (N, C, H/S, W), image by image."""
    z = torch.stack([part.mean(dim=(2, 3)) for part in parts], dim=2)  # (N, C, S)
    eye = torch.eye(len(parts), device=z.device, dtype=torch.bool)
    total = 0
    for own in z:
        gram = own.t() @ own / len(z)
        total = total + (gram[eye] - 1).square().sum()
        total = total + DECORRELATION_OFF_DIAGONAL * gram[~eye].square().sum()
    return total / DECORRELATION_SCALE


def plain_terms(
    out: Mapping[str, Tensor | list[Tensor]],
    labels: Tensor,
    order: Sequence[int],
    *,
    label_smoothing: float = 0.0,
    weights: Mapping[str, float] = TERM_WEIGHTS,
) -> dict[str, Tensor]:
    """The loss terms of `PlainNet`'s output, named as in `TERM_WEIGHTS`.

    Args:
        out: See `PlainNet.forward`.
        labels: (N,).
        order: Of the stripes, for the alignment.
        label_smoothing: e.
        weights: Terms of weight 0 are left out.
    """
    logits, features = out["part_logits"].unbind(1), out["part_feats"].unbind(1)
    terms = {
        "id": sum(plain_identity(x, labels, label_smoothing) for x in logits),
        "triplet": plain_hetero_center(out["feat"], labels),
        "center_triplet": sum(plain_hetero_center(x, labels) for x in features),
    }
    if "memory_feat" in out:
        terms["memory_id"] = plain_identity(out["memory_logits"], labels, label_smoothing)
        terms["memory_triplet"] = plain_hetero_center(out["memory_feat"], labels)
    if "memory_parts" in out:
        shuffled = [out["memory_parts"][i] for i in order]
        half = len(order) // 2
        first, second = torch.cat(shuffled[:half]), torch.cat(shuffled[half : 2 * half])
        terms["alignment"] = (first - second).square().mean()
        if weights.get("decorrelation"):
            terms["decorrelation"] = plain_decorrelation(out["memory_parts"])
    return terms


def plain_training_step(
    net: PlainNet,
    optimizer: torch.optim.Optimizer,
    *,
    visible: Tensor,
    infrared: Tensor,
    labels: Tensor,
    order: Sequence[int],
    label_smoothing: float = 0.0,
    weights: Mapping[str, float] = TERM_WEIGHTS,
) -> dict[str, Tensor]:
    """One optimisation step; arguments and terms are those of `engine.train.training_step`."""
    out = net(visible, infrared)
    terms = plain_terms(out, labels, order, label_smoothing=label_smoothing, weights=weights)
    total = sum(weights[name] * term for name, term in terms.items())
    if "alignment" in terms:
        total = total - weights["alignment"] * ALIGNMENT_OFFSET
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return {**terms, "total": total}


# --- Evaluation -----------------------------------------------------------------------------------


def plain_evaluate(
    distmat: np.ndarray,
    q_pids: np.ndarray,
    g_pids: np.ndarray,
    q_camids: np.ndarray | None = None,
    g_camids: np.ndarray | None = None,
    max_rank: int = 20,
) -> tuple[np.ndarray, float, float]:
    """CMC, mAP and mINP, query by query: the field's usual loop.

    Without cameras RegDB's protocol; with them SYSU-MM01's: camera-3 queries ignore camera-2
    images, and the CMC counts each identity once.

    Args:
        distmat: (Q, G).
        q_pids: (Q,).
        g_pids: (G,), of at least `max_rank` images (SYSU-MM01: identities).
        q_camids: (Q,) or None.
        g_camids: (G,) or None.
        max_rank: Length of the CMC.
    """
    ranking = np.argsort(distmat, axis=1, kind="stable")
    curves, precisions, penalties = [], [], []
    for i in range(len(distmat)):
        order = ranking[i]
        if q_camids is not None:
            order = order[~((q_camids[i] == 3) & (g_camids[order] == 2))]
        matches = (g_pids[order] == q_pids[i]).astype(np.int64)
        if not matches.any():
            continue
        hits = matches
        if q_camids is not None:
            ranked = g_pids[order]
            first = np.sort(np.unique(ranked, return_index=True)[1])
            hits = (ranked[first] == q_pids[i]).astype(np.int64)
        curves.append(np.minimum(hits.cumsum(), 1)[:max_rank])
        found = matches.cumsum()
        precision = [count / (rank + 1) for rank, count in enumerate(found)]
        precisions.append((np.asarray(precision) * matches).sum() / matches.sum())
        penalties.append(matches.sum() / (np.flatnonzero(matches)[-1] + 1))
    return np.mean(curves, axis=0), float(np.mean(precisions)), float(np.mean(penalties))


def plain_k_reciprocal(
    q_feats: np.ndarray,
    g_feats: np.ndarray,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    dtype: type = np.float32,
) -> np.ndarray:
    """k-reciprocal re-ranking over dense (N, N) matrices of `dtype`, image by image: (Q, G).

    Earlier releases compute in float16.
    """
    feats = np.concatenate([q_feats, g_feats]).astype(np.float64)
    queries, count = len(q_feats), len(feats)
    norms = np.square(feats).sum(axis=1)
    distance = np.maximum(norms[:, None] + norms - 2 * feats @ feats.T, 0)
    np.fill_diagonal(distance, 0)
    distance = (distance / distance.max(axis=1, keepdims=True)).astype(dtype)
    ranking = np.argsort(distance, axis=1, kind="stable")
    codes = np.zeros((count, count), dtype)
    for i in range(count):
        members = _expanded_neighbours(ranking, i, k1)
        weights = np.exp(-distance[i, members])
        codes[i, members] = weights / weights.sum()
    if k2 > 1:
        codes = np.stack([codes[ranking[i, :k2]].mean(axis=0) for i in range(count)])
    holders = [np.flatnonzero(codes[:, j]) for j in range(count)]
    jaccard = np.zeros((queries, count), dtype)
    for i in range(queries):
        shared = np.zeros(count, dtype)
        for j in np.flatnonzero(codes[i]):
            shared[holders[j]] += np.minimum(codes[i, j], codes[holders[j], j])
        jaccard[i] = 1 - shared / (2 - shared)
    result = (1 - lambda_value) * jaccard + lambda_value * distance[:queries]
    return result[:, queries:]


def _expanded_neighbours(ranking: np.ndarray, i: int, k1: int) -> np.ndarray:
    """R*(i): the k-reciprocal set, expanded."""
    mutual = _mutual_neighbours(ranking, i, k1)
    members = mutual
    for j in mutual:
        candidate = _mutual_neighbours(ranking, j, round(k1 / 2))
        if len(np.intersect1d(candidate, mutual)) > 2 / 3 * len(candidate):
            members = np.append(members, candidate)
    return np.unique(members)


def _mutual_neighbours(ranking: np.ndarray, i: int, k: int) -> np.ndarray:
    """R(i, k): those among i's first k + 1 that have i among their first k + 1."""
    forward = ranking[i, : k + 1]
    backward = ranking[forward, : k + 1]
    return forward[(backward == i).any(axis=1)]
