"""Builds SYSU-MM01's training caches: every training image decoded and resized once, not each run.

    python pre_process_sysu.py --data-path data/SYSU-MM01

Writes `train_{rgb,ir}_resized_{img,label}.npy` into the data folder, where training finds them:
uint8 (n, H, W, 3) and int64 (n,), in the order of the training lists; 4.3 GB at 288 x 144. Each
file appears under its name once it is complete. With --output-dir the caches go elsewhere: link
them into the data folder. Bad data or a full disk end with status 2.
"""

import argparse
import math
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data_loader import load_images
from data_manager import DATASETS, DataError, TrainSet, train_set
from datasets.sysu_mm01 import cache_files
from options import COUNT, Parser
from utils import lock, user_errors, write_atomic


def build_caches(args: argparse.Namespace) -> None:
    """Builds the caches of both modalities, except those that are there already."""
    train = train_set("sysu", args.data_path, use_cache=False)
    folder = args.output_dir or args.data_path
    with lock(folder / ".lock", wait=True):  # another process may be building the same
        for left in folder.glob(".train_*_resized_*.tmp"):
            left.unlink()
        fill(folder, train, args)
    sys.stdout.write(f"the caches of {train.description} are in {folder}\n")


def fill(folder: Path, train: TrainSet, args: argparse.Namespace) -> None:
    """Writes what is missing in a folder."""
    todo = []
    for images, labels in zip((train.visible, train.infrared), train.labels, strict=True):
        shape = (len(images), args.img_h, args.img_w, 3)
        if args.overwrite or not is_built(folder, images.modality, shape, labels):
            todo.append((images, labels, shape))
    needed = sum(math.prod(shape) for *_, shape in todo)  # bytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free and the caches take {needed / 1e9:.1f} GB;"
            " make room, or choose another disk with --output-dir"
        )
    for images, labels, shape in todo:
        image_file, label_file = cache_files(folder, images.modality)
        pixels = load_images(images, height=shape[1], width=shape[2], workers=args.workers)
        write_atomic(label_file, partial(np.save, arr=labels))
        # The images last: the pair is complete once they are there.
        write_atomic(image_file, partial(np.save, arr=pixels))


def is_built(folder: Path, modality: str, shape: tuple[int, ...], labels: np.ndarray) -> bool:
    """Tells whether a cache is there; one of another shape or other labels is a DataError."""
    files = cache_files(folder, modality)
    for file, expected in zip(files, (shape, labels.shape), strict=True):
        if not file.exists():
            continue
        try:
            found = np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged header makes numpy raise nearly anything
            raise DataError(f"{file} cannot be read ({error}): use --overwrite") from error
        if found.shape != expected or (file == files[1] and (found != labels).any()):
            raise DataError(
                f"{file} has shape {found.shape}; expected {expected} and the labels of the"
                f" {modality} training images. To replace it: --overwrite"
            )
    return all(file.exists() for file in files)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: 0 when the caches are there, 130 when interrupted."""
    parser = Parser(__doc__)
    add = parser.add_argument
    folder = DATASETS["sysu"].default_folder
    add("--data-path", "--data_path", type=Path, default=folder, help=f"default: {folder}")
    text = "where the caches go (default: --data-path)"
    add("--output-dir", "--output_dir", type=Path, help=text)
    add("--img_h", "--img-h", type=COUNT, default=288, help="image height, pixels (default 288)")
    add("--img_w", "--img-w", type=COUNT, default=144, help="image width, pixels (default 144)")
    add("--workers", type=COUNT, default=os.cpu_count() or 1, help="threads (default: every core)")
    add("--overwrite", action="store_true", help="build anew what is there")
    try:
        with user_errors():
            build_caches(parser.parse_args(argv))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command builds what is missing\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
