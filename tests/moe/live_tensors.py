"""Which tensors of at least a given size are alive at once, forward and backward, seen below autograd."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Within it, storages that operators make with room for `numel` elements or more are counted while they live.

    An element counts in any dtype: a mask of bytes is as large as the scores it is about.
    """

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.peak = self.peak_bytes = 0
        self._alive: dict[int, tuple[weakref.ref, int, str]] = {}
        self.at_peak: list[str] = []  # the operators that made what lived then

    @property
    def count(self) -> int:
        """Storages alive now."""
        return len(self._alive)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, str(function))
        return result

    def _note(self, tensor: torch.Tensor, maker: str) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.numel * tensor.element_size() or storage._cdata in self._alive:
            return
        key = storage._cdata
        gone = weakref.ref(storage, lambda _: self._alive.pop(key, None))
        self._alive[key] = (gone, storage.nbytes(), maker)
        alive = sum(size for _, size, _ in self._alive.values())
        self.peak_bytes = max(self.peak_bytes, alive)
        if self.count > self.peak:
            self.peak, self.at_peak = self.count, [maker for _, _, maker in self._alive.values()]
