"""Routers, modules with the logits of tokens as output; routing.py and choices/ make routings of them.

Facts matched to microsoft/Tutel at ac0e51b, tutel/gates/cosine_top.py and top.py.

Shape legend: T tokens, D channels, E experts (with soft MoE slots of an image), P cosine projection.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.config import MoEConfig
from swin_moe.config.choices import facts_of
from swin_moe.ops.linear import steady_linear
from swin_moe.randomness import truncated_normal_
from swin_moe.registry import lookup

ROUTERS = {
    "linear": "swin_moe.moe.routers:LinearRouter",
    "cosine": "swin_moe.moe.routers:CosineRouter",
}

_MAX_LOG_SCALE = math.log(100.0)  # cosine router: the logit scale never exceeds 100


def gate_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype logits are computed in: float32 whatever the precision of the rest, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class BalanceBias(nn.Module):
    """One number per expert that is added to its score when tokens choose; moved after a step, never by a gradient.

    Router state: a frozen parameter, so that it is saved, averaged and sharded as weights are. A module of its own, so
    that an engine that gathers parameters per module gathers it too.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(num_experts), requires_grad=False)

    def forward(self) -> Tensor:
        """Returns (E,), a copy: the parameter's memory may be another's after the forward."""
        return self.bias.detach().clone()


class Router(nn.Module):
    """What routers have in common: init_weights, and the bias of those that balance by it.

    A row of ROUTERS is called as f(dim, num_experts, config, balanced=): D, the logits of a token, the layer's options,
    and whether it holds a BalanceBias. Its forward returns (T, num_experts) logits of x (T, D), outside autocast.
    """

    balance: BalanceBias | None

    def init_weights(self, generator: torch.Generator, std: float) -> None:
        """Fills all parameters."""
        self._init_projection(generator, std)
        if self.balance is not None:
            with torch.no_grad():
                self.balance.bias.zero_()

    def matrix(self) -> Tensor | None:
        """Returns (E, D), the weight of a router that computes x W^T and nothing else; None of others."""
        return None

    def _init_projection(self, generator: torch.Generator, std: float) -> None:
        raise NotImplementedError


class LinearRouter(Router):
    """logits = x W^T, no bias."""

    def __init__(self, dim: int, num_experts: int, config: MoEConfig, *, balanced: bool = False) -> None:
        super().__init__()
        self.balance = BalanceBias(num_experts) if balanced else None
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (T, E) logits of x (T, D). To be called outside autocast."""
        return steady_linear(x.to(gate_dtype(x)), self.weight.to(gate_dtype(x)))

    def matrix(self) -> Tensor | None:
        """Returns (E, D); of a subclass, which may compute something else, None."""
        return self.weight if type(self) is LinearRouter else None

    def _init_projection(self, generator: torch.Generator, std: float) -> None:
        """Truncated normal, as every linear layer of the official model."""
        _fill(self.weight, lambda value: truncated_normal_(value, std, generator))


class CosineRouter(Router):
    """logits = cosine(W x + b, s_e) * exp(temperature): an expert is a direction s_e (Tutel, cosine_top)."""

    def __init__(self, dim: int, num_experts: int, config: MoEConfig, *, balanced: bool = False) -> None:
        super().__init__()
        self.balance = BalanceBias(num_experts) if balanced else None
        self.init_t = config.cosine_init_t
        self.temperature = nn.Parameter(torch.empty(1))
        self.projector = nn.Linear(dim, config.cosine_dim)
        self.sim_matrix = nn.Parameter(torch.empty(config.cosine_dim, num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (T, E) logits of x (T, D). To be called outside autocast."""
        dtype = gate_dtype(x)
        point_TP = F.linear(x.to(dtype), self.projector.weight.to(dtype), self.projector.bias.to(dtype))
        cosine_TE = F.normalize(point_TP, dim=1) @ F.normalize(self.sim_matrix.to(dtype), dim=0)
        return cosine_TE * self.temperature.to(dtype).clamp(max=_MAX_LOG_SCALE).exp()

    def scaled_directions(self) -> Tensor:
        """Returns (P, E), the experts' directions, each of the length that its cosine is multiplied by."""
        return F.normalize(self.sim_matrix, dim=0) * self.temperature.clamp(max=_MAX_LOG_SCALE).exp()

    def _init_projection(self, generator: torch.Generator, std: float) -> None:
        """Projector truncated normal, directions normal(0, 0.01), scale 1 / init_t."""
        weight = self.projector.weight
        _fill(weight, lambda value: truncated_normal_(value, std, generator))
        _fill(self.sim_matrix, lambda value: value.normal_(0.0, 0.01, generator=generator))
        with torch.no_grad():
            self.projector.bias.zero_()
            self.temperature.fill_(-math.log(self.init_t))


def _fill(parameter: Tensor, rule: Callable[[Tensor], object]) -> None:
    """Fills a parameter with float32 numbers drawn on the CPU, the same on every device."""
    with torch.no_grad():
        value = torch.empty(parameter.shape, dtype=torch.float32)
        rule(value)
        parameter.copy_(value)


def build_router(dim: int, config: MoEConfig) -> Router:
    """Returns the router of a layer: one output per expert, or per slot with soft MoE."""
    facts = facts_of(config)
    router = lookup(ROUTERS, config.router, key="model.moe.router")
    return router(dim, facts.logits(config), config, balanced=facts.has_balance_bias(config))
