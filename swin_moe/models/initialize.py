"""Initial weights as a pure function of (seed, parameter name), by the official rules."""

import math
import zlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from swin_moe.models.attention import SpatialMLP, WindowAttention
from swin_moe.moe import MoELayer
from swin_moe.randomness import derive_key, truncated_normal_


def initialize(model: nn.Module, seed: int, *, std: float, only: Collection[nn.Module] | None = None) -> None:
    """Fills the dense parameters of a model: linear layers and tables truncated normal, norms one, biases zero.

    Patch embedding and convolutional decoders keep torch's default rule for convolutions. The order of modules and the
    device have no influence. MoE layers fill theirs themselves; their sub-modules are skipped here.

    only: Modules whose own parameters are filled; None = all.
    """
    experts = tuple(prefix for prefix, module in model.named_modules() if isinstance(module, MoELayer))
    with torch.no_grad():
        for prefix, module in model.named_modules():
            if only is not None and module not in only:
                continue
            if any(prefix == p or prefix.startswith(p + ".") for p in experts):
                continue
            for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
                generator = torch.Generator().manual_seed(derive_key(seed, zlib.crc32(name.encode())))
                value = torch.empty(parameter.shape)
                _fill(value, module, name.rpartition(".")[2], generator, std)
                parameter.copy_(value)


def _fill(value: Tensor, module: nn.Module, name: str, generator: torch.Generator, std: float) -> None:
    """Fills one parameter in place; `name` is its attribute name in `module`."""
    if isinstance(module, nn.Conv2d):
        bound = 1.0 / math.sqrt(module.in_channels * math.prod(module.kernel_size))
        nn.init.uniform_(value, -bound, bound, generator=generator)
    elif name in ("bias", "q_bias", "v_bias"):
        value.zero_()
    elif name == "weight" and value.ndim == 1:  # of a norm
        value.fill_(1.0)
    elif isinstance(module, WindowAttention) and name == "logit_scale":
        value.fill_(math.log(10.0))
    elif isinstance(module, nn.Linear | SpatialMLP) or name.startswith(("relative_", "absolute_", "mask_")):
        truncated_normal_(value, std, generator)
    else:
        raise AssertionError(f"no initial value for {type(module).__name__}.{name}")
