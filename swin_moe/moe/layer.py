"""The Mixture-of-Experts layer: router -> choice -> dispatcher -> experts -> combine.

Facts matched to the official Swin-MoE on Tutel (microsoft/Swin-Transformer models/swin_transformer_moe.py:MoEMlp,
microsoft/Tutel tutel/impls/moe_layer.py). The output is sum_k gate_k * expert_k(x); a dropped pair adds nothing.
Routers beyond the official ones: docs/moe.md.

Shape legend: B images, L tokens per image, T = B * L, D channels, E experts, k choices per token.
"""

import zlib
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from swin_moe.config import MoEConfig
from swin_moe.moe.choices import Routed, RoutingStats, build_choice
from swin_moe.moe.dispatch import Dispatcher, LocalDispatcher, PaddedDispatcher, order_and_counts
from swin_moe.moe.experts import Dropout, GroupedExperts
from swin_moe.moe.phases import PhaseClock, mark
from swin_moe.moe.routers import build_router
from swin_moe.moe.routing import Routing
from swin_moe.moe.shared import SharedExpert
from swin_moe.ops.linear import is_ordinary, is_untouched
from swin_moe.ops.moe import moe_layer
from swin_moe.ops.random_draws import with_words
from swin_moe.ops.row_products import LayerOrder
from swin_moe.randomness import RandomContext, derive_key

# Stand where experts have their number, so that a router or a shared expert never shares an expert's numbers.
_ROUTER_WORD, _SHARED_WORD = -1, -2


