"""What twenty minutes on a new GPU settle: correctness, speed, memory, whole runs.

    python -m benchmarks.first_run --json runs/first_run.json
    python -m benchmarks.first_run --json OUT --smoke      # the same parts, tiny; runs on a CPU

Each part stands on its own: its numbers, or its error, are in the file as soon as it ends, and the
next one goes on. `benchmarks/README.md` says where to send the file.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import memory
from benchmarks import train
from benchmarks.common import setting
from engine.devices import peak_memory, set_up
from engine.evaluate import embed
from networks import sparse_read
from networks.checkpoint_file import load_checkpoint, save_checkpoint
from networks.memory_health import MemoryHealth
from utils import write_json

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = ("float32", "TF32", "bf16", "fp16")
SHAPES = {"RegDB": ("8x4", 206), "SYSU-MM01": ("6x8", 395)}  # batch of each modality, identities
REGDB_STEPS, REGDB_EPOCHS, REGDB_EVALUATIONS = 65, 61, 26
CAPS = (11, 24)  # GB, cards that trainings should fit
Part = Callable[["Bench"], Any]


class Bench:
    """What the parts share: device, sizes, and how a step is made and timed."""

    def __init__(self, smoke: bool) -> None:
        cuda = torch.cuda.is_available()
        self.smoke, self.device = smoke, torch.device("cuda", 0) if cuda else torch.device("cpu")
        words = ["--arch", "resnet18", "--height", "96", "--width", "48"] if smoke else []
        self.args = train.build_parser().parse_args(words)
        self.shapes = {"tiny": ("2x2", 12)} if smoke else SHAPES
        self.steps = 1 if smoke else 30
        methods = tuple(train.MEMORIES)  # HCT first
        self.methods = methods[::2] if smoke else methods
        self.precisions = PRECISIONS[:2] if smoke else PRECISIONS
        self.synchronize = train.synchronizer(self.device)

    def step(
        self, method: str, precision: str, shape: str | None = None, **how: Any
    ) -> Callable[[], Any]:
        """A training step; warm after three calls."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what is reserved is this step's alone
        batch, ids = self.shapes[shape or next(iter(self.shapes))]
        self.set_precision(precision)
        variant = precision if precision in train.HALF else "float32"
        return train.make_step(
            *(self.args, self.device, method, variant), batch=batch, ids=ids, **how
        )

    def set_precision(self, precision: str) -> None:
        """On a GPU, whether float32 means TF32."""
        if self.device.type == "cuda":
            exact = precision == "float32"
            set_up(self.device, float32_precision="highest" if exact else "high")

    def time(self, call: Callable[[], Any], *, warm_up: int = 3) -> dict[str, float]:
        """Milliseconds a call: until it returns (``cpu``) and until the device is done; memory."""
        for _ in range(1 if self.smoke else warm_up):
            call()
        self.synchronize()
        peak_memory(self.device)
        start = time.perf_counter()
        for _ in range(self.steps):
            call()
        queued = time.perf_counter() - start
        self.synchronize()
        whole = time.perf_counter() - start
        scale = 1e3 / self.steps
        return {"ms": scale * whole, "cpu_ms": scale * queued, **peak_memory(self.device)}


def ceilings(bench: Bench) -> dict[str, Any]:
    """The card, and the fastest products, copies and launches it can do."""
    found: dict[str, Any] = {"setting": setting(bench.device)}
    if bench.device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"capability": [card.major, card.minor], "memory_gib": card.total_memory / 2**30}
        found |= {"kernels": torch.cuda.get_arch_list(), "cudnn": torch.backends.cudnn.version()}
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        with contextlib.suppress(OSError):  # in a container without nvidia-smi
            found["driver"] = _run(query, limit=30)["output"]
        found["sparse_read"] = sparse_read._works_on(bench.device)
    size = 64 if bench.smoke else 8192
    for precision in PRECISIONS:
        bench.set_precision(precision)
        kind = train.HALF.get(precision, torch.float32)
        a = torch.randn(size, size, device=bench.device).to(kind)
        ms = bench.time(functools.partial(torch.mm, a, a))["ms"]
        found[f"{precision}_tflops"] = 2 * size**3 / ms / 1e9
    there = torch.zeros(size * size, device=bench.device)
    here = torch.zeros(size * size)
    copies = {"device": there, "pageable": here}
    if bench.device.type == "cuda":
        copies["pinned"] = here.pin_memory()
    for name, source in copies.items():
        ms = bench.time(functools.partial(there.copy_, source, non_blocking=True))["ms"]
        found[f"{name}_gb_per_s"] = (2 if name == "device" else 1) * there.nbytes / ms / 1e6
    small = torch.zeros(1, device=bench.device)
    found["launch_us"] = 1e3 * bench.time(lambda: [small.add_(1) for _ in range(100)])["ms"] / 100
    return found


