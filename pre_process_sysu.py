"""Builds SYSU-MM01's training caches: every training image decoded and resized once, not each run.

    python pre_process_sysu.py --data-path data/SYSU-MM01

Writes `train_{rgb,ir}_resized_{img,label}.npy` into the data folder, where training finds them:
uint8 (n, H, W, 3) and int64 (n,), in the order of the training lists; 4.3 GB at 288 x 144. Each
file appears under its name once it is complete. With --output-dir the caches go elsewhere: link
them into the data folder. Bad data or a full disk end with status 2.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data_manager import DATASETS, train_set
from datasets.decode import load_images
from datasets.sysu_mm01 import cache_files
from options import COUNT, Parser
from utils import make_writable_dir, user_errors, write_atomic


def build_caches(args: argparse.Namespace) -> None:
    """Builds the caches of both modalities, except those that are there already."""
    train = train_set("sysu", args.data_path, use_cache=False)
    folder = make_writable_dir(args.output_dir or args.data_path)
    for images, labels in zip((train.visible, train.infrared), train.labels, strict=True):
        files = cache_files(folder, images.modality)
        if not args.overwrite and all(file.exists() for file in files):
            sys.stdout.write(f"{files[0]} is there and stays; --overwrite builds it anew\n")
            continue
        pixels = load_images(images, height=args.img_h, width=args.img_w, workers=args.workers)
        for file, array in zip(files, (pixels, labels), strict=True):
            write_atomic(file, partial(np.save, arr=array))
    sys.stdout.write(f"the caches of {train.description} are in {folder}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: 0 when the caches are there, 130 when interrupted."""
    parser = Parser(__doc__)
    add = parser.add_argument
    folder = DATASETS["sysu"].default_folder
    add("--data-path", "--data_path", type=Path, default=folder, help=f"default: {folder}")
    add("--output-dir", "--output_dir", type=Path, help="for the caches (default: --data-path)")
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
