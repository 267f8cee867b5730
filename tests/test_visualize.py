"""Tests of visualize.py: what is measured for a figure, every command, and refusals."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import sparse

import stand_in
import visualize
from data_loader import EvalLoader
from data_manager import DataError, EvalSet, ImageList, eval_set
from datasets.decode import ImageCache
from datasets.folders import folder_images
from engine.evaluate import distances, embed
from eval_metrics import METRICS, eval_regdb
from figures import charts, evaluation, image_grids
from model import TwoStreamNet
from networks.checkpoint_file import save_checkpoint

SIZE = (96, 32)


def script(name):
    """A script as a module; `test` is also the name of one of Python's own."""
    path = Path(visualize.__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{name}_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


test_script = script("test")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Leaves the logging of the process alone."""
    for module in (visualize, test_script.utils):
        monkeypatch.setattr(module, "setup_logging", lambda *_: None)


def network(memory, seed=0):
    torch.manual_seed(seed)
    net = TwoStreamNet(3, memory=memory, arch="resnet18", local_feat_dim=8, share_net=1)
    if memory:  # prototypes of a length that a map's positions tell apart
        torch.nn.init.normal_(net.memory.part_bank, std=0.1)
    return net.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Stand-in data in two layouts, checkpoints with and without memory."""
    root = tmp_path_factory.mktemp("visualize")
    counts = {"train_ids": 3, "test_ids": 4, "images_per_id": 3, "seed": 1, "workers": 1}
    stand_in.generate(root / "regdb", layout="regdb", **counts)
    stand_in.generate(root / "sysu", layout="sysu", **counts)
    for name, memory in (("mg", "mg"), ("sg", "sg"), ("none", None)):
        net = network(memory)
        content = {
            "net": net.state_dict(),
            "config": net.config,
            "options": {"img_h": SIZE[0], "img_w": SIZE[1], "weights": "none"},
            "selection": "last epoch",
            "epoch": 1,
            "data": "stand-in data in RegDB's layout",
        }
        save_checkpoint(root / f"{name}.pt", content)
    return root


def flags(place, checkpoint="mg", dataset="regdb"):
    where = ("--dataset", dataset, "--data-path", place / dataset)
    return [*where, "--resume", place / f"{checkpoint}.pt", "--gpu", "cpu", "--quiet"]


def draw(*words, code=0):
    """Runs a command; a refusal is its exit code."""
    if not code:
        assert visualize.main([str(word) for word in words]) == 0
        return
    with pytest.raises(SystemExit) as caught:
        visualize.main([str(word) for word in words])
    assert caught.value.code == code


# ------------------------------------------------------------------------------------- commands


COMMANDS = {
    "ranked": ("--num-queries", 2, "--top", 3),
    "distances": (),
    "embedding": ("--ids", 3),
    "addressing": ("--ids", 2, "--top", 2),
    "prototypes": ("--count", 3, "--top", 2, "--images", 5),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_draws_a_picture(name, place, tmp_path):
    path = tmp_path / f"{name}.png"
    draw(name, *flags(place), *COMMANDS[name], "--out", path)
    assert path.stat().st_size > 5_000
    first = path.read_bytes()
    image = Image.open(path)
    assert image.width / image.info["dpi"][0] < 7.5  # inches, the width of a page's text
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if name == "prototypes":  # nothing but the seed decides
        draw(name, *flags(place), *COMMANDS[name], "--out", path)
        assert path.read_bytes() == first


@pytest.mark.parametrize(("name", "checkpoint"), [("ranked", "none"), ("addressing", "sg")])
def test_sysu_and_other_networks(name, checkpoint, place, tmp_path):
    where = ("--top", 2, "--img_h", 96, "--out", tmp_path / "a.png")
    few = ("--num-queries", 2) if name == "ranked" else ("--ids", 1)
    draw(name, *flags(place, checkpoint, "sysu"), *few, *where)
    assert (tmp_path / "a.png").stat().st_size > 5_000


def test_prototypes_of_another_level(place, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(image_grids, "prototypes", lambda rows, **_: seen.extend(rows))
    monkeypatch.setattr(visualize, "save", lambda *_, **__: None)
    where = ("--level", "semantic", "--count", 2, "--out", tmp_path / "a.png")
    draw("prototypes", *flags(place), *where)
    assert [row.name.split()[0] for row in seen] == ["semantic"] * 2
    assert seen[0].patches["visible"].shape == (6, 48, 48, 3)


@pytest.mark.parametrize("uniform", [True, False])
def test_uniform_weights_are_said_to_be(uniform, place, tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(image_grids, "prototypes", lambda _, note, **__: notes.append(note))
    monkeypatch.setattr(visualize, "save", lambda *_, **__: None)
    if uniform:
        weights = sparse.csr_matrix(np.full((5 * 12, 90), 1 / 90, np.float32))
        found = {"part": weights}, (6, 2)
        monkeypatch.setattr(visualize, "addressing_weights", lambda *_: found)
    draw("prototypes", *flags(place), "--images", 5)
    assert ("All weights of the part level are alike" in notes[0]) == uniform


def test_title_and_note_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text('{"epoch": 1, "lr": 0.1, "id": 2.0, "total": 2.0}\n')
    seen = []
    monkeypatch.setattr(visualize, "save", lambda figure, path, heading: seen.append(heading))
    draw("curves", tmp_path)
    draw("curves", tmp_path, "--no-title")
    assert seen == [True, False]


def test_a_log_is_drawn_and_titled_with_its_data(tmp_path, monkeypatch):
    line = {"epoch": 1, "lr": 0.1, "id": 2.0, "total": 2.0, "memory/part/used": 0.1}
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "options.json").write_text(json.dumps({"method": "M", "data": "stand-in data"}))
    draw("curves", tmp_path)
    draw("health", tmp_path / "log.jsonl")
    assert (tmp_path / "curves.png").exists() and (tmp_path / "health.png").exists()
    assert visualize.read_log(tmp_path)[1] == "M: stand-in data"
    (tmp_path / "options.json").unlink()
    assert visualize.read_log(tmp_path)[1] == str(tmp_path)


REFUSALS = {
    "no checkpoint": (("ranked",), "name the checkpoint"),
    "no such checkpoint": (("ranked", "--resume", "nowhere.pt"), "no checkpoint at nowhere.pt"),
    "no such log": (("curves", "nowhere"), "nowhere cannot be used"),
    "no such results": (("cmc", "nowhere.json"), "nowhere.json cannot be used"),
    "another kind of file": (("curves", ".", "--out", "a.jpg"), ".png or .pdf"),
    "no such folder": (("curves", ".", "--out", "nowhere/a.png"), "folder to write into"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, message = REFUSALS[name]
    draw(*words, code=2)
    assert message in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_the_work(place, capsys, monkeypatch):
    monkeypatch.setattr(visualize.os, "access", lambda path, mode: path != place)
    monkeypatch.setattr(visualize, "Subject", None)
    draw("ranked", *flags(place), code=2)
    assert f"--out {place / 'ranked.png'}: expected" in capsys.readouterr().err


def test_of_several_splits_the_first_is_drawn(place, tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "Subject", lambda args: seen.append(args.resume) or 1 / 0)
    seen, pattern = [], place / "mg{trial}.pt"
    (place / "mg1.pt").write_bytes((place / "mg.pt").read_bytes())
    with pytest.raises(ZeroDivisionError):
        draw("ranked", "--resume", pattern, "--dataset", "regdb", "--out", tmp_path / "a.png")
    assert seen == [str(place / "mg1.pt")]


NETWORK_REFUSALS = {
    "no memory": (("addressing",), "none", "train_MGMRA.py"),
    "no memory to search": (("prototypes",), "none", "no memory"),
    "no such level": (("prototypes", "--level", "semantic"), "sg", "no semantic level"),
    "too many identities": (("embedding", "--ids", "8"), "none", "invalid choice: 8"),
    "no such start": (("distances", "--before", "no.pth"), "none", "--before none|imagenet|PATH"),
    "wrong height": (("ranked", "--img_h", "100"), "none", "96, 192"),
}


@pytest.mark.parametrize("name", NETWORK_REFUSALS)
def test_refusals_about_a_network(name, place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, checkpoint, message = NETWORK_REFUSALS[name]
    draw(words[0], *flags(place, checkpoint), *words[1:], code=2)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ measurements


def listed(pids, camids, modality):
    names = tuple(f"{i}.png" for i in range(len(pids)))
    return ImageList(Path("."), names, np.array(pids), np.array(camids), modality)


def test_pairs_against_a_naive_loop_and_the_camera_rule():
    rng = np.random.default_rng(0)
    features = {role: rng.normal(size=(n, 5)) for role, n in (("query", 4), ("gallery", 6))}
    features = {k: v / np.linalg.norm(v, axis=1, keepdims=True) for k, v in features.items()}
    query = listed([1, 2, 1, 3], [3, 6, 3, 3], "infrared")
    gallery = listed([1, 2, 9, 1, 3, 2], [2, 1, 4, 1, 2, 5], "visible")
    rows = np.array([5, 0, 3, 4])
    protocol = EvalSet("sysu", query, gallery, (rows,), "sysu", "p")
    within, between = [], []
    for q in range(4):
        for g in rows:
            if query.camids[q] == 3 and gallery.camids[g] == 2:
                continue
            value = 1 - features["query"][q] @ features["gallery"][g]
            (within if query.pids[q] == gallery.pids[g] else between).append(value)
    trial = evaluation.first_trial(protocol)
    features["gallery"] = features["gallery"][rows]
    found = evaluation.pair_distances(trial, features)
    np.testing.assert_allclose(found[0], within)
    np.testing.assert_allclose(found[1], between)
    same = evaluation.ignored(replace(trial, camera_rule="same"))
    naive = [
        [(p, c) == (gallery.pids[g], gallery.camids[g]) for g in rows]
        for p, c in zip(query.pids, query.camids, strict=True)
    ]
    assert same.tolist() == naive
    with pytest.raises(ValueError, match="camera rule 'other'"):
        evaluation.ignored(replace(trial, camera_rule="other"))


def test_the_first_of_several_trials_is_drawn_and_named():
    images = listed([4, 5, 6], [1, 2, 3], "visible")
    protocol = EvalSet("sysu", images, images, (np.array([2, 0]), np.array([1])), "none", "p")
    assert evaluation.first_trial(replace(protocol, tta="flip")).tta == "flip"
    trial = evaluation.first_trial(protocol)
    assert (trial.gallery.pids.tolist(), trial.query.pids.tolist()) == ([6, 4], [4, 5, 6])
    assert trial.protocol == "p; first trial's gallery"
    only = replace(protocol, gallery_trials=protocol.gallery_trials[:1])
    assert evaluation.first_trial(only).protocol == "p"
    turned = replace(protocol, query_trials=(np.array([1]), np.array([0])))
    trial = evaluation.first_trial(turned)
    assert (trial.query.pids.tolist(), trial.query_trials) == ([5], None)
    assert trial.protocol == "p; first trial's queries"


def test_identities_are_chosen_among_those_in_both_modalities(place):
    protocol = eval_set("regdb", place / "regdb")
    shown = set(protocol.query.pids.tolist())
    assert set(evaluation.chosen_identities(protocol, 9, 0).tolist()) == shown
    some = {tuple(evaluation.chosen_identities(protocol, 2, seed)) for seed in range(20)}
    assert all(len(pids) == 2 and set(pids) <= shown for pids in some) and len(some) > 2


def test_pca_keeps_planar_distances_and_names_their_share():
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(20, 2)) * (5, 2)
    turned = plane @ np.linalg.qr(rng.normal(size=(6, 6)))[0][:2] + 3
    points, names = evaluation.project(turned)
    gaps = lambda x: np.linalg.norm(x[:, None] - x, axis=2)  # noqa: E731
    np.testing.assert_allclose(gaps(points), gaps(plane), atol=1e-9)
    shares = np.linalg.eigvalsh(np.cov(plane.T))[::-1]
    assert names[0] == f"component 1 ({100 * shares[0] / shares.sum():.0f} % of the variance)"
    assert np.ptp(points[:, 0]) > np.ptp(points[:, 1])
    again = evaluation.project(turned[::-1])[0][::-1]
    np.testing.assert_allclose(points, again, atol=1e-9)  # signs too


# --------------------------------------------------------------------------------- logs and results


def test_a_log_is_read(tmp_path):
    file = tmp_path / "log.jsonl"
    lines = [{"epoch": e, "total": t} for e, t in ((1, 1.0), (2, 2.0))]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert visualize.read_log(tmp_path)[0] == lines
    no_epoch = json.dumps({"epoch": 1, "eval": dict.fromkeys(METRICS, 0.5)})
    cases = (
        ("", "is empty"),
        ('{"epoch": 1}\n{"ep', "log.jsonl cannot be used"),
        (no_epoch, "'eval' lacks 'epoch'"),
    )
    for text, message in cases:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            visualize.read_log(file)


def result(folder, re_rank="no", **change):
    folder.mkdir(parents=True)
    content = {"cmc": [0.5, 1.0], "mAP": 0.4, "dataset": "d", "protocol": "p", "re_rank": re_rank}
    (folder / "results.json").write_text(json.dumps(content | change))
    return folder


def test_cmc_names_runs_by_their_folders(tmp_path, monkeypatch):
    runs = [result(tmp_path / "HCT/test"), result(tmp_path / "MG/test", "k_reciprocal")]
    seen = []
    monkeypatch.setattr(charts, "cmc_curves", lambda runs, **_: seen.extend(runs))
    monkeypatch.setattr(visualize, "save", lambda *_, **__: None)
    draw("cmc", *runs, "--out", tmp_path / "a.png")
    assert [name for name, _ in seen] == [str(run) for run in runs]
    assert [read["re_rank"] for _, read in seen] == ["no", "k_reciprocal"]
    seen.clear()
    draw("cmc", *runs, "--names", "a", "b", "--out", tmp_path / "a.png")
    assert [name for name, _ in seen] == ["a", "b"]


def test_results_that_cannot_be_drawn(tmp_path, capsys):
    run = result(tmp_path / "a")
    draw("cmc", run, run, code=2)
    assert "tell them apart with --names" in capsys.readouterr().err
    draw("cmc", run, "--names", "a", "b", code=2)
    assert "2 --names for 1 results" in capsys.readouterr().err
    for text, message in (
        ("{", "cannot be used"),
        ("[]", "expected dict"),
        ('{"cmc": 1}', "lacks 'mAP'"),
    ):
        (run / "results.json").write_text(text)
        draw("cmc", run, code=2)
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------- test.py's files


def evaluate(*words, code=0):
    if not code:
        assert test_script.main([str(word) for word in words]) == 0
        return
    with pytest.raises(SystemExit) as caught:
        test_script.main([str(word) for word in words])
    assert caught.value.code == code


def test_an_evaluation_draws_and_saves_what_it_ranked(place, tmp_path):
    words = [*flags(place), "--re_rank", "random_walk", "--output-dir", tmp_path, "--figures"]
    evaluate(*words, "--save-features", tmp_path / "f.npz")
    kinds = ("ranked_lists", "cmc", "distances", "embedding")
    names = {f"{kind}.{form}" for kind in kinds for form in ("png", "pdf")}
    assert {path.name for path in tmp_path.iterdir()} == names | {"f.npz", "results.json"}
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    with np.load(tmp_path / "f.npz", allow_pickle=False) as saved:
        for row in rows:
            gallery = saved["gallery_pcb"][saved["gallery_trials"][0]]
            distmat = distances(saved["query_pcb"], gallery, row["re_rank"])
            cmc, mean_ap, _ = eval_regdb(distmat, saved["query_pids"], saved["gallery_pids"])
            assert row["mAP"] == pytest.approx(mean_ap)
            assert row["cmc"] == pytest.approx(cmc)
        assert saved["query_modality"] == "visible" and saved["gallery_modality"] == "infrared"
        assert (place / "regdb" / str(saved["query_paths"][0])).is_file()
        assert saved["query_camids"].tolist() == [1] * 12
        assert str(saved["protocol"]) == rows[0]["protocol"]


def test_features_go_into_an_npz(place, tmp_path, capsys):
    evaluate(*flags(place), "--save-features", tmp_path / "f.npy", code=2)
    assert ".npz" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- own folders


@pytest.fixture
def folders(tmp_path):
    """Two folders of images of several sizes and depths."""
    rng = np.random.default_rng(0)
    for name in ("people/a.png", "people/b/c.JPG", "night/x.bmp", "night/y.png", "night/z/w.jpeg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (rng.integers(40, 90), 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    (tmp_path / "people/notes.txt").write_text("no image")
    (tmp_path / "people/.thumbnails").mkdir()
    (tmp_path / "people/.thumbnails/a.png").write_text("hidden")
    return tmp_path


def own(place, folders, *words):
    names = ("--query-dir", folders / "people", "--gallery-dir", folders / "night")
    return [*names, "--resume", place / "none.pt", "--gpu", "cpu", "--quiet", *words]


def test_a_folder_is_listed_by_name_without_hidden_files(folders, caplog):
    with caplog.at_level("INFO"):
        images = folder_images(folders / "people", "visible")
    assert images.paths == ("a.png", "b/c.JPG")
    expected = "visible images taken: 2; other files skipped: 1 (notes.txt)"
    assert [text.partition(": ")[2] for text in caplog.messages] == [expected]
    assert (images.root / images.paths[1]).is_file()
    assert (
        images.modality == "visible" and images.pids.tolist() == images.camids.tolist() == [-1] * 2
    )
    for name, message in (("nowhere", "does not exist"), ("people/.thumbnails/..", None)):
        if message:
            with pytest.raises(DataError, match=message):
                folder_images(folders / name, "visible")
    (folders / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image.*JPEG"):
        folder_images(folders / "empty", "visible")


def test_own_images_are_ranked_as_their_features_say(place, folders, tmp_path):
    evaluate(*own(place, folders, "--output-dir", tmp_path / "out"))
    out = tmp_path / "out"
    names = {"ranks.csv", "ranks.json", "ranked_lists.png"}
    assert {path.name for path in out.iterdir()} == names
    found = json.loads((out / "ranks.json").read_text())
    assert (found["query_modality"], found["gallery_modality"]) == ("visible", "infrared")
    net = network(None)
    features = []
    for name, modality in (("people", "visible"), ("night", "infrared")):
        images = folder_images(folders / name, modality)
        batches = EvalLoader(ImageCache(*SIZE)(images), batch_size=1, device=torch.device("cpu"))
        features.append(embed(net, batches, modality, ("pcb",)))
        features[-1]["paths"] = images.paths
    similarity = features[0]["pcb"] @ features[1]["pcb"].T
    lines = ["query,rank,gallery,score"]
    for q, entry in enumerate(found["ranks"]):
        assert entry["query"] == features[0]["paths"][q]
        order = np.argsort(-similarity[q], kind="stable")
        expected = [features[1]["paths"][g] for g in order]
        assert [answer["image"] for answer in entry["gallery"]] == expected
        scores = [answer["score"] for answer in entry["gallery"]]
        np.testing.assert_allclose(scores, similarity[q, order], atol=1e-4)
        lines += [
            f"{entry['query']},{a['rank']},{a['image']},{a['score']}" for a in entry["gallery"]
        ]
    assert (out / "ranks.csv").read_text().split() == lines


def test_own_images_of_every_format_are_searched_and_their_features_saved(place, folders, tmp_path):
    for name in ("a.tif", "b.webp", "c.gif", "d.unknown"):
        form = {"d.unknown": "PNG"}.get(name)
        noise = np.random.default_rng(len(name)).integers(0, 256, (60, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folders / "people" / name, form)
    out = tmp_path / "out"
    words = ("--top", 2, "--output-dir", out, "--save-features", tmp_path / "f.npz")
    evaluate(*own(place, folders, *words))
    found = json.loads((out / "ranks.json").read_text())
    assert "cosine similarity" in found["score"]
    names = [entry["query"] for entry in found["ranks"]]
    assert names == ["a.png", "a.tif", "b/c.JPG", "b.webp", "c.gif", "d.unknown"]
    assert all(len(entry["gallery"]) == 2 for entry in found["ranks"])
    with np.load(tmp_path / "f.npz") as saved:
        assert saved["query_paths"].tolist() == names
        similarity = saved["query_pcb"] @ saved["gallery_pcb"].T
    best = [entry["gallery"][0]["score"] for entry in found["ranks"]]
    np.testing.assert_allclose(similarity.max(axis=1), best, atol=1e-5)


def test_modalities_of_own_images_can_be_named(place, folders, tmp_path):
    words = ("--gallery-modality", "visible", "--re_rank", "random_walk", "--output-dir", tmp_path)
    evaluate(*own(place, folders, *words))
    found = json.loads((tmp_path / "ranks.json").read_text())
    assert (found["query_modality"], found["gallery_modality"]) == ("visible", "visible")
    assert found["re_rank"] == "random_walk"
    assert found["score"].startswith("minus the re-ranked distance")


def test_own_folders_that_cannot_be_searched(place, folders, capsys):
    evaluate("--query-dir", folders / "people", "--resume", place / "none.pt", code=2)
    assert "--gallery-dir FOLDER" in capsys.readouterr().err
    words = own(place, folders)
    for name, message in (("nowhere", "does not exist"), ("people/.thumbnails", "a.png")):
        words[1] = folders / name
        evaluate(*words, code=2)
        assert message in capsys.readouterr().err
    words[1] = folders / "people/a.png"
    evaluate(*words, code=2)
    assert "a.png does not exist, or is a file, not a folder" in capsys.readouterr().err
    (folders / "night/broken.png").write_bytes(b"\x89PNG not quite")
    evaluate(*own(place, folders), code=2)
    error = capsys.readouterr().err
    assert "cannot decode" in error and "broken.png" in error
