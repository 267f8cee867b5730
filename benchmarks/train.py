"""Times training steps against the plain rendering of the released algorithms.

    python -m benchmarks.train                     # the paper's shape, on the CPU: half an hour
    python -m benchmarks.train --device cuda --batches 8x4 16x4 32x8
    python -m benchmarks.train --small             # a quick look

Prints Markdown tables and, with ``--json``, writes all numbers. Variants take turns, so that
whatever else the machine does hits all of them alike; numbers are medians of wall-clock times, with
processor times of all threads beside them. Images and weights are random; ``--bank-scale`` sets how
many prototypes survive (printed).
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import finish, interleaved, table
from benchmarks.plain import PlainNet, plain_training_step
from data_loader import Augmentation, IdentitySampler, ImageStore, TrainLoader
from engine import make_optimizer, set_learning_rate, training_step
from loss import LABEL_SMOOTHING, TERM_WEIGHTS, Criterion
from memory import MemoryHealth
from model import TwoStreamNet

MEMORIES = {"HCT": None, "SG-MRA": "sg", "MG-MRA": "mg"}
VARIANTS = ("plain float32", "float32", "bf16")
SECTIONS = ("steps", "peak", "identities", "batches", "input")
GEM_P = 10.0  # RegDB's
RATE = 1e-3  # small: the steps should not run away
STORED_IMAGES = 2060  # per modality, as RegDB's training split
CEILING_SIZE = 8192  # of the square matrices whose product is the bf16 ceiling
Step = Callable[[], Any]


def build_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description="Time training steps.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--methods", nargs="+", choices=MEMORIES, default=list(MEMORIES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--height", type=int, default=288)
    parser.add_argument("--width", type=int, default=144)
    parser.add_argument("--batch", default="8x4", help="identities x images, of each modality")
    parser.add_argument("--batches", nargs="*", default=["4x4", "8x4", "8x8"])
    parser.add_argument("--ids", type=int, default=206, help="training identities")
    parser.add_argument("--identities", nargs="*", type=int, default=[206, 395, 2000, 10000])
    parser.add_argument("--bank-scale", type=float, default=4.0, help="1: as at the start")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="ResNet-18, 96 x 48, 2 repeats")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # one variant, for its peak memory
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.small:
        args.arch, args.height, args.width, args.repeats = "resnet18", 96, 48, 2
        args.identities, args.batches = [206, 395], ["4x4", "8x4"]
    device = torch.device(args.device)
    if args.child:
        sys.stdout.write(json.dumps(_peak_here(args, device, *args.child.split("/"))) + "\n")
        return 0
    results: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}}
    sections = {
        "steps": _steps,
        "peak": _peaks,
        "identities": _identities,
        "batches": _batches,
        "input": _input,
    }
    for name in SECTIONS:
        if name in args.only:
            results[name] = sections[name](args, device)
    finish(results, device, args.json)
    return 0


def _sizes(batch: str) -> tuple[int, int]:
    ids, images = (int(number) for number in batch.split("x"))
    return ids, images


def _network(args: argparse.Namespace, method: str, ids: int) -> TwoStreamNet:
    """A network with random weights, the bank scaled."""
    torch.manual_seed(0)
    memory = MEMORIES[method]
    net = TwoStreamNet(ids, memory=memory, arch=args.arch, gem_p=GEM_P)
    if memory is not None:
        with torch.no_grad():
            net.memory.part_bank.mul_(args.bank_scale)
    return net.train()


def _data(args: argparse.Namespace, device: torch.device, batch: str) -> dict[str, Any]:
    """Random images and their labels."""
    ids, images = _sizes(batch)
    shape = (ids * images, 3, args.height, args.width)
    generator = torch.Generator().manual_seed(1)
    visible, infrared = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    labels = torch.arange(ids, device=device).repeat_interleave(images).repeat(2)
    return {"visible": visible, "infrared": infrared, "labels": labels, "order": [3, 1, 4, 0, 5, 2]}


def _step(
    args: argparse.Namespace,
    device: torch.device,
    method: str,
    variant: str,
    *,
    batch: str,
    ids: int,
    health: MemoryHealth | None = None,
) -> Step:
    """One training step, ready to be called."""
    net = _network(args, method, ids)
    data = _data(args, device, batch)
    if variant.startswith("plain"):
        plain = PlainNet(net).to(device)
        optimizer = torch.optim.SGD(
            plain.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        return functools.partial(
            plain_training_step, plain, optimizer, **data, label_smoothing=LABEL_SMOOTHING
        )
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(net)
    set_learning_rate(optimizer, RATE)
    for name in ("visible", "infrared"):
        data[name] = data[name].to(memory_format=torch.channels_last)
    if health is None and net.memory is not None:
        health = MemoryHealth()
    return functools.partial(
        training_step,
        net,
        Criterion(label_smoothing=LABEL_SMOOTHING),
        optimizer,
        **data,
        weights=TERM_WEIGHTS,
        amp=variant == "bf16",
        health=health,
    )


def _synchronize(device: torch.device) -> Callable[[], Any]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _steps(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every method in every variant, at one shape."""
    calls, healths = {}, {}
    for method in args.methods:
        for variant in args.variants:
            healths[method] = MemoryHealth()
            calls[f"{method}/{variant}"] = _step(
                args,
                device,
                method,
                variant,
                batch=args.batch,
                ids=args.ids,
                health=healths[method] if MEMORIES[method] else None,
            )
    flops = {}
    if device.type == "cuda":
        flops = {name: _flops(call) for name, call in calls.items() if "plain" not in name}
    times = interleaved(
        calls, args.repeats, synchronize=_synchronize(device), description="training steps"
    )
    ceiling = _ceiling(device) if device.type == "cuda" else None
    rows = []
    for name, numbers in times.items():
        method, variant = name.split("/")
        plain = times.get(f"{method}/plain float32", {}).get("median", float("nan"))
        base = times.get(f"HCT/{variant}", {}).get("median", float("nan"))
        numbers["speedup"] = plain / numbers["median"]
        numbers["over_hct"] = numbers["median"] / base
        if ceiling and name in flops:
            numbers["share_of_bf16_ceiling"] = flops[name] / numbers["median"] / ceiling
        rows.append(
            (
                method,
                variant,
                1e3 * numbers["median"],
                1e3 * numbers["min"],
                1e3 * numbers["cpu"],
                numbers["speedup"],
                numbers["over_hct"],
                numbers.get("share_of_bf16_ceiling", "-"),
            )
        )
    header = (
        "method",
        "variant",
        "ms",
        "fastest ms",
        "CPU ms",
        "plain / this",
        "this / HCT",
        "bf16 ceiling",
    )
    ids, images = _sizes(args.batch)
    shape = f"{2 * ids * images} images of {args.height} x {args.width}, {args.arch}"
    table(f"One training step, {shape}, {args.ids} identities", header, rows)
    addressed = {method: health.summary() for method, health in healths.items() if MEMORIES[method]}
    keys = [
        f"{level}/{name}" for level in ("part", "instance") for name in ("zero_reads", "survivors")
    ]
    rows = [
        (method, *(numbers.get(key, "-") for key in keys)) for method, numbers in addressed.items()
    ]
    table("How the banks were addressed", ("method", *keys), rows)
    return {"times": times, "addressed": addressed, "ceiling": ceiling}


