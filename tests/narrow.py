"""A script with a narrow network: narrow.py train_MGMRA|test|... FLAGS."""

import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]

import short_run  # noqa: E402

if __name__ == "__main__":
    short_run.use_narrow_backbone()
    script = importlib.import_module(sys.argv[1])
    sys.exit(script.main(sys.argv[2:]))
