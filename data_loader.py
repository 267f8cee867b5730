"""Images into batches: decode once, keep uint8, assemble and augment whole batches on the device.

Every random draw is a function of (seed, epoch, step), so that a run can be resumed at any epoch
and prefetching changes nothing.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from datasets.transforms import Augmentation, Draw, augment, normalize, transform_each

PREFETCH = 2  # batches made ahead
RESIDENT_FRACTION = 0.05  # of the device's memory, up to which "auto" keeps a store there
# The last word of (seed, epoch, step, stream): one stream of random numbers for each purpose.
SAMPLER_STREAM = 0
AUGMENT_STREAMS = {"visible": 1, "infrared": 2}
TRANSFORM_STREAMS = {"visible": 5, "infrared": 6}  # 3: the order of stripes, in engine.train


class IdentityBatch(NamedTuple):
    """Rows of one batch: (P*K,) int64 each, P blocks of K, in one identity order."""

    visible: np.ndarray
    infrared: np.ndarray
    labels: np.ndarray


@dataclass(eq=False)
class IdentitySampler:
    """Draws P identities without replacement, then K images of each per modality with replacement.

    Raises:
        ValueError: Fewer than P identities.

    Source: the AGW code base; floor(max(#visible, #infrared) / (P*K)) + 1 steps make an epoch.
    """

    visible_labels: np.ndarray  # (n_v,) integers 0..L-1, each at least once
    infrared_labels: np.ndarray  # (n_i,) the same
    ids_per_batch: int  # P
    images_per_id: int  # K
    seed: int

    def __post_init__(self) -> None:
        both = self.visible_labels, self.infrared_labels
        self.num_ids = 1 + max(labels.max() for labels in both)
        if self.num_ids < self.ids_per_batch:
            raise ValueError(
                f"a batch asks for {self.ids_per_batch} identities and there are {self.num_ids};"
                f" lower --batch-size to {self.num_ids} or less"
            )
        self._rows_of = [  # each label's rows, by modality
            [np.flatnonzero(labels == label) for label in range(self.num_ids)] for labels in both
        ]
        rows = self.ids_per_batch * self.images_per_id
        self.steps_per_epoch = max(map(len, both)) // rows + 1

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
        drawn = []
        for rows_of in self._rows_of:
            rows = [rows_of[label] for label in ids]  # P arrays
            numbers = rng.integers([[len(own)] for own in rows], size=shape)  # (P, K)
            drawn.append(np.concatenate([own[n] for own, n in zip(rows, numbers, strict=True)]))
        return IdentityBatch(*drawn, np.repeat(ids, self.images_per_id))


class ImageStore:
    """(n, H, W, 3) uint8 images, kept on a CUDA device whole or copied there batch by batch.

    `resident` is "on", "off" or "auto": on the device if small against its memory.
    """

    def __init__(self, images: np.ndarray, device: torch.device, *, resident: str = "auto") -> None:
        self.device, self._images = device, torch.from_numpy(images)
        if device.type == "cuda":
            small = images.nbytes <= RESIDENT_FRACTION * torch.cuda.mem_get_info(device)[1]
            if resident == "on" or (resident == "auto" and small):
                self._images = self._images.to(device)

    def gather(self, rows: np.ndarray) -> torch.Tensor:
        """Returns the images at `rows` ((m,) integers): (m, H, W, 3) uint8 on the device."""
        chosen = _copy_to(self._images.device, torch.from_numpy(rows))
        return _copy_to(self.device, self._images.index_select(0, chosen))


def _copy_to(device: torch.device, batch: torch.Tensor) -> torch.Tensor:
    if device.type == "cuda" and not batch.is_cuda:
        batch = batch.pin_memory()  # or the copy would wait for the training steps before it
    return batch.to(device, non_blocking=True)


class Batch(NamedTuple):
    """One training step's input; with several processes P is a process's part of the identities."""

    visible: torch.Tensor  # (P*K, 3, H, W) float32
    infrared: torch.Tensor  # (P*K, 3, H, W) float32, the same identities in the same order
    labels: torch.Tensor  # (2*P*K,) int64, visible rows first


@dataclass(eq=False, kw_only=True)
class TrainLoader:
    """Delivers augmented batches of both modalities, made ahead of time by one thread."""

    visible: ImageStore
    infrared: ImageStore
    sampler: IdentitySampler
    augmentation: Augmentation
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None  # before it: `transform_each`
    rank: int = 0  # of `world_size` processes, which divide the identities of a batch
    world_size: int = 1

    def __post_init__(self) -> None:
        self._rows = self.sampler.rows_of_rank(self.rank, self.world_size)

    def __len__(self) -> int:
        return self.sampler.steps_per_epoch

    def batch(self, epoch: int, step: int) -> Batch:
        """Makes one batch, a function of (seed, epoch, step)."""
        drawn = self.sampler.batch(epoch, step)
        visible = self._augmented("visible", drawn.visible, epoch, step)
        infrared = self._augmented("infrared", drawn.infrared, epoch, step)
        labels = torch.from_numpy(np.tile(drawn.labels[self._rows], 2))
        return Batch(visible, infrared, _copy_to(self.visible.device, labels))

    def _augmented(self, modality: str, rows: np.ndarray, epoch: int, step: int) -> torch.Tensor:
        """Returns this process's images of a batch; draws random numbers for the whole batch."""
        images, seed = getattr(self, modality).gather(rows[self._rows]), self.sampler.seed
        if self.transform is not None:
            rng = np.random.default_rng((seed, epoch, step, TRANSFORM_STREAMS[modality]))
            seeds = rng.integers(2**63, size=len(rows))[self._rows]
            images = transform_each(images, self.transform, seeds.tolist())
        rng = np.random.default_rng((seed, epoch, step, AUGMENT_STREAMS[modality]))
        draws = rng.random((len(Draw), len(rows)))[:, self._rows]
        return augment(images, self.augmentation, draws, modality=modality)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yields the batches of an epoch; closing the iterator early stops the thread."""
        device, queue = self.visible.device, deque()
        on_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else ()
        pool = ThreadPoolExecutor(1, "batches", *on_device)
        try:
            for step in range(len(self)):
                queue.append(pool.submit(self.batch, epoch, step))
                if len(queue) > PREFETCH:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class EvalLoader:
    """Delivers (n, H, W, 3) uint8 images in order as normalised batches."""

    def __init__(self, images: np.ndarray, *, batch_size: int, device: torch.device) -> None:
        self.batches, self.device = torch.from_numpy(images).split(batch_size), device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self.batches:
            yield normalize(_copy_to(self.device, batch))