def tests(bench: Bench) -> dict[str, Any]:
    """The tests that need a GPU."""
    what = ["--collect-only", "tests/test_structure.py"] if bench.smoke else ["-m", "gpu"]
    words = ["-n", "0", "-q", "--maxfail=50", "-p", "no:cacheprovider", *what]
    return _run([sys.executable, "-m", "pytest", *words], limit=900)


def synchronisations(bench: Bench) -> dict[str, str]:
    """Whether a step waits for the device; where it does."""
    found = {}
    for method in bench.methods:
        for precision in bench.precisions:
            step = bench.step(method, precision, health=MemoryHealth())
            step()
            try:
                with no_synchronisation(bench.device):
                    step()
                found[f"{method}/{precision}"] = "none"
            except RuntimeError:
                found[f"{method}/{precision}"] = traceback.format_exc(limit=-4)
    return found


@contextlib.contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """Makes a wait for the device an error."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def throughput(bench: Bench) -> dict[str, Any]:
    """A step of each method in each precision at each data set's shape."""
    found: dict[str, Any] = {}
    for shape, (batch, _) in bench.shapes.items():
        images = 2 * math.prod(map(int, batch.split("x")))
        for precision in bench.precisions:
            for method in bench.methods:
                numbers = bench.time(bench.step(method, precision, shape))
                numbers["images_per_s"] = 1e3 * images / numbers["ms"]
                hct = found.get(f"{shape}/{precision}/HCT", numbers)
                numbers["over_hct"] = numbers["ms"] / hct["ms"]
                found[f"{shape}/{precision}/{method}"] = numbers
    return found


def kernels(bench: Bench) -> dict[str, Any]:
    """Which kernels a step spends its time in."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    key = f"self_{bench.device.type}_time_total"
    found = {}
    for method in ("HCT", "MG-MRA"):
        step = bench.step(method, "bf16")
        step()
        with torch.profiler.profile(activities=activities) as profile:
            step()
            bench.synchronize()
        table = profile.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=90)
        found[method] = table.splitlines()
    return found


def reads(bench: Bench) -> dict[str, Any]:
    """The plain and the fast read of the part bank, from no survivor to many."""
    found = {}
    positions, channels = (50, 16) if bench.smoke else (64 * 162, 2048)
    identities = (12,) if bench.smoke else (206, 395, 713, 2000)
    for ids in identities:
        bank = torch.randn(30 * ids, channels, device=bench.device, requires_grad=True)
        for scale in (0.0, 0.05, 0.15):  # none, few, many
            x = (scale * torch.randn(positions, channels, device=bench.device)).requires_grad_()
            for precision in ("float32", "TF32", "bf16"):
                bench.set_precision(precision)
                for name in ("plain", "sparse"):
                    key, numbers = f"{ids}/{scale}/{precision}/{name}", {}
                    try:
                        numbers |= bench.time(functools.partial(_read, name, x, bank, precision))
                        if name == "sparse":
                            weights = sparse_read.sparse_read(x, bank, bank, 0.0025)[1]
                            numbers["survivors"] = weights.offsets[-1].item() / positions
                    except RuntimeError as error:  # the plain read of a large bank takes gigabytes
                        numbers["failed"] = str(error)
                    found[key] = numbers
    return found


def _read(name: str, x: torch.Tensor, bank: torch.Tensor, precision: str) -> None:
    """Reads once, forward and backward."""
    half = train.HALF.get(precision)
    with torch.autocast(x.device.type, dtype=half, enabled=half is not None):
        if name == "sparse":
            out, _ = sparse_read.sparse_read(x, bank, bank, 0.0025, bounded=True)
        else:
            out, _ = memory.plain_read(x, bank, bank, 0.0025)
    torch.autograd.grad(out.sum(), (x, bank))


def fits(bench: Bench) -> dict[str, Any]:
    """Whether MG-MRA's step fits smaller cards; its memory."""
    found = {}
    for cap in CAPS:
        for shape in bench.shapes:
            for precision in ("float32", "bf16"):
                name = f"{cap} GB/{shape}/{precision}"
                if bench.device.type == "cuda":
                    torch.cuda.empty_cache()
                    total = torch.cuda.get_device_properties(0).total_memory
                    share = (cap * 1e9 - 0.6e9) / total  # less a context
                    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
                try:
                    found[name] = bench.time(bench.step("MG-MRA", precision, shape))
                except RuntimeError as error:  # cuDNN and cuBLAS have errors of their own
                    found[name] = f"does not fit: {error}"
                finally:
                    if bench.device.type == "cuda":
                        torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def whole_run(bench: Bench) -> dict[str, Any]:
    """Stand-in data: a training that is ended by a signal, goes on, and is evaluated."""
    with _run_folder(bench) as (flags, folder):
        command = [sys.executable, *flags, "--output-dir", str(folder / "run")]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 600
        while process.poll() is None and not (folder / "run/last.pt").exists():
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        found: dict[str, Any] = {"ended": process.wait()}
        found["resumed"] = _run([*command, "--resume"], limit=600)
        log = (folder / "run/log.jsonl").read_text().splitlines()
        found["log"] = [json.loads(line) for line in log]
        evaluation = ["test.py", *flags[1:5], "--resume", str(folder / "run/last.pt")]
        evaluation += ["--gpu", "cpu" if bench.device.type == "cpu" else "0"]
        found["evaluated"] = _run([sys.executable, *evaluation], limit=600)
    return found


