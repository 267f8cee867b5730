"""Tables from ``results.json`` files: Markdown, LaTeX and CSV, with published numbers beside.

A row names the files of its numbers: one for each trial, or one for all. A trial that is not there
is shown as missing, and its row has no mean. Last epochs, best epochs and re-ranked rows stand in
tables of their own; every caption names the data. The published numbers and where each was read are
in ``published.csv``.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_manager import DATASETS
from eval_metrics import METRICS, mean_and_std
from networks.settings import HEALTH, LEVELS
from reproduction.plan import MEMORY_ABLATIONS, Row, Section

HEADERS = ("Rank-1", "Rank-5", "Rank-10", "Rank-20", "mAP", "mINP")  # of METRICS
CHECKPOINTS = {"last": "last epoch", "best": "best epoch"}  # titles where no result is there
KINDS = (*CHECKPOINTS, "re-ranked")  # a table each
PUBLISHED = Path(__file__).with_name("published.csv")  # percent


def published(section: Section) -> dict[str, dict[str, str]]:
    """Returns the lines of ``published.csv`` under a protocol by method; {} where there are none.

    Each has percents by metric ("" where not known) and ``source``, where they were read.
    """
    wanted = {"dataset": section.dataset, **{k: str(v) for k, v in section.options.items()}}
    with PUBLISHED.open(newline="", encoding="utf-8") as stream:
        lines = [line for line in csv.DictReader(stream) if wanted.items() <= line.items()]
    for line in lines:
        line["source"] += f"; {line['note']}" if line["note"] else ""
    return {line["method"]: line for line in lines}


def _percent(line: dict[str, str], metric: str) -> str:
    return f"{float(line[metric]):.2f}" if line.get(metric) else "-"


# --- Reading results ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What the files of a row say.

    Attributes:
        row: The row.
        trials: Trials asked for.
        missing: Trial numbers, from 1, that are not there.
        mean: Fractions by metric; {} unless every trial is there.
        std: Population standard deviations over trials, likewise.
        read: Of each file its entry for the row, with the ``commit`` of the code that wrote it.
    """

    row: Row
    trials: int
    missing: list[int]
    mean: dict[str, float]
    std: dict[str, float]
    read: list[dict[str, Any]]


def measure(row: Row, trials: int | None = None) -> Result:
    """Reads a row's files; of their trials the first `trials` only, where it is given.

    Raises:
        ValueError: A file is no results file, or lacks the row's feature or re-ranking.
    """
    expected = min(row.trials, trials or row.trials)
    all_in_one = len(row.files) == 1 and row.trials > 1
    per_trial: dict[int, dict[str, float]] = {}
    read = []
    for number, file in enumerate(row.files if all_in_one else row.files[:expected], start=1):
        if file.exists():
            read.append(_read_result(file, row))
            numbers = read[-1]["per_trial"][:expected] if all_in_one else read[-1:]
            for trial, values in enumerate(numbers, start=number):
                per_trial[trial] = {m: values[m] for m in METRICS}
    missing = [t for t in range(1, expected + 1) if t not in per_trial]
    mean, std = ({}, {}) if missing else mean_and_std(list(per_trial.values()))
    return Result(row, expected, missing, mean, std, read)


def _read_result(file: Path, row: Row) -> dict[str, Any]:
    feat = row.setting.test.get("test_feat")  # None: the first, which is the method's headline
    try:
        content = json.loads(file.read_text())
        wanted = (row.re_rank, feat or content["rows"][0]["test_feat"])
        found = [r for r in content["rows"] if (r["re_rank"], r["test_feat"]) == wanted]
        return {**found[0], "commit": content["versions"]["commit"]}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{file} has no result with re-ranking {row.re_rank!r} and feature "
            f"{feat or 'of the method'!r} ({error!r}); remove it and run again"
        ) from error


def _distinct(results: Sequence[Result], entry: str) -> list[str]:
    """Returns the different values of an entry in all files of some rows, sorted."""
    return sorted({str(read[entry]) for result in results for read in result.read})


def is_stand_in(result: Result) -> bool:
    """Tells whether a row is of stand-in data."""
    title = DATASETS[result.row.section.dataset].title
    # Files written before there was such a field have only the data's name.
    return any(read.get("stand_in", read["dataset"] != title) for read in result.read)


