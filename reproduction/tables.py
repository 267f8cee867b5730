"""Tables out of ``results.json`` files: Markdown, LaTeX, CSV, with the published numbers beside.

A row knows the files that its numbers come from, one for each trial or one for all. A trial that
is not there is shown as missing, and its row has no mean. Last and best epochs, re-ranked rows and
plain ones stand in tables of their own; every caption names the data.

Sources of the published numbers stand beside them.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_metrics import METRICS, mean_and_std
from memory import HEALTH, LEVELS

HEADERS = ("Rank-1", "Rank-5", "Rank-10", "Rank-20", "mAP", "mINP")
CHECKPOINTS = {"last": "last epoch", "best": "best epoch"}  # where there is no result to ask

PAPER = "arXiv 2109.08843, Table 1"
COLLECTED = "collected for this project, source not recorded"
# Percent: Rank-1, Rank-10, Rank-20, mAP, and mINP where known.
_REGDB = {
    "v2i": {
        "AlignGAN": (57.9, None, None, 53.6),
        "Xmodal": (62.21, 83.13, 91.72, 60.18),
        "CMSP": (65.07, 83.71, None, 64.5),
        "DDAG": (69.34, 86.19, 91.49, 63.46),
        "AGW": (70.05, None, None, 66.37, 50.19),
        "cm-SSFT": (72.3, None, None, 72.9),
        "CICL": (78.8, None, None, 69.4),
        "NFS": (80.54, 91.96, 95.07, 72.10),
        "MPANet": (83.7, None, None, 80.9),
        "HCT": (91.05, 97.16, 98.57, 83.28, 68.84),
        "GLMC": (91.84, 97.86, 98.98, 81.42),
        "MG-MRA": (94.59, 97.35, 99.00, 88.18),
    },
    "i2v": {
        "AlignGAN": (56.3, None, None, 53.4),
        "DDAG": (68.06, 85.15, 90.31, 61.80),
        "cm-SSFT": (71.0, None, None, 71.7),
        "CICL": (77.9, None, None, 69.4),
        "NFS": (77.95, 90.45, 93.62, 69.79),
        "MPANet": (82.8, None, None, 90.7),  # as printed, surely 80.7
        "HCT": (89.30, 96.41, 98.16, 81.46),
        "GLMC": (91.12, 97.86, 98.69, 81.06),
        "MG-MRA": (93.22, 96.98, 98.87, 87.19),
    },
}
# Percent: Rank-1, mAP, mINP; single-shot, seeded galleries.
_SYSU = {
    "all": {
        "AGW": (47.50, 47.65, 35.30),
        "DDAG": (54.75, 53.02, 39.62),
        "HCT": (61.68, 57.51, 39.54),
        "CAJ": (69.88, 66.89, 53.61),
        "MG-MRA": (72.50, 68.94),
    },
    "indoor": {
        "AGW": (54.17, 62.97, 59.23),
        "DDAG": (61.02, 67.98, 62.61),
        "MG-MRA": (77.35,),
    },
}
# RegDB visible to infrared, trials 1..10, of the authors' README; probably re-ranked, as its script
# does by default.
README_RANK1 = (93.50, 95.24, 93.01, 93.30, 96.80, 94.85, 95.73, 95.49, 93.98, 95.05)
README_MAP = (93.84, 95.07, 93.29, 93.73, 95.98, 93.88, 95.47, 95.34, 93.94, 94.57)
README_SOURCE = "the authors' README, mean of trials 1 to 10, probably re-ranked"


@dataclass(frozen=True)
class Row:
    """A row of a table and where its numbers come from.

    Attributes:
        section: Key of the protocol, such as "regdb v2i" or "sysu all 1 seeded".
        group: What an ablation varies; "" elsewhere.
        name: The method or setting.
        checkpoint: "last" or "best".
        re_rank: "no", or the re-ranking's name.
        test_feat: Retrieval feature; None takes the method's headline.
        files: ``results.json`` of each trial, or a single one that holds all trials.
        trials: Trials that a complete row has.
        training: Folders of the trainings, for the memory's health; () to leave it out.
    """

    section: str
    group: str
    name: str
    checkpoint: str
    re_rank: str
    test_feat: str | None
    files: tuple[Path, ...]
    trials: int
    training: tuple[Path, ...] = ()


def published(section: str) -> dict[str, tuple[dict[str, float], str]]:
    """Published numbers in percent of a protocol, and their source, by method.

    Returns:
        ``{method: ({metric: percent}, source)}``; {} where none are known.
    """
    dataset, key, *rest = section.split()
    if dataset == "regdb":
        names, rows = ("rank1", "rank10", "rank20", "mAP", "mINP"), _REGDB.get(key, {})
    elif dataset == "sysu" and rest == ["1", "seeded"]:
        names, rows = ("rank1", "mAP", "mINP"), _SYSU.get(key, {})
    else:
        return {}
    found = {}
    for method, values in rows.items():
        pairs = zip(names, values, strict=False)
        source = PAPER if dataset == "regdb" else COLLECTED
        if (section, method) == ("sysu indoor 1 seeded", "MG-MRA"):
            source = "the authors' own re-run"
        if (section, method) == ("regdb i2v", "MPANet"):
            source += "; mAP as printed there, surely 80.7"
        found[method] = {k: v for k, v in pairs if v is not None}, source
    return found


def measure(row: Row, trials: int | None = None) -> dict[str, Any]:
    """Reads a row's files.

    Args:
        row: Which files, and what to take from them.
        trials: Look at the first so many trials only.

    Returns:
        ``mean`` and ``std`` (fractions by metric; None unless every trial is there), ``found`` and
        ``missing`` (trial numbers from 1), ``trials``, and of the files there ``data``,
        ``protocols``, ``selections``, ``commits`` (sets of words).

    Raises:
        ValueError: A file is no results file, or lacks the row's feature or re-ranking.
    """
    expected = min(row.trials, trials or row.trials)
    files = row.files[:expected] if len(row.files) > 1 else row.files
    per_trial: dict[int, dict[str, float]] = {}
    words: dict[str, set[str]] = {k: set() for k in ("data", "protocols", "selections", "commits")}
    for number, file in enumerate(files, start=1):
        if not file.exists():
            continue
        content, result = _read(file, row)
        for name, key in (
            ("data", "dataset"),
            ("protocols", "protocol"),
            ("selections", "selection"),
        ):
            words[name].add(str(result[key]))
        words["commits"].add(content["versions"]["commit"])
        if len(files) > 1 or row.trials == 1:
            per_trial[number] = {m: result[m] for m in METRICS}
        else:
            per_trial |= dict(enumerate(result["per_trial"][:expected], start=1))
    missing = [t for t in range(1, expected + 1) if t not in per_trial]
    mean, std = (None, None) if missing else mean_and_std(list(per_trial.values()))
    found = sorted(per_trial)
    return {
        "mean": mean,
        "std": std,
        "found": found,
        "missing": missing,
        "trials": expected,
        **words,
    }


def _read(file: Path, row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
    """A results file, and the result in it that the row asks for."""
    try:
        content = json.loads(file.read_text())
        rows = content["rows"]
        feat = row.test_feat or rows[0]["test_feat"]
        same = [r for r in rows if (r["re_rank"], r["test_feat"]) == (row.re_rank, feat)]
        return content, same[0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{file} has no result with re-ranking {row.re_rank!r} and feature "
            f"{row.test_feat or 'of the method'!r} ({error!r}); remove it and run again"
        ) from error


def health(row: Row) -> dict[str, float] | None:
    """Memory health of a row's last epochs, mean over its trainings; None unless all are there."""
    lines = []
    for folder in row.training:
        try:
            last = (folder / "log.jsonl").read_text().strip().splitlines()[-1]
            lines.append({k: v for k, v in json.loads(last).items() if k.startswith("memory/")})
        except (OSError, IndexError, ValueError):
            return None
    return mean_and_std(lines)[0] if lines and lines[0] else None


