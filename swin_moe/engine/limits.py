"""What an engine cannot do: refused with a reason before anything is allocated, from what it says that it serves.

A combination that would train silently wrong must not start, so what an engine does not name (base.py: Serves) is not
asked of it.
"""

from typing import Any

from swin_moe.config import Config
from swin_moe.engine.base import ENGINES, SERVES, Serves
from swin_moe.layout import even_split
from swin_moe.parallel.compile import static_routing
from swin_moe.parallel.sharding import Degrees
from swin_moe.registry import lookup

# Tasks that change weights after an update, and of what; another one is known by its Task.changes_weights alone.
_MOVED = dict.fromkeys(("moby", "soft_teacher"), "the momentum networks elsewhere than those they follow")


def check_engine(config: Config, world_size: int, *, changes_weights: bool = False) -> None:
    """Raises ValueError where engine.name cannot run the config in a world of this many ranks; pure arithmetic.

    changes_weights: What the class of task.name says (tasks/base.py), which engines do not know.
    """
    name, task, serves = config.engine.name, config.task.name, serves_of(config.engine.name)
    if not serves.changed_weights and (changes_weights or task in _MOVED):
        cut = _MOVED.get(task, "weights otherwise than what the task changes them by after each step")
        raise ValueError(f"engine.name={name} does not run task.name={task}: it cuts {cut}; use engine.name=torch")
    if config.engine.offload == "parameters" and ("parameters" not in serves.offload or config.parallel.zero != 3):
        raise ValueError(
            f"engine.offload=parameters needs engine.name=deepspeed and parallel.zero=3, got engine.name={name} and "
            f"parallel.zero={config.parallel.zero}; allowed: none, optimizer"
        )
    for key, value, allowed in _asked(config, serves, world_size):
        if value not in allowed:
            why = serves.reasons.get(key, "it does not say that it does (swin_moe/engine/base.py: Serves)")
            words = ", ".join(map(str, allowed))
            raise ValueError(f"engine.name={name} does not run {key}={value}: {why}; allowed: {words}")
    if config.parallel.compile != "none":
        _check_compiled(config, world_size)
    if not serves.uneven_experts and config.model.moe.has_blocks:
        _check_even_experts(config, world_size)


def serves_of(name: str) -> Serves:
    """Returns what an engine says that it serves; the least where it says nothing."""
    found = SERVES.get(name) or getattr(lookup(ENGINES, name, key="engine.name"), "serves", Serves())
    if not isinstance(found, Serves):
        raise ValueError(f"engine.name={name}: its serves is {found!r}; allowed: swin_moe.engine.base.Serves(...)")
    return found


def _asked(config: Config, serves: Serves, world_size: int) -> list[tuple[str, Any, tuple]]:
    """Returns (option, what the config asks for, what the engine serves) of every option that engines differ in."""
    parallel, engine, clip, ema = config.parallel, config.engine, config.optim.clip_norm, config.optim.ema
    asked: list[tuple[str, Any, tuple]] = [
        ("parallel.zero", parallel.zero, serves.zero),
        ("engine.precision", engine.precision, serves.precision),
        ("engine.offload", engine.offload, serves.offload),
        ("parallel.compile", parallel.compile, serves.compile),
        ("parallel.recompute", parallel.recompute, serves.recompute),
        ("optim.clip_norm", clip, (clip if serves.clip else 0,)),
        ("optim.ema", ema, (ema if serves.ema else 0,)),
    ]
    if not serves.accumulation:
        micro, steps = config.accumulation(world_size)
        asked.append(("data.micro_batch", micro, (micro * steps,)))
    return asked


def _check_compiled(config: Config, world_size: int) -> None:
    """Refuses what no graph holds; what one block can do without is left outside of its graph instead."""
    moe, key = config.model.moe, f"parallel.compile={config.parallel.compile}"
    if moe.has_blocks and moe.backend == "tutel":
        raise ValueError(f"{key} does not run model.moe.backend=tutel, whose kernels cannot be traced; use native")
    if config.parallel.compile != "model":
        return
    if not config.task.options.classifies:
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
    """As DeepSpeed: it fills buckets by element counts, so ranks with uneven experts would reduce different ones."""
    moe, model = config.model.moe, config.model
    degrees = Degrees.resolve(config.parallel, moe.num_experts, world_size)
    if len({size for _, size in even_split(moe.num_experts, degrees.expert)}) > 1:
        raise ValueError(
            f"engine.name={config.engine.name} needs as many experts on every rank: "
            f"model.moe.num_experts={moe.num_experts} is not a multiple of parallel.expert={degrees.expert}; use a "
            f"divisor, or engine.name=torch or fairscale"
        )
    for stage, blocks in enumerate(moe.blocks):
        if not any(block >= 0 for block in blocks):
            continue
        dim = model.embed_dim * 2**stage
        for channels in (dim, int(dim * model.mlp_ratio)):
            if channels % degrees.expert_shard:
                raise ValueError(
                    f"engine.name={config.engine.name} needs equal shards of an expert: its {channels} channels in "
                    f"stage {stage} are not a multiple of parallel.expert_shard={degrees.expert_shard}; choose a "
                    f"divisor, or engine.name=torch or fairscale"
                )
