"""Times evaluation against plain loops: CMC, mAP and mINP, k-reciprocal re-ranking, SYSU's trials.

    python -m benchmarks.evaluation                # all sizes: ten minutes, most of it the loops
    python -m benchmarks.evaluation --small        # a quick look

Prints Markdown tables and, with ``--json``, writes all numbers. Features are random around one
direction an identity; numbers are medians of wall-clock times taken in turn.
"""

import argparse
import functools
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.common import finish, interleaved, table, unit_features
from benchmarks.plain import plain_evaluate, plain_k_reciprocal
from engine.evaluate import score
from eval_metrics import eval_regdb, eval_sysu
from re_rank import k_reciprocal

WIDTH = 1536  # of the retrieval feature: 6 stripes of 256
TRIALS = 10


def build_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description="Time evaluation.")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", default="10000x50000", help="queries x gallery, metrics alone")
    sizes = ["2000x8000", "3803x48197", "10400x41600"]
    parser.add_argument("--re-rank", nargs="*", default=sizes, help="queries x gallery, ours alone")
    parser.add_argument("--small", action="store_true", help="a tenth of every size")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    args = build_parser().parse_args(argv)
    share = 10 if args.small else 1
    if args.small:
        args.large, args.re_rank = "1000x5000", ["200x800"]
    results: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}}
    for name, section in SECTIONS.items():
        if name in args.only:
            results[name] = section(args, share)
    finish(results, torch.device("cpu"), args.json)
    return 0


