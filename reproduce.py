"""The paper's tables, each from one command.

    python reproduce.py check --dataset regdb --data-path data/RegDB
    python reproduce.py run --table regdb --data-path data/RegDB --dry-run
    python reproduce.py run --table ablation --trials 2 --preset scratch --epochs 10
    python reproduce.py table --table regdb

`check` looks a data folder through. `run` prints the commands behind a table and runs those whose
results are not there yet; any flag of the training scripts may follow and reaches all of them. When
it is stopped, the same command goes on. `table` writes what is there as Markdown, LaTeX and CSV.
"""

import argparse
import functools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import options
from data_manager import DATASETS, eval_set, train_set
from reproduction.check_data import check
from reproduction.tables import Row, arrange, comma_separated, data_in, latex, markdown
from utils import make_writable_dir, user_errors, write_json

HERE = Path(__file__).resolve().parent
TABLES = ("regdb", "sysu", "ablation", "memory")
# What the tables themselves decide: such flags can't follow on the command line.
FIXED = ("trial", "mode", "gallery", "shots", "direction", "tvsearch", "re_rank", "test_feat")
FIXED += ("method", "resume", "test_only", "overwrite", "output_dir", "model_path", "log_path")
FIXED += ("vis_log_path",)


@dataclass(frozen=True)
class Setting:
    """What a table varies.

    Attributes:
        name: The method, or the value of what is varied.
        script: The training script.
        flags: Of the training.
        group: What an ablation varies here; "" for methods.
        test_flags: Of the evaluation; with any, the last epoch alone is evaluated.
        health: Whether the memory's health is reported.
    """

    name: str
    script: str = "train_MGMRA.py"
    flags: tuple[str, ...] = ()
    group: str = ""
    test_flags: tuple[str, ...] = ()
    health: bool = False


METHODS = (
    Setting("HCT", "train_HCT.py"),
    Setting("SG-MRA", "train_SGMRA.py"),
    Setting("MG-MRA"),
    Setting("AGW", "train_HCT.py", ("--method", "agw")),
    Setting("AGW + MG-MRA", flags=("--method", "agw")),
)
# As the authors' README was probably made: its script re-ranks by default.
README_SETTING = Setting("MG-MRA", test_flags=("--re_rank", "k_reciprocal"))

# What is varied, its values' names and flags; all on MG-MRA. A value that is MG-MRA's own shares
# MG-MRA's training.
MEMORY_ABLATIONS = {
    "granularities": {
        "control: memory branch, no memory": "--memory-levels none",
        "part": "--memory-levels part",
        "+ instance": "--memory-levels instance",
        "+ semantic: MG-MRA": "",
    },
    "variant": {v: f"--memory-variant {v}" for v in ("paper", "released")},
    "lambda": {
        **{v: f"--shrink {v}" for v in ("0", "0.001", "0.0025", "0.005")},
        **{f"{c} / m": f"--shrink auto --shrink-scale {c}" for c in ("0.5", "1", "2")},
    },
    "T x R": {
        f"{t} x {r}": f"--instances-per-id {t} --parts-per-instance {r}"
        for t, r in ((1, 1), (1, 6), (5, 1), (5, 6), (10, 6))
    },
}
OTHER_ABLATIONS = {
    "loss weights": {
        "as published": "",
        "no memory identity": "--w_memory_id 0",
        "no memory triplet": "--w_memory_triplet 0",
        "no alignment": "--w_alignment 0",
        "decorrelation 0.01": "--w_decorrelation 0.01",
        "no stripe triplets": "--w_center 0",
    },
    "share_net": {str(k): f"--share_net {k}" for k in range(6)},
    "pooling p": {p: f"--gem-p {p}" for p in ("1", "3", "10")},
}


def settings_of(table: str) -> list[Setting]:
    """The settings of a table, in its order; "memory" is the part of "ablation" on the memory."""
    if table in ("regdb", "sysu"):
        return [*METHODS, README_SETTING]
    found = [Setting("none: HCT", "train_HCT.py", group="granularities")]
    for groups, health in ((MEMORY_ABLATIONS, True), (OTHER_ABLATIONS, False)):
        if health or table == "ablation":
            for group, values in groups.items():
                found += [
                    Setting(name, flags=tuple(flags.split()), group=group, health=health)
                    for name, flags in values.items()
                ]
    for feat in ("pcb", "memory", "both"):
        found.append(Setting(feat, group="test feature", test_flags=("--test-feat", feat)))
    if table == "ablation":
        for ranking in ("k_reciprocal", "random_walk"):
            flags = ("--re_rank", ranking)
            found.append(Setting("MG-MRA", group="re-ranking", test_flags=flags))
    return found


