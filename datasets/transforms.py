"""What happens to a batch of images before the network sees it, on whatever device it lies.

The random numbers come in from outside; each image of a batch has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the pretraining images, RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
SCALE = (1 / (255 * np.array(IMAGENET_STD))).astype(np.float32)
SHIFT = (-np.array(IMAGENET_MEAN) / np.array(IMAGENET_STD)).astype(np.float32)
LUMA = (19595, 38470, 7471)  # ITU-R 601 weights in 1/65536, as Pillow's conversion to grey
ERASE_AREA = (0.02, 0.4)  # fractions of the image, as torchvision's RandomErasing and its paper
ERASE_ASPECT = 3.3  # height over width between 1 / 3.3 and 3.3


# What each row of an array of uniform random numbers decides; its columns are images.
Draw = IntEnum(
    "Draw",
    "TOP LEFT FLIP GREY GAMMA GAIN ERASE ERASE_ASPECT ERASE_PLACE ERASE_AREA "  # TOP of the crop
    "EXCHANGE CHANNEL FILL_RED FILL_GREEN FILL_BLUE",  # the former rows' numbers stay as they were
    start=0,
)


@dataclass(frozen=True)
class Augmentation:
    """The train transform: pad with black, crop back to the image's size, flip, normalise.

    Source: the AGW code base for pad and flip; the others are off by default: channel exchange and
    channel-level erasing follow CAJ (Ye et al., ICCV 2021), the rest is this project's.
    """

    pad: int = 10  # pixels of black on every side before the crop
    flip: float = 0.5  # probability of a horizontal flip
    grey: float = 0.0  # probability that a visible image is made grey
    erase: float = 0.0  # probability that a rectangle is set to the ImageNet mean, or see below
    tone: float = 0.0  # s > 0 draws a gamma and a gain in exp(-s)..exp(s) for each image
    # Probability that a visible image is made its red, green or blue channel, or grey, each as
    # likely. Above 0, erased rectangles get a random value in each channel instead.
    channel_aug: float = 0.0


def augment(
    images_uint8: torch.Tensor, augmentation: Augmentation, draws: np.ndarray, *, modality: str
) -> torch.Tensor:
    """Augments a batch (n, H, W, 3), each image on its own, and normalises it.

    `draws` (len(Draw), n) are uniform random numbers in [0, 1). Returns (n, 3, H, W) float32 on the
    same device, channels_last in memory.
    """
    offsets = 2 * augmentation.pad + 1
    top, left = (draws[[Draw.TOP, Draw.LEFT]] * offsets).astype(np.int64)
    flipped = np.flatnonzero(draws[Draw.FLIP] < augmentation.flip)
    images = images_uint8
    if modality == "visible" and augmentation.grey > 0:
        images = _grey(images, np.flatnonzero(draws[Draw.GREY] < augmentation.grey))
    if modality == "visible" and augmentation.channel_aug > 0:
        chosen = np.flatnonzero(draws[Draw.EXCHANGE] < augmentation.channel_aug)
        images = _exchange(images, chosen, (4 * draws[Draw.CHANNEL, chosen]).astype(np.int64))
    images = _crop_and_flip(images, augmentation.pad, top, left, flipped)
    if augmentation.tone > 0:
        tone = (2 * draws[[Draw.GAMMA, Draw.GAIN]] - 1) * augmentation.tone
        images = _tone(images, np.exp(tone))
    batch = normalize(images)
    if augmentation.erase > 0:
        chosen = np.flatnonzero(draws[Draw.ERASE] < augmentation.erase)
        fills = np.zeros((3, len(chosen)), np.float32)  # the mean, once normalised
        if augmentation.channel_aug > 0:
            values = 255 * draws[Draw.FILL_RED : Draw.FILL_BLUE + 1, chosen]
            fills = (values * SCALE[:, None] + SHIFT[:, None]).astype(np.float32)
        _erase(batch, chosen, draws[:, chosen], fills)
    return batch


def transform_each(
    images_uint8: torch.Tensor,
    transform: Callable[[torch.Tensor], torch.Tensor],
    seeds: Sequence[int],
) -> torch.Tensor:
    """Applies a transform that draws its own random numbers, such as one of torchvision's v2.

    It maps one image, (3, H, W) uint8, to another, each with a seed of its own for torch's CPU
    generator. From (n, H, W, 3) to the same.

    Raises:
        ValueError: The transform returns another shape or type.
    """
    results = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images_uint8.permute(0, 3, 1, 2), seeds, strict=True):
            torch.default_generator.manual_seed(seed)
            result = transform(image)
            if result.shape != image.shape or result.dtype != torch.uint8:
                raise ValueError(
                    f"the transform made {result.dtype} {tuple(result.shape)} of a uint8 image"
                    f" {tuple(image.shape)}; expected the same type and shape"
                )
            results.append(result)
    return torch.stack(results).permute(0, 2, 3, 1)


def normalize(images_uint8: torch.Tensor) -> torch.Tensor:
    """Normalises (n, H, W, 3), 0..255, with ImageNet's statistics: the evaluation transform.

    Returns (n, 3, H, W) float32 on the same device, channels_last in memory.
    """
    scale, shift = _on(images_uint8, SCALE), _on(images_uint8, SHIFT)  # (3,)
    return (images_uint8.float() * scale + shift).permute(0, 3, 1, 2)


def _on(images: torch.Tensor, values: np.ndarray) -> torch.Tensor:
    """Returns a few numbers on the images' device."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(images.device, non_blocking=True)


