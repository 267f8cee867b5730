"""Evaluates checkpoints: any method, data set, direction, gallery; this project's or released.

    python test.py --dataset sysu --mode all --resume CHECKPOINT --gpu 0
    python test.py --dataset regdb --trial 1 --tvsearch --resume CHECKPOINT
    python test.py --dataset regdb --trials 10 --resume 'runs/MGMRA_regdb_trial{trial}/last.pt'
    python test.py --query-dir people --gallery-dir night --resume CHECKPOINT    # own images

Prints a table and writes ``results.json``. Every row names the data (real or stand-in), the
protocol, whether it is re-ranked, and how the checkpoint's epoch was chosen. One's own folders of
images need no identities: ``ranks.csv``, ``ranks.json`` and a picture say who resembles whom.
"""

import argparse
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import options
from data_loader import EvalLoader, load_images
from data_manager import EvalSet, ImageList, data_name, eval_set
from engine import distributed
from engine.evaluate import extract_shared, score
from eval_metrics import METRICS, mean_and_std
from model import TwoStreamNet, load_network, trained_size
from search import search_folders
from utils import (
    load_checkpoint,
    make_writable_dir,
    plain_entry,
    setup_logging,
    user_errors,
    versions,
    write_atomic,
    write_json,
)

log = logging.getLogger(__name__)


def checkpoints(args: argparse.Namespace) -> list[tuple[int, str]]:
    """The checkpoints to evaluate, each with its RegDB trial.

    A path with ``{trial}`` stands for trials 1 to ``--trials``; any other for ``--trial`` alone.

    Raises:
        ValueError: When no checkpoint is named, or one of the pattern's is missing.
    """
    if not args.resume:
        raise ValueError("name the checkpoint to evaluate: --resume PATH")
    if "{trial}" not in args.resume:
        return [(args.trial, args.resume)]
    if args.dataset != "regdb":
        raise ValueError("{trial} in --resume is for RegDB, whose trials are trained one by one")
    found = [(t, args.resume.replace("{trial}", str(t))) for t in range(1, args.trials + 1)]
    missing = [path for _, path in found if not Path(path).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(found)} checkpoints are missing, {missing[0]} first: train "
            f"them, or evaluate fewer with --trials N"
        )
    return found


def image_size(args: argparse.Namespace, info: dict[str, Any]) -> tuple[int, int]:
    """Height and width to evaluate at: the flags', else those the checkpoint was trained at."""
    height, width = trained_size(info)
    return args.img_h or height, args.img_w or width


class ImageCache:
    """Decoded images by list: galleries and queries that several checkpoints share load once."""

    def __init__(self, *, workers: int, progress: bool) -> None:
        """Keeps how images are loaded."""
        self._workers, self._progress = workers, progress
        self._held: dict[tuple, np.ndarray] = {}

    def __call__(self, images: ImageList, size: tuple[int, int]) -> np.ndarray:
        """Images (n, H, W, 3) uint8 of a list at a size (H, W)."""
        key = (images.paths, size)
        if key not in self._held:
            self._held = dict(list(self._held.items())[-1:])  # this list's partner, no older ones
            self._held[key] = load_images(
                images,
                height=size[0],
                width=size[1],
                workers=self._workers,
                progress=self._progress,
            )
        return self._held[key]


