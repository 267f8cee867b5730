import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import LLCM_COUNTS, REGDB_IDS, save_image
from damage import both, link_out, remove, write

import data_manager
from data_manager import DataError, ImageList, eval_set, train_set

OFFICIAL = Path(__file__).parents[2] / "shared/golden/official_sysu/split_test.npz"
LAYOUT = Path(__file__).parents[2] / "shared/data/sysu_layout.json"


# --- RegDB ----------------------------------------------------------------------------------------


def test_regdb_training_lists_agree_with_the_files(tiny_regdb):
    train = train_set("regdb", tiny_regdb)
    assert train.pids.tolist() == list(REGDB_IDS["train"])
    assert train.num_ids == 6
    for images, labels, word, camera in (
        (train.visible, train.labels[0], "visible", 1),
        (train.infrared, train.labels[1], "thermal", 2),
    ):
        lines = (tiny_regdb / f"idx/train_{word}_1.txt").read_text().splitlines()
        assert [f"{p} {k}" for p, k in zip(images.paths, labels, strict=True)] == lines
        assert images.pids.tolist() == [int(line.split("/")[1]) for line in lines]
        assert images.camids.tolist() == [camera] * len(lines)
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
    assert fit.pids[fit.labels[0]].tolist() == fit.visible.pids.tolist()
    assert fit.pids[fit.labels[1]].tolist() == fit.infrared.pids.tolist()
    assert "validation" in val.protocol


def test_regdb_lists_with_windows_ends_blank_lines_and_spaces_in_names(tiny_regdb):
    save_image(tiny_regdb / "Visible/4/a b.bmp", 1)
    file = tiny_regdb / "idx/train_visible_1.txt"
    lines = [*file.read_text().splitlines(), "", "  Visible/4/a b.bmp   1  "]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    train = train_set("regdb", tiny_regdb)
    assert train.visible.paths[-1] == "Visible/4/a b.bmp"


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


def relabel(number, label):
    def apply(root):
        line = (root / "idx" / VISIBLE).read_text().splitlines()[number - 1]
        edit(VISIBLE, number, f"{line.split()[0]} {label}")(root)

    return apply


def drop_label(word, label):
    def apply(root):
        file = root / f"idx/train_{word}_1.txt"
        lines = file.read_text().splitlines()
        file.write_text("\n".join(x for x in lines if not x.endswith(f" {label}")))

    return apply


