"""Draws one figure from a checkpoint, from several results, or from a run's log.

    python visualize.py ranked     --dataset regdb --resume runs/MGMRA_regdb_trial1/last.pt
    python visualize.py distances  --dataset regdb --resume runs/MGMRA_regdb_trial1/last.pt
    python visualize.py embedding  --dataset regdb --resume runs/MGMRA_regdb_trial1/last.pt --ids 7
    python visualize.py addressing --dataset regdb --resume runs/MGMRA_regdb_trial1/last.pt
    python visualize.py prototypes --dataset regdb --resume runs/MGMRA_regdb_trial1/last.pt
    python visualize.py cmc runs/*/test_regdb_v2i_trial1_last --names HCT MG-MRA
    python visualize.py curves runs/MGMRA_regdb_trial1
    python visualize.py health runs/MGMRA_regdb_trial1

Test identities only: no figure shows an identity that the network was trained on. Every figure goes
beside its input, or where --out says; --help after a figure's name lists what can be chosen.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

import options
from data_loader import EvalLoader, ImageCache
from data_manager import EvalSet, ImageList, data_name, eval_set
from engine.evaluate import evaluate
from figures import charts, image_grids
from figures.evaluation import (
    chosen_identities,
    draw_distances,
    draw_embedding,
    draw_ranked,
    first_trial,
    re_ranked_suffix,
    tsne_class,
)
from figures.page import FORMATS
from figures.prototypes import (
    Fired,
    addressed,
    fired,
    level_weights,
    prototype_patches,
    require_memory,
)
from model import TwoStreamNet, load_network, trained_size
from networks.settings import LEVELS
from utils import resolve_device, seed_everything, setup_logging, user_errors

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Subject:
    """A network and the images it is shown on.

    Attributes:
        net: On its device, in evaluation mode.
        trial: Queries, and the gallery of the protocol's first trial.
        images: From an image list to its pixels at the network's size.
        args: The command line.
        info: What the checkpoint holds beside the network.
    """

    net: TwoStreamNet
    trial: EvalSet
    images: ImageCache
    args: argparse.Namespace
    info: dict[str, Any]

    @property
    def data(self) -> str:
        """Data and protocol in words; stand-in data are called so."""
        return f"{data_name(self.args.dataset, self.args.data_path)}: {self.trial.protocol}"

    @property
    def title(self) -> str:
        """Data, protocol and the end of the checkpoint's path."""
        return f"{self.data}; {'/'.join(Path(self.args.resume).parts[-2:])}"

    def batches(self, images: ImageList) -> EvalLoader:
        """Returns normalised batches of images."""
        device = next(self.net.parameters()).device
        return EvalLoader(self.images(images), batch_size=self.args.test_batch, device=device)

    def features(self, net: TwoStreamNet | None = None) -> dict[str, np.ndarray]:
        """Returns features of query and gallery, of this network or another like it."""
        feat = self.args.test_feat or self.net.test_feats()[0]
        features, _ = evaluate(
            self.net if net is None else net,
            self.trial,
            self.images,
            test_feats=(feat,),
            rankings=(),
            batch_size=self.args.test_batch,
            amp=self.args.amp,
            progress=not self.args.quiet,
        )
        return {role: kinds[feat] for role, kinds in features.items()}


def open_subject(args: argparse.Namespace) -> Subject:
    """Loads the checkpoint and lists the images that the flags name.

    Raises:
        ValueError: When no checkpoint is named, or it or the data cannot be used.
    """
    if not args.resume:
        raise ValueError("name the checkpoint to draw from: --resume PATH")
    device = resolve_device(args.gpu)
    net, info = load_network(args.resume, gem_p=args.gem_p, memory_variant=args.memory_variant)
    trial = first_trial(eval_set(**options.protocol(args, subset=args.subset)))
    net = net.to(device, memory_format=torch.channels_last).eval()
    height, width = trained_size(info)
    height, width = args.img_h or height, args.img_w or width
    net.check_image_height(height)
    images = ImageCache(height, width, workers=args.workers, progress=not args.quiet)
    return Subject(net, trial, images, args, info)


def ranked(args: argparse.Namespace, path: Path) -> None:
    """``ranked``: queries with their nearest gallery images."""
    subject = open_subject(args)
    sides = {"query": subject.trial.query, "gallery": subject.trial.gallery}
    images = {role: subject.images(listed) for role, listed in sides.items()}
    choice = {"num_queries": args.num_queries, "top": args.top, "seed": args.seed}
    choice |= {"title": subject.data, "ranking": args.re_rank}
    draw_ranked(path, subject.trial, images, subject.features(), **choice)


