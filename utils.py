"""Files, signals, logging: what every script needs and no part of the method.

Files are written atomically (a temporary file in the same folder, flushed to disk, then renamed):
an interruption leaves either the former file or the new one. JSON files are read against a schema.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import math
import os
import platform
import reprlib
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import numpy as np

if TYPE_CHECKING:
    import torch

try:
    import fcntl
except ImportError:  # on Windows, where nothing is locked
    fcntl = None

log = logging.getLogger(__name__)

VERSION = "2.0.0"  # of this project, see CHANGELOG.md
JSON_LIMIT = 16 * 2**20  # bytes of a JSON text; the log of an epoch takes about 2,000
DEEPEST = 20  # levels in it
MADE_FOLDERS: list[Path] = []  # by this process, the deepest first


class CheckpointError(ValueError):
    """A checkpoint file cannot be used."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C; files are written atomically, so that it may be raised anywhere."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number  # as a shell reports a death by this signal


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Raises SIGTERM and Ctrl-C as `Interrupted` inside."""
    numbers = (signal.SIGTERM, signal.SIGINT)

    def stop(number: int, _: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # torchrun repeats a Ctrl-C
        raise Interrupted(number)

    former = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, former, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors a user can mend into one paragraph on standard error and exit code 2.

    Folders that `make_writable_dir` has made inside are removed again if they are empty.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    finally:
        for folder in MADE_FOLDERS:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        MADE_FOLDERS.clear()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names a path in those system errors that name none, such as a full disk's."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def setup_logging() -> None:
    """Logs to standard error, and keeps the records for `log_to`."""
    screen = logging.StreamHandler()
    kept = logging.handlers.MemoryHandler(1000, flushLevel=100)  # above every level
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(
        level=logging.INFO, format=form, datefmt="%H:%M", handlers=[screen, kept], force=True
    )
    logging.captureWarnings(True)
    for chatty in ("fontTools", "matplotlib"):  # each glyph of a PDF, each font found
        logging.getLogger(chatty).setLevel(logging.WARNING)


def log_to(file: Path) -> None:
    """Appends to a file, with dates, what is logged from now on and what was since the start."""
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for kept in logging.getLogger().handlers[:]:
        if isinstance(kept, logging.handlers.MemoryHandler):
            kept.setTarget(handler)
            kept.close()  # writes the records
            logging.getLogger().removeHandler(kept)
    logging.getLogger().addHandler(handler)


def versions(device: torch.device) -> dict[str, str]:
    """Versions, hardware and commit (marked where the code has local changes) of a number."""
    import torch  # takes seconds, and --help does without

    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        git = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    on_gpu = device.type == "cuda"
    return {
        "version": VERSION,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": metadata.version("torchvision"),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "commit": commit or "unknown",
    }


def make_writable_dir(path: Path) -> Path:
    """Creates a folder; raises ValueError, with the system's reason, when it is not writable."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        MADE_FOLDERS[:0] = new
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(
            f"cannot write into {path}: {error.strerror}; choose another folder with --output-dir"
        ) from error
    return path


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock file, which the system frees when this process ends, however it ends.

    Its folder is made.

    Raises:
        ValueError: Another process, which the message names, holds it, and `wait` is false.
    """
    while True:
        make_writable_dir(path.parent)
        with open(path, "a+") as file:
            _take_lock(file, path, wait)
            if os.fstat(file.fileno()).st_nlink == 0:  # its former holder has just removed it
                continue
            try:
                with naming(path):
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {platform.node()}")
                    file.flush()
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
            return


def _take_lock(file: TextIO, path: Path, wait: bool) -> None:
    try:
        if fcntl is None:
            raise OSError("this system has no such locks")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        text = f"{path.parent} is being written by {file.read() or 'another process'}"
        if not wait:
            raise ValueError(f"{text}: wait for it, end it, or choose another folder") from None
        log.warning("%s: waiting for it", text)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        log.warning("%s cannot be locked (%s): start no other run there", path, error)


def write_atomic(
    path: Path, write: Callable[[BinaryIO], None], *, keep: Path | None = None
) -> None:
    """Writes a file through `write(stream)` so that `path` is never half written.

    A former file moves to `keep`, if given, once the new one is on the disk.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # no other process's
    try:
        with naming(path), open(temporary, "xb") as stream:
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


