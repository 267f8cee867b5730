"""Every command-line flag, once; the presets and where they come from; how one is resolved.

A flag that is not given takes its value from the preset (``--preset``, by default the data set's),
and where the preset is silent from `DEFAULTS`. What was resolved is printed and saved.
Each flag can be spelled with ``-`` or with ``_``.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DATA_FOLDERS = {"regdb": "RegDB", "sysu": "SYSU-MM01", "llcm": "LLCM"}
DATASETS = tuple(DATA_FOLDERS)

# Values shared by all presets: the releases' settings.
DEFAULTS: dict[str, Any] = {
    "lr": 0.1,
    "optim": "sgd",
    "backbone_lr_scale": 0.1,
    "weight_decay": 5e-4,
    "momentum": 0.9,
    "epochs": 61,
    "schedule": "step",
    "warmup_epochs": 10,
    "milestones": (20, 50),
    "triplet_ramp": (0, 0),
    "batch_size": 8,
    "num_pos": 4,
    "arch": "resnet50",
    "weights": "imagenet",
    "gem_p": 3.0,
    "margin": 0.3,
    "label_smooth": "off",
    "w_id": 1.0,
    "w_triplet": 1.0,
    "w_center": 1.0,
    "w_memory_id": 0.1,
    "w_memory_triplet": 1.0,
    "w_alignment": 0.1,
    "w_decorrelation": 0.0,
    "img_h": 288,
    "img_w": 144,
    "pad": 10,
    "flip": 0.5,
    "grey": 0.0,
    "tone": 0.0,
    "erase": 0.0,
    "eval_start": 10,
    "eval_every": 2,
}

PRESETS: dict[str, dict[str, Any]] = {
    # The authors' README for RegDB.
    "regdb": {
        "batch_size": 8,
        "num_pos": 4,
        "gem_p": 10.0,
        "w_center": 2.0,
        "label_smooth": "on",
    },
    # HCT's README for SYSU-MM01; the MG-MRA release itself keeps w_center 2.0 with smoothing. The
    # rate is the first MG-MRA README's; the authors' later README says 0.01.
    "sysu": {
        "batch_size": 6,
        "num_pos": 8,
        "gem_p": 3.0,
        "w_center": 1.0,
        "label_smooth": "off",
    },
    # This project's guess: SYSU-MM01's, the other set of several cameras and one image per camera
    # in the gallery; no source we read trains these methods on LLCM.
    "llcm": {
        "batch_size": 6,
        "num_pos": 8,
        "gem_p": 3.0,
        "w_center": 1.0,
        "label_smooth": "off",
    },
    # No pretrained weights at hand: small network, small images, equal rates, triplets let in late.
    # Measured on stand-in data only.
    "scratch": {
        "weights": "none",
        "arch": "resnet18",
        "img_h": 96,
        "img_w": 48,
        "pad": 4,
        "gem_p": 3.0,
        "w_center": 1.0,
        "label_smooth": "on",
        "lr": 0.05,
        "backbone_lr_scale": 1.0,
        "epochs": 14,
        "schedule": "cosine",
        "warmup_epochs": 3,
        "triplet_ramp": (4, 9),
        "grey": 0.5,
        "tone": 0.3,
        "eval_start": 0,
        "eval_every": 7,
    },
}
PRESET_SOURCES = {
    "regdb": "the authors' README for RegDB",
    "sysu": "HCT's README for SYSU-MM01, rate of the first MG-MRA README",
    "llcm": "this project's guess, SYSU-MM01's values",
    "scratch": "this project, on stand-in data",
}


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def positive(kind: type) -> Any:
    """Returns a parser of numbers above 0, for argparse."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def non_negative(kind: type) -> Any:
    """Returns a parser of numbers from 0 on, for argparse."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
        return value

    parse.__name__ = f"non-negative {kind.__name__}"
    return parse


def _shrink(text: str) -> float | str:
    return text if text == "auto" else _probability(text)


# Flags without influence on a number.
INCIDENTAL = (
    *("workers", "quiet", "gpu", "output_dir", "model_path", "log_path", "vis_log_path", "resume"),
    *("overwrite", "test_only", "save_epoch", "save_every_steps", "test_batch", "figures"),
)
# On --resume: what may differ, what belongs to the run for good, and what places the steps within
# an epoch. Everything else may change, and is reported.
FREE_ON_RESUME = (*INCIDENTAL, "data_path", "preset", "weights", "deterministic")
PROTOCOL = ("dataset", "data_path", "trial", "direction", "mode", "gallery", "shots", "trials")
FIXED_ON_RESUME = ("dataset", "trial", "select_on", "method", "optim")
FIXED_WITHIN_EPOCH = ("seed", "batch_size", "num_pos")


class Flags:
    """Adds flags to a group in both spellings; absent ones stay None until resolved."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._group = parser.add_argument_group(title)

    def __call__(self, name: str, help_text: str, *short: str, **settings: Any) -> None:
        """Adds one flag; `settings` go to argparse."""
        names = list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}", *short]))
        key = name.replace("-", "_")
        names = list(dict.fromkeys([*names, f"--{key}"]))
        self._group.add_argument(*names, dest=key, help=help_text, **settings)


