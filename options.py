"""Every command-line flag, once; its default; the presets and where they come from.

A flag that is not given takes its value from the preset (``--preset``, by default the data set's),
and where the preset is silent from `DEFAULTS`. Each can be spelled with ``-`` or with ``_``.
Over 400 lines, because every flag of a training is a row of one table.
"""

import argparse
import difflib
import json
import logging
import math
import pkgutil
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from data_manager import DATASETS, TTA, EvalOptions
from eval_metrics import RE_RANKINGS
from networks import settings
from utils import parse_json

log = logging.getLogger(__name__)

# --- Kinds of values ------------------------------------------------------------------------------

Kind = Callable[[str], Any]  # a type for argparse


def _checked(kind: Kind, expected: str, legal: Callable[[Any], bool]) -> Kind:
    """Returns `kind`, but its errors say what was `expected` and legal."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not legal(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    parse.__name__ = kind.__name__  # in argparse's "invalid int value", where `kind` refuses
    return parse


COUNT, FACTOR = (_checked(k, "a number above 0", lambda n: 0 < n < math.inf) for k in (int, float))
COUNT_OR_0, WEIGHT = (_checked(k, "0 or more", lambda n: 0 <= n < math.inf) for k in (int, float))
NPZ = _checked(Path, "a name that ends with .npz", lambda path: path.suffix == ".npz")
PROBABILITY = _checked(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
AMP_VALUES = {"auto": True, "bf16": "bf16", "fp16": "fp16"}
AMP = _checked(AMP_VALUES.get, "no value, auto, bf16 or fp16", bool)
TV_SEARCH = _checked({"True": "i2v", "False": "v2i"}.get, "no value, True or False", bool)
METHOD = _checked({"base": "base", "agw": "agw", "awg": "agw"}.get, "base or agw", bool)


def _shrink(text: str) -> float | str:
    return text if text == "auto" else PROBABILITY(text)


def _class(text: str) -> Any:
    try:
        return pkgutil.resolve_name(text)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected MODULE.CLASS, got {text} ({error})") from error


# --- The presets ----------------------------------------------------------------------------------

PRESETS: dict[str, Mapping[str, Any]] = {
    **{name: data.preset for name, data in DATASETS.items()},
    # No pretrained weights at hand: small network, small images, equal rates, triplets let in late.
    "scratch": {
        **{"weights": "none", "arch": "resnet18", "img_h": 96, "img_w": 48, "pad": 4},
        **{"gem_p": 3.0, "w_center": 1.0, "label_smooth": "on", "triplet_ramp": (4, 9)},
        **{"lr": 0.05, "backbone_lr_scale": 1.0, "schedule": "cosine", "warmup_epochs": 3},
        **{"epochs": 14, "eval_start": 6, "eval_every": 7, "grey": 0.5, "tone": 0.3},
    },
    # What recent methods add to their baselines; measured by nobody with the methods here.
    "strong": {"img_h": 384, "img_w": 144, "erase": 0.5, "channel_aug": 0.8, "tta": "flip"},
}
ON_TOP = ("strong",)  # change a few values of the data set's preset instead of replacing it
PRESET_SOURCES = {
    **{name: data.preset_source for name, data in DATASETS.items()},
    "scratch": "this project, on stand-in data",
    "strong": "the data set's; 384 x 144: DEEN, IDKL, RLE; erasing and channel augmentation: CAJ; "
    "flip averaging: CAJ, DEEN, CSDN, RLE",
}
# AGW's own settings on every data set: what defines the method, and schedule and batch.
AGW = {"pcb": "off", "label_smooth": "off", "gem_p": 3.0}
AGW_TRAINING = {"epochs": 81, "batch_size": 8, "num_pos": 4, "share_net": 1}

# --- The flags ------------------------------------------------------------------------------------


class Flag:
    """A command-line flag; `kind` is a type for argparse, or the legal values.

    A default of None means that `text` says what happens without it; False makes it a switch.
    """

    def __init__(
        self, name: str, default: Any, text: str, kind: Any = str, *short: str, **more: Any
    ) -> None:
        self.name, self.default, self.text = name.replace("-", "_"), default, text
        spellings = (f"--{name}", f"--{name.replace('_', '-')}", f"--{self.name}", *short)
        self.spellings = tuple(dict.fromkeys(spellings))
        if default is False and kind is str:
            self.argparse = {"action": "store_true"}
        elif callable(kind):
            self.argparse = {"type": kind, **more}
        else:
            self.argparse = {"type": type(kind[0]), "choices": kind}


RESUME_LAST = ""  # --resume without a value
ON_OFF = ("on", "off")
FEATS = ("pcb", "neck", "pool", "memory", "both")  # the last two run the memory
# The longer texts of the table below.
FOLDERS = ", ".join(str(data.default_folder) for data in DATASETS.values())
TV = "same as --direction i2v (default: v2i)"
BANK_INIT = "first prototypes: random, or each a feature of its identity's training images"
READ = "granularity whose read is added; none: a control without memory (default: the coarsest)"
PRESET = "values of flags not given (default: the data set's); named, wins over AGW's epochs, batch"
MILESTONES = "--schedule step: epochs, counted from 0, at which the rate is divided by 10"
RESUME = "checkpoint, or folder of last.pt, to resume; without a value: the run's own, if any"
RESIDENT = "training images on the GPU: only where small against its memory (auto), on or off"
SELECT = "identities that choose best.pt, the epoch of the best Rank-1; val: held out from training"
AUTOCAST = "run the network in bf16 or fp16; without a value, or auto: bf16 if the GPU has it"

# By the headings of --help. The defaults are the releases' settings.
TRAIN = {
    "data and protocol": (
        Flag("dataset", "regdb", "data set: folder layout and protocol", tuple(DATASETS)),
        Flag("data-path", None, f"data folder (default: {FOLDERS})", Path),
        Flag("trial", 1, "RegDB: split, 1 to 10", int),
        Flag("protocol", "paper", "LLCM v2i: see docs/protocols.md", ("paper", "repository")),
        Flag("mode", "all", "SYSU-MM01: gallery from all or indoor cameras", ("all", "indoor")),
        Flag("gallery", "seeded", "SYSU-MM01: seeded or published draws", ("seeded", "official")),
        Flag("shots", 1, "SYSU-MM01: gallery images per identity and camera", (1, 10)),
        Flag("trials", 10, "SYSU-MM01, LLCM: gallery draws; RegDB: splits 1 to N", COUNT),
        Flag("direction", "v2i", "RegDB, LLCM: visible to infrared or reverse", ("v2i", "i2v")),
        Flag("tvsearch", None, TV, TV_SEARCH, dest="direction", nargs="?", const="True"),
        Flag("re_rank", "no", "re-ranking of the results, named in every row", RE_RANKINGS),
        Flag("tta", "no", "flip: features of image and mirror image are summed", tuple(TTA)),
        Flag("test-feat", None, "retrieval feature (default: pcb; without stripes: neck)", FEATS),
    ),
    "model": (
        Flag("method", "base", "HCT (base) or AGW (agw; AGW's scripts also say awg)", METHOD),
        Flag("arch", "resnet50", "backbone: resnet18, resnet34, resnet50 or resnet101"),
        Flag("weights", "imagenet", "starting weights: imagenet, none (random), or a file"),
        Flag("share_net", 2, "first shared backbone stage: 0 shares all, 5 none", range(6)),
        Flag("pcb", "on", "HCT: stripes; off: its baseline, one feature of the map", ON_OFF),
        Flag("num_strips", 6, "horizontal stripes per image, S", COUNT),
        Flag("local_feat_dim", 256, "channels of a stripe's feature", COUNT),
        Flag("gem-p", 3.0, "exponent p of the generalised-mean (GeM) pooling", FACTOR),
    ),
    "memory": (
        Flag("memory-variant", "paper", "MG-MRA: paper, or first, later upload", settings.VARIANTS),
        Flag("shrink", settings.SHRINK, "memory threshold lambda, 0 to 1, or auto", _shrink),
        Flag("shrink-scale", 1.0, "c of --shrink auto: lambda is c / (size of the bank)", FACTOR),
        Flag("addressing", "dot", "of prototypes: dot, or cosine / T", ("dot", "cosine")),
        Flag("temperature", settings.TEMPERATURE, "T of --addressing cosine", FACTOR),
        Flag("bank-init", "uniform", BANK_INIT, ("uniform", "features")),
        Flag("bank-init-epoch", 4, "epochs before --bank-init features", COUNT_OR_0),
        Flag("memory-levels", None, READ, ("none", *settings.LEVELS)),
        Flag("instances-per-id", settings.INSTANCES_PER_ID, "instances per identity, T", COUNT),
        Flag("parts-per-instance", settings.PARTS_PER_INSTANCE, "parts per instance, R", COUNT),
        Flag("memory-ids", None, "identities it is built for (default: all; releases: 206)", COUNT),
    ),
    "losses": (
        Flag("margin", settings.MARGIN, "margin of the triplet losses (feature distance)", WEIGHT),
        Flag("label_smooth", "off", f"label smoothing, {settings.LABEL_SMOOTHING}", ON_OFF),
        Flag("w_id", 1.0, "weight of the identity loss", WEIGHT),
        Flag("w_triplet", 1.0, "weight of the concatenated feature's triplet loss", WEIGHT),
        Flag("w_center", 1.0, "weight of the stripes' hetero-centre triplet losses", WEIGHT),
        Flag("w_memory_id", 0.1, "weight of the memory feature's identity loss", WEIGHT),
        Flag("w_memory_triplet", 1.0, "weight of the memory feature's triplet loss", WEIGHT),
        Flag("w_alignment", 0.1, "weight of the part alignment loss", WEIGHT),
        # Released: computed, left out of the sum; its note suggests 0.01.
        Flag("w_decorrelation", 0.0, "weight of the part decorrelation loss", WEIGHT),
    ),
    "optimisation": (
        Flag("preset", None, PRESET, tuple(PRESETS)),
        Flag("lr", 0.1, "base learning rate", FACTOR),
        Flag("optim", "sgd", "optimiser", ("sgd", "adam")),
        Flag("backbone-lr-scale", 0.1, "rate of all but the head, as a fraction of --lr", FACTOR),
        Flag("weight-decay", 5e-4, "weight decay (L2) of every parameter", WEIGHT),
        Flag("momentum", 0.9, "Nesterov momentum of SGD, 0 to 1", PROBABILITY),
        Flag("epochs", 61, "epochs in all, those before a resume included", COUNT),
        Flag("schedule", "step", "learning rate after the warm-up", ("step", "cosine")),
        Flag("warmup-epochs", 10, "epochs in which the rate rises linearly to --lr", COUNT_OR_0),
        Flag("milestones", (20, 50), MILESTONES, int, nargs="*"),
        Flag("triplet-ramp", (0, 0), "START END: epochs of the triplet losses' rise", int, nargs=2),
        Flag("batch-size", 8, "identities per batch, P", COUNT),
        Flag("num_pos", 4, "images per identity and modality in a batch, K", COUNT),
        Flag("img_h", 288, "image height in pixels", COUNT),
        Flag("img_w", 144, "image width in pixels", COUNT),
        Flag("pad", 10, "black pixels on each side before the random crop", COUNT_OR_0),
        Flag("flip", 0.5, "probability of a horizontal flip", PROBABILITY),
        Flag("grey", 0.0, "probability that a visible image is made grey", PROBABILITY),
        Flag("tone", 0.0, "random gamma and gain from exp(-TONE) to exp(TONE)", WEIGHT),
        Flag("erase", 0.0, "probability that a rectangle is erased", PROBABILITY),
        # Above 0, --erase fills with a random value in each channel, not with the mean.
        Flag("channel-aug", 0.0, "probability of one channel, or grey (CAJ)", PROBABILITY),
        Flag("seed", 0, "seed of all random numbers", COUNT_OR_0),
        Flag("sync-bn", False, "torchrun: batch-norm statistics over all processes (CUDA only)"),
        Flag("compile", False, "compile the backbone for a GPU: minutes at the start, then faster"),
        Flag("deterministic", False, "bitwise reproducible results on CUDA too; slower"),
        Flag("eval-start", 10, "first epoch that is evaluated, counted from 0", COUNT_OR_0),
        Flag("eval-every", 2, "epochs between evaluations; the last always has one", COUNT),
        Flag("select-on", "test", SELECT, ("test", "val")),
    ),
    "precision": (
        Flag("amp", False, AUTOCAST, AMP, nargs="?", const=True),
        Flag("float32-precision", "high", "CUDA: high uses TF32", ("highest", "high")),
    ),
    "run": (
        Flag("options", None, "options.json of a run to use; flags win (default: none)", Path),
        Flag("output-dir", None, "folder of a run's files (default: runs/NAME)", Path),
        Flag("model_path", None, "folder of RUN_last.pt, ... (default: the output folder)", Path),
        Flag("log_path", None, "folder of RUN.log (default: train.log in the output folder)", Path),
        Flag("vis_log_path", None, "folder of RUN's events (default: OUTPUT/tensorboard)", Path),
        Flag("overwrite", False, "start anew in a folder that holds a run; deletes its files"),
        Flag("resume", None, RESUME, str, "-r", nargs="?", const=RESUME_LAST),
        Flag("test-only", False, "train nothing, evaluate the checkpoint of --resume"),
        Flag("resident", "auto", RESIDENT, ("auto", *ON_OFF)),
        Flag("no-cache", False, "SYSU-MM01: train from the jpgs, not from caches"),
        Flag("save_epoch", 0, "epochs between numbered checkpoints; 0: none", COUNT_OR_0),
        Flag("save-last-every", 1, "epochs between saves of last.pt; the end has one", COUNT),
    ),
    "machine": (
        Flag("gpu", None, "CUDA index, or cpu; torchrun: one per process (default: 0, if any)"),
        Flag("test-batch", 64, "images per evaluation batch", COUNT),
        Flag("workers", 4, "threads that decode images; 0 counts as 1", COUNT_OR_0),
        Flag("quiet", False, "no progress bars"),
    ),
}
DEFAULTS = {f.name: f.default for group in TRAIN.values() for f in group if f.default is not None}

AS_TRAINED = "as trained"
CHECKPOINT = "checkpoint, or a folder with last.pt; {trial} in it stands for RegDB's trials 1 to N"
MEMORY = "MODULE.CLASS of a memory of your own, for --test-feat memory and both"
FEATURES = ".npz with image paths and features (see the README); {trial} in it as in --resume"
TOP = "gallery images per query in ranks.csv, by cosine similarity or re-ranked (default: 20)"
# Of ``test.py`` and of the figures of a checkpoint.
EVALUATION = {
    "checkpoint": (
        Flag("resume", None, CHECKPOINT, str, "-r"),
        Flag("model_path", Path("save_model"), "folder to look for --resume in, too", Path),
        Flag("img_h", AS_TRAINED, "image height in pixels", COUNT),
        Flag("img_w", AS_TRAINED, "image width in pixels", COUNT),
        Flag("gem-p", AS_TRAINED, "GeM exponent; earlier releases' files: 3", FACTOR),
        Flag("memory-variant", AS_TRAINED, "of MG-MRA; earlier files: released", settings.VARIANTS),
        Flag("memory", None, MEMORY, _class),
    ),
    "data and protocol": (
        Flag("dataset", AS_TRAINED, "data set: folder layout and protocol", tuple(DATASETS)),
        Flag("data-path", None, f"data folder (default: as trained, or {FOLDERS})", Path),
        Flag("trial", AS_TRAINED, "RegDB: split, 1 to 10", int),
        *TRAIN["data and protocol"][3:],
    ),
    "identities": (
        Flag("subset", "test", "test identities, or --select-on val's", ("test", "val")),
        Flag("seen-ids", False, "admit identities that were trained on; every result says so"),
    ),
    "precision": TRAIN["precision"],
    "machine": TRAIN["machine"],
}
MODALITY = ("visible", "infrared")
NO_TITLE = Flag("no-title", False, "figures without title and note, for a paper's caption")
TEST = {
    "output": (
        Flag("output-dir", None, "folder of results.json (default: beside the checkpoint)", Path),
        Flag("figures", False, "draw ranked lists, CMC, distances and an embedding"),
        NO_TITLE,
        Flag("save-features", None, "write features, identities and paths to this .npz", NPZ),
    ),
    "features of any method, in place of a checkpoint": (Flag("features", None, FEATURES),),
    "your own images, in place of a data set": (
        Flag("query-dir", None, "folder of query images; subfolders are searched too", Path),
        Flag("query-modality", None, "theirs (default: as --direction says)", MODALITY),
        Flag("gallery-dir", None, "folder of gallery images, likewise", Path),
        Flag("gallery-modality", None, "theirs (default: as --direction says)", MODALITY),
        Flag("top", None, TOP, COUNT),
    ),
}

# Flags that name data and protocol, as `data_manager.eval_set` takes them.
PROTOCOL = ("dataset", "data_path", *(f.name for f in fields(EvalOptions) if f.name != "subset"))
# Flags without influence on a number.
INCIDENTAL = (*(flag.name for flag in (*TRAIN["run"], *TRAIN["machine"])), "figures")
# Options that do not end a run's name: in its front, without influence, or free to grow (epochs).
UNNAMED = ("dataset", "trial", "method", "pcb", "preset", "data_path", "deterministic", "epochs")
LONGEST = 60  # characters of what distinguishes a run; longer ones end with a hash
AS_TRAINED_FLAGS = tuple(f.name for f in EVALUATION["checkpoint"] if f.default == AS_TRAINED)
# The ancestors' test scripts take these too; here the checkpoint knows them.
CHECKPOINT_KNOWS = (
    *("lr", "optim", "arch", "test_only", "save_epoch", "log_path", "vis_log_path", "batch_size"),
    *("method", "margin", "num_pos", "seed", "share_net", "pcb", "w_center", "local_feat_dim"),
    *("num_strips", "label_smooth"),
)

# --- Parsers --------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors, as those found later are (see `utils.user_errors`)."""

    def __init__(self, description: str = "", **more: Any) -> None:
        more |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(description=description, **more)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Returns the flags; a space in the name of one has its own error."""
        words = sys.argv[1:] if args is None else list(args)
        if "--" in words[:-1]:  # as in HCT's README
            name = words[words.index("--") + 1]
            self.error(f"'-- {name}' has a space: write --{name}")
        found, rest = self.parse_known_args(words, namespace)
        if rest:
            self.unknown(rest)
        return found

    def unknown(self, words: Sequence[str]) -> NoReturn:
        """Raises ValueError for words that are no flags; names the flag that the first is like."""
        flags = list(self._option_string_actions)
        for action in self._actions:  # those of all commands
            for command in action.choices.values() if action.nargs == argparse.PARSER else ():
                flags += command._option_string_actions
        near = difflib.get_close_matches(words[0].partition("=")[0], flags, n=1, cutoff=0.75)
        hint = f" (did you mean {near[0]}?)" if near else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{hint}")

    def error(self, message: str) -> NoReturn:
        """Raises ValueError: "argument --lr: expected a number above 0, got -1; ..."."""
        raise ValueError(f"{message}; {self.prog} --help lists all flags")


def add_flags(
    parser: argparse.ArgumentParser, groups: Mapping[str, Sequence[Flag]], *, presets: bool = False
) -> None:
    """Adds flags by the headings of --help; those in `DEFAULTS` are None until they are resolved.

    The help of each ends with its default, and with the values that `presets` and AGW give it.
    """
    layers = {**PRESETS, "agw": {**AGW, **AGW_TRAINING}} if presets else {}
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            text, name, more = flag.text, flag.name, flag.argparse
            if "action" not in more and flag.default is not None:
                values = {"default": flag.default}
                values |= {k: layer[name] for k, layer in layers.items() if name in layer}
                text += f" ({'; '.join(f'{k}: {_words(value)}' for k, value in values.items())})"
                more = {"default": None if name in DEFAULTS else flag.default, **more}
            group.add_argument(*flag.spellings, help=text.replace("%", "%%"), **more)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def train_parser(description: str) -> Parser:
    """Returns the parser of the three training scripts."""
    parser = Parser(description)
    add_flags(parser, TRAIN, presets=True)
    return parser


def test_parser(description: str) -> Parser:
    """Returns the parser of ``test.py``."""
    parser = Parser(description)
    hidden = [Flag(k, None, argparse.SUPPRESS, nargs="?", const=True) for k in CHECKPOINT_KNOWS]
    add_flags(parser, {**EVALUATION, argparse.SUPPRESS: hidden, **TEST})
    parser.set_defaults(ignored=CHECKPOINT_KNOWS)
    return parser


# --- Resolving ------------------------------------------------------------------------------------


def resolve(args: Namespace, script: str = "train_MGMRA.py") -> tuple[Namespace, dict[str, str]]:
    """Fills in the flags of a training that were not given.

    Returns the resolved flags, and where each value came from: "flag", "default", a preset, ...

    Raises:
        ValueError: When flags contradict each other, or have no effect.
    """
    flags = _given(vars(args))
    saved = read_options(args.options) if args.options else {}
    given = {**saved, **flags}
    data, named = given.get("dataset", DEFAULTS["dataset"]), given.get("preset")
    agw, pcb, levels = given.get("method") == "agw", given.get("pcb"), given.get("memory_levels")
    if agw and pcb == "on":
        raise ValueError("--method agw has no stripes: leave out --pcb on, or train --method base")
    values, sources = {**vars(args), "preset": named or data}, {}
    for source, layer, holds in (  # each wins over those above
        ("default", DEFAULTS, True),
        (f"preset {data}", PRESETS[data], named in (None, *ON_TOP)),
        ("AGW", AGW_TRAINING, agw),
        (f"preset {named}", PRESETS.get(named), named is not None),
        ("AGW", AGW, agw),
        ("no stripes", {"w_center": 0.0}, agw or pcb == "off"),
        ("no memory", {"w_alignment": 0.0, "w_decorrelation": 0.0}, levels == "none"),
        ("--options", saved, True),
        ("flag", flags, True),
    ):
        if holds:
            values |= layer
            sources |= dict.fromkeys(layer, source)
    for name, reason in unused(script, given).items():
        usual = name in PROTOCOL and flags.get(name) == DEFAULTS.get(name)
        absent = name.startswith("w_") and flags.get(name) == 0  # what a term without use has
        if name in flags and not (usual or absent):
            raise ValueError(f"--{name} has no effect, since {reason}: leave it out")
    start, end = values["triplet_ramp"]
    if not 0 <= start <= end:
        raise ValueError(f"--triplet-ramp takes two epochs, START <= END; got {start} {end}")
    if values["bank_init"] == "features" and values["memory_ids"] is not None:
        raise ValueError("--bank-init features has a bank size of its own: leave out --memory-ids")
    values["data_path"] = values["data_path"] or DATASETS[values["dataset"]].default_folder
    return Namespace(**values), sources


OF_STRIPES = ("w_center", "local_feat_dim")
OF_LEVELS = ("memory_variant", "w_alignment", "w_decorrelation")
OF_MEMORY = (*OF_LEVELS, *(f.name for f in TRAIN["memory"] if f.name != "memory_levels"))
OF_BRANCH = ("memory_levels", "w_memory_id", "w_memory_triplet")
OF_FOLDERS = ("query_modality", "gallery_modality", "top")


def unused(script: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Returns the flags that have no effect on a script with those `given`, and why."""
    values = {**DEFAULTS, **given}
    if values.get("query_dir") or values.get("gallery_dir"):
        names = [k for k in (*PROTOCOL, "figures", "seen_ids") if k not in ("direction", "tta")]
        return dict.fromkeys(names, "your own images have no protocol")
    data = DATASETS[values["dataset"]]
    no_choice = f"{data.title} has no such choice"
    tested = script == "test.py"
    by_pattern = tested and "{trial}" in (values.get("resume") or "")
    choices = {"dataset", "data_path", "tta"}.union(*data.protocols.values())
    choices |= {"trial"} if data.splits > 1 else set()
    choices |= {"trials"} if data.gallery_draws > 1 or by_pattern else set()
    without = [name for name in PROTOCOL if name not in choices]
    flags: dict[str, str] = {}
    for holds, names, reason in (
        (by_pattern, ["trial"], "{trial} in --resume stands for the trials 1 to --trials"),
        (True, without, no_choice),
        (tested and "trials" in without, ["trials"], no_choice + ", and --resume no {trial} in it"),
        ("query_dir" in values, OF_FOLDERS, "there is no --query-dir"),
        (values["shrink"] != "auto", ["shrink_scale"], "--shrink is not auto"),
        (values["addressing"] != "cosine", ["temperature"], "--addressing is not cosine"),
        (values["bank_init"] != "features", ["bank_init_epoch"], "--bank-init is not features"),
        (values["pcb"] == "off", OF_STRIPES, "--pcb off has no stripes"),
        (values["method"] == "agw", OF_STRIPES, "--method agw has no stripes"),
        (values.get("memory_levels") == "none", OF_MEMORY, "--memory-levels none has no memory"),
        (script == "train_SGMRA.py", OF_LEVELS, f"{script} has no multi-granularity memory"),
        (script == "train_HCT.py", OF_MEMORY + OF_BRANCH, f"{script} has no memory"),
    ):
        flags |= dict.fromkeys(names if holds else (), reason)
    return flags


