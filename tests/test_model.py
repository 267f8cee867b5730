import numpy as np
import pytest
import torch
from recipe import GOLDEN, METHODS, images, released_state_dict

from engine.checkpoints import load_network
from loss import part_alignment_loss
from memory import MemoryRead, MultiGranularityMemory, SingleGranularityMemory
from model import TwoStreamNet
from networks.checkpoint_file import CheckpointError, save_checkpoint
from networks.memory_health import MemoryHealth
from networks.released import convert_released_state_dict, released_config


def small(**settings):
    """A quick network: ResNet-18, 5 identities, 6 stripes unless said otherwise."""
    return TwoStreamNet(**{"num_ids": 5, "arch": "resnet18", "local_feat_dim": 16, **settings})


def pictures(count=4, height=96, width=32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 3, height, width, generator=gen) for _ in range(2)]


def relative(value, expected):
    return np.abs(value.detach().numpy() - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", METHODS)
def test_agrees_with_the_released_network(name):
    method, gem_p, variant = METHODS[name]
    golden = np.load(GOLDEN / f"model_{name}.npz")
    state = released_state_dict(method)
    config = released_config(state)
    assert config["num_ids"] == 206
    assert config["share_net"] == (1 if method == "AGW" else 2)
    net = TwoStreamNet(gem_p=gem_p, memory_variant=variant, **config)
    net.load_state_dict({k: v.float() for k, v in convert_released_state_dict(state).items()})
    visible, infrared = (images(f"img.{m}", 8).float() for m in ("visible", "infrared"))
    with torch.no_grad():
        net.eval()
        for modality, inputs in (("visible", (visible, None)), ("infrared", (None, infrared))):
            if method == "AGW":
                assert relative(net(*inputs), golden[f"eval/{modality}.bn"]) < 1e-3
                assert (
                    relative(net.embed(*inputs, ("pool",))["pool"], golden[f"eval/{modality}.pool"])
                    < 1e-3
                )
            else:
                assert relative(net(*inputs), golden[f"eval/{modality}"]) < 1e-3
        net.train()
        out = net(visible, infrared)
    assert relative(out["feat"], golden["train/features"]) < 1e-3
    logits = {"train/logits": "logits", "train/local_logits": "part_logits"}
    logits |= {"train/memory_features": "memory_feat", "train/memory_logits": "memory_logits"}
    compared = [relative(out[ours], golden[key]) for key, ours in logits.items() if key in golden]
    assert len(compared) == (1 if name in ("HCT", "AGW") else 3)
    assert max(compared) < 1e-3
    if "train/alignment_mse" in golden:
        part = out["memory_read"].part
        alignment = part_alignment_loss(part, golden["strip_permutation"].tolist())
        assert alignment.item() == pytest.approx(golden["train/alignment_mse"].item(), rel=1e-3)
    if "train/part_pooled" in golden:
        pooled = torch.nn.functional.adaptive_avg_pool2d(part, (6, 1)).squeeze(3)[:, ::16]
        # The golden numbers are float32's: the variant paper's float64 reads are 1.7e-3 from them.
        assert relative(pooled, golden["train/part_pooled"]) < 2e-3


@pytest.mark.parametrize("head", ["pcb", "global", "agw"])
@pytest.mark.parametrize("memory", [None, "sg", "mg"])
def test_training_outputs_have_the_promised_names_and_shapes(head, memory):
    net = small(head=head, memory=memory)
    out = net(*pictures())
    expected = {"feat": (8, 96 if head == "pcb" else 512)}
    if head == "pcb":
        expected |= {"part_feats": (8, 6, 16), "part_logits": (8, 6, 5)}
    else:
        expected |= {"logits": (8, 5)}
    if memory:
        expected |= {"memory_feat": (8, 512), "memory_logits": (8, 5)}
        assert out["memory_read"].part.shape == (8, 512, 6, 2)
        assert (out["memory_read"].semantic is None) == (memory == "sg")
    assert {k: tuple(v.shape) for k, v in out.items() if k != "memory_read"} == expected


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_arch_is_honoured(arch):
    net = small(arch=arch, head="agw")
    assert net.dim == (512 if arch in ("resnet18", "resnet34") else 2048)
    counts = [len(getattr(net.shared, f"layer{i}").blocks) for i in (2, 3, 4)]
    depths = {"resnet18": [2, 2, 2], "resnet34": [4, 6, 3], "resnet50": [4, 6, 3]}
    assert counts == depths.get(arch, [4, 23, 3])
    assert net.feature_map(*pictures(1)).shape == (2, net.dim, 6, 2)  # stride 16
    assert len(net.shared.layer3.non_local) == min(3, counts[1])
    assert len(net.shared.layer2.non_local) == 2


@pytest.mark.parametrize("share_net", range(6))
def test_share_net_says_from_which_stage_on_weights_are_shared(share_net):
    net = small(share_net=share_net)
    stages = ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert list(dict(net.visible.named_children())) == stages[:share_net]
    assert list(dict(net.infrared.named_children())) == stages[:share_net]
    assert list(dict(net.shared.named_children())) == stages[share_net:]
    visible, infrared = pictures(2)
    net.eval()
    same = torch.equal(net(visible, None), net(None, visible))
    assert same, "both streams start from the same weights"
    net.train()(visible, infrared)["feat"].sum().backward()
    with torch.no_grad():
        for p in net.infrared.parameters():
            p.add_(0.1)
    net.eval()
    moved = not torch.allclose(net(visible, None), net(None, visible))
    assert moved == (share_net > 0)


def test_streams_do_not_mix():
    net = small(memory="mg").eval()
    visible, infrared = pictures()
    v, i = net(visible, None), net(None, infrared)
    torch.testing.assert_close(net(visible, infrared), torch.cat([v, i]))
    torch.testing.assert_close(v.norm(dim=1), torch.ones(4))


def test_evaluation_does_not_run_the_memory_unless_asked():
    net = small(memory="mg").eval()
    calls = []
    net.memory.register_forward_hook(lambda *_: calls.append(1))
    visible, _ = pictures()
    headline = net(visible, None)
    assert not calls
    memory = net.embed(visible, None, ("memory",))["memory"]
    both = net.embed(visible, None, ("both",))["both"]
    assert len(calls) == 2
    assert (headline.shape, memory.shape, both.shape) == ((4, 96), (4, 512), (4, 608))
    expected = torch.nn.functional.normalize(torch.cat([headline, memory], dim=1))
    torch.testing.assert_close(both, expected)


def test_test_features_are_named_in_errors():
    with pytest.raises(ValueError, match="pcb; got 'memory'"):
        small().eval().embed(*pictures(), ("memory",))["memory"]
    assert small(head="agw", memory="sg").test_feats() == ("neck", "pool", "memory", "both")


def test_memory_feature_is_the_mean_of_map_plus_coarsest_read():
    for memory in ("sg", "mg"):
        net = small(memory=memory, shrink=0.0)
        x = torch.randn(2, 512, 6, 2)
        read = net.memory(x)
        coarsest = read.part if memory == "sg" else read.semantic
        expected = (x + coarsest).mean(dim=(2, 3))
        torch.testing.assert_close(net._memory_feature(x)[0], expected)


class Doubled(MultiGranularityMemory):
    def forward(self, x):
        read = super().forward(x)
        return read._replace(semantic=2 * read.semantic)


class Halves(torch.nn.Module):
    """A memory of one's own that shares nothing with ours."""

    def forward(self, x):
        return MemoryRead(x / 4, None, x / 2)


def test_a_memory_of_ones_own_is_added_as_it_reads():
    torch.manual_seed(0)
    net = small(memory=Doubled(5, dim=512, shrink=0.0))
    x = torch.randn(2, net.dim, 6, 2)
    expected = (x + net.memory(x).semantic).mean(dim=(2, 3))
    torch.testing.assert_close(net._memory_feature(x)[0], expected)
    net = small(memory=Halves())
    feat, read = net._memory_feature(x)
    torch.testing.assert_close(feat, 1.5 * x.mean(dim=(2, 3)))
    health = MemoryHealth()
    health.update(read.weights)  # it says nothing of them
    assert health.summary() == {}
    with pytest.raises(ValueError, match="the memory reads no instance level"):
        small(memory=Halves(), memory_levels="instance")._memory_feature(x)
    assert net(*pictures(2))["memory_read"].part.shape[0] == 4


def test_a_memory_of_ones_own_is_saved_by_name_and_loaded_by_its_class(tmp_path, caplog):
    net = small(memory=Doubled(5, 2, 3, dim=512, shrink_scale=2.0)).eval()
    assert net.config["memory"] == "Doubled"
    save_checkpoint(tmp_path / "x.pt", {"net": net.state_dict(), "config": net.config})
    visible, _ = pictures()
    again, _ = load_network(tmp_path / "x.pt", memory=Doubled)
    assert isinstance(again.memory, Doubled)
    torch.testing.assert_close(
        again.eval().embed(visible, None, ("memory",))["memory"],
        net.embed(visible, None, ("memory",))["memory"],
    )
    without, _ = load_network(tmp_path / "x.pt")
    assert "loaded without it (--memory MODULE.CLASS)" in caplog.text
    torch.testing.assert_close(without.eval()(visible, None), net(visible, None))
    with pytest.raises(CheckpointError, match="its memory is 'Doubled', not 'Halves'"):
        load_network(tmp_path / "x.pt", memory=Halves)


def test_a_memory_like_sg_mra_s_is_built_without_a_variant(tmp_path):
    class Own(SingleGranularityMemory):
        pass

    net = small(memory=Own)
    save_checkpoint(tmp_path / "x.pt", {"net": net.state_dict(), "config": net.config})
    assert isinstance(load_network(tmp_path / "x.pt", memory=Own)[0].memory, Own)


def test_a_memory_that_takes_a_variant_gets_it():
    class Own(SingleGranularityMemory):
        def __init__(self, *args, variant, **more):
            super().__init__(*args, **more)
            self.variant = variant

    assert small(memory=Own, memory_variant="first").memory.variant == "first"


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="shrnk"):
        small(shrnk=0.3)


