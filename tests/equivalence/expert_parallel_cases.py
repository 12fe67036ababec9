"""What every rank runs to compare the spread layer with the same layer in one process, and the table of layouts."""

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from swin_moe.config import MoEConfig, ParallelConfig
from swin_moe.moe import MoELayer
from swin_moe.parallel.apply import (
    dense_parameters,
    expert_parameters,
    parallelize,
    parameter_layout,
    reduce_expert_gradients,
)
from swin_moe.parallel.clip import clip_by_norm, global_grad_norm
from swin_moe.parallel.groups import Groups, build_groups
from swin_moe.randomness import RandomContext

DIM, TOKENS, LAYER, NAME = 6, 4, 5, "layers.0.blocks.1.mlp"
NOISY = {"dropout": 0.3, "gate_noise": 2.0}


@dataclass(frozen=True)
class Case:
    """One layout and one kind of layer; images: per rank."""

    images: tuple[int, ...]
    parallel: ParallelConfig = ParallelConfig()
    experts: int = 4
    options: dict = field(default_factory=dict)
    hidden: int = 8
    fc2_bias: bool = True
    starve: int | None = None  # an expert that no token chooses
    recompute: bool = False
    routing_ranks: int = 1  # consecutive ranks that hold one routing group
    hosts: tuple[int, ...] | None = None  # nodes that the ranks pretend to be on

    @property
    def config(self) -> MoEConfig:
        common = {"num_experts": self.experts, "cosine_dim": 5, "capacity_factor": 1.0, "aux_loss_weight": 1.0}
        return MoEConfig(**{**common, **self.options})


def spread(expert: int = 0, shard: int = 0) -> ParallelConfig:
    return ParallelConfig(expert=expert, expert_shard=shard)


GROUPS = {"capacity_scope": "images", "group_images": 2}


def together(images: tuple[int, ...], ranks: int, *, parallel: ParallelConfig | None = None, **options) -> Case:
    """Returns a case of 2 images a rank (fewer at the end of the batch) whose groups span `ranks` ranks."""
    recompute = options.pop("recompute", False)
    options = {"capacity_scope": "images", "group_images": 2 * ranks, **NOISY, **options}
    return Case(images, parallel or spread(), options=options, recompute=recompute, routing_ranks=ranks)


def every_kind(images: tuple[int, ...], ranks: int) -> dict[str, Case]:
    """Returns cases of every router option that a routing group over ranks has to get right."""
    kinds = itertools.product((1, 2), (False, True), ("load_importance", "gshard"), (0.5, 1.25, 0.0, -0.5))
    return {
        f"group on {ranks} ranks: top-{k}, {loss}, capacity {factor}{', by confidence' if confident else ''}": together(
            images, ranks, top_k=k, batch_prioritized=confident, balance_loss=loss, capacity_factor=factor
        )
        for k, confident, loss, factor in kinds
    }


SIGMOID = {"scores": "sigmoid", "balance_loss": "gshard", "top_k": 2, "normalize_gate": True, **NOISY}
LIMITED: dict[str, Any] = {**SIGMOID, "expert_groups": 2, "group_limit": 1, "z_loss_weight": 0.5}
EXPERTS_CHOOSE = {"choice": "expert", "balance_loss": "none", "top_k": 2, **NOISY}
SOFT = {"choice": "soft", "balance_loss": "none", "slots": 2, **NOISY}
GLOBAL = {**GROUPS, "balance_scope": "global", "top_k": 2, **NOISY}


def two_hops(hosts: tuple[int, ...], images: tuple[int, ...], *layout: int, **fields) -> Case:
    """Returns a case on ranks that pretend to be on these nodes, with rows sent inside nodes and then between them."""
    options = {"transport": "hierarchical", "overlap": fields.pop("overlap", 1), "top_k": 2, **NOISY}
    return Case(images, spread(*layout), options=options, hosts=hosts, **{"experts": 8, **fields})


def sliced(images: tuple[int, ...], *layout: int, overlap: int = 2, **fields) -> Case:
    """Returns a case whose rows travel in slices."""
    return Case(images, spread(*layout), options={"overlap": overlap, "top_k": 2, **NOISY}, **{"experts": 8, **fields})