def health(row: Row) -> dict[str, float]:
    """Returns the memory's health in a row's last epochs, mean over its trainings.

    {} unless all of them are there.
    """
    last_epochs = []
    for folder in row.training:
        try:
            last = json.loads((folder / "log.jsonl").read_text().strip().splitlines()[-1])
        except (OSError, IndexError, ValueError):
            return {}
        last_epochs.append({k: v for k, v in last.items() if k.startswith("memory/")})
    return mean_and_std(last_epochs)[0]


# --- Layout ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table as text: a title, a caption, a header and rows of cells."""

    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def data_in(results: Sequence[Result]) -> str:
    """Returns the name of the data that all results are of.

    Raises:
        ValueError: No result is there at all, or they are of different data.
    """
    data = _distinct(results, "dataset")
    if not data:
        raise ValueError("none of the table's results is there yet: reproduce.py run makes them")
    if len(data) > 1:
        raise ValueError(f"the results are of different data: {', '.join(data)}; use a folder each")
    return data[0]


def arrange(title: str, results: Sequence[Result], *, note: str = "") -> list[Table]:
    """Lays rows out: one table for each protocol, kind of checkpoint, and re-ranked or not.

    Args:
        title: The title of the whole.
        results: In the order to print.
        note: Added to each caption.

    Raises:
        ValueError: No file is there at all, or the files are of different data.
    """
    ablation = any(result.row.setting.group for result in results)  # compares with itself
    data = data_in(results)
    caption = f"{title}. Data: {data}."
    caption += " Percent, mean +- population standard deviation over trials."
    if any(map(is_stand_in, results)):
        caption += " Numbers on stand-in data say nothing of the real data set's"
        caption += "." if ablation else "; the published ones are of the real data set."
    caption += f" Code: {', '.join(_distinct(results, 'commit'))}.{f' {note}' if note else ''}"
    ours = {result.row.setting.published for result in results}
    tables = []
    for section in dict.fromkeys(result.row.section for result in results):
        here = [result for result in results if result.row.section == section]
        for kind in KINDS:
            chosen = [result for result in here if _kind(result.row) == kind]
            if chosen:
                tables.append(_results_table(section, kind, caption, chosen))
        others = {k: v for k, v in published(section).items() if k not in ours}
        if others and not ablation:
            tables.append(_published_table(section, others))
    return [*tables, *_health_tables(caption, [result.row for result in results])]


def _kind(row: Row) -> str:
    return row.checkpoint if row.re_rank == "no" else "re-ranked"


def _results_table(section: Section, kind: str, caption: str, results: Sequence[Result]) -> Table:
    selection = ", ".join(_distinct(results, "selection"))
    title = f"{section.title}, {selection or CHECKPOINTS[results[0].row.checkpoint]}"
    title += ", re-ranked" if kind == "re-ranked" else ""
    grouped = any(result.row.setting.group for result in results)
    known = published(section)
    with_published = any(result.row.setting.published in known for result in results)
    header = (("varied",) if grouped else ()) + ("method", *HEADERS, "trials")
    header += ("published Rank-1 / mAP", "source") if with_published else ()
    lines = []
    for result in results:
        setting, ranking = result.row.setting, result.row.re_rank
        label = setting.name if ranking == "no" else f"{setting.name}, {ranking}"
        line = ((setting.group,) if grouped else ()) + (label, *_cells(result))
        if with_published:
            theirs = known.get(setting.published)
            numbers = f"{_percent(theirs, 'rank1')} / {_percent(theirs, 'mAP')}" if theirs else "-"
            line += (numbers, theirs["source"] if theirs else "-")
        lines.append(line)
    return Table(title, caption, header, tuple(lines))


def _cells(result: Result) -> tuple[str, ...]:
    """Returns the metrics and the trials of a row."""
    if result.missing:
        found = f"{result.trials - len(result.missing)} of {result.trials}"
        missing = ", ".join(map(str, result.missing))
        return ("missing",) * len(METRICS) + (f"{found}, missing: {missing}",)
    spread = [f" +- {100 * result.std[m]:.2f}" if result.trials > 1 else "" for m in METRICS]
    numbers = (f"{100 * result.mean[m]:.2f}{s}" for m, s in zip(METRICS, spread, strict=True))
    return (*numbers, str(result.trials))


