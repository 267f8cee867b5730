"""Evaluates checkpoints: any method, data set, direction, gallery; this project's or released.

    python test.py --dataset sysu --mode all --resume CHECKPOINT --gpu 0
    python test.py --dataset regdb --trial 1 --tvsearch --resume CHECKPOINT
    python test.py --dataset regdb --trials 10 --resume 'runs/MGMRA_regdb_trial{trial}/last.pt'
    python test.py --dataset regdb --features FILE.npz                           # anyone's
    python test.py --query-dir people --gallery-dir night --resume CHECKPOINT    # own images

Prints a table and writes ``results.json``. Every row names the data (real or stand-in), the
protocol, whether it is re-ranked, and how the checkpoint's epoch was chosen. Your own folders of
images need no identities: ``ranks.csv``, ``ranks.json`` and a picture show the nearest images.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import options
import utils
from data_loader import ImageCache
from data_manager import (
    DATASETS,
    TTA,
    EvalSet,
    data_name,
    eval_set,
    folder_images,
    is_stand_in,
)
from engine import devices, distributed
from engine.checkpoints import TrainedOn, describe, open_network
from engine.evaluate import distances, evaluate, score_kinds
from engine.feature_files import read_features, save_features
from engine.own_folders import write_ranks
from eval_metrics import METRICS, mean_and_std
from model import TwoStreamNet

log = logging.getLogger(__name__)

TOP = 20  # gallery images per query in an own folder's ranking
DRAWN = 10  # gallery images per query in the picture of an own folder's ranking


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    with utils.user_errors():
        utils.setup_logging()
        args = options.test_parser(__doc__).parse_args(argv)
        if args.features:
            return score_features(args)
        if not args.resume:
            raise ValueError("name the checkpoint to evaluate: --resume PATH")
        args.resume = utils.find_checkpoint(args.resume, args.model_path)
        trained = TrainedOn.read(args.resume.replace("{trial}", "1"))
        args = options.resolve_evaluation(args, trained.defaults)
        with distributed.processes(args.gpu) as device:
            devices.set_up(device, args.float32_precision)
            if args.query_dir or args.gallery_dir:
                rank_folders(args, device, trained)
            else:
                evaluate_checkpoints(args, device, trained)
    return 0


def open_checkpoint(
    args: argparse.Namespace, path: str, device: torch.device
) -> tuple[TwoStreamNet, dict[str, Any], ImageCache]:
    """Opens a checkpoint with the flags' settings; see `open_network`."""
    settings = {name: getattr(args, name) for name in (*options.AS_TRAINED_FLAGS, "memory")}
    net, info, size = open_network(path, device, **settings)
    return net, info, ImageCache(*size, workers=args.workers, progress=shows_bars(args))


def shows_bars(args: argparse.Namespace) -> bool:
    """Whether this process shows progress bars."""
    return distributed.is_main() and not args.quiet


def rankings(args: argparse.Namespace) -> tuple[str, ...]:
    """What results are ranked by: the distance, and what --re_rank asks for."""
    return tuple(dict.fromkeys(("no", args.re_rank)))


# --- A data set -----------------------------------------------------------------------------------


def evaluate_checkpoints(
    args: argparse.Namespace, device: torch.device, trained: TrainedOn
) -> None:
    """Evaluates every checkpoint asked for; rank 0 prints and writes the results.

    `trained` is of the first. What is wrong with any of them is found before the long work.
    """
    paths = checkpoint_paths(args)
    feature_files = [feature_file(args, trial) for trial, _ in paths]
    data = data_name(args.dataset, args.data_path)
    protocols = []  # and what results say of their identities
    for trial, path in paths:
        known = trained if path == trained.path else TrainedOn.read(path)
        protocol = eval_set(**options.protocol(args, subset=args.subset, trial=trial))
        which = {"trial": trial, "subset": args.subset, "seen": args.seen_ids}
        protocols.append(known.admit(protocol, data, **which))
    output = utils.make_writable_dir(args.output_dir or default_output(args, trained.options))
    results: list[list[dict[str, Any]]] = []
    for (_, path), (protocol, remark), target in zip(paths, protocols, feature_files, strict=True):
        net, info, images = open_checkpoint(args, path, device)
        features, rows = evaluate(
            net,
            protocol,
            images,
            test_feats=(args.test_feat,) if args.test_feat else net.default_test_feats(),
            rankings=rankings(args),
            batch_size=args.test_batch,
            amp=devices.amp_dtype(args.amp, device),
            progress=shows_bars(args),
        )
        if not distributed.is_main():
            continue
        about = {"dataset": data, "stand_in": is_stand_in(args.data_path), "remark": remark}
        about |= describe(path, info, net)
        results.append([{**row, **about} for row in rows])
        if target:
            save_features(target, protocol, features, results[-1][-1])
            log.info("wrote %s", target)
        if args.figures and len(results) == 1:
            from figures.evaluation import evaluation_figures  # matplotlib takes a second to import

            feat = rows[-1]["test_feat"]
            drawn = {role: kinds[feat] for role, kinds in features.items()}
            how = {"heading": not args.no_title}
            files = evaluation_figures(output, protocol, images, drawn, results[0], **how)
            log.info("wrote %s", ", ".join(files))
    if distributed.is_main():
        write_results(output, args, results, device)


