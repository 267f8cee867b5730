"""The benchmark scripts run and write the numbers they print."""

import contextlib
import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
from short_run import NARROW

from benchmarks import evaluation, first_run, train
from networks.backbone import BACKBONES

TINY = ["--arch", "resnet18", "--height", "96", "--width", "48", "--batch", "2x2", "--ids", "12"]
ONCE = ["--repeats", "1", "--steps", "1"]


def here(command, **_):
    """Runs a turn in this process in place of one of its own, which spares the imports."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert train.main(command[3:]) == 0  # after python -m benchmarks.train
    return SimpleNamespace(stdout=output.getvalue())


def test_training_benchmark(tmp_path, capsys, monkeypatch):
    processes = SimpleNamespace(run=here, PIPE=None, CalledProcessError=None)
    monkeypatch.setattr(train, "subprocess", processes)
    file = tmp_path / "train.json"
    argv = [*TINY, *ONCE, "--float32", "--only", "steps", "input", "--methods", "HCT", "MG-MRA"]
    assert train.main([*argv, "--json", str(file)]) == 0
    times = json.loads(file.read_text())["steps"]["times"]
    float32 = [variant for variant in train.VARIANTS if variant != "bf16"]
    assert times.keys() == {
        train.YARDSTICK,
        *(f"{method}/{variant}" for method in ("HCT", "MG-MRA") for variant in float32),
    }
    assert all(t["median"] > 0 for t in times.values())
    for name in ("HCT/float32", "MG-MRA/float32"):
        ratio = times[name]["median"] / times[train.YARDSTICK]["median"]
        assert times[name]["over_torchvision"] == pytest.approx(ratio)
    assert times["MG-MRA/float32"]["addressed"]
    out = capsys.readouterr().out
    assert "| torchvision resnet18 | plain float32 |" in out
    assert "| MG-MRA | float32 |" in out
    assert "HCT's float32 step waits for its batch" in out


def test_turns_in_processes_of_their_own(tmp_path):
    file = tmp_path / "train.json"
    argv = [*TINY, *ONCE, "--only", "steps", "--methods", "HCT", "--variants", "float32"]
    assert train.main([*argv, "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert results["steps"]["times"].keys() == {train.YARDSTICK, "HCT/float32"}
    assert results["setting"]["torch"]


def test_evaluation_benchmark(tmp_path, capsys):
    file = tmp_path / "evaluation.json"
    argv = ["--small", "--repeats", "1", "--only", "metrics", "large", "sysu"]
    assert evaluation.main([*argv, "--json", str(file)]) == 0
    assert "SYSU ten-shot" in json.loads(file.read_text())["metrics"]
    assert "MiB beyond the distances" in capsys.readouterr().out


PROGRAMS = {"tests", "whole_run", "deterministic", "against_plain"}  # run others: slow


@pytest.mark.parametrize(
    "parts", [first_run.PARTS.keys() - PROGRAMS, pytest.param(PROGRAMS, marks=pytest.mark.slow)]
)
def test_first_run(parts, tmp_path, monkeypatch, capsys):
    if parts.isdisjoint(PROGRAMS):
        monkeypatch.setitem(BACKBONES, "resnet18", NARROW["resnet18"])
    file = tmp_path / "out.json"
    assert first_run.main(["--json", str(file), "--smoke", "--only", *sorted(parts)]) == 0
    results = json.loads(file.read_text())
    assert results.keys() == parts
    assert not [name for name, part in results.items() if "error" in part["found"]]
    codes = re.findall(r'"(?:code|ended)": (-?\d+)', file.read_text())
    assert set(codes) <= {"0", "143"}  # 143: SIGTERM
    assert len(re.findall(r": done in \d+ s", capsys.readouterr().out)) == len(parts)


def test_a_part_that_fails_does_not_end_the_first_run(tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.json"
    monkeypatch.setattr(first_run, "PARTS", {"one": lambda bench: 1 / 0, "two": lambda bench: {}})
    assert first_run.main(["--json", str(file), "--smoke"]) == 0
    results = json.loads(file.read_text())
    assert "ZeroDivisionError" in results["one"]["found"]["error"]
    assert results["two"]["found"] == {}
    assert "one: failed" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        first_run.main(["--json", str(file)])


@pytest.mark.slow
def test_every_section(tmp_path):
    shapes = ["--identities", "12", "--batches", "2x2", "--repeats", "1"]
    assert train.main([*TINY, *shapes, "--json", str(tmp_path / "train.json")]) == 0
    assert set(json.loads((tmp_path / "train.json").read_text())) >= set(train.SECTIONS)
    assert evaluation.main(["--small", "--json", str(tmp_path / "evaluation.json")]) == 0
