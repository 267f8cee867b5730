"""Draws one figure from a checkpoint, from several results, or from a run's log.

    python visualize.py ranked --dataset regdb --resume runs/MGMRA_regdb_trial1/last.pt
    python visualize.py cmc runs/*/test_regdb_v2i_trial1_last --names HCT MG-MRA
    python visualize.py curves runs/MGMRA_regdb_trial1

Identities that the checkpoint was trained on are refused, unless --seen-ids is given. A figure is
written beside its input, or to --out; --no-title leaves title and note to the paper's caption.
--help after a figure's name lists what can be chosen.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import sparse

import options
from data_loader import EvalLoader
from data_manager import ImageList, data_name, eval_set
from datasets.decode import ImageCache
from engine.checkpoints import TrainedOn, open_network
from engine.devices import amp_dtype, resolve_device, set_up
from engine.evaluate import evaluate
from eval_metrics import LOG_LINE
from figures import charts, evaluation, image_grids
from figures.page import FORMATS, save
from figures.prototypes import addressing_weights, alike, fired, prototype_patches
from model import TwoStreamNet
from networks.settings import LEVELS
from options import COUNT, COUNT_OR_0, Flag
from utils import check_form, find_checkpoint, read_json, setup_logging, user_errors

log = logging.getLogger(__name__)


class Subject:
    """What a checkpoint's figures need: its network, and the images of a protocol's first trial.

    `images` decodes an image list; `data` names data set and protocol, `title` the checkpoint too.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises ValueError when the checkpoint or the data cannot be used."""
        self.args, self.device = args, resolve_device(args.gpu)
        set_up(self.device, args.float32_precision)
        settings = {name: getattr(args, name) for name in (*options.AS_TRAINED_FLAGS, "memory")}
        self.net, self.info, size = open_network(args.resume, self.device, **settings)
        self.images = ImageCache(*size, workers=args.workers, progress=not args.quiet)
        name = data_name(args.dataset, args.data_path)
        which = {"trial": args.trial, "subset": args.subset, "seen": args.seen_ids}
        protocol = eval_set(**options.protocol(args, subset=args.subset))
        protocol, _ = TrainedOn(args.resume, self.info).admit(protocol, name, **which)
        self.trial = evaluation.first_trial(protocol)
        self.data = f"{name}: {self.trial.protocol}"
        self.title = f"{self.data}; {'/'.join(Path(args.resume).parts[-2:])}"

    def addressing(self, images: ImageList) -> tuple[dict[str, sparse.csr_matrix], tuple[int, int]]:
        """Returns how images address the memory; see `addressing_weights`."""
        pixels = self.images(images)
        batches = EvalLoader(pixels, batch_size=self.args.test_batch, device=self.device)
        return addressing_weights(self.net, batches, images.modality)

    def features(self, net: TwoStreamNet) -> evaluation.Features:
        """Returns a network's features of query and gallery."""
        args, feat = self.args, self.args.test_feat or net.test_feats()[0]
        how = {"batch_size": args.test_batch, "progress": not args.quiet}
        how["amp"] = amp_dtype(args.amp, self.device)
        features, _ = evaluate(net, self.trial, self.images, test_feats=(feat,), rankings=(), **how)
        return {role: kinds[feat] for role, kinds in features.items()}


def ranked(args: argparse.Namespace) -> Figure:
    """Draws queries with their nearest gallery images."""
    subject = Subject(args)
    features = subject.features(subject.net)
    choice = {"num_queries": args.num_queries, "top": args.top, "seed": args.seed}
    choice |= {"title": subject.data, "ranking": args.re_rank}
    return evaluation.draw_ranked(subject.trial, subject.images, features, **choice)


