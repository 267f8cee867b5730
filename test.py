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

import csv
import io
import logging
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import options
import utils
from data_manager import DATASETS, TTA, EvalSet, data_name, eval_set, is_stand_in
from datasets.decode import ImageCache
from datasets.folders import folder_images
from engine import devices
from engine.checkpoints import TrainedOn, describe, open_network
from engine.evaluate import Features, average, distances, evaluate, score_kinds
from engine.feature_files import read_features, save_features
from eval_metrics import METRICS
from figures.evaluation import evaluation_figures
from figures.image_grids import ranked_lists
from figures.page import save

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]  # results of one checkpoint: a row for each feature and ranking

TOP = 20  # gallery images per query in an own folder's ranking
# Flags of a network, and of what takes one: they do not go with --features.
NOT_WITH_FEATURES = ("resume", "query_dir", "gallery_dir", "figures", "save_features", "test_feat")
NOT_WITH_FEATURES += ("top", "seen_ids", "amp", "memory", *options.AS_TRAINED_FLAGS)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    with utils.user_errors():
        utils.setup_logging()
        args = options.test_parser(__doc__).parse_args(argv)
        device, trained = torch.device("cpu"), {}
        if args.features:
            for name in NOT_WITH_FEATURES:
                if getattr(args, name):
                    flag = f"--{name.replace('_', '-')}"
                    raise ValueError(f"--features does not go with {flag}: give one")
            args.resume = args.features
            args = options.resolve_evaluation(args)
        elif args.resume:
            args.resume = utils.find_checkpoint(args.resume, args.model_path)
            first = TrainedOn(args.resume.replace("{trial}", "1"))
            args, trained = options.resolve_evaluation(args, first.defaults), first.options
            device = devices.resolve_device(args.gpu)
            devices.set_up(device, args.float32_precision)
        else:
            raise ValueError("name the checkpoint to evaluate: --resume PATH")
        own = args.query_dir or args.gallery_dir
        if own and (not (args.query_dir and args.gallery_dir) or "{trial}" in args.resume):
            flags = "--query-dir FOLDER --gallery-dir FOLDER --resume CHECKPOINT"
            raise ValueError(f"your own images take three flags: {flags}, which names one")
        output = args.output_dir or default_output(args, trained)
        run = rank_folders if own else evaluate_all
        run(args, device, output)
    return 0


def get_features(
    args: Namespace, device: torch.device, path: str, protocol: EvalSet, output: Path
) -> tuple[Features, dict[str, Any], ImageCache | None]:
    """Embeds a protocol's images by a checkpoint's network, or reads their features from a file.

    Makes the folders to write into, `output` and that of --save-features, as soon as nothing is
    refused any more. Returns the features, what a result says of where they come from, and the
    decoded images.
    """
    if args.features:
        features = read_features(path, protocol)
        utils.make_writable_dir(output)
        return features, {"checkpoint": path, "selection": "unknown: features of a file"}, None
    settings = {name: getattr(args, name) for name in (*options.AS_TRAINED_FLAGS, "memory")}
    net, info, size = open_network(path, device, **settings)
    images = ImageCache(*size, workers=args.workers, progress=not args.quiet)
    if args.test_feat not in (None, *net.test_feats()):
        legal = ", ".join(net.test_feats())
        raise ValueError(f"test feature must be one of: {legal}; got {args.test_feat!r}")
    utils.make_writable_dir(output)
    if args.save_features:
        utils.make_writable_dir(args.save_features.parent)
    feats = (args.test_feat,) if args.test_feat else net.default_test_feats()
    how = {"batch_size": args.test_batch, "progress": not args.quiet}
    how["amp"] = devices.amp_dtype(args.amp, device)
    features, _ = evaluate(net, protocol, images, test_feats=feats, rankings=(), **how)
    return features, describe(path, info, net), images


# --- A data set -----------------------------------------------------------------------------------