# --- Layout ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table as text: a title, a caption, a header and rows of cells."""

    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def compact(numbers: Sequence[int]) -> str:
    """Trial numbers in words: 1, 2, 3, 7 is "1-3, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def data_in(rows: Sequence[Row], trials: int | None = None) -> str:
    """The data that all of the rows' results are of, in words.

    Raises:
        ValueError: No result is there at all, or they are of different data.
    """
    data = sorted({words for row in rows for words in measure(row, trials)["data"]})
    if not data:
        raise ValueError("none of the table's results is there yet: reproduce.py run makes them")
    if len(data) > 1:
        raise ValueError(f"the results are of different data: {', '.join(data)}; use a folder each")
    return data[0]


def arrange(
    title: str,
    rows: Sequence[Row],
    words: Callable[[str], str],
    *,
    trials: int | None = None,
    note: str = "",
) -> list[Table]:
    """Lays rows out: one table for each protocol, kind of checkpoint, and re-ranked or not.

    Args:
        title: The title of the whole.
        rows: In the order to print.
        words: From a section's key to its title.
        trials: Look at the first so many trials only.
        note: Added to each caption.

    Raises:
        ValueError: No file is there at all, or the files are of different data.
    """
    measured = [(row, measure(row, trials)) for row in rows]
    data = data_in(rows, trials)
    ablation = any(row.group for row in rows)  # compares with itself
    commits = sorted({c for _, numbers in measured for c in numbers["commits"]})
    caption = f"{title}. Data: {data}. Percent, mean +- population standard deviation over trials."
    if data.startswith("stand-in"):
        caption += " Numbers on stand-in data say nothing of the real data set's"
        caption += "." if ablation else "; the published ones are of the real data set."
    caption += f" Code: {', '.join(commits)}.{f' {note}' if note else ''}"
    tables = []
    for section in dict.fromkeys(row.section for row in rows):
        for kind in ("last", "best", "re-ranked"):
            part = [(row, numbers) for row, numbers in measured if _in(row, section, kind)]
            if part:
                chosen = {c for _, numbers in part for c in numbers["selections"]}
                what = ", ".join(sorted(chosen)) or CHECKPOINTS[part[0][0].checkpoint]
                what += ", re-ranked" if kind == "re-ranked" else ""
                tables.append(_results_table(f"{words(section)}, {what}", caption, part))
        ours = {row.name for row in rows}
        others = {k: v for k, v in published(section).items() if k not in ours}
        if others and not ablation:
            tables.append(_published_table(f"{words(section)}, others as published", others))
    return [*tables, *_health_tables(caption, rows)]


def _in(row: Row, section: str, kind: str) -> bool:
    plain = row.re_rank == "no"
    return row.section == section and (row.checkpoint == kind if plain else kind == "re-ranked")


def _results_table(title: str, caption: str, part: Sequence[tuple[Row, dict[str, Any]]]) -> Table:
    grouped = any(row.group for row, _ in part)
    beside = {row.section: published(row.section) for row, _ in part}
    with_published = any(row.name in beside[row.section] for row, _ in part)
    with_published |= any(_readme(row) for row, _ in part)
    header = (("varied",) if grouped else ()) + ("method", *HEADERS, "trials")
    header += ("published Rank-1 / mAP", "source") if with_published else ()
    lines = []
    for row, numbers in part:
        label = row.name if row.re_rank == "no" else f"{row.name}, {row.re_rank}"
        line = ((row.group,) if grouped else ()) + (label, *_cells(numbers), _trials(numbers))
        if with_published:
            line += _beside(row, beside[row.section])
        lines.append(line)
    return Table(title, caption, header, tuple(lines))


def _readme(row: Row) -> bool:
    """Whether the authors' README stands beside a row."""
    return (row.section, row.name, row.re_rank) == ("regdb v2i", "MG-MRA", "k_reciprocal")


