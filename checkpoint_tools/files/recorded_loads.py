"""Recorded loads of experts, from a run's metrics.jsonl or a JSON file."""

import json
import math
from pathlib import Path
from typing import Any

_ENDING, _BEGINNING = "/load", "moe/"


def expert_loads(path: Path) -> dict[str, list[float]]:
    """Returns layer (layers.2.blocks.1) -> tokens per expert; of a metrics.jsonl the sum over its records.

    Raises:
        ValueError: There is no such file, or it holds no loads.
    """
    try:
        text = path.read_text(encoding="utf-8")
        parts = [line for line in text.splitlines() if line.strip()] if _is_lines(path) else [text]
        records = [json.loads(part) for part in parts]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--load {path}: cannot be read as JSON ({error})") from None
    loads: dict[str, list[float]] = {}
    for record in records:
        for key, values in record.items() if isinstance(record, dict) else ():
            layer = key.removeprefix(_BEGINNING).removesuffix(_ENDING)
            if not isinstance(values, list) or (_is_lines(path) and not key.endswith(_ENDING)):
                continue
            known = loads.setdefault(layer, [0.0] * len(values))
            if len(known) != len(values) or not all(map(_is_count, values)):
                raise ValueError(f"--load {path}: {key} must be numbers >= 0, as many in every record")
            loads[layer] = [a + b for a, b in zip(known, values)]
    if not loads:
        raise ValueError(f"--load {path}: holds no loads of experts (moe/<layer>/load)")
    return loads


def _is_lines(path: Path) -> bool:
    return path.suffix == ".jsonl"


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
