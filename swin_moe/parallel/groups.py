"""Process groups: the only place that starts torch.distributed, calls new_group or reads the launcher's variables."""

import datetime
import os
import socket
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from swin_moe.config import ParallelConfig
from swin_moe.parallel.exchange.topology import Topology
from swin_moe.parallel.meeting import meet
from swin_moe.parallel.sharding import Coordinates, Degrees

__all__ = ["Degrees", "Groups", "build_groups", "ensure_distributed", "init_distributed", "single_process_groups"]


@dataclass(frozen=True)
class Groups:
    """This rank's place in the world and the groups it communicates in; a group of one rank is None."""

    world_size: int
    rank: int
    degrees: Degrees
    world: ProcessGroup | None = None
    expert: ProcessGroup | None = None  # the expert x expert_shard consecutive ranks that exchange tokens
    shard: ProcessGroup | None = None  # the consecutive ranks that hold parts of the same experts
    expert_data: ProcessGroup | None = None  # the ranks that hold what I hold
    routing: ProcessGroup | None = None  # the consecutive ranks whose images compete for slots
    node: ProcessGroup | None = None  # the ranks of my expert group on my node, where built for two hops
    crossing: ProcessGroup | None = None  # the ranks of my expert group that I exchange rows between nodes with
    checkpoint: ProcessGroup | None = None  # the world again, gloo: for the thread that saves while training goes on

    hosts: tuple[int, ...] = (0,)  # per rank, the number of its node

    def __deepcopy__(self, memo: dict[int, Any]) -> "Groups":
        """Returns itself: a copied model talks to the same ranks, and process groups cannot be copied."""
        return self

    @property
    def coordinates(self) -> Coordinates:
        """Axis -> (index, size) of this rank, as sharding.py wants it."""
        return self.degrees.coordinates(self.rank)

    @property
    def expert_size(self) -> int:
        """Ranks in the expert group."""
        return self.degrees.expert * self.degrees.expert_shard

    @property
    def expert_rank(self) -> int:
        """This rank's number in the expert group."""
        return self.rank % self.expert_size

    @property
    def topology(self) -> Topology:
        """The nodes of the expert group."""
        start, hosts = self.rank - self.expert_rank, self.hosts
        if len(hosts) != self.world_size:  # built without ranks
            hosts = (0,) * self.world_size
        return Topology(hosts[start : start + self.expert_size])


def init_distributed(device: torch.device, *, timeout: float = 600.0, patience: float = 60.0) -> tuple[int, int]:
    """Returns (rank, world size) after joining the world that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    gloo for the CPU, nccl (and gloo for CPU tensors) for CUDA; gloo too where ranks share a CUDA device. Without the
    variables, or in a world of one, nothing is started.

    Args:
        timeout: Seconds until a collective that not all ranks joined fails.
        patience: Seconds until a rank says whom it waits for while the world assembles.

    Raises:
        ValueError: Some of the variables are missing, the port is in use, or a rank does not come.
    """
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    world_size = number_of("WORLD_SIZE", 1)
    if world_size == 1:
        return 0, 1
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"WORLD_SIZE={world_size}, but {', '.join(missing)} is not set; start with python -m launcher")
    backend = communication_backend(device, number_of("LOCAL_WORLD_SIZE", world_size))
    rank, store = number_of("RANK"), None
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun hosts a store at this port already
        address, port = os.environ["MASTER_ADDR"], number_of("MASTER_PORT")
        store = meet(rank, world_size, address, port, patience=patience, timeout=timeout)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout),
        device_id=device if "nccl" in backend and device.index is not None else None,
    )
    return dist.get_rank(), world_size


def number_of(name: str, default: int = 0) -> int:
    """Returns a variable of the environment that tells about the world; raises ValueError where it is no number."""
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"environment variable {name} must be a whole number >= 0, got {text!r}")
    if len(text) > 1000:  # int() takes 4,300
        raise ValueError(f"environment variable {name} must be a whole number >= 0, got one of {len(text)} digits")
    return int(text)


def ensure_distributed(device: torch.device) -> None:
    """Starts torch.distributed for one process alone, where nothing is started: libraries that want it always."""
    if not dist.is_initialized():
        dist.init_process_group(communication_backend(device, 1), rank=0, world_size=1, store=dist.HashStore())


