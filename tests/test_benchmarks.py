"""The benchmark scripts run and write the numbers they print."""

import json

import pytest

from benchmarks import evaluation, train

TINY = ["--arch", "resnet18", "--height", "96", "--width", "48", "--batch", "2x2", "--ids", "12"]


def test_training_benchmark(tmp_path, capsys):
    file = tmp_path / "train.json"
    argv = [*TINY, "--only", "steps", "input", "--methods", "HCT", "MG-MRA", "--repeats", "1"]
    assert train.main([*argv, "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert set(results["steps"]["times"]) == {
        f"{method}/{variant}" for method in ("HCT", "MG-MRA") for variant in train.VARIANTS
    }
    assert all(t["median"] > 0 for t in results["steps"]["times"].values())
    assert results["setting"]["torch"]
    out = capsys.readouterr().out
    assert "| MG-MRA | bf16 |" in out
    assert "Input pipeline" in out


def test_evaluation_benchmark(tmp_path, capsys):
    file = tmp_path / "evaluation.json"
    argv = ["--small", "--repeats", "1", "--only", "metrics", "large", "sysu"]
    assert evaluation.main([*argv, "--json", str(file)]) == 0
    assert "SYSU ten-shot" in json.loads(file.read_text())["metrics"]
    assert "MiB beyond the distances" in capsys.readouterr().out


@pytest.mark.slow
def test_every_section(tmp_path):
    shapes = ["--identities", "12", "--batches", "2x2", "--repeats", "1"]
    assert train.main([*TINY, *shapes, "--json", str(tmp_path / "train.json")]) == 0
    assert set(json.loads((tmp_path / "train.json").read_text())) >= set(train.SECTIONS)
    assert evaluation.main(["--small", "--json", str(tmp_path / "evaluation.json")]) == 0
