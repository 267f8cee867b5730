"""Times training steps against the plain rendering of the released algorithms.

    python -m benchmarks.train                     # the paper's shape, on the CPU: half an hour
    python -m benchmarks.train --device cuda --batches 8x4 16x4 32x8
    python -m benchmarks.train --small             # a quick look
    python -m benchmarks.train --float32           # on a processor without native bf16

Prints Markdown tables and, with ``--json``, writes all numbers. Variants take turns, so that
whatever else the machine does hits all of them alike, each in a process of its own that does a few
steps in a row, as training does: what one leaves in the allocator is no burden to another. Numbers
are medians of wall-clock times, with processor times of all threads beside them. Images and weights
are random; ``--bank-scale`` sets how many prototypes survive (printed).
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.common import finish, interleaved, table
from benchmarks.plain import PlainNet, plain_training_step, term_weights
from data_loader import IdentitySampler, ImageStore, TrainLoader
from datasets.transforms import Augmentation
from engine.devices import keep_freed_memory, set_up
from engine.train import make_optimizer, set_learning_rate, training_step
from loss import Criterion
from model import TwoStreamNet
from networks.memory_health import MemoryHealth
from networks.settings import LABEL_SMOOTHING

MEMORIES = {"HCT": None, "SG-MRA": "sg", "MG-MRA": "mg"}
# "kept": the plain rendering with the allocator's settings that our training runs under.
VARIANTS = ("plain float32", "plain float32, kept", "float32", "bf16")
# Forward and backward of torchvision's network, without losses or optimiser: the common yardstick.
YARDSTICK = f"torchvision/{VARIANTS[0]}"
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
GEM_P = 10.0  # RegDB's
RATE = 1e-3  # small: the steps should not run away
STORED_IMAGES = 2060  # per modality, as RegDB's training split
CEILING_SIZE = 8192  # of the square matrices whose product is the bf16 ceiling
Step = Callable[[], Any]


def build_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description="Time training steps.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--methods", nargs="+", choices=MEMORIES, default=list(MEMORIES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--float32", action="store_true", help="float32 in place of bf16")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--height", type=int, default=288)
    parser.add_argument("--width", type=int, default=144)
    parser.add_argument("--batch", default="8x4", help="identities x images, of each modality")
    parser.add_argument("--batches", nargs="*", default=["4x4", "8x4", "8x8"])
    parser.add_argument("--ids", type=int, default=206, help="training identities")
    parser.add_argument("--identities", nargs="*", type=int, default=[206, 395, 2000, 10000])
    parser.add_argument("--bank-scale", type=float, default=4.0, help="1: as at the start")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=2, help="timed a turn, after one that is not")
    parser.add_argument("--small", action="store_true", help="ResNet-18, 96 x 48, 2 repeats")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # one turn of one variant
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.small:
        args.arch, args.height, args.width, args.repeats = "resnet18", 96, 48, 2
        args.identities, args.batches = [206, 395], ["4x4", "8x4"]
    if args.float32:
        args.variants = [variant for variant in args.variants if variant != "bf16"]
    device = torch.device(args.device)
    if args.child:
        sys.stdout.write(json.dumps(_turn_here(args, device, *args.child.split("/"))) + "\n")
        return 0
    results: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}}
    for name, section in SECTIONS.items():
        if name in args.only:
            results[name] = section(args, device)
    finish(results, device, args.json)
    return 0


def _precision(args: argparse.Namespace) -> str:
    """The variant of ours that grows, and that waits for its input."""
    return "float32" if args.float32 else "bf16"


def _sizes(batch: str) -> tuple[int, int]:
    ids, images = (int(number) for number in batch.split("x"))
    return ids, images


def make_network(args: argparse.Namespace, method: str, ids: int) -> TwoStreamNet:
    """A network with random weights, the bank scaled."""
    torch.manual_seed(0)
    memory = MEMORIES[method]
    net = TwoStreamNet(ids, memory=memory, arch=args.arch, gem_p=GEM_P)
    if memory is not None:
        with torch.no_grad():
            net.memory.part_bank.mul_(args.bank_scale)
    return net.train()


def make_data(args: argparse.Namespace, device: torch.device, batch: str) -> dict[str, Any]:
    """Random images and their labels."""
    ids, images = _sizes(batch)
    shape = (ids * images, 3, args.height, args.width)
    generator = torch.Generator().manual_seed(1)
    visible, infrared = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    labels = torch.arange(ids, device=device).repeat_interleave(images).repeat(2)
    return {"visible": visible, "infrared": infrared, "labels": labels, "order": [3, 1, 4, 0, 5, 2]}


def make_step(
    args: argparse.Namespace,
    device: torch.device,
    method: str,
    variant: str,
    *,
    batch: str,
    ids: int,
    health: MemoryHealth | None = None,
    prepare: Callable[[TwoStreamNet], Any] = lambda net: None,
) -> Step:
    """One training step, ready to be called; `prepare` changes our network beforehand."""
    if method == "torchvision":
        return _torchvision_step(args, device, batch)
    net = make_network(args, method, ids)
    data = make_data(args, device, batch)
    if variant.startswith("plain"):
        plain = PlainNet(net).to(device)
        optimizer = torch.optim.SGD(
            plain.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        return functools.partial(
            plain_training_step, plain, optimizer, **data, label_smoothing=LABEL_SMOOTHING
        )
    net = net.to(device, memory_format=torch.channels_last)
    prepare(net)
    optimizer = make_optimizer(net)
    set_learning_rate(optimizer, RATE)
    for name in ("visible", "infrared"):
        data[name] = data[name].to(memory_format=torch.channels_last)
    weights, half = term_weights(net), HALF.get(variant)
    images_per_id = _sizes(batch)[1]
    return functools.partial(
        training_step,
        net,
        Criterion(weights, label_smoothing=LABEL_SMOOTHING, images_per_id=images_per_id),
        optimizer,
        SimpleNamespace(**data),
        order=data["order"],
        weights=weights,
        amp=half,
        scaler=torch.amp.GradScaler(device.type, enabled=half == torch.float16),
        health=health,
    )


def _torchvision_step(args: argparse.Namespace, device: torch.device, batch: str) -> Step:
    """Forward and backward of a plain torchvision network in float32 on the same images."""
    data = make_data(args, device, batch)
    images = torch.cat([data["visible"], data["infrared"]])
    net = torchvision.models.get_model(args.arch, weights=None).to(device).train()

    def step() -> None:
        net.zero_grad()
        net(images).sum().backward()

    return step


def synchronizer(device: torch.device) -> Callable[[], Any]:
    """What waits for the device."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _measured(
    args: argparse.Namespace, names: Sequence[str], what: str, *, batch: str, ids: int
) -> dict[str, dict[str, Any]]:
    """Times and peak memory of variants, ``method/variant``, that take turns.

    Returns:
        By name ``median``, ``min`` and ``cpu``, in seconds; ``peak`` in bytes; ``flops`` (CUDA);
        ``addressed``, the memory's health.
    """
    command = [sys.executable, "-m", "benchmarks.train", "--device", args.device]
    command += ["--arch", args.arch, "--batch", batch, "--ids", str(ids)]
    command += ["--height", str(args.height), "--width", str(args.width)]
    command += ["--bank-scale", str(args.bank_scale), "--steps", str(args.steps)]
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tqdm(total=args.repeats * len(names), desc=what, disable=None) as bar:
        for _ in range(args.repeats):
            for name in names:
                bar.set_postfix_str(name)
                done = subprocess.run(
                    [*command, "--child", name], check=True, stdout=subprocess.PIPE, text=True
                )
                turns[name].append(json.loads(done.stdout.splitlines()[-1]))
                bar.update()
    return {name: _over_turns(own) for name, own in turns.items()}