def _data_flags(parser: argparse.ArgumentParser) -> None:
    add = Flags(parser, "data")
    add("dataset", "which data set's layout and protocol", choices=DATASETS, default="regdb")
    add("data-path", "data folder (default: data/RegDB, data/SYSU-MM01, data/LLCM)", type=Path)
    add("trial", "RegDB split, 1..10", type=int, default=1)
    add("workers", "threads that decode images", type=positive(int), default=4)
    add("img_h", "image height in pixels", type=positive(int))
    add("img_w", "image width in pixels", type=positive(int))
    add("batch-size", "identities in a batch, P", type=positive(int))
    add("num_pos", "images per identity and modality, K", type=positive(int))
    add("test-batch", "images in an evaluation batch", type=positive(int), default=64)
    add("pad", "black pixels around an image before the crop", type=non_negative(int))
    add("flip", "probability of a horizontal flip", type=_probability)
    add("grey", "probability that a visible image is made grey", type=_probability)
    add("tone", "strength of a random change of tone, 0 is none", type=non_negative(float))
    add("erase", "probability that a rectangle is erased", type=_probability)


def _protocol_flags(parser: argparse.ArgumentParser) -> None:
    add = Flags(parser, "protocol")
    add("mode", "SYSU-MM01 gallery cameras", choices=("all", "indoor"), default="all")
    add("gallery", "SYSU-MM01 gallery draw", choices=("seeded", "official"), default="seeded")
    add("shots", "SYSU-MM01 gallery images per identity and camera", type=int, choices=(1, 10))
    add("trials", "SYSU-MM01, LLCM: gallery draws; RegDB: splits 1..N", type=positive(int))
    add("direction", "RegDB, LLCM: query to gallery", choices=("v2i", "i2v"))
    add("tvsearch", "the same as --direction i2v", action="store_true")
    add(
        "re_rank",
        "re-ranking of the result, named in every printed row",
        choices=("no", "k_reciprocal", "random_walk"),
        default="no",
    )
    add(
        "test-feat",
        "retrieval feature: pcb is the method's own; memory and both run the memory",
        choices=("pcb", "neck", "pool", "memory", "both"),
    )


def _model_flags(parser: argparse.ArgumentParser) -> None:
    add = Flags(parser, "model")
    add("arch", "backbone", choices=("resnet18", "resnet34", "resnet50", "resnet101"))
    add("method", "base is HCT, agw is AGW", choices=("base", "agw"), default="base")
    add("pcb", "stripes; on for base, off for agw", choices=("on", "off"))
    add("share_net", "first shared stage, 0 shares all", type=int, choices=range(6), default=2)
    add("num_strips", "horizontal stripes, S", type=positive(int), default=6)
    add("local_feat_dim", "channels of a stripe's feature", type=positive(int), default=256)
    add("gem-p", "exponent of the generalised-mean pooling", type=positive(float))
    add("weights", "imagenet, none, or a file: backbone or any checkpoint")
    add(
        "memory-variant",
        "MG-MRA: as in the paper's figure, or as in the later upload",
        choices=("paper", "released"),
        default="paper",
    )
    add(
        "shrink",
        "memory threshold lambda; auto: --shrink-scale / m on a bank of m prototypes",
        type=_shrink,
        default=0.0025,
    )
    add("shrink-scale", "of --shrink auto (default: 1)", type=positive(float))
    add(
        "memory-levels",
        "which read is added to the map (default: the method's coarsest); none: the memory branch "
        "without a memory",
        choices=("none", "part", "instance", "semantic"),
    )
    add("instances-per-id", "instance prototypes per identity, T", type=positive(int), default=5)
    add("parts-per-instance", "part prototypes per instance, R", type=positive(int), default=6)


def _loss_flags(parser: argparse.ArgumentParser) -> None:
    add = Flags(parser, "losses")
    add("margin", "margin of the triplets", type=non_negative(float))
    add("label_smooth", "label smoothing of 0.1", choices=("on", "off"))
    for term, text in {
        "id": "identity",
        "triplet": "hetero-centre triplet of the concatenated feature (AGW: its triplet)",
        "center": "hetero-centre triplets of the stripes",
        "memory_id": "memory identity",
        "memory_triplet": "memory hetero-centre triplet",
        "alignment": "part alignment",
        "decorrelation": "part decorrelation",
    }.items():
        add(f"w_{term}", f"weight: {text}", type=non_negative(float))


