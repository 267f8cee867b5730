"""The scripts as a user runs them, on tiny stand-in data.

Each script runs in a process of its own at least once; where that adds nothing, `call` runs its
`main` here, which spares the four seconds of its imports. Networks are narrow (`short_run.NARROW`)
unless said otherwise.
"""

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipe import released_file
from short_run import NARROW

import stand_in
import test
import train_MGMRA
import utils
from memory import MemoryRead, MultiGranularityMemory
from networks.backbone import BACKBONES
from networks.checkpoint_file import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
    *("--arch", "resnet18", "--weights", "none", "--img_h", 96, "--img_w", 32, "--pad", 2),
    *("--num_pos", 2, "--batch-size", 4, "--warmup-epochs", 1),
    *("--lr", 0.05, "--backbone-lr-scale", 1, "--triplet-ramp", 9, 9, "--eval-start", 0),
    *("--gpu", "cpu", "--quiet"),
]


@pytest.fixture(autouse=True)
def narrow_networks(monkeypatch):
    monkeypatch.setitem(BACKBONES, "resnet18", NARROW["resnet18"])


def run_as_is(script, *flags, cwd, code=0):
    """Runs a script in a process; returns its standard output and error."""
    return _run([ROOT / script, *flags], cwd, code)


def run(script, *flags, cwd, code=0):
    """The same with a narrow network."""
    narrow = [ROOT / "tests/narrow.py", script.removesuffix(".py")]
    return _run([*narrow, *flags], cwd, code)


def _run(words, cwd, code):
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout, done.stderr


def call(script, *flags, cwd, code=0):
    """The same as `run`, in this process."""
    main = importlib.import_module(script.removesuffix(".py")).main
    output, error = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patched,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(error),
    ):
        patched.chdir(cwd)
        try:
            ended = main([*map(str, flags)])
        except SystemExit as stop:
            ended = stop.code
    assert ended == code, error.getvalue()
    return output.getvalue(), error.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Stand-in data in each layout: 8 training and 6 test identities."""
    root = tmp_path_factory.mktemp("data")
    common = {"train_ids": 8, "test_ids": 6, "seed": 1, "workers": 1}
    stand_in.generate(root / "regdb", layout="regdb", images_per_id=8, **common)
    stand_in.generate(root / "sysu", layout="sysu", images_per_id=2, **common)
    stand_in.generate(root / "llcm", layout="llcm", images_per_id=3, **common)
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The same of RegDB alone, as small as an epoch can be: 8 images in each modality."""
    root = tmp_path_factory.mktemp("tiny")
    counts = {"train_ids": 4, "test_ids": 3, "images_per_id": 2}
    stand_in.generate(root / "regdb", layout="regdb", **counts, seed=1, workers=1)
    return root


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def train(script, data, folder, *flags, dataset="regdb", code=0, start=call):
    where = ("--dataset", dataset, "--data-path", data / dataset, "--output-dir", folder)
    return start(script, *where, *QUICK, *flags, cwd=folder.parent, code=code)


