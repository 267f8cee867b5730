"""Makes docs/example_regdb_table.md and docs/example_ablation_table.md, on stand-in data.

    python docs/make_example_tables.py    # a quarter of an hour of one core
    python docs/make_example_tables.py --train-ids 100 --test-ids 30 --images-per-id 10 --epochs 10

They are examples of what `reproduce.py` writes, at a size that says nothing about any method. When
it is stopped, the same command resumes.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = "runs/example_tables"
QUICK = "--preset scratch --arch resnet18 --img_w 32 --batch-size 6 --local_feat_dim 64"
QUICK += " --triplet-ramp 0 2"  # the preset's ramp begins after more epochs than these
PREFACE = """<!-- Written by docs/make_example_tables.py -->

**An example of what `reproduce.py` writes, at a size chosen to be quick: stand-in data of {train}
training and {test} test identities, {trials} trial(s), {epochs} epochs of a small network on small
images. It says nothing about any method.** These commands made it:

```
{commands}
```

"""


def main() -> int:
    """Runs the commands and writes the pages; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train-ids", type=int, default=12, help="training identities (default: 12)")
    add("--test-ids", type=int, default=6, help="test identities (default: 6)")
    add(
        "--images-per-id", type=int, default=4, help="images per identity and modality (default: 4)"
    )
    add("--epochs", type=int, default=2, help="epochs of each training (default: 2)")
    add("--trials", type=int, default=2, help="RegDB splits of each table (default: 2)")
    add("--tables", nargs="+", default=["regdb", "ablation"], help="which pages (default: both)")
    add("--gpu", default="cpu", help="CUDA index, or cpu (default: cpu)")
    args = parser.parse_args()
    draw = f"python stand_in.py --layout regdb --out {RUNS}/data --train-ids {args.train_ids}"
    draw += f" --test-ids {args.test_ids} --images-per-id {args.images_per_id} --seed 0"
    if not (ROOT / RUNS / "data/stand_in.json").exists():
        call(draw)
    pages = {}
    for table in args.tables:
        run = f"python reproduce.py run --table {table} --trials {args.trials} --runs {RUNS}"
        run += f" --data-path {RUNS}/data {QUICK} --epochs {args.epochs} --gpu {args.gpu} --quiet"
        write = f"python reproduce.py table --table {table} --runs {RUNS}"
        call(run)
        page = call(write)
        preface = PREFACE.format(
            trials=args.trials,
            train=args.train_ids,
            test=args.test_ids,
            epochs=args.epochs,
            commands="\n".join((draw, run, write)),
        )
        pages[table] = preface + page
    for table, page in pages.items():  # last: a changed page marks the code of later runs as dirty
        (ROOT / f"docs/example_{table}_table.md").write_text(page, encoding="utf-8")
    return 0


def call(command: str) -> str:
    """Runs a command in the repository; returns its standard output."""
    words = [sys.executable, *shlex.split(command)[1:]]
    return subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