def _optimiser_flags(parser: argparse.ArgumentParser) -> None:
    add = Flags(parser, "optimisation")
    add("preset", "values for flags not given (default: the data set's)", choices=tuple(PRESETS))
    add("lr", "base learning rate", type=positive(float))
    add("optim", "optimiser", choices=("sgd", "adam"))
    add("backbone-lr-scale", "share of the rate for all but the head", type=positive(float))
    add("weight-decay", "weight decay", type=non_negative(float))
    add("momentum", "momentum of SGD", type=_probability)
    add("epochs", "epochs", type=positive(int))
    add("schedule", "rate after the warm-up", choices=("step", "cosine"))
    add("warmup-epochs", "epochs of linear warm-up", type=non_negative(int))
    add("milestones", "epochs from which the rate is a tenth", type=int, nargs="*")
    add("triplet-ramp", "epochs between which triplet terms come in", type=int, nargs=2)
    add("amp", "bf16 autocast in the network", action="store_true")
    add("seed", "seed of everything random", type=non_negative(int), default=0)
    add("gpu", "CUDA index, or cpu; under torchrun each process takes its own", default="0")
    add("sync-bn", "torchrun: batch statistics over all processes", action="store_true")
    add("deterministic", "the same bits in each run on CUDA too; slower", action="store_true")


def _run_flags(parser: argparse.ArgumentParser) -> None:
    add = Flags(parser, "run")
    add("output-dir", "everything a run writes (default: runs/METHOD_DATASET...)", type=Path)
    add("model_path", "checkpoints (default: the output folder)", type=Path)
    add("log_path", "log files (default: the output folder)", type=Path)
    add("vis_log_path", "TensorBoard (default: OUTPUT/tensorboard)", type=Path)
    add("overwrite", "start afresh in a folder that holds a run", action="store_true")
    add("save_epoch", "keep a checkpoint every so many epochs", type=non_negative(int), default=0)
    add(
        "save-every-steps",
        "save last.pt every so many steps, beside after each epoch",
        type=non_negative(int),
        default=0,
    )
    add("resume", "continue from this checkpoint; alone: from the output folder", "-r", nargs="?")
    add("test-only", "evaluate --resume, train nothing", action="store_true")
    add("eval-start", "epochs before the first evaluation", type=non_negative(int))
    add("eval-every", "epochs between evaluations", type=positive(int))
    add(
        "select-on",
        "what picks best.pt: test, or identities held out of training",
        choices=("test", "val"),
        default="test",
    )
    add("quiet", "no progress bars", action="store_true")


def train_parser(description: str) -> argparse.ArgumentParser:
    """Parser of the three training scripts."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for flags in (
        _data_flags,
        _protocol_flags,
        _model_flags,
        _loss_flags,
        _optimiser_flags,
        _run_flags,
    ):
        flags(parser)
    parser.set_defaults(resume="")
    return parser


def test_parser(description: str) -> argparse.ArgumentParser:
    """Parser of ``test.py``."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    evaluation_flags(parser)
    add = Flags(parser, "output")
    add("output-dir", "where results.json goes (default: beside the checkpoint)", type=Path)
    add("figures", "draw ranked lists, CMC, distances and an embedding", action="store_true")
    add("save-features", "write all features, identities and paths to this .npz", type=Path)
    add = Flags(parser, "one's own images, in place of a data set")
    for role in ("query", "gallery"):
        add(f"{role}-dir", f"folder of {role} images, searched below it too", type=Path)
        add(
            f"{role}-modality",
            f"of the {role} images (default: as --direction has it)",
            choices=("visible", "infrared"),
        )
    return parser


def evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that ``test.py`` and the figures of a checkpoint share."""
    add = Flags(parser, "what to evaluate")
    add("resume", "checkpoint; with {trial} in it, RegDB's checkpoints of trials 1..N", "-r")
    add("dataset", "which data set's layout and protocol", choices=DATASETS, default="regdb")
    add("data-path", "data folder (default: data/RegDB, data/SYSU-MM01, data/LLCM)", type=Path)
    add("trial", "RegDB split, 1..10", type=int, default=1)
    add("subset", "test identities, or those held out", choices=("test", "val"), default="test")
    _protocol_flags(parser)
    add = Flags(parser, "how")
    add("img_h", "image height in pixels (default: as trained)", type=positive(int))
    add("img_w", "image width in pixels (default: as trained)", type=positive(int))
    add("gem-p", "pooling exponent (default: as trained; releases: 3)", type=positive(float))
    add(
        "memory-variant",
        "MG-MRA variant (default: as trained; releases: released)",
        choices=("paper", "released"),
    )
    add("test-batch", "images in a batch", type=positive(int), default=64)
    add("workers", "threads that decode images", type=positive(int), default=4)
    add("amp", "bf16 autocast", action="store_true")
    add("gpu", "CUDA index, or cpu", default="0")
    add("quiet", "no progress bars", action="store_true")


def resolve(args: argparse.Namespace) -> dict[str, str]:
    """Fills the flags that were not given, in place.

    Args:
        args: From `train_parser`.

    Returns:
        For each flag with a preset, where its value came from: "flag", a preset's name, "default".

    Raises:
        ValueError: When flags contradict each other.
    """
    preset = args.preset or args.dataset
    sources = {}
    for name, default in DEFAULTS.items():
        if getattr(args, name) is not None:
            sources[name] = "flag"
            continue
        in_preset = name in PRESETS[preset]
        setattr(args, name, PRESETS[preset][name] if in_preset else default)
        sources[name] = f"preset {preset}" if in_preset else "default"
    args.preset = preset
    if args.pcb is None:
        args.pcb = "off" if args.method == "agw" else "on"
    if (args.method == "agw") == (args.pcb == "on"):
        raise ValueError(
            f"--method {args.method} with --pcb {args.pcb} is not a method of this project: "
            f"HCT is --method base --pcb on, AGW is --method agw --pcb off"
        )
    if args.method == "agw":
        for name, value in {"label_smooth": "off", "gem_p": 3.0}.items():
            if sources[name] != "flag":  # AGW's own settings, whatever the data set
                setattr(args, name, value)
                sources[name] = "AGW"
    if args.shrink_scale is not None and args.shrink != "auto":
        raise ValueError(f"--shrink-scale is of --shrink auto, and --shrink is {args.shrink}")
    args.shrink_scale = args.shrink_scale or 1.0
    args.milestones = tuple(args.milestones)
    args.triplet_ramp = tuple(args.triplet_ramp)
    if not 0 <= args.triplet_ramp[0] <= args.triplet_ramp[1]:
        raise ValueError(f"--triplet-ramp takes two epochs, START <= END; got {args.triplet_ramp}")
    resolve_protocol(args)
    return sources


def resolve_protocol(args: argparse.Namespace) -> None:
    """Fills data folder, direction, shots and trials, in place.

    Raises:
        ValueError: When --tvsearch and --direction v2i are both given.
    """
    if args.tvsearch and args.direction == "v2i":
        raise ValueError("--tvsearch asks for infrared to visible, --direction v2i for the reverse")
    args.direction = "i2v" if args.tvsearch else args.direction or "v2i"
    if args.data_path is None:
        args.data_path = Path("data") / DATA_FOLDERS[args.dataset]
    args.shots = args.shots or 1
    args.trials = args.trials or 10


def protocol(args: argparse.Namespace, **given: Any) -> dict[str, Any]:
    """The flags that name data and protocol, as `data_manager.eval_set` takes them.

    Args:
        args: Resolved flags.
        **given: What is added to them, or takes the place of one.
    """
    return {**{name: getattr(args, name) for name in PROTOCOL}, **given}


def changes(saved: Mapping[str, Any], present: Mapping[str, Any], *, within_epoch: bool) -> str:
    """The options that a run was started with and is to go on without: "lr 0.1 -> 0.05; ...".

    Args:
        saved: Options in the checkpoint, as `to_json` gives them.
        present: Options now, likewise.
        within_epoch: Whether the checkpoint lies inside an epoch.

    Raises:
        ValueError: When one of them cannot change.
    """
    fixed = FIXED_ON_RESUME + (FIXED_WITHIN_EPOCH if within_epoch else ())
    changed = {
        name: f"{name} {saved[name]} -> {value}"
        for name, value in present.items()
        if name in saved and name not in FREE_ON_RESUME and saved[name] != value
    }
    refused = [text for name, text in changed.items() if name in fixed]
    if refused:
        place = " inside an epoch" if within_epoch else ""
        raise ValueError(
            f"a run cannot go on{place} with a changed {'; '.join(refused)}: give the former "
            f"value, or start a new run from these weights with --weights and another --output-dir"
        )
    return "; ".join(changed.values())


def describe(args: argparse.Namespace, sources: dict[str, str]) -> str:
    """The resolved options, one a line, with where each came from."""
    values = vars(args)
    width = max(map(len, values))
    lines = [
        f"  {name:<{width}}  {value}{f'  ({sources[name]})' if name in sources else ''}"
        for name, value in sorted(values.items())
    ]
    source = PRESET_SOURCES.get(args.preset, "names no source")
    return "\n".join([*lines, f"  preset {args.preset}: {source}"])


def to_json(args: argparse.Namespace) -> dict[str, Any]:
    """The options as plain values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

    return {name: plain(value) for name, value in vars(args).items()}
