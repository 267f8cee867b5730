import gc
import io
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import save_image
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import data_loader
from data_loader import (
    EvalLoader,
    IdentitySampler,
    ImageStore,
    TrainLoader,
)
from data_manager import DataError, ImageList, train_set
from datasets import decode
from datasets.decode import ImageCache, load_images
from datasets.transforms import Augmentation, Draw, augment, normalize

CPU = torch.device("cpu")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def image_list(root, *names, **more):
    zeros = np.zeros(len(names), dtype=np.int64)
    return ImageList(root, names, zeros, zeros, "visible", **more)


def noise(n, height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def reference(pixels):
    """torchvision's to-tensor and normalise of one (H, W, 3) image."""
    return tv.normalize(tv.to_dtype(tv.to_image(pixels), torch.float32, scale=True), MEAN, STD)


# --- Decoding -------------------------------------------------------------------------------------


def test_images_of_any_size_equal_pillow_one_by_one(tmp_path):
    sizes = [(64, 128), (144, 288), (7, 5), (1, 1), (300, 20), (48, 96)]
    names = [f"{i}.{'jpg' if i % 2 else 'bmp'}" for i in range(len(sizes))]
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        save_image(tmp_path / name, i, size)
    found = load_images(image_list(tmp_path, *names), height=96, width=48, progress=False)
    assert found.shape == (6, 96, 48, 3) and found.dtype == np.uint8
    for name, pixels in zip(names, found, strict=True):
        image = (
            Image.open(tmp_path / name).convert("RGB").resize((48, 96), Image.Resampling.LANCZOS)
        )
        assert np.array_equal(pixels, np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_grey_and_other_modes_become_rgb(tmp_path, mode):
    name = "a.jpg" if mode == "CMYK" else "a.png"
    Image.fromarray(noise(1, 20, 10)[0]).convert(mode).save(tmp_path / name)
    (found,) = load_images(image_list(tmp_path, name), height=40, width=20, progress=False)
    image = Image.open(tmp_path / name).convert("RGB").resize((20, 40), Image.Resampling.LANCZOS)
    assert np.array_equal(found, np.asarray(image))


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", np.uint16), ("a.tif", np.uint16), ("b.tif", np.float32)]
)
def test_deep_grey_is_stretched_between_percentiles_and_that_is_said(tmp_path, name, kind, caplog):
    """A thermal camera's 14-bit counts, with a dead pixel."""
    ramp = np.linspace(3000, 6060, 200).astype(kind).reshape(20, 10)
    ramp[0, 0] = 16383
    Image.fromarray(ramp).save(tmp_path / name)
    images = image_list(tmp_path, name, name)
    found, _ = load_images(images, height=20, width=10, progress=False)
    black, white = np.percentile(ramp.astype(float), (1, 99))
    expected = 255 * ((ramp.astype(float) - black) / (white - black)).clip(0, 1)
    np.testing.assert_allclose(found, np.repeat(expected[..., None], 3, axis=2), atol=1)
    assert (found.min(), found.max(), found[0, 0, 0]) == (0, 255, 255)
    assert caplog.text.count("2 of 2 images") == 1 and "percentile 99 (white)" in caplog.text
    same = np.full((20, 10), 7, np.uint16)
    same[0, 0] = 9000
    Image.fromarray(same).save(tmp_path / "flat.png")
    with np.errstate(all="raise"):
        (flat,) = load_images(image_list(tmp_path, "flat.png"), height=20, width=10, progress=False)
    assert flat.any(axis=2).sum() == 1


def test_of_several_frames_the_first_is_read_and_the_suffix_says_nothing(tmp_path):
    frames = [Image.fromarray(np.full((20, 10), value, np.uint8)) for value in (40, 90)]
    for form in ("GIF", "TIFF", "WEBP"):
        name = f"{form}.jpg"
        lossless = {"lossless": True} if form == "WEBP" else {}
        with open(tmp_path / name, "w+b") as file:
            frames[0].save(file, form, save_all=True, append_images=frames[1:], **lossless)
        (found,) = load_images(image_list(tmp_path, name), height=20, width=10, progress=False)
        assert (found == 40).all(), form


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_threads_change_nothing(tmp_path, workers):
    names = [f"{i}.png" for i in range(70)]  # more than two chunks
    for i, name in enumerate(names):
        save_image(tmp_path / name, i)
    images = image_list(tmp_path, *names)
    found = load_images(images, height=12, width=6, workers=workers, progress=False)
    for i, pixels in enumerate(found):
        expected = np.random.default_rng(i).integers(0, 256, (12, 6, 3), dtype=np.uint8)
        assert np.array_equal(pixels, expected)


def test_no_images_make_an_empty_array(tmp_path):
    assert load_images(image_list(tmp_path), height=4, width=2).shape == (0, 4, 2, 3)


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""
    chunks = b""
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" * 1000)),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + kind + data
        chunks += struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def encoded(form, cut=None):
    stream = io.BytesIO()
    Image.fromarray(noise(1, 64, 32)[0]).save(stream, form)
    return stream.getvalue()[:cut]


BAD_IMAGES = {
    "empty": b"",
    "text": b"Visible/1/a.bmp 0",
    "truncated jpeg": encoded("JPEG", cut=1200),
    "truncated bmp": encoded("BMP", cut=1200),
    "truncated png": encoded("PNG", cut=1200),
    "header only": encoded("JPEG", cut=20),
    "other format": encoded("PPM"),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "bomb": png_header(30_000, 30_000),
    "small bomb": png_header(8_000, 8_000),
    "no pixels": png_header(0, 0),
    "png of noise": encoded("PNG")[:60] + bytes(range(200)),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_an_undecodable_image_is_named(tmp_path, case):
    names = [f"{i}.jpg" for i in range(40)]
    for i, name in enumerate(names):
        save_image(tmp_path / name, i)
    (tmp_path / "33.jpg").write_bytes(BAD_IMAGES[case])
    images = image_list(tmp_path, *names)
    with pytest.raises(DataError, match=rf"cannot decode {tmp_path / '33.jpg'}: "):
        load_images(images, height=8, width=4, workers=2, progress=False)


def test_an_image_deleted_meanwhile_and_a_folder_are_named(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    for name in ("gone.jpg", "folder.jpg"):
        with pytest.raises(DataError, match=f"cannot decode .*{name}"):
            load_images(image_list(tmp_path, name), height=8, width=4, progress=False)


def test_decoding_stops_at_the_first_bad_image(tmp_path, monkeypatch):
    save_image(tmp_path / "good.png", 0)
    (tmp_path / "bad.png").write_text("x")
    calls = []
    plain = decode._decode
    monkeypatch.setattr(decode, "_decode", lambda *a: (calls.append(a[1]), plain(*a)))
    images = image_list(tmp_path, "bad.png", *["good.png"] * 5000)
    with pytest.raises(DataError, match="bad.png"):
        load_images(images, height=8, width=4, workers=1, progress=False)
    assert len(calls) < 4900


# --- Caches ---------------------------------------------------------------------------------------


def cached(root, pixels, rows=None):
    file = root / "train_rgb_resized_img.npy"
    np.save(file, pixels)
    n = np.zeros(len(pixels), dtype=np.int64)
    images = ImageList(root, (), n, n, "visible", np.load(file, mmap_mode="c"))
    return images if rows is None else images.take(rows)


def test_a_whole_cache_is_mapped_and_rows_of_it_are_copied(tmp_path):
    pixels = noise(50, 8, 4)
    whole = load_images(cached(tmp_path, pixels), height=8, width=4)
    assert isinstance(whole, np.memmap) and whole.mode == "c"  # the file stays as it is
    assert np.array_equal(whole, pixels)
    rows = np.random.default_rng(0).permutation(50)[:13]
    some = load_images(cached(tmp_path, pixels, rows), height=8, width=4)
    assert np.array_equal(some, pixels[rows])


def test_a_cache_of_another_size_names_the_command(tmp_path):
    with pytest.raises(DataError) as caught:
        load_images(cached(tmp_path, noise(5, 8, 4)), height=288, width=144)
    text = str(caught.value)
    assert "8 x 4" in text and "288 x 144" in text
    command = (
        f"python pre_process_sysu.py --data-path {tmp_path} --overwrite --img_h 288 --img_w 144"
    )
    assert command in text


def test_an_image_cache_keeps_the_two_lists_used_last(tmp_path, monkeypatch):
    for i in range(4):
        save_image(tmp_path / f"{i}.png", i)
    calls, plain = [], decode.load_images
    monkeypatch.setattr(
        decode, "load_images", lambda images, **o: (calls.append(images), plain(images, **o))[1]
    )
    lists = [image_list(tmp_path, f"{i}.png") for i in range(4)]
    cache = ImageCache(12, 6, workers=1)

    def decoded(*numbers):
        before = len(calls)
        for i in numbers:
            assert np.array_equal(cache(lists[i]), plain(lists[i], height=12, width=6))
        return len(calls) - before

    assert decoded(0, 1) == 2
    assert decoded(0, 1, 1, 0) == 0
    assert decoded(2) == 1  # in place of 1, which was used longest ago
    assert decoded(0, 2) == 0
    assert decoded(1) == 1
    assert decoded(0) == 1
    (tmp_path / "other").mkdir()
    save_image(tmp_path / "other/0.png", 9)
    lists[0] = image_list(tmp_path / "other", "0.png")  # the same names in another folder
    assert decoded(0) == 1


def test_an_image_cache_tells_rows_of_a_cache_apart(tmp_path):
    pixels = noise(10, 8, 4)
    cache = ImageCache(8, 4)
    for rows in ([3, 1], [1, 3], [5]):
        assert np.array_equal(cache(cached(tmp_path, pixels, rows)), pixels[rows])
    assert np.array_equal(cache(cached(tmp_path, pixels)), pixels)


# --- Sampler --------------------------------------------------------------------------------------


def make_labels(counts, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


VISIBLE = make_labels([3, 1, 7, 2, 5, 4, 9], seed=1)
INFRARED = make_labels([1, 6, 2, 3, 3, 8, 2], seed=2)


def make_sampler(p=4, k=3, seed=0, visible=VISIBLE, infrared=INFRARED):
    return IdentitySampler(visible, infrared, ids_per_batch=p, images_per_id=k, seed=seed)


def test_each_batch_holds_p_identities_and_k_images_of_each():
    sampler = make_sampler()
    for step in range(60):
        batch = sampler.batch(0, step)
        assert batch.visible.shape == batch.infrared.shape == batch.labels.shape == (12,)
        assert (VISIBLE[batch.visible] == batch.labels).all()
        assert (INFRARED[batch.infrared] == batch.labels).all()
        blocks = batch.labels.reshape(4, 3)
        assert (blocks == blocks[:, :1]).all()
        assert len(set(blocks[:, 0])) == 4
        assert batch.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("visible", "infrared", "p", "k"),
    [(2060, 2060, 8, 4), (22258, 11909, 6, 8), (31, 25, 4, 3), (24, 25, 5, 5)],
)
def test_steps_per_epoch(visible, infrared, p, k):
    labels = [np.arange(n) % 24 for n in (visible, infrared)]
    sampler = make_sampler(p, k, visible=labels[0], infrared=labels[1])
    assert sampler.steps_per_epoch == max(visible, infrared) // (p * k) + 1


def test_draws_are_uniform_and_images_come_with_replacement():
    sampler = make_sampler(p=3, k=4)
    steps = 4000
    ids, images, pairs = np.zeros(7), np.zeros(len(VISIBLE)), 0
    for step in range(steps):
        batch = sampler.batch(1, step)
        ids[batch.labels[::4]] += 1
        images += np.bincount(batch.visible, minlength=len(VISIBLE))
        mine = batch.visible[batch.labels == 2]  # 7 images
        pairs += len(mine) > 0 and len(set(mine)) < 4
    expected = steps * 3 / 7
    assert (abs(ids - expected) < 5 * np.sqrt(expected)).all()
    per_image = expected * 4 / np.bincount(VISIBLE)[VISIBLE]
    assert (abs(images - per_image) < 5 * np.sqrt(per_image)).all()
    with_repeat = 1 - 7 * 6 * 5 * 4 / 7**4  # 0.65 with replacement, 0 without
    assert abs(pairs / ids[2] - with_repeat) < 0.06


def test_visible_and_infrared_rows_are_drawn_apart():
    labels = np.repeat(np.arange(4), 10)
    sampler = make_sampler(4, 5, visible=labels, infrared=labels)
    batches = [sampler.batch(0, step) for step in range(20)]
    assert any((b.visible != b.infrared).any() for b in batches)


def test_batches_are_functions_of_seed_epoch_and_step():
    def rows(seed, epoch, step):
        batch = make_sampler(seed=seed).batch(epoch, step)
        return (*batch.visible, *batch.infrared, *batch.labels)

    sampler = make_sampler(seed=3)
    for step in (4, 0, 2):  # in any order
        batch = sampler.batch(5, step)
        assert rows(3, 5, step) == (*batch.visible, *batch.infrared, *batch.labels)
    assert len({rows(s, e, t) for s in (3, 4) for e in (5, 6) for t in (0, 1)}) == 8


def test_the_global_generators_are_left_alone():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    make_sampler().batch(0, 0)
    images = torch.from_numpy(noise(4, 8, 4))
    everything = Augmentation(2, 0.5, 0.5, 0.5, 0.5, 0.5)
    draws = np.random.default_rng(0).random((len(Draw), 4))
    augment(images, everything, draws, modality="visible")
    assert np.array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[1], torch.get_rng_state())


def test_more_identities_in_a_batch_than_there_are():
    with pytest.raises(ValueError, match="asks for 8 identities and there are 7; lower --batch-s"):
        make_sampler(p=8)


# --- Stores and loaders ---------------------------------------------------------------------------


def test_gather_returns_the_rows_asked_for(tmp_path):
    pixels = noise(30, 8, 4)
    np.save(tmp_path / "a.npy", pixels)
    rows = np.array([7, 7, 0, 29])
    for images in (pixels, np.load(tmp_path / "a.npy", mmap_mode="c")):
        store = ImageStore(images, device=CPU)
        found = store.gather(rows)
        assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), pixels[rows])
        found.zero_()  # a batch is the caller's own
        assert np.array_equal(store.gather(rows).numpy(), pixels[rows])
        with pytest.raises(IndexError):
            store.gather(np.array([0, 99]))
        assert len(store.gather(np.array([], dtype=np.int64))) == 0


