"""What the paper's tables run: settings, protocols, and the commands behind each row.

A run is a dictionary of options; `options.flags_of` makes a command line of it.
"""

import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import options
from data_manager import DATASETS, EvalOptions, eval_set, train_set
from networks.settings import VARIANTS
from utils import read_json

ROOT = Path(__file__).resolve().parents[1]  # of the scripts
# A data set's name: all methods under all its protocols.
TABLES = (*DATASETS, "ablation", "memory", "study", "continued", "unseen")
# Options that the tables themselves decide: they cannot follow on the command line.
FIXED = ("trial", "mode", "gallery", "shots", "direction", "protocol", "re_rank")
FIXED += ("test_feat", "method", "resume", "test_only", "overwrite")
FIXED += ("output_dir", "model_path", "log_path", "vis_log_path", "options")
# Of evaluations, but for what a checkpoint knows itself.
TEST_FLAGS = {flag.name for flags in options.EVALUATION.values() for flag in flags}
TEST_FLAGS -= {*options.AS_TRAINED_FLAGS}

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """What a table varies."""

    name: str  # the method, or the value of what is varied
    script: str = "train_MGMRA.py"
    train: Options = field(default_factory=dict)  # spelled as they are in its folder's name
    # With any, only the last epoch is evaluated, and only under the data set's first protocol.
    test: Options = field(default_factory=dict)
    group: str = ""  # what an ablation varies
    published: str | None = None  # method of ``published.csv`` whose numbers stand beside

    @property
    def references(self) -> tuple[str, str]:
        """Rows to compare a study's row with: its baseline, and that with the memory branch."""
        return AGW_REFERENCES if "method" in self.train else REFERENCES


METHODS = (
    Setting("HCT", "train_HCT.py", published="HCT"),
    Setting("SG-MRA", "train_SGMRA.py"),
    Setting("MG-MRA", published="MG-MRA"),
    Setting("AGW", "train_HCT.py", {"method": "agw"}, published="AGW"),
    Setting("AGW + MG-MRA", train={"method": "agw"}),
    # As the authors' README was probably made: its script re-ranks by default.
    Setting("MG-MRA", test={"re_rank": "k_reciprocal"}, published="MG-MRA re-ranked"),
)

# Which recipe made the published SYSU-MM01 numbers is not known: HCT's README, the preset's source,
# has w_center 1 without smoothing, the release's script 2 with it; the authors' first README has
# the rate 0.1, as the preset, the later one 0.01.
SMOOTHED = {"w_center": 2.0, "label_smooth": "on"}
RECIPES = (
    ("MG-MRA, rate 0.01", {"lr": 0.01}),
    ("MG-MRA, w_center 2, smoothing", SMOOTHED),
    ("MG-MRA, w_center 2, smoothing, rate 0.01", {**SMOOTHED, "lr": 0.01}),
)

# Reads that are selective at every level; this project's (`docs/what_the_memory_does.md`).
COSINE = {"addressing": "cosine", "shrink": "auto", "shrink-scale": 3}
FEATURES = {**COSINE, "bank-init": "features"}

# What is varied, the values' names and options; all on MG-MRA. A value that is MG-MRA's own shares
# MG-MRA's training.
MEMORY_ABLATIONS: dict[str, dict[str, Options]] = {
    "granularities": {
        "control: memory branch, no memory": {"memory-levels": "none"},
        "part": {"memory-levels": "part"},
        "+ instance": {"memory-levels": "instance"},
        "+ semantic: MG-MRA": {},
    },
    "variant": {v: {"memory-variant": v} for v in VARIANTS},
    "lambda": {
        **{str(v): {"shrink": v} for v in (0, 0.001, 0.0025, 0.005)},
        **{f"{c} / m": {"shrink": "auto", "shrink-scale": c} for c in (0.5, 1, 2)},
    },
    "addressing": {
        "dot: MG-MRA": {},
        "cosine, 3 / m": COSINE,
        "cosine, 3 / m, features": FEATURES,
    },
    "T x R": {
        f"{t} x {r}": {"instances-per-id": t, "parts-per-instance": r}
        for t, r in ((1, 1), (1, 6), (5, 1), (5, 6), (10, 6))
    },
}
ABLATIONS: dict[str, dict[str, Options]] = {
    **MEMORY_ABLATIONS,
    "loss weights": {
        "as published": {},
        "no memory identity": {"w_memory_id": 0},
        "no memory triplet": {"w_memory_triplet": 0},
        "no alignment": {"w_alignment": 0},
        "decorrelation 0.01": {"w_decorrelation": 0.01},
        "no stripe triplets": {"w_center": 0},
    },
    "share_net": {str(k): {"share_net": k} for k in range(6)},
    "pooling p": {str(p): {"gem-p": p} for p in (1, 3, 10)},
}

