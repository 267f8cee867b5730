"""A faster read of large banks: sums and gradients touch only prototypes above the threshold.

With M = 6,180 part prototypes and lambda = 0.0025 at most 400 weights of a query survive, usually a
handful. The scores of all prototypes are needed to find them; the weighted sums and all gradients
then gather the survivors' rows alone. Values and gradients equal those of the plain form in
`memory.plain_read`, which `tests/test_sparse_read.py` checks.

Shapes: ``n`` queries, ``m`` prototypes, ``C`` channels, ``k`` survivors of all queries together and
spare entries. A prototype is addressed by its key; what is read is the prototype itself.
"""

import functools
import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)

SCORES_AT_A_TIME = 1 << 21  # on the CPU, 8 MiB in float32: stays within its cache
# The least m * lambda for which this form is faster: below 2 half of a bank or more may survive. A
# GPU multiplies faster than it gathers, and its lists have their greatest length.
MIN_SURVIVAL_ODDS = {"cpu": 2.0, "cuda": 8.0}
HALF_ROWS = ("cuda",)  # devices that gather rows in autocast's precision too


class Survivors(NamedTuple):
    """The nonzero weights of a read, ordered by query."""

    rows: Tensor  # (k,) int32, query of each; n in spare entries, which come last
    columns: Tensor  # (k,) int32, prototype of each; m in spare entries
    alpha: Tensor  # (k,) renormalised weight, float32; 0 in spare entries
    offsets: Tensor  # (n + 1,) int32, where each query's begin
    size: int  # m

    def to_dense(self) -> Tensor:
        """All weights, (n, m)."""
        dense = self.alpha.new_zeros(len(self.offsets), self.size + 1)
        return dense.index_put_((self.rows, self.columns), self.alpha)[:-1, :-1]


Weights = Tensor | Survivors  # addressing weights of a read, (n, m); of a large bank the nonzero


def pays_off(queries: Tensor, bank: Tensor, shrink: float) -> bool:
    """Whether `sparse_read` is the faster form: where few prototypes can survive.

    float64 takes the plain form: the sums here are float32 and have no second derivatives.
    """
    device = queries.device.type
    few = len(bank) * shrink >= MIN_SURVIVAL_ODDS.get(device, torch.inf)
    return few and queries.dtype != torch.float64 and (device == "cpu" or _works_on(queries.device))


@functools.cache
def _works_on(device: torch.device) -> bool:
    """Whether a GPU runs what `sparse_read` needs there; if not, warns once."""
    try:
        one, offsets = torch.ones(1, 1, device=device), torch.arange(2, device=device).int()
        torch.nonzero_static(one, size=1)  # on CUDA since torch 2.7
        return weighted_sums(one, offsets[:1], offsets, one[0]).item() == 1
    except Exception as error:  # nor without Triton or a C compiler for it
        log.warning("the memory is read in its plain form, which is slower: %s", error)
        return False


def sparse_read(
    queries: Tensor, keys: Tensor, bank: Tensor, shrink: float, *, bounded: bool | None = None
) -> tuple[Tensor, Survivors]:
    """Reads a bank (m, C), addressed by its keys (m, C), with queries (n, C); see `memory.read`.

    Under autocast the scores are computed in its type, and on CUDA the rows gathered in it.
    `bounded` makes lists of the greatest length there can be, 1 / lambda per query, so that nothing
    waits for the device; no sum touches the spare entries at their ends. None: in training on CUDA.
    """
    device = queries.device.type
    if bounded is None:
        bounded = device == "cuda" and torch.is_grad_enabled()
    dtype = queries.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        weights = _survivors(queries.to(dtype), keys.to(dtype), shrink, bounded)
        common = bank.mean(dim=0)
        gathered = dtype if device in HALF_ROWS else bank.dtype
        rows = [x.to(gathered) for x in (queries, keys, bank - common)]
        values = _WeightedSums.apply(*rows, weights)
        reads = weights.offsets.diff() > 0  # (n,)
        return values + reads.unsqueeze(1) * common, weights