VISIBLE, THERMAL = "train_visible_1.txt", "train_thermal_1.txt"
FIRST = "Visible/31/male_back_v_00000_31.bmp"  # line 1 of the visible list, label 0
SHAPE = r"train_visible_1.txt:{} of .* is .*; expected `Visible/<pid>/<file> <label>`"
BAD_REGDB = {
    "no label": (edit(VISIBLE, 2, FIRST), SHAPE.format(2)),
    "word for label": (edit(VISIBLE, 2, f"{FIRST} one"), SHAPE.format(2)),
    "fraction": (edit(VISIBLE, 2, f"{FIRST} 1.0"), SHAPE.format(2)),
    "negative": (edit(VISIBLE, 2, f"{FIRST} -1"), SHAPE.format(2)),
    "other digits": (edit(VISIBLE, 2, f"{FIRST} ١"), SHAPE.format(2)),
    "underscore": (edit(VISIBLE, 2, f"{FIRST} 1_0"), SHAPE.format(2)),
    "huge label": (edit(VISIBLE, 2, f"{FIRST} {10**30}"), SHAPE.format(2)),
    "dots": (edit(VISIBLE, 3, "Visible/../../x.bmp 0"), SHAPE.format(3)),
    "hidden dots": (edit(VISIBLE, 3, "Visible/4/../../../x.bmp 0"), SHAPE.format(3)),
    "absolute": (edit(VISIBLE, 3, "/etc/passwd 0"), SHAPE.format(3)),
    "backslashes": (edit(VISIBLE, 3, "Visible\\31\\x.bmp 0"), SHAPE.format(3)),
    "other modality": (edit(VISIBLE, 3, "Thermal/31/x.bmp 0"), SHAPE.format(3)),
    "no pid": (edit(VISIBLE, 3, "Visible/x.bmp 0"), SHAPE.format(3)),
    "pid of words": (edit(VISIBLE, 3, "Visible/ann/x.bmp 0"), SHAPE.format(3)),
    "too deep": (edit(VISIBLE, 3, "Visible/4/4/x.bmp 1"), SHAPE.format(3)),
    "parent": (edit(VISIBLE, 3, "Visible/4/.. 1"), r":3 names .* no such file"),
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
    "twice": (edit(VISIBLE, 0, f"{FIRST} 0"), r":13 names .*again; expected each image once"),
    "label of another": (relabel(7, 0), r"identity 8 has label 0 in the lists of .*; expected one"),
    "two labels": (relabel(1, 6), r"identity 31 has label 0 in the lists of"),
    "gap": (
        both(drop_label("visible", 2), drop_label("thermal", 2)),
        r"identity .* has label 3 in",
    ),
    "visible only": (drop_label("thermal", 5), r"identity 2 has no infrared image"),
    "infrared only": (drop_label("visible", 5), r"identity 2 has no visible image"),
    "empty list": (write(f"idx/{THERMAL}", " \n\n"), r"train_thermal_1.txt is empty"),
    "no list": (remove(f"idx/{THERMAL}"), r"train_thermal_1.txt does not exist"),
    "list of bytes": (write(f"idx/{VISIBLE}", b"\xff\xfe\x00"), r"cannot be read as text"),
    "image links out": (link_out(FIRST), r"31.bmp leads to .*outside"),
    "folder links out": (link_out("Visible/4"), r"Visible/4 leads to .*outside"),
    "tree links out": (link_out("Thermal"), r"Thermal/31 leads to .*outside"),
    "list links out": (link_out(f"idx/{VISIBLE}"), r"train_visible_1.txt leads to .*outside"),
}


@pytest.mark.parametrize("case", BAD_REGDB)
def test_bad_regdb(tiny_regdb, case):
    damage, message = BAD_REGDB[case]
    damage(tiny_regdb)
    with pytest.raises(DataError, match=message):
        train_set("regdb", tiny_regdb)


def test_a_split_that_is_not_there_is_named(tiny_regdb):
    with pytest.raises(DataError, match="train_visible_2.txt does not exist"):
        train_set("regdb", tiny_regdb, trial=2)


# --- Layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["regdb", "sysu"])
def test_a_missing_folder_says_how_to_get_the_data(tmp_path, dataset):
    with pytest.raises(DataError, match="does not exist") as caught:
        train_set(dataset, tmp_path / "nowhere")
    text = str(caught.value)
    assert "signed form" in text and f"stand_in.py --layout {dataset}" in text
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file does not exist, or is a file"):
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
        ("sysu", "exp", "exp/ is part of the data set's download"),
        ("llcm", "idx", "put it beside test_vis/"),
    ],
)
def test_where_the_lists_alone_are_missing_it_is_said(dataset, folder, hint, request):
    root = request.getfixturevalue(f"tiny_{dataset}")
    (root / folder).rename(root / "gone")
    with pytest.raises(DataError, match=f"has no {folder}/.*the lists are not: .*{hint}"):
        eval_set(dataset, root)


# --- ImageList ------------------------------------------------------------------------------------


def test_take_keeps_everything_in_step(tiny_regdb):
    images = train_set("regdb", tiny_regdb).infrared
    part = images.take([5, 2, 2])
    assert part.paths == tuple(images.paths[i] for i in (5, 2, 2))
    assert part.pids.tolist() == images.pids[[5, 2, 2]].tolist()
    assert len(images.take([])) == 0


