import logging
from urllib.error import URLError

import pytest
import torch
import torchvision
from recipe import METHODS, numbered, released_file

from engine.checkpoints import load_network
from model import TwoStreamNet
from networks.checkpoint_file import CheckpointError, save_checkpoint
from networks.released import convert_released_state_dict, is_released, released_config


def small(**settings):
    return TwoStreamNet(**{"num_ids": 5, "arch": "resnet18", "local_feat_dim": 16, **settings})


@pytest.mark.parametrize("method", ["HCT", "SGMRA", "MGMRA", "AGW"])
def test_released_checkpoints_are_rebuilt_and_loaded(method, tmp_path):
    state = {f"module.{k}": v.float() if v.ndim else v.long() for k, v in numbered(method).items()}
    path = tmp_path / "released.t"
    torch.save({"net": state, "mAP": 0.5, "epoch": 3}, path)
    net, info = load_network(path, gem_p=10.0)
    assert info == {}  # its weights alone are taken
    assert net.gem_p == 10.0
    assert net.config["num_ids"] == 206
    assert net.config["memory"] == {"SGMRA": "sg", "MGMRA": "mg"}.get(method)
    stem = "visible_module.visible.conv1.weight"
    assert torch.equal(net.visible.stem.conv1.weight, state[f"module.{stem}"])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("method", ["SGMRA", "MGMRA"])
def test_a_bank_of_206_beside_classifiers_of_395(method, legacy, tmp_path, caplog):
    path = tmp_path / "sysu_best.t"
    state = released_file(path, method, 395, legacy)
    net, _ = load_network(path)
    assert (net.config["num_ids"], net.config["memory_ids"]) == (395, 206)
    assert torch.equal(net.memory.part_bank, state["mem_rep.memory.weight"])
    assert torch.equal(net.memory_classifier.weight, state["classifier.weight"])
    features = net.eval().embed(torch.randn(1, 3, 96, 48), None, ("pcb", "memory"))
    assert all(feature.isfinite().all() for feature in features.values())
    # Fine-tuned on data with 395 identities: all fits, with a bank of its size.
    with caplog.at_level(logging.INFO):
        net = TwoStreamNet(395, memory=net.config["memory"], memory_ids=206, weights=path)
    assert "start afresh" not in caplog.text
    assert torch.equal(net.memory.part_bank, state["mem_rep.memory.weight"])


def test_a_bank_of_the_training_identities_needs_no_size(tmp_path):
    assert released_config(numbered("SGMRA"))["memory_ids"] == 206
    assert small(memory="mg", memory_ids=5).config["memory_ids"] is None
    net = small(memory="mg", memory_ids=3, parts_per_instance=2)
    assert net.memory.banks()[1].shape == (3, 512)
    assert net.memory_classifier.weight.shape == (5, 512)
    save_checkpoint(tmp_path / "own.pt", {"net": net.state_dict(), "config": net.config})
    assert load_network(tmp_path / "own.pt")[0].config == net.config
    with pytest.raises(ValueError, match="num_ids must be at least 1, got -1"):
        small(memory="sg", memory_ids=-1)


def test_every_entry_is_mapped_or_known_to_be_unused():
    for method, unused in {"HCT": 0, "SGMRA": 5, "MGMRA": 5}.items():
        state = numbered(method)
        converted = convert_released_state_dict(state)
        reached = {int(i) for v in converted.values() for i in v.flatten().unique_consecutive()}
        lost = [k for i, k in enumerate(state) if i not in reached]
        # Stripes' counters of batches are all equal: the first stands for the six.
        lost = [k for k in lost if not (k.startswith("local") and k.endswith("tracked"))]
        assert len(lost) == unused, lost
        assert all(k.startswith("bn.") for k in lost)
    agw = convert_released_state_dict(numbered("AGW"))
    assert set(agw) == set(TwoStreamNet(206, head="agw", share_net=1).state_dict())


