"""Several processes on the CPU (gloo) against one: same loss, same gradients, same results."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from short_run import arguments, differences, log_lines, outcome, write_data

from data_loader import IdentitySampler, ImageStore, TrainLoader
from datasets.transforms import Augmentation
from engine import distributed

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What one, two and three processes made of the same batch and the same run: by number."""
    root = tmp_path_factory.mktemp("distributed")
    done = subprocess.run(
        [sys.executable, str(WORKER), str(root)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {n: torch.load(root / str(n) / "report.pt", weights_only=True) for n in (1, 2, 3)}


@pytest.mark.parametrize("count", [2, 3])
def test_losses_and_gradients_equal_one_process(count, reports):
    for method, one in reports[1]["methods"].items():
        several = reports[count]["methods"][method]
        for name, value in one["terms"].items():
            assert several["terms"][name].item() == pytest.approx(value.item(), rel=1e-6), name
        assert one["gradients"].keys() == several["gradients"].keys()
        for name, gradient in one["gradients"].items():
            scale = gradient.abs().max().clamp_min(1e-12)
            error = ((several["gradients"][name] - gradient).abs().max() / scale).item()
            assert error < 1e-6, f"{method}, {name}: {error}"
        assert one["health"].keys() == several["health"].keys()
        for name, value in one["health"].items():
            assert several["health"][name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("count", [2, 3])
def test_parameters_and_statistics_are_equal_on_all_ranks(count, reports):
    assert reports[count]["alike"] == [True] * count


def test_each_rank_loads_its_share_of_the_one_batch():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 3)
    stores = [
        ImageStore(rng.integers(0, 256, (18, 12, 6, 3), dtype=np.uint8), device=torch.device("cpu"))
        for _ in range(2)
    ]
    sampler = IdentitySampler(labels, labels, ids_per_batch=6, images_per_id=2, seed=3)

    def loader(rank=0, world_size=1):
        settings = Augmentation(pad=2, grey=0.5, erase=0.5, tone=0.2, channel_aug=0.5)
        return TrainLoader(
            visible=stores[0],
            infrared=stores[1],
            sampler=sampler,
            augmentation=settings,
            rank=rank,
            world_size=world_size,
        )

    whole = loader().batch(1, 1)
    for count in (2, 3, 6):
        shares = [loader(i, count).batch(1, 1) for i in range(count)]
        for name in ("visible", "infrared"):
            assert torch.equal(torch.cat([getattr(s, name) for s in shares]), getattr(whole, name))
        halves = [share.labels.chunk(2) for share in shares]
        joined = torch.cat([half[i] for i in range(2) for half in halves])
        assert torch.equal(joined, whole.labels)
    with pytest.raises(ValueError, match="multiple of 4"):
        loader(0, 4)


def test_alone_everything_is_the_identity():
    rows = torch.ones(4, 2)
    assert (distributed.size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    assert distributed.gather_rows(rows) is rows
    assert distributed.mean_of({"a": rows}) == {"a": rows}
    distributed.sum_in_place([rows])
    assert torch.equal(rows, torch.ones(4, 2))
    net = torch.nn.Linear(2, 2)
    assert distributed.parallel(net) is net


def torchrun(count, script, arguments):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [str(WORKER.with_name("narrow.py")), script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition, process):
    """Waits until it holds, while the process runs."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_torchrun_a_dead_rank_ends_all_and_the_run_resumes_to_the_same_bits(tmp_path):
    data, epochs = write_data(tmp_path / "data"), 30
    flags = ("--epochs", epochs, "--eval-every", 10, "--resume")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = torchrun(2, "train_MGMRA", arguments(data, whole, *flags))
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert output.count("INFO MGMRA_regdb") == 1  # only rank 0 logs
    assert [line["epoch"] for line in log_lines(whole)] == list(range(1, epochs + 1))

    process = torchrun(2, "train_MGMRA", arguments(data, broken, *flags))
    wait_for((broken / "last.pt").exists, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in output

    # SIGTERM to the launcher, which passes it on to all ranks.
    process = torchrun(2, "train_MGMRA", arguments(data, broken, *flags))
    before = (broken / "last.pt").stat().st_mtime
    wait_for(lambda: (broken / "last.pt").stat().st_mtime > before, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert f"stopped by SIGTERM: complete epochs are in {broken / 'last.pt'}" in output
    assert 0 < len(log_lines(broken)) < epochs

    process = torchrun(2, "train_MGMRA", arguments(data, broken, *flags))
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert differences(outcome(whole), outcome(broken)) == []


def children(pid):
    """Process ids of a process's children, oldest first."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(map(int, listed))
