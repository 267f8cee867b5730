"""Every command-line flag, once; its default; the presets and where they come from.

A flag that is not given takes its value from the preset (``--preset``, by default the data set's),
and where the preset is silent from `DEFAULTS`. What was resolved is printed and saved.
Each flag can be spelled with ``-`` or with ``_``.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_manager import DATASETS
from eval_metrics import RE_RANKINGS
from networks.settings import (
    INSTANCES_PER_ID,
    LABEL_SMOOTHING,
    LEVELS,
    MARGIN,
    PARTS_PER_INSTANCE,
    SHRINK,
    STAGES,
    VARIANTS,
)

# The default of every flag that has one; the training's are the releases' settings.
DEFAULTS: dict[str, Any] = {
    "dataset": "regdb",
    "trial": 1,
    "workers": 4,
    "img_h": 288,
    "img_w": 144,
    "batch_size": 8,
    "num_pos": 4,
    "test_batch": 64,
    "pad": 10,
    "flip": 0.5,
    "grey": 0.0,
    "tone": 0.0,
    "erase": 0.0,
    "mode": "all",
    "gallery": "seeded",
    "shots": 1,
    "trials": 10,
    "direction": "v2i",
    "re_rank": "no",
    "arch": "resnet50",
    "method": "base",
    "share_net": 2,
    "num_strips": 6,
    "local_feat_dim": 256,
    "gem_p": 3.0,
    "weights": "imagenet",
    "memory_variant": "paper",
    "shrink": SHRINK,
    "shrink_scale": 1.0,
    "instances_per_id": INSTANCES_PER_ID,
    "parts_per_instance": PARTS_PER_INSTANCE,
    "margin": MARGIN,
    "label_smooth": "off",
    "w_id": 1.0,
    "w_triplet": 1.0,
    "w_center": 1.0,
    "w_memory_id": 0.1,
    "w_memory_triplet": 1.0,
    "w_alignment": 0.1,
    "w_decorrelation": 0.0,  # released: computed, left out; its note suggests 0.01
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
    "seed": 0,
    "gpu": "0",
    "save_epoch": 0,
    "eval_start": 10,
    "eval_every": 2,
    "select_on": "test",
    "subset": "test",
}

PRESETS: dict[str, Mapping[str, Any]] = {
    **{name: data.preset for name, data in DATASETS.items()},
    # No pretrained weights at hand: small network, small images, equal rates, triplets let in late.
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
    **{name: data.preset_source for name, data in DATASETS.items()},
    "scratch": "this project, on stand-in data",
}
# Whatever the data set: AGW's own settings, which have no stripes and so no stripes' triplets.
METHOD_VALUES = {"agw": {"label_smooth": "off", "gem_p": 3.0, "w_center": 0.0}}

# Flags that name data and protocol, as `data_manager.eval_set` takes them.
PROTOCOL = ("dataset", "data_path", "trial", "direction", "mode", "gallery", "shots", "trials")
# Flags without influence on a number.
INCIDENTAL = (
    *("workers", "quiet", "gpu", "output_dir", "model_path", "log_path", "vis_log_path", "resume"),
    *("overwrite", "test_only", "save_epoch", "test_batch", "figures"),
)
# On --resume: what may differ without a remark, and what belongs to the run for good. Everything
# else may change, and is reported.
FREE_ON_RESUME = (*INCIDENTAL, "data_path", "preset", "weights", "deterministic")
FIXED_ON_RESUME = ("dataset", "trial", "select_on", "method", "optim")


# --- Kinds of values ------------------------------------------------------------------------------


def _checked(kind: type, name: str, legal: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Returns a parser of numbers, for argparse, whose errors say what was expected."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (math.isfinite(value) and legal(value)):
            raise argparse.ArgumentTypeError(f"expected {name}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def positive(kind: type) -> Callable[[str], Any]:
    """Returns a parser of numbers above 0, for argparse."""
    return _checked(kind, "a number above 0", lambda value: value > 0)


def non_negative(kind: type) -> Callable[[str], Any]:
    """Returns a parser of numbers from 0 on, for argparse."""
    return _checked(kind, "0 or more", lambda value: value >= 0)


probability = _checked(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def _shrink(text: str) -> float | str:
    return text if text == "auto" else probability(text)


# --- Flags ----------------------------------------------------------------------------------------


class Flags:
    """Adds flags to a group of a parser, in both spellings; absent ones stay None until resolved.

    The help of each ends with its default, and with the values that presets give it.
    """

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._group = parser.add_argument_group(title)

    def __call__(
        self, name: str, text: str, *short: str, default: Any = None, **settings: Any
    ) -> None:
        """Adds one flag.

        Args:
            name: With either spelling, without dashes in front.
            text: What it is; a default given in words belongs into it.
            *short: Further spellings.
            default: A default that is not in `DEFAULTS`; "as trained" only says so in the help.
            **settings: For argparse.
        """
        key = name.replace("-", "_")
        dashed = key.replace("_", "-")
        flags = dict.fromkeys([f"--{name}", f"--{dashed}", f"--{key}", *short])
        if settings.get("action") != "store_true":
            in_presets = {k: v[key] for k, v in PRESETS.items() if key in v}
            shown = DEFAULTS.get(key) if default is None else default
            values = [] if shown is None else [f"default: {_words(shown)}"]
            if default is None:
                values += [f"{preset}: {_words(value)}" for preset, value in in_presets.items()]
            text += f" ({'; '.join(values)})" if values else ""
            settings["default"] = None if default == AS_TRAINED else default
        self._group.add_argument(*flags, dest=key, help=text.replace("%", "%%"), **settings)


AS_TRAINED = "as trained"


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def data_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name the data and the protocol."""
    add = Flags(parser, "data and protocol")
    folders = ", ".join(str(data.default_folder) for data in DATASETS.values())
    add("dataset", "which data set's layout and protocol", choices=tuple(DATASETS))
    add("data-path", f"data folder (default: {folders})", type=Path)
    add("trial", "RegDB: split, 1..10", type=int)
    add("mode", "SYSU-MM01: gallery cameras", choices=("all", "indoor"))
    add("gallery", "SYSU-MM01: who draws the gallery", choices=("seeded", "official"))
    add("shots", "SYSU-MM01: gallery images per identity and camera", type=int, choices=(1, 10))
    add("trials", "SYSU-MM01, LLCM: gallery draws; RegDB: splits 1..N", type=positive(int))
    add("direction", "RegDB, LLCM: query to gallery", choices=("v2i", "i2v"))
    add("tvsearch", "the same as --direction i2v", action="store_true")
    add("re_rank", "re-ranking of the result, named in every row", choices=RE_RANKINGS)
    add(
        "test-feat",
        "retrieval feature; memory and both run the memory (default: pcb; AGW: neck)",
        choices=("pcb", "neck", "pool", "memory", "both"),
    )


