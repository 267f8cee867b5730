"""Differences split by split, and the study's table and figure."""

import csv
import json
import math
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from data_manager import DATASETS, EvalOptions
from eval_metrics import METRICS
from figures import charts
from reproduce import main
from reproduction.paired import Difference, differences
from reproduction.plan import REFERENCES, STUDY, choose, plan
from reproduction.tables import arrange, measure


def test_intervals_are_students():
    """Sample standard deviation 2, three splits: 4.3027 * 2 / sqrt(3)."""
    difference = Difference("x", np.array([1.0, 3.0, 5.0]))
    assert difference.mean == 3
    assert difference.half_width == pytest.approx(4.9683, abs=1e-4)
    assert str(difference) == "+3.0 +- 5.0"
    assert math.isnan(Difference("x", np.array([1.0])).half_width)
    assert str(Difference("x", np.array([-1.0]))) == "-1.0"


def fill(rows, value):
    """Writes results of every row; `value` of a row's place and trial."""
    for place, row in enumerate(rows):
        for trial, file in enumerate(row.files, start=1):
            number = value(place, trial)
            if number is None:
                continue
            file.parent.mkdir(parents=True)
            own = dict.fromkeys(METRICS, number)
            draws = [dict.fromkeys(METRICS, number + error) for error in (-0.1, 0.1)]
            entry = {**own, "per_trial": draws, "re_rank": "no", "test_feat": "pcb"}
            entry |= {"dataset": row.dataset, "stand_in": True, "protocol": "p"}
            entry["selection"] = "last epoch"
            content = {"rows": [entry], "versions": {"commit": "c"}, "options": {}}
            file.write_text(json.dumps(content))


