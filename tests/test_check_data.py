"""`reproduce.py check`: what is right is counted, usual mistakes are found, their fix is said."""

import json
import re

import pytest
from conftest import save_image
from PIL import Image

import reproduce
import stand_in
from data_manager import eval_set
from reproduction.check_data import check

SMALL = {"train_ids": 5, "test_ids": 3, "images_per_id": 2, "img_h": 40, "img_w": 20, "trials": 2}
COUNTS = {
    "regdb": {
        "trial 2 train: identities, visible, infrared": "5 + 10 + 10",
        "trial 2 test: identities, visible, infrared": "3 + 6 + 6",
        "images that open, of all": "32 + 32",
    },
    "sysu": {"test, indoor-search, ten-shot, seeded gallery: queries, gallery": "10 + 8"},
    "llcm": {
        "train: identities, visible, infrared": "5 + 10 + 10",
        "test: identities, visible, infrared": "3 + 6 + 6",
    },
}


@pytest.fixture
def drawn(tmp_path, request):
    """Small stand-in data in the layout that the test names."""
    return stand_in.generate(tmp_path / "data", layout=request.param, workers=1, **SMALL)


def both(dataset, folder, capsys):
    """Findings, after checking that the command line says the same."""
    findings = check(dataset, folder)
    code = reproduce.main(["check", "--dataset", dataset, "--data-path", str(folder)])
    assert capsys.readouterr().out == findings.report()
    assert code == (1 if findings.problems else 0)
    return findings


@pytest.mark.parametrize(("drawn", "dataset"), [(d, d) for d in COUNTS], indirect=["drawn"])
def test_good_data_passes_and_is_counted(drawn, dataset, capsys):
    findings = both(dataset, drawn, capsys)
    report = findings.report()
    assert report.startswith("stand-in data in ")
    assert report.endswith("all is well\n")
    for what, numbers in COUNTS[dataset].items():
        assert re.search(rf"  ok  {what} +{re.escape(numbers)}\n", report), what


def test_counts_of_the_real_data_set_are_expected_without_the_marker(
    tiny_regdb, tiny_sysu, tiny_llcm
):
    report = check("regdb", tiny_regdb).report()
    assert "!!  trial 1 train: identities, visible, infrared" in report
    assert "6 + 12 + 18   expected 206 + 2,060 + 2,060" in report
    assert "idx/train_visible_2.txt does not exist" in report
    report = check("sysu", tiny_sysu).report()
    assert "expected 395 + 22,258 + 11,909" in report
    assert "expected 96 + 6,775 + 3,803" in report and "expected 3,803 + 1,120" in report
    assert "rand_perm_cam.mat cannot be read" in report and "--gallery seeded" in report
    report = check("llcm", tiny_llcm).report()
    assert "expected 713 + 16,946 + 13,975" in report
    assert "3 + 11 + 14   expected 351 + ? + ?" in report


def nest(folder):
    inner = folder / "again"
    inner.mkdir()
    for path in list(folder.iterdir()):
        if path.name not in ("again", "stand_in.json"):
            path.rename(inner / path.name)


def mix_splits(folder):
    for word in ("visible", "thermal"):
        text = (folder / f"idx/test_{word}_2.txt").read_text()
        (folder / f"idx/test_{word}_1.txt").write_text(text)


def mix_modalities(folder):
    text = (folder / "idx/train_visible_2.txt").read_text()
    (folder / "idx/train_visible_1.txt").write_text(text)


def truncate(folder):
    path = sorted(folder.rglob("*.bmp"))[0]
    path.write_bytes(path.read_bytes()[:100])


def resize(size):
    return lambda folder: save_image(sorted(folder.rglob("*.bmp"))[3], 1, size)


def remove(name):
    return lambda folder: (folder / name).unlink()


