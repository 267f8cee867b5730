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
CHUNK_ENTRIES = 1 << 21  # weights held at a time on the CPU: 8 MiB, within its cache
DENSE_SHARE = 0.05  # above this share of survivors, dense products are cheaper
MIN_QUERIES_PER_CHUNK = 128  # also of a bank so large that they hold more
GROUPS_PER_CHUNK = 32  # groups of prototypes gated at a time on the CPU
QUERIES_PER_BAG = 1024  # whose gradients are computed at a time on the CPU
BOUND_FACTOR = 2.1  # 2 and what rounding may add, of bf16 too
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
    def update(
        self, level: str, survivors: "Survivors", num_prototypes: int, repeats: int = 1
    ) -> None:
        """Adds one read.

        Args:
            level: "part", "instance" or "semantic".
            survivors: Who was addressed, and how strongly.
            num_prototypes: Size m of the bank.
            repeats: How often its rows, in order, are repeated.
        """
        counts = survivors.offsets.diff()
        used = torch.zeros(num_prototypes, dtype=torch.bool, device=counts.device)
        used[survivors.columns] = True
        weights = survivors.weights
        new = {
            "rows": torch.tensor(repeats * len(counts), device=counts.device),
            "zero_rows": repeats * (counts == 0).sum(),
            "survivors": repeats * counts.sum(),
            "entropy": -repeats * torch.special.xlogy(weights, weights).sum(dtype=torch.float64),
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

    def repeat(self, times: int) -> "Survivors":
        """All queries, over and over."""
        counts = self.offsets.diff().repeat(times)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Survivors(offsets, self.columns.repeat(times), self.weights.repeat(times))


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
    weights = logits.softmax(dim=1, dtype=at_least_float32(logits))
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
    total, size = len(x), len(bank)
    reading = torch.arange(total, device=x.device)
    per_chunk = max(1, total)
    if x.device.type == "cpu":
        per_chunk = max(MIN_QUERIES_PER_CHUNK, CHUNK_ENTRIES // size)
        if size * shrink >= 1:
            # Scores lie within |x| |b| of zero, so that no weight exceeds exp(2 |x| |b|) / m.
            reach = (x.norm(dim=1) * bank.norm(dim=1).max()).float()
            reading = (BOUND_FACTOR * reach > math.log(size * shrink)).nonzero()[:, 0]
            x = x if len(reading) == total else x[reading]
    found, weights = [], []
    for queries in x.split(per_chunk):
        weight = (queries @ bank.t()).softmax(dim=1, dtype=at_least_float32(x)).flatten()
        places = (weight > shrink).nonzero()[:, 0]
        weights.append(weight[places])
        found.append(places + len(found) * per_chunk * size)
    found, weights = torch.cat(found), torch.cat(weights)
    rows, columns = reading[found // size], found % size
    sums = weights.new_zeros(total).index_add_(0, rows, weights)
    offsets = torch.searchsorted(rows, torch.arange(total + 1, device=x.device))
    return Survivors(offsets, columns, weights / sums[rows])


class _SparseRead(torch.autograd.Function):
    """Weighted sums of the survivors; the backward, too, costs what the survivors cost.

    The second result holds the first one's sums over each image's positions: a gradient that comes
    through it alone is the same for all of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bank: Tensor,
        offsets: Tensor,
        columns: Tensor,
        weights: Tensor,
        images: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, bank, offsets, columns, weights)
        ctx.set_materialize_grads(False)
        if not len(columns):  # one zero vector for all
            values = bank.new_zeros(1, bank.shape[1])
            return values.expand(len(x), -1), values.repeat(images, 1)
        values = _bag(bank, columns, offsets, weights)
        return values, values.unflatten(0, (images, -1)).sum(dim=1)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, bank, offsets, columns, weights = ctx.saved_tensors
        if not len(columns):
            grads = [v.new_zeros(()).expand_as(v) for v in (x, bank)]
            return *grads, None, None, None, None
        survivors = Survivors(offsets, columns, weights)
        rows = survivors.rows()
        grad_weight = torch.zeros_like(weights)
        if grad is not None:
            grad_weight += _row_products(grad, bank, survivors, rows)
        if grad_sums is not None:
            images = rows // (len(x) // len(grad_sums))
            grad_weight += (grad_sums @ bank.to(grad_sums.dtype).t())[images, columns]
        # Softmax over the survivors: d logit = a * (d a - sum of a * d a over the row).
        mean = weights.new_zeros(len(x)).index_add_(0, rows, weights * grad_weight)
        grad_logit = weights * (grad_weight - mean[rows])
        grad_x = grad_bank = None
        if ctx.needs_input_grad[1]:
            order = columns.argsort(stable=True)
            places = torch.arange(len(bank) + 1, device=x.device)
            starts = torch.searchsorted(columns[order], places)
            grad_bank = _bag(x.to(bank.dtype), rows[order], starts, grad_logit[order])
            if grad is not None:
                grad_bank += _bag(grad, rows[order], starts, weights[order])
            if grad_sums is not None:
                used = weights.new_zeros(len(grad_sums) * len(bank))
                used.index_add_(0, images * len(bank) + columns, weights)
                grad_bank += used.view(len(grad_sums), -1).t() @ grad_sums
        if ctx.needs_input_grad[0]:
            grad_x = _grad_of_queries(x, bank, Survivors(offsets, columns, grad_logit))
        return grad_x, grad_bank, None, None, None, None


def _grad_of_queries(x: Tensor, bank: Tensor, grad_logits: Survivors) -> Tensor:
    """Derivative towards the queries (n, C), in their type."""
    offsets, columns, weights = grad_logits
    if x.device.type != "cpu":  # where slices of unknown bounds would wait for the device
        return _bag(bank, columns, offsets, weights).to(x.dtype)
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    for i, out in enumerate(result.split(QUERIES_PER_BAG)):  # no whole map in float32
        own = offsets[i * QUERIES_PER_BAG :][: len(out) + 1]
        part = slice(own[0], own[-1])
        out.copy_(_bag(bank, columns[part], own - own[0], weights[part]))
    return result


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
        Map of x's shape, zero where no prototype's weight is above `shrink`.
    """
    values, total = _read(x, bank, shrink, level, health)
    values.position_sum = (_version(values), total)
    return values


def position_sum(values: Tensor) -> Tensor:
    """Sum of a map (B, C, H, W) over its positions: (B, C), float32 or wider.

    `read` computes its map's own beside the map, with a derivative that costs less than one through
    the map; any other map, one changed in place included, is summed here.
    """
    version, total = getattr(values, "position_sum", (None, None))
    if total is not None and version == _version(values):
        return total
    return values.sum(dim=(2, 3), dtype=at_least_float32(values))


def _version(x: Tensor) -> int:
    """How often a tensor was changed in place; inference mode does not count."""
    return 0 if x.is_inference() else x._version


def _read(
    x: Tensor, bank: Tensor, shrink: float, level: str, health: MemoryHealth | None
) -> tuple[Tensor, Tensor]:
    """What `read` returns, and its sums over each image's positions, (B, C)."""
    batch, channels, height, width = shape = x.shape
    positions = batch * height * width
    constant = x.stride(0) == x.stride(2) == x.stride(3) == 0
    if constant:
        x = _OfAll.apply(x)
    queries = x.permute(0, 2, 3, 1).reshape(-1, channels)  # (B*H*W, C)
    images = len(x)
    survivors = None
    if x.dtype != torch.float64 and len(bank) * shrink >= SPARSE_BANK:
        survivors = select(*_autocast(queries, bank), shrink)
    if survivors is None or len(survivors.columns) > DENSE_SHARE * len(queries) * len(bank):
        weights = address(queries, bank, shrink)
        survivors = None if health is None else _from_dense(weights.detach())
        values = weights.to(queries.dtype) @ bank.to(queries.dtype)  # (B*H*W, C)
        with torch.autocast(x.device.type, enabled=False):
            sums = weights.unflatten(0, (images, -1)).sum(dim=1) @ bank.to(weights.dtype)
    else:
        values, sums = _sparse_read(queries, bank, survivors, images)
    if health is not None:
        health.update(level, survivors, len(bank), repeats=positions // len(queries))
    values = values.view(images, *x.shape[2:], channels).permute(0, 3, 1, 2)
    if constant:
        values = values.expand(shape)
        sums = (height * width * sums).expand(batch, -1)
    return values, sums


class _OfAll(torch.autograd.Function):
    """The vector (1, C, 1, 1) of which a map is an expanded view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x[:1, :, :1, :1].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # What the view's own derivative sums up again; it takes no memory.
        return (grad * (grad.numel() / ctx.shape.numel())).expand(ctx.shape)


def sparse_read(queries: Tensor, bank: Tensor, survivors: Survivors) -> Tensor:
    """Weighted sums of the survivors' prototypes, differentiable in both: (n, C)."""
    return _sparse_read(queries, bank, survivors, 1)[0]


def _sparse_read(
    queries: Tensor, bank: Tensor, survivors: Survivors, images: int
) -> tuple[Tensor, Tensor]:
    with torch.autocast(queries.device.type, enabled=False):
        return _SparseRead.apply(queries, bank, *survivors, images)


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


def at_least_float32(x: Tensor) -> torch.dtype:
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
        """Reads all granularities at every position of x (B, C, H, W); `health` counts them."""
        return MemoryRead(self._read("part", x, self.part_bank, health))

    def _read(self, level: str, x: Tensor, bank: Tensor, health: MemoryHealth | None) -> Tensor:
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

    def forward(self, x: Tensor, health: MemoryHealth | None = None) -> MemoryRead:
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
