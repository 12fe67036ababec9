"""The MoE layers that moe_layer.py compares: ours, two plain ones, Tutel's, DeepSpeed's, FairScale's.

Each is a builder: builder(Shape, ours) -> Contender. Where a peer's weights can be set they are ours, so that results
can be compared too. A peer that cannot run raises Skipped with the reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.config import MoEConfig, ParallelConfig
from swin_moe.moe.layer import MoELayer
from swin_moe.parallel.apply import parallelize
from swin_moe.parallel.groups import build_groups

CPU = torch.device("cpu")
ONE_HOT_LIMIT = 4 * 2**30  # bytes of one-hot temporaries that are worth waiting for


class Skipped(Exception):
    """Why a peer does not run a shape."""


@dataclass(frozen=True)
class Shape:
    """One row of the table. Tokens are a rank's."""

    tokens: int
    dim: int
    experts: int
    top_k: int
    factor: float  # capacity factor; 0 = by need
    skew: float  # load of the hottest expert over the mean; 1 = as a fresh router balances
    prioritized: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        load = f"capacity {self.factor:g}" if self.factor else "dropless"
        skew = f", hottest {self.skew:g}x" if self.skew != 1 else ""
        kind = "" if self.dtype == torch.float32 else f", {str(self.dtype).removeprefix('torch.')}"
        return f"T {self.tokens} D {self.dim} E {self.experts} k {self.top_k}, {load}{skew}{kind}"

    @property
    def one_hot_bytes(self) -> int:
        """Bytes of an einsum layer's (T, E, C) combine weights and dispatch mask, C its capacity per expert."""
        need = self.skew if self.factor == 0 else self.factor
        return 5 * self.tokens * self.experts * max(1, int(self.top_k * need * self.tokens / self.experts))


@dataclass(frozen=True)
class Contender:
    """A layer in training."""

    forward: Callable[[Tensor], tuple[Tensor, Tensor]]  # x (T, D) -> (y (T, D), auxiliary loss)
    parameters: Sequence[Tensor]
    comparable: bool  # has our weights and semantics, so its results must be ours


def world_size() -> int:
    """Returns the ranks of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ours(shape: Shape) -> tuple[MoELayer, Contender]:
    """Returns our layer, experts spread over all ranks, and the contender."""
    config = MoEConfig(
        num_experts=shape.experts,
        top_k=shape.top_k,
        capacity_factor=shape.factor,
        gate_noise=0.0,
        balance_loss="gshard",
        batch_prioritized=shape.prioritized,
        aux_loss_weight=1.0,
    )
    layer = MoELayer(shape.dim, 4 * shape.dim, config, fc2_bias=True, layer=0, init_std=0.02)
    layer.init_weights(0, "layer")
    if world_size() > 1:
        parallelize(layer, ParallelConfig(), build_groups(ParallelConfig(), shape.experts, CPU))
    layer.train().to(shape.dtype)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y, aux = layer(x[None])
        return y[0], aux

    return layer, Contender(forward, list(layer.parameters()), True)


def _shared(layer: MoELayer) -> list[Tensor]:
    """Returns leaves that share the memory of our weights, which nobody changes: 2.4 GB at 128 experts of 768."""
    return [p.detach().requires_grad_() for p in layer.parameters()]


def loop(shape: Shape, layer: MoELayer) -> Contender:
    """A plain loop over experts: softmax, top-k, index_select per expert, index_add. Nothing is dropped, one rank."""
    if world_size() > 1:
        raise Skipped("one rank only")
    if shape.factor:
        raise Skipped("has no capacity")
    weights = _shared(layer)
    router, fc1, fc1_bias, fc2, fc2_bias = weights

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.softmax(F.linear(x, router), dim=1)
        gate, expert = scores.topk(shape.top_k, dim=1)
        y = torch.zeros_like(x)
        experts = zip(fc1.unbind(), fc1_bias.unbind(), fc2.unbind(), fc2_bias.unbind())
        for e, (w1, b1, w2, b2) in enumerate(experts):
            token, choice = (expert == e).nonzero(as_tuple=True)
            hidden = F.gelu(F.linear(x[token], w1, b1))
            y = y.index_add(0, token, torch.addmm(b2, hidden, w2) * gate[token, choice, None])
        first = torch.bincount(expert[:, 0], minlength=shape.experts) / len(x)
        return y, shape.experts * (scores.mean(dim=0) * first).sum()

    return Contender(forward, weights, True)


def grouped(shape: Shape, layer: MoELayer) -> Contender:
    """A plain layer by F.grouped_mm: pairs sorted by expert, two products, index_add. Nothing is dropped, one rank."""
    if world_size() > 1:
        raise Skipped("one rank only")
    if shape.factor:
        raise Skipped("has no capacity")
    weights = _shared(layer)
    router, fc1, fc1_bias, fc2, fc2_bias = weights

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.softmax(F.linear(x.float(), router.float()), dim=1)
        gate, expert = scores.topk(shape.top_k, dim=1)
        of_row, pair = expert.flatten().sort(stable=True)
        token, counts = pair // shape.top_k, torch.bincount(of_row, minlength=shape.experts)
        ends = counts.cumsum(0).to(torch.int32)
        hidden = F.gelu(F.grouped_mm(x[token], fc1.transpose(1, 2), offs=ends) + fc1_bias[of_row])
        rows = F.grouped_mm(hidden, fc2, offs=ends) + fc2_bias[of_row]
        y = torch.zeros_like(x).index_add(0, token, rows * gate.flatten()[pair, None].to(x.dtype))
        first = torch.bincount(expert[:, 0], minlength=shape.experts) / len(x)
        return y, shape.experts * (scores.mean(dim=0) * first).sum()

    return Contender(forward, weights, True)


def tutel_layer(layer: MoELayer) -> Any:
    """Returns Tutel's moe_layer, a module, with our weights and options; its router is computed in float32 as ours is.

    Raises:
        Skipped: It is not importable, or does something else.
    """
    try:
        from tutel import moe
    except ImportError as error:
        raise Skipped(f"not importable ({error})") from error
    config, experts = layer.config, layer.experts
    if config.capacity_factor == 0 and config.batch_prioritized:
        raise Skipped("drops tokens when capacity by need meets batch-prioritized routing")
    gate = {"capacity_factor": config.capacity_factor, "gate_noise": config.gate_noise, "fp32_gate": True}
    peer = moe.moe_layer(
        gate_type={"type": "top", "k": config.top_k, **gate},
        experts={
            "type": "ffn",
            "num_experts_per_device": config.num_experts // world_size(),
            "hidden_size_per_expert": experts.hidden_dim,
            "activation_fn": F.gelu,
        },
        model_dim=experts.dim,
        batch_prioritized_routing=config.batch_prioritized,
        normalize_gate=config.normalize_gate,
        is_gshard_loss=config.balance_loss == "gshard",
    ).train()
    values = {
        "gates.0.wg.weight": layer.router.get_parameter("weight"),
        "experts.batched_fc1_w": experts.fc1_weight,
        "experts.batched_fc2_w": experts.fc2_weight,
        "experts.batched_fc1_bias": experts.fc1_bias,
        "experts.batched_fc2_bias": experts.fc2_bias,
    }
    own = dict(peer.named_parameters())
    assert own.keys() == values.keys(), sorted(own)
    for name, value in values.items():
        assert own[name].shape == value.shape, name
        own[name].data = value.detach()
        own[name].requires_grad_(value.requires_grad)
    return peer


def tutel(shape: Shape, layer: MoELayer) -> Contender:
    """Tutel's moe_layer, with our weights."""
    peer = tutel_layer(layer)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = peer(x)
        return y, peer.l_aux

    return Contender(forward, list(peer.parameters()), True)


