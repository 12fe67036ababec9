"""Large CPU tensors in memory that was used before: the first write to fresh memory is a fault per page."""

import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from swin_moe.ops import extension

# The allocator (glibc) gives freed blocks back to the system at once from 32 MiB on, and smaller ones where they lie at
# the end of its heap: 60000 faults a step of Swin-MoE-S with 8 experts, most of whose weights are 18 MiB each.
_SMALLEST = 4 << 20
_free: dict[int, list[np.ndarray]] = defaultdict(list)  # bytes -> blocks that no tensor uses


def empty_like_reused(tensor: Tensor) -> Tensor:
    """Returns what torch.empty_like does; a large CPU tensor lies in the memory of an earlier one that is gone.

    The weight gradients of 128 experts of 1536 x 384 are written in 70 ms so, and in 190 ms to fresh memory (one
    thread; huge pages take 70 ms where the system has them at hand, more than small ones where it must make them). What
    is kept is at most what was in use at once, which a step needs again; it is not returned to the system.
    """
    size = tensor.numel() * tensor.element_size()
    dense = tensor.untyped_storage().nbytes() == size and tensor.storage_offset() == 0
    if tensor.device.type != "cpu" or size < _SMALLEST or not dense:
        return torch.empty_like(tensor)
    return torch.ops.swin_moe.empty_like_reused(tensor)


def _reused(tensor: Tensor) -> Tensor:
    size = tensor.untyped_storage().nbytes()
    blocks = _free[size]
    block = blocks.pop() if blocks else np.empty(size, np.uint8)
    lent = memoryview(block)  # lives as long as the storage; the block comes back when it goes
    weakref.finalize(lent, blocks.append, block).atexit = False
    return torch.frombuffer(lent, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _register() -> None:
    # An operator, so that whoever watches operators for the memory that they return sees it (planner/trace.py).
    library = extension.define("empty_like_reused(Tensor like) -> Tensor")
    library.impl("empty_like_reused", _reused, "CompositeExplicitAutograd")
    torch.library.register_fake("swin_moe::empty_like_reused", torch.empty_like, lib=library)


_register()
