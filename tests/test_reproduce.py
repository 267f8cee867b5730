"""`reproduce.py run` and `table`: plan, restarts, refusals; stubs stand in for the long work."""

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import options
import stand_in
from networks.checkpoint_file import save_checkpoint
from options import flags_of
from reproduce import main
from reproduction import plan as plans
from reproduction.plan import given_options, plan

ROOT = Path(__file__).resolve().parents[1]
TRAIN_STUB = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import options
args = options.train_parser("").parse_args()
args, _ = options.resolve(args)
out = args.output_dir
with open({log!r}, "a") as stream:
    stream.write(" ".join(sys.argv) + "\\n")
if (out / "last.pt").exists() and not (args.overwrite or args.resume is not None):
    sys.exit(2)
out.mkdir(parents=True, exist_ok=True)
(out / "options.json").write_text(json.dumps({{"options": options.to_json(args)}}))
last = args.epochs - (os.environ.get("STUB_STOPS", "nothing") in str(out))
for name in ("last.pt", "best.pt"):
    (out / name).write_bytes(Path({log!r} + ".pt").read_bytes())
(out / "training.json").write_text(json.dumps({{"last": {{"epoch": last}}}}))
line = {{"epoch": last, "memory/part/zero_reads": args.trial / 10, "memory/part/used": 0.5}}
(out / "log.jsonl").write_text(json.dumps(line) + "\\n")
sys.exit(1 if last < args.epochs else 0)
"""
TEST_STUB = """
import json, sys
sys.path.insert(0, {root!r})
import options
args = options.test_parser("").parse_args()
args = options.resolve_evaluation(args)
with open({log!r}, "a") as stream:
    stream.write(" ".join(sys.argv) + "\\n")
number = len(args.resume) % 5 / 10
def result(ranking, draw=0):
    names = ("rank1", "rank5", "rank10", "rank20", "mAP", "mINP")
    shift = 0.05 * (ranking != "no") + args.trial / 100 + draw / 1000
    return {{name: number + shift for name in names}}
draws = args.trials if args.dataset == "sysu" else 1
rows = [
    {{**result(ranking), "re_rank": ranking, "test_feat": feat, "dataset": "stand-in data",
      "stand_in": True, "protocol": args.dataset,
      "selection": "last epoch" if "last" in args.resume else "best",
      "per_trial": [result(ranking, draw) for draw in range(draws)]}}
    for feat in (args.test_feat or "pcb",) for ranking in dict.fromkeys(("no", args.re_rank))
]
args.output_dir.mkdir(parents=True, exist_ok=True)
content = {{"rows": rows, "options": options.to_json(args), "versions": {{"commit": "abc"}}}}
(args.output_dir / "results.json").write_text(json.dumps(content))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small stand-in data in RegDB's and in SYSU-MM01's layout."""
    root = tmp_path_factory.mktemp("data")
    sizes = {"train_ids": 6, "test_ids": 3, "images_per_id": 2, "img_h": 40, "img_w": 20}
    for layout in ("regdb", "sysu"):
        stand_in.generate(root / layout, layout=layout, workers=1, **sizes)
    return root


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Scripts that write what the real ones write, at once; returns the log of their calls."""
    folder, log = tmp_path / "scripts", tmp_path / "calls"
    folder.mkdir()
    log.touch()
    save_checkpoint(Path(f"{log}.pt"), {"net": {"weight": torch.ones(1)}})
    words = {"root": str(ROOT), "log": str(log)}
    for name in ("train_HCT.py", "train_SGMRA.py", "train_MGMRA.py"):
        (folder / name).write_text(TRAIN_STUB.format(**words))
    (folder / "test.py").write_text(TEST_STUB.format(**words))
    monkeypatch.setattr(plans, "ROOT", folder)
    return log


@pytest.fixture
def go(data, tmp_path, stubs):
    """Calls ``reproduce.py run`` on the data; returns exit code and new calls of the scripts."""

    def call(*flags, dataset="regdb"):
        before = len(stubs.read_text().splitlines())
        where = ["--runs", str(tmp_path / "runs"), "--data-path", str(data / dataset)]
        try:
            code = main(["run", *map(str, flags), *where])
        except SystemExit as stop:
            code = stop.code
        return code, stubs.read_text().splitlines()[before:]

    return call