CASES = {
    1: {
        "one rank": Case((3,), options=NOISY),
        "no tokens": Case((0,)),
    },
    2: {
        "top-1": Case((2, 2), options=NOISY),
        "top-2": Case((2, 2), options={"top_k": 2, "normalize_gate": True, **NOISY}),
        "cosine, gshard": Case((2, 3), options={"router": "cosine", "balance_loss": "gshard", **NOISY}),
        "token order": Case((3, 1), options={"batch_prioritized": False, "capacity_factor": 0.5}),
        "data": Case((2, 1), spread(1), options=NOISY),
        "shards": Case((2, 2), spread(1, 2), options={"top_k": 2, **NOISY}),
        "one expert": Case((2, 1), experts=1),
        "3 experts over 2 ranks": Case((2, 3), spread(2), experts=3, options={"top_k": 2, **NOISY}),
        "a rank without tokens": Case((0, 3), options={"top_k": 2, **NOISY}),
        "a rank without tokens, shards": Case((3, 0), spread(1, 2), hidden=9, fc2_bias=False),
        "no tokens at all": Case((0, 0), options=NOISY),
        "a starved expert": Case((2, 2), starve=3),
        "recomputed": Case((2, 0), options={"top_k": 2, **NOISY}, recompute=True),
        "groups of images": Case((4, 2), options={**GROUPS, **NOISY}),
        "by need": Case((2, 1), options={"capacity_factor": 0.0, "top_k": 2, **NOISY}),
        "nothing gets a slot": Case((2, 2), options={"capacity_factor": 0.1}),
        "two hops without levels": two_hops((0, 1), (2, 1)),
        "slices": sliced((2, 1)),
        "slices, more than rows": sliced((1, 0), overlap=9),
        "slices, no tokens at all": sliced((0, 0)),
        "slices, 3 experts over 2 ranks": sliced((2, 3), 2, experts=3, overlap=3),
        "slices, shards": sliced((2, 1), 1, 2, hidden=9),
        "slices, recomputed": sliced((2, 1), overlap=3, recompute=True),
        **every_kind((2, 1), 2),
        "group with an empty rank": together((2, 0), 2, top_k=2, capacity_factor=0.5),
        "group of nothing": together((0, 0), 2, top_k=2),
        "group, recomputed": together((2, 1), 2, top_k=2, normalize_gate=True, capacity_factor=0.5, recompute=True),
        "group without experts elsewhere": together((2, 2), 2, parallel=spread(1), capacity_factor=0.5),
        "group, no slots": together((2, 2), 2, capacity_factor=0.1),
        "sigmoid with a bias": Case((2, 1), options=SIGMOID),
        "sigmoid, group limit, group on 2 ranks": together((2, 1), 2, **LIMITED),
        "experts choose": Case((2, 3), options=EXPERTS_CHOOSE),
        "experts choose, shards, recomputed": Case((3, 0), spread(1, 2), options=EXPERTS_CHOOSE, recompute=True),
        "soft": Case((2, 1), options=SOFT),
        "soft, a rank without images": Case((0, 2), options={**SOFT, "router": "cosine"}, recompute=True),
        "shared expert": Case((2, 1), options={"shared_experts": 2, **NOISY}),
        "balance over all ranks": Case((4, 2), options=GLOBAL),
        "balance over all ranks, gshard": Case((4, 0), options={**GLOBAL, "balance_loss": "gshard"}, recompute=True),
    },
    4: {
        "one expert a rank": Case((1, 2, 1, 1), options=NOISY),
        "2 experts a rank, top-2": Case((2, 1, 3, 0), experts=8, options={"top_k": 2, **NOISY}),
        "expert 2 x data 2": Case((2, 1, 0, 3), spread(2), options={"top_k": 2, **NOISY}),
        "expert 2 x shard 2": Case((2, 1, 1, 1), spread(2, 2), options={"top_k": 2, **NOISY}),
        "expert 2 x shard 2, automatic": Case((2, 1, 1, 1), experts=2, hidden=9, options=NOISY),
        "shard 2 x data 2": Case((2, 1, 0, 1), spread(1, 2), experts=3, options=NOISY),
        "shard 4": Case((1, 2, 0, 1), spread(1, 4), hidden=9, options=NOISY),  # 9 over 4 is 3, 3, 3, 0
        "5 experts over 4 ranks": Case((1, 2, 1, 2), spread(4), experts=5, options={"top_k": 3, **NOISY}),  # 2, 2, 1, 0
        "5 experts over 4 ranks, recomputed": Case((1, 0, 1, 2), spread(4), experts=5, options=NOISY, recompute=True),
        "a starved rank": Case((1, 1, 1, 1), starve=2),
        "groups of images": Case((2, 4, 2, 2), spread(2), options={**GROUPS, "top_k": 2, **NOISY}),
        "3 experts": Case((1, 2, 1, 1), experts=3),  # automatic: data only
        "two hops, 2 + 2 ranks": two_hops((0, 0, 1, 1), (2, 1, 3, 0)),
        "two hops, 3 + 1 ranks": two_hops((0, 0, 0, 1), (2, 1, 0, 1)),
        "two hops, 1 + 3 ranks": two_hops((0, 1, 1, 1), (0, 1, 2, 1), 4, experts=5),
        "two hops, ranks in turn": two_hops((0, 1, 0, 1), (1, 2, 1, 1), recompute=True),
        "two hops, 1 + 2 + 1 ranks": two_hops((0, 1, 1, 2), (1, 2, 1, 1), experts=4),
        "two hops, shards": two_hops((0, 0, 0, 1), (1, 2, 1, 1), 2, 2, hidden=9),
        "two hops in groups of two": two_hops((0, 1, 1, 1), (1, 2, 1, 1), 2),
        "two hops, no tokens at all": two_hops((0, 0, 0, 1), (0, 0, 0, 0)),
        "slices, two hops, 3 + 1 ranks": two_hops((0, 0, 0, 1), (2, 1, 0, 1), overlap=3),
        "slices, two hops, recomputed": two_hops((0, 1, 1, 1), (2, 1, 0, 1), overlap=2, recompute=True),
        "slices, 5 experts over 4 ranks": sliced((1, 2, 1, 2), 4, experts=5),
        "slices, expert 2 x data 2": sliced((2, 1, 0, 3), 2, overlap=4),
        **every_kind((2, 2, 2, 1), 2),
        "group on 4 ranks": together((2, 2, 1, 0), 4, top_k=2, capacity_factor=0.5),
        "group on 4 ranks, recomputed": together((2, 2, 2, 2), 4, router="cosine", top_k=2, recompute=True),
        "group on 4 ranks, expert 2 x data 2": together(
            (2, 2, 2, 1), 4, parallel=spread(2), balance_loss="gshard", capacity_factor=0.5
        ),
        "sigmoid, group limit": Case((1, 2, 0, 1), options=LIMITED),
        "sigmoid, group on 2 of 4 ranks": together((2, 2, 2, 1), 2, parallel=spread(2), **SIGMOID),
        "experts choose": Case((1, 2, 0, 1), options=EXPERTS_CHOOSE),
        "experts choose, groups of images": Case((2, 4, 2, 1), spread(2), options={**EXPERTS_CHOOSE, **GROUPS}),
        "soft": Case((1, 2, 0, 1), options=SOFT),
        "soft, 5 experts over 2 x 2 ranks": Case((1, 2, 1, 1), spread(2, 2), experts=5, options=SOFT),
        "shared expert, expert 2 x data 2": Case((1, 2, 0, 1), spread(2), options={"shared_experts": 1, **NOISY}),
        "balance over all ranks": Case((2, 4, 2, 1), spread(2), options=GLOBAL),
        "balance over all ranks, groups on 2": together(
            (2, 2, 2, 1), 2, balance_scope="global", balance_loss="gshard", top_k=2, capacity_factor=0.5
        ),
        "balance of sigmoid shares over all ranks": Case((2, 4, 2, 0), options={**GLOBAL, **SIGMOID}),
        "a group of nothing": together((2, 2, 0, 0), 2, parallel=spread(2, 2), top_k=2, capacity_factor=0.5),
    },
}