def _beside(row: Row, known: dict[str, tuple[dict[str, float], str]]) -> tuple[str, str]:
    """Published numbers and source for a row."""
    if _readme(row):
        mean, std = mean_and_std(
            [{"r": r, "m": m} for r, m in zip(README_RANK1, README_MAP, strict=True)]
        )
        words = " / ".join(f"{mean[k]:.2f} +- {std[k]:.2f}" for k in "rm")
        return words, README_SOURCE
    if row.re_rank != "no" or row.name not in known:
        return "-", "-"
    values, source = known[row.name]
    return " / ".join(f"{values[k]:.2f}" if k in values else "-" for k in ("rank1", "mAP")), source


def _cells(numbers: dict[str, Any]) -> tuple[str, ...]:
    if numbers["mean"] is None:
        return ("missing",) * len(METRICS)
    spread = numbers["trials"] > 1
    return tuple(
        f"{100 * numbers['mean'][m]:.2f}" + (f" +- {100 * numbers['std'][m]:.2f}" if spread else "")
        for m in METRICS
    )


def _trials(numbers: dict[str, Any]) -> str:
    if not numbers["missing"]:
        return str(numbers["trials"])
    words = f"{len(numbers['found'])} of {numbers['trials']}"
    return f"{words}, missing: {compact(numbers['missing'])}"


