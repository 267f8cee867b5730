"""Decoding: an `ImageList` becomes one uint8 array, whatever its images' sizes and formats."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.base import DataError, ImageList

FORMATS = ("BMP", "JPEG", "PNG")  # the only Pillow decoders that are tried
MAX_PIXELS = 50_000_000  # more is taken for a decompression bomb; real crops have under 1 million


def load_images(
    images: ImageList, *, height: int, width: int, workers: int = 4, progress: bool = True
) -> np.ndarray:
    """Decodes images of any size, grey or colour, in threads, and resizes them (Lanczos).

    Returns:
        (n, height, width, 3) uint8 RGB; a memory map where a whole cache is asked for.

    Raises:
        DataError: An image cannot be decoded, or the cache has another size.
    """
    if images.cache is not None:
        return _load_cache(images, height, width)
    n, out = len(images), np.empty((len(images), height, width, 3), dtype=np.uint8)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        decoded = pool.map(lambda index: _decode(images, index, out[index]), range(n))
        hidden = None if progress else True
        for _ in tqdm(decoded, f"decode {images.modality}", n, unit="img", disable=hidden):
            pass  # raises what a thread raised, and cancels the others
    return out


def _decode(images: ImageList, index: int, out: np.ndarray) -> None:
    """Decodes one image into `out` (H, W, 3)."""
    height, width, _ = out.shape
    file = images.root / images.paths[index]
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, over {MAX_PIXELS}")
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode != "L":
                image = image.convert("RGB")
            pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    except Exception as error:  # a damaged image makes Pillow raise nearly anything
        raise DataError(
            f"cannot decode {file}: {error}; expected an intact {', '.join(FORMATS)} image: copy it"
            " again from the data set"
        ) from error
    out[:] = pixels if pixels.ndim == 3 else pixels[:, :, None]


def _load_cache(images: ImageList, height: int, width: int) -> np.ndarray:
    """Opens what `pre_process_sysu.py` wrote."""
    cache = np.load(images.cache, mmap_mode="c", allow_pickle=False)  # changes are not written
    if cache.shape[1:] != (height, width, 3):
        raise DataError(
            f"{images.cache} holds images of {cache.shape[1]} x {cache.shape[2]} (H x W), and"
            f" {height} x {width} are asked for. Rebuild: python pre_process_sysu.py --data-path"
            f" {images.root} --overwrite --img_h {height} --img_w {width}; or pass"
            f" --img_h {cache.shape[1]} --img_w {cache.shape[2]}"
        )
    return cache if images.cache_rows is None else np.asarray(cache[images.cache_rows])


class ImageCache:
    """Decodes an image list once and keeps the two lists used last: queries and gallery."""

    def __init__(
        self, height: int, width: int, *, workers: int = 4, progress: bool = False
    ) -> None:
        self._settings = {"height": height, "width": width, "workers": workers}
        self._settings["progress"] = progress
        self._held: dict[tuple, np.ndarray] = {}

    def __call__(self, images: ImageList) -> np.ndarray:
        """Returns the list's images, (n, H, W, 3) uint8."""
        rows = None if images.cache_rows is None else images.cache_rows.tobytes()
        key = (images.root, images.paths, images.cache, rows)
        found = self._held.pop(key, None)
        self._held = dict(list(self._held.items())[-1:])  # the other one; the last is the newest
        self._held[key] = load_images(images, **self._settings) if found is None else found
        return self._held[key]
