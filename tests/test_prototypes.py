"""Tests of figures/prototypes.py: what is recorded is what the memory reads, counted naively."""

import numpy as np
import pytest
import torch
from scipy import sparse

from figures import prototypes
from memory import read
from model import TwoStreamNet

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
    levels, shape = prototypes.addressing_weights(net, images.split(1), modality)
    assert shape == (6, 2) and set(levels) == {"part", "instance", "semantic"}
    with torch.no_grad():
        x = net.feature_map(*((images, None) if modality == "visible" else (None, images)))
        part = net.memory(x).part
        banks = (net.memory.part_bank, *net.memory.banks())
        expected = read(x, banks[0], net.memory.shrink)[1].to_dense()
    for weights, bank in zip(levels.values(), banks, strict=True):
        assert weights.shape == (2 * 6 * 2, len(bank))
    dense = torch.from_numpy(levels["part"].toarray())
    torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-4)
    values = (dense @ banks[0]).view(2, 6, 2, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(values, part, atol=1e-4, rtol=1e-4)


def test_fired_against_a_dense_matrix():
    rng = np.random.default_rng(0)
    dense = rng.random((3 * 6, 7)) * (rng.random((3 * 6, 7)) < 0.3)
    dense[6:12] = 0  # an image that reads nothing
    dense[12:, 2:] = 0  # and one that reads two prototypes at most
    found = prototypes.fired(sparse.csr_matrix(dense), (3, 2), top=3)
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


def test_best_positions_are_one_an_image_and_descend():
    dense = np.zeros((12, 8))  # three images of 2 x 2 positions
    for row, column, weight in (
        *((3, 5, 0.2), (1, 5, 0.9), (4, 5, 0.4), (6, 5, 0.4), (9, 4, 1.0), (9, 5, 0.5)),
    ):
        dense[row, column] = weight
    weights = sparse.csc_matrix(dense)
    for number, top, rows, values in (
        (5, 9, [1, 9, 4], [0.9, 0.5, 0.4]),
        (5, 2, [1, 9], [0.9, 0.5]),
        (0, 2, [], []),
    ):
        found = prototypes.best_positions(weights, number, 4, top)
        assert found[0].tolist() == rows and found[1].tolist() == values


def test_patches_are_cut_around_their_position():
    image = np.random.default_rng(0).integers(0, 190, (96, 60, 3), dtype=np.uint8)
    middle = prototypes.cut_patch(image, 1 * 4 + 1, (6, 4))
    np.testing.assert_array_equal(middle, image[0:48, 0:48])
    corner = prototypes.cut_patch(image, 0, (6, 4))
    assert corner.shape == middle.shape
    np.testing.assert_array_equal(corner[16:, 16:], image[:32, :32])
    assert (corner[:16] == 200).all() and (corner[:, :16] == 200).all()
    last = prototypes.cut_patch(image, 23, (6, 4))  # a map's last column may reach beyond the image
    np.testing.assert_array_equal(last[:32, :28], image[64:, 32:])
    assert (last[32:] == 200).all() and (last[:, 28:] == 200).all()


def test_a_memory_that_reads_nothing_is_refused():
    both = dict.fromkeys(prototypes.MODALITIES, sparse.csr_matrix((24, 9)))
    choice = {"count": 3, "top": 2}
    with pytest.raises(ValueError, match="no position of the images reads any part prototype"):
        prototypes.prototype_patches(both, {}, (6, 2), level="part", **choice)


def test_alike_are_equal_weights_that_are_read():
    assert prototypes.alike(np.full(5, 0.04)) and prototypes.alike(np.array([0.04, 0.04001]))
    assert not prototypes.alike(np.array([0.04, 0.05])) and not prototypes.alike(np.zeros(3))
