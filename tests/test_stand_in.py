"""Tests of stand_in.py: layouts, determinism, identities across modalities, refusals."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

import stand_in
from datasets import pedestrians, stand_in_layouts
from datasets.pedestrians import make_person, render
from datasets.stand_in_layouts import Settings
from stand_in import generate

ROOT = Path(stand_in.__file__).parent
REGDB = {"layout": "regdb", "train_ids": 8, "test_ids": 5, "images_per_id": 3, "seed": 5}
SYSU = {"layout": "sysu", "train_ids": 8, "test_ids": 5, "images_per_id": 2, "seed": 5}


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def regdb(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("regdb") / "data", **REGDB)


@pytest.fixture(scope="module")
def sysu(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("sysu") / "data", **SYSU)


# ---------------------------------------------------------------------------------------- RegDB


def test_regdb_images(regdb):
    files = [p.relative_to(regdb).as_posix() for p in regdb.rglob("*.bmp")]
    pattern = re.compile(r"(Visible|Thermal)/(\d+)/(fe)?male_(front|back)_([vt])_\d{5}_(\d+)\.bmp")
    for name in files:
        match = pattern.fullmatch(name)
        assert match, name
        assert match[2] == match[6] and str(int(match[2])) == match[2]
        assert match[5] == {"Visible": "v", "Thermal": "t"}[match[1]]
    counts = {}
    for name in files:
        counts[tuple(name.split("/")[:2])] = counts.get(tuple(name.split("/")[:2]), 0) + 1
    assert counts == {(m, str(pid)): 3 for m in ("Visible", "Thermal") for pid in range(1, 14)}


def test_regdb_holds_nothing_else(regdb):
    assert {p.name for p in regdb.iterdir()} == {"Visible", "Thermal", "idx", "stand_in.json"}
    assert {p.suffix for p in regdb.rglob("*") if p.is_file()} == {".bmp", ".txt", ".json"}


def test_regdb_images_open_at_their_size(regdb):
    for folder in ("Visible", "Thermal"):
        with Image.open(next((regdb / folder / "1").iterdir())) as image:
            assert image.format == "BMP"
            assert image.size == (64, 128)
            assert image.mode == "RGB"
    thermal = np.asarray(Image.open(next((regdb / "Thermal" / "1").iterdir())))
    assert (thermal == thermal[..., :1]).all()


def read_list(path: Path) -> list[tuple[str, int]]:
    lines = path.read_text().splitlines()
    return [(line.split(" ")[0], int(line.split(" ")[1])) for line in lines]


@pytest.mark.parametrize("trial", range(1, 11))
def test_regdb_lists(regdb, trial):
    of_role = {}
    for role, ids in (("train", 8), ("test", 5)):
        labels_of = {}
        for modality, folder in (("visible", "Visible"), ("thermal", "Thermal")):
            rows = read_list(regdb / "idx" / f"{role}_{modality}_{trial}.txt")
            assert len(rows) == ids * 3
            assert len({name for name, _ in rows}) == ids * 3
            assert all(
                name.startswith(folder + "/") and (regdb / name).is_file() for name, _ in rows
            )
            labels_of[modality] = {(int(name.split("/")[1]), label) for name, label in rows}
        assert labels_of["visible"] == labels_of["thermal"]
        pids = sorted(pid for pid, _ in labels_of["visible"])
        assert labels_of["visible"] == {(pid, label) for label, pid in enumerate(pids)}
        of_role[role] = set(pids)
    assert of_role["train"] | of_role["test"] == set(range(1, 14))
    assert not of_role["train"] & of_role["test"]


def test_regdb_trials_differ(regdb):
    lists = [(regdb / "idx" / f"train_visible_{t}.txt").read_text() for t in range(1, 11)]
    assert len(set(lists)) == 10
    assert len(list((regdb / "idx").iterdir())) == 40


# ----------------------------------------------------------------------------------------- SYSU


def read_ids(path: Path) -> list[int]:
    text = path.read_text()
    assert text.count("\n") == 1
    return [int(word) for word in text.split(",")]


def test_sysu_images_and_ids(sysu):
    files = [p.relative_to(sysu).as_posix() for p in sysu.rglob("*.jpg")]
    assert all(re.fullmatch(r"cam[1-6]/\d{4}/\d{4}\.jpg", name) for name in files)
    ids = {role: read_ids(sysu / "exp" / f"{role}_id.txt") for role in ("train", "val", "test")}
    assert {role: len(pids) for role, pids in ids.items()} == {"train": 6, "val": 2, "test": 5}
    assert all(pids == sorted(pids) for pids in ids.values())
    assert sorted(sum(ids.values(), [])) == list(range(1, 14))
    cameras = {pid: set() for pid in range(1, 14)}
    for name in files:
        cameras[int(name[5:9])].add(int(name[3]))
    assert all(seen & {3, 6} and seen & {1, 2, 4, 5} for seen in cameras.values())
    assert any(len(seen) < 6 for seen in cameras.values())
    for folder in {Path(name).parent for name in files}:
        assert sorted(p.name for p in (sysu / folder).iterdir()) == ["0001.jpg", "0002.jpg"]


def test_sysu_image_sizes_vary_and_infrared_is_grey(sysu):
    sizes = set()
    for path in sorted(sysu.rglob("*.jpg")):
        with Image.open(path) as image:
            sizes.add(image.size)
            pixels = np.asarray(image)
        assert image.format == "JPEG" and pixels.ndim == 3
        colour = np.abs(np.diff(pixels.astype(int), axis=2)).max()
        assert (colour == 0) == (path.parts[-3] in ("cam3", "cam6"))
    assert len(sizes) > 10
    assert max(w for w, _ in sizes) <= 72 and max(h for _, h in sizes) <= 160


def test_sysu_rand_perm_cam(sysu):
    cells = loadmat(sysu / "exp" / "rand_perm_cam.mat")["rand_perm_cam"]
    assert cells.shape == (6, 1)
    for camera in range(1, 7):
        assert cells[camera - 1][0].shape == (13, 1)
        for pid in range(1, 14):
            draws = cells[camera - 1][0][pid - 1][0]
            folder = sysu / f"cam{camera}" / f"{pid:04d}"
            count = len(list(folder.iterdir())) if folder.is_dir() else 0
            assert draws.shape == ((10, count) if count else (0, 0))
            if count:
                assert (np.sort(draws, axis=1) == np.arange(1, count + 1)).all()


def test_sysu_draws_differ_between_trials():
    settings = Settings("sysu", train_ids=4, test_ids=3, images_per_id=9)
    drawings, _ = stand_in_layouts.sysu(settings)
    pid = next(pid for pid, own in drawings.items() if any(drawing.camera == 3 for drawing in own))
    draws = stand_in_layouts._rand_perm_cam(settings, drawings)[2, 0][pid - 1, 0]
    assert len({tuple(row) for row in draws.tolist()}) == 10


@pytest.mark.parametrize("train_ids", [2, 3, 7, 20, 101])
@pytest.mark.parametrize("test_ids", [1, 2, 33])
@pytest.mark.parametrize("seed", [0, 1])
def test_sysu_nobody_lacks_a_modality(train_ids, test_ids, seed):
    settings = Settings("sysu", train_ids, test_ids, images_per_id=1, seed=seed)
    drawings, _ = stand_in_layouts.sysu(settings)
    assert len(drawings) == train_ids + test_ids
    for own in drawings.values():
        cameras = {drawing.camera for drawing in own}
        assert cameras & {3, 6} and cameras & {1, 2, 4, 5}


# ---------------------------------------------------------------------------------- determinism


def test_files_do_not_depend_on_workers(sysu, tmp_path):
    assert digest(generate(tmp_path / "two", workers=2, **SYSU)) == digest(sysu)


def test_another_seed_draws_other_people(regdb, tmp_path):
    other = digest(generate(tmp_path / "other", **(REGDB | {"seed": 6})))
    assert not set(other.values()) & set(digest(regdb).values())


def test_people_do_not_depend_on_how_many_there_are(regdb, tmp_path):
    fewer = generate(
        tmp_path / "fewer", **(REGDB | {"train_ids": 4, "test_ids": 2, "images_per_id": 2})
    )
    larger = digest(regdb)
    for name, value in digest(fewer).items():
        if name.endswith(".bmp"):
            assert larger[name] == value


def test_a_stopped_run_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def stop_after_four(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw(*args)

    draw = stand_in._draw_identity
    monkeypatch.setattr(stand_in, "_draw_identity", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "data", **REGDB)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- identity


def structure(image: Image.Image) -> np.ndarray:
    """Where edges of which orientation are, whatever their contrast's sign: (12 * 6 * 6,)."""
    pixels = np.asarray(image.convert("L").resize((48, 96)), float)
    dy, dx = np.gradient(pixels)
    strength, angle = np.hypot(dx, dy), np.arctan2(dy, dx) % np.pi
    cells = [
        (strength * (np.floor(angle / np.pi * 6) == k)).reshape(12, 8, 6, 8).sum((1, 3))
        for k in range(6)
    ]
    vector = np.sqrt(np.stack(cells)).ravel()
    return vector / np.linalg.norm(vector)


