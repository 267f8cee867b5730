"""How much of a memory is used: numbers for the log, not part of the method.

Shapes: ``n`` positions, ``m`` prototypes of a bank, ``k`` survivors of all positions together.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from networks.settings import HEALTH
from networks.sparse_read import Survivors, Weights, starts


class MemoryHealth:
    """Usage statistics of a memory over an epoch's reads, counted on the device without a sync."""

    def __init__(self) -> None:
        # By level (4,) float64: rows, rows that read nothing, survivors, sum of entropies.
        self.counters: dict[str, Tensor] = {}
        self.used: dict[str, Tensor] = {}  # (m,) float32: how many reads each prototype survived

    @torch.no_grad()
    def update(self, weights: Mapping[str, Weights]) -> None:
        """Adds the reads of one batch, `MemoryRead.weights`."""
        for level, own in weights.items():
            if isinstance(own, Survivors):
                positive, per_row = own.alpha, own.offsets.diff()  # (k,), (n,)
                used = starts(own.columns.sort().values, own.size).diff()  # (m,)
            else:
                positive, survive = own, own > 0  # (n, m)
                per_row, used = survive.sum(dim=1), survive.sum(dim=0)
            entropy = torch.special.entr(positive).sum(dtype=torch.float64)
            rows = torch.full_like(entropy, len(per_row))
            new = torch.stack([rows, (per_row == 0).sum(), per_row.sum(), entropy])
            self.counters[level] = self.counters.get(level, 0) + new
            self.used[level] = self.used.get(level, 0) + used.float()

    def summary(self) -> dict[str, float]:
        """Returns ``{level/number: value}`` over all updates.

        ``zero_reads``: share of positions whose read is all zero. ``survivors``: mean number of
        prototypes above the threshold per position. ``used``: share of the bank's prototypes that
        any position addressed. ``entropy``: mean entropy in nats of the positions that read
        something (0 when none did).
        """
        result = {}
        for level, counters in self.counters.items():
            rows, zero_rows, survivors, entropy = counters.tolist()
            used = float((self.used[level] > 0).double().mean())
            entropy = abs(entropy) / max(rows - zero_rows, 1)
            numbers = (zero_rows / rows, survivors / rows, used, entropy)
            result |= {f"{level}/{k}": v for k, v in zip(HEALTH, numbers, strict=True)}
        return result