def build(case: Case) -> MoELayer:
    return MoELayer(DIM, case.hidden, case.config, fc2_bias=case.fc2_bias, layer=LAYER, init_std=0.5)


class Net(torch.nn.Module):
    """A MoE layer at the name it has in a network, behind a dense layer."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(DIM, DIM)
        self.mlp = layer

    def initialize(self, case: Case) -> "Net":
        with torch.no_grad():
            self.dense.weight.copy_(torch.eye(DIM))
            self.dense.bias.zero_()
        self.mlp.init_weights(3, NAME)
        if self.mlp.router.balance is not None:
            with torch.no_grad():
                self.mlp.router.balance.bias.copy_(torch.linspace(-0.2, 0.2, case.experts))
        self.double()
        if case.starve is not None:
            with torch.no_grad():
                self.mlp.router.get_parameter("weight")[case.starve] = -50.0  # inputs are positive in such a case
        return self

    def run(self, x, seen, random, share, recompute=False):
        """Returns (y, sum of y * seen + share * aux)."""
        h = self.dense(x)
        y, aux = checkpoint(self.mlp, h, random, use_reentrant=False) if recompute else self.mlp(h, random=random)
        return y, (y * seen).sum() + share * aux


def data(case: Case) -> tuple[list, list]:
    """Returns per rank the inputs and the weights of the outputs in the loss."""
    generator = torch.Generator().manual_seed(sum(case.images))
    shape = (sum(case.images), TOKENS, DIM)
    x, seen = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return list((x.abs() if case.starve is not None else x).split(case.images)), list(seen.split(case.images))


def run_alone(case: Case) -> dict:
    """Returns outputs, gradients and norm of the whole layer, on every rank's batch by itself (images: all at once)."""
    net = Net(build(case)).initialize(case)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    xs, seens = data(case)
    xs = [x.requires_grad_() for x in xs]
    sample, total, world = torch.arange(sum(case.images)), max(sum(case.images), 1), len(case.images)
    if case.config.capacity_scope == "images":
        y, loss = net.run(torch.cat(xs), torch.cat(seens), RandomContext(7, 3, sample), world)
        ys, losses = y.split(case.images), (loss,)
    else:
        runs = [
            net.run(x, seen, RandomContext(7, 3, part), len(x) * world / total)
            for x, seen, part in zip(xs, seens, sample.split(case.images))
        ]
        ys, losses = zip(*runs)
    (sum(losses) / world).backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    stats = net.mlp.stats
    assert stats is not None, "it has just run"
    whole = {"aux": stats.aux, "dropped": stats.dropped}  # means something where all ran at once
    return {
        "whole": whole,
        "y": ys,
        "x_grad": [x.grad * world for x in xs],
        "weights": weights,
        "grads": grads,
        "norm": norm,
    }


