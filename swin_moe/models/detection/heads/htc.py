"""What Hybrid Task Cascade and HTC++ have beside a cascade's heads.

SemanticHead (arXiv:1901.07518; open-mmlab/mmdetection 2.11.0, mask_heads/fused_semantic_head.py): all levels in one
map, what every pixel is, and features that boxes and masks add to theirs.

GlobalBlock is HTC++'s global attention over the backbone's last map, rebuilt: the authors released neither code nor
weights. A pre-norm transformer block over all tokens of the stride-32 map, with an MLP of four times the width, is what
fits the published parameters and operations of both networks (159.5 M and 1,043 G with Swin-B, 283.8 M and 1,470 G with
Swin-L). What those numbers do not tell is chosen here: no position bias, and its place after the output norm.

Shape legend: B images, C channels, K classes, H x W of a map.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.dense.layers import ConvModule, with_initial
from swin_moe.models.detection.losses import semantic_loss
from swin_moe.models.detection.spec import SemanticSpec
from swin_moe.models.detection.targets import LossSums
from swin_moe.models.layers import ModuleList, widened
from swin_moe.ops.layer_norm import LayerNorm


class SemanticHead(nn.Module):
    """Lateral convolutions of all levels, their sum, convolutions, and two outputs, under the official names."""

    def __init__(self, spec: SemanticSpec, channels: int, levels: int) -> None:
        super().__init__()
        self.spec = spec
        self.lateral_convs = ModuleList(ConvModule(channels, channels, 1) for _ in range(levels))
        self.convs = ModuleList(ConvModule(channels, channels, 3) for _ in range(spec.convs))
        self.conv_embedding = ConvModule(channels, channels, 1)
        self.conv_logits = with_initial(nn.Conv2d(channels, spec.num_classes, 1), "he")

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns logits (B, K, H, W) and features (B, C, H, W)."""
        size, x = maps[self.spec.level].shape[2:], None
        order = sorted(range(len(maps)), key=lambda level: level != self.spec.level)  # the map's own level first
        for level in order:
            own = maps[level]
            if level != self.spec.level:
                own = F.interpolate(own, size=size, mode="bilinear", align_corners=True)
            lateral = self.lateral_convs[level](own)
            x = lateral if x is None else x + lateral
        assert x is not None, "a network has levels"
        for conv in self.convs:
            x = conv(x)
        return widened(self.conv_logits(x)), self.conv_embedding(x)

    def losses(self, logits: Tensor, label_map: Tensor) -> LossSums:
        """Returns loss_semantic_seg, a mean over labelled pixels of the map.

        label_map: (B, height, width) int64 of the image's pixels or of the map's, of which the first of every cell
            counts; 255 = not labelled.
        """
        step = -(-label_map.shape[1] // logits.shape[2])
        total, count = semantic_loss(logits, label_map[:, ::step, ::step])
        return LossSums({"loss_semantic_seg": total * self.spec.loss_weight}, {"loss_semantic_seg": float(count)})


class GlobalBlock(nn.Module):
    """Attention between all tokens of a map, and a feed-forward network, each with a norm before it."""

    def __init__(self, dim: int, heads: int, *, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.heads, hidden = heads, int(dim * mlp_ratio)
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C, H, W) of (B, C, H, W)."""
        batch, dim, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(self.norm1(tokens)).view(batch, height * width, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value) if batch else value
        tokens = tokens + self.proj(mixed.transpose(1, 2).reshape(batch, height * width, dim))
        tokens = tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))
        return tokens.transpose(1, 2).reshape(x.shape).contiguous()

    def counted(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns (what the official counter sees, attention's two products) of one map of this size."""
        tokens, dim = size[0] * size[1], self.proj.in_features
        weights = sum(linear.weight.numel() for linear in (self.qkv, self.proj, self.fc1, self.fc2))
        return tokens * (weights + 2 * 2 * dim), 2 * tokens**2 * dim
