import io
import json
import os
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import LLCM_COUNTS, REGDB_IDS, SYSU_COUNTS, save_image
from scipy.io import loadmat, savemat

import data_manager
from data_manager import DataError, EvalOptions, ImageList, eval_set, train_set

OFFICIAL = Path(__file__).parents[2] / "shared/golden/official_sysu/split_test.npz"
LAYOUT = Path(__file__).parents[2] / "shared/data/sysu_layout.json"


def keys(images):
    """(camera, pid, 1-based image number) of each image, read off its path."""
    return [
        (int(p.split("/")[0][3:]), int(p.split("/")[1]), int(p.split("/")[2][:-4]))
        for p in images.paths
    ]


# --- RegDB ----------------------------------------------------------------------------------------


def test_regdb_training_lists_agree_with_the_files(tiny_regdb):
    train = train_set("regdb", tiny_regdb)
    assert train.pids.tolist() == list(REGDB_IDS["train"])
    assert train.num_ids == 6
    for images, labels, word, camera in (
        (train.visible, train.visible_labels, "visible", 1),
        (train.infrared, train.infrared_labels, "thermal", 2),
    ):
        lines = (tiny_regdb / f"idx/train_{word}_1.txt").read_text().splitlines()
        assert [f"{p} {k}" for p, k in zip(images.paths, labels, strict=True)] == lines
        assert images.pids.tolist() == [int(line.split("/")[1]) for line in lines]
        assert images.camids.tolist() == [camera] * len(lines)
        assert images.origins[3] == f"idx/train_{word}_1.txt:4"
        assert all((images.root / p).is_file() for p in images.paths)
        assert {a.dtype for a in (images.pids, images.camids, labels)} == {np.dtype(np.int64)}
    assert (train.visible.modality, train.infrared.modality) == ("visible", "infrared")
    assert "6 identities, 12 visible and 18 infrared" in train.description


def test_regdb_directions_swap_query_and_gallery(tiny_regdb):
    forth = eval_set("regdb", tiny_regdb, direction="v2i")
    back = eval_set("regdb", str(tiny_regdb), direction="i2v")
    assert (forth.query.modality, forth.gallery.modality) == ("visible", "infrared")
    assert (len(forth.query), len(forth.gallery)) == (8, 12)
    assert back.query.paths == forth.gallery.paths
    assert back.gallery.paths == forth.query.paths
    assert [t.tolist() for t in forth.gallery_trials] == [list(range(12))]
    assert forth.camera_rule == "none"
    assert set(forth.query.pids) == set(REGDB_IDS["test"]) == set(forth.gallery.pids)
    assert "visible to infrared" in forth.protocol and "infrared to visible" in back.protocol


def test_regdb_fit_and_val_share_the_training_identities(tiny_regdb):
    full, fit = train_set("regdb", tiny_regdb), train_set("regdb", tiny_regdb, subset="fit")
    val = eval_set("regdb", tiny_regdb, subset="val")
    held_out = [REGDB_IDS["train"][0], REGDB_IDS["train"][5]]
    assert sorted(set(val.query.pids)) == sorted(held_out) == sorted(set(val.gallery.pids))
    assert fit.pids.tolist() == list(REGDB_IDS["train"][1:5])
    assert sorted(fit.visible.paths + val.query.paths) == sorted(full.visible.paths)
    assert sorted(fit.infrared.paths + val.gallery.paths) == sorted(full.infrared.paths)
    assert fit.pids[fit.visible_labels].tolist() == fit.visible.pids.tolist()
    assert fit.pids[fit.infrared_labels].tolist() == fit.infrared.pids.tolist()
    assert "validation" in val.protocol


def test_regdb_lists_with_windows_ends_blank_lines_and_spaces_in_names(tiny_regdb):
    save_image(tiny_regdb / "Visible/4/a b.bmp", 1)
    file = tiny_regdb / "idx/train_visible_1.txt"
    lines = [*file.read_text().splitlines(), "", "  Visible/4/a b.bmp   1  "]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    train = train_set("regdb", tiny_regdb)
    assert train.visible.paths[-1] == "Visible/4/a b.bmp"
    assert train.visible.origins[-1] == "idx/train_visible_1.txt:14"