@pytest.mark.parametrize(("memory", "level"), [("mg", "part"), ("mg", "instance"), ("sg", "part")])
def test_the_level_asked_for_is_the_read_that_is_added(memory, level):
    net = small(memory=memory, memory_levels=level)
    x = torch.randn(2, net.dim, 6, 2)
    read = net.memory(x)
    expected = (x + getattr(read, level)).mean(dim=(2, 3))
    torch.testing.assert_close(net._memory_feature(x)[0], expected)
    out = net(*pictures(2))
    assert out["memory_read"].part.shape[0] == 4
    sum(v.sum() for v in (out["memory_logits"], out["feat"], out["part_logits"])).backward()
    without = {n for n, p in net.named_parameters() if p.requires_grad and p.grad is None}
    assert not without, "parameters that no loss reaches are not trained"
    assert (out["memory_read"].semantic is None) == (memory == "sg")


@pytest.mark.parametrize("head", ["pcb", "agw"])
def test_the_control_keeps_the_memory_branch_and_drops_the_memory(head):
    full, control = (small(head=head, memory="mg", memory_levels=k) for k in (None, "none"))
    names = {k for k in full.state_dict() if not k.startswith("memory.")}
    assert set(control.state_dict()) == names
    assert any(k.startswith("memory_neck") for k in names)
    out = control(*pictures(2))
    assert "memory_read" not in out
    assert {"memory_feat", "memory_logits"} <= set(out)
    x = torch.randn(2, control.dim, 6, 2)
    torch.testing.assert_close(control._memory_feature(x)[0], x.mean(dim=(2, 3)))
    assert control.test_feats() == full.test_feats()
    assert torch.isfinite(control.eval().embed(pictures(2)[0], None, ("both",))["both"]).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": "sg", "memory_levels": "semantic"},
        {"memory": "mg", "memory_variant": "released", "memory_levels": "instance"},
        {"memory": "mg", "memory_levels": "all"},
    ],
)
def test_levels_that_a_network_lacks(settings):
    with pytest.raises(ValueError, match="memory_levels"):
        small(**settings)