def resolve_evaluation(args: Namespace, trained: Mapping[str, Any] | None = None) -> Namespace:
    """Fills in the flags of an evaluation that were not given, but for those `AS_TRAINED_FLAGS`.

    `trained` holds dataset, trial and data_path of the checkpoint's training: {} where it does not
    say them, None without a checkpoint.

    Raises:
        ValueError: When flags contradict each other, or have no effect.
    """
    asked = dict(vars(args))
    no_effect = [name for name in asked.pop("ignored", ()) if asked.pop(name) is not None]
    flags = _given(asked)
    if trained == {} and not ("dataset" in flags or "query_dir" in flags):
        raise ValueError(
            f"{args.resume} does not say its data set: pass --dataset {' or '.join(DATASETS)}"
        )
    trained = trained or {}
    same_data = flags.get("dataset", trained.get("dataset")) == trained.get("dataset")
    defaults = {k: v for k, v in DEFAULTS.items() if k in asked and k not in AS_TRAINED_FLAGS}
    values = {**asked, **defaults, **(trained if same_data else {}), **flags}
    values["data_path"] = values["data_path"] or DATASETS[values["dataset"]].default_folder
    for name, reason in unused("test.py", values).items():
        if name in flags and (flags[name] != DEFAULTS.get(name) or name == "trials"):
            raise ValueError(f"--{name} has no effect, since {reason}: leave it out")
        no_effect += [name] if name in flags else []
    if no_effect:
        log.warning("no effect, since checkpoint and data set know: --%s", ", --".join(no_effect))
    return Namespace(**values)