def protocols_of(table: str, dataset: str) -> dict[str, tuple[str, ...]]:
    """Flags of the protocols that a table has, by section key."""
    directions = {f"{dataset} {d}": ("--direction", d) for d in ("v2i", "i2v")}
    sysu = {
        f"sysu {mode} {shots} {gallery}": ("--mode", mode, "--shots", shots, "--gallery", gallery)
        for mode, shots, gallery in product(("all", "indoor"), ("1", "10"), ("seeded", "official"))
    }
    found = sysu if dataset == "sysu" else directions
    return found if table in ("regdb", "sysu") else dict(list(found.items())[:1])


def section_words(section: str) -> str:
    """A section's title."""
    dataset, key, *rest = section.split()
    name = DATASETS[dataset].title
    if dataset != "sysu":
        return f"{name}, {'visible to infrared' if key == 'v2i' else 'infrared to visible'}"
    shots = {"1": "single-shot", "10": "ten-shot"}[rest[0]]
    return f"{name}, {key}-search, {shots}, {rest[1]} gallery"


# --- The commands behind a table ------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One command: a script, its flags, what they resolve to, and the folder it fills."""

    script: str
    flags: tuple[str, ...]
    resolved: dict[str, Any]
    folder: Path

    @property
    def trains(self) -> bool:
        """Whether it is a training, not an evaluation."""
        return self.script != "test.py"

    def state(self) -> str:
        """What is there of it: "done", "begun" or "to do".

        Raises:
            ValueError: When the folder holds a run with other options.
        """
        file = self.folder / ("options.json" if self.trains else "results.json")
        if not file.exists():
            return "to do"
        saved = _read_json(file, "options")
        if not self.trains:
            return "done" if self._still_valid(file, saved) else "to do"
        differing = [
            f"{name} {saved[name]!r} there, {value!r} here"
            for name, value in self._differing(saved)
        ]
        if differing:
            raise ValueError(
                f"{self.folder} holds a run with other options ({'; '.join(differing)}): give "
                f"another folder with --runs, or do these anew with --again"
            )
        if not (self.folder / "last.pt").exists():
            return "to do"
        report = self.folder / "training.json"
        last = _read_json(report, "last") if report.exists() else None
        return "done" if last and last["epoch"] == saved["epochs"] else "begun"

    def _differing(self, saved: dict[str, Any]) -> list[tuple[str, Any]]:
        """Options, with their values here, that a saved run has otherwise."""
        return [
            (name, value)
            for name, value in self.resolved.items()
            if name in saved and name not in options.INCIDENTAL and saved[name] != value
        ]

    def _still_valid(self, results: Path, saved: dict[str, Any]) -> bool:
        """Whether an evaluation's results are of these options and not older than its weights."""
        checkpoint = Path(self.resolved["resume"])
        written = results.stat().st_mtime
        stale = checkpoint.exists() and checkpoint.stat().st_mtime > written
        return not stale and not self._differing(saved)

    def command(self, state: str, again: bool = False) -> tuple[str, ...]:
        """Script and flags, going on where a training was stopped, or afresh."""
        extra = ()
        if self.trains and again:
            extra = ("--overwrite",)
        elif self.trains and state == "begun":
            extra = ("--resume",)
        return (os.path.relpath(HERE / self.script), *self.flags, *extra)


def _read_json(path: Path, entry: str) -> Any:
    """An entry of a JSON file that a run has written."""
    try:
        return json.loads(path.read_text())[entry]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} can't be used, {entry!r} can't be read ({error!r}); remove it and run again"
        ) from error


@functools.cache
def _script_parser(*, train: bool) -> argparse.ArgumentParser:
    """Parser of the training scripts, or of ``test.py``."""
    text = "flags of the training scripts, for `reproduce.py run`"
    return options.train_parser(text) if train else options.test_parser("")


def _resolved(flags: Sequence[str], *, train: bool) -> dict[str, Any]:
    """What flags mean to a training script, or to ``test.py``."""
    args = _script_parser(train=train).parse_args(flags)
    (options.resolve if train else options.resolve_protocol)(args)
    return options.to_json(args)


