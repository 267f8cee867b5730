"""Stand-in data: procedural pedestrians in the layouts of RegDB, SYSU-MM01 and LLCM.

None of the data sets may be redistributed, so tests, demo and benchmarks run on these drawings. An
identity is a structure (body, hair, patterned garments, things carried) that shows in both
modalities; its colours do not. A finished folder holds `stand_in.json`, which the real data lack.

    python stand_in.py --layout regdb --out data/regdb --train-ids 150 --test-ids 40 --seed 0
    python stand_in.py --layout sysu --out data/sysu --train-ids 395 --test-ids 96
    python stand_in.py --layout llcm --out data/llcm --train-ids 60 --test-ids 20 --images-per-id 8
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import MISSING, asdict, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from data_manager import STAND_IN_MARKER
from datasets.pedestrians import camera_look, make_person, render
from datasets.stand_in_layouts import DRAWINGS, LISTS, Drawing, Settings, flag
from options import Parser

log = logging.getLogger(__name__)


def generate(out: Path, *, workers: int = 1, **settings: Any) -> Path:
    """Writes stand-in data to the folder `out`, which appears once it is complete; returns `out`.

    `settings` are the fields of `Settings`. The files do not depend on the number of processes,
    `workers`.

    Raises:
        ValueError: A setting is out of range, or there is something in `out`.
    """
    out, resolved = Path(out), Settings(**settings).resolved()
    if workers < 1:
        raise ValueError(f"--workers {workers}: expected 1 or more")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out {out}: is there already; delete it, or give another name")
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    drawings = DRAWINGS[resolved.layout](resolved)
    # spawn: the caller may run threads (torch), which a fork would not survive
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))  # starts none until used
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary, pool:
        folder = Path(temporary) / "data"
        draw = partial(_draw_identity, resolved, folder)
        done = (map if workers == 1 else pool.map)(draw, drawings, drawings.values())
        for _ in tqdm(done, total=len(drawings), unit="identity", desc="drawing", disable=None):
            pass
        for name, content in LISTS[resolved.layout](resolved, drawings):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        marker = asdict(resolved) | {"val_ids": resolved.val_ids}
        (folder / STAND_IN_MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
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
    from utils import (  # here: the drawing processes need no torch
        naming,
        setup_logging,
        user_errors,
    )

    parser = Parser(__doc__)
    add = parser.add_argument
    for item in fields(Settings):
        name, text = flag(item.name), item.metadata["help"]
        kind = str if item.name == "layout" else int
        add(name, type=kind, default=item.default, required=item.default is MISSING, help=text)
    add("--out", type=Path, required=True, help="folder to make")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    setup_logging()
    try:
        with user_errors():
            args = parser.parse_args(argv)
            with naming(args.out):
                generate(**vars(args))
    except KeyboardInterrupt:
        sys.stderr.write("stopped; nothing was written\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
