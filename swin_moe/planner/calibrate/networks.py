"""Every operator of a step timed where it stands, in networks of all kinds but small ones, and what is left is the
host's: Python, autograd, views and dispatch between operators. Also the update of their weights.

Plans are of other sizes; what is found is fitted by bytes and products (rates.py).
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from swin_moe.config import Config
from swin_moe.config.io import load_config
from swin_moe.engine.base import ENGINES
from swin_moe.optim import build_schedule
from swin_moe.parallel.groups import Groups, single_process_groups
from swin_moe.planner.calibrate.machine import clock
from swin_moe.planner.calibrate.timed import Timed
from swin_moe.planner.micro_step import example_batch
from swin_moe.planner.operators import BYTES
from swin_moe.planner.rates import HOST, UPDATE, Curve, Rate, beyond, fit, fit_rates, moved_by_update
from swin_moe.registry import lookup
from swin_moe.run.session import Session, build_meta_model
from swin_moe.tasks.base import StepContext, build_task

_SMALL = "model.num_classes=100 model.num_heads=[3,6,12,24] model.embed_dim="
_EXPERTS = (
    "model.moe.num_experts=4 model.moe.capacity_factor=0 model.moe.capacity_scope=rank model.moe.blocks="
    "[[-1],[-1],[1],[0]]"
)
NETWORKS = (
    _SMALL + "48 model.name=swin model.img_size=96 model.depths=[2,2,2,2] model.window_size=6 data.global_batch=8",
    _SMALL + "48 model.name=swinv2 model.img_size=128 model.depths=[2,2,2,2] model.window_size=8 data.global_batch=4",
    _SMALL + "96 model.name=swin model.img_size=224 model.depths=[1,1,1,1] model.window_size=7 data.global_batch=1",
    _SMALL + "96 model.name=swinv2 model.img_size=256 model.depths=[2,1,1,1] model.window_size=8 data.global_batch=1",
    _SMALL
    + "48 model.name=swin_moe model.img_size=96 model.depths=[1,1,2,1] model.window_size=6 data.global_batch=8 "
    + _EXPERTS,
    # Few images, as micro-batches have: what an operator takes however little it moves.
    _SMALL + "48 model.name=swin model.img_size=96 model.depths=[1,1,1,1] model.window_size=6 data.global_batch=2",
    _SMALL
    + "48 model.name=swin_moe model.img_size=96 model.depths=[1,1,2,1] model.window_size=6 data.global_batch=2 "
    + _EXPERTS,
    # Large experts, most of whose time is their weights'; and gradients of a second micro-batch, added to the first's.
    _SMALL
    + "96 model.name=swin_moe model.img_size=96 model.depths=[1,1,2,1] model.window_size=6 data.global_batch=4 "
    + "data.micro_batch=2 "
    + _EXPERTS,
)
_ROUNDS, _WARMING = 5, 2  # of a step as it is and one whose operators are timed


@dataclass(frozen=True)
class Seen:
    """A network's step: operators with their seconds, and what the step took without their timing."""

    operators: list[tuple[str, str]]  # (name, precision)
    work: np.ndarray  # (operators, 5), see operators.py
    seconds: np.ndarray  # (operators,)
    micro_step: float
    update: float
    weights: np.ndarray  # (tensors,) bytes

    @property
    def host(self) -> float:
        """Seconds that the host takes around all operators."""
        return max(0.0, self.micro_step - float(self.seconds.sum()))


class SmallStep:
    """A network that is trained on one batch of noise: on this rank alone, or with all of `groups`."""

    def __init__(self, config: Config, device: torch.device, groups: Groups | None = None) -> None:
        groups = single_process_groups() if groups is None else groups
        session = Session(config, groups, device)
        self.config, self.device, self.task, self.steps = config, device, build_task(config), 0
        engine = lookup(ENGINES, config.engine.name, key="engine.name")
        schedule = build_schedule(config.optim, steps_per_epoch=100, global_batch=config.data.global_batch)
        self.engine = engine(
            build_meta_model(session, self.task), config=config, groups=groups, schedule=schedule, device=device
        )
        self.world_size = groups.world_size
        images, self.accumulation = config.accumulation(self.world_size)
        batch: Any = example_batch(config, images, self.task)
        batch["image"].normal_()
        batch["target"].random_(config.model.num_classes)
        batch["sample"].copy_(torch.arange(images))
        if "partner" in batch:
            batch["partner"].copy_(torch.arange(images).roll(1))
        self.batch: Any = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    def micro_steps(self) -> None:
        """Forward and backward of a step."""
        context = StepContext(
            self.config, self.steps, self.world_size, self.config.data.global_batch, self.engine.autocast
        )
        for index in range(self.accumulation):
            with self.engine.micro_step(last=index == self.accumulation - 1):
                self.engine.backward(self.task.loss(self.engine.model, self.batch, context).total)

    def update(self) -> None:
        """Norm, clipping and optimizer."""
        self.engine.measure()
        self.engine.step(self.steps)
        self.steps += 1


