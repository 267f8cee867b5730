"""The paper's tables, each from one command.

    python reproduce.py check --dataset regdb --data-path data/RegDB
    python reproduce.py run --table regdb --data-path data/RegDB --dry-run
    python reproduce.py run --table ablation --trials 2 --preset scratch --epochs 10
    python reproduce.py table --table regdb

`check` verifies a data folder. `run` prints the commands behind a table and runs those whose
results are missing; any flag of the training scripts may follow and reaches each that uses it.
When it is stopped, the same command resumes. `table` writes what is there as Markdown, LaTeX and
CSV.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import options
from data_manager import DATASETS
from reproduction import tables
from reproduction.check_data import check
from reproduction.plan import (
    TABLES,
    Row,
    Step,
    check_lists,
    flags_of,
    given_options,
    plan,
    read_json,
)
from utils import make_writable_dir, user_errors, write_json


def run_command(args: argparse.Namespace, extra: Sequence[str]) -> int:
    """`run`: prints the commands, then runs those that are not done; returns the exit code."""
    dataset = _dataset(args)
    data = DATASETS[dataset]
    most = max(data.splits, data.gallery_draws)
    # An ablation trains on one split unless told otherwise.
    trials = min(args.trials or (1 if args.table != dataset and data.splits > 1 else most), most)
    about = {"dataset": dataset, "trials": trials, "extra": given_options(extra)}
    steps, rows = plan(args.table, runs=args.runs, **about)
    steps = _wanted(steps, rows, args.only)
    for step in steps:
        state = "to do" if args.again else step.state()
        sys.stdout.write(f"{state:6} python {shlex.join(step.command(state, args.again))}\n")
    sys.stdout.flush()
    if args.dry_run:
        return 0
    check_lists(steps)
    write_json(make_writable_dir(args.runs) / f"{_plan_name(args)}.json", about)
    return run_steps(steps, again=args.again, keep_going=args.keep_going)


def _dataset(args: argparse.Namespace) -> str:
    dataset = args.table if args.table in DATASETS else args.dataset or "regdb"
    if args.dataset not in (None, dataset):
        raise ValueError(f"--table {args.table} is of --dataset {dataset}, not {args.dataset}")
    return dataset


def _plan_name(args: argparse.Namespace) -> str:
    return args.table if args.table in DATASETS else f"{args.table}_{_dataset(args)}"


def _wanted(steps: Sequence[Step], rows: Sequence[Row], texts: Sequence[str]) -> list[Step]:
    """Returns the evaluations of the rows that hold all texts, and their trainings."""
    folders: set[Path] = set()
    for row in rows:
        title = f"{row.section.dataset} {row.section.protocol} {row.setting.group} "
        if all(text in title + row.setting.name for text in texts):
            folders.update(row.training, (file.parent for file in row.files))
    if not folders:
        raise ValueError(f"--only {' '.join(texts)} leaves no row of the table")
    return [step for step in steps if step.folder in folders]


def run_steps(steps: Sequence[Step], *, again: bool, keep_going: bool) -> int:
    """Runs the steps that are not done; returns the exit code.

    Raises:
        ValueError: When a step fails, unless `keep_going`.
    """
    failed = []
    for number, step in enumerate(steps, start=1):
        state = "to do" if again else step.state()
        mark = f"[{number}/{len(steps)}]"
        if state == "done":
            continue
        if not step.trains and not Path(step.options["resume"]).exists():
            failed.append(step)
            sys.stdout.write(f"{mark} skipped, its training failed: {step.folder}\n")
            continue
        command = step.command(state, again)
        sys.stdout.write(f"{mark} python {shlex.join(command)}\n")
        sys.stdout.flush()
        start = time.monotonic()
        code = subprocess.run([sys.executable, *command]).returncode
        if code:
            failed.append(step)
            if not keep_going:
                raise ValueError(
                    f"this command ended with exit code {code}: python {shlex.join(command)}; "
                    f"mend what it says and repeat: what is done is kept (--keep-going goes on)"
                )
        result = f"failed, exit code {code}" if code else "done"
        sys.stdout.write(f"{mark} {result} in {(time.monotonic() - start) / 60:.1f} min\n")
    for step in failed:
        sys.stdout.write(f"failed: python {shlex.join(step.command('to do'))}\n")
    return int(bool(failed))


def table_command(args: argparse.Namespace) -> int:
    """`table`: writes Markdown, LaTeX and CSV beside the runs, and Markdown to the screen."""
    file = args.runs / f"{_plan_name(args)}.json"
    if not file.exists():
        raise ValueError(f"{file} does not exist: `reproduce.py run --table {args.table}` first")
    about = {name: read_json(file, name) for name in ("dataset", "trials", "extra")}
    _, rows = plan(args.table, runs=args.runs, **about)
    results = [tables.measure(row, args.trials) for row in rows]
    kind = {"ablation": "Ablations, ", "memory": "Ablations of the memory, "}.get(args.table, "")
    title = kind + DATASETS[about["dataset"]].title
    silent = ("data_path", *options.INCIDENTAL)
    flags = shlex.join(flags_of({k: v for k, v in about["extra"].items() if k not in silent}))
    note = f"Flags beyond the table's own: {flags}." if flags else ""
    found = tables.arrange(title, results, note=note)
    texts = {
        "md": tables.markdown(f"{title}: {tables.data_in(results)}", found),
        "tex": tables.latex(found),
        "csv": tables.comma_separated(args.table, results),
    }
    folder = make_writable_dir(args.out or args.runs)
    for suffix, text in texts.items():
        (folder / f"{file.stem}_table.{suffix}").write_text(text, encoding="utf-8")
    sys.stdout.write(texts["md"])
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the three commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("check", help="verify a data folder", allow_abbrev=False).add_argument
    add("--dataset", choices=DATASETS, required=True, help="whose layout to expect")
    add("--data-path", type=Path, required=True, help="the data folder")
    add("--workers", type=int, default=4, help="threads that open images (default: 4)")
    add("--skip-images", action="store_true", help="check lists and counts only, open no image")
    for name in ("run", "table"):
        text = "run a table's commands" if name == "run" else "write a table"
        add = commands.add_parser(name, help=text, allow_abbrev=False).add_argument
        add("--table", choices=TABLES, required=True, help="which table")
        add("--dataset", choices=DATASETS, help="of the ablations (default: regdb)")
        text = "folder of all runs (default: runs/reproduce)"
        add("--runs", type=Path, default=Path("runs/reproduce"), help=text)
        text = "RegDB: splits 1..N; others: gallery draws (default: 10, RegDB's ablations 1)"
        add("--trials", type=int, choices=range(1, 11), metavar="N", help=text)
    add("--out", type=Path, help="folder to write to (default: that of the runs)")
    add = commands.choices["run"].add_argument
    add("--dry-run", action="store_true", help="print the commands only")
    add("--again", action="store_true", help="run everything anew, not only what is missing")
    add("--keep-going", action="store_true", help="continue when a command fails")
    text = "only rows whose section, group and name hold all of these texts"
    add("--only", nargs="+", default=[], metavar="TEXT", help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = build_parser()
    args, extra = parser.parse_known_args(argv)
    if extra and args.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    with user_errors():
        if args.command == "run":
            return run_command(args, extra)
        if args.command == "table":
            return table_command(args)
        images = not args.skip_images
        findings = check(args.dataset, args.data_path, workers=args.workers, open_images=images)
        sys.stdout.write(findings.report())
        return 0 if findings.good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command resumes\n")
        sys.exit(130)
