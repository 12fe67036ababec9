"""A source computed box by box from another one: for verbs that change the network."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from checkpoint_tools.files.floats import decode, encode
from checkpoint_tools.sources.base import Source, SourceTensor
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW
from swin_moe.layout import Chunk

Fill = Callable[[Chunk, np.ndarray], None]  # fills raw elements of a box


class Derived(NamedTuple):
    """A tensor of the new source."""

    shape: tuple[int, ...]
    dtype: str
    fill: Fill
    origin: str = ""  # the tensor of the base that it is mostly read from


class DerivedSource(Source):
    """See Source.

    Args:
        base: What is read. tensors: What is given, by name.
        recipe: JSON that says what was done, for provenance and the journal.
    """

    def __init__(
        self,
        base: Source,
        tensors: Mapping[str, Derived],
        *,
        step: int,
        state: dict[str, Any],
        config: dict[str, Any],
        recipe: dict[str, Any],
    ) -> None:
        self.format, self.path, self.files, self.base = "derived", base.path, base.files, base
        self._made = dict(sorted(tensors.items()))
        kept = any(name.startswith("optim.") for name in self._made)
        self.step_unknown = base.step_unknown and kept and step == base.step
        self._places = {"": ("", 0)}  # of what is made of no tensor
        self.tensors = {name: SourceTensor(made.shape, made.dtype) for name, made in self._made.items()}
        self.step, self.state, self.config, self._recipe = step, state, config, recipe
        self.provenance = {"derived": recipe, "source": {"path": str(base.path), "provenance": base.provenance}}

    @property
    def described(self) -> str:
        """See Source."""
        return self.base.described

    def read(self, name: str, box: Chunk, destination: np.ndarray) -> None:
        """See Source."""
        if box.numel:
            self._made[name].fill(box, destination)

    def locate(self, name: str, box: Chunk) -> tuple[str, int]:
        """See Source: beside what the tensor is made from."""
        origin = self._made[name].origin
        if origin not in self._places:
            self._places[origin] = self.base.locate(origin, Chunk.whole(self.base.tensors[origin].shape))
        return self._places[origin]

    def identity(self) -> Any:
        """See Source."""
        return {"base": self.base.identity(), "recipe": self._recipe}


def copied(base: Source, name: str) -> Derived:
    """Returns a tensor of the base as it is."""
    shape, dtype = base.tensors[name]
    return Derived(tuple(shape), dtype, lambda box, out: base.read(name, box, out), name)


def zeros(shape: tuple[int, ...], dtype: str) -> Derived:
    """Returns a tensor of zeros."""

    def fill(box: Chunk, out: np.ndarray) -> None:
        out[...] = 0

    return Derived(shape, dtype, fill)


def from_array(values: np.ndarray, dtype: str) -> Derived:
    """Returns a small tensor of numbers that are in memory, rounded to `dtype`."""

    def fill(box: Chunk, out: np.ndarray) -> None:
        encode(values[(*box.within(Chunk.whole(values.shape)), ...)].astype(np.float64), dtype, out)

    return Derived(values.shape, dtype, fill)


def load(base: Source, name: str, box: Chunk | None = None) -> np.ndarray:
    """Returns a box of a tensor, default all of it, as float64; for small ones."""
    shape, dtype = base.tensors[name]
    box = box or Chunk.whole(tuple(shape))
    raw = np.empty(box.size, RAW[DTYPE_BYTES[dtype]])
    base.read(name, box, raw)
    return decode(raw, dtype)


def scale(raw: np.ndarray, dtype: str, factor: float) -> None:
    """Multiplies raw elements in place; exact where the factor is a power of two."""
    if factor != 1.0:
        encode(decode(np.ascontiguousarray(raw), dtype) * factor, dtype, raw)
