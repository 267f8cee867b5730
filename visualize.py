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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import options
from data_loader import EvalLoader, load_images
from data_manager import EvalSet, ImageList, data_name, eval_set
from engine.evaluate import distances, extract_features
from eval_metrics import excluded
from figures import charts as figures
from figures import image_grids as pictures
from figures.prototypes import (
    addressed,
    collect_addresses,
    fired,
    prototype_patches,
    require_memory,
)
from model import TwoStreamNet, load_network, trained_size
from utils import resolve_device, seed_everything, setup_logging, user_errors

log = logging.getLogger(__name__)

Features = Mapping[str, np.ndarray]  # "query" (Q, D) and "gallery" (G, D), rows of norm 1
EMBEDDED_IMAGES = 20  # an identity and modality
PERPLEXITY = 20  # of t-SNE, for a few hundred points


# ------------------------------------------------------------------------------ what is measured


@dataclass(frozen=True, eq=False)
class Subject:
    """A network and the images it is shown on.

    Attributes:
        net: On its device, in evaluation mode.
        protocol: Queries and gallery; figures use its first trial's.
        args: The command line.
        info: What the checkpoint holds beside the network.
        held: Images by their list's paths: queries and gallery are decoded once.
    """

    net: TwoStreamNet
    protocol: EvalSet
    args: argparse.Namespace
    info: dict[str, Any]
    held: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict)

    @property
    def data(self) -> str:
        """Data and protocol in words; stand-in data are called so."""
        name = data_name(self.args.dataset, self.args.data_path)
        words = self.protocol.protocol.replace(", 1 trials", ", first trial")
        return f"{name}: {words}"

    @property
    def title(self) -> str:
        """Data, protocol and the end of the checkpoint's path."""
        return f"{self.data}; {'/'.join(Path(self.args.resume).parts[-2:])}"

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    def load(self, images: ImageList) -> np.ndarray:
        """Images (n, H, W, 3) uint8 at the network's size."""
        if images.paths not in self.held:
            height, width = trained_size(self.info)
            self.held[images.paths] = load_images(
                images,
                height=self.args.img_h or height,
                width=self.args.img_w or width,
                workers=self.args.workers,
                progress=not self.args.quiet,
            )
        return self.held[images.paths]

    def batches(self, images: ImageList) -> EvalLoader:
        """Normalised batches of images."""
        return EvalLoader(self.load(images), batch_size=self.args.test_batch, device=self.device)

    def features(self, net: TwoStreamNet | None = None) -> dict[str, np.ndarray]:
        """Retrieval features of query and gallery, of this network or another like it."""
        feat = self.args.test_feat or self.net.test_feats()[0]
        return {
            role: extract_features(
                self.net if net is None else net,
                self.batches(getattr(self.protocol, role)),
                modality=getattr(self.protocol, role).modality,
                test_feats=(feat,),
                amp=self.args.amp,
                progress=not self.args.quiet,
            )[feat]
            for role in ("query", "gallery")
        }


def open_subject(args: argparse.Namespace) -> Subject:
    """Loads the checkpoint and lists the images that the flags name.

    Raises:
        ValueError: When no checkpoint is named, or it or the data cannot be used.
    """
    if not args.resume:
        raise ValueError("name the checkpoint to draw from: --resume PATH")
    options.resolve_protocol(args)
    device = resolve_device(args.gpu)
    net, info = load_network(args.resume, gem_p=args.gem_p, memory_variant=args.memory_variant)
    protocol = eval_set(**options.protocol(args, subset=args.subset, trials=1))
    net = net.to(device, memory_format=torch.channels_last).eval()
    net.check_image_height(args.img_h or trained_size(info)[0])
    return Subject(net, protocol, args, info)


def ignored(protocol: EvalSet) -> np.ndarray:
    """Which images of the first trial's gallery the protocol ignores for a query: (Q, G) bool.

    Raises:
        ValueError: An unknown camera rule.
    """
    query, gallery = protocol.query, protocol.gallery.take(protocol.gallery_trials[0])
    mask = excluded(protocol.camera_rule, query.pids, gallery.pids, query.camids, gallery.camids)
    return np.zeros((len(query), len(gallery)), bool) if mask is None else mask


