"""train_MGMRA.py with a narrow network, for launchers that start a script."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]

import short_run  # noqa: E402

import train_MGMRA  # noqa: E402

if __name__ == "__main__":
    short_run.use_narrow_backbone()
    sys.exit(train_MGMRA.main())
