"""What networks of dense tasks have in common: a pyramid backbone, and parts of their own beside it."""

import zlib
from collections.abc import Collection

from torch import nn

from swin_moe.models.dense import counting
from swin_moe.models.dense.layers import init_weights
from swin_moe.models.dense.pyramid import PyramidBackbone
from swin_moe.models.network import Network
from swin_moe.randomness import derive_key


class DenseNetwork(Network):
    """A pyramid backbone as `backbone`, and heads in other children, which subclasses add.

    Args:
        image_size: (height, width) that images of training have, for counts of work.
        official_groups: Weight decay where the official optimizers have it: on all biases, and on batch norms.
    """

    def __init__(
        self, backbone: PyramidBackbone, *, image_size: tuple[int, int], official_groups: bool = False
    ) -> None:
        super().__init__()
        self.backbone, self.image_size, self.vectors_decay = backbone, image_size, official_groups

    def init_weights(self, seed: int, only: Collection[nn.Module] | None = None) -> None:
        """See Network: the backbone's as its own, parts beside it as their layers are marked (layers.py)."""
        self.backbone.init_weights(seed, only)
        for name, child in self.named_children():
            if isinstance(child, DenseNetwork):  # a whole network, which begins as this one
                child.init_weights(seed, only)
            elif name != "backbone":
                key = derive_key(seed, zlib.crc32(name.encode()))
                init_weights(child, key, std=self.backbone.config.init_std, only=only)

    def no_weight_decay(self) -> set[str]:
        """See Network."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def no_weight_decay_keywords(self) -> set[str]:
        """See Network."""
        return self.backbone.no_weight_decay_keywords() | ({"norm"} if self.vectors_decay else set())

    def head_parameters(self) -> set[str]:
        """Returns full names of all that stands beside the backbone."""
        return {name for name, _ in self.named_parameters() if not name.startswith("backbone.")}

    def counted(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns (what the official counter sees, attention's two products) of one image of this (height, width)."""
        seen, attention = counting.backbone(self.backbone.config, size, self.backbone.out_indices)
        maps = counting.map_sizes(self.backbone.config, size)
        return seen + self.counted_beside([maps[i] for i in self.backbone.out_indices]), attention

    def counted_beside(self, maps: list[tuple[int, int]]) -> int:
        """Returns what the official counter sees of the parts beside the backbone, whose maps have these sizes."""
        raise NotImplementedError(f"{type(self).__name__} has no counted_beside (swin_moe/models/dense/network.py)")

    def flops(self) -> float:
        """Returns the multiply-accumulates of one image of `image_size`: of the official counter, and attention's."""
        return float(sum(self.counted(self.image_size)))

    def active_flops(self) -> float:
        """Returns what an image costs; see flops."""
        return self.flops()
