"""The inference form of a network for the CPU: swin_moe.optimize.

Weights are packed once, and a block is four calls: norm and queries, keys and values; attention; projection and
residual; norm, both layers of the feed-forward network and residual (ops/packed_layers.py). Between blocks the map is
float32 (float64 in float64), as under autocast; the factors of products have the dtype that was asked for, or those of
blocks are int8.

Shape legend: B images, H x W tokens of a feature map, C channels, T = B * H * W, K classes, E experts.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, NoReturn, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.attention import SpatialMLP, WindowAttention
from swin_moe.models.layers import PatchEmbed, PatchMerging, check_image
from swin_moe.models.optimizable import optimize_refusal
from swin_moe.models.swin import Block, SwinTransformer
from swin_moe.moe import MoELayer
from swin_moe.moe.dispatch import LocalDispatcher
from swin_moe.moe.routers import CosineRouter, LinearRouter, Router
from swin_moe.ops import packed_experts
from swin_moe.ops.attention.fused import fused_window_attention
from swin_moe.ops.attention.in_windows import clamped_factor
from swin_moe.ops.moe.moe_layer import Options, Slots
from swin_moe.ops.packed_layers import (
    PackedLinear,
    PackedNorm,
    Packing,
    Patches,
    packed_layers,
    sums_dtype,
)


def optimize(model: nn.Module, *, dtype: torch.dtype = torch.float32, int8: bool = False) -> "OptimizedSwin":
    """Returns the inference form of a network: the same logits (B, K), faster, on the CPU, without gradients.

    It has copies of the weights: later changes of the model's are not seen, and the model may be deleted.

    Args:
        model: A Swin network of any family; it is left as it is.
        dtype: Of the products' factors: float32, bfloat16, float16 or float64. Sums, norms, residuals and routing are
            float32 or float64.
        int8: Linear layers of blocks (attention's, feed-forward networks, experts) and patch merging multiply whole
            numbers of 8 bits: weights by output, rows as they are read. dtype is that of the rest: patches, attention.

    Raises:
        ValueError: What the network is, where it lies, or what it is made of cannot be optimized, with the reason.
    """
    problem = optimize_refusal(model, dtype, int8=int8)
    if problem:
        raise ValueError(f"optimize: {problem}")
    assert isinstance(model, SwinTransformer), "others are refused"
    with torch.no_grad():
        return OptimizedSwin(model, dtype, int8=int8)


class OptimizedSwin(nn.Module):
    """What `optimize` returns. It has no parameters: weights are packed for the processor, so it is never saved.

    Images are of any size and floating dtype, as the network takes them.
    """

    def __init__(self, model: SwinTransformer, dtype: torch.dtype, *, int8: bool = False) -> None:
        super().__init__()
        self.dtype, self.int8, self.config = dtype, int8, model.config
        self.img_size, self.num_classes = model.img_size, model.num_classes
        wide, packing = sums_dtype(dtype), Packing(dtype, int8=int8)
        self._embed = _Embedding(model, dtype)
        self._stages = [[_Block(block, packing) for block in stage.blocks] for stage in model.layers]
        merges = [stage.downsample for stage in model.layers]
        self._merges = [None if merge is None else _Merging(merge, packing) for merge in merges]
        # In a list: no parameters of this module, which nobody trains, moves or saves.
        self._last = [_wide(model.norm, wide)]
        head = model.head
        self._head = PackedLinear.of(head.weight, head.bias, wide) if isinstance(head, nn.Linear) else None
        self.eval()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuses to be saved: with other instructions the same bytes are another matrix."""
        raise TypeError(
            "an optimized network is packed for this processor and is not saved; save the model it is made of"
        )

    def __deepcopy__(self, memo: dict) -> "OptimizedSwin":
        """Returns itself: nothing changes it."""
        return self

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (B, K) in the dtype of sums; features (B, C) of a network without a class head.

        x: (B, channels, height, width); B may be 0.
        """
        # Autocast would convert what is chosen here already.
        with torch.autocast("cpu", enabled=False):
            tokens = self._encode(x, ())[0]
            features = self._last[0](tokens).flatten(1, 2).mean(dim=1)
            return features if self._head is None else packed_layers(features, self._head)

    @torch.no_grad()
    def forward_features(self, x: Tensor, stages: Sequence[int] | None = None) -> list[Tensor]:
        """Returns the maps (B, C, H, W) of the given stages (None = all), as the network's own forward_features."""
        count = len(self._stages)
        chosen = range(count) if stages is None else stages
        unknown = [s for s in chosen if not 0 <= s < count]
        if unknown:
            raise ValueError(f"stages must be in [0, {count - 1}], got {unknown[0]}")
        with torch.autocast("cpu", enabled=False):
            maps = self._encode(x, chosen)[1]
        return [m.permute(0, 3, 1, 2).contiguous() for m in maps]

    def _encode(self, image: Tensor, stages: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Returns (tokens of the last stage before the final norm, maps of stages), each (B, H, W, C)."""
        x, nominal = self._embed(image), tuple(image.shape[-2:]) == self.img_size
        maps = []
        for number, (blocks, merge) in enumerate(zip(self._stages, self._merges)):
            for block in blocks:
                x = block(x, nominal)
            if number in stages:
                maps.append(self._last[0](x) if merge is None else x)
            x = x if merge is None else merge(x)
        return x, maps


def _wide(module: nn.Module, wide: torch.dtype) -> nn.Module:
    """Returns a copy of a module that nobody trains, in the dtype of sums."""
    return copy.deepcopy(module).to(wide).requires_grad_(False).eval()


class _Norm:
    """A LayerNorm, packed and as it is."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(norm, nn.LayerNorm), "a Swin network has no other"
        self.packed, self.module = PackedNorm.of(norm, dtype), _wide(norm, sums_dtype(dtype))


class _Around(NamedTuple):
    """What stands around a branch: its norm, before it or after."""

    norm: _Norm
    post: bool

    @property
    def before(self) -> PackedNorm | None:
        """The norm of a pre-norm block."""
        return None if self.post else self.norm.packed

    @property
    def after(self) -> PackedNorm | None:
        """The norm of a post-norm block."""
        return self.norm.packed if self.post else None

    def apply(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns x and a branch that is no packed layer, added."""
        if self.post:
            return x + self.norm.module(branch(x))
        return x + branch(self.norm.module(x))


class _Embedding:
    """Patches, their norm and absolute positions."""

    def __init__(self, model: SwinTransformer, dtype: torch.dtype) -> None:
        embed: PatchEmbed = model.patch_embed
        self.wide, self.patch, self.grid = sums_dtype(dtype), embed.patch_size, model.grid
        self.img_size = model.img_size
        self.layer = PackedLinear.of(embed.proj.weight.flatten(1), embed.proj.bias, dtype)
        self.norm = None if embed.norm is None else PackedNorm.of(embed.norm, dtype)
        self.positions = model.absolute_pos_embed.detach().to(self.wide) if model.config.ape else None
        # Says of a wrong image what the network says of it.
        self.like = nn.Conv2d(
            embed.proj.in_channels, embed.proj.out_channels, self.patch, device="meta", dtype=self.wide
        )

    def __call__(self, image: Tensor) -> Tensor:
        """Returns the map of patches (B, H, W, C), cut at the nominal size, else padded."""
        if isinstance(image, Tensor) and image.is_floating_point():
            image = image.to(self.wide)
        check_image(image, self.like)
        if image.device.type != "cpu":
            raise ValueError(f"an optimized network takes images on the CPU, got one on {image.device}")
        (height, width), (ph, pw) = image.shape[-2:], self.patch
        cut = (height, width) == self.img_size
        rows, columns = (height // ph, width // pw) if cut else (-(-height // ph), -(-width // pw))
        x = packed_layers(image, self.layer, after=self.norm, patches=Patches(ph, pw, rows, columns))
        return x if self.positions is None else x + self._positions(rows, columns)

    def _positions(self, rows: int, columns: int) -> Tensor:
        assert self.positions is not None
        positions = self.positions.view(1, *self.grid, -1)
        if (rows, columns) == self.grid:
            return positions
        resized = F.interpolate(positions.permute(0, 3, 1, 2), size=(rows, columns), mode="bicubic")
        return resized.permute(0, 2, 3, 1)


class _Merging:
    """2 x 2 tokens joined, norm and reduction."""

    def __init__(self, merging: PatchMerging, packing: Packing) -> None:
        self.layer = packing.linear(merging.reduction.weight, merging.reduction.bias)
        norm = PackedNorm.of(merging.norm, packing.dtype)
        self.norm, self.after = (None if merging.norm_after else norm), (norm if merging.norm_after else None)

    def __call__(self, x: Tensor) -> Tensor:
        return packed_layers(x, self.layer, norm=self.norm, after=self.after, merged=True)


class _Block:
    """A block of the network: the mixer and the feed-forward network, each with its norm and residual."""

    def __init__(self, block: Block, packing: Packing) -> None:
        mixer, dtype = block.mixer, packing.dtype
        self.mixer = _Attention(mixer, packing) if isinstance(mixer, WindowAttention) else _Spatial(mixer, dtype)
        self.ffn = _Experts(block.mlp, packing) if isinstance(block.mlp, MoELayer) else _FeedForward(block.mlp, packing)
        self.around = [_Around(_Norm(norm, dtype), block.post_norm) for norm in (block.norm1, block.norm2)]
        self.extra = None if block.enorm is None else _wide(block.enorm, sums_dtype(dtype))
        self.shifts = {nominal: block.shift(nominal=nominal) for nominal in (False, True)}

    def __call__(self, x: Tensor, nominal: bool) -> Tensor:
        x = self.ffn(self.mixer(x, self.around[0], self.shifts[nominal]), self.around[1])
        return x if self.extra is None else self.extra(x)


class _Attention:
    """Window attention; a continuous position bias is computed once, here."""

    def __init__(self, attn: WindowAttention, packing: Packing) -> None:
        wide, bias = sums_dtype(packing.dtype), attn._qkv_bias()
        self.qkv = packing.linear(attn.qkv.weight, bias)
        self.proj = packing.linear(attn.proj.weight, attn.proj.bias)
        self.pad = None if bias is None else bias.detach().to(packing.dtype)  # of a token that is zero
        # In the order in which the kernel reads it, which would transpose it in every forward.
        self.table = attn.bias_table().detach().to(wide).t().clone(memory_format=torch.contiguous_format).t()
        logit = attn.logit_scale
        self.factor = None if logit is None else clamped_factor(logit).detach().flatten().to(wide, copy=True)
        self.heads, self.window, self.scale = attn.num_heads, (attn.window,) * 2, attn.scale

    def __call__(self, x: Tensor, around: _Around, shift: int) -> Tensor:
        qkv = packed_layers(x, self.qkv, norm=around.before, wide=False)
        out = fused_window_attention(
            qkv,
            self.table,
            num_heads=self.heads,
            window=self.window,
            shift=(shift, shift),
            scale=self.scale,
            logit_scale=self.factor,
            pad_qkv=self.pad,
        )
        return packed_layers(out, self.proj, after=around.after, residual=x)


class _Spatial:
    """The spatial MLP, by its own forward: products of all windows at once."""

    def __init__(self, mixer: SpatialMLP, dtype: torch.dtype) -> None:
        self.mixer, self.dtype = copy.deepcopy(mixer).to(dtype).requires_grad_(False).eval(), dtype

    def __call__(self, x: Tensor, around: _Around, shift: int) -> Tensor:
        return around.apply(x, lambda y: self.mixer(y.to(self.dtype), shift=shift).to(x.dtype))


class _FeedForward:
    """Both layers of a dense feed-forward network."""

    def __init__(self, mlp: nn.Module, packing: Packing) -> None:
        fc1, fc2 = mlp.fc1, mlp.fc2
        assert isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear), "other parts are refused"
        self.layers = [packing.linear(layer.weight, layer.bias) for layer in (fc1, fc2)]

    def __call__(self, x: Tensor, around: _Around) -> Tensor:
        return packed_layers(x, *self.layers, norm=around.before, after=around.after, residual=x)

    def alone(self, x: Tensor, norm: PackedNorm | None = None) -> Tensor:
        """Returns the network's result for rows, normalized first if there is a norm, without residual."""
        return packed_layers(x, *self.layers, norm=norm)


class _Experts:
    """A MoE layer: routed as it is in evaluation, without losses. One operator where tokens choose experts by a router
    that it knows; else the steps of the layer."""

    def __init__(self, layer: MoELayer, packing: Packing) -> None:
        experts, dtype = layer.experts, packing.dtype
        self.dtype, self.choice = dtype, copy.copy(layer.choice)
        self.choice.config = replace(layer.config, balance_loss="none", z_loss_weight=0.0)
        router = _wide(layer.router, sums_dtype(dtype))
        assert isinstance(router, Router)
        self.router = router
        self.packed_router = _packed_router(router, sums_dtype(dtype)) if packed_experts.available() else None
        self.planned: tuple[tuple[int, int], tuple[Slots, Options] | None] | None = None  # of the last call's sizes
        self.dispatcher = LocalDispatcher()
        # Tutel's layout: the first matrix is applied transposed, the second as it is.
        self.first = packing.linear(experts.fc1_weight, experts.fc1_bias)
        self.second = packing.linear(experts.fc2_weight.transpose(1, 2), experts.fc2_bias)
        self.shared = None if layer.shared is None else _FeedForward(layer.shared, packing)

    def __call__(self, x: Tensor, around: _Around) -> Tensor:
        plan = None if self.packed_router is None else self._plan(x)
        if plan is None:
            return around.apply(x, self._branch)
        assert self.packed_router is not None
        inner = None if self.shared is None else self.shared.alone(x, norm=around.before)
        return packed_experts.packed_experts(
            x,
            self.packed_router,
            self.first,
            self.second,
            *plan,
            norm=around.before,
            after=around.after,
            inner=inner,
        )

    def _plan(self, x_BHWC: Tensor) -> tuple[Slots, Options] | None:
        """Returns how the one operator routes so many tokens; None where it does not cover the choice."""
        batch, height, width, channels = x_BHWC.shape
        sizes = batch, height * width
        if self.planned is None or self.planned[0] != sizes:
            rows = x_BHWC.reshape(-1, channels)
            plan = self.choice.at_once(rows, tokens_per_image=height * width, training=False, draws=False)
            self.planned = sizes, plan
        return self.planned[1]

    def _branch(self, x_BHWC: Tensor) -> Tensor:
        batch, height, width, channels = x_BHWC.shape
        x_TD = x_BHWC.reshape(batch * height * width, channels)
        routed = self.choice.route(
            x_TD, self.router, tokens_per_image=height * width, training=False, random=None, token=None
        )
        dispatched = self.dispatcher.dispatch(routed.rows.to(self.dtype), routed.routing, None)
        tokens, counts = dispatched.tokens, dispatched.counts
        assert isinstance(tokens, Tensor) and isinstance(counts, Tensor), "all experts are here"
        y = packed_layers(tokens, self.first, self.second, counts=counts, wide=False)
        y = routed.restore(self.dispatcher.combine(y, dispatched, routed.routing.gate)).to(x_TD.dtype)
        return (y if self.shared is None else y + self.shared.alone(x_TD)).view(x_BHWC.shape)


def _packed_router(router: Router, wide: torch.dtype) -> packed_experts.PackedRouter | None:
    """Returns the router as the operator reads it; None of one that it does not know."""
    balance = None if router.balance is None else router.balance()
    if type(router) is LinearRouter:
        return packed_experts.PackedRouter(PackedLinear.of(router.weight, None, wide), None, balance)
    if type(router) is CosineRouter:
        directions = PackedLinear.of(router.scaled_directions().t(), None, wide)
        projector = PackedLinear.of(router.projector.weight, router.projector.bias, wide)
        return packed_experts.PackedRouter(directions, projector, balance)
    return None
