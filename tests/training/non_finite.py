"""What the ranks run in test_non_finite.py: one gradient of one rank is spoiled for one step."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from swin_moe.run.metrics import LOGGER
from swin_moe.train import Trainer
from tests.training.cases import open_tiny

EXPERT, DENSE = "layers.1.blocks.1.mlp.experts.fc1_weight", "layers.0.blocks.0.attn.qkv.weight"
KINDS = (
    ("nan", "fp32", "torch", 0),
    ("inf", "fp32", "torch", 0),
    ("nan", "fp16", "torch", 0),
    ("nan", "fp32", "torch", 1),
    ("nan", "fp32", "torch", 3),
    ("nan", "fp32", "deepspeed", 1),
    ("inf", "fp32", "deepspeed", 2),
    ("nan", "fp16", "deepspeed", 3),
    ("nan", "fp32", "fairscale", 1),
    ("inf", "fp16", "fairscale", 2),
)
CASES = {
    f"{value} in {kind}, {precision}, {engine} ZeRO-{zero}": (name, value, precision, engine, zero)
    for kind, name in {"expert": EXPERT, "dense": DENSE}.items()
    for value, precision, engine, zero in KINDS
    if engine == "torch" or importlib.util.find_spec(engine)
}
BAD_RANK, BAD_STEP = 1, 1


class Messages(logging.Handler):
    """Keeps the warnings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def spoil(trainer: Trainer, name: str, value: str) -> None:
    """Replaces one element of the parameter's gradient on this rank, in BAD_STEP."""
    owner, _, key = name.rpartition(".")
    module = trainer.engine.local_model.get_submodule(owner)
    done: list[RemovableHandle] = []

    def replace(gradient):
        if trainer.progress.step == BAD_STEP:
            gradient = gradient.clone()
            gradient.view(-1)[3] = float(value)
        return gradient

    def attach(*_):
        # In the forward, because FSDP2 exchanges the parameters then.
        if not done:
            held = dict(module._parameters.items())[key]  # DeepSpeed would gather an attribute, on this rank only
            done.append(held.register_hook(replace))

    block = name.rpartition(".experts")[0] + ".experts" if ".experts." in name else name.split(".attn")[0]
    trainer.engine.local_model.get_submodule(block).register_forward_pre_hook(attach)


def run(root: Path, case: str) -> dict:
    name, value, precision, engine, zero = CASES[case]
    options = [f"engine.name={engine}", f"engine.precision={precision}", f"parallel.zero={zero}"]
    options += ["optim.epochs=0.1", "optim.warmup_epochs=0"]
    trainer = Trainer(open_tiny(root / case.replace(" ", "-"), *options))
    if precision == "fp16":
        trainer.engine.loss_scale.value = 8.0  # no overflow of its own
    if dist.get_rank() == BAD_RANK:
        spoil(trainer, name, value)
    updates, messages = [], Messages()
    original = trainer.engine.step

    def step(t):
        weights = {n: torch.as_tensor(p.tensor).clone() for n, p in enumerate(trainer.engine.pieces())}
        stats = original(t)
        after = {n: torch.as_tensor(p.tensor) for n, p in enumerate(trainer.engine.pieces())}
        updates.append((stats.skipped, all(torch.equal(weights[n], after[n]) for n in weights)))
        return stats

    trainer.engine.step = step  # type: ignore[method-assign]  # a stand-in
    LOGGER.addHandler(messages)
    try:
        trainer.run()
    finally:
        LOGGER.removeHandler(messages)
    trained: Any = trainer.engine  # updates are no member that every engine has
    scale = trained.loss_scale.value
    return {"updates": updates, "messages": messages.texts, "scale": scale, "taken": trained.updates}


def run_world(root: str) -> dict:
    """Returns case -> what run gave on this rank."""
    return {case: run(Path(root), case) for case in CASES}
