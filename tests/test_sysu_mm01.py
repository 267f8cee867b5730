"""Tests of sysu_mm01.py."""

import json
import os
import pickle
import random
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import SYSU_COUNTS
from damage import both, link_out, remove, write
from scipy.io import loadmat, savemat

from data_manager import DataError, EvalOptions, eval_set, train_set
from datasets import sysu_mm01

OFFICIAL = Path(__file__).parents[2] / "shared/golden/official_sysu/split_test.npz"
LAYOUT = Path(__file__).parents[2] / "shared/data/sysu_layout.json"


def keys(images):
    """(camera, pid, 1-based image number) of each image, read off its path."""
    return [
        (int(p.split("/")[0][3:]), int(p.split("/")[1]), int(p.split("/")[2][:-4]))
        for p in images.paths
    ]


# --- SYSU-MM01: training --------------------------------------------------------------------------


def naive_items(counts, cameras):
    return [
        (camera, pid, i)
        for pid in sorted(counts)
        for camera in cameras
        for i in range(1, counts[pid][camera - 1] + 1)
    ]


def test_sysu_training_lists(tiny_sysu):
    train = train_set("sysu", tiny_sysu)
    counts = SYSU_COUNTS["train"] | SYSU_COUNTS["val"]
    assert train.pids.tolist() == [1, 2, 5, 9, 12, 20]
    for images, labels, cameras in (
        (train.visible, train.labels[0], (1, 2, 4, 5)),
        (train.infrared, train.labels[1], (3, 6)),
    ):
        expected = naive_items(counts, cameras)
        assert keys(images) == expected
        assert images.camids.tolist() == [item[0] for item in expected]
        assert images.pids.tolist() == [item[1] for item in expected]
        assert labels.tolist() == [train.pids.tolist().index(item[1]) for item in expected]
        assert images.pixels is None


def test_sysu_fit_leaves_the_validation_list_out(tiny_sysu):
    fit = train_set("sysu", tiny_sysu, subset="fit")
    assert fit.pids.tolist() == [1, 2, 5, 9]
    assert keys(fit.visible) == naive_items(SYSU_COUNTS["train"], (1, 2, 4, 5))
    assert fit.pids[fit.labels[1]].tolist() == fit.infrared.pids.tolist()
    val = eval_set("sysu", tiny_sysu, subset="val", trials=2)
    assert set(val.query.pids) == {12, 20} == set(val.gallery.pids)
    with pytest.raises(
        DataError, match="empty gallery: .* for indoor-search.*validation identities;"
    ):
        eval_set("sysu", tiny_sysu, subset="val", mode="indoor")


def test_sysu_ignores_what_is_no_image(tiny_sysu):
    before = train_set("sysu", tiny_sysu).visible.paths
    for name in ("Thumbs.db", "._0001.jpg", ".DS_Store", "notes.txt"):
        (tiny_sysu / "cam1/0001" / name).write_text("x")
    (tiny_sysu / "cam1/0001/9999.jpg").mkdir()
    (tiny_sysu / "cam1/readme.txt").write_text("x")
    assert train_set("sysu", tiny_sysu).visible.paths == before


# --- SYSU-MM01: galleries -------------------------------------------------------------------------


def naive_seeded(root, cameras, trial, shots):
    """The draw of the AGW family over os.listdir."""
    generator, drawn = random.Random(trial), []
    for pid in sorted(SYSU_COUNTS["test"]):
        for camera in cameras:
            folder = root / f"cam{camera}" / f"{pid:04d}"
            if os.path.isdir(folder):
                names = sorted(os.listdir(folder))
                if shots == 1:
                    drawn.append((camera, pid, int(generator.choice(names)[:-4])))
                else:
                    some = generator.sample(names, min(10, len(names)))
                    drawn += [(camera, pid, int(name[:-4])) for name in some]
    return drawn