@pytest.fixture(scope="module")
def descriptors() -> tuple[np.ndarray, np.ndarray]:
    """Of 30 people, 3 visible and 3 infrared images each: (30, 3, 432) twice."""
    both = []
    for camera in (1, 2):
        look = pedestrians.camera_look("regdb", camera, 0)
        rows = [
            [
                structure(
                    render(make_person(0, pid), look, np.random.default_rng((pid, n)), (96, 48))
                )
                for n in range(3 * camera, 3 * camera + 3)
            ]
            for pid in range(1, 31)
        ]
        both.append(np.array(rows))
    return both[0], both[1]


def test_structure_is_shared_across_modalities(descriptors):
    visible, infrared = descriptors
    similarity = np.einsum("iad,jbd->ijab", visible, infrared).mean((2, 3))
    same = np.diag(similarity)
    other = similarity[~np.eye(30, dtype=bool)]
    assert same.mean() - other.mean() > 3 * similarity.std() / np.sqrt(30)
    assert (same > np.quantile(other, 0.9)).mean() > 0.6


def test_nearest_structure_finds_the_person_across_modalities(descriptors):
    visible, infrared = (d.reshape(90, -1) for d in descriptors)
    hits = np.argmax(visible @ infrared.T, axis=1) // 3 == np.arange(90) // 3
    assert hits.mean() > 0.5  # chance 0.033


