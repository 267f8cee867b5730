"""The device a process runs on: which one, its precision and choice of kernels, its memory."""

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from utils import VERSION

log = logging.getLogger(__name__)


def resolve_device(gpu: str | None, *, local_rank: str | None = None) -> torch.device:
    """Returns the device of ``--gpu``, or of torchrun's `local_rank`: CUDA's current one from now.

    None is GPU 0, or the CPU, with a warning, where torch can use no GPU. Raises ValueError for a
    GPU that is not there, or that was asked for and cannot be used.
    """
    if gpu in ("cpu", "-1"):
        return torch.device("cpu")
    indices = (local_rank or gpu or "0").split(",")
    if not all(index.isdigit() for index in indices):
        raise ValueError(f"--gpu takes a CUDA index (0, 1, ...) or 'cpu', got {gpu!r}")
    if len(indices) > 1:
        log.warning(
            "--gpu %s: one process uses one GPU, here the first of these; for several start it "
            "with torchrun --nproc_per_node=%d",
            *(gpu, len(indices)),
        )
    index = int(indices[0])
    if torch.cuda.is_available() and index >= torch.cuda.device_count():
        raise ValueError(
            f"--gpu {index}: this machine has {torch.cuda.device_count()} CUDA device(s), "
            f"numbered from 0; list them with nvidia-smi"
        )
    problem = _why_unusable(index)
    if problem and gpu is not None:
        raise ValueError(f"--gpu {gpu}: {problem}, or run on the CPU with --gpu cpu")
    if problem or not torch.cuda.is_available():
        log.warning("running on the CPU: %s", problem or "no CUDA device on this machine")
        return torch.device("cpu")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)  # for what takes no device: events, autocast, object exchange
    return device


def _why_unusable(index: int) -> str:
    """Why torch cannot use the GPU of a machine with NVIDIA's driver, and the remedy, or ""."""
    if not torch.cuda.is_available() and shutil.which("nvidia-smi") is None:
        return ""
    try:
        torch.ones(1, device=torch.device("cuda", index)).add(1)
        return ""
    except (RuntimeError, AssertionError) as error:  # the second: a build without CUDA
        reason = str(error).splitlines()[0]
    found = _output_of("nvidia-smi --query-gpu=name,driver_version --format=csv,noheader")
    cards = f"{'; '.join(found.splitlines())} (card, driver)" if found else "this GPU"
    return (
        f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}) cannot use {cards}: {reason}. "
        f"Update the driver, unset CUDA_VISIBLE_DEVICES, or install a PyTorch that can, for "
        f"example from https://download.pytorch.org/whl/cu126"
    )


def _output_of(command: str) -> str:
    """What a command prints, here in the code's folder; "" where there is no such program."""
    folder = Path(__file__).parent
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    return done.stdout.strip()


def set_up(
    device: torch.device, float32_precision: str = "high", *, deterministic: bool = False
) -> None:
    """Sets torch up for the device: a CPU's allocator; a GPU's precision and choice of kernels.

    With the precision "high" a GPU's float32 products and convolutions use TF32 where it has it;
    `deterministic` allows only operations that give the same bits in each run.
    """
    if deterministic:
        # cuBLAS reads it when it starts, at the first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cpu":
        keep_freed_memory()
        return
    tf32 = float32_precision == "high"
    torch.set_float32_matmul_precision(float32_precision)
    torch.backends.cudnn.allow_tf32 = tf32  # torch's default
    torch.backends.cudnn.benchmark = not deterministic
    log.info(
        "%s, CUDA %s; float32 products and convolutions %s",
        *(torch.cuda.get_device_name(device), torch.version.cuda),
        "in TF32 (--float32-precision highest: without)" if tf32 else "without TF32",
    )


def amp_dtype(amp: str | bool, device: torch.device) -> torch.dtype | None:
    """The network's precision under ``--amp`` ("bf16", "fp16", True: what the device has), or None.

    Below compute capability 8.0 torch emulates bf16: its convolutions are slower than in float32.
    """
    if not amp:
        return None
    native = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if amp is True:
        return torch.bfloat16 if native else torch.float16
    if amp == "bf16" and not native:
        log.warning("--amp bf16: this GPU has no bf16, which is slow; --amp fp16 is faster")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def peak_memory(device: torch.device) -> dict[str, float]:
    """Returns the peaks of a GPU's memory since the last call, in GiB; {} on the CPU."""
    if device.type != "cuda":
        return {}
    peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    names = ("allocated_gib", "reserved_gib")
    return {name: peak / 2**30 for name, peak in zip(names, peaks, strict=True)}


def keep_freed_memory() -> None:
    """Lets glibc's allocator keep freed memory for later use instead of returning it at once.

    A training step on the CPU frees and allocates gigabytes; got from the system anew, each page of
    them is mapped and zeroed first, a third of the step's time. The process keeps its peak.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks are not mapped one by one
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap never shrinks
        libc.mallopt(1, 0)  # M_MXFAST: a freed block takes in the slivers cut off for alignment


def versions(device: torch.device) -> dict[str, str]:
    """Returns versions, hardware and commit (marked where the code has local changes) of a run."""
    on_gpu = device.type == "cuda"
    return {
        "version": VERSION,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: metadata.version(name) for name in ("torchvision", "numpy")},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "commit": _output_of("git describe --always --dirty --abbrev=12") or "unknown",
    }
