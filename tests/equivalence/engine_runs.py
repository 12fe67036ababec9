"""What a rank runs for a row of engine_cases.py: clipped AdamW steps, checkpoints, steps that are skipped."""

import hashlib
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from swin_moe.config.io import load_config
from swin_moe.data.batch import to_device
from swin_moe.data.loader import StepBatches
from swin_moe.engine.base import StepStats
from swin_moe.parallel.groups import build_groups
from swin_moe.run.expert_load import moe_layers
from swin_moe.run.session import Session
from swin_moe.train import Trainer
from tests.equivalence.engine_cases import BALANCED, BATCH, CHECKPOINTS, POISONED, Case, runnable


def open_case(case: Case, directory: Path, *options: str) -> Session:
    """Returns a session of the case in this (already started) world; refuses as open_session does."""
    config = load_config("digits_swin_moe", [*case.overrides, f"run.output={directory}", *options])
    config.check(case.world)
    groups = build_groups(
        config.parallel,
        config.model.moe.num_experts,
        torch.device("cpu"),
        routing_ranks=config.routing_ranks(case.world),
        saves_in_background=config.checkpoint.asynchronous,
    )
    return Session(config, groups, torch.device("cpu"))


def take_step(trainer: Trainer, step: int, batches: StepBatches) -> tuple[list[float], StepStats]:
    """Returns ([task loss, auxiliary loss, pairs dropped], statistics) of one optimizer step, summed over ranks."""
    context = trainer._context(step, trainer._count(batches))
    sums = torch.zeros(3, dtype=torch.float64)
    for index, batch in enumerate(batches):
        batch = to_device(batch, trainer.device, trainer.config.engine.precision)
        with trainer.engine.micro_step(last=index == len(batches) - 1):
            loss = trainer.task.loss(trainer.engine.model, batch, context)
            trainer.engine.backward(loss.total)
        sums[:2] += torch.stack([loss.task, loss.aux])
        for _, layer in moe_layers(trainer.engine.local_model):
            assert layer.stats is not None, "it has just run"
            sums[2] += int(layer.stats.dropped)
    if dist.is_initialized():
        dist.all_reduce(sums)
    stats = trainer.engine.step(step)
    if stats.skipped:
        trainer.engine.discard_gradients()
    return sums.tolist(), stats


def saved(trainer: Trainer) -> list[tuple]:
    """Returns (name, global shape, offset, tensor) of this rank's pieces."""
    return [(p.name, p.shape, p.chunk.offset, torch.as_tensor(p.tensor).clone()) for p in trainer.engine.pieces()]


