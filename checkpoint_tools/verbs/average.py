"""`average A B ... DST`: the weighted mean of several checkpoints' parameters, box by box, summed in float64."""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_tools.files.floats import WRITABLE, decode, encode
from checkpoint_tools.formats import open_source
from checkpoint_tools.sources.base import Options, Source, split_kind
from checkpoint_tools.verbs.arguments import add_format_argument, add_output_arguments
from checkpoint_tools.verbs.convert import write_or_plan
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.layout import Chunk

_AT_ONCE = 1 << 18  # elements summed at once: 2 MiB as float64


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add = parser.add_argument
    add("sources", type=Path, nargs="+", help="checkpoints of one network, of any formats")
    add("destination", type=Path, help="the native checkpoint to write; nothing may be there yet")
    add("--weights", default="", metavar="W,W,...", help="one per source, summing to 1 (default: all alike)")
    add("--ema", action="store_true", help="take the averaged weights (ema/) of the sources instead of the last ones")
    add_format_argument(parser, of="of all sources")
    add_output_arguments(parser)


def run(arguments: argparse.Namespace, options: Options) -> int:
    """Writes the mean."""
    weights = parse_weights(arguments.weights, len(arguments.sources))
    sources: list[Source] = []
    try:
        for path in arguments.sources:
            sources.append(open_source(path, options, arguments.format))
        mean = MeanSource(sources, weights, "ema" if arguments.ema else "weight", options)
        write_or_plan(mean, arguments.destination, options, dry_run=arguments.dry_run)
    finally:
        for source in sources:
            source.close()
    return 0


def parse_weights(text: str, count: int) -> list[float]:
    """Returns one weight per source.

    Raises:
        ValueError: They are not `count` finite numbers that sum to 1.
    """
    if not text:
        return [1 / count] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not math.isclose(math.fsum(weights), 1, rel_tol=1e-6):  # a nan is close to nothing
        raise ValueError(f"--weights must be {count} numbers that sum to 1, one per source; got {text!r}")
    return weights


class MeanSource(Source):
    """The weighted mean of parameters; what is not a float must be the same in all sources."""

    format = "mean"

    def __init__(self, sources: list[Source], weights: list[float], kind: str, options: Options) -> None:
        self._sources, self._weights = sources, weights
        self._buffers = np.empty((2, options.box_bytes), np.uint8)
        first = sources[0]
        self._stored = {p: name for name in first.tensors for k, p in (split_kind(name),) if k == kind}
        if not self._stored:
            raise CheckpointError(f"{first.path}: holds no {'averaged weights (ema/...)' if kind == 'ema' else kind}")
        self.path, self.files = first.path, [path for source in sources for path in source.files]
        self.tensors = {parameter: first.tensors[name] for parameter, name in self._stored.items()}
        for source in sources[1:]:
            self._check_alike(first, source, kind)
        self.step = max(source.step for source in sources)
        self.state, self.config = {}, first.config
        self.provenance = {
            "mean": [
                {"path": str(s.path), "step": s.step, "weight": w, "provenance": s.provenance}
                for s, w in zip(sources, weights)
            ]
        }

    @property
    def described(self) -> str:
        """See Source."""
        weighted = (f"{weight:.3g} x {source.path}" for source, weight in zip(self._sources, self._weights))
        return f"{' + '.join(weighted)} (the mean)"

    def _check_alike(self, first: Source, other: Source, kind: str) -> None:
        """Raises CheckpointError, naming the tensor, unless another source holds the same parameters."""
        own = {p for k, p in map(split_kind, other.tensors) if k == kind}
        for parameter in sorted(own ^ self._stored.keys()):
            path = first.path if parameter in own else other.path
            raise CheckpointError(f"{path}: holds no tensor {parameter}, as the other sources do")
        for name in self._stored.values():
            a, b = first.tensors[name], other.tensors[name]
            if (tuple(a.shape), a.dtype) != (tuple(b.shape), b.dtype):
                raise CheckpointError(
                    f"{other.path}: tensor {name}: is {b.dtype} {tuple(b.shape)}, "
                    f"but {a.dtype} {tuple(a.shape)} in {first.path}"
                )

    def read(self, name: str, box: Chunk, destination: np.ndarray) -> None:
        """See Source."""
        dtype, raw = self.tensors[name].dtype, destination.dtype
        sides = [part[: box.numel * raw.itemsize].view(raw) for part in self._buffers]
        total = np.zeros(box.numel if dtype in WRITABLE else 0, np.float64)
        for number, (source, weight) in enumerate(zip(self._sources, self._weights)):
            side = sides[min(number, 1)]
            source.read(self._stored[name], box, side.reshape(box.size))
            if dtype in WRITABLE:
                for start in range(0, box.numel, _AT_ONCE):
                    total[start : start + _AT_ONCE] += weight * decode(side[start : start + _AT_ONCE], dtype)
            elif number and not np.array_equal(sides[0], sides[1]):
                raise CheckpointError(f"{source.path}: tensor {name}: {dtype} has no mean, and its values differ")
        if dtype in WRITABLE:
            for start in range(0, box.numel, _AT_ONCE):
                encode(total[start : start + _AT_ONCE], dtype, sides[0][start : start + _AT_ONCE])
        destination[...] = sides[0].reshape(box.size)

    def locate(self, name: str, box: Chunk) -> tuple[str, int]:
        """See Source: the order of the first source."""
        return self._sources[0].locate(self._stored[name], box)

    def read_bytes(self, name: str, box: Chunk) -> int:
        """See Source."""
        return sum(source.read_bytes(self._stored[name], box) for source in self._sources)

    def identity(self) -> Any:
        """See Source."""
        parts = [[source.identity(), weight] for source, weight in zip(self._sources, self._weights)]
        return {"parts": parts, "tensors": self._stored}