class MoELayer(nn.Module):
    """E feed-forward networks of which each token visits k, or as many as choose it, or all a little (soft MoE); beside
    them, if there is one, a shared network that all tokens visit.

    Args:
        dim: D. hidden_dim: Hidden channels of one expert.
        fc2_bias: False = second bias is frozen at zero.
        layer: Number of the block in the network; every random draw depends on it.
        init_std: Standard deviation of initial weights.
    """

    def __init__(
        self, dim: int, hidden_dim: int, config: MoEConfig, *, fc2_bias: bool, layer: int, init_std: float
    ) -> None:
        super().__init__()
        self.config, self.layer, self.init_std = config, layer, init_std
        self.router = build_router(dim, config)
        self.experts = GroupedExperts(dim, hidden_dim, config.num_experts, fc2_bias=fc2_bias)
        shared_dim = config.shared_experts * hidden_dim
        self.shared = SharedExpert(dim, shared_dim, fc2_bias=fc2_bias) if shared_dim else None
        self.dispatcher: Dispatcher = PaddedDispatcher() if config.backend == "padded" else LocalDispatcher()
        self.choice = build_choice(config, layer)
        self.stats: RoutingStats | None = None
        self.observer: Callable[[Routing], None] | None = None  # sees the routing of every forward
        self.clock: PhaseClock | None = None  # measures forward and backward while it is set

    def forward(
        self, x_BLD: Tensor, random: RandomContext | None = None, valid_BL: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns (y of x's shape and dtype, auxiliary losses times their weights).

        Args:
            random: What training draws from; None in training makes a fresh one. Evaluation draws nothing.
            valid_BL: (B, L) bool; the others are padding, are not routed and get 0. None = all tokens are an image's.
        """
        if torch.jit.is_tracing():
            raise RuntimeError("torch.jit.trace would fix how many tokens an expert gets; torch.export.export does not")
        batch, num_tokens, dim = x_BLD.shape
        if not self.training:
            random = None
        elif random is None:
            random = RandomContext.fresh(batch, x_BLD.device)
        token = None
        if random is not None and not self.choice.draws():
            random = None  # nor words and numbers of tokens, of which nobody asks
        if random is not None:
            random = with_words(random)
            position = torch.arange(num_tokens, device=x_BLD.device)
            token = (random.sample[:, None] * num_tokens + position).flatten()
        x = x_BLD.reshape(batch * num_tokens, dim)
        if valid_BL is None:
            y, aux = self._compute(x, random, token, num_tokens, None)
            return y.view(x_BLD.shape), aux
        (rows,) = valid_BL.flatten().nonzero(as_tuple=True)
        counts = tuple(valid_BL.sum(dim=1).tolist())
        alike = len(set(counts)) == 1
        num_tokens = counts[0] if alike else num_tokens
        chosen = None if token is None else token[rows]
        y, aux = self._compute(x[rows], random, chosen, num_tokens, None if alike else counts)
        return x.new_zeros(x.shape).index_copy(0, rows, y).view(x_BLD.shape), aux

    def _compute(
        self,
        x_TD: Tensor,
        random: RandomContext | None,
        token: Tensor | None,
        tokens_per_image: int,
        counts: tuple[int, ...] | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns ((T, D), auxiliary losses times their weights).

        Args:
            token: (T,) global index of every token; None in evaluation.
            counts: Tokens of each image, where images have unequally many.
        """
        x = mark(x_TD, self.clock, forward="", backward="route")
        device_type = x.device.type
        is_mixed = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if is_mixed else x.dtype
        # Only where there is something to switch off: torch.export cannot hold a region with these results.
        with torch.autocast(device_type, enabled=False) if is_mixed else nullcontext():
            plan = None if counts is not None else self._plan(x, dtype, tokens_per_image, draws=random is not None)
            if plan is not None:
                y, aux = self._at_once(x, plan, dtype, random, token)
            else:
                routed = self._route(x, random, token, tokens_per_image, counts)
                in_one = self._is_in_one(routed, dtype)
                y = (self._in_one if in_one else self._step_by_step)(routed, dtype, random, token).to(x.dtype)
                aux = routed.aux
        y = mark(y, self.clock, forward="combine", backward="")
        if self.shared is not None:
            y = y + self.shared(x_TD).to(y.dtype)
        return y, aux

    def _route(
        self,
        x: Tensor,
        random: RandomContext | None,
        token: Tensor | None,
        tokens_per_image: int,
        counts: tuple[int, ...] | None,
    ) -> Routed:
        """Returns what to do with the tokens; remembers what came of it, and shows it to who observes."""
        routed = self.choice.route(
            x,
            self.router,
            tokens_per_image=tokens_per_image,
            counts=counts,
            training=self.training,
            random=random,
            token=token,
        )
        self.stats = routed.stats
        if self.observer is not None:
            self.observer(routed.routing)
        return routed

    def _plan(
        self, x: Tensor, dtype: torch.dtype, tokens_per_image: int, *, draws: bool
    ) -> tuple[moe_layer.Slots, moe_layer.Options] | None:
        """Returns how routing, experts and what is between them are one operator; None where they are not: it covers a
        router that is a matrix, the choices that say so, few rows, all here, and nobody watches."""
        if self.clock is not None or self.observer is not None or not getattr(self.dispatcher, "in_one", False):
            return None
        matrix = self.router.matrix() if is_untouched(self.router) else None
        if matrix is None or "cpu" not in moe_layer.COMPILED or not is_ordinary(matrix):
            return None
        if not self.experts.take_tokens(x, x.shape[0] * self.config.top_k, dtype):
            return None
        return self.choice.at_once(x, tokens_per_image=tokens_per_image, training=self.training, draws=draws)

    def _at_once(
        self,
        x: Tensor,
        plan: tuple[moe_layer.Slots, moe_layer.Options],
        dtype: torch.dtype,
        random: RandomContext | None,
        token: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns what choice.route and _in_one do one after the other."""
        matrix, balance = self.router.matrix(), self.router.balance
        assert matrix is not None, "a plan is made for no other"
        found = moe_layer.moe_layer(
            x,
            matrix,
            self.experts.parameters_in_order(),
            *plan,
            bias=None if balance is None else balance(),
            words=None if random is None else random.words,
            token=token,
            dtype=dtype,
        )
        experts = self.config.num_experts
        demand, kept, dropped = found.totals.split([experts, experts, 1])
        self.stats = RoutingStats(demand, kept, dropped.view(()), found.entropy, found.balance)
        return found.y, found.aux

    def _step_by_step(
        self, routed: Routed, dtype: torch.dtype, random: RandomContext | None, token: Tensor | None
    ) -> Tensor:
        """Returns (T, D), what was combined of the rows, restored."""
        routing, pair, dropout = routed.routing, self._pairs(routed.routing, random, token), None
        # Cast before the rows travel: half the bytes between ranks.
        rows = mark(routed.rows.to(dtype), self.clock, forward="route", backward="dispatch")
        dispatched = self.dispatcher.dispatch(rows, routing, pair)
        tokens = mark(dispatched.tokens, self.clock, forward="dispatch", backward="experts")
        if random is not None and dispatched.pair is not None:
            dropout = Dropout(self.config.dropout, random, self.layer, dispatched.pair)
        y = self.experts(tokens, dispatched.counts, dropout, dispatched.slices)
        y = mark(y, self.clock, forward="experts", backward="combine")
        return routed.restore(self.dispatcher.combine(y, dispatched, routing.gate))

    def _pairs(self, routing: Routing, random: RandomContext | None, token: Tensor | None) -> Tensor | None:
        """Returns the (T, k) numbers by which hidden units are dropped; None where none are."""
        if random is None or token is None or self.config.dropout <= 0:
            return None
        return self.choice.pairs(routing, random, token)

    def _is_in_one(self, routed: Routed, dtype: torch.dtype) -> bool:
        """Returns whether dispatch, experts and combine are one operator: few rows, all here, nobody watches."""
        plain = type(self.dispatcher) is LocalDispatcher and type(routed) is Routed and self.clock is None
        gate = routed.routing.gate
        return plain and gate.dtype == torch.float32 and self.experts.take_tokens(routed.rows, gate.numel(), dtype)

    def _in_one(self, routed: Routed, dtype: torch.dtype, random: RandomContext | None, token: Tensor | None) -> Tensor:
        """Returns what _step_by_step does, in the dtype of the rows before they were cast."""
        routing, pair, dropout = routed.routing, self._pairs(routed.routing, random, token), None
        order, counts = order_and_counts(routing, ask=True)
        if random is not None and pair is not None:
            dropout = Dropout(self.config.dropout, random, self.layer, pair.flatten()[order.pair])
        keep = None if order.keep is None else order.keep.contiguous()
        place = LayerOrder(order.position.contiguous(), keep, order.pair, counts)
        return self.experts.on_tokens(routed.rows, routing.gate, place, dtype=dtype, dropout=dropout)

    def init_weights(self, seed: int, name: str) -> None:
        """Fills all weights as a function of (seed, name, global expert number); `name` is the layer's in the net."""
        generator = torch.Generator().manual_seed(derive_key(seed, zlib.crc32(name.encode()), _ROUTER_WORD))
        self.router.init_weights(generator, self.init_std)
        self.experts.init_weights(seed, name, self.init_std)
        if self.shared is not None:
            generator = torch.Generator().manual_seed(derive_key(seed, zlib.crc32(name.encode()), _SHARED_WORD))
            self.shared.init_weights(generator, self.init_std)
