import json
import logging
import os
import pickle
import platform
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import utils
from engine import devices
from networks.checkpoint_file import CheckpointError, load_checkpoint, save_checkpoint
from utils import (
    Interrupted,
    find_checkpoint,
    lock,
    log_to,
    make_writable_dir,
    setup_logging,
    stop_signals,
    user_errors,
    write_atomic,
    write_json,
)


class Payload:
    """Would create a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_checkpoints_round_trip(tmp_path):
    path = tmp_path / "a.pt"
    content = {"net": {"w": torch.ones(1)}, "epoch": 2, "best": {"rank1": 0.5}, "generators": {}}
    save_checkpoint(path, {**content, "config": {"a": (1, 2)}})
    assert load_checkpoint(path) == {**content, "config": {"a": (1, 2)}}
    assert list(tmp_path.iterdir()) == [path]


def test_earlier_releases_dictionaries_load_safely(tmp_path):
    path = tmp_path / "released.t"
    content = {
        "net": {"module.w": torch.ones(1)},
        "cmc": np.linspace(0, 1, 5),
        "mAP": np.float64(0.25),
        "mINP": np.float32(0.125),
        "epoch": np.int64(7),
    }
    torch.save(content, path)
    assert load_checkpoint(path) == {"net": {"w": torch.ones(1)}}  # and nothing else


def test_numpy_1_names_load_too(tmp_path):
    path = tmp_path / "old.t"
    torch.save({"net": {"w": torch.ones(1)}, "mAP": np.float64(0.5)}, path, pickle_protocol=2)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries = {
        k: v.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        for k, v in entries.items()
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert load_checkpoint(path)["net"]["w"] == 1


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickled_payload_is_refused_and_not_run(tmp_path):
    victim = tmp_path / "victim"
    for name, save in (("zip.pt", torch.save), ("raw.pt", None)):
        path = tmp_path / name
        if save:
            save({"net": Payload(victim)}, path)
        else:
            path.write_bytes(pickle.dumps({"net": Payload(victim)}))
        with pytest.raises(CheckpointError, match="not loaded for safety"):
            load_checkpoint(path)
        assert not victim.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "text", "list"])
def test_damaged_checkpoints_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "broken.pt"
    save_checkpoint(path, {"net": {"w": torch.randn(1000)}})
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        data[: len(data) // 3] = bytes(b ^ 0xFF for b in data[: len(data) // 3])
        path.write_bytes(data)
    elif damage == "text":
        path.write_text("hello")
    else:
        torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="broken.pt"):
        load_checkpoint(path)


def test_a_missing_checkpoint_names_those_that_are_there(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"net": {}})
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*lost.pt: .*there: last.pt\)"):
        load_checkpoint(tmp_path / "lost.pt")
    assert load_checkpoint(tmp_path)["net"] == {}  # of a folder last.pt
    for name in ("last{trial}.pt", "run{trial}"):
        (tmp_path / "run1").mkdir(exist_ok=True)
        save_checkpoint(tmp_path / "run1/last.pt", {})
        save_checkpoint(tmp_path / "last1.pt", {})
        expected = tmp_path / name / ("" if name.endswith(".pt") else "last.pt")
        assert find_checkpoint(name, tmp_path / "nowhere", tmp_path) == str(expected)
    with pytest.raises(CheckpointError, match=r"no checkpoint at a.pt: looked for /.* and /"):
        find_checkpoint("a.pt", tmp_path)


def test_a_dictionary_without_weights(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"no network weights \(found: epoch\)"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_failed_write_leaves_the_former_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"kept": 1})

    def fail(stream):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device: .*a.json"):
        write_atomic(path, fail)
    assert json.loads(path.read_text()) == {"kept": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_ends_with_its_process(tmp_path):
    file = tmp_path / "a" / "b" / ".lock"
    code = (
        "import pathlib, sys, utils\n"
        "with utils.lock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command, pipe = [sys.executable, "-c", code, str(file)], subprocess.PIPE
    root = Path(utils.__file__).parent
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=root) as other:
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(ValueError, match=f"{file.parent} is being written by process"),
            lock(file),
        ):
            pass
        other.kill()  # SIGKILL
        other.wait()
        with lock(file):
            assert file.read_text() == f"process {os.getpid()} on {platform.node()}"


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "in it"):
        with pytest.raises(ValueError, match="cannot write into .*--output-dir"):
            make_writable_dir(path)
    assert make_writable_dir(tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())


def pretend_cuda(monkeypatch, capability=(8, 6)):
    """Two CUDA devices of that capability; the list of those made current."""
    current, ones = [], torch.ones
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_capability": lambda _: capability,
        "get_device_name": lambda device: f"card {device.index}",
        "set_device": current.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "ones", lambda n, device=None: ones(n))
    return current


def test_a_gpu_that_torch_cannot_use(monkeypatch, tmp_path, caplog):
    pretend_cuda(monkeypatch)

    def refuse(*_, device):
        raise RuntimeError(
            "no kernel image is available for execution on the device\nCUDA kernel ..."
        )

    monkeypatch.setattr(torch, "ones", refuse)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho NVIDIA A100-PCIE-40GB, 535.104.05\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    message = r"cannot use .*A100-PCIE-40GB, 535.104.05 \(card, driver\): no kernel image .* device"
    message += r"\. Update .*, or install .*cu126"
    for local_rank in (None, "1"):
        with pytest.raises(ValueError, match=f"^--gpu 0: PyTorch .*{message}.*--gpu cpu$"):
            devices.resolve_device("0", local_rank=local_rank)
    assert devices.resolve_device(None).type == "cpu"
    assert re.search(message, caplog.text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        devices.resolve_device("0")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert devices.resolve_device("0").type == "cpu"  # a machine without NVIDIA's driver


def test_devices(monkeypatch, caplog):
    assert devices.resolve_device("cpu").type == devices.resolve_device("-1").type == "cpu"
    with pytest.raises(ValueError, match="CUDA index"):
        devices.resolve_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.resolve_device("0").type == devices.resolve_device(None).type == "cpu"
    assert caplog.messages == ["running on the CPU: no CUDA device on this machine"] * 2
    current = pretend_cuda(monkeypatch)
    assert devices.resolve_device("1") == devices.resolve_device("1,0") == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)] * 2
    assert devices.resolve_device(None) == torch.device("cuda", 0)
    assert devices.resolve_device("0", local_rank="1") == torch.device("cuda", 1)
    assert devices.versions(torch.device("cuda", 1))["device"] == "card 1"
    assert devices.versions(torch.device("cpu"))["device"] != "card 1"
    assert "--gpu 1,0: one process uses one GPU, here the first" in caplog.text
    with pytest.raises(ValueError, match=r"2 CUDA device\(s\)"):
        devices.resolve_device("2")


def test_figure_libraries_do_not_chatter_and_the_log_holds_what_came_before_it(tmp_path, capsys):
    setup_logging()
    logging.getLogger("fontTools.subset").info("glyph")
    logging.getLogger("early").warning("before the file was known")
    log_to(tmp_path / "log")
    logging.getLogger("late").info("after")
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "WARNING before the file was known",
        "INFO after",
    ]
    assert capsys.readouterr().err.count("\n") == 2
    setup_logging()  # the file is closed


@pytest.mark.parametrize(
    ("amp", "capability", "expected"),
    [
        (False, (9, 0), None),
        (True, (9, 0), torch.bfloat16),
        (True, (8, 0), torch.bfloat16),
        (True, (7, 5), torch.float16),
        ("bf16", (7, 5), torch.bfloat16),
        ("fp16", (9, 0), torch.float16),
    ],
)
def test_the_precision_a_device_has(amp, capability, expected, monkeypatch, caplog):
    pretend_cuda(monkeypatch, capability)
    assert devices.amp_dtype(amp, torch.device("cuda", 0)) == expected
    assert ("--amp fp16 is faster" in caplog.text) == (amp == "bf16")
    assert devices.amp_dtype(True, torch.device("cpu")) == torch.bfloat16


def test_a_gpu_s_settings_are_set_and_said(monkeypatch, caplog):
    pretend_cuda(monkeypatch)
    backend = SimpleNamespace()
    monkeypatch.setattr(torch.backends, "cudnn", backend)
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", chosen.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    with caplog.at_level("INFO"):
        devices.set_up(torch.device("cuda", 1))
        assert (backend.allow_tf32, backend.benchmark) == (True, True)
        devices.set_up(torch.device("cuda", 1), float32_precision="highest", deterministic=True)
    assert (backend.allow_tf32, backend.benchmark) == (False, False)
    assert chosen == ["high", True, "highest"]
    assert "card 1" in caplog.messages[0]
    assert [message.split(" convolutions ")[1] for message in caplog.messages] == [
        "in TF32 (--float32-precision highest: without)",
        "without TF32",
    ]


def test_peaks_of_memory_are_read_and_forgotten(monkeypatch):
    forgotten = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 2**31)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    device = torch.device("cuda", 0)
    assert devices.peak_memory(device) == {"allocated_gib": 1.0, "reserved_gib": 2.0}
    assert forgotten == [device]
    assert devices.peak_memory(torch.device("cpu")) == {}


def test_user_errors_are_one_paragraph_and_others_keep_their_traceback(capsys):
    with pytest.raises(SystemExit) as stop, user_errors():
        raise ValueError("what to mend")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: what to mend\n"
    with pytest.raises(KeyError), user_errors():
        raise KeyError("a bug")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signals_are_raised_at_once_and_handlers_given_back(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"^stopped by {number.name}$") as stop, stop_signals():
        os.kill(os.getpid(), number)
        raise AssertionError("went on after the signal")
    with pytest.raises(Interrupted, match=number.name), stop_signals():
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), signal.SIGINT)  # a launcher's repetition
    assert stop.value.exit_code == 128 + number
    assert isinstance(stop.value, KeyboardInterrupt)  # `except Exception` does not swallow it
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("moment", ["torch.save", "utils.os.fsync", "utils.os.replace"])
def test_an_interruption_within_a_save_leaves_a_whole_file(moment, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"net": {}, "epoch": 1})

    def interrupted(*_):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(moment, interrupted)
    with pytest.raises(Interrupted):
        save_checkpoint(path, {"net": {}, "epoch": 2}, keep=tmp_path / "former.pt")
    assert load_checkpoint(path)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of the GNU C library")
def test_freed_memory_is_kept():
    """A large block, freed and allocated again, costs no page faults; a process of its own."""
    code = (
        "import resource, torch; from engine import devices\n"
        "devices.keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20):\n"
        "    before = faults()\n"
        "    torch.ones(1 << 24)\n"
        "print(faults() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(utils.__file__).parent,
    )
    assert int(done.stdout) < 1000  # of 16,384 pages