def table(tmp_path, *flags):
    return main(["table", "--runs", str(tmp_path / "runs"), *map(str, flags)])


# --- The plan -------------------------------------------------------------------------------------


def planned(table, dataset="regdb", trials=10, flags=()):
    extra = given_options(flags)
    return plan(table, dataset=dataset, runs=Path("runs"), trials=trials, extra=extra)


def test_options_become_flags_and_flags_options():
    given = {"preset": "scratch", "gem_p": 3.0, "triplet_ramp": [0, 2], "milestones": []}
    given |= {"amp": "fp16", "compile": True, "data_path": Path("here")}
    flags = flags_of(given)
    assert flags[:7] == ["--preset", "scratch", "--gem-p", "3.0", "--triplet-ramp", "0", "2"]
    assert flags[7:] == ["--milestones", "--amp", "fp16", "--compile", "--data-path", "here"]
    assert given_options(flags) == given
    assert given_options([]) == {}


@pytest.mark.parametrize(
    ("table", "dataset", "trainings", "tests", "files"),
    [
        ("regdb", "regdb", 50, 10 * (5 * 2 * 2 + 1), 10),
        ("sysu", "sysu", 8, 8 * 8 * 2 + 1, 1),
        ("ablation", "regdb", 10 * 31, None, 10),
        ("ablation", "sysu", 31, None, 1),
        ("memory", "llcm", 19, None, 1),
        ("llcm", "llcm", 5, 5 * 3 * 2 + 1, 1),
    ],
)
def test_tables_have_the_runs_that_they_name(table, dataset, trainings, tests, files):
    steps, rows = planned(table, dataset)
    assert len({step.folder for step in steps}) == len(steps)
    assert sum(step.trains for step in steps) == trainings
    assert tests is None or sum(not step.trains for step in steps) == tests
    assert {len(row.files) for row in rows} == {files}
    assert {row.trials for row in rows} == {10}
    made = set()
    for step in steps:  # each evaluation follows its training and reads its checkpoint
        if step.trains:
            made.add(step.folder)
        else:
            assert Path(step.options["resume"]).parent in made
            assert step.resolved["dataset"] == dataset
    for row in rows:
        for file in row.files:
            assert any(step.folder == file.parent for step in steps)


def test_methods_and_protocols_of_the_tables():
    steps, rows = planned("regdb")
    names = {row.setting.name for row in rows}
    assert names == {"HCT", "SG-MRA", "MG-MRA", "AGW", "AGW + MG-MRA"}
    assert {row.protocol for row in rows} == {"v2i", "i2v"}
    assert [r.setting.name for r in rows if r.re_rank != "no"] == ["MG-MRA"]
    trained = {(s.script, s.resolved["method"]) for s in steps if s.trains}
    assert trained == {
        *(("train_HCT.py", m) for m in ("base", "agw")),
        *(("train_MGMRA.py", m) for m in ("base", "agw")),
        ("train_SGMRA.py", "base"),
    }
    steps, rows = planned("sysu", "sysu", trials=3)
    agw = [s.resolved for s in steps if s.trains and s.resolved["method"] == "agw"]
    names = ("epochs", "batch_size", "num_pos", "share_net", "label_smooth", "w_center")
    assert {tuple(run[n] for n in names) for run in agw} == {(81, 8, 4, 1, "off", 0.0)}
    assert len({row.protocol for row in rows}) == 8
    recipes = {
        tuple(s.resolved[n] for n in ("w_center", "label_smooth", "lr"))
        for s in steps
        if s.trains and s.script == "train_MGMRA.py" and s.resolved["method"] == "base"
    }
    assert recipes == {
        (w, smooth, lr) for w, smooth in ((1, "off"), (2, "on")) for lr in (0.1, 0.01)
    }
    tests = [step.resolved for step in steps if not step.trains]
    combinations = {(t["mode"], t["shots"], t["gallery"]) for t in tests}
    assert len(combinations) == 8
    assert {t["trials"] for t in tests} == {3}


