"""One network for Swin, SwinV2, Swin-MLP and Swin-MoE: their differences are the rows of
config.variants.VARIANTS.

Parameter names of the dense parts are the official ones (microsoft/Swin-Transformer), patch merging at the end of its
stage. Any variant takes MoE blocks, so SwinV2-MoE is name=swinv2 with moe.blocks.

Shape legend: B images, H x W tokens of a feature map, L = H * W, C channels, K classes.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swin_moe.config import DataConfig, ModelConfig
from swin_moe.config.variants import VARIANTS
from swin_moe.models import flops
from swin_moe.models.attention import SpatialMLP, StageGeometry, WindowAttention, check_attention, stage_geometry
from swin_moe.models.initialize import initialize
from swin_moe.models.layers import (
    Mlp,
    ModuleList,
    PatchEmbed,
    PatchMerging,
    add_and_norm,
    check_image,
    dropout,
    norm_and_add,
)
from swin_moe.models.network import Network
from swin_moe.moe import MoELayer
from swin_moe.ops.layer_norm import LayerNorm
from swin_moe.ops.random_draws import drop_path_factors, with_words
from swin_moe.ops.residual_norm import add_branch
from swin_moe.randomness import RandomContext
from swin_moe.registry import lookup

# What reads and writes whole networks knows their files, and stands above them.
_FILES = {
    "save_pretrained": "swin_moe.weights.hub:save_pretrained",
    "from_pretrained": "swin_moe.weights.hub:from_pretrained",
}


class Encoded(NamedTuple):
    """What the backbone gives: normalized tokens of the last stage, maps of chosen stages, auxiliary loss."""

    tokens: Tensor  # (B, H, W, C)
    maps: list[Tensor]  # (B, C, H, W), in stage order
    aux: Tensor | None  # scalar, weighted; None without MoE blocks


class Block(nn.Module):
    """A token mixer and a feed-forward network (dense or MoE), each with norm and residual sum."""

    def __init__(self, config: ModelConfig, geometry: StageGeometry, stage: int, index: int, layer: int) -> None:
        super().__init__()
        variant, dim, heads = VARIANTS[config.name], geometry.dim, config.num_heads[stage]
        self.layer, self.odd, self.shrunk = layer, index % 2 == 1, geometry.shrunk
        self.post_norm = variant.norm == "post"
        self.drop_path = config.drop_path_rate * layer / max(sum(config.depths) - 1, 1)
        self.norm1 = LayerNorm(dim)
        if variant.mixer == "mlp":
            self.spatial_mlp = SpatialMLP(geometry.window, heads, drop=0.0, layer=layer)
        else:
            pretrained = config.pretrained_window_sizes[stage] if stage < len(config.pretrained_window_sizes) else 0
            self.attn = WindowAttention(
                dim,
                geometry.window,
                heads,
                layer=layer,
                pretrained_window=pretrained,
                qkv_bias=config.qkv_bias,
                log_cpb=variant.bias == "log_cpb",
                bias_sigmoid=variant.bias_sigmoid,
                cosine=variant.scores == "cosine",
                qk_scale=config.qk_scale,
                drop=config.drop_rate,
                attn_drop=config.attn_drop_rate,
                at_once=config.attention_chunk,
                path=config.attention,
            )
        self.norm2 = LayerNorm(dim)
        hidden_dim = int(dim * config.mlp_ratio)
        if stage < len(config.moe.blocks) and index in config.moe.blocks[stage]:
            self.mlp: MoELayer | Mlp = MoELayer(
                dim, hidden_dim, config.moe, fc2_bias=config.mlp_fc2_bias, layer=layer, init_std=config.init_std
            )
        else:
            self.mlp = Mlp(dim, hidden_dim, fc2_bias=config.mlp_fc2_bias, drop=config.drop_rate, layer=layer)
        every = config.extra_norm_every
        self.enorm = LayerNorm(dim) if every and (index + 1) % every == 0 else None

    @property
    def mixer(self) -> WindowAttention | SpatialMLP:
        """The token mixer, under its official name."""
        return self.attn if hasattr(self, "attn") else self.spatial_mlp

    def shift(self, *, nominal: bool) -> int:
        """Returns how many tokens the windows are displaced; a map of one window stays in place at nominal size."""
        return self.mixer.window // 2 if self.odd and not (nominal and self.shrunk) else 0

    def forward(
        self,
        x_BHWC: Tensor,
        random: RandomContext | None = None,
        nominal: bool = True,
        factors_2B: Tensor | None = None,
        valid_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (x of the same shape, auxiliary loss times its weight or None).

        Args:
            nominal: The image has the size the model was built for; decides about the shift of a map of one window.
            factors_2B: What drop path multiplies every image's two branches by; None = 1.
            valid_BL: See MoELayer.forward.
        """
        x, shift = x_BHWC, self.shift(nominal=nominal)
        mixer_factor, ffn_factor = (None, None) if factors_2B is None or not self.drop_path else factors_2B.unbind(0)
        if self.post_norm:
            x = norm_and_add(x, self.mixer(x, shift=shift, random=random), mixer_factor, self.norm1)
            branch, aux = self._feed_forward(x, random, valid_BL)
            x = norm_and_add(x, branch, ffn_factor, self.norm2)
        else:
            branch = self.mixer(self.norm1(x), shift=shift, random=random)
            x, normed = add_and_norm(x, branch, mixer_factor, self.norm2)
            branch, aux = self._feed_forward(normed, random, valid_BL)
            x = add_branch(x, branch, ffn_factor)
        return (x if self.enorm is None else self.enorm(x)), aux

    def _feed_forward(
        self, x_BHWC: Tensor, random: RandomContext | None, valid_BL: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(self.mlp, MoELayer):
            return self.mlp(x_BHWC, random), None
        batch, height, width, channels = x_BHWC.shape
        y_BLC, aux = self.mlp(x_BHWC.reshape(batch, height * width, channels), random=random, valid_BL=valid_BL)
        return y_BLC.view(x_BHWC.shape), aux


class Stage(nn.Module):
    """Blocks of one resolution, then patch merging except in the last stage."""

    def __init__(self, config: ModelConfig, stage: int) -> None:
        super().__init__()
        geometry, first = stage_geometry(config, stage), sum(config.depths[:stage])
        self.blocks = ModuleList(Block(config, geometry, stage, i, first + i) for i in range(config.depths[stage]))
        last = stage == len(config.depths) - 1
        norm_after = VARIANTS[config.name].merge_norm == "after"
        self.downsample = None if last else PatchMerging(geometry.dim, norm_after=norm_after)


class SwinTransformer(Network):
    """A Swin network of any family, for images of any size.

    Images of `config.img_size` get the official classification numerics. Any other size is treated as the official
    detection backbone treats it: maps padded to whole windows, every odd block shifted.
    """

    task_parts: tuple[str, ...] = ("head", "mask_token")  # what is inside, but belongs to the task that trains it
    classes: tuple[str, ...] = ()  # names in the order of outputs, where what it was loaded from has them
    reading: DataConfig | None = None  # how images become its input, likewise

    def __init__(self, config: ModelConfig, *, recompute: str = "none", mask_token: bool = False) -> None:
        """Builds the modules; weights come from init_weights. Works on meta and without a process group.

        Args:
            recompute: "none", or "block": activations of every block are recomputed in backward.
            mask_token: Adds the token that stands for masked patches (SimMIM).
        """
        super().__init__()
        if recompute not in ("none", "block"):
            raise ValueError(f"recompute must be none or block, got {recompute!r}")
        check_attention(config)
        self.config, self.variant, self.recompute = config, VARIANTS[config.name], recompute
        self.img_size = config.img_size
        self.num_classes = config.num_classes
        self.num_features = config.embed_dim * 2 ** (len(config.depths) - 1)
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, config.embed_dim, norm=config.patch_norm)
        self.grid = stage_geometry(config, 0).resolution
        if config.ape:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], config.embed_dim))
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.layers = ModuleList(Stage(config, stage) for stage in range(len(config.depths)))
        self.norm = LayerNorm(self.num_features)
        self.head = nn.Linear(self.num_features, config.num_classes) if config.num_classes else nn.Identity()

    def forward(self, x: Tensor, random: RandomContext | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Returns logits (B, K), or (logits, aux) with any MoE block; aux is a scalar, already times its weight.

        Args:
            x: (B, channels, height, width); B may be 0.
            random: What training draws from; None = a fresh context from torch's generator. Unused in evaluation.
        """
        encoded = self.encode(x, random=random)
        logits = self.head(encoded.tokens.flatten(1, 2).mean(dim=1))
        return logits if encoded.aux is None else (logits, encoded.aux)

    def forward_features(
        self, x: Tensor, stages: Sequence[int] | None = None, random: RandomContext | None = None
    ) -> list[Tensor]:
        """Returns the maps (B, C, H, W) of the given stages (None = all) before merging, the last after the final norm.

        Raises:
            ValueError: A stage that the model does not have.
        """
        return self.encode(x, range(len(self.layers)) if stages is None else stages, random=random).maps

    def encode(
        self, x: Tensor, stages: Sequence[int] = (), *, random: RandomContext | None = None, mask: Tensor | None = None
    ) -> Encoded:
        """Returns tokens, maps of the given stages and auxiliary loss.

        mask: (B, H, W) over patches, 1 where the patch is replaced by the mask token; None = no patch.
        """
        check_image(x, self.patch_embed.proj)
        unknown = [s for s in stages if not 0 <= s < len(self.layers)]
        if unknown:
            raise ValueError(f"stages must be in [0, {len(self.layers) - 1}], got {unknown[0]}")
        random = self._context(x, random)
        nominal = tuple(x.shape[-2:]) == self.img_size
        x = self._embed(x, nominal, mask, random)
        factors = self._drop_path(random, x.dtype)
        maps, losses = [], []
        for index, stage in enumerate(self.layers):
            for block in stage.blocks:
                x, aux = self._run(block, x, random, nominal, None if factors is None else factors[block.layer])
                losses += [] if aux is None else [aux]
            if stage.downsample is None:
                x = self.norm(x)
            if index in stages:
                maps.append(x.permute(0, 3, 1, 2).contiguous())
            if stage.downsample is not None:
                x = stage.downsample(x)
        aux = torch.stack(losses).sum() if losses else None
        return Encoded(x, maps, aux)

    def save_pretrained(self, folder: str | Path, **options: Any) -> str:
        """Returns the layout in which it was written, as a folder of Hugging Face's; see weights/hub.py."""
        return lookup(_FILES, "save_pretrained", key="method")(self, folder, **options)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> "SwinTransformer":
        """Returns the network of a folder that save_pretrained or transformers wrote, in eval mode."""
        return lookup(_FILES, "from_pretrained", key="method")(folder, **overrides)

    def set_window_size(self, window: int, *, img_size: tuple[int, int] | None = None) -> None:
        """Changes the attention window, and the nominal image size if given, of a trained model for evaluation.

        Windows of small maps shrink as in a model built with these values. Bias tables are resized (bicubic); bias
        networks keep the bias they learned for every offset, as with pretrained_window_sizes = the old windows.

        Raises:
            ValueError: Swin-MLP, whose weights belong to one window; or absolute positions with a new img_size.
        """
        if self.variant.mixer == "mlp":
            raise ValueError(
                f"set_window_size: model.name={self.config.name} has weights per token of a window, it cannot change"
            )
        if self.config.ape and img_size not in (None, self.config.img_size):
            raise ValueError("set_window_size: img_size cannot change with model.ape; pass images of any size instead")
        trained = tuple(stage.blocks[0].attn.pretrained_window for stage in self.layers)
        self.config = replace(
            self.config, window_size=window, img_size=img_size or self.config.img_size, pretrained_window_sizes=trained
        )
        self.img_size, self.grid = self.config.img_size, stage_geometry(self.config, 0).resolution
        for index, stage in enumerate(self.layers):
            geometry = stage_geometry(self.config, index)
            for block in stage.blocks:
                block.shrunk = geometry.shrunk
                block.attn.set_window(geometry.window)

    def init_weights(self, seed: int, only: Collection[nn.Module] | None = None) -> None:
        """Fills every parameter; a value depends on the seed, the parameter's name and the expert's global number.

        only: Modules whose own parameters are filled (a MoE layer: with all it contains); None = all.
        """
        initialize(self, seed, std=self.config.init_std, only=only)
        for name, module in self.named_modules():
            if only is not None and module not in only:
                continue
            if isinstance(module, MoELayer):
                module.init_weights(seed, name)
            elif isinstance(module, Block) and module.post_norm:
                for norm in (module.norm1, module.norm2):
                    nn.init.constant_(norm.weight, self.config.post_norm_init)
                    nn.init.constant_(norm.bias, self.config.post_norm_init)

    def flops(self) -> float:
        """Returns the official count of multiply-accumulates of one image, capacity factor x top-k included."""
        return flops.official_flops(self.config, **self._flop_options())

    def active_flops(self) -> float:
        """Returns the multiply-accumulates one image really costs: top-k expert passes per token, no spare capacity."""
        return flops.active_flops(self.config, **self._flop_options())

    def no_weight_decay(self) -> set[str]:
        """Returns full names of parameters without weight decay."""
        return {"absolute_pos_embed", "mask_token"}

    def head_parameters(self) -> set[str]:
        """See Network."""
        return {f"head.{name}" for name, _ in self.head.named_parameters()}

    def no_weight_decay_keywords(self) -> set[str]:
        """Returns strings; a parameter whose name contains one has no weight decay."""
        keywords = {"relative_position_bias_table"}
        if self.variant.bias == "log_cpb":
            keywords.add("cpb_mlp")
        if self.variant.scores == "cosine":
            keywords.add("logit_scale")
        if self.config.moe.has_blocks:
            keywords |= {"fc1_bias", "fc2_bias", "router.temperature", "router.projector", "router.sim_matrix"}
        return keywords

    def _flop_options(self) -> dict[str, bool]:
        return {"spatial_mlp": self.variant.mixer == "mlp", "norm_after": self.variant.merge_norm == "after"}

    def _context(self, x: Tensor, random: RandomContext | None) -> RandomContext | None:
        """Returns what this forward draws from: None in evaluation, made once so that recomputation sees the same."""
        if not self.training:
            return None
        if random is None:
            random = RandomContext.fresh(len(x), x.device)
        elif random.sample.device != x.device:
            random = replace(random, sample=random.sample.to(x.device))
        return with_words(random)

    def _drop_path(self, random: RandomContext | None, dtype: torch.dtype) -> Sequence[Tensor] | None:
        """Returns (2, B) for every block, what its branches are multiplied by; None where nothing is dropped."""
        if random is None or not self.config.drop_path_rate:
            return None
        rates = [block.drop_path for stage in self.layers for block in stage.blocks]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return drop_path_factors(random, rates, wide).unbind(1)

    def _embed(self, image: Tensor, nominal: bool, mask: Tensor | None, random: RandomContext | None) -> Tensor:
        """Returns the map of patches with mask token, absolute positions and dropout, (B, H, W, C)."""
        x = self.patch_embed(image, pad=not nominal)
        if mask is not None:
            x = torch.where(mask[..., None].bool(), self.mask_token.view(1, 1, 1, -1).to(x.dtype), x)
        if self.config.ape:
            x = x + self._absolute_positions(x.shape[1:3])
        return dropout(x, self.config.drop_rate, random, layer=sum(self.config.depths), site=0)

    def _absolute_positions(self, size: torch.Size) -> Tensor:
        """Returns (1, H, W, C), bicubic where the map is not the nominal one."""
        positions = self.absolute_pos_embed.view(1, *self.grid, -1)
        if tuple(size) == self.grid:
            return positions
        return F.interpolate(positions.permute(0, 3, 1, 2), size=tuple(size), mode="bicubic").permute(0, 2, 3, 1)

    def _run(
        self,
        block: Block,
        x: Tensor,
        random: RandomContext | None,
        nominal: bool,
        factors: Tensor | None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if self.recompute == "block" and torch.is_grad_enabled():
            # Draws are functions of `random`, so torch's generators need no saving and no restoring.
            arguments = x, random, nominal, factors, valid
            return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        return block(x, random, nominal, factors, valid)
