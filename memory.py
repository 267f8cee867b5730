"""The two memories of prototype banks, and the numbers that tell their health.

Letters in shapes: ``L`` training identities, ``T`` instance prototypes per identity, ``R`` part
prototypes per instance, ``M = L*T*R`` part prototypes, ``C`` backbone channels.

Source: "Memory Regulation and Alignment toward Generalizer RGB-Infrared Person Re-identification"
(arXiv 2109.08843), its figure; the read descends from MemAE (Gong et al., ICCV 2019).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from networks.sparse_read import EPSILON, Observer, Survivors, at_least_float32, read

SHRINK = 0.0025  # lambda: addressing weights at or below it are dropped (released setting)
INSTANCES_PER_ID = 5  # T, released setting
PARTS_PER_INSTANCE = 6  # R, released setting; not tied to the number of stripes
GROUPS_PER_CHUNK = 32  # groups of prototypes gated at a time on the CPU
VARIANTS = ("paper", "released")
LEVELS = ("part", "instance", "semantic")
HEALTH = ("zero_reads", "survivors", "used", "entropy")  # numbers of `MemoryHealth.summary`


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
    def update(
        self, level: str, weights: Survivors | Tensor, num_prototypes: int, repeats: int = 1
    ) -> None:
        """Adds one read.

        Args:
            level: "part", "instance" or "semantic".
            weights: Who was addressed, and how strongly: sparse, or dense (n, num_prototypes).
            num_prototypes: Size m of the bank.
            repeats: How often its rows, in order, are repeated.
        """
        if isinstance(weights, Survivors):
            counts, columns, weights = weights.offsets.diff(), weights.columns, weights.weights
            used = torch.zeros(num_prototypes, dtype=torch.bool, device=counts.device)
            used[columns] = True
        else:
            counts, used = (weights > 0).sum(dim=1), weights.amax(dim=0) > 0
            # Rows in half precision do not quite sum to 1.
            weights = weights.to(at_least_float32(weights))
            weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(EPSILON)
        entropy = -torch.special.xlogy(weights, weights).sum(dim=-1).sum(dtype=torch.float64)
        new = {
            "rows": torch.full((), repeats * len(counts), device=counts.device),
            "zero_rows": repeats * (counts == 0).sum(),
            "survivors": repeats * counts.sum(),
            "entropy": repeats * entropy,
            "used": used,
        }
        old = self._levels.get(level)
        if old is not None:
            old = {k: v.to(counts.device) for k, v in old.items()}
            new = {k: (old[k] | v) if k == "used" else old[k] + v for k, v in new.items()}
        self._levels[level] = new

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The counters by level and name, on the CPU: what `load_state_dict` goes on from."""
        return {
            level: {name: counter.cpu() for name, counter in counters.items()}
            for level, counters in self._levels.items()
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Takes over the counters of `state_dict`; the next update moves them to its device."""
        self._levels = {level: dict(counters) for level, counters in state.items()}

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
            result[f"{level}/entropy"] = abs(float(counters["entropy"])) / max(rows - zero_rows, 1)
        return result


def _gated_mean(gate: nn.Conv1d, groups: Tensor) -> Tensor:
    """Mean over the members of each group (n, members, C), gated by ``sigmoid(gate(groups))``."""
    with torch.autocast(groups.device.type, enabled=False):
        return _GatedMean.apply(groups, gate.weight[:, :, 0], gate.bias)


class _GatedMean(torch.autograd.Function):
    """Gated mean that keeps nothing for its backward but its inputs.

    A convolution of kernel 1 is a batched product: three times faster on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, groups: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(groups, weight, bias)
        chunks = _chunks(groups)
        return torch.cat([_gate(x, weight, bias).mul_(x).mean(dim=1) for x in chunks])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups, weight, bias = ctx.saved_tensors
        grad = grad.unsqueeze(1) / groups.shape[1]
        grad_groups = torch.empty_like(groups)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for x, above, result in zip(*map(_chunks, (groups, grad, grad_groups)), strict=True):
            gate = _gate(x, weight, bias)
            inner = torch.addcmul(gate, gate, gate, value=-1).mul_(x).mul_(above)
            grad_weight += torch.bmm(inner, x.mT).sum(dim=0)
            grad_bias += inner.sum(dim=(0, 2))
            result.copy_(gate.mul_(above).baddbmm_(weight.t().expand(len(x), -1, -1), inner))
        return grad_groups, grad_weight, grad_bias


def _gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``sigmoid(weight @ x + bias)`` of each group of x (n, members, C)."""
    return torch.baddbmm(bias[:, None], weight.expand(len(x), -1, -1), x).sigmoid_()


def _chunks(groups: Tensor) -> tuple[Tensor, ...]:
    """Groups a few at a time on the CPU, whose cache then holds what is computed from them."""
    return groups.split(GROUPS_PER_CHUNK if groups.device.type == "cpu" else len(groups))


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
        *,
        shrink_scale: float | None = None,
    ) -> None:
        """Builds the bank.

        Args:
            num_ids: Training identities L.
            instances_per_id: Instance prototypes per identity T.
            parts_per_instance: Part prototypes per instance R.
            dim: Channels C of the map to be read.
            shrink: Addressing weights at or below it are dropped.
            shrink_scale: In place of `shrink`, a threshold of ``shrink_scale / m`` on a bank of m
                prototypes, so that all levels and any number of identities are cut alike.

        Raises:
            ValueError: When a size is not positive, `shrink` is outside [0, 1), or `shrink_scale`
                is not above 0.
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
        if shrink_scale is not None and not shrink_scale > 0:
            raise ValueError(f"shrink_scale must be above 0, got {shrink_scale}")
        self.shrink = shrink
        self.shrink_scale = shrink_scale
        num_parts = num_ids * instances_per_id * parts_per_instance
        self.part_bank = nn.Parameter(torch.empty(num_parts, dim))
        nn.init.uniform_(self.part_bank, -1 / math.sqrt(dim), 1 / math.sqrt(dim))

    def threshold(self, bank: Tensor) -> float:
        """Threshold on the addressing weights of a bank (m, C)."""
        if self.shrink_scale is None:
            return self.shrink
        return min(self.shrink_scale / len(bank), 1.0)

    def forward(self, x: Tensor, health: Observer | None = None) -> MemoryRead:
        """Reads all granularities at every position of x (B, C, H, W); `health` counts them."""
        return MemoryRead(self._read("part", x, self.part_bank, health))

    def _read(self, level: str, x: Tensor, bank: Tensor, health: Observer | None) -> Tensor:
        return read(x, bank, self.threshold(bank), level=level, health=health)

    def extra_repr(self) -> str:
        """One line of sizes for ``print(model)``."""
        return (
            f"L={self.num_ids}, T={self.instances_per_id}, R={self.parts_per_instance}, "
            f"C={self.dim}, "
            + (f"shrink={self.shrink_scale}/m" if self.shrink_scale else f"shrink={self.shrink}")
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
        *,
        shrink_scale: float | None = None,
    ) -> None:
        """Builds bank and gates; see `SingleGranularityMemory`.

        Raises:
            ValueError: Also when `variant` is unknown.
        """
        super().__init__(
            num_ids, instances_per_id, parts_per_instance, dim, shrink, shrink_scale=shrink_scale
        )
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
        instance = _gated_mean(self.part_gate, parts)  # (L*T, C)
        grouped = instance.view(self.num_ids, self.instances_per_id, self.dim)  # (L, T, C)
        return instance, _gated_mean(self.instance_gate, grouped)  # (L, C)

    def forward(self, x: Tensor, health: Observer | None = None) -> MemoryRead:
        """Reads all granularities; see `SingleGranularityMemory.forward`."""
        instance_bank, semantic_bank = self.banks()
        part = self._read("part", x, self.part_bank, health)
        if self.variant == "released":
            semantic = self._read("semantic", x, semantic_bank, health)
            return MemoryRead(part, semantic=semantic)
        instance = self._read("instance", part, instance_bank, health)
        semantic = self._read("semantic", instance, semantic_bank, health)
        return MemoryRead(part, instance, semantic)

    def extra_repr(self) -> str:
        """One line of sizes for ``print(model)``."""
        return f"{super().extra_repr()}, variant={self.variant}"
