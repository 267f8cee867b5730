"""Tables from ``results.json`` files: Markdown, LaTeX and CSV, with published numbers beside."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_manager import DATASETS
from eval_metrics import LOG_LINE, METRICS, REPORTED_RANKS, RESULT, mean_and_std
from networks.settings import HEALTH, LEVELS
from reproduction.plan import MEMORY_ABLATIONS, PAIRED, Row
from utils import read_json

TITLES = {f"rank{k}": f"Rank-{k}" for k in REPORTED_RANKS}  # of columns
ENTRY = {**RESULT, "test_feat": str, "dataset": str, "selection": str, "tta?": str}
ENTRY["per_trial"] = [dict.fromkeys(METRICS, float)]
RESULTS = {"rows": [ENTRY], "versions": {"commit": str}}  # of results.json, as `utils.parse_json`
PUBLISHED = Path(__file__).with_name("published.csv")  # percent


def published(dataset: str, protocol: str) -> dict[str, dict[str, str]]:
    """Returns the lines of ``published.csv`` under a protocol by method; {} where there are none.

    Each has percents by metric ("" where not known) and ``source``, where they were read.
    """
    options = DATASETS[dataset].protocols[protocol]
    wanted = {"dataset": dataset, **{name: str(value) for name, value in options.items()}}
    with PUBLISHED.open(newline="", encoding="utf-8") as stream:
        lines = csv.DictReader(stream)
        return {line["method"]: line for line in lines if wanted.items() <= line.items()}


# --- Reading results ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What the files of a row say."""

    row: Row
    missing: list[int]  # trial numbers, from 1, that are not there
    per_trial: dict[int, dict[str, float]]  # fractions by metric of the trials that are there
    mean: dict[str, float]  # likewise over trials; {} unless every trial is there
    std: dict[str, float]  # population standard deviations over trials, likewise
    read: list[dict[str, Any]]  # of each file its entry for the row, and the code's ``commit``


def measure(row: Row) -> Result:
    """Reads a row's files.

    Raises:
        ValueError: A file is no results file, or lacks the row's feature or re-ranking.
    """
    found: dict[int, dict[str, float]] = {}  # by trial
    read = []
    for number, file in enumerate(row.files, start=1):
        if file.exists():
            entry = _read_result(file, row)
            read.append(entry)
            # One file per trial: its mean over gallery draws is that trial's number.
            own = entry["per_trial"] if row.trials > len(row.files) else [entry]
            for trial, numbers in enumerate(own, start=number):
                found[trial] = {metric: numbers[metric] for metric in METRICS}
    wanted = range(1, row.trials + 1)  # a file may hold more trials
    missing = [trial for trial in wanted if trial not in found]
    mean, std = ({}, {}) if missing else mean_and_std([found[trial] for trial in wanted])
    return Result(row, missing, found, mean, std, read)


def _read_result(file: Path, row: Row) -> dict[str, Any]:
    content = read_json(file, RESULTS)
    feat = row.setting.test.get("test_feat")  # None: the first, which is the method's headline
    for entry in content["rows"]:
        if entry["re_rank"] == row.re_rank and feat in (None, entry["test_feat"]):
            return {"tta": "no", **entry, "commit": content["versions"]["commit"]}
    raise ValueError(
        f"{file} has no result with re-ranking {row.re_rank!r} and feature "
        f"{feat or 'of the method'!r}; remove it and run again"
    )


def _distinct(results: Sequence[Result], entry: str) -> str:
    """Returns the different values of an entry in all files of some rows, sorted."""
    return ", ".join(sorted({read[entry] for result in results for read in result.read}))


# --- Layout ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table as text: a title, a caption, a header and rows of cells, "-" where there is none."""

    title: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def _table(title: str, caption: str, columns: Sequence[str], lines: list[dict[str, str]]) -> Table:
    """Lays lines out under those columns in which some line has a value."""
    kept = [name for name in columns if any(line.get(name) for line in lines)]
    header = [TITLES.get(name, name.removeprefix("memory/").replace("_", " ")) for name in kept]
    return Table(title, caption, header, [[line.get(x) or "-" for x in kept] for line in lines])


def arrange(title: str, results: Sequence[Result]) -> list[Table]:
    """Lays rows out: one table for each protocol, kind of checkpoint, and re-ranked or not.

    Raises:
        ValueError: No file is there at all, or the files are of different data.
    """
    entries = [read for result in results for read in result.read]
    if not entries:
        raise ValueError("none of the table's results is there yet: reproduce.py run makes them")
    data = _distinct(results, "dataset")
    if len({e["dataset"] for e in entries}) > len({r.row.dataset for r in results if r.read}):
        raise ValueError(f"the results are of different data: {data}; use a folder each")
    caption = f"{title}. Data: {data}. Percent, mean +- population standard deviation over trials."
    if any(entry.get("stand_in") for entry in entries):
        caption += " Numbers on stand-in data say nothing of the real data set."
    caption += f" Code: {_distinct(results, 'commit')}."
    kinds: dict[tuple[str, str, bool], list[Result]] = {}
    for result in results:
        row = result.row
        kinds.setdefault((row.protocol, row.checkpoint, row.re_rank != "no"), []).append(result)
    tables = [_results_table(caption, own) for own in kinds.values()]
    if not any(result.row.setting.group for result in results):  # ablations compare with themselves
        ours = {result.row.setting.published for result in results}
        protocols = {result.row.protocol: result.row for result in results}
        tables += [_published_table(row, ours) for row in protocols.values()]
    tables.append(_health_table(caption, [result.row for result in results]))
    return [table for table in tables if table.rows]