# What each part of the memory is worth: split t is trained with seed t in every row, so that rows
# are compared split by split, to the references above all.
REFERENCES = ("HCT", "control: memory branch, no memory")
AGW_REFERENCES = ("AGW", "AGW, memory branch, no memory")
STUDY = (
    Setting(REFERENCES[0], "train_HCT.py"),
    Setting(REFERENCES[1], train={"memory-levels": "none"}),
    Setting("SG-MRA", "train_SGMRA.py"),
    *(Setting(f"MG-MRA, {variant}", train={"memory-variant": variant}) for variant in VARIANTS),
    Setting("MG-MRA, threshold 1 / m", train={"shrink": "auto"}),
    Setting("MG-MRA, cosine, 3 / m", train=COSINE),
    Setting("MG-MRA, cosine, 3 / m, features", train=FEATURES),
    Setting(AGW_REFERENCES[0], "train_HCT.py", {"method": "agw"}),
    Setting(AGW_REFERENCES[1], train={"method": "agw", "memory-levels": "none"}),
    Setting("AGW, cosine, 3 / m, features", train={"method": "agw", **FEATURES}),
)
STUDY_SPLITS = 5
# Evaluated on data sets not trained on.
UNSEEN = (*REFERENCES, "MG-MRA, paper", "MG-MRA, cosine, 3 / m, features")
# The study's rows from a common start: each goes on from the weights of its split's HCT, or AGW.
# When a training from random weights leaves its first plateau is chance, and decides more than the
# row.
CONTINUING = {"epochs": 8, "warmup_epochs": 1, "triplet_ramp": (0, 0), "lr": 0.02}
PAIRED = ("study", "continued")  # tables whose rows are compared split by split
SEEDED = (*PAIRED, "unseen")  # tables whose split t is trained with seed t


def settings_of(table: str) -> list[Setting]:
    """Returns a table's settings, in its order; "memory" is "ablation" without the rest."""
    if table in DATASETS:
        recipes = RECIPES if table == "sysu" else ()
        return [*METHODS, *(Setting(k, train=v, published="MG-MRA") for k, v in recipes)]
    if table in SEEDED:
        chosen = [each for each in STUDY if table != "unseen" or each.name in UNSEEN]
        return [replace(setting, group=table) for setting in chosen]
    found = [Setting("none: HCT", "train_HCT.py", group="granularities")]
    for group, values in (ABLATIONS if table == "ablation" else MEMORY_ABLATIONS).items():
        found += [Setting(name, train=train, group=group) for name, train in values.items()]
    for feat in ("pcb", "memory", "both"):
        found.append(Setting(feat, test={"test_feat": feat}, group="test feature"))
    if table == "ablation":
        found.append(replace(METHODS[-1], group="re-ranking"))
        found.append(Setting("MG-MRA", test={"re_rank": "random_walk"}, group="re-ranking"))
    return found


# --- The commands behind a table ------------------------------------------------------------------


@functools.cache
def _parser(train: bool) -> options.Parser:
    parser = options.train_parser("") if train else options.test_parser("")
    parser.prog = "train_MGMRA.py" if train else "test.py"  # whose --help errors name
    return parser


def given_options(flags: Sequence[str], table: str = "") -> dict[str, Any]:
    """Returns what training flags ask for other than the defaults; refuses the table's own."""
    parser = _parser(True)
    given = vars(parser.parse_args(flags))
    extra = {name: value for name, value in given.items() if value != parser.get_default(name)}
    for name in (*FIXED, "seed") if table in SEEDED else FIXED:
        if name in extra:
            raise ValueError(f"--{name} is decided by the table; leave it out")
    return extra


