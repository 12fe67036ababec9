"""Real training steps of a large Swin-MoE on a few CPU ranks: peak memory of each rank, and of all together.

    python -m launcher -n 2 -- benchmarks/training/large_step.py [CONFIG] [key=value ...]

Without arguments: Swin-MoE-B with 32 experts (955 M parameters), ZeRO-3, bf16, blocks recomputed, one image a rank and
forward, fused AdamW, initial weights made shard by shard. Limits are for the sum over ranks of VmHWM, which counts
pages that ranks share (libraries) once per rank; the proportional size (PSS) is sampled too.
"""

import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from swin_moe.data.batch import to_device
from swin_moe.engine.base import StepStats
from swin_moe.run.metrics import peak_memory
from swin_moe.run.session import Session, open_session, run_main
from swin_moe.train import Trainer

CONFIG = "swin_moe_base_patch4_window12_192_32expert_32gpu_22k"
STEPS = 2  # the second one has optimizer state whose pages were touched before
GIB = 2.0**30


def read_memory(path: str, key: str) -> float:
    """Returns a kB entry of a file in /proc/self, in GiB."""
    with open(f"/proc/self/{path}") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024 / GIB


class PeakSampler(threading.Thread):
    """Remembers the largest proportional set size, sampled."""

    def __init__(self, seconds: float = 0.25):
        super().__init__(daemon=True)
        self.seconds, self.peak, self.done = seconds, 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        """Samples until `done`."""
        while not self.done.wait(self.seconds):
            self.peak = max(self.peak, read_memory("smaps_rollup", "Pss:"))


def take_step(trainer: Trainer, step: int, batches: list, report: Callable[[str], None]) -> tuple[float, StepStats]:
    """Returns (loss of this rank's last image, statistics of the step)."""
    context = trainer._context(step, trainer.config.data.global_batch)
    for index, batch in enumerate(batches):
        batch = to_device(batch, trainer.device, trainer.config.engine.precision)
        with trainer.engine.micro_step(last=index == len(batches) - 1):
            loss = trainer.task.loss(trainer.engine.model, batch, context)
            report(f"step {step}: forward")
            trainer.engine.backward(loss.total)
    report(f"step {step}: backward")
    stats = trainer.engine.step(step)
    report(f"step {step}: update")
    return float(loss.task), stats


def open_run(argv: list[str]) -> Session:
    """Returns the session of the arguments over this benchmark's defaults."""
    given = [a for a in argv if "=" in a]
    config = next((a for a in argv if "=" not in a), CONFIG)
    return open_session(
        config,
        [
            *(
                "data.name=synthetic data.workers=0 data.global_batch=2 data.micro_batch=1 parallel.zero=3 "
                "parallel.recompute=block engine.precision=bf16 engine.device=cpu log.tensorboard=false"
            ).split(),
            *given,
        ],
    )


def main(argv: list[str]) -> None:
    """Prints memory after every phase on rank 0, and peaks of all ranks."""
    session = open_run(argv)
    started = time.perf_counter()

    def report(phase: str) -> None:
        if session.rank == 0:
            now, peak = read_memory("status", "VmRSS:"), read_memory("status", "VmHWM:")
            print(f"{time.perf_counter() - started:7.1f} s  {phase:20} {now:6.2f} GiB, peak {peak:6.2f}", flush=True)

    report("start")
    baseline = read_memory("status", "VmRSS:")
    sampler = PeakSampler()
    trainer = Trainer(session)
    report("model and optimizer")
    for step, batches in zip(range(STEPS), trainer.loader.batches(0, STEPS)):
        weight = next(iter(trainer.engine.pieces())).tensor
        before = weight.clone()
        loss, stats = take_step(trainer, step, list(batches), report)
        weight = next(iter(trainer.engine.pieces())).tensor
        moved = float((weight - before).abs().max()) if before.numel() else 0.0
        if session.rank == 0:
            print(
                f"           loss {loss:.4f}, gradient norm {stats.grad_norm:.4g}, skipped {stats.skipped}, "
                f"largest change of a weight {moved:.1e}",
                flush=True,
            )
    sampler.done.set()
    held = sum(piece.chunk.numel for piece in trainer.engine.pieces())
    mine = torch.tensor([read_memory("status", "VmHWM:"), sampler.peak, baseline, 4 * held / GIB], dtype=torch.float64)
    all_ranks = [torch.empty_like(mine) for _ in range(session.world_size)]
    if session.world_size > 1:
        dist.all_gather(all_ranks, mine)
    else:
        all_ranks = [mine]
    if session.device.type == "cuda":
        print(f"rank {session.rank}: peak on the device {peak_memory(session.device) / GIB:.2f} GiB")
    if session.rank == 0:
        for rank, (high, pss, start, state) in enumerate(torch.stack(all_ranks).tolist()):
            print(
                f"rank {rank}: peak {high:.2f} GiB resident, {pss:.2f} proportional; at start {start:.2f}; "
                f"parameters and optimizer state {state:.2f}"
            )
        high, pss = torch.stack(all_ranks)[:, :2].sum(dim=0).tolist()
        print(f"sum over {session.world_size} ranks: {high:.2f} GiB resident, {pss:.2f} GiB proportional")


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
