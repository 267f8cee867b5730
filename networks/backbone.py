"""The backbone: residual stages with AGW's non-local blocks, and the weights they start from.

Another backbone is one more entry of `BACKBONES`.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from networks.checkpoint_file import CheckpointError, load_checkpoint
from networks.settings import STAGES

NON_LOCAL_BLOCKS = {"layer2": 2, "layer3": 3}  # AGW: after each stage's last so many blocks
OUTPUT_STRIDE = 16  # pixels of the image per position of the last map, which is not negative

Stages = OrderedDict[str, nn.Module]


class NonLocal(nn.Module):
    """AGW's non-local block: one inner channel, scores divided by the number of positions.

    With a single inner channel the attended value factorises: ``sum_j theta_i phi_j g_j / n`` is
    ``theta_i`` times the mean of ``phi * g``, so no (n x n) score matrix is needed.

    Source: AGW (arXiv 2001.04193). The residual path starts at zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = nn.Conv2d(channels, 1, 1)
        self.phi = nn.Conv2d(channels, 1, 1)
        self.g = nn.Conv2d(channels, 1, 1)
        self.project = nn.Conv2d(1, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over the positions of x (N, C, H, W); same shape."""
        attended = self.theta(x) * (self.phi(x) * self.g(x)).mean(dim=(2, 3), keepdim=True)
        return x + self.norm(self.project(attended))


class Stage(nn.Module):
    """One residual stage; each of its last `num_non_local` blocks has a non-local one behind it."""

    def __init__(self, blocks: nn.Sequential, channels: int, num_non_local: int) -> None:
        super().__init__()
        self.blocks = blocks
        count = min(num_non_local, len(blocks))
        self.non_local = nn.ModuleList(NonLocal(channels) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x through the stage."""
        first = len(self.blocks) - len(self.non_local)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= first:
                x = self.non_local[i - first](x)
        return x


def resnet_stages(
    arch: str, state: Mapping[str, Tensor] | None, origin: str, non_local: bool
) -> Stages:
    """Stages of a torchvision ResNet whose last stride is 1 in place of 2."""
    resnet = torchvision.models.get_model(arch, weights=None)
    if state is not None:
        _load(resnet, state, origin)
    for module in resnet.layer4[0].modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
    stem = ((name, getattr(resnet, name)) for name in ("conv1", "bn1", "relu", "maxpool"))
    stages: Stages = OrderedDict(stem=nn.Sequential(OrderedDict(stem)))
    channels = resnet.fc.in_features  # of layer4; each earlier stage has half of the next one's
    for i, name in enumerate(STAGES[1:]):
        count = NON_LOCAL_BLOCKS.get(name, 0) if non_local else 0
        stages[name] = Stage(getattr(resnet, name), channels // 2 ** (3 - i), count)
    return stages


def _load(resnet: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Loads weights into a torchvision ResNet, classifier and counters aside."""
    unused = ("fc.weight", "fc.bias", "num_batches_tracked")
    own = {k: v for k, v in resnet.state_dict().items() if not k.endswith(unused)}
    wrong = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
    if wrong:
        raise CheckpointError(
            f"{origin} does not fit this backbone: {len(wrong)} of {len(own)} entries are missing "
            f"or of another shape, {wrong[0]} first; is --arch right?"
        )
    resnet.load_state_dict({k: state[k] for k in own}, strict=False)


class Trunk(nn.Sequential):
    """Stages in a row. `--compile` makes one graph of this `forward`; not of nn.Sequential's."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps images, or the map of the stages before."""
        for stage in self:
            x = stage(x)
        return x


@dataclass(frozen=True)
class Backbone:
    """A backbone that ``--arch`` can name."""

    channels: int  # C, of the last map
    # (weights or None, where they come from, whether to add non-local blocks) -> the five `STAGES`
    build: Callable[[Mapping[str, Tensor] | None, str, bool], Stages]


BACKBONES = {
    "resnet18": Backbone(512, partial(resnet_stages, "resnet18")),
    "resnet34": Backbone(512, partial(resnet_stages, "resnet34")),
    "resnet50": Backbone(2048, partial(resnet_stages, "resnet50")),
    "resnet101": Backbone(2048, partial(resnet_stages, "resnet101")),
}


def find_backbone(arch: str) -> Backbone:
    """Returns an entry of `BACKBONES`; ValueError, naming all of them, where there is none."""
    if arch not in BACKBONES:
        raise ValueError(f"arch must be one of: {', '.join(BACKBONES)}; got {arch!r}")
    return BACKBONES[arch]


def read_weights(arch: str, weights: str | Path) -> dict[str, Tensor]:
    """Returns the state dict that ``--weights`` names.

    That is "imagenet" (torchvision's V1, as the earlier releases used), or a file with a
    torchvision backbone or a whole network.

    Raises:
        FileNotFoundError: When ImageNet weights are neither cached nor downloadable.
        CheckpointError: When a file cannot be used.
    """
    if str(weights) != "imagenet":
        return load_checkpoint(weights)["net"]
    imagenet = torchvision.models.get_model_weights(arch).IMAGENET1K_V1
    try:
        return imagenet.get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:
        name = imagenet.url.rsplit("/", 1)[1]
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise FileNotFoundError(
            f"ImageNet weights for {arch} could not be downloaded ({error}). Put {name} (from "
            f"{imagenet.url}) into {folder}, or name its place with --weights PATH, or train from "
            f"random weights with --weights none (and --preset scratch)"
        ) from error