@pytest.mark.parametrize("shots", [1, 10])
@pytest.mark.parametrize("mode", ["all", "indoor"])
def test_seeded_galleries(tiny_sysu, mode, shots):
    cameras = {"all": (1, 2, 4, 5), "indoor": (1, 2)}[mode]
    test = eval_set("sysu", tiny_sysu, mode=mode, shots=shots, trials=4)
    held = keys(test.gallery)
    assert len(set(held)) == len(held)
    assert len(test.gallery_trials) == 4
    for trial, rows in enumerate(test.gallery_trials):
        assert [held[row] for row in rows] == naive_seeded(tiny_sysu, cameras, trial, shots)
    assert set(np.concatenate(test.gallery_trials)) == set(range(len(held)))
    assert test.gallery.camids.tolist() == [key[0] for key in held]
    assert test.gallery.pids.tolist() == [key[1] for key in held]
    probes = [item for c in (3, 6) for item in naive_items(SYSU_COUNTS["test"], (c,))]
    assert keys(test.query) == probes
    assert test.camera_rule == "sysu"
    shown = "single-shot" if shots == 1 else "ten-shot"
    assert test.protocol == f"{mode}-search, {shown}, seeded gallery, 4 trials"
    assert test.query.modality == "infrared" and test.gallery.modality == "visible"


def write_permutations(root, counts, rows=10, first=None):
    """Write rand_perm_cam.mat; `first` {(camera, pid): (trials, k)} fixes how rows begin."""
    rng = np.random.default_rng(5)
    cells = np.empty((6, 1), dtype=object)
    table = {}
    for camera in range(1, 7):
        people = np.empty((max(pid for pid in counts), 1), dtype=object)
        for pid in range(1, len(people) + 1):
            n = counts.get(pid, (0,) * 6)[camera - 1]
            matrix = np.stack([rng.permutation(n) + 1 for _ in range(rows)]).astype(np.uint8)
            if first and (camera, pid) in first:
                begin = first[camera, pid]
                rest = [[i for i in range(1, n + 1) if i not in set(b.tolist())] for b in begin]
                matrix = np.concatenate([begin, np.array(rest, dtype=np.uint8)], axis=1)
            people[pid - 1, 0] = table[camera, pid] = matrix
        cells[camera - 1, 0] = people
    savemat(root / "exp/rand_perm_cam.mat", {"rand_perm_cam": cells})
    return table


@pytest.mark.parametrize("shots", [1, 10])
@pytest.mark.parametrize("mode", ["all", "indoor"])
def test_official_galleries(tiny_sysu, mode, shots):
    table = write_permutations(tiny_sysu, SYSU_COUNTS["test"])
    test = eval_set("sysu", tiny_sysu, mode=mode, gallery="official", shots=shots)
    held = keys(test.gallery)
    for trial, rows in enumerate(test.gallery_trials):
        expected = [
            (camera, pid, number)
            for camera in ((1, 2, 4, 5) if mode == "all" else (1, 2))
            for pid in (3, 6, 30)
            for number in table[camera, pid][trial][:shots].tolist()
        ]
        assert [held[row] for row in rows] == expected
    assert "official gallery, 10 trials" in test.protocol


def test_a_file_far_too_large_for_permutations_is_not_read(tiny_sysu, monkeypatch):
    write_permutations(tiny_sysu, SYSU_COUNTS["test"])
    monkeypatch.setattr(sysu_mm01, "OFFICIAL_DRAW_LIMIT", 100)
    with pytest.raises(DataError, match=r"rand_perm_cam.mat cannot be read .*bytes, over 100"):
        eval_set("sysu", tiny_sysu, gallery="official")


def test_caches_of_another_size_are_left_for_the_jpgs(tiny_sysu, caplog):
    write_caches(tiny_sysu)
    cached = train_set("sysu", tiny_sysu)
    shape = cached.visible.pixels.shape[1:3]
    assert f"(caches, {shape[0]} x {shape[1]})" in cached.description
    assert train_set("sysu", tiny_sysu, size=shape).visible.pixels is not None
    assert caplog.messages == []
    assert train_set("sysu", tiny_sysu, size=(96, 48)).visible.pixels is None
    assert "--img_h x --img_w is 96 x 48: taking the jpgs" in caplog.text


def test_official_numbers_count_files_in_sorted_order(tiny_sysu):
    folder = tiny_sysu / "cam1/0003"
    for i in range(12, 0, -1):
        (folder / f"{i:04d}.jpg").rename(folder / f"{3 * i:04d}.jpg")
    table = write_permutations(tiny_sysu, SYSU_COUNTS["test"])
    test = eval_set("sysu", tiny_sysu, gallery="official", trials=1)
    assert keys(test.gallery.take(test.gallery_trials[0]))[0] == (1, 3, 3 * table[1, 3][0, 0])


