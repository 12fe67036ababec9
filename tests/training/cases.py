"""What the ranks run in the training tests: small runs of the real trainer, in one MPI start per world."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from swin_moe.config.io import load_config
from swin_moe.parallel.apply import parameter_layout
from swin_moe.parallel.groups import build_groups
from swin_moe.parallel.replicas import first_differing_replica
from swin_moe.run.session import Session
from swin_moe.train import Trainer
from tests.gathered import NETWORK

TINY = [
    *NETWORK,
    "model.moe.blocks=[[-1],[1]]",
    "model.moe.num_experts=4",
    "model.moe.group_images=4",
    "data.global_batch=32",
    "data.crop_scale=[0.8,1.0]",
    "data.erase_prob=0.0",  # else every rank imports timm, which takes longer than all it trains here
    "data.eval_batch=30",
    "optim.epochs=0.13",
    "optim.warmup_epochs=0.02",
    "optim.ema=0.9",
    "optim.clip_norm=0.5",
    "model.drop_path_rate=0.2",
    "task.mixup=0.4",
    "log.every=1",
    "log.tensorboard=false",
    "log.eval_every=0",
    "checkpoint.every=1000",
    "checkpoint.keep=0",
]  # 45 steps an epoch (the last one smaller): 0.13 epochs are 5 steps

# A bias that follows the loads of all micro-batches and ranks, choices limited to groups of experts, a shared expert.
BALANCED = (
    "engine.precision=fp64 data.micro_batch=4 model.moe.scores=sigmoid model.moe.bias_rate=0.01 "
    "model.moe.balance_loss=none model.moe.top_k=2 model.moe.normalize_gate=true model.moe.expert_groups=4 "
    "model.moe.group_limit=3 model.moe.shared_experts=1"
).split()
TOGETHER = ["engine.precision=fp64", "model.moe.capacity_factor=0.7", "model.moe.top_k=2"]  # routing groups over ranks


def open_tiny(directory: Path, *options: str) -> Session:
    """Returns a session of the tiny digits run in this (already started) world."""
    overrides = [*TINY, f"run.output={directory}", "run.name=run", *options]
    config = load_config("digits_swin_moe", overrides)
    device = torch.device("cpu")
    world_size = torch.distributed.get_world_size()
    config.check(world_size)
    groups = build_groups(
        config.parallel,
        config.model.moe.num_experts,
        device,
        routing_ranks=config.routing_ranks(world_size),
        saves_in_background=config.checkpoint.asynchronous,
    )
    return Session(config, groups, device)


def train(session: Session, *, stop_after: int | None = None) -> Trainer:
    """Runs (or resumes) a run; with stop_after it stops as SIGTERM would make it, after that many steps in all."""
    trainer = Trainer(session)
    trainer.resume()
    if stop_after is not None:
        original = trainer._record

        def record(*arguments):
            original(*arguments)
            if trainer.progress.step == stop_after - 1:
                trainer.stop.name = "SIGTERM"  # seen in the next step, as a signal during it would be

        trainer._record = record  # type: ignore[method-assign]  # a stand-in
    trainer.run()
    return trainer


def records(session: Session) -> list[dict]:
    """Returns the records of metrics.jsonl."""
    path = session.directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(session: Session) -> list[tuple[float, float, float]]:
    """Returns (loss, auxiliary loss, gradient norm) of every step."""
    return [(r["train/loss"], r["train/aux"], r["train/grad_norm"]) for r in records(session) if "train/loss" in r]


def local_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Returns every saved tensor of this rank, by name and offset."""
    return {f"{p.name}@{p.chunk.offset}": torch.as_tensor(p.tensor).clone() for p in trainer.engine.pieces()}


def full_weights(trainer: Trainer) -> dict[str, tuple]:
    """Returns name -> (global shape, offset, tensor) of this rank's parameters."""
    layout = parameter_layout(trainer.engine.local_model, trainer.session.groups)
    return {
        n: (layout[n][0], layout[n][1].offset, p.detach().clone())
        for n, p in trainer.engine.local_model.named_parameters()
    }


# What the rows of equivalence/engine_cases.py have, of every engine: here too with --full.
LAYOUTS = ("balanced", "shared", "replicated", "odd", "together")


