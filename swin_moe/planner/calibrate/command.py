"""`swin-moe calibrate`: measures the machine at hand and writes a hardware file for `swin-moe plan --hardware FILE`."""

import datetime
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from swin_moe.engine.precision import DTYPES
from swin_moe.ops.host_memory import keep_freed_memory
from swin_moe.parallel.groups import init_distributed, number_of
from swin_moe.planner.calibrate.kernels import measure_kernels
from swin_moe.planner.calibrate.libraries import measure_handling, measure_recomputing
from swin_moe.planner.calibrate.links import fit_links, measure_collectives, read_preflight
from swin_moe.planner.calibrate.machine import (
    clock_of_ranks,
    measure_disk,
    measure_launch,
    measure_memory,
    measure_products,
    memory_of,
)
from swin_moe.planner.calibrate.networks import NETWORKS, Seen, measure_networks, rates_of
from swin_moe.planner.hardware import Hardware, Link, curves_of, dump_hardware, load_hardware, shipped_hardware
from swin_moe.planner.rates import Point
from swin_moe.run.session import pick_device, run_main
from swin_moe.usage import parsers

_PRECISIONS = ("fp32", "bf16")
TURNS = 2  # of all networks, some seconds apart: a machine is not always equally fast


class Steps:
    """Says on the screen what is measured, and how long it takes."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled, self._start = enabled, time.monotonic()

    def __call__(self, text: str) -> None:
        """Says what comes now."""
        if self._enabled:
            print(f"calibrate: {time.monotonic() - self._start:5.1f} s  {text}", file=sys.stderr, flush=True)


def run(argv: list[str] | None = None) -> None:
    """Runs the command line on this rank."""
    run_main(main, argv)


def main(argv: list[str]) -> None:
    """Measures, and writes the file on rank 0. Raises ValueError or OSError for wrong use, before it measures."""
    options = parsers.calibrate(argv)
    links = read_preflight(Path(options.preflight)) if options.preflight else {}
    out = Path(options.out)
    if out.exists() and not options.overwrite:
        raise ValueError(f"--out {out} exists; give another name, or --overwrite")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    rank, world = number_of("RANK"), number_of("WORLD_SIZE", 1)
    if number_of("LOCAL_WORLD_SIZE", world) != world:
        raise ValueError(
            f"swin-moe calibrate measures ranks of one host, and of {world} ranks some are elsewhere; what lies "
            "between hosts is measured by swin-moe launch --preflight-file, and read with --preflight"
        )
    device = pick_device("auto", number_of("LOCAL_RANK"))
    like = load_hardware(options.like or _alike(device))
    torch.set_num_threads(1)
    say = Steps(enabled=rank == 0)
    hardware = measure_rank(device, like, out.parent, say, ranks=world)
    if world > 1:
        init_distributed(device)
        hardware = measure_together(device, hardware, say)
        links = {"inside": hardware.inside} | links
    found, on_node = _both(links, like), max(world, like.ranks_per_node)
    hardware = replace(
        hardware, name=out.stem, ranks_per_node=on_node, inside=found["inside"], between=found["between"]
    )
    if rank == 0:
        dump_hardware(hardware, out, _header(device, like, measured=bool(links)))
        say(f"wrote {out}")
        print("\n".join(summary(hardware)))


def _alike(device: torch.device) -> str:
    """Returns the shipped machine with such devices."""
    if device.type == "cpu":
        return "cpu"
    model = torch.cuda.get_device_name(device).lower()
    size = torch.cuda.get_device_properties(device).total_memory
    found = [load_hardware(name) for name in shipped_hardware() if name.partition("_")[0] in model]
    if not found:
        raise ValueError(f"no shipped machine has a {model}; say with --like which is nearest: {shipped_hardware()}")
    return min(found, key=lambda machine: abs(machine.memory_bytes - size)).name


def measure_rank(
    device: torch.device,
    like: Hardware,
    folder: Path,
    say: Steps,
    *,
    ranks: int,
    precisions: Sequence[str] = _PRECISIONS,
) -> Hardware:
    """Returns what one rank measures alone; the rest is of the machine that is like it."""
    if device.type == "cpu":
        keep_freed_memory()  # as a run does
    names = [name for name in precisions if name in like.flops]
    products: dict[str, list[Point]] = {}
    kernels: dict[str, dict[str, list[Point]]] = {}
    for name in names:
        say(f"products in {name}")
        products[name] = list(measure_products(device, DTYPES[name] or torch.float32))
        if device.type == "cpu":
            kernels[name] = measure_kernels(DTYPES[name] or torch.float32)
    say("memory, disk")
    memory, (written, _) = measure_memory(device), measure_disk(folder)
    launch, rates = measure_launch(device), {}
    if device.type == "cpu":
        seen: dict[str, list[Seen]] = {name: [] for name in names}
        for name in names * TURNS:
            for number, step in enumerate(measure_networks(device, name, NETWORKS), 1):
                seen[name].append(step)
                say(f"step of network {number} of {len(NETWORKS)} in {name}: {1e3 * step.micro_step:.0f} ms")
        launch = float(np.median([step.host / len(step.operators) for steps in seen.values() for step in steps]))
        rates = rates_of(curves_of(products), {name: curves_of(found) for name, found in kernels.items()}, seen)
    peaks = {name: max(point[3] for point in points) for name, points in products.items()}
    hardware = replace(
        like,
        memory_bytes=memory_of(device, max(ranks, like.ranks_per_node)),
        flops={**like.flops, **peaks},
        memory_bytes_per_second=memory,
        launch_seconds=launch,
        recomputing_seconds=0.0,
        disk_bytes_per_second=written,
        matrix_share=1.0,
        memory_share=1.0,
        link_share=1.0,
        steps_share=1.0,
        device=device.type,
        products=products,
        kernels=kernels,
        operators=rates,
    )
    if device.type != "cpu":
        return hardware
    say("a network whose blocks are computed again")
    return replace(hardware, recomputing_seconds=measure_recomputing(device, hardware, names[0]))


def measure_together(device: torch.device, hardware: Hardware, say: Steps) -> Hardware:
    """Returns the machine of one rank with what all ranks of one host, which have met, measure together."""
    ranks = dist.get_world_size()
    now, share = clock_of_ranks(device)
    busy = "" if now is not time.process_time else f"; a rank has {100 * share:.0f} % of a core: CPU time is counted"
    say(f"collectives of {ranks} ranks{busy}")
    link, kinds = fit_links(list(measure_collectives(device, now)))
    on_node = max(ranks, hardware.ranks_per_node)
    hardware = replace(hardware, inside=link, collectives=kinds, ranks_per_node=on_node)
    if device.type != "cpu":
        return hardware
    say("what DDP and FSDP2 do around weights, and the exchange around rows")
    return measure_handling(device, hardware, now)


def _both(links: Mapping[str, Link], like: Hardware) -> dict[str, Link]:
    """Returns both links: of one host's ranks what was measured, between hosts too where nothing else is known."""
    scaled = {
        name: Link(link.latency, link.bytes_per_second * like.link_share)
        for name, link in (("inside", like.inside), ("between", like.between))
    }
    return scaled | dict(links)


def _header(device: torch.device, like: Hardware, *, measured: bool) -> str:
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    links = "links fitted to collectives" if measured else f"links of {like.name}.yaml"
    return (
        f"Written by swin-moe calibrate, {datetime.date.today()}, torch {torch.__version__}, {what}, a thread a rank.\n"
        f"Measured: products, memory and disk bandwidth, operators and the host's time between them; {links}.\n"
        f"Not measured, from {like.name}.yaml: watts, price, FLOP/s of other precisions, ranks of a node."
    )


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def summary(hardware: Hardware) -> list[str]:
    """Returns lines for the screen."""
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in hardware.flops.items() if name in hardware.products)
    return [
        f"products, GFLOP/s at most: {rates}; memory {hardware.memory_bytes_per_second / 1e9:.1f} GB/s; "
        f"host {1e6 * hardware.launch_seconds:.1f} us an operator",
        f"ranks of a node: {1e6 * hardware.inside.latency:.0f} us, {hardware.inside.bytes_per_second / 1e9:.2f} GB/s; "
        f"disk {hardware.disk_bytes_per_second / 1e6:.0f} MB/s written",
    ]
