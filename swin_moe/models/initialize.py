"""Initial weights as a pure function of (seed, parameter name), by the official rules."""

import copy
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

    Convolutions keep torch's default rule, as do all modules of types that are not known here: their own
    reset_parameters. The order of modules and the device have no influence. MoE layers fill theirs themselves; their
    sub-modules are skipped here.

    only: Modules whose own parameters are filled; None = all.
    """
    experts = tuple(prefix for prefix, module in model.named_modules() if isinstance(module, MoELayer))
    with torch.no_grad():
        for prefix, module in model.named_modules():
            if only is not None and module not in only:
                continue
            if any(prefix == p or prefix.startswith(p + ".") for p in experts):
                continue
            values = {}
            for name, parameter in module.named_parameters(recurse=False):
                generator = torch.Generator().manual_seed(_key(seed, prefix, name))
                values[name] = torch.empty(parameter.shape)
                if not _fill(values[name], module, name, generator, std):
                    values = _torchs_values(module, _key(seed, prefix, ""))
                    break
            for name, parameter in module.named_parameters(recurse=False):
                parameter.copy_(values[name])


def _key(seed: int, prefix: str, name: str) -> int:
    return derive_key(seed, zlib.crc32(f"{prefix}.{name}".strip(".").encode()))


def _fill(value: Tensor, module: nn.Module, name: str, generator: torch.Generator, std: float) -> bool:
    """Fills one parameter in place; returns False where no rule is known. `name` is its attribute name in `module`."""
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
        return False
    return True


def _torchs_values(module: nn.Module, key: int) -> dict[str, Tensor]:
    """Returns a module's own parameters as its reset_parameters fills them on the CPU, a function of the key.

    Raises:
        ValueError: It has none.
    """
    twin = copy.copy(module)
    own = module.named_parameters(recurse=False)
    blank = {name: nn.Parameter(torch.empty(parameter.shape)) for name, parameter in own}
    twin.__dict__["_parameters"] = dict(module._parameters) | blank
    reset = getattr(twin, "reset_parameters", None) or getattr(twin, "_reset_parameters", None)
    if reset is None:
        kind, names = type(module).__name__, ", ".join(blank)
        raise ValueError(
            f"{kind} needs a method reset_parameters that fills {names}: networks are built without memory"
        )
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(key)
        reset()
    return {name: parameter.detach() for name, parameter in blank.items()}
