"""Stand-in data: procedural pedestrians in the layouts of RegDB, SYSU-MM01 and LLCM.

None of the data sets may be redistributed, so tests, demo and benchmarks run on these drawings. An
identity is a structure (body, hair, patterned garments, things carried) that shows in both
modalities; its colours do not. A finished folder holds `stand_in.json`, which the real data lack.

    python stand_in.py --layout regdb --out data/regdb --train-ids 150 --test-ids 40 --seed 0
    python stand_in.py --layout sysu --out data/sysu --train-ids 395 --test-ids 96
    python stand_in.py --layout llcm --out data/llcm --train-ids 60 --test-ids 20 --images-per-id 8
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from data_manager import STAND_IN_MARKER
from datasets.pedestrians import camera_look, make_person, render
from datasets.stand_in_layouts import LAYOUTS, Drawing, Settings
from options import COUNT, Parser
from utils import naming, setup_logging, user_errors

log = logging.getLogger(__name__)


def generate(out: Path, *, workers: int = 1, **options: Any) -> Path:
    """Writes stand-in data to the folder `out`, which appears once it is complete; returns `out`.

    `options` are the fields of `Settings`. The files do not depend on the number of processes,
    `workers`.

    Raises:
        ValueError: There is something in `out`.
    """
    out, settings = Path(out), Settings(**options)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: is there already; delete it, or give another name")
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    drawings, files = LAYOUTS[settings.layout](settings)
    files[STAND_IN_MARKER] = json.dumps(asdict(settings), indent=1).encode() + b"\n"
    # spawn: the caller may run threads (torch), which a fork would not survive
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))  # starts none until used
    temporary = TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    with naming(out), temporary, pool:
        folder = Path(temporary.name) / "data"
        draw = partial(_draw_identity, settings, folder)
        done = (map if workers == 1 else pool.map)(draw, drawings, drawings.values())
        list(tqdm(done, total=len(drawings), unit="identity", desc="drawing", disable=None))
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        folder.rename(target)
    log.info("%d images of %d identities: %s", sum(map(len, drawings.values())), len(drawings), out)
    return out


def _draw_identity(settings: Settings, folder: Path, pid: int, drawings: list[Drawing]) -> None:
    person = make_person(settings.seed, pid)
    for drawing in drawings:
        path = folder / drawing.path
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng((settings.seed, pid, drawing.camera, drawing.number))
        look = camera_look(settings.layout, drawing.camera, settings.seed)
        image = render(person, look, rng, (settings.img_h, settings.img_w))
        image.save(path, quality=92)  # a JPEG's; the suffix says the format


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script: 0, 2 on a value that cannot be honoured, 130 when interrupted."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--layout", choices=LAYOUTS, required=True, help="whose folders and lists")
    text = "identities to train on; SYSU: 1/4 of them for validation (default: %(default)s)"
    add("--train-ids", type=COUNT, default=Settings.train_ids, help=text)
    add("--test-ids", type=COUNT, default=Settings.test_ids, help="others (default: %(default)s)")
    text = "per modality (RegDB, LLCM), per camera that sees it (SYSU); default: %(default)s"
    add("--images-per-id", type=COUNT, default=Settings.images_per_id, help=text)
    add("--seed", type=int, default=Settings.seed, help="of everything (default: %(default)s)")
    text = "RegDB's splits, SYSU's official gallery draws (default: %(default)s)"
    add("--trials", type=COUNT, default=Settings.trials, help=text)
    add("--img-h", type=COUNT, help="largest height, pixels (default: RegDB 128, others 160)")
    add("--img-w", type=COUNT, help="largest width, pixels (default: RegDB 64, others 72)")
    add("--out", type=Path, required=True, help="folder to make")
    add("--workers", type=COUNT, default=os.cpu_count() or 1, help="processes (default: all cores)")
    setup_logging()
    try:
        with user_errors():
            generate(**vars(parser.parse_args(argv)))
    except KeyboardInterrupt:
        sys.stderr.write("stopped; nothing was written\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
