"""Machines as the planner sees them, read from configs/hardware/*.yaml; every figure there has its source beside it."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from swin_moe.config.checks import shown
from swin_moe.config.shipped.machines import LINKS, hardware_folder, shipped_hardware
from swin_moe.config.yaml_files import read_yaml
from swin_moe.planner.rates import OTHER, Curve, Point, Rate, Rates

PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
KINDS = ("all_to_all", "all_reduce", "all_gather", "reduce_scatter", "broadcast")  # of collectives
_MAY_BE_ZERO = (
    "nics_per_node",
    "nodes_per_leaf",
    "handling_seconds",
    "handling_bytes_per_second",
    "replicating_seconds",
    "exchanging_seconds",
    "recomputing_seconds",
)
_LINK = "inside"  # a figure of this form


@dataclass(frozen=True)
class Link:
    """What one rank sends through, in one direction."""

    latency: float  # seconds from the start of a collective's step to its first byte
    bytes_per_second: float


@dataclass(frozen=True)
class Hardware:
    """One kind of machine: ranks, one per device, on equal nodes."""

    name: str
    memory_bytes: float  # of one rank's device, that a run may use
    flops: Mapping[str, float]  # precision -> matrix FLOP/s of one rank; a precision without a figure cannot run
    memory_bytes_per_second: float
    launch_seconds: float  # host time of one operator
    inside: Link  # between ranks of a node
    between: Link  # between nodes, the share of one rank
    ranks_per_node: int
    disk_bytes_per_second: float  # of one node
    watts: float  # of one rank, with its share of the node
    price_per_hour: float  # of one rank, US dollars
    # What large kernels reach of the figures above; measured by calibration, 1 where the figures are measured ones.
    matrix_share: float = 1.0
    memory_share: float = 1.0
    link_share: float = 1.0
    steps_share: float = 1.0  # of a calibrated CPU: the speed of operators in runs over that in calibration
    nics_per_node: int = 0  # 0 = one a rank
    nodes_per_leaf: int = 0  # nodes on one switch of the network's lowest level; 0 = all
    oversubscription: float = 1.0  # bytes/s that the nodes of a leaf send over those that its uplinks carry
    # Of a CPU's host (a device's runs ahead): around a weight that FSDP2 gathers or scatters, beside its message, and
    # bytes of such weights that it copies, 0 = at once; around a weight whose gradient DDP reduces; around rows that
    # go to the experts of a layer and back, in forward or backward; and of an operator that is computed again, 0 =
    # launch_seconds.
    handling_seconds: float = 0.0
    handling_bytes_per_second: float = 0.0
    replicating_seconds: float = 0.0
    exchanging_seconds: float = 0.0
    recomputing_seconds: float = 0.0
    device: str = "cuda"  # whose operators are counted: cuda or cpu
    # What calibration found, by precision: products by shape, and seconds of operators by name (rates.py).
    products: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    # Those of single kernels of a CPU: precision -> operator -> points.
    kernels: Mapping[str, Mapping[str, Sequence[Point]]] = field(default_factory=dict)
    collectives: Mapping[str, Link] = field(default_factory=dict)  # by kind, between ranks of a node; others by inside
    operators: Mapping[str, Mapping[str, Rate]] = field(default_factory=dict)
    # What FairScale and DeepSpeed take in a step around a weight (call) and a byte of it, by engine and stage
    # ("deepspeed-2"); one that is not here takes what DDP or FSDP2 does.
    libraries: Mapping[str, Rate] = field(default_factory=dict)

    def matrix_rate(self, precision: str) -> float:
        """Returns FLOP/s that matrix products reach.

        Raises:
            ValueError: The machine has no figure for this precision.
        """
        if precision not in self.flops:
            raise ValueError(
                f"hardware {self.name} has no figure for engine.precision={precision}; it has {', '.join(self.flops)}"
            )
        return self.flops[precision] * self.matrix_share

    @cached_property
    def rates(self) -> dict[str, Rates]:
        """What calibration found, by precision; none of a data sheet's machine."""
        return {
            name: Rates(Curve(self.products[name]), operators, curves_of(self.kernels.get(name, {})))
            for name, operators in self.operators.items()
            if name in self.products
        }

    def times_operators(self, precision: str) -> bool:
        """Returns whether steps are sums of operators that this processor chooses: a calibrated CPU's."""
        return self.device == "cpu" and precision in self.rates

    @property
    def nics(self) -> int:
        """NICs of a node, each with the bandwidth of as many `between` as ranks share it."""
        return self.nics_per_node or self.ranks_per_node

    @property
    def memory_rate(self) -> float:
        """Bytes/s that large passes over memory reach."""
        return self.memory_bytes_per_second * self.memory_share


