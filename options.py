"""Every command-line flag, once; its default; the presets and where they come from.

Over 400 lines, because every flag of a training is a row of one table.

A flag that is not given takes its value from the preset (``--preset``, by default the data set's),
and where the preset is silent from `DEFAULTS`. What was resolved is printed and saved.
Each flag can be spelled with ``-`` or with ``_``.
"""

import argparse
import difflib
import itertools
import json
import logging
import math
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from data_manager import DATASETS, TTA
from eval_metrics import RE_RANKINGS
from networks.settings import (
    ADDRESSINGS,
    INSTANCES_PER_ID,
    LABEL_SMOOTHING,
    LEVELS,
    MARGIN,
    PARTS_PER_INSTANCE,
    SHRINK,
    TEMPERATURE,
    VARIANTS,
)

log = logging.getLogger(__name__)

# --- Kinds of values ------------------------------------------------------------------------------


def _checked(kind: type, expected: str, legal: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Returns a parser of numbers, for argparse, whose errors say what was expected."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not legal(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where `kind` refuses the text
    return parse


def positive(kind: type) -> Callable[[str], Any]:
    """Returns a parser of numbers above 0, for argparse."""
    return _checked(kind, "a number above 0", lambda value: 0 < value < math.inf)


def non_negative(kind: type) -> Callable[[str], Any]:
    """Returns a parser of numbers from 0 on, for argparse."""
    return _checked(kind, "0 or more", lambda value: 0 <= value < math.inf)


COUNT, COUNT_OR_0 = positive(int), non_negative(int)
FACTOR, WEIGHT = positive(float), non_negative(float)
PROBABILITY = _checked(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def _shrink(text: str) -> float | str:
    return text if text == "auto" else PROBABILITY(text)


def _class(text: str) -> Any:
    try:
        return pkgutil.resolve_name(text)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected MODULE.CLASS, got {text} ({error})") from error


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected no value, True or False, got {text}")
    return text.lower() == "true"


def _amp(text: str) -> str | bool:
    if text not in ("auto", "bf16", "fp16"):
        raise argparse.ArgumentTypeError(f"expected no value, auto, bf16 or fp16, got {text}")
    return text if text != "auto" else True


def _method(text: str) -> str:
    return "agw" if text == "awg" else text  # AGW's scripts spell it so too


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
ON_TOP = ("strong",)  # change a few values of the data set's preset, in place of all
PRESET_SOURCES = {name: data.preset_source for name, data in DATASETS.items()}
PRESET_SOURCES["scratch"] = "this project, on stand-in data"
PRESET_SOURCES["strong"] = (
    "the data set's, and 384 x 144 as DEEN, IDKL, RLE; erasing at torchvision's default 0.5; CAJ's "
    "channels at this project's 0.8, all kinds and unchanged as likely; flips as CAJ, DEEN, CSDN"
)

# --- The flags of the training scripts ------------------------------------------------------------


class Flag:
    """A flag; a default of False without a parser makes it a switch.

    With None the help text says what happens.
    """

    def __init__(
        self, name: str, default: Any, text: str, kind: Any = str, *short: str, **settings: Any
    ) -> None:
        self.name, self.default, self.text, self.short = name, default, text, short
        if default is False and kind is str:
            self.settings = {"action": "store_true"}
        elif callable(kind):
            self.settings = {"type": kind, **settings}
        else:
            self.settings = {"type": type(kind[0]), "choices": kind}


RESUME_LAST = ""  # --resume without a value
ON_OFF = ("on", "off")
# The longer help texts of the table below.
FOLDERS = ", ".join(str(data.default_folder) for data in DATASETS.values())
FEAT = "retrieval feature; memory and both run the memory (default: pcb; without stripes: neck)"
FLIP = "flip: features of image and mirror image summed, then normalised; named in every row"
READ = (
    "granularity whose read is added to the map; none is a control: the memory branch without a "
    "memory (default: the method's coarsest)"
)
ADDRESSING = (
    "the memory's weights are a softmax of prototype @ query (dot, the published method), or of "
    "their cosine / T (cosine)"
)
BANK_INIT = (
    "first values of the prototypes: random, or features of the training images, each of its own "
    "identity, image and stripe, once --bank-init-epoch epochs are trained"
)
VARIANT = "MG-MRA: the paper's figure, or the release's first or later upload (released)"
MEMORY_IDS = (
    "identities that the memory has prototypes for; the releases' has 206 on every data set "
    "(default: the training identities)"
)
MILESTONES = "--schedule step: epochs, counted from 0, at which the rate is divided by 10"
PROTOCOL_OF_LLCM = (
    "LLCM, visible to infrared: as in the CVPR 2023 paper, or as in its authors' repository, where "
    "drawn infrared images query all visible ones; their numbers do not compare"
)
MODEL_PATH = (
    "folder of checkpoints, which runs may share: RUN_last.pt, RUN_best.pt, RUN being the name of "
    "the default output folder (default: last.pt, best.pt in the output folder)"
)
OUTPUT_DIR = (
    "folder of a run's files (default: runs/NAME, of method, data set, trial, seed and the flags "
    "that differ from the preset)"
)
METHOD = "baseline network and its training: base is HCT, agw (also spelled awg) is AGW"
FEATURES = (
    ".npz with image paths and their features (--save-features writes one; see the README); with "
    "{trial} in it, RegDB's of trials 1 to N; --tta flip says that they are flip-averaged"
)
CHANNEL_AUG = (
    "probability that a visible image is made one of its channels, or grey (CAJ, ICCV 2021); above "
    "0, --erase fills its rectangle with a random value in each channel, not with the mean"
)
PRESET = (
    "values of flags not given (default: the data set's); one that is named here also decides "
    "AGW's --epochs, --batch-size, --num_pos and --share_net, as far as it has them"
)
RAMP = "START END: epochs, counted from 0, over which the triplet weights rise from 0 to full"
SELECT = (
    "identities that choose best.pt, the epoch of the best Rank-1; val: held out from training "
    "(the releases chose their best SYSU-MM01 epoch on gallery draw 0 of the test identities "
    "alone: --trials 1)"
)
AMP = (
    "run the network in bf16 or fp16 (autocast; fp16 with loss scaling); without a value, or auto: "
    "fp16 on a GPU below compute capability 8.0, which has no bf16, and bf16 elsewhere"
)
PRECISION = "CUDA, float32 products and convolutions: high uses TF32, highest does not"
COMPILE = "compile the backbone's training for a GPU (Inductor): minutes at the start, then faster"
SAVE_LAST = "epochs between saves of last.pt, for epochs as short as a save; the end always has one"
RESIDENT = "training images on the GPU: only where small against its memory (auto), on or off"
GPU = "CUDA device index, or cpu; torchrun assigns one per process (default: 0, if there is one)"
OPTIONS = "options.json of a run, whose options are used; flags given beside it win (default: none)"
RESUME = "checkpoint to resume from; without a value: last.pt of the output folder, if any"

TOP = (
    "nearest gallery images per query in ranks.csv and ranks.json; their score is the cosine "
    "similarity of the features, -1 to 1, or minus the re-ranked distance"
)

# By the headings of --help. The defaults are the releases' settings.
TRAIN = {
    "data and protocol": (
        Flag("dataset", "regdb", "data set: folder layout and protocol", tuple(DATASETS)),
        Flag("data-path", None, f"data folder (default: {FOLDERS})", Path),
        Flag("trial", 1, "RegDB: split, 1 to 10", int),
        Flag("protocol", "paper", PROTOCOL_OF_LLCM, ("paper", "repository")),
        Flag("mode", "all", "SYSU-MM01: gallery from all or indoor cameras", ("all", "indoor")),
        Flag("gallery", "seeded", "SYSU-MM01: seeded or published draws", ("seeded", "official")),
        Flag("shots", 1, "SYSU-MM01: gallery images per identity and camera", (1, 10)),
        Flag("trials", 10, "SYSU-MM01, LLCM: gallery draws; RegDB: splits 1 to N", COUNT),
        Flag("direction", "v2i", "RegDB, LLCM: visible to infrared or reverse", ("v2i", "i2v")),
        Flag("tvsearch", False, "same as --direction i2v", _truth, nargs="?", const=True),
        Flag("re_rank", "no", "re-ranking of the results, named in every row", RE_RANKINGS),
        Flag("tta", "no", FLIP, tuple(TTA)),
        Flag("test-feat", None, FEAT, ("pcb", "neck", "pool", "memory", "both")),
    ),
    "model": (
        Flag("method", "base", METHOD, _method, choices=("base", "agw")),
        Flag("arch", "resnet50", "backbone: resnet18, resnet34, resnet50 or resnet101"),
        Flag("weights", "imagenet", "starting weights: imagenet, none (random), or a file"),
        Flag("share_net", 2, "first shared backbone stage: 0 shares all, 5 none", range(6)),
        Flag("pcb", "on", "HCT: stripes; off: its baseline, one feature of the map", ON_OFF),
        Flag("num_strips", 6, "horizontal stripes per image, S", COUNT),
        Flag("local_feat_dim", 256, "channels of a stripe's feature", COUNT),
        Flag("gem-p", 3.0, "exponent p of the generalised-mean (GeM) pooling", FACTOR),
        Flag("memory-variant", "paper", VARIANT, VARIANTS),
        Flag("shrink", SHRINK, "memory threshold lambda, 0 to 1, or auto", _shrink),
        Flag("shrink-scale", 1.0, "c of --shrink auto: lambda is c / (size of the bank)", FACTOR),
        Flag("addressing", "dot", ADDRESSING, ADDRESSINGS),
        Flag("temperature", TEMPERATURE, "T of --addressing cosine", FACTOR),
        Flag("bank-init", "uniform", BANK_INIT, ("uniform", "features")),
        Flag("bank-init-epoch", 4, "epochs before --bank-init features", COUNT_OR_0),
        Flag("memory-levels", None, READ, ("none", *LEVELS)),
        Flag("instances-per-id", INSTANCES_PER_ID, "instance prototypes per identity, T", COUNT),
        Flag("parts-per-instance", PARTS_PER_INSTANCE, "part prototypes per instance, R", COUNT),
        Flag("memory-ids", None, MEMORY_IDS, COUNT),
    ),
    "losses": (
        Flag("margin", MARGIN, "margin of the triplet losses (feature distance)", WEIGHT),
        Flag("label_smooth", "off", f"identity losses: label smoothing {LABEL_SMOOTHING}", ON_OFF),
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
        Flag("triplet-ramp", (0, 0), RAMP, int, nargs=2),
        Flag("batch-size", 8, "identities per batch, P", COUNT),
        Flag("num_pos", 4, "images per identity and modality in a batch, K", COUNT),
        Flag("img_h", 288, "image height in pixels", COUNT),
        Flag("img_w", 144, "image width in pixels", COUNT),
        Flag("pad", 10, "black pixels on each side before the random crop", COUNT_OR_0),
        Flag("flip", 0.5, "probability of a horizontal flip", PROBABILITY),
        Flag("grey", 0.0, "probability that a visible image is made grey", PROBABILITY),
        Flag("tone", 0.0, "random gamma and gain from exp(-TONE) to exp(TONE)", WEIGHT),
        Flag("erase", 0.0, "probability that a rectangle is erased", PROBABILITY),
        Flag("channel-aug", 0.0, CHANNEL_AUG, PROBABILITY),
        Flag("seed", 0, "seed of all random numbers", COUNT_OR_0),
        Flag("sync-bn", False, "torchrun: batch-norm statistics over all processes (CUDA only)"),
        Flag("compile", False, COMPILE),
        Flag("deterministic", False, "bitwise reproducible results on CUDA too; slower"),
    ),
    "run": (
        Flag("options", None, OPTIONS, Path),
        Flag("output-dir", None, OUTPUT_DIR, Path),
        Flag("model_path", None, MODEL_PATH, Path),
        Flag("log_path", None, "folder of RUN.log (default: train.log in the output folder)", Path),
        Flag("vis_log_path", None, "folder of RUN's events (default: OUTPUT/tensorboard)", Path),
        Flag("overwrite", False, "start anew in a folder that holds a run; deletes its files"),
        Flag("resume", None, RESUME, str, "-r", nargs="?", const=RESUME_LAST),
        Flag("test-only", False, "train nothing, evaluate the checkpoint of --resume"),
        Flag("resident", "auto", RESIDENT, ("auto", *ON_OFF)),
        Flag("no-cache", False, "SYSU-MM01: train from the jpgs, not from caches"),
        Flag("save_epoch", 0, "epochs between numbered checkpoints; 0: none", COUNT_OR_0),
        Flag("save-last-every", 1, SAVE_LAST, COUNT),
        Flag("eval-start", 10, "first epoch that is evaluated, counted from 0", COUNT_OR_0),
        Flag("eval-every", 2, "epochs between evaluations; the last always has one", COUNT),
        Flag("select-on", "test", SELECT, ("test", "val")),
    ),
    "machine": (
        Flag("gpu", None, GPU),
        Flag("amp", False, AMP, _amp, nargs="?", const=True),
        Flag("float32-precision", "high", PRECISION, ("highest", "high")),
        Flag("test-batch", 64, "images per evaluation batch", COUNT),
        Flag("workers", 4, "threads that decode images; 0 counts as 1", COUNT_OR_0),
        Flag("quiet", False, "no progress bars"),
    ),
}
DEFAULTS: dict[str, Any] = {
    flag.name.replace("-", "_"): flag.default
    for flags in TRAIN.values()
    for flag in flags
    if flag.default is not None
}

# AGW's own settings, whatever the data set. The first ones are what AGW is; in the others, how long
# it trains and on what, a preset that is asked for by its name wins.
AGW = {"pcb": "off", "label_smooth": "off", "gem_p": 3.0}
AGW_TRAINING = {"epochs": 81, "batch_size": 8, "num_pos": 4, "share_net": 1}
METHOD_VALUES = {"agw": {**AGW, **AGW_TRAINING}}
NO_STRIPES = {"w_center": 0.0}  # --pcb off: no triplets of stripes
NO_MEMORY = {"w_alignment": 0.0, "w_decorrelation": 0.0}  # --memory-levels none: no read to align

# Flags that name data and protocol, as `data_manager.eval_set` takes them.
PROTOCOL = ("dataset", "data_path", "trial", "direction", "protocol", "mode", "gallery", "shots")
PROTOCOL += ("trials", "tta")
# Flags without influence on a number.
INCIDENTAL = (
    *("workers", "quiet", "gpu", "output_dir", "model_path", "log_path", "vis_log_path", "resume"),
    *("overwrite", "test_only", "save_epoch", "save_last_every", "resident", "test_batch"),
    *("figures", "options", "no_cache"),
)
# Of a run's name: what it always holds, or shows by the preset's, and what no run differs by.
IN_NAME = ("dataset", "trial", "method", "pcb", "preset")
UNNAMED = (*IN_NAME, *INCIDENTAL, "data_path", "deterministic", "epochs")
LONGEST = 60  # characters of what distinguishes a run; longer ones end with a hash
AS_TRAINED_FLAGS = ("img_h", "img_w", "gem_p", "memory_variant")  # of an evaluation, unless given
# The ancestors' test scripts take these too; here the checkpoint knows them.
CHECKPOINT_KNOWS = (
    *("lr", "optim", "arch", "test-only", "save_epoch", "log_path", "vis_log_path", "batch-size"),
    *("method", "margin", "num_pos", "seed", "share_net", "pcb", "w_center", "local_feat_dim"),
    *("num_strips", "label_smooth"),
)
# On --resume: what may differ without a remark, and what belongs to the run for good. Everything
# else may change, and is reported.
FREE_ON_RESUME = (*INCIDENTAL, "data_path", "preset", "weights", "deterministic")
FIXED_ON_RESUME = ("dataset", "trial", "select_on", "method", "optim")


# --- Parsers --------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors, as those found later are (see `utils.user_errors`)."""

    def __init__(self, description: str = "", **settings: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(
            **{"description": description, "formatter_class": form, "allow_abbrev": False},
            **settings,
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Returns the flags; a value behind a switch and a space in a flag have their own error."""
        words = sys.argv[1:] if args is None else list(args)
        if "--" in words[:-1]:  # as in HCT's README
            name = words[words.index("--") + 1]
            self.error(f"'-- {name}' has a space: write --{name}")
        found, rest = self.parse_known_args(words, namespace)
        for flag, word in itertools.pairwise(words):
            action = self._option_string_actions.get(flag)
            if word in rest and action is not None and action.nargs == 0:
                self.error(f"{flag} takes no value, got {word}: leave the value out")
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


class Flags:
    """Adds flags to a group of a parser, in both spellings; absent ones stay None until resolved.

    The help of each ends with its default, and with the values that presets and AGW give it.
    """

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._group = parser.add_argument_group(title)

    def __call__(
        self, name: str, text: str, *short: str, default: Any = None, **settings: Any
    ) -> None:
        """Adds one flag; a `default` stands in place of that in `DEFAULTS`."""
        key = name.replace("-", "_")
        spellings = dict.fromkeys([f"--{name}", f"--{key.replace('_', '-')}", f"--{key}", *short])
        if settings.get("action") != "store_true" and text != argparse.SUPPRESS:
            layers = {"default": DEFAULTS, **PRESETS, **METHOD_VALUES}
            values = {origin: layer[key] for origin, layer in layers.items() if key in layer}
            if default is not None:
                values = {"default": default}
            shown = "; ".join(f"{origin}: {_words(value)}" for origin, value in values.items())
            text += f" ({shown})" if shown else ""
            settings["default"] = None if default == AS_TRAINED else default
        self._group.add_argument(*spellings, dest=key, help=text.replace("%", "%%"), **settings)


AS_TRAINED = "as trained"


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _add_group(parser: argparse.ArgumentParser, title: str) -> None:
    add = Flags(parser, title)
    for flag in TRAIN[title]:
        add(flag.name, flag.text, *flag.short, **flag.settings)


def train_parser(description: str) -> Parser:
    """Returns the parser of the three training scripts."""
    parser = Parser(description)
    for title in TRAIN:
        _add_group(parser, title)
    return parser


def test_parser(description: str) -> Parser:
    """Returns the parser of ``test.py``."""
    parser = Parser(description)
    evaluation_flags(parser)
    add = Flags(parser, argparse.SUPPRESS)
    for name in CHECKPOINT_KNOWS:
        add(name, argparse.SUPPRESS, nargs="?", const=True)
    parser.set_defaults(ignored=[name.replace("-", "_") for name in CHECKPOINT_KNOWS])
    add = Flags(parser, "output")
    add("output-dir", "folder of results.json (default: beside the checkpoint)", type=Path)
    add("figures", "draw ranked lists, CMC, distances and an embedding", action="store_true")
    add("save-features", "write all features, identities and paths to this .npz", type=Path)
    add = Flags(parser, "features of any method, in place of a checkpoint")
    add("features", FEATURES)
    add = Flags(parser, "your own images, in place of a data set")
    for role in ("query", "gallery"):
        add(f"{role}-dir", f"folder of {role} images; subfolders are searched too", type=Path)
        text = f"modality of the {role} images (default: as --direction says)"
        add(f"{role}-modality", text, choices=("visible", "infrared"))
    add("top", TOP, type=COUNT, default=20)
    return parser


def evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that ``test.py`` and the figures of a checkpoint share."""
    add = Flags(parser, "checkpoint")
    text = "checkpoint, or a folder with last.pt; with {trial} in it, RegDB's of trials 1 to N"
    add("resume", text, "-r")
    text = "folder in which --resume is looked for where there is no such path"
    add("model_path", text, type=Path, default=Path("save_model"))  # as in the ancestors' scripts
    add("img_h", "image height in pixels", type=COUNT, default=AS_TRAINED)
    add("img_w", "image width in pixels", type=COUNT, default=AS_TRAINED)
    text = "GeM exponent; the earlier releases' files store none: 3 unless given"
    add("gem-p", text, type=FACTOR, default=AS_TRAINED)
    text = "MG-MRA variant; the earlier releases' files store none: released unless given"
    add("memory-variant", text, choices=VARIANTS, default=AS_TRAINED)
    add(
        "memory",
        "MODULE.CLASS of a memory of your own, for --test-feat memory and both",
        type=_class,
    )
    _add_group(parser, "data and protocol")
    add = Flags(parser, "identities")
    text = "test identities, or those that --select-on val held out"
    add("subset", text, choices=("test", "val"), default="test")
    text = "evaluate on identities that were trained on all the same; every result says so"
    add("seen-ids", text, action="store_true")
    _add_group(parser, "machine")


# --- Resolving ------------------------------------------------------------------------------------


def resolve(
    args: argparse.Namespace, script: str = "train_MGMRA.py"
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Fills in the flags of a training that were not given.

    Returns:
        The resolved flags, and for each flag with a value where it came from: "flag", a preset's
        name, "default".

    Raises:
        ValueError: When flags contradict each other, or have no effect.
    """
    flags = _given(args)
    saved = read_options(args.options) if args.options else {}
    given = {**saved, **flags}
    method = given.get("method", DEFAULTS["method"])
    of_method = METHOD_VALUES.get(method, {})
    data = given.get("dataset") or DEFAULTS["dataset"]
    preset = given.get("preset") or data
    if "preset" in given:
        of_method = {k: v for k, v in of_method.items() if k in AGW or k not in PRESETS[preset]}
    values, sources = {**vars(args), "preset": preset}, {}
    for source, layer in (
        ("default", DEFAULTS),
        (f"preset {data}", PRESETS[data] if preset in ON_TOP else {}),
        (f"preset {preset}", PRESETS[preset]),
        (method.upper(), of_method),
        ("no stripes", NO_STRIPES if {**of_method, **given}.get("pcb") == "off" else {}),
        ("no memory", NO_MEMORY if given.get("memory_levels") == "none" else {}),
        ("--options", saved),
        ("flag", flags),
    ):
        values |= layer
        sources |= dict.fromkeys(layer, source)
    if method == "agw" and values["pcb"] == "on":
        raise ValueError("--method agw has no stripes: leave out --pcb on, or train --method base")
    for name, reason in unused(script, given).items():
        if flags.get(name):  # a weight of 0 is what an absent term has
            raise ValueError(f"--{name} has no effect, since {reason}: leave it out")
    start, end = values["triplet_ramp"]
    if not 0 <= start <= end:
        raise ValueError(f"--triplet-ramp takes two epochs, START <= END; got {start} {end}")
    _resolve_protocol(values, direction_given=args.direction)
    return argparse.Namespace(**values), sources


def unused(script: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Returns the flags that have no effect on a training with those `given`, and why."""
    of_levels = ("memory_variant", "w_alignment", "w_decorrelation")
    of_memory = ("shrink", "shrink_scale", "instances_per_id", "parts_per_instance", "memory_ids")
    of_memory += ("addressing", "temperature", "bank_init", "bank_init_epoch")
    of_branch = ("memory_levels", "w_memory_id", "w_memory_triplet")
    flags = {}
    if given.get("shrink") != "auto":
        flags["shrink_scale"] = f"--shrink is {given.get('shrink', SHRINK)}, not auto"
    if given.get("addressing") != "cosine":
        flags["temperature"] = "--addressing is dot, not cosine"
    if given.get("bank_init") != "features":
        flags["bank_init_epoch"] = "--bank-init is uniform, not features"
    for flag, value in (("pcb", "off"), ("method", "agw")):
        if given.get(flag) == value:
            reason = f"--{flag} {value} has no stripes"
            flags |= dict.fromkeys(("w_center", "local_feat_dim"), reason)
    if given.get("memory_levels") == "none":
        flags |= dict.fromkeys((*of_levels, *of_memory), "--memory-levels none has no memory")
    if script == "train_SGMRA.py":
        flags |= dict.fromkeys(of_levels, f"{script} has no multi-granularity memory")
    if script == "train_HCT.py":
        flags |= dict.fromkeys((*of_levels, *of_memory, *of_branch), f"{script} has no memory")
    return flags


def resolve_evaluation(
    args: argparse.Namespace, trained: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Fills in the flags of an evaluation that were not given, but for those `AS_TRAINED_FLAGS`.

    `trained` holds dataset, trial and data_path of the checkpoint's training, if known.

    Raises:
        ValueError: When flags contradict each other, or have no effect.
    """
    values, trained = dict(vars(args)), trained or {}
    no_effect = [name for name in values.pop("ignored", ()) if values.pop(name) is not None]
    if values["dataset"] in (None, trained.get("dataset")):
        values |= {name: value for name, value in trained.items() if values[name] is None}
    for name in DEFAULTS.keys() & values.keys() - set(AS_TRAINED_FLAGS):
        if values[name] is None:
            values[name] = DEFAULTS[name]
    _resolve_protocol(values, direction_given=args.direction)
    for name, reason in unused_in_evaluation(values).items():
        if vars(args).get(name) in (None, False):
            continue
        if values[name] != DEFAULTS.get(name) or name == "trials":
            raise ValueError(f"--{name} has no effect, since {reason}: leave it out")
        no_effect.append(name)
    if no_effect:
        text = ", --".join(no_effect)
        log.warning("no effect, since checkpoint and data set know: --%s", text)
    return argparse.Namespace(**values)


def distinction(args: argparse.Namespace, sources: Mapping[str, str], script: str) -> str:
    """Returns what tells a run's name from that of the preset's values: "_seed3_lr0.05", or ""."""
    named = dict.fromkeys(vars(args)) | {name: getattr(args, name) for name in IN_NAME}
    plain = vars(resolve(argparse.Namespace(**named), script)[0])
    words = [] if args.preset == args.dataset else [f"_{args.preset}"]
    for name, value in sorted(vars(args).items(), key=lambda item: item[0] != "seed"):
        shown = _words(value)
        typed = sources.get(name) in ("flag", "--options") and name not in UNNAMED
        if typed and shown != _words(plain[name]):
            words.append(f"_{name.replace('_', '-')}{'' if value is True else shown}")
    text = re.sub(r"[^\w.+-]", "-", "".join(words))
    return text if len(text) <= LONGEST else f"{text[:40]}_{sha256(text.encode()).hexdigest()[:8]}"


def unused_in_evaluation(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns the flags that have no effect on an evaluation with these values, and why."""
    data = DATASETS[values["dataset"]]
    if values.get("query_dir") or values.get("gallery_dir"):
        names = {*PROTOCOL, "figures", "seen_ids"} - {"direction", "tta"}
        return dict.fromkeys(names, "your own images have no protocol")
    flags = dict.fromkeys(("query_modality", "gallery_modality"), "there is no --query-dir")
    choices = {name for settings in data.protocols.values() for name in settings}
    for name in ("direction", "tvsearch", "protocol", "mode", "gallery", "shots"):
        if name.replace("tvsearch", "direction") not in choices:
            flags[name] = f"{data.title} has no such choice"
    several = "{trial}" in (values["resume"] or "")
    if data.splits == 1:
        flags["trial"] = f"{data.title} has one split"
    elif several:
        flags["trial"] = "{trial} in --resume stands for the trials 1 to --trials"
    if data.gallery_draws == 1 and not several:
        flags["trials"] = f"{data.title} has one gallery, and --resume no {{trial}} in it"
    return flags


def _resolve_protocol(values: dict[str, Any], direction_given: str | None) -> None:
    """Sets direction and data folder among the values."""
    if values["tvsearch"] and direction_given == "v2i":
        raise ValueError("--tvsearch asks for infrared to visible, --direction v2i for the reverse")
    if values["tvsearch"]:
        values["direction"] = "i2v"
    if values["data_path"] is None:
        values["data_path"] = DATASETS[values["dataset"]].default_folder


def protocol(args: argparse.Namespace, **given: Any) -> dict[str, Any]:
    """Returns the flags that `data_manager.eval_set` takes; `given` ones are added or replaced."""
    return {**{name: getattr(args, name) for name in PROTOCOL}, **given}


def changes(saved: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """Returns the options that changed since a run was saved: "lr 0.1 -> 0.05; ...".

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
    """Returns the preset and the options that differ from it, one a line, with their source."""
    preset = {**DEFAULTS, **PRESETS[args.preset], "preset": args.preset}
    lines = [
        f"  {name} {_words(value)}  ({sources[name]}; preset: {_words(preset.get(name, 'unset'))})"
        for name, value in sorted(vars(args).items())
        if name in sources and name not in INCIDENTAL and value != preset.get(name)
    ]
    differing = "these options differ" if lines else "no option differs"
    source = PRESET_SOURCES[args.preset]
    return "\n".join([f"preset {args.preset} ({source}); {differing} (options.json: all)", *lines])


def evaluation_of(args: argparse.Namespace) -> list[str]:
    """Returns the flags with which ``test.py`` evaluates what a training evaluated."""
    default = {**DEFAULTS, "data_path": DATASETS[args.dataset].default_folder, "dataset": None}
    unused = unused_in_evaluation(vars(args))
    names = [name for name in (*PROTOCOL, "re_rank", "test_feat") if name not in unused]
    values = {name: getattr(args, name) for name in names}
    return flags_of({k: v for k, v in values.items() if v != default.get(k)})


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """Returns options as command-line flags; True is a switch, a sequence several values."""
    flags = []
    for name, value in values.items():
        several = value if isinstance(value, list | tuple) else [value]
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, several))]
    return flags


def read_options(path: Path) -> dict[str, Any]:
    """Returns those options in a run's ``options.json`` that influence its numbers, checked.

    Raises:
        ValueError: When it is no such file, or holds an illegal value.
    """
    try:
        saved = json.loads(path.read_text())["options"].items()
        known = {k: v for k, v in saved if k not in (*INCIDENTAL, "tvsearch")}
        words = flags_of({k: v for k, v in known.items() if v is not None and v is not False})
        return _given(train_parser("").parse_args(words))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--options {path}: expected the options.json of a run ({error or error!r})"
        ) from error


def _given(args: argparse.Namespace) -> dict[str, Any]:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items()}
    return {k: v for k, v in values.items() if v is not None and v is not False}


def to_json(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options as plain values: paths as texts, tuples as lists."""
    return json.loads(json.dumps(vars(args), default=str))
