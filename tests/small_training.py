"""A network and a loader that train in a second."""

import math
from types import SimpleNamespace

import torch

from model import TwoStreamNet


def small(**settings):
    torch.manual_seed(0)
    return TwoStreamNet(**{"num_ids": 4, "arch": "resnet18", "local_feat_dim": 8, **settings})


class Loader:
    """A few fixed batches an epoch."""

    def __init__(self, poison_step=None, steps=2):
        self.poison_step, self.steps = poison_step, steps

    def __len__(self):
        return self.steps

    def epoch(self, epoch):
        labels = torch.tensor([0, 0, 1, 1]).repeat(2)
        for step in range(self.steps):
            gen = torch.Generator().manual_seed(10 * epoch + step)
            images = [torch.randn(4, 3, 96, 32, generator=gen) for _ in range(2)]
            if step == self.poison_step:
                images[0][0, 0, 0, 0] = math.nan
            yield SimpleNamespace(visible=images[0], infrared=images[1], labels=labels)
