"""Keeps the numbers of the study, and writes the tables and the figure of `study.md` from them.

python -m docs.study_numbers --runs runs/reproduce    # adds what is there of `TABLES`
python -m docs.study_numbers                          # tables and figure from study.csv alone
"""

import argparse
import csv
import json
import math
import sys
from pathlib import Path

from docs.memory_numbers import replace_block, table
from eval_metrics import METRICS, mean_and_std
from figures import charts, page
from networks.settings import HEALTH, LEVELS
from reproduction.paired import differences, paired_table
from reproduction.plan import AGW_REFERENCES, REFERENCES, STUDY_SPLITS, Row, plan
from reproduction.tables import Result

NUMBERS, PAGE, FIGURE = (Path(__file__).with_name(f"study.{x}") for x in ("csv", "md", "png"))
HEALTH_NAMES = [f"{level}/{name}" for level in LEVELS for name in HEALTH if name != "entropy"]
KEY = ["table", "method", "split", "direction"]
COLUMNS = [*KEY, *METRICS, *HEALTH_NAMES, "data", "commit"]
TABLES = {  # table and data set of `reproduce.py`
    "continued": ("continued", "regdb"),
    "study": ("study", "regdb"),
    "sysu": ("continued", "sysu"),
}
PANELS = {"continued": "from a common start", "study": "from random weights"}
SYSU = "all 1 seeded"  # all-search, single-shot
# Folders of evaluations on data of other layouts, below that of a training.
UNSEEN = {"unseen_sysu": "SYSU-MM01's layout", "unseen_llcm": "LLCM's layout"}


def rows_of(table_name: str, runs: Path) -> list[Row]:
    """A table's rows, whether they have been run or not."""
    name, dataset = TABLES[table_name]
    return plan(name, dataset=dataset, runs=runs, trials=STUDY_SPLITS, extra={})[1]


def collect(runs: Path) -> list[dict[str, str]]:
    """One line for each result in a folder of runs, with the memory's health in the last epoch."""
    lines = []
    for table_name, row in ((name, row) for name in TABLES for row in rows_of(name, runs)):
        for split, (file, training) in enumerate(zip(row.files, row.training, strict=True), 1):
            others = {name: training / name / "results.json" for name in UNSEEN}
            for direction, found in {row.protocol: file, **others}.items():
                if not found.exists():
                    continue
                result = json.loads(found.read_text())
                health = json.loads((training / "log.jsonl").read_text().splitlines()[-1])
                about = json.loads((training / "options.json").read_text())
                line = {"table": table_name, "method": row.setting.name, "split": split}
                line["direction"] = direction
                line |= {metric: f"{result[metric]:.4f}" for metric in METRICS}
                known = {name: health.get(f"memory/{name}") for name in HEALTH_NAMES}
                line |= {k: "" if v is None else f"{v:.3g}" for k, v in known.items()}
                line |= {"data": result["dataset"], "commit": about["versions"]["commit"]}
                lines.append({name: str(value) for name, value in line.items()})
    return lines


def results(lines: list[dict[str, str]], table_name: str, direction: str) -> list[Result]:
    """A table's rows with what the lines say of them, in one direction."""
    found = []
    for row in rows_of(table_name, Path()):
        if row.protocol not in ("v2i", SYSU):
            continue
        key = (table_name, row.setting.name, direction)
        own = [x for x in lines if (x["table"], x["method"], x["direction"]) == key]
        per_trial = {int(x["split"]): {m: float(x[m]) for m in METRICS} for x in own}
        mean, std = mean_and_std(list(per_trial.values())) if own else ({}, {})
        missing = [t for t in range(1, row.trials + 1) if t not in per_trial]
        found.append(Result(row, missing, per_trial, mean, std, []))
    return found


def main() -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="folder of runs, whose results are added")
    args = parser.parse_args()
    lines = list(csv.DictReader(NUMBERS.read_text().splitlines()))
    if args.runs:
        known = {tuple(line[k] for k in KEY): line for line in [*lines, *collect(args.runs)]}
        lines = list(known.values())
        with NUMBERS.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    text = PAGE.read_text()
    panels = {}
    for name, words in PANELS.items():
        for direction in ("v2i", "i2v"):
            for block, references in (("", REFERENCES), ("agw ", AGW_REFERENCES)):
                own = results(lines, name, direction)
                own = [each for each in own if each.row.setting.references == references]
                text = replace_block(text, f"{name} {block}{direction}", results_table(own))
                if (block, direction) == ("", "v2i"):
                    panels[words] = differences(own, references[1], "mAP")
    for block, table_name, direction in (
        *((name, "continued", name) for name in UNSEEN),
        (f"sysu {SYSU}", "sysu", SYSU),
    ):
        own = results(lines, table_name, direction)
        own = [each for each in own if each.row.setting.references == REFERENCES]
        text = replace_block(text, block, results_table(own))
    PAGE.write_text(replace_block(text, "health", health_table(lines)))
    title = "What each row gains over the control, in points of mAP (visible to infrared)"
    page.save(charts.differences(panels, title=title), FIGURE)
    return 0


def results_table(own: list[Result]) -> str:
    """Rank-1 and mAP of each row, and its paired differences to their references."""
    references = own[0].row.setting.references
    paired = {row[0]: row[2:] for row in paired_table(own, references).rows}
    cells = []
    for result in (result for result in own if result.per_trial):
        name = result.row.setting.name
        numbers = [f"{100 * result.mean[m]:.1f}" for m in ("rank1", "mAP")]
        if len(result.per_trial) > 1:
            spread = [f"{100 * result.std[m]:.1f}" for m in ("rank1", "mAP")]
            numbers = [f"{a} ± {b}" for a, b in zip(numbers, spread, strict=True)]
        gained = [cell.replace("+-", "±") for cell in paired.get(name, ("-",) * 4)]
        cells.append([name, str(len(result.per_trial)), *numbers, *gained])
    header = ["method", "splits", "Rank-1", "mAP"]
    for reference in (references[0], "control"):
        header += [f"Rank-1 - {reference}", f"mAP - {reference}"]
    return table(header, cells)


def health_table(lines: list[dict[str, str]]) -> str:
    """Usage statistics of the memories trained from a common start, means over their splits."""
    rows = []
    lines = [x for x in lines if (x["table"], x["direction"]) == ("continued", "v2i")]
    for name in dict.fromkeys(row.setting.name for row in rows_of("continued", Path())):
        own = [x for x in lines if x["method"] == name and x["part/zero_reads"]]
        if own:
            known = ([float(x[column]) for x in own if x[column]] for column in HEALTH_NAMES)
            means = [sum(values) / len(values) if values else math.nan for values in known]
            cells = [f"{x:.0f}" if x >= 100 else f"{x:.2g}" for x in means]
            rows.append([name, *(cell.replace("nan", "-") for cell in cells)])
    return table(["method", *(name.replace("_", " ") for name in HEALTH_NAMES)], rows)


if __name__ == "__main__":
    sys.exit(main())