def test_a_fixed_gallery_of_a_single_split_has_no_trials(monkeypatch, capsys):
    """As of the data set in docs/change_one_thing.md: `test.py` refuses --trials there."""
    monkeypatch.setattr(options.DATASETS["llcm"], "gallery_draws", 1)
    steps, rows = planned("llcm", "llcm", trials=1)
    assert {len(row.files) for row in rows} == {1}
    for step in steps:
        assert "trials" not in step.options
        assert step.resolved["dataset"] == "llcm"
    with pytest.raises(SystemExit):
        main(["run", "--table", "llcm", "--trials", "3", "--dry-run"])
    assert "--trials 3: LLCM has 1" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--preset", "scratch", "--epochs", "2")])
def test_ablations_vary_one_thing_and_share_what_is_equal(flags):
    steps, _ = planned("ablation", trials=1, flags=flags)
    trained = {s.folder.name: (s.script, s.resolved) for s in steps if s.trains}
    script, base = trained["MGMRA_regdb_trial1"]
    assert script == "train_MGMRA.py"
    related = {frozenset(("shrink", "shrink_scale")), frozenset(("shrink",))}
    related |= {frozenset(("instances_per_id", "parts_per_instance"))}
    cosine = {"addressing", "shrink", "shrink_scale"}
    related |= {frozenset(cosine), frozenset({*cosine, "bank_init"})}
    related |= {frozenset(("memory_levels", "w_alignment"))}  # without a memory nothing to align
    for name, (script, resolved) in trained.items():
        differing = {k for k in base if resolved[k] != base[k]} - {"output_dir"}
        if script == "train_HCT.py" or name == "MGMRA_regdb_trial1":
            assert not differing
        else:
            assert len(differing) == 1 or frozenset(differing) in related, name
    own = str(base["gem_p"])[:-2]
    assert f"MGMRA_regdb_gem-p_{own}_trial1" not in trained  # MG-MRA's own value
    assert not any("share_net_2" in name or "shrink_0.0025" in name for name in trained)


def test_the_control_and_the_scaled_threshold_are_in_the_tables():
    for name in ("ablation", "memory"):
        steps, _ = planned(name, trials=1)
        flags = [" ".join(flags_of(step.options)) for step in steps if step.trains]
        variants = (f"--memory-variant {name}" for name in ("first", "released"))
        for wanted in ("--memory-levels none", "--shrink auto --shrink-scale 0.5", *variants):
            assert any(wanted in line for line in flags), wanted
    rows = planned("ablation", trials=1)[1]
    assert {row.re_rank for row in rows} == {"no", "k_reciprocal", "random_walk"}
    assert {"memory", "both", "pcb"} <= {row.setting.test.get("test_feat") for row in rows}


def test_a_flag_reaches_the_trainings_that_use_it():
    flags = ("--w_memory_id", "0.5", "--w_alignment", "0.3", "--w_center", "3", "--epochs", "9")
    steps, _ = planned("regdb", trials=1, flags=flags)
    given = {
        s.folder.name: set(s.options) - {"dataset", "trial", "method"} for s in steps if s.trains
    }
    assert given == {
        "HCT_regdb_trial1": {"w_center", "epochs"},
        "SGMRA_regdb_trial1": {"w_memory_id", "w_center", "epochs"},
        "MGMRA_regdb_trial1": {"w_memory_id", "w_alignment", "w_center", "epochs"},
        "HCT_regdb_method_agw_trial1": {"epochs"},
        "MGMRA_regdb_method_agw_trial1": {"w_memory_id", "w_alignment", "epochs"},
    }