def deterministic(bench: Bench) -> dict[str, Any]:
    """Two runs with --deterministic: the same bits?"""
    found: dict[str, Any] = {}
    states = []
    with _run_folder(bench) as (flags, folder):
        for name in ("one", "two"):
            words = [*flags, "--deterministic", "--output-dir", str(folder / name)]
            found[name] = _run([sys.executable, *words], limit=600)
            states.append(load_checkpoint(folder / name / "last.pt")["net"])
    found["different"] = [k for k, v in states[0].items() if not torch.equal(v, states[1][k])]
    return found


@contextlib.contextmanager
def _run_folder(bench: Bench) -> Iterator[tuple[list[str], Path]]:
    """Yields a short training's command line, on new stand-in data, and an empty folder."""
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        ids, test_ids = ("6", "4") if bench.smoke else ("60", "20")
        words = ["--layout", "regdb", "--out", str(data), "--seed", "0", "--images-per-id", "4"]
        words += ["--train-ids", ids, "--test-ids", test_ids]
        made = _run([sys.executable, "stand_in.py", *words], limit=600)
        if made["code"]:
            raise RuntimeError(made["output"])
        flags = ["train_MGMRA.py", "--dataset", "regdb", "--data-path", str(data)]
        flags += ["--preset", "scratch", "--eval-start", "1", "--quiet"]
        flags += ["--epochs", "2" if bench.device.type == "cpu" else "20"]  # time for a signal
        if bench.smoke:
            flags += ["--batch-size", "2", "--num_pos", "2", "--local_feat_dim", "8"]
            flags += ["--img_h", "32", "--img_w", "16", "--num_strips", "2", "--workers", "1"]
        flags += ["--gpu", "cpu"] if bench.device.type == "cpu" else ["--gpu", "0", "--amp"]
        yield flags, Path(name)


def input_alone(bench: Bench) -> dict[str, Any]:
    """Batches without training, and training's wait for them."""
    batch, ids = next(iter(bench.shapes.values()))
    args = argparse.Namespace(**{**vars(bench.args), "batch": batch, "ids": ids})
    if bench.smoke:
        args.float32, args.repeats = True, 1
    return train.input_pipeline(args, bench.device)


