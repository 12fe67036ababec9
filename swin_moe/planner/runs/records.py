"""What a training run left behind, as the planner reads it: config.yaml, and the records of metrics.jsonl."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swin_moe.config import Config
from swin_moe.config.checks import shown
from swin_moe.config.io import load_config

_SPEED = "speed/images_per_second"


@dataclass(frozen=True, eq=False)
class Run:
    """A run that recorded at least one step."""

    directory: Path
    config: Config
    ranks: int
    records: list[dict[str, Any]]  # of steps with these ranks, in order

    def median(self, key: str) -> float | None:
        """Returns the median of a number over the records, None if none has it.

        The first record counts only where there is no other: its steps warmed up.
        """
        values = [record[key] for record in self.records[1:] or self.records if key in record]
        return statistics.median(values) if values else None

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, with loading of data."""
        rate = self.median(_SPEED)
        assert rate is not None, "read_run has looked"
        return self.config.data.global_batch / rate

    @property
    def loads(self) -> list[list[int]]:
        """Tokens by expert, of every layer and record."""
        return [v for r in self.records for k, v in r.items() if k.startswith("moe/") and k.endswith("/load")]


def read_run(name: str, ranks: int = 0) -> Run:
    """Returns a run by its folder.

    Args:
        ranks: Of the run, where its records do not say it.

    Raises:
        ValueError: No run, or one without records, in a sentence.
    """
    directory = Path(name)
    if not (directory / "config.yaml").is_file():
        raise ValueError(f"{shown(name)} is no folder of a training run: it has no config.yaml")
    config = load_config(directory / "config.yaml")
    path = directory / "metrics.jsonl"
    records = [record for record in _lines(path) if _is_speed(record.get(_SPEED))] if path.is_file() else []
    if not records:
        raise ValueError(
            f"run {shown(name)} has no records of steps in metrics.jsonl; let it train for log.every="
            f"{config.log.every} steps at least"
        )
    ranks = ranks or records[-1].get("speed/ranks", 0)
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"the records of run {shown(name)} do not say how many ranks it had; say it with --gpus N")
    return Run(directory, config, ranks, [r for r in records if r.get("speed/ranks", ranks) == ranks])


def read_evaluations(name: str) -> list[dict[str, Any]]:
    """Returns the records of a run's evaluations, in order; raises ValueError where there is none."""
    path = Path(name) / "metrics.jsonl"
    records = _lines(path) if path.is_file() else []
    found = [record for record in records if any(key.startswith("eval/") for key in record)]
    if not found:
        raise ValueError(f"run {shown(name)} has no records of evaluations in metrics.jsonl")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file; a line that a kill has cut is left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _is_speed(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
