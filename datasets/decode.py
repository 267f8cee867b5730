"""Decoding: an `ImageList` becomes one uint8 array, whatever its images' sizes and formats."""

import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.base import DataError, ImageList

log = logging.getLogger(__name__)

# The only decoders that Pillow tries, by a file's first bytes; of several frames the first is read.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
PERCENTILES = (1, 99)  # of a deep grey image, such as a thermal camera's counts: black and white


def load_images(
    images: ImageList, *, height: int, width: int, workers: int = 4, progress: bool = True
) -> np.ndarray:
    """Decodes images of any size, grey or colour, in threads, and resizes them (Lanczos).

    Grey of more than 8 bits is stretched between two percentiles of each image.

    Returns:
        (n, height, width, 3) uint8 RGB; the list's own `pixels` where it has them.

    Raises:
        DataError: An image cannot be decoded, or the `pixels` have another size.
    """
    if images.pixels is not None:
        found = images.pixels.shape[1:3]
        if found != (height, width):
            raise DataError(
                f"the {images.modality} cache in {images.root} holds images of {found[0]} x"
                f" {found[1]} (H x W), not {height} x {width}. Rebuild: python pre_process_sysu.py"
                f" --data-path {images.root} --overwrite --img_h {height} --img_w {width}"
            )
        return images.pixels
    files, hidden = [images.root / path for path in images.paths], None if progress else True
    out = np.empty((len(files), height, width, 3), dtype=np.uint8)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        decoded = pool.map(_decode, files, out)  # raises what a thread raised, cancels the others
        text = f"decode {images.modality}"
        deep = sum(tqdm(decoded, text, len(files), unit="img", disable=hidden))
    if deep:
        log.warning(
            "%d of %d images of %s have more than 8 bits of grey: each is stretched from its "
            "percentile %d (black) to its percentile %d (white)",
            *(deep, len(files), images.root, *PERCENTILES),
        )
    return out


def _decode(file: Path, out: np.ndarray) -> bool:
    """Decodes one image into `out` (H, W, 3); returns whether its grey was stretched."""
    height, width, _ = out.shape
    try:
        with Image.open(file, formats=FORMATS) as image:
            deep = image.mode.startswith(("I", "F"))  # which Pillow would clip at 255
            if deep:
                counts = np.nan_to_num(np.asarray(image, dtype=np.float64))
                black, white = np.percentile(counts, PERCENTILES)
                grey = (counts - black) / max(white - black, np.finfo(float).eps)
                image = Image.fromarray(np.uint8(255 * grey.clip(0, 1)))
            image = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            out[:] = np.asarray(image)
    except Exception as error:  # a damaged image makes Pillow raise nearly anything
        formats = ", ".join(FORMATS)
        raise DataError(
            f"cannot decode {file}: {error}; expected an intact {formats} image: copy it again"
        ) from error
    return deep


class ImageCache:
    """Decodes an image list once and keeps the two lists used last: queries and gallery."""

    def __init__(
        self, height: int, width: int, *, workers: int = 4, progress: bool = False
    ) -> None:
        how = {"height": height, "width": width, "workers": workers, "progress": progress}
        self._load = functools.lru_cache(maxsize=2)(functools.partial(load_images, **how))

    def __call__(self, images: ImageList) -> np.ndarray:
        """Returns the list's images, (n, H, W, 3) uint8."""
        return self._load(images)