@pytest.mark.skipif(not OFFICIAL.exists(), reason="the official split is not at hand")
@pytest.mark.parametrize(("mode", "total"), [("all", 301), ("indoor", 112)])
def test_the_real_official_galleries(tmp_path, mode, total):
    split = np.load(OFFICIAL)
    counts = {int(pid): [0] * 6 for pid in split["test_id"]}
    for camera, pid, n in split["counts_cam_pid_n"].tolist():
        counts[pid][camera - 1] = n
        folder = tmp_path / f"cam{camera}/{pid:04d}"
        folder.mkdir(parents=True)
        for i in range(1, n + 1):
            (folder / f"{i:04d}.jpg").touch()
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp/test_id.txt").write_text(",".join(map(str, split["test_id"])))
    pairs = list(zip(split["gallery_cam"].tolist(), split["gallery_pid"].tolist(), strict=True))
    first = {pair: split["gallery_first10"][i] for i, pair in enumerate(pairs)}
    write_permutations(tmp_path, counts, first=first)
    kept = [i for i, pair in enumerate(pairs) if mode == "all" or pair[0] in (1, 2)]
    assert len(kept) == total
    for shots in (1, 10):
        test = eval_set("sysu", tmp_path, mode=mode, gallery="official", shots=shots)
        held = keys(test.gallery)
        for trial, rows in enumerate(test.gallery_trials):
            numbers = split["gallery_first10"][:, trial, :shots].tolist()
            expected = [(*pairs[i], number) for i in kept for number in numbers[i]]
            assert [held[row] for row in rows] == expected
        seeded = eval_set("sysu", tmp_path, mode=mode, shots=shots)
        assert [len(rows) for rows in seeded.gallery_trials] == [total * shots] * 10
    assert len(test.query) == 3803
    assert (test.query.camids == 3).sum() == 1883
    assert (np.diff(test.query.camids) >= 0).all()


@pytest.mark.slow
@pytest.mark.skipif(not LAYOUT.exists(), reason="the real layout is not at hand")
def test_the_real_training_counts(tmp_path):
    layout = json.loads(LAYOUT.read_text())
    for split, name in (("train", "train_id"), ("val", "val_id_inferred"), ("test", "test_id")):
        (tmp_path / "exp").mkdir(exist_ok=True)
        (tmp_path / f"exp/{split}_id.txt").write_text(",".join(map(str, layout[name])))
    for pid, row in layout["images_per_id_per_cam"].items():
        for camera, n in enumerate(row, start=1):
            folder = tmp_path / f"cam{camera}/{int(pid):04d}"
            folder.mkdir(parents=True)
            for i in range(1, n + 1):
                (folder / f"{i:04d}.jpg").touch()
    train = train_set("sysu", tmp_path)
    assert (train.num_ids, len(train.visible), len(train.infrared)) == (395, 22258, 11909)
    assert train_set("sysu", tmp_path, subset="fit").num_ids == 296


BAD_SYSU_TRAIN = {
    "no train list": (remove("exp/train_id.txt"), r"exp/train_id.txt does not exist"),
    "no val list": (remove("exp/val_id.txt"), r"exp/val_id.txt does not exist"),
    "words": (write("exp/train_id.txt", "1,two,5"), r"train_id.txt: .*'two"),
    "empty": (write("exp/train_id.txt", ""), r"train_id.txt: .*; expected one line"),
    "spaces for commas": (write("exp/train_id.txt", "1 2 5"), r"train_id.txt: .*'1 2 5"),
    "lines for commas": (write("exp/train_id.txt", "1\n2\n5"), r"train_id.txt: .*'1\\n2"),
    "negative": (write("exp/train_id.txt", "1,-2"), r"identity -2 has no visible image"),
    "in train and test": (write("exp/test_id.txt", "3,5"), r"identity 5 is in .*test_id.*train_id"),
    "in val and test": (write("exp/test_id.txt", "3,20"), r"identity 20 is in .*test_id.*val_id"),
    "path": (write("exp/train_id.txt", "1,../../9"), r"train_id.txt: .*'../../9"),
    "huge": (write("exp/train_id.txt", "1," + "9" * 50), r"identity 9999.* has no visible image"),
    "bytes": (write("exp/train_id.txt", b"\xff\x00"), r"cannot be read as text"),
    "no such identity": (write("exp/train_id.txt", "1,77"), r"identity 77 has no visible image"),
    "visible only": (
        both(
            remove("cam6/0009/0001.jpg"), remove("cam3/0009/0001.jpg"), remove("cam3/0009/0002.jpg")
        ),
        r"identity 9 has no infrared image in the cameras \(3, 6\) of",
    ),
    "image links out": (link_out("cam1/0001/0001.jpg"), r"0001.jpg leads to .*outside"),
    "identity links out": (link_out("cam1/0001"), r"cam1/0001 leads to .*outside"),
    "camera links out": (link_out("cam4"), r"cam4/.* leads to .*outside"),
    "list links out": (link_out("exp/train_id.txt"), r"train_id.txt leads to .*outside"),
    "no camera": (lambda r: (r / "cam6").rename(r / "c6"), r"has no cam6/\. .*signed form"),
    "no exp": (lambda r: (r / "exp").rename(r / "lists"), r"has no exp/"),
}