def numbered(n, height=8, width=4, start=0):
    """Images whose every pixel is their own number."""
    numbers = np.arange(start, start + n, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(numbers, (n, height, width, 3)).copy()


def make_loader(augmentation=None, seed=0, images=None, **more):
    visible, infrared = images or (numbered(len(VISIBLE)), numbered(len(INFRARED), start=100))
    return TrainLoader(
        visible=ImageStore(visible, device=CPU),
        infrared=ImageStore(infrared, device=CPU),
        sampler=make_sampler(seed=seed),
        augmentation=augmentation or Augmentation(),
        **more,
    )


def numbers(batch):
    """The image number that each row of a batch shows in its middle."""
    value = batch[:, 0, 4, 2] * STD[0] + MEAN[0]
    return (value * 255).round().long()


def test_batches_show_the_sampled_images_with_their_labels():
    loader = make_loader(augmentation=Augmentation(pad=0))
    batches = list(loader.epoch(2))
    assert len(batches) == len(loader) == loader.sampler.steps_per_epoch == 3
    for step, batch in enumerate(batches):
        rows = loader.sampler.batch(2, step)
        assert numbers(batch.visible).tolist() == rows.visible.tolist()
        assert (numbers(batch.infrared) - 100).tolist() == rows.infrared.tolist()
        assert batch.labels.tolist() == [*rows.labels, *rows.labels]
        assert batch.labels.dtype == torch.int64
        assert batch.visible.shape == batch.infrared.shape == (12, 3, 8, 4)
        assert batch.infrared.is_contiguous(memory_format=torch.channels_last)


def same(one, other):
    return all(map(torch.equal, one, other))


def test_batches_depend_on_seed_epoch_and_step_alone(monkeypatch):
    everything = Augmentation(2, 0.5, 0.5, 0.5, 0.5, 0.5)
    images = noise(len(VISIBLE), 8, 4), noise(len(INFRARED), 8, 4, seed=1)

    def run(epoch=1, seed=0):
        return list(make_loader(everything, seed, images).epoch(epoch))

    loader = make_loader(everything, 0, images)
    plain = [loader.batch(1, step) for step in range(3)]
    for prefetch in (1, 2, 9):
        monkeypatch.setattr(data_loader, "PREFETCH", prefetch)
        assert all(map(same, plain, run())) and len(run()) == 3
    assert same(loader.batch(1, 2), plain[2])  # in any order
    assert not same(run(epoch=2)[0], plain[0]) and not same(run(seed=1)[0], plain[0])


def test_the_two_modalities_are_cropped_apart():
    pixels = noise(len(VISIBLE), 8, 4)
    loader = make_loader(images=(pixels, pixels[: len(INFRARED)]))
    draws = [
        np.random.default_rng((0, 0, 0, stream)).random(4)
        for stream in (
            data_loader.SAMPLER_STREAM,
            *data_loader.AUGMENT_STREAMS.values(),
            *data_loader.TRANSFORM_STREAMS.values(),
        )
    ]
    assert len({tuple(d) for d in draws}) == 5
    assert not torch.equal(loader.batch(0, 0).visible, loader.batch(0, 0).infrared)


def test_a_transform_of_ones_own_is_a_function_of_seed_epoch_and_step_too():
    images = noise(len(VISIBLE), 8, 4), noise(len(INFRARED), 8, 4, seed=1)
    jitter = v2.ColorJitter(brightness=0.8, hue=0.4)

    def run(epoch=0, **more):
        loader = make_loader(Augmentation(2), 0, images, transform=jitter, **more)
        return list(loader.epoch(epoch))

    plain = list(make_loader(Augmentation(2), 0, images).epoch(0))
    found = run()
    torch.manual_seed(1)
    assert all(map(same, found, run()))
    assert not same(found[0], plain[0]) and not same(run(epoch=1)[0], found[0])
    halves = [run(rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(found):
        for name in ("visible", "infrared"):
            joined = torch.cat([getattr(half[step], name) for half in halves])
            assert torch.equal(joined, getattr(batch, name))

    def invert(image):
        assert image.shape == (3, 8, 4) and image.dtype == torch.uint8
        return 255 - image

    loader = make_loader(Augmentation(pad=0, flip=0), 0, images, transform=invert)
    rows = loader.sampler.batch(0, 0).visible
    assert torch.equal(
        loader.batch(0, 0).visible, normalize(torch.from_numpy(255 - images[0][rows]))
    )


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_an_abandoned_epoch_ends_its_thread():
    loader = make_loader()
    for _ in loader.epoch(0):
        break
    gc.collect()
    iterator = loader.epoch(0)
    next(iterator)
    assert threads()
    iterator.close()
    assert not threads()
    list(loader.epoch(0))
    assert not threads()


def test_a_failure_in_the_thread_arrives_and_ends_it(monkeypatch):
    loader = make_loader()
    plain = loader.sampler.batch

    def fail(epoch, step):
        if step == 1:
            raise RuntimeError("drawn badly")
        return plain(epoch, step)

    monkeypatch.setattr(loader.sampler, "batch", fail)
    seen = []
    with pytest.raises(RuntimeError, match="drawn badly"):
        seen.extend(b for b in loader.epoch(0))
    assert not threads()
    iterator = loader.epoch(0)
    assert next(iterator).visible.shape[0] == 12
    with pytest.raises(RuntimeError, match="drawn badly"):
        next(iterator)


def test_the_thread_works_ahead_but_not_further_than_asked(monkeypatch):
    monkeypatch.setattr(data_loader, "PREFETCH", 1)
    loader = make_loader()
    made = []
    plain = loader.sampler.batch
    monkeypatch.setattr(loader.sampler, "batch", lambda e, s: (made.append(s), plain(e, s))[1])
    iterator = loader.epoch(0)
    next(iterator)
    deadline = time.monotonic() + 5
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1]
    iterator.close()


def test_an_abandoned_epoch_makes_no_further_batches(monkeypatch):
    monkeypatch.setattr(data_loader, "PREFETCH", 3)
    loader = make_loader()
    made, plain = [], loader.sampler.batch

    def slow(epoch, step):
        made.append(step)
        time.sleep(0.5 if step else 0)
        return plain(epoch, step)

    monkeypatch.setattr(loader.sampler, "batch", slow)
    iterator = loader.epoch(0)
    next(iterator)
    iterator.close()
    assert len(made) < 3


@pytest.mark.parametrize(("n", "size"), [(7, 3), (6, 3), (2, 5)])
def test_evaluation_batches_keep_the_order(n, size):
    pixels = noise(n, 8, 4)
    loader = EvalLoader(pixels, batch_size=size, device=CPU)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == -(-n // size)
        assert [len(b) for b in batches[:-1]] == [size] * (len(batches) - 1)
        joined = torch.cat([*batches, torch.zeros(0, 3, 8, 4)])
        assert torch.equal(joined, normalize(torch.from_numpy(pixels)))


def test_from_files_to_batches(tiny_regdb):
    train = train_set("regdb", tiny_regdb)
    stores = [
        ImageStore(load_images(x, height=12, width=6, progress=False), device=CPU)
        for x in (train.visible, train.infrared)
    ]
    sampler = make_sampler(3, 2, 0, *train.labels)
    parts = {"visible": stores[0], "infrared": stores[1], "sampler": sampler}
    loader = TrainLoader(**parts, augmentation=Augmentation(pad=0, flip=0))
    (first, *_) = loader.epoch(0)
    rows = sampler.batch(0, 0)
    for i, row in enumerate(rows.infrared):
        image = np.array(Image.open(train.infrared.root / train.infrared.paths[row]))
        torch.testing.assert_close(first.infrared[i], reference(image), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("resident", "total", "kept"), [("auto", 1000, False), ("auto", 3000, True), ("on", 1, True)]
)
def test_images_stay_on_a_device_where_small_or_asked_for(resident, total, kept, monkeypatch):
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total // 10, total))
    with fake.FakeTensorMode():
        images = np.zeros((4, 3, 4, 3), dtype=np.uint8)  # 144 bytes
        store = ImageStore(images, torch.device("cuda", 0), resident=resident)
        off = ImageStore(images, torch.device("cuda", 0), resident="off")
    assert store._images.is_cuda == kept
    assert not off._images.is_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("resident", ["on", "off"])
def test_cuda_batches_equal_those_of_the_cpu(resident):
    cuda = torch.device("cuda")
    everything = Augmentation(2, 0.5, 0.5, 0.5, 0.5, 0.5)
    images = noise(len(VISIBLE), 32, 16), noise(len(INFRARED), 32, 16, seed=1)
    expected = list(make_loader(everything, 0, images).epoch(0))
    loader = TrainLoader(
        visible=ImageStore(images[0], cuda, resident=resident),
        infrared=ImageStore(images[1], cuda, resident=resident),
        sampler=make_sampler(),
        augmentation=everything,
    )
    for mine, theirs in zip(loader.epoch(0), expected, strict=True):
        for name in ("visible", "infrared", "labels"):
            found = getattr(mine, name)
            assert found.device.type == "cuda"
            torch.testing.assert_close(found.cpu(), getattr(theirs, name), atol=1e-5, rtol=0)
        assert mine.visible.is_contiguous(memory_format=torch.channels_last)
    batches = torch.cat([b.cpu() for b in EvalLoader(images[0], batch_size=5, device=cuda)])
    torch.testing.assert_close(batches, normalize(torch.from_numpy(images[0])))
