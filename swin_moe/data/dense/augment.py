"""What a step does to an image, planned from its stored size and a key, and done later to all of it alike.

A plan knows the size it ends with before a pixel is read: the padded size of a step needs no image of another rank.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from swin_moe.config import DataConfig
from swin_moe.data.dense.geometry import Flip, Move, Resize, scaled_size
from swin_moe.data.dense.sample import DenseSample


@dataclass(frozen=True)
class Plan:
    """The moves of one image, in order."""

    size: tuple[int, int]  # height, width at the end
    moves: tuple[Move, ...]

    def apply(self, sample: DenseSample) -> DenseSample:
        """Returns the sample after all moves."""
        for move in self.moves:
            sample = move(sample)
        return sample


Planner = Callable[[int, int, int], Plan]  # height, width, key


def build_planner(config: DataConfig, *, train: bool) -> Planner:
    """Returns the planner of training, or of evaluation, where the key is not used."""
    return TrainingPlanner(config) if train else EvaluationPlanner(config)


class EvaluationPlanner:
    """Resizes to data.dense.eval_short, at most eval_long on the longer side."""

    def __init__(self, config: DataConfig) -> None:
        self._short, self._long = config.dense.eval_short, config.dense.eval_long
        self._antialias = config.dense.antialias

    def __call__(self, height: int, width: int, key: int = 0) -> Plan:
        """Returns the plan of an image of this size."""
        if not self._short:
            return Plan((height, width), ())
        size = scaled_size(height, width, self._short, self._long)
        return Plan(size, (Resize(size, self._antialias),))


class TrainingPlanner:
    """Flip and resize."""

    def __init__(self, config: DataConfig) -> None:
        self._hflip, self._options = config.hflip, config.dense

    def __call__(self, height: int, width: int, key: int) -> Plan:
        """Returns the plan of an image of this size; a pure function of size and key."""
        draw, options = random.Random(key), self._options
        moves: list[Move] = []
        size = height, width
        if draw.random() < self._hflip:
            moves.append(Flip())
        if options.short:
            short = options.short[int(draw.random() * len(options.short))]
            size = scaled_size(height, width, short, options.long)
            moves.append(Resize(size, options.antialias))
        return Plan(size, tuple(moves))
