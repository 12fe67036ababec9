"""What tests of several ranks compare: whole tensors out of what every rank holds, and networks small enough for it."""

from collections.abc import Iterable

import torch
from torch import Tensor

# Options of a network of two stages on images of 16 x 16; two windows a side in the first stage, one in the second.
NETWORK = (
    "model.img_size=16",
    "model.patch_size=2",
    "model.embed_dim=8",
    "model.depths=[1,2]",
    "model.num_heads=[1,2]",
    "model.window_size=4",
)


def gathered(held: Iterable[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]) -> dict[str, Tensor]:
    """Returns the whole tensors by name; refuses one of which no rank holds some element.

    A bias of queries, keys and values has zeros for the keys: their true gradient is 0, and Adam turns its rounding
    noise into steps.

    Args:
        held: (name, whole shape, offset, part) of everything that any rank holds.
    """
    tensors: dict[str, Tensor] = {}
    for name, shape, offset, part in held:
        whole = tensors.setdefault(name, torch.full(shape, float("nan"), dtype=part.dtype))
        whole[tuple(slice(o, o + n) for o, n in zip(offset, part.shape))] = part
    for name, tensor in tensors.items():
        assert not tensor.isnan().any(), f"no rank holds all of {name}"
        if name.endswith("qkv.bias"):
            third = tensor.shape[0] // 3
            tensor[third : 2 * third] = 0
    return tensors
