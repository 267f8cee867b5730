"""Tests of addresses.py: what is recorded is what the memory reads, counted naively."""

import numpy as np
import pytest
import torch

from figures import prototypes as addresses
from model import TwoStreamNet
from networks.sparse_read import Survivors, address

SIZE = (96, 32)


def network():
    torch.manual_seed(0)
    net = TwoStreamNet(3, memory="mg", arch="resnet18", local_feat_dim=8, share_net=1)
    # prototypes of a length that a map's positions tell apart
    torch.nn.init.normal_(net.memory.part_bank, std=0.1)
    return net.eval()


@pytest.mark.parametrize("modality", ["visible", "infrared"])
def test_what_is_addressed_is_what_the_memory_reads(modality):
    net = network()
    images = torch.randn(2, 3, *SIZE)
    levels, shape = addresses.addressed(net, images, modality)
    assert shape == (6, 2) and set(levels) == {"part", "instance", "semantic"}
    with torch.no_grad():
        x = net.feature_map(*((images, None) if modality == "visible" else (None, images)))
        part = net.memory(x).part
        banks = (net.memory.part_bank, *net.memory.banks())
        expected = address(x.permute(0, 2, 3, 1).flatten(0, 2), banks[0], net.memory.shrink)
    for (survivors, size), bank in zip(levels.values(), banks, strict=True):
        assert size == len(bank)
        assert len(survivors.offsets) == 2 * 6 * 2 + 1
    survivors = levels["part"][0]
    dense = torch.zeros(24, len(banks[0]))
    dense[survivors.rows(), survivors.columns] = survivors.weights
    torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-4)
    read = (dense @ banks[0]).view(2, 6, 2, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(read, part, atol=1e-4, rtol=1e-4)


def sparse(dense: np.ndarray) -> Survivors:
    rows, columns = np.nonzero(dense)
    offsets = np.concatenate([[0], np.cumsum((dense > 0).sum(axis=1))])
    return Survivors(*map(torch.from_numpy, (offsets, columns, dense[rows, columns])))


def test_fired_against_a_dense_matrix():
    rng = np.random.default_rng(0)
    dense = rng.random((3 * 6, 7)) * (rng.random((3 * 6, 7)) < 0.3)
    dense[6:12] = 0  # an image that reads nothing
    dense[12:, 2:] = 0  # and one that reads two prototypes at most
    found = addresses.fired(sparse(dense), 7, (3, 2), top=3)
    maps = dense.reshape(3, 6, 7)
    assert found.size == 7 and found.maps.shape == (3, 3, 3, 2)
    for image in range(3):
        totals = maps[image].sum(axis=0)
        strongest = [n for n in sorted(range(7), key=lambda n: -totals[n])[:3] if totals[n] > 0]
        assert [n for n in found.numbers[image] if n >= 0] == strongest
        for place, number in enumerate(strongest):
            np.testing.assert_allclose(
                found.maps[image, place].ravel(), maps[image, :, number], 1e-6
            )
    assert (found.numbers[1] == -1).all() and (found.maps[1] == 0).all()


def test_best_entries_are_one_an_image_and_descend():
    images, places = np.array([0, 0, 1, 1, 2, 2]), np.array([3, 1, 0, 2, 1, 1])
    columns, weights = np.array([5, 5, 5, 5, 4, 5]), np.array([0.2, 0.9, 0.4, 0.4, 1.0, 0.5])
    found = addresses.Addresses(images, places, columns, weights, (2, 2), 8)
    assert found.best(5, 9).tolist() == [1, 5, 2]
    assert found.best(5, 2).tolist() == [1, 5]
    assert found.best(0, 2).tolist() == []
    np.testing.assert_allclose(found.totals()[[4, 5, 0]], [1.0, 2.4, 0])


def test_patches_are_cut_around_their_position():
    image = np.random.default_rng(0).integers(0, 190, (96, 60, 3), dtype=np.uint8)
    middle = addresses.cut_patch(image, 1 * 4 + 1, (6, 4))
    np.testing.assert_array_equal(middle, image[0:48, 0:48])
    corner = addresses.cut_patch(image, 0, (6, 4))
    assert corner.shape == middle.shape
    np.testing.assert_array_equal(corner[16:, 16:], image[:32, :32])
    assert (corner[:16] == 200).all() and (corner[:, :16] == 200).all()
    last = addresses.cut_patch(image, 23, (6, 4))  # a map's last column may reach beyond the image
    np.testing.assert_array_equal(last[:32, :28], image[64:, 32:])
    assert (last[32:] == 200).all() and (last[:, 28:] == 200).all()


def test_a_memory_that_reads_nothing_is_refused():
    none = np.zeros(0, int)
    empty = addresses.Addresses(none, none, none, none, (6, 2), 9)
    both = {"visible": empty, "infrared": empty}
    with pytest.raises(ValueError, match="no position of the images reads any part prototype"):
        addresses.prototype_patches(both, {}, level="part", numbers=None, count=3, top=2)
