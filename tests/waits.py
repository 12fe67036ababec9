"""Counts what would make the host wait for a device, on a machine without one."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or the size of it, the host has to know.
_OPERATORS = set(
    "_local_scalar_dense nonzero is_nonzero equal masked_select _unique2 unique_dim unique_consecutive bincount".split()
)
_METHODS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}


class _Operators(TorchDispatchMode):
    """Sees what reaches the dispatcher; the inside of a custom operator does not."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _OPERATORS or masks or (name == "repeat_interleave" and func._overloadname == "Tensor"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Sees the methods that on the CPU read memory without an operator."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _METHODS:
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Returns a context that counts waits by the name of what waits."""
    found: Counter[str] = Counter()
    with _Operators(found), _Methods(found):
        yield found
