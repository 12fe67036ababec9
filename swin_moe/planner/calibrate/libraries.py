"""What libraries add to a step beside operators and messages: on several ranks FSDP2 around weights that it gathers or
scatters and DDP around those that it reduces, and torch's checkpoint around operators that are computed again."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from swin_moe.config.io import load_config
from swin_moe.parallel.groups import build_groups
from swin_moe.planner.calibrate.machine import Clock, clock
from swin_moe.planner.calibrate.networks import NETWORKS, SmallStep, operators_of
from swin_moe.planner.collectives import exchanges, weights_handled, weights_replicated
from swin_moe.planner.hardware import Hardware
from swin_moe.planner.layouts import Layout, layout_in
from swin_moe.planner.micro_step import trace_micro_step
from swin_moe.planner.rates import fit
from swin_moe.planner.step_time import operator_seconds, predict_time
from swin_moe.planner.workload import Workload, build_workload
from swin_moe.run.session import layout_of

# Of a rank's batch each: two narrow ones and a wide one; with experts, many images and few.
_DENSE, _SPREAD = NETWORKS[:3], (NETWORKS[4], NETWORKS[6])
RECOMPUTED = (NETWORKS[1], NETWORKS[5])  # are taken also with their blocks computed again: many operators, or short
_ROUNDS = 8


def measure_recomputing(device: torch.device, hardware: Hardware, precision: str) -> float:
    """Returns host seconds of an operator that is computed again: what steps with blocks computed again take over those
    without, taken in turns, beyond what their operators say.

    hardware: With the rates of operators and of the host.
    """
    now, excess, more = clock(device), 0.0, 0
    for options in RECOMPUTED:
        with tempfile.TemporaryDirectory() as folder:
            words = f"model.moe.blocks=[] {options} engine.precision={precision} run.output={folder}".split()
            both = [load_config("digits_swin_moe", [*words, f"parallel.recompute={how}"]) for how in ("none", "block")]
            steps = [SmallStep(config, device) for config in both]
            taken = [_turn(steps, now) for _ in range(_ROUNDS + 1)][1:]  # the first makes what is made once
            seen = [operators_of(step, now) for step in steps]
        plain, again = (operator_seconds(hardware, precision, *one) for one in seen)
        excess += float(np.median(np.diff(taken, axis=1))) - (again - plain)
        more += len(seen[1][0]) - len(seen[0][0])
    return seconds_of_recomputing(hardware.launch_seconds, excess, more)


def _turn(steps: list[SmallStep], now: Clock) -> list[float]:
    """Returns the seconds of forward and backward of each network."""
    taken = []
    for step in steps:
        start = now()
        step.micro_steps()
        taken.append(now() - start)
        step.update()
    return taken


def seconds_of_recomputing(launch: float, excess: float, more: int) -> float:
    """Returns host seconds of each of so many operators that are computed again, which together take this excess over
    the ordinary ones."""
    return launch + max(0.0, excess) / more


@dataclass(frozen=True)
class Handled:
    """What a network's step takes on all ranks over the same step of each alone, beyond what the planner says of it."""

    excess: float  # seconds
    times: int  # weights, or rows of a layer, that a library took into its hands
    bytes: float = 0.0  # of these weights


def measure_handling(device: torch.device, hardware: Hardware, now: Clock) -> Hardware:
    """Returns the machine with what DDP and FSDP2 take around weights, and the exchange around rows, beside messages:
    of forward and backward of small networks with weights on all ranks, cut over them, or experts spread over them.

    hardware: With measured operators and collectives. now: The clock that took these.
    """
    hardware = replace(
        hardware,
        handling_seconds=0.0,
        handling_bytes_per_second=0.0,
        replicating_seconds=0.0,
        exchanging_seconds=0.0,
    )
    whole, cut, spread = [], [], []
    for options in _DENSE:
        probes = _excesses(options, ("parallel.zero=0", "parallel.zero=3"), hardware, device, now)
        (workload, layout, excess), (_, cut_layout, cut_excess) = probes
        whole.append(Handled(excess, weights_replicated(workload, layout)))
        cut.append(Handled(cut_excess, *weights_handled(workload, cut_layout, torch.float32.itemsize)))
    replicating, handling, per_second = fit_handling(whole, cut)
    hardware = replace(
        hardware,
        replicating_seconds=replicating,
        handling_seconds=handling,
        handling_bytes_per_second=per_second,
    )
    for options in _SPREAD:
        ((workload, layout, excess),) = _excesses(options, ("parallel.expert=0",), hardware, device, now)
        spread.append(Handled(excess, exchanges(workload, layout)))
    return replace(hardware, exchanging_seconds=_each(spread))


def fit_handling(whole: Sequence[Handled], cut: Sequence[Handled]) -> tuple[float, float, float]:
    """Returns (replicating_seconds, handling_seconds, handling_bytes_per_second) of a hardware file that say these
    excesses of DDP (whole) and FSDP2 (cut)."""
    features = np.array([[row.times, row.bytes] for row in cut], dtype=np.float64)
    weight, byte = fit(features, np.array([row.excess for row in cut]))
    return _each(whole), float(weight), 1 / float(byte) if byte else 0.0


def _each(found: Sequence[Handled]) -> float:
    """Returns seconds each time, 0 where ranks share nothing of this kind."""
    times = sum(row.times for row in found)
    return max(0.0, sum(row.excess for row in found)) / times if times else 0.0


def _excesses(
    options: str, ways: Sequence[str], hardware: Hardware, device: torch.device, now: Clock
) -> list[tuple[Workload, Layout, float]]:
    """Returns (workload, layout, seconds of forward and backward beyond what the planner says) of a network that all
    ranks train in each of these ways, over those of each rank alone."""
    world = dist.get_world_size()
    with tempfile.TemporaryDirectory() as folder:
        words = f"model.moe.blocks=[] {options} run.output={folder}".split()
        alone = load_config("digits_swin_moe", words)
        images = alone.data.global_batch
        configs = [load_config("digits_swin_moe", [*words, f"data.global_batch={images * world}", w]) for w in ways]
        groups = [build_groups(*layout_of(config), device) for config in configs]
        steps = [SmallStep(alone, device), *(SmallStep(c, device, g) for c, g in zip(configs, groups))]
        taken = _slowest(steps, device, now)
    workload = build_workload(alone)
    layouts = [layout_in(alone, 1), *(layout_in(config, world) for config in configs)]
    said = []
    for config, layout in zip([alone, *configs], layouts):
        segments = trace_micro_step(config, layout.degrees, images=layout.micro_batch).at(layout.micro_batch)
        time = predict_time(config, hardware, workload, layout, segments)
        said.append(time.seconds - time.update)
    return [(workload, layouts[i], taken[i] - taken[0] - (said[i] - said[0])) for i in range(1, len(layouts))]


def _slowest(steps: list[SmallStep], device: torch.device, now: Clock) -> list[float]:
    """Returns the median seconds of forward and backward of each network, taken in turns, by its slowest rank."""
    found = []
    for turn in range(_ROUNDS + 1):  # the first makes what is made once
        taken = []
        for step in steps:
            dist.barrier()
            start = now()
            step.micro_steps()
            taken.append(now() - start)
            step.update()
        found += [taken] if turn else []
    slowest = torch.tensor(np.array(found), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.median(0).values.tolist()
