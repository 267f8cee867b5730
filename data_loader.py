"""Images into batches: decode once, keep uint8, assemble and augment whole batches on the device.

`load_images` turns an `ImageList` into one uint8 array, `ImageStore` holds it where gathering is
cheapest, `IdentitySampler` says which rows make a batch and `TrainLoader` delivers augmented
batches ahead of time. Every random draw is a function of (seed, epoch, step), so that a run can be
taken up anywhere and prefetching changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from datasets.base import DataError, ImageList
from datasets.sysu_mm01 import CACHE_COMMAND
from datasets.transforms import Augmentation, augment, normalize

FORMATS = ("BMP", "JPEG", "PNG")  # the only decoders a stranger's file may reach
MAX_PIXELS = 50_000_000  # more is taken for a decompression bomb; real crops have under 1 million
DECODE_CHUNK = 32  # images a thread decodes between two progress updates
COPY_CHUNK = 1024  # images copied at once from a memory map
EVAL_PREFETCH = 2
RESIDENT_SHARE = 0.25  # of the free device memory that one store may take
SAMPLER_STREAM, VISIBLE_STREAM, INFRARED_STREAM = range(3)  # tell apart the draws of one step

T = TypeVar("T")


# --- Decoding -------------------------------------------------------------------------------------


def load_images(
    images: ImageList, *, height: int, width: int, workers: int = 4, progress: bool = True
) -> np.ndarray:
    """Decode images of any size, grey or colour, and resize them (Lanczos) to `height` x `width`.

    Args:
        images: n images; those of a cache are opened, not decoded.
        height: of the result, pixels.
        width: of the result, pixels.
        workers: decoding threads.
        progress: show a progress bar.

    Returns:
        (n, height, width, 3) uint8 RGB; a read-only memory map where a whole cache is asked for.

    Raises:
        DataError: an image can't be decoded (names the file and the line that asked for it), or the
            cache has another size.
    """
    if images.cache is not None:
        return _load_cache(images, height, width)
    out = np.empty((len(images), height, width, 3), dtype=np.uint8)

    def decode(start: int) -> int:
        stop = min(start + DECODE_CHUNK, len(images))
        for index in range(start, stop):
            _decode(images, index, out[index])
        return stop - start

    with (
        ThreadPoolExecutor(max(1, workers)) as pool,
        tqdm(
            total=len(images),
            desc=f"decode {images.modality}",
            unit="img",
            disable=None if progress else True,
        ) as bar,
    ):
        futures = [pool.submit(decode, start) for start in range(0, len(images), DECODE_CHUNK)]
        try:
            for future in futures:
                bar.update(future.result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return out


def _decode(images: ImageList, index: int, out: np.ndarray) -> None:
    height, width, _ = out.shape
    try:
        with Image.open(images.root / images.paths[index], formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, over {MAX_PIXELS}")
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode != "L":
                image = image.convert("RGB")
            pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    except Exception as error:  # a damaged image makes Pillow raise nearly anything
        raise DataError(
            f"can't decode {images.describe(index)}: {error}; expected an intact"
            f" {', '.join(FORMATS)} image: copy it again from the data set"
        ) from error
    out[:] = pixels if pixels.ndim == 3 else pixels[:, :, None]


def _load_cache(images: ImageList, height: int, width: int) -> np.ndarray:
    cache = np.load(images.cache, mmap_mode="r", allow_pickle=False)
    if cache.shape[1:] != (height, width, 3):
        command = CACHE_COMMAND.format(images.root) + f" --img_h {height} --img_w {width}"
        raise DataError(
            f"{images.cache} holds images of {cache.shape[1]} x {cache.shape[2]} (H x W), and"
            f" {height} x {width} is asked for. Rebuild it: {command}; or pass"
            f" --img_h {cache.shape[1]} --img_w {cache.shape[2]}"
        )
    if images.cache_rows is None:
        return cache
    out = np.empty((len(images), height, width, 3), dtype=np.uint8)
    for start in range(0, len(images), COPY_CHUNK):
        rows = images.cache_rows[start : start + COPY_CHUNK]
        out[start : start + len(rows)] = cache[rows]
    return out


# --- Sampling -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class IdentityBatch:
    """Rows of one batch: (P*K,) int64 each, P blocks of K, in one identity order."""

    visible: np.ndarray
    infrared: np.ndarray
    labels: np.ndarray


class IdentitySampler:
    """Draws P identities without replacement, then K images of each per modality with replacement.

    Stateless: a batch is a function of (seed, epoch, step).

    Source: the AGW code base; floor(max(#visible, #infrared) / (P*K)) + 1 steps make an epoch.
    """

    def __init__(
        self,
        visible_labels: np.ndarray,
        infrared_labels: np.ndarray,
        *,
        ids_per_batch: int,
        images_per_id: int,
        seed: int,
    ) -> None:
        """Index the images by identity.

        Args:
            visible_labels: (n_v,) integers 0..L-1, each at least once.
            infrared_labels: (n_i,) the same for the infrared images.
            ids_per_batch: P.
            images_per_id: K, per modality.
            seed: not negative.

        Raises:
            ValueError: fewer than P identities, labels with gaps, or numbers out of range.
        """
        if ids_per_batch < 1 or images_per_id < 1 or seed < 0:
            raise ValueError(
                f"{ids_per_batch} identities a batch, {images_per_id} images of each, seed {seed};"
                " expected at least 1, 1 and 0"
            )
        self._tables = [
            _by_label(np.asarray(labels)) for labels in (visible_labels, infrared_labels)
        ]
        self.num_ids = len(self._tables[0][1])
        if len(self._tables[1][1]) != self.num_ids:
            raise ValueError(
                f"{self.num_ids} identities have visible images and {len(self._tables[1][1])}"
                " infrared ones; expected the same labels 0..L-1 in both"
            )
        if self.num_ids < ids_per_batch:
            raise ValueError(
                f"a batch asks for {ids_per_batch} identities and there are {self.num_ids}; lower"
                f" --batch-size to {self.num_ids} or less"
            )
        self.ids_per_batch, self.images_per_id, self.seed = ids_per_batch, images_per_id, seed
        most = max(len(visible_labels), len(infrared_labels))
        self.steps_per_epoch = most // (ids_per_batch * images_per_id) + 1

    def share(self, index: int, count: int) -> slice:
        """Return which rows of each batch are the `index`-th of `count` equal shares of identities.

        Raises:
            ValueError: P does not divide into them.
        """
        if self.ids_per_batch % count:
            raise ValueError(
                f"--batch-size {self.ids_per_batch} identities don't divide among {count}"
                f" processes; choose a multiple of {count}"
            )
        rows = self.ids_per_batch // count * self.images_per_id
        return slice(index * rows, (index + 1) * rows)

    def batch(self, epoch: int, step: int) -> IdentityBatch:
        """Draw the rows of one step, both counted from 0."""
        rng = np.random.default_rng((self.seed, epoch, step, SAMPLER_STREAM))
        ids = rng.choice(self.num_ids, self.ids_per_batch, replace=False)
        shape = (self.ids_per_batch, self.images_per_id)
        rows = [
            order[first[ids, None] + rng.integers(counts[ids, None], size=shape)].reshape(-1)
            for order, counts, first in self._tables
        ]
        return IdentityBatch(*rows, np.repeat(ids, self.images_per_id))


def _by_label(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows sorted by label, and per label its number of rows and where they start."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.size == 0 or labels.min() < 0:
        raise ValueError(f"labels are {labels.dtype} {labels.shape}; expected (n,) integers 0..L-1")
    counts = np.bincount(labels)
    if counts.min() == 0:
        raise ValueError(
            f"label {counts.argmin()} has no image; expected each of 0..{len(counts) - 1}"
        )
    return np.argsort(labels, kind="stable"), counts, np.cumsum(counts) - counts


# --- Storage --------------------------------------------------------------------------------------


class ImageStore:
    """uint8 images kept where gathering a batch is cheapest, and batches of them on the device.

    Host memory or a memory map is gathered row by row into a (pinned) buffer; on a CUDA device the
    images move there whole when they fit.
    """

    def __init__(
        self, images: np.ndarray, *, device: torch.device, resident: bool | None = None
    ) -> None:
        """Place the images.

        Args:
            images: (n, H, W, 3) uint8, a memory map or in memory.
            device: where batches are wanted.
            resident: keep all of them on the device (CPU: in memory); None decides: on CUDA when
                they take at most `RESIDENT_SHARE` of its free memory.
        """
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise ValueError(
                f"images are {images.dtype} {images.shape}; expected uint8 (n, H, W, 3)"
            )
        self.device = torch.device(device)
        if resident is None:
            resident = (
                self.device.type == "cuda"
                and images.nbytes <= RESIDENT_SHARE * (torch.cuda.mem_get_info(self.device)[0])
            )
        self._host, self._resident = images, None
        if resident:
            self._resident = torch.empty(images.shape, dtype=torch.uint8, device=self.device)
            for start in range(0, len(images), COPY_CHUNK):
                chunk = np.array(images[start : start + COPY_CHUNK])
                self._resident[start : start + len(chunk)] = torch.from_numpy(chunk)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._host)

    @property
    def resident(self) -> bool:
        """Whether all images are kept on the device."""
        return self._resident is not None

    def gather(self, indices: np.ndarray) -> torch.Tensor:
        """Return the images at `indices` ((m,) integers): (m, H, W, 3) uint8 on the device."""
        if self._resident is not None:
            return self._resident[torch.from_numpy(np.asarray(indices)).to(self.device)]
        pinned = self.device.type == "cuda"
        shape = (len(indices), *self._host.shape[1:])
        buffer = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        if len(indices) and not 0 <= np.min(indices) <= np.max(indices) < len(self):
            raise IndexError(f"rows {np.min(indices)}..{np.max(indices)} of {len(self)} images")
        # mode="raise" would copy through a temporary; the range is checked above.
        np.take(self._host, indices, axis=0, out=buffer.numpy(), mode="clip")
        return buffer.to(self.device, non_blocking=pinned)


# --- Loaders --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """One training step's input.

    Attributes:
        visible: (P*K, 3, H, W) float32; P is smaller where a loader delivers a share.
        infrared: (P*K, 3, H, W) float32, the same identities in the same order.
        labels: (2*P*K,) int64, visible rows first.
    """

    visible: torch.Tensor
    infrared: torch.Tensor
    labels: torch.Tensor


class TrainLoader:
    """Delivers augmented batches of both modalities, made ahead of time by one thread."""

    def __init__(
        self,
        *,
        visible: ImageStore,
        infrared: ImageStore,
        sampler: IdentitySampler,
        augmentation: Augmentation,
        seed: int,
        device: torch.device,
        prefetch: int = 2,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Keep the parts.

        Args:
            visible: the visible images.
            infrared: the infrared images.
            sampler: says which rows make a batch.
            augmentation: the train transform.
            seed: of the augmentation's draws, not negative.
            device: where batches are wanted; the stores' device.
            prefetch: batches made ahead, 0 for none; what is in them does not depend on it.
            share: (i, n): of each batch only the i-th of n equal shares of its identities.

        Raises:
            ValueError: the identities of a batch don't divide into n shares.
        """
        self._rows = sampler.share(*share)
        self.visible, self.infrared, self.sampler = visible, infrared, sampler
        self.augmentation, self.seed = augmentation, seed
        self.device, self.prefetch = torch.device(device), prefetch

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.sampler.steps_per_epoch

    def batch(self, epoch: int, step: int) -> Batch:
        """Make one batch, a function of (seed, epoch, step)."""
        rows = self.sampler.batch(epoch, step)
        labels = np.tile(rows.labels[self._rows], 2)
        parts = (
            ("visible", self.visible, rows.visible, VISIBLE_STREAM),
            ("infrared", self.infrared, rows.infrared, INFRARED_STREAM),
        )
        images = [
            augment(
                store.gather(chosen[self._rows]),
                self.augmentation,
                np.random.default_rng((self.seed, epoch, step, stream)),
                modality=modality,
                first=self._rows.start,
                total=len(chosen),
            )
            for modality, store, chosen, stream in parts
        ]
        return Batch(*images, torch.from_numpy(labels).to(self.device))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from `start_step` on; leaving early stops the thread."""
        steps = range(start_step, len(self))
        return _ahead(lambda step: self.batch(epoch, step), steps, self.prefetch, self.device)


class EvalLoader:
    """Delivers images in order as normalised batches, made ahead of time by one thread."""

    def __init__(self, images: np.ndarray, *, batch_size: int, device: torch.device) -> None:
        """Keep the parts.

        Args:
            images: (n, H, W, 3) uint8, a memory map or in memory.
            batch_size: images a batch; the last one may be smaller.
            device: where batches are wanted.
        """
        if batch_size < 1:
            raise ValueError(f"batch size is {batch_size}; expected at least 1")
        self.store = ImageStore(images, device=device, resident=False)
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.store) // self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield (m, 3, H, W) float32 batches."""

        def make(start: int) -> torch.Tensor:
            stop = min(start + self.batch_size, len(self.store))
            return normalize(self.store.gather(np.arange(start, stop)))

        starts = range(0, len(self.store), self.batch_size)
        return _ahead(make, starts, EVAL_PREFETCH, self.store.device)


def _ahead(make: Callable[[int], T], items: range, depth: int, device: torch.device) -> Iterator[T]:
    """Yield make(item) in order, up to `depth` of them made ahead by a thread of their own.

    What `make` raises is raised here, and closing the generator ends the thread. On CUDA the thread
    works on a stream of its own, so that copies run beside training; the consumer's stream waits
    for each result.
    """
    if depth < 1:
        yield from map(make, items)
        return
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:  # resident images were copied on the current stream
        stream.wait_stream(torch.cuda.current_stream(device))

    def work(item: int) -> tuple[T, torch.cuda.Event | None]:
        with torch.cuda.stream(stream):  # None: no effect
            return make(item), stream.record_event() if stream else None

    queue: deque[Future] = deque()
    waiting = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        try:
            queue.extend(pool.submit(work, item) for item in islice(waiting, depth))
            while queue:
                result, event = queue.popleft().result()
                queue.extend(pool.submit(work, item) for item in islice(waiting, 1))
                if event is not None:
                    _hand_over(result, event)
                yield result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _hand_over(result: Batch | torch.Tensor, event: torch.cuda.Event) -> None:
    """Let the current stream wait for the tensors, and the allocator for the current stream."""
    tensors = vars(result).values() if isinstance(result, Batch) else (result,)
    for tensor in tensors:
        current = torch.cuda.current_stream(tensor.device)
        current.wait_event(event)
        tensor.record_stream(current)