@pytest.mark.parametrize("case", BAD_SYSU_TRAIN)
def test_bad_sysu_training_data(tiny_sysu, case):
    damage, message = BAD_SYSU_TRAIN[case]
    damage(tiny_sysu)
    with pytest.raises(DataError, match=message):
        train_set("sysu", tiny_sysu)


def permutations(change):
    """Write permutations after `change`d a table (6, 1) of cells."""

    def apply(root):
        write_permutations(root, SYSU_COUNTS["test"])
        cells = loadmat(root / "exp/rand_perm_cam.mat")["rand_perm_cam"]
        cells = change(cells)
        savemat(root / "exp/rand_perm_cam.mat", {"rand_perm_cam": cells})

    return apply


def put(value):
    def change(cells):
        cells[0, 0][2, 0] = np.array(value)  # camera 1, identity 3, 12 images
        return cells

    return permutations(change)


BAD_OFFICIAL = {
    "absent": (lambda r: None, r"rand_perm_cam.mat cannot be read .*No such.*--gallery seeded"),
    "text": (write("exp/rand_perm_cam.mat", "hello" * 100), r"rand_perm_cam.mat cannot be read"),
    "nothing": (write("exp/rand_perm_cam.mat", ""), r"rand_perm_cam.mat cannot be read"),
    "hdf5": (
        write(
            "exp/rand_perm_cam.mat",
            b"MATLAB 7.3 MAT-file" + b" " * 105 + b"\x00\x02IM" + b"x" * 512,
        ),
        r"rand_perm_cam.mat cannot be read",
    ),
    "other variable": (
        lambda r: savemat(r / "exp/rand_perm_cam.mat", {"perm": np.ones(3)}),
        r"rand_perm_cam.mat cannot be read",
    ),
    "no cells": (permutations(lambda c: np.ones((6, 1))), r"camera 1, identity 3, trial 1"),
    "four cameras": (permutations(lambda c: c[:4]), r"rand_perm_cam.mat cannot be read"),
    "zero": (put([[0, 1, 2]] * 10), r"has \[0\] for camera 1, identity 3, trial 1"),
    "past the end": (put([[13, *range(1, 13)]] * 10), r"different numbers in 1\.\.12"),
    "fraction": (put([[1.5, 2]] * 10), r"camera 1, identity 3"),
    "nan": (put([[np.nan, 2]] * 10), r"camera 1, identity 3"),
    "strings": (put("permutation"), r"camera 1, identity 3"),
    "few trials": (put([list(range(1, 13))] * 4), r"identity 3, trial 5"),
    "three dimensions": (put(np.ones((10, 2, 2))), r"camera 1, identity 3, trial 1"),
    "empty": (put(np.zeros((0, 0))), r"identity 3, trial 1"),
    "few identities": (
        permutations(lambda c: np.array([[p[:5]] for p in c[:, 0]] + [[0]], dtype=object)[:6]),
        r"camera 1, identity 6",
    ),
    "links out": (
        both(write("exp/rand_perm_cam.mat", "x"), link_out("exp/rand_perm_cam.mat")),
        r"rand_perm_cam.mat leads to",
    ),
}


