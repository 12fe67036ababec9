"""What this host has for its ranks: cores with their NUMA nodes, how much of them it may use, and GPUs. From /proc and
/sys alone (Linux); elsewhere the cores are one node."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_GPU_DRIVERS = ("nvidia", "amdgpu")
_GPU_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
_GPU_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")  # PCI: VGA, 3D and display controllers, accelerators
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Core:
    """A logical CPU this process may run on."""

    number: int
    node: int  # NUMA
    physical: tuple[int, int]  # (socket, core); hardware threads of one core share it


@dataclass(frozen=True)
class Gpu:
    """A GPU this process may use, in the order in which CUDA numbers equal GPUs: that of the PCI bus."""

    bus: str
    vendor: str
    node: int | None  # NUMA; None = the host does not say


@dataclass(frozen=True)
class Machine:
    """What a host has. Quota is in cores; None = all the time of all cores."""

    cores: tuple[Core, ...]
    quota: float | None
    gpus: tuple[Gpu, ...]
    distances: Mapping[tuple[int, int], int]  # between NUMA nodes, as the firmware tells; 10 = itself


def read_machine(environ: Mapping[str, str], root: Path = Path("/")) -> Machine:
    """Returns what this host has and this process may use: its affinity, its cgroup's quota, $CUDA_VISIBLE_DEVICES.

    Args:
        root: Where proc, sys and dev lie; another one in tests.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    nodes, distances = _nodes(root)
    smt = _text(root / "sys/devices/system/cpu/smt/active") == "1"
    cores = tuple(Core(n, nodes.get(n, 0), _physical(n, root) if smt else (0, n)) for n in allowed)
    return Machine(cores, cpu_quota(root), _visible(_gpus(root), environ), distances)


def parse_list(text: str) -> list[int]:
    """Returns the numbers of the kernel's short form: "0-2,8" is 0, 1, 2, 8."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        numbers += range(int(low), int(high or low) + 1)
    return numbers


def short_list(numbers: Sequence[int]) -> str:
    """Returns the short form of numbers: 0, 1, 2, 8 is "0-2,8"."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Returns how many cores' time the cgroups of this process allow, None = no limit.

    Of a cgroup and all above it the least counts (kernel documentation: cgroup-v2.rst, cpu.max; sched-bwc.rst, cgroup
    v1). Inside a container the path may be that of the host, of which only the root is to be seen.
    """
    limits = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mount, read = root / "sys/fs/cgroup", _quota_v2
        elif "cpu" in controllers.split(","):
            mount, read = root / "sys/fs/cgroup" / controllers, _quota_v1
            mount = mount if mount.is_dir() else root / "sys/fs/cgroup/cpu"
        else:
            continue
        inner = path.strip("/").split("/")
        for depth in range(len(inner) + 1):
            limits.append(read(mount.joinpath(*inner[:depth])))
    return min((limit for limit in limits if limit is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _nodes(root: Path) -> tuple[dict[int, int], dict[tuple[int, int], int]]:
    """Returns (NUMA node of each core, distances between nodes)."""
    folders = {int(path.name[4:]): path for path in (root / "sys/devices/system/node").glob("node[0-9]*")}
    nodes = {core: node for node, path in folders.items() for core in parse_list(_text(path / "cpulist"))}
    online = sorted(folders)
    distances = {
        (node, other): int(text)
        for node in online
        for other, text in zip(online, _text(folders[node] / "distance").split())
    }
    return nodes, distances


def _physical(number: int, root: Path) -> tuple[int, int]:
    folder = root / f"sys/devices/system/cpu/cpu{number}/topology"
    package, core = _text(folder / "physical_package_id"), _text(folder / "core_id")
    return (int(package), int(core)) if package.isdigit() and core.isdigit() else (0, number)


def _gpus(root: Path) -> list[Gpu]:
    if not any((root / "sys/module" / driver).is_dir() for driver in _GPU_DRIVERS):
        return []
    found = []
    for path in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor = _text(path / "vendor")
        if vendor not in _GPU_VENDORS or _text(path / "class")[:6] not in _GPU_CLASSES:
            continue
        driver = (path / "driver").resolve().name if (path / "driver").exists() else ""
        if driver in _GPU_DRIVERS and _is_given(path.name, root):
            node = _text(path / "numa_node")
            found.append(Gpu(path.name, _GPU_VENDORS[vendor], int(node) if node.isdigit() else None))
    return found


def _is_given(bus: str, root: Path) -> bool:
    """Returns whether this container has the device of an NVIDIA GPU; the list in /proc is the whole host's."""
    minor = re.search(r"Device Minor:\s*(\d+)", _text(root / f"proc/driver/nvidia/gpus/{bus}/information"))
    return minor is None or (root / f"dev/nvidia{minor[1]}").exists()


def _visible(gpus: list[Gpu], environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Returns the GPUs in the order of the first variable that chooses some; () where it names them in another way."""
    chosen = next((environ[name] for name in _VISIBLE if name in environ), None)
    if chosen is None:
        return tuple(gpus)
    numbers = [int(word) if word.strip().isdigit() else -1 for word in chosen.split(",")]
    return tuple(gpus[n] for n in numbers) if all(0 <= n < len(gpus) for n in numbers) else ()


def _text(path: Path) -> str:
    """Returns what a file of the kernel says, "" where it is not there."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