def test_take_twice_from_a_cache_composes_rows():
    numbers = np.arange(10)
    pixels = np.broadcast_to(numbers[:, None, None, None], (10, 4, 2, 3))
    images = ImageList(Path("x"), (), numbers, numbers, "visible", pixels)
    taken = images.take([7, 3, 5]).take([2, 0])
    assert taken.pixels[:, 0, 0, 0].tolist() == taken.pids.tolist() == [5, 7]


# --- LLCM -----------------------------------------------------------------------------------------


def test_llcm_training_lists(tiny_llcm):
    train = train_set("llcm", tiny_llcm)
    for images, labels, word in (
        (train.visible, train.labels[0], "vis"),
        (train.infrared, train.labels[1], "nir"),
    ):
        lines = (tiny_llcm / f"idx/train_{word}.txt").read_text().splitlines()
        assert [f"{p} {k}" for p, k in zip(images.paths, labels, strict=True)] == lines
        assert images.pids.tolist() == labels.tolist()
        assert set(images.camids.tolist()) == {-1}
    assert "6 identities, 12 visible and 18 infrared" in train.description


PROTOCOLS = ("paper", "repository")


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


def test_llcm_s_other_protocol_turns_the_paper_s_round(tiny_llcm):
    theirs = {"direction": "v2i", "trials": 4}
    paper, other = (eval_set("llcm", tiny_llcm, protocol=p, **theirs) for p in PROTOCOLS)
    assert other.query.paths == paper.gallery.paths and other.gallery.paths == paper.query.paths
    assert paper.query_trials is None
    for drawn, asking, rows in zip(
        paper.gallery_trials, other.query_trials, other.gallery_trials, strict=True
    ):
        assert asking.tolist() == drawn.tolist()
        assert rows.tolist() == list(range(len(paper.query)))
    assert (other.query.modality, other.camera_rule) == ("infrared", "same")
    assert "the CVPR 2023 paper's protocol, " in paper.protocol
    assert "the authors' repository's protocol" in other.protocol
    assert "protocol" not in eval_set("llcm", tiny_llcm, direction="i2v").protocol
    with pytest.raises(DataError, match="one protocol .* leave out --protocol repository"):
        eval_set("llcm", tiny_llcm, direction="i2v", protocol="repository")


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
SHAPE = r"train_vis.txt:2 of .* is .*; expected `<folder>/<file> <label>`"
BAD_LLCM = {
    "no label": (edit(TRAIN, 2, "vis/0020/000.jpg"), SHAPE),
    "dots": (edit(TRAIN, 2, "vis/../../x.jpg 0"), r"vis/../.. leads to .*outside"),
    "absolute": (edit(TRAIN, 2, "/etc/passwd 0"), r"/etc leads to .*outside"),
    "no folder": (edit(TRAIN, 2, "x.jpg 0"), SHAPE),
    "null": (edit(TRAIN, 2, "vis\0/x.jpg 0"), SHAPE),
    "too long": (edit(TRAIN, 2, f"{'x' * 5000}/x.jpg 0"), r"no such file"),
    "backslashes": (edit(TRAIN, 2, "vis\\20\\x.jpg 0"), SHAPE),
    "no such file": (edit(TRAIN, 2, "vis/0020/9.jpg 0"), r"no such file"),
    "twice": (edit(TRAIN, 2, "vis/0020/000.jpg 0"), r":2 names vis/0020/000.jpg again"),
    "gap": (edit(TRAIN, 0, "nir/0020/000.jpg 9"), r"identity 9 has label 9 in the lists"),
    "empty list": (write(f"idx/{TRAIN}", ""), r"train_vis.txt is empty; expected `<folder>"),
    "no list": (remove(f"idx/{TRAIN}"), r"train_vis.txt does not exist"),
    "binary list": (write(f"idx/{TRAIN}", b"\xff\xfe\x00"), r"cannot be read as text"),
    "link out": (link_out("vis"), r"leads to .*outside"),
}


