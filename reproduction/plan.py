"""What the paper's tables run: settings, protocols, and the commands behind each row.

A run is a dictionary of options. `flags_of` makes a command line of it, `resolve` says what that
means to the script.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import options
from data_manager import DATASETS, eval_set, train_set

ROOT = Path(__file__).resolve().parents[1]  # of the scripts
TABLES = ("regdb", "sysu", "ablation", "memory")
# Options that the tables themselves decide: they cannot follow on the command line.
FIXED = ("trial", "mode", "gallery", "shots", "direction", "tvsearch", "re_rank", "test_feat")
FIXED += ("method", "resume", "test_only", "overwrite", "output_dir", "model_path", "log_path")
FIXED += ("vis_log_path",)

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """What a table varies.

    Attributes:
        name: The method, or the value of what is varied.
        script: The training script.
        train: Options of the training, spelled as they are in its folder's name.
        test: Options of the evaluation; with any, the last epoch alone is evaluated.
        group: What an ablation varies here; "" for methods.
        health: Whether the memory's health is reported.
        published: Method of ``published.csv`` whose numbers stand beside.
        first_section_only: Whether it is evaluated under the table's first protocol alone.
    """

    name: str
    script: str = "train_MGMRA.py"
    train: Options = field(default_factory=dict)
    test: Options = field(default_factory=dict)
    group: str = ""
    health: bool = False
    published: str | None = None
    first_section_only: bool = False


METHODS = (
    Setting("HCT", "train_HCT.py", published="HCT"),
    Setting("SG-MRA", "train_SGMRA.py"),
    Setting("MG-MRA", published="MG-MRA"),
    Setting("AGW", "train_HCT.py", {"method": "agw"}, published="AGW"),
    Setting("AGW + MG-MRA", train={"method": "agw"}),
    # As the authors' README was probably made: its script re-ranks by default.
    Setting(
        "MG-MRA",
        test={"re_rank": "k_reciprocal"},
        published="MG-MRA re-ranked",
        first_section_only=True,
    ),
)

# What is varied, the values' names and options; all on MG-MRA. A value that is MG-MRA's own shares
# MG-MRA's training.
MEMORY_ABLATIONS: dict[str, dict[str, Options]] = {
    "granularities": {
        "control: memory branch, no memory": {"memory-levels": "none"},
        "part": {"memory-levels": "part"},
        "+ instance": {"memory-levels": "instance"},
        "+ semantic: MG-MRA": {},
    },
    "variant": {v: {"memory-variant": v} for v in ("paper", "released")},
    "lambda": {
        **{str(v): {"shrink": v} for v in (0, 0.001, 0.0025, 0.005)},
        **{f"{c} / m": {"shrink": "auto", "shrink-scale": c} for c in (0.5, 1, 2)},
    },
    "T x R": {
        f"{t} x {r}": {"instances-per-id": t, "parts-per-instance": r}
        for t, r in ((1, 1), (1, 6), (5, 1), (5, 6), (10, 6))
    },
}
OTHER_ABLATIONS: dict[str, dict[str, Options]] = {
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


def settings_of(table: str) -> list[Setting]:
    """Returns a table's settings, in its order; "memory" is "ablation" without the rest."""
    if table in ("regdb", "sysu"):
        return list(METHODS)
    found = [Setting("none: HCT", "train_HCT.py", group="granularities")]
    for group, values in MEMORY_ABLATIONS.items():
        found += [Setting(k, train=v, group=group, health=True) for k, v in values.items()]
    if table == "ablation":
        for group, values in OTHER_ABLATIONS.items():
            found += [Setting(k, train=v, group=group) for k, v in values.items()]
    for feat in ("pcb", "memory", "both"):
        found.append(Setting(feat, test={"test_feat": feat}, group="test feature"))
    if table == "ablation":
        for ranking in ("k_reciprocal", "random_walk"):
            published = "MG-MRA re-ranked" if ranking == "k_reciprocal" else None
            test = {"re_rank": ranking}
            found.append(Setting("MG-MRA", test=test, group="re-ranking", published=published))
    return found


