"""Attention of windows that are cut already, with a position bias per head and a mask per window.

Three implementations with one meaning: `reference`, autograd over the official order of operations; `analytic`, the
same products with a hand-written backward; `sdpa`, torch's fused kernel. `choose` says which of them serves where
nothing is measured.

Shape legend: B images, M windows of one image, W = B * M windows (image-major), N tokens of a window, C channels,
H heads, D = C / H.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.ops.transforms import apply

IMPLEMENTATIONS = ("auto", "reference", "analytic", "sdpa")
MAX_LOGIT_SCALE = math.log(100.0)  # clamp of the learned log-scale of cosine scores, SwinV2 (arXiv:2111.09883, 3.3)
NORM_EPS = 1e-12  # smallest length a query or key is divided by, as F.normalize


def attend_windows(
    qkv_WNC: Tensor,
    bias_HNN: Tensor,
    mask_MNN: Tensor | None = None,
    *,
    scale: float = 1.0,
    logit_scale: Tensor | None = None,
    dropout_WHNN: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Returns the attended values (W, N, C): softmax(scores + bias + mask) v in every window and head.

    Args:
        qkv_WNC: (W, N, 3C), queries, keys and values side by side, heads inside each.
        bias_HNN: (H, N, N), added to the scores of every window.
        mask_MNN: (M, N, N), added to the scores of window m of every image; None = no mask.
        scale: Factor on the queries; dot-product scores only.
        logit_scale: (H, 1, 1) log of the factor on cosine scores, clamped at log 100; None = dot-product scores.
        dropout_WHNN: Multiplier of the attention weights (0 or 1 / keep probability); computed by `reference`.
        implementation: One of IMPLEMENTATIONS.

    Raises:
        ValueError: Unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if dropout_WHNN is not None or qkv_WNC.shape[0] == 0:
        implementation = "reference"  # sdpa of no windows returns a constant: the bias would have no gradient
    elif implementation == "auto":
        implementation = choose(
            qkv_WNC.device.type,
            qkv_WNC.dtype,
            bias_HNN.dtype,
            gradients=torch.is_grad_enabled() and (qkv_WNC.requires_grad or bias_HNN.requires_grad),
        )
    # Merged once per call: the score matrix is then read and written once less than with two additions.
    bias = bias_HNN[None] if mask_MNN is None else bias_HNN[None] + mask_MNN[:, None]
    if implementation == "analytic":
        return apply(_Analytic, qkv_WNC, bias, scale, logit_scale)
    if implementation == "sdpa":
        out_WHND = _sdpa(qkv_WNC, bias, scale, logit_scale)
    else:
        factor = None if logit_scale is None else clamped_factor(logit_scale)
        out_WHND = attend_explicitly(qkv_WNC, bias, scale, factor, dropout_WHNN)
    return out_WHND.transpose(1, 2).reshape(*qkv_WNC.shape[:2], qkv_WNC.shape[2] // 3)


def choose(device_type: str, dtype: torch.dtype, bias_dtype: torch.dtype, *, gradients: bool) -> str:
    """Returns the implementation that serves best where nothing is measured.

    CUDA: sdpa. CPU in float32 and float64: sdpa without gradients (1.3 times as fast as reference); analytic with them
    (1.1 times, 1.9 with cosine scores), because a bias that needs a gradient sends sdpa to its unfused path (0.7 to
    0.9). CPU in half precision: reference, whose sum of scores and bias is float32 under autocast; sdpa gains nothing
    there and takes 1.25 to 2.4 times as long in training.
    """
    if device_type == "cuda":
        return "sdpa"
    if dtype not in (torch.float32, torch.float64) or bias_dtype != dtype:
        return "reference"
    return "analytic" if gradients else "sdpa"


def _split_heads(qkv_WNC: Tensor, heads: int) -> Tensor:
    """Returns a (3, W, H, N, D) view of queries, keys and values."""
    windows, tokens, width = qkv_WNC.shape
    return qkv_WNC.view(windows, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)


def clamped_factor(logit_scale: Tensor) -> Tensor:
    """Returns what cosine scores are multiplied by, (H, 1, 1), at most 100."""
    return logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()


def _scaled(q: Tensor, k: Tensor, scale: float, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns queries and keys whose plain products are the scores. factor: (H, 1, 1), of cosine scores."""
    if factor is None:
        return q * scale, k
    # Lengths in at least float32, as autocast computes norms. The factor goes onto the queries: D columns instead of N.
    wide = torch.promote_types(q.dtype, torch.float32)
    unit_q, unit_k = (F.normalize(x.to(wide), dim=-1, eps=NORM_EPS) for x in (q, k))
    return (unit_q * factor).to(q.dtype), unit_k.to(k.dtype)


