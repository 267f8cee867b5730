"""Augmentation and normalisation of whole batches, on the device that holds them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch.nn import functional as F

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
    images, pad = images_uint8, augmentation.pad

    def chosen(row: Draw, probability: float) -> torch.Tensor:  # (n, 1, 1, 1) bool
        return _on(images_uint8, draws[row] < probability)[:, None, None, None]

    if modality == "visible" and augmentation.grey > 0:
        images = torch.where(chosen(Draw.GREY, augmentation.grey), _grey(images), images)
    if modality == "visible" and augmentation.channel_aug > 0:
        exchanged = _one_channel(images, draws[Draw.CHANNEL])
        images = torch.where(chosen(Draw.EXCHANGE, augmentation.channel_aug), exchanged, images)
    images = _crop(images, pad, *(draws[[Draw.TOP, Draw.LEFT]] * (2 * pad + 1)).astype(int))
    images = torch.where(chosen(Draw.FLIP, augmentation.flip), images.flip(2), images)
    if augmentation.tone > 0:
        exponents = augmentation.tone * (2 * draws[[Draw.GAMMA, Draw.GAIN]] - 1)  # (2, n)
        gamma, gain = _on(images, np.exp(exponents).astype(np.float32))[..., None, None, None]
        images = ((images / 255) ** gamma * gain).clamp_(max=1) * 255
    batch = normalize(images)
    if augmentation.erase > 0:
        _erase(batch, augmentation, draws)
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
    return torch.from_numpy(values).to(images.device, non_blocking=True)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Returns (n, H, W, 3) images in grey, with Pillow's rounding."""
    luma = (images.int() * _on(images, np.array(LUMA, dtype=np.int32))).sum(-1, keepdim=True)
    return ((luma + (1 << 15)) >> 16).to(torch.uint8).expand(-1, -1, -1, 3)


def _one_channel(images: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """Returns (n, H, W, 3) images three times red, green, blue or grey, as `draws` (n,) say."""
    channels = torch.cat([images, _grey(images)[..., :1]], dim=3)  # (n, H, W, 4)
    chosen = _on(images, (4 * draws).astype(np.int64))[:, None, None, None]
    return channels.take_along_dim(chosen, dim=3).expand(-1, -1, -1, 3)


def _crop(images: torch.Tensor, pad: int, top: np.ndarray, left: np.ndarray) -> torch.Tensor:
    """Cuts an H x W window at (top, left), (n,) each, out of each padded (n, H, W, 3) image."""
    _, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    places = zip(padded, top, left, strict=True)
    return torch.stack([image[y : y + height, x : x + width] for image, y, x in places])


def _erase(batch: torch.Tensor, augmentation: Augmentation, draws: np.ndarray) -> None:
    """Fills a rectangle of some of the normalised images (n, 3, H, W), in place."""
    n, _, height, width = batch.shape
    area = ERASE_AREA[0] + draws[Draw.ERASE_AREA] * (ERASE_AREA[1] - ERASE_AREA[0])
    pixels = area * height * width
    ratio = ERASE_ASPECT ** (2 * draws[Draw.ERASE_ASPECT] - 1)
    tall = np.clip(np.sqrt(pixels * ratio), 1, height).astype(np.int64)
    wide = np.clip(np.sqrt(pixels / ratio), 1, width).astype(np.int64)
    places = (height - tall + 1) * (width - wide + 1)  # one draw picks one of all
    place = (draws[Draw.ERASE_PLACE] * places).astype(np.int64)
    top, left = np.divmod(place, width - wide + 1)
    colours = np.zeros((n, 3))  # the mean, once normalised
    if augmentation.channel_aug > 0:
        colours = 255 * draws[Draw.FILL_RED : Draw.FILL_BLUE + 1].T * SCALE + SHIFT
    colours = _on(batch, colours.astype(np.float32))[:, :, None, None]  # (n, 3, 1, 1)
    for i in np.flatnonzero(draws[Draw.ERASE] < augmentation.erase):
        batch[i, :, top[i] : top[i] + tall[i], left[i] : left[i] + wide[i]] = colours[i]