@torch.no_grad()
def _survivors(queries: Tensor, keys: Tensor, shrink: float, bounded: bool) -> Survivors:
    """Finds the softmax weights above the threshold, and renormalises them."""
    n, m = len(queries), len(keys)
    found = []
    chunk = n if bounded else max(1, SCORES_AT_A_TIME // m)
    for start in range(0, n, chunk):
        weights = (queries[start : start + chunk] @ keys.t()).float()  # (chunk, m)
        torch.softmax(weights, dim=1, out=weights)
        F.threshold(weights, shrink, 0.0, inplace=True)
        if bounded:
            at_most = n * min(m, int(1 / max(shrink, 1 / m)) + 1)
            rows, columns = torch.nonzero_static(weights, size=at_most, fill_value=0).unbind(1)
        else:
            rows, columns = weights.nonzero(as_tuple=True)
        alpha = weights[rows, columns] / weights.sum(dim=1)[rows]
        found.append((rows + start, columns, alpha))
    rows, columns, alpha = (torch.cat(parts) for parts in zip(*found, strict=True))
    rows, columns = rows.int(), columns.int()
    if bounded:
        spare = torch.arange(len(rows), device=rows.device) >= weights.count_nonzero()
        rows, columns = rows.masked_fill(spare, n), columns.masked_fill(spare, m)
        alpha = alpha.masked_fill(spare, 0.0)
    return Survivors(rows, columns, alpha, starts(rows, n), m)


class _WeightedSums(torch.autograd.Function):
    """``weights @ bank``, where the weights are the softmax of the survivors' scores."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, bank: Tensor, weights: Survivors
    ) -> Tensor:
        rows, columns, alpha, offsets, _ = weights
        values = weighted_sums(bank, columns, offsets, alpha)
        ctx.save_for_backward(queries, keys, bank, rows, columns, alpha, offsets, values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, bank, rows, columns, alpha, offsets, values = ctx.saved_tensors
        grad = grad.contiguous()
        # d value / d weight: products of the gradient's rows with the survivors' prototypes.
        grad_alpha = products(grad, bank, rows, columns, offsets)
        # Softmax backward over each row's survivors; grad_alpha's weighted mean is grad . value.
        mean = F.pad((grad * values).sum(dim=1, dtype=torch.float32), (0, 1))  # (n + 1,)
        grad_scores = alpha * (grad_alpha - mean[rows])
        # The same survivors, ordered by prototype.
        order = columns.argsort(stable=True)
        of_prototype = starts(columns[order], len(bank))
        rows = rows[order]
        grad_queries = weighted_sums(keys, columns, offsets, grad_scores)
        grad_keys = weighted_sums(queries, rows, of_prototype, grad_scores[order])
        grad_bank = weighted_sums(grad, rows, of_prototype, alpha[order])
        return grad_queries, grad_keys, grad_bank, None


def starts(groups: Tensor, count: int) -> Tensor:
    """Where each of `count` groups begins, and the last ends, in sorted numbers of groups (k,)."""
    numbers = torch.arange(count + 1, dtype=torch.int32, device=groups.device)
    return torch.searchsorted(groups, numbers, out_int32=True)


@torch.library.custom_op("mgmra::weighted_sums", mutates_args=())
def weighted_sums(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Sums (b, C) of rows of a table (r, C): group i has the entries offsets[i]:offsets[i + 1].

    `indices` and `weights` are (k,), int32 and float32; entries after the last group are spare.
    """
    if table.is_cuda:
        from networks import sparse_kernels  # Triton comes with CUDA builds alone

        with torch.cuda.device_of(table):
            return sparse_kernels.weighted_sums(table, indices, offsets, weights)
    own = int(offsets[-1])
    indices, weights = indices[:own], weights[:own].to(table.dtype)
    how = {"mode": "sum", "per_sample_weights": weights}
    return F.embedding_bag(indices, table.contiguous(), offsets[:-1], **how)


@torch.library.custom_op("mgmra::products", mutates_args=())
def products(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    """Products (k,) of rows of `left` (n, C) and `right` (m, C), float32; 0 in spare entries."""
    if left.is_cuda:
        from networks import sparse_kernels

        with torch.cuda.device_of(left):
            return sparse_kernels.products(left, right, columns, offsets)
    own = int(offsets[-1])
    found = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right.contiguous(), columns[:own], offsets[:-1], rows[:own], 0
    )
    return F.pad(found.float(), (0, len(rows) - own))


@weighted_sums.register_fake
def _(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return table.new_empty(len(offsets) - 1, table.shape[1])


@products.register_fake
def _(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(len(rows), dtype=torch.float32)
