"""Files, signals, logging: what every script needs and no part of the method."""

import contextlib
import json
import logging
import logging.handlers
import os
import platform
import reprlib
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

log = logging.getLogger(__name__)

VERSION = "2.0.0"  # of this project, see CHANGELOG.md
RECORD = "%(asctime)s %(levelname)s %(message)s"  # of the log


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
    """Turns errors a user can mend into one paragraph on standard error and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path to system errors that name none, such as a full disk's."""
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
    logging.basicConfig(
        level=logging.INFO, format=RECORD, datefmt="%H:%M", handlers=[screen, kept], force=True
    )
    logging.captureWarnings(True)
    for chatty in ("fontTools", "matplotlib"):  # each glyph of a PDF, each font found
        logging.getLogger(chatty).setLevel(logging.WARNING)


def log_to(file: Path) -> None:
    """Appends to a file, with dates, what is logged from now on and what was since the start."""
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter(RECORD))
    for kept in logging.getLogger().handlers[:]:
        if isinstance(kept, logging.handlers.MemoryHandler):
            kept.setTarget(handler)
            kept.close()  # writes the records
            logging.getLogger().removeHandler(kept)
    logging.getLogger().addHandler(handler)


def make_writable_dir(path: Path) -> Path:
    """Creates a folder; raises ValueError, with the system's reason, when it is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(
            f"cannot write into {path}: {error.strerror}; choose another folder (--output-dir, ...)"
        ) from error
    return path


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds a lock on a file, whose folder is made; the system frees it when this process ends.

    Raises:
        ValueError: Another process, which the message names, holds it.
    """
    make_writable_dir(path.parent)
    with open(path, "a+") as file:
        try:
            import fcntl  # not on Windows, where nothing is locked

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{path.parent} is being written by {file.read() or 'another process'}: wait for "
                f"it, end it, or choose another folder"
            ) from None
        except (ImportError, OSError) as error:
            log.warning("%s cannot be locked (%s): start no other run there", path, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def write_atomic(
    path: Path, write: Callable[[BinaryIO], None], *, keep: Path | None = None
) -> None:
    """Writes a file through `write(stream)`: an interruption leaves the former file or the new one.

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
    """Finds a checkpoint by its path, as given or in one of the `folders`; of a folder last.pt.

    ``{trial}`` stays in what is returned; the file of trial 1 must be there.

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
        data = path.read_bytes()
        if path.suffix == ".jsonl":
            data, schema = b"[" + b",\n".join(data.splitlines()) + b"]", [schema]
        return parse_json(data, schema)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} cannot be used: {reason}; remove it and run again") from error


def parse_json(text: str | bytes, schema: Any) -> Any:
    """Reads a JSON text; raises ValueError where it is none, or other than the schema.

    A schema is a type (float takes integers too, object any value), (None, schema) where null will
    do, a list with the schema of each entry, or a dictionary of entries: "name?" may be absent, "*"
    is the schema of those not named.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_form(value, schema)
    return value


def check_form(value: Any, schema: Any, where: str = "it") -> None:
    """Raises ValueError, which says `where`, when a JSON value is other than a schema."""
    if isinstance(schema, tuple):
        if value is None:
            return
        schema = schema[1]
    kind = schema if isinstance(schema, type) else type(schema)
    fits = kind in (object, type(value)) or (kind is float and type(value) is int)
    if not fits:
        raise ValueError(f"{where} is {reprlib.repr(value)}, expected {kind.__name__}")
    if isinstance(schema, list):
        for number, each in enumerate(value, start=1):
            check_form(each, schema[0], f"entry {number} of {where}")
    elif isinstance(schema, dict):
        missing = [name for name in schema if not name.endswith(("?", "*")) and name not in value]
        if missing:
            raise ValueError(f"{where} lacks {missing[0]!r}")
        for name, each in value.items():
            own = schema.get(name, schema.get(f"{name}?", schema.get("*", object)))
            check_form(each, own, reprlib.repr(name))