@dataclass(frozen=True)
class Section:
    """An evaluation protocol: a section of a table.

    Attributes:
        dataset: Name in `DATASETS`.
        direction: RegDB, LLCM: "v2i" or "i2v".
        mode: SYSU-MM01: "all" or "indoor".
        shots: SYSU-MM01: 1 or 10.
        gallery: SYSU-MM01: "seeded" or "official".
    """

    dataset: str
    direction: str | None = None
    mode: str | None = None
    shots: int | None = None
    gallery: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of ``test.py`` that ask for it."""
        return {k: v for k, v in asdict(self).items() if k != "dataset" and v is not None}

    @property
    def key(self) -> str:
        """A short name: "regdb v2i", "sysu all 1 seeded"."""
        return " ".join(map(str, (self.dataset, *self.options.values())))

    @property
    def title(self) -> str:
        """The protocol in a heading."""
        name = DATASETS[self.dataset].title
        if self.mode is None:
            sides = "visible to infrared" if self.direction == "v2i" else "infrared to visible"
            return f"{name}, {sides}"
        shots = {1: "single-shot", 10: "ten-shot"}[self.shots]
        return f"{name}, {self.mode}-search, {shots}, {self.gallery} gallery"


def sections_of(table: str, dataset: str) -> list[Section]:
    """Returns the protocols of a table; ablations have the data set's first alone."""
    if dataset == "sysu":
        protocols = product(("all", "indoor"), (1, 10), ("seeded", "official"))
        sections = [Section(dataset, None, *protocol) for protocol in protocols]
    else:
        sections = [Section(dataset, direction) for direction in ("v2i", "i2v")]
    return sections if table in ("regdb", "sysu") else sections[:1]


def has_splits(dataset: str) -> bool:
    """Tells whether a data set's trials are splits, each with a training, or gallery draws."""
    return dataset == "regdb"


# --- Options and command lines --------------------------------------------------------------------


def flags_of(values: Options) -> list[str]:
    """Returns options as command-line flags; True is a switch, a sequence several values."""
    flags = []
    for name, value in values.items():
        several = value if isinstance(value, list | tuple) else [value]
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, several))]
    return flags


@functools.cache
def _parser(train: bool) -> Any:
    text = "flags of the training scripts, for `reproduce.py run`"
    return options.train_parser(text) if train else options.test_parser("")


def resolve(script: str, values: Options) -> dict[str, Any]:
    """Returns all options of a script as plain values, as it understands those given."""
    train = script != "test.py"
    args = _parser(train).parse_args(flags_of(values))
    if train:
        return options.to_json(options.resolve(args, script)[0])
    return options.to_json(options.resolve_evaluation(args))


def given_options(flags: Sequence[str]) -> dict[str, Any]:
    """Returns what training flags ask for other than the defaults; unknown ones end the program.

    Raises:
        ValueError: When the tables decide one of them.
    """
    given, default = (vars(_parser(True).parse_args(words)) for words in (list(flags), []))
    extra = {name: value for name, value in given.items() if value != default[name]}
    for name in FIXED:
        if name in extra:
            raise ValueError(f"--{name} is decided by the table; leave it out")
    return extra


def influential(values: Options) -> dict[str, Any]:
    """Returns the options that a number depends on."""
    silent = ("data_path", *options.INCIDENTAL)
    return {name: value for name, value in values.items() if name not in silent}


# --- The commands behind a table ------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of a table and where its numbers come from.

    Attributes:
        section: The protocol.
        setting: The method or setting.
        checkpoint: "last" or "best".
        files: ``results.json`` of each trial, or a single one that holds all trials.
        trials: Trials that a complete row has.
        training: Folders of the trainings.
    """

    section: Section
    setting: Setting
    checkpoint: str
    files: tuple[Path, ...]
    trials: int
    training: tuple[Path, ...] = ()

    @property
    def re_rank(self) -> str:
        """The re-ranking's name, or "no"."""
        return self.setting.test.get("re_rank", "no")


@dataclass(frozen=True)
class Step:
    """One command: a script, its options, what they resolve to, and the folder it fills."""

    script: str
    options: Options
    resolved: Options
    folder: Path

    @property
    def trains(self) -> bool:
        """Whether it is a training, not an evaluation."""
        return self.script != "test.py"

    def state(self) -> str:
        """Returns what is there of it: "done", "begun" or "to do".

        Raises:
            ValueError: When the folder holds a training with other options, or a damaged file.
        """
        file = self.folder / ("options.json" if self.trains else "results.json")
        if not file.exists():
            return "to do"
        saved = read_json(file, "options")
        changed = [
            f"{name} {saved[name]!r} there, {value!r} here"
            for name, value in self.resolved.items()
            if name in saved and name not in options.INCIDENTAL and saved[name] != value
        ]
        if not self.trains:
            weights = Path(self.options["resume"])
            stale = weights.exists() and weights.stat().st_mtime > file.stat().st_mtime
            return "to do" if changed or stale else "done"
        if changed:
            raise ValueError(
                f"{self.folder} holds a run with other options ({'; '.join(changed)}): give "
                f"another folder with --runs, or do these anew with --again"
            )
        if not (self.folder / "last.pt").exists():
            return "to do"
        report = self.folder / "training.json"
        last = read_json(report, "last") if report.exists() else None
        return "done" if last and last["epoch"] == saved["epochs"] else "begun"

    def command(self, state: str, again: bool = False) -> list[str]:
        """Returns script and flags that resume a stopped training, or start afresh."""
        values = {**self.options, "output_dir": self.folder}
        if self.trains and again:
            values["overwrite"] = True
        elif self.trains and state == "begun":
            values["resume"] = True
        return [os.path.relpath(ROOT / self.script), *flags_of(values)]


