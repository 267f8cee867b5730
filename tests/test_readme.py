"""README and docs tell the truth: commands parse, links exist, presets and Python lines agree."""

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

import options
import stand_in
import visualize
from data_manager import eval_set
from engine import devices
from engine.feature_files import read_features
from model import TwoStreamNet
from networks.checkpoint_file import save_checkpoint
from reproduction.plan import TABLES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
COMMANDS = re.findall(r"^python (\w+\.py.*?)(?:   +#.*)?$", README, re.MULTILINE)


def test_readme_is_short():
    assert len(README.split()) < 2000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_modules_exist(page):
    text = page.read_text()
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    missing = [target for target in links if not (page.parent / target).exists()]
    missing += [
        name
        for name in re.findall(r"`([\w/]+\.py)\b", text.partition("## Commands")[0])
        if page.name in ("README.md", "details.md") and not (ROOT / name).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    script, *words = shlex.split(command)
    if script.startswith("train_"):
        args = options.train_parser("").parse_args(words)
        resolved, _ = options.resolve(args, script)
        assert resolved.lr == 0.1
    elif script == "test.py":
        options.resolve_evaluation(options.test_parser("").parse_args(words))
    else:
        assert (ROOT / script).exists()


def test_version_and_citation_are_those_in_use():
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert (
        re.search(r"^## ([\d.]+)", changes, re.MULTILINE)[1]
        == devices.versions(torch.device("cpu"))["version"]
    )
    citation = (ROOT / "CITATION.cff").read_text()
    for name in re.findall(r"(\w+), \w+", re.search(r"author  = {(.*)}", README)[1]):
        assert f"family-names: {name}," in citation
    assert re.search(r"title   = {(.*)}", README)[1] in citation


def test_readme_names_what_there_is():
    for script in ("train_HCT", "train_SGMRA", "train_MGMRA", "test", "reproduce"):
        assert any(command.startswith(f"{script}.py") for command in COMMANDS), script
    figures = next(a for a in visualize.figure_parser("")._actions if a.dest == "figure").choices
    for name in (*options.PRESETS, *figures, *TABLES):
        assert f"`{name}`" in README, name


@pytest.mark.parametrize("name", ["regdb", "sysu", "llcm", "scratch"])
def test_preset_table(name):
    cells = re.search(rf"^\| `{name}` \|(.*)$", README, re.MULTILINE)[1].split("|")
    values = {**options.DEFAULTS, **options.PRESETS[name]}
    p_by_k = f"{values['batch_size']} x {values['num_pos']}"
    expected = [values["lr"], p_by_k, f"{values['gem_p']:g}", values["w_center"]]
    assert [cell.strip() for cell in cells[:5]] == [*map(str, expected), values["label_smooth"]]


def test_make_refuses_an_old_python_by_its_version(tmp_path):
    for name in ("Makefile", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old"
    code = "import sys; sys.version_info = (3, 8); exec(sys.argv[1])"
    old.write_text(f"#!/bin/sh\nshift\nexec {sys.executable} -c '{code}' \"$1\"\n")
    old.chmod(0o755)
    command = ["make", "demo", f"PYTHON={old}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "Python 3.8 is too old" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_python_lines_run(tmp_path, monkeypatch):
    net = TwoStreamNet(3, arch="resnet18")
    (tmp_path / "runs/demo").mkdir(parents=True)
    content = {"net": net.state_dict(), "config": net.config}
    save_checkpoint(tmp_path / "runs/demo/last.pt", content)
    monkeypatch.chdir(tmp_path)
    counts = {"train_ids": 4, "test_ids": 3, "images_per_id": 2}
    stand_in.generate(tmp_path / "data/RegDB", layout="regdb", **counts, seed=1, workers=1)
    found = {"my_network": lambda path: np.asarray(Image.open(path)).mean(axis=0).ravel()}
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for block in blocks:
        exec(block, found)
    assert len(blocks) == 2
    assert found["distances"].shape == (4, 4)
    assert torch.all(found["distances"] >= -1e-6)
    protocol = eval_set("regdb", "data/RegDB")
    features = read_features("mine.npz", protocol)
    assert features["query"]["features"].shape == (len(protocol.query), found["features"].shape[1])
