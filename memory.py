"""Memory prototype banks: the read, the two memories, and the numbers that tell their health.

Letters in shapes: ``L`` training identities, ``T`` instance prototypes per identity, ``R`` part
prototypes per instance, ``M = L*T*R`` part prototypes, ``C`` backbone channels.

Source: "Memory Regulation and Alignment toward Generalizer RGB-Infrared Person Re-identification"
(arXiv 2109.08843), figure 2; the read descends from MemAE (Gong et al., ICCV 2019).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

SHRINK = 0.0025  # lambda: addressing weights at or below it are dropped (released setting)
INSTANCES_PER_ID = 5  # T, released setting
PARTS_PER_INSTANCE = 6  # R, released setting; not tied to the number of stripes
EPSILON = 1e-12  # of the releases' divisions; float32 does not resolve it, float64 goldens do
VARIANTS = ("paper", "released")
LEVELS = ("part", "instance", "semantic")


class MemoryRead(NamedTuple):
    """What a memory returns: one map per granularity, each of the input's shape, or None.

    Attributes:
        part: Read from the part bank, (B, C, H, W).
        instance: Read from the instance bank (MG-MRA, variant ``paper``), (B, C, H, W).
        semantic: Read from the semantic bank (MG-MRA), (B, C, H, W).
    """

    part: Tensor
    instance: Tensor | None = None
    semantic: Tensor | None = None


class MemoryHealth:
    """Accumulates, without any gradient, how a memory's levels are addressed.

    Hand one instance to the forward passes of an epoch, then call `summary`. Counters stay on the
    device, so that updating never waits for it.
    """

    def __init__(self) -> None:
        """Starts at zero."""
        self._levels: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def update(self, level: str, weights: Tensor) -> None:
        """Adds one read.

        Args:
            level: "part", "instance" or "semantic".
            weights: Addressing weights (n, m); rows sum to 1 or are zero.
        """
        used = weights > 0
        survivors = used.sum(dim=1)
        entropy = -torch.special.xlogy(weights, weights).sum()
        new = {
            "rows": torch.tensor(len(weights), device=weights.device),
            "zero_rows": (survivors == 0).sum(),
            "survivors": survivors.sum(),
            "entropy": entropy.double(),
            "used": used.any(dim=0),
        }
        old = self._levels.get(level)
        if old is not None:
            new = {k: (old[k] | v) if k == "used" else old[k] + v for k, v in new.items()}
        self._levels[level] = new

    def summary(self) -> dict[str, float]:
        """Returns ``{level/number: value}`` over all updates.

        ``zero_reads``: share of positions whose read is all zero. ``survivors``: mean number of
        prototypes above the threshold per position. ``used``: share of the bank's prototypes that
        any position addressed. ``entropy``: mean entropy in nats of the positions that read
        something (0 when none did).
        """
        result = {}
        for level, counters in self._levels.items():
            rows, zero_rows = int(counters["rows"]), int(counters["zero_rows"])
            result[f"{level}/zero_reads"] = zero_rows / rows
            result[f"{level}/survivors"] = int(counters["survivors"]) / rows
            result[f"{level}/used"] = float(counters["used"].double().mean())
            result[f"{level}/entropy"] = float(counters["entropy"]) / max(rows - zero_rows, 1)
        return result


def address(x: Tensor, bank: Tensor, shrink: float) -> Tensor:
    """Addressing weights: softmax over the bank, hard-shrunk, renormalised over the survivors.

    The softmax's normaliser cancels in the renormalisation, so that the result is the softmax over
    the survivors alone: gradient reaches survivors only, and at most ``1 / shrink`` of them.

    Args:
        x: Queries, (n, C).
        bank: Prototypes, (m, C).
        shrink: Weights at or below it are set to zero.

    Returns:
        Weights (n, m) in float32 or wider; rows sum to 1 or are zero.

    Source: MemAE's hard shrinkage, ``relu(w - lambda) * w / (|w - lambda| + epsilon)``.
    """
    logits = x @ bank.t()  # (n, m)
    weights = logits.softmax(dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    excess = (weights - shrink).relu()
    survivors = weights * (excess / (excess + EPSILON))
    return survivors / survivors.sum(dim=1, keepdim=True).clamp_min(EPSILON)


def read(
    x: Tensor, bank: Tensor, shrink: float, *, level: str = "", health: MemoryHealth | None = None
) -> Tensor:
    """Reads a bank at every position of a map.

    Positions are independent: a whole map at once equals stripe by stripe.

    Args:
        x: Queries, (B, C, H, W).
        bank: Prototypes, (m, C).
        shrink: Threshold on the addressing weights, in [0, 1).
        level: Name under which `health` counts this read.
        health: Where to count; None costs nothing.

    Returns:
        Map of x's shape; zero where no prototype's weight is above `shrink`.
    """
    batch, channels, height, width = x.shape
    queries = x.permute(0, 2, 3, 1).reshape(-1, channels)  # (B*H*W, C)
    weights = address(queries, bank, shrink)
    if health is not None:
        health.update(level, weights.detach())
    values = weights.to(queries.dtype) @ bank.to(queries.dtype)  # (B*H*W, C)
    return values.view(batch, height, width, channels).permute(0, 3, 1, 2)


class SingleGranularityMemory(nn.Module):
    """SG-MRA's memory: one learned bank of part prototypes.

    Attributes:
        part_bank: The M = L*T*R part prototypes, (M, C), uniform in +-1/sqrt(C) at the start.
    """

    def __init__(
        self,
        num_ids: int,
        instances_per_id: int = INSTANCES_PER_ID,
        parts_per_instance: int = PARTS_PER_INSTANCE,
        dim: int = 2048,
        shrink: float = SHRINK,
    ) -> None:
        """Builds the bank.

        Args:
            num_ids: Training identities L.
            instances_per_id: Instance prototypes per identity T.
            parts_per_instance: Part prototypes per instance R.
            dim: Channels C of the map to be read.
            shrink: Addressing weights at or below it are dropped.

        Raises:
            ValueError: When a size is not positive or `shrink` is outside [0, 1).
        """
        super().__init__()
        sizes = {
            "num_ids": num_ids,
            "instances_per_id": instances_per_id,
            "parts_per_instance": parts_per_instance,
            "dim": dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= shrink < 1:
            raise ValueError(f"shrink must be in [0, 1), got {shrink}")
        self.num_ids = num_ids
        self.instances_per_id = instances_per_id
        self.parts_per_instance = parts_per_instance
        self.dim = dim
        self.shrink = shrink
        num_parts = num_ids * instances_per_id * parts_per_instance
        self.part_bank = nn.Parameter(torch.empty(num_parts, dim))
        nn.init.uniform_(self.part_bank, -1 / math.sqrt(dim), 1 / math.sqrt(dim))

    def forward(self, x: Tensor, health: MemoryHealth | None = None) -> MemoryRead:
        """Reads the part bank at every position of x (B, C, H, W)."""
        return MemoryRead(part=read(x, self.part_bank, self.shrink, level="part", health=health))

    def extra_repr(self) -> str:
        """One line of sizes for ``print(model)``."""
        return (
            f"L={self.num_ids}, T={self.instances_per_id}, R={self.parts_per_instance}, "
            f"C={self.dim}, shrink={self.shrink}"
        )


class MultiGranularityMemory(SingleGranularityMemory):
    """MG-MRA's memory: part prototypes, and instance and semantic prototypes made from them.

    Only the part bank and two gates are learned. Variant ``paper`` queries in a cascade (the part
    read addresses the instances, the instance read the semantics) and averages each instance's own
    parts. Variant ``released`` queries every level with x, returns no instance read, and gates and
    averages interleaved: the flat memory of an instance is viewed as (C, R), so that channel c is
    the mean of R neighbouring entries of a single part.

    Deviation: the default is ``paper``, as in the figure; ``released`` continues from the later
    upload's checkpoints.

    Attributes:
        part_gate: Gate over the R parts of an instance, Conv1d(R, R, 1) along the channels.
        instance_gate: Gate over the T instances of an identity, Conv1d(T, T, 1).
    """

    def __init__(
        self,
        num_ids: int,
        instances_per_id: int = INSTANCES_PER_ID,
        parts_per_instance: int = PARTS_PER_INSTANCE,
        dim: int = 2048,
        shrink: float = SHRINK,
        variant: str = "paper",
    ) -> None:
        """Builds bank and gates; see `SingleGranularityMemory`.

        Raises:
            ValueError: Also when `variant` is unknown.
        """
        super().__init__(num_ids, instances_per_id, parts_per_instance, dim, shrink)
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        self.variant = variant
        self.part_gate = nn.Conv1d(parts_per_instance, parts_per_instance, kernel_size=1)
        self.instance_gate = nn.Conv1d(instances_per_id, instances_per_id, kernel_size=1)

    def banks(self) -> tuple[Tensor, Tensor]:
        """Returns the instance bank (L*T, C) and the semantic bank (L, C)."""
        size = (self.parts_per_instance, self.dim)
        if self.variant == "paper":
            parts = self.part_bank.view(-1, *size)  # (L*T, R, C)
        else:  # the flat memory of an instance seen as (C, R)
            parts = self.part_bank.view(-1, *reversed(size)).transpose(1, 2)  # (L*T, R, C)
        instance = (torch.sigmoid(self.part_gate(parts)) * parts).mean(dim=1)  # (L*T, C)
        grouped = instance.view(self.num_ids, self.instances_per_id, self.dim)  # (L, T, C)
        semantic = (torch.sigmoid(self.instance_gate(grouped)) * grouped).mean(dim=1)  # (L, C)
        return instance, semantic

    def forward(self, x: Tensor, health: MemoryHealth | None = None) -> MemoryRead:
        """Reads all granularities at every position of x (B, C, H, W)."""
        instance_bank, semantic_bank = self.banks()
        part = read(x, self.part_bank, self.shrink, level="part", health=health)
        if self.variant == "released":
            semantic = read(x, semantic_bank, self.shrink, level="semantic", health=health)
            return MemoryRead(part=part, semantic=semantic)
        instance = read(part, instance_bank, self.shrink, level="instance", health=health)
        semantic = read(instance, semantic_bank, self.shrink, level="semantic", health=health)
        return MemoryRead(part=part, instance=instance, semantic=semantic)

    def extra_repr(self) -> str:
        """One line of sizes for ``print(model)``."""
        return f"{super().extra_repr()}, variant={self.variant}"
