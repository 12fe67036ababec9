"""Machines as the planner sees them, read from configs/hardware/*.yaml; every figure there has its source beside it."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from swin_moe.config.checks import shown
from swin_moe.config.io import config_folder
from swin_moe.config.yaml_files import read_yaml

PRECISIONS = ("fp32", "bf16", "fp16", "fp64")


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
    nics_per_node: int = 0  # 0 = one a rank
    nodes_per_leaf: int = 0  # nodes on one switch of the network's lowest level; 0 = all
    oversubscription: float = 1.0  # bytes/s that the nodes of a leaf send over those that its uplinks carry
    device: str = "cuda"  # whose operators are counted: cuda or cpu

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

    @property
    def nics(self) -> int:
        """NICs of a node, each with the bandwidth of as many `between` as ranks share it."""
        return self.nics_per_node or self.ranks_per_node

    @property
    def memory_rate(self) -> float:
        """Bytes/s that large passes over memory reach."""
        return self.memory_bytes_per_second * self.memory_share


def hardware_folder() -> Path:
    """Returns the folder of the shipped machines."""
    return config_folder() / "hardware"


def shipped_hardware() -> list[str]:
    """Returns the names of the shipped machines."""
    return sorted(path.stem for path in hardware_folder().glob("*.yaml"))


def load_hardware(name_or_path: str) -> Hardware:
    """Returns a machine by the name of a file in configs/hardware/, or by the path of a file of the same form.

    Raises:
        ValueError: No such machine (with the near name), or a figure is missing, negative or no number.
    """
    path = Path(name_or_path)
    if not (path.suffix in (".yaml", ".yml") or path.is_file()):
        path = hardware_folder() / f"{name_or_path}.yaml"
        if name_or_path not in shipped_hardware():
            near = difflib.get_close_matches(name_or_path.lower(), shipped_hardware(), n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            names = ", ".join(shipped_hardware())
            raise ValueError(f"no hardware {shown(name_or_path)}; {meant}known: {names}, or the path of a YAML file")
    return read_hardware(path)


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
    return Hardware(**figures)


def _figure(path: Path, key: str, value: Any) -> Any:
    """Returns a figure of a file in its type."""
    if key == "device":
        if value not in ("cpu", "cuda"):
            raise ValueError(f"{path}: device must be cpu or cuda, got {shown(value)}")
        return value
    if key == "flops":
        if not isinstance(value, dict) or not value or set(value) - set(PRECISIONS):
            raise ValueError(f"{path}: flops must give FLOP/s of some of {', '.join(PRECISIONS)}, got {shown(value)}")
        return {name: _number(path, f"flops.{name}", rate) for name, rate in value.items()}
    if key in ("inside", "between"):
        wanted = [f.name for f in dataclasses.fields(Link)]
        if not isinstance(value, dict) or set(value) != set(wanted):
            raise ValueError(f"{path}: {key} must give {' and '.join(wanted)}, got {shown(value)}")
        return Link(**{name: _number(path, f"{key}.{name}", value[name]) for name in wanted})
    number = _number(path, key, value)
    if key in ("ranks_per_node", "nics_per_node", "nodes_per_leaf"):
        if number != int(number):
            raise ValueError(f"{path}: {key} must be a whole number, got {shown(value)}")
        return int(number)
    if key.endswith("_share") and number > 1:
        raise ValueError(f"{path}: {key} must be in (0, 1], got {shown(value)}")
    return number


def _number(path: Path, key: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value <= 0:
        raise ValueError(f"{path}: {key} must be a number > 0, got {shown(value)}")
    return float(value)


def dump_hardware(hardware: Hardware, path: Path, header: str) -> None:
    """Writes a machine as a file that read_hardware reads back equal. header: Comment lines, with where it is from."""
    tree = dataclasses.asdict(hardware)
    del tree["name"]
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    path.write_text(comment + yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
