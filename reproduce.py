"""The paper's tables, each from one command.

    python reproduce.py check --dataset regdb --data-path data/RegDB
    python reproduce.py run --table regdb --data-path data/RegDB --dry-run
    python reproduce.py run --table ablation --trials 2 --preset scratch --epochs 10
    python reproduce.py table --table regdb

`check` verifies a data folder. `run` prints the commands behind a table and runs those whose
results are missing; any flag of the training scripts may follow: all that use it get it.
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
from networks.checkpoint_file import load_checkpoint, save_checkpoint
from reproduction import paired, tables
from reproduction import plan as plans
from reproduction.check_data import check
from utils import make_writable_dir, read_json, user_errors, write_atomic, write_json


def run_command(args: argparse.Namespace, extra: Sequence[str]) -> None:
    """`run`: prints the commands, then runs those that are not done until one fails."""
    if args.unseen and args.table != "unseen":
        raise ValueError(f"--unseen has no effect on --table {args.table}: leave it out")
    about = {"dataset": args.dataset, "trials": _trials(args), "unseen": dict(args.unseen)}
    about["extra"] = plans.given_options(extra, args.table)
    steps = plans.choose(*plans.plan(args.table, runs=args.runs, **about), args.only)
    for step in steps:
        state = "done " if step.is_done() else "to do"
        sys.stdout.write(f"{state} python {shlex.join(step.command)}\n")
    if args.dry_run:
        return
    plans.check_lists(steps)
    write_json(make_writable_dir(args.runs) / f"{args.name}.json", about)
    for number, step in enumerate(steps, start=1):
        if step.is_done():
            continue
        mark, command = f"[{number}/{len(steps)}]", shlex.join(step.command)
        sys.stdout.write(f"{mark} python {command}\n")
        sys.stdout.flush()  # before the command's own output
        start = time.monotonic()
        code = subprocess.run([sys.executable, *step.command]).returncode
        if code:
            raise ValueError(
                f"this command ended with exit code {code}: python {command}; mend what it says "
                f"and repeat: what is done is kept"
            )
        if step.trains:  # half of last.pt is of no use to a complete run
            content = load_checkpoint(step.folder / "last.pt")
            content.pop("optimizer", None)
            save_checkpoint(step.folder / "last.pt", content)
        sys.stdout.write(f"{mark} done in {(time.monotonic() - start) / 60:.1f} min\n")


def _trials(args: argparse.Namespace) -> int:
    """Returns how many splits, seeds or gallery draws a table has, with or without --trials."""
    data = DATASETS[args.dataset]
    most = max(data.splits, data.gallery_draws)
    if args.table in plans.SEEDED:
        return args.trials or (plans.STUDY_SPLITS if args.table in plans.PAIRED else 1)
    if args.trials and args.trials > most:
        raise ValueError(f"--trials {args.trials}: {data.title} has {most}")
    one_split = args.table != data.name and data.splits > 1  # an ablation trains on one split
    return args.trials or (1 if one_split else most)


def table_command(args: argparse.Namespace) -> None:
    """`table`: writes Markdown, LaTeX and CSV beside the runs, and Markdown to the screen."""
    file = args.runs / f"{args.name}.json"
    if not file.exists():
        raise ValueError(f"{file} does not exist: `reproduce.py run --table {args.table}` first")
    schema = {"dataset": str, "trials": int, "extra": {}, "unseen?": {"*": (None, str)}}
    about = read_json(file, schema)
    _, rows = plans.plan(args.table, runs=args.runs, **about)
    results = [tables.measure(row) for row in rows]
    title = DATASETS[args.dataset].title
    title += "" if args.table in DATASETS else f", table {args.table}"
    silent = ("data_path", *options.INCIDENTAL)
    flags = options.flags_of({k: v for k, v in about["extra"].items() if k not in silent})
    note = f". Flags beyond the table's own: {shlex.join(flags)}" if flags else ""
    found = tables.arrange(title + note, results)
    if args.table in plans.PAIRED:
        found += _compared(results, args.runs / f"{args.name}_differences.png")
    texts = {"md": tables.markdown(title, found), "tex": tables.latex(found)}
    texts["csv"] = tables.comma_separated(results)
    for suffix, text in texts.items():
        file = args.runs / f"{args.name}_table.{suffix}"
        write_atomic(file, lambda stream, text=text: stream.write(text.encode()))
    sys.stdout.write(texts["md"])


def _compared(results: Sequence[tables.Result], path: Path) -> list[tables.Table]:
    """Draws the study's differences in mAP to the control; returns tables of all differences."""
    groups: dict[tuple[str, tuple[str, str]], list[tables.Result]] = {}
    for result in results:
        groups.setdefault((result.row.protocol, result.row.setting.references), []).append(result)
    panels, compared = {}, []
    for (_, references), own in groups.items():
        compared.append(paired.paired_table(own, references))
        if references == plans.REFERENCES:
            panels[own[0].row.words] = paired.differences(own, references[1], "mAP")
    if any(panels.values()):
        from figures import charts, page  # matplotlib takes a second to import

        title = "What each row gains over the control, in points of mAP"
        page.save(charts.differences(panels, title=title), path)
    return compared


