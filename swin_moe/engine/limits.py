"""What engines of other libraries cannot do: refused with a reason before anything is allocated. Plain data.

A combination that would train silently wrong must not start, so anything not known to be right stands here.
Measured on the versions that requirements.txt pins.
"""

from dataclasses import dataclass

from swin_moe.config import Config
from swin_moe.layout import even_split
from swin_moe.parallel.compile import static_routing
from swin_moe.parallel.sharding import Degrees


@dataclass(frozen=True)
class Limit:
    """The values of an option that an engine runs with, and why not with others."""

    section: str
    option: str
    allowed: tuple[str | int, ...]
    reason: str


LIMITS: dict[str, tuple[Limit, ...]] = {
    "deepspeed": (
        Limit(
            "parallel", "compile", ("none",), "its hooks on modules and parameters break graphs; use engine.name=torch"
        ),
        Limit("parallel", "zero", (1, 2, 3), "its stage 0 clips by a wrong norm; use engine.name=torch for it"),
        Limit("engine", "precision", ("fp32", "bf16", "fp16"), "its master weights are float32; use engine.name=torch"),
    ),
    "fairscale": (
        Limit("parallel", "compile", ("none",), "its hooks were not checked with graphs; use engine.name=torch"),
        Limit(
            "parallel",
            "zero",
            (1, 2),
            "only OSS (1) and ShardedDDP (2) are right on today's torch, its FSDP (3) needs CUDA and an older one; "
            "use engine.name=torch for 0 and 3",
        ),
        Limit("engine", "offload", ("none",), "its OffloadModel is for CUDA and one rank; use engine.name=torch"),
    ),
}


# Tasks that change weights after an update, and of what; another one is known by its Task.changes_weights alone.
_MOVED = {"moby": "the momentum networks elsewhere than those they follow"}


def check_engine(config: Config, world_size: int, *, changes_weights: bool = False) -> None:
    """Raises ValueError where engine.name cannot run the config in a world of this many ranks; pure arithmetic.

    changes_weights: What the class of task.name says (tasks/base.py), which engines do not know.
    """
    name, task = config.engine.name, config.task.name
    if name == "deepspeed" and (changes_weights or task in _MOVED):
        cut = _MOVED.get(task, "weights otherwise than what the task changes them by after each step")
        raise ValueError(f"engine.name=deepspeed does not run task.name={task}: it cuts {cut}; use engine.name=torch")
    for limit in LIMITS.get(name, ()):
        value = getattr(getattr(config, limit.section), limit.option)
        if value not in limit.allowed:
            allowed = ", ".join(map(str, limit.allowed))
            key = f"{limit.section}.{limit.option}"
            raise ValueError(f"engine.name={name} does not run {key}={value}: {limit.reason}; allowed: {allowed}")
    if config.engine.offload == "parameters" and (name, config.parallel.zero) != ("deepspeed", 3):
        raise ValueError(
            f"engine.offload=parameters needs engine.name=deepspeed and parallel.zero=3, got engine.name={name} and "
            f"parallel.zero={config.parallel.zero}; allowed: none, optimizer"
        )
    if config.parallel.compile != "none":
        _check_compiled(config, world_size)
    if name == "deepspeed" and config.model.moe.has_blocks:
        _check_even_experts(config, world_size)


def _check_compiled(config: Config, world_size: int) -> None:
    """Refuses what no graph holds; what one block can do without is left outside of its graph instead."""
    moe, key = config.model.moe, f"parallel.compile={config.parallel.compile}"
    if moe.has_blocks and moe.backend == "tutel":
        raise ValueError(f"{key} does not run model.moe.backend=tutel, whose kernels cannot be traced; use native")
    if config.parallel.compile != "model":
        return
    if config.task.name != "classify":
        raise ValueError(f"{key} is for task.name=classify, got {config.task.name}; allowed: none, block")
    if config.parallel.zero >= 2 and world_size > 1:
        raise ValueError(
            f"{key} does not run parallel.zero={config.parallel.zero}, which gathers parameters block by block; "
            f"allowed: none, block"
        )
    if not moe.has_blocks:
        return
    spans = world_size > 1 and (config.routing_ranks(world_size) > 1 or moe.balance_scope == "global")
    degrees = Degrees.resolve(config.parallel, moe.num_experts, world_size)
    if spans or degrees.expert * degrees.expert_shard > 1:
        raise ValueError(f"{key} cannot hold MoE layers whose ranks exchange rows or counts; allowed: none, block")
    if not static_routing(moe):
        raise ValueError(
            f"{key} needs shapes that do not depend on the data: model.moe.choice=token, got {moe.choice}, and with "
            f"model.moe.backend=padded a model.moe.capacity_factor > 0, got {moe.capacity_factor}; allowed: none, block"
        )


def _check_even_experts(config: Config, world_size: int) -> None:
    """DeepSpeed fills buckets by element counts: with uneven experts ranks would reduce different parameters."""
    moe, model = config.model.moe, config.model
    degrees = Degrees.resolve(config.parallel, moe.num_experts, world_size)
    if len({size for _, size in even_split(moe.num_experts, degrees.expert)}) > 1:
        raise ValueError(
            f"engine.name=deepspeed needs as many experts on every rank: model.moe.num_experts={moe.num_experts} "
            f"is not a multiple of parallel.expert={degrees.expert}; use a divisor, or engine.name=torch or fairscale"
        )
    for stage, blocks in enumerate(moe.blocks):
        if not any(block >= 0 for block in blocks):
            continue
        dim = model.embed_dim * 2**stage
        for channels in (dim, int(dim * model.mlp_ratio)):
            if channels % degrees.expert_shard:
                raise ValueError(
                    f"engine.name=deepspeed needs equal shards of an expert: its {channels} channels in stage {stage} "
                    f"are not a multiple of parallel.expert_shard={degrees.expert_shard}; choose a divisor, or "
                    f"engine.name=torch or fairscale"
                )