def distances(args: argparse.Namespace) -> Figure:
    """Draws distances within and between identities, before and after training."""
    subject = Subject(args)
    weights = args.before or subject.info.get("options", {}).get("weights") or "imagenet"
    torch.manual_seed(args.seed)
    try:
        untrained = TwoStreamNet(**subject.net.config, weights=weights)
    except (ValueError, FileNotFoundError) as error:
        hint = "These are the weights before training; others: --before none|imagenet|PATH"
        raise ValueError(f"{error}\n{hint}") from error
    untrained.to(subject.device, memory_format=torch.channels_last)
    origin = {"none": "random weights", "imagenet": "ImageNet weights"}.get(weights, weights)
    features = {f"before ({origin})": subject.features(untrained)}
    features["after training"] = subject.features(subject.net)
    return evaluation.draw_distances(subject.trial, features, title=subject.data)


def embedding(args: argparse.Namespace) -> Figure:
    """Draws test features in the plane."""
    subject = Subject(args)
    choice = {"ids": args.ids, "seed": args.seed, "title": subject.data}
    return evaluation.draw_embedding(subject.trial, subject.features(subject.net), **choice)


def addressing(args: argparse.Namespace) -> Figure:
    """Draws where on an image each granularity's strongest prototypes fire."""
    subject = Subject(args)
    rng = np.random.default_rng((args.seed, 1))
    images, found, names = [], {}, []
    for pid in evaluation.chosen_identities(subject.trial, args.ids, args.seed):
        for side in (subject.trial.query, subject.trial.gallery):
            one = side.take([rng.choice(np.flatnonzero(side.pids == pid))])
            weights, shape = subject.addressing(one)
            for level, own in weights.items():
                found.setdefault(level, []).append(own)
            images.append(subject.images(one))
            names.append(f"identity {pid}\n{side.modality}")
    levels = {level: fired(sparse.vstack(own), shape, args.top) for level, own in found.items()}
    return image_grids.addressing(np.concatenate(images), names, levels, title=subject.title)


def prototypes(args: argparse.Namespace) -> Figure:
    """Draws the image patches that address a prototype most."""
    subject = Subject(args)
    rng = np.random.default_rng(args.seed)
    weights, shown = {}, {}
    for images in (subject.trial.query, subject.trial.gallery):
        count = min(args.images, len(images))
        some = images.take(rng.choice(len(images), count, replace=False))
        found, shape = subject.addressing(some)
        if args.level not in found:
            raise ValueError(f"the memory has no {args.level} level, expected {' or '.join(found)}")
        weights[images.modality], shown[images.modality] = found[args.level], subject.images(some)
    choice = {"level": args.level, "count": args.count, "top": args.top}
    rows = prototype_patches(weights, shown, shape, **choice)
    searched = " and ".join(f"{len(images)} {modality}" for modality, images in shown.items())
    note = f"The patches, of {searched} images, whose middle (framed) addresses a prototype most, "
    note += "at most one per image; below each the prototype's weight there."
    if all(alike(own) for own in weights.values()):
        note += f" All weights of the {args.level} level are alike: it tells no position from "
        note += f"another, and which patches stand here is chance (seed {args.seed})."
    return image_grids.prototypes(rows, title=subject.title, note=note)


def cmc(args: argparse.Namespace) -> Figure:
    """Draws cumulative matching curves of several evaluations."""
    files = [p / "results.json" if p.is_dir() else p for p in args.results]
    results = [read_result(file) for file in files]
    names = args.names or [str(file.parent) for file in files]
    if len(names) != len(files):
        raise ValueError(f"{len(names)} --names for {len(files)} results, expected one each")
    if len(set(names)) < len(names):
        raise ValueError(f"names are {', '.join(names)}: tell them apart with --names")
    titles = dict.fromkeys(f"{result['dataset']}: {result['protocol']}" for result in results)
    return charts.cmc_curves(list(zip(names, results, strict=True)), title="\n".join(titles))


def read_result(file: Path) -> dict[str, Any]:
    """Reads a ``results.json``; raises ValueError when `test.py` did not write it."""
    schema = {"cmc": [float], "mAP": float, "dataset": str, "protocol": str, "re_rank": str}
    content = read_json(file, schema)
    if not content["cmc"]:
        raise ValueError(f"{file} has an empty cmc: write one with test.py --output-dir FOLDER")
    return content


