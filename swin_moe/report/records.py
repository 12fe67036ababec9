"""What a run wrote of itself: its records as series, its configuration, and where it ran. No torch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swin_moe.config.arguments import near_path
from swin_moe.config.mistaken import belongs
from swin_moe.config.shipped.show import resolved
from swin_moe.names.files import RECORDS, RUN_CONFIG


@dataclass(frozen=True)
class Series:
    """One quantity over the steps of a run."""

    steps: np.ndarray  # (n,) int64, rising
    values: np.ndarray  # (n,) float64, or (n, E) of a quantity per expert


@dataclass(frozen=True)
class Run:
    """A run's folder, read."""

    name: str  # distinct among the runs of a page
    directory: Path
    config: dict[str, Any]  # dotted key -> value
    series: dict[str, Series]  # key of a record -> it
    about: dict[str, str]  # time, ranks and versions of its newest checkpoint; {} where it has saved nothing

    @property
    def last_step(self) -> int:
        """Returns the step of the newest record."""
        return max(int(series.steps[-1]) for series in self.series.values())


def read_run(path: str | Path, name: str = "") -> Run:
    """Returns a run.

    Raises:
        ValueError: It is no run's folder, or has no record yet; names the file.
    """
    directory = Path(path)
    hint = belongs(directory) or near_path(directory)
    for file in (RUN_CONFIG, RECORDS):
        if not (directory / file).is_file():
            raise ValueError(f"{directory} is no folder of a run: it has no {file}{hint}")
    config = {key: value for key, value, _ in resolved(str(directory / RUN_CONFIG), [])}
    series = _read_records(directory / RECORDS)
    if not series:
        raise ValueError(f"{directory / RECORDS} holds no record yet; a run writes one every log.every steps")
    return Run(name or str(config["run.name"]), directory, config, series, _read_about(directory))


def read_runs(paths: list[str]) -> list[Run]:
    """Returns runs with distinct names: those of their configs, else of their folders, else numbered."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.directory) for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return [Run(name, run.directory, run.config, run.series, run.about) for name, run in zip(names, runs)]


def _read_records(path: Path) -> dict[str, Series]:
    """Returns every quantity of the records; a line that a kill cut, and values that are no number, are left out."""
    found: dict[str, tuple[list[int], list[Any]]] = {}
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                step = int(record.pop("step"))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            for key, value in record.items():
                steps, values = found.setdefault(key, ([], []))
                if _is_number(value) or isinstance(value, list) and value and all(map(_is_number, value)):
                    steps.append(step)
                    values.append(value)
    series = {}
    for key, (steps, values) in found.items():
        shapes = {np.shape(value) for value in values}
        if len(shapes) == 1:  # one number of experts: another began with another run of that name
            series[key] = Series(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))
    return series


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_about(directory: Path) -> dict[str, str]:
    """Returns what the newest checkpoint says it was made with."""
    for path in sorted(directory.glob("checkpoints/*/provenance.json"), reverse=True):
        try:
            told = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(told, dict):
            versions = told.get("versions", {})
            return {"saved": str(told.get("time", "")), "ranks": str(told.get("world_size", "")), **versions}
    return {}
