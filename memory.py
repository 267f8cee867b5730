"""Memory prototype banks: the read, the two memories, and the numbers that tell their health.

Letters in shapes: ``L`` training identities, ``T`` instance prototypes per identity, ``R`` part
prototypes per instance, ``M = L*T*R`` part prototypes, ``C`` backbone channels.

Source: "Memory Regulation and Alignment toward Generalizer RGB-Infrared Person Re-identification"
(arXiv 2109.08843), its figure; the read descends from MemAE (Gong et al., ICCV 2019).
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHRINK = 0.0025  # lambda: addressing weights at or below it are dropped (released setting)
INSTANCES_PER_ID = 5  # T, released setting
PARTS_PER_INSTANCE = 6  # R, released setting; not tied to the number of stripes
EPSILON = 1e-12  # of the releases' divisions; float32 does not resolve it, float64 goldens do
CHUNK_ENTRIES = 1 << 20  # scores held at a time on the CPU: 4 MiB, within its cache
DENSE_SHARE = 0.05  # above this share of survivors, dense products are cheaper
SPARSE_BANK = 2.0  # banks of fewer than this over lambda prototypes are read densely
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
    def update(self, level: str, survivors: "Survivors", num_prototypes: int) -> None:
        """Adds one read.

        Args:
            level: "part", "instance" or "semantic".
            survivors: Who was addressed, and how strongly.
            num_prototypes: Size m of the bank.
        """
        counts = survivors.offsets.diff()
        used = torch.zeros(num_prototypes, dtype=torch.bool, device=counts.device)
        used[survivors.columns] = True
        weights = survivors.weights
        new = {
            "rows": torch.tensor(len(counts), device=counts.device),
            "zero_rows": (counts == 0).sum(),
            "survivors": counts.sum(),
            "entropy": -torch.special.xlogy(weights, weights).sum(dtype=torch.float64),
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


class Survivors(NamedTuple):
    """Sparse addressing weights of n queries: row i owns entries offsets[i] to offsets[i + 1].

    Attributes:
        offsets: (n + 1,) int64.
        columns: Prototype of each entry, (nnz,) int64.
        weights: Its weight, (nnz,); a row's sum to 1.
    """

    offsets: Tensor
    columns: Tensor
    weights: Tensor

    def rows(self) -> Tensor:
        """Query of each entry, (nnz,)."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(counts, output_size=len(self.columns))


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
    weights = logits.softmax(dim=1, dtype=_at_least_float32(logits))
    excess = (weights - shrink).relu()
    survivors = weights * (excess / (excess + EPSILON))
    return survivors / survivors.sum(dim=1, keepdim=True).clamp_min(EPSILON)


