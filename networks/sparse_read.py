"""The read of a large bank at the cost of the prototypes that survive the threshold.

With M = 6,180 part prototypes and lambda = 0.0025 at most 400 weights of a query survive, usually a
handful. The scores of all prototypes are needed to find them; the weighted sums and all gradients
are products with sparse matrices that hold the survivors alone. Values and gradients equal those of
the plain form in `memory.read`, which `tests/test_sparse_read.py` checks.

Shapes: ``n`` queries, ``m`` prototypes, ``C`` channels, ``k`` survivors of all queries together.
A prototype is addressed by its key, and read as it stands in the bank.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SCORES_AT_A_TIME = 1 << 21  # 8 MiB in float32: stays within a CPU's cache
MIN_SURVIVAL_ODDS = 2.0  # below m * lambda = 2 half of a bank or more may survive: no gain


def pays_off(queries: Tensor, bank: Tensor, shrink: float) -> bool:
    """Whether `sparse_read` is the faster form: on the CPU, where few prototypes can survive.

    float64 takes the plain form, which has second derivatives.
    """
    few = len(bank) * shrink >= MIN_SURVIVAL_ODDS
    return few and queries.device.type == "cpu" and queries.dtype != torch.float64


def sparse_read(
    queries: Tensor, keys: Tensor, bank: Tensor, shrink: float
) -> tuple[Tensor, Tensor]:
    """Reads a bank (m, C), addressed by its keys (m, C), with queries (n, C); see `memory.read`.

    Returns values (n, C) in the bank's type, and the weights, a sparse CSR matrix (n, m). Under
    autocast the scores are computed in its type.
    """
    device = queries.device.type
    dtype = queries.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        weights = _surviving_weights(queries.detach().to(dtype), keys.detach().to(dtype), shrink)
        return _WeightedSums.apply(queries, keys, bank, weights), weights


@torch.no_grad()
def _surviving_weights(queries: Tensor, keys: Tensor, shrink: float) -> Tensor:
    """Softmax weights above the threshold, renormalised: sparse CSR (n, m), float32."""
    rows, columns, values = [], [], []
    chunk = max(1, SCORES_AT_A_TIME // len(keys))
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ keys.t()  # (chunk, m)
        weights = scores.softmax(dim=1, dtype=torch.float32)
        row, column = (weights > shrink).nonzero(as_tuple=True)
        rows.append(row + start)
        columns.append(column)
        values.append(weights[row, column])
    rows, columns, values = (torch.cat(parts) for parts in (rows, columns, values))  # (k,) each
    totals = values.new_zeros(len(queries)).index_add_(0, rows, values)  # (n,)
    offsets = torch.searchsorted(rows, torch.arange(len(queries) + 1))  # of each row's survivors
    return _csr(offsets, columns, values / totals[rows], (len(queries), len(keys)))


class _WeightedSums(torch.autograd.Function):
    """``weights @ bank``, where the weights are the softmax of the survivors' scores."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, bank: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys, bank, weights)
        return weights @ bank

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, bank, weights = ctx.saved_tensors
        rows = torch.repeat_interleave(weights.crow_indices().diff())  # query of each survivor
        alpha = weights.values()  # (k,)
        # d value / d weight: products of the gradient's rows with the survivors' prototypes.
        grad_alpha = torch.sparse.sampled_addmm(weights, grad, bank.t(), beta=0.0).values()
        # Softmax over the survivors of each row.
        mean = alpha.new_zeros(len(queries)).index_add_(0, rows, alpha * grad_alpha)
        grad_scores = alpha * (grad_alpha - mean[rows])
        grad_scores = _csr(
            weights.crow_indices(), weights.col_indices(), grad_scores, weights.shape
        )
        grad_queries = (grad_scores @ keys).to(queries.dtype)
        grad_keys = grad_scores.t() @ queries.to(keys.dtype)
        return grad_queries, grad_keys, weights.t() @ grad, None


def _csr(offsets: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A sparse CSR matrix, without torch's notices: these are in beta state, and not checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        return torch.sparse_csr_tensor(
            offsets, columns, values, tuple(shape), check_invariants=False
        )
