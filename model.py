"""The network: two-stream ResNet, HCT (PCB) and AGW heads, memory branch.

Shapes: ``N`` rows of a batch (visible first, then infrared), ``S`` stripes, ``C`` backbone
channels, ``L`` training identities. The last map of an image of H x W pixels is H/16 x W/16.
"""

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory import MemoryRead, MultiGranularityMemory, SingleGranularityMemory
from networks.backbone import OUTPUT_STRIDE, Trunk, find_backbone, read_weights
from networks.layers import StripeLinear, at_least_float32, gem, linear_classifier, neck_norm
from networks.released import convert_released_state_dict, load_matching  # noqa: F401
from networks.settings import INSTANCES_PER_ID, LEVELS, PARTS_PER_INSTANCE, SHRINK, STAGES

HEADS = ("pcb", "global", "agw")
MEMORIES = {"sg": SingleGranularityMemory, "mg": MultiGranularityMemory}


class TwoStreamNet(nn.Module):
    """Two-stream ResNet with an HCT (``pcb``, ``global``) or AGW head, and a memory branch or none.

    The memory acts in training; evaluation runs it only where a memory feature is asked for.

    Source: AGW, HCT and MG-MRA, detail by detail in `docs/details.md`.
    """

    def __init__(
        self,
        num_ids: int,
        head: str = "pcb",
        memory: str | type[nn.Module] | nn.Module | None = None,
        memory_variant: str = "paper",
        share_net: int = 2,
        num_strips: int = 6,
        local_feat_dim: int = 256,
        gem_p: float = 3.0,
        arch: str = "resnet50",
        weights: str | Path | None = None,
        *,
        memory_levels: str | None = None,
        memory_ids: int | None = None,
        instances_per_id: int = INSTANCES_PER_ID,
        parts_per_instance: int = PARTS_PER_INSTANCE,
        shrink: float = SHRINK,
        shrink_scale: float | None = None,
        temperature: float | None = None,
    ) -> None:
        """Builds the network for L = `num_ids` training identities.

        The head is "pcb" (HCT's stripes), "global" (HCT's baseline: AGW's head without its
        non-local blocks) or "agw". Stages are shared from the `share_net`-th on: 0 shares all, 1
        all but the stem, ..., 5 nothing. The `weights` are "imagenet", a file with a torchvision
        backbone or any checkpoint, or None (also "none") for random ones.

        The memory is "sg", "mg", a class built like `memory.MultiGranularityMemory`, or a finished
        module from a map (N, C, H, W) to a `MemoryRead`. The first three are built here, with
        `memory_variant`, the settings from `instances_per_id` on, and prototypes for `memory_ids`
        identities (None: L; the releases' has 206 whatever the data set).

        `memory_levels` names the one level whose read is added to the map. None: the method's own,
        SG-MRA's "part" and MG-MRA's "semantic". "none": a control that keeps pooling, neck,
        classifier and losses of the memory branch and has no memory.

        Raises:
            ValueError: When an argument has no legal value, or weights do not fit.
            FileNotFoundError: When weights are neither there nor downloadable.
        """
        super().__init__()
        _check_choice("head", head, HEADS)
        _check_choice("share_net", share_net, range(len(STAGES) + 1))
        if not isinstance(memory, nn.Module | type):
            _check_choice("memory", memory, (None, *MEMORIES))
        if not (gem_p > 0 and num_ids > 0 and num_strips > 0):
            numbers = f"{gem_p}, {num_ids}, {num_strips}"
            raise ValueError(f"gem_p, num_ids, num_strips must be positive; got {numbers}")
        self.head, self.num_strips, self.gem_p = head, num_strips, gem_p
        self.memory_levels = memory_levels

        # Backbone: the stages below share_net once a modality, the others once.
        backbone = find_backbone(arch)
        state = None if weights in (None, "none") else read_weights(arch, weights)
        whole_network = state is not None and "conv1.weight" not in state  # no torchvision ResNet
        stages = backbone.build(None if whole_network else state, str(weights), head == "agw")
        stages = list(stages.items())
        self.dim = backbone.channels
        self.visible = Trunk(OrderedDict(stages[:share_net]))
        self.infrared = copy.deepcopy(self.visible)
        self.shared = Trunk(OrderedDict(stages[share_net:]))

        # Head: HCT's stripes, or the neck of the whole map's feature.
        if head == "pcb":
            self.part_reduce = StripeLinear(num_strips, self.dim, local_feat_dim)
            # One batch norm over S*d channels equals one over d channels for each stripe.
            self.part_norm = nn.BatchNorm1d(num_strips * local_feat_dim)
            classifier = StripeLinear(num_strips, local_feat_dim, num_ids, classifies=True)
            self.part_classifier = classifier
        else:
            self.neck = neck_norm(self.dim)
            self.classifier = linear_classifier(self.dim, num_ids)

        # Memory branch: the memory, and neck and classifier of its own.
        memory_settings = {
            "instances_per_id": instances_per_id,
            "parts_per_instance": parts_per_instance,
            "shrink": shrink,
            "shrink_scale": shrink_scale,
            "temperature": temperature,
        }
        memory = MEMORIES.get(memory, memory)
        if isinstance(memory, type):
            takes_one = "variant" in inspect.signature(memory).parameters
            takes_one = takes_one or issubclass(memory, MultiGranularityMemory)
            variant = {"variant": memory_variant} if takes_one else {}
            memory = memory(memory_ids or num_ids, dim=self.dim, **memory_settings, **variant)
        levels = memory.levels if isinstance(memory, SingleGranularityMemory) else LEVELS
        _check_choice("memory_levels", memory_levels, (None, "none", *levels))
        self.memory = None if memory_levels == "none" else memory
        self.memory_neck = None
        if memory is not None:
            self.memory_neck = neck_norm(self.dim, train_bias=True)
            self.memory_classifier = linear_classifier(self.dim, num_ids)
        if isinstance(self.memory, MultiGranularityMemory):  # freezes gates that no loss reaches
            self.memory.part_gate.requires_grad_(memory_levels != "part")
            self.memory.instance_gate.requires_grad_(memory_levels in (None, "semantic"))

        names = {kind: name for name, kind in MEMORIES.items()}
        memory_ids = getattr(memory, "num_ids", memory_ids)
        self.config = {
            "num_ids": num_ids,
            "head": head,
            "memory": None if memory is None else names.get(type(memory), type(memory).__name__),
            "memory_variant": getattr(memory, "variant", memory_variant),
            "share_net": share_net,
            "num_strips": num_strips,
            "local_feat_dim": local_feat_dim,
            "gem_p": gem_p,
            "arch": arch,
            **{k: getattr(memory, k, v) for k, v in memory_settings.items()},
            "memory_levels": memory_levels,
            "memory_ids": None if memory_ids == num_ids else memory_ids,
        }
        if whole_network:
            load_matching(self, state, str(weights))

    def check_image_height(self, height: int) -> None:
        """Raises ValueError, with heights that fit, unless the image's map divides into stripes."""
        needs_stripes = self.head == "pcb" or self.memory is not None
        map_height = math.ceil(height / OUTPUT_STRIDE)
        if needs_stripes and map_height % self.num_strips:
            unit = OUTPUT_STRIDE * self.num_strips
            raise ValueError(
                f"an image height of {height} gives a map of height {map_height}, which does not "
                f"divide into {self.num_strips} stripes; multiples of {unit} do: {unit}, "
                f"{2 * unit}, {3 * unit}, ... (--img_h), or change --num_strips"
            )

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters trained at the full rate; all others, memory included, take a tenth of it."""
        if self.head == "pcb":
            modules = (self.part_reduce, self.part_norm, self.part_classifier)
        else:
            modules = (self.neck, self.classifier)
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def feature_map(self, visible: Tensor | None = None, infrared: Tensor | None = None) -> Tensor:
        """Maps images (n, 3, H, W) of either or both modalities to (N, C, H/16, W/16)."""
        streams = ((self.visible, visible), (self.infrared, infrared))
        maps = [stream(images) for stream, images in streams if images is not None]
        if not maps:
            raise ValueError("give visible images, infrared images or both; got neither")
        return self.shared(torch.cat(maps))

    def part_features(self, feature_map: Tensor) -> Tensor:
        """Stripe features (N, S, d) of a map (N, C, H, W)."""
        n, c, h, w = feature_map.shape
        self.check_image_height(h * OUTPUT_STRIDE)
        stripes = feature_map.reshape(n, c, self.num_strips, h // self.num_strips, w)
        pooled = gem(stripes, self.gem_p, dims=(3, 4)).transpose(1, 2)  # (N, S, C)
        reduced = self.part_reduce(pooled)
        return F.relu(self.part_norm(reduced.flatten(1))).view_as(reduced)

    def forward(
        self, visible: Tensor | None, infrared: Tensor | None
    ) -> dict[str, Tensor | MemoryRead] | Tensor:
        """Training: everything the losses need; evaluation: the first of `test_feats`, (N, D).

        In training mode a dict with N = all rows, visible first: with the pcb head ``feat``
        (N, S*d), ``part_feats`` (N, S, d) and ``part_logits`` (N, S, L), with the others ``feat``
        (N, C) and ``logits`` (N, L), and with a memory ``memory_feat`` (N, C), ``memory_logits``
        (N, L), ``memory_read`` (a `MemoryRead`; none where `memory_levels` is "none").
        """
        if not self.training:
            name = self.test_feats()[0]
            return self.embed(visible, infrared, (name,))[name]
        x = self.feature_map(visible, infrared)  # (N, C, H, W)
        if self.head == "pcb":
            parts = self.part_features(x)
            logits = self.part_classifier(parts)
            out = {"feat": parts.flatten(1), "part_feats": parts, "part_logits": logits}
        else:
            feat = gem(x, self.gem_p, dims=(2, 3))
            out = {"feat": feat, "logits": self.classifier(self.neck(feat))}
        if self.memory_neck is not None:
            feat, read = self._memory_feature(x)
            if read is not None:
                out["memory_read"] = read
            out["memory_feat"] = feat
            out["memory_logits"] = self.memory_classifier(self.memory_neck(feat))
        return out

    def _memory_feature(self, x: Tensor) -> tuple[Tensor, MemoryRead | None]:
        """Mean over positions of the map x plus its read, (N, C), and all reads if any."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        feat = x.mean(dim=(2, 3), dtype=dtype)
        if self.memory is None:
            return feat, None
        read = self.memory(x)
        added = getattr(read, self.memory_levels) if self.memory_levels else read.coarsest()
        if added is None:
            raise ValueError(f"the memory reads no {self.memory_levels} level (memory_levels)")
        return feat + added.mean(dim=(2, 3), dtype=dtype), read

    def test_feats(self) -> tuple[str, ...]:
        """Names that `embed` accepts, the headline first."""
        names = self.default_test_feats()
        return names if self.memory_neck is None else (*names, "memory", "both")

    def default_test_feats(self) -> tuple[str, ...]:
        """Features that are reported when none is asked for; none of them runs the memory."""
        return ("pcb",) if self.head == "pcb" else ("neck", "pool")

    def embed(
        self, visible: Tensor | None, infrared: Tensor | None, test_feats: Sequence[str]
    ) -> dict[str, Tensor]:
        """Retrieval features (N, D), L2-normalised, of images (n, 3, H, W) in evaluation mode.

        Their names are "pcb": concatenated stripes; "neck" and "pool": the whole map's after and
        before the neck; "memory": the memory feature after its neck; "both": the headline, pcb or
        neck, and the memory feature, side by side with equal weight.
        """
        for name in test_feats:
            _check_choice("test feature", name, self.test_feats())
        x = self.feature_map(visible, infrared)
        return {name: self._embed_map(x, name) for name in test_feats}

    def _embed_map(self, x: Tensor, test_feat: str) -> Tensor:
        """One kind of retrieval feature (N, D) of a map (N, C, H, W)."""
        if test_feat == "both":
            pair = [self._embed_map(x, name) for name in (self.test_feats()[0], "memory")]
            return F.normalize(torch.cat(pair, dim=1))
        if test_feat == "pcb":
            feat = self.part_features(x).flatten(1)
        elif test_feat == "memory":
            feat = self.memory_neck(self._memory_feature(x)[0])
        else:
            feat = gem(x, self.gem_p, dims=(2, 3))
            feat = self.neck(feat) if test_feat == "neck" else feat
        return F.normalize(at_least_float32(feat))


def _check_choice(name: str, value: object, legal: Sequence[object]) -> None:
    """Raises ValueError naming the value met and the legal ones."""
    if value not in legal:
        raise ValueError(f"{name} must be one of: {', '.join(map(str, legal))}; got {value!r}")
