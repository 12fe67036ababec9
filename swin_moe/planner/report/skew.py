"""How much longer a step takes with uneven routing: the rank with the most rows is the one that all others wait for.

Shape legend: N draws of a layer's load, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swin_moe.config import Config
from swin_moe.planner.hardware import Hardware
from swin_moe.planner.plan import Planned
from swin_moe.planner.step_time import expert_seconds
from swin_moe.planner.workload import PADDED, Workload

_QUANTILES = (0.1, 0.9)
_DRAWS = 256
# Standard deviation over mean of experts' loads, where no run says it: between a well balanced layer and a poor one.
_DEFAULT_CV = (0.1, 0.5)


@dataclass(frozen=True, eq=False)
class Skew:
    """Loads of experts to reckon with."""

    loads: np.ndarray  # (N, E), each row of mean 1
    source: str  # where they are from, in words


def default_skew(experts: int) -> Skew:
    """Returns loads as gamma distributions draw them, whose standard deviation over mean is spread over a range."""
    generator = np.random.default_rng(0)
    shape = np.linspace(*_DEFAULT_CV, _DRAWS)[:, None] ** -2.0
    loads = generator.gamma(np.broadcast_to(shape, (_DRAWS, experts)))
    low, high = _DEFAULT_CV
    return Skew(_scaled(loads), f"assumed: standard deviation of experts' loads {low:g} to {high:g} of their mean")


def recorded_skew(loads: Sequence[Sequence[float]], experts: int, run: str) -> Skew:
    """Returns the loads that a run recorded; drawn from them at random where it had another number of experts.

    Args:
        loads: One list per record and layer, tokens by expert before any drop.
        run: Its name, for the source.

    Raises:
        ValueError: There are none.
    """
    if not any(map(sum, loads)):
        raise ValueError(f"run {run!r} recorded no loads of experts; its config has no MoE blocks, or it took no step")
    rows = [_scaled(np.asarray(row, dtype=np.float64)[None])[0] for row in loads if sum(row)]
    if all(len(row) == experts for row in rows):
        return Skew(np.stack(rows), f"{len(rows)} loads of layers recorded by {run}")
    generator = np.random.default_rng(0)
    drawn = np.stack([generator.choice(row, experts) for row in rows])
    source = f"{len(rows)} loads of layers recorded by {run}, drawn for {experts} experts instead of {len(rows[0])}"
    return Skew(_scaled(np.maximum(drawn, 1e-9)), source)


def fullest_rank(loads: np.ndarray, ranks: int) -> np.ndarray:
    """Returns (N,) rows of the rank with the most over rows of a rank with an even load, at least 1.

    Args:
        loads: (N, E), each row of mean 1.
        ranks: That the experts are spread over, consecutive ones together.
    """
    if ranks == 1 or loads.shape[1] % ranks:
        return np.ones(len(loads))
    return np.maximum(loads.reshape(len(loads), ranks, -1).mean(2).max(1), 1.0)


def step_interval(
    config: Config, hardware: Hardware, workload: Workload, planned: Planned, skew: Skew
) -> tuple[float, float]:
    """Returns (low, high) seconds of a step: the 10 % and 90 % quantiles over the loads. An even load is step_seconds.

    Rows between ranks and the experts' products grow with the fullest rank; padded backends always move full slots,
    experts that choose take what they choose, and a capacity cuts what an expert takes.
    """
    moe, layout, time = config.model.moe, planned.layout, planned.time
    if not moe.has_blocks or moe.backend in PADDED or moe.choice != "token":
        return time.seconds, time.seconds
    capacity = abs(moe.capacity_factor)
    loads = np.minimum(skew.loads, capacity) if capacity else skew.loads
    grows = time.exchange + expert_seconds(config, hardware, workload, layout) * layout.accumulation
    low, high = np.quantile(fullest_rank(loads, layout.expert), _QUANTILES)
    return time.seconds + (low - 1) * grows, time.seconds + (high - 1) * grows


def _scaled(loads: np.ndarray) -> np.ndarray:
    """Returns loads whose rows have mean 1."""
    return loads / loads.mean(1, keepdims=True)