@pytest.mark.parametrize("case", BAD_OFFICIAL)
def test_bad_official_permutations(tiny_sysu, case):
    damage, message = BAD_OFFICIAL[case]
    damage(tiny_sysu)
    with pytest.raises(DataError, match=message):
        eval_set("sysu", tiny_sysu, gallery="official", shots=1)


def test_permutations_too_short_for_ten_shots(tiny_sysu):
    put([[1, 2, 3]] * 10)(tiny_sysu)
    assert eval_set("sysu", tiny_sysu, gallery="official", shots=1)
    for bad in ([1, 2, 3], [1, *range(1, 12)]):
        put([bad] * 10)(tiny_sysu)
        with pytest.raises(DataError, match="expected 10 different numbers"):
            eval_set("sysu", tiny_sysu, gallery="official", shots=10)


def test_empty_query_and_gallery(tiny_sysu):
    (tiny_sysu / "exp/test_id.txt").write_text("777")
    with pytest.raises(DataError, match="empty query: .* no infrared image for all-search"):
        eval_set("sysu", tiny_sysu)
    (tiny_sysu / "exp/test_id.txt").write_text("30")
    with pytest.raises(DataError, match="empty gallery: .* no visible image for indoor-search"):
        eval_set("sysu", tiny_sysu, mode="indoor")
    (tiny_sysu / "exp/test_id.txt").unlink()
    with pytest.raises(DataError, match="test_id.txt does not exist"):
        eval_set("sysu", tiny_sysu)


# --- SYSU-MM01: caches ----------------------------------------------------------------------------


def write_caches(root, size=(8, 4)):
    train = train_set("sysu", root, use_cache=False)
    for word, labels in (("rgb", train.labels[0]), ("ir", train.labels[1])):
        numbers = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
        pixels = np.broadcast_to(numbers, (len(labels), *size, 3))
        np.save(root / f"train_{word}_resized_img.npy", pixels)
        np.save(root / f"train_{word}_resized_label.npy", labels)
    return train


def test_caches_are_taken_as_they_are(tiny_sysu):
    plain = write_caches(tiny_sysu)
    cached = train_set("sysu", tiny_sysu)
    for name in ("visible", "infrared"):
        images, expected = getattr(cached, name), getattr(plain, name)
        assert images.paths == () and len(images.pixels) == len(images) == len(expected)
        assert images.pids.tolist() == expected.pids.tolist()
        assert set(images.camids) == {-1} and images.modality == name
    assert cached.labels[0].tolist() == plain.labels[0].tolist()
    whole = cached.infrared.pixels
    assert Path(whole.filename) == tiny_sysu / "train_ir_resized_img.npy"
    assert isinstance(whole, np.memmap) and whole.mode == "c"  # the file stays as it is
    assert cached.pids.tolist() == plain.pids.tolist()
    assert train_set("sysu", tiny_sysu, use_cache=False).visible.paths == plain.visible.paths


def test_fit_takes_rows_of_the_caches(tiny_sysu):
    write_caches(tiny_sysu)
    cached = train_set("sysu", tiny_sysu, subset="fit")
    plain = train_set("sysu", tiny_sysu, subset="fit", use_cache=False)
    full = train_set("sysu", tiny_sysu, use_cache=False)
    rows = cached.visible.pixels[:, 0, 0, 0]  # each pixel of an image is its row
    assert [full.visible.paths[i] for i in rows] == list(plain.visible.paths)
    assert cached.labels[1].tolist() == plain.labels[1].tolist()
    assert cached.pids.tolist() == [1, 2, 5, 9]


def test_incomplete_caches_are_reported_and_left(tiny_sysu, caplog):
    write_caches(tiny_sysu)
    (tiny_sysu / "train_ir_resized_label.npy").unlink()
    assert train_set("sysu", tiny_sysu).visible.pixels is None
    assert "of the four caches" in caplog.text


