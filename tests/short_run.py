"""A complete MG-MRA training of seconds, and what it must leave behind whatever happens to it.

Shared by the tests of resuming, by `fault_injection.py` and by those of several processes.
"""

import json
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

import stand_in
from networks import backbone
from networks.checkpoint_file import load_checkpoint

EPOCHS, STEPS = 3, 5  # evaluated after epochs 2 and 3
FLAGS = (
    *("--arch", "resnet18", "--weights", "none", "--img_h", "32", "--img_w", "16"),
    *("--num_strips", "2", "--pad", "2"),
    *("--batch-size", "2", "--num_pos", "2", "--test-batch", "4", "--workers", "1"),
    *("--epochs", str(EPOCHS), "--warmup-epochs", "1", "--lr", "0.01", "--grey", "0.3"),
    *("--eval-start", "1", "--eval-every", "1", "--gpu", "cpu", "--quiet"),
)
METHOD_FLAGS = ("--local_feat_dim", "8", "--shrink", "0.001")  # of no use to AGW, to HCT
CHANNELS = 32  # of the narrow network's last map
TIMES = ("images_per_second", "seconds")


def narrow_stages(state: dict | None, origin: str, non_local: bool) -> backbone.Stages:
    """A ResNet's stages with an eighth of its channels: files and steps cost next to nothing."""
    assert state is None, origin
    stages = OrderedDict(
        stem=nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
    )
    before = 8
    for name, after, stride in (
        ("layer1", 8, 1),
        ("layer2", 16, 2),
        ("layer3", 16, 2),
        ("layer4", CHANNELS, 1),
    ):
        shortcut = None
        if after != before or stride > 1:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            shortcut = nn.Sequential(conv, nn.BatchNorm2d(after))
        block = nn.Sequential(BasicBlock(before, after, stride, shortcut))
        count = backbone.NON_LOCAL_BLOCKS.get(name, 0) if non_local else 0
        stages[name] = backbone.Stage(block, after, count)
        before = after
    return stages


NARROW = {"resnet18": backbone.Backbone(CHANNELS, narrow_stages)}


def use_narrow_backbone() -> None:
    """Makes every network of this process narrow."""
    backbone.BACKBONES.update(NARROW)


def write_data(root: Path) -> Path:
    """Stand-in data in RegDB's layout: 6 training and 4 test identities, 3 images of each."""
    counts = {"train_ids": 6, "test_ids": 4, "images_per_id": 3}
    stand_in.generate(root, layout="regdb", **counts, seed=1, workers=1)
    return root


def arguments(data: Path, folder: Path, *more: object) -> list[str]:
    """Command line of the run; later flags win."""
    where = ("--dataset", "regdb", "--data-path", data, "--output-dir", folder)
    own = () if "agw" in more else METHOD_FLAGS
    return [str(word) for word in (*where, *FLAGS, *own, *more)]


def outcome(folder: Path) -> dict:
    """Everything that must not depend on interruptions, flat: name to value."""
    found = {"log": [without_times(line) for line in log_lines(folder)]}
    found["training.json"] = json.loads((folder / "training.json").read_text())
    for name in ("last.pt", "best.pt"):
        found[name] = (folder / name).exists()
        if not found[name]:
            continue
        content = load_checkpoint(folder / name)
        found[f"{name}: log"] = [without_times(line) for line in content["log"]]
        for key in ("epoch", "best", "last", "selection", "config", "identities"):
            found[f"{name}: {key}"] = content[key]
        for key in ("net", "optimizer", "generators", "scaler"):
            found.update(flat(content.get(key), f"{name}: {key}"))
    return found


def log_lines(folder: Path) -> list[dict]:
    """The lines of log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(line: dict) -> dict:
    """A log line's reproducible part."""
    return {key: value for key, value in line.items() if key not in TIMES}


def flat(value: object, name: str) -> dict[str, object]:
    """Leaves of nested dictionaries and lists."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flat(item, f"{name}.{key}").items()}
    return {name: value}


def differences(first: dict, second: dict) -> list[str]:
    """Names under which two outcomes differ, to the bit."""
    names = sorted(first.keys() | second.keys())
    return [n for n in names if not same(first.get(n), second.get(n))]


def same(first: object, second: object) -> bool:
    """Whether two leaves are equal, tensors to the bit."""
    if torch.is_tensor(first) and torch.is_tensor(second):
        return first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and first == second