def machine_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where and how fast to compute."""
    add = Flags(parser, "machine")
    add("gpu", "CUDA index, or cpu; under torchrun each process takes its own")
    add("amp", "bf16 autocast in the network", action="store_true")
    add("test-batch", "images in an evaluation batch", type=positive(int))
    add("workers", "threads that decode images", type=positive(int))
    add("quiet", "no progress bars", action="store_true")


def _model_flags(parser: argparse.ArgumentParser) -> None:
    add = Flags(parser, "model")
    add("method", "base is HCT, agw is AGW", choices=("base", "agw"))
    add("arch", "backbone: resnet18, resnet34, resnet50, resnet101")
    add("weights", "imagenet, none, or a file: backbone or any checkpoint")
    stages = range(len(STAGES) + 1)
    add("share_net", "first stage shared by both modalities; 0: all", type=int, choices=stages)
    add("pcb", "stripes (default: on; AGW: off)", choices=("on", "off"))
    add("num_strips", "horizontal stripes S", type=positive(int))
    add("local_feat_dim", "channels of a stripe's feature", type=positive(int))
    add("gem-p", "exponent p of the generalised-mean pooling", type=positive(float))
    add("memory-variant", "MG-MRA: the figure's, or the later upload's", choices=VARIANTS)
    add(
        "shrink", "memory threshold lambda; auto: --shrink-scale / m for m prototypes", type=_shrink
    )
    add("shrink-scale", "numerator of --shrink auto", type=positive(float))
    levels = ("none", *LEVELS)
    text = "which read is added to the map; none: a control, the memory branch without a memory"
    add("memory-levels", f"{text} (default: the method's coarsest)", choices=levels)
    add("instances-per-id", "instance prototypes per identity T", type=positive(int))
    add("parts-per-instance", "part prototypes per instance R", type=positive(int))


def _loss_flags(parser: argparse.ArgumentParser) -> None:
    add = Flags(parser, "losses")
    add("margin", "margin of the hetero-centre triplets", type=non_negative(float))
    text = f"label smoothing of {LABEL_SMOOTHING} in the identity terms"
    add("label_smooth", text, choices=("on", "off"))
    for name, text in {
        "w_id": "identity",
        "w_triplet": "hetero-centre triplet of the concatenated feature (AGW: its own triplet)",
        "w_center": "hetero-centre triplets of the stripes",
        "w_memory_id": "identity of the memory feature",
        "w_memory_triplet": "hetero-centre triplet of the memory feature",
        "w_alignment": "part alignment",
        "w_decorrelation": "part decorrelation",
    }.items():
        add(name, f"weight: {text}", type=non_negative(float))


def _optimisation_flags(parser: argparse.ArgumentParser) -> None:
    add = Flags(parser, "optimisation")
    text = "values of flags that are not given (default: the data set's)"
    add("preset", text, choices=tuple(PRESETS))
    add("lr", "base learning rate", type=positive(float))
    add("optim", "optimiser", choices=("sgd", "adam"))
    text = "learning rate of all but the head, as a share of the base rate"
    add("backbone-lr-scale", text, type=positive(float))
    add("weight-decay", "weight decay of every parameter", type=non_negative(float))
    add("momentum", "Nesterov momentum of SGD", type=probability)
    add("epochs", "epochs in all, an interrupted run's included", type=positive(int))
    add("schedule", "learning rate after the warm-up", choices=("step", "cosine"))
    add("warmup-epochs", "epochs of linear warm-up", type=non_negative(int))
    add(
        "milestones",
        "step: epochs (from 0) at which the rate falls to a tenth",
        type=int,
        nargs="*",
    )
    text = "epochs (from 0) START END between which the triplet terms' weights rise from 0"
    add("triplet-ramp", text, type=int, nargs=2)
    add("batch-size", "identities in a batch P", type=positive(int))
    add("num_pos", "images per identity and modality K", type=positive(int))
    add("img_h", "image height in pixels", type=positive(int))
    add("img_w", "image width in pixels", type=positive(int))
    add("pad", "pixels of black around an image before the random crop", type=non_negative(int))
    add("flip", "probability of a horizontal flip", type=probability)
    add("grey", "probability that a visible image is made grey", type=probability)
    add("tone", "random gamma and gain in exp(-TONE)..exp(TONE)", type=non_negative(float))
    add("erase", "probability that a rectangle is erased", type=probability)
    add("seed", "seed of everything random", type=non_negative(int))
    add("sync-bn", "torchrun: batch statistics over all processes", action="store_true")
    add("deterministic", "the same bits in each run on CUDA too; slower", action="store_true")


def _run_flags(parser: argparse.ArgumentParser) -> None:
    add = Flags(parser, "run")
    add(
        "output-dir",
        "folder of everything a run writes (default: runs/METHOD_DATASET...)",
        type=Path,
    )
    add("model_path", "folder of checkpoints (default: the output folder)", type=Path)
    add("log_path", "folder of train.log (default: the output folder)", type=Path)
    add("vis_log_path", "folder of TensorBoard events (default: OUTPUT/tensorboard)", type=Path)
    add("overwrite", "start afresh in a folder that holds a run", action="store_true")
    text = (
        "checkpoint to go on from; without a value: last.pt of the output folder, if there is one"
    )
    add("resume", text, "-r", nargs="?", const=RESUME_LAST)
    add("test-only", "evaluate --resume, train nothing", action="store_true")
    add("save_epoch", "epochs between numbered checkpoints, 0: none", type=non_negative(int))
    add("eval-start", "epochs before the first evaluation", type=non_negative(int))
    add("eval-every", "epochs between evaluations", type=positive(int))
    text = "what picks best.pt: the test set, or identities held out of training"
    add("select-on", text, choices=("test", "val"))


RESUME_LAST = ""  # --resume without a value


def train_parser(description: str) -> argparse.ArgumentParser:
    """Returns the parser of the three training scripts."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for add_flags in (
        data_flags,
        _model_flags,
        _loss_flags,
        _optimisation_flags,
        _run_flags,
        machine_flags,
    ):
        add_flags(parser)
    return parser


