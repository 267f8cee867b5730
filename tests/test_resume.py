"""Interrupted runs go on to the bits of an unbroken one, whatever ended them."""

import errno
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from short_run import (
    EPOCHS,
    NARROW,
    STEPS,
    arguments,
    differences,
    log_lines,
    outcome,
    write_data,
)

import options
import train_HCT
import train_MGMRA
import utils
from data_loader import ImageStore
from datasets.decode import ImageCache
from engine import distributed, evaluate, fit, setup
from engine import train as engine_train
from engine.run_files import RunFiles
from memory import LEVELS, MultiGranularityMemory
from networks.backbone import BACKBONES
from networks.checkpoint_file import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("short") / "data")


@pytest.fixture(autouse=True, scope="module")
def narrow_backbone():
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(BACKBONES, "resnet18", NARROW["resnet18"])
        yield


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory, narrow_backbone):
    """A run that nothing ended: its folder."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert train(data, folder) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory, narrow_backbone):
    """A run that ended in its third epoch: its folder."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, engine_train, "training_step", 2 * STEPS + 1)
        interrupted(data, folder, code=143)
    return folder


def train(data, folder, *flags):
    return train_MGMRA.main(arguments(data, folder, *flags))


def stop_at(monkeypatch, target, name, call, number=signal.SIGTERM):
    """Sends this process a signal within the given call (counted from 0) of a function."""
    calls = []
    function = getattr(target, name)

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call + 1:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(target, name, counted)


def interrupted(data, folder, *flags, code):
    with pytest.raises(SystemExit) as stop:
        train(data, folder, *flags)
    assert stop.value.code == code


