"""model.moe.tune=measure: transport, payload and overlap of every MoE layer from measured times, kept on disk.

The dictionary of Tutel's paper (arXiv:2206.03382, section 3.3: shape -> parallelism, algorithm, pipelining degree),
which its published code never had. Every distinct layer shape is measured once per machine and layout: the candidates
take turns on random rows, spread evenly over the experts, with real exchanges and products, forward and backward.

Shape legend: N rows that a rank sends to experts in one forward, D channels, E experts.
"""

import copy
import logging
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swin_moe import choice_cache
from swin_moe.config import MoEConfig
from swin_moe.moe.experts import GroupedExperts
from swin_moe.moe.layer import MoELayer
from swin_moe.moe.routing import Routing
from swin_moe.parallel.exchange.link import Link
from swin_moe.parallel.exchange.payload import PAYLOADS
from swin_moe.parallel.exchange.transport import build_transport
from swin_moe.parallel.groups import Groups

LOGGER = logging.getLogger("swin_moe")
OPTION = "model.moe.tune"
OVERLAPS = (1, 2, 4)
ROUNDS = 5  # after one to warm up
MARGIN = 0.03  # a candidate has to be this much faster than a simpler one: noise must not cost exactness


@dataclass(frozen=True)
class Candidate:
    """What can be chosen."""

    transport: str
    payload: str
    overlap: int

    def __str__(self) -> str:
        return f"{self.transport}, payload {self.payload}, overlap {self.overlap}"


@dataclass(frozen=True)
class LayerShape:
    """What tells the cost of one layer from another's."""

    rows: int  # N
    dim: int
    hidden_dim: int
    num_experts: int
    dtype: str  # of the rows


def candidates(config: MoEConfig, groups: Groups, dtype: torch.dtype) -> list[Candidate]:
    """Returns what may be chosen, the simplest first; payloads up to model.moe.payload, where they save bytes."""
    transports = ["linear"] if groups.topology.is_flat else ["linear", "hierarchical"]
    allowed = list(PAYLOADS)[: list(PAYLOADS).index(config.payload) + 1]
    row = torch.empty((1, 64), dtype=dtype)
    payloads = [name for name in allowed if (codec := PAYLOADS[name]) is None or codec.applies(row)]
    return [Candidate(t, p, o) for p in payloads for t in transports for o in OVERLAPS]


def tune(layers: Iterable[tuple[MoELayer, int]], groups: Groups, *, dtype: torch.dtype, device: torch.device) -> None:
    """Gives every layer the link that is fastest for it. Collective; all ranks choose alike.

    Nothing is measured where all experts are here, or where rank 0 finds the choice on disk.

    Args:
        layers: (layer of a parallelized model, N); parameters may be on meta. Needs memory for one more layer's experts
            of this rank and their gradients.
        dtype: Of the rows, as autocast makes them.
    """
    if groups.expert_size == 1:
        return
    shapes: dict[LayerShape, list[MoELayer]] = {}
    for layer, rows in layers:
        experts = layer.experts
        sizes = (rows, experts.dim, experts.hidden_dim, experts.num_experts)
        shapes.setdefault(LayerShape(*sizes, str(dtype).removeprefix("torch.")), []).append(layer)
    for shape, alike in shapes.items():
        config = alike[0].config
        directory = Path(config.tune_cache) if config.tune_cache else choice_cache.default_directory()
        options = candidates(config, groups, dtype)
        key = {**asdict(shape), "dispatcher": config.backend, **_setting(groups, device)}
        key["candidates"] = [str(c) for c in options]
        number = _agree(_stored(directory, key, options) if groups.rank == 0 else -1, groups, device)
        how = "kept from an earlier start"
        if number < 0:
            seconds = _measure(shape, alike[0], options, groups, device, dtype)
            number, how = choose(seconds), "measured"
            if groups.rank == 0:
                _report(shape, options, seconds, number)
                value = {"choice": str(options[number]), "seconds": dict(zip(map(str, options), seconds))}
                choice_cache.write(directory, key, value, option=OPTION)
        for layer in alike:
            dispatcher: Any = layer.dispatcher  # one with a link: others have nothing to tune
            dispatcher.link = _link(options[number], groups, f"model.moe.tune=measure: {how}")


def choose(seconds: list[float]) -> int:
    """Returns the number of the first candidate that is within MARGIN of the fastest."""
    return next(i for i, s in enumerate(seconds) if s <= min(seconds) * (1 + MARGIN))