def test_parser(description: str) -> argparse.ArgumentParser:
    """Returns the parser of ``test.py``."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    evaluation_flags(parser)
    add = Flags(parser, "output")
    add("output-dir", "folder of results.json (default: beside the checkpoint)", type=Path)
    add("figures", "draw ranked lists, CMC, distances and an embedding", action="store_true")
    add("save-features", "write all features, identities and paths to this .npz", type=Path)
    add = Flags(parser, "your own images, in place of a data set")
    for role in ("query", "gallery"):
        add(f"{role}-dir", f"folder of {role} images, searched below it too", type=Path)
        add(
            f"{role}-modality",
            f"modality of the {role} images (default: as --direction has it)",
            choices=("visible", "infrared"),
        )
    return parser


def evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that ``test.py`` and the figures of a checkpoint share."""
    add = Flags(parser, "checkpoint")
    add("resume", "checkpoint; with {trial} in it, RegDB's checkpoints of trials 1..N", "-r")
    add("img_h", "image height in pixels", type=positive(int), default=AS_TRAINED)
    add("img_w", "image width in pixels", type=positive(int), default=AS_TRAINED)
    text = "GeM exponent; the earlier releases' files store none: 3 unless given"
    add("gem-p", text, type=positive(float), default=AS_TRAINED)
    text = "MG-MRA variant; the earlier releases' files store none: released unless given"
    add("memory-variant", text, choices=VARIANTS, default=AS_TRAINED)
    add("memory", "MODULE.CLASS of a memory of your own, for --test-feat memory and both")
    data_flags(parser)
    add = Flags(parser, "identities")
    add(
        "subset", "test identities, or those that --select-on val held out", choices=("test", "val")
    )
    machine_flags(parser)