@pytest.mark.parametrize("case", BAD_LLCM)
def test_bad_llcm_training_data(tiny_llcm, case):
    break_it, message = BAD_LLCM[case]
    break_it(tiny_llcm)
    with pytest.raises(DataError, match=message):
        train_set("llcm", tiny_llcm)


BAD_LLCM_TEST = {
    "word": (write("idx/test_id.txt", "3,x"), r"test_id.txt: .*'x'; expected one line"),
    "unknown": (
        write("idx/test_id.txt", "9999"),
        r"empty query: .* no visible image for LLCM, visible to infrared",
    ),
    "no ids": (remove("idx/test_id.txt"), r"test_id.txt does not exist"),
}


@pytest.mark.parametrize("case", BAD_LLCM_TEST)
def test_bad_llcm_test_data(tiny_llcm, case):
    break_it, message = BAD_LLCM_TEST[case]
    break_it(tiny_llcm)
    with pytest.raises(DataError, match=message):
        eval_set("llcm", tiny_llcm)


def test_llcm_folder_is_told_apart(tiny_llcm, tiny_regdb):
    with pytest.raises(DataError, match="looks like LLCM: pass RegDB.s folder, or --dataset llcm"):
        train_set("regdb", tiny_llcm)
    with pytest.raises(DataError, match="looks like RegDB: pass LLCM.s folder, or --dataset regdb"):
        train_set("llcm", tiny_regdb)
    assert data_manager.data_name("llcm", tiny_llcm) == "LLCM"
    write("stand_in.json", "{}")(tiny_llcm)
    assert data_manager.data_name("llcm", tiny_llcm) == "stand-in data in LLCM's layout"


# --- A data set of one's own ----------------------------------------------------------------------


class Own(data_manager.DataSet):
    name, title, folders = "own", "Own", ("images",)
    people = {"train": ((7, 3, 5), (5, 3, 7)), "test": ((1, 2), (2,))}

    def items(self, root, role, trial):
        def listed(pids, camid):
            return [(f"images/{role}_{camid}_{pid}.png", pid, camid) for pid in pids]

        return listed(self.people[role][0], 1), listed(self.people[role][1], 2)


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own/images").mkdir(parents=True)
    monkeypatch.setitem(data_manager.DATASETS, "own", Own())
    return tmp_path / "own"


def test_an_image_without_a_label_is_refused(tiny_regdb):
    train = train_set("regdb", tiny_regdb)
    with pytest.raises(DataError, match=f"of identity {train.pids[2]}, which has no label"):
        dataclasses.replace(train, pids=np.delete(train.pids, 2))


def test_a_data_set_is_its_lists_of_images(own):
    train = train_set("own", own)
    assert train.pids.tolist() == [3, 5, 7]
    assert train.labels[0].tolist() == [2, 0, 1]
    assert train.infrared.paths[2] == "images/train_2_7.png"
    test = eval_set("own", own, direction="i2v")
    assert (test.query.pids.tolist(), test.gallery.pids.tolist()) == ([2], [1, 2])
    assert test.protocol == "Own, infrared to visible"
    assert eval_set("own", own, subset="val").query.pids.tolist() == [3]
    assert Own().default_folder == Path("data/Own")


def test_its_lists_are_checked_and_no_stand_in_is_promised(own, monkeypatch):
    with pytest.raises(DataError, match="does not exist") as caught:
        train_set("own", own / "nowhere")
    assert "stand_in.py" not in str(caught.value)
    monkeypatch.setitem(Own.people, "train", ((7, 3), (3,)))
    with pytest.raises(DataError, match="training identity 7 has no infrared image"):
        train_set("own", own)
    monkeypatch.setitem(Own.people, "test", ((), (2,)))
    with pytest.raises(DataError, match="empty query: .* has no visible image"):
        eval_set("own", own)