@pytest.mark.parametrize("relative", [False, True])
def test_caches_beside_the_folder_are_found_and_said(tiny_sysu, monkeypatch, caplog, relative):
    """AGW's and HCT's pre-processing joins folder and file without a slash."""
    write_caches(tiny_sysu)
    for file in tiny_sysu.glob("*.npy"):
        file.rename(tiny_sysu.with_name(tiny_sysu.name + file.name))
    monkeypatch.chdir(tiny_sysu)
    assert train_set("sysu", "." if relative else tiny_sysu).visible.pixels is None
    hints = caplog.messages[:]
    assert len(hints) == 4
    for hint in hints:
        assert hint.startswith("a cache of an earlier release lies beside")
        word, old, new = shlex.split(hint.partition("to use it: ")[2])
        assert word == "mv"
        os.rename(old, new)
    assert train_set("sysu", tiny_sysu).visible.pixels is not None
    assert caplog.messages == hints


def resave(name, change):
    def apply(root):
        file = root / f"train_{name}.npy"
        np.save(file, change(np.load(file)))

    return apply


def replace_pid(values):
    return np.where(values == 3, 2, values)


BAD_CACHES = {
    "float pixels": (resave("rgb_resized_img", lambda a: a.astype(np.float32)), r"float32 \(22, 8"),
    "flat pixels": (
        resave("rgb_resized_img", lambda a: a[..., 0]),
        r"expected uint8 \(n, H, W, 3\)",
    ),
    "grey pixels": (
        resave("rgb_resized_img", lambda a: a[..., :1]),
        r"expected uint8 \(n, H, W, 3\)",
    ),
    "channels first": (
        resave("rgb_resized_img", lambda a: a.transpose(0, 3, 1, 2)),
        r"expected uint8",
    ),
    "image missing": (resave("ir_resized_img", lambda a: a[1:]), r"train_ir_resized_img.npy"),
    "label missing": (resave("ir_resized_label", lambda a: a[1:]), r"train_ir_resized_img.npy"),
    "label grid": (resave("ir_resized_label", lambda a: a[:, None]), r"integers \(n,\)"),
    "empty": (
        both(
            resave("ir_resized_label", lambda a: a[:0]), resave("ir_resized_img", lambda a: a[:0])
        ),
        r"cannot be used",
    ),
    "labels from 1": (
        resave("ir_resized_label", lambda a: a + 1),
        r"labels from 1 to 6; expected .* all of 0\.\.5",
    ),
    "negative": (
        resave("ir_resized_label", lambda a: a - 1),
        r"labels from -1 to 4; expected .* all of 0\.\.5",
    ),
    "gap": (resave("ir_resized_label", replace_pid), r"from 0 to 5; expected"),
    "few ids": (write("exp/train_id.txt", "1,2"), r"labels from 0 to 5; .* all of 0\.\.3"),
    "not numpy": (write("train_rgb_resized_img.npy", "hello"), r"cannot be used"),
    "nothing": (write("train_rgb_resized_img.npy", ""), r"cannot be used"),
    "cut off": (lambda r: os.truncate(r / "train_rgb_resized_img.npy", 300), r"cannot be used"),
    "pickle": (
        lambda r: np.save(r / "train_ir_resized_label.npy", np.array([{}], dtype=object)),
        r"cannot be used",
    ),
}


@pytest.mark.parametrize("case", BAD_CACHES)
def test_bad_caches(tiny_sysu, case):
    damage, message = BAD_CACHES[case]
    write_caches(tiny_sysu)
    damage(tiny_sysu)
    with pytest.raises(DataError, match=message) as caught:
        train_set("sysu", tiny_sysu)
    assert "python pre_process_sysu.py" in str(caught.value)


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["rgb_resized_img", "ir_resized_label"])
def test_nothing_in_a_cache_is_executed(tiny_sysu, tmp_path, name):
    write_caches(tiny_sysu)
    for content in (pickle.dumps(Payload(tmp_path / "ran")), None):
        if content:
            (tiny_sysu / f"train_{name}.npy").write_bytes(content)
        else:
            array = np.array([Payload(tmp_path / "ran")], dtype=object)
            np.save(tiny_sysu / f"train_{name}.npy", array, allow_pickle=True)
        with pytest.raises(DataError, match="cannot be used"):
            train_set("sysu", tiny_sysu)
        assert not (tmp_path / "ran").exists()


def test_defaults_of_the_protocol_options():
    expected = {"trial": 1, "direction": "v2i", "protocol": "paper", "mode": "all"}
    expected |= {"gallery": "seeded", "shots": 1, "trials": 10, "subset": "test", "tta": "no"}
    assert vars(EvalOptions()) == expected