def measure_networks(device: torch.device, precision: str, networks: Sequence[str] = NETWORKS) -> Iterator[Seen]:
    """Yields what the steps of small networks were."""
    now = clock(device)
    with tempfile.TemporaryDirectory() as directory:
        for options in networks:
            words = f"model.moe.blocks=[] {options} engine.precision={precision} run.output={directory}".split()
            yield _measure(SmallStep(load_config("digits_swin_moe", words), device), now)


def _measure(step: SmallStep, now: Any) -> Seen:
    for _ in range(_WARMING):
        step.micro_steps()
        step.update()
    plain, timed = [], []
    for _ in range(_ROUNDS):
        start = now()
        step.micro_steps()
        middle = now()
        step.update()
        plain.append((middle - start, now() - middle))
        with Timed(now) as seen:
            step.micro_steps()
        step.update()
        timed.append(seen)
    assert all(t.operators == timed[0].operators for t in timed), "a step does the same each time"
    micro_step, update = np.median(plain, axis=0)
    sizes = np.array([4.0 * parameter.numel() for parameter in step.engine.local_model.parameters()])
    first = timed[0]
    seconds = np.median([t.seconds for t in timed], axis=0)
    return Seen(first.operators, np.array(first.work), seconds, float(micro_step), float(update), sizes)


def operators_of(step: SmallStep, now: Any) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Returns (name and precision, work) of every operator of a step, which is taken."""
    with Timed(now) as seen:
        step.micro_steps()
    step.update()
    return seen.operators, np.array(seen.work)


def rates_of(
    curves: dict[str, Curve], kernels: dict[str, dict[str, Curve]], seen: dict[str, list[Seen]]
) -> dict[str, dict[str, Rate]]:
    """Returns precision -> rate by operator, of the update and of the host.

    curves, kernels: By precision, of products and of single kernels. seen: By engine.precision.

    In bf16 parts of a step run in fp32: operators count by what they read, in whatever network.
    """
    calls: dict[str, dict[str, list[tuple[np.ndarray, float]]]] = {precision: {} for precision in curves}
    for steps in seen.values():
        for step in steps:
            for (name, precision), work, taken in zip(step.operators, step.work, step.seconds):
                calls[precision if precision in calls else "fp32"].setdefault(name, []).append((work, float(taken)))
    found = {}
    for precision, by_name in calls.items():
        tables = {n: (np.array([w for w, _ in c]), np.array([s for _, s in c])) for n, c in by_name.items()}
        of_steps = _update_rates(seen[precision]) | _host_rates(seen[precision])
        found[precision] = fit_rates(curves[precision], tables, kernels.get(precision)) | of_steps
    return found


def _update_rates(steps: list[Seen]) -> dict[str, Rate]:
    moved = [moved_by_update(step.weights) for step in steps]
    features = np.array([[len(m), m.sum(), beyond(m).sum()] for m in moved])
    call, byte, far = (float(v) for v in fit(features, np.array([step.update for step in steps])))
    return {UPDATE: Rate(call, byte, 0.0, far)}


def _host_rates(steps: list[Seen]) -> dict[str, Rate]:
    """Memory that operators filled is given back between them, so that the host takes longer where they move more. A
    step that was disturbed while its operators were timed says nothing of it."""
    steps = [step for step in steps if step.host > 0]
    if not steps:
        return {}
    moved = [step.work[:, BYTES] for step in steps]
    features = np.array([[len(m), m.sum(), beyond(m).sum()] for m in moved])
    call, byte, far = (float(v) for v in fit(features, np.array([step.host for step in steps])))
    return {HOST: Rate(call, byte, 0.0, far)}
