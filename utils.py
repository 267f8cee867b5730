"""Seeds, devices, files: what every script needs and no part of the method.

Files are written atomically (a temporary file in the same folder, flushed to disk, then renamed):
an interruption leaves either the former file or the new one. Checkpoints are read without
executing anything stored in them.
"""

import contextlib
import json
import logging
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

log = logging.getLogger(__name__)

FORMAT = "mgmra-checkpoint-1"  # written into each checkpoint; other files are earlier releases'


class CheckpointError(ValueError):
    """A checkpoint file cannot be used; the message says which, why, and what to do."""


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch; model initialisation is all that draws from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - for libraries that use the global generator
    torch.manual_seed(seed)


def resolve_device(gpu: str) -> torch.device:
    """Turns ``--gpu`` into a device.

    Args:
        gpu: CUDA index ("0"), or "cpu".

    Returns:
        The device; the CPU, with a logged warning, on a machine without CUDA.

    Raises:
        ValueError: When CUDA is there but not that index, or `gpu` is neither.
    """
    if gpu in ("cpu", "-1"):
        return torch.device("cpu")
    if not gpu.isdigit():
        raise ValueError(f"--gpu takes a CUDA index (0, 1, ...) or 'cpu', got {gpu!r}")
    if not torch.cuda.is_available():
        log.warning("--gpu %s: no CUDA device on this machine, running on the CPU", gpu)
        return torch.device("cpu")
    if int(gpu) >= torch.cuda.device_count():
        raise ValueError(
            f"--gpu {gpu}: this machine has {torch.cuda.device_count()} CUDA device(s), "
            f"numbered from 0; list them with nvidia-smi"
        )
    return torch.device("cuda", int(gpu))


def setup_logging(file: Path | None = None) -> None:
    """Logs to standard error, and to `file` (appending) when one is given."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None:
        handlers.append(logging.FileHandler(file))
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )
    logging.captureWarnings(True)


def versions() -> dict[str, str]:
    """Versions, hardware and commit that a number depends on."""
    import torchvision

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "commit": _commit(),
    }


def _commit() -> str:
    """Commit of the code, with a mark when it has local changes; "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        folder = Path(__file__).resolve().parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
        if done.returncode == 0:
            return done.stdout.strip()
    return "unknown"


def make_writable_dir(path: Path) -> Path:
    """Creates a folder and proves that it can be written to.

    Raises:
        ValueError: When it cannot, with the system's reason.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write into {path}: {error.strerror}; choose another folder with --output-dir"
        ) from error
    return path


def write_atomic(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file through `write(stream)` so that `path` is never half written.

    Raises:
        OSError: When it cannot be written (disk full, ...); a former file is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, indented, with a final newline."""
    text = json.dumps(content, indent=2, default=str) + "\n"
    write_atomic(path, lambda stream: stream.write(text.encode()))


def append_json_line(path: Path, content: dict[str, Any]) -> None:
    """Appends one JSON object as one line."""
    with open(path, "a") as stream:
        stream.write(json.dumps(content) + "\n")


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Saves a checkpoint atomically, marked with `FORMAT`."""
    write_atomic(path, lambda stream: torch.save({"format": FORMAT, **content}, stream))


def _numpy_types() -> list[Any]:
    """The NumPy types in earlier releases' checkpoints: scalars and arrays beside the weights."""
    core = np._core.multiarray
    dtypes = [type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "bool")]
    return [
        np.dtype,
        np.ndarray,
        *dtypes,
        core.scalar,
        core._reconstruct,
        (core.scalar, "numpy.core.multiarray.scalar"),  # written under NumPy 1
        (core._reconstruct, "numpy.core.multiarray._reconstruct"),
        (_latin1, "_codecs.encode"),
    ]


def _latin1(text: str, encoding: str) -> bytes:
    """Stand-in for ``_codecs.encode``, as pickle protocol 2 stores bytes: latin-1 only."""
    if encoding != "latin1":
        raise CheckpointError(f"unexpected text encoding {encoding!r} in a checkpoint")
    return text.encode("latin1")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint or a bare state dict onto the CPU, executing nothing that it contains.

    Raises:
        CheckpointError: When there is no such file, or it is truncated, corrupt, no checkpoint, or
            holds objects other than tensors, plain values and NumPy numbers.
    """
    path = Path(path)
    if not path.is_file():
        where = path.parent if path.parent.is_dir() else Path.cwd()
        names = (p.name for p in where.iterdir() if p.suffix in (".pt", ".pth", ".t"))
        found = ", ".join(sorted(names)[:8]) or "none"
        raise CheckpointError(f"no checkpoint at {path}; checkpoints in {where}: {found}")
    try:
        with torch.serialization.safe_globals(_numpy_types()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for each kind of damage
        text = str(error).strip() or repr(error)
        # torch's advice on unsafe loading comes before the reason: keep the reason only.
        reason = text.rpartition("WeightsUnpickler error: ")[2].splitlines()[0].split(" Please")[0]
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a readable checkpoint: it is truncated, "
            f"corrupt, or holds objects that are not loaded for safety ({reason[:300]})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    return content


def state_dict_of(content: dict[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """The network's state dict in a checkpoint: under ``net``, ``state_dict``, ``model``, or bare.

    Raises:
        CheckpointError: When there is none.
    """
    for key in ("net", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {k.removeprefix("module."): v for k, v in content.items() if torch.is_tensor(v)}
    if not state:
        raise CheckpointError(
            f"{path} holds no network weights (found: {', '.join(content)[:200]})"
        )
    return state


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors a user can mend into one paragraph on standard error and exit code 2."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
