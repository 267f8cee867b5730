"""Images into batches: decode once, keep uint8, assemble and augment whole batches on the device.

`load_images` turns an `ImageList` into one uint8 array, `ImageStore` holds it where gathering is
cheapest, `IdentitySampler` says which rows make a batch and `TrainLoader` delivers augmented
batches ahead of time. Every random draw is a function of (seed, epoch, step), so that a run can be
resumed anywhere and prefetching changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from datasets.decode import ImageCache, load_images
from datasets.transforms import Augmentation, Draw, augment, normalize, transform_each

__all__ = [
    "Batch",
    "EvalLoader",
    "IdentityBatch",
    "IdentitySampler",
    "ImageCache",
    "ImageStore",
    "TrainLoader",
    "load_images",
]

COPY_CHUNK = 1024  # images copied at once from a memory map
EVAL_PREFETCH = 2
RESIDENT_FRACTION = 0.25  # of the free device memory that one store may take
# The last word of (seed, epoch, step, stream): one stream of random numbers for each purpose.
SAMPLER_STREAM, VISIBLE_STREAM, INFRARED_STREAM, VISIBLE_SEEDS, INFRARED_SEEDS = range(5)

T = TypeVar("T")


# --- Sampling -------------------------------------------------------------------------------------


class LabelIndex(NamedTuple):
    """The rows of each label: `rows[starts[label] : starts[label] + counts[label]]`.

    Attributes:
        rows: (n,) int64 row numbers, sorted by label.
        counts: (L,) int64 rows of each label, at least 1.
        starts: (L,) int64 where each label's rows start.
    """

    rows: np.ndarray
    counts: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True, eq=False)
class IdentityBatch:
    """Rows of one batch: (P*K,) int64 each, P blocks of K, in one identity order."""

    visible: np.ndarray
    infrared: np.ndarray
    labels: np.ndarray


class IdentitySampler:
    """Draws P identities without replacement, then K images of each per modality with replacement.

    Stateless: a batch is a function of (seed, epoch, step).

    Args:
        visible_labels: (n_v,) integers 0..L-1, each at least once.
        infrared_labels: (n_i,) the same for the infrared images.
        ids_per_batch: P.
        images_per_id: K, per modality.
        seed: Not negative.

    Raises:
        ValueError: Fewer than P identities, labels with gaps, or numbers out of range.

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
        if ids_per_batch < 1 or images_per_id < 1 or seed < 0:
            raise ValueError(
                f"{ids_per_batch} identities a batch, {images_per_id} images of each, seed {seed};"
                " expected at least 1, 1 and 0"
            )
        self._visible, self._infrared = map(_index_labels, (visible_labels, infrared_labels))
        self.num_ids = len(self._visible.counts)
        if len(self._infrared.counts) != self.num_ids:
            raise ValueError(
                f"{self.num_ids} identities have visible images and {len(self._infrared.counts)}"
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

    def rows_of_rank(self, rank: int, world_size: int) -> slice:
        """Returns which rows of each batch a process gets: an equal number of whole identities.

        Raises:
            ValueError: P does not divide by `world_size`.
        """
        if self.ids_per_batch % world_size:
            raise ValueError(
                f"--batch-size {self.ids_per_batch} identities do not divide among {world_size}"
                f" processes; choose a multiple of {world_size}"
            )
        rows = self.ids_per_batch // world_size * self.images_per_id
        return slice(rank * rows, (rank + 1) * rows)

    def batch(self, epoch: int, step: int) -> IdentityBatch:
        """Draws the rows of one step, both counted from 0."""
        rng = np.random.default_rng((self.seed, epoch, step, SAMPLER_STREAM))
        ids = rng.choice(self.num_ids, self.ids_per_batch, replace=False)  # (P,)
        shape = (self.ids_per_batch, self.images_per_id)
        rows = []
        for index in (self._visible, self._infrared):
            chosen = rng.integers(index.counts[ids, None], size=shape)  # (P, K), of each label's
            rows.append(index.rows[index.starts[ids, None] + chosen].reshape(-1))
        return IdentityBatch(*rows, np.repeat(ids, self.images_per_id))


def _index_labels(labels: np.ndarray) -> LabelIndex:
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.size == 0 or labels.min() < 0:
        raise ValueError(f"labels are {labels.dtype} {labels.shape}; expected (n,) integers 0..L-1")
    counts = np.bincount(labels)
    if counts.min() == 0:
        raise ValueError(
            f"label {counts.argmin()} has no image; expected each of 0..{len(counts) - 1}"
        )
    return LabelIndex(np.argsort(labels, kind="stable"), counts, np.cumsum(counts) - counts)


# --- Storage --------------------------------------------------------------------------------------


class ImageStore:
    """uint8 images kept where gathering a batch is cheapest, and batches of them on the device.

    Host memory or a memory map is gathered row by row into a (pinned) buffer; on a CUDA device the
    images move there whole when they fit.

    Args:
        images: (n, H, W, 3) uint8, a memory map or in memory.
        device: Where batches are wanted.
        resident: Keep all of them on the device (CPU: in memory); None decides: on CUDA when
            they take at most `RESIDENT_FRACTION` of its free memory.
    """

    def __init__(
        self, images: np.ndarray, *, device: torch.device, resident: bool | None = None
    ) -> None:
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise ValueError(
                f"images are {images.dtype} {images.shape}; expected uint8 (n, H, W, 3)"
            )
        self.device = torch.device(device)
        if resident is None:
            resident = (
                self.device.type == "cuda"
                and images.nbytes <= RESIDENT_FRACTION * torch.cuda.mem_get_info(self.device)[0]
            )
        self._host, self._resident = images, None
        if resident:
            self._resident = torch.empty(images.shape, dtype=torch.uint8, device=self.device)
            for start in range(0, len(images), COPY_CHUNK):
                chunk = np.array(images[start : start + COPY_CHUNK])
                self._resident[start : start + len(chunk)] = torch.from_numpy(chunk)

    def __len__(self) -> int:
        return len(self._host)

    @property
    def resident(self) -> bool:
        """Whether all images are kept on the device."""
        return self._resident is not None

    def gather(self, indices: np.ndarray) -> torch.Tensor:
        """Returns the images at `indices` ((m,) integers): (m, H, W, 3) uint8 on the device."""
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
        visible: (P*K, 3, H, W) float32; with several processes P is a process's part of the
            identities.
        infrared: (P*K, 3, H, W) float32, the same identities in the same order.
        labels: (2*P*K,) int64, visible rows first.
    """

    visible: torch.Tensor
    infrared: torch.Tensor
    labels: torch.Tensor


class TrainLoader:
    """Delivers augmented batches of both modalities, made ahead of time by one thread.

    Args:
        visible: The visible images.
        infrared: The infrared images.
        sampler: Says which rows make a batch.
        augmentation: The train transform.
        seed: Seed of the augmentation's draws, not negative.
        device: Where batches are wanted; the stores' device.
        prefetch: Batches made ahead, 0 for none; what is in them does not depend on it.
        rank: This process, 0..world_size - 1.
        world_size: Processes among which each batch's identities are divided.
        transform: Applied to each image before `augmentation`: from (3, H, W) uint8 on the device
            to the same, such as a `torchvision.transforms.v2` transform. What it draws from
            torch's CPU generator is a function of (seed, epoch, step) too.

    Raises:
        ValueError: The identities of a batch do not divide by `world_size`.
    """

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
        rank: int = 0,
        world_size: int = 1,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._rows = sampler.rows_of_rank(rank, world_size)
        self.visible, self.infrared, self.sampler = visible, infrared, sampler
        self.augmentation, self.transform, self.seed = augmentation, transform, seed
        self.device, self.prefetch = torch.device(device), prefetch

    def __len__(self) -> int:
        return self.sampler.steps_per_epoch

    def batch(self, epoch: int, step: int) -> Batch:
        """Makes one batch, a function of (seed, epoch, step)."""
        drawn = self.sampler.batch(epoch, step)
        labels = np.tile(drawn.labels[self._rows], 2)

        def generator(stream: int) -> np.random.Generator:
            return np.random.default_rng((self.seed, epoch, step, stream))

        def augmented(
            store: ImageStore, rows: np.ndarray, modality: str, stream: int, seeds: int
        ) -> torch.Tensor:
            images = store.gather(rows[self._rows])
            if self.transform is not None:
                of_batch = generator(seeds).integers(2**63, size=len(rows))
                images = transform_each(images, self.transform, of_batch[self._rows].tolist())
            draws = generator(stream).random((len(Draw), len(rows)))[:, self._rows]
            return augment(images, self.augmentation, draws, modality=modality)

        return Batch(
            augmented(self.visible, drawn.visible, "visible", VISIBLE_STREAM, VISIBLE_SEEDS),
            augmented(self.infrared, drawn.infrared, "infrared", INFRARED_STREAM, INFRARED_SEEDS),
            torch.from_numpy(labels).to(self.device),
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from `start_step` on; leaving early stops the thread."""
        steps = range(start_step, len(self))
        return _ahead(lambda step: self.batch(epoch, step), steps, self.prefetch, self.device)


class EvalLoader:
    """Delivers images in order as normalised batches, made ahead of time by one thread.

    Args:
        images: (n, H, W, 3) uint8, a memory map or in memory.
        batch_size: Images a batch; the last one may be smaller.
        device: Where batches are wanted.
    """

    def __init__(self, images: np.ndarray, *, batch_size: int, device: torch.device) -> None:
        if batch_size < 1:
            raise ValueError(f"batch size is {batch_size}; expected at least 1")
        self.store = ImageStore(images, device=device, resident=False)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.store) // self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        def make(start: int) -> torch.Tensor:
            stop = min(start + self.batch_size, len(self.store))
            return normalize(self.store.gather(np.arange(start, stop)))

        starts = range(0, len(self.store), self.batch_size)
        return _ahead(make, starts, EVAL_PREFETCH, self.store.device)


def _ahead(make: Callable[[int], T], items: range, depth: int, device: torch.device) -> Iterator[T]:
    """Yields make(item) in order, up to `depth` of them made ahead by a thread of their own.

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
    """Makes the current stream wait for the tensors, and the allocator for the current stream."""
    tensors = vars(result).values() if isinstance(result, Batch) else (result,)
    for tensor in tensors:
        current = torch.cuda.current_stream(tensor.device)
        current.wait_event(event)
        tensor.record_stream(current)