def evaluate_all(args: Namespace, device: torch.device, output: Path) -> None:
    """Evaluates every checkpoint, or file of features; prints the table and writes the results.

    Files that are missing or hold no such features, identities that were trained on and folders
    that cannot be written are found before the first evaluation.
    """
    data = data_name(args.dataset, args.data_path)
    work = []
    for trial, path in files_to_evaluate(args):
        protocol = eval_set(**options.protocol(args, subset=args.subset, trial=trial))
        if args.features:
            read_features(path, protocol)
            remark = ""
        else:
            which = {"trial": trial, "subset": args.subset, "seen": args.seen_ids}
            protocol, remark = TrainedOn(path).admit(protocol, data, **which)
        work.append((trial, path, protocol, remark))
    rankings = tuple(dict.fromkeys(("no", args.re_rank)))
    results: list[Rows] = []
    for trial, path, protocol, remark in work:
        features, about, images = get_features(args, device, path, protocol, output)
        about |= {"dataset": data, "stand_in": is_stand_in(args.data_path), "remark": remark}
        rows = [{**row, **about} for row in score_kinds(protocol, features, rankings)]
        results.append(rows)
        if args.save_features:
            target = args.save_features
            if "{trial}" in args.resume:
                target = target.with_stem(f"{target.stem}_trial{trial}")
            save_features(target, protocol, features, rows[-1])
            log.info("wrote %s", target)
        if args.figures and len(results) == 1:
            drawn = {role: kinds[rows[-1]["test_feat"]] for role, kinds in features.items()}
            heading = not args.no_title
            files = evaluation_figures(output, protocol, images, drawn, rows, heading=heading)
            log.info("wrote %s", ", ".join(files))
    write_results(output, args, results, device)


def files_to_evaluate(args: Namespace) -> list[tuple[int, str]]:
    """Returns the checkpoints, or files of features, to evaluate, each with its RegDB trial.

    A path with ``{trial}`` stands for trials 1 to ``--trials``, and raises ValueError when one of
    its files is missing; any other stands for ``--trial`` alone.
    """
    if "{trial}" not in args.resume:
        return [(args.trial, args.resume)]
    if DATASETS[args.dataset].splits == 1:
        raise ValueError("{trial} in a path is for RegDB, whose trials are trained one by one")
    found = [(t, args.resume.replace("{trial}", str(t))) for t in range(1, args.trials + 1)]
    missing = [path for _, path in found if not Path(path).is_file()]
    if missing:
        what = f"{len(missing)} of {len(found)} files are missing, {missing[0]} first"
        raise ValueError(f"{what}: make them, or evaluate fewer with --trials N")
    return found


def over_checkpoints(per_checkpoint: list[Rows]) -> Rows:
    """Mean and spread over several checkpoints' (RegDB trials') results, row by row."""
    if len(per_checkpoint) == 1:
        return per_checkpoint[0]
    rows = []
    for same in zip(*per_checkpoint, strict=True):
        trials = [{metric: row[metric] for metric in METRICS} for row in same]
        row = {**same[0], **average(trials, [each["cmc"] for each in same])}
        row["protocol"] += f" (mean of trials 1 to {len(same)}, one model each)"
        row["remark"] = "; ".join(dict.fromkeys(each["remark"] for each in same if each["remark"]))
        if row["remark"] not in row["protocol"]:
            row["protocol"] += f"; {row['remark']}"
        rows.append(row)
    return rows


def write_results(output: Path, args: Namespace, results: list[Rows], device: torch.device) -> None:
    """Prints the table; writes results.json: the means over checkpoints of each kind of row."""
    rows = over_checkpoints(results)
    sys.stdout.write(table(rows) + "\n")
    # The headline is what was asked for: re-ranked only where --re_rank says so.
    headline = next(row for row in rows if row["re_rank"] == args.re_rank)
    content = {
        **{k: v for k, v in headline.items() if k not in ("per_trial", "std")},
        "rows": rows,
        "checkpoints": [own[0]["checkpoint"] for own in results],
        "options": options.to_json(args),
        "versions": devices.versions(device),
    }
    utils.write_json(output / "results.json", content)
    log.info("wrote %s", output / "results.json")


def table(rows: Rows) -> str:
    """The results in percent, mean +- standard deviation where there are several trials."""
    header = "".join(f"{name.replace('rank', 'R'):>8}" for name in METRICS)
    lines = [f"{'feature':8} {'re-ranked':12}{header}"]
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