def test_regdb_links_inside_the_folder_are_fine(tiny_regdb):
    path = tiny_regdb / train_set("regdb", tiny_regdb).visible.paths[0]
    path.rename(tiny_regdb / "stored.bmp")
    path.symlink_to(tiny_regdb / "stored.bmp")
    (tiny_regdb / "Thermal").rename(tiny_regdb / "Infrared")
    (tiny_regdb / "Thermal").symlink_to("Infrared")
    link = tiny_regdb.parent / "link"
    link.symlink_to(tiny_regdb)
    assert len(train_set("regdb", link).visible) == 12


def edit(name, number, text):
    """A change of one line (from 1; 0 appends) of an idx list."""

    def apply(root):
        file = root / "idx" / name
        lines = file.read_text().splitlines()
        lines[number - 1 if number else len(lines) :] = [text, *(lines[number:] if number else [])]
        file.write_text("\n".join(lines) + "\n")

    return apply


def drop_label(word, label):
    def apply(root):
        file = root / f"idx/train_{word}_1.txt"
        lines = file.read_text().splitlines()
        file.write_text("\n".join(x for x in lines if not x.endswith(f" {label}")))

    return apply


def both(*steps):
    return lambda root: [step(root) for step in steps]


def link_out(name):
    """Move a file or folder out of the data folder and leave a link in its place."""

    def apply(root):
        (root / name).rename(root.parent / "outside")
        (root / name).symlink_to(root.parent / "outside")

    return apply


def remove(name):
    return lambda root: (root / name).unlink()