def run_layouts(own: Path, world: int) -> dict[str, tuple]:
    """Runs the cases of LAYOUTS."""
    replicas = max(1, world // 2)
    double = "engine.precision=fp64"
    options = {
        "balanced": BALANCED,
        "shared": [double, "model.moe.num_experts=2"],  # on 4 ranks, two of them share an expert
        "replicated": [double, f"parallel.expert={replicas}"],  # experts twice, on 2 and 4 ranks
        # 2 experts on one rank, 1 on the other
        "odd": [double, "model.moe.num_experts=3", f"parallel.expert={min(2, world)}"],
        "together": [*TOGETHER, "model.moe.group_images=32"],
    }
    return {name: _final(train(open_tiny(own / name, *options[name]))) for name in LAYOUTS}


def run_world(root: str, half: str, full: bool) -> dict:
    """Runs every case of this world and returns what the tests compare.

    half: What leave_half left in another world. full: Also those of LAYOUTS.
    """
    world = torch.distributed.get_world_size()
    own = Path(root) / f"world{world}"
    result: dict[str, Any] = {"resumed elsewhere": resume_elsewhere(str(own / "rest"), half)}
    whole = train(open_tiny(own / "whole"))
    result["whole"] = (losses(whole.session), local_weights(whole))
    result["records"] = [r for r in records(whole.session) if "train/loss" in r]
    first = train(open_tiny(own / "parts", "checkpoint.asynchronous=true"), stop_after=3)
    assert first.progress.step == 3
    second = train(open_tiny(own / "parts"))
    result["parts"] = (losses(second.session), local_weights(second))
    result["differs"] = first_differing_replica(second.engine.local_model, second.session.groups)
    if world > 1:
        result["failed save"] = fail_in_background(own / "failed")
        with torch.no_grad():
            second.engine.local_model.get_parameter("head.bias")[0] += whole.session.rank * 1e-7
        result["tampered"] = first_differing_replica(second.engine.local_model, second.session.groups)
    result["double"] = _final(train(open_tiny(own / "double", "engine.precision=fp64")))
    result["accumulated"] = _final(train(open_tiny(own / "accumulated", "engine.precision=fp64", "data.micro_batch=4")))
    result["recomputed"] = _final(
        train(open_tiny(own / "recomputed", "engine.precision=fp64", "parallel.recompute=block"))
    )
    result["uneven"] = _final(
        train(
            open_tiny(
                own / "uneven",
                "engine.precision=fp64",
                "data.drop_last=false",
                "optim.epochs=1.0",
                "data.global_batch=300",
                "data.micro_batch=0",
                "model.moe.group_images=1",
                "log.eval_every=1.0",
            )
        )
    )
    if full:
        result |= run_layouts(own, world)
    micro = f"data.micro_batch={8 if world == 1 else 4}"  # the same groups of 8 images: on one rank, or on two
    result["together in parts"] = _final(train(open_tiny(own / "parts8", *TOGETHER, "model.moe.group_images=8", micro)))
    tuned = ("model.moe.tune=measure", f"model.moe.tune_cache={own / 'tuned-choices'}")
    result["tuned"] = _final(train(open_tiny(own / "tuned", "engine.precision=fp64", *tuned)))
    result["choices"] = [path.name for path in sorted((own / "tuned-choices").glob("*.json"))]
    result["rounded"] = records(
        train(open_tiny(own / "rounded", "model.moe.payload=fp8", "model.moe.overlap=2", "log.every=2")).session
    )
    result["bf16"] = losses(train(open_tiny(own / "bf16", "engine.precision=bf16")).session)
    fp16 = train(open_tiny(own / "fp16", "engine.precision=fp16"))
    engine: Any = fp16.engine  # updates are no member that every engine has
    result["fp16"] = (losses(fp16.session), engine.loss_scale.value, engine.updates)
    return result


def fail_in_background(directory: Path) -> tuple:
    """Returns (error, steps taken, checkpoints left) of a run whose last rank cannot write its second checkpoint."""
    trainer = Trainer(open_tiny(directory, "checkpoint.every=10", "checkpoint.asynchronous=true", "optim.epochs=50"))
    save = sys.modules["swin_moe.checkpoint.save"]  # the package has a function of this name
    members = vars(save)
    real = members["write_shares"]

    def write(staging: Path, *arguments: object) -> None:
        if staging.name.startswith(".0000000020") and trainer.session.rank == trainer.session.world_size - 1:
            raise OSError(28, "No space left on device", str(staging))
        real(staging, *arguments)

    members["write_shares"] = write
    try:
        trainer.run()
    except ValueError as error:
        left = sorted(path.name for path in trainer.checkpoints.root.iterdir())
        return type(error).__name__, str(error), trainer.progress.step, left
    finally:
        members["write_shares"] = real
    return ("none",)


def resume_elsewhere(root: str, source: str) -> tuple:
    """Continues the float64 run that another world left after 3 steps; returns its losses and weights."""
    session = open_tiny(Path(root), "engine.precision=fp64", f"checkpoint.load={source}")
    return _final(train(session))


def leave_half(root: str) -> None:
    """Trains 3 float64 steps and stops."""
    train(open_tiny(Path(root), "engine.precision=fp64"), stop_after=3)


def resume_sharded(root: str) -> dict[int, tuple]:
    """Returns for ZeRO stages 1 to 3, with replicated experts: (equal numbers, tensors that differ) after a resume."""
    result = {}
    for zero in (1, 2, 3):
        options = (f"parallel.zero={zero}", "parallel.expert=1", "parallel.expert_shard=1")
        whole = train(open_tiny(Path(root) / f"whole{zero}", *options))
        train(open_tiny(Path(root) / f"parts{zero}", *options), stop_after=3)
        parts = train(open_tiny(Path(root) / f"parts{zero}", *options))
        expected, actual = local_weights(whole), local_weights(parts)
        assert expected.keys() == actual.keys()
        different = [name for name, tensor in expected.items() if not torch.equal(tensor, actual[name])]
        result[zero] = (losses(whole.session) == losses(parts.session), different)
    return result


def _final(trainer: Trainer) -> tuple:
    results = [r for r in records(trainer.session) if "eval/loss" in r]
    return losses(trainer.session), full_weights(trainer), results
