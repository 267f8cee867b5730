"""The sums of `sparse_read` on CUDA, as Triton kernels: one program for a group of survivors.

Spare entries, which follow the last group, are never read. Sums are float32.
Letters in shapes: see `sparse_read`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES, CHANNELS = 16, 128  # read at a time


def weighted_sums(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Sums (b, C) of rows of a table (r, C): group i has the entries offsets[i]:offsets[i + 1]."""
    groups, width = len(offsets) - 1, table.shape[1]
    table, out = table.contiguous(), table.new_empty(groups, width)
    grid = (groups, triton.cdiv(width, CHANNELS))
    _weighted_sums[grid](out, table, indices, offsets, weights, width, ENTRIES, CHANNELS)
    return out


def products(left: Tensor, right: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    """Products (k,) of row i of `left` (n, C) with the rows of `right` of its entries; spare: 0."""
    left, right = left.contiguous(), right.contiguous()
    out = torch.zeros(columns.shape, dtype=torch.float32, device=left.device)
    _products[(len(left),)](out, left, right, columns, offsets, left.shape[1], CHANNELS)
    return out


@triton.jit
def _weighted_sums(
    out,
    table,
    indices,
    offsets,
    weights,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first, end = tl.load(offsets + group), tl.load(offsets + group + 1)
    total = tl.zeros([CHANNELS], dtype=tl.float32)
    while first < end:
        entries = first + tl.arange(0, ENTRIES)
        own = entries < end
        rows = tl.load(indices + entries, mask=own, other=0).to(tl.int64)
        weight = tl.load(weights + entries, mask=own, other=0.0)
        mask = own[:, None] & (channels < WIDTH)[None, :]
        values = tl.load(table + rows[:, None] * WIDTH + channels[None, :], mask=mask, other=0.0)
        total += tl.sum(values.to(tl.float32) * weight[:, None], axis=0)
        first += ENTRIES
    tl.store(out + group * WIDTH + channels, total.to(out.dtype.element_ty), mask=channels < WIDTH)


@triton.jit
def _products(out, left, right, columns, offsets, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    entry, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    while entry < end:
        column = tl.load(columns + entry).to(tl.int64)
        total = tl.zeros([CHANNELS], dtype=tl.float32)
        for first in range(0, WIDTH, CHANNELS):
            channels = first + tl.arange(0, CHANNELS)
            mask = channels < WIDTH
            a = tl.load(left + row * WIDTH + channels, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(right + column * WIDTH + channels, mask=mask, other=0.0).to(tl.float32)
            total += a * b
        tl.store(out + entry, tl.sum(total, axis=0))
        entry += 1
