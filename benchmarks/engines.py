"""Memory and time of every engine and ZeRO stage on a few CPU ranks, each in a fresh start of MPI.

    python benchmarks/engines.py [RANKS ...] [key=value ...]

Default: 2 and 4 ranks. About 106 M parameters in float32, 8 experts, 2 images a rank, no recomputation, so that state
is over 1 GiB a rank without ZeRO on 2 ranks. Prints a markdown table: peak of a rank's proportional set size (sampled)
less what it was before the model was built; bytes of parameters, gradients and optimizer state by arithmetic; seconds a
step, and their ratio to one process of engine torch with the same batch a rank and all experts. Bytes sent are not
counted.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # not benchmarks.x: FairScale installs a package of that name
MODEL = (
    "data.name=synthetic", "data.workers=0", "engine.device=cpu", "log.tensorboard=false", "optim.ema=0",
    "model.img_size=32", "model.patch_size=2", "model.embed_dim=384", "model.depths=[2,5]", "model.num_heads=[12,24]",
    "model.window_size=8", "model.moe.blocks=[[-1],[1,3]]", "model.moe.num_experts=8", "model.moe.group_images=2",
    "data.eval_batch=2", "optim.warmup_epochs=0",
)  # fmt: skip
ROWS = (
    ("torch", 0), ("torch", 1), ("torch", 2), ("torch", 3),
    ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("fairscale", 1), ("fairscale", 2),
)  # fmt: skip
STEPS = 4  # the first builds buffers and is not timed
GIB = 2.0**30


def state_bytes(engine: str, zero: int, world: int, dense: int, experts: int) -> int:
    """Returns bytes a rank must hold for parameters, gradients and two moments; the experts are this rank's own.

    Without replicas of experts, so that ZeRO cuts only what is dense. DeepSpeed below stage 3 keeps a second, cut copy
    of the weights.
    """
    weights = dense // (world if zero == 3 or (engine, zero) == ("torch", 2) else 1)
    gradients = dense // (world if zero >= 2 else 1)
    moments = 2 * dense // (world if zero >= 1 else 1)
    masters = dense // world + experts if engine == "deepspeed" and zero < 3 else 0
    return 4 * (weights + gradients + moments + masters + 4 * experts)


def run_rank(argv: list[str]) -> None:
    """Trains STEPS steps and prints this world's numbers as JSON on rank 0."""
    import torch
    import torch.distributed as dist
    from large_step import PeakSampler, read_memory, take_step

    from swin_moe.parallel.sharding import placement
    from swin_moe.session import open_session
    from swin_moe.train import Trainer

    session = open_session("digits_swin_moe", argv)
    if session.config.engine.name == "deepspeed":  # its import alone is no state of the model
        from swin_moe.engine.deepspeed_start import import_deepspeed
        from swin_moe.parallel.groups import ensure_distributed

        ensure_distributed(session.device)
        import_deepspeed(session.device)
    before = read_memory("smaps_rollup", "Pss:")
    sampler = PeakSampler(0.02)
    trainer = Trainer(session)
    seconds = []
    for step, batches in zip(range(STEPS), trainer.loader.batches(0, STEPS)):
        start = time.perf_counter()
        take_step(trainer, step, list(batches), lambda phase: None)
        seconds.append(time.perf_counter() - start)
    sampler.done.set()
    mine = torch.tensor([sampler.peak - before])
    if session.world_size > 1:
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    sizes = {name: chunk.numel for name, (_, chunk) in trainer.engine.layout.items()}
    experts = sum(numel for name, numel in sizes.items() if placement(name).is_expert)
    if session.rank == 0:
        numbers = {"peak": float(mine), "seconds": statistics.median(seconds[1:])}
        print("RESULT", json.dumps(numbers | {"experts": experts, "dense": sum(sizes.values()) - experts}), flush=True)


def measure(engine: str, zero: int, world: int, overrides: list[str]) -> dict | str:
    """Returns the numbers of one run, or the sentence it failed with."""
    options = [*MODEL, f"engine.name={engine}", f"parallel.zero={zero}", f"data.global_batch={2 * world}", *overrides]
    command = [sys.executable, "-m", "launcher", "-n", str(world), "--", str(Path(__file__)), "--rank", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(found[0].removeprefix("RESULT ")) if found else (done.stdout + done.stderr)[-2000:]


def main(argv: list[str]) -> None:
    """Prints one table row per engine, stage and world."""
    overrides = [a for a in argv if "=" in a]
    worlds = [int(a) for a in argv if "=" not in a] or [2, 4]
    alone = measure("torch", 0, 1, overrides)
    assert isinstance(alone, dict), alone
    print(f"one process: {alone['seconds']:.2f} s a step, {alone['peak']:.2f} GiB at peak\n", flush=True)
    print("| engine | ZeRO | ranks | peak GiB | state GiB | s a step | of one process |\n|---|---|---|---|---|---|---|")
    for world in worlds:
        for engine, zero in ROWS:
            found = measure(engine, zero, world, overrides)
            if isinstance(found, str):
                print(f"| {engine} | {zero} | {world} | {found} | | | |", flush=True)
                continue
            state = state_bytes(engine, zero, world, found["dense"], found["experts"]) / GIB
            ratio = found["seconds"] / alone["seconds"]
            print(f"| {engine} | {zero} | {world} | {found['peak']:.2f} | {state:.2f} | {found['seconds']:.2f} "
                  f"| {ratio:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        from swin_moe.session import run_main

        run_main(run_rank, sys.argv[2:])
    else:
        main(sys.argv[1:])