def _each(flags: Sequence[str]) -> list[list[str]]:
    """Flags one by one, each with its values."""
    groups: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups


def _for_test(extra: Sequence[str]) -> list[str]:
    """Those of the flags that ``test.py`` knows too."""
    parser = _script_parser(train=False)
    return [word for flag in _each(extra) if not parser.parse_known_args(flag)[1] for word in flag]


def _telling(extra: Sequence[str]) -> str:
    """Those of the flags that a number depends on, as typed."""
    silent = ("data_path", *options.INCIDENTAL)
    kept = [
        f for f in _each(extra) if f[0].lstrip("-").split("=")[0].replace("-", "_") not in silent
    ]
    return shlex.join(word for flag in kept for word in flag)


def check_extra(extra: Sequence[str]) -> None:
    """Checks the flags that follow.

    Raises:
        ValueError: When one is decided by the table; unknown ones end the program.
    """
    parser = _script_parser(train=True)
    given, default = (vars(parser.parse_args(words)) for words in (list(extra), []))
    wrong = [name for name in FIXED if given[name] != default[name]]
    if wrong:
        raise ValueError(f"--{wrong[0]} is decided by the table; leave it out")


def plan(
    table: str, *, dataset: str, runs: Path, trials: int, extra: Sequence[str] = ()
) -> tuple[list[Step], list[Row]]:
    """The commands behind a table, each training before its evaluations, and the table's rows.

    Args:
        table: One of `TABLES`.
        dataset: Whose layout and protocol.
        runs: Folder of all runs.
        trials: RegDB: splits, each with a training; else gallery draws.
        extra: Flags for every training, and for every evaluation that knows them.
    """
    commands = _Commands(dataset, runs, trials, tuple(extra))
    rows = []
    for setting in settings_of(table):
        trainings = commands.train(setting)
        named = dict(zip(setting.test_flags[::2], setting.test_flags[1::2], strict=True))
        for section, protocol in protocols_of(table, dataset).items():
            if setting == README_SETTING and section not in ("regdb v2i", "sysu all 1 seeded"):
                continue
            for checkpoint in ("last",) if setting.test_flags else ("last", "best"):
                row = Row(
                    section=section,
                    group=setting.group,
                    name=setting.name,
                    checkpoint=checkpoint,
                    re_rank=named.get("--re_rank", "no"),
                    test_feat=named.get("--test-feat"),
                    files=commands.evaluate(setting, trainings, protocol, checkpoint),
                    trials=trials,
                    training=trainings if setting.health else (),
                )
                rows.append(row)
    return commands.in_order(), rows


class _Commands:
    """Collects trainings and evaluations; what is equal to an earlier one shares its folder."""

    def __init__(self, dataset: str, runs: Path, trials: int, extra: tuple[str, ...]) -> None:
        self._runs, self._dataset, self._extra = runs, dataset, extra
        self._test_extra = tuple(_for_test(extra))
        where = ("--dataset", dataset)
        regdb = dataset == "regdb"
        self._splits = tuple(range(1, trials + 1)) if regdb else (1,)
        self._train_where = [(*where, "--trial", str(t)) if regdb else where for t in self._splits]
        draws = () if regdb else ("--trials", str(trials))
        self._test_where = [(*flags, *draws) for flags in self._train_where]
        self._steps: dict[Path, Step] = {}
        self._homes: dict[str, Path] = {}  # what is trained -> its folder

    def train(self, setting: Setting) -> tuple[Path, ...]:
        """Adds a setting's trainings; returns their folders."""
        found = []
        for split, where in zip(self._splits, self._train_where, strict=True):
            flags = (*where, *self._extra, *setting.flags)
            what = json.dumps([setting.script, _resolved(flags, train=True)])
            name = _folder_name(setting, self._dataset, split)
            home = self._homes.setdefault(what, self._runs / name)
            if home not in self._steps:
                flags += ("--output-dir", str(home))
                self._steps[home] = Step(setting.script, flags, _resolved(flags, train=True), home)
            found.append(home)
        return tuple(found)

    def evaluate(
        self, setting: Setting, trainings: tuple[Path, ...], protocol: tuple[str, ...], name: str
    ) -> tuple[Path, ...]:
        """Adds the evaluations of the trainings' checkpoint `name`; returns their results files."""
        files = []
        for home, where in zip(trainings, self._test_where, strict=True):
            folder = home / "_".join([*protocol[1::2], *setting.test_flags[1::2], name])
            if folder not in self._steps:
                flags = (*where, *self._test_extra, *protocol, *setting.test_flags)
                flags += ("--resume", str(home / f"{name}.pt"), "--output-dir", str(folder))
                self._steps[folder] = Step("test.py", flags, _resolved(flags, train=False), folder)
            files.append(folder / "results.json")
        return tuple(files)

    def in_order(self) -> list[Step]:
        """All steps, each training directly followed by its evaluations."""
        order = {home: place for place, home in enumerate(self._homes.values())}
        return sorted(
            self._steps.values(), key=lambda s: order[s.folder if s.trains else s.folder.parent]
        )