def distances(args: argparse.Namespace, path: Path) -> None:
    """``distances``: within and between identities, before and after training."""
    subject = open_subject(args)
    weights = args.before or subject.info.get("options", {}).get("weights") or "imagenet"
    seed_everything(args.seed)
    try:
        untrained = TwoStreamNet(**subject.net.config, weights=weights)
    except (ValueError, FileNotFoundError) as error:
        hint = "These are the weights before training; others: --before none|imagenet|PATH"
        raise ValueError(f"{error}\n{hint}") from error
    untrained.to(next(subject.net.parameters()).device, memory_format=torch.channels_last)
    origin = {"none": "random weights", "imagenet": "ImageNet weights"}.get(weights, weights)
    features = {f"before ({origin})": subject.features(untrained)}
    features["after training"] = subject.features()
    draw_distances(path, subject.trial, features, title=subject.data)


def embedding(args: argparse.Namespace, path: Path) -> None:
    """``embedding``: test features in the plane."""
    if args.method == "tsne":
        tsne_class()  # fails before anything is embedded, if it is not installed
    subject = open_subject(args)
    choice = {"ids": args.ids, "method": args.method, "seed": args.seed}
    draw_embedding(path, subject.trial, subject.features(), title=subject.data, **choice)


def addressing(args: argparse.Namespace, path: Path) -> None:
    """``addressing``: where on an image each granularity's strongest prototypes fire."""
    subject = open_subject(args)
    require_memory(subject.net)
    rng = np.random.default_rng((args.seed, 1))
    wanted = chosen_identities(subject.trial, args.ids, args.seed)
    sides = (subject.trial.query, subject.trial.gallery)
    shown, found = [], []
    for images in sides:
        some = images.take([rng.choice(np.flatnonzero(images.pids == pid)) for pid in wanted])
        shown.append(subject.images(some))
        for batch in subject.batches(some):
            weights, shape = addressed(subject.net, batch, images.modality)
            found.append(weights)
    order = np.arange(2 * len(wanted)).reshape(2, -1).T.ravel()  # an identity's two images
    levels = {}
    for level in found[0]:
        both = fired(sparse.vstack([weights[level] for weights in found]), shape, args.top)
        levels[level] = Fired(both.size, both.numbers[order], both.maps[order])
    image_grids.addressing(
        path,
        images=np.concatenate(shown)[order],
        names=[f"identity {pid}\n{images.modality}" for pid in wanted for images in sides],
        levels=levels,
        title=subject.title,
    )


def prototypes(args: argparse.Namespace, path: Path) -> None:
    """``prototypes``: the image patches that address a prototype most."""
    subject = open_subject(args)
    require_memory(subject.net)
    rng = np.random.default_rng(args.seed)
    weights, shown = {}, {}
    for images in (subject.trial.query, subject.trial.gallery):
        count, modality = min(args.images, len(images)), images.modality
        some = images.take(rng.choice(len(images), count, replace=False))
        shown[modality], batches = subject.images(some), subject.batches(some)
        weights[modality], shape = level_weights(subject.net, batches, modality, args.level)
    choice = {"numbers": args.numbers, "count": args.count, "top": args.top}
    rows = prototype_patches(weights, shown, shape, level=args.level, **choice)
    searched = " and ".join(f"{len(images)} {modality}" for modality, images in shown.items())
    note = (
        f"Best of {searched} test images, each by its best position (framed; below, the "
        f"prototype's weight in what is read there); ties in random order (seed {args.seed})."
    )
    image_grids.prototypes(path, rows, title=subject.title, note=note)


# ------------------------------------------------------------------------ from results and logs


def cmc(args: argparse.Namespace, path: Path) -> None:
    """``cmc``: curves of several evaluations."""
    files = [p / "results.json" if p.is_dir() else p for p in args.results]
    names = args.names or _short_names(files)
    if len(names) != len(files):
        raise ValueError(f"{len(names)} --names for {len(files)} results, expected one each")
    if len(set(names)) < len(names):
        raise ValueError(f"names are {', '.join(names)}: tell them apart with --names")
    results = [read_result(file) for file in files]
    runs = {
        name + re_ranked_suffix(result): (result["cmc"], result["mAP"])
        for name, result in zip(names, results, strict=True)
    }
    titles = dict.fromkeys(f"{result['dataset']}: {result['protocol']}" for result in results)
    charts.cmc_curves(path, runs, title="\n".join(titles))


def _short_names(files: Sequence[Path]) -> list[str]:
    """Returns the folders that tell results apart: the first path component that differs."""
    if len(files) == 1:
        return [files[0].resolve().parent.name]
    for names in zip(*(file.resolve().parts for file in files), strict=False):
        if len(set(names)) == len(names):
            return list(names)
    return [str(file.parent) for file in files]


def read_result(file: Path) -> dict[str, Any]:
    """Reads a ``results.json`` with a CMC in it.

    Raises:
        ValueError: It is not there, or `test.py` did not write it.
    """
    hint = "write one with test.py --output-dir FOLDER"
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"there is no {file}: {hint}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}): {hint}") from error
    missing = {"cmc", "mAP", "dataset", "protocol", "re_rank"}
    missing -= set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{file} has no {', '.join(sorted(missing))}: evaluate again; {hint}")
    return content