def default_output(args: Namespace, trained: Mapping[str, Any]) -> Path:
    """A folder beside the checkpoint, named by protocol and what differs from the training."""
    given = vars(args)
    if args.query_dir:
        words = ["search", args.query_dir.resolve().name, args.gallery_dir.resolve().name]
        words += [args.query_modality, args.gallery_modality]
        words += ["i2v"] if args.direction == "i2v" else []
    else:
        data = DATASETS[args.dataset]
        asked: dict[str, Any] = {}  # the options in which its protocols in this direction differ
        for settings in data.protocols.values():
            if settings.get("direction", args.direction) == args.direction:
                asked |= settings
        words = ["test", args.dataset]
        words += [f"{given[name]}shot" if name == "shots" else given[name] for name in asked]
        if data.splits > 1:
            words.append("trials" if "{trial}" in args.resume else f"trial{args.trial}")
        if args.trials != options.DEFAULTS["trials"]:
            words.append(f"first{args.trials}")
        folder = args.data_path.resolve()
        trained_folder = Path(trained.get("data_path") or folder).resolve()
        if trained.get("dataset") == args.dataset and trained_folder != folder:
            words.append(folder.name)
    usual = {**trained, "amp": False, "float32_precision": "high"}
    for name in (*options.AS_TRAINED_FLAGS, "amp", "float32_precision", "seen_ids"):
        if given[name] not in (None, False, usual.get(name)):
            words.append(name if given[name] is True else f"{name}{given[name]}")
    rare = (args.test_feat, args.subset, args.re_rank, args.tta)
    words += [word for word in rare if word not in ("test", "no")]
    stem = Path(args.resume.replace("{trial}", "")).stem
    folder = Path(args.resume.replace("{trial}", "1")).parent
    return folder / "_".join(filter(None, [*words, stem]))


# --- Your own images ------------------------------------------------------------------------------


def rank_folders(args: Namespace, device: torch.device, output: Path) -> None:
    """Ranks one folder's images by likeness to another's: no identities, no lists, no protocol.

    Writes ``ranks.csv``, ``ranks.json`` and ``ranked_lists.png``. Raises ValueError when a folder,
    an image or the checkpoint cannot be used.
    """
    sides = ("visible", "infrared") if args.direction == "v2i" else ("infrared", "visible")
    query = folder_images(args.query_dir, args.query_modality or sides[0])
    gallery = folder_images(args.gallery_dir, args.gallery_modality or sides[1])
    title = f"{args.query_dir} ({query.modality}) among {args.gallery_dir} ({gallery.modality})"
    title += TTA[args.tta]
    whole = (np.arange(len(gallery)),)
    protocol = EvalSet("own folders", query, gallery, whole, "none", title, None, args.tta)
    features, _, images = get_features(args, device, args.resume, protocol, output)
    feat = next(iter(features["query"]))
    features = {role: {feat: kinds[feat]} for role, kinds in features.items()}
    distmat = distances(features["query"][feat], features["gallery"][feat], args.re_rank)
    about = {"checkpoint": args.resume, "query": args.query_dir, "gallery": args.gallery_dir}
    about |= {"query_modality": query.modality, "gallery_modality": gallery.modality}
    about |= {"test_feat": feat, "re_rank": args.re_rank, "tta": args.tta}
    write_ranks(output, protocol, distmat, about, args.top or TOP)
    if args.save_features:
        save_features(args.save_features, protocol, features, {**about, **vars(protocol)})
        log.info("wrote %s", args.save_features)
    figure = ranked_lists(
        query_images=images(query),
        gallery_images=images(gallery),
        distmat=distmat,
        names=query.paths,
        title=title + ("" if args.re_rank == "no" else f"; re-ranked: {args.re_rank}"),
    )
    save(figure, output / "ranked_lists.png", heading=not args.no_title)
    log.info("wrote ranks.csv, ranks.json and ranked_lists.png into %s", output)


def write_ranks(
    folder: Path, protocol: EvalSet, distmat: np.ndarray, about: dict[str, Any], top: int
) -> None:
    """Writes each query's nearest gallery images, nearest first: ``ranks.csv``, ``ranks.json``.

    A rank's ``score`` is minus the distance in `distmat` (Q, G); ties keep gallery order. `top` are
    the gallery images per query, `about` further entries of the JSON file, ``re_rank`` among them.
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
    utils.write_atomic(folder / "ranks.csv", lambda stream: stream.write(content))
    score = "cosine similarity of the features, from -1 to 1: higher is more alike"
    if about["re_rank"] != "no":
        score = "minus the re-ranked distance: higher is more alike, comparable within one query"
    utils.write_json(folder / "ranks.json", {**about, "score": score, "ranks": ranks})


if __name__ == "__main__":
    sys.exit(main())