def evaluate_checkpoint(
    net: TwoStreamNet,
    protocol: EvalSet,
    load: Callable[[ImageList], np.ndarray],
    *,
    test_feats: Sequence[str],
    rankings: Sequence[str],
    batch_size: int,
    device: torch.device,
    amp: bool,
    progress: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Scores one network under one protocol, embedding each image once.

    Args:
        net: On `device`.
        protocol: Queries and galleries.
        load: From an image list to its images.
        test_feats: Kinds of retrieval feature.
        rankings: Kinds of re-ranking, "no" among them.
        batch_size: Images a batch.
        device: Where the network is.
        amp: bf16 autocast.
        progress: Whether to show bars.

    Returns:
        A result (`retrieval.score`) for each feature and ranking (none in processes other than the
        main one), and the features by role and kind.
    """
    features: dict[str, dict[str, np.ndarray]] = {}
    for role in ("query", "gallery"):
        images = getattr(protocol, role)

        def batches(first: int, last: int, images: ImageList = images) -> EvalLoader:
            whole = last - first == len(images)
            shown = load(images if whole else images.take(range(first, last)))
            return EvalLoader(shown, batch_size=batch_size, device=device)

        features[role] = extract_shared(
            net,
            len(images),
            batches,
            batch_size=batch_size,
            modality=images.modality,
            test_feats=test_feats,
            amp=amp,
            progress=progress,
        )
    rows = []
    if not distributed.is_main():
        return rows, features
    for feat in test_feats:
        for ranking in rankings:
            result = score(protocol, features["query"][feat], features["gallery"][feat], ranking)
            rows.append({**result, "test_feat": feat})
    return rows, features


def over_checkpoints(per_checkpoint: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and spread over several checkpoints' (RegDB trials') results, row by row."""
    if len(per_checkpoint) == 1:
        return per_checkpoint[0]
    rows = []
    for same in zip(*per_checkpoint, strict=True):
        mean, std = mean_and_std([{m: row[m] for m in METRICS} for row in same])
        trials = [{m: row[m] for m in METRICS} for row in same]
        cmc = np.mean([row["cmc"] for row in same], axis=0).tolist()
        protocol = f"{same[0]['protocol']} and on to {len(same)} trials, one model each"
        rows.append(
            {**same[0], **mean, "std": std, "per_trial": trials, "cmc": cmc, "protocol": protocol}
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results in percent, mean +- standard deviation where there are several trials."""
    header = ["R1", "R5", "R10", "R20", "mAP", "mINP"]
    lines = [f"{'feature':8} {'re-ranked':12} " + " ".join(f"{name:>14}" for name in header)]
    for row in rows:
        spread = len(row["per_trial"]) > 1
        cells = [
            f"{100 * row[m]:.2f}" + (f" +- {100 * row['std'][m]:.2f}" if spread else "")
            for m in METRICS
        ]
        lines.append(
            f"{row['test_feat']:8} {row['re_rank']:12} " + " ".join(f"{cell:>14}" for cell in cells)
        )
    first = rows[0]
    lines.append(f"data: {first['dataset']}; protocol: {first['protocol']}")
    lines.append(f"checkpoint: {first['checkpoint']}; epoch chosen: {first['selection']}")
    return "\n".join(lines)


def feature_file(args: argparse.Namespace, trial: int) -> Path | None:
    """Where the features of one checkpoint go: one file each where there are several.

    Raises:
        ValueError: When it is no .npz, or its folder cannot be written to.
    """
    path = args.save_features
    if path is None:
        return None
    if path.suffix != ".npz":
        raise ValueError(f"--save-features {path}: expected a name that ends with .npz")
    make_writable_dir(path.parent)
    return path.with_stem(f"{path.stem}_trial{trial}") if "{trial}" in args.resume else path


def save_features(
    path: Path, protocol: EvalSet, features: dict[str, dict[str, np.ndarray]], row: dict[str, Any]
) -> None:
    """Writes everything that an evaluation ranks, in the order of the protocol's lists.

    The arrays are, for ``query`` and ``gallery`` each, ``<role>_<feature>`` (n, D) float32 with
    rows of norm 1, ``<role>_pids`` (n,), ``<role>_camids`` (n,), ``<role>_paths`` (n,) and
    ``<role>_modality``; ``gallery_trials`` (trials, g) with rows of the gallery, -1 behind a
    trial's last; ``protocol``, ``dataset``, ``checkpoint``. None needs pickle to be read.
    """
    trials = protocol.gallery_trials
    padded = np.full((len(trials), max(map(len, trials))), -1, np.int64)
    for number, rows in enumerate(trials):
        padded[number, : len(rows)] = rows
    arrays: dict[str, Any] = {"gallery_trials": padded}
    arrays |= {name: np.array(str(row[name])) for name in ("protocol", "dataset", "checkpoint")}
    for role in ("query", "gallery"):
        images = getattr(protocol, role)
        arrays |= {f"{role}_{feat}": values for feat, values in features[role].items()}
        arrays[f"{role}_pids"], arrays[f"{role}_camids"] = images.pids, images.camids
        arrays[f"{role}_paths"] = np.array(images.paths)
        arrays[f"{role}_modality"] = np.array(images.modality)
    write_atomic(path, lambda stream: np.savez(stream, **arrays))


def draw_figures(
    folder: Path,
    protocol: EvalSet,
    load: Callable[[ImageList], np.ndarray],
    features: dict[str, dict[str, np.ndarray]],
    rows: Sequence[dict[str, Any]],
) -> None:
    """Draws ranked lists, CMC, distances and an embedding of the last row's feature."""
    from visualize import evaluation_figures  # drawing takes its time to import

    feat = rows[-1]["test_feat"]
    of_feat = {role: kinds[feat] for role, kinds in features.items()}
    log.info("wrote %s", ", ".join(evaluation_figures(folder, protocol, load, of_feat, rows)))


def describe_checkpoint(path: str, info: dict[str, Any]) -> dict[str, Any]:
    """What a result says of its checkpoint: file, how its epoch was chosen, training data."""
    unknown = "unknown (checkpoint of an earlier release)"
    return {
        "checkpoint": str(path),
        "selection": plain_entry(info, "selection", unknown, path),
        "epoch": plain_entry(info, "epoch", 0, path) if "epoch" in info else None,
        "trained_on": plain_entry(info, "data", "unknown", path),
    }


def default_output(args: argparse.Namespace, checkpoint: str) -> Path:
    """A folder beside the checkpoint, named by the protocol: none overwrites another's results."""
    if args.dataset == "regdb":
        words = [args.direction, "trials" if "{trial}" in checkpoint else f"trial{args.trial}"]
    elif args.dataset == "sysu":
        words = [args.mode, args.gallery, f"{args.shots}shot"]
    else:
        words = [args.direction]
    words += [word for word in (args.test_feat, args.subset) if word not in (None, "test")]
    words += [args.re_rank] if args.re_rank != "no" else []
    parent = Path(checkpoint.replace("{trial}", "1")).parent
    return parent / "_".join(["test", args.dataset, *words, Path(checkpoint).stem])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    with user_errors():
        args = options.test_parser(__doc__).parse_args(argv)
        options.resolve_protocol(args)
        setup_logging()
        if args.query_dir or args.gallery_dir:
            search_folders(args)
            return 0
        with distributed.processes(args.gpu) as device:
            evaluate_all(args, device)
    return 0


def evaluate_all(args: argparse.Namespace, device: torch.device) -> None:
    """Evaluates every checkpoint asked for; the main process prints and writes the results."""
    found = checkpoints(args)
    targets = [feature_file(args, trial) for trial, _ in found]
    given = {"gem_p": args.gem_p, "memory_variant": args.memory_variant}
    for _, path in found[1:]:
        load_checkpoint(path)  # a broken one is found before the others' long work
    protocols = [
        eval_set(**options.protocol(args, subset=args.subset, trial=trial)) for trial, _ in found
    ]
    output = args.output_dir or default_output(args, args.resume)
    if distributed.is_main():
        make_writable_dir(output)
    shows_bars = distributed.is_main() and not args.quiet
    cache = ImageCache(workers=args.workers, progress=shows_bars)
    data = data_name(args.dataset, args.data_path)
    results = []
    for (_, path), protocol, target in zip(found, protocols, targets, strict=True):
        net, info = load_network(path, **given)
        size = image_size(args, info)
        net.check_image_height(size[0])
        load = functools.partial(cache, size=size)
        rows, features = evaluate_checkpoint(
            net.to(device, memory_format=torch.channels_last),
            protocol,
            load,
            test_feats=(args.test_feat,) if args.test_feat else net.default_test_feats(),
            rankings=tuple(dict.fromkeys(("no", args.re_rank))),
            batch_size=args.test_batch,
            device=device,
            amp=args.amp,
            progress=shows_bars,
        )
        if not distributed.is_main():
            continue
        about = {"dataset": data, **describe_checkpoint(path, info)}
        results.append([{**row, **about} for row in rows])
        if target:
            save_features(target, protocol, features, results[-1][-1])
            log.info("wrote %s", target)
        if args.figures and len(results) == 1:
            draw_figures(output, protocol, load, features, results[0])
    if not distributed.is_main():
        return
    rows = over_checkpoints(results)
    sys.stdout.write(table(rows) + "\n")
    # The headline is what was asked for: re-ranked only where --re_rank says so.
    headline = next(row for row in rows if row["re_rank"] == args.re_rank)
    content = {
        **{k: v for k, v in headline.items() if k not in ("per_trial", "std")},
        "rows": rows,
        "checkpoints": [path for _, path in found],
        "options": options.to_json(args),
        "versions": versions(),
    }
    write_json(output / "results.json", content)
    log.info("wrote %s", output / "results.json")


if __name__ == "__main__":
    sys.exit(main())
