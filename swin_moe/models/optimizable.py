"""Which networks have an inference form for the CPU (optimized.py), and why others have none."""

import torch
from torch import nn

from swin_moe.models.attention import WindowAttention
from swin_moe.models.layers import Mlp, PatchEmbed, PatchMerging
from swin_moe.models.swin import Block, SwinTransformer
from swin_moe.moe import MoELayer
from swin_moe.moe.shared import SharedExpert
from swin_moe.ops.attention.fused import unsupported
from swin_moe.ops.layer_norm import LayerNorm
from swin_moe.ops.linear import Linear, is_untouched
from swin_moe.ops.packed_layers import DTYPES, INT8_DTYPES, refusal

# Where the parts of a network are defined, and what has to stand where: something else (LoRA, quantization) computes
# more than its weight says.
_MODULES = ("swin_moe.models.", "swin_moe.moe.", "swin_moe.ops.", "torch.nn.modules.")
_LINEAR, _NORM = (nn.Linear, Linear), (nn.LayerNorm, LayerNorm)
_PARTS: dict[type[nn.Module], dict[str, tuple[type[nn.Module], ...]]] = {
    SwinTransformer: {"norm": _NORM, "head": (*_LINEAR, nn.Identity)},
    PatchEmbed: {"proj": (nn.Conv2d,), "norm": _NORM},
    PatchMerging: {"reduction": _LINEAR, "norm": _NORM},
    Block: {"norm1": _NORM, "norm2": _NORM, "enorm": _NORM, "mlp": (Mlp, MoELayer)},
    WindowAttention: {"qkv": _LINEAR, "proj": _LINEAR},
    Mlp: {"fc1": _LINEAR, "fc2": _LINEAR},
    SharedExpert: {"fc1": _LINEAR, "fc2": _LINEAR},
}


def optimize_refusal(model: nn.Module, dtype: torch.dtype, *, int8: bool = False) -> str:
    """Returns why there is no inference form of a network, one clause; "" where there is."""
    if not isinstance(model, SwinTransformer):
        return f"it takes a Swin network as build_model and create_model give it, got a {type(model).__name__}"
    if dtype not in (dtypes := INT8_DTYPES if int8 else DTYPES):
        told = " with int8=True, of what is not in int8" if int8 else " (int8=True multiplies in int8)"
        return f"dtype must be one of {', '.join(map(str, dtypes))}{told}, got {dtype}"
    if reason := refusal():
        return f"it needs the compiled kernels: {reason}"
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or type(parameter) is not nn.Parameter:
            return f"it is for weights on the CPU of one process, {name} is on {parameter.device}"
    for name, module in model.named_modules():
        if reason := _strange(module):
            return f"{name or 'the network'} {reason}"
        if isinstance(module, WindowAttention):
            window, head_dim = (module.window,) * 2, module.proj.in_features // module.num_heads
            problem = unsupported(device_type="cpu", dtype=dtype, head_dim=head_dim, window=window)
            if problem is not None:
                return f"{name}: {problem}"
        if isinstance(module, MoELayer) and module.experts.num_local_experts != module.experts.num_experts:
            return f"the experts of {name} are spread over ranks"
    return ""


def _strange(module: nn.Module) -> str:
    """Returns what is not as build_model makes it, a predicate; "" where nothing is."""
    if not type(module).__module__.startswith(_MODULES):
        return f"({type(module).__name__}) is none of the parts that a Swin network is built of"
    if not is_untouched(module):
        return "has hooks or a forward of its own, which would not be called"
    for name, kinds in _PARTS.get(type(module), {}).items():
        part = getattr(module, name)
        if part is not None and type(part) not in kinds:
            return f"has a {type(part).__name__} for its {name}, which is not a {kinds[0].__name__}"
    return ""
