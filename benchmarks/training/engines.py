"""Memory and time of every engine and ZeRO stage on a few CPU ranks, each in a fresh start of MPI.

    python benchmarks/training/engines.py [RANKS ...] [key=value ...]

Default: 2 and 4 ranks. About 300 M parameters in float32, 8 experts, 2 small images a rank, no recomputation: state is
over 1 GiB a rank with ZeRO-3 on 4 ranks, and activations are small beside it. Prints a markdown table, per row:

* peak: of a rank's proportional set size (sampled every 20 ms) less what it was before the model was built;
* state: bytes of parameters, gradients and optimizer state that must be there, by arithmetic;
* activations: what autograd holds at the end of the forward, counted through saved-tensor hooks, without parameters;
* peak over (state + activations);
* seconds a step, and their ratio to one process of engine torch with the same batch a rank and all experts;
* MiB a rank sends in a step, from the loopback interface's counter. It counts everything on it, so nothing else may
  talk there; `unshare -rn sh -c 'ip link set lo up; exec python benchmarks/training/engines.py'` gives the run its own.
"""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # not benchmarks.x: FairScale installs a package of that name
MODEL = (
    "data.name=synthetic data.workers=0 engine.device=cpu log.tensorboard=false optim.ema=0 model.img_size=16 "
    "model.patch_size=2 model.embed_dim=640 model.depths=[2,5] model.num_heads=[20,40] model.window_size=8 "
    "model.moe.blocks=[[-1],[1,3]] model.moe.num_experts=8 model.moe.group_images=2 data.eval_batch=2 "
    "optim.warmup_epochs=0"
).split()
LEVELS = {"torch": (0, 1, 2, 3), "deepspeed": (1, 2, 3), "fairscale": (1, 2)}
ROWS = [(engine, zero) for engine, levels in LEVELS.items() for zero in levels]
# glibc keeps freed blocks of up to 32 MiB in a heap that only shrinks from its end. Here they are given back, so that
# peaks are what the engine holds. Measured on torch, stage 3, 2 ranks: 2.5 GiB so, 3.1 GiB with glibc's defaults.
MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
STEPS = 4  # the first builds buffers and is not timed
GIB = 2.0**30


def state_bytes(engine: str, zero: int, world: int, dense: int, experts: int) -> int:
    """Returns bytes a rank must hold for parameters, gradients and two moments; the experts are this rank's own.

    Without replicas of experts, so that ZeRO cuts only what is dense. DeepSpeed keeps a second, cut copy of weights.
    """
    weights = dense // (world if zero == 3 or (engine, zero) == ("torch", 2) else 1)
    gradients = dense // (world if zero >= 2 else 1)
    moments = 2 * dense // (world if zero >= 1 else 1)
    masters = dense // world + experts if engine == "deepspeed" else 0
    return 4 * (weights + gradients + moments + masters + 4 * experts)


def sent_bytes() -> int:
    """Returns the bytes sent over the loopback interface so far, by all processes; 0 where there is no such counter."""
    table = Path("/proc/net/dev")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:")), 0)