def read_log(run: Path) -> list[dict[str, Any]]:
    """Reads a run's ``log.jsonl``, epochs ascending; of an epoch run twice, the later line.

    Raises:
        ValueError: It is not there, is empty, or a line is no JSON object with an epoch.
    """
    file = run / "log.jsonl" if run.is_dir() else run
    if not file.is_file():
        raise ValueError(f"there is no {file}: name the folder that a training script wrote into")
    lines: dict[int, dict[str, Any]] = {}
    for number, text in enumerate(file.read_text(errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
            lines[int(line["epoch"])] = line
        except (ValueError, KeyError, TypeError) as error:
            what = f"{file}, line {number} is no epoch of a training log ({text[:40]!r})"
            raise ValueError(what) from error
    if not lines:
        raise ValueError(f"{file} is empty: no epoch is complete yet")
    return [lines[epoch] for epoch in sorted(lines)]


def run_name(run: Path) -> str:
    """Returns method and data of a run, from the ``options.json`` beside its log; else its path."""
    folder = run if run.is_dir() else run.parent
    try:
        content = json.loads((folder / "options.json").read_text())
        return f"{content['method']}: {content['data']}"
    except (OSError, ValueError, KeyError, TypeError):
        return str(run)


def curves(args: argparse.Namespace, path: Path) -> None:
    """``curves``: loss terms, learning rate and evaluations over the epochs."""
    charts.training_curves(path, read_log(args.run), title=run_name(args.run))


def health(args: argparse.Namespace, path: Path) -> None:
    """``health``: how the memory's levels are addressed over the epochs."""
    charts.memory_health(path, read_log(args.run), title=run_name(args.run))


# ------------------------------------------------------------------------------ the command line


def figure_parser(description: str) -> argparse.ArgumentParser:
    """Returns the parser of ``visualize.py``: one command a figure."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=description, **form)
    commands = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    count, number = options.positive(int), options.non_negative(int)

    def command(draw: Callable[..., None], text: str) -> tuple[Any, options.Flags]:
        name = draw.__name__
        figure = commands.add_parser(name, help=text, description=f"Draws {text}.", **form)
        figure.set_defaults(draw=draw)
        add = options.Flags(figure, "figure")
        add("out", f"file, .png or .pdf (default: {name}.png beside the input)", type=Path)
        return figure, add

    def checkpoint_command(draw: Callable[..., None], text: str) -> options.Flags:
        figure, add = command(draw, text)
        options.evaluation_flags(figure)
        add("seed", "of random choices", type=number, default=0)
        return add

    add = checkpoint_command(ranked, "queries with their nearest gallery images")
    add("num-queries", "queries", type=count, default=8)
    add("top", "gallery images a query", type=count, default=10)
    text = "distances within and between identities, before and after training"
    add = checkpoint_command(distances, text)
    add("before", "weights before training: imagenet, none or a file")
    add = checkpoint_command(embedding, "test features in the plane")
    most = charts.MAX_CURVES
    add("ids", f"identities, 1..{most}", type=int, choices=range(1, most + 1), default=most)
    add("method", "projection", choices=("pca", "tsne"), default="pca")
    text = "where on an image each granularity's strongest prototypes fire"
    add = checkpoint_command(addressing, text)
    add("ids", "identities, two images each", type=count, default=3)
    add("top", "prototypes an image and level", type=count, default=3)
    add = checkpoint_command(prototypes, "the image patches that address a prototype most")
    add("level", "granularity", choices=LEVELS, default="part")
    add("numbers", "prototypes (default: the most addressed)", type=number, nargs="+")
    add("count", "prototypes, where no numbers are given", type=count, default=8)
    add("top", "patches a prototype and modality", type=count, default=6)
    add("images", "images a modality to look through", type=count, default=200)
    figure, add = command(cmc, "cumulative matching curves of several evaluations")
    figure.add_argument("results", nargs="+", type=Path, help="results.json, or folders with one")
    add("names", "of the curves (default: the folders')", nargs="+")
    for draw, text in (
        (curves, "loss terms, learning rate and evaluations over the epochs"),
        (health, "how the memory's levels are addressed over the epochs"),
    ):
        figure, _ = command(draw, text)
        figure.add_argument("run", type=Path, help="a run's folder, or its log.jsonl")
    return parser


def default_path(args: argparse.Namespace) -> Path:
    """Returns the figure's file beside what it is drawn from."""
    if "results" in args:
        source = args.results[0]
    else:
        source = args.run if "run" in args else Path(args.resume or ".")
    return (source if source.is_dir() else source.parent) / f"{args.figure}.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    with user_errors():
        args = figure_parser(__doc__).parse_args(argv)
        if "resume" in args:
            args = options.resolve_evaluation(args)
        setup_logging()
        path = args.out or default_path(args)
        known = path.suffix.lower() in FORMATS
        if args.out and not (known and os.access(path.parent, os.W_OK)):
            raise ValueError(f"--out {path}: expected a .png or .pdf in a folder to write into")
        args.draw(args, path)
        log.info("wrote %s", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
