"""Prototypes taken from the training images: what ``--bank-init features`` does.

Shapes: ``L`` training identities, ``T`` instances, ``R`` parts, ``C`` channels, ``b`` images.
"""

from collections.abc import Sequence

import numpy as np
import torch

from data_loader import TrainLoader
from datasets.transforms import normalize
from engine import distributed
from model import TwoStreamNet

MODALITIES = ("visible", "infrared")  # of the instances of an identity, in turn
IMAGES_AT_A_TIME = 64
BANK_STREAM = 4  # its random generator starts from (seed, 4)


@torch.no_grad()
def fill_bank(
    net: TwoStreamNet,
    optimizer: torch.optim.Optimizer,
    loader: TrainLoader,
    labels: Sequence[np.ndarray],
    *,
    seed: int,
) -> None:
    """Sets each part prototype to a feature of its identity and body part.

    Prototype (l, t, r) becomes one position, in horizontal part r, of the last map of one image of
    identity l; instances are images of the two modalities in turn. Images and positions are drawn
    from the seed, images are not augmented, and the network is in evaluation mode. What the
    optimiser had accumulated for the bank is zeroed. The memory is of the kind of
    `memory.SingleGranularityMemory`; `labels` are of the loader's visible and of its infrared
    images, (n,) each, 0..L-1.
    """
    memory = net.memory
    num_ids, num_parts = memory.num_ids, memory.parts_per_instance
    bank = memory.part_bank.view(num_ids, memory.instances_per_id, num_parts, memory.dim)
    rng = np.random.default_rng((seed, BANK_STREAM))
    down, across = rng.random((2, *bank.shape[:3]))  # place within the part and within the map
    net.eval()
    for t in range(memory.instances_per_id):
        modality, own = MODALITIES[t % 2], labels[t % 2]
        chosen = [rng.choice(np.flatnonzero(own == label)) for label in range(num_ids)]
        for start in range(0, num_ids, IMAGES_AT_A_TIME):
            ids = slice(start, start + IMAGES_AT_A_TIME)
            x = normalize(getattr(loader, modality).gather(np.array(chosen[ids])))  # (b, 3, H, W)
            x = net.feature_map(**{modality: x})
            rows = (np.arange(num_parts) + down[ids, t]) * x.shape[2] / num_parts  # (b, R)
            columns = across[ids, t] * x.shape[3]  # (b, R)
            rows, columns = (torch.from_numpy(at).long() for at in (rows, columns))
            bank[ids, t] = x[torch.arange(len(x))[:, None], :, rows, columns]  # (b, R, C)
    distributed.share([memory.part_bank])
    for state in filter(torch.is_tensor, optimizer.state.get(memory.part_bank, {}).values()):
        state.zero_()