def test_infrared_tones_follow_colours_in_part_only():
    fabrics = [make_person(0, pid).fabrics["upper"].first for pid in range(1, 401)]
    luma = [np.dot(f.visible, (0.299, 0.587, 0.114)) for f in fabrics]
    assert 0.35 < np.corrcoef(luma, [f.infrared for f in fabrics])[0, 1] < 0.85


def test_materials_of_a_fabric_contrast_in_the_infrared_both_ways():
    fabrics = [make_person(1, pid).fabrics["upper"] for pid in range(1, 101)]
    steps = np.array([f.first.infrared - f.second.infrared for f in fabrics])
    assert np.abs(steps).min() > 0.3
    assert (steps > 0).any() and (steps < 0).any()


def test_five_hundred_people_differ():
    people = [make_person(0, pid) for pid in range(1, 501)]
    looks = {tuple(sorted(p.style.items())) + (p.fabrics["upper"].pattern,) for p in people}
    assert len(looks) == 500
    assert len({tuple(p.body.values()) for p in people}) == 500


@pytest.mark.parametrize("pattern", sorted(set(pedestrians.PATTERNS.split())))
def test_every_pattern_shows_both_materials(pattern):
    rng = np.random.default_rng(0)
    u, v = np.meshgrid(np.linspace(-1, 1, 40), np.linspace(0, 1, 60))
    for _ in range(20):
        fabric = pedestrians._cloth(rng, pattern)
        weight = pedestrians.pattern_weight(fabric, u, v)
        assert weight.shape == u.shape and weight.min() >= 0 and weight.max() <= 1
        if pattern == "plain":
            assert (weight == 0).all()
        else:
            assert 0.03 < weight.mean() < 0.97


@pytest.mark.parametrize("style", [
    {"bag": "umbrella"}, {"bag": "case"}, {"bag": "handbag"}, {"bag": "satchel"}, {"bag": "box"},
    {"bag": "backpack"}, {"hat": "brim"}, {"hair": "long"}, {"hair": "afro"}, {"legs": "maxi"},
    {"legs": "shorts"}, {"coat": "knee"}, {"scarf": "yes"}, {"sleeves": "long"},
], ids=lambda style: "-".join(style.values()))  # fmt: skip
def test_style_changes_the_silhouette_or_what_is_in_it(style):
    base = {"bag": "none", "hat": "none", "hair": "bald", "legs": "trousers", "coat": "hip"}
    base |= {"scarf": "no", "sleeves": "none", "open": "no", "belt": "no", "view": "front"}
    person = make_person(0, 1)
    look = pedestrians.camera_look("regdb", 2, 0)
    images = []
    for changes in (base, base | style):
        dressed = person._replace(style=person.style | changes)
        image = render(dressed, look, np.random.default_rng(1), (128, 64))
        images.append(np.asarray(image, float))
    assert (np.abs(images[0] - images[1]).max(axis=2) > 30).mean() > 0.005


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("name", ["image.bmp", "stand_in.json"])
def test_what_is_there_is_never_replaced(tmp_path, name):
    there = tmp_path / "RegDB" / name
    there.parent.mkdir()
    there.write_text("precious")
    for out in (there.parent, there):
        with pytest.raises(ValueError, match="is there already"):
            generate(out, **REGDB)
    assert there.read_text() == "precious"
    assert [p.name for p in tmp_path.rglob("*")] == ["RegDB", name]


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "data").mkdir()
    small = REGDB | {"train_ids": 1, "test_ids": 1, "images_per_id": 1, "trials": 1}
    generate(tmp_path / "data", **small)
    assert (tmp_path / "data" / "idx" / "train_visible_1.txt").is_file()


