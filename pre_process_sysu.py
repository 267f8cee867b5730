"""Builds SYSU-MM01's training caches: every training image decoded and resized once, not each run.

    python pre_process_sysu.py --data-path data/SYSU-MM01
    python pre_process_sysu.py --data-path data/SYSU-MM01 --img_h 384 --img_w 192 --overwrite

Writes `train_{rgb,ir}_resized_{img,label}.npy` into the data folder, where training finds them:
uint8 (n, H, W, 3) and int64 (n,), in the order of the training lists; 4.3 GB at 288 x 144. After an
interruption the same command goes on where it stopped, and what is finished is kept. With
--output-dir the caches go elsewhere: link them into the data folder. Bad data or a full disk end
with status 2. Several machines with one file system share the work under `torchrun`, each process
decoding its share.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_loader import load_images
from data_manager import DataError, ImageList, train_set
from datasets.sysu_mm01 import CACHE_WORDS
from engine import distributed

logger = logging.getLogger(__name__)

CHUNK = 128  # images a worker decodes between two notes of progress


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
    """Build the caches of both modalities, except those that are there already.

    Args:
        data_path: SYSU-MM01's folder.
        output_dir: where the four files go; made if need be.
        height: of the cached images, pixels.
        width: of the cached images, pixels.
        workers: decoding processes; the files do not depend on their number.
        overwrite: build anew what is there.
        progress: show progress bars.

    Returns:
        The image files that were built.

    Raises:
        DataError: the data set is incomplete, an image can't be decoded, or a cache of another size
            or of other labels is in the way.
        OSError: the folder can't be written, or the disk has too little room.
    """
    if min(height, width, workers) < 1:
        raise DataError(f"img_h {height}, img_w {width}, workers {workers}; expected at least 1")
    train = train_set("sysu", data_path, use_cache=False)
    output_dir.mkdir(parents=True, exist_ok=True)
    parts = [(train.visible, train.visible_labels), (train.infrared, train.infrared_labels)]
    todo = [
        (images, labels)
        for images, labels in parts
        if overwrite or not _is_built(output_dir, images, labels, (height, width))
    ]
    _check_room(output_dir, sum(len(images) for images, _ in todo) * height * width * 3)
    distributed.wait_for_all()  # everyone has looked before anyone writes
    for images, labels in todo:
        image_file, label_file = _names(output_dir, images)
        if distributed.is_main():
            partial = label_file.with_suffix(".npy.partial")
            with partial.open("wb") as file:
                np.save(file, labels)
            os.replace(partial, label_file)
        _build(image_file, images, (height, width), workers, progress)  # last: it marks the end
        logger.info("built %s: %d images of %d x %d", image_file, len(images), height, width)
    return [_names(output_dir, images)[0] for images, _ in todo]


def _names(output_dir: Path, images: ImageList) -> tuple[Path, Path]:
    stem = f"train_{CACHE_WORDS[images.modality]}_resized"
    return output_dir / f"{stem}_img.npy", output_dir / f"{stem}_label.npy"


def _is_built(
    output_dir: Path, images: ImageList, labels: np.ndarray, size: tuple[int, int]
) -> bool:
    """Tell whether the cache is there; one of other images, labels or size is in the way."""
    for file in _names(output_dir, images):
        if not file.exists():
            continue
        try:
            found = np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged header makes numpy raise nearly anything
            raise DataError(
                f"{file} can't be read ({error}); to replace it: --overwrite"
            ) from error
        is_labels = file.name.endswith("_label.npy")
        shape = labels.shape if is_labels else (len(images), *size, 3)
        if found.shape != shape or (is_labels and not np.array_equal(found, labels)):
            raise DataError(
                f"{file} has shape {found.shape}; the {len(images)} {images.modality} training"
                f" images of {images.root} at {size[0]} x {size[1]} and their labels make"
                f" {shape}. To replace it: --overwrite"
            )
    built = all(file.exists() for file in _names(output_dir, images))
    if built:
        logger.info("%s is built already", _names(output_dir, images)[0])
    return built


def _check_room(output_dir: Path, needed: int) -> None:
    held = sum(file.stat().st_blocks * 512 for file in output_dir.glob("train_*_img.npy.partial"))
    free = shutil.disk_usage(output_dir).free + held
    if needed > free:
        raise OSError(
            f"{output_dir} has {free / 1e9:.1f} GB free and the caches take {needed / 1e9:.1f} GB;"
            " make room, or choose another disk with --output-dir"
        )


def _build(
    file: Path, images: ImageList, size: tuple[int, int], workers: int, progress: bool
) -> None:
    """Fill FILE.partial chunk by chunk, note finished chunks in FILE.journal, rename at the end."""
    partial = file.with_suffix(".npy.partial")
    journals = sorted(file.parent.glob(f"{file.stem}.npy.journal*"))
    journal = file.with_suffix(f".npy.journal{distributed.rank() or ''}")
    shape = (len(images), *size, 3)
    key = _fingerprint(images, size)
    header = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    length = header.tell() + math.prod(shape)
    done = set().union(*(_finished(notes, partial, key, length) for notes in journals))
    distributed.wait_for_all()
    if not done and distributed.is_main():
        with partial.open("wb") as out:
            out.write(header.getvalue())
            out.truncate(length)
    if not _finished(journal, partial, key, length):
        journal.write_text(f"{key}\n")
    distributed.wait_for_all()
    every = [start for start in range(0, len(images), CHUNK) if start not in done]
    todo = every[distributed.rank() :: distributed.size()]
    own = sum(min(CHUNK, len(images) - start) for start in todo)
    bar = tqdm(
        total=own if distributed.size() > 1 else len(images),
        initial=0 if distributed.size() > 1 else len(images) - own,
        desc=f"cache {images.modality}",
        unit="img",
        disable=None if progress else True,
    )
    with _pool(workers) as pool, journal.open("a") as notes, bar:
        chunks = {
            start: images.take(range(start, min(start + CHUNK, len(images)))) for start in todo
        }
        futures = {
            pool.submit(_fill, partial, shape, start, chunk): start
            for start, chunk in chunks.items()
        }
        try:
            for future in as_completed(futures):
                future.result()
                notes.write(f"{futures[future]}\n")
                notes.flush()
                bar.update(len(chunks[futures[future]]))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    distributed.wait_for_all()
    if distributed.is_main():
        os.replace(partial, file)
    journal.unlink()
    for notes in journals:  # of an interrupted run with more processes
        notes.unlink(missing_ok=True)


def _fill(partial: Path, shape: tuple[int, ...], start: int, images: ImageList) -> None:
    """Decode one chunk and write it in its place, safely on the disk before it is noted as done."""
    pixels = load_images(images, height=shape[1], width=shape[2], workers=1, progress=False)
    total, row = math.prod(shape), math.prod(shape[1:])
    with partial.open("r+b") as out:
        out.seek(partial.stat().st_size - total + start * row)  # past the header
        out.write(pixels.data)
        out.flush()
        os.fsync(out.fileno())


def _fingerprint(images: ImageList, size: tuple[int, int]) -> str:
    """Digest what a cache depends on: sizes and the images' names, lengths and times."""
    digest = hashlib.sha256(repr((size, CHUNK)).encode())
    for path in images.paths:
        status = os.stat(images.root / path)
        digest.update(f"\n{path} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _finished(journal: Path, partial: Path, key: str, length: int) -> set[int]:
    """Return the chunks that an interrupted run of the same images and size has finished."""
    if not (journal.is_file() and partial.is_file() and partial.stat().st_size == length):
        return set()
    first, *notes = journal.read_text(errors="replace").split("\n")
    return {int(note) for note in notes[:-1]} if first == key else set()  # last: cut off or empty


def _pool(workers: int) -> Executor:
    if workers == 1:
        return ThreadPoolExecutor(1)
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["data_loader"])  # one import of torch for all workers
    return ProcessPoolExecutor(workers, context, initializer=_start_worker)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, which lets running chunks end, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def build_parser() -> argparse.ArgumentParser:
    """Return the flags; each is spelled with `-` or `_`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-path", "--data_path", type=Path, required=True, help="SYSU-MM01's folder")
    add(
        "--output-dir", "--output_dir", type=Path, help="where the caches go (default: --data-path)"
    )
    add("--img_h", "--img-h", type=int, default=288, help="image height, pixels (default 288)")
    add("--img_w", "--img-w", type=int, default=144, help="image width, pixels (default 144)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: every core)")
    add("--overwrite", action="store_true", help="build anew what is there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 when the caches are there, 2 on bad data, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with distributed.processes("cpu"):
            build_caches(
                args.data_path,
                args.output_dir or args.data_path,
                height=args.img_h,
                width=args.img_w,
                workers=args.workers,
                overwrite=args.overwrite,
                progress=distributed.is_main(),
            )
    except BrokenProcessPool:
        logger.error(
            "a worker process died, perhaps for want of memory; the same command goes on where it"
            " stopped, and fewer --workers take less memory"
        )
        return 2
    except (DataError, OSError) as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt:
        logger.error("interrupted; the same command goes on where it stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
