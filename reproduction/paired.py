"""Rows of a table compared split by split: differences to a reference row and how sure they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from reproduction.tables import Result, Table

LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Difference:
    """A row minus the reference row, in points (percent), on the splits that both have."""

    name: str
    values: np.ndarray  # (n,)

    @property
    def mean(self) -> float:
        """Mean over the splits."""
        return float(self.values.mean())

    @property
    def half_width(self) -> float:
        """Half the width of Student's interval of the mean; NaN with fewer than three splits."""
        n = len(self.values)
        if n < 3:  # two say next to nothing: their interval is 13 times as wide as their gap
            return float("nan")
        return float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * stats.sem(self.values))

    def __str__(self) -> str:
        half = "" if np.isnan(self.half_width) else f" +- {self.half_width:.1f}"
        return f"{self.mean:+.1f}{half}"


def differences(results: Sequence[Result], reference: str, metric: str) -> list[Difference]:
    """Returns each row's difference to the row called `reference`, where they share splits."""
    base = next(result.per_trial for result in results if result.row.setting.name == reference)
    found = []
    for result in results:
        shared = sorted(result.per_trial.keys() & base.keys())
        values = [100 * (result.per_trial[t][metric] - base[t][metric]) for t in shared]
        if shared and result.row.setting.name != reference:
            found.append(Difference(result.row.setting.name, np.array(values)))
    return found


def paired_table(results: Sequence[Result], references: Sequence[str]) -> Table:
    """Lays out the differences of one protocol's rows to each reference, which is one of them."""
    columns: dict[str, dict[str, Difference]] = {}
    for reference in references:
        for metric, title in (("rank1", "Rank-1"), ("mAP", "mAP")):
            found = differences(results, reference, metric)
            columns[f"{title} minus {reference}"] = {each.name: each for each in found}
    rows = []
    for name in (result.row.setting.name for result in results):
        own = [column.get(name) for column in columns.values()]
        if any(own):
            count = max(len(difference.values) for difference in own if difference)
            rows.append([name, str(count), *(str(difference or "-") for difference in own)])
    caption = (
        "Differences in points on the same splits and seeds: mean +- half the width of its "
        f"{LEVEL:.0%} interval (Student's t)."
    )
    title = f"{results[0].row.title}, split by split, {references[0]}"
    return Table(title, caption, ["method", "splits", *columns], rows)