def test_a_released_file_without_stripes_and_non_local_blocks_is_hct_s_baseline():
    state = {k: v for k, v in numbered("AGW").items() if not k.startswith("NL_")}
    config = released_config(state)
    assert (config["head"], released_config(numbered("AGW"))["head"]) == ("global", "agw")
    with torch.device("meta"):
        assert set(convert_released_state_dict(state)) == set(TwoStreamNet(**config).state_dict())


def test_the_shared_stage_is_read_off_the_names():
    state = numbered("HCT")
    assert released_config(state)["share_net"] == 2
    moved = {
        k.replace("base_resnet.base.layer2", "visible_module.visible.layer2"): v
        for k, v in state.items()
    }
    assert released_config(moved)["share_net"] == 3


def test_other_dictionaries_are_no_releases():
    assert not is_released(small().state_dict())
    with pytest.raises(ValueError, match="not a checkpoint of the earlier releases"):
        convert_released_state_dict({"a": torch.zeros(1)})


def test_imagenet_names_fill_both_streams(tmp_path):
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(weights=None)
    path = tmp_path / "resnet18.pth"
    torch.save(resnet.state_dict(), path)
    net = small(weights=path)
    assert torch.equal(net.visible.stem.conv1.weight, resnet.conv1.weight)
    assert torch.equal(net.infrared.layer1.blocks[1].conv2.weight, resnet.layer1[1].conv2.weight)
    assert torch.equal(net.shared.layer4.blocks[0].conv1.weight, resnet.layer4[0].conv1.weight)
    with pytest.raises(CheckpointError, match="is --arch right"):
        small(weights=path, arch="resnet50")


def test_without_internet_the_message_names_the_file(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        small(weights="imagenet")
    text = str(error.value)
    for part in ("resnet18-f37072fd.pth", str(tmp_path / "checkpoints"), "--weights none"):
        assert part in text


def test_fine_tuning_keeps_what_fits_and_names_the_rest(tmp_path, caplog):
    torch.manual_seed(0)
    donor = small(num_ids=9, memory="mg")
    path = tmp_path / "donor.pt"
    save_checkpoint(path, {"net": donor.state_dict(), "config": donor.config})
    with caplog.at_level(logging.INFO):
        net = small(num_ids=5, memory="mg", weights=path)
    assert torch.equal(net.part_reduce.weight, donor.part_reduce.weight)
    assert net.part_classifier.weight.shape[1] == 5
    assert "part_classifier.weight" in caplog.text
    assert "memory.part_bank" in caplog.text
    with pytest.raises(CheckpointError, match="belongs to another network"):
        small(arch="resnet34", weights=path, head="agw")


def test_fine_tuning_from_a_release(tmp_path):
    state = {k: v.float() for k, v in numbered("MGMRA").items()}
    path = tmp_path / "released.t"
    torch.save({"net": state}, path)
    net = TwoStreamNet(50, memory="mg", weights=path)
    assert torch.equal(
        net.memory.part_gate.weight, state["mem_rep.memory.reweight_layer_part.weight"]
    )
    assert net.memory.part_bank.shape == (1500, 2048)


def test_own_checkpoints_carry_their_architecture(tmp_path):
    net = small(head="agw", memory="sg", share_net=3, gem_p=2.5)
    path = tmp_path / "own.pt"
    save_checkpoint(path, {"net": net.state_dict(), "config": net.config})
    loaded, _ = load_network(path)
    assert loaded.config == net.config
    images = torch.randn(2, 3, 96, 32)
    torch.testing.assert_close(loaded.eval()(images, None), net.eval()(images, None))
    content = {"net": net.state_dict(), "config": {**net.config, "head": "pcb"}}
    save_checkpoint(path, content)
    with pytest.raises(CheckpointError, match="own.pt holds no network of this project"):
        load_network(path)


def test_methods_cover_the_golden_files():
    assert {method for method, _, _ in METHODS.values()} == {"AGW", "HCT", "MGMRA", "SGMRA"}
