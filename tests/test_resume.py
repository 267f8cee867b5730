"""Interrupted runs go on to the bits of an unbroken one, whatever ended them."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from short_run import (
    EPOCHS,
    STEPS,
    NarrowResNet,
    arguments,
    differences,
    log_lines,
    outcome,
    write_data,
)

import train_HCT
import train_MGMRA
import utils
from engine import fit as fit_loop
from engine import setup as training
from engine import train as engine

GET_MODEL = torchvision.models.get_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("short") / "data")


@pytest.fixture(autouse=True, scope="module")
def narrow_backbone():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torchvision.models, "get_model", NarrowResNet)
        yield


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory, narrow_backbone):
    """A run that nothing ended: its folder."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert train(data, folder) == 0
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
        (engine, "training_step", 0, (0, 1)),
        (engine, "training_step", STEPS + 2, (1, 3)),
        (engine, "training_step", STEPS - 1, (1, 0)),  # the last step: its epoch ends
        (engine, "training_step", 2 * STEPS - 1, (1, STEPS)),  # the same, before an evaluation
        (training, "score", 0, (1, STEPS)),  # during an evaluation
        (fit_loop, "save_checkpoint", 0, (1, 0)),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(
    target, name, call, saved, data, unbroken, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        number = signal.SIGINT if call % 2 else signal.SIGTERM
        stop_at(patched, target, name, call, number)
        interrupted(data, folder, code=128 + number)
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"stopped by {number.name}: {saved[0]} epochs" in message
    assert str(folder / "last.pt") in message
    assert message.endswith("--resume")
    content = torch.load(folder / "last.pt", weights_only=True)
    assert (content["epoch"], content["underway"]["steps"]) == saved
    assert train(data, folder, "--resume") == 0
    assert differences(outcome(unbroken), outcome(folder)) == []


def test_a_run_in_many_pieces_and_saves_within_epochs(data, unbroken, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    flags = ("--save-every-steps", 2, "--resume")  # nothing there yet: starts at the beginning
    for _ in range(2 * EPOCHS):
        with monkeypatch.context() as patched:
            stop_at(patched, engine, "training_step", 1)
            interrupted(data, folder, *flags, code=143)
    assert train(data, folder, *flags) == 0
    assert differences(outcome(unbroken), outcome(folder)) == []


def test_signals_before_training_leave_at_once_and_handlers_are_given_back(
    data, tmp_path, monkeypatch, capsys
):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop_at(monkeypatch, training, "load_images", 0)
    interrupted(data, tmp_path / "run", code=143)
    assert "stopped by SIGTERM. Go on with" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_ctrl_c_is_not_put_off(monkeypatch):
    with utils.StopSignals() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher's repetition
        assert stop.received == signal.SIGINT
        monkeypatch.setattr(utils, "INSIST_SECONDS", 0.0)
        with pytest.raises(utils.Interrupted, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(utils.Interrupted), stop.deferred(False):
            pass


def test_a_run_goes_on_in_another_folder_with_its_log_and_best(data, unbroken, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(unbroken, source)
    (source / "last.pt").unlink()
    folder = tmp_path / "run"
    train(data, folder, "--epochs", EPOCHS, "--resume", source / "last.previous.pt")
    assert [line["epoch"] for line in log_lines(folder)] == [1, 2, 3]
    assert differences(outcome(unbroken), outcome(folder)) == []


def test_a_finished_run_has_nothing_to_do_and_mends_its_reports(data, unbroken, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    (folder / "training.json").unlink()
    (folder / "log.jsonl").write_text('{"epoch": 1}\n{"epo')
    with caplog.at_level(logging.INFO):
        assert train(data, folder, "--resume") == 0
    assert differences(outcome(unbroken), outcome(folder)) == []
    with pytest.raises(SystemExit):
        train(data, folder, "--resume", "--epochs", EPOCHS - 1)


def test_changed_options_are_reported_or_refused(data, unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    train(data, folder, "--resume", "--epochs", EPOCHS + 1, "--lr", 0.02, "--weight-decay", 0.1)
    error = capsys.readouterr().err
    assert "weight_decay 0.0005 -> 0.1" in error
    assert f"epochs {EPOCHS} -> {EPOCHS + 1}" in error
    content = torch.load(folder / "last.pt", weights_only=True)
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


def test_inside_an_epoch_the_steps_stay_what_they_were(data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        stop_at(patched, engine, "training_step", 1)
        interrupted(data, tmp_path / "run", code=143)
    for flags in (("--seed", 1), ("--num_pos", 3)):
        interrupted(data, tmp_path / "run", "--resume", *flags, code=2)
        assert "inside an epoch" in capsys.readouterr().err


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "a bit of the weights": lambda data: flipped(data, len(data) // 2),
    "a bit of the first record": lambda data: flipped(data, data.find(b"epoch")),
    "empty": lambda data: b"",
}


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    name, data, unbroken, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    last = folder / "last.pt"
    last.write_bytes(DAMAGES[name](last.read_bytes()))
    assert train(data, folder, "--resume") == 0
    error = capsys.readouterr().err
    assert f"{last} (" in error
    assert f"Going on from the one before it, {folder / 'last.previous.pt'}" in error
    assert differences(outcome(unbroken), outcome(folder)) == []
    assert (folder / "last.damaged.pt").exists()
    (folder / "last.previous.pt").unlink()
    last.write_bytes(b"")
    interrupted(data, folder, "--resume", code=2)
    assert str(last) in capsys.readouterr().err


def test_a_full_disk_leaves_the_former_checkpoint_and_says_so(data, unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    before = (folder / "last.pt").read_bytes()
    temporary = folder / f".last.pt.{os.getpid()}.tmp"
    with pytest.MonkeyPatch.context() as patched:
        # Every write to this device fails for want of room.
        patched.setattr(fit_loop, "remove_temporary_files", lambda f: None)
        temporary.symlink_to("/dev/full")
        interrupted(data, folder, "--resume", "--epochs", EPOCHS + 1, code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: cannot write the checkpoint {folder / 'last.pt'}")
    assert os.strerror(errno.ENOSPC) in error
    assert "the former one is untouched" in error
    assert (folder / "last.pt").read_bytes() == before
    assert not temporary.is_symlink()
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
        if str(path).startswith(str(folder / ".last.pt")) and "w" in mode:
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


def test_a_loss_or_weight_that_is_not_finite_keeps_the_last_good_checkpoint(
    data, unbroken, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    before = (folder / "last.pt").read_bytes()
    step = engine.training_step

    def poisoned(net, *args, **kwargs):
        result = step(net, *args, **kwargs)
        with torch.no_grad():  # as a gradient that overflows leaves it; the loss still was finite
            net.part_norm.bias.fill_(torch.nan)
        return result

    monkeypatch.setattr(engine, "training_step", poisoned)
    flags = ("--resume", "--epochs", EPOCHS + 1)
    interrupted(data, folder, *flags, code=2)
    assert f"'id' is nan in epoch {EPOCHS}, step 1" in capsys.readouterr().err
    interrupted(data, folder, *flags, "--save-every-steps", 1, code=2)
    assert "'part_norm.bias' holds NaN or infinity" in capsys.readouterr().err
    assert (folder / "last.pt").read_bytes() == before


def test_a_loader_thread_that_dies_is_an_error(data, tmp_path, monkeypatch):
    from data_loader import ImageStore

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
    interrupted(data, tmp_path / "run", "--sync-bn", code=2)
    assert "--sync-bn needs CUDA" in capsys.readouterr().err
    monkeypatch.setattr(training.distributed, "size", lambda: 3)
    interrupted(data, tmp_path / "run", "--batch-size", 4, code=2)
    error = capsys.readouterr().err
    assert "4 identities don't divide among 3 processes; choose a multiple of 3" in error
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


def test_other_methods_and_adam_resume_within_an_epoch(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", GET_MODEL)
    flags = ("--method", "agw", "--optim", "adam", "--epochs", 1, "--lr", 1e-4)
    for name in ("whole", "parts"):
        folder = tmp_path / name
        if name == "parts":
            with monkeypatch.context() as patched:
                stop_at(patched, engine, "training_step", 2)
                with pytest.raises(SystemExit):
                    train_HCT.main(arguments(data, folder, *flags))
        train_HCT.main(arguments(data, folder, *flags, *(["--resume"] * (name == "parts"))))
    assert differences(outcome(tmp_path / "whole"), outcome(tmp_path / "parts")) == []


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing():
    script = Path(__file__).with_name("fault_injection.py")
    command = [sys.executable, str(script), "--kills", "20", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills: 20" in done.stdout
    assert "wrong: 0" in done.stdout