def _grey(images: torch.Tensor, chosen: np.ndarray) -> torch.Tensor:
    """Returns (n, H, W, 3) images of which the `chosen` (k,) are grey, with Pillow's rounding."""
    rows = _on(images, chosen)
    luma = (images[rows].int() * _on(images, np.array(LUMA, dtype=np.int32))).sum(-1, keepdim=True)
    grey = (luma + (1 << 15)) >> 16  # (k, H, W, 1)
    return images.index_copy(0, rows, grey.to(torch.uint8).expand(-1, -1, -1, 3))


def _exchange(images: torch.Tensor, chosen: np.ndarray, kinds: np.ndarray) -> torch.Tensor:
    """Returns (n, H, W, 3) images of which `chosen` (k,) are one channel (0 to 2), or grey (3)."""
    images = _grey(images, chosen[kinds == 3])
    rows, channels = _on(images, chosen[kinds < 3]), _on(images, kinds[kinds < 3])
    single = images[rows, :, :, channels].unsqueeze(3)  # (k', H, W, 1)
    return images.index_copy(0, rows, single.expand(-1, -1, -1, 3))


def _crop_and_flip(
    images: torch.Tensor, pad: int, top: np.ndarray, left: np.ndarray, flipped: np.ndarray
) -> torch.Tensor:
    """Cuts an H x W window at (top, left), (n,) each, out of each padded image; mirrors some."""
    n, height, width, channels = images.shape
    padded = images.new_zeros((n, height + 2 * pad, width + 2 * pad, channels))
    padded[:, pad : pad + height, pad : pad + width] = images
    # (n, 2 pad + 1, 2 pad + 1, C, H, W), a view
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)
    at = _on(images, np.stack([np.arange(n), top, left]))
    crops = windows.permute(0, 1, 2, 4, 5, 3)[at[0], at[1], at[2]]  # (n, H, W, C)
    rows = _on(images, flipped)
    return crops.index_copy_(0, rows, crops[rows].flip(2))


def _tone(images: torch.Tensor, exponents: np.ndarray) -> torch.Tensor:
    """Applies gain * (x / 255) ** gamma; `exponents` (2, n) holds gammas and gains; black stays."""
    gamma, gain = _on(images, exponents.astype(np.float32))[:, :, None, None, None]
    return ((images / 255) ** gamma * gain).clamp_(max=1) * 255


def _erase(batch: torch.Tensor, chosen: np.ndarray, draws: np.ndarray, fills: np.ndarray) -> None:
    """Fills a rectangle of each `chosen` (k,) image in place; `draws`, `fills` have k columns."""
    _, _, height, width = batch.shape
    area = ERASE_AREA[0] + draws[Draw.ERASE_AREA] * (ERASE_AREA[1] - ERASE_AREA[0])
    pixels = area * height * width
    ratio = np.exp((2 * draws[Draw.ERASE_ASPECT] - 1) * math.log(ERASE_ASPECT))
    tall = np.clip(np.sqrt(pixels * ratio), 1, height).astype(np.int64)
    wide = np.clip(np.sqrt(pixels / ratio), 1, width).astype(np.int64)
    places = (height - tall + 1) * (width - wide + 1)  # one draw picks one of all
    place = (draws[Draw.ERASE_PLACE] * places).astype(np.int64)
    top, left = np.divmod(place, width - wide + 1)
    colours = _on(batch, fills.T)[:, :, None, None]  # (k, 3, 1, 1)
    for row, y, x, h, w, colour in zip(chosen, top, left, tall, wide, colours, strict=True):
        batch[row, :, y : y + h, x : x + w] = colour