def distinction(args: Namespace, sources: Mapping[str, str]) -> str:
    """Returns what tells a run's name from that without other flags: "_seed3_lr0.05", or ""."""
    preset = None if args.preset == args.dataset else args.preset
    front = ("dataset", "method", "pcb", "memory_levels")
    chosen = {"preset": preset, **{name: getattr(args, name) for name in front}}
    usual = vars(resolve(Namespace(**dict.fromkeys(vars(args)) | chosen))[0])
    usual["memory_levels"] = None  # named, but the loss weights that follow from it are not
    words = [f"_{preset}"] if preset else []
    named = [k for k in vars(args) if k in sources and k not in (*UNNAMED, *INCIDENTAL)]
    for name in sorted(named, key=lambda name: name != "seed"):
        value = getattr(args, name)
        if value != usual[name]:
            words.append(f"_{name.replace('_', '-')}{'' if value is True else _words(value)}")
    text = re.sub(r"[^\w.+-]", "-", "".join(words))
    return text if len(text) <= LONGEST else f"{text[:40]}_{sha256(text.encode()).hexdigest()[:8]}"


def describe(args: Namespace, sources: Mapping[str, str]) -> str:
    """Returns the preset and the options that differ from it, one a line, with their source."""
    below = PRESETS[args.dataset] if args.preset in ON_TOP else {}
    preset = {**DEFAULTS, **below, **PRESETS[args.preset], "preset": args.preset}
    lines = []
    for name, value in sorted(vars(args).items()):
        if name in sources and name not in INCIDENTAL and value != preset.get(name):
            usual = _words(preset.get(name, "unset"))
            lines.append(f"  {name} {_words(value)}  ({sources[name]}; preset: {usual})")
    differing = "these options differ" if lines else "no option differs"
    source = PRESET_SOURCES[args.preset]
    return "\n".join([f"preset {args.preset} ({source}); {differing} (options.json: all)", *lines])