def test_the_study_pairs_seeds_with_splits_and_compares_what_is_there(tmp_path, capsys):
    steps, rows = plan("study", dataset="regdb", runs=tmp_path, trials=3, extra={"epochs": 2})
    trained = [step for step in steps if step.trains]
    assert len(trained) == 3 * len(STUDY)
    assert all(step.resolved["seed"] == step.resolved["trial"] for step in trained)
    live = [step.resolved for step in trained if step.resolved["bank_init"] == "features"]
    assert {(o["addressing"], o["shrink"], o["shrink_scale"]) for o in live} == {
        ("cosine", "auto", 3.0)
    }
    # Row p of each protocol: 0.5 + p / 100 + split / 10; the third split of the fourth is missing.
    fill(rows, lambda p, t: None if (p // 2, t) == (3, 3) else 0.5 + p // 2 / 100 + t / 10)
    results = [measure(row) for row in rows if row.protocol == "v2i"]
    found = differences(results, REFERENCES[1], "mAP")
    assert [d.name for d in found] == [s.name for s in STUDY if s.name != REFERENCES[1]]
    np.testing.assert_allclose([d.mean for d in found], [-1, *range(1, len(STUDY) - 1)], atol=1e-9)
    assert [len(d.values) for d in found] == [3, 3, 2, *[3] * (len(STUDY) - 4)]
    about = {"dataset": "regdb", "trials": 3, "extra": {"epochs": 2}}
    (tmp_path / "study_regdb.json").write_text(json.dumps(about))
    assert main(["table", "--table", "study", "--runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| MG-MRA, cosine, 3 / m, features | 3 | +8.0 ± 0.0 | +8.0 ± 0.0 | +7.0 ± 0.0 |" in text
    assert (tmp_path / "study_regdb_differences.png").stat().st_size > 10_000


def test_unseen_data_sets_are_evaluated_in_their_own_folders_and_draws(tmp_path):
    """Trained on two splits of RegDB; each split's model is one trial, whatever it is a mean of."""
    unseen = {"sysu": "elsewhere", "llcm": None}
    about = {"runs": tmp_path, "extra": {"data_path": "data/night"}, "unseen": unseen}
    steps, rows = plan("unseen", dataset="regdb", trials=2, **about)
    tests = [step for step in steps if not step.trains]
    assert {step.options["dataset"] for step in tests} == {"sysu", "llcm"}
    for step in tests:
        assert step.resolved["trials"] == 10
        assert step.options.get("data_path") == unseen[step.options["dataset"]]
        assert "trial" not in step.options
    fill(rows, lambda p, t: 0.5 + p / 100 + t / 10)
    result = measure(rows[3])
    assert result.mean["mAP"] == pytest.approx(0.68)
    assert result.std["mAP"] == pytest.approx(0.05)
    arrange("t", [measure(row) for row in rows])
    _, rows = plan("unseen", dataset="sysu", trials=3, runs=tmp_path, extra={})
    assert {(row.dataset, row.trials) for row in rows} == {("regdb", 3), ("llcm", 3)}


def test_tables_share_trainings_and_no_folder_with_those_of_other_seeds(tmp_path):
    def trainings(table, **about):
        about = {"dataset": "regdb", "runs": tmp_path, "extra": {}, **about}
        return {s.folder: s.resolved for s in plan(table, **about)[0] if s.trains}

    study, unseen = trainings("study", trials=5), trainings("unseen", trials=2)
    assert len(unseen) == 8
    assert unseen.items() <= study.items()
    regdb = trainings("regdb", trials=5)
    assert not study.keys() & regdb.keys()


def test_a_training_has_one_line_of_its_memory_s_health(tmp_path):
    _, rows = plan("study", dataset="regdb", trials=2, runs=tmp_path, extra={})
    fill(rows, lambda p, t: 0.5)
    for number, folder in enumerate(dict.fromkeys(f for row in rows for f in row.training)):
        lines = json.dumps({"epoch": 1, "memory/part/used": 0.5}) + "\n" if number else ""
        (folder / "log.jsonl").write_text(lines)
    table = arrange("t", [measure(row) for row in rows])[-1]
    assert [line[1] for line in table.rows] == [setting.name for setting in STUDY[1:]]


def test_one_split_is_trained_on_with_every_seed(tmp_path):
    """Each training's mean over SYSU-MM01's draws is one value of the paired comparison."""
    steps, rows = plan("study", dataset="sysu", trials=3, runs=tmp_path, extra={})
    assert [s.resolved["seed"] for s in steps if s.trains] == [1, 2, 3] * len(STUDY)
    assert all(s.resolved["trials"] == 10 for s in steps if not s.trains)
    own = [row for row in rows if row.protocol == rows[0].protocol]
    fill(own, lambda p, t: 0.5 + p / 100 + t / 10)
    results = [measure(row) for row in own]
    assert list(results[2].per_trial) == [1, 2, 3]
    assert [len(d.values) for d in differences(results, REFERENCES[1], "mAP")] == [3] * 11


def test_the_page_of_the_study_is_made_of_its_numbers():
    docs = Path(__file__).parents[1] / "docs"
    with (docs / "study.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    keys = ("table", "method", "split", "direction")
    assert len({tuple(line[key] for key in keys) for line in lines}) == len(lines)
    page = (docs / "study.md").read_text()
    for table, direction in {(line["table"], line["direction"]) for line in lines}:
        own = [x for x in lines if (x["table"], x["direction"]) == (table, direction)]
        for name in {line["method"] for line in own}:
            kind = " agw " if name.startswith("AGW") else " "
            place = direction if direction.startswith("unseen") else f"{table}{kind}{direction}"
            block = page.split(f"<!-- {place} -->")[1].split("<!-- end")[0]
            values = [float(line["mAP"]) for line in own if line["method"] == name]
            assert re.search(
                rf"^\| {re.escape(name)} \| {len(values)} \| [^|]* \| {100 * np.mean(values):.1f}",
                block,
                re.MULTILINE,
            ), (table, direction, name)


def test_rows_that_continue_start_from_their_split_s_hct_or_agw(tmp_path):
    about = {"dataset": "regdb", "trials": 2, "runs": tmp_path, "extra": {"preset": "scratch"}}
    steps, rows = plan("continued", **about)
    study = {step.folder: step.resolved for step in plan("study", **about)[0] if step.trains}
    trained = [step for step in steps if step.trains]
    starts = [step for step in trained if step.folder in study]
    assert [step.resolved for step in starts] == [study[step.folder] for step in starts]
    assert [step.resolved["epochs"] for step in starts] == 4 * [14]  # two methods in two splits
    own = [step for step in trained if step not in starts]
    assert len(own) == 2 * len(STUDY)
    for step in own:
        agw = "_method_agw" if step.resolved["method"] == "agw" else ""
        start = (
            tmp_path / f"HCT_regdb{agw}_trial{step.resolved['trial']}_seed{step.resolved['seed']}"
        )
        assert step.resolved["weights"] == str(start / "last.pt")
        assert (step.resolved["epochs"], step.resolved["lr"]) == (8, 0.02)
        assert trained.index(step) > [s.folder for s in trained].index(start)
    chosen = choose(steps, rows, ["1 / m", "v2i"])
    assert sum(step.trains for step in chosen) == 4  # two, and their starts


def test_no_text_of_many_panels_covers_another():
    """SYSU-MM01 has eight protocols with long names."""
    data = DATASETS["sysu"]
    found = [Difference(setting.name, np.array([-1.0, 0.0, 2.0])) for setting in STUDY[:8]]
    protocols = [data.describe(EvalOptions(**options)) for options in data.protocols.values()]
    figure = charts.differences(dict.fromkeys(protocols, found), title="t")
    figure.draw_without_rendering()
    texts = [text for chart in figure.axes for text in (chart.title, chart.xaxis.label)]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 2 * len(protocols)
    assert not [1 for a, b in combinations(boxes, 2) if a.overlaps(b)]