def test_checkpoints_rebuild_threshold_and_level(tmp_path):
    net = small(memory="mg", shrink_scale=0.5, memory_levels="instance")
    save_checkpoint(tmp_path / "x.pt", {"net": net.state_dict(), "config": net.config})
    again, _ = load_network(tmp_path / "x.pt")
    assert again.config == net.config
    assert again.memory.shrink_scale == 0.5
    assert again.memory_levels == "instance"
    older = {k: v for k, v in net.config.items() if k not in ("shrink_scale", "memory_levels")}
    save_checkpoint(tmp_path / "x.pt", {"net": net.state_dict(), "config": older})
    assert load_network(tmp_path / "x.pt")[0].memory_levels is None


def test_stripes_are_pooled_and_classified_one_by_one():
    net = small(num_strips=3, gem_p=2.0)
    x = torch.rand(4, 512, 6, 2)
    feats = net.part_features(x)
    logits = net.part_classifier(feats)
    for s in range(3):
        pooled = (x[:, :, 2 * s : 2 * s + 2] ** 2).mean(dim=(2, 3)).sqrt()
        reduced = pooled @ net.part_reduce.weight[s].t() + net.part_reduce.bias[s]
        norm = torch.nn.BatchNorm1d(16)(reduced).relu()
        torch.testing.assert_close(feats[:, s], norm, atol=1e-4, rtol=1e-3)
        expected = feats[:, s] @ net.part_classifier.weight[s].t() + net.part_classifier.bias[s]
        torch.testing.assert_close(logits[:, s], expected)


