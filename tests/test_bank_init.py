"""Prototypes that are features of the training images: which, when, and what a resume does."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from short_run import NARROW, arguments, differences, outcome, write_data

import train_MGMRA
from data_loader import ImageStore
from datasets.transforms import normalize
from engine.bank_init import IMAGES_AT_A_TIME, fill_bank
from engine.train import make_optimizer
from model import TwoStreamNet
from networks.backbone import BACKBONES


def test_a_prototype_is_a_position_of_its_identity_modality_and_part(monkeypatch):
    """More identities than one batch has."""
    monkeypatch.setitem(BACKBONES, "resnet18", NARROW["resnet18"])
    count = IMAGES_AT_A_TIME + 3
    torch.manual_seed(0)
    net = TwoStreamNet(count, arch="resnet18", memory="mg", local_feat_dim=8, instances_per_id=3)
    rng = np.random.default_rng(0)
    labels = (np.repeat(np.arange(count), 2), np.arange(count)[::-1].copy())
    images = [rng.integers(0, 256, (len(own), 96, 32, 3), dtype=np.uint8) for own in labels]
    cpu = torch.device("cpu")
    loader = SimpleNamespace(
        visible=ImageStore(images[0], device=cpu), infrared=ImageStore(images[1], device=cpu)
    )
    optimizer = make_optimizer(net, "sgd")
    net.memory.part_bank.grad = torch.ones_like(net.memory.part_bank)
    optimizer.step()
    fill_bank(net, optimizer, loader, labels, seed=5)
    bank = net.memory.part_bank.detach().view(count, 3, 6, -1)
    first = bank.clone()
    with torch.no_grad():
        maps = [
            net.feature_map(*((x, None) if i == 0 else (None, x)))
            for i, x in enumerate(normalize(torch.from_numpy(own)) for own in images)
        ]
    for label in (0, 1, IMAGES_AT_A_TIME, count - 1):
        for instance in range(3):
            modality = instance % 2
            own = maps[modality][labels[modality] == label]  # (n, C, 6, 2)
            for part in range(6):
                places = own[:, :, part].permute(0, 2, 1).flatten(0, 1)  # (n * 2, C)
                gap = (places - bank[label, instance, part]).abs().amax(dim=1)
                assert gap.min() < 1e-4
    assert not optimizer.state[net.memory.part_bank]["momentum_buffer"].any()
    fill_bank(net, optimizer, loader, labels, seed=5)
    assert torch.equal(first, bank)
    fill_bank(net, optimizer, loader, labels, seed=6)
    assert not torch.equal(first, bank)


def test_a_run_fills_its_bank_once_and_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "resnet18", NARROW["resnet18"])
    data = write_data(tmp_path / "data")
    own = ("--addressing", "cosine", "--bank-init", "features", "--bank-init-epoch", "1")
    assert train_MGMRA.main(arguments(data, tmp_path / "whole", *own)) == 0
    flags = arguments(data, tmp_path / "parts", *own)
    assert train_MGMRA.main([*flags, "--epochs", "2"]) == 0
    assert train_MGMRA.main([*flags, "--resume"]) == 0
    whole, parts = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    assert not differences(whole, parts)
    assert whole["last.pt: config"]["temperature"] == 0.02
    bank = whole["last.pt: net.memory.part_bank"]
    assert (bank < -0.01).float().mean() < 0.05  # as features after a ReLU; half of random ones


def test_what_cannot_be_filled_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(BACKBONES, "resnet18", NARROW["resnet18"])
    data = write_data(tmp_path / "data")
    flags = arguments(data, tmp_path / "run", "--bank-init", "features", "--epochs", "1")
    assert train_MGMRA.main(flags) == 0
    assert "no epoch has the number of --bank-init-epoch" in capsys.readouterr().err

    class Own(torch.nn.Identity):
        num_ids = 6

    with pytest.raises(SystemExit):
        train_MGMRA.main([*flags, "--overwrite"], memory_class=Own)
    assert "--bank-init features cannot fill a Own" in capsys.readouterr().err
