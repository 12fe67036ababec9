"""Trees of /sys and /proc as machines of other kinds have them, for what reads the topology."""

from pathlib import Path


def write(root: Path, files: dict[str, str]) -> Path:
    """Returns the root under which the files are."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def nodes(*cpulists: str) -> dict[str, str]:
    """Returns the files of NUMA nodes with these cores, each 10 from itself, 12 from its pair and 32 from the rest."""
    count = len(cpulists)
    files = {f"sys/devices/system/node/node{n}/cpulist": text for n, text in enumerate(cpulists)}
    for n in range(count):
        row = ["10" if n == other else "12" if n // 2 == other // 2 else "32" for other in range(count)]
        files[f"sys/devices/system/node/node{n}/distance"] = " ".join(row)
    return files


def smt(pairs: list[tuple[int, int]]) -> dict[str, str]:
    """Returns the files of cores of two hardware threads each."""
    files = {"sys/devices/system/cpu/smt/active": "1"}
    for core, pair in enumerate(pairs):
        for number in pair:
            folder = f"sys/devices/system/cpu/cpu{number}/topology"
            files |= {f"{folder}/core_id": str(core), f"{folder}/physical_package_id": "0"}
    return files


def add_gpus(root: Path, numa_nodes: list[int], *, given: list[int] | None = None) -> None:
    """Adds NVIDIA GPUs on these NUMA nodes, and devices for those given to the container (all without a list)."""
    write(root, {"sys/module/nvidia/version": "570.1", "proc/driver/nvidia/version": "NVRM version: 570.1"})
    driver = root / "sys/bus/pci/drivers/nvidia"
    driver.mkdir(parents=True)
    for number, node in enumerate(numa_nodes):
        bus = f"0000:{number + 1:02x}:00.0"
        folder = f"sys/bus/pci/devices/{bus}"
        write(
            root,
            {
                f"{folder}/vendor": "0x10de",
                f"{folder}/class": "0x030200",
                f"{folder}/numa_node": str(node),
                f"proc/driver/nvidia/gpus/{bus}/information": f"Model: \t\t Test\nDevice Minor: \t {number}",
            },
        )
        (root / folder / "driver").symlink_to(driver)
        if given is None or number in given:
            write(root, {f"dev/nvidia{number}": ""})
    # A network card and the graphics of the board are no GPUs.
    write(
        root,
        {"sys/bus/pci/devices/0000:00:02.0/vendor": "0x1a03", "sys/bus/pci/devices/0000:00:02.0/class": "0x030000"},
    )