class _Expert(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def _refuse_one_hot(shape: Shape) -> None:
    if shape.dtype != torch.float32:
        raise Skipped("float32 only here")
    if shape.one_hot_bytes > ONE_HOT_LIMIT or shape.tokens > 4096:
        raise Skipped(f"its one-hot (T, E, C) tensors alone need {shape.one_hot_bytes / 2**30:.1f} GiB")


def deepspeed(shape: Shape, layer: MoELayer) -> Contender:
    """DeepSpeed's MoE layer (its own weights and gating: cost only)."""
    _refuse_one_hot(shape)
    if world_size() > 1:
        raise Skipped("one rank only here: its groups are global and cannot be built beside another engine's")
    try:
        from swin_moe.engine.deepspeed.start import import_deepspeed
        from swin_moe.parallel.groups import ensure_distributed

        ensure_distributed(CPU)
        import_deepspeed(CPU)
        from deepspeed.moe.layer import MoE
    except ImportError as error:
        raise Skipped(f"not importable ({error})") from error
    options = {"drop_tokens": False} if shape.factor == 0 else {"capacity_factor": shape.factor, "min_capacity": 0}
    peer = MoE(shape.dim, _Expert(shape.dim), shape.experts, k=shape.top_k, use_rts=False, **options).train()
    peer.set_deepspeed_parallelism()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y, aux, _ = peer(x)
        return y, aux

    return Contender(forward, list(peer.parameters()), False)


def fairscale(shape: Shape, layer: MoELayer) -> Contender:
    """FairScale's MOELayer with its Top2Gate (capacity 2 T / E, fixed; its own weights: cost only)."""
    _refuse_one_hot(shape)
    if shape.top_k != 2 or shape.factor == 0:
        raise Skipped("top-2 with a fixed capacity only")
    try:
        from fairscale.nn.moe import MOELayer, Top2Gate

        from swin_moe.parallel.groups import ensure_distributed
    except ImportError as error:
        raise Skipped(f"not importable ({error})") from error
    ensure_distributed(CPU)
    experts = nn.ModuleList(_Expert(shape.dim) for _ in range(shape.experts // world_size()))
    peer = MOELayer(Top2Gate(shape.dim, shape.experts), experts, group=dist.group.WORLD).train()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = peer(x.view(shape.experts, -1, shape.dim))  # it wants dim 0 to be a multiple of its experts
        return y.reshape(x.shape), peer.l_aux

    return Contender(forward, list(peer.parameters()), False)


PEERS = {"tutel": tutel, "deepspeed": deepspeed, "fairscale": fairscale, "loop": loop, "grouped_mm": grouped}