def checkpoint_paths(args: argparse.Namespace) -> list[tuple[int, str]]:
    """Returns the checkpoints to evaluate, each with its RegDB trial.

    A path with ``{trial}`` stands for trials 1 to ``--trials``; any other for ``--trial`` alone.

    Raises:
        ValueError: When one of the pattern's files is missing.
    """
    if "{trial}" not in args.resume:
        return [(args.trial, args.resume)]
    if DATASETS[args.dataset].splits == 1:
        raise ValueError("{trial} in --resume is for RegDB, whose trials are trained one by one")
    found = [(t, args.resume.replace("{trial}", str(t))) for t in range(1, args.trials + 1)]
    missing = [path for _, path in found if not Path(path).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(found)} files are missing, {missing[0]} first: make them, or "
            f"evaluate fewer with --trials N"
        )
    return found


def over_checkpoints(per_checkpoint: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and spread over several checkpoints' (RegDB trials') results, row by row."""
    if len(per_checkpoint) == 1:
        return per_checkpoint[0]
    rows = []
    for same in zip(*per_checkpoint, strict=True):
        trials = [{metric: row[metric] for metric in METRICS} for row in same]
        mean, std = mean_and_std(trials)
        row = {**same[0], **mean, "std": std, "per_trial": trials}
        row["cmc"] = np.mean([each["cmc"] for each in same], axis=0).tolist()
        row["protocol"] += f" (mean of trials 1 to {len(same)}, one model each)"
        row["remark"] = "; ".join(dict.fromkeys(each["remark"] for each in same if each["remark"]))
        if row["remark"] not in row["protocol"]:
            row["protocol"] += f"; {row['remark']}"
        rows.append(row)
    return rows


def write_results(
    output: Path,
    args: argparse.Namespace,
    results: list[list[dict[str, Any]]],
    device: torch.device,
) -> None:
    """Prints the table and writes results.json: the mean over checkpoints, of rows of each."""
    rows = over_checkpoints(results)
    sys.stdout.write(table(rows) + "\n")
    # The headline is what was asked for: re-ranked only where --re_rank says so.
    headline = next(row for row in rows if row["re_rank"] == args.re_rank)
    content = {
        **{k: v for k, v in headline.items() if k not in ("per_trial", "std")},
        "rows": rows,
        "checkpoints": [own[0]["checkpoint"] for own in results],
        "options": options.to_json(args),
        "versions": utils.versions(device),
    }
    utils.write_json(output / "results.json", content)
    log.info("wrote %s", output / "results.json")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results in percent, mean +- standard deviation where there are several trials."""
    header = ("R1", "R5", "R10", "R20", "mAP", "mINP")
    lines = [f"{'feature':8} {'re-ranked':12}" + "".join(f"{name:>8}" for name in header)]
    for row in rows:
        numbers = "".join(f"{100 * row[metric]:8.2f}" for metric in METRICS)
        lines.append(f"{row['test_feat']:8} {row['re_rank']:12}{numbers}")
        if len(row["per_trial"]) > 1:
            spread = "".join(f"{100 * row['std'][metric]:8.2f}" for metric in METRICS)
            lines.append(f"{'':8} {'+-':12}{spread}")
        if row["remark"]:
            lines.append(f"{'':8} {row['remark']}")
    first = rows[0]
    lines.append(f"data: {first['dataset']}; protocol: {first['protocol']}")
    about = f"checkpoint: {first['checkpoint']}; epoch chosen: {first['selection']}"
    about += f"; trained with {first['recipe']}" if first.get("recipe") else ""
    lines.append(about)
    return "\n".join(lines)


def default_output(args: argparse.Namespace, trained: Mapping[str, Any]) -> Path:
    """A folder beside the checkpoint, named by the protocol and what differs from the training."""
    parent = Path(args.resume.replace("{trial}", "1")).parent
    stem = Path(args.resume.replace("{trial}", "")).stem
    if args.query_dir:
        words = ["search", args.query_dir.resolve().name, args.gallery_dir.resolve().name]
        sides = (args.query_modality, args.gallery_modality)
        words += [*filter(None, sides), *(["i2v"] if args.direction == "i2v" else [])]
        return parent / "_".join([*words, *changed_settings(args, trained), stem])
    data, given = DATASETS[args.dataset], vars(args)
    asked = dict.fromkeys(  # what the data set's protocols in this direction differ in
        name
        for settings in data.protocols.values()
        if settings.get("direction", args.direction) == args.direction
        for name in settings
    )
    words = [f"{given[name]}shot" if name == "shots" else given[name] for name in asked]
    if data.splits > 1:
        words.append("trials" if "{trial}" in args.resume else f"trial{args.trial}")
    if args.trials != options.DEFAULTS["trials"]:
        words.append(f"first{args.trials}")
    trained_path = trained.get("data_path")
    same_data = trained_path and trained.get("dataset") == args.dataset
    if same_data and Path(trained_path).resolve() != args.data_path.resolve():
        words.append(args.data_path.resolve().name)
    words += changed_settings(args, trained)
    return parent / "_".join(["test", args.dataset, *words, stem])


