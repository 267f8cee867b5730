"""Tiny data sets in the real layouts, written anew for each test that asks for one."""

import os
from pathlib import Path

# Two test processes run side by side (pyproject.toml): one thread each, scripts included.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

# (camera 1..6) images of each identity; several cameras are missing somewhere, as in the real set.
SYSU_COUNTS = {
    "train": {
        1: (2, 1, 3, 0, 1, 0),
        2: (0, 2, 1, 1, 0, 1),
        5: (1, 0, 0, 2, 2, 2),
        9: (0, 0, 2, 3, 0, 1),
    },
    "val": {12: (0, 0, 2, 2, 1, 0), 20: (0, 0, 3, 2, 2, 0)},
    "test": {3: (12, 0, 2, 13, 4, 2), 6: (11, 12, 0, 3, 12, 3), 30: (0, 0, 2, 14, 3, 0)},
}
# Visible, then infrared images of each LLCM identity at each camera.
LLCM_COUNTS = {
    3: ({1: 2, 2: 3, 3: 1}, {1: 1, 2: 4, 9: 2}),
    11: ({4: 2}, {4: 3, 5: 2}),
    1002: ({7: 1, 8: 2}, {8: 2}),
}
REGDB_IDS = {"train": (31, 4, 17, 8, 25, 2), "test": (5, 40, 11, 7)}  # the pid of label 0, 1, ...


def save_image(path: Path, seed: int, size: tuple[int, int] = (6, 12)) -> None:
    """Write noise of `size` (width, height) that depends on the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def tiny_regdb(tmp_path: Path) -> Path:
    """RegDB, trial 1 only: 6 training and 4 test identities, 2 visible and 3 infrared images."""
    root = tmp_path / "regdb"
    (root / "idx").mkdir(parents=True)
    for split, pids in REGDB_IDS.items():
        for folder, word, count in (("Visible", "visible", 2), ("Thermal", "thermal", 3)):
            lines = []
            for label, pid in enumerate(pids):
                for i in range(count):
                    name = f"{folder}/{pid}/male_back_{folder[0].lower()}_{i:05d}_{pid}.bmp"
                    save_image(root / name, 100 * pid + 10 * count + i)
                    lines.append(f"{name} {label}\n")
            (root / f"idx/{split}_{word}_1.txt").write_text("".join(lines))
    return root


@pytest.fixture
def tiny_sysu(tmp_path: Path) -> Path:
    """SYSU-MM01 with 4 training, 2 validation and 3 test identities (`SYSU_COUNTS`)."""
    root = tmp_path / "sysu"
    (root / "exp").mkdir(parents=True)
    for split, counts in SYSU_COUNTS.items():
        (root / f"exp/{split}_id.txt").write_text(",".join(map(str, counts)) + "\n")
        for pid, row in counts.items():
            for camera, count in enumerate(row, start=1):
                for i in range(1, count + 1):
                    file = root / f"cam{camera}/{pid:04d}/{i:04d}.jpg"
                    save_image(file, pid * 1000 + camera * 100 + i, (5 + camera, 9 + i % 3))
    return root


@pytest.fixture
def tiny_llcm(tmp_path: Path) -> Path:
    """LLCM with 6 training and 3 test identities (`LLCM_COUNTS`)."""
    root = tmp_path / "llcm"
    (root / "idx").mkdir(parents=True)
    for word, count in (("vis", 2), ("nir", 3)):
        lines = []
        for label in range(6):
            for i in range(count):
                name = f"{word}/{label + 20:04d}/{i:03d}.jpg"
                save_image(root / name, 1000 * label + 10 * count + i)
                lines.append(f"{name} {label}\n")
        (root / f"idx/train_{word}.txt").write_text("".join(lines))
    for pid, sides in LLCM_COUNTS.items():
        for word, counts in zip(("vis", "nir"), sides, strict=True):
            for camera, count in counts.items():
                for i in range(count):
                    file = root / f"test_{word}/cam{camera}/{pid:04d}/{i:03d}.jpg"
                    save_image(file, pid * 100 + camera * 10 + i)
    (root / "idx/test_id.txt").write_text(",".join(map(str, LLCM_COUNTS)) + "\n")
    return root
