"""tables.py: the published numbers, and what is made of rows and files."""

import json

import pytest

from reproduction.tables import (
    METRICS,
    README_MAP,
    README_RANK1,
    Row,
    Table,
    arrange,
    compact,
    latex,
    markdown,
    measure,
    published,
)


def write(path, dataset="RegDB", per_trial=(0.5,), re_rank="no", feat="pcb"):
    values = [dict.fromkeys(METRICS, v) for v in per_trial]
    row = {**values[0], "per_trial": values, "re_rank": re_rank, "test_feat": feat}
    row |= {"dataset": dataset, "protocol": "p", "selection": "last epoch"}
    path.write_text(json.dumps({"rows": [row], "versions": {"commit": "c0ffee"}}))
    return path


def row(*files, trials=None, **changes):
    plain = {"section": "regdb v2i", "group": "", "name": "HCT", "checkpoint": "last"}
    plain |= {"re_rank": "no", "test_feat": None} | changes
    return Row(files=files, trials=trials or len(files), **plain)


@pytest.mark.parametrize(
    ("section", "method", "numbers", "source"),
    [
        ("regdb v2i", "MG-MRA", (94.59, 97.35, 99.00, 88.18), "arXiv 2109.08843, Table 1"),
        ("regdb i2v", "MG-MRA", (93.22, 96.98, 98.87, 87.19), "arXiv 2109.08843, Table 1"),
        ("regdb v2i", "HCT", (91.05, 97.16, 98.57, 83.28, 68.84), "Table 1"),
        ("regdb v2i", "AGW", (70.05, 66.37, 50.19), "Table 1"),
        ("regdb i2v", "MPANet", (82.8, 90.7), "surely 80.7"),
        ("sysu all 1 seeded", "MG-MRA", (72.50, 68.94), "source not recorded"),
        ("sysu all 1 seeded", "HCT", (61.68, 57.51, 39.54), "source not recorded"),
        ("sysu indoor 1 seeded", "MG-MRA", (77.35,), "own re-run"),
        ("sysu indoor 1 seeded", "AGW", (54.17, 62.97, 59.23), "source not recorded"),
    ],
)
def test_published_numbers(section, method, numbers, source):
    values, named = published(section)[method]
    assert tuple(values.values()) == numbers
    assert source in named


@pytest.mark.parametrize("section", ["sysu all 10 seeded", "sysu all 1 official", "llcm v2i"])
def test_nothing_is_published_elsewhere(section):
    assert published(section) == {}


def test_means_of_the_authors_readme():
    assert len(README_RANK1) == len(README_MAP) == 10
    assert sum(README_RANK1) / 10 == pytest.approx(94.70, abs=0.005)
    assert sum(README_MAP) / 10 == pytest.approx(94.51, abs=0.005)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([], ""), ([4], "4"), ([1, 2, 3], "1-3"), ([1, 3, 4, 9], "1, 3-4, 9"), ([1, 2], "1-2")],
)
def test_numbers_in_words(numbers, words):
    assert compact(numbers) == words


def test_trials_in_one_file_each_or_all_in_one(tmp_path):
    files = [write(tmp_path / f"{i}.json", per_trial=(i / 10,)) for i in (1, 2, 3)]
    apart = measure(row(*files))
    together = measure(row(write(tmp_path / "all.json", per_trial=(0.1, 0.2, 0.3)), trials=3))
    for numbers in (apart, together):
        assert numbers["mean"]["mAP"] == pytest.approx(0.2)
        assert numbers["std"]["mAP"] == pytest.approx((0.02 / 3) ** 0.5)
        assert (numbers["found"], numbers["missing"]) == ([1, 2, 3], [])
    assert measure(row(*files), 2)["mean"]["mAP"] == pytest.approx(0.15)
    too_few = measure(row(files[0], trials=3))
    assert (too_few["mean"], too_few["missing"]) == (None, [2, 3])


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"rows": []}', '{"rows": [{"re_rank": "no"}]}', "\x00"]
)
def test_damaged_results_are_named(tmp_path, content):
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="results.json has no result .*run again"):
        measure(row(file))
    write(file, feat="neck")
    with pytest.raises(ValueError, match="feature 'memory'"):
        measure(row(file, test_feat="memory"))
    with pytest.raises(ValueError, match="re-ranking 'random_walk'"):
        measure(row(file, re_rank="random_walk"))


def test_captions_name_the_data(tmp_path):
    real = arrange("T", [row(write(tmp_path / "a.json"))], str)
    assert "Data: RegDB." in real[0].caption and "stand-in" not in real[0].caption
    drawn = write(tmp_path / "b.json", dataset="stand-in data in RegDB's layout")
    assert "say nothing of the real" in arrange("T", [row(drawn)], str)[0].caption
    with pytest.raises(ValueError, match="of different data: RegDB, stand-in data"):
        arrange("T", [row(tmp_path / "a.json"), row(drawn, name="AGW")], str)


def test_re_ranked_rows_stand_apart_and_carry_their_name(tmp_path):
    plain = row(write(tmp_path / "a.json"), name="MG-MRA")
    ranked = write(tmp_path / "b.json", re_rank="k_reciprocal")
    ranked = row(ranked, name="MG-MRA", re_rank="k_reciprocal")
    first, second, others = arrange("T", [plain, ranked], str)
    assert [line[0] for line in first.rows] == ["MG-MRA"]
    assert first.rows[0][-2:] == ("94.59 / 88.18", "arXiv 2109.08843, Table 1")
    assert [line[0] for line in second.rows] == ["MG-MRA, k_reciprocal"]
    assert second.title.endswith("re-ranked")
    assert "probably re-ranked" in second.rows[0][-1]
    assert "HCT" in [line[0] for line in others.rows]


def test_formats_hold_every_cell():
    table = Table("A & B", "50% of_it", ("x", "y"), (("1.0 +- 0.5", "a_b"), ("-", "2")))
    page = markdown("Title", [table])
    assert "| 1.0 ± 0.5 | a_b |" in page and page.startswith("# Title\n\n50% of_it\n")
    tex = latex([table])
    assert r"A \& B" in tex and r"50\% of\_it" in tex
    assert r"1.0 $\pm$ 0.5 & a\_b \\" in tex
