"""Tables: the published numbers, and what is made of rows and files."""

import json

import numpy as np
import pytest

from eval_metrics import METRICS
from reproduction.plan import Row, Setting
from reproduction.tables import (
    Table,
    arrange,
    latex,
    markdown,
    measure,
    published,
)

V2I, I2V = ("regdb", "v2i"), ("regdb", "i2v")
LLCM = {key: ("llcm", key) for key in ("v2i paper", "v2i repository", "i2v")}
ALL, INDOOR = ("sysu", "all 1 seeded"), ("sysu", "indoor 1 seeded")
# RegDB visible to infrared, trials 1..10, in the MG-MRA authors' README.
README_RANK1 = (93.50, 95.24, 93.01, 93.30, 96.80, 94.85, 95.73, 95.49, 93.98, 95.05)
README_MAP = (93.84, 95.07, 93.29, 93.73, 95.98, 93.88, 95.47, 95.34, 93.94, 94.57)


def write(path, dataset="RegDB", per_trial=(0.5,), re_rank="no", feat="pcb", **more):
    values = [dict.fromkeys(METRICS, v) for v in per_trial]
    row = {**values[0], "per_trial": values, "re_rank": re_rank, "test_feat": feat}
    row |= {"dataset": dataset, "protocol": "p", "selection": "last epoch", **more}
    path.write_text(json.dumps({"rows": [row], "versions": {"commit": "c0ffee"}}))
    return path


def row(*files, trials=None, name="HCT", re_rank="no", test_feat=None, published=None):
    test = {"re_rank": re_rank} if re_rank != "no" else {}
    test |= {"test_feat": test_feat} if test_feat else {}
    setting = Setting(name, test=test, published=published or name)
    return Row(*V2I, setting, "last", files, trials or len(files))


@pytest.mark.parametrize(
    ("section", "method", "numbers", "source"),
    [
        (V2I, "MG-MRA", (94.59, 97.35, 99.00, 88.18), "arXiv 2109.08843, Table 1"),
        (I2V, "MG-MRA", (93.22, 96.98, 98.87, 87.19), "arXiv 2109.08843, Table 1"),
        (V2I, "HCT", (91.05, 97.16, 98.57, 83.28, 68.84), "HCT's README"),
        (V2I, "AGW", (70.05, 66.37, 50.19), "AGW's README"),
        (V2I, "DDAG", (69.34, 86.19, 91.49, 63.46), "Table 1"),
        (I2V, "MPANet", (82.8, 90.7), "surely 80.7"),
        (ALL, "MG-MRA", (72.50, 68.94), "the MG-MRA authors' README"),
        (ALL, "MG-MRA", (72.50, 68.94), "an independent run reached less"),
        (
            ALL,
            "MG-MRA, independent run",
            (60.58, 56.15),
            "8 x 6 in place of 6 x 8; the authors there",
        ),
        (ALL, "MG-MRA, independent run", (60.58, 56.15), "this result may be unstable"),
        (
            V2I,
            "MG-MRA, independent run",
            (93.11, 83.70),
            "issue 1 of the MG-MRA authors' repository",
        ),
        (V2I, "GLMC", (91.84, 97.86, 98.98, 81.42), "a picture in the authors' repository"),
        (ALL, "HCT", (61.68, 57.51, 39.54), "HCT's README"),
        (ALL, "CAJ", (69.88, 66.89, 53.61), "flip averaging"),
        (INDOOR, "MG-MRA", (77.35,), "own re-run"),
        (INDOOR, "AGW", (54.17, 62.97, 59.23), "DDAG's README"),
    ],
)
def test_published_numbers(section, method, numbers, source):
    line = published(*section)[method]
    assert tuple(float(line[m]) for m in METRICS if line.get(m)) == numbers
    assert source in line["source"]


@pytest.mark.parametrize("section", [V2I, I2V, ALL, INDOOR, *LLCM.values()])
def test_every_published_number_has_a_source(section):
    assert published(*section)
    for method, line in published(*section).items():
        assert line["source"] and "not recorded" not in line["source"], method
        assert float(line["rank1"]) > 40, method


def test_nothing_is_published_elsewhere():
    for protocol in ("all 10 seeded", "all 1 official"):
        assert published("sysu", protocol) == {}


@pytest.mark.parametrize(
    ("key", "numbers"),
    [
        ("v2i paper", {"DEEN": (62.5, 65.8)}),
        ("v2i repository", {"AGW": (63.72, 47.21), "DEEN": (69.21, 55.52)}),
        (
            "i2v",
            {"AGW": (49.13, 55.80), "DEEN": (55.52, 62.07), "DEEN in its paper": (54.9, 62.9)},
        ),
    ],
)
def test_llcm_s_published_numbers_stand_beside_their_own_protocol_alone(key, numbers):
    lines = published(*LLCM[key])
    assert {k: (float(v["rank1"]), float(v["mAP"])) for k, v in lines.items()} == numbers
    for method, line in lines.items():
        in_paper = key == "v2i paper" or "paper" in method
        assert ("the CVPR 2023 paper" if in_paper else "README of LLCM's authors") in line["source"]