def test_unknown_setting_is_refused(tmp_path):
    with pytest.raises(TypeError, match="colour"):
        generate(tmp_path / "data", colour="red", **REGDB)


# --------------------------------------------------------------------------------- command line


def test_command_line_as_documented(tmp_path):
    command = [sys.executable, str(ROOT / "stand_in.py"), "--layout", "sysu", "--out", "data"]
    command += ["--train-ids", "2", "--test-ids", "1", "--images-per-id", "1", "--seed", "0"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "of 3 identities" in run.stderr
    settings = json.loads((tmp_path / "data" / "stand_in.json").read_text())
    assert settings["layout"] == "sysu" and settings["val_ids"] == 1


@pytest.mark.parametrize(("line", "message"), [
    ("--layout market --out x", "--layout: invalid choice: 'market'"),
    ("--layout regdb", "--out"),
    ("--out x", "--layout"),
    ("--layout regdb --out x --train-ids none", "--train-ids"),
    ("--layout regdb --out x --workers 0", "--workers: expected a number above 0, got 0"),
    ("--layout regdb --out x --test-ids 0", "--test-ids: expected a number above 0"),
    ("--layout regdb --out x --trials -1", "--trials: expected a number above 0"),
    ("--layout regdb --out x --seed -1", "expected non-negative integer"),
    ("--layout sysu --out x --train-ids 1", "one of them for validation"),
    ("--layout regdb --out x --workres 1", "did you mean --workers?"),
])  # fmt: skip
def test_command_line_refusals(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        stand_in.main(line.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_interrupt_is_no_traceback(tmp_path, monkeypatch, capsys):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(stand_in, "generate", interrupt)
    assert stand_in.main(["--layout", "regdb", "--out", str(tmp_path / "data")]) == 130
    assert "stopped" in capsys.readouterr().err


def llcm_lists(folder: Path) -> dict[str, list[tuple[str, int]]]:
    return {name: read_list(folder / f"idx/{name}.txt") for name in ("train_vis", "train_nir")}


@pytest.mark.parametrize("images_per_id", [1, 6])
def test_llcm_lists_and_folders(tmp_path, images_per_id):
    settings = {"train_ids": 5, "test_ids": 4, "images_per_id": images_per_id, "seed": 2}
    folder = stand_in.generate(tmp_path / "llcm", layout="llcm", img_h=40, img_w=20, **settings)
    people = {}
    for name, lines in llcm_lists(folder).items():
        people[name] = {(label, path.split("/")[1]) for path, label in lines}
        assert [label for _, label in lines] == sorted(list(range(5)) * images_per_id)
        assert all(path.startswith(name[-3:] + "/") for path, _ in lines)
        assert all((folder / path).is_file() for path, _ in lines)
    assert people["train_vis"] == people["train_nir"]
    test_ids = read_ids(folder / "idx/test_id.txt")
    assert len(test_ids) == 4
    assert not {f"{pid:04d}" for pid in test_ids} & {name for _, name in people["train_vis"]}
    for pid in test_ids:
        for word in ("vis", "nir"):
            images = [p.relative_to(folder) for p in folder.glob(f"test_{word}/*/{pid:04d}/*.jpg")]
            assert len(images) == images_per_id
            cameras = {image.parts[1] for image in images}
            assert cameras <= {f"cam{c}" for c in stand_in_layouts.LLCM_CAMERAS[word]}
    assert not (folder / "test_nir/cam3").exists()
    spread = np.ptp(np.asarray(Image.open(next(folder.glob("nir/*/*.jpg"))), float), axis=2)
    assert spread.max() == 0  # grey