def write(name, content):
    def apply(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


VISIBLE, THERMAL = "train_visible_1.txt", "train_thermal_1.txt"
FIRST = "Visible/31/male_back_v_00000_31.bmp"  # line 1 of the visible list, label 0
BAD_REGDB = {
    "no label": (edit(VISIBLE, 2, FIRST), r"train_visible_1.txt:2 has no label"),
    "word for label": (edit(VISIBLE, 2, f"{FIRST} one"), r":2 has the label 'one', not a whole"),
    "fraction": (edit(VISIBLE, 2, f"{FIRST} 1.0"), r":2 has the label '1.0'"),
    "negative": (edit(VISIBLE, 2, f"{FIRST} -1"), r":2 has the label '-1'"),
    "other digits": (edit(VISIBLE, 2, f"{FIRST} ١"), r":2 has the label"),
    "underscore": (edit(VISIBLE, 2, f"{FIRST} 1_0"), r":2 has the label '1_0'"),
    "huge label": (edit(VISIBLE, 2, f"{FIRST} {10**30}"), r":2 has the label '1000"),
    "dots": (edit(VISIBLE, 3, "Visible/../../x.bmp 0"), r":3 names .*, which leaves"),
    "hidden dots": (edit(VISIBLE, 3, "Visible/4/../../../x.bmp 0"), r":3 names .*, which leaves"),
    "absolute": (edit(VISIBLE, 3, "/etc/passwd 0"), r":3 names '/etc/passwd', which leaves"),
    "backslashes": (
        edit(VISIBLE, 3, "Visible\\31\\x.bmp 0"),
        r":3 names .*; expected `Visible/<pid>",
    ),
    "other modality": (edit(VISIBLE, 3, "Thermal/31/x.bmp 0"), r":3 names .*; expected `Visible/"),
    "no pid": (edit(VISIBLE, 3, "Visible/x.bmp 0"), r":3 names .*; expected `Visible/<pid>/<file>"),
    "pid of words": (
        edit(VISIBLE, 3, "Visible/ann/x.bmp 0"),
        r":3 names .*; expected `Visible/<pid>",
    ),
    "too deep": (edit(VISIBLE, 3, "Visible/4/4/x.bmp 1"), r":3 names .*; expected `Visible/<pid>"),
    "null byte": (edit(VISIBLE, 3, "Visible/4/a\0b.bmp 1"), r":3 names .* no such file"),
    "endless name": (edit(VISIBLE, 3, f"Visible/4/{'x' * 9000} 1"), r":3 names .* no such file"),
    "missing image": (
        edit(VISIBLE, 3, "Visible/4/gone.bmp 1"),
        r":3 names Visible/4/gone.bmp.* no such",
    ),
    "missing folder": (edit(VISIBLE, 3, "Visible/999/a.bmp 1"), r":3 names Visible/999/a.bmp"),
    "folder for image": (
        both(lambda r: (r / "Visible/4/d.bmp").mkdir(), edit(VISIBLE, 0, "Visible/4/d.bmp 1")),
        r":13 names Visible/4/d.bmp",
    ),
    "deleted image": (remove(FIRST), r"train_visible_1.txt:1 names Visible/31"),
    "twice": (
        edit(VISIBLE, 0, f"{FIRST} 0"),
        r":13 names .*visible_1.txt:1 does; expected each image",
    ),
    "label of another": (
        edit(VISIBLE, 1, f"{FIRST} 3"),
        r"train_visible_1.txt:7 gives label 3 to identity 8, .*visible_1.txt:1 to 31",
    ),
    "two labels": (edit(VISIBLE, 1, f"{FIRST} 6"), r"an identity has two labels"),
    "gap": (both(drop_label("visible", 2), drop_label("thermal", 2)), r"label 2 is not among them"),
    "visible only": (drop_label("thermal", 5), r"identity 2 .*one\s+modality only"),
    "infrared only": (drop_label("visible", 5), r"identity 2 .*one\s+modality only"),
    "empty list": (write(f"idx/{THERMAL}", " \n\n"), r"train_thermal_1.txt is empty"),
    "no list": (remove(f"idx/{THERMAL}"), r"train_thermal_1.txt does not exist"),
    "list of bytes": (write(f"idx/{VISIBLE}", b"\xff\xfe\x00"), r"can't be read as text"),
    "image links out": (link_out(FIRST), r"31.bmp is a link to .*outside"),
    "folder links out": (link_out("Visible/4"), r"Visible/4 is a link to .*outside"),
    "tree links out": (link_out("Thermal"), r"Thermal/31 is a link to .*outside"),
    "list links out": (link_out(f"idx/{VISIBLE}"), r"train_visible_1.txt is a link to .*outside"),
}


@pytest.mark.parametrize("case", BAD_REGDB)
def test_bad_regdb(tiny_regdb, case):
    damage, message = BAD_REGDB[case]
    damage(tiny_regdb)
    with pytest.raises(DataError, match=message):
        train_set("regdb", tiny_regdb)


@pytest.mark.parametrize("trial", [0, 11, -1, "1", 1.5, None, True])
def test_trial_out_of_range(tiny_regdb, tiny_sysu, trial):
    with pytest.raises(DataError, match=r"trial is .*; expected 1\.\.10"):
        train_set("regdb", tiny_regdb, trial=trial)
    with pytest.raises(DataError, match=r"trial is .*; expected 1\.\.10"):
        eval_set("sysu", tiny_sysu, trial=trial)


def test_a_split_that_is_not_there_is_named(tiny_regdb):
    with pytest.raises(DataError, match="train_visible_2.txt does not exist"):
        train_set("regdb", tiny_regdb, trial=2)


def test_one_identity_is_too_few_to_hold_one_out(tiny_regdb):
    for word in ("visible", "thermal"):
        for label in range(1, 6):
            drop_label(word, label)(tiny_regdb)
    assert train_set("regdb", tiny_regdb).num_ids == 1
    with pytest.raises(DataError, match="too few"):
        train_set("regdb", tiny_regdb, subset="fit")


# --- Layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["regdb", "sysu"])
def test_a_missing_folder_says_how_to_get_the_data(tmp_path, dataset):
    for path in (tmp_path / "nowhere", tmp_path / "a\0b"):
        with pytest.raises(DataError, match="does not exist") as caught:
            train_set(dataset, path)
        text = str(caught.value)
        assert "signed form" in text and f"stand_in.py --layout {dataset}" in text
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="does not exist"):
        eval_set(dataset, tmp_path / "file")


def test_wrong_layouts_are_told_apart(tiny_regdb, tiny_sysu, tmp_path):
    cases = {
        ("regdb", tiny_regdb / "idx"): f"It is in {tiny_regdb}: pass --data-path {tiny_regdb}",
        ("regdb", tiny_sysu): "--dataset sysu",
        ("sysu", tiny_regdb): "--dataset regdb",
        ("sysu", tiny_sysu / "cam1"): f"pass --data-path {tiny_sysu}",
    }
    nested = tmp_path / "nested"
    nested.mkdir()
    (nested / "RegDB").symlink_to(tiny_regdb)
    cases["regdb", nested] = f"pass --data-path {nested / 'RegDB'}"
    for (dataset, path), message in cases.items():
        for read in (train_set, eval_set):
            with pytest.raises(DataError) as caught:
                read(dataset, path)
            assert message in str(caught.value)