def _flops(call: Step) -> int:
    """Multiply-adds, counted twice, of a step's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _ceiling(device: torch.device) -> float:
    """Operations a second of the fastest large bf16 matrix product."""
    a = torch.randn(CEILING_SIZE, CEILING_SIZE, device=device, dtype=torch.bfloat16)
    times = interleaved({"product": lambda: a @ a}, 20, synchronize=_synchronize(device))
    return 2 * CEILING_SIZE**3 / times["product"]["median"]


def _peaks(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Peak memory of two steps of each variant, each in a process of its own."""
    flags = ["--device", args.device, "--arch", args.arch, "--batch", args.batch]
    flags += ["--height", str(args.height), "--width", str(args.width), "--ids", str(args.ids)]
    flags += ["--bank-scale", str(args.bank_scale)]
    peaks, rows = {}, []
    for method in args.methods:
        for variant in args.variants:
            command = [sys.executable, "-m", "benchmarks.train", *flags]
            command += ["--child", f"{method}/{variant}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peak = json.loads(done.stdout.splitlines()[-1])
            peaks[f"{method}/{variant}"] = peak
            whole = peaks.get(f"{method}/plain float32", float("nan"))
            rows.append((method, variant, peak / 2**30, peak / whole))
    what = "allocated on the device" if device.type == "cuda" else "resident, everything included"
    table(f"Peak memory ({what})", ("method", "variant", "GiB", "this / plain"), rows)
    return peaks


def _peak_here(args: argparse.Namespace, device: torch.device, method: str, variant: str) -> int:
    """Bytes that this process needed at most for two steps."""
    step = _step(args, device, method, variant, batch=args.batch, ids=args.ids)
    step(), step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage where it can be helped: on Linux its peak may be that of the parent process.
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _grow(
    args: argparse.Namespace, device: torch.device, cases: Sequence[tuple[Any, str, int]], what: str
) -> dict[str, Any]:
    """HCT's and MG-MRA's bf16 step as something grows; one size in memory at a time."""
    results, rows = {}, []
    for label, batch, ids in cases:
        methods = [method for method in ("HCT", "MG-MRA") if method in args.methods]
        calls = {m: _step(args, device, m, "bf16", batch=batch, ids=ids) for m in methods}
        synchronize = _synchronize(device)
        times = interleaved(
            calls,
            max(1, args.repeats // 2),
            synchronize=synchronize,
            description=f"{what} {label}",
        )
        results[str(label)] = times
        medians = [times[method]["median"] for method in methods]
        ratio = medians[-1] / medians[0]
        rows.append((label, *(1e3 * m for m in medians), ratio))
    header = (what, *(f"{method} ms" for method in methods), "ratio")
    table(f"bf16 steps by {what}", header, rows)
    return results


def _identities(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return _grow(args, device, [(n, args.batch, n) for n in args.identities], "identities")


def _batches(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return _grow(args, device, [(batch, batch, args.ids) for batch in args.batches], "batch")


def _input(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What a batch costs to make, and how long the training loop waits for one."""
    rng = np.random.default_rng(0)
    shape = (STORED_IMAGES, args.height, args.width, 3)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(STORED_IMAGES) % args.ids
    ids, count = _sizes(args.batch)
    start = time.perf_counter()
    loader = TrainLoader(
        visible=ImageStore(images, device=device),
        infrared=ImageStore(images[::-1].copy(), device=device),
        sampler=IdentitySampler(labels, labels, ids_per_batch=ids, images_per_id=count, seed=0),
        augmentation=Augmentation(),
        seed=0,
        device=device,
    )
    batches = loader.epoch(0)
    next(batches)
    first = time.perf_counter() - start
    synchronize = _synchronize(device)
    alone = interleaved(
        {"batch": lambda: loader.batch(0, 0)}, 10, synchronize=synchronize, description="batches"
    )["batch"]["median"]
    step = _step(args, device, "HCT", "bf16", batch=args.batch, ids=args.ids)
    step()
    waits, whole = [], []
    for _ in range(args.repeats + 1):
        synchronize()
        start = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - start)
        step()
        synchronize()
        whole.append(time.perf_counter() - start)
    batches.close()
    wait, total = float(np.median(waits)), float(np.median(whole))
    rows = [
        ("first batch, the images being cached", 1e3 * first),
        ("a batch made alone", 1e3 * alone),
        ("HCT's bf16 step waits for its batch", 1e3 * wait),
        ("that step, waiting included", 1e3 * total),
    ]
    table("Input pipeline", ("what", "ms"), rows)
    table(
        "",
        ("waiting, % of the step", "making, % of the step"),
        [(100 * wait / total, 100 * alone / total)],
    )
    return {"first": first, "alone": alone, "wait": wait, "step": total}


if __name__ == "__main__":
    sys.exit(main())