def read_log(run: Path) -> tuple[list[dict[str, Any]], str]:
    """Reads a run's log, and its title; raises ValueError where it is no log, or has no epoch."""
    file = run / "log.jsonl" if run.is_dir() else run
    lines = read_json(file, LOG_LINE)
    if not lines:
        raise ValueError(f"{file} is empty: no epoch is complete yet")
    beside = file.with_name("options.json")
    if not beside.is_file():
        return lines, str(run)
    about = read_json(beside, {"method": str, "data": str})
    return lines, f"{about['method']}: {about['data']}"


def curves(args: argparse.Namespace) -> Figure:
    """Draws loss terms, learning rate and evaluations over the epochs."""
    lines, title = read_log(args.run)
    check_form(lines[-1], {"lr": float, "total": float}, f"the last line of {args.run}")
    return charts.training_curves(lines, title=title)


def health(args: argparse.Namespace) -> Figure:
    """Draws how the memory's levels are addressed over the epochs."""
    lines, title = read_log(args.run)
    return charts.memory_health(lines, title=title)


MOST = charts.MAX_CURVES
BEFORE = "weights before training: imagenet, none or a file (default: those trained from)"
SEED = Flag("seed", 0, "seed of the figure's random choices", COUNT_OR_0)
# The figures, each with the flags of its own.
FIGURES: dict[Callable[..., Figure], tuple[Flag, ...]] = {
    ranked: (
        Flag("num-queries", 8, "queries", COUNT),
        Flag("top", 10, "gallery images per query", COUNT),
    ),
    distances: (Flag("before", None, BEFORE),),
    embedding: (Flag("ids", MOST, "identities that can be told apart", range(1, MOST + 1)),),
    addressing: (
        Flag("ids", 3, "identities, two images each", COUNT),
        Flag("top", 3, "prototypes per image and level", COUNT),
    ),
    prototypes: (
        Flag("level", "part", "granularity", LEVELS),
        Flag("count", 8, "prototypes, the most addressed ones", COUNT),
        Flag("top", 6, "patches per prototype and modality", COUNT),
        Flag("images", 200, "images per modality to look through", COUNT),
    ),
    cmc: (Flag("names", None, "names of the curves (default: the folders)", nargs="+"),),
    curves: (),
    health: (),
}


def figure_parser(description: str) -> options.Parser:
    """Returns the parser of ``visualize.py``: one command per figure."""
    parser = options.Parser(description)
    commands = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    for draw, flags in FIGURES.items():
        name, text = draw.__name__, draw.__doc__
        figure = commands.add_parser(name, help=text, description=text)
        figure.set_defaults(draw=draw)
        out = Flag("out", None, f"file, .png or .pdf (default: {name}.png beside the input)", Path)
        groups = {"file": (out, options.NO_TITLE), "figure": flags}
        if draw is cmc:
            text = "results.json, or folders with one"
            figure.add_argument("results", nargs="+", type=Path, help=text)
        elif draw in (curves, health):
            figure.add_argument("run", type=Path, help="a run's folder, or its log.jsonl")
        else:
            groups |= {"figure": (SEED, *flags), **options.EVALUATION}
        options.add_flags(figure, groups)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    with user_errors():
        setup_logging()
        args = figure_parser(__doc__).parse_args(argv)
        if "resume" in args:
            if not args.resume:
                raise ValueError("name the checkpoint to draw from: --resume PATH")
            resume = args.resume.replace("{trial}", str(args.trial or 1))
            args.resume = find_checkpoint(resume, args.model_path)
            args = options.resolve_evaluation(args, TrainedOn(args.resume).defaults)
        source = Path(vars(args).get("run") or vars(args).get("resume") or args.results[0])
        out = args.out or (source if source.is_dir() else source.parent) / f"{args.figure}.png"
        writable = out.suffix.lower() in FORMATS and os.access(out.parent, os.W_OK)
        if not writable and (args.out or source.exists()):
            raise ValueError(f"--out {out}: expected a .png or .pdf in a folder to write into")
        save(args.draw(args), out, heading=not args.no_title)
        log.info("wrote %s", out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
