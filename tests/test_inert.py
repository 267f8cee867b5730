"""As published, MG-MRA's memory is inert; docs/what_the_memory_does.md says why."""

import re

import pytest
import torch
from short_run import NARROW, write_data

from docs import memory_numbers
from docs.memory_numbers import loss_terms
from memory import MultiGranularityMemory
from model import TwoStreamNet
from networks.backbone import BACKBONES
from networks.checkpoint_file import save_checkpoint
from networks.settings import LEVELS


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """A narrow ResNet: prototypes have the norms of 2048 channels, and some part reads pass."""
    monkeypatch.setitem(BACKBONES, "resnet18", NARROW["resnet18"])


@pytest.fixture(scope="module")
def without():
    """The loss terms of the control."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "resnet18", NARROW["resnet18"])
        return loss_terms(memory_levels="none")[0]


def largest_difference(first, second):
    return float((first - second).abs().max())


@pytest.mark.parametrize("variant", ["paper", "first"])
def test_a_cascade_trains_like_no_memory(variant, without):
    losses, zero_part_reads, gradient = loss_terms(memory_variant=variant)
    assert largest_difference(losses, without) < 1e-10
    assert gradient < 1e-15  # of the bank, relative to it: rounding
    assert max(zero_part_reads) < 1  # not because nothing was read at all
    assert largest_difference(without[0], without[-1]) > 0.1  # the steps did change the network


def test_released_trains_nearly_like_no_memory(without):
    losses, _, gradient = loss_terms(memory_variant="released")
    assert 1e-10 < largest_difference(losses[0], without[0]) < 1e-4
    assert 1e-10 < gradient < 1e-5
    # A hundredth of the rate: the steps themselves enlarge any difference.
    slow = loss_terms(lr=1e-4, memory_variant="released")[0]
    assert largest_difference(slow, loss_terms(lr=1e-4, memory_levels="none")[0]) < 1e-3


def test_lambda_zero_does_not_wake_the_cascade(without):
    losses, zero_part_reads, _ = loss_terms(shrink=0.0)
    assert max(zero_part_reads) == 0
    assert largest_difference(losses, without) < 1e-7


@pytest.mark.parametrize("settings", [{"shrink_scale": 1.0}, {"memory_levels": "part"}])
def test_the_comparison_sees_a_memory_that_acts(without, settings):
    losses, _, gradient = loss_terms(**settings)
    assert largest_difference(losses, without) > 1e-3
    assert gradient > 1e-6


@pytest.mark.parametrize("norm", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("variant", ["paper", "first"])
def test_the_instance_level_is_shut_for_any_map(variant, norm):
    torch.manual_seed(0)
    memory = MultiGranularityMemory(206, dim=32, variant=variant)
    with torch.no_grad():
        read = memory(norm * torch.randn(2, 32, 3, 3).relu())
    assert not read.instance.any()
    assert read.semantic.flatten(2).std(dim=2).max() < 1e-7
    assert read.part.any() == (norm > 1)


def test_a_query_reads_from_the_norm_that_it_needs():
    gen = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 8, generator=gen), torch.randn(20, 8, generator=gen)
    needed = torch.tensor(memory_numbers.norm_needed(queries, bank, 0.3)).unsqueeze(1)
    assert needed.isfinite().all()
    for factor, reads in ((0.99, False), (1.01, True)):
        weights = (factor * needed * queries @ bank.t()).softmax(dim=1)
        assert ((weights > 0.3).any(dim=1) == reads).all()
        bound = memory_numbers.largest_weight(float((factor * needed * queries).norm()), bank)
        assert weights.max() <= bound
    assert not memory_numbers.norm_needed(queries, bank, 0.01).any()


@pytest.mark.parametrize("variant", ["paper", "first", "released"])
def test_a_checkpoint_is_measured(variant, tmp_path):
    memory = memory_numbers.initial_memory(6, dim=32, variant=variant)
    net = TwoStreamNet(6, memory=memory, arch="resnet18")
    options = {"dataset": "regdb", "trial": 1, "arch": "resnet18", "w_alignment": 0.1}
    line = {"epoch": 1, "alignment": 0.5, "total": 5.0, "eval": {"rank1": 0.5, "mAP": 0.25}}
    line |= {f"memory/{level}/zero_reads": 0.5 for level in LEVELS}
    content = {"net": net.state_dict(), "config": net.config, "log": [line]}
    path = tmp_path / "last.pt"
    save_checkpoint(path, {**content, "options": options | {"img_h": 96, "img_w": 32}})
    data = write_data(tmp_path / "data")
    if variant == "released":
        with pytest.raises(ValueError, match="no memory of MG-MRA's variant paper or first"):
            memory_numbers.checkpoint_rows(path, data)
        return
    words, rows = memory_numbers.checkpoint_rows(path, data)
    assert "6 identities, resnet18 (C = 32), 1 epochs" in words and "1e-02" in words
    assert [row[:2] for row in rows] == [["part", "180"], ["instance", "30"], ["semantic", "6"]]
    assert all(row[2] == row[3] for row in rows)  # the mean prototype: never trained
    assert [row[6:] for row in rows] == [["0.0", "180.0"], ["0.0", "30.0"], ["0.0", "6.0"]]


# --- the page -------------------------------------------------------------------------------------


def rows_of(block):
    text = memory_numbers.PAGE.read_text()
    lines = text.split(f"<!-- {block} -->\n")[1].split(f"\n<!-- end of {block} -->")[0].splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return cells[2:]  # below the heads


def same(shown, computed):
    """Whether two cells have the same words, and numbers but for another processor's rounding."""
    number = r"\d+(?:\.\d+)?(?:e-\d+)?"
    pairs = zip(re.findall(number, shown), re.findall(number, computed), strict=True)
    close = all(float(a) == pytest.approx(float(b), rel=0.05, abs=1e-7) for a, b in pairs)
    return close and re.sub(number, "", shown) == re.sub(number, "", computed)


@pytest.mark.parametrize("block", ["banks", "rules"])
def test_the_page_shows_what_the_script_computes(block):
    make = {"banks": memory_numbers.bank_rows, "rules": memory_numbers.rule_rows}[block]
    shown = [row for row in rows_of(block) if row[0] == "206"]
    for ours, computed in zip(shown, make(206), strict=True):
        assert all(map(same, ours, computed)), (ours, computed)


def test_the_page_has_a_row_of_each_bank_and_training():
    levels = {(row[0], row[1]) for row in rows_of("banks")}
    assert len(levels) == 3 * len(memory_numbers.BANKS)
    assert [row[0] for row in rows_of("trainings")] == list(memory_numbers.TRAININGS)
    assert [row[0] for row in rows_of("checkpoint")] == ["part", "instance", "semantic"]
    prose = [x for x in memory_numbers.PAGE.read_text().splitlines() if not x.startswith("|")]
    assert len(" ".join(prose).split()) < 1000
    assert memory_numbers.FIGURE.stat().st_size < 200_000