def compiled(bench: Bench) -> dict[str, Any]:
    """Inductor on the backbone; seconds until the first step is done."""
    found = {}
    for method in ("HCT", "MG-MRA"):
        for mode in (None, "reduce-overhead"):  # the latter with CUDA graphs
            step = bench.step(method, "bf16", prepare=functools.partial(_compile, mode=mode))
            start = time.perf_counter()
            if not bench.smoke:
                step()
                bench.synchronize()
            first = time.perf_counter() - start
            numbers = {} if bench.smoke else bench.time(step)
            found[f"{method}/{mode or 'default'}"] = {"first_s": first, **numbers}
    return found


def _compile(net: torch.nn.Module, mode: str | None) -> None:
    for stages in (net.visible, net.infrared, net.shared):
        stages.compile(dynamic=False, mode=mode)


def trial(bench: Bench) -> dict[str, Any]:
    """Seconds a save, images a second of evaluation, and what a RegDB trial comes to."""
    shape = next(iter(bench.shapes))
    net = train.make_network(bench.args, "MG-MRA", bench.shapes[shape][1])
    net.to(bench.device, memory_format=torch.channels_last)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        file = Path(folder) / "last.pt"
        start = time.perf_counter()
        save_checkpoint(file, {"net": net.state_dict(), "generators": state})  # as momentum
        save_s = time.perf_counter() - start
    images = torch.zeros(64, 3, bench.args.height, bench.args.width, device=bench.device)
    batches = [images] * (1 if bench.smoke else 20)
    run = functools.partial(embed, net, batches, "visible", ("pcb",), amp=torch.bfloat16)
    run()
    start = time.perf_counter()
    run()
    images_per_s = 64 * len(batches) / (time.perf_counter() - start)
    step_s = bench.time(bench.step("MG-MRA", "bf16", shape))["ms"] / 1e3
    evaluation_s = 2 * train.STORED_IMAGES / images_per_s
    total = REGDB_EPOCHS * (REGDB_STEPS * step_s + save_s) + REGDB_EVALUATIONS * evaluation_s
    return {"save_s": save_s, "embedded_per_s": images_per_s, "regdb_trial_minutes": total / 60}


def against_plain(bench: Bench) -> dict[str, Any]:
    """The plain rendering of the released algorithms against ours."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--device", bench.device.type, "--only", "steps", "--methods", "HCT", "MG-MRA"]
        words += ["--variants", "plain float32", "float32", "bf16", "--json", f"{folder}/out"]
        words += ["--repeats", "1", "--steps", "1" if bench.smoke else "10"]
        if bench.smoke:
            words += ["--arch", "resnet18", "--height", "96", "--width", "48", "--batch", "2x2"]
            words += ["--ids", "12", "--methods", "HCT", "--variants", "float32"]
        done = _run([sys.executable, "-m", "benchmarks.train", *words], limit=900)
        return json.loads(Path(folder, "out").read_text()) if not done["code"] else done


def _run(command: Sequence[str], *, limit: int) -> dict[str, Any]:
    """Exit code, seconds and last output of a command run in the repository's root."""
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
    )
    seconds = time.perf_counter() - start
    return {"code": done.returncode, "seconds": seconds, "output": done.stdout[-20_000:].strip()}


PARTS: dict[str, Part] = {
    "ceilings": ceilings,
    "tests": tests,
    "synchronisations": synchronisations,
    "throughput": throughput,
    "kernels": kernels,
    "reads": reads,
    "fits": fits,
    "whole_run": whole_run,
    "deterministic": deterministic,
    "input": input_alone,
    "compiled": compiled,
    "trial": trial,
    "against_plain": against_plain,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure a new GPU.")
    parser.add_argument("--json", type=Path, required=True, help="where to write all numbers")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does the script run?")
    args = parser.parse_args(argv)
    bench = Bench(args.smoke)
    if bench.device.type == "cpu" and not args.smoke:
        parser.error("torch finds no CUDA device; --smoke runs tiny parts on the CPU")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    # Parts of an earlier call stay.
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name in args.only:
        start = time.perf_counter()
        try:
            found = PARTS[name](bench)
        except Exception:
            found = {"error": traceback.format_exc()}
        if bench.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # after an error of the device itself
                torch.cuda.empty_cache()
        failed = isinstance(found, dict) and "error" in found
        seconds = time.perf_counter() - start
        results[name] = {"seconds": seconds, "found": found}
        write_json(args.json, results)
        sys.stdout.write(f"{name}: {'failed' if failed else 'done'} in {seconds:.0f} s\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
