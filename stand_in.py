"""Stand-in data: procedural pedestrians in the layouts of RegDB, SYSU-MM01 and LLCM.

None of the data sets may be redistributed, so tests, demo and benchmarks run on these drawings. An
identity is a structure (body, hair, patterned garments, things carried) that shows in both
modalities; its colours do not. A finished folder holds `stand_in.json`, which the real data lack.

    python stand_in.py --layout regdb --out data/regdb --train-ids 150 --test-ids 40 --seed 0
    python stand_in.py --layout sysu --out data/sysu --full
    python stand_in.py --layout llcm --out data/llcm --train-ids 60 --test-ids 20 --images-per-id 8
    python stand_in.py --layout regdb --sheet sheet.png
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data_manager import STAND_IN_MARKER
from datasets.pedestrians import camera_look, make_person, render
from datasets.stand_in_layouts import DRAWINGS, LISTS, Drawing, Drawings, Settings, flag

log = logging.getLogger(__name__)

SHEET_CAMERAS = {  # of the columns of a contact sheet, visible first
    "regdb": (1, 1, 1, 1, 2, 2, 2, 2),
    "sysu": (1, 2, 4, 5, 3, 3, 6, 6),
    "llcm": (1, 2, 4, 5, 11, 12, 14, 15),
}


def generate(
    out: Path,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Path:
    """Writes stand-in data to the folder `out`, which appears once it is complete; returns `out`.

    `settings` are the fields of `Settings`. The files do not depend on the number of processes,
    `workers`; `overwrite` replaces stand-in data, and nothing else.

    Raises:
        ValueError: A setting is out of range, or `out` must not be replaced.
    """
    out, resolved = Path(out), Settings(**settings).resolved()
    if workers < 1:
        raise ValueError(f"--workers {workers}: expected 1 or more")
    _check_replaceable(out, overwrite)
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    drawings = DRAWINGS[resolved.layout](resolved)
    total, hidden = sum(map(len, drawings.values())), None if progress else True
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary) / "data"
        with tqdm(total=total, unit="image", desc="drawing", disable=hidden) as bar:
            for count in _draw_all(resolved, drawings, folder, workers):
                bar.update(count)
        for name, content in LISTS[resolved.layout](resolved, drawings):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        text = json.dumps(asdict(resolved), indent=1) + "\n"
        (folder / STAND_IN_MARKER).write_text(text, encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    log.info("%d images of %d identities: %s", total, len(drawings), out)
    return out


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; expected a new folder's name")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / STAND_IN_MARKER).is_file():
        raise ValueError(
            f"--out {out}: holds something that is not stand-in data (it has no"
            f" {STAND_IN_MARKER}); expected a new folder's name"
        )
    if not overwrite:
        raise ValueError(
            f"--out {out}: holds stand-in data already; add --overwrite to replace it, or give"
            " another name"
        )


def _draw_all(settings: Settings, drawings: Drawings, folder: Path, workers: int) -> Iterator[int]:
    """Writes every image; yields the number of images of each identity that is done."""
    jobs = repeat(settings), drawings.keys(), drawings.values(), repeat(folder)
    if workers == 1:
        yield from map(_draw_identity, *jobs)
        return
    # spawn: the caller may run threads (torch), which a fork would not survive
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_draw_identity, *jobs)


def _draw_identity(settings: Settings, pid: int, drawings: list[Drawing], folder: Path) -> int:
    person = make_person(settings.seed, pid, settings.tone_correlation)
    for drawing in drawings:
        path = folder / drawing.path
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng((settings.seed, pid, drawing.camera, drawing.number))
        look = camera_look(settings.layout, drawing.camera, settings.seed)
        image = render(person, look, rng, (settings.img_h, settings.img_w))
        image.save(path, quality=92)  # a JPEG's; the suffix says the format
    return len(drawings)


def sheet(path: Path, settings: Settings, ids: int = 12) -> None:
    """Draws a contact sheet: a row per identity, visible images left, infrared ones right."""
    if ids < 1:
        raise ValueError(f"--sheet-ids {ids}: expected 1 or more")
    s, gap, margin = settings.resolved(), 4, 36
    cameras = SHEET_CAMERAS[s.layout]
    wide, high = s.img_w + gap, s.img_h + gap
    page = Image.new("RGB", (margin + len(cameras) * wide + 8, 20 + ids * high), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for pid in range(1, ids + 1):
        person, y = make_person(s.seed, pid, s.tone_correlation), 20 + (pid - 1) * high
        draw.text((3, y + high // 2), f"id {pid}", fill="black", font=font)
        for column, camera in enumerate(cameras):
            look = camera_look(s.layout, camera, s.seed)
            x = margin + column * wide + (8 if look.infrared else 0)
            if pid == 1:
                word = "infrared" if look.infrared else "visible"
                draw.text((x, 4), f"{word} {camera}", fill="black", font=font)
            rng = np.random.default_rng((s.seed, pid, camera, column + 1))
            page.paste(render(person, look, rng, (s.img_h, s.img_w)), (x, y))
    page.save(path)


def build_parser() -> argparse.ArgumentParser:
    """Returns the flags: one for each field of `Settings`, and how to run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for item in fields(Settings):
        name, meaning = flag(item.name), item.metadata["help"]
        if item.name == "full":
            add(name, action="store_true", help=meaning)
        elif item.name == "layout":
            add(name, required=True, help=meaning)
        else:
            kind = float if item.name == "tone_correlation" else int
            add(name, type=kind, default=item.default, help=meaning)
    add("--out", type=Path, help="folder to make")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    add("--overwrite", action="store_true", help="replace stand-in data that is there")
    add("--sheet", type=Path, metavar="PNG", help="draw a contact sheet instead")
    add("--sheet-ids", type=int, default=12, help="identities on the sheet")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: 0, or 130 when interrupted.

    Exits with status 2 on a value that cannot be honoured.
    """
    from utils import setup_logging, user_errors  # here: the drawing processes need no torch

    args = build_parser().parse_args(argv)
    setup_logging()
    settings = {item.name: getattr(args, item.name) for item in fields(Settings)}
    run = {"workers": args.workers, "overwrite": args.overwrite, "progress": True}
    try:
        with user_errors():
            if args.sheet is not None:
                sheet(args.sheet, Settings(**settings), args.sheet_ids)
            elif args.out is None:
                raise ValueError("--out is missing: expected the folder to make")
            else:
                generate(args.out, **run, **settings)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; nothing was written\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