class SavedTensors:
    """Counts the bytes that autograd keeps from a forward, each memory once, parameters apart.

    A parameter may lie in one memory with others (DeepSpeed) or be gathered to a memory of its own during the forward.
    The latter is known by its size: what is as large as a large parameter, or as one expert of it, is left out.
    """

    def __init__(self, model: "nn.Module", boxes: list[tuple[int, ...]]):
        local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
        self.held = {tensor.untyped_storage().data_ptr() for tensor in local}
        numels = {math.prod(box) for box in boxes} | {math.prod(box[1:]) for box in boxes}
        self.weights = {4 * numel for numel in numels if 4 * numel > 2**20}
        self.seen: dict[int, int] = {}

    def pack(self, tensor: "Tensor") -> "Tensor":
        """Counts a tensor and returns it as it is."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.held and self.weights.isdisjoint((storage.nbytes(), tensor.nbytes)):
            self.seen[storage.data_ptr()] = storage.nbytes()
        return tensor


def run_rank(argv: list[str]) -> None:
    """Trains STEPS steps and prints this world's numbers as JSON on rank 0."""
    import torch
    import torch.distributed as dist
    from large_step import PeakSampler, read_memory, take_step

    from swin_moe.parallel.sharding import placement
    from swin_moe.run.session import open_session
    from swin_moe.train import Trainer

    session = open_session("digits_swin_moe", argv)
    if session.config.engine.name == "deepspeed":  # its import alone is no state of the model
        from swin_moe.engine.deepspeed.start import import_deepspeed
        from swin_moe.parallel.groups import ensure_distributed

        ensure_distributed(session.device)
        import_deepspeed(session.device)
    before = read_memory("smaps_rollup", "Pss:")
    sampler = PeakSampler(0.02)
    trainer = Trainer(session)
    sizes = {name: chunk.numel for name, (_, chunk) in trainer.engine.layout.items()}
    saved = SavedTensors(trainer.engine.model, [chunk.size for _, chunk in trainer.engine.layout.values()])
    seconds, sent = [], []
    for step, batches in zip(range(STEPS), trainer.loader.batches(0, STEPS)):
        start, sent_before = time.perf_counter(), sent_bytes()
        hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
        with hooks if step == 0 else contextlib.nullcontext():
            take_step(trainer, step, list(batches), lambda phase: None)
        if session.world_size > 1:
            dist.barrier()  # everything of this step is sent, nothing of the next one
        seconds.append(time.perf_counter() - start)
        sent.append(sent_bytes() - sent_before)
    sampler.done.set()
    mine = torch.tensor([sampler.peak - before, sum(saved.seen.values()) / GIB])
    if session.world_size > 1:
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    experts = sum(numel for name, numel in sizes.items() if placement(name).is_expert)
    if session.rank == 0:
        numbers = {"peak": float(mine[0]), "activations": float(mine[1]), "seconds": statistics.median(seconds[1:])}
        numbers |= {"sent": statistics.median(sent[1:]) / session.world_size / 2**20}
        print("RESULT", json.dumps(numbers | {"experts": experts, "dense": sum(sizes.values()) - experts}), flush=True)


def measure(engine: str, zero: int, world: int, overrides: list[str]) -> dict | str:
    """Returns the numbers of one run, or the sentence it failed with."""
    options = [*MODEL, f"engine.name={engine}", f"parallel.zero={zero}", f"data.global_batch={2 * world}", *overrides]
    command = [sys.executable, "-m", "launcher", "-n", str(world), "--", str(Path(__file__)), "--rank", *options]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ | {MMAP_THRESHOLD: str(2**20)}
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(found[0].removeprefix("RESULT ")) if found else (done.stdout + done.stderr)[-2000:]


def main(argv: list[str]) -> None:
    """Prints one table row per engine, stage and world."""
    overrides = [a for a in argv if "=" in a]
    worlds = [int(a) for a in argv if "=" not in a] or [2, 4]
    alone = measure("torch", 0, 1, overrides)
    assert isinstance(alone, dict), alone
    print(f"one process: {alone['seconds']:.2f} s a step, {alone['peak']:.2f} GiB at peak\n", flush=True)
    print(
        "| engine | ZeRO | ranks | peak GiB | state GiB | activations GiB | peak / (state + activations) | s a step "
        "| of one process | sent MiB a rank |\n" + "|---" * 10 + "|"
    )
    for world in worlds:
        for engine, zero in ROWS:
            found = measure(engine, zero, world, overrides)
            if isinstance(found, str):
                print(f"| {engine} | {zero} | {world} | {found} |" + " |" * 6, flush=True)
                continue
            state = state_bytes(engine, zero, world, found["dense"], found["experts"]) / GIB
            print(
                f"| {engine} | {zero} | {world} | {found['peak']:.2f} | {state:.2f} | {found['activations']:.2f} "
                f"| {found['peak'] / (state + found['activations']):.2f} | {found['seconds']:.2f} "
                f"| {found['seconds'] / alone['seconds']:.2f} | {found['sent']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        from swin_moe.run.session import run_main

        run_main(run_rank, sys.argv[2:])
    else:
        main(sys.argv[1:])
