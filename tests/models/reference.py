"""Weights and inputs made by the rules of the recorded outputs, and a slow, obvious Swin block."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from swin_moe.models.swin import Block

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
NUMBERS = json.loads((GOLDEN / "numbers.json").read_text())
TINY = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "num_classes": 3}
SMALL = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [2, 2, 4, 4]}

# Our name of a MoE parameter -> the official one.
OFFICIAL_MOE = {
    "mlp.router.weight": "mlp._moe_layer.gates.0.wg.weight",
    "mlp.experts.fc1_weight": "mlp._moe_layer.experts.batched_fc1_w",
    "mlp.experts.fc1_bias": "mlp._moe_layer.experts.batched_fc1_bias",
    "mlp.experts.fc2_weight": "mlp._moe_layer.experts.batched_fc2_w",
    "mlp.experts.fc2_bias": "mlp._moe_layer.experts.batched_fc2_bias",
}


def official_name(name: str) -> str:
    for ours, theirs in OFFICIAL_MOE.items():
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    return name


def normal(tag: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.RandomState(zlib.crc32(tag.encode())).standard_normal(shape))


def fill_by_name(model: nn.Module) -> None:
    """Fills parameters by the rule of tests/golden/{dense,moe}: each is a function of its official name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = official_name(name)
            if ".experts." in name:
                z = torch.stack([normal(f"{name}.{e}", tuple(parameter.shape[1:])) for e in range(len(parameter))])
            else:
                z = normal(name, tuple(parameter.shape))
            if parameter.dim() == 1 and name.endswith(".weight"):
                value = 1 + 0.1 * z
            elif name.endswith("logit_scale"):
                value = np.log(10) + 0.1 * z
            else:
                value = 0.05 * z
            parameter.copy_(value.float())


def fill_by_rank(model: nn.Module) -> None:
    """Fills parameters by the rule of numbers.json: each is a function of its rank in the sorted names."""
    with torch.no_grad():
        for rank, (name, parameter) in enumerate(sorted(model.named_parameters())):
            value = 0.1 * np.random.RandomState(rank).standard_normal(parameter.numel()).reshape(tuple(parameter.shape))
            if "norm" in name and name.endswith(".weight"):
                value = value + 1.0
            if name.endswith("logit_scale"):
                value = value + np.log(10)
            parameter.copy_(torch.from_numpy(value))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).double().norm() / theirs.double().norm()).item()


def gradient_norms(model: nn.Module) -> dict[str, float]:
    # In float64: torch's own float32 norm of two million elements is off by 2e-4 on CPU.
    return {n: p.grad.double().norm().item() for n, p in model.named_parameters() if p.grad is not None}


def slow_v1_block(block: Block, x_HWC: Tensor, shift: int) -> Tensor:
    """Returns a V1 block's output for one image, token by token: padded, attended by region, cropped."""
    height, width, channels = x_HWC.shape
    attn, window = block.attn, block.attn.window
    heads, head_dim = attn.num_heads, channels // attn.num_heads
    padded_h, padded_w = -(-height // window) * window, -(-width // window) * window
    x = torch.zeros(padded_h, padded_w, channels, dtype=x_HWC.dtype)
    x[:height, :width] = block.norm1(x_HWC)
    qkv = attn.qkv(x).view(padded_h, padded_w, 3, heads, head_dim)
    out = torch.zeros(height, width, heads, head_dim, dtype=x.dtype)

    def place(y, x):  # position after the cyclic shift
        return (y - shift) % padded_h, (x - shift) % padded_w

    def region(n, size):  # part of the shifted map that a position belongs to, per axis
        return int(n >= size - window) + int(n >= size - shift) if shift else 0

    positions = [(y, x) for y in range(padded_h) for x in range(padded_w)]
    for y, x_ in ((y, x_) for y in range(height) for x_ in range(width)):
        a, b = place(y, x_)
        keys, scores = [], []
        for ky, kx in positions:
            c, d = place(ky, kx)
            if (a // window, b // window) != (c // window, d // window):
                continue
            same = region(a, padded_h) == region(c, padded_h) and region(b, padded_w) == region(d, padded_w)
            row = (a - c + window - 1) * (2 * window - 1) + (b - d + window - 1)
            score = (qkv[y, x_, 0] * attn.scale * qkv[ky, kx, 1]).sum(-1) + attn.relative_position_bias_table[row]
            keys.append(qkv[ky, kx, 2])
            scores.append(score if same else score - 100.0)
        weights = torch.stack(scores).softmax(0)
        out[y, x_] = (weights[:, :, None] * torch.stack(keys)).sum(0)
    x = x_HWC + attn.proj(out.reshape(height, width, channels))
    return x + block.mlp(block.norm2(x)[None])[0]
