"""The attention half of a block as others compute it: the contenders of window_attention.py.

Official order (microsoft/Swin-Transformer, models/swin_transformer.py and swin_transformer_v2.py): roll, partition,
projection, scores, bias, mask, softmax, values, output projection, merge, roll. Index and mask are made once, as the
official buffers; the bias of the SwinV2 shapes is given as a table, so nobody computes its network or its sigmoid.

Shape legend: B images, H x W tokens, C channels, A heads, D = C / A, M windows of an image, N tokens of a window.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.ops.attention.half import HalfShape, HalfTensors

Half = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One shape: a stage of a network."""

    network: str
    stage: int  # from 1
    side: int  # tokens of the map
    dim: int
    heads: int
    window: int
    cosine: bool

    @property
    def shift(self) -> int:
        """The displacement of odd blocks; a map of one window stays in place."""
        return self.window // 2 if self.side > self.window else 0

    @property
    def shape(self) -> HalfShape:
        """What our implementation takes."""
        return HalfShape(self.heads, (self.window,) * 2, (self.shift,) * 2, (self.dim // self.heads) ** -0.5)

    def __str__(self) -> str:
        return f"{self.network} stage {self.stage}"


def rows() -> list[Row]:
    """Returns every stage of the four networks."""
    networks = (
        ("Swin-T w7", 56, 96, 3, 7, False),
        ("SwinV2-B w8", 64, 128, 4, 8, True),
        ("SwinV2-B w16", 64, 128, 4, 16, True),
        ("Swin-B-384 w12", 96, 128, 4, 12, False),
    )
    return [
        Row(name, stage + 1, side >> stage, dim << stage, heads << stage, min(window, side >> stage), cosine)
        for name, side, dim, heads, window, cosine in networks
        for stage in range(4)
    ]


class Official:
    """A half in the official order; `attend` is what differs."""

    def __init__(self, row: Row, tensors: HalfTensors) -> None:
        self.row, self.tensors = row, tensors
        window = row.window
        coords = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = coords[:, :, None] - coords[:, None, :] + window - 1
        self.index = (relative[0] * (2 * window - 1) + relative[1]).flatten()
        self.mask = self._mask() if row.shift else None

    def _mask(self) -> Tensor:
        """Returns (M, N, N), -100 between tokens of different regions."""
        row, regions = self.row, torch.zeros(1, self.row.side, self.row.side, 1)
        slices = (slice(0, -row.window), slice(-row.window, -row.shift), slice(-row.shift, None))
        for number, (down, right) in enumerate((a, b) for a in slices for b in slices):
            regions[:, down, right] = number
        windows = self._partition(regions)[..., 0]
        return (windows[:, None, :] != windows[:, :, None]).float() * -100.0

    def _partition(self, x: Tensor) -> Tensor:
        (batch, side, _, channels), window = x.shape, self.row.window
        x = x.view(batch, side // window, window, side // window, window, channels)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, channels)

    def bias(self) -> Tensor:
        """Returns (A, N, N)."""
        tokens = self.row.window**2
        return self.tensors.bias_table[self.index].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        row, weights = self.row, self.tensors
        batch, side, tokens, grid = len(x), row.side, row.window**2, row.side // row.window
        if row.shift:
            x = torch.roll(x, (-row.shift, -row.shift), (1, 2))
        windows = self._partition(x)
        qkv = F.linear(windows, weights.qkv_weight, weights.qkv_bias)
        q, k, v = qkv.view(-1, tokens, 3, row.heads, row.dim // row.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.linear(self.attend(q, k, v), weights.proj_weight, weights.proj_bias)
        out = out.view(batch, grid, grid, row.window, row.window, row.dim)
        out = out.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, side, side, row.dim)
        return torch.roll(out, (row.shift, row.shift), (1, 2)) if row.shift else out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns (B * M, N, C) from (B * M, A, N, D)."""
        raise NotImplementedError

    def unit(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        """Returns queries, keys and the scale whose scaled products are the scores."""
        if self.tensors.logit_scale is None:
            return q, k, self.row.shape.scale
        factor = self.tensors.logit_scale.clamp(max=math.log(100.0)).exp()
        return (F.normalize(q, dim=-1) * factor).to(q.dtype), F.normalize(k, dim=-1).to(q.dtype), 1.0


class Eager(Official):
    """The official implementation."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, tokens = self.row.heads, self.row.window**2
        if self.tensors.logit_scale is None:
            scores = q * self.row.shape.scale @ k.transpose(-2, -1)
        else:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * self.tensors.logit_scale.clamp(max=math.log(100.0)).exp()
        scores = scores + self.bias()[None]
        if self.mask is not None:
            scores = scores.view(-1, len(self.mask), heads, tokens, tokens) + self.mask[None, :, None]
            scores = scores.view(-1, heads, tokens, tokens)
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(-1, tokens, self.row.dim)


class Sdpa(Official):
    """scaled_dot_product_attention over heads, with a mask for every window of every image."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, scale = self.unit(q, k)
        mask = self.bias()[None]
        if self.mask is not None:
            mask = (mask + self.mask[:, None]).repeat(len(q) // len(self.mask), 1, 1, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), scale=scale)
        return out.transpose(1, 2).reshape(-1, self.row.window**2, self.row.dim)


class SdpaFolded(Official):
    """scaled_dot_product_attention over windows x heads, with a mask that all images share."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, scale = self.unit(q, k)
        mask, windows = self.bias()[None], 1
        if self.mask is not None:
            windows = len(self.mask)
            mask = (mask + self.mask[:, None]).flatten(0, 1)[None]
        q_fold, k_fold, v_fold = (t.reshape(-1, windows * self.row.heads, *t.shape[2:]) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q_fold, k_fold, v_fold, attn_mask=mask.to(q.dtype), scale=scale)
        return out.view(q.shape).transpose(1, 2).reshape(-1, self.row.window**2, self.row.dim)


class Flex(Official):
    """FlexAttention: bias and mask are read inside its compiled kernel."""

    def __init__(self, row: Row, tensors: HalfTensors) -> None:
        super().__init__(row, tensors)
        from torch.nn.attention.flex_attention import flex_attention

        self.flex = torch.compile(flex_attention, dynamic=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, scale = self.unit(q, k)
        bias, mask = self.bias(), self.mask

        def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            value = value + bias[h, i, j]
            return value if mask is None else value + mask[b % len(mask), i, j]

        out = self.flex(q.contiguous(), k.contiguous(), v.contiguous(), score_mod=score, scale=scale)
        return out.transpose(1, 2).reshape(-1, self.row.window**2, self.row.dim)


def peers(row: Row, tensors: HalfTensors, *, compiled: bool) -> dict[str, Half]:
    """Returns every contender but ours, by name; the first is the official one."""
    plain: dict[str, Half] = {"eager": Eager(row, tensors), "sdpa": Sdpa(row, tensors)}
    plain["sdpa folded"] = SdpaFolded(row, tensors)
    if compiled:
        for name, kind in (("eager", Eager), ("sdpa folded", SdpaFolded)):
            plain[f"compile({name})"] = torch.compile(kind(row, tensors).__call__, dynamic=False)
        plain["flex"] = Flex(row, tensors)
    return plain