@torch.no_grad()
def select(x: Tensor, bank: Tensor, shrink: float) -> Survivors:
    """Finds the prototypes above the threshold, chunk by chunk: no (n, m) matrix is kept.

    Args:
        x: Queries, (n, C).
        bank: Prototypes, (m, C), of x's type.
        shrink: Softmax weights at or below it do not survive.

    Deviation: without the epsilon of `address`, whose effect float32 does not resolve.
    """
    on_cpu = x.device.type == "cpu"
    per_chunk = max(1, CHUNK_ENTRIES // len(bank)) if on_cpu else len(x)
    # A zero query addresses all prototypes alike, hence none where 1 / m is within the threshold.
    skip_zeros = on_cpu and len(bank) * shrink >= 1
    counts, columns, weights = [], [], []
    for queries in x.split(per_chunk):
        if skip_zeros:
            alive = queries.norm(dim=1) > 0
            some_zero = not alive.all()
            queries = queries[alive] if some_zero else queries
        logits = (queries @ bank.t()).to(_at_least_float32(x))  # (chunk, m)
        log_norm = logits.logsumexp(dim=1, keepdim=True)
        survives = logits > log_norm + (math.log(shrink) if shrink else -math.inf)
        count = survives.sum(dim=1)
        found = survives.nonzero()  # row by row
        weight = (logits[found[:, 0], found[:, 1]] - log_norm[found[:, 0], 0]).exp()
        total = torch.zeros_like(log_norm[:, 0]).index_add_(0, found[:, 0], weight)
        if skip_zeros and some_zero:
            count = torch.zeros_like(alive, dtype=count.dtype).index_put_((alive,), count)
        counts.append(count)
        columns.append(found[:, 1])
        weights.append(weight / total[found[:, 0]])
    offsets = torch.cat([counts[0].new_zeros(1), torch.cat(counts).cumsum(0)])
    return Survivors(offsets, torch.cat(columns), torch.cat(weights))


class _SparseRead(torch.autograd.Function):
    """Weighted sums of the survivors; the backward, too, costs what the survivors cost."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bank: Tensor, offsets: Tensor, columns: Tensor, weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, bank, offsets, columns, weights)
        return _bag(bank, columns, offsets, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bank, offsets, columns, weights = ctx.saved_tensors
        survivors = Survivors(offsets, columns, weights)
        rows = survivors.rows()
        # Softmax over the survivors: d logit = a * (d a - sum of a * d a over the row).
        grad_weight = _row_products(grad, bank, survivors, rows)  # (nnz,)
        mean = torch.zeros_like(grad[:, 0]).index_add_(0, rows, weights * grad_weight)
        grad_logit = weights * (grad_weight - mean[rows])
        grad_x = grad_bank = None
        if ctx.needs_input_grad[0]:
            grad_x = _bag(bank, columns, offsets, grad_logit).to(x.dtype)
        if ctx.needs_input_grad[1]:
            order = columns.argsort(stable=True)
            by_column = torch.bincount(columns, minlength=len(bank)).cumsum(0)
            starts = torch.cat([by_column.new_zeros(1), by_column])
            grad_bank = _bag(grad, rows[order], starts, weights[order])
            grad_bank += _bag(x.to(grad.dtype), rows[order], starts, grad_logit[order])
        return grad_x, grad_bank, None, None, None


def _bag(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Sums of ``weights * table[indices]`` over each bag: (bags, C); empty bags are zero."""
    if not len(indices):
        return table.new_zeros(len(offsets) - 1, table.shape[1])
    return F.embedding_bag(
        indices,
        table,
        offsets,
        mode="sum",
        per_sample_weights=weights.to(table.dtype),
        include_last_offset=True,
    )


def _row_products(a: Tensor, b: Tensor, survivors: Survivors, rows: Tensor) -> Tensor:
    """Scalar products ``a[rows] . b[columns]`` of the survivors, (nnz,), nothing gathered."""
    # This is what embedding_bag's own derivative towards its weights computes.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return products(a.contiguous(), b.to(a.dtype), survivors.columns, survivors.offsets, rows, 0)


def read(
    x: Tensor, bank: Tensor, shrink: float, *, level: str = "", health: MemoryHealth | None = None
) -> Tensor:
    """Reads a bank at every position of a map.

    Positions are independent: a whole map at once equals stripe by stripe. The read is a softmax
    over the survivors alone, hence computed from them: scores for all, sums and gradients for the
    few. float64 takes the dense route, which follows the releases to the last epsilon, and so do
    banks of which many prototypes can survive at once.

    Args:
        x: Queries, (B, C, H, W).
        bank: Prototypes, (m, C).
        shrink: Threshold on the addressing weights, in [0, 1).
        level: Name under which `health` counts this read.
        health: Where to count; None costs nothing.

    Returns:
        Map of x's shape, float32 or wider; zero where no prototype's weight is above `shrink`.
    """
    batch, channels, height, width = x.shape
    queries = x.permute(0, 2, 3, 1).reshape(-1, channels)  # (B*H*W, C)
    survivors = None
    if x.dtype != torch.float64 and len(bank) * shrink >= SPARSE_BANK:
        survivors = select(*_autocast(queries, bank), shrink)
    if survivors is None or len(survivors.columns) > DENSE_SHARE * len(queries) * len(bank):
        weights = address(queries, bank, shrink)
        survivors = None if health is None else _from_dense(weights.detach())
        values = weights.to(queries.dtype) @ bank.to(queries.dtype)  # (B*H*W, C)
    else:
        values = sparse_read(queries, bank, survivors)
    if health is not None:
        health.update(level, survivors, len(bank))
    return values.view(batch, height, width, channels).permute(0, 3, 1, 2)


def sparse_read(queries: Tensor, bank: Tensor, survivors: Survivors) -> Tensor:
    """Weighted sums of the survivors' prototypes, differentiable in both: (n, C)."""
    with torch.autocast(queries.device.type, enabled=False):
        return _SparseRead.apply(queries, bank, *survivors)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Detached tensors in the type that autocast would multiply them in."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        return tuple(t.detach().to(torch.get_autocast_dtype(kind)) for t in tensors)
    return tuple(t.detach() for t in tensors)


def _from_dense(weights: Tensor) -> Survivors:
    """Sparse form of addressing weights (n, m)."""
    found = weights.nonzero()
    counts = (weights > 0).sum(dim=1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Survivors(offsets, found[:, 1], weights[found[:, 0], found[:, 1]])


def _gated_mean(gate: nn.Conv1d, groups: Tensor) -> Tensor:
    """Mean over the members of each group (n, members, C), gated by ``sigmoid(gate(groups))``."""
    # A convolution of kernel 1, as a batched product: three times faster on a CPU.
    weight = gate.weight[:, :, 0].expand(len(groups), -1, -1)
    return (torch.sigmoid(torch.baddbmm(gate.bias[:, None], weight, groups)) * groups).mean(dim=1)


def _at_least_float32(x: Tensor) -> torch.dtype:
    """Float32 under autocast, the tensor's own type where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


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

    def forward(self, x: Tensor, health: MemoryHealth | None = None) -> MemoryRead:
        """Reads the part bank at every position of x (B, C, H, W)."""
        return MemoryRead(
            part=read(
                x, self.part_bank, self.threshold(self.part_bank), level="part", health=health
            )
        )

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

    def forward(self, x: Tensor, health: MemoryHealth | None = None) -> MemoryRead:
        """Reads all granularities at every position of x (B, C, H, W)."""
        instance_bank, semantic_bank = self.banks()
        part = read(x, self.part_bank, self.threshold(self.part_bank), level="part", health=health)
        if self.variant == "released":
            semantic = read(
                x, semantic_bank, self.threshold(semantic_bank), level="semantic", health=health
            )
            return MemoryRead(part=part, semantic=semantic)
        instance = read(
            part, instance_bank, self.threshold(instance_bank), level="instance", health=health
        )
        semantic = read(
            instance, semantic_bank, self.threshold(semantic_bank), level="semantic", health=health
        )
        return MemoryRead(part=part, instance=instance, semantic=semantic)

    def extra_repr(self) -> str:
        """One line of sizes for ``print(model)``."""
        return f"{super().extra_repr()}, variant={self.variant}"