def test_initialisation():
    torch.manual_seed(0)
    net = small(num_ids=200, memory="mg", local_feat_dim=64)
    assert net.part_classifier.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not net.part_classifier.bias.any()
    assert net.part_reduce.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    assert net.memory_neck.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert net.memory_neck.bias.requires_grad
    bound = 1 / 512**0.5
    assert net.memory.part_bank.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert not small(head="agw").neck.bias.requires_grad


def test_head_parameters_are_the_part_layers_or_neck_and_classifier():
    names = {"pcb": ("part_",), **dict.fromkeys(("global", "agw"), ("neck.", "classifier."))}
    for head, prefixes in names.items():
        net = small(head=head, memory="mg")
        ids = {id(p) for p in net.head_parameters()}
        for name, p in net.named_parameters():
            assert (id(p) in ids) == (name.startswith(prefixes) and p.requires_grad), name


@pytest.mark.parametrize(("height", "fits"), [(96, True), (288, True), (100, False), (192, True)])
def test_heights_that_do_not_divide_are_refused_with_ones_that_do(height, fits):
    net = small()
    if fits:
        net.check_image_height(height)
        return
    with pytest.raises(ValueError, match="map of height 7.*6 stripes.*96, 192, 288"):
        net.check_image_height(height)
    with pytest.raises(ValueError, match="does not divide into 6 stripes"):
        net(*pictures(height=height))


def test_a_network_without_stripes_and_memory_takes_any_height():
    for head in ("global", "agw"):
        small(head=head).check_image_height(100)


def test_the_global_head_is_agw_s_without_non_local_blocks():
    ours, agw = (small(head=head).eval() for head in ("global", "agw"))
    names = agw.state_dict().keys()
    assert ours.state_dict().keys() == {name for name in names if "non_local" not in name} < names
    agw.load_state_dict(ours.state_dict(), strict=False)  # non-local blocks start as identities
    with torch.no_grad():
        for name in ("neck", "pool"):
            feats = [net.embed(*pictures(), (name,))[name] for net in (ours, agw)]
            torch.testing.assert_close(*feats)
    assert ours.test_feats() == ("neck", "pool")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "bnneck"}, "head must be one of: pcb, global, agw; got 'bnneck'"),
        ({"memory": "xl"}, "memory must be one of: None, sg, mg"),
        ({"share_net": 6}, "share_net must be one of: 0, 1, 2, 3, 4, 5; got 6"),
        ({"arch": "vgg16"}, "arch must be one of: resnet18"),
        ({"gem_p": 0.0}, "gem_p"),
        ({"num_ids": 0}, "num_ids"),
        ({"memory": "mg", "memory_variant": "x"}, "paper, first, released"),
    ],
)
def test_illegal_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_no_images_at_all():
    with pytest.raises(ValueError, match="got neither"):
        small().eval()(None, None)
