"""How unevenly tokens ask for experts: shares of every expert of a layer, stated or drawn from recorded routing.

Shape legend: L layers, E experts.
"""

import json
import math
from pathlib import Path

import numpy as np

from swin_moe.config.checks import shown


def draw_shares(layers: int, experts: int, *, spread: float, seed: int) -> np.ndarray:
    """Returns shares of tokens by layer and expert, (L, E), rows add up to 1.

    Args:
        spread: Standard deviation over mean of an expert's load, as moe/<layer>/load_cv of a run; 0 = even.
    """
    if spread == 0:
        return np.full((layers, experts), 1.0 / experts)
    shape = 1.0 / spread**2  # of a gamma distribution, whose deviation over its mean is 1 / sqrt(shape)
    drawn = np.random.default_rng(seed).gamma(shape, size=(layers, experts))
    return drawn / drawn.sum(1, keepdims=True)


def shares_of_run(path: Path, layers: int, experts: int, *, seed: int) -> np.ndarray:
    """Returns shares (L, E) drawn from the loads that a run has recorded: layer after layer of its last record, and for
    every expert one of those there.

    Args:
        path: metrics.jsonl of a run, or the run's folder.

    Raises:
        ValueError: The file has no record with loads of experts.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    recorded: list[list[int]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}: line {number} is no record of a run ({error})") from None
        found = record.items() if isinstance(record, dict) else ()
        loads = {key: load for key, load in found if key.startswith("moe/") and key.endswith("/load")}
        for key, load in loads.items():
            if not isinstance(load, list) or not all(map(_is_count, load)):
                raise ValueError(f"{file}: line {number}: {key} must be a list of numbers >= 0, got {shown(load)}")
        recorded = [load for load in loads.values() if sum(load)] or recorded
    if not recorded:
        raise ValueError(f"{file}: no record has the load of experts (moe/<layer>/load), which runs of MoE write")
    generator, drawn = np.random.default_rng(seed), np.empty((layers, experts))
    for layer in range(layers):
        load_E = np.array(recorded[layer % len(recorded)], dtype=np.float64)
        one = load_E if len(load_E) == experts else generator.choice(load_E, size=experts)
        drawn[layer] = one if one.sum() else 1.0
    return drawn / drawn.sum(1, keepdims=True)


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