@dataclass(frozen=True)
class Row:
    """A row of a table and where its numbers come from."""

    dataset: str
    protocol: str  # a key of the data set's `protocols`, such as "v2i", "all 1 seeded"
    setting: Setting
    checkpoint: str  # "last" or "best"
    files: Sequence[Path]  # ``results.json`` of each trial, or a single one that holds all
    trials: int  # that a complete row has
    training: Sequence[Path] = ()  # folders

    @property
    def re_rank(self) -> str:
        """The re-ranking's name, or "no"."""
        return self.setting.test.get("re_rank", "no")

    @property
    def words(self) -> str:
        """The protocol in words."""
        data = DATASETS[self.dataset]
        return data.describe(EvalOptions(**data.protocols[self.protocol]))

    @property
    def title(self) -> str:
        """Data set and protocol in a heading."""
        return f"{DATASETS[self.dataset].title}, {self.words}"


@dataclass(frozen=True)
class Step:
    """One command: a script, its options, and the folder it fills."""

    script: str
    options: Options
    folder: Path

    @property
    def trains(self) -> bool:
        """Whether it is a training, not an evaluation."""
        return self.script != "test.py"

    @property
    def command(self) -> list[str]:
        """Script and flags; a training resumes where it was stopped, if it was."""
        values = {**self.options, "output_dir": self.folder}
        values |= {"resume": True} if self.trains else {}
        return [os.path.relpath(ROOT / self.script), *options.flags_of(values)]

    @functools.cached_property
    def resolved(self) -> dict[str, Any]:
        """All options of the script as plain values, as it understands those given."""
        args = _parser(self.trains).parse_args(options.flags_of(self.options))
        if self.trains:
            return options.to_json(options.resolve(args, self.script)[0])
        return options.to_json(options.resolve_evaluation(args))

    def is_done(self) -> bool:
        """Tells whether its folder holds all of its results.

        Raises:
            ValueError: When the folder holds a training with other options, or a damaged file.
        """
        file = self.folder / ("options.json" if self.trains else "results.json")
        if not file.exists():
            return False
        saved = read_json(file, {"options": {}})["options"]
        changed = [
            f"{name} {saved[name]!r} there, {value!r} here"
            for name, value in self.resolved.items()
            if name in saved and name not in options.INCIDENTAL and saved[name] != value
        ]
        if not self.trains:
            weights = Path(self.options["resume"])
            stale = weights.exists() and weights.stat().st_mtime > file.stat().st_mtime
            return not (changed or stale)
        if changed:
            raise ValueError(
                f"{self.folder} holds a run with other options ({'; '.join(changed)}): give "
                f"another folder with --runs, or remove this one"
            )
        report = self.folder / "training.json"
        if not report.exists() or not (self.folder / "last.pt").exists():
            return False
        last = read_json(report, {"last": (None, {"epoch": int})})["last"]
        return bool(last) and last["epoch"] == saved.get("epochs")


def training_of(setting: Setting, split: Options, runs: Path, extra: Options) -> Step:
    """Returns a setting's training on a split, with those options in `extra` that it uses.

    `split` holds its data set, and by "trial" and "seed" what numbers it in the folder's name.
    """
    own = {name.replace("-", "_"): value for name, value in setting.train.items()}
    unused = options.unused(setting.script, {**split, **extra, **own})
    used = {name: value for name, value in extra.items() if name not in unused}
    method = setting.script.removeprefix("train_").removesuffix(".py")
    numbers = [f"{name}{value}" for name, value in split.items() if name != "dataset"]
    words = [method, split["dataset"], *itertools.chain(*setting.train.items()), *numbers]
    return Step(setting.script, {**split, **used, **own}, runs / "_".join(map(str, words)))


def trainings_of(
    table: str, setting: Setting, split: Options, runs: Path, extra: Options
) -> list[Step]:
    """Returns a setting's training on a split, last, and before it one that it continues."""
    if table != "continued":
        return [training_of(setting, split, runs, extra)]
    first = next(each for each in STUDY if each.name == setting.references[0])
    start = training_of(first, split, runs, extra)
    if "bank-init" in setting.train:
        setting = replace(setting, train={**setting.train, "bank-init-epoch": 1})
    own = training_of(setting, split, runs, extra)
    values = {**CONTINUING, **own.options, "weights": str(start.folder / "last.pt")}
    return [start, Step(setting.script, values, runs / f"continued_{own.folder.name}")]


