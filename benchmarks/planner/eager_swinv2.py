"""SwinV2 as eager PyTorch 1.8 runs it under automatic mixed precision, on tensors without memory: what its operators
move and multiply. It stands for the program whose speed arXiv:2206.03382 publishes, and timm's, which are not ours.

Every operator is a pass over memory: windows are copied out and back, scores get scale, bias, mask, softmax and dropout
one by one. Autocast keeps norms, softmax and normalization in fp32 and casts what goes into products to fp16.

Shape legend: B images, H, W tokens, C channels, N tokens of a window, D channels of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from swin_moe.planner.hardware import Hardware
from swin_moe.planner.trace import LiveBytes


def weight(*shape: int, grad: bool = True) -> Tensor:
    return torch.empty(shape, requires_grad=grad)


def product(x: Tensor, out: int, bias: bool = True) -> Tensor:
    """Returns a linear layer of x as autocast runs it: input and weight are cast, each by a kernel."""
    half = torch.float16
    w, b = weight(out, x.shape[-1]), weight(out) if bias else None
    return F.linear(x.to(half), w.to(half), None if b is None else b.to(half))


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), (x.shape[-1],), weight(x.shape[-1]), weight(x.shape[-1]))


def attend(x_BHWC: Tensor, window: int, heads: int, shift: int, training: bool) -> Tensor:
    B, H, W, C = x_BHWC.shape
    x = torch.roll(x_BHWC, (-shift, -shift), (1, 2)) if shift else x_BHWC
    x = x.view(B, H // window, window, W // window, window, C).permute(0, 1, 3, 2, 4, 5).contiguous()
    x = x.view(-1, window * window, C)
    n, N = x.shape[:2]
    q, k, v = product(x, 3 * C).reshape(n, N, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    scores = F.normalize(q.float(), dim=-1).half() @ F.normalize(k.float(), dim=-1).half().transpose(-2, -1)
    scores = scores.float() * weight(heads, 1, 1) + weight(1, heads, N, N)
    if shift:
        count = H // window * (W // window)
        scores = scores.view(B, count, heads, N, N) + weight(1, count, 1, N, N, grad=False)
        scores = scores.view(-1, heads, N, N)
    y = F.dropout(scores.softmax(-1), 0.0, training).half() @ v
    y = F.dropout(product(y.transpose(1, 2).reshape(n, N, C), C), 0.0, training)
    y = y.view(B, H // window, W // window, window, window, C).permute(0, 1, 3, 2, 4, 5).contiguous()
    y = y.view(B, H, W, C)
    return torch.roll(y, (shift, shift), (1, 2)) if shift else y


def add(x: Tensor, branch: Tensor, training: bool) -> Tensor:
    """Returns x with a branch whose path may be dropped."""
    return x + (branch * weight(len(x), 1, 1, 1, grad=False) if training else branch)


@dataclass(frozen=True)
class Network:
    """What one SwinV2 is made of."""

    dim: int
    depths: tuple[int, ...]
    size: int = 192  # pixels of an image's side
    window: int = 12  # tokens of a window's side
    classes: int = 21841


def forward(images: int, network: Network, training: bool) -> Tensor:
    size, side, dim = network.size, network.size // 4, network.dim
    x = norm(
        F.conv2d(weight(images, 3, size, size, grad=False).half(), weight(dim, 3, 4, 4).half(), stride=4)
        .flatten(2)
        .transpose(1, 2)
    ).view(images, side, side, dim)
    for stage, depth in enumerate(network.depths):
        heads, window = dim * 2**stage // 32, min(network.window, side // 2**stage)
        for block in range(depth):
            shift = window // 2 if block % 2 and x.shape[1] > window else 0
            x = add(x, norm(attend(x, window, heads, shift, training)), training)
            hidden = F.dropout(F.gelu(product(x, 4 * x.shape[-1])), 0.0, training)
            x = add(x, norm(F.dropout(product(hidden, x.shape[-1]), 0.0, training)), training)
        if stage < len(network.depths) - 1:
            parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            x = norm(product(torch.cat(parts, -1), 2 * x.shape[-1], bias=False))
    return product(norm(x).mean((1, 2)), network.classes)


def count(images: int, network: Network, *, training: bool) -> dict[str, float]:
    """Returns bytes that products and other operators move, and operators that start kernels."""
    with FakeTensorMode(), LiveBytes() as counted, torch.set_grad_enabled(training):
        out = forward(images, network, training)
        if training:
            F.cross_entropy(out.float(), torch.empty(images, dtype=torch.int64)).backward()
        counted.end()
    names = ("moved", "moved_by_products", "launches")
    return {name: sum(float(getattr(s, name)) for s in counted.segments) for name in names} | {
        "peak": float(counted.peak)
    }


def seconds(images: int, network: Network, macs: float, hardware: Hardware, *, training: bool) -> float:
    """Returns seconds of one step, or of one forward: its products, and its passes over memory one after another.

    Args:
        macs: Multiply-accumulates of an image in forward.
    """
    work = count(images, network, training=training)
    arithmetic = 2 * macs * images * (3 if training else 1) / hardware.matrix_rate("fp16")
    products = max(work["moved_by_products"] / hardware.memory_rate, arithmetic)
    return max(products + work["moved"] / hardware.memory_rate, work["launches"] * hardware.launch_seconds)
