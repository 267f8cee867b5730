"""The recipes of docs/change_one_thing.md, done to the letter in a copy of the repository."""

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
from test_structure import ROOMS

import stand_in

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--arch resnet18 --weights none --img_h 32 --img_w 16 --num_strips 2 --local_feat_dim 16"
    " --batch-size 2 --num_pos 2 --epochs 1 --gpu cpu --quiet"
)
BLOCK = re.compile(r"^```(python|diff|)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = dict(
    section.split("\n", 1)
    for section in (ROOT / "docs/change_one_thing.md").read_text().split("\n## ")[1:]
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Stand-in data in RegDB's layout, and the same images in one's own folders."""
    root = tmp_path_factory.mktemp("data")
    generate = {"train_ids": 4, "test_ids": 3, "images_per_id": 2, "seed": 1, "workers": 1}
    stand_in.generate(root / "regdb", layout="regdb", **generate)
    for split in ("train", "test"):
        for word, modality in (("visible", "visible"), ("thermal", "infrared")):
            listed = (root / f"regdb/idx/{split}_{word}_1.txt").read_text().splitlines()
            for number, line in enumerate(listed):
                path = line.split()[0]
                folder = root / "folders" / split / modality / f"id{path.split('/')[1]}"
                target = folder / f"{number}.bmp"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / "regdb" / path, target)
    return root


def change(file: Path, lines: list[str]) -> None:
    """Applies one hunk of a diff, whose place must be unmistakable."""
    old, new = ("\n".join(n[1:] for n in lines if n[0] in signs) + "\n" for signs in (" -", " +"))
    before = file.read_text()
    if old == "\n" or before.count(old) != 1:  # lines that begin with what stands there
        old, new = old.rstrip("\n"), new.rstrip("\n")
    assert before.count(old) == 1, old
    file.write_text(before.replace(old, new))


def follow(recipe: str, data: Path, folder: Path) -> None:
    """Writes a recipe's files into a copy of the repository and runs its commands, made tiny."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room)
    commands = []
    for language, text in BLOCK.findall(SECTIONS[recipe]):
        if not language:
            commands += text.splitlines()
            continue
        place, code = text.split("\n", 1)
        name = re.fullmatch(r"# (at the end of )?([\w/]+\.py)", place)
        assert name, place
        if language == "diff":
            change(folder / name[2], code.splitlines())
            continue
        with open(folder / name[2], "a" if name[1] else "x") as file:
            file.write(f"\n\n{code}")
    assert commands
    for command in commands:
        words = shlex.split(command.replace("--data-path DIR", f"--data-path {data / 'folders'}"))
        assert words[0] == "python"
        flags = [] if "--data-path" in words else ["--data-path", str(data / "regdb")]
        evaluates = ["--gpu", "cpu", "--quiet"]
        flags += {"test.py": evaluates, "reproduce.py": []}.get(words[1], TINY.split())
        flags = flags + words[2:]  # the recipe's own win
        done = subprocess.run(
            [sys.executable, words[1], *flags],
            cwd=folder,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def log_line(folder: Path) -> dict:
    return json.loads((folder / "log.jsonl").read_text())


def test_every_section_is_tested():
    tests = {name for name in globals() if name.startswith("test_")}
    for title in SECTIONS:
        name = re.sub(r"\W+", "_", title.lower())
        assert f"test_{name}" in tests or title in ONLY_TRAINED, title
    assert "docs/change_one_thing.md" in (ROOT / "README.md").read_text()


ONLY_TRAINED = {  # with the file that must be there afterwards
    "A threshold for each level": "runs/tight_parts/last.pt",
    "Another backbone": "runs/convnext/test_regdb_v2i_trial1_last/results.json",
    "An augmentation": "runs/perspective/last.pt",
    "Another distance": "runs/cityblock/last.pt",
    "Weight averaging": "runs/average/test_regdb_v2i_trial1_average/results.json",
}


@pytest.mark.parametrize("recipe", ONLY_TRAINED)
def test_recipes_that_train(recipe, data, tmp_path):
    follow(recipe, data, tmp_path)
    assert (tmp_path / ONLY_TRAINED[recipe]).exists()


def test_a_learning_rate_schedule(data, tmp_path):
    follow("A learning-rate schedule", data, tmp_path)
    assert log_line(tmp_path / "runs/polynomial")["lr"] == 0.1


def test_an_optimiser(data, tmp_path):
    follow("An optimiser", data, tmp_path)
    lines = (tmp_path / "runs/adamw/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_logging_to_weights_biases(data, tmp_path):
    stub = "def init(**settings):\n    open('called', 'w').write(repr(settings))\n"
    (tmp_path / "wandb.py").write_text(stub)
    follow("Logging to Weights & Biases", data, tmp_path)
    assert "'sync_tensorboard': True" in (tmp_path / "called").read_text()


def test_a_loss_term(data, tmp_path):
    follow("A loss term", data, tmp_path)
    line = log_line(tmp_path / "runs/modality_gap")
    assert line["modality_gap"] > 0
    options = json.loads((tmp_path / "runs/modality_gap/options.json").read_text())["options"]
    terms = {
        "id": "w_id",
        "triplet": "w_triplet",
        "center_triplet": "w_center",
        "memory_id": "w_memory_id",
        "memory_triplet": "w_memory_triplet",
        "alignment": "w_alignment",
    }
    total = sum(options[flag] * line[term] for term, flag in terms.items())
    total += 0.1 * line["modality_gap"] - options["w_alignment"] * 0.1
    assert line["total"] == pytest.approx(total, rel=1e-4)


def test_a_memory_of_your_own(data, tmp_path, monkeypatch):
    follow("A memory of your own", data, tmp_path)
    assert log_line(tmp_path / "runs/plain_means")["memory/semantic/survivors"] >= 0
    results = sorted((tmp_path / "runs/plain_means").glob("test_*/results.json"))
    feats = [json.loads(result.read_text())["test_feat"] for result in results]
    assert feats == ["pcb", "memory"]
    monkeypatch.syspath_prepend(tmp_path)
    from plain_means import PlainMeans

    memory = PlainMeans(3, instances_per_id=2, parts_per_instance=2, dim=4)
    instance, semantic = memory.banks()
    bank = memory.part_bank.detach().numpy()
    np.testing.assert_allclose(instance.detach()[1], bank[2:4].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(semantic.detach()[1], bank[4:8].mean(axis=0), rtol=1e-5)


def test_a_data_set(data, tmp_path):
    follow("A data set", data, tmp_path)
    assert log_line(tmp_path / "runs/folders")["eval"]["protocol"] == "Folders, visible to infrared"
    (result,) = (tmp_path / "runs/folders").glob("test_*/results.json")
    result = json.loads(result.read_text())
    assert result["protocol"] == "Folders, infrared to visible"
    assert result["dataset"] == "Folders"
    assert result["mAP"] > 0