def _folder_name(setting: Setting, dataset: str, split: int) -> str:
    words = [setting.script.removeprefix("train_").removesuffix(".py"), dataset]
    words += [word.lstrip("-") for word in setting.flags]
    return "_".join([*words, *([f"trial{split}"] if dataset == "regdb" else [])])


# --- Running them ---------------------------------------------------------------------------------


def check_lists(steps: Sequence[Step]) -> None:
    """Reads every list that the steps will need, so that a wrong one is found before all work."""
    seen = set()
    for step in steps:
        r = step.resolved
        names = ("trial",) if step.trains else ("trial", "direction", "mode", "gallery", "shots")
        names += () if step.trains else ("trials", "subset")
        key = (step.trains, r["dataset"], r["data_path"], *(r[name] for name in names))
        if key not in seen:
            seen.add(key)
            read = train_set if step.trains else eval_set
            read(r["dataset"], r["data_path"], **{name: r[name] for name in names})


def run(steps: Sequence[Step], *, again: bool, keep_going: bool) -> int:
    """Runs the steps that are not done; returns the exit code.

    Raises:
        ValueError: When a step fails, unless `keep_going`.
    """
    taken: dict[bool, list[float]] = {True: [], False: []}
    failed = []
    for number, step in enumerate(steps, start=1):
        state = "to do" if again else step.state()
        mark = f"[{number}/{len(steps)}]"
        if state == "done":
            continue
        if not step.trains and not Path(step.resolved["resume"]).exists():
            failed.append(step)
            sys.stdout.write(f"{mark} skipped, its training failed: {step.folder}\n")
            continue
        command = step.command(state, again)
        sys.stdout.write(f"{mark} python {shlex.join(command)}\n")
        sys.stdout.flush()
        start = time.monotonic()
        code = subprocess.run([sys.executable, *command]).returncode
        taken[step.trains].append(time.monotonic() - start)
        if code:
            failed.append(step)
            if not keep_going:
                raise ValueError(
                    f"this command ended with exit code {code}: python {shlex.join(command)}; "
                    f"mend what it says and repeat: what is done is kept (--keep-going goes on)"
                )
        left = _seconds_left(steps[number:], taken, again)
        sys.stdout.write(
            f"{mark} {f'failed, exit code {code}' if code else 'done'} in "
            f"{_minutes(taken[step.trains][-1])}; {len(steps) - number} left, about "
            f"{_minutes(left)}\n"
        )
    for step in failed:
        sys.stdout.write(f"failed: python {shlex.join(step.command('to do'))}\n")
    return int(bool(failed))


def _seconds_left(steps: Sequence[Step], taken: dict[bool, list[float]], again: bool) -> float:
    """Estimate from the mean of each kind of step so far."""
    means = {kind: sum(times) / max(len(times), 1) for kind, times in taken.items()}
    return sum(means[step.trains] for step in steps if again or step.state() != "done")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _run_command(args: argparse.Namespace, extra: list[str]) -> int:
    """`run`: prints the plan, keeps its rows for `table`, runs the steps."""
    check_extra(extra)
    dataset = args.table if args.table in ("regdb", "sysu") else args.dataset or "regdb"
    if args.dataset not in (None, dataset):
        raise ValueError(f"--table {args.table} is of --dataset {dataset}, not {args.dataset}")
    ablating = args.table in ("ablation", "memory")
    trials = args.trials or (1 if ablating and dataset == "regdb" else 10)
    if trials > 10:
        raise ValueError(f"--trials {trials}: there are 10 splits and gallery draws")
    steps, rows = plan(args.table, dataset=dataset, runs=args.runs, trials=trials, extra=extra)
    wanted = {
        path.parent
        for row in rows
        for path in row.files
        if all(word in f"{row.section} {row.group} {row.name}" for word in args.only)
    }
    steps = [s for s in steps if s.folder in wanted or any(s.folder in w.parents for w in wanted)]
    if not steps:
        raise ValueError(f"--only {' '.join(args.only)} leaves no row of the table")
    for step in steps:
        state = "to do" if args.again else step.state()
        command = shlex.join(step.command(state, args.again))
        sys.stdout.write(f"{state:6} python {command}\n")
    sys.stdout.flush()
    if args.dry_run:
        return 0
    check_lists(steps)
    content = {"table": args.table, "dataset": dataset, "extra": extra}
    content["rows"] = [asdict(row) for row in _relative(rows, args.runs)]
    write_json(make_writable_dir(args.runs) / _plan_name(args.table, dataset), content)
    return run(steps, again=args.again, keep_going=args.keep_going)


