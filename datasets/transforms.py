"""What happens to a batch of images before the network sees it, on whatever device it lies.

The random numbers come in from outside; each image of a batch has its own.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the pretraining images, RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
SCALE = (1 / (255 * np.array(IMAGENET_STD))).astype(np.float32)
SHIFT = (-np.array(IMAGENET_MEAN) / np.array(IMAGENET_STD)).astype(np.float32)
LUMA = (19595, 38470, 7471)  # ITU-R 601 weights in 1/65536, as Pillow's conversion to grey
ERASE_AREA = (0.02, 0.4)  # share of the image, as torchvision's RandomErasing and its paper
ERASE_ASPECT = 3.3  # height over width between 1 / 3.3 and 3.3


@dataclass(frozen=True)
class Augmentation:
    """The train transform: pad with black, crop back to the image's size, flip, normalise.

    Attributes:
        pad: pixels of black on every side before the crop.
        flip: probability of a horizontal flip.
        grey: probability that a visible image is made grey.
        erase: probability that a rectangle (2 to 40 % of the area) is set to the ImageNet mean.
        tone: s > 0 draws a gamma and a gain in exp(-s)..exp(s) for each image.

    Source: the AGW code base for pad and flip; the others are this project's and off by default.
    """

    pad: int = 10
    flip: float = 0.5
    grey: float = 0.0
    erase: float = 0.0
    tone: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.pad < 0 or self.tone < 0:
            raise ValueError(f"pad is {self.pad}, tone {self.tone}; expected at least 0")
        for name in ("flip", "grey", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a probability")


def augment(
    images_uint8: torch.Tensor,
    augmentation: Augmentation,
    rng: np.random.Generator,
    *,
    modality: str,
    first: int = 0,
    total: int | None = None,
) -> torch.Tensor:
    """Augment a batch, each image on its own, and normalise it.

    Args:
        images_uint8: (n, H, W, 3) uint8.
        augmentation: what to do.
        rng: total x 9 uniform numbers are drawn from it, whatever is switched on.
        modality: "visible" or "infrared" (never made grey).
        first: number of the first image within the whole batch, of which these may be a share.
        total: images in the whole batch (None: n).

    Returns:
        (n, 3, H, W) float32 on the same device, channels_last in memory.
    """
    count = len(images_uint8)
    draws = rng.random((9, total or count))[:, first : first + count]
    side = 2 * augmentation.pad + 1
    top, left = (draws[:2] * side).astype(np.int64)
    flipped = np.flatnonzero(draws[2] < augmentation.flip)
    images = images_uint8
    if modality == "visible" and augmentation.grey > 0:
        images = _grey(images, np.flatnonzero(draws[3] < augmentation.grey))
    images = _crop_and_flip(images, augmentation.pad, top, left, flipped)
    if augmentation.tone > 0:
        images = _tone(images, np.exp((2 * draws[4:6] - 1) * augmentation.tone))
    batch = normalize(images)
    if augmentation.erase > 0:
        chosen = np.flatnonzero(draws[6] < augmentation.erase)
        _erase(batch, chosen, *draws[6:9, chosen])
    return batch


def normalize(images_uint8: torch.Tensor) -> torch.Tensor:
    """Normalise with ImageNet's statistics, nothing else: the evaluation transform.

    Args:
        images_uint8: (n, H, W, 3), 0..255.

    Returns:
        (n, 3, H, W) float32 on the same device, channels_last in memory.
    """
    n, height, width, _ = images_uint8.shape
    # Whole rows at once: broadcasting over three channels alone is several times slower on a CPU.
    scale, shift = (_on(images_uint8, np.tile(values, width)) for values in (SCALE, SHIFT))
    rows = images_uint8.reshape(n, height, width * 3).to(torch.float32, copy=True)
    return rows.mul_(scale).add_(shift).view(n, height, width, 3).permute(0, 3, 1, 2)


def _on(images: torch.Tensor, values: np.ndarray) -> torch.Tensor:
    """Bring a few numbers to the images' device."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(images.device, non_blocking=True)


def _grey(images: torch.Tensor, chosen: np.ndarray) -> torch.Tensor:
    """Return a copy in which the `chosen` images are grey, with Pillow's rounding."""
    rows = _on(images, chosen)
    luma = (images[rows].int() * _on(images, np.array(LUMA, dtype=np.int32))).sum(-1, keepdim=True)
    grey = (luma + (1 << 15)) >> 16
    return images.index_copy(0, rows, grey.to(torch.uint8).expand(-1, -1, -1, 3))


def _crop_and_flip(
    images: torch.Tensor, pad: int, top: np.ndarray, left: np.ndarray, flipped: np.ndarray
) -> torch.Tensor:
    """Cut an H x W window at (top, left) out of each padded image; mirror the `flipped` ones."""
    n, height, width, channels = images.shape
    padded = images.new_zeros((n, height + 2 * pad, width + 2 * pad, channels))
    padded[:, pad : pad + height, pad : pad + width] = images
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # (n, side, side, C, H, W), a view
    at = _on(images, np.stack([np.arange(n), top, left]))
    crops = windows.permute(0, 1, 2, 4, 5, 3)[at[0], at[1], at[2]]  # (n, H, W, C)
    rows = _on(images, flipped)
    return crops.index_copy_(0, rows, crops[rows].flip(2))


def _tone(images: torch.Tensor, exponents: np.ndarray) -> torch.Tensor:
    """Apply gain * (x / 255) ** gamma; `exponents` (2, n) holds gammas and gains; black stays."""
    gamma, gain = _on(images, exponents.astype(np.float32))[:, :, None, None, None]
    return ((images / 255) ** gamma * gain).clamp_(max=1) * 255


def _erase(
    batch: torch.Tensor, chosen: np.ndarray, area: np.ndarray, aspect: np.ndarray, place: np.ndarray
) -> None:
    """Set a rectangle of each `chosen` image to zero, in place; one draw in [0, 1) per image."""
    _, _, height, width = batch.shape
    pixels = (ERASE_AREA[0] + area * (ERASE_AREA[1] - ERASE_AREA[0])) * height * width
    ratio = np.exp((2 * aspect - 1) * math.log(ERASE_ASPECT))
    tall = np.clip(np.sqrt(pixels * ratio), 1, height).astype(np.int64)
    wide = np.clip(np.sqrt(pixels / ratio), 1, width).astype(np.int64)
    spots = (height - tall + 1) * (width - wide + 1)  # one draw picks one of all places
    top, left = np.divmod((place * spots).astype(np.int64), width - wide + 1)
    y, x = np.arange(height), np.arange(width)
    rows = (y >= top[:, None]) & (y < (top + tall)[:, None])
    columns = (x >= left[:, None]) & (x < (left + wide)[:, None])
    inside = _on(batch, rows)[:, None, :, None] & _on(batch, columns)[:, None, None, :]
    at = _on(batch, chosen)
    batch[at] = batch[at].masked_fill(inside, 0)