def _regdb(share: int) -> tuple[np.ndarray, ...]:
    """Identities of queries and gallery: RegDB's test split."""
    pids = np.repeat(np.arange(206 // share), 10)
    return pids, pids


def _sysu(share: int, shots: int) -> tuple[np.ndarray, ...]:
    """Identities of queries and gallery, then their cameras: SYSU-MM01, all-search."""
    rng = np.random.default_rng(1)
    queries = 3803 // share
    q_pids = rng.integers(0, 96, queries)
    q_camids = np.where(np.arange(queries) < 1883 // share, 3, 6)
    g_pids = np.repeat(np.arange(96), 4)[: max(301 // share, 96)]
    g_camids = np.tile([1, 2, 4, 5], 96)[: len(g_pids)]
    return q_pids, np.repeat(g_pids, shots), q_camids, np.repeat(g_camids, shots)


def _features(q_pids: np.ndarray, g_pids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    return unit_features(rng, q_pids, WIDTH), unit_features(rng, g_pids, WIDTH)


def _peak(call: Any) -> int:
    """The most bytes that a call allocates on top of what is there."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def _metrics(args: argparse.Namespace, share: int) -> dict[str, Any]:
    """CMC, mAP and mINP at the data sets' sizes."""
    cases = {
        "RegDB": (eval_regdb, _regdb(share)),
        "SYSU single-shot": (eval_sysu, _sysu(share, 1)),
        "SYSU ten-shot": (eval_sysu, _sysu(share, 10)),
    }
    results, rows = {}, []
    for name, (evaluate, labels) in cases.items():
        query, gallery = _features(*labels[:2])
        distmat = 1 - query @ gallery.T
        calls = {
            "plain": functools.partial(plain_evaluate, distmat, *labels),
            "ours": functools.partial(evaluate, distmat, *labels),
        }
        times = interleaved(calls, args.repeats, description=name, warm_up=False)
        plain, ours = (times[each]["median"] for each in calls)
        results[name] = {"shape": distmat.shape, "times": times, "ratio": plain / ours}
        size = "{} x {}".format(*distmat.shape)
        rows.append((name, size, 1e3 * plain, 1e3 * ours, plain / ours))
    table("CMC, mAP, mINP", ("protocol", "size", "plain ms", "ours ms", "plain / ours"), rows)
    return results


def _large(args: argparse.Namespace, share: int) -> dict[str, Any]:
    """A large ranking, and the memory it takes beyond the distances."""
    queries, images = (int(number) for number in args.large.split("x"))
    rng = np.random.default_rng(3)
    distmat = rng.random((queries, images), dtype=np.float32)
    labels = (
        rng.integers(0, 500, queries),
        rng.integers(0, 500, images),
        rng.choice([3, 6], queries),
        rng.choice([1, 2, 4, 5], images),
    )
    cases = {
        "RegDB's protocol": functools.partial(eval_regdb, distmat, *labels[:2]),
        "SYSU's protocol": functools.partial(eval_sysu, distmat, *labels),
    }
    times = interleaved(cases, args.repeats, description=args.large, warm_up=False)
    results, rows = {}, []
    for name, call in cases.items():
        peak = _peak(call)
        results[name] = {"seconds": times[name]["median"], "peak_bytes": peak}
        rows.append((name, times[name]["median"], peak / 2**20))
    header = ("protocol", "s", "MiB beyond the distances")
    table(f"CMC, mAP, mINP at {args.large}", header, rows)
    return results


def _k_reciprocal(args: argparse.Namespace, share: int) -> dict[str, Any]:
    """k-reciprocal re-ranking: against the plain one, then alone at larger sizes."""
    cases = {
        "RegDB": _regdb(share),
        "SYSU single-shot": _sysu(share, 1),
        "SYSU ten-shot": _sysu(share, 10),
    }
    results, rows = {}, []
    for name, labels in cases.items():
        query, gallery = _features(*labels[:2])
        calls = {
            "float16": functools.partial(plain_k_reciprocal, query, gallery, dtype=np.float16),
            "plain": functools.partial(plain_k_reciprocal, query, gallery),
            "ours": functools.partial(k_reciprocal, query, gallery),
        }
        times = interleaved(calls, args.repeats, description=name, warm_up=False)
        half, plain, ours = (times[each]["median"] for each in calls)
        difference = float(np.abs(calls["ours"]() - calls["plain"]()).max())
        results[name] = {"times": times, "ratio": plain / ours, "difference": difference}
        size = f"{len(query)} + {len(gallery)}"
        rows.append((name, size, half, plain, ours, half / ours, difference))
    header = ("protocol", "images", "plain float16 s", "plain float32 s", "ours s")
    header += ("float16 / ours", "ours - float32")
    table("k-reciprocal re-ranking", header, rows)
    rows = []
    for size in args.re_rank:
        queries, images = (int(number) for number in size.split("x"))
        count = queries + images
        pids = np.random.default_rng(4).integers(0, max(1, count // 20), count)
        query, gallery = _features(pids[:queries], pids[queries:])
        call = functools.partial(k_reciprocal, query, gallery)
        seconds = interleaved({size: call}, 1, warm_up=False)[size]["median"]
        peak = _peak(call)
        result = len(query) * len(gallery) * 4
        results[size] = {"seconds": seconds, "peak_bytes": peak, "result_bytes": result}
        rows.append((size, seconds, peak / 2**30, result / 2**30))
    header = ("queries x gallery", "s", "GiB beyond the features", "of which the result")
    table("k-reciprocal re-ranking, larger", header, rows)
    return results


def _sysu_trials(args: argparse.Namespace, share: int) -> dict[str, Any]:
    """Everything after the embeddings for SYSU-MM01's ten trials."""
    rng = np.random.default_rng(5)
    results, rows = {}, []
    for shots in (1, 10):
        q_pids, g_pids, q_camids, g_camids = _sysu(share, shots)
        # Ten galleries out of three times as many images, each embedded once.
        pids, camids = np.tile(g_pids, 3), np.tile(g_camids, 3)
        chosen = [np.arange(len(g_pids)) + rng.integers(0, 3) * len(g_pids) for _ in range(TRIALS)]
        eval_set = SimpleNamespace(
            query=SimpleNamespace(pids=q_pids, camids=q_camids),
            gallery=SimpleNamespace(pids=pids, camids=camids),
            gallery_trials=tuple(chosen),
            query_trials=None,
            camera_rule="sysu",
            protocol=f"all-search, {shots}-shot",
        )
        query, gallery = _features(q_pids, pids)
        for ranking in ("no", "k_reciprocal"):
            call = functools.partial(score, eval_set, query, gallery, ranking)
            name = f"{shots}-shot, {'not re-ranked' if ranking == 'no' else ranking}"
            repeats = args.repeats if ranking == "no" else 1
            times = interleaved({name: call}, repeats, description=name, warm_up=False)
            results[name] = times[name]
            rows.append((name, times[name]["median"]))
    table("SYSU-MM01, ten trials, all after the embeddings", ("protocol", "s"), rows)
    return results


SECTIONS = {
    "metrics": _metrics,
    "large": _large,
    "k_reciprocal": _k_reciprocal,
    "sysu": _sysu_trials,
}

if __name__ == "__main__":
    sys.exit(main())
