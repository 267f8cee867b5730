"""The read of a bank, and the memories of SG-MRA and MG-MRA.

Letters in shapes: ``L`` training identities, ``T`` instance prototypes per identity, ``R`` part
prototypes per instance, ``M = L*T*R`` part prototypes, ``C`` backbone channels, ``m`` prototypes of
any bank, ``n = B*H*W`` positions.

Source: "Memory Regulation and Alignment toward Generalizer RGB-Infrared Person Re-identification"
(arXiv 2109.08843), its figure; the read descends from MemAE (Gong et al., ICCV 2019).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks import sparse_read
from networks.settings import INSTANCES_PER_ID, LEVELS, PARTS_PER_INSTANCE, SHRINK, VARIANTS

EPSILON = 1e-12  # of the releases' divisions
RECOMPUTED_ENTRIES = 1 << 24  # weights, n * m, above which the backward pass recomputes them


def read(
    x: Tensor, bank: Tensor, shrink: float, temperature: float | None = None
) -> tuple[Tensor, sparse_read.Weights]:
    """Reads a bank (m, C) with a query at every position of a map x (B, C, H, W).

    ``weights = softmax(bank @ query)``, those at or below `shrink` set to zero and the rest
    renormalised; ``value = weights @ bank``. With a `temperature` cosines in place of dot products
    address the bank, whatever the norms: ``softmax(cos(bank, query) / temperature)``.

    Under autocast the products run in half precision; the prototypes' mean, which would swamp what
    tells them apart, is kept out of them.

    Returns:
        The values, a map of x's shape, zero where no weight is above `shrink`; and the weights,
        float32 or wider, without gradient, whose rows sum to 1 or are zero.

    Source: MemAE (Gong et al., ICCV 2019).
    """
    b, c, h, w = x.shape
    queries, keys = x.permute(0, 2, 3, 1).reshape(-1, c), bank  # (n, C), (m, C)
    if temperature is not None:
        queries = F.normalize(queries) / temperature
        keys = F.normalize(bank)
    keys = keys - keys.mean(dim=0)  # cancels in the softmax; smaller scores are rounded less
    if sparse_read.pays_off(queries, bank, shrink):
        values, weights = sparse_read.sparse_read(queries, keys, bank, shrink)
    elif len(queries) * len(bank) > RECOMPUTED_ENTRIES and torch.is_grad_enabled():
        how = {"use_reentrant": False, "preserve_rng_state": False}
        values, weights = checkpoint(plain_read, queries, keys, bank, shrink, **how)
    else:
        values, weights = plain_read(queries, keys, bank, shrink)
    return values.view(b, h, w, c).permute(0, 3, 1, 2), weights


def plain_read(queries: Tensor, keys: Tensor, bank: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
    """The formula of `read`: queries (n, C), keys, bank (m, C) -> values (n, C), weights (n, m)."""
    scores = queries @ keys.t()  # (n, m)
    weights = scores.softmax(dim=1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = hard_shrink(weights, shrink)
    total = weights.sum(dim=1, keepdim=True)  # (n, 1)
    weights = weights / total.clamp_min(EPSILON)
    common = bank.mean(dim=0)  # (C,)
    values = (total > 0) * common  # (n, C)
    values += weights @ (bank - common)  # weights @ bank, rounded less
    return values, weights.detach()


def hard_shrink(weights: Tensor, shrink: float) -> Tensor:
    """Sets weights at or below the threshold to zero.

    Deviation: MemAE and the releases multiply by ``excess / (excess + 1e-12)``, where ``excess =
    weights - shrink``. Its derivative explodes within 1e-8 of the threshold, which float32 hardly
    resolves; float64, for tests alone, keeps it: the releases' first five steps depend on it.
    """
    if weights.dtype != torch.float64:
        return F.threshold(weights, shrink, 0.0)
    excess = (weights - shrink).relu()
    return weights * (excess / (excess + EPSILON))


class MemoryRead(NamedTuple):
    """What a memory returns: the read of each granularity's bank, (B, C, H, W), or None."""

    part: Tensor
    instance: Tensor | None = None  # of MG-MRA's cascades
    semantic: Tensor | None = None  # of MG-MRA
    weights: Mapping[str, sparse_read.Weights] = {}  # by level, for statistics; may be left out

    def coarsest(self) -> Tensor:
        """The read of the coarsest granularity there is: the method's own result."""
        return next(r for r in (self.semantic, self.instance, self.part) if r is not None)