@pytest.mark.parametrize("folder", ["Visible", "Thermal"])
def test_each_regdb_folder_is_looked_for(tiny_regdb, folder):
    (tiny_regdb / folder).rename(tiny_regdb / "gone")
    with pytest.raises(DataError, match=f"has no {folder}/.*signed form"):
        eval_set("regdb", tiny_regdb)


@pytest.mark.parametrize(
    ("dataset", "folder", "hint"),
    [
        ("regdb", "idx", "comes apart from the images"),
        ("sysu", "exp", "train_id.txt, val_id.txt and test_id.txt is part of the data set's"),
        ("llcm", "idx", "put it beside test_vis/"),
    ],
)
def test_where_the_lists_alone_are_missing_it_is_said(dataset, folder, hint, request):
    root = request.getfixturevalue(f"tiny_{dataset}")
    (root / folder).rename(root / "gone")
    with pytest.raises(DataError, match=f"has no {folder}/.*the lists are not: .*{hint}"):
        eval_set(dataset, root)


BAD_OPTIONS = [
    {"direction": "v2v"}, {"mode": "outdoor"}, {"gallery": "random"}, {"shots": 5}, {"shots": True},
    {"trials": 0}, {"trials": 11}, {"trials": "10"}, {"subset": "fit"}, {"subset": None},
]  # fmt: skip


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options(tiny_regdb, options):
    (name,) = options
    with pytest.raises(DataError, match=f"{name} is .*; expected"):
        eval_set("regdb", tiny_regdb, **options)


def test_bad_data_set_and_subset(tiny_regdb):
    with pytest.raises(DataError, match="dataset is 'market'; expected regdb or sysu"):
        train_set("market", tiny_regdb)
    with pytest.raises(DataError, match="subset is 'val'; expected all or fit"):
        train_set("regdb", tiny_regdb, subset="val")
    with pytest.raises(TypeError):
        eval_set("regdb", tiny_regdb, tirals=3)


# --- ImageList ------------------------------------------------------------------------------------


def test_take_keeps_everything_in_step(tiny_regdb):
    images = train_set("regdb", tiny_regdb).infrared
    part = images.take([5, 2, 2])
    for name in ("paths", "origins"):
        assert getattr(part, name) == tuple(getattr(images, name)[i] for i in (5, 2, 2))
    assert part.pids.tolist() == images.pids[[5, 2, 2]].tolist()
    assert part.describe(0) == f"{images.root / images.paths[5]} (named in {images.origins[5]})"
    assert replace(part, origins=()).describe(1) == str(images.root / images.paths[2])
    assert len(images.take([])) == 0


def test_take_twice_from_a_cache_composes_rows():
    numbers = np.arange(10)
    images = ImageList(Path("x"), (), numbers, numbers, "visible", cache=Path("x.npy"))
    assert images.cache_rows is None
    assert images.take([7, 3, 5]).take([2, 0]).cache_rows.tolist() == [5, 7]


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
        (train.visible, train.visible_labels, (1, 2, 4, 5)),
        (train.infrared, train.infrared_labels, (3, 6)),
    ):
        expected = naive_items(counts, cameras)
        assert keys(images) == expected
        assert images.camids.tolist() == [item[0] for item in expected]
        assert images.pids.tolist() == [item[1] for item in expected]
        assert labels.tolist() == [train.pids.tolist().index(item[1]) for item in expected]
        assert images.origins == () and images.cache is None


def test_sysu_fit_leaves_the_validation_list_out(tiny_sysu):
    fit = train_set("sysu", tiny_sysu, subset="fit")
    assert fit.pids.tolist() == [1, 2, 5, 9]
    assert keys(fit.visible) == naive_items(SYSU_COUNTS["train"], (1, 2, 4, 5))
    assert fit.pids[fit.infrared_labels].tolist() == fit.infrared.pids.tolist()
    val = eval_set("sysu", tiny_sysu, subset="val", trials=2)
    assert set(val.query.pids) == {12, 20} == set(val.gallery.pids)
    with pytest.raises(DataError, match="empty gallery: cam1/, cam2/.*val_id.txt"):
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


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.float32, np.float64, np.uint16])
@pytest.mark.parametrize("compressed", [False, True])
def test_permutations_are_read_as_scipy_reads_them(kind, compressed):
    rng = np.random.default_rng(0)
    cells = np.empty((3, 1), dtype=object)
    for i, shape in enumerate([(10, 7), (0, 0), (1, 1)]):
        cells[i, 0] = np.empty((2, 1), dtype=object)
        cells[i, 0][0, 0] = rng.integers(0, 200, shape).astype(kind)
        cells[i, 0][1, 0] = rng.integers(0, 200, (2, 3)).astype(kind)
    stream = io.BytesIO()
    variables = {"note": "text", "other": {"a": 1}, "rand_perm_cam": cells}
    savemat(stream, variables, do_compression=compressed)
    found = data_manager._read_mat(stream.getvalue(), "rand_perm_cam")
    expected = loadmat(stream)["rand_perm_cam"]
    assert found.shape == expected.shape == (3, 1)
    for mine, theirs in zip(found[:, 0], expected[:, 0], strict=True):
        assert mine.shape == theirs.shape == (2, 1)
        for one, other in zip(mine[:, 0], theirs[:, 0], strict=True):
            assert np.array_equal(one, other) and one.shape == other.shape