def targets_of(
    table: str, setting: Setting, dataset: str, unseen: Mapping[str, str | None]
) -> list[tuple[str, str, Options]]:
    """Returns on what a setting is evaluated: data sets, protocols, folders (None: the usual)."""
    if table == "unseen":
        others = unseen or dict.fromkeys(name for name in DATASETS if name != dataset)
        return [(k, next(iter(DATASETS[k].protocols)), {"data_path": v}) for k, v in others.items()]
    protocols = [(dataset, protocol, {}) for protocol in DATASETS[dataset].protocols]
    everywhere = table in (*DATASETS, *PAIRED) and not setting.test
    return protocols if everywhere else protocols[:1]


def plan(
    table: str,
    *,
    dataset: str,
    runs: Path,
    trials: int,
    extra: Options,
    unseen: Mapping[str, str | None] | None = None,
) -> tuple[list[Step], list[Row]]:
    """Returns the commands behind one of `TABLES`, each training before its evaluations; its rows.

    Trainings that mean the same share a folder in `runs`, and so do evaluations. `trials` counts
    RegDB's splits, with a training each; of other data sets gallery draws of one training; of
    tables in `SEEDED` trainings with the seeds from 1, evaluated on the usual number of draws.
    Every training and evaluation gets the options in `extra` that it uses. `unseen` are the data
    sets that the table of this name evaluates on, with their folders, None for the usual one;
    without it, all others.
    """
    numbered = ["trial"] if DATASETS[dataset].splits > 1 else []
    numbered += ["seed"] if table in SEEDED else []
    splits = [{"dataset": dataset, **dict.fromkeys(numbered, n + 1)} for n in range(trials)]
    draws = {}
    if not numbered:  # one training, evaluated on several draws where its gallery is drawn
        splits = splits[:1]
        draws = {"trials": trials} if DATASETS[dataset].gallery_draws > 1 else {}
    groups: dict[str, list[Step]] = {}  # by what is trained: the training, then its evaluations
    rows = []
    for setting in settings_of(table):
        own = []  # the group of each split
        for split in splits:
            for step in trainings_of(table, setting, split, runs, extra):
                group = groups.setdefault(json.dumps([step.script, step.resolved]), [step])
            own.append(group)
        trainings = [group[0].folder for group in own]
        for target, protocol, where in targets_of(table, setting, dataset, unseen or {}):
            asked = {**DATASETS[target].protocols[protocol], **setting.test}
            about = {k: v for k, v in extra.items() if k in TEST_FLAGS}
            about |= {**asked, "dataset": target, **where, **draws}
            words = [*([] if target == dataset else [target]), *map(str, asked.values())]
            for checkpoint in ("last",) if setting.test or table in SEEDED else ("last", "best"):
                name = "_".join([*words, checkpoint])
                for group in own:
                    training = group[0]
                    values = {**about, "resume": str(training.folder / f"{checkpoint}.pt")}
                    if target == dataset and "trial" in training.options:
                        values["trial"] = training.options["trial"]
                    group.append(Step("test.py", values, training.folder / name))
                files = [folder / name / "results.json" for folder in trainings]
                rows.append(Row(target, protocol, setting, checkpoint, files, trials, trainings))
    steps = {step.folder: step for group in groups.values() for step in group}
    return list(steps.values()), rows


def choose(steps: Sequence[Step], rows: Sequence[Row], texts: Sequence[str]) -> list[Step]:
    """Returns the evaluations of rows whose title holds all texts, and the trainings they need."""
    folders: set[Path] = set()
    for row in rows:
        title = f"{row.dataset} {row.protocol} {row.setting.group} {row.setting.name}"
        if all(text in title for text in texts):
            folders.update(row.training, (file.parent for file in row.files))
    weights = {step.options.get("weights") for step in steps if step.folder in folders}
    folders |= {step.folder for step in steps if str(step.folder / "last.pt") in weights}
    if not folders:
        raise ValueError(f"--only {' '.join(texts)} leaves no row of the table")
    return [step for step in steps if step.folder in folders]


def check_lists(steps: Sequence[Step]) -> None:
    """Reads every list that the steps need once: a DataError before any work, if one is wrong."""
    read_train, read_test = functools.cache(train_set), functools.cache(eval_set)
    for step in steps:
        if step.trains:
            read_train(**{name: step.resolved[name] for name in ("dataset", "data_path", "trial")})
        else:
            read_test(**{name: step.resolved[name] for name in options.PROTOCOL})