# --- Resolving ------------------------------------------------------------------------------------


def resolve(args: argparse.Namespace) -> tuple[argparse.Namespace, dict[str, str]]:
    """Fills in the flags of a training that were not given.

    Args:
        args: From `train_parser`.

    Returns:
        The resolved flags, and for each flag with a default where its value came from: "flag", a
        preset's name, "default".

    Raises:
        ValueError: When flags contradict each other.
    """
    values = dict(vars(args))
    method = values["method"] or DEFAULTS["method"]
    values["preset"] = values["preset"] or values["dataset"] or DEFAULTS["dataset"]
    preset = PRESETS[values["preset"]]
    if values["shrink_scale"] is not None and values["shrink"] != "auto":
        shrink = DEFAULTS["shrink"] if values["shrink"] is None else values["shrink"]
        raise ValueError(f"--shrink-scale belongs to --shrink auto, and --shrink is {shrink}")
    sources = {}
    for name, default in DEFAULTS.items():
        if name not in values:
            continue
        if values[name] is not None:
            sources[name] = "flag"
        elif name in METHOD_VALUES.get(method, {}):
            values[name], sources[name] = METHOD_VALUES[method][name], method.upper()
        elif name in preset:
            values[name], sources[name] = preset[name], f"preset {values['preset']}"
        else:
            values[name], sources[name] = default, "default"
    values["pcb"] = values["pcb"] or ("off" if method == "agw" else "on")
    _check_method(values, sources)
    values["milestones"] = tuple(values["milestones"])
    values["triplet_ramp"] = tuple(values["triplet_ramp"])
    _resolve_protocol(values, direction_given=args.direction)
    return argparse.Namespace(**values), sources


