"""What both benchmarks share: what was measured on, tables, JSON."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine.devices import versions
from utils import write_json

CPU_FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # the widest first


def setting(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, without a machine's name."""
    known = versions(device)
    names = ("python", "torch", "torchvision", "numpy", "commit")
    hardware = f"CPU, {_cpu_features()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)}; {hardware}"
    return {**{name: known[name] for name in names}, "hardware": hardware}


def _cpu_features() -> str:
    """The vector and matrix extensions that matter here."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.exists() else set()
    found = [name for name in CPU_FEATURES if name in flags]
    return " ".join(found) or torch.backends.cpu.get_cpu_capability()


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    synchronize: Callable[[], Any] = lambda: None,
    description: str = "",
    warm_up: bool = True,
) -> dict[str, dict[str, float]]:
    """Times calls in turn, so that whatever else the machine does hits all of them alike.

    Args:
        calls: By name.
        repeats: Times that each is timed, after one call that is not.
        synchronize: Called before the clock is read.
        description: Of the progress bar.
        warm_up: Whether there is the call that is not timed.

    Returns:
        By name, in seconds: ``median`` and ``min`` of wall-clock times, and ``cpu``, the median of
        processor times of all threads, which other work on the machine hardly changes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    rounds = range(-1 if warm_up else 0, repeats)
    with tqdm(total=len(rounds) * len(calls), desc=description, disable=None) as bar:
        for turn in rounds:
            for name, call in calls.items():
                bar.set_postfix_str(name)
                synchronize()
                start, start_cpu = time.perf_counter(), time.process_time()
                call()
                synchronize()
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - start)
                    processor[name].append(time.process_time() - start_cpu)
                bar.update()
    return {
        name: {
            "median": statistics.median(values),
            "min": min(values),
            "cpu": statistics.median(processor[name]),
        }
        for name, values in seconds.items()
    }


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Writes a Markdown table; numbers get three digits."""
    lines = [f"\n{title}\n", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def finish(results: dict[str, Any], device: torch.device, file: Path | None) -> None:
    """Prints what was measured on and writes all numbers to `file`."""
    results["setting"] = setting(device)
    sys.stdout.write("\n" + "; ".join(f"{k} {v}" for k, v in results["setting"].items()) + "\n")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, results)


def unit_features(rng: np.random.Generator, pids: np.ndarray, width: int) -> np.ndarray:
    """Unit features (n, width), float32, scattered around one direction an identity."""
    directions = np.random.default_rng(0).standard_normal((pids.max() + 1, width), np.float32)
    feats = 2.5 * rng.standard_normal((len(pids), width), np.float32) + directions[pids]
    return feats / np.linalg.norm(feats, axis=1, keepdims=True)
