"""The sharding table: which part of which parameter a rank holds. Plain data and arithmetic, no torch.

Four users: apply.py (cuts the model), checkpoint (which chunk is mine), reshard (target layout), planner (bytes per
rank).

Layout (ARCHITECTURE.md, section 9): world = expert x expert_shard x expert_data,
rank = (expert_data_index * expert + expert_index) * expert_shard + shard_index.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swin_moe.config import ParallelConfig
from swin_moe.layout import Chunk, even_part

Coordinates = Mapping[str, tuple[int, int]]  # axis -> (index, size)


@dataclass(frozen=True)
class Degrees:
    """Sizes of the axes that the world is the product of."""

    expert: int  # ranks that experts are spread over
    expert_shard: int  # ranks that share one expert
    expert_data: int  # replicas of every expert

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.expert * self.expert_shard * self.expert_data

    @classmethod
    def resolve(cls, parallel: ParallelConfig, num_experts: int, world_size: int) -> "Degrees":
        """Returns the degrees for a world; 0 in the config is filled in.

        expert: the largest number of ranks that divides both the experts and the ranks. expert_shard: ranks / experts
        where ranks outnumber experts, divide evenly and no expert shares its rank with another; else 1. expert_data:
        the rest.

        Raises:
            ValueError: The world cannot hold the layout.
        """
        expert, shard = parallel.expert, parallel.expert_shard
        if expert > num_experts:
            raise ValueError(
                f"parallel.expert={expert} is more than model.moe.num_experts={num_experts}; "
                f"allowed: 1 to {num_experts} (parallel.expert_shard spreads one expert over ranks)"
            )
        if shard == 0:
            shard = 1
            if world_size > num_experts and world_size % num_experts == 0 and expert in (0, num_experts):
                shard = world_size // num_experts
        if world_size % shard:
            raise ValueError(f"parallel.expert_shard={shard} does not divide the world of {world_size} ranks")
        if expert == 0:
            expert = math.gcd(world_size // shard, num_experts)
        if world_size % (expert * shard):
            raise ValueError(
                f"parallel.expert={expert} x parallel.expert_shard={shard} = {expert * shard} does not divide "
                f"the world of {world_size} ranks"
            )
        return cls(expert, shard, world_size // (expert * shard))

    def coordinates(self, rank: int) -> Coordinates:
        """Returns where a rank stands on every axis."""
        rest, shard = divmod(rank, self.expert_shard)
        data, expert = divmod(rest, self.expert)
        return {
            "expert": (expert, self.expert),
            "expert_shard": (shard, self.expert_shard),
            "expert_data": (data, self.expert_data),
        }


def describe_placement(degrees: Degrees, hosts: Sequence[int]) -> str:
    """Returns whether the ranks that exchange tokens share a node, and if not, why; rank r runs on node hosts[r]."""
    size = degrees.expert * degrees.expert_shard
    groups = [hosts[start : start + size] for start in range(0, len(hosts), size)]
    most = max(len(set(group)) for group in groups)
    ranks = f"{size} consecutive ranks" if size > 1 else "1 rank"
    if most == 1:
        return f"an expert group is {ranks} of one node"
    room = min(hosts.count(node) for node in set(hosts))
    if sum(a != b for a, b in zip(hosts, hosts[1:])) >= len(set(hosts)):
        reason = "consecutive ranks are on different nodes: let the hostfile fill a node before the next"
    elif size > room:
        reason = f"it does not fit a node of {room} ranks"
    else:
        reason = f"nodes of {room} ranks are not a multiple of it: change parallel.expert or parallel.expert_shard"
    return f"an expert group is {ranks} on up to {most} nodes, because {reason}"


@dataclass(frozen=True)
class Placement:
    """The axis that each dim of a parameter is cut along; None or missing = not cut. Replicated over all other axes."""

    axes: tuple[str | None, ...] = ()

    @property
    def is_expert(self) -> bool:
        """True for parameters that differ between ranks, so that their gradients are not averaged over the world."""
        return "expert" in self.axes


REPLICATED = Placement()
# Dim 1 is the hidden channels H of both weights and fc1_bias, and the channels D of fc2_bias.
_EXPERT = Placement(("expert", "expert_shard"))
# Name pattern -> placement, the first match counts. Also matches optimizer state and averages ("ema/<name>").
TABLE: tuple[tuple[str, Placement], ...] = ((r"(^|[./])experts\.fc[12]_(weight|bias)$", _EXPERT),)


def placement(name: str) -> Placement:
    """Returns the placement of a parameter; dense parameters are replicated."""
    return next((place for pattern, place in TABLE if re.search(pattern, name)), REPLICATED)


def cut_dim(shape: tuple[int, ...], parts: int) -> int:
    """Returns the dim along which a rank's expert tensor is cut over its replicas: the first that divides evenly.

    FSDP2 cuts other dims than 0 only into equal parts; with one local expert dim 0 would leave ranks empty.
    """
    return next((dim for dim, size in enumerate(shape) if size % parts == 0), 0)


def sub_chunk(chunk: Chunk, dim: int, index: int, parts: int) -> Chunk:
    """Returns part `index` of a box that is cut along `dim` as torch.chunk cuts; may be empty."""
    start, length = even_part(chunk.size[dim], parts, index)
    offset, size = list(chunk.offset), list(chunk.size)
    offset[dim] += start
    size[dim] = length
    return Chunk(tuple(offset), tuple(size))


def local_chunk(name: str, shape: tuple[int, ...], coordinates: Coordinates) -> Chunk:
    """Returns the box of a parameter of this global shape that a rank holds; may be empty. Splits like torch.chunk."""
    offset, size = [0] * len(shape), list(shape)
    for dim, axis in enumerate(placement(name).axes):
        if axis is not None:
            index, parts = coordinates[axis]
            offset[dim], size[dim] = even_part(shape[dim], parts, index)
    return Chunk(tuple(offset), tuple(size))