class SingleGranularityMemory(nn.Module):
    """SG-MRA's memory: one learned bank of part prototypes, `part_bank` (M, C)."""

    levels: tuple[str, ...] = ("part",)  # granularities that `forward` returns

    def __init__(
        self,
        num_ids: int,
        instances_per_id: int = INSTANCES_PER_ID,
        parts_per_instance: int = PARTS_PER_INSTANCE,
        dim: int = 2048,
        shrink: float = SHRINK,
        *,
        shrink_scale: float | None = None,
        temperature: float | None = None,
    ) -> None:
        """Builds the bank.

        Args:
            num_ids: Training identities L.
            instances_per_id: Instance prototypes per identity T.
            parts_per_instance: Part prototypes per instance R.
            dim: Channels C of the map and of each prototype.
            shrink: Addressing weights at or below it are dropped.
            shrink_scale: In place of `shrink`, a threshold of ``shrink_scale / m`` on a bank of m
                prototypes, so that all levels and any number of identities are cut alike.
            temperature: Of cosine addressing; None: dot products. See `read`.

        Raises:
            ValueError: When a size, `shrink_scale` or `temperature` is not positive, or `shrink` is
                outside [0, 1).
        """
        super().__init__()
        self.num_ids, self.dim = num_ids, dim
        self.instances_per_id, self.parts_per_instance = instances_per_id, parts_per_instance
        self.shrink, self.shrink_scale, self.temperature = shrink, shrink_scale, temperature
        for name in ("num_ids", "instances_per_id", "parts_per_instance", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= shrink < 1:
            raise ValueError(f"shrink must be in [0, 1), got {shrink}")
        for name in ("shrink_scale", "temperature"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        num_parts = num_ids * instances_per_id * parts_per_instance
        self.part_bank = nn.Parameter(torch.empty(num_parts, dim))
        nn.init.uniform_(self.part_bank, -1 / math.sqrt(dim), 1 / math.sqrt(dim))

    def threshold(self, level: str, num_prototypes: int) -> float:
        """Threshold on the addressing weights of a level's bank; the same rule for all levels."""
        if self.shrink_scale is None:
            return self.shrink
        return min(self.shrink_scale / num_prototypes, 1.0)

    def bank_sizes(self) -> dict[str, int]:
        """Returns how many prototypes m the bank of each level has."""
        instances = self.num_ids * self.instances_per_id
        sizes = {"part": len(self.part_bank), "instance": instances, "semantic": self.num_ids}
        return {level: sizes[level] for level in self.levels}

    def read(self, level: str, x: Tensor, bank: Tensor) -> tuple[Tensor, sparse_read.Weights]:
        """Reads a level's bank (m, C) with the queries x (B, C, H, W); see `memory.read`."""
        return read(x, bank, self.threshold(level, len(bank)), self.temperature)

    def forward(self, x: Tensor) -> MemoryRead:
        """Reads the part bank at every position of x (B, C, H, W)."""
        part, weights = self.read("part", x, self.part_bank)
        return MemoryRead(part, weights={"part": weights})


class MultiGranularityMemory(SingleGranularityMemory):
    """MG-MRA's memory: part prototypes, and instance and semantic prototypes made from them.

    Only the part bank and two gates are learned: `part_gate` over the R parts of an instance, a
    Conv1d(R, R, 1) along the channels, and `instance_gate` over the T instances of an identity, a
    Conv1d(T, T, 1). The variants:

    - ``paper``, the paper's figure: a cascade, in which the part read queries the instances and the
      instance read the semantics; an instance is the gated mean of its own parts.
    - ``first``, the release's first upload: the same cascade, gated and averaged interleaved: the
      flat memory of an instance is viewed as (C, R), so that channel c averages R neighbouring
      entries of one part in place of the R parts.
    - ``released``, its later upload: interleaved too, but x queries every level, and there is no
      instance read.

    Deviation: the default is ``paper``; the interleaved mean of both uploads is most likely a slip.
    """

    def __init__(
        self,
        num_ids: int,
        instances_per_id: int = INSTANCES_PER_ID,
        parts_per_instance: int = PARTS_PER_INSTANCE,
        dim: int = 2048,
        shrink: float = SHRINK,
        variant: str = "paper",
        **addressing: float | None,
    ) -> None:
        """Builds bank and gates; see `SingleGranularityMemory`.

        Raises:
            ValueError: Also when `variant` is unknown.
        """
        super().__init__(num_ids, instances_per_id, parts_per_instance, dim, shrink, **addressing)
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        self.variant = variant
        self.levels = ("part", "semantic") if variant == "released" else LEVELS
        self.part_gate = nn.Conv1d(parts_per_instance, parts_per_instance, kernel_size=1)
        self.instance_gate = nn.Conv1d(instances_per_id, instances_per_id, kernel_size=1)

    def banks(self) -> tuple[Tensor, Tensor]:
        """Returns the instance bank (L*T, C) and the semantic bank (L, C)."""
        if self.variant == "paper":
            parts = self.part_bank.view(-1, self.parts_per_instance, self.dim)  # (L*T, R, C)
        else:  # the flat memory of an instance seen as (C, R)
            parts = self.part_bank.view(-1, self.dim, self.parts_per_instance).transpose(1, 2)
        instance = gated_mean(parts, self.part_gate)  # (L*T, C)
        instances = instance.view(self.num_ids, self.instances_per_id, self.dim)  # (L, T, C)
        return instance, gated_mean(instances, self.instance_gate)  # (L*T, C), (L, C)

    def forward(self, x: Tensor) -> MemoryRead:
        """Reads all granularities at every position of x (B, C, H, W)."""
        instance_bank, semantic_bank = self.banks()
        part, weights = self.read("part", x, self.part_bank)
        by_level = {"part": weights}
        if self.variant == "released":
            semantic, by_level["semantic"] = self.read("semantic", x, semantic_bank)
            return MemoryRead(part, semantic=semantic, weights=by_level)
        instance, by_level["instance"] = self.read("instance", part, instance_bank)
        semantic, by_level["semantic"] = self.read("semantic", instance, semantic_bank)
        return MemoryRead(part, instance, semantic, by_level)


def gated_mean(groups: Tensor, gate: nn.Conv1d) -> Tensor:
    """Mean over the members of each group, gated: (groups, members, C) -> (groups, C)."""
    with torch.autocast(groups.device.type, enabled=False):  # prototypes stay in full precision
        return (gate(groups).sigmoid() * groups).mean(dim=1)