def communication_backend(device: torch.device, ranks_here: int) -> str:
    """Returns what torch.distributed is started with; `ranks_here` is the number of ranks on this host.

    NCCL refuses two ranks on one device; gloo carries tensors of a shared one through host memory.
    """
    if device.type != "cuda" or ranks_here > torch.cuda.device_count():
        return "gloo"
    return "cpu:gloo,cuda:nccl"


def meeting_store() -> dist.Store:
    """Returns the store that the ranks of the started world met at, hosted by rank 0 (or by torchrun)."""
    return dist.distributed_c10d._get_default_store()


def single_process_groups() -> Groups:
    """Returns the groups of a world of one rank, for which no process group is needed."""
    return Groups(1, 0, Degrees(1, 1, 1))


def build_groups(
    parallel: ParallelConfig,
    num_experts: int,
    device: torch.device,
    *,
    routing_ranks: int = 1,
    timeout: float = 600.0,
    two_hops: bool = False,
    hosts: tuple[int, ...] | None = None,
    saves_in_background: bool = False,
) -> Groups:
    """Returns this rank's groups. Every rank of the world has to call it, with the same arguments.

    Args:
        device: Where this rank computes. gloo and NCCL groups do not depend on it.
        routing_ranks: Consecutive ranks whose images form one routing group, Config.routing_ranks; divides the world.
        timeout: Seconds until a collective that not all ranks of a group joined fails; sub-groups do not inherit the
            world's.
        two_hops: Also build the groups of HierarchicalTransport, where an expert group spans nodes.
        hosts: The number of every rank's node, instead of asking the ranks.
        saves_in_background: Checkpoints are saved by a thread, whose collectives must not mix with training's.

    Raises:
        ValueError: The world cannot hold the layout.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    degrees = Degrees.resolve(parallel, num_experts, world_size)
    if not dist.is_initialized():
        return single_process_groups()
    rank = dist.get_rank()
    span, shard = degrees.expert * degrees.expert_shard, degrees.expert_shard
    expert = [list(range(start, start + span)) for start in range(0, world_size, span)]
    shards = [list(range(start, start + shard)) for start in range(0, world_size, shard)]
    replicas = [list(range(start, world_size, span)) for start in range(span)]
    routing = [list(range(start, start + routing_ranks)) for start in range(0, world_size, routing_ranks)]
    hosts = hosts or _gather_hosts(world_size, device)
    inside, between = _two_hops(expert, hosts) if two_hops else ([], [])
    lists = {"expert": expert, "shard": shards, "expert_data": replicas, "routing": routing, "node": inside}
    own = {name: _group_of(rank, ranks, timeout) for name, ranks in (lists | {"crossing": between}).items()}
    groups = Groups(world_size, rank, degrees, dist.group.WORLD, hosts=hosts, **own)
    if saves_in_background:
        saving = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        groups = replace(groups, checkpoint=saving)
    return groups


def _two_hops(expert: list[list[int]], hosts: tuple[int, ...]) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the ranks that exchange rows inside nodes, and those that do between nodes, of all expert groups."""
    inside, between = [], []
    for ranks in expert:
        topology = Topology(tuple(hosts[rank] for rank in ranks))
        if not topology.is_flat:
            inside += [[ranks[0] + r for r in node] for node in topology.nodes]
            between += [[ranks[0] + r for r in crossing] for crossing in topology.crossings]
    return inside, between


def _gather_hosts(world_size: int, device: torch.device) -> tuple[int, ...]:
    """Returns the number of every rank's node, counted in the order of ranks."""
    mine = torch.tensor([zlib.crc32(socket.gethostname().encode())], device=device)
    everyone = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(everyone, mine)
    names = [int(name) for name in everyone]
    return tuple(list(dict.fromkeys(names)).index(name) for name in names)


def _group_of(rank: int, rank_lists: list[list[int]], timeout: float) -> ProcessGroup | None:
    """Returns the group that holds `rank`, None if it is alone; every rank has to create every group, in one order."""
    mine = None
    for ranks in rank_lists:
        if len(ranks) == 1:
            continue
        whole = len(ranks) == dist.get_world_size()
        group = dist.group.WORLD if whole else dist.new_group(ranks, timeout=datetime.timedelta(seconds=timeout))
        if rank in ranks:
            mine = group
    return mine
