"""Full-size stand-in SYSU-MM01 through everything, with time and peak memory of each stage.

    python tests/load.py                                    # 288 x 144, ResNet-50, bf16, 20 steps
    python tests/load.py --size 96 48 --arch resnet18 --folder DIR    # quicker; DIR is kept

Stages: data generated (skipped where FOLDER holds them), caches built, an epoch's beginning trained
and stopped by SIGTERM, ten trials evaluated. Memory is what the stage's processes together hold for
themselves (anonymous and shared pages); pages of the mapped caches, which the system takes back
when it needs them, are printed beside it. Exit code 1 when a stage fails or takes over 8 GB.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 8.0  # GB
IMAGES, IDENTITIES = 44_745, 491  # all that the protocol uses: 22,258 + 11,909 + 6,775 + 3,803


def tree(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def held(pid: int) -> tuple[float, float]:
    """GB that a process tree holds for itself, and that it maps from files."""
    own = mapped = 0
    for process in tree(pid):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssShmem"):
                own += int(value.split()[0])
            elif name == "RssFile":
                mapped += int(value.split()[0])
    return own / 1e6, mapped / 1e6


class Stage:
    """One command, watched."""

    def __init__(self, name: str, *command: object) -> None:
        self.name, self.peak, self.mapped = name, 0.0, 0.0
        self._start = time.perf_counter()
        self.process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            try:
                own, mapped = held(self.process.pid)
            except (OSError, ProcessLookupError):  # a process ended meanwhile
                continue
            self.peak, self.mapped = max(self.peak, own), max(self.mapped, mapped)
            time.sleep(0.1)

    def finish(self, code: int = 0, until: Callable[[], bool] | None = None) -> bool:
        """Waits (for a condition, then sends SIGTERM); prints; returns whether all went well."""
        while until is not None and not until() and self.process.poll() is None:
            time.sleep(0.5)
        if until is not None:
            self.process.send_signal(signal.SIGTERM)
        well = self.process.wait() == code and self.peak <= LIMIT
        self._watcher.join()
        sys.stdout.write(
            f"{self.name:<10} {time.perf_counter() - self._start:8.1f} s   "
            f"peak {self.peak:5.2f} GB   mapped files {self.mapped:5.2f} GB   "
            f"{'ok' if well else f'FAILED, exit code {self.process.returncode}'}\n"
        )
        sys.stdout.flush()
        return well


def stages(folder: Path, args: argparse.Namespace) -> bool:
    """Runs every stage until one fails."""
    data, run = folder / "SYSU-MM01", folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    height, width = args.size
    size = ("--img_h", height, "--img_w", width)
    if not (data / "stand_in.json").exists():
        generate = ("stand_in.py", "--layout", "sysu", "--out", data, "--full")
        if not Stage("generated", *generate).finish():
            return False
    images = sum(1 for _ in data.glob("cam*/*/*.jpg"))
    identities = len({path.name for path in data.glob("cam*/*")})
    sys.stdout.write(f"{images} images of {identities} identities\n")
    if (images, identities) != (IMAGES, IDENTITIES):
        return False
    where = ("--dataset", "sysu", "--data-path", data)
    training = (
        *("train_MGMRA.py", *where, *size, "--output-dir", run, "--overwrite", "--quiet"),
        *("--weights", "none", "--arch", args.arch, "--triplet-ramp", 4, 9, "--gpu", args.gpu),
        *("--save-every-steps", args.steps, "--amp"),
    )
    testing = (
        *("test.py", *where, "--mode", "all", "--trials", 10, "--resume", run / "last.pt"),
        *("--output-dir", folder / "test", "--gpu", args.gpu, "--quiet"),
    )
    return (
        Stage("prepared", "pre_process_sysu.py", "--data-path", data, *size).finish()
        and Stage("trained", *training).finish(143, until=(run / "last.pt").exists)
        and Stage("evaluated", *testing).finish()
    )


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one, 6 GB")
    parser.add_argument("--size", type=int, nargs=2, default=(288, 144), help="height, width")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--gpu", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return 0 if stages(folder, args) else 1


if __name__ == "__main__":
    sys.exit(main())
