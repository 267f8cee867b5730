"""Kills a short training at random moments, again and again, and counts what is lost.

    python tests/fault_injection.py                 # 50 kills, half a minute
    python tests/fault_injection.py --kills 500 --seed 7

SIGKILL and SIGTERM take turns; after the latter a run has to end with its own exit code and
message. Each attempt resumes what the one before it left; when one comes to its end, its
checkpoints, log and results are compared, to the bit, with an unbroken run's, and a new run begins.
Prints the counts; exit code 0 when every attempt could resume and every finished run is equal.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]

import short_run  # noqa: E402

import train_MGMRA  # noqa: E402
from networks.checkpoint_file import load_checkpoint  # noqa: E402


def attempt(
    arguments: list[str], errors: Path, delay: float | None = None, number: int = signal.SIGKILL
) -> int:
    """Trains in a child process, sends it a signal after a delay; returns its exit code.

    Minus the signal's number where it was the signal that ended it.

    The child is a fork of this process, which has imported everything: it starts at once, so that
    kills fall on the run and not on its imports.
    """
    child = os.fork()
    if child == 0:
        with errors.open("wb") as stream:
            os.dup2(stream.fileno(), 2)
            try:
                os._exit(train_MGMRA.main(arguments))
            except SystemExit as stop:
                os._exit(stop.code)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(70)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def moment(folder: Path) -> str:
    """What a kill left: where the run was, as far as its files tell."""
    if any(folder.glob(".*.tmp")):
        return "during a write"
    if not (folder / "last.pt").exists():
        between = (folder / "last.previous.pt").exists()
        return "between the renames of a save" if between else "before the first checkpoint"
    epoch = load_checkpoint(folder / "last.pt")["epoch"]
    return f"with {epoch} of {short_run.EPOCHS} epochs saved"


def inject(root: Path, kills: int, seed: int) -> tuple[Counter, list[str]]:
    """Kills that many times; returns counts, and a line for each thing that went wrong."""
    short_run.use_narrow_backbone()
    rng = random.Random(seed)
    data, errors = short_run.write_data(root / "data"), root / "errors"
    duration = float("inf")
    for _ in range(3):  # the shortest: files are in the system's cache, and nothing else ran
        shutil.rmtree(root / "unbroken", ignore_errors=True)
        start = time.perf_counter()
        if attempt(short_run.arguments(data, root / "unbroken"), errors) != 0:
            return Counter(), [errors.read_text()]
        duration = min(duration, time.perf_counter() - start)
    unbroken = short_run.outcome(root / "unbroken")
    counts, wrong = Counter(), []
    folder = root / "run"
    while True:
        last = counts["kills"] >= kills
        delay = None if last else rng.uniform(0, duration)
        number = (signal.SIGKILL, signal.SIGTERM)[counts["kills"] % 2]
        code = attempt(short_run.arguments(data, folder, "--resume"), errors, delay, number)
        said = "stopped by SIGTERM" in errors.read_text()
        if code == -number or (code == 128 + number and said):
            counts["kills"] += 1
            counts["  SIGTERM, with exit code and message"] += said
            counts[f"  {moment(folder)}"] += 1
            continue
        counts["runs finished"] += 1
        if code != 0:
            wrong.append(f"exit code {code}: {errors.read_text()}")
        else:
            different = short_run.differences(unbroken, short_run.outcome(folder))
            counts["  equal to the unbroken run"] += not different
            wrong += [f"differs: {name}" for name in different]
        shutil.rmtree(folder)
        if last:
            return counts, wrong


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        counts, wrong = inject(Path(root), args.kills, args.seed)
    lines = [f"{name}: {count}" for name, count in counts.items()]
    sys.stdout.write("\n".join([*lines, f"wrong: {len(wrong)}", *wrong]) + "\n")
    return 1 if wrong or not counts["runs finished"] else 0


if __name__ == "__main__":
    sys.exit(main())