def test_means_of_the_authors_readme():
    line = published(*V2I)["MG-MRA re-ranked"]
    for name, values in (("rank1", README_RANK1), ("mAP", README_MAP)):
        assert len(values) == 10
        assert float(line[name]) == pytest.approx(np.mean(values), abs=0.0051)
        assert f"{np.std(values):.2f}" in line["source"]


def test_trials_in_one_file_each_or_all_in_one(tmp_path):
    files = [write(tmp_path / f"{i}.json", per_trial=(i / 10,)) for i in (1, 2, 3)]
    apart = measure(row(*files))
    together = measure(row(write(tmp_path / "all.json", per_trial=(0.1, 0.2, 0.3)), trials=3))
    for numbers in (apart, together):
        assert numbers.mean["mAP"] == pytest.approx(0.2)
        assert numbers.std["mAP"] == pytest.approx((0.02 / 3) ** 0.5)
        assert numbers.missing == []
    more_draws = measure(row(tmp_path / "all.json", trials=2))
    assert more_draws.mean["mAP"] == pytest.approx(0.15)
    too_few = measure(row(files[0], trials=3))
    assert (too_few.mean, too_few.missing) == ({}, [2, 3])


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"rows": []}', '{"rows": [{"re_rank": "no"}]}', "\x00"]
)
def test_damaged_results_are_named(tmp_path, content):
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="results.json .*run again"):
        measure(row(file))
    write(file, feat="neck")
    with pytest.raises(ValueError, match="feature 'memory'"):
        measure(row(file, test_feat="memory"))
    with pytest.raises(ValueError, match="re-ranking 'random_walk'"):
        measure(row(file, re_rank="random_walk"))


def arranged(*rows):
    return arrange("T", [measure(row) for row in rows])


def test_captions_name_the_data(tmp_path):
    real = arranged(row(write(tmp_path / "a.json")))
    assert "Data: RegDB." in real[0].caption and "stand-in" not in real[0].caption
    drawn = write(tmp_path / "b.json", dataset="stand-in data in RegDB's layout", stand_in=True)
    assert "say nothing of the real" in arranged(row(drawn))[0].caption
    renamed = write(tmp_path / "d.json", dataset="RegDB (copy)", stand_in=False)
    assert "say nothing of the real" not in arranged(row(renamed))[0].caption
    with pytest.raises(ValueError, match="of different data: RegDB, stand-in data"):
        arranged(row(tmp_path / "a.json"), row(drawn, name="AGW"))


def test_re_ranked_rows_stand_apart_and_carry_their_name(tmp_path):
    plain = row(write(tmp_path / "a.json"), name="MG-MRA")
    ranked = write(tmp_path / "b.json", re_rank="k_reciprocal")
    ranked = row(ranked, name="MG-MRA", re_rank="k_reciprocal", published="MG-MRA re-ranked")
    first, second, others = arranged(plain, ranked)
    assert [line[0] for line in first.rows] == ["MG-MRA"]
    assert first.rows[0][-2] == "94.59 / 88.18"
    assert "arXiv 2109.08843, Table 1" in first.rows[0][-1]
    assert [line[0] for line in second.rows] == ["MG-MRA, k_reciprocal"]
    assert second.title.endswith("re-ranked")
    assert "probably re-ranked" in second.rows[0][-1]
    flipped = write(tmp_path / "c.json", tta="flip")
    assert arranged(row(flipped))[0].title == f"{first.title}, tta: flip"
    methods = [line[0] for line in others.rows]
    assert "HCT" in methods and "MG-MRA re-ranked" not in methods


def test_trainings_without_a_memory_have_no_row_of_its_health(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"epoch": 1, "memory/part/used": 0.25}\n{"epoch": 2, "memory/part/used": 0.5}\n'
    )
    (tmp_path / "hct").mkdir()
    (tmp_path / "hct/log.jsonl").write_text('{"epoch": 1}\n')
    file = write(tmp_path / "a.json")
    rows = [
        Row(*V2I, Setting(name, group="lambda"), "last", [file], 1, [folder])
        for name, folder in (("HCT", tmp_path / "hct"), ("0.5", tmp_path), ("1", tmp_path / "no"))
    ]
    health = arranged(*rows)[-1]
    assert health.header == ["varied", "method", "part/used"]
    assert health.rows == [["lambda", "0.5", "0.5"]]


def test_formats_hold_every_cell():
    table = Table("A & B", "50% of_it", ("x", "y"), (("1.0 +- 0.5", "a_b"), ("-", "2")))
    page = markdown("Title", [table])
    assert "| 1.0 ± 0.5 | a_b |" in page and page.startswith("# Title\n\n50% of_it\n")
    tex = latex([table])
    assert r"A \& B" in tex and r"50\% of\_it" in tex
    assert r"1.0 $\pm$ 0.5 & a\_b \\" in tex