def _over_turns(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seconds = [time for turn in turns for time in turn["seconds"]]
    return {
        **turns[-1],
        "median": statistics.median(seconds),
        "min": min(seconds),
        "cpu": statistics.median(time for turn in turns for time in turn["cpu"]),
        "peak": statistics.median(turn["peak"] for turn in turns),
    }


def _turn_here(
    args: argparse.Namespace, device: torch.device, method: str, variant: str
) -> dict[str, Any]:
    """A few steps of one variant, the first not timed."""
    if "plain" not in variant:
        set_up(device)  # as training is: on a GPU float32 products take TF32
    elif variant.endswith("kept"):
        keep_freed_memory()
    health = MemoryHealth() if MEMORIES.get(method) else None
    step = make_step(args, device, method, variant, batch=args.batch, ids=args.ids, health=health)
    synchronize = synchronizer(device)
    step()
    seconds, cpu = [], []
    for _ in range(args.steps):
        synchronize()
        start, start_cpu = time.perf_counter(), time.process_time()
        step()
        synchronize()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    turn = {"seconds": seconds, "cpu": cpu, "peak": _peak(device)}
    if health is not None and "plain" not in variant:
        turn["addressed"] = health.summary()
    if device.type == "cuda" and "plain" not in variant:
        turn["flops"] = _flops(step)
    return turn


def _peak(device: torch.device) -> float:
    """Bytes that this process needed at most; on a CPU known on Linux alone."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: on Linux its peak may be that of the parent process.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if "VmHWM" in line), float("nan"))


def _steps(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every method in every variant, at one shape."""
    names = [f"{method}/{variant}" for method in args.methods for variant in args.variants]
    names.insert(0, YARDSTICK)
    times = _measured(args, names, "training steps", batch=args.batch, ids=args.ids)
    ceiling = _ceiling(device) if device.type == "cuda" else None
    rows, nothing = [], {"median": float("nan"), "peak": float("nan")}
    for name, numbers in times.items():
        method, variant = name.split("/")
        plain = times.get(f"{method}/{VARIANTS[0]}", nothing)
        numbers["speedup"] = plain["median"] / numbers["median"]
        numbers["over_hct"] = numbers["median"] / times.get(f"HCT/{variant}", nothing)["median"]
        numbers["over_torchvision"] = numbers["median"] / times[YARDSTICK]["median"]
        numbers["peak_share"] = numbers["peak"] / plain["peak"]
        if ceiling and "flops" in numbers:
            numbers["share_of_bf16_ceiling"] = numbers["flops"] / numbers["median"] / ceiling
        rows.append(
            (
                f"torchvision {args.arch}" if name == YARDSTICK else method,
                variant,
                1e3 * numbers["median"],
                1e3 * numbers["min"],
                1e3 * numbers["cpu"],
                numbers["speedup"],
                numbers["over_hct"],
                numbers["over_torchvision"],
                numbers["peak"] / 2**30,
                numbers["peak_share"],
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
        "this / torchvision",
        "peak GiB",
        "this / plain",
        "bf16 ceiling",
    )
    ids, images = _sizes(args.batch)
    shape = f"{2 * ids * images} images of {args.height} x {args.width}, {args.arch}"
    title = f"One training step, {shape}, {args.ids} identities (torchvision: no losses)"
    table(title, header, rows)
    addressed = {
        name.split("/")[0]: numbers["addressed"]
        for name, numbers in times.items()
        if "addressed" in numbers
    }
    keys = [
        f"{level}/{name}" for level in ("part", "instance") for name in ("zero_reads", "survivors")
    ]
    rows = [
        (method, *(numbers.get(key, "-") for key in keys)) for method, numbers in addressed.items()
    ]
    table("How the banks were addressed", ("method", *keys), rows)
    return {"times": times, "ceiling": ceiling}


def _flops(call: Step) -> int:
    """Multiply-adds, counted twice, of a step's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _ceiling(device: torch.device) -> float:
    """Operations a second of the fastest large bf16 matrix product."""
    a = torch.randn(CEILING_SIZE, CEILING_SIZE, device=device, dtype=torch.bfloat16)
    times = interleaved({"product": lambda: a @ a}, 20, synchronize=synchronizer(device))
    return 2 * CEILING_SIZE**3 / times["product"]["median"]


def _grow(
    args: argparse.Namespace, cases: Sequence[tuple[Any, str, int]], what: str
) -> dict[str, Any]:
    """HCT's and MG-MRA's step as something grows; one size in memory at a time."""
    results, rows = {}, []
    methods = [method for method in ("HCT", "MG-MRA") if method in args.methods]
    precision = _precision(args)
    for label, batch, ids in cases:
        names = [f"{method}/{precision}" for method in methods]
        try:
            times = _measured(args, names, f"{what} {label}", batch=batch, ids=ids)
        except subprocess.CalledProcessError as error:  # out of memory, most likely
            rows.append((label, f"failed: exit code {error.returncode}"))
            continue
        results[str(label)] = times
        medians = [times[name]["median"] for name in names]
        peaks = [times[name]["peak"] / 2**30 for name in names]
        rows.append((label, *(1e3 * m for m in medians), medians[-1] / medians[0], *peaks))
    header = (what, *(f"{method} ms" for method in methods), "ratio")
    header += tuple(f"{method} peak GiB" for method in methods)
    table(f"{precision} steps by {what}", header, rows)
    return results


def _identities(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return _grow(args, [(n, args.batch, n) for n in args.identities], "identities")


def _batches(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return _grow(args, [(batch, batch, args.ids) for batch in args.batches], "batch")


def input_pipeline(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What a batch costs to make, and how long the training loop waits for one."""
    keep_freed_memory()
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
    )
    batches = loader.epoch(0)
    next(batches)
    first = time.perf_counter() - start
    synchronize = synchronizer(device)
    alone = interleaved(
        {"batch": lambda: loader.batch(0, 0)}, 10, synchronize=synchronize, description="batches"
    )["batch"]["median"]
    precision = _precision(args)
    step = make_step(args, device, "HCT", precision, batch=args.batch, ids=args.ids)
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
        (f"HCT's {precision} step waits for its batch", 1e3 * wait),
        ("that step, waiting included", 1e3 * total),
    ]
    table("Input pipeline", ("what", "ms"), rows)
    table(
        "",
        ("waiting, % of the step", "making, % of the step"),
        [(100 * wait / total, 100 * alone / total)],
    )
    return {"first": first, "alone": alone, "wait": wait, "step": total}


SECTIONS = {
    "steps": _steps,
    "identities": _identities,
    "batches": _batches,
    "input": input_pipeline,
}

if __name__ == "__main__":
    sys.exit(main())