def groups_of(case: Case) -> Groups:
    """Returns the process groups of a case."""
    return build_groups(
        case.parallel,
        case.experts,
        torch.device("cpu"),
        routing_ranks=case.routing_ranks,
        two_hops=case.config.transport == "hierarchical",
        hosts=case.hosts,
    )


def run_spread(case: Case) -> dict:
    """Returns this rank's largest differences from the layer run alone, and its gradient norm's bits."""
    expected = run_alone(case)
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = groups_of(case)
    with torch.device("meta"):
        net = Net(build(case))
    net = parallelize(net, case.parallel, groups).to_empty(device="cpu").initialize(case)
    layout = parameter_layout(net, groups)
    own = {name: tuple(slice(o, o + n) for o, n in zip(c.offset, c.size)) for name, (_, c) in layout.items()}
    assert all(layout[n][0] == tuple(w.shape) for n, w in expected["weights"].items())
    errors = {"weights": max(error(p, expected["weights"][n][own[n]]) for n, p in net.named_parameters())}

    xs, seens = data(case)
    x, seen = xs[rank].requires_grad_(), seens[rank]
    sample = torch.arange(sum(case.images)).split(case.images)[rank]
    share = len(x) * world / max(sum(case.images), 1)
    y, loss = net.run(x, seen, RandomContext(7, 3, sample), share, case.recompute)
    loss.backward()
    stats = net.mlp.stats
    assert stats is not None, "it has just run"
    if case.config.capacity_scope == "images":
        found = torch.stack([stats.aux * share / world, stats.dropped.double()])
        dist.all_reduce(found)
        wanted = expected["whole"]
        errors |= {"aux": error(found[0], wanted["aux"]), "dropped": error(found[1], wanted["dropped"])}
    reduce_expert_gradients(net, groups, world)
    dense = [(n, p) for n, p in dense_parameters(net) if p.requires_grad]
    for _, p in dense:
        assert p.grad is not None
        dist.all_reduce(p.grad)
        p.grad /= world
    assert x.grad is not None
    errors |= {"y": error(y, expected["y"][rank]), "x_grad": error(x.grad, expected["x_grad"][rank])}
    grads = {n: p.grad for n, p in net.named_parameters() if p.requires_grad}
    trained = {n: grad for n, grad in grads.items() if grad is not None}
    assert grads.keys() == trained.keys() == expected["grads"].keys()
    errors["expert_grads"] = max(
        error(trained[n], expected["grads"][n][own[n]]) for n, p in expert_parameters(net) if p.requires_grad
    )
    errors["dense_grads"] = max(error(trained[n], expected["grads"][n]) for n, _ in dense)
    norm = global_grad_norm(net, groups)
    errors["norm"] = error(norm, expected["norm"])
    clip_by_norm(net.parameters(), norm, 0.5 * float(norm))
    errors["clip"] = error(global_grad_norm(net, groups), 0.5 * norm * (norm / (norm + 1e-6)))
    twin = copy.deepcopy(net).eval()  # an averaged copy of the weights talks to the same ranks
    errors["copy"] = error(twin.mlp(x)[0], net.eval().mlp(x)[0])
    return {
        "errors": errors,
        "norm": float(norm).hex(),
        "degrees": groups.degrees,
        "dispatcher": type(net.mlp.dispatcher).__name__,
        "transport": transport_of(net.mlp),
        "kept": stats.kept.tolist(),
    }


def transport_of(layer: MoELayer) -> str:
    """Returns the transport's name, "" for a layer whose rows do not travel."""
    link = getattr(layer.dispatcher, "link", None)
    return link.transport.name if link else ""


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the largest difference; the shapes have to be equal."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).detach().abs().max()) if a.numel() else 0.0


def run_world() -> dict:
    """Returns case -> what run_spread found on this rank."""
    return {name: run_spread(case) for name, case in CASES[dist.get_world_size()].items()}