def test_damaged_permutations_never_raise_anything_else(tiny_sysu):
    write_permutations(tiny_sysu, SYSU_COUNTS["test"])
    file = tiny_sysu / "exp/rand_perm_cam.mat"
    good, rng = file.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(3):
            bad[rng.randrange(120, len(bad))] = rng.randrange(256)
        file.write_bytes(bad[: rng.choice([None, None, rng.randrange(len(bad))])])
        try:
            eval_set("sysu", tiny_sysu, gallery="official", trials=1)
        except DataError:
            refused += 1
    assert refused > 50


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
    "words": (write("exp/train_id.txt", "1,two,5"), r"train_id.txt holds 'two'"),
    "empty": (write("exp/train_id.txt", ""), r"train_id.txt holds ''"),
    "spaces for commas": (write("exp/train_id.txt", "1 2 5"), r"train_id.txt holds '1 2 5'"),
    "lines for commas": (write("exp/train_id.txt", "1\n2\n5"), r"train_id.txt holds '1\\n2"),
    "negative": (write("exp/train_id.txt", "1,-2"), r"train_id.txt holds '-2'"),
    "path": (write("exp/train_id.txt", "1,../../9"), r"train_id.txt holds '../../9'"),
    "huge": (write("exp/train_id.txt", "1," + "9" * 50), r"train_id.txt holds '9999"),
    "bytes": (write("exp/train_id.txt", b"\xff\x00"), r"can't be read as text"),
    "twice": (write("exp/train_id.txt", "1,2,2"), r"train_id.txt names an identity twice"),
    "in train and val": (write("exp/val_id.txt", "12,5"), r"identity 5 is in .*train.*val_id"),
    "in train and test": (write("exp/test_id.txt", "3,5"), r"identity 5 is in .*train.*test_id"),
    "in val and test": (write("exp/test_id.txt", "3,20"), r"identity 20 is in .*val.*test_id"),
    "no such identity": (write("exp/train_id.txt", "1,77"), r"identity 77 has no visible image"),
    "visible only": (
        both(
            remove("cam6/0009/0001.jpg"), remove("cam3/0009/0001.jpg"), remove("cam3/0009/0002.jpg")
        ),
        r"identity 9 has no infrared image: none in cam3/0009/, cam6/0009/",
    ),
    "image links out": (link_out("cam1/0001/0001.jpg"), r"0001.jpg is a link to .*outside"),
    "identity links out": (link_out("cam1/0001"), r"cam1/0001 is a link to .*outside"),
    "camera links out": (link_out("cam4"), r"cam4/.* is a link to .*outside"),
    "list links out": (link_out("exp/train_id.txt"), r"train_id.txt is a link to .*outside"),
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
    "absent": (lambda r: None, r"rand_perm_cam.mat does not exist; .*--gallery seeded"),
    "text": (write("exp/rand_perm_cam.mat", "hello" * 100), r"rand_perm_cam.mat can't be read"),
    "nothing": (write("exp/rand_perm_cam.mat", ""), r"rand_perm_cam.mat can't be read"),
    "hdf5": (
        write(
            "exp/rand_perm_cam.mat",
            b"MATLAB 7.3 MAT-file" + b" " * 105 + b"\x00\x02IM" + b"x" * 512,
        ),
        r"rand_perm_cam.mat can't be read",
    ),
    "other variable": (
        lambda r: savemat(r / "exp/rand_perm_cam.mat", {"perm": np.ones(3)}),
        r"rand_perm_cam.mat can't be read",
    ),
    "no cells": (permutations(lambda c: np.ones((6, 1))), r"camera 1, identity 3, trial 1"),
    "four cameras": (permutations(lambda c: c[:4]), r"rand_perm_cam.mat can't be read"),
    "zero": (put([[0, 1, 2]] * 10), r"has \[0, 1, 2\] for camera 1, identity 3, trial 1"),
    "past the end": (put([[*range(1, 13), 13]] * 10), r"different numbers in 1\.\.12"),
    "fraction": (put([[1.5, 2]] * 10), r"camera 1, identity 3"),
    "nan": (put([[np.nan, 2]] * 10), r"camera 1, identity 3"),
    "repeated": (put([[2, 2, 1]] * 10), r"camera 1, identity 3"),
    "strings": (put("permutation"), r"rand_perm_cam.mat can't be read"),
    "few trials": (put([list(range(1, 13))] * 4), r"identity 3, trial 5"),
    "empty": (put(np.zeros((0, 0))), r"identity 3, trial 1"),
    "few identities": (
        permutations(lambda c: np.array([[p[:5]] for p in c[:, 0]] + [[0]], dtype=object)[:6]),
        r"camera 1, identity 6",
    ),
    "links out": (
        both(write("exp/rand_perm_cam.mat", "x"), link_out("exp/rand_perm_cam.mat")),
        r"rand_perm_cam.mat is a link",
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
    with pytest.raises(DataError, match="at least 10 different numbers"):
        eval_set("sysu", tiny_sysu, gallery="official", shots=10)


def test_empty_query_and_gallery(tiny_sysu):
    (tiny_sysu / "exp/test_id.txt").write_text("777")
    with pytest.raises(DataError, match="empty query: cam3/, cam6/ .*1 identities in exp/test_id"):
        eval_set("sysu", tiny_sysu)
    (tiny_sysu / "exp/test_id.txt").write_text("30")
    with pytest.raises(DataError, match="empty gallery: cam1/, cam2/ .*mode indoor"):
        eval_set("sysu", tiny_sysu, mode="indoor")
    (tiny_sysu / "exp/test_id.txt").unlink()
    with pytest.raises(DataError, match="test_id.txt does not exist"):
        eval_set("sysu", tiny_sysu)


# --- SYSU-MM01: caches ----------------------------------------------------------------------------


def write_caches(root, size=(8, 4)):
    train = train_set("sysu", root, use_cache=False)
    for word, labels in (("rgb", train.visible_labels), ("ir", train.infrared_labels)):
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
        assert images.paths == () and images.cache_rows is None and len(images) == len(expected)
        assert images.pids.tolist() == expected.pids.tolist()
        assert set(images.camids) == {-1} and images.modality == name
    assert cached.visible_labels.tolist() == plain.visible_labels.tolist()
    assert cached.infrared.cache == tiny_sysu / "train_ir_resized_img.npy"
    assert cached.pids.tolist() == plain.pids.tolist()
    assert train_set("sysu", tiny_sysu, use_cache=False).visible.paths == plain.visible.paths


def test_fit_takes_rows_of_the_caches(tiny_sysu):
    write_caches(tiny_sysu)
    cached = train_set("sysu", tiny_sysu, subset="fit")
    plain = train_set("sysu", tiny_sysu, subset="fit", use_cache=False)
    full = train_set("sysu", tiny_sysu, use_cache=False)
    assert [full.visible.paths[i] for i in cached.visible.cache_rows] == list(plain.visible.paths)
    assert cached.infrared_labels.tolist() == plain.infrared_labels.tolist()
    assert cached.pids.tolist() == [1, 2, 5, 9]


def test_caches_alone_are_enough_for_training(tiny_sysu, tmp_path):
    write_caches(tiny_sysu)
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in tiny_sysu.glob("*.npy"):
        (alone / file.name).symlink_to(file)  # links to faster storage are the user's own affair
    train = train_set("sysu", alone)
    assert train.num_ids == 6 and train.pids.tolist() == list(range(6))
    with pytest.raises(DataError, match="val_id.txt does not exist"):
        train_set("sysu", alone, subset="fit")


def test_incomplete_caches_are_reported_and_left(tiny_sysu, caplog):
    write_caches(tiny_sysu)
    (tiny_sysu / "train_ir_resized_label.npy").unlink()
    assert train_set("sysu", tiny_sysu).visible.cache is None
    assert "of the four caches" in caplog.text


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
    "float labels": (resave("ir_resized_label", lambda a: a * 1.0), r"and float64 \("),
    "label grid": (resave("ir_resized_label", lambda a: a[:, None]), r"integers \(n,\)"),
    "empty": (
        both(
            resave("ir_resized_label", lambda a: a[:0]), resave("ir_resized_img", lambda a: a[:0])
        ),
        r"n > 0",
    ),
    "labels from 1": (
        resave("ir_resized_label", lambda a: a + 1),
        r"1\.\.6; expected each of 0\.\.5",
    ),
    "negative": (
        resave("ir_resized_label", lambda a: a - 1),
        r"in -1\.\.4; expected each of 0\.\.5",
    ),
    "gap": (resave("ir_resized_label", replace_pid), r"5 values in 0\.\.5; expected each"),
    "few ids": (write("exp/train_id.txt", "1,2"), r"6 values in 0\.\.5; expected each of 0\.\.3"),
    "not numpy": (write("train_rgb_resized_img.npy", "hello"), r"can't be read"),
    "nothing": (write("train_rgb_resized_img.npy", ""), r"can't be read"),
    "cut off": (lambda r: os.truncate(r / "train_rgb_resized_img.npy", 300), r"can't be read"),
    "pickle": (
        lambda r: np.save(r / "train_ir_resized_label.npy", np.array([{}], dtype=object)),
        r"can't be read",
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
        with pytest.raises(DataError, match="can't be read"):
            train_set("sysu", tiny_sysu)
        assert not (tmp_path / "ran").exists()


def test_defaults_of_the_protocol_options():
    assert EvalOptions() == EvalOptions(1, "v2i", "all", "seeded", 1, 10, "test")


# --- LLCM -----------------------------------------------------------------------------------------


def test_llcm_training_lists(tiny_llcm):
    train = train_set("llcm", tiny_llcm)
    for images, labels, word in (
        (train.visible, train.visible_labels, "vis"),
        (train.infrared, train.infrared_labels, "nir"),
    ):
        lines = (tiny_llcm / f"idx/train_{word}.txt").read_text().splitlines()
        assert [f"{p} {k}" for p, k in zip(images.paths, labels, strict=True)] == lines
        assert images.pids.tolist() == labels.tolist()
        assert set(images.camids.tolist()) == {-1}
        assert images.origins[2] == f"idx/train_{word}.txt:3"
    assert "6 identities, 12 visible and 18 infrared" in train.description


def naive_llcm_gallery(root, word, trial):
    """The protocol's draw and of the tiny set's counts, written once more."""
    generator, drawn = random.Random(trial), []
    for pid in sorted(LLCM_COUNTS):
        for camera in sorted(LLCM_COUNTS[pid][word == "nir"]):
            folder = f"test_{word}/cam{camera}/{pid:04d}"
            drawn.append(
                generator.choice(sorted(f"{folder}/{p.name}" for p in (root / folder).iterdir()))
            )
    return drawn


@pytest.mark.parametrize(("direction", "words"), [("v2i", ("vis", "nir")), ("i2v", ("nir", "vis"))])
def test_llcm_queries_and_seeded_galleries(tiny_llcm, direction, words):
    protocol = eval_set("llcm", tiny_llcm, direction=direction, trials=4)
    files = [p.relative_to(tiny_llcm).as_posix() for p in tiny_llcm.glob(f"test_{words[0]}/*/*/*")]
    assert sorted(protocol.query.paths) == sorted(files)
    for path, pid, camera in zip(
        protocol.query.paths, protocol.query.pids, protocol.query.camids, strict=True
    ):
        assert path.split("/")[1:3] == [f"cam{camera}", f"{pid:04d}"]
    assert len(protocol.gallery_trials) == 4
    for trial, rows in enumerate(protocol.gallery_trials):
        paths = protocol.gallery.take(rows).paths
        assert list(paths) == naive_llcm_gallery(tiny_llcm, words[1], trial)
    assert protocol.camera_rule == "same"
    assert "4 trials" in protocol.protocol and protocol.query.modality in protocol.protocol
    assert len(eval_set("llcm", tiny_llcm).gallery_trials) == 10


def test_llcm_folders_may_lack_leading_zeros(tiny_llcm):
    before = eval_set("llcm", tiny_llcm)
    for folder in list(tiny_llcm.glob("test_*/cam*/*")):
        folder.rename(folder.with_name(str(int(folder.name))))
    after = eval_set("llcm", tiny_llcm)
    assert after.query.pids.tolist() == before.query.pids.tolist()
    assert [len(rows) for rows in after.gallery_trials] == [
        len(rows) for rows in before.gallery_trials
    ]


def test_llcm_infrared_images_of_camera_3_do_not_exist_for_the_protocol(tiny_llcm):
    save_image(tiny_llcm / "test_nir/cam3/0003/000.jpg", 5)
    assert 3 not in eval_set("llcm", tiny_llcm, direction="i2v").query.camids
    assert 3 in eval_set("llcm", tiny_llcm, direction="v2i").query.camids


def test_llcm_validation_holds_out_every_fifth_label(tiny_llcm):
    fit, val = train_set("llcm", tiny_llcm, subset="fit"), eval_set("llcm", tiny_llcm, subset="val")
    assert fit.pids.tolist() == [1, 2, 3, 4]
    assert sorted(set(val.query.pids)) == [0, 5] == sorted(set(val.gallery.pids))
    assert val.camera_rule == "none"
    assert "validation" in val.protocol


TRAIN = "train_vis.txt"
BAD_LLCM = {
    "no label": (edit(TRAIN, 2, "vis/0020/000.jpg"), r"train_vis.txt:2 has no label"),
    "twice": (edit(TRAIN, 2, "vis/0020/000.jpg 0"), r":2 names vis/0020/000.jpg, as .*:1 does"),
    "dots": (edit(TRAIN, 2, "vis/../../x.jpg 0"), r":2 names .*, which leaves"),
    "absolute": (edit(TRAIN, 2, "/etc/passwd 0"), r":2 names '/etc/passwd', which leaves"),
    "no folder": (
        edit(TRAIN, 2, "x.jpg 0"),
        r":2 names 'x.jpg'; expected `<folder>/<file> <label>",
    ),
    "backslashes": (edit(TRAIN, 2, "vis\\20\\x.jpg 0"), r":2 names .*expected `<folder>"),
    "no such file": (edit(TRAIN, 2, "vis/0020/9.jpg 0"), r"no such file"),
    "gap": (edit(TRAIN, 0, "nir/0020/000.jpg 9"), r"label 6 is not among them"),
    "empty list": (write(f"idx/{TRAIN}", ""), r"train_vis.txt is empty; expected `<folder>"),
    "no list": (remove(f"idx/{TRAIN}"), r"train_vis.txt does not exist"),
    "binary list": (write(f"idx/{TRAIN}", b"\xff\xfe\x00"), r"can't be read as text"),
    "link out": (link_out("vis"), r"link to .*outside"),
}


@pytest.mark.parametrize("case", BAD_LLCM)
def test_bad_llcm_training_data(tiny_llcm, case):
    break_it, message = BAD_LLCM[case]
    break_it(tiny_llcm)
    with pytest.raises(DataError, match=message):
        train_set("llcm", tiny_llcm)


BAD_LLCM_TEST = {
    "word": (write("idx/test_id.txt", "3,x"), r"test_id.txt holds 'x'"),
    "twice": (write("idx/test_id.txt", "3,3"), r"names an identity twice"),
    "unknown": (write("idx/test_id.txt", "9999"), r"empty query: test_vis/, test_nir/ .*the 1 id"),
    "no ids": (remove("idx/test_id.txt"), r"test_id.txt does not exist"),
}


@pytest.mark.parametrize("case", BAD_LLCM_TEST)
def test_bad_llcm_test_data(tiny_llcm, case):
    break_it, message = BAD_LLCM_TEST[case]
    break_it(tiny_llcm)
    with pytest.raises(DataError, match=message):
        eval_set("llcm", tiny_llcm)


def test_llcm_folder_is_told_apart(tiny_llcm, tiny_regdb):
    with pytest.raises(DataError, match="looks like LLCM: pass --dataset llcm"):
        train_set("regdb", tiny_llcm)
    with pytest.raises(DataError, match="looks like RegDB: pass --dataset regdb"):
        train_set("llcm", tiny_regdb)
    assert data_manager.data_name("llcm", tiny_llcm) == "LLCM"
    write("stand_in.json", "{}")(tiny_llcm)
    assert data_manager.data_name("llcm", tiny_llcm) == "stand-in data in LLCM's layout"
