"""Do candidate layouts of one config come in the right order? Real steps of each, interleaved, beside the planner's.

    python -m launcher -n 2 -- benchmarks/planner/planner_layouts.py [--rounds 5] [--out machine.yaml] [key=value ...]
    python -m launcher -n 2 -- benchmarks/planner/planner_layouts.py --hardware machine.yaml [--rounds 7] [key=value]

Builds the same network once per layout in one start of MPI and takes a step of each in turn, in rounds, so that what
else the machine does meets all alike; and calibrates, the rounds lying between calibration's measurements, so that both
meet the same machine (or takes a file that it wrote). Batches are loaded before. A step's time is that of the slowest
rank: seconds on the wall, and of its CPU, which other programs disturb less, but where waiting for the others is not
counted. Prints the medians, the planner's seconds, and Spearman's correlation of the order.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from swin_moe.config import Config
from swin_moe.config.io import load_config
from swin_moe.parallel.groups import build_groups, init_distributed
from swin_moe.planner.calibrate.command import Steps, measure_rank, measure_together
from swin_moe.planner.hardware import Hardware, dump_hardware, load_hardware
from swin_moe.planner.layouts import layout_in
from swin_moe.planner.micro_step import micro_step_here
from swin_moe.planner.step_time import StepTime, predict_time
from swin_moe.planner.workload import build_workload
from swin_moe.run.session import Session, check_layout, layout_of
from swin_moe.train import Trainer

NETWORK = (
    "data.name=synthetic data.synthetic_samples=64 data.workers=0 log.tensorboard=false model.img_size=96 "
    "model.embed_dim=48 model.depths=[2,2,4,2] model.num_heads=[3,6,12,24] model.window_size=6 model.num_classes=100 "
    "model.pretrained_window_sizes=[0,0,0,0] model.moe.blocks=[[-1],[-1],[1,3],[1]] model.moe.num_experts=8 "
    "model.moe.capacity_factor=0 model.moe.capacity_scope=rank data.global_batch=16"
).split()
LAYOUTS = {
    "experts over all ranks": "",
    "recomputed": "parallel.recompute=block",
    "2 micro-batches": "data.micro_batch={half}",
    "4 micro-batches": "data.micro_batch={quarter}",
    "4 micro-batches, recomputed": "data.micro_batch={quarter} parallel.recompute=block",
    "experts on every rank": "parallel.expert=1",
    "ZeRO-1": "parallel.zero=1",
    "ZeRO-2": "parallel.zero=2",
    "ZeRO-3": "parallel.zero=3",
    "ZeRO-3, 4 micro-batches": "parallel.zero=3 data.micro_batch={quarter}",
    "ZeRO-3, recomputed": "parallel.zero=3 parallel.recompute=block",
    "FairScale, ZeRO-1": "engine.name=fairscale parallel.zero=1",
    "FairScale, ZeRO-2": "engine.name=fairscale parallel.zero=2",
    "DeepSpeed, ZeRO-1": "engine.name=deepspeed parallel.zero=1",
    "DeepSpeed, ZeRO-2": "engine.name=deepspeed parallel.zero=2",
    "DeepSpeed, ZeRO-3": "engine.name=deepspeed parallel.zero=3",
}


Row = tuple[str, float, float, float, StepTime]  # layout, seconds on the wall, of the CPU, of the update, what was said


@dataclass
class Candidate:
    """A layout with its trainer, a loaded step, and what steps took on this rank."""

    config: Config
    trainer: Trainer
    batches: list[Any]
    steps: int = 0
    taken: list[tuple[float, ...]] = field(default_factory=list)  # (wall, CPU, CPU of the update) seconds

    def take(self) -> tuple[float, float, float]:
        """Takes a step; returns its seconds on the wall, of the CPU, and of these what the update took."""
        trainer = self.trainer
        context = trainer._context(self.steps, self.config.data.global_batch)
        self.steps += 1
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        for index, batch in enumerate(self.batches):
            with trainer.engine.micro_step(last=index == len(self.batches) - 1):
                trainer.engine.backward(trainer.task.loss(trainer.engine.model, batch, context).total)
        middle = time.process_time()
        trainer.engine.measure()
        trainer.engine.step(context.step)
        end = time.process_time()
        dist.barrier()
        return time.perf_counter() - wall, end - cpu, end - middle


def build(words: list[str], folder: str, world_size: int) -> Candidate:
    """Returns a layout that is ready for steps."""
    config = load_config("digits_swin_moe", [*words, f"run.output={folder}"])
    check_layout(config, world_size)
    device = torch.device("cpu")
    groups = build_groups(*layout_of(config), device, routing_ranks=config.routing_ranks(world_size))
    trainer = Trainer(Session(config, groups, device))
    batches = [list(loaded) for loaded in trainer.loader.batches(0, 1)]
    trainer.loader.close()
    return Candidate(config, trainer, batches[0])


def predict(config: Config, hardware: Any, world_size: int) -> StepTime:
    """Returns what the planner says of a step."""
    layout = layout_in(config, world_size)
    return predict_time(config, hardware, build_workload(config), layout, micro_step_here(config, layout))


def take_round(candidates: dict[str, Candidate]) -> None:
    """Takes a step of every candidate and notes it."""
    for candidate in candidates.values():
        candidate.taken.append(candidate.take())


class Between(Steps):
    """Takes rounds of the candidates where calibration says that it measures something else."""

    def __init__(self, candidates: dict[str, Candidate], rounds: int, *, enabled: bool) -> None:
        super().__init__(enabled=enabled)
        self.candidates, self.rounds, self.said = candidates, rounds, 0

    def __call__(self, text: str) -> None:
        """Says what comes now."""
        super().__call__(text)
        self.said += 1
        if len(next(iter(self.candidates.values())).taken) < self.rounds and self.said % 3 == 0:
            take_round(self.candidates)
            super().__call__("round of steps")


def calibrated(candidates: dict[str, Candidate], rounds: int, folder: Path) -> Hardware:
    """Returns the machine as it is measured between rounds of steps; rounds that are left follow."""
    device, ranks = torch.device("cpu"), dist.get_world_size()
    say = Between(candidates, rounds, enabled=dist.get_rank() == 0)
    hardware = measure_rank(device, load_hardware("cpu"), folder, say, ranks=ranks, precisions=("fp32",))
    hardware = measure_together(device, hardware, say)
    while len(next(iter(candidates.values())).taken) < rounds:
        take_round(candidates)
    return hardware


def slowest(taken: list[tuple[float, ...]], world_size: int) -> list[float]:
    """Returns the medians over rounds of the slowest rank's seconds."""
    mine = torch.tensor(taken, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).amax(0).median(0).values.tolist()