def run_case(case: Case, steps: int) -> dict:
    """Returns numbers of every step, gradients of the first (as Adam's first moment) and the final weights."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(open_case(case, Path(directory)))
    rows = []
    for step, batches in enumerate(trainer.loader.batches(0, steps)):
        sums, stats = take_step(trainer, step, batches)
        rows.append([*sums, stats.grad_norm, stats.clip_factor, float(stats.skipped)])
        if step == 0:
            first = [piece for piece in saved(trainer) if piece[0].startswith("optim.exp_avg/")]
    trainer.loader.close()
    final = [piece for piece in saved(trainer) if not piece[0].startswith("optim.")]
    return {"rows": rows, "first": first, "final": final}


def run_cases(cases: list[Case], steps: int) -> dict[str, dict]:
    """Returns what run_case gave for each; an error becomes {"error": text}, which all ranks have to meet alike."""
    results = {}
    for case in cases:
        try:
            results[case.name] = run_case(case, steps)
        except ValueError:
            results[case.name] = {"error": traceback.format_exc()}
    return results


def train_and_save(case: Case, root: str, steps: int, source: str = "") -> str:
    """Returns the checkpoint that a run writes `steps` after its start, or after the checkpoint `source`."""
    extra = (f"checkpoint.load={source}",) if source else ()
    trainer = Trainer(open_case(case, Path(root), *extra))
    trainer.resume()
    begin = trainer.progress.step
    for step, batches in zip(range(begin, begin + steps), trainer.loader.batches(begin, begin + steps)):
        take_step(trainer, step, batches)
        trainer.progress.step, trainer.progress.samples = step + 1, trainer.progress.samples + BATCH
    trainer._save(False)
    return str(trainer.checkpoints.latest())


def digests(path: str) -> dict[str, str]:
    """Returns file -> sha256 of a checkpoint, without what says who wrote it when."""
    files = [f for f in sorted(Path(path).iterdir()) if f.name != "provenance.json"]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def continue_from(case: Case, source: str, root: str) -> dict:
    """Returns, for a run that starts from a checkpoint: what it saves at once, how it evaluates, and its next steps.

    On several ranks the save goes on in the background of these steps, which must change nothing of it.
    """
    background = f"checkpoint.asynchronous={dist.get_world_size() > 1}"
    trainer = Trainer(open_case(case, Path(root), f"checkpoint.load={source}", background))
    trainer.resume()
    trainer._save(False)
    evaluations, rows = [], []
    begin = trainer.progress.step
    for step, batches in zip(range(begin, begin + 2), trainer.loader.batches(begin, begin + 2)):
        with trainer.engine.evaluation():
            images = (to_device(b, trainer.device, trainer.config.engine.precision) for b in trainer.eval_loader)
            result = trainer.task.evaluate(trainer.engine.local_model, images, trainer._context(step, 0))
            evaluations.append(result["loss"])
        sums, stats = take_step(trainer, step, batches)
        rows.append([*sums, stats.grad_norm, stats.clip_factor, float(stats.skipped)])
    trainer.checkpoints.wait()
    return {"files": digests(str(trainer.checkpoints.latest())), "rows": rows, "evaluations": evaluations}


def poison(case: Case, root: str) -> dict:
    """Returns what a step does in which the last rank's gradients are not numbers, and the step after it."""
    trainer = Trainer(open_case(case, Path(root)))
    before = saved(trainer)
    factor = float("nan") if dist.get_rank() == dist.get_world_size() - 1 else 1.0
    handle = trainer.engine.local_model.get_submodule("norm").register_forward_hook(
        lambda module, inputs, output: output.register_hook(lambda g: g * factor) and None
    )
    batches = trainer.loader.batches(0, 2)
    _, skipped = take_step(trainer, 0, next(batches))
    same = all(torch.equal(a[3], b[3]) for a, b in zip(before, saved(trainer)))
    handle.remove()
    _, good = take_step(trainer, 1, next(batches))
    return {"skipped": skipped.skipped, "unchanged": same, "then": good.skipped, "norm": good.grad_norm}


def run_alone(cases: list[Case], steps: int, root: str) -> dict:
    """Returns what one rank gives: cases, and by precision a checkpoint, what follows it and a later one."""
    result: dict[str, Any] = {"cases": run_cases(cases, steps)}
    for precision in ("fp64", "fp32"):
        alone, folder = Case("torch", 0, 1, precision=precision, options=BALANCED), f"{root}/{precision}"
        source = train_and_save(alone, f"{folder}/source", 3)
        later = train_and_save(alone, f"{folder}/later", 2, source)
        result[precision] = {
            "source": source,
            "continued": continue_from(alone, source, f"{folder}/continued"),
            "later": continue_from(alone, later, f"{folder}/rest"),
        }
    return result


def run_world(cases: list[Case], steps: int, sources: dict[str, str], root: str, full: bool) -> dict:
    """Returns what one rank of a world gives: cases, checkpoints, steps that are skipped. sources: By precision."""
    world = dist.get_world_size()
    checkpoints = runnable(CHECKPOINTS, world, full)
    return {
        "cases": run_cases(cases, steps),
        "continued": {c.name: continue_from(c, sources[c.precision], f"{root}/{c.name}") for c in checkpoints},
        "saved": {
            c.name: train_and_save(c, f"{root}/saved-{c.name}", 2, sources[c.precision])
            for c in checkpoints
            if c.zero == 3 or c.engine != "torch"
        },
        "poisoned": {c.name: poison(c, f"{root}/poisoned-{c.name}") for c in runnable(POISONED, world, full)},
    }


def read_back(cases: list[Case], paths: dict[str, str], root: str) -> dict[str, dict]:
    """Returns how one rank continues what others saved."""
    return {c.name: continue_from(c.oracle, paths[c.name], f"{root}/{c.name}") for c in cases}
