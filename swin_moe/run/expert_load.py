"""What the MoE layers of a model did, over all ranks: load, drops, dead experts, time per phase, bytes sent."""

import torch
import torch.distributed as dist
from torch import nn

from swin_moe.moe import MoELayer
from swin_moe.moe.phases import PHASES, PhaseClock
from swin_moe.parallel.exchange.link import EXPOSED, Link
from swin_moe.parallel.groups import Groups


def moe_layers(model: nn.Module) -> list[tuple[str, MoELayer]]:
    """Returns (name, layer) of every MoE layer, in depth order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoELayer)]


def _prefix(name: str) -> str:
    """Returns what the numbers of a layer begin with."""
    return f"moe/{name.removesuffix('.mlp')}"


@torch.no_grad()
def expert_load(model: nn.Module, groups: Groups) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Returns (numbers, histograms) of the last forward, equal on all ranks; one all-reduce for all layers.

    Per layer: moe/<layer>/{load_cv, dropped_percent, dead_experts, entropy, aux} and the histogram moe/<layer>/load,
    tokens per expert before any drop. load_cv is the standard deviation over the mean of the load.
    """
    layers = [(name, layer.stats) for name, layer in moe_layers(model) if layer.stats is not None]
    if not layers:
        return {}, {}
    rows = []
    for _, stats in layers:
        pairs = stats.demand.sum().double()
        rows.append(
            torch.cat(
                [
                    stats.demand.double(),
                    stats.kept.double(),
                    torch.stack([pairs * stats.entropy.double(), pairs * stats.aux.double()]),
                ]
            )
        )
    table = torch.stack(rows)
    if groups.world_size > 1:
        dist.all_reduce(table, group=groups.world)
    numbers: dict[str, float] = {}
    histograms: dict[str, list[int]] = {}
    for (name, stats), row in zip(layers, table.cpu()):
        count = stats.demand.numel()
        demand, kept = row[:count], row[count : 2 * count]
        tokens = max(1.0, float(demand.sum()))
        prefix = _prefix(name)
        numbers[f"{prefix}/load_cv"] = float(demand.std(correction=0) / demand.mean()) if demand.sum() else 0.0
        numbers[f"{prefix}/dropped_percent"] = 100 * (1 - float(kept.sum()) / tokens)
        numbers[f"{prefix}/dead_experts"] = int((demand == 0).sum())
        numbers[f"{prefix}/entropy"] = float(row[-2]) / tokens
        numbers[f"{prefix}/aux"] = float(row[-1]) / tokens
        histograms[f"{prefix}/load"] = [int(v) for v in demand]
    return numbers, histograms


def start_clocks(model: nn.Module, device: torch.device) -> None:
    """Measures the phases of every MoE layer, and what its rows wait and lose between ranks, until phase_times()."""
    for _, layer in moe_layers(model):
        layer.clock = PhaseClock(device)
    for _, link in links(model):
        link.clock = PhaseClock(device)


@torch.no_grad()
def phase_times(model: nn.Module, groups: Groups) -> dict[str, float]:
    """Returns moe/<layer>/ms_<phase>, milliseconds of forward and backward on the slowest rank; {} without clocks.

    ms_exposed is the part of dispatch, experts and combine in which rows were waited for and nothing was computed.
    Collective: every rank calls it, after the backward, with clocks on all ranks or on none. Stops the clocks.
    """
    layers = [(name, layer, layer.clock) for name, layer in moe_layers(model) if layer.clock is not None]
    if not layers:
        return {}
    travelling = dict(links(model))
    measured = [clock.seconds() for *_, clock in layers]
    for (name, *_), seconds in zip(layers, measured):
        waited = travelling[name].clock if name in travelling else None
        seconds[EXPOSED] = 0.0 if waited is None else waited.seconds().get(EXPOSED, 0.0)
    phases = (*PHASES, EXPOSED)
    table = torch.tensor([[seconds[phase] for phase in phases] for seconds in measured], dtype=torch.float64)
    table = table.to(layers[0][2].device)
    if groups.world_size > 1:
        dist.all_reduce(table, op=dist.ReduceOp.MAX, group=groups.world)
    for _, layer, _ in layers:
        layer.clock = None
    for link in travelling.values():
        link.clock = None
    return {
        f"{_prefix(name)}/ms_{phase}": 1e3 * value
        for (name, *_), row in zip(layers, table.tolist())
        for phase, value in zip(phases, row)
    }


def links(model: nn.Module) -> list[tuple[str, Link]]:
    """Returns (name, link) of every MoE layer whose rows travel between ranks, in depth order."""
    found = ((name, getattr(layer.dispatcher, "link", None)) for name, layer in moe_layers(model))
    return [(name, link) for name, link in found if link is not None]


@torch.no_grad()
def exchange_cost(model: nn.Module, groups: Groups, steps: int) -> dict[str, float]:
    """Returns numbers since the last call, equal on all ranks; one all-reduce for all layers; starts again from zero.

    Per layer: moe/<layer>/sent_bytes and crossing_bytes, what left a rank and what left a node, over all ranks, forward
    and backward, mean of `steps` steps; and where a payload rounds and was measured, payload_error and
    payload_gradient_error: the norm of the rounding error over the norm of the rows.
    """
    found = links(model)
    if not found or steps == 0:
        return {}
    rows = []
    for _, link in found:
        traffic, rounding = link.take()
        nothing = torch.zeros(2)
        sums = [rounding.get(what, nothing).double().cpu() for what in ("rows", "gradients")]
        rows.append(torch.cat([torch.tensor([traffic.sent_bytes, traffic.crossing_bytes]).double(), *sums]))
    table = torch.stack(rows).to(next(model.parameters()).device)
    dist.all_reduce(table, group=groups.world)
    numbers = {}
    for (name, _), (sent, crossing, *sums) in zip(found, table.tolist()):
        prefix = _prefix(name)
        numbers[f"{prefix}/sent_bytes"] = sent / steps
        numbers[f"{prefix}/crossing_bytes"] = crossing / steps
        for key, error, norm in (("payload_error", *sums[:2]), ("payload_gradient_error", *sums[2:])):
            if norm > 0:
                numbers[f"{prefix}/{key}"] = (error / norm) ** 0.5
    return numbers
