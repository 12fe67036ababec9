"""`diff A B`: what differs between two checkpoints of any formats, read box by box."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoint_tools.files.floats import decode
from checkpoint_tools.formats import open_source
from checkpoint_tools.sources.base import Options, Source
from checkpoint_tools.sources.stream import Job, Unit, plan_job, split_units, unit_boxes
from checkpoint_tools.verbs.arguments import add_format_argument
from checkpoint_tools.verbs.text import progress_of, shortened, table
from swin_moe.checkpoint.communicator import collect
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW
from swin_moe.config.tasks import nested
from swin_moe.layout import Chunk

_AT_ONCE = 1 << 18  # elements decoded at once: 2 MiB as float64


class Delta(NamedTuple):
    """How a tensor differs: elements whose bits or values do, and the largest absolute difference."""

    elements: int
    largest: float  # nan where a nan stands against a number


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    add_format_argument(parser, "--from-a", of="format of the first")
    add_format_argument(parser, "--from-b", of="format of the second")
    parser.add_argument("--json", action="store_true", help="the differences as JSON")


def run(arguments: argparse.Namespace, options: Options) -> int:
    """Prints the differences on rank 0; returns 1 if there are any, as diff(1)."""
    with (
        open_source(arguments.a, options, arguments.from_a) as a,
        open_source(arguments.b, options, arguments.from_b) as b,
    ):
        found = compare(a, b, options)
    same = not any(found.values())
    if options.comm.rank == 0:
        text = json.dumps(found, indent=1, sort_keys=True) if arguments.json else render(found, a.path, b.path)
        print(text)
    return 0 if same else 1


def compare(a: Source, b: Source, options: Options) -> dict[str, Any]:
    """Returns the differences from `a` to `b` as JSON; empty values where there are none."""
    shared = [name for name in a.tensors if name in b.tensors and a.tensors[name].shape == b.tensors[name].shape]
    reshaped = {
        name: [list(a.tensors[name].shape), list(b.tensors[name].shape)]
        for name in sorted(a.tensors.keys() & b.tensors.keys() - set(shared))
    }
    retyped = {
        name: [a.tensors[name].dtype, b.tensors[name].dtype]
        for name in sorted(shared)
        if a.tensors[name].dtype != b.tensors[name].dtype
    }
    ranks = collect(options.comm, lambda: _compare_data(a, b, set(shared), options))
    changed: dict[str, Delta] = {}
    for rank in ranks:
        for name, delta in rank.items():
            changed[name] = _join(changed.get(name), delta)
    return {
        "missing": sorted(a.tensors.keys() - b.tensors.keys()),
        "added": sorted(b.tensors.keys() - a.tensors.keys()),
        "reshaped": reshaped,
        "retyped": retyped,
        "changed": {name: {"elements": d.elements, "max": str(d.largest)} for name, d in sorted(changed.items())},
        "entries": dict(_entries(_header(a), _header(b), "")),
    }


def _compare_data(a: Source, b: Source, shared: set[str], options: Options) -> dict[str, Delta]:
    """Returns the differences in this rank's share of the tensors that both hold in one shape."""
    job = plan_job(a, options)
    units = [unit for unit in split_units(job, options.comm.size)[options.comm.rank] if unit.name in shared]
    result: dict[str, Delta] = {}
    with progress_of(options, sum(unit.num_bytes for unit in units)) as advance:
        for unit in units:
            delta = _compare_unit(a, b, job, unit)
            if delta is not None:
                result[unit.name] = _join(result.get(unit.name), delta)
            advance(unit.num_bytes)
    return result


def _compare_unit(a: Source, b: Source, job: Job, unit: Unit) -> Delta | None:
    found = None
    for box, _, _ in unit_boxes(job.plan, unit):
        (left, left_dtype), (right, right_dtype) = (_elements(source, unit.name, box) for source in (a, b))
        if left_dtype != right_dtype or not np.array_equal(left, right):
            found = _join(found, _delta(left, right, left_dtype, right_dtype))
    return found if found is None or found.elements else None


def _elements(source: Source, name: str, box: Chunk) -> tuple[np.ndarray, str]:
    """Returns the raw elements of a box, in a row, and their dtype."""
    dtype = source.tensors[name].dtype
    raw = np.empty(box.size, RAW[DTYPE_BYTES[dtype]])
    source.read(name, box, raw)
    return raw.reshape(-1), dtype


def _delta(a: np.ndarray, b: np.ndarray, a_dtype: str, b_dtype: str) -> Delta:
    """Returns how raw elements differ: by value where the dtypes do, else by bits."""
    elements, largest = 0, 0.0
    for start in range(0, len(a), _AT_ONCE):
        parts = a[start : start + _AT_ONCE], b[start : start + _AT_ONCE]
        values = decode(parts[0], a_dtype), decode(parts[1], b_dtype)
        with np.errstate(invalid="ignore"):
            step = np.abs(values[0] - values[1])
        alike = (values[0] == values[1]) | (np.isnan(values[0]) & np.isnan(values[1]))
        step[alike] = 0
        elements += int(np.count_nonzero(parts[0] != parts[1] if a_dtype == b_dtype else ~alike))
        largest = float(np.maximum(largest, step.max(initial=0)))  # keeps a nan
    return Delta(elements, largest)


def _join(a: Delta | None, b: Delta) -> Delta:
    return b if a is None else Delta(a.elements + b.elements, float(np.maximum(a.largest, b.largest)))


def _header(source: Source) -> dict[str, Any]:
    return {"step": source.step, "state": source.state, "config": nested(source.config, source=str(source.path))}


def _entries(a: Any, b: Any, place: str) -> Iterator[tuple[str, list]]:
    """Yields (place, [value in a, value in b]) of entries that differ; None where one has none."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from _entries(a.get(key), b.get(key), f"{place}.{key}" if place else key)
    elif a != b:
        yield place, [a, b]


def render(found: dict[str, Any], a: Path, b: Path) -> str:
    """Returns the differences as text."""
    if not any(found.values()):
        return f"{a} and {b} hold the same"
    parts = []
    for key, text in (("missing", f"only in {a}"), ("added", f"only in {b}")):
        if found[key]:
            parts += [f"{text}:", *(f"  {name}" for name in found[key])]
    rows = [(name, "shape", *("x".join(map(str, side)) for side in sides)) for name, sides in found["reshaped"].items()]
    rows += [(name, "dtype", *sides) for name, sides in found["retyped"].items()]
    rows += [(name, "entry", *(shortened(json.dumps(s)) for s in sides)) for name, sides in found["entries"].items()]
    if rows:
        parts.append(table(("name", "differs in", str(a), str(b)), rows))
    if found["changed"]:
        rows = [(name, d["elements"], f"{float(d['max']):.6g}") for name, d in found["changed"].items()]
        parts.append(table(("tensor", "elements that differ", "max |delta|"), rows))
    return "\n".join(parts)