def curves_of(kernels: Mapping[str, Sequence[Point]]) -> dict[str, Curve]:
    """Returns the curves of kernels that were measured by themselves."""
    return {name: Curve(points) for name, points in kernels.items()}


def shipped_links() -> dict[str, Link]:
    """Returns the links that a machine can be given, by name."""
    path = hardware_folder() / LINKS
    return {name: _figure(path, name, value, _LINK) for name, value in read_yaml(path).items()}


def load_hardware(text: str) -> Hardware:
    """Returns a machine by the name of a file in configs/hardware/, or by the path of a file of the same form.

    Args:
        text: NAME or PATH, and after commas what differs: h100,between=slingshot_11,ranks_per_node=4.

    Raises:
        ValueError: No such machine, link or figure (with the near name), or one is missing, negative or no number.
    """
    name, *changes = text.split(",")
    path = Path(name)
    if not (path.suffix in (".yaml", ".yml") or path.is_file()):
        path = hardware_folder() / f"{name}.yaml"
        if name not in shipped_hardware():
            known = f"{', '.join(shipped_hardware())}, or the path of a YAML file"
            raise ValueError(f"no hardware {shown(name)}; {_near(name.lower(), shipped_hardware(), known)}")
    hardware = read_hardware(path)
    for change in changes:
        hardware = dataclasses.replace(hardware, **_changed(change))
    return hardware


def _changed(text: str) -> dict[str, Any]:
    """Returns a figure of "key=value"."""
    key, _, value = text.partition("=")
    if key not in ("inside", "between", "ranks_per_node"):
        raise ValueError(f"--hardware: {shown(text)} is not inside=LINK, between=LINK or ranks_per_node=N")
    if key == "ranks_per_node":
        if not (value.isascii() and value.isdigit() and int(value) > 0):
            raise ValueError(f"--hardware: ranks_per_node must be a whole number > 0, got {shown(value)}")
        return {key: int(value)}
    links = shipped_links()
    if value not in links:
        raise ValueError(f"--hardware: no link {shown(value)}; {_near(value.lower(), links, ', '.join(links))}")
    return {key: links[value]}


def _near(name: str, names: Iterable[str], known: str) -> str:
    """Returns which name may have been meant, and what is known."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"{f'did you mean {near[0]}? ' if near else ''}known: {known}"


def read_hardware(path: Path) -> Hardware:
    """Returns the machine of a file; its name is the file's. Raises ValueError as load_hardware."""
    tree = read_yaml(path)
    figures: dict[str, Any] = {"name": path.stem}
    known = {f.name: f for f in dataclasses.fields(Hardware) if f.name != "name"}
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{path}: no figure is called {shown(key)}; {meant}")
    for key, entry in known.items():
        if key in tree:
            figures[key] = _figure(path, key, tree[key])
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path}: {key} is missing; every hardware file says it")
    found = Hardware(**figures)
    if found.ranks_per_node % found.nics:
        raise ValueError(
            f"{path}: nics_per_node={found.nics_per_node} must divide ranks_per_node={found.ranks_per_node}"
        )
    return found


def _figure(path: Path, key: str, value: Any, form: str = "") -> Any:
    """Returns a figure of a file in its type. form: The figure whose form it has; "" = its own."""
    form = form or key
    if form == "device":
        if value not in ("cpu", "cuda"):
            raise ValueError(f"{path}: device must be cpu or cuda, got {shown(value)}")
        return value
    if form == "flops":
        if not isinstance(value, dict) or not value or set(value) - set(PRECISIONS):
            raise ValueError(f"{path}: flops must give FLOP/s of some of {', '.join(PRECISIONS)}, got {shown(value)}")
        return {name: _number(path, f"flops.{name}", rate) for name, rate in value.items()}
    if form == "collectives":
        if not isinstance(value, dict) or set(value) - set(KINDS):
            raise ValueError(f"{path}: collectives must be links of some of {', '.join(KINDS)}, got {shown(value)}")
        return {name: _figure(path, f"collectives.{name}", link, _LINK) for name, link in value.items()}
    if form in ("inside", "between"):
        wanted = [f.name for f in dataclasses.fields(Link)]
        if not isinstance(value, dict) or set(value) != set(wanted):
            raise ValueError(f"{path}: {key} must give {' and '.join(wanted)}, got {shown(value)}")
        return Link(**{name: _number(path, f"{key}.{name}", value[name]) for name in wanted})
    if form in _CALIBRATED:
        return _CALIBRATED[form](path, key, value)
    number = _number(path, key, value, zero=key in _MAY_BE_ZERO)
    if key == "oversubscription" and number < 1:
        raise ValueError(f"{path}: oversubscription must be >= 1, got {shown(value)}")
    if key in ("ranks_per_node", "nics_per_node", "nodes_per_leaf"):
        if number != int(number):
            raise ValueError(f"{path}: {key} must be a whole number, got {shown(value)}")
        return int(number)
    if key.endswith("_share") and number > 1:
        raise ValueError(f"{path}: {key} must be in (0, 1], got {shown(value)}")
    return number