def build_parser() -> options.Parser:
    """Returns the parser of the three commands."""
    parser = options.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("check", help="verify a data folder").add_argument
    add("--dataset", choices=DATASETS, required=True, help="whose layout to expect")
    add("--data-path", type=Path, required=True, help="the data folder")
    add("--skip-images", action="store_true", help="check lists and counts only, open no image")
    for name, text in (("run", "run a table's commands"), ("table", "write a table")):
        add = commands.add_parser(name, help=text).add_argument
        add("--table", choices=plans.TABLES, required=True, help="which table")
        add("--dataset", choices=DATASETS, help="of the ablations (default: regdb)")
        text = "folder of all runs (default: runs/reproduce)"
        add("--runs", type=Path, default=Path("runs/reproduce"), help=text)
    add = commands.choices["run"].add_argument
    text = "RegDB: splits 1..N; others: gallery draws (default: 10, RegDB's ablations 1); study, "
    text += "continued, unseen: trainings with the seeds 1..N (default: 5, 5, 1)"
    add("--trials", type=int, choices=range(1, 11), metavar="N", help=text)
    add("--dry-run", action="store_true", help="print the commands only")
    text = "--table unseen: data sets to evaluate on, and their folders (default: all others)"
    add("--unseen", nargs="+", type=_unseen, default=[], metavar="DATASET=FOLDER", help=text)
    text = "only rows whose section, group and name hold all of these texts"
    add("--only", nargs="+", default=[], metavar="TEXT", help=text)
    return parser


def _unseen(text: str) -> tuple[str, str | None]:
    name, _, folder = text.partition("=")
    if name not in DATASETS:
        raise argparse.ArgumentTypeError(f"expected {' or '.join(DATASETS)}, got {name}")
    return name, folder or None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    with user_errors():
        parser = build_parser()
        args, extra = parser.parse_known_args(argv)
        if extra and args.command != "run":
            parser.unknown(extra)
        if args.command == "check":
            findings = check(args.dataset, args.data_path, open_images=not args.skip_images)
            sys.stdout.write(findings.report())
            return 1 if findings.problems else 0
        dataset = args.table if args.table in DATASETS else args.dataset or "regdb"
        if args.dataset not in (None, dataset):
            raise ValueError(f"--table {args.table} is of --dataset {dataset}, not {args.dataset}")
        args.dataset = dataset
        args.name = dataset if args.table == dataset else f"{args.table}_{dataset}"
        if args.command == "run":
            run_command(args, extra)
        else:
            table_command(args)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command resumes\n")
        sys.exit(130)
