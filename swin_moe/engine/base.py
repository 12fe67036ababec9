"""What the training loop needs from a parallel engine, and nothing more."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from swin_moe import registry
from swin_moe.checkpoint import Piece
from swin_moe.engine.precision import LossScale
from swin_moe.layout import Chunk
from swin_moe.models.network import Network

ENGINES = {
    "torch": "swin_moe.engine.torch_native:torch_engine",
    "deepspeed": "swin_moe.engine.deepspeed.engine:DeepSpeedEngine",
    "fairscale": "swin_moe.engine.fairscale:fairscale_engine",
}


@dataclass(frozen=True)
class Serves:
    """What an engine was seen to be right with. An option that it does not name runs at its least, which is the
    default here, so that what nobody thought of is refused and does not train silently wrong.
    """

    zero: tuple[int, ...] = (0,)
    precision: tuple[str, ...] = ("fp32",)
    offload: tuple[str, ...] = ("none",)
    compile: tuple[str, ...] = ("none",)
    recompute: tuple[str, ...] = ("none",)
    clip: bool = False  # optim.clip_norm
    ema: bool = False  # optim.ema
    accumulation: bool = False  # several micro-batches in a step
    changed_weights: bool = False  # tasks that change weights after a step (Engine.change_weights)
    graphs: bool = False  # engine.cuda_graphs in training: forward and backward outside of its update
    uneven_experts: bool = False  # ranks that hold different numbers of experts, or shards of different sizes
    reasons: Mapping[str, str] = field(default_factory=dict)  # option -> why it does not run with other values


# What common.py:StepEngine does for all three of ours, and every block of the network by itself.
_OURS: dict[str, Any] = {"clip": True, "ema": True, "accumulation": True, "recompute": ("none", "block")}
_PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
# By name in ENGINES; an engine of another place has its own as an attribute `serves`. Measured on the versions that
# requirements.txt pins.
SERVES = {
    "torch": Serves(
        zero=(0, 1, 2, 3),
        precision=_PRECISIONS,
        offload=("none", "optimizer"),
        compile=("none", "block", "model"),
        **_OURS,
        changed_weights=True,
        graphs=True,
        uneven_experts=True,
    ),
    "deepspeed": Serves(
        zero=(1, 2, 3),
        precision=("fp32", "bf16", "fp16"),
        offload=("none", "optimizer", "parameters"),
        **_OURS,
        reasons={
            "parallel.compile": "its hooks on modules and parameters break graphs; use engine.name=torch",
            "parallel.zero": "its stage 0 clips by a wrong norm; use engine.name=torch for it",
            "engine.precision": "its master weights are float32; use engine.name=torch",
        },
    ),
    "fairscale": Serves(
        zero=(1, 2),
        precision=_PRECISIONS,
        **_OURS,
        changed_weights=True,
        uneven_experts=True,
        reasons={
            "parallel.compile": "its hooks were not checked with graphs; use engine.name=torch",
            "parallel.zero": "only OSS (1) and ShardedDDP (2) are right on today's torch, its FSDP (3) needs CUDA and "
            "an older one; use engine.name=torch for 0 and 3",
            "engine.offload": "its OffloadModel is for CUDA and one rank; use engine.name=torch",
        },
    ),
}


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did; the same on every rank."""

    grad_norm: float  # global L2 norm before clipping, dense and expert parameters
    clip_factor: float  # what gradients were multiplied by, <= 1
    lr: float  # of a group with lr_scale 1
    skipped: bool  # True: a gradient was not finite and nothing was updated
    loss_scale: float  # 1 except in fp16


class Engine(Protocol):
    """A model, its optimizer and its collectives.

    A step is: `with engine.micro_step(last=...)`: forward, loss, `backward(loss)`, once per micro-batch, then `measure`
    and `step`. The host waits for the device once, in `measure`: what a step decides by is read there together, and
    the update that follows keeps the device busy while the host starts the next step.
    Every rank calls every method the same number of times, also with no sample left.

    A row of ENGINES is called as f(model, config=, groups=, schedule=, device=) with a parallelized model on meta:
    the engine materializes it (common.materialize), so that it can shard before anything is allocated.
    """

    loss_scale: LossScale
    model: Any  # call this one in training
    local_model: Network  # the network itself: call it in evaluation, read statistics from it
    layout: dict[str, tuple[tuple[int, ...], Chunk]]  # parameter -> (global shape, this rank's box before ZeRO cuts it)

    def autocast(self) -> AbstractContextManager:
        """Returns the context for the forward; the loss is computed outside it, in float32."""

    def micro_step(self, *, last: bool) -> AbstractContextManager:
        """Returns a context for forward and backward; gradients are communicated only in the last one of a step."""

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients of `loss`, whose mean over ranks is the global loss."""

    def measure(self, numbers: Tensor | None = None) -> list[list[float]]:
        """Finishes the reduction of gradients and takes their norm; returns every rank's numbers, in rank order.

        numbers: (S,) float64 on the device, as many on every rank: they travel with the norm.
        """

    def step(self, t: int) -> StepStats:
        """Clips gradients, updates weights with the learning rate of step t, clears gradients; calls `measure` where
        nobody has in this step. A step whose norm is not finite changes nothing, and leaves gradients to
        `discard_gradients`."""

    def discard_gradients(self) -> str | None:
        """Clears the gradients of a skipped step; returns the first parameter of this rank that is not finite."""

    def change_weights(self, change: Callable[[dict[str, tuple[Tensor, Chunk]]], None]) -> None:
        """Calls `change` with parameter -> (this rank's part, which box of it that is), to be changed in place."""

    def evaluation(self) -> AbstractContextManager:
        """Returns a context in which `model` is in eval mode with averaged weights, where there are any."""

    def pieces(self) -> Iterable[Piece]:
        """Returns this rank's part of all saved tensors: parameters, optimizer state, averaged weights."""

    def state(self) -> dict:
        """Returns the scalars that belong to the checkpoint, as JSON types."""

    def load_state(self, state: dict) -> None:
        """Takes back `state`, after the tensors of `pieces` were filled in place."""


def check_members(engine: object, name: str) -> None:
    """Raises ValueError, naming them, where an engine lacks members of Engine: found at start, not at the first step
    that is skipped.

    name: Of the engine in the config.
    """
    registry.check_members(engine, Engine, chosen=f"engine.name={name}", where="swin_moe/engine/base.py: Engine")