def order(a: list[float], b: list[float]) -> float:
    """Returns Spearman's correlation of ranks."""
    places = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(places[0], places[1])[0, 1])


def table(rows: list[Row]) -> list[str]:
    """Returns lines of Markdown, the planner's best first."""
    lines = [
        "| layout | predicted, ms | on the wall, ms | error | CPU of the slowest rank, ms | of it update, predicted | "
        "measured |",
        "|--|--|--|--|--|--|--|",
    ]
    rows = sorted(rows, key=lambda row: row[-1].seconds)
    for name, wall, cpu, update, said in rows:
        lines.append(
            f"| {name} | {1e3 * said.seconds:.0f} | {1e3 * wall:.0f} | {100 * (said.seconds / wall - 1):+.0f} % | "
            f"{1e3 * cpu:.0f} | {1e3 * said.update:.0f} | {1e3 * update:.0f} |"
        )
    seconds = [row[-1].seconds for row in rows]
    by_wall, by_cpu = order(seconds, [row[1] for row in rows]), order(seconds, [row[2] for row in rows])
    errors = np.abs([row[-1].seconds / row[1] - 1 for row in rows])
    return [
        *lines,
        "",
        f"Order of {len(rows)} layouts, Spearman: {by_wall:.2f} on the wall, {by_cpu:.2f} of the CPU. Largest error on "
        f"the wall {100 * errors.max():.0f} %, median {100 * np.median(errors):.0f} %, within 15 %: "
        f"{int((errors <= 0.15).sum())} of {len(errors)}.",
    ]


def main(argv: list[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hardware", help="a file that calibration wrote, instead of calibrating")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="where the measured machine is written")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rank, world_size = init_distributed(torch.device("cpu"))
    share = int(next(word for word in NETWORK if word.startswith("data.global_batch")).split("=")[1]) // world_size
    with tempfile.TemporaryDirectory() as folder:
        candidates = {}
        for number, (name, text) in enumerate(LAYOUTS.items()):
            words = text.format(half=max(1, share // 2), quarter=max(1, share // 4)).split()
            candidates[name] = build([*NETWORK, *words, *options.overrides], f"{folder}/{number}", world_size)
        for candidate in candidates.values():
            candidate.take()  # makes what is made once
        if options.hardware:
            hardware = load_hardware(options.hardware)
            for _ in range(options.rounds):
                take_round(candidates)
        else:
            hardware = calibrated(candidates, options.rounds, Path(folder))
        if options.out and rank == 0:
            dump_hardware(
                hardware, Path(options.out), "Written by benchmarks/planner/planner_layouts.py between its steps."
            )
        rows: list[Row] = []
        for name, candidate in candidates.items():
            wall, cpu, update = slowest(candidate.taken, world_size)
            if rank == 0:
                rows.append((name, wall, cpu, update, predict(candidate.config, hardware, world_size)))
        if rank == 0:
            print("\n".join(table(rows)), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    from launcher import mpi

    mpi.bootstrap()
    main(sys.argv[1:])