@pytest.mark.parametrize(
    ("target", "name", "call", "saved"),
    [
        (ImageCache, "__call__", 0, None),  # before training
        (engine_train, "training_step", 0, None),
        (engine_train, "training_step", STEPS - 1, None),  # the last step of an epoch
        (engine_train, "training_step", STEPS + 2, 1),
        (engine_train, "training_step", 2 * STEPS - 1, 1),  # the last one before an evaluation
        (evaluate, "score", 0, 1),  # during an evaluation
        (fit, "save_checkpoint", 0, None),
        (fit, "save_checkpoint", 2, 1),  # best.pt of the second epoch is saved, last.pt is not
        (fit, "write_reports", 1, 2),  # last.pt is saved, the reports are not
    ],
)
def test_a_signal_ends_a_run_at_once_and_it_goes_on_to_the_same_bits(
    target, name, call, saved, data, unbroken, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        number = signal.SIGINT if call % 2 else signal.SIGTERM
        stop_at(patched, target, name, call, number)
        interrupted(data, folder, code=128 + number)
    message = capsys.readouterr().err.splitlines()[-1]
    begin = f"stopped by {number.name}"
    if saved is None:
        assert message.startswith(f"{begin}. Go on with: python ")
        assert not (folder / "last.pt").exists()
    else:
        kept = f"{begin}: complete epochs are in {folder / 'last.pt'}. Go on with: python "
        assert message.startswith(kept)
        assert load_checkpoint(folder / "last.pt")["epoch"] == saved
    assert message.endswith(" --resume")
    assert train(data, folder, "--resume") == 0
    assert differences(outcome(unbroken), outcome(folder)) == []


def test_the_command_that_goes_on_is_the_one_that_was_ended(data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a run"
    for flags in (("--overwrite",), ("--resume",), ("-r", folder / "last.pt")):
        with monkeypatch.context() as patched:
            patched.setattr("sys.argv", [script := "somewhere/train_MGMRA.py"])
            stop_at(patched, engine_train, "training_step", STEPS if len(flags) == 1 else 0)
            interrupted(data, folder, *flags, code=143)
        command = capsys.readouterr().err.splitlines()[-1].split("Go on with: python ")[1]
        assert (words := shlex.split(command))[0] == script
        parse = options.train_parser("").parse_args
        assert parse(words[1:]) == parse([*arguments(data, folder), "--resume"])
    elsewhere = folder / "last.pt"
    stop_at(monkeypatch, engine_train, "training_step", 0)
    interrupted(data, tmp_path / "other", "--resume", elsewhere, code=143)
    command = capsys.readouterr().err.splitlines()[-1]
    assert command.endswith(shlex.join(["--resume", str(elsewhere)]))  # no epoch is saved yet


def test_a_run_ended_in_every_epoch_reaches_the_same_bits(data, unbroken, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for complete in range(1, EPOCHS):  # --resume: nothing there yet, it starts at the beginning
        with monkeypatch.context() as patched:
            stop_at(patched, engine_train, "training_step", STEPS + 1)
            interrupted(data, folder, "--resume", code=143)
        assert len(log_lines(folder)) == complete
    assert train(data, folder, "--resume") == 0
    assert differences(outcome(unbroken), outcome(folder)) == []


def test_a_run_goes_on_in_another_folder_with_its_log_and_best(data, unbroken, stopped, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(stopped, source)
    (source / "last.pt").unlink()
    folder = tmp_path / "run"
    train(data, folder, "--epochs", EPOCHS, "--resume", source / "last.previous.pt")
    assert [line["epoch"] for line in log_lines(folder)] == [1, 2, 3]
    assert differences(outcome(unbroken), outcome(folder)) == []


def test_a_run_is_not_overwritten_by_another_one_that_goes_on(data, unbroken, tmp_path, capsys):
    folder, other = tmp_path / "run", unbroken / "last.pt"
    shutil.copytree(unbroken, folder)
    before = (folder / "last.pt").read_bytes()
    interrupted(data, folder, "--epochs", EPOCHS + 1, "--resume", other, code=2)
    assert "is there already" in capsys.readouterr().err
    assert (folder / "last.pt").read_bytes() == before
    (folder / "ranks.json").write_text("{}")
    train(data, folder, "--epochs", 1, "--overwrite")
    assert (folder / "ranks.json").read_text() == "{}"  # no run's file
    assert len(log_lines(folder)) == 1


def test_a_feature_that_the_network_has_not_is_refused_first(data, tmp_path, capsys):
    (tmp_path / "last.pt").write_bytes(b"of a former run")
    interrupted(data, tmp_path, "--overwrite", "--test-feat", "neck", code=2)
    assert "--test-feat neck: this network has pcb, memory, both" in capsys.readouterr().err
    assert (tmp_path / "last.pt").exists()


def test_a_run_ended_before_it_overwrites_is_started_again_as_it_was(
    data, unbroken, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    stop_at(monkeypatch, setup, "eval_set", 0)
    interrupted(data, folder, "--overwrite", code=143)
    message = capsys.readouterr().err.splitlines()[-1]
    assert "complete epochs" not in message and message.endswith(" --overwrite")


def test_whose_checkpoint_it_is_follows_from_folder_and_name(tmp_path):
    def files(prefix=""):
        return RunFiles(tmp_path / "out", tmp_path, tmp_path, prefix=prefix)

    (tmp_path / "last.pt").symlink_to(tmp_path / "elsewhere.pt")
    assert files()._holds(tmp_path / "last.pt")
    assert files("a_")._holds(tmp_path / "a_epoch_010.pt")
    assert not files("a_")._holds(tmp_path / "a_lr0.05_last.pt")
    assert not files()._holds(tmp_path / "out" / "last.pt")


def test_of_a_folder_without_last_pt_the_one_before_is_taken(data, stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    (folder / "last.pt").unlink()
    train(data, folder, "--resume", folder)
    assert [line["epoch"] for line in log_lines(folder)] == [1, 2, 3]


def test_a_finished_run_has_nothing_to_do_and_mends_its_reports(data, unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    (folder / "training.json").unlink()
    (folder / "log.jsonl").write_text('{"epoch": 1}\n{"epo')
    assert train(data, folder, "--resume") == 0
    assert differences(outcome(unbroken), outcome(folder)) == []
    interrupted(data, folder, "--resume", folder / "best.pt", code=2)
    assert "(without optimizer, generators; last.pt has them)" in capsys.readouterr().err
    assert train(data, folder, "--resume", "--epochs", EPOCHS - 1) == 0
    assert "nothing to train: all 3 epochs are done" in capsys.readouterr().err


def test_changed_options_are_reported_or_refused(data, unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    train(data, folder, "--resume", "--epochs", EPOCHS + 1, "--lr", 0.02, "--weight-decay", 0.1)
    error = capsys.readouterr().err
    assert "weight_decay 0.0005 -> 0.1" in error
    assert f"epochs {EPOCHS} -> {EPOCHS + 1}" in error
    content = load_checkpoint(folder / "last.pt")
    groups = content["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.1}  # reported and in force
    before = (folder / "last.pt").read_bytes()
    for flags, text in {
        ("--optim", "adam"): "optim sgd -> adam",
        ("--select-on", "val"): "select_on test -> val",
        ("--local_feat_dim", 16): "local_feat_dim 8 there, 16 here",
        ("--overwrite",): "give one",
    }.items():
        interrupted(data, folder, "--resume", "--epochs", 9, *flags, code=2)
        assert text in capsys.readouterr().err, flags
    assert (folder / "last.pt").read_bytes() == before


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "a bit of the weights": lambda data: flipped(data, len(data) // 2),
    "a bit of the first record": lambda data: flipped(data, data.find(b"about")),
    "empty": lambda data: b"",
}


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def test_a_damaged_checkpoint_is_set_aside_however_it_is_named(
    data, stopped, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stopped, "run")
    last = tmp_path / "run/last.pt"
    last.write_bytes(b"")
    with monkeypatch.context() as patched:
        stop_at(patched, engine_train, "training_step", 0)
        interrupted(data, "run", "--resume", tmp_path / "run", code=143)
    assert not last.exists() and (tmp_path / "run/last.damaged.pt").exists()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    name, data, unbroken, stopped, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    last = folder / "last.pt"
    last.write_bytes(DAMAGES[name](last.read_bytes()))
    assert train(data, folder, "--resume") == 0
    error = capsys.readouterr().err
    assert f"{last} (" in error
    assert f"Going on from the one before it, {folder / 'last.previous.pt'}" in error
    assert differences(outcome(unbroken), outcome(folder)) == []
    assert (folder / "last.damaged.pt").exists()
    assert not (folder / "last.previous.pt").exists()  # the run is complete
    last.write_bytes(b"")
    interrupted(data, folder, "--resume", code=2)
    assert str(last) in capsys.readouterr().err


def test_a_full_disk_leaves_the_former_checkpoint_and_says_so(
    data, unbroken, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    before = (folder / "last.pt").read_bytes()
    real = open

    def full(path, mode="r", *args, **kwargs):  # every write to this device fails for want of room
        if str(path).startswith(str(folder / ".last.pt")):
            path, mode = "/dev/full", "wb"
        return real(path, mode, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(utils, "open", full, raising=False)
        interrupted(data, folder, "--resume", "--epochs", EPOCHS + 1, code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: cannot write the checkpoint {folder / 'last.pt'}")
    assert os.strerror(errno.ENOSPC) in error
    assert "a former one is untouched" in error
    assert (folder / "last.pt").read_bytes() == before
    train(data, folder, "--resume", "--epochs", EPOCHS + 1)
    assert [line["epoch"] for line in log_lines(folder)] == [1, 2, 3, 4]


def test_a_folder_that_became_read_only_leaves_the_former_checkpoint(
    data, unbroken, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    before = (folder / "last.pt").read_bytes()
    real = open

    def read_only(path, mode="r", *args, **kwargs):  # root may write into a read-only folder
        if str(path).startswith(str(folder / ".last.pt")) and "x" in mode:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(utils, "open", read_only, raising=False)
    interrupted(data, folder, "--resume", "--epochs", EPOCHS + 1, code=2)
    assert "Permission denied" in capsys.readouterr().err
    assert (folder / "last.pt").read_bytes() == before


def test_a_kill_between_the_two_renames_loses_nothing(data, unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    os.replace(folder / "last.pt", folder / "last.previous.pt")
    (folder / ".last.pt.1.tmp").write_bytes(b"half")
    interrupted(data, folder, code=2)  # neither overwritten
    assert train(data, folder, "--resume", "--epochs", EPOCHS + 1) == 0
    assert not (folder / ".last.pt.1.tmp").exists()
    assert log_lines(folder)[:EPOCHS] == log_lines(unbroken)


def test_a_folder_that_a_living_run_writes_is_refused_and_left_alone(
    data, unbroken, tmp_path, capsys
):
    folder, holder = tmp_path / "run", f"process {os.getpid()} on {platform.node()}"
    with utils.lock(folder / ".lock"):  # in its first epoch: there is no checkpoint yet
        interrupted(data, folder, code=2)
        assert capsys.readouterr().err.startswith(f"error: {folder} is being written by {holder}: ")
        shutil.copytree(unbroken, folder, dirs_exist_ok=True)
        before = outcome(folder)
        for flag in ("--resume", "--overwrite"):
            interrupted(data, folder, flag, "--epochs", EPOCHS + 1, code=2)
            assert f"is being written by {holder}" in capsys.readouterr().err
        assert train(data, folder, "--resume", "--test-only") == 0
    assert differences(before, outcome(folder)) == []
    (folder / ".lock").write_text("process 1 on a host that is gone")
    assert train(data, folder, "--resume") == 0


def test_an_end_between_any_two_renames_loses_nothing(data, unbroken, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    replace = os.replace
    for allowed in range(8, 14):  # of the renames, up to the last epoch and its best.pt
        folder, calls = tmp_path / str(allowed), []

        def fail(source, target, allowed=allowed, calls=calls):
            calls.append(target)
            if len(calls) > allowed:
                raise Killed
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(utils.os, "replace", fail)
            with pytest.raises(Killed):
                train(data, folder)
        assert train(data, folder, "--resume") == 0
        assert differences(outcome(unbroken), outcome(folder)) == [], calls[-1]


@pytest.mark.parametrize(
    ("poisoned_step", "message"),
    [(1, f"'id' is nan in epoch {EPOCHS + 1}, step 1"), (STEPS, "'part_norm.bias' holds NaN")],
)
def test_a_loss_or_weight_that_is_not_finite_keeps_the_last_good_checkpoint(
    poisoned_step, message, data, unbroken, tmp_path, capsys, monkeypatch
):
    folder, calls = tmp_path / "run", []
    shutil.copytree(unbroken, folder)
    before = {name: (folder / name).read_bytes() for name in ("last.pt", "best.pt", "log.jsonl")}
    step = engine_train.training_step

    def poisoned(net, *args, **kwargs):
        result = step(net, *args, **kwargs)
        calls.append(1)
        if len(calls) == poisoned_step:
            with torch.no_grad():  # as a gradient that overflows leaves it; the loss was finite
                net.part_norm.bias.fill_(torch.nan)
        return result

    monkeypatch.setattr(engine_train, "training_step", poisoned)
    interrupted(data, folder, "--resume", "--epochs", EPOCHS + 1, code=2)
    assert message in capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_loader_thread_that_dies_is_an_error(data, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageStore, "gather", lambda self, rows: exec("raise MemoryError('full')"))
    with pytest.raises(MemoryError, match="full"):
        train(data, tmp_path / "run")


def test_the_same_bits_whatever_the_workers(data, unbroken, tmp_path):
    folder = tmp_path / "run"
    train(data, folder, "--workers", 3, "--deterministic")
    try:
        assert differences(outcome(unbroken), outcome(folder)) == []
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_the_same_bits_twice_on_cuda(data, tmp_path):
    flags = ("--gpu", 0, "--deterministic")
    try:
        train(data, tmp_path / "one", *flags)
        train(data, tmp_path / "two", *flags, "--workers", 3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert differences(outcome(tmp_path / "one"), outcome(tmp_path / "two")) == []


def test_what_several_processes_cannot_do_is_said_before_any_work(
    data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    interrupted(data, tmp_path / "run", "--batch-size", 4, code=2)
    error = capsys.readouterr().err
    assert "--batch-size 4" in error
    assert "choose a multiple of 3" in error
    assert not (tmp_path / "run").exists()


def test_test_only_evaluates_the_file_that_was_named_or_nothing(data, unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    assert train(data, folder, "--test-only", "--resume", "--lr", 7) == 0
    assert "R1 " in capsys.readouterr().err
    (folder / "last.pt").write_bytes(b"")
    interrupted(data, folder, "--test-only", "--resume", code=2)
    report = json.loads((folder / "training.json").read_text())
    assert report["last"]["epoch"] == EPOCHS


def whole_and_parts(main, data, folder, monkeypatch, *flags, **settings):
    """Trains two epochs at once, and again in two runs; where the results differ."""
    flags = ("--epochs", 2, *flags)
    assert main(arguments(data, folder / "whole", *flags), **settings) == 0
    with monkeypatch.context() as patched:
        stop_at(patched, engine_train, "training_step", STEPS + 1)
        with pytest.raises(SystemExit):
            main(arguments(data, folder / "parts", *flags), **settings)
    assert main(arguments(data, folder / "parts", *flags, "--resume"), **settings) == 0
    assert [line["epoch"] for line in log_lines(folder / "parts")] == [1, 2]
    return differences(outcome(folder / "whole"), outcome(folder / "parts"))


def test_agw_and_adam_resume_to_the_same_bits(data, tmp_path, monkeypatch):
    flags = ("--method", "agw", "--optim", "adam", "--lr", 1e-4)
    assert whole_and_parts(train_HCT.main, data, tmp_path, monkeypatch, *flags) == []


def test_float16_resumes_with_its_loss_scale(data, tmp_path, monkeypatch):
    flags = ("--amp", "fp16")
    assert whole_and_parts(train_MGMRA.main, data, tmp_path, monkeypatch, *flags) == []
    scaler = load_checkpoint(tmp_path / "parts" / "last.pt")["scaler"]
    assert scaler["scale"] > 0  # compared as well


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("AdamW", {"amsgrad": True, "weight_decay": 0.1}),
        ("RMSprop", {"momentum": 0.5, "centered": True}),
        ("NAdam", {}),
        ("Adafactor", {}),  # its state has fewer entries than the parameter
    ],
)
def test_any_optimiser_resumes_to_the_same_bits(kind, settings, data, tmp_path, monkeypatch):
    if not hasattr(torch.optim, kind):
        pytest.skip(f"this version of torch has no {kind}")

    def make(net, *_):
        groups = [
            {"params": net.head_parameters(), "lr_scale": 1.0},
            {"params": [net.memory.part_bank, *net.shared.parameters()], "lr_scale": 0.1},
        ]
        return getattr(torch.optim, kind)(groups, lr=1e-3, **settings)

    monkeypatch.setattr(train_MGMRA, "make_optimizer", make)
    flags = ("--lr", 1e-3)
    assert whole_and_parts(train_MGMRA.main, data, tmp_path, monkeypatch, *flags) == []
    saved = load_checkpoint(tmp_path / "parts" / "last.pt")["optimizer"]["state"]
    assert saved


class ThresholdPerLevel(MultiGranularityMemory):
    """A user's memory whose threshold is a tuple: one for each level."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shrink = (0.001, 0.002, 0.003)

    def threshold(self, level, num_prototypes):
        return self.shrink[LEVELS.index(level)]


def test_a_tuple_in_the_network_s_configuration_survives(data, tmp_path, monkeypatch, capsys):
    main, own = train_MGMRA.main, {"memory_class": ThresholdPerLevel}
    assert whole_and_parts(main, data, tmp_path, monkeypatch, **own) == []
    folder = tmp_path / "parts"
    config = load_checkpoint(folder / "last.pt")["config"]
    assert (config["memory"], config["shrink"]) == ("ThresholdPerLevel", (0.001, 0.002, 0.003))
    capsys.readouterr()
    interrupted(data, folder, "--epochs", 3, "--resume", code=2)  # the method's own memory
    assert "memory 'ThresholdPerLevel' there, 'mg' here" in capsys.readouterr().err


def test_an_optimiser_s_state_that_does_not_fit_is_refused(data, unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    content = load_checkpoint(folder / "last.pt")
    state, groups = content["optimizer"]["state"], content["optimizer"]["param_groups"]
    state[0] = {"momentum_buffer": state[0]["momentum_buffer"][:1, :2].clone()}
    shorter = [{**groups[0], "params": groups[0]["params"][:-1]}, groups[1]]
    for optimizer in (
        {"state": state, "param_groups": groups},
        {"state": {}, "param_groups": shorter},
    ):
        save_checkpoint(folder / "last.pt", {**content, "optimizer": optimizer})
        interrupted(data, folder, "--resume", "--epochs", EPOCHS + 1, code=2)
        error = capsys.readouterr().err
        assert f"{folder / 'last.pt'} cannot be resumed here" in error


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing():
    script = Path(__file__).with_name("fault_injection.py")
    command = [sys.executable, str(script), "--kills", "20", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills: 20" in done.stdout
    assert "wrong: 0" in done.stdout