def pair_distances(protocol: EvalSet, features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Cosine distances across modalities within and between identities, over the first trial."""
    rows = protocol.gallery_trials[0]
    distmat = 1 + distances(features["query"], features["gallery"][rows])
    same = protocol.query.pids[:, None] == protocol.gallery.pids[rows]
    counts = ~ignored(protocol)
    return distmat[same & counts], distmat[~same & counts]


def chosen_identities(protocol: EvalSet, count: int, seed: int) -> np.ndarray:
    """Random test identities, ascending, among those with images in both modalities."""
    shown = protocol.gallery.pids[protocol.gallery_trials[0]]
    pids = np.intersect1d(protocol.query.pids, shown)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(pids, min(count, len(pids)), replace=False))


def project(points: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, tuple[str, str], str]:
    """Puts features (n, D) into the plane.

    Returns:
        Points (n, 2), names of the axes, and what was done, in words.

    Raises:
        ValueError: Under three points, or t-SNE without scikit-learn.
    """
    if len(points) < 3:
        raise ValueError(f"{len(points)} images are too few for a plane, expected at least 3")
    centered = points.astype(np.float64) - points.mean(axis=0)
    left, scale, right = np.linalg.svd(centered, full_matrices=False)
    if method == "pca":
        right *= np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])[:, None]
        shares = 100 * scale**2 / max((scale**2).sum(), 1e-300)
        names = tuple(f"component {i + 1} ({shares[i]:.0f} % of the variance)" for i in (0, 1))
        return centered @ right[:2].T, names, "Principal components of the features shown."
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    tsne = tsne_class()(perplexity=perplexity, init="pca", random_state=seed)
    words = f"t-SNE, perplexity {perplexity:.3g}, seed {seed}: distances in it mean little."
    return tsne.fit_transform(points), ("", ""), words


def tsne_class() -> Any:
    """scikit-learn's t-SNE.

    Raises:
        ValueError: It is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ValueError(
            "--method tsne needs scikit-learn, which is not among this project's requirements: "
            "pip install scikit-learn, or take --method pca"
        ) from error
    return TSNE


# -------------------------------------------------------------------- figures of test features


def draw_ranked(
    path: Path,
    protocol: EvalSet,
    load: Callable[[ImageList], np.ndarray],
    features: Features,
    *,
    title: str,
    ranking: str = "no",
    num_queries: int = 8,
    top: int = 10,
    seed: int = 0,
) -> None:
    """Draws ranked lists over the first trial's gallery; see `pictures.ranked_lists`."""
    rows = protocol.gallery_trials[0]
    mask = ignored(protocol)
    words = "not re-ranked" if ranking == "no" else f"re-ranked: {ranking}"
    pictures.ranked_lists(
        path,
        query_images=load(protocol.query),
        gallery_images=load(protocol.gallery)[rows],
        distmat=distances(features["query"], features["gallery"][rows], ranking),
        q_pids=protocol.query.pids,
        g_pids=protocol.gallery.pids[rows],
        excluded=mask if mask.any() else None,
        num_queries=num_queries,
        top=top,
        title=f"{title}; {words}",
        seed=seed,
    )


def draw_distances(
    path: Path, protocol: EvalSet, features: Mapping[str, Features], *, title: str
) -> None:
    """Draws distances across modalities, a panel for each of several features by name."""
    figures.distance_histograms(
        path,
        {name: pair_distances(protocol, each) for name, each in features.items()},
        title=title,
        note=f"Pairs of {protocol.query.modality} queries and {protocol.gallery.modality} gallery "
        "images of test identities.",
    )


def draw_embedding(
    path: Path,
    protocol: EvalSet,
    features: Features,
    *,
    title: str,
    ids: int = figures.MOST_CURVES,
    method: str = "pca",
    seed: int = 0,
) -> None:
    """Draws a few test identities' features in the plane; see `project`."""
    wanted = chosen_identities(protocol, ids, seed)
    points, pids, infrared = [], [], []
    gallery_rows = protocol.gallery_trials[0]
    for role, rows in (("query", np.arange(len(protocol.query))), ("gallery", gallery_rows)):
        images = getattr(protocol, role)
        of_pid = [rows[images.pids[rows] == pid][:EMBEDDED_IMAGES] for pid in wanted]
        kept = np.concatenate(of_pid)
        points.append(features[role][kept])
        pids.append(images.pids[kept])
        infrared.append(np.full(len(kept), images.modality == "infrared"))
    plane, axes, words = project(np.concatenate(points), method, seed)
    figures.embedding(
        path,
        plane,
        np.concatenate(pids),
        np.concatenate(infrared),
        axis_names=axes,
        title=title,
        note=f"{words} {len(wanted)} test identities, drawn at random (seed {seed}).",
    )


def evaluation_figures(
    folder: Path,
    protocol: EvalSet,
    load: Callable[[ImageList], np.ndarray],
    features: Features,
    rows: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Draws what an evaluation has at hand into its folder.

    Args:
        folder: Where to.
        protocol: What was evaluated.
        load: From an image list to its images.
        features: Of the rows' last kind of feature.
        rows: Results as in ``results.json``; the last one is what the ranked lists show.

    Returns:
        Names of the files.
    """
    last = rows[-1]
    title = f"{last['dataset']}: {last['protocol']}"
    names = ("ranked_lists", "cmc", "distances", "embedding")
    paths = [folder / f"{name}.png" for name in names]
    draw_ranked(paths[0], protocol, load, features, title=title, ranking=last["re_rank"])
    figures.cmc_curves(paths[1], {_curve_name(r): (r["cmc"], r["mAP"]) for r in rows}, title=title)
    draw_distances(paths[2], protocol, {"after training": features}, title=title)
    draw_embedding(paths[3], protocol, features, title=title)
    return [path.name for path in paths]


def _curve_name(row: Mapping[str, Any]) -> str:
    ranked = "" if row["re_rank"] == "no" else f", {row['re_rank']}"
    return f"{row['test_feat']}{ranked}"


# ------------------------------------------------------------------------------------ commands


def ranked(args: argparse.Namespace, path: Path) -> None:
    """``ranked``: queries with their nearest gallery images."""
    it = open_subject(args)
    choice = {"num_queries": args.num_queries, "top": args.top, "seed": args.seed}
    draw_ranked(
        path, it.protocol, it.load, it.features(), title=it.data, ranking=args.re_rank, **choice
    )


def distances_before_and_after(args: argparse.Namespace, path: Path) -> None:
    """``distances``: within and between identities, before and after training."""
    it = open_subject(args)
    weights = args.before or it.info.get("options", {}).get("weights") or "imagenet"
    seed_everything(args.seed)
    try:
        untrained = TwoStreamNet(**it.net.config, weights=weights)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"{error}\nThese are the weights before training; others: --before none|imagenet|PATH"
        ) from error
    untrained = untrained.to(it.device, memory_format=torch.channels_last)
    origin = {"none": "random weights", "imagenet": "ImageNet weights"}.get(weights, weights)
    features = {f"before ({origin})": it.features(untrained), "after training": it.features()}
    draw_distances(path, it.protocol, features, title=it.data)


def embedding(args: argparse.Namespace, path: Path) -> None:
    """``embedding``: test features in the plane."""
    if args.method == "tsne":
        tsne_class()  # not installed is said before anything is embedded
    it = open_subject(args)
    choice = {"ids": args.ids, "method": args.method, "seed": args.seed}
    draw_embedding(path, it.protocol, it.features(), title=it.data, **choice)


def addressing(args: argparse.Namespace, path: Path) -> None:
    """``addressing``: where on an image each granularity's strongest prototypes fire."""
    it = open_subject(args)
    require_memory(it.net)
    rng = np.random.default_rng((args.seed, 1))
    wanted = chosen_identities(it.protocol, args.ids, args.seed)
    parts: dict[str, list] = {}
    shown, names = [], []
    for images in (it.protocol.query, it.protocol.gallery):
        rows = [rng.choice(np.flatnonzero(images.pids == pid)) for pid in wanted]
        some = images.take(rows)
        shown.append(it.load(some))
        names.append([f"identity {pid}\n{images.modality}" for pid in wanted])
        (batch,) = EvalLoader(shown[-1], batch_size=len(rows), device=it.device)
        levels, shape = addressed(it.net, batch, images.modality)
        for level, (survivors, size) in levels.items():
            parts.setdefault(level, []).append(fired(survivors, size, shape, args.top))
    order = np.arange(2 * len(wanted)).reshape(2, -1).T.ravel()  # modalities side by side
    levels = {
        level: pictures.Fired(
            each[0].size,
            np.concatenate([f.numbers for f in each])[order],
            np.concatenate([f.maps for f in each])[order],
        )
        for level, each in parts.items()
    }
    pictures.addressing(
        path,
        images=np.concatenate(shown)[order],
        names=[sum(names, [])[i] for i in order],
        levels=levels,
        title=it.title,
    )


def prototypes(args: argparse.Namespace, path: Path) -> None:
    """``prototypes``: the image patches that address a prototype most."""
    it = open_subject(args)
    require_memory(it.net)
    rng = np.random.default_rng(args.seed)
    found, shown = {}, {}
    for images in (it.protocol.query, it.protocol.gallery):
        count = min(args.images, len(images))
        some = images.take(rng.choice(len(images), count, replace=False))
        shown[images.modality] = it.load(some)
        batches = EvalLoader(shown[images.modality], batch_size=args.test_batch, device=it.device)
        found[images.modality] = collect_addresses(it.net, batches, images.modality, args.level)
    rows = prototype_patches(
        found,
        shown,
        level=args.level,
        numbers=args.numbers,
        count=args.count,
        top=args.top,
    )
    looked = " and ".join(f"{len(images)} {m}" for m, images in shown.items())
    note = (
        f"Best of {looked} test images, each by its best position (framed; below, the prototype's "
        f"weight in what is read there); ties in random order (seed {args.seed})."
    )
    pictures.prototypes(path, rows, title=it.title, note=note)


def cmc(args: argparse.Namespace, path: Path) -> None:
    """``cmc``: curves of several evaluations."""
    files = [p / "results.json" if p.is_dir() else p for p in args.results]
    names = args.names or _short_names(files)
    if len(names) != len(files):
        raise ValueError(f"{len(names)} --names for {len(files)} results, expected one each")
    if len(set(names)) < len(names):
        raise ValueError(f"names are {', '.join(names)}: tell them apart with --names")
    results = [read_result(file) for file in files]
    titles = dict.fromkeys(f"{each['dataset']}: {each['protocol']}" for each in results)
    ranked = ["" if r["re_rank"] == "no" else f", {r['re_rank']}" for r in results]
    names = [name + words for name, words in zip(names, ranked, strict=True)]
    runs = {name: (r["cmc"], r["mAP"]) for name, r in zip(names, results, strict=True)}
    figures.cmc_curves(path, runs, title="\n".join(titles))


def _short_names(files: Sequence[Path]) -> list[str]:
    """The folders that tell results apart: the first path component that differs, else the file."""
    if len(files) == 1:
        return [files[0].resolve().parent.name]
    folders = [file.resolve().parts for file in files]
    for depth in range(min(map(len, folders))):
        names = [parts[depth] for parts in folders]
        if len(set(names)) == len(names):
            return names
    return [str(file.parent) for file in files]


def read_result(file: Path) -> dict[str, Any]:
    """Reads a ``results.json`` with a CMC in it.

    Raises:
        ValueError: It is not there, or is none of `test.py`'s.
    """
    hint = "write one with test.py --output-dir FOLDER"
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"there is no {file}: {hint}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read as JSON ({error}): {hint}") from error
    lacking = {"cmc", "mAP", "dataset", "protocol", "re_rank"}
    lacking -= set(content if isinstance(content, dict) else ())
    if lacking:
        raise ValueError(f"{file} has no {', '.join(sorted(lacking))}: evaluate again; {hint}")
    return content


def read_log(run: Path) -> list[dict[str, Any]]:
    """Reads a run's ``log.jsonl``, epochs ascending; of an epoch run twice, the later line.

    Args:
        run: The run's folder, or the file.

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
            raise ValueError(
                f"{file}, line {number} is no epoch of a training log ({text[:40]!r})"
            ) from error
    if not lines:
        raise ValueError(f"{file} is empty: no epoch is complete yet")
    return [lines[epoch] for epoch in sorted(lines)]


def run_name(run: Path) -> str:
    """Method and data of a run, from the ``options.json`` beside its log; else its path."""
    folder = run if run.is_dir() else run.parent
    try:
        content = json.loads((folder / "options.json").read_text())
        return f"{content['method']}: {content['data']}"
    except (OSError, ValueError, KeyError, TypeError):
        return str(run)


def curves(args: argparse.Namespace, path: Path) -> None:
    """``curves``: loss terms, rate and evaluations over the epochs."""
    figures.training_curves(path, read_log(args.run), title=run_name(args.run))


def health(args: argparse.Namespace, path: Path) -> None:
    """``health``: how the memory's levels are addressed over the epochs."""
    figures.memory_health(path, read_log(args.run), title=run_name(args.run))


def figure_parser(description: str) -> argparse.ArgumentParser:
    """Parser of ``visualize.py``: one command a figure."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=description, **form)
    commands = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")

    def command(name: str, text: str) -> tuple[argparse.ArgumentParser, options.Flags]:
        figure = commands.add_parser(name, help=text, description=f"Draws {text}.", **form)
        add = options.Flags(figure, "figure")
        add("out", f"file, .png or .pdf (default: {name}.png beside the input)", type=Path)
        return figure, add

    some = {"type": options.positive(int)}
    parsers = {}
    for name, text in {
        "ranked": "queries with their nearest gallery images",
        "distances": "distances within and between identities, before and after training",
        "embedding": "test features in the plane",
        "addressing": "where on an image each granularity's strongest prototypes fire",
        "prototypes": "the image patches that address a prototype most",
    }.items():
        figure, parsers[name] = command(name, text)
        options.evaluation_flags(figure)
        options.Flags(figure, "choice")(
            "seed", "of random choices", type=options.non_negative(int), default=0
        )
    parsers["ranked"]("num-queries", "queries", **some, default=8)
    parsers["ranked"]("top", "gallery images a query", **some, default=10)
    parsers["distances"]("before", "weights before training: imagenet, none or a file")
    parsers["embedding"]("ids", "identities, 1..7", type=int, choices=range(1, 8), default=7)
    parsers["embedding"]("method", "projection", choices=("pca", "tsne"), default="pca")
    parsers["addressing"]("ids", "identities, two images each", **some, default=3)
    parsers["addressing"]("top", "prototypes an image and level", **some, default=3)
    add = parsers["prototypes"]
    levels = ("part", "instance", "semantic")
    add("level", "granularity", choices=levels, default="part")
    add(
        "numbers",
        "prototypes (default: the most addressed)",
        type=options.non_negative(int),
        nargs="+",
    )
    add("count", "prototypes, where no numbers are given", **some, default=8)
    add("top", "patches a prototype and modality", **some, default=6)
    add("images", "images a modality to look through", **some, default=200)

    figure, add = command("cmc", "cumulative matching curves of several evaluations")
    figure.add_argument("results", nargs="+", type=Path, help="results.json, or folders with one")
    add("names", "of the curves (default: the folders')", nargs="+")
    for name, text in {
        "curves": "loss terms, rate and evaluations over the epochs",
        "health": "how the memory's levels are addressed over the epochs",
    }.items():
        figure, _ = command(name, text)
        figure.add_argument("run", type=Path, help="a run's folder, or its log.jsonl")
    return parser


COMMANDS: dict[str, Callable[[argparse.Namespace, Path], None]] = {
    "ranked": ranked,
    "cmc": cmc,
    "distances": distances_before_and_after,
    "embedding": embedding,
    "addressing": addressing,
    "prototypes": prototypes,
    "health": health,
    "curves": curves,
}


def default_path(args: argparse.Namespace) -> Path:
    """The figure's file beside what it is drawn from."""
    if args.figure == "cmc":
        source = args.results[0]
    else:
        source = args.run if args.figure in ("curves", "health") else Path(args.resume or ".")
    return (source if source.is_dir() else source.parent) / f"{args.figure}.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    with user_errors():
        args = figure_parser(__doc__).parse_args(argv)
        setup_logging()
        path = args.out or default_path(args)
        named = path.suffix.lower() in figures.FORMATS
        if args.out and not (named and os.access(path.parent, os.W_OK)):
            raise ValueError(f"--out {path}: expected a .png or .pdf in a folder to write into")
        COMMANDS[args.figure](args, path)
        log.info("wrote %s", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
