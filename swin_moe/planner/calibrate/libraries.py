"""What libraries add to a step beside operators and messages: on several ranks FSDP2 around weights that it gathers or
scatters and DDP around those that it reduces, and torch's checkpoint around operators that are computed again."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np
import torch
import torch.distributed as dist

from swin_moe.config.io import load_config
from swin_moe.parallel.groups import build_groups
from swin_moe.planner.calibrate.machine import Clock, clock
from swin_moe.planner.calibrate.networks import NETWORKS, SmallStep, operators_of
from swin_moe.planner.collectives import exchanges, weights_handled, weights_of_library, weights_replicated
from swin_moe.planner.hardware import Hardware
from swin_moe.planner.layouts import Layout, layout_in
from swin_moe.planner.micro_step import micro_step_here
from swin_moe.planner.rates import Rate, fit
from swin_moe.planner.step_time import operator_seconds, predict_time
from swin_moe.planner.workload import Workload, build_workload
from swin_moe.run.session import layout_of

# Of a rank's batch each: two narrow ones and a wide one; with experts, many images and few.
_DENSE, _SPREAD = NETWORKS[:3], (NETWORKS[4], NETWORKS[6])
STAGES = ("fairscale-1", "fairscale-2", "deepspeed-1", "deepspeed-2", "deepspeed-3")  # engine and ZeRO stage
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

    Of FairScale and DeepSpeed, where they are installed, that and what their updates take beyond ours, by stage.

    hardware: With measured operators and collectives. now: The clock that took these.
    """
    hardware = replace(
        hardware,
        handling_seconds=0.0,
        handling_bytes_per_second=0.0,
        replicating_seconds=0.0,
        exchanging_seconds=0.0,
        libraries={},
    )
    whole, cut, spread = [], [], []
    stages = [stage for stage in STAGES if find_spec(stage.partition("-")[0])]
    theirs: dict[str, list[Handled]] = {stage: [] for stage in stages}
    for options in _DENSE:
        ways = ["parallel.zero=0", "parallel.zero=3"]
        ways += ["engine.name={} parallel.zero={}".format(*stage.split("-")) for stage in stages]
        first, second, *others = _excesses(options, ways, hardware, device, now)
        workload, item = first.workload, torch.float32.itemsize
        whole.append(Handled(first.computation, weights_replicated(workload, first.layout)))
        cut.append(Handled(second.computation, *weights_handled(workload, second.layout, item)))
        for stage, probe in zip(stages, others):
            counts = weights_of_library(workload, probe.layout, item)
            theirs[stage].append(Handled(probe.computation + probe.update, *counts))
    replicating, handling, per_second = fit_handling(whole, cut)
    hardware = replace(
        hardware,
        replicating_seconds=replicating,
        handling_seconds=handling,
        handling_bytes_per_second=per_second,
        libraries={stage: _rate_of(found) for stage, found in theirs.items()},
    )
    for options in _SPREAD:
        (probe,) = _excesses(options, ("parallel.expert=0",), hardware, device, now)
        spread.append(Handled(probe.computation, exchanges(probe.workload, probe.layout)))
    return replace(hardware, exchanging_seconds=_each(spread))


def fit_handling(whole: Sequence[Handled], cut: Sequence[Handled]) -> tuple[float, float, float]:
    """Returns (replicating_seconds, handling_seconds, handling_bytes_per_second) of a hardware file that say these
    excesses of DDP (whole) and FSDP2 (cut)."""
    rate = _rate_of(cut)
    return _each(whole), rate.call, 1 / rate.byte if rate.byte else 0.0


def _rate_of(found: Sequence[Handled]) -> Rate:
    """Returns seconds of a weight and of a byte of it."""
    features = np.array([[row.times, row.bytes] for row in found], dtype=np.float64)
    weight, byte = fit(features, np.array([row.excess for row in found]))
    return Rate(float(weight), float(byte), 0.0)


def _each(found: Sequence[Handled]) -> float:
    """Returns seconds each time, 0 where ranks share nothing of this kind."""
    times = sum(row.times for row in found)
    return max(0.0, sum(row.excess for row in found)) / times if times else 0.0


@dataclass(frozen=True)
class Excess:
    """Seconds beyond what the planner says of a network that all ranks train in some way, over those of one alone."""

    workload: Workload
    layout: Layout
    computation: float  # forward and backward
    update: float


def _excesses(options: str, ways: Sequence[str], hardware: Hardware, device: torch.device, now: Clock) -> list[Excess]:
    """Returns what each of these ways to train a network on all ranks takes more."""
    world = dist.get_world_size()
    with tempfile.TemporaryDirectory() as folder:
        words = f"model.moe.blocks=[] {options} run.output={folder}".split()
        alone = load_config("digits_swin_moe", words)
        images = alone.data.global_batch
        configs = [
            load_config("digits_swin_moe", [*words, f"data.global_batch={images * world}", *w.split()]) for w in ways
        ]
        groups = [build_groups(*layout_of(config), device) for config in configs]
        steps = [SmallStep(alone, device), *(SmallStep(c, device, g) for c, g in zip(configs, groups))]
        taken = _slowest(steps, device, now)
    workload = build_workload(alone)
    layouts = [layout_in(alone, 1), *(layout_in(config, world) for config in configs)]
    said = []
    for config, layout in zip([alone, *configs], layouts):
        segments = micro_step_here(config, layout)
        time = predict_time(config, hardware, workload, layout, segments)
        said.append((time.seconds - time.update, time.update))
    more = (np.array(taken) - taken[0]) - (np.array(said) - said[0])
    return [Excess(workload, layouts[i], *map(float, more[i])) for i in range(1, len(layouts))]


def _slowest(steps: list[SmallStep], device: torch.device, now: Clock) -> list[list[float]]:
    """Returns the median seconds of (forward and backward, update) of each network, taken in turns, by its slowest
    rank."""
    found = []
    for turn in range(_ROUNDS + 1):  # the first makes what is made once
        taken = []
        for step in steps:
            dist.barrier()
            start = now()
            step.micro_steps()
            middle = now()
            step.update()
            taken.append((middle - start, now() - middle))
        found += [taken] if turn else []
    slowest = torch.tensor(np.array(found), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.median(0).values.tolist()
