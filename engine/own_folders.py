"""The files of a ranking of one's own images, whose identities nobody knows."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from data_manager import EvalSet
from utils import write_atomic, write_json


def write_ranks(
    folder: Path, protocol: EvalSet, distmat: np.ndarray, about: dict[str, Any], top: int
) -> None:
    """Writes each query's nearest gallery images, nearest first: ``ranks.csv``, ``ranks.json``.

    A rank's ``score`` is minus `distmat` (Q, G), of which ties keep gallery order; `top` are the
    gallery images per query, `about` what the JSON says beside the ranks, ``re_rank`` among it.
    """
    names = protocol.gallery.paths
    ranks, lines = [], [("query", "rank", "gallery", "score")]
    for name, row in zip(protocol.query.paths, distmat, strict=True):
        nearest = np.argsort(row, kind="stable")[:top].tolist()
        answers = [
            {"rank": place, "image": names[g], "score": round(float(-row[g]), 6)}
            for place, g in enumerate(nearest, start=1)
        ]
        ranks.append({"query": name, "gallery": answers})
        lines += [(name, *answer.values()) for answer in answers]
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    content = text.getvalue().encode("utf-8", "surrogateescape")
    write_atomic(folder / "ranks.csv", lambda stream: stream.write(content))
    score = "cosine similarity of the features, from -1 to 1: higher is more alike"
    if about["re_rank"] != "no":
        score = "minus the re-ranked distance: higher is more alike, comparable within one query"
    write_json(folder / "ranks.json", {**about, "score": score, "ranks": ranks})