def _link(candidate: Candidate, groups: Groups, reason: str) -> Link:
    return Link(build_transport(candidate.transport, groups)[0], candidate.payload, candidate.overlap, reason)


def _setting(groups: Groups, device: torch.device) -> dict[str, Any]:
    """Returns what besides the layer a time depends on; rank 0's hardware stands for all."""
    degrees = groups.degrees
    return {
        "world": groups.world_size,
        "layout": [degrees.expert, degrees.expert_shard, degrees.expert_data],
        "hosts": list(groups.hosts),
        "backend": str(dist.get_backend(groups.expert)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else choice_cache.cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _stored(directory: Path, key: dict[str, Any], options: list[Candidate]) -> int:
    """Returns the number of the candidate on disk, or -1."""
    value = choice_cache.read(directory, key, option=OPTION)
    names = [str(option) for option in options]
    return names.index(value["choice"]) if value and value.get("choice") in names else -1


def _agree(number: int, groups: Groups, device: torch.device) -> int:
    """Returns rank 0's number."""
    found = torch.tensor([number if groups.rank == 0 else 0], device=device)
    dist.all_reduce(found, group=groups.world)
    return int(found)


def even_routing(num_tokens: int, num_experts: int, *, top_k: int = 1, device: torch.device) -> Routing:
    """Returns a routing that keeps every pair and gives experts equally many, but for the remainder."""
    pair = torch.arange(num_tokens * top_k, device=device).view(top_k, num_tokens).t()
    demand = torch.bincount(pair.flatten() % num_experts, minlength=num_experts)[None]
    gate = torch.full(pair.shape, 1.0 / top_k, device=device)
    keep = torch.ones(pair.shape, dtype=torch.bool, device=device)
    slot = pair.div(num_experts, rounding_mode="floor")
    capacity = int(demand.max()) if num_tokens else 0
    return Routing(pair % num_experts, slot, gate, keep, capacity, demand, demand, max(num_tokens, 1))


def random_experts(experts: GroupedExperts, device: torch.device) -> GroupedExperts:
    """Returns a copy of this rank's part with random weights, also of experts on meta."""
    twin = copy.deepcopy(experts).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)  # the run's own random state is left alone
    for parameter in twin.parameters():
        nn.init.normal_(parameter, std=0.02, generator=generator)
    return twin


def _measure(
    shape: LayerShape,
    layer: MoELayer,
    options: list[Candidate],
    groups: Groups,
    device: torch.device,
    dtype: torch.dtype,
) -> list[float]:
    """Returns the seconds of each candidate, the slowest rank's median; the same numbers on all ranks."""
    experts = random_experts(layer.experts, device)
    routing = even_routing(shape.rows, shape.num_experts, device=device)
    generator = torch.Generator().manual_seed(groups.rank)
    x = torch.randn((shape.rows, shape.dim), generator=generator).to(device=device, dtype=dtype)
    dispatcher: Any = copy.deepcopy(layer.dispatcher)
    links = [_link(option, groups, "") for option in options]
    seconds: list[list[float]] = [[] for _ in options]
    for number in range(ROUNDS + 1):
        for link, times in zip(links, seconds):
            dispatcher.link = link
            dist.barrier(group=groups.world)
            start = time.perf_counter()
            layer_pass(dispatcher, experts, x, routing)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                times.append(time.perf_counter() - start)
    medians = torch.tensor([statistics.median(times) for times in seconds], dtype=torch.float64, device=device)
    dist.all_reduce(medians, op=dist.ReduceOp.MAX, group=groups.world)
    return medians.tolist()


def layer_pass(dispatcher: Any, experts: GroupedExperts, x: Tensor, routing: Routing) -> None:
    """Runs what a layer does between its router and its output, and the backward of it."""
    x = x.detach().requires_grad_()
    dispatched = dispatcher.dispatch(x, routing, None)
    y = experts(dispatched.tokens, dispatched.counts, None, dispatched.slices)
    dispatcher.combine(y, dispatched, routing.gate.to(x.dtype)).sum().backward()
    experts.zero_grad()


def _report(shape: LayerShape, options: list[Candidate], seconds: list[float], number: int) -> None:
    LOGGER.info(OPTION + ": %s", ", ".join(f"{name} {value}" for name, value in asdict(shape).items()))
    for i, (option, s) in enumerate(zip(options, seconds)):
        LOGGER.info("  %8.2f ms  %s%s", 1e3 * s, option, "  <- chosen" if i == number else "")