def read_json(path: Path, entry: str) -> Any:
    """Returns an entry of a JSON file that a run has written.

    Raises:
        ValueError: When there is none.
    """
    try:
        return json.loads(path.read_text())[entry]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be used, {entry!r} cannot be read ({error!r}); remove it and run again"
        ) from error


def plan(
    table: str, *, dataset: str, runs: Path, trials: int, extra: Options
) -> tuple[list[Step], list[Row]]:
    """Returns the commands behind a table, each training before its evaluations, and its rows.

    Trainings that mean the same share a folder, and so do evaluations.

    Args:
        table: One of `TABLES`.
        dataset: Whose layout and protocol.
        runs: Folder of all runs.
        trials: Splits, each with a training, or gallery draws.
        extra: Options of every training and evaluation that has a use for them.
    """
    data: list[dict[str, Any]] = [{"dataset": dataset}]  # what each training is of
    draws = {"trials": trials}
    if has_splits(dataset):
        data, draws = [{"dataset": dataset, "trial": t + 1} for t in range(trials)], {}
    test_extra = {k: v for k, v in extra.items() if k in vars(_parser(False).parse_args([]))}
    test_data = [{**split, **draws, **test_extra} for split in data]
    rows = []
    steps: dict[Path, dict[Path, Step]] = {}  # of each training by folder, itself first
    folder_of: dict[str, Path] = {}  # what is trained -> its folder
    for setting in settings_of(table):
        trainings = []
        for split in data:
            own = {name.replace("-", "_"): value for name, value in setting.train.items()}
            useless = options.unused(setting.script, {**extra, **own})
            used = {name: value for name, value in extra.items() if name not in useless}
            values = {**split, **used, **own}
            resolved = resolve(setting.script, values)
            folder = runs / _folder_name(setting, split)
            folder = folder_of.setdefault(json.dumps([setting.script, resolved]), folder)
            steps.setdefault(folder, {folder: Step(setting.script, values, resolved, folder)})
            trainings.append(folder)
        sections = sections_of(table, dataset)
        for section in sections[:1] if setting.first_section_only else sections:
            asked = {**section.options, **setting.test}
            for checkpoint in ("last",) if setting.test else ("last", "best"):
                files = []
                for training, values in zip(trainings, test_data, strict=True):
                    step = _evaluation(training, checkpoint, values, asked)
                    steps[training].setdefault(step.folder, step)
                    files.append(step.folder / "results.json")
                row = Row(section, setting, checkpoint, tuple(files), trials, tuple(trainings))
                rows.append(row)
    return [step for group in steps.values() for step in group.values()], rows


def _evaluation(training: Path, checkpoint: str, values: Options, asked: Options) -> Step:
    folder = training / "_".join([*map(str, asked.values()), checkpoint])
    values = {**values, **asked, "resume": str(training / f"{checkpoint}.pt")}
    return Step("test.py", values, resolve("test.py", values), folder)


def _folder_name(setting: Setting, split: Options) -> str:
    words = [setting.script.removeprefix("train_").removesuffix(".py"), split["dataset"]]
    words += [str(word) for option in setting.train.items() for word in option]
    return "_".join([*words, *([f"trial{split['trial']}"] if "trial" in split else [])])


def check_lists(steps: Sequence[Step]) -> None:
    """Reads every list that the steps need, so that a wrong one is found before any work.

    Raises:
        DataError: A list is missing or wrong.
    """
    seen = set()
    for step in steps:
        names = ("dataset", "data_path", "trial")
        if not step.trains:
            names += ("direction", "mode", "gallery", "shots", "trials")
        values = tuple((name, step.resolved[name]) for name in names)
        if (step.trains, values) not in seen:
            seen.add((step.trains, values))
            (train_set if step.trains else eval_set)(**dict(values))