METHODS = {  # script, flags, and how the first training is started
    "HCT": ("train_HCT.py", (), run),
    "AGW": ("train_HCT.py", ("--method", "agw", "--lr", 0.005), call),
    "SGMRA": ("train_SGMRA.py", (), run),
    "MGMRA": ("train_MGMRA.py", (), run),
    "AGW + MGMRA released": (
        "train_MGMRA.py",
        ("--method", "agw", "--lr", 0.005, "--memory-variant", "released", "--share_net", 1),
        call,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains_resumes_and_is_evaluated(name, data, tmp_path):
    script, flags, start = METHODS[name]
    folder = tmp_path / "run"
    train(script, data, folder, *flags, "--epochs", 6, start=start)
    first, *_, last = log_lines(folder)
    assert last["id"] < 0.8 * first["id"]
    assert last["total"] < first["total"]
    assert all(np.isfinite(v) for v in last.values() if isinstance(v, float))
    assert ("memory/part/survivors" in last) == ("MRA" in name)
    saved = load_checkpoint(folder / "last.pt")
    assert saved["epoch"] == 6
    assert saved["options"]["seed"] == 0
    assert {"torch", "commit"} <= set(saved["versions"])
    report = json.loads((folder / "training.json").read_text())
    assert report["last"]["selection"] == "last epoch"
    assert report["best"]["selection"] == "best Rank-1 on the test set"
    assert any((folder / "tensorboard").iterdir())

    train(script, data, folder, *flags, "--epochs", 7, "--resume")
    assert [line["epoch"] for line in log_lines(folder)] == [1, 2, 3, 4, 5, 6, 7]

    output = call(
        *("test.py", "--dataset", "regdb", "--data-path", data / "regdb", "--gpu", "cpu"),
        *("--resume", folder / "last.pt", "--output-dir", tmp_path / "test", "--quiet"),
        cwd=tmp_path,
    )[0]
    assert "stand-in data in RegDB's layout" in output
    result = json.loads((tmp_path / "test" / "results.json").read_text())
    last = log_lines(folder)[-1]["eval"]
    for metric in ("rank1", "mAP", "mINP"):
        assert result[metric] == pytest.approx(last[metric], abs=1e-6), metric
    assert (result["re_rank"], result["selection"]) == ("no", "last epoch")
    assert {row["test_feat"] for row in result["rows"]} == (
        {"neck", "pool"} if "AGW" in name else {"pcb"}
    )


@pytest.mark.parametrize("name", ["HCT", "SGMRA", "MGMRA"])
def test_hct_s_recipe_without_stripes_trains_and_is_evaluated(name, tiny, tmp_path):
    folder = tmp_path / "run"
    train(f"train_{name}.py", tiny, folder, "--pcb", "off", "--epochs", 1)
    line = log_lines(folder)[0]
    assert {"id", "triplet"} <= line.keys() and "center_triplet" not in line
    saved = load_checkpoint(folder / "last.pt")
    assert saved["config"]["head"] == "global"
    assert saved["method"] == f"{name}_global_regdb_trial1"
    flags = ("--dataset", "regdb", "--data-path", tiny / "regdb", "--gpu", "cpu", "--quiet")
    call("test.py", *flags, "--resume", folder / "last.pt", cwd=tmp_path)
    result = json.loads((folder / "test_regdb_v2i_trial1_last/results.json").read_text())
    assert [row["test_feat"] for row in result["rows"]] == ["neck", "pool"]
    assert result["rank1"] == pytest.approx(line["eval"]["rank1"])


def test_resumed_run_equals_an_unbroken_one(tiny, tmp_path):
    train("train_MGMRA.py", tiny, tmp_path / "whole", "--epochs", 2, start=run)
    train("train_MGMRA.py", tiny, tmp_path / "parts", "--epochs", 1, start=run)
    train("train_MGMRA.py", tiny, tmp_path / "parts", "--epochs", 2, "--resume", start=run)
    whole, parts = (load_checkpoint(tmp_path / n / "last.pt") for n in ("whole", "parts"))
    for name, value in whole["net"].items():
        assert torch.equal(value, parts["net"][name]), name
    for ours, theirs in zip(
        log_lines(tmp_path / "whole"), log_lines(tmp_path / "parts"), strict=True
    ):
        for key in ("id", "triplet", "total", "alignment", "memory/part/survivors"):
            assert ours[key] == theirs[key], key


def test_half_precision_trains_and_evaluates(tiny, tmp_path):
    """On the smallest data: processors without bf16 take half a second an image."""
    folder = tmp_path / "run"
    train("train_MGMRA.py", tiny, folder, "--epochs", 1, "--amp", "--tta", "flip")
    (line,) = log_lines(folder)
    assert line["eval"]["tta"] == "flip" and "flip averaging" in line["eval"]["protocol"]
    assert all(np.isfinite(v) for v in line.values() if isinstance(v, float))
    call(
        *("test.py", "--dataset", "regdb", "--data-path", tiny / "regdb", "--gpu", "cpu", "--amp"),
        *("--resume", folder / "last.pt", "--quiet", "--tta", "flip"),
        cwd=tmp_path,
    )
    result = json.loads((folder / "test_regdb_v2i_trial1_amp_flip_last/results.json").read_text())
    assert result["tta"] == "flip"
    for metric in ("rank1", "mAP", "mINP"):
        assert result[metric] == pytest.approx(line["eval"][metric], abs=1e-6), metric


def assert_scored_alike(result, folder):
    """Results of a checkpoint and of the features that it wrote are the same to the bit."""
    scored = json.loads((folder / "results.json").read_text())
    names = ("test_feat", "re_rank", "tta", "dataset", "protocol", "per_trial", "cmc", "std", "mAP")
    for mine, theirs in zip(result["rows"], scored["rows"], strict=True):
        assert {name: mine[name] for name in names} == {name: theirs[name] for name in names}


def test_sysu_trains_from_jpgs_and_caches_alike_and_selects_on_validation_ids(data, tmp_path):
    flags = ("--epochs", 1, "--trials", 2)
    train("train_MGMRA.py", data, tmp_path / "jpg", *flags, dataset="sysu")
    cached = tmp_path / "data" / "sysu"
    cached.parent.mkdir()
    shutil.copytree(data / "sysu", cached)
    run("pre_process_sysu.py", "--data-path", cached, "--img_h", 96, "--img_w", 32, cwd=tmp_path)
    assert (cached / "train_rgb_resized_img.npy").exists()
    train("train_MGMRA.py", tmp_path / "data", tmp_path / "npy", *flags, dataset="sysu")
    assert log_lines(tmp_path / "jpg")[0]["total"] == log_lines(tmp_path / "npy")[0]["total"]
    train(*("train_HCT.py", data, tmp_path / "val", "--select-on", "val", *flags), dataset="sysu")
    report = json.loads((tmp_path / "val" / "training.json").read_text())
    assert report["best"]["selection"] == "best Rank-1 on the validation identities"
    for gallery, shots in (("seeded", 1), ("official", 10)):
        output = call(
            *("test.py", "--dataset", "sysu", "--data-path", data / "sysu", "--mode", "indoor"),
            *("--gallery", gallery, "--shots", shots, "--resume", tmp_path / "jpg" / "last.pt"),
            *("--gpu", "cpu", "--re_rank", "k_reciprocal", "--output-dir", tmp_path / gallery),
            *("--save-features", tmp_path / f"{gallery}.npz"),
            cwd=tmp_path,
        )[0]
        assert "indoor" in output
        assert gallery in output
        result = json.loads((tmp_path / gallery / "results.json").read_text())
        assert result["re_rank"] == "k_reciprocal"
        assert [row["re_rank"] for row in result["rows"]] == ["no", "k_reciprocal"]
        assert len(result["rows"][0]["per_trial"]) == 10
        mean = np.mean([t["mAP"] for t in result["rows"][0]["per_trial"]])
        assert result["rows"][0]["mAP"] == pytest.approx(mean)
        call(
            *("test.py", "--dataset", "sysu", "--data-path", data / "sysu", "--mode", "indoor"),
            *("--gallery", gallery, "--shots", shots, "--re_rank", "k_reciprocal"),
            *("--features", tmp_path / f"{gallery}.npz", "--output-dir", tmp_path / "scored"),
            cwd=tmp_path,
        )
        assert_scored_alike(result, tmp_path / "scored")


def test_llcm_trains_and_is_evaluated_the_other_way_round(data, tmp_path):
    flags = ("--epochs", 1, "--trials", 2, "--shrink", "auto", "--memory-levels", "instance")
    train("train_MGMRA.py", data, tmp_path / "run", *flags, dataset="llcm")
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (saved["config"]["shrink_scale"], saved["config"]["memory_levels"]) == (1.0, "instance")
    assert log_lines(tmp_path / "run")[0]["memory/part/zero_reads"] < 0.5
    output, _ = run(
        *("test.py", "--dataset", "llcm", "--data-path", data / "llcm", "--tvsearch"),
        *("--resume", tmp_path / "run" / "last.pt", "--gpu", "cpu", "--test-feat", "both"),
        cwd=tmp_path,
    )
    assert "stand-in data in LLCM's layout" in output and "infrared to visible" in output
    result = json.loads((tmp_path / "run/test_llcm_i2v_both_last/results.json").read_text())
    assert len(result["rows"][0]["per_trial"]) == 10
    output, _ = call(
        *("test.py", "--dataset", "llcm", "--data-path", data / "llcm", "--protocol", "repository"),
        *("--resume", tmp_path / "run" / "last.pt", "--gpu", "cpu", "--trials", 2, "--figures"),
        *("--save-features", tmp_path / "features.npz", "--tta", "flip"),
        cwd=tmp_path,
    )
    assert "the authors' repository's protocol" in output
    folder = tmp_path / "run/test_llcm_v2i_repository_first2_flip_last"
    result = json.loads((folder / "results.json").read_text())
    assert "the authors' repository's protocol" in result["protocol"]
    words = ("--dataset", "llcm", "--data-path", data / "llcm", "--protocol", "repository")
    features = ("--features", tmp_path / "features.npz")
    output, _ = call("test.py", *words, "--trials", 2, *features, "--tta", "flip", cwd=tmp_path)
    assert "flip averaging" in output and "features.npz" in output
    assert_scored_alike(result, tmp_path / "test_llcm_v2i_repository_first2_flip_features")
    for flags in (("--resume", "last.pt"), ("--figures",), ("--test-feat", "pcb")):
        _, error = call("test.py", *words, *features, *flags, cwd=tmp_path, code=2)
        assert f"--features does not go with {flags[0]}" in error
    with np.load(tmp_path / "features.npz") as saved:
        asking, visible = saved["query_trials"], saved["gallery_pids"]
        assert len(asking) == len(saved["gallery_trials"]) == 2
        assert saved["gallery_trials"].shape[1] == len(visible)
        assert asking.max() < len(saved["query_pids"])


def test_regdb_checkpoints_by_pattern_and_both_directions(data, tmp_path):
    for trial in (1, 2):
        train(*("train_HCT.py", data, tmp_path / f"trial{trial}", "--trial", trial, "--epochs", 1))
    pattern = str(tmp_path / "trial{trial}" / "last.pt")
    where = ("--dataset", "regdb", "--data-path", data / "regdb", "--gpu", "cpu")
    output, _ = run(
        *("test.py", *where, "--resume", pattern, "--trials", 2, "--tvsearch", "--figures"),
        *("--output-dir", tmp_path / "both", "--save-features", tmp_path / "f.npz"),
        cwd=tmp_path,
    )
    assert "infrared to visible" in output
    result = json.loads((tmp_path / "both" / "results.json").read_text())
    per_trial = result["rows"][0]["per_trial"]
    assert len(per_trial) == 2
    assert result["rank1"] == pytest.approx(np.mean([t["rank1"] for t in per_trial]))
    assert result["rows"][0]["std"]["mAP"] == pytest.approx(np.std([t["mAP"] for t in per_trial]))
    assert (tmp_path / "both" / "ranked_lists.png").stat().st_size > 10_000
    features = ("--features", tmp_path / "f_trial{trial}.npz", "--trials", 2, "--tvsearch")
    call("test.py", *where, *features, "--output-dir", tmp_path / "scored", cwd=tmp_path)
    assert_scored_alike(result, tmp_path / "scored")
    _, error = call("test.py", *where, "--resume", pattern, "--trials", 3, cwd=tmp_path, code=2)
    assert "1 of 3 files are missing" in error
    assert "trial3" in error


def test_identities_that_were_trained_on_are_no_test(data, tiny, tmp_path):
    own, run_dir = ("--gpu", "cpu", "--quiet"), tmp_path / "one_trial1"
    train("train_HCT.py", tiny, run_dir, "--epochs", 1)
    for trial in (2, 3):
        shutil.copytree(run_dir, tmp_path / f"one_trial{trial}")
    evaluate = ("test.py", *own, "--resume", run_dir)
    output, _ = call(*evaluate, cwd=tmp_path)  # the rest is in the checkpoint
    assert "protocol: RegDB trial 1, visible to infrared\n" in output
    assert output.endswith("epoch chosen: last epoch; trained with preset regdb\n")
    saw = "of 3 test identities were trained on"
    late = {  # found once the checkpoint is open, or later
        "--img_h 100": "an image height of 100",
        "--memory-variant paper": "has no memory of MG-MRA",
        "--test-feat memory --save-features deep/er/f.npz": "test feature must be one of",
    }
    before = set(tmp_path.rglob("*"))
    for flags, reason in late.items():
        _, error = call(*evaluate, *flags.split(), cwd=tmp_path, code=2)
        assert reason in error
        assert set(tmp_path.rglob("*")) == before
    refused = {
        "trial2": (*evaluate, "--trial", 2),
        "trials_first3": (*evaluate[:-1], tmp_path / "one_trial{trial}", "--trials", 3),
        "ranked": ("visualize.py", "ranked", *own, "--resume", run_dir, "--trial", 2),
    }
    for name, command in refused.items():
        _, error = call(*command, cwd=tmp_path, code=2)
        assert f"{saw} by" in error and "(of trial 1: pass --trial 1)" in error, name
    for name, command in refused.items():
        output, _ = call(*command, "--seen-ids", cwd=tmp_path)
        if name != "ranked":
            *_, row, about, _ = output.splitlines()
            assert saw in row and saw in about
            report = run_dir / f"test_regdb_v2i_{name}_seen_ids_last/results.json"
            assert json.loads(report.read_text())["remark"] in row
    # Another data set's identities are not compared, and named.
    where = ("--dataset", "sysu", "--data-path", data / "sysu", "--trials", 1)
    output, _ = call(*evaluate, *where, cwd=tmp_path)
    assert output.splitlines()[2].strip() == "trained on stand-in data in RegDB's layout"
    # Starting weights that saw test identities.
    fine = ("--epochs", 1, "--trial", 2, "--weights", run_dir / "last.pt")
    _, error = train("train_HCT.py", tiny, tmp_path / "fine", *fine)
    assert error.count("every result of this run says: ") == error.count("WARNING") == 1
    assert "identities were trained on" in log_lines(tmp_path / "fine")[0]["eval"]["protocol"]
    train("train_HCT.py", tiny, tmp_path / "fine", *fine, "--epochs", 2, "--resume")
    saved = load_checkpoint(tmp_path / "fine/last.pt")
    before = load_checkpoint(run_dir / "last.pt")
    assert saved["identities_before"] == {before["data"]: before["identities"]}
    for command in (
        ("test.py", *own, "--resume", tmp_path / "fine"),
        ("train_HCT.py", *QUICK, "--data-path", tiny / "regdb", "--trial", 2, "--test-only")
        + ("--resume", tmp_path / "fine/last.pt"),
    ):
        _, error = call(*command, cwd=tmp_path, code=2)
        assert f"{saw} by" in error and "(or its starting weights)" in error


def test_a_run_is_not_overwritten_and_test_only_evaluates(tiny, tmp_path):
    folder = tmp_path / "run"
    train("train_HCT.py", tiny, folder, "--epochs", 1, "--save_epoch", 1)
    assert (folder / "epoch_001.pt").exists()
    before = (folder / "last.pt").read_bytes()
    _, error = train("train_HCT.py", tiny, folder, "--epochs", 1, code=2)
    assert "--overwrite" in error
    assert "--resume" in error
    assert (folder / "last.pt").read_bytes() == before
    _, error = train("train_HCT.py", tiny, folder, "--test-only", "--resume", folder / "last.pt")
    assert "R1 " in error
    assert (folder / "last.pt").read_bytes() == before
    _, error = train("train_HCT.py", tiny, folder, "--epochs", 1, "--resume")
    assert "nothing to train" in error
    _, error = train("train_MGMRA.py", tiny, folder, "--resume", code=2)
    assert "belongs to another network" in error
    # The same file starts another method's weights.
    train(
        *("train_MGMRA.py", tiny, tmp_path / "fine", "--weights", folder / "last.pt"),
        *("--epochs", 1),
    )
    train("train_HCT.py", tiny, folder, "--epochs", 1, "--overwrite", "--optim", "adam")
    assert (folder / "last.pt").read_bytes() != before


def test_trials_share_a_folder_of_checkpoints(data, tmp_path):
    shared = ("--model_path", "saved", "--log_path", "logs", "--vis_log_path", "events")
    where = ("--dataset", "regdb", "--data-path", data / "regdb", *QUICK, "--num_pos", 4)
    for trial in (1, 2):
        flags = (*where, *shared, "--trial", trial, "--epochs", 1)
        call("train_HCT.py", *flags, cwd=tmp_path)
    saved = tmp_path / "saved"
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    pattern = names[0].replace("trial1", "trial{trial}") + "_last.pt"
    assert names == [pattern[:-8].format(trial=trial) for trial in (1, 2)]
    files = {f"{name}_{kind}.pt" for name in names for kind in ("last", "best")}
    assert {path.name for path in saved.glob("[!.]*")} == files
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {f"{n}.log" for n in names}
    assert {path.name for path in (tmp_path / "events").iterdir()} == set(names)
    _, error = call("train_HCT.py", *flags, cwd=tmp_path, code=2)
    assert f"saved/{names[1]}_last.pt is there already" in error
    with utils.lock(saved / f".{names[1]}_lock"):
        elsewhere = (*flags, "--overwrite", "--output-dir", "elsewhere")
        _, error = call("train_HCT.py", *elsewhere, cwd=tmp_path, code=2)
    assert "saved is being written by process" in error
    other = saved / f"{names[1]}_seed1_last.pt"  # no file of this run, although it begins so
    other.touch()
    (saved / f"{names[1]}_last.pt").rename(saved / f"{names[1]}_last.previous.pt")
    first = (saved / f"{names[0]}_last.pt").read_bytes()
    _, error = call("train_HCT.py", *flags, "--epochs", 2, "--resume", cwd=tmp_path)
    assert f"resumed saved/{names[1]}_last.previous.pt after epoch 1" in error
    call("train_HCT.py", *flags, "--overwrite", cwd=tmp_path)
    other.unlink()
    assert (saved / f"{names[0]}_last.pt").read_bytes() == first
    output = ("--output-dir", f"runs/{names[0]}")
    _, error = call("train_HCT.py", *flags, *output, "--resume", cwd=tmp_path, code=2)
    assert f"holds another run than {names[1]}" in error
    # test.py finds them there, one or all of them.
    found = ("--dataset", "regdb", "--data-path", data / "regdb", "--gpu", "cpu", "--quiet")
    found += ("--model_path", "saved", "--lr", 0.1, "--batch-size", 8, "--method", "agw")
    name = f"{names[0]}_last.pt"
    _, error = call("test.py", *found, "--resume", name, cwd=tmp_path)
    assert (
        error.count("no effect, since checkpoint and data set know: --lr, --batch_size, --method\n")
        == 1
    )
    call("test.py", *found, "--trials", 2, "--resume", pattern, cwd=tmp_path)
    (report,) = saved.glob("test_regdb_v2i_trials_first2_*/results.json")
    assert len(json.loads(report.read_text())["checkpoints"]) == 2
    saved.rename(tmp_path / "save_model")  # where the ancestors' scripts look
    found = found[: found.index("--model_path")]
    call("test.py", *found, "--resume", name, cwd=tmp_path)


@pytest.mark.parametrize("method", ["SGMRA", "MGMRA"])
def test_a_bank_of_another_number_of_identities(method, tiny, tmp_path):
    script, folder, flags = f"train_{method}.py", tmp_path / "run", ("--memory-ids", 3)
    train(script, tiny, folder, *flags, "--epochs", 1)
    train(script, tiny, folder, *flags, "--epochs", 2, "--resume")
    saved = load_checkpoint(folder / "last.pt")
    assert len(saved["net"]["memory.part_bank"]) == 3 * 5 * 6
    assert (saved["config"]["memory_ids"], saved["config"]["num_ids"]) == (3, 4)
    _, error = train(script, tiny, folder, "--epochs", 3, "--resume", code=2)
    assert "(memory_ids 3 there, None here)" in error
    where = ("--dataset", "regdb", "--data-path", tiny / "regdb", "--gpu", "cpu", "--quiet")
    call("test.py", *where, "--resume", folder / "last.pt", "--test-feat", "both", cwd=tmp_path)
    fine = ("--weights", folder / "last.pt", "--epochs", 1)
    _, error = train(script, tiny, tmp_path / "same", *fine, *flags)
    assert "start afresh" not in error
    _, error = train(script, tiny, tmp_path / "other", *fine)
    taken = re.search(
        r"WARNING .*: took (\d+) of its (\d+) entries; in the network 1 .*_bank\n", error
    )
    assert int(taken[1]) + 1 == int(taken[2])
    assert taken[0].split("WARNING")[1] in (tmp_path / "other/train.log").read_text()


def test_a_bank_too_large_for_the_threshold_is_said(data, tmp_path):
    flags = ("--epochs", 1, "--memory-ids", 713)
    llcm = {"dataset": "llcm"}
    _, error = train("train_MGMRA.py", data, tmp_path / "a", *flags, "--trials", 1, **llcm)
    line = log_lines(tmp_path / "a")[0]
    warning = "prototypes of 713 identities: at their initial norms no semantic read passes"
    assert error.index(warning) < error.index("epoch 1")
    for level in ("instance", "semantic"):
        assert line[f"memory/{level}/zero_reads"] == 1
        assert error.count(f"epoch 1: {level} level: no read passed lambda 0.0025 (uniform") == 1
    _, error = train("train_MGMRA.py", data, tmp_path / "b", *flags, "--shrink", "auto")
    assert "no read passed" not in error and "no semantic read" not in error


@pytest.mark.parametrize("given", [(), ("--gem-p", 10, "--memory-variant", "first")])
def test_a_released_sysu_file_is_evaluated_and_its_exponent_said(given, data, tmp_path):
    released_file(tmp_path / "sysu_best.t", "MGMRA", 395, legacy=True)
    _, error = call(
        *("test.py", "--dataset", "sysu", "--data-path", data / "sysu", "--gpu", "cpu", "--quiet"),
        *("--resume", "sysu_best.t", "--output-dir", "test", "--test-feat", "memory"),
        *("--img_h", 96, "--img_w", 32, "--trials", 1, *given),
        cwd=tmp_path,
    )
    assert error.count("stores no GeM exponent") == error.count("WARNING") == (not given)
    result = json.loads((tmp_path / "test" / "results.json").read_text())
    used = (result["gem_p"], result["memory_variant"], result["test_feat"])
    assert used == ((10.0, "first", "memory") if given else (3.0, "released", "memory"))
    assert result["rows"][0]["gem_p"] == used[0]


class OwnMemory(MultiGranularityMemory):
    """A user's memory, which `test.py --memory test_scripts.OwnMemory` finds."""

    def read(self, level, x, bank):
        value, weights = super().read(level, x, bank)
        return 2 * value, weights


def test_a_memory_of_one_s_own_is_trained_and_evaluated(tiny, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    where = ("--dataset", "regdb", "--data-path", tiny / "regdb")
    flags = (*where, *QUICK, "--epochs", 1, "--test-feat", "memory", "--output-dir", folder)
    assert train_MGMRA.main([*map(str, flags)], memory_class=OwnMemory) == 0
    trained = log_lines(folder)[-1]["eval"]
    common = (*where, "--gpu", "cpu", "--quiet", "--resume", folder / "last.pt", "--output-dir")

    def evaluated(*flags):
        assert test.main([*map(str, (*common, tmp_path / "test", *flags))]) == 0
        return json.loads((tmp_path / "test" / "results.json").read_text())

    own = ("--memory", "test_scripts.OwnMemory", "--test-feat", "memory")
    assert evaluated(*own)["mAP"] == pytest.approx(trained["mAP"])
    features = []
    for scale in (1, 0):  # it is this class that is run
        with monkeypatch.context() as patched:
            if scale == 0:
                patched.setattr(OwnMemory, "forward", lambda self, x: MemoryRead(0 * x))
            evaluated(*own, "--save-features", tmp_path / "f.npz")
        with np.load(tmp_path / "f.npz") as saved:
            features.append(saved["query_memory"])
    assert not np.allclose(*features)
    capsys.readouterr()
    assert {row["test_feat"] for row in evaluated()["rows"]} == {"pcb"}  # without it
    assert "has a memory of the class OwnMemory: loaded without it" in capsys.readouterr().err
    for name, text in {
        "nothing": "expected MODULE.CLASS",
        "test_scripts.Other": "expected MODULE.CLASS",
        "memory.MultiGranularityMemory": "its memory is 'OwnMemory', not 'MultiGranularityMemory'",
    }.items():
        with pytest.raises(SystemExit):
            evaluated("--memory", name)
        assert text in capsys.readouterr().err


def test_own_folders_are_ranked_without_identities(data, tiny, tmp_path):
    train("train_HCT.py", tiny, tmp_path / "run", "--epochs", 1)
    folders = [data / "regdb" / name for name in ("Visible", "Thermal")]
    where = ("--gpu", "cpu", "--quiet", "--resume", tmp_path / "run" / "last.pt")
    run(
        *("test.py", "--query-dir", folders[0], "--gallery-dir", folders[1], *where),
        *("--tta", "flip"),
        cwd=tmp_path,
    )
    output = tmp_path / "run" / "search_Visible_Thermal_flip_last"
    ranks = json.loads((output / "ranks.json").read_text())
    assert (ranks["query_modality"], ranks["gallery_modality"]) == ("visible", "infrared")
    assert ranks["tta"] == "flip"
    assert len(ranks["ranks"]) == len(list(folders[0].rglob("*.bmp")))
    for entry in ranks["ranks"]:
        scores = [answer["score"] for answer in entry["gallery"]]
        assert [answer["rank"] for answer in entry["gallery"]] == list(range(1, 21))
        assert scores == sorted(scores, reverse=True)
        assert (folders[1] / entry["gallery"][0]["image"]).is_file()
    lines = (output / "ranks.csv").read_text().splitlines()
    assert lines[0] == "query,rank,gallery,score"
    assert len(lines) == 1 + 20 * len(ranks["ranks"])
    assert (output / "ranked_lists.png").stat().st_size > 10_000
    titled = Image.open(output / "ranked_lists.png").height
    both = ("--query-dir", folders[0], "--gallery-dir", folders[1], "--no-title", "--tta", "flip")
    call("test.py", *both, *where, cwd=tmp_path)
    assert Image.open(output / "ranked_lists.png").height < titled


BAD_INPUT = {
    "no data folder": (("--data-path", "nowhere"), "stand_in.py"),
    "height that does not divide": (("--img_h", "100"), "96, 192, 288"),
    "fewer identities than P": (("--batch-size", "13"), "13"),
    "trial out of range": (("--trial", "11"), "1"),
    "unknown arch": (("--arch", "vgg"), "resnet18"),
    "unknown flag": (("--num-gpus", "4"), "--num-gpus"),
    "contradicting flags": (("--method", "agw", "--pcb", "on"), "--method agw"),
    "flag without effect": (("--memory-levels", "none", "--shrink", "0.1"), "has no memory: leave"),
    "negative rate": (("--lr", "-1"), "above 0"),
    "no such checkpoint": (("--resume", "nowhere.pt"), "no checkpoint at nowhere.pt"),
    "no such weights": (("--weights", "nowhere.pth"), "no checkpoint at nowhere.pth"),
    "test-only without a checkpoint": (("--test-only",), "--resume"),
    "not a device": (("--gpu", "tpu"), "CUDA index"),
    "a value behind a switch": (("--compile", "True"), "unrecognized arguments: True"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_a_message_before_any_work(name, tiny, tmp_path):
    flags, message = BAD_INPUT[name]
    _, error = train("train_MGMRA.py", tiny, tmp_path / "run", *flags, code=2)
    assert message in error
    assert "usage:" not in error
    assert "decode" not in error
    assert list(tmp_path.iterdir()) == []


def test_bad_input_ends_the_process_with_its_code(tiny, tmp_path):
    _, error = train(
        "train_SGMRA.py", tiny, tmp_path / "run", "--img_h", 100, code=2, start=run_as_is
    )
    assert error.startswith("error: an image height of 100")
    assert error.count("\n") == 1


def test_gpu_0_without_cuda_falls_back_and_says_so(tiny, tmp_path):
    _, error = train("train_HCT.py", tiny, tmp_path / "run", "--epochs", 1, "--gpu", 0, start=run)
    warning = "running on the CPU: no CUDA device on this machine"
    text = (tmp_path / "run/train.log").read_text()
    assert error.count(warning) == text.count(warning) == 1  # though it is older than the file
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d", text)
    folder = tmp_path / "run"
    for words in ("command: python ", "--epochs 1 --gpu 0", "device: ", "; torch ", ", commit "):
        assert words in text, words
    assert f": writing into {folder}\n" in text
    command = shlex.split(re.search(r"Evaluate it with: python \S+/test.py (.*)", text)[1])
    output, _ = call("test.py", *command, "--gpu", "cpu", cwd=tmp_path)
    assert max(map(len, output.splitlines()[:2])) <= 80