def _published_table(title: str, others: dict[str, tuple[dict[str, float], str]]) -> Table:
    rows = tuple(
        (name, *(f"{values[m]:.2f}" if m in values else "-" for m in METRICS), source)
        for name, (values, source) in others.items()
    )
    caption = "Published numbers in percent; nothing here was measured by this project."
    return Table(title, caption, ("method", *HEADERS, "source"), rows)


def _health_tables(caption: str, rows: Iterable[Row]) -> list[Table]:
    """One table of the memory's health in the last epoch, where any row has a training with it."""
    wanted = [row for row in rows if row.training and row.checkpoint == "last"]
    wanted = [row for row in wanted if row.re_rank == "no" and row.test_feat is None]
    first: dict[tuple[Path, ...], Row] = {}
    for row in wanted:
        first.setdefault(row.training, row)
    found = [(row, numbers) for row in first.values() if (numbers := health(row))]
    if not found:
        return []
    names = [f"{level}/{name}" for level in LEVELS for name in HEALTH]
    lines = []
    for row, numbers in found:
        values = [numbers.get(f"memory/{name}") for name in names]
        cells = ("-" if value is None else f"{value:.3g}" for value in values)
        lines.append((row.group, row.name, *cells))
    header = ("varied", "method", *(name.replace("_", " ") for name in names))
    explained = (
        " Memory health in training's last epoch, mean over trials: share of positions whose read "
        "is zero, prototypes above the threshold per position, share of prototypes used, entropy."
    )
    return [Table("Memory health", caption + explained, header, tuple(lines))]


# --- Formats --------------------------------------------------------------------------------------


def markdown(title: str, tables: Sequence[Table]) -> str:
    """All tables as one Markdown page; the caption they share stands once, on top."""
    shared = tables[0].caption
    parts = [f"# {title}", shared]
    for table in tables:
        parts.append(f"## {table.title}")
        if table.caption != shared:
            parts.append(table.caption.removeprefix(shared).strip())
        lines = [table.header, ("---",) * len(table.header), *table.rows]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts).replace("+-", "±") + "\n"


def latex(tables: Sequence[Table]) -> str:
    """Each table as a `table` environment (package booktabs)."""
    return "\n".join(_latex_table(table) for table in tables)


def _latex_table(table: Table) -> str:
    escapes = {c: f"\\{c}" for c in "&%$#_{}"} | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
    }

    def clean(text: str) -> str:
        return "".join(escapes.get(c, c) for c in text).replace("+-", r"$\pm$")

    lines = [" & ".join(map(clean, line)) + r" \\" for line in (table.header, *table.rows)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\caption{" + clean(f"{table.title}. {table.caption}") + "}",
            r"\begin{tabular}{" + "l" * len(table.header) + "}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def comma_separated(title: str, rows: Sequence[Row], trials: int | None = None) -> str:
    """One line a row: what it is, means and deviations as fractions, trials, published percents."""
    out = io.StringIO()
    about = ("table", "section", "varied", "method", "checkpoint", "re_rank", "test_feat")
    counts = ("trials", "found", "missing", "data", "selection", "commit")
    spread = tuple(f"{m}_{kind}" for m in METRICS for kind in ("mean", "std"))
    theirs = tuple(f"published_{m}_percent" for m in METRICS)
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*about, *counts, *spread, *theirs, "published_source"))
    for row in rows:
        numbers = measure(row, trials)
        values, source = published(row.section).get(row.name, ({}, ""))
        if row.re_rank != "no":
            values, source = {}, ""
        line = [title, row.section, row.group, row.name, row.checkpoint, row.re_rank]
        line += [row.test_feat or "", numbers["trials"], len(numbers["found"])]
        line += [compact(numbers["missing"])]
        line += ["; ".join(sorted(numbers[k])) for k in ("data", "selections", "commits")]
        for metric in METRICS:
            known = numbers["mean"] is not None
            line += [numbers[kind][metric] if known else "" for kind in ("mean", "std")]
        writer.writerow([*line, *(values.get(m, "") for m in METRICS), source])
    return out.getvalue()
