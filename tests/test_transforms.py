"""Tests of datasets/transforms.py: each transform against Pillow or torchvision."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from datasets.transforms import Augmentation, Draw, augment, normalize, transform_each

CPU = torch.device("cpu")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def noise(n, height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def draws(n, seed=0):
    return np.random.default_rng(seed).random((len(Draw), n))


def reference(pixels):
    """torchvision's to-tensor and normalise of one (H, W, 3) image."""
    return tv.normalize(tv.to_dtype(tv.to_image(pixels), torch.float32, scale=True), MEAN, STD)


def candidates(pixels, pad):
    """Every (top, left, flip) of torchvision's pad, crop, flip and normalise of one image."""
    height, width, _ = pixels.shape
    padded = tv.pad(tv.to_image(pixels), [pad] * 4, fill=0)
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = tv.crop(padded, top, left, height, width)
            for flip in (False, True):
                image = tv.horizontal_flip(crop) if flip else crop
                yield (top, left, flip), reference(image.permute(1, 2, 0).numpy())


def test_each_image_is_padded_cropped_flipped_and_normalised_like_torchvision():
    pad, n = 2, 400
    originals = noise(4, 9, 6)
    images = torch.from_numpy(originals).repeat(n // 4, 1, 1, 1)
    out = augment(images, Augmentation(pad=pad), draws(n, 1), modality="visible")
    assert out.shape == (n, 3, 9, 6) and out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    tables = [list(candidates(pixels, pad)) for pixels in originals]
    seen = []
    for i, image in enumerate(out):
        hits = [
            key for key, expected in tables[i % 4] if torch.allclose(image, expected, atol=1e-5)
        ]
        assert len(hits) == 1
        seen += hits
    places = [key[:2] for key in seen]
    assert len(set(places)) == 25  # each is expected 16 times
    assert max(places.count(place) for place in set(places)) < 40
    for axis in (0, 1):  # flips do not depend on the place: 80 images share each top and each left
        for place in range(5):
            assert 20 < sum(key[2] for key in seen if key[axis] == place) < 60
    assert torch.equal(images[:4], torch.from_numpy(originals))  # the input is untouched


@pytest.mark.parametrize(("flip", "pad"), [(0.0, 0), (1.0, 0), (0.0, 10)])
def test_the_ends_of_the_ranges(flip, pad):
    pixels = noise(6, 5, 4)
    images = torch.from_numpy(pixels)
    out = augment(images, Augmentation(pad, flip), draws(6), modality="infrared")
    if pad == 0:
        expected = pixels[:, :, ::-1] if flip else pixels
        assert torch.equal(out, normalize(torch.from_numpy(expected.copy())))
    else:  # more padding than image: black in most places, and nowhere anything but pixels or black
        black = normalize(torch.zeros(1, 5, 4, 3, dtype=torch.uint8))
        assert (out == black).all(dim=1).float().mean() > 0.5


def test_normalize_equals_torchvision():
    pixels = noise(3, 7, 5)
    out = normalize(torch.from_numpy(pixels))
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == torch.float32
    for image, expected in zip(out, pixels, strict=True):
        torch.testing.assert_close(image, reference(expected), atol=2e-6, rtol=0)


def test_grey_equals_pillow_and_spares_infrared():
    pixels = noise(400, 6, 4)
    images = torch.from_numpy(pixels)
    grey = np.stack([np.asarray(Image.fromarray(p).convert("L").convert("RGB")) for p in pixels])
    always = Augmentation(pad=0, flip=0, grey=1)

    def run(augmentation, modality):
        return augment(images, augmentation, draws(400), modality=modality)

    assert torch.equal(run(always, "visible"), normalize(torch.from_numpy(grey)))
    assert torch.equal(run(always, "infrared"), normalize(images))
    half = run(replace(always, grey=0.5), "visible")
    is_grey = (half == normalize(torch.from_numpy(grey))).flatten(1).all(1)
    is_plain = (half == normalize(images)).flatten(1).all(1)
    assert (is_grey ^ is_plain).all()
    assert 150 < is_grey.sum() < 250
    assert torch.equal(images, torch.from_numpy(pixels))


def test_switching_one_augmentation_on_leaves_the_other_draws_alone():
    images = torch.from_numpy(noise(50, 8, 6))

    def run(**options):
        augmentation = Augmentation(pad=2, **options)
        return augment(images, augmentation, draws(50, 3), modality="infrared")

    assert torch.equal(run(), run(grey=1.0))
    assert torch.equal(run(), run(channel_aug=1.0))
    erased, plain = run(erase=1.0), run()
    assert torch.equal(torch.where(erased == 0, plain, erased), plain)


def test_erase_blanks_one_rectangle_of_legal_size():
    images = torch.full((300, 40, 20, 3), 255, dtype=torch.uint8)
    augmentation = Augmentation(pad=0, flip=0, erase=0.5)
    out = augment(images, augmentation, draws(300), modality="visible")
    gone = (out == 0).all(1)
    assert torch.equal((out == 0).any(1), gone)
    erased = gone.flatten(1).any(1)
    assert 110 < erased.sum() < 190
    tops, lefts, areas = set(), set(), []
    for mask in gone[erased]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == len(rows) * len(columns)  # a full rectangle
        assert rows[-1] - rows[0] + 1 == len(rows) and columns[-1] - columns[0] + 1 == len(columns)
        assert 0.005 * 800 < mask.sum() <= 0.4 * 800
        tops.add(int(rows[0]))
        lefts.add(int(columns[0]))
        areas.append(int(mask.sum()) / 800)
    assert len(tops) > 15 and len(lefts) > 8
    assert 0.17 < np.mean(areas) < 0.23  # uniform over 0.02..0.4, however rarely one is erased


def test_channel_augmentation_gives_one_channel_or_grey_and_spares_infrared():
    pixels = noise(1000, 6, 4)
    images = torch.from_numpy(pixels)

    def run(p, modality="visible"):
        return augment(
            images, Augmentation(pad=0, flip=0, channel_aug=p), draws(1000), modality=modality
        )

    kinds = [np.repeat(pixels[..., c : c + 1], 3, axis=3) for c in range(3)]
    kinds += [
        np.stack([np.asarray(Image.fromarray(p).convert("L").convert("RGB")) for p in pixels])
    ]
    kinds += [pixels]
    found = run(0.8)
    hits = np.array([(found == normalize(torch.from_numpy(k))).flatten(1).all(1) for k in kinds])
    assert (hits.sum(axis=0) == 1).all()
    assert (abs(hits.sum(axis=1) - 200) < 50).all()  # red, green, blue, grey, as it was
    assert torch.equal(run(1, "infrared"), normalize(images))
    assert torch.equal(run(0), normalize(images))
    assert torch.equal(images, torch.from_numpy(pixels))


@pytest.mark.parametrize("modality", ["visible", "infrared"])
def test_with_channel_augmentation_erased_channels_get_a_random_value_each(modality):
    images = torch.from_numpy(noise(200, 20, 10))
    settings = {"pad": 2, "erase": 1.0}
    where = augment(images, Augmentation(**settings), draws(200), modality=modality) == 0
    found = augment(
        images, Augmentation(**settings, channel_aug=1e-9), draws(200), modality=modality
    )
    values = []
    for mask, image in zip(where.all(1), found, strict=True):
        inside = image[:, mask]
        assert torch.equal(inside, inside[:, :1].expand_as(inside))
        values.append(inside[:, 0] * torch.tensor(STD) + torch.tensor(MEAN))
    values = torch.stack(values)
    assert values.min() > -1e-6 and values.max() < 1 + 1e-6
    assert (abs(values.mean(0) - 0.5) < 0.07).all() and len(values.unique()) > 590


def test_tone_is_one_monotone_curve_per_image_and_keeps_black():
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(200, 1, 1, 3)
    augmentation = Augmentation(pad=0, flip=0, tone=0.4)
    out = augment(ramp, augmentation, draws(200), modality="infrared")
    curve = (out * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).flatten(2)
    assert torch.allclose(curve[:, 0], curve[:, 1], atol=1e-5)
    assert abs(curve[..., 0]).max() < 1e-6
    assert curve.max() < 1 + 1e-5 and (curve.diff() > -1e-5).all()
    x = torch.arange(256) / 255
    assert len({round(float(c), 3) for c in curve[:, 0, 128]}) > 100
    low, high = (x**g * k for g, k in ((np.exp(0.4), np.exp(-0.4)), (np.exp(-0.4), np.exp(0.4))))
    assert (curve >= low - 1e-5).all() and (curve <= high.clamp(max=1) + 1e-5).all()


JITTER = v2.Compose([v2.ColorJitter(brightness=0.5, hue=0.3), v2.RandomGrayscale(0.5)])


def test_a_transform_of_torchvision_draws_from_each_images_seed_alone():
    pixels = torch.from_numpy(noise(5, 8, 6))
    state = torch.get_rng_state()
    found = transform_each(pixels, JITTER, range(5))
    assert found.shape == pixels.shape and found.dtype == torch.uint8
    assert torch.equal(torch.get_rng_state(), state)
    for i in range(5):
        torch.manual_seed(i)
        assert torch.equal(found[i], JITTER(pixels[i].permute(2, 0, 1)).permute(1, 2, 0))
    assert torch.equal(transform_each(pixels[3:], JITTER, [3, 4]), found[3:])
    assert not torch.equal(transform_each(pixels, JITTER, range(1, 6)), found)


@pytest.mark.parametrize(
    "transform", [v2.Resize((4, 3)), v2.ToDtype(torch.float32), v2.Grayscale()]
)
def test_a_transform_must_keep_shape_and_type(transform):
    with pytest.raises(ValueError, match="expected the same type and shape"):
        transform_each(torch.from_numpy(noise(2, 8, 6)), transform, [0, 1])
