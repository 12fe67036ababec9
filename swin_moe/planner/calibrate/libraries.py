"""What libraries add to a step beside operators and messages: FSDP2 around every weight that it gathers or scatters, on
several ranks, and torch's checkpoint around every operator that is computed again."""

import tempfile

import numpy as np
import torch
import torch.distributed as dist

from swin_moe.config.io import load_config
from swin_moe.parallel.groups import build_groups
from swin_moe.planner.calibrate.machine import clock
from swin_moe.planner.calibrate.networks import NETWORKS, Seen, SmallStep
from swin_moe.planner.collectives import collectives_of, tensors_passed
from swin_moe.planner.hardware import Hardware
from swin_moe.planner.layouts import layout_in
from swin_moe.planner.step_time import seconds_of_collective
from swin_moe.planner.workload import build_workload
from swin_moe.run.session import layout_of

_PROBES = (NETWORKS[0], NETWORKS[2])  # narrow and wide
_IMAGES = 2  # of a rank
RECOMPUTED = NETWORKS[0]  # is taken also with its blocks computed again
_ROUNDS = 4


def seconds_of_recomputing(plain: Seen, again: Seen) -> float:
    """Returns host seconds of an operator that is computed again. Of a network's step as it is, and recomputed."""
    more = len(again.operators) - len(plain.operators)
    return max(0.0, again.host * len(again.operators) - plain.host * len(plain.operators)) / more


def measure_handling(device: torch.device, hardware: Hardware) -> float:
    """Returns seconds that FSDP2 takes around one weight beside its message: of small networks' forward and backward
    cut over all ranks, less those of whole weights, and of what is sent in both by the measured collectives.

    hardware: With those.
    """
    excess, tensors = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for options in _PROBES:
            batch = f"data.global_batch={_IMAGES * dist.get_world_size()}"
            words = f"model.moe.blocks=[] {options} {batch} run.output={folder}".split()
            configs = [load_config("digits_swin_moe", [*words, f"parallel.zero={zero}"]) for zero in (0, 3)]
            steps = []
            for config in configs:
                groups = build_groups(*layout_of(config), device)
                steps.append(SmallStep(config, device, groups))
            whole, cut = _slowest(steps, device)
            world, workload = dist.get_world_size(), build_workload(configs[0])
            layouts = [layout_in(config, world) for config in configs]
            sent = [
                sum(seconds_of_collective(c, hardware)[0] for c in collectives_of(config, workload, layout))
                for config, layout in zip(configs, layouts)
            ]
            excess += cut - whole - (sent[1] - sent[0])
            tensors += tensors_passed(workload, layouts[1])
    return max(0.0, excess / tensors)


def _slowest(steps: list[SmallStep], device: torch.device) -> list[float]:
    """Returns the median seconds of forward and backward of each network, taken in turns, by its slowest rank."""
    now, found = clock(device), []
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