def _plan_name(table: str, dataset: str) -> str:
    return f"{table}.json" if table == dataset else f"{table}_{dataset}.json"


def _relative(rows: Sequence[Row], runs: Path) -> Iterator[Row]:
    """Rows with paths relative to the folder of runs, which may be moved."""
    for row in rows:
        inside = {k: tuple(p.relative_to(runs) for p in getattr(row, k)) for k in PATHS}
        yield Row(**{**vars(row), **inside})


PATHS = ("files", "training")


def _table_command(args: argparse.Namespace) -> int:
    """`table`: writes Markdown, LaTeX and CSV beside the plan, and Markdown to the screen."""
    dataset = args.table if args.table in ("regdb", "sysu") else args.dataset or "regdb"
    file = args.runs / _plan_name(args.table, dataset)
    if not file.exists():
        raise ValueError(f"{file} does not exist: `reproduce.py run --table {args.table}` first")
    rows = [
        Row(**{**row, **{k: tuple(args.runs / p for p in row[k]) for k in PATHS}})
        for row in _read_json(file, "rows")
    ]
    kind = {"ablation": "Ablations, ", "memory": "Ablations of the memory, "}.get(args.table, "")
    title = kind + DATASETS[dataset].title
    flags = _telling(_read_json(file, "extra"))
    note = f"Flags beyond the table's own: {flags}." if flags else ""
    found = arrange(title, rows, section_words, trials=args.trials, note=note)
    texts = {
        "md": markdown(f"{title}: {data_in(rows, args.trials)}", found),
        "tex": latex(found),
        "csv": comma_separated(args.table, rows, args.trials),
    }
    for suffix, text in texts.items():
        target = make_writable_dir(args.out or args.runs) / f"{file.stem}_table.{suffix}"
        target.write_text(text, encoding="utf-8")
    sys.stdout.write(texts["md"])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("check", help="verify a data folder", allow_abbrev=False).add_argument
    add("--dataset", choices=options.DATASETS, required=True)
    add("--data-path", type=Path, required=True)
    add("--workers", type=int, default=4, help="threads that open images")
    add("--skip-images", action="store_true", help="lists and counts only, open no image")
    for name in ("run", "table"):
        text = "run a table's commands" if name == "run" else "write a table"
        add = commands.add_parser(name, help=text, allow_abbrev=False).add_argument
        add("--table", choices=TABLES, required=True)
        add("--dataset", choices=options.DATASETS, help="of the ablations (default: regdb)")
        add("--runs", type=Path, default=Path("runs/reproduce"), help="folder of all runs")
        help_text = "RegDB: splits 1..N; others: gallery draws (default: 10, RegDB's ablations 1)"
        add("--trials", type=int, choices=range(1, 11), metavar="N", help=help_text)
        if name == "table":
            add("--out", type=Path, help="folder to write to (default: that of the runs)")
            continue
        add("--dry-run", action="store_true", help="print the commands only")
        add("--again", action="store_true", help="run all anew, in place of what is missing")
        add("--keep-going", action="store_true", help="go on when a command fails")
        help_text = "rows only whose section, group and name hold all of these words"
        add("--only", nargs="+", default=[], metavar="TEXT", help=help_text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = _parser()
    args, extra = parser.parse_known_args(argv)
    if extra and args.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    with user_errors():
        if args.command == "check":
            findings = check(
                args.dataset,
                args.data_path,
                workers=args.workers,
                open_images=not args.skip_images,
            )
            sys.stdout.write(findings.report())
            return 0 if findings.good else 1
        return _run_command(args, extra) if args.command == "run" else _table_command(args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on\n")
        sys.exit(130)