def find_checkpoint(name: str | Path, *folders: Path) -> str:
    """Returns the path of a checkpoint, which may lie in one of the `folders`; of a folder last.pt.

    ``{trial}`` in it stays: that of trial 1 is looked for.

    Raises:
        CheckpointError: When there is none; it says where it was looked for and what is there.
    """
    looked = {}
    for place in (Path(name), *(folder / name for folder in folders)):
        first = Path(str(place).replace("{trial}", "1"))
        if first.is_dir():
            place, first = place / "last.pt", first / "last.pt"
        if first.is_file():
            return str(place)
        there = sorted(p.name for p in first.parent.glob("*") if p.suffix in (".pt", ".pth", ".t"))
        looked[f"{first.absolute()} (checkpoints there: {', '.join(there[:8]) or 'none'})"] = None
    raise CheckpointError(f"no checkpoint at {name}: looked for {' and '.join(looked)}")


def read_json(path: Path, schema: Any) -> Any:
    """Reads a JSON file, or all lines of a .jsonl as a list; see `parse_json`.

    Raises:
        ValueError: It is not there, or not such a file.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(JSON_LIMIT + 1)
        if path.suffix == ".jsonl":
            data, schema = b"[" + b",\n".join(data.splitlines()) + b"]", [schema]
        return parse_json(data, schema)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} cannot be used: {reason}; remove it and run again") from error


def parse_json(text: str | bytes, schema: Any) -> Any:
    """Reads a JSON text; raises ValueError where it is none, too long, or other than the schema.

    A schema is a type (float takes integers too, object any value), None, a tuple of alternatives,
    a list with the schema of each entry, or a dictionary of entries: "name?" may be absent, "*" is
    the schema of those not named. NaN, infinity and deep nesting are refused.
    """
    if len(text) > JSON_LIMIT:
        raise ValueError(f"it has over {JSON_LIMIT} bytes")
    try:
        value = json.loads(text, parse_int=_number, parse_float=_number, parse_constant=_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_form(value, schema)
    return value


def check_form(value: Any, schema: Any, where: str = "it", depth: int = 0) -> None:
    """Raises ValueError, which says `where`, when a JSON value is other than a schema."""
    if isinstance(schema, tuple):
        schema = next((each for each in schema if _is_a(value, each)), schema[0])
    if schema is object:
        schema = {dict: {}, list: [object]}.get(type(value), object)
    if not _is_a(value, schema) or depth > DEEPEST:
        expected = getattr(schema, "__name__", type(schema).__name__)
        raise ValueError(f"{where} is {reprlib.repr(value)}, expected {expected}")
    if isinstance(schema, list):
        for number, each in enumerate(value, start=1):
            check_form(each, schema[0], f"entry {number} of {where}", depth + 1)
    elif isinstance(schema, dict):
        missing = [name for name in schema if not name.endswith(("?", "*")) and name not in value]
        if missing:
            raise ValueError(f"{where} lacks {missing[0]!r}")
        for name, each in value.items():
            own = schema.get(name, schema.get(f"{name}?", schema.get("*", object)))
            check_form(each, own, reprlib.repr(name), depth + 1)


def _is_a(value: Any, schema: Any) -> bool:
    kind = schema if isinstance(schema, type) else type(schema)
    return kind in (type(value), object) or (kind is float and type(value) is int)


def _number(text: str) -> float:
    whole = text.lstrip("-").isdigit()
    if not abs(float(text)) < (2**63 if whole else math.inf):
        raise ValueError(f"{text[:40]} is no number of use")
    return int(text) if whole else float(text)
