"""Seeds, devices, files: what every script needs and no part of the method.

Files are written atomically (a temporary file in the same folder, flushed to disk, then renamed):
an interruption leaves either the former file or the new one. Checkpoints are read without
executing anything stored in them.
"""

import contextlib
import ctypes
import json
import logging
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch

log = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = "mgmra-checkpoint-1"  # written into each checkpoint; other files are earlier releases'
ZIP_MAGIC = b"PK\x03\x04"  # the first bytes of what torch.save writes
# Numbers and values of glibc's M_MMAP_MAX, M_TRIM_THRESHOLD and M_MXFAST. Without the last, slivers
# that aligning cuts off are set aside, and a freed block is never large enough for its like.
NO_MMAP = (-4, 0)
NEVER_TRIM = (-1, 2**31 - 1)
NO_FASTBINS = (1, 0)


class CheckpointError(ValueError):
    """A checkpoint file cannot be used; the message says which, why, and what to do."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C; files are written atomically, so that it may be raised anywhere.

    Attributes:
        signal: Which of the two.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"stopped by {self.signal.name}")

    @property
    def exit_code(self) -> int:
        """The process's exit code, as a shell reports a death by this signal."""
        return 128 + self.signal


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Raises SIGTERM and Ctrl-C as `Interrupted` inside (in the main thread; elsewhere nothing)."""

    def stop(number: int, _: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)  # torchrun repeats a Ctrl-C
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch; model initialisation is all that draws from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - for libraries that use the global generator
    torch.manual_seed(seed)


def make_deterministic() -> None:
    """Restricts torch to operations that give the same bits in each run, on CUDA too; slower.

    To be called before CUDA is first used. Operations without such a form raise RuntimeError.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)


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


def keep_freed_memory() -> bool:
    """Lets glibc's allocator keep freed memory for later use instead of returning it at once.

    A training step on the CPU frees and allocates gigabytes; got from the system anew, each page of
    them is mapped and zeroed first, a third of the step's time. The process keeps its peak.

    Returns:
        Whether the C library has such settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(*NO_MMAP) and mallopt(*NEVER_TRIM) and mallopt(*NO_FASTBINS))


def setup_logging(file: Path | None = None, level: int = logging.INFO) -> None:
    """Logs to standard error, and to `file` (appending) when one is given."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None:
        handlers.append(logging.FileHandler(file))
    logging.basicConfig(
        level=level,
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


def write_atomic(
    path: Path, write: Callable[[BinaryIO], None], *, keep: Path | None = None
) -> None:
    """Writes a file through `write(stream)` so that `path` is never half written.

    Args:
        path: Where to.
        write: Gives the content.
        keep: A former file moves here once the new one is on the disk, just before it takes its
            place: at every moment one of the two is whole.

    Raises:
        OSError: When it cannot be written (disk full, ...); a former file is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, indented, with a final newline."""
    text = json.dumps(content, indent=2, default=str) + "\n"
    write_atomic(path, lambda stream: stream.write(text.encode()))


def write_json_lines(path: Path, content: list[dict[str, Any]]) -> None:
    """Writes JSON objects atomically, one a line."""
    text = "".join(json.dumps(line) + "\n" for line in content)
    write_atomic(path, lambda stream: stream.write(text.encode()))


def remove_temporary_files(folder: Path) -> None:
    """Removes what a process killed within `write_atomic` has left in a folder."""
    for file in folder.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def save_checkpoint(path: Path, content: dict[str, Any], *, keep: Path | None = None) -> None:
    """Saves a checkpoint atomically, marked with `FORMAT`.

    Args:
        path: Where to.
        content: Tensors, plain values, and containers of them.
        keep: The former file moves here, once the new one is safe on the disk.

    Raises:
        OSError: When it cannot be written (disk full, read-only, ...); the former file is then
            untouched, and the message says so.
    """

    def write(stream: BinaryIO) -> None:
        torch.save({"format": FORMAT, **content}, stream)

    try:
        write_atomic(path, write, keep=keep)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's own, for a failed write
        if isinstance(error.__context__, Interrupted):  # torch.save covers it with its own error
            raise error.__context__ from None
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        state = "the former one is untouched" if path.exists() else "there was none before it"
        raise OSError(
            f"cannot write the checkpoint {path} ({cause}); {state}. Make room or mend the folder, "
            f"then go on with --resume"
        ) from error


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
        _check_integrity(path)
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


def _check_integrity(path: Path) -> None:
    """Compares each record with its checksum, which torch.load does not; older formats have none.

    Raises:
        ValueError: When one differs, and zipfile's errors when the archive itself is damaged.
    """
    with open(path, "rb") as stream:
        if stream.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
            return
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("it holds compressed records, which torch.save never writes")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its record {damaged} is wrong")


def state_dict_of(content: dict[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """The network's state dict in a checkpoint: under ``net``, ``state_dict``, ``model``, or bare.

    Raises:
        CheckpointError: When there is none.
    """
    for key in ("net", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and torch.is_tensor(v)}
    if not tensors:
        found = ", ".join(map(str, content))[:200]
        raise CheckpointError(f"{path} holds no network weights (found: {found})")
    return {k.removeprefix("module."): v for k, v in tensors.items()}


def plain_entry(content: dict[str, Any], key: str, default: T, path: str | Path) -> T:
    """An entry of a checkpoint, of the default's type; the default when it is absent or None.

    Raises:
        CheckpointError: When it has another type, or is a number below 0.
    """
    value = content.get(key)
    if value is None:
        return default
    # Earlier releases store numbers as NumPy's.
    value = value.item() if isinstance(value, np.generic) else value
    if type(value) is not type(default) or (isinstance(value, int) and value < 0):
        raise CheckpointError(f"{path}: {key!r} is {str(value)[:40]!r}, expected as in {default!r}")
    return value


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors a user can mend into one paragraph on standard error and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