def protocol(args: Namespace, **given: Any) -> dict[str, Any]:
    """Returns the flags that `data_manager.eval_set` takes; `given` ones are added or replaced."""
    return {**{name: getattr(args, name) for name in PROTOCOL}, **given}


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """Returns options as flags: True a switch, a sequence several values, None and False none."""
    flags = []
    for name, value in _given(values).items():
        several = value if isinstance(value, tuple) else [value]
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, several))]
    return flags


def read_options(path: Path) -> dict[str, Any]:
    """Returns those options in a run's ``options.json`` that influence its numbers, checked.

    Raises:
        ValueError: When it is no such file, or holds an illegal value.
    """
    try:
        saved = parse_json(path.read_bytes(), {"options": {}})["options"]
        words = flags_of({k: v for k, v in saved.items() if k not in INCIDENTAL})
        return _given(vars(train_parser("").parse_args(words)))
    except (OSError, ValueError) as error:
        text = f"--options {path}: expected the options.json of a run ({error})"
        raise ValueError(text) from error


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags that were given, several values of one as a tuple."""
    given = {k: v for k, v in values.items() if v is not None and v is not False}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def to_json(args: Namespace) -> dict[str, Any]:
    """Returns the options as plain values: paths as texts, tuples as lists."""
    return json.loads(json.dumps(vars(args), default=str))