def changed_settings(args: argparse.Namespace, trained: Mapping[str, Any]) -> list[str]:
    """Words for the settings that differ from the training's, or from the usual ones."""
    given, words = vars(args), []
    usual = {**trained, "amp": False, "float32_precision": "high"}
    for name in (*options.AS_TRAINED_FLAGS, "amp", "float32_precision", "seen_ids"):
        if given[name] not in (None, False, usual.get(name)):
            words.append(name if given[name] is True else f"{name}{given[name]}")
    rare = (args.test_feat, args.subset, args.re_rank, args.tta)
    return words + [word for word in rare if word not in (None, "test", "no")]


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
    utils.make_writable_dir(path.parent)
    return path.with_stem(f"{path.stem}_trial{trial}") if "{trial}" in args.resume else path


def score_features(args: argparse.Namespace) -> int:
    """Scores files of features, anyone's, in place of checkpoints; returns the exit code.

    Raises:
        ValueError: When a flag does not go with --features, or a file cannot be used.
    """
    names = ("resume", "query_dir", "gallery_dir", "figures", "save_features", "test_feat", "top")
    for name in (*names, "seen_ids", "amp", "memory", *options.AS_TRAINED_FLAGS):
        if getattr(args, name):
            raise ValueError(f"--features does not go with --{name.replace('_', '-')}: give one")
    args.resume = args.features
    args = options.resolve_evaluation(args)
    about = {"dataset": data_name(args.dataset, args.data_path), "remark": ""}
    about |= {"stand_in": is_stand_in(args.data_path), "selection": "unknown: features of a file"}
    results = []
    for trial, path in checkpoint_paths(args):
        protocol = eval_set(**options.protocol(args, subset=args.subset, trial=trial))
        rows = score_kinds(protocol, read_features(path, protocol), rankings(args))
        results.append([{**row, **about, "checkpoint": path} for row in rows])
    output = utils.make_writable_dir(args.output_dir or default_output(args, {}))
    write_results(output, args, results, torch.device("cpu"))
    return 0


# --- Your own images ------------------------------------------------------------------------------


def rank_folders(args: argparse.Namespace, device: torch.device, trained: TrainedOn) -> None:
    """Ranks one folder's images by likeness to another's: no identities, no lists, no protocol.

    Writes ``ranks.csv``, ``ranks.json`` and ``ranked_lists.png``.

    Raises:
        ValueError: A folder or the checkpoint is not named, missing or of no use, or an image
            cannot be decoded.
    """
    from figures.image_grids import ranked_lists  # matplotlib takes a second to import
    from figures.page import save

    if not (args.query_dir and args.gallery_dir) or "{trial}" in args.resume:
        raise ValueError(
            "your own images take three flags: --query-dir FOLDER --gallery-dir FOLDER "
            "--resume CHECKPOINT, which names one"
        )
    target = feature_file(args, args.trial)
    sides = ("visible", "infrared") if args.direction == "v2i" else ("infrared", "visible")
    query = folder_images(args.query_dir, args.query_modality or sides[0])
    gallery = folder_images(args.gallery_dir, args.gallery_modality or sides[1])
    net, _, images = open_checkpoint(args, args.resume, device)
    output = utils.make_writable_dir(args.output_dir or default_output(args, trained.options))
    feat = args.test_feat or net.test_feats()[0]
    title = f"{args.query_dir} ({query.modality}) among {args.gallery_dir} ({gallery.modality})"
    title += TTA[args.tta]
    whole = (np.arange(len(gallery)),)
    protocol = EvalSet("own folders", query, gallery, whole, "none", title, None, args.tta)
    features, _ = evaluate(
        net,
        protocol,
        images,
        test_feats=(feat,),
        rankings=(),
        batch_size=args.test_batch,
        amp=devices.amp_dtype(args.amp, device),
        progress=shows_bars(args),
    )
    distmat = distances(features["query"][feat], features["gallery"][feat], args.re_rank)
    about = {"checkpoint": args.resume, "query": args.query_dir, "gallery": args.gallery_dir}
    about |= {"query_modality": query.modality, "gallery_modality": gallery.modality}
    about |= {"test_feat": feat, "re_rank": args.re_rank, "tta": args.tta}
    top = args.top or TOP
    write_ranks(output, query, gallery, distmat, about, top=top)
    if target:
        save_features(target, protocol, features, {**about, **vars(protocol)})
        log.info("wrote %s", target)
    figure = ranked_lists(
        query_images=images(query),
        gallery_images=images(gallery),
        distmat=distmat,
        names=query.paths,
        top=DRAWN,
        title=title + ("" if args.re_rank == "no" else f"; re-ranked: {args.re_rank}"),
    )
    save(figure, output / "ranked_lists.png", heading=not args.no_title)
    text = "wrote ranks.csv and ranks.json (the nearest %d of %d) and ranked_lists.png into %s"
    log.info(text, min(top, len(gallery)), len(gallery), output)


if __name__ == "__main__":
    sys.exit(main())