def test_each_command_is_one_a_user_could_type(capsys):
    assert (
        main(["run", "--table", "memory", "--dry-run", "--epochs", "3", "--test-batch", "8"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 20
    for line in lines:
        words = shlex.split(line.removeprefix("to do "))
        script = words[1]
        assert words[0] == "python"
        assert (Path(script)).name in {p.name for p in ROOT.glob("*.py")}
        parser = options.test_parser("") if "test.py" in script else options.train_parser("")
        args = parser.parse_args(words[2:])
        assert args.test_batch == 8
        assert getattr(args, "epochs", 3) == 3


# --- Running --------------------------------------------------------------------------------------


def test_a_table_is_run_once_and_only_what_is_missing_again(go, tmp_path, capsys):
    code, calls = go("--table", "regdb", "--trials", 2, "--only", "HCT")
    assert code == 0
    assert len(calls) == 2 * (1 + 4)
    assert "[10/10] done in" in capsys.readouterr().out
    assert go("--table", "regdb", "--trials", 2, "--only", "HCT") == (0, [])
    (tmp_path / "runs/HCT_regdb_trial2/i2v_best/results.json").unlink()
    code, calls = go("--table", "regdb", "--trials", 2, "--only", "HCT")
    assert code == 0
    assert len(calls) == 1
    assert "--direction i2v" in calls[0] and "best.pt" in calls[0]


def test_a_dry_run_runs_nothing(go, tmp_path, capsys):
    assert go("--table", "regdb", "--dry-run") == (0, [])
    assert not (tmp_path / "runs").exists()
    assert capsys.readouterr().out.count("to do") == 50 + 210


def test_a_stopped_training_goes_on_and_its_stale_results_are_made_anew(
    go, tmp_path, monkeypatch, capsys
):
    only = ("--table", "regdb", "--trials", 1, "--only", "AGW", "v2i", "--epochs", 4)
    monkeypatch.setenv("STUB_STOPS", "HCT_regdb_method_agw")
    code, calls = go(*only)
    assert code == 2
    assert len(calls) == 1
    error = capsys.readouterr().err
    assert "ended with exit code 1" in error and "repeat" in error
    results = tmp_path / "runs/HCT_regdb_method_agw_trial1/v2i_last/results.json"
    monkeypatch.delenv("STUB_STOPS")
    code, calls = go(*only)
    assert code == 0
    assert "--resume" in shlex.split(calls[0])
    assert [shlex.split(c)[0].endswith("test.py") for c in calls] == [False, True, True] * 2
    later = results.stat().st_mtime + 10
    os.utime(results.parents[1] / "last.pt", (later, later))
    code, calls = go(*only)
    assert (code, len(calls)) == (0, 1)
    assert str(results.parent) in calls[0]


def test_runs_of_other_options_are_not_taken_for_these(go, capsys):
    only = ("--table", "regdb", "--trials", 1, "--only", "HCT", "v2i")
    assert go(*only, "--epochs", 4)[0] == 0
    code, calls = go(*only, "--epochs", 5)
    assert (code, calls) == (2, [])
    error = capsys.readouterr().err
    assert "epochs 4 there, 5 here" in error and "--runs" in error
    assert go(*only, "--epochs", 4, "--quiet", "--workers", 1) == (0, [])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("HCT_regdb_trial1/options.json", "{"),
        ("HCT_regdb_trial1/options.json", "[]"),
        ("HCT_regdb_trial1/training.json", "{}"),
        ("HCT_regdb_trial1/v2i_last/results.json", "\x00"),
    ],
)
def test_damaged_files_of_a_run_are_named(go, tmp_path, capsys, name, content):
    only = ("--table", "regdb", "--trials", 1, "--only", "HCT", "v2i")
    assert go(*only)[0] == 0
    (tmp_path / "runs" / name).write_text(content)
    assert go(*only) == (2, [])
    error = capsys.readouterr().err
    assert name in error and "remove it and run again" in error


REFUSALS = {
    "decided by the table": (("--table", "regdb", "--trial", 3), "--trial is decided by the table"),
    "direction": (("--table", "regdb", "--tvsearch"), "--direction is decided by the table"),
    "seed": (("--table", "study", "--seed", 3), "--seed is decided by the table"),
    "elsewhere": (
        ("--table", "regdb", "--unseen", "sysu"),
        "--unseen has no effect on --table reg",
    ),
    "folder": (("--table", "regdb", "--output-dir", "x"), "--output_dir is decided"),
    "unknown flag": (("--table", "regdb", "--speed", "9"), "--speed"),
    "illegal value": (("--table", "regdb", "--lr", "-1"), "above 0"),
    "no table": ((), "--table"),
    "unknown table": (("--table", "market"), "market"),
    "too many trials": (("--table", "regdb", "--trials", "11"), "--trials"),
    "another data set": (("--table", "regdb", "--dataset", "sysu"), "is of --dataset regdb"),
    "no such row": (("--table", "regdb", "--only", "Xmodal"), "leaves no row"),
    "contradiction": (("--table", "regdb", "--pcb", "on"), "agw has no stripes"),
    "no data": (("--table", "regdb", "--data-path", "nowhere"), "signed form"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_come_before_any_work(name, tmp_path, stubs, capsys):
    flags, message = REFUSALS[name]
    with pytest.raises(SystemExit) as stop:
        main(["run", *map(str, flags), "--runs", str(tmp_path / "runs")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert not stubs.read_text()


def test_a_missing_split_is_found_before_any_work(go, data, tmp_path, capsys):
    list_file = data / "regdb/idx/test_thermal_9.txt"
    text = list_file.read_text()
    list_file.unlink()
    try:
        assert go("--table", "regdb", "--only", "HCT") == (2, [])
        assert "test_thermal_9.txt does not exist" in capsys.readouterr().err
    finally:
        list_file.write_text(text)


# --- The tables -----------------------------------------------------------------------------------


def test_a_missing_trial_is_shown_and_never_averaged_over(go, tmp_path, capsys):
    go("--table", "regdb", "--trials", 3, "--only", "HCT", "v2i")
    files = [tmp_path / f"runs/HCT_regdb_trial{t}/v2i_last/results.json" for t in (1, 2, 3)]
    values = [json.loads(f.read_text())["rows"][0]["rank1"] for f in files]
    capsys.readouterr()
    assert table(tmp_path, "--table", "regdb") == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("| HCT"))
    assert f"| {100 * np.mean(values):.2f} ± {100 * np.std(values):.2f} |" in row
    assert "| 3 | 91.05 / 83.28 | HCT's README; also in the abstract" in row
    assert text.startswith("# RegDB\n")
    assert "Data: stand-in data" in text and "say nothing of the real data set" in text
    assert "Code: abc." in text
    files[1].unlink()
    table(tmp_path, "--table", "regdb")
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| HCT"))
    assert row.startswith("| HCT | missing | missing |")
    assert "2 of 3, missing: 2" in row
    assert go("--table", "regdb", "--trials", 1, "--only", "HCT", "v2i") == (0, [])
    table(tmp_path, "--table", "regdb")
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| HCT"))
    assert f"| HCT | {100 * values[0]:.2f} |" in row
    with (tmp_path / "runs/regdb_table.csv").open() as stream:
        lines = {(r["section"], r["method"], r["checkpoint"]): r for r in csv.DictReader(stream)}
    line = lines["regdb v2i", "HCT", "last"]
    assert float(line["rank1_mean"]) == pytest.approx(values[0])
    assert float(line["published_mAP_percent"]) == 83.28
    assert lines["regdb i2v", "HCT", "last"]["missing"] == "1"
    assert lines["regdb i2v", "HCT", "last"]["rank1_mean"] == ""
    tex = (tmp_path / "runs/regdb_table.tex").read_text()
    assert tex.count(r"\begin{table}") == tex.count(r"\end{table}") > 4
    assert r"k\_reciprocal" in tex and "±" not in tex


def test_ablations_come_with_health_and_re_ranked_rows_apart(go, tmp_path, capsys):
    flags = ("--table", "ablation", "--trials", 2, "--preset", "scratch", "--epochs", 2)
    assert go(*flags, "--only", "lambda", "0.5 / m")[0] == 0
    assert go(*flags, "--only", "re-ranking")[0] == 0
    capsys.readouterr()
    table(tmp_path, "--table", "ablation")
    text = capsys.readouterr().out
    assert "Flags beyond the table's own: --preset scratch --epochs 2." in text
    assert str(tmp_path) not in text
    sections = text.split("\n## ")
    plain = next(s for s in sections if "visible to infrared, last epoch\n" in s)
    ranked = next(s for s in sections if "re-ranked\n" in s)
    assert "| lambda | 0.5 / m |" in plain and "k_reciprocal" not in plain
    assert "| re-ranking | MG-MRA, k_reciprocal |" in ranked
    assert "| re-ranking | MG-MRA, random_walk |" in ranked
    health = sections[-1]
    assert health.startswith("Memory health")
    assert "| lambda | 0.5 / m | 0.15 | 0.5 |" in health  # the stub's trials say 0.1 and 0.2
    assert not any("as published" in s.split("\n")[0] for s in sections)


def test_sysu_rows_average_over_draws(go, tmp_path, capsys):
    flags = ("--table", "sysu", "--trials", 3, "--only", "SG-MRA", "indoor 10 official")
    code, calls = go(*flags, dataset="sysu")
    assert (code, len(calls)) == (0, 3)
    capsys.readouterr()
    table(tmp_path, "--table", "sysu")
    text = capsys.readouterr().out
    section = text.split("\n## SYSU-MM01, indoor-search, ten-shot, official gallery, last epoch")[1]
    row = next(x for x in section.splitlines() if x.startswith("| SG-MRA"))
    assert f"± {100 * np.std([0, 0.001, 0.002]):.2f}" in row
    assert "their own re-run" in text
    code, calls = go(*flags[:2], "--trials", 5, *flags[4:], dataset="sysu")
    assert (code, len(calls)) == (0, 2)  # more draws: evaluated anew, not trained


def test_tables_refuse_what_they_can_not_make(go, tmp_path, capsys):
    def refused(*flags):
        with pytest.raises(SystemExit) as stop:
            table(tmp_path, *flags)
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "`reproduce.py run --table regdb` first" in refused("--table", "regdb")
    assert "unrecognized arguments: --epochs" in refused("--table", "regdb", "--epochs", "2")
    assert "(did you mean --runs?)" in refused("--table", "regdb", "--run", "x")
    go("--table", "regdb", "--trials", 2, "--only", "HCT", "v2i")
    file = tmp_path / "runs/HCT_regdb_trial2/v2i_last/results.json"
    content = json.loads(file.read_text())
    content["rows"][0]["dataset"] = "RegDB"
    file.write_text(json.dumps(content))
    assert "different data: RegDB, stand-in data" in refused("--table", "regdb")
    file.write_text("{}")
    assert "v2i_last/results.json cannot be used" in refused("--table", "regdb")
    for path in (tmp_path / "runs").rglob("results.json"):
        path.unlink()
    assert "none of the table's results is there yet" in refused("--table", "regdb")


def test_from_nothing_to_a_table_with_the_real_scripts(data, tmp_path, capsys):
    quick = ("--arch", "resnet18", "--weights", "none", "--img_h", 96, "--img_w", 32)
    quick += ("--batch-size", 3, "--num_pos", 2, "--local_feat_dim", 16, "--eval-start", 0)
    quick += ("--lr", 0.01, "--epochs", 1, "--gpu", "cpu", "--quiet")
    flags = ("run", "--table", "regdb", "--trials", 1, "--only", "SG-MRA", "v2i", "--runs")
    flags += (tmp_path / "runs", "--data-path", data / "regdb", *quick)
    command = [sys.executable, str(ROOT / "reproduce.py"), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[3/3] done in" in done.stdout
    assert main(list(map(str, flags))) == 0
    out = capsys.readouterr().out
    assert out.count("done  python") == 3 and "done in" not in out
    table(tmp_path, "--table", "regdb")
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("| SG-MRA"))
    assert "missing" not in row
    assert "stand-in data in RegDB's layout" in text