def _check_method(values: dict[str, Any], sources: dict[str, str]) -> None:
    """Raises ValueError for flags that the method has no use for."""
    method = values["method"]
    if (method == "agw") == (values["pcb"] == "on"):
        raise ValueError(
            f"--method {method} with --pcb {values['pcb']} is not a method of this project: "
            f"HCT is --method base --pcb on, AGW is --method agw --pcb off"
        )
    if method == "agw" and values["w_center"]:
        raise ValueError("--w_center weighs the stripes' triplets, and --method agw has no stripes")
    if values["memory_levels"] == "none":  # no read to align
        for name in ("w_alignment", "w_decorrelation"):
            if sources[name] == "flag" and values[name]:
                raise ValueError(f"--{name} needs a memory, and --memory-levels none has none")
            values[name], sources[name] = 0.0, "no memory"
    start, end = values["triplet_ramp"]
    if not 0 <= start <= end:
        raise ValueError(f"--triplet-ramp takes two epochs, START <= END; got {start} {end}")


def resolve_evaluation(args: argparse.Namespace) -> argparse.Namespace:
    """Fills in the flags of an evaluation that were not given, but for those "as trained".

    Raises:
        ValueError: When flags contradict each other.
    """
    as_trained = ("img_h", "img_w", "gem_p", "memory_variant")
    values = {
        name: DEFAULTS.get(name) if value is None and name not in as_trained else value
        for name, value in vars(args).items()
    }
    _resolve_protocol(values, direction_given=args.direction)
    return argparse.Namespace(**values)


def _resolve_protocol(values: dict[str, Any], direction_given: str | None) -> None:
    """Sets direction and data folder among the values."""
    if values["tvsearch"] and direction_given == "v2i":
        raise ValueError("--tvsearch asks for infrared to visible, --direction v2i for the reverse")
    if values["tvsearch"]:
        values["direction"] = "i2v"
    if values["data_path"] is None:
        values["data_path"] = DATASETS[values["dataset"]].default_folder


def protocol(args: argparse.Namespace, **given: Any) -> dict[str, Any]:
    """Returns the flags that name data and protocol, as `data_manager.eval_set` takes them.

    Args:
        args: Resolved flags.
        **given: Added to them, or in place of one.
    """
    return {**{name: getattr(args, name) for name in PROTOCOL}, **given}


def changes(saved: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """Returns the options that changed since a run was saved: "lr 0.1 -> 0.05; ...".

    Args:
        saved: Options in the checkpoint, as `to_json` gives them.
        present: Options now, likewise.

    Raises:
        ValueError: When one of them cannot change.
    """
    changed = {
        name: f"{name} {saved[name]} -> {value}"
        for name, value in present.items()
        if name in saved and name not in FREE_ON_RESUME and saved[name] != value
    }
    refused = [text for name, text in changed.items() if name in FIXED_ON_RESUME]
    if refused:
        raise ValueError(
            f"a run cannot go on with a changed {'; '.join(refused)}: give the former value, or "
            f"start a new run from these weights with --weights and another --output-dir"
        )
    return "; ".join(changed.values())


def describe(args: argparse.Namespace, sources: dict[str, str]) -> str:
    """Returns the resolved options, one a line, with where each came from."""
    values = vars(args)
    width = max(map(len, values))
    lines = [
        f"  {name:<{width}}  {value}{f'  ({sources[name]})' if name in sources else ''}"
        for name, value in sorted(values.items())
    ]
    source = PRESET_SOURCES.get(args.preset, "names no source")
    return "\n".join([*lines, f"  preset {args.preset}: {source}"])


def to_json(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options as plain values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

    return {name: plain(value) for name, value in vars(args).items()}