def _published_table(section: Section, others: dict[str, dict[str, str]]) -> Table:
    caption = "Published numbers in percent; nothing here was measured by this project."
    lines = tuple(
        (method, *(_percent(line, m) for m in METRICS), line["source"])
        for method, line in others.items()
    )
    title = f"{section.title}, others as published"
    return Table(title, caption, ("method", *HEADERS, "source"), lines)


def _health_tables(caption: str, rows: Sequence[Row]) -> list[Table]:
    """Returns one table of the memory's health in the last epoch, where a row has any."""
    first: dict[tuple[Path, ...], Row] = {}  # of the rows that share a training
    for row in rows:
        if row.setting.group in MEMORY_ABLATIONS and _kind(row) == "last":
            first.setdefault(tuple(row.training), row)
    names = [f"{level}/{name}" for level in LEVELS for name in HEALTH]
    lines = []
    for row in first.values():
        if numbers := health(row):
            keys = [f"memory/{name}" for name in names]
            cells = (f"{numbers[key]:.3g}" if key in numbers else "-" for key in keys)
            lines.append((row.setting.group, row.setting.name, *cells))
    if not lines:
        return []
    caption += (
        " Memory health in training's last epoch, mean over trials: share of positions whose read "
        "is zero, prototypes above the threshold per position, share of prototypes used, entropy."
    )
    header = ("varied", "method", *(name.replace("_", " ") for name in names))
    return [Table("Memory health", caption, header, tuple(lines))]


# --- Formats --------------------------------------------------------------------------------------


def markdown(title: str, tables: Sequence[Table]) -> str:
    """Returns all tables as one Markdown page; the caption they share stands once, on top."""
    shared = tables[0].caption
    blocks = [f"# {title}", shared]
    for table in tables:
        blocks.append(f"## {table.title}")
        if table.caption != shared:
            blocks.append(table.caption.removeprefix(shared).strip())
        lines = [table.header, ("---",) * len(table.header), *table.rows]
        blocks.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(blocks).replace("+-", "±") + "\n"


LATEX = r"""\begin{table}
\caption{%s}
\begin{tabular}{%s}
\toprule
%s
\midrule
%s
\bottomrule
\end{tabular}
\end{table}
"""


def latex(tables: Sequence[Table]) -> str:
    """Returns each table as a `table` environment (package booktabs)."""
    escapes = str.maketrans(
        {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    )

    def clean(text: str) -> str:
        return text.translate(escapes).replace("+-", r"$\pm$")

    pages = []
    for table in tables:
        caption, columns = clean(f"{table.title}. {table.caption}"), "l" * len(table.header)
        header, *rows = (" & ".join(map(clean, x)) + r" \\" for x in (table.header, *table.rows))
        pages.append(LATEX % (caption, columns, header, "\n".join(rows)))
    return "\n".join(pages)


def comma_separated(table: str, results: Sequence[Result]) -> str:
    """Returns one line a row: what it is, fractions with deviations, trials, published percents."""
    lines = []
    for result in results:
        row, setting = result.row, result.row.setting
        theirs = published(row.section).get(setting.published, {})
        line = {"table": table, "section": f"{row.section.dataset} {row.section.protocol}"}
        line |= {
            "varied": setting.group,
            "method": setting.name,
            "checkpoint": row.checkpoint,
            "re_rank": row.re_rank,
        }
        line |= {"test_feat": setting.test.get("test_feat"), "trials": result.trials}
        missing = ", ".join(map(str, result.missing))
        line |= {"found": result.trials - len(result.missing), "missing": missing}
        line |= {"data": "; ".join(_distinct([result], "dataset"))}
        line |= {k: "; ".join(_distinct([result], k)) for k in ("selection", "commit")}
        for metric in METRICS:
            line[f"{metric}_mean"] = result.mean.get(metric)
            line[f"{metric}_std"] = result.std.get(metric)
        for metric in METRICS:
            line[f"published_{metric}_percent"] = theirs.get(metric)
        lines.append({**line, "published_source": theirs.get("source")})
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
