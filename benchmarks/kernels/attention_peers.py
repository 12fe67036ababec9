"""Window attention from qkv (B, H, W, 3C) to (B, H, W, C) by the means of PyTorch, to compare the fused operator with.

Every peer takes (qkv, bias_table, logit_scale) and computes what the operator does; differentiable in all three.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.ops.attention.fused import fused_window_attention
from swin_moe.ops.attention.geometry import MASKED, gather_bias, merge_windows, partition_windows, shift_mask
from swin_moe.ops.attention.in_windows import attend_windows
from swin_moe.ops.attention.reference import AttentionNumbers, attend_map

Attend = Callable[[Tensor, Tensor, Tensor | None], Tensor]
HEAD_DIM = 32  # of all published models
BATCH = 64

StageTensors = tuple[Tensor, Tensor, Tensor | None]  # as Stage.tensors gives them


@dataclass(frozen=True)
class Stage:
    """One stage of a network: its map, windows and heads."""

    model: str
    number: int
    side: int  # tokens
    window: int
    heads: int
    cosine: bool
    batch: int = BATCH

    @property
    def shift(self) -> int:
        """Of every second block; none where the map is one window."""
        return self.window // 2 if self.side > self.window else 0

    @property
    def scale(self) -> float:
        """Factor of dot products."""
        return HEAD_DIM**-0.5

    def tensors(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> StageTensors:
        """Returns qkv, the bias table, the factor of cosine scores."""
        torch.manual_seed(seed)
        qkv = torch.randn(self.batch, self.side, self.side, 3 * self.heads * HEAD_DIM, device=device, dtype=dtype)
        table = torch.randn((2 * self.window - 1) ** 2, self.heads, device=device)
        return qkv, table, torch.full((self.heads,), 10.0, device=device) if self.cosine else None


def stages(model: str, size: int, window: int, heads: int, *, cosine: bool) -> list[Stage]:
    """Returns the four stages of a network with patches of 4; a window is no larger than the map."""
    sides = [size // 4 // 2**n for n in range(4)]
    return [Stage(model, n + 1, side, min(window, side), heads * 2**n, cosine) for n, side in enumerate(sides)]


STAGES = [
    *stages("Swin-T w7", 224, 7, 3, cosine=False),
    *stages("SwinV2-B w8", 256, 8, 4, cosine=True),
    *stages("SwinV2-B w16", 256, 16, 4, cosine=True),
    *stages("Swin-B-384 w12", 384, 12, 4, cosine=False),
    *stages("SwinV2-B w24", 384, 24, 4, cosine=True),
]


def fused(stage: Stage) -> Attend:
    """Returns the operator of this package."""

    def attend(qkv: Tensor, table: Tensor, factor: Tensor | None) -> Tensor:
        return fused_window_attention(
            qkv,
            table,
            num_heads=stage.heads,
            window=(stage.window,) * 2,
            shift=(stage.shift,) * 2,
            scale=stage.scale,
            logit_scale=factor,
        )

    return attend


def eager(stage: Stage) -> Attend:
    """Returns the official order of operations."""
    numbers = AttentionNumbers(stage.heads, *(stage.window,) * 2, *(stage.shift,) * 2, stage.scale, MASKED)
    return lambda qkv, table, factor: attend_map(qkv, table, factor, None, numbers=numbers)


def in_windows(stage: Stage, attend: Callable[..., Tensor]) -> Attend:
    """Returns roll, partition, `attend(windows, bias, mask, factor)`, merge, roll."""
    window, side, shift = (stage.window,) * 2, stage.side, stage.shift

    def whole(qkv: Tensor, table: Tensor, factor: Tensor | None) -> Tensor:
        x = torch.roll(qkv, (-shift, -shift), dims=(1, 2)) if shift else qkv
        bias = gather_bias(table, window)
        mask = shift_mask(side, side, window, (shift, shift), qkv.device, bias.dtype) if shift else None
        out = merge_windows(attend(partition_windows(x, window), bias, mask, factor), window, stage.batch, side, side)
        return torch.roll(out, (shift, shift), dims=(1, 2)) if shift else out

    return whole


def sdpa(stage: Stage) -> Attend:
    """Returns scaled_dot_product_attention with bias and mask as its mask."""

    def attend(windows: Tensor, bias: Tensor, mask: Tensor | None, factor: Tensor | None) -> Tensor:
        log_factor = None if factor is None else factor.log().view(-1, 1, 1)
        return attend_windows(
            windows, bias.to(windows.dtype), mask, scale=stage.scale, logit_scale=log_factor, implementation="sdpa"
        )

    return in_windows(stage, attend)


def flex(stage: Stage) -> Attend:
    """Returns FlexAttention, compiled, with bias and mask added by its score function."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(windows: Tensor, bias: Tensor, mask: Tensor | None, factor: Tensor | None) -> Tensor:
        count, tokens, width = windows.shape
        q, k, v = windows.view(count, tokens, 3, stage.heads, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
        scale = stage.scale
        if factor is not None:
            q, k, scale = F.normalize(q, dim=-1) * factor.view(-1, 1, 1).to(q.dtype), F.normalize(k, dim=-1), 1.0

        def add(score: Tensor, window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            score = score + bias[head, query, key]
            return score if mask is None else score + mask[window % mask.shape[0], query, key]

        out = compiled(q.contiguous(), k.contiguous(), v.contiguous(), score_mod=add, scale=scale)
        return out.transpose(1, 2).reshape(count, tokens, width // 3)

    return in_windows(stage, attend)


def compiled(make: Callable[[Stage], Attend], stage: Stage) -> Attend:
    """Returns another peer through torch.compile."""
    torch.compiler.reset()
    return torch.compile(make(stage), dynamic=False)


PEERS: dict[str, Callable[[Stage], Attend]] = {
    "sdpa": sdpa,
    "eager": eager,
    "compile(sdpa)": partial(compiled, sdpa),
    "flex": flex,
    "compile(eager)": partial(compiled, eager),
}
