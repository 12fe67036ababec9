"""What a config computes and sends, as plain data: parameters, arithmetic by module, and collectives by group.

Nothing here is as long as there are experts or ranks. Arithmetic is that of the network's own counts (models/flops.py),
so the sum over modules is flops() or active_flops(); launches and bytes come from micro_step.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from swin_moe.config import Config, MoEConfig, OptimConfig
from swin_moe.config.choices import facts_of
from swin_moe.config.variants import VARIANTS
from swin_moe.engine.weight_copies import WeightCopies
from swin_moe.models.attention import stage_geometry
from swin_moe.models.flops import part_flops
from swin_moe.models.network import Network
from swin_moe.optim import frozen_parameters, parameter_groups
from swin_moe.parallel.sharding import placement
from swin_moe.tasks.base import Task, build_task

PADDED = ("padded", "tutel")  # backends that move and compute full slots
_ROW_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}


@dataclass(frozen=True)
class Parameter:
    """One parameter of the network, over all ranks."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    copied: bool  # ranks that have it whole keep it in half precision, too (engine/weight_copies.py)
    is_expert: bool  # ranks hold different parts of it
    group: int  # of the optimizer's parameters, in its order

    @property
    def numel(self) -> int:
        """Elements over all ranks."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class MoEWork:
    """One MoE layer."""

    name: str
    tokens: int  # of one image
    rows: int  # that the tokens of an image send to experts, if none is dropped
    dim: int
    hidden: int
    weights: int  # elements of all experts


@dataclass(frozen=True, eq=False)
class Workload:
    """What a config asks of a world, whatever its layout."""

    parameters: tuple[Parameter, ...]
    macs: tuple[tuple[str, float], ...]  # (module, multiply-accumulates of one image really computed), in order
    flops: float  # the network's own counts of one image, multiply-accumulates: official
    active_flops: float
    moe: tuple[MoEWork, ...]
    blocks: int
    row_bytes: int  # of one channel of a row between ranks, without a payload's encoding

    def numel(self, *, experts: bool | None = None, trained: bool | None = None) -> int:
        """Returns elements of parameters; None = of both kinds."""
        return _numel(self, experts, trained)

    def tensors(self, *, experts: bool) -> int:
        """Returns how many parameters are trained."""
        return sum(p.trained and p.is_expert == experts for p in self.parameters)


@lru_cache(maxsize=64)
def _numel(workload: Workload, experts: bool | None, trained: bool | None) -> int:
    return sum(
        p.numel
        for p in workload.parameters
        if (experts is None or p.is_expert == experts) and (trained is None or p.trained == trained)
    )


def weight_dtype(config: Config) -> torch.dtype:
    """Returns what weights, gradients and optimizer state are kept in: bf16 and fp16 are computed from fp32."""
    return torch.float64 if config.engine.precision == "fp64" else torch.float32


def moments_of(optim: OptimConfig) -> int:
    """Returns the optimizer's tensors as large as a parameter."""
    return {"adamw": 2, "sgd": int(optim.momentum > 0)}[optim.name]


def rows_share(moe: MoEConfig) -> float:
    """Returns rows that are sent and computed under even loads, over MoEWork.rows: a capacity below 1 drops some, and
    padded backends fill every slot of a given capacity, above or below 1."""
    if not moe.has_blocks or not facts_of(moe).has_groups:
        return 1.0
    if moe.backend in PADDED and moe.capacity_factor > 0:
        return moe.capacity_factor
    return min(1.0, abs(moe.capacity_factor)) if moe.capacity_factor else 1.0


def build_workload(config: Config) -> Workload:
    """Returns the workload of a config. Its network is built on meta, and dropped."""
    with torch.device("meta"):
        network = task_to_count(config).build_network()
    frozen = frozen_parameters(network, config.optim.freeze)
    parameters = [(n, tuple(p.shape), p.requires_grad and n not in frozen) for n, p in network.named_parameters()]
    places = [g["names"] for g in parameter_groups(network, config.optim, config.model.depths)]
    group = {name: number for number, names in enumerate(places) for name in names}
    blocks = sum(config.model.depths)
    counts = network.flops(), network.active_flops()
    copied = set(WeightCopies(network, torch.bfloat16).copies)
    return Workload(
        parameters=tuple(
            Parameter(*row, row[0] in copied, placement(row[0]).is_expert, group.get(row[0], 0)) for row in parameters
        ),
        macs=tuple(_macs(config, network)),
        flops=counts[0],
        active_flops=counts[1],
        moe=tuple(_moe_layers(config)),
        blocks=blocks,
        row_bytes=_ROW_BYTES[config.engine.precision],
    )


@dataclass
class StandIn:
    """A teacher of whose network only the width is known: the student's."""

    num_features: int

    def __call__(self, image: Tensor) -> Tensor:
        """Raises ValueError: it has no network."""
        raise ValueError("task.name=distill: the planner does not count what a teacher holds and computes")


def task_to_count(config: Config) -> Task:
    """Returns the task, with a stand-in for the teacher where it needs one.

    Raises:
        ValueError: It is of images that have other sizes than model.img_size, and heads of other layers.
    """
    task = build_task(config)
    if task.needs_boxes or task.needs_label_maps:
        raise ValueError(
            f"task.name={config.task.name}: the planner counts networks of images of model.img_size alone, none with "
            f"boxes or label maps; plan the backbone with task.name=classify"
        )
    if task.needs_teacher:
        task.teacher = StandIn(config.model.embed_dim * 2 ** (len(config.model.depths) - 1))
    return task


def _macs(config: Config, network: Network) -> Iterator[tuple[str, float]]:
    """Yields (module, multiply-accumulates of one image) as active_flops counts; what a task adds comes last."""
    variant, headless = VARIANTS[config.model.name], not config.task.options.classifies
    model = replace(config.model, num_classes=0) if headless else config.model
    options = {"spatial_mlp": variant.mixer == "mlp", "norm_after": variant.merge_norm == "after"}
    total = 0.0
    for name, macs in part_flops(model, 1.0, **options):
        total += macs
        yield name, macs
    rest = network.active_flops() - total
    if rest:
        yield "task", rest


def _moe_layers(config: Config) -> Iterator[MoEWork]:
    moe = config.model.moe
    for stage, chosen in enumerate(moe.blocks):
        geometry = stage_geometry(config.model, stage)
        tokens = math.prod(geometry.resolution)
        hidden = int(geometry.dim * config.model.mlp_ratio)
        weights = moe.num_experts * (2 * geometry.dim * hidden + geometry.dim + hidden)
        for block in sorted(b for b in set(chosen) if b >= 0):
            name = f"layers.{stage}.blocks.{block}"
            yield MoEWork(name, tokens, facts_of(moe).rows(moe, tokens), geometry.dim, hidden, weights)