def _by_precision(read: Callable[[Path, str, Any], Any], path: Path, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) - set(PRECISIONS):
        raise ValueError(f"{path}: {key} must be figures by {', '.join(PRECISIONS)}, got {shown(value)}")
    return {name: read(path, f"{key}.{name}", figures) for name, figures in value.items()}


def _points(path: Path, key: str, value: Any) -> list[Point]:
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and len(row) == 4 for row in value):
        raise ValueError(f"{path}: {key} must be rows of [rows, inner, columns, FLOP/s], got {shown(value)}")
    a: list[Any] = [tuple(_number(path, f"{key}[{place}]", n) for n in row) for place, row in enumerate(value)]
    return a


def _kernels(path: Path, key: str, value: Any) -> dict[str, list[Point]]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} must be points by operator, got {shown(value)}")
    return {name: _points(path, f"{key}.{name}", points) for name, points in value.items()}


def _rates(path: Path, key: str, value: Any, needed: Sequence[str] = (OTHER,)) -> dict[str, Rate]:
    wanted = [f.name for f in dataclasses.fields(Rate) if f.default is dataclasses.MISSING]
    known = {f.name for f in dataclasses.fields(Rate)}
    if not isinstance(value, dict) or not set(needed) <= set(value):
        one = f", one of them {OTHER}" if needed else ""
        raise ValueError(f"{path}: {key} must be rates by name{one}, got {shown(value)}")
    for name, rate in value.items():
        if not isinstance(rate, dict) or not set(wanted) <= set(rate) <= known:
            raise ValueError(f"{path}: {key}.{name} must give {', '.join(wanted)}, got {shown(rate)}")
    return {
        name: Rate(**{k: _number(path, f"{key}.{name}.{k}", rate[k], zero=True) for k in rate})
        for name, rate in value.items()
    }


_CALIBRATED: dict[str, Callable[[Path, str, Any], Any]] = {
    "products": partial(_by_precision, _points),
    "kernels": partial(_by_precision, _kernels),
    "operators": partial(_by_precision, _rates),
    "libraries": partial(_rates, needed=()),
}


def _number(path: Path, key: str, value: Any, *, zero: bool = False) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{path}: {key} must be a number {'>= 0' if zero else '> 0'}, got {shown(value)}")
    return float(value)


def dump_hardware(hardware: Hardware, path: Path, header: str) -> None:
    """Writes a machine as a file that read_hardware reads back equal. header: Comment lines, with where it is from."""
    tree = dataclasses.asdict(hardware)
    del tree["name"]
    for entry in dataclasses.fields(Hardware):
        if entry.name in tree and tree[entry.name] == entry.default:  # one that means "as others say" is no figure
            del tree[entry.name]
    tree["products"] = _as_lists(hardware.products)
    tree["kernels"] = {name: _as_lists(kernels) for name, kernels in hardware.kernels.items()}
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    text = yaml.dump(tree, Dumper=_Rows, sort_keys=False, width=120)
    path.write_text(comment + text, encoding="utf-8")


def _as_lists(curves: Mapping[str, Sequence[Point]]) -> dict[str, list[list[float]]]:
    return {name: [list(point) for point in points] for name, points in curves.items()}


class _Rows(yaml.SafeDumper):
    """Writes lists, the points of a curve, in one line each."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        """See yaml.SafeDumper."""
        return super().represent_sequence(tag, sequence, not any(isinstance(value, list) for value in sequence))
