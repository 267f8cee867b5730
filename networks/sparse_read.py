"""The read of one memory bank: who is addressed, and the sums of what is addressed.

Letters in shapes: ``n`` queries, ``m`` prototypes, ``C`` backbone channels.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-12  # of the releases' divisions; float32 does not resolve it, float64 goldens do
CHUNK_ENTRIES = 1 << 21  # weights held at a time on the CPU: 8 MiB, within its cache
# Weights held at a time on other devices, where so few are read densely: products of whole matrices
# are what such devices are fast at, and how many prototypes survive need not be waited for.
DENSE_ENTRIES = 1 << 29  # 2 GiB in float32; SYSU-MM01's step has a third of it
DENSE_SHARE = 0.05  # above this share of survivors, dense products are cheaper
MIN_QUERIES_PER_CHUNK = 128  # also of a bank so large that they hold more
BAGS_PER_CHUNK = 1024  # sums computed at a time on the CPU
BOUND_FACTOR = 2.1  # 2 and what rounding may add, of bf16 too
SPARSE_BANK = 2.0  # banks of fewer than this over lambda prototypes are read densely
ON_CPU = ("cpu",)  # devices with a cache to stay in, whose answers cost no waiting


class Observer(Protocol):
    """Is told of every read: `memory.MemoryHealth`, or `addresses.Recorder`."""

    def update(
        self, level: str, weights: "Survivors | Tensor", num_prototypes: int, repeats: int = 1
    ) -> None:
        """Takes in the addressing weights of one read; see `memory.MemoryHealth.update`."""


def at_least_float32(x: Tensor) -> torch.dtype:
    """Float32 under autocast, the tensor's own type where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


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

    @classmethod
    def of(cls, weights: "Survivors | Tensor") -> "Survivors":
        """The sparse form of weights (n, m), which waits for the device; others as they are."""
        if isinstance(weights, Survivors):
            return weights
        found = weights.nonzero()
        counts = (weights > 0).sum(dim=1)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(offsets, found[:, 1], weights[found[:, 0], found[:, 1]])

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
    on_cpu = x.device.type in ON_CPU
    per_chunk = max(MIN_QUERIES_PER_CHUNK, (CHUNK_ENTRIES if on_cpu else DENSE_ENTRIES) // size)
    if on_cpu and size * shrink >= 1:
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
            return values.expand(len(x), -1), values.repeat(images, 1).to(at_least_float32(values))
        values = _bag(bank, columns, offsets, weights)
        return values, _image_sums(values, images)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, bank, offsets, columns, weights = ctx.saved_tensors
        if not len(columns):
            grads = [v.new_zeros(()).expand_as(v) for v in (x, bank)]
            return *grads, None, None, None, None
        survivors = Survivors(offsets, columns, weights)
        rows = survivors.rows()
        # Gathered are rows of the queries' type: under autocast half the traffic, sums in float32.
        # Centred: a part common to all prototypes cancels, and would not once the rest is rounded.
        narrow = (bank - bank.mean(dim=0)).to(x.dtype)
        grad_weight = torch.zeros_like(weights)
        if grad is not None:
            grad = grad.to(x.dtype)
            grad_weight += _row_products(grad, narrow, survivors, rows)
        if grad_sums is not None:
            images = rows // (len(x) // len(grad_sums))
            grad_weight += (grad_sums @ bank.to(grad_sums.dtype).t())[images, columns]
        # Softmax over the survivors: d logit = a * (d a - sum of a * d a over the row).
        mean = weights.new_zeros(len(x)).index_add_(0, rows, weights * grad_weight)
        grad_logit = weights * (grad_weight - mean[rows])
        grad_x = grad_bank = None
        if ctx.needs_input_grad[0]:
            grad_x = _bag(narrow, columns, offsets, grad_logit)
        del narrow  # a large bank's has gigabytes
        if ctx.needs_input_grad[1]:
            order = columns.argsort(stable=True)
            places = torch.arange(len(bank) + 1, device=x.device)
            starts = torch.searchsorted(columns[order], places)
            grad_bank = torch.zeros_like(bank)
            _add_bags(grad_bank, x, rows[order], starts, grad_logit[order])
            if grad is not None:
                _add_bags(grad_bank, grad, rows[order], starts, weights[order])
            if grad_sums is not None:
                used = weights.new_zeros(len(grad_sums) * len(bank))
                used.index_add_(0, images * len(bank) + columns, weights)
                grad_bank += used.view(len(grad_sums), -1).t() @ grad_sums
        return grad_x, grad_bank, None, None, None, None


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


def _add_bags(
    result: Tensor, table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor
) -> None:
    """Adds `_bag` to a result (bags, C); on the CPU with no whole result in the table's type."""
    on_cpu = result.device.type in ON_CPU
    for i, part in enumerate(result.split(BAGS_PER_CHUNK if on_cpu else len(result))):
        own = offsets[i * BAGS_PER_CHUNK :][: len(part) + 1]
        if on_cpu:
            inside = slice(own[0], own[-1])
            part += _bag(table, indices[inside], own - own[0], weights[inside])
        else:  # where slices of unknown bounds would wait for the device
            part += _bag(table, indices, own, weights)


def _row_products(a: Tensor, b: Tensor, survivors: Survivors, rows: Tensor) -> Tensor:
    """Scalar products ``a[rows] . b[columns]`` of the survivors, (nnz,), nothing gathered."""
    # This is what embedding_bag's own derivative towards its weights computes.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward
    values = products(a.contiguous(), b, survivors.columns, survivors.offsets, rows, 0)
    return values.to(survivors.weights.dtype)


class _DenseRead(torch.autograd.Function):
    """Weighted sums by products of whole matrices of one type; nothing waits for the device.

    Its results are `_SparseRead`'s, and the weights (n, m).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bank: Tensor, shrink: float, images: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.images, ctx.types = images, (x.dtype, bank.dtype)
        x, bank = x.to(dtype), bank.to(dtype)
        full = (x @ bank.t()).softmax(dim=1, dtype=at_least_float32(x))
        full = F.threshold(full, shrink, 0.0, inplace=True)
        totals = full.sum(dim=1, keepdim=True).clamp_min_(EPSILON)
        weights = torch.div(full, totals, out=torch.empty_like(full, dtype=dtype))
        ctx.save_for_backward(x, bank, weights)
        ctx.mark_non_differentiable(weights)
        ctx.set_materialize_grads(False)
        sums = _image_sums(full.div_(totals), images)  # (images, m)
        return weights @ bank, sums @ bank.to(sums.dtype), weights

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_sums: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        if grad is None and grad_sums is None:
            return (None,) * 5
        x, bank, weights = ctx.saved_tensors
        # A part common to all prototypes cancels in the softmax's derivative; left in, it would
        # do so only as far as rows of rounded weights sum to 1.
        centred = bank - bank.mean(dim=0)
        if grad_sums is not None:
            grad_sums = grad_sums.to(bank.dtype)
        if grad is None:  # alike for all rows of an image
            grad_weight = (grad_sums @ centred.t()).repeat_interleave(len(x) // ctx.images, dim=0)
        else:
            grad = grad.to(bank.dtype)
            if grad_sums is not None:
                grad = grad.unflatten(0, (ctx.images, -1)) + grad_sums.unsqueeze(1)
                grad = grad.flatten(0, 1)
            grad_weight = grad @ centred.t()
        # The softmax over the survivors: others have no weight, hence no gradient.
        backward = torch.ops.aten._softmax_backward_data
        grad_logit = backward(grad_weight, weights, 1, weights.dtype)
        grad_x = grad_bank = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_logit @ centred).to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            grad_bank = (grad_logit.t() @ x).to(ctx.types[1])
            if grad is None:
                grad_bank += _image_sums(weights, ctx.images).to(bank.dtype).t() @ grad_sums
            else:
                grad_bank += weights.t() @ grad
        return grad_x, grad_bank, None, None, None


def _image_sums(x: Tensor, images: int) -> Tensor:
    """Sums over the positions of each image: (n, D) to (images, D)."""
    return x.unflatten(0, (images, -1)).sum(dim=1, dtype=at_least_float32(x))


def read(
    x: Tensor, bank: Tensor, shrink: float, *, level: str = "", health: Observer | None = None
) -> Tensor:
    """Reads a bank at every position of a map.

    Positions are independent: a whole map at once equals stripe by stripe. The read is a softmax
    over the survivors alone, hence computed from them on the CPU: scores for all, sums and
    gradients for the few. Banks of which many prototypes can survive at once take products of whole
    matrices, and so do all but the largest on other devices. float64 takes `address`, which follows
    the releases to the last epsilon.

    Args:
        x: Queries, (B, C, H, W).
        bank: Prototypes, (m, C).
        shrink: Threshold on the addressing weights, in [0, 1).
        level: Name under which `health` counts this read.
        health: Where to count; None costs nothing.

    Returns:
        Map of x's shape, zero where no prototype's weight is above `shrink`.

    Raises:
        RuntimeError: When second derivatives are asked for; float64 has them.
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
    x: Tensor, bank: Tensor, shrink: float, level: str, health: Observer | None
) -> tuple[Tensor, Tensor]:
    """What `read` returns, and its sums over each image's positions, (B, C)."""
    batch, channels, height, width = shape = x.shape
    positions = batch * height * width
    constant = x.stride(0) == x.stride(2) == x.stride(3) == 0
    if constant:
        x = _OfAll.apply(x)
    queries = x.permute(0, 2, 3, 1).reshape(-1, channels)  # (B*H*W, C)
    values, sums, weights = _read_rows(queries, bank, shrink, len(x))
    if health is not None:
        health.update(level, weights, len(bank), repeats=positions // len(queries))
    values = values.view(len(x), *x.shape[2:], channels).permute(0, 3, 1, 2)
    if constant:
        values = values.expand(shape)
        sums = (height * width * sums).expand(batch, -1)
    return values, sums


def _read_rows(
    queries: Tensor, bank: Tensor, shrink: float, images: int
) -> tuple[Tensor, Tensor, Survivors | Tensor]:
    """Sums of prototypes (n, C), their sums over each image's rows (images, C), the weights."""
    device = queries.device.type
    if queries.dtype == torch.float64:
        weights = address(queries, bank, shrink)
        values = weights @ bank
        return values, _image_sums(weights, images) @ bank, weights.detach()
    dtype = queries.dtype  # that products are computed in
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    entries = len(queries) * len(bank)
    survivors = None
    if len(bank) * shrink >= SPARSE_BANK and (device in ON_CPU or entries > DENSE_ENTRIES):
        survivors = select(queries.detach().to(dtype), bank.detach().to(dtype), shrink)
    if survivors is not None and len(survivors.columns) <= DENSE_SHARE * entries:
        return *sparse_read(queries, bank, survivors, images), survivors
    with torch.autocast(device, enabled=False):
        return _DenseRead.apply(queries, bank, shrink, images, dtype)


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


def sparse_read(
    queries: Tensor, bank: Tensor, survivors: Survivors, images: int = 1
) -> tuple[Tensor, Tensor]:
    """Weighted sums of the survivors' prototypes, differentiable in both.

    Args:
        queries: (n, C), as many rows of each image, one image after the other.
        bank: Prototypes, (m, C).
        survivors: From `select`.
        images: Number of images.

    Returns:
        The sums, (n, C), and their own sums over each image's rows, (images, C).
    """
    with torch.autocast(queries.device.type, enabled=False):
        return _SparseRead.apply(queries, bank, *survivors, images)