MISTAKES = {
    "nested": ("regdb", nest, "again: pass --data-path"),
    "no exp": ("sysu", lambda f: (f / "exp").rename(f / "x"), "exp/ is part of the data"),
    "no list": ("regdb", remove("idx/test_thermal_2.txt"), "test_thermal_2.txt does not exist"),
    "no permutations": ("sysu", remove("exp/rand_perm_cam.mat"), "--gallery seeded needs no such"),
    "another split's test lists": ("regdb", mix_splits, "take all of them from one source"),
    "another split's visible list": ("regdb", mix_modalities, "are all lists of one split"),
    "shared identity": (
        "sysu",
        lambda f: (f / "exp/test_id.txt").write_text((f / "exp/val_id.txt").read_text()),
        "expected lists that share none",
    ),
    "truncated image": ("regdb", truncate, "1 images cannot be read"),
    "odd size": ("regdb", resize((50, 30)), "(50 x 30)"),
    "thumbnail": ("regdb", resize((4, 9)), "thumbnails and whole scenes"),
    "another data set": ("llcm", lambda f: (f / "idx").rename(f / "y"), "put it beside test_vis/"),
    "damaged marker": ("regdb", lambda f: (f / "stand_in.json").write_text("{"), "draw the data"),
}


@pytest.mark.parametrize(
    ("drawn", "name"), [(MISTAKES[n][0], n) for n in MISTAKES], indirect=["drawn"], ids=MISTAKES
)
def test_usual_mistakes_are_found_with_their_fix(drawn, name, capsys):
    dataset, spoil, fix = MISTAKES[name]
    spoil(drawn)
    findings = both(dataset, drawn, capsys)
    assert findings.problems
    assert any(fix in problem for problem in findings.problems), findings.report()
    assert "need a look" in findings.report()


@pytest.mark.parametrize("drawn", ["regdb"], indirect=True)
def test_what_training_cannot_decode_is_found(drawn):
    file = sorted(drawn.rglob("*.bmp"))[0]
    Image.open(file).save(file, format="PPM")
    assert "1 images cannot be read" in "".join(check("regdb", drawn).problems)


@pytest.mark.parametrize("drawn", ["sysu"], indirect=True)
def test_what_training_ignores_is_no_finding(drawn):
    (drawn / "cam1/._0001.jpg").write_text("")
    (drawn / "cam1/9999.jpg").mkdir()
    assert not check("sysu", drawn).problems


@pytest.mark.parametrize("drawn", ["llcm"], indirect=True)
def test_queries_are_counted_as_a_trial_has_them(drawn):
    settings = {"protocol": "repository", "trials": 2}
    drawn_queries = eval_set("llcm", drawn, **settings).query_trials
    report = check("llcm", drawn, open_images=False).report()
    line = next(line for line in report.splitlines() if "repository's protocol" in line)
    assert f"  {len(drawn_queries[0])} + " in line


@pytest.mark.parametrize("drawn", ["llcm"], indirect=True)
def test_training_images_in_a_test_folder(drawn, capsys):
    moved = sorted((drawn / "test_vis").rglob("*.jpg"))[0].relative_to(drawn).as_posix()
    with (drawn / "idx/train_vis.txt").open("a") as stream:
        stream.write(f"{moved} 0\n")
    assert moved in "".join(both("llcm", drawn, capsys).problems)


@pytest.mark.parametrize("drawn", ["regdb"], indirect=True)
def test_images_need_not_be_opened(drawn):
    truncate(drawn)
    assert not check("regdb", drawn, open_images=False).problems


def test_a_missing_folder_is_one_problem(tmp_path, capsys):
    findings = both("regdb", tmp_path / "nowhere", capsys)
    assert len(findings.problems) == 1
    assert "stand_in.py" in findings.problems[0]


@pytest.mark.parametrize("drawn", ["sysu"], indirect=True)
def test_caches_are_counted_too(drawn):
    import pre_process_sysu

    flags = ["--data-path", str(drawn), "--img_h", "32", "--img_w", "16"]
    assert pre_process_sysu.main(flags) == 0
    findings = check("sysu", drawn, open_images=False)
    assert not findings.problems
    assert "  ok  caches: identities, visible, infrared" in findings.report()


def test_sizes_that_vary_are_no_finding(tmp_path):
    folder = stand_in.generate(tmp_path / "d", layout="sysu", workers=1, **SMALL)
    sizes = {Image.open(p).size for p in folder.rglob("*.jpg")}
    assert len(sizes) > 3
    assert json.loads((folder / "stand_in.json").read_text())["layout"] == "sysu"
    assert not check("sysu", folder).problems
