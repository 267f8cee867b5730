"""Where a run writes, and what a former run has left there."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import read_json, write_json

LAST, PREVIOUS, BEST = "last.pt", "last.previous.pt", "best.pt"
DAMAGED = "last.damaged.pt"
CHECKPOINTS = (LAST, PREVIOUS, BEST, DAMAGED, "epoch_*.pt")  # patterns of a run's files
REPORTS = ("options.json", "log.jsonl", "training.json")


@dataclass
class RunFiles:
    """A run's folders, and what all its checkpoints say of it."""

    output_dir: Path  # log.jsonl, results
    checkpoint_dir: Path
    tensorboard_dir: Path
    header: dict[str, Any] = field(default_factory=dict)  # entries: run, its name, options, ...
    prefix: str = ""  # of the checkpoints' names, in a folder that runs share
    begun: bool = False  # whether what is there is this run's

    def checkpoint(self, name: str) -> Path:
        """Path of one of the run's checkpoints: `LAST`, `PREVIOUS`, `BEST` or a numbered one."""
        return self.checkpoint_dir / f"{self.prefix}{name}"

    def check(self, *, overwrite: bool, resumed: Path | None) -> None:
        """Raises ValueError where the run, `resumed` from a checkpoint, would overwrite another."""
        report = self.output_dir / "options.json"
        others, name = self.prefix and report.exists(), self.header["run"]
        if others and read_json(report, {"run?": str}).get("run") != name:
            raise ValueError(
                f"{self.output_dir} holds another run than {name}; runs can share --model_path, "
                f"but each needs an --output-dir of its own: name another, or leave it out"
            )
        existing = [path for path in map(self.checkpoint, (LAST, PREVIOUS)) if path.exists()]
        if existing and not (overwrite or self._holds(resumed)):
            raise ValueError(
                f"{existing[0]} is there already: continue that run with --resume (no file), start "
                f"it afresh with --overwrite, or choose another --output-dir"
            )

    def begin(self, *, overwrite: bool, resumed: Path | None) -> None:
        """Removes a former run's files or keeps a resumed one's; writes options.json."""
        folder, last, previous = self.checkpoint_dir, *map(self.checkpoint, (LAST, PREVIOUS))
        former = [p for name in CHECKPOINTS for p in folder.glob(f".{self.prefix}{name}.*.tmp")]
        if overwrite:
            former += [p for name in CHECKPOINTS for p in folder.glob(f"{self.prefix}{name}")]
            former += [self.output_dir / name for name in REPORTS]
            former += self.tensorboard_dir.glob("events.*")
        for file in former:
            file.unlink(missing_ok=True)
        if self._holds(resumed) and resumed.name == previous.name and last.exists():
            last.replace(self.checkpoint(DAMAGED))  # else the next save moves it over the good one
        write_json(self.output_dir / "options.json", self.header)
        self.begun = True

    def _holds(self, checkpoint: Path | None) -> bool:
        """Whether a checkpoint is one of the run's."""
        if checkpoint is None or checkpoint.parent.resolve() != self.checkpoint_dir.resolve():
            return False
        return not self.prefix or any(checkpoint.match(self.prefix + name) for name in CHECKPOINTS)
