"""Builds SYSU-MM01's training caches: every training image decoded and resized once, not each run.

    python pre_process_sysu.py --data-path data/SYSU-MM01
    python pre_process_sysu.py --data-path data/SYSU-MM01 --img_h 384 --img_w 192 --overwrite

Writes `train_{rgb,ir}_resized_{img,label}.npy` into the data folder, where training finds them:
uint8 (n, H, W, 3) and int64 (n,), in the order of the training lists; 4.3 GB at 288 x 144. Each
file appears under its name once it is complete. With --output-dir the caches go elsewhere: link
them into the data folder. Bad data or a full disk end with status 2.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from data_loader import load_images
from data_manager import DataError, ImageList, train_set
from datasets.sysu_mm01 import cache_files
from utils import setup_logging, user_errors, write_atomic

log = logging.getLogger(__name__)

CHUNK = 500  # images decoded and written at once


def build_caches(
    data_path: Path,
    output_dir: Path,
    *,
    height: int = 288,
    width: int = 144,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Builds the caches of both modalities in `output_dir`, except those that are there already.

    Returns:
        The image files that were built; they do not depend on the number of threads, `workers`.

    Raises:
        DataError: The data set is incomplete, an image cannot be decoded, or a cache of another
            size or of other labels is in the way.
        OSError: The folder cannot be written, or the disk has too little room.
    """
    if min(height, width, workers) < 1:
        raise DataError(f"img_h {height}, img_w {width}, workers {workers}; expected at least 1")
    train = train_set("sysu", data_path, use_cache=False)
    output_dir.mkdir(parents=True, exist_ok=True)
    todo = [
        (images, labels)
        for images, labels in zip((train.visible, train.infrared), train.labels, strict=True)
        if overwrite or not _is_built(output_dir, images, labels, (height, width))
    ]
    needed = sum(len(images) for images, _ in todo) * height * width * 3
    free = shutil.disk_usage(output_dir).free
    if needed > free:
        raise OSError(
            f"{output_dir} has {free / 1e9:.1f} GB free and the caches take {needed / 1e9:.1f} GB;"
            " make room, or choose another disk with --output-dir"
        )
    size = {"height": height, "width": width, "workers": workers}
    for images, labels in todo:
        image_file, label_file = cache_files(output_dir, images.modality)
        write_atomic(label_file, partial(np.save, arr=labels))
        # The images last: the pair is complete once they are there.
        write_atomic(image_file, partial(_write_images, images=images, progress=progress, **size))
        log.info("built %s: %d images of %d x %d", image_file, len(images), height, width)
    return [cache_files(output_dir, images.modality)[0] for images, _ in todo]


def _write_images(
    stream: BinaryIO, images: ImageList, height: int, width: int, workers: int, progress: bool
) -> None:
    """Writes a .npy file of (n, height, width, 3) uint8, chunk by chunk."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), height, width, 3)}
    np.lib.format.write_array_header_1_0(stream, header)
    starts, hidden = range(0, len(images), CHUNK), None if progress else True
    for start in tqdm(starts, f"cache {images.modality}", unit=f"{CHUNK} img", disable=hidden):
        chunk = images.take(range(start, min(start + CHUNK, len(images))))
        pixels = load_images(chunk, height=height, width=width, workers=workers, progress=False)
        stream.write(pixels.data)


def _is_built(
    output_dir: Path, images: ImageList, labels: np.ndarray, size: tuple[int, int]
) -> bool:
    """Returns whether the cache is there; one of other images, labels or size is an error."""
    files = cache_files(output_dir, images.modality)
    present = [file for file in files if file.exists()]
    for file in present:
        shape = labels.shape if file == files[1] else (len(images), *size, 3)
        try:
            found = np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged header makes numpy raise nearly anything
            raise DataError(
                f"{file} cannot be read ({error}); to replace it: --overwrite"
            ) from error
        if found.shape != shape or (file == files[1] and not np.array_equal(found, labels)):
            raise DataError(
                f"{file} has shape {found.shape}; the {len(images)} {images.modality} training"
                f" images of {images.root} at {size[0]} x {size[1]} and their labels make"
                f" {shape}. To replace it: --overwrite"
            )
    if len(present) == 2:
        log.info("%s is built already", files[0])
    return len(present) == 2


def build_parser() -> argparse.ArgumentParser:
    """Returns the flags; each is spelled with `-` or `_`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-path", "--data_path", type=Path, required=True, help="SYSU-MM01's folder")
    help_text = "where the caches go (default: --data-path)"
    add("--output-dir", "--output_dir", type=Path, help=help_text)
    add("--img_h", "--img-h", type=int, default=288, help="image height, pixels (default 288)")
    add("--img_w", "--img-w", type=int, default=144, help="image width, pixels (default 144)")
    help_text = "threads that decode images (default: every core)"
    add("--workers", type=int, default=os.cpu_count() or 1, help=help_text)
    add("--overwrite", action="store_true", help="build anew what is there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: 0 when the caches are there, 130 when interrupted.

    Exits with status 2 on bad data or flags.
    """
    args = build_parser().parse_args(argv)
    setup_logging()
    try:
        with user_errors():
            build_caches(
                args.data_path,
                args.output_dir or args.data_path,
                height=args.img_h,
                width=args.img_w,
                workers=args.workers,
                overwrite=args.overwrite,
            )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command builds what is missing\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
