import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pre_process_sysu
from data_manager import train_set
from datasets.decode import load_images
from pre_process_sysu import main

SCRIPT = Path(pre_process_sysu.__file__)
NAMES = [f"train_{word}_resized_{kind}.npy" for word in ("rgb", "ir") for kind in ("img", "label")]
SIZE = ["--img_h", "16", "--img-w", "8"]


def run(root, *flags):
    try:
        return main(["--data-path", str(root), *SIZE, "--workers", "1", *map(str, flags)])
    except SystemExit as error:
        return error.code


def contents(folder):
    return {name: (folder / name).read_bytes() for name in NAMES}


def leftovers(folder):
    return sorted(
        p.name for p in folder.iterdir() if p.name.startswith("train_") and p.name not in NAMES
    )


def test_caches_equal_decoding_the_jpgs(tiny_sysu):
    plain = train_set("sysu", tiny_sysu)
    assert run(tiny_sysu) == 0
    cached = train_set("sysu", tiny_sysu)
    for side, name in enumerate(("visible", "infrared")):
        jpgs, cache = getattr(plain, name), getattr(cached, name)
        assert Path(cache.pixels.filename).parent == tiny_sysu
        expected = load_images(jpgs, height=16, width=8, progress=False)
        assert np.array_equal(load_images(cache, height=16, width=8), expected)
        assert cached.labels[side].tolist() == plain.labels[side].tolist()
    assert np.load(tiny_sysu / NAMES[1]).dtype == np.int64
    assert leftovers(tiny_sysu) == []


def test_several_threads_make_the_same_files(tiny_sysu, tmp_path):
    assert run(tiny_sysu, "--output-dir", tmp_path / "one") == 0
    command = [sys.executable, SCRIPT, "--data_path", tiny_sysu, "--output_dir", tmp_path / "two"]
    done = subprocess.run([*command, *SIZE, "--workers", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert leftovers(tmp_path / "two") == []
    assert not list(tiny_sysu.glob("train_*"))


def test_finished_caches_are_kept(tiny_sysu, monkeypatch, capsys):
    run(tiny_sysu)
    times = {name: (tiny_sysu / name).stat().st_mtime_ns for name in NAMES}
    monkeypatch.setattr(pre_process_sysu, "load_images", None)
    assert run(tiny_sysu) == 0
    assert {name: (tiny_sysu / name).stat().st_mtime_ns for name in NAMES} == times


def count_calls(monkeypatch, stop_after=None, error=KeyboardInterrupt):
    """Notes each modality that is decoded; fails after some."""
    seen = []

    def load(images, **settings):
        if len(seen) == stop_after:
            raise error
        seen.append((images.modality, len(images)))
        return load_images(images, **settings)

    monkeypatch.setattr(pre_process_sysu, "load_images", load)
    return seen


@pytest.mark.parametrize("stop_after", [0, 1])
def test_an_interrupted_run_leaves_whole_caches_only(
    tiny_sysu, tmp_path, monkeypatch, stop_after, capsys
):
    run(tiny_sysu, "--output-dir", tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        count_calls(patch, stop_after)
        assert run(tiny_sysu) == 130
    assert "the same command" in capsys.readouterr().err
    assert train_set("sysu", tiny_sysu).visible.pixels is None  # no half cache is ever taken
    assert not list(tiny_sysu.glob(".*"))
    rest = count_calls(monkeypatch)
    assert run(tiny_sysu) == 0
    assert len(rest) == 2 - stop_after
    assert contents(tiny_sysu) == contents(tmp_path / "unbroken")
    assert leftovers(tiny_sysu) == []


@pytest.mark.parametrize("lacking", [None, *NAMES])
def test_what_is_there_needs_overwrite_unless_half_of_it_is_gone(tiny_sysu, capsys, lacking):
    run(tiny_sysu)
    before = contents(tiny_sysu)
    if lacking:
        (tiny_sysu / lacking).unlink()
    assert run(tiny_sysu) == 0
    assert capsys.readouterr().out.count("is there and stays; --overwrite") == (1 if lacking else 2)
    assert contents(tiny_sysu) == before
    assert run(tiny_sysu, "--img_h", 20) == 0
    assert contents(tiny_sysu) == before
    assert run(tiny_sysu, "--img_h", 20, "--overwrite") == 0
    assert np.load(tiny_sysu / NAMES[2]).shape == (15, 20, 8, 3)


def test_a_broken_image_ends_with_its_name_and_keeps_what_is_done(tiny_sysu, capsys, monkeypatch):
    image = tiny_sysu / "cam4/0020/0002.jpg"
    good = image.read_bytes()
    image.write_bytes(good[:100])
    assert run(tiny_sysu) == 2
    error = capsys.readouterr().err
    assert str(image) in error and "Traceback" not in error
    assert not (tiny_sysu / NAMES[0]).exists()
    image.write_bytes(good)
    assert run(tiny_sysu) == 0


def test_two_at_once_both_succeed(tiny_sysu, monkeypatch):
    command = [sys.executable, SCRIPT, "--data_path", tiny_sysu]
    others = [subprocess.Popen([*map(str, command), *SIZE]) for _ in range(2)]
    assert [other.wait(60) for other in others] == [0, 0]
    assert leftovers(tiny_sysu) == [] and not list(tiny_sysu.glob(".*"))
    built = contents(tiny_sysu)
    assert run(tiny_sysu, "--overwrite") == 0
    assert contents(tiny_sysu) == built


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "nowhere"], "stand_in.py --layout sysu"),
        (["--img_h", "0"], "a number above 0, got 0"),
        (["--workers", "0"], "a number above 0, got 0"),
        (["--output-dir", "/dev/null/x"], "/dev/null/x"),
    ],
)
def test_bad_requests_end_before_any_work(tiny_sysu, capsys, monkeypatch, flags, message):
    seen = count_calls(monkeypatch)
    assert run(tiny_sysu, *flags) == 2
    assert message in capsys.readouterr().err and not seen


def test_a_bad_training_list_ends_before_any_work(tiny_sysu, capsys, monkeypatch):
    (tiny_sysu / "exp/train_id.txt").write_text("1,x")
    seen = count_calls(monkeypatch)
    assert run(tiny_sysu) == 2
    assert "train_id.txt: invalid" in capsys.readouterr().err and not seen
    assert not list(tiny_sysu.glob("train_*"))


def test_a_disk_that_fills_up_on_the_way(tiny_sysu, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        count_calls(patch, 1, OSError(28, "No space left on device"))
        assert run(tiny_sysu) == 2
    assert "No space left" in capsys.readouterr().err
    assert run(tiny_sysu) == 0


def test_unknown_flags_and_values():
    for flags in (["--size", "3"], ["--img_h", "tall"], []):
        with pytest.raises(SystemExit) as caught:
            main(flags)
        assert caught.value.code == 2