def _lengths(x: Tensor) -> Tensor:
    """Returns the length of every row, kept as a last dim of 1, never below NORM_EPS."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(NORM_EPS)


def attend_explicitly(
    qkv_WNC: Tensor, bias: Tensor, scale: float, factor: Tensor | None, dropout: Tensor | None = None
) -> Tensor:
    """Returns (W, H, N, D) through an explicit score matrix.

    Args:
        bias: (1 or M, H, N, N), added to the scores.
        factor: (H, 1, 1) on cosine scores; None = dot-product scores times `scale`.
        dropout: (W, H, N, N), multiplier of the weights.
    """
    weights, v = attention_weights(qkv_WNC, bias, scale, factor)
    if dropout is not None:
        weights = weights * dropout
    return weights.to(v.dtype) @ v


def attention_weights(qkv_WNC: Tensor, bias: Tensor, scale: float, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (how much each query (dim 2) takes of each key (dim 3), (W, H, N, N), rows that sum to 1; the values).

    Args:
        bias, factor: See attend_explicitly.
    """
    q, k, v = _split_heads(qkv_WNC, bias.shape[1]).unbind(0)
    q, k = _scaled(q, k, scale, factor)
    scores = q @ k.transpose(-2, -1)
    shape = scores.shape
    return (scores.view(shape[0] // bias.shape[0], *bias.shape) + bias).view(shape).softmax(dim=-1), v


def _sdpa(qkv: Tensor, bias: Tensor, scale: float, logit_scale: Tensor | None) -> Tensor:
    """Returns (W, H, N, D) through scaled_dot_product_attention; bias is (1 or M, H, N, N)."""
    split = _split_heads(qkv, bias.shape[1])
    if logit_scale is not None and qkv.dtype == bias.dtype and not torch.is_grad_enabled():
        # A copy scaled in place takes 0.7 of the time of two F.normalize.
        split = split.clone(memory_format=torch.contiguous_format)
        split[:2].div_(_lengths(split[:2]))
        split[0].mul_(clamped_factor(logit_scale))
        scale, logit_scale = 1.0, None
    q, k, v = split.unbind(0)
    if logit_scale is not None:
        q, k = _scaled(q, k, scale, clamped_factor(logit_scale))
        scale = 1.0
    if bias.shape[0] > 1:
        bias = bias.expand(q.shape[0] // bias.shape[0], *bias.shape).reshape(q.shape[0], *bias.shape[1:])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)


class _Analytic(torch.autograd.Function):
    """Explicit scores with a hand-written backward, (W, N, 3C) -> (W, N, C); float32 and float64.

    Queries, keys and values are copied into head order once and their gradients written into one buffer of that order;
    unit vectors take one reduction and one product. Autograd over F.normalize alone costs more than the attention.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor, scale: float, logit_scale: Tensor | None) -> Tensor:
        heads, tokens = bias.shape[1], bias.shape[2]
        windows, width = qkv.shape[0], qkv.shape[2] // 3
        packed = _split_heads(qkv, heads).clone(memory_format=torch.contiguous_format)
        ctx.scale, ctx.bias_shape = scale, bias.shape
        if logit_scale is None:
            norm = packed.new_empty(0)
            q = packed[0].mul_(scale)
        else:
            norm = _lengths(packed[:2])
            packed[:2].div_(norm)
            q = packed[0] * clamped_factor(logit_scale)
        flat = (windows * heads, tokens, width // heads)
        scores = torch.bmm(q.view(flat), packed[1].view(flat).transpose(1, 2))
        scores.view(windows // bias.shape[0], *bias.shape).add_(bias)
        weights = scores.softmax(dim=-1)
        out = torch.bmm(weights, packed[2].view(flat))
        ctx.save_for_backward(packed, norm, weights, logit_scale)
        return out.view(windows, heads, tokens, width // heads).transpose(1, 2).reshape(windows, tokens, width)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_WNC: Tensor) -> tuple[Tensor | None, ...]:
        packed, norm, weights, logit_scale = ctx.saved_tensors
        _, windows, heads, tokens, head_dim = packed.shape
        flat = (windows * heads, tokens, head_dim)
        q, k, v = (t.view(flat) for t in packed.unbind(0))
        grad_out = grad_WNC.reshape(windows, tokens, heads, head_dim).transpose(1, 2).reshape(flat)
        grads = torch.empty_like(packed)
        grad_q, grad_k, grad_v = (t.view(flat) for t in grads.unbind(0))
        torch.bmm(weights.transpose(1, 2), grad_out, out=grad_v)
        grad_weights = torch.bmm(grad_out, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = grad_scores.view(windows // ctx.bias_shape[0], *ctx.bias_shape).sum(0)
        torch.bmm(grad_scores, k, out=grad_q)
        grad_logit_scale = None
        if logit_scale is None:
            grad_q.mul_(ctx.scale)
            torch.bmm(grad_scores.transpose(1, 2), q, out=grad_k)
        else:
            factor = clamped_factor(logit_scale)
            torch.bmm(grad_scores.transpose(1, 2), (packed[0] * factor).view(flat), out=grad_k)
            grads[0].mul_(factor)
            # d(x / |x|): the part along the unit vector is removed; along the queries it is the factor's gradient.
            along = (grads[:2] * packed[:2]).sum(dim=-1, keepdim=True)
            grads[:2].addcmul_(packed[:2], along, value=-1.0).div_(norm)
            inside = (logit_scale <= MAX_LOGIT_SCALE).to(along.dtype)
            grad_logit_scale = along[0].sum(dim=(0, 2)).view_as(logit_scale) * inside
        grad_qkv = grads.permute(1, 3, 0, 2, 4).reshape(windows, tokens, 3 * heads * head_dim)
        return grad_qkv, grad_bias, None, grad_logit_scale
