"""The backbone of dense tasks: any Swin network that gives normalized maps of several stages, at any size of image.

Numerics and parameter names are those of the official detection and segmentation repositories
(SwinTransformer/Swin-Transformer-Object-Detection, mmdet/models/backbones/swin_transformer.py): maps are padded to
whole windows, no window shrinks on a small map, every odd block is shifted, each map that is handed out has a norm of
its own, and the classifier's norm is not there. What differs: frozen stages are those that are named, with their norms.

Shape legend: B images, C channels and H x W tokens of a stage.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.config import ModelConfig
from swin_moe.config.variants import VARIANTS
from swin_moe.models.attention import stage_geometry
from swin_moe.models.layers import check_image
from swin_moe.models.swin import SwinTransformer
from swin_moe.ops.layer_norm import LayerNorm
from swin_moe.randomness import RandomContext


class Pyramid(NamedTuple):
    """What the backbone gives."""

    maps: list[Tensor]  # (B, C, H, W) of every stage of out_indices, finest first
    aux: Tensor | None  # scalar, weighted, of all MoE blocks once; None without any


def whole_windows(config: ModelConfig) -> ModelConfig:
    """Returns the config of a network whose windows are whole in every stage, and that has no class head.

    The nominal image grows until the last stage holds a window. A position bias that was learned in the smaller windows
    of config.img_size keeps its value for every offset (pretrained_window_sizes), where it is made by a network.
    """
    unit = config.window_size * 2 ** (len(config.depths) - 1)
    height, width = (max(side, patch * unit) for side, patch in zip(config.img_size, config.patch_size))
    given = config.pretrained_window_sizes
    learned = [stage_geometry(config, stage).window for stage in range(len(config.depths))]
    trained = tuple(given[i] if i < len(given) and given[i] else window for i, window in enumerate(learned))
    if VARIANTS[config.name].bias != "log_cpb":
        trained = given
    return replace(config, img_size=(height, width), num_classes=0, pretrained_window_sizes=trained)


def inside(shape: torch.Size, tokens_B2: Tensor) -> Tensor:
    """Returns (B, H * W) bool: which tokens of maps of this (H, W) are of the image, not of what pads it."""
    rows, columns = (torch.arange(side, device=tokens_B2.device) for side in shape)
    return ((rows[:, None] < tokens_B2[:, 0, None, None]) & (columns < tokens_B2[:, 1, None, None])).flatten(1)


class PyramidBackbone(SwinTransformer):
    """A Swin network of any family with one LayerNorm per map that it gives, `norm<stage>`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        recompute: str = "none",
    ) -> None:
        """Builds the modules; weights come from init_weights. Works on meta and without a process group.

        Args:
            config: img_size is the size that absolute positions belong to; images may have any other.
            out_indices: Stages whose maps are given, rising; None = all.
            frozen_stages: -1 = none; 0 = patch embedding and positions; n = also the first n stages with their norms,
                which then neither learn nor drop anything.

        Raises:
            ValueError: Stages that the network does not have.
        """
        depth = len(config.depths)
        out_indices = range(depth) if out_indices is None else out_indices
        in_order = list(out_indices) == sorted(set(out_indices)) and len(out_indices) > 0
        if not in_order or not all(0 <= i < depth for i in out_indices):
            raise ValueError(f"out_indices must rise within [0, {depth - 1}], got {tuple(out_indices)}")
        if not -1 <= frozen_stages <= depth:
            raise ValueError(f"frozen_stages must be in [-1, {depth}], got {frozen_stages}")
        super().__init__(whole_windows(config), recompute=recompute)
        self.task_parts = (*SwinTransformer.task_parts, *(f"norm{stage}" for stage in out_indices))
        self.out_indices, self.frozen_stages = tuple(out_indices), frozen_stages
        self.channels = tuple(config.embed_dim * 2**i for i in self.out_indices)
        self.grid = stage_geometry(config, 0).resolution
        if config.ape:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, config.embed_dim, *self.grid))
        self.add_module("norm", nn.Identity())  # the classifier's: normalizing twice is not normalizing once
        for stage, channels in zip(self.out_indices, self.channels):
            self.add_module(f"norm{stage}", LayerNorm(channels))
        self._freeze()

    def forward(  # type: ignore[override]
        self, x: Tensor, random: RandomContext | None = None, size: Tensor | None = None
    ) -> Pyramid:
        """Returns the maps of out_indices and the auxiliary loss.

        Args:
            x: (B, channels, height, width) of any size; B may be 0.
            random: What training draws from; None = a fresh context from torch's generator. Unused in evaluation.
            size: (B, 2) int64, (height, width) of each image in the upper left corner of what a batch was padded to;
                MoE blocks do not route the rest, unless model.moe.skip_padding says no. None = images are not padded.
        """
        check_image(x, self.patch_embed.proj)
        random = self._context(x, random)
        x_size = x.shape[2:]
        x = self._embed(x, False, None, random)
        factors, tokens = self._drop_path(random, x.dtype), self._tokens(x_size, size)
        maps, losses = [], []
        for index, stage in enumerate(self.layers):
            valid = None if tokens is None else inside(x.shape[1:3], tokens)
            for block in stage.blocks:
                learns = index >= self.frozen_stages
                own = factors[block.layer] if factors is not None and learns else None
                x, aux = self._run(block, x, random if learns else None, False, own, valid)
                losses += [] if aux is None else [aux]
            if index in self.out_indices:
                normed = self.get_submodule(f"norm{index}")(x)
                maps.append(normed.permute(0, 3, 1, 2).contiguous())
            if index == self.out_indices[-1]:
                break  # nothing that is given depends on what follows
            if stage.downsample is not None:
                x = stage.downsample(x)
                tokens = None if tokens is None else (tokens + 1) // 2
        return Pyramid(maps, torch.stack(losses).sum() if losses else None)

    def train(self, mode: bool = True) -> "PyramidBackbone":
        """Returns self. What is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _absolute_positions(self, size: torch.Size) -> Tensor:
        """Returns (1, H, W, C), bicubic where the map is not that of config.img_size."""
        positions: Tensor = self.absolute_pos_embed
        if tuple(size) != self.grid:
            positions = F.interpolate(positions, size=tuple(size), mode="bicubic")
        return positions.permute(0, 2, 3, 1)

    def _tokens(self, padded: torch.Size, size: Tensor | None) -> Tensor | None:
        """Returns (B, 2) int64, the (H, W) of each image in the first stage; None where all tokens are routed."""
        moe = self.config.moe
        if size is None or not moe.has_blocks or not moe.skip_padding or moe.choice == "soft":
            return None
        if bool((size == size.new_tensor(padded)).all()):
            return None  # as with a mask of all tokens, and faster
        patch = size.new_tensor(self.config.patch_size)
        return (size + patch - 1) // patch

    def _frozen(self) -> list[nn.Module]:
        """Returns what does not learn: frozen stages, and what no map that is given depends on."""
        last = self.out_indices[-1]
        after = (self.layers[last].downsample, *(self.layers[i] for i in range(last + 1, len(self.layers))))
        unused: list[nn.Module] = [module for module in after if module is not None]
        if self.frozen_stages < 0:
            return unused
        stages = range(self.frozen_stages)
        norms = [self.get_submodule(f"norm{i}") for i in self.out_indices if i in stages]
        return [self.patch_embed, *(self.layers[i] for i in stages), *norms, *unused]

    def _freeze(self) -> None:
        for module in self._frozen():
            module.requires_grad_(False)
        if self.frozen_stages >= 0 and self.config.ape:
            self.absolute_pos_embed.requires_grad_(False)
