"""Small runs that begin with one another's weights, for the tests of what is carried over."""

from pathlib import Path

import torch

from swin_moe.config.io import load_config
from swin_moe.parallel.groups import single_process_groups
from swin_moe.run.session import Session
from swin_moe.train import Trainer
from swin_moe.weights.load import start_from
from tests.gathered import NETWORK

CPU = torch.device("cpu")
TINY = (
    *NETWORK,
    "task.mask_patch_size=4",
    "data.images_per_class=2",
    "data.global_batch=10",
    "data.erase_prob=0.0",  # else every rank imports timm
    "optim.epochs=1",
    "optim.warmup_epochs=0",
    "log.tensorboard=false",
    "log.eval_every=0",
    "data.eval_batch=120",
)
MOE = (
    "model.moe.blocks=[[-1],[1]]",
    "model.moe.num_experts=4",
    "model.moe.capacity_scope=images",
    "model.moe.group_images=1",
)


def session_of(root: Path, config: str, *options: str) -> Session:
    loaded = load_config(config, [*TINY, f"run.output={root}", *options])
    loaded.check(1)
    return Session(loaded, single_process_groups(), CPU)


def trained(root: Path, config: str, *options: str) -> Trainer:
    """Returns a run at its end, with its checkpoint."""
    trainer = Trainer(session_of(root, config, *options))
    trainer.resume()
    trainer.run()
    return trainer


def begun(root: Path, config: str, source: str | Path, *options: str) -> tuple[Trainer, str]:
    """Returns a run that has loaded `source`, and the report."""
    trainer = Trainer(session_of(root, config, f"run.name=new{source}".replace("/", "-"), *options))
    return trainer, start_from(str(source), trainer.engine, trainer.session)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.engine.local_model.named_parameters()}


def untouched(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Returns the weights of the same run as the seed makes them."""
    return weights(Trainer(trainer.session))


# Pre-training to fine-tuning.