def _results_table(caption: str, results: Sequence[Result]) -> Table:
    first, flip = results[0].row, _distinct(results, "tta")
    title = f"{first.title}, {_distinct(results, 'selection') or f'{first.checkpoint} epoch'}"
    title += "" if first.re_rank == "no" else ", re-ranked"
    title += f", tta: {flip}" if flip not in ("", "no") else ""
    known = published(first.dataset, first.protocol)
    lines = []
    for result in results:
        setting, ranking, trials = result.row.setting, result.row.re_rank, result.row.trials
        label = setting.name if ranking == "no" else f"{setting.name}, {ranking}"
        line = {"varied": setting.group, "method": label, "trials": str(trials)}
        if result.missing:
            absent = ", ".join(map(str, result.missing))
            line["trials"] = f"{trials - len(result.missing)} of {trials}, missing: {absent}"
            line |= dict.fromkeys(METRICS, "missing")
        for metric, mean in result.mean.items():
            spread = f" +- {100 * result.std[metric]:.2f}" if trials > 1 else ""
            line[metric] = f"{100 * mean:.2f}{spread}"
        theirs = known.get(setting.published)
        if theirs:
            line["published Rank-1 / mAP"] = f"{theirs['rank1']} / {theirs['mAP'] or '-'}"
            line["source"] = theirs["source"]
        lines.append(line)
    columns = ("varied", "method", *METRICS, "trials", "published Rank-1 / mAP", "source")
    return _table(title, caption, columns, lines)


def _published_table(row: Row, ours: set[str | None]) -> Table:
    known = published(row.dataset, row.protocol)
    lines = [line for method, line in known.items() if method not in ours]
    caption = "Published numbers in percent; nothing here was measured by this project."
    title = f"{row.title}, others as published"
    return _table(title, caption, ("method", *METRICS, "source"), lines)


def _health_table(caption: str, rows: Sequence[Row]) -> Table:
    """Returns the memory's health in the last epoch of each training that has it in its log."""
    names = [f"memory/{level}/{name}" for level in LEVELS for name in HEALTH]
    lines = []
    once = [row for row in rows if (row.protocol, row.checkpoint) == (rows[0].protocol, "last")]
    for row in (row for row in once if row.setting.group in (*MEMORY_ABLATIONS, *PAIRED)):
        files = [folder / "log.jsonl" for folder in row.training]
        logs = [read_json(file, LOG_LINE) if file.exists() else [] for file in files]
        if all(logs):
            last = [{name: log[-1][name] for name in names if name in log[-1]} for log in logs]
            cells = {name: f"{mean:.3g}" for name, mean in mean_and_std(last)[0].items()}
            if cells:
                lines.append({"varied": row.setting.group, "method": row.setting.name, **cells})
    caption += (
        " Memory health in training's last epoch, mean over trials: share of positions whose read "
        "is zero, prototypes above the threshold per position, share of prototypes used, entropy."
    )
    return _table("Memory health", caption, ("varied", "method", *names), lines)


# --- Formats --------------------------------------------------------------------------------------


def markdown(title: str, tables: Sequence[Table]) -> str:
    """Returns all tables as one Markdown page; the caption they share stands once, on top."""
    shared = tables[0].caption
    blocks = [f"# {title}", shared]
    for table in tables:
        blocks += [f"## {table.title}", table.caption.removeprefix(shared).strip()]
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        blocks.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(filter(None, blocks)).replace("+-", "±") + "\n"


def latex(tables: Sequence[Table]) -> str:
    """Returns each table as a `table` environment (package booktabs)."""
    escapes = {ord(character): f"\\{character}" for character in "&%$#_{}"}

    def clean(text: str) -> str:
        return text.translate(escapes).replace("+-", r"$\pm$")

    lines = []
    for table in tables:
        header, *rows = (" & ".join(map(clean, x)) + r" \\" for x in (table.header, *table.rows))
        lines += [r"\begin{table}", rf"\caption{{{clean(f'{table.title}. {table.caption}')}}}"]
        lines += [rf"\begin{{tabular}}{{{'l' * len(table.header)}}}", r"\toprule", header]
        lines += [r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def comma_separated(results: Sequence[Result]) -> str:
    """Returns one line a row: what it is, fractions with deviations, published percents."""
    lines = []
    for result in results:
        row, setting = result.row, result.row.setting
        line = {"section": f"{row.dataset} {row.protocol}", "varied": setting.group}
        line |= {"method": setting.name, "checkpoint": row.checkpoint, "re_rank": row.re_rank}
        line |= {"test_feat": setting.test.get("test_feat"), "trials": row.trials}
        line["missing"] = ", ".join(map(str, result.missing))
        for name in ("dataset", "selection", "tta", "commit"):
            line[name] = _distinct([result], name)
        theirs = published(row.dataset, row.protocol).get(setting.published, {})
        for name, numbers in (("mean", result.mean), ("std", result.std)):
            line |= {f"{metric}_{name}": numbers.get(metric) for metric in METRICS}
        line |= {f"published_{metric}_percent": theirs.get(metric) for metric in METRICS}
        lines.append({**line, "published_source": theirs.get("source")})
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
