"""A layer of experts that tokens choose, all of it on this processor, as one operator and one autograd node.

The CPU kernel is csrc/moe/moe_layer.cpp. The reference is what swin_moe/moe/layer.py does where this is not taken:
router, moe_route.py, moe_balance.py, moe_plan.py and row_products.expert_layer one after the other, whose bits these
are. Between them lie some hundred calls from Python, which take longer than a small layer's arithmetic.

Shape legend: T tokens, D channels, E experts, H hidden channels of an expert, k choices per token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.ops import extension
from swin_moe.ops.moe.moe_balance import KINDS
from swin_moe.ops.reused_memory import empty_like_reused
from swin_moe.randomness import PURPOSES

COMPILED = extension.compiled_for("moe_layer", "moe_layer_backward")
_NOISE, _DROPOUT = PURPOSES.index("gate_noise"), PURPOSES.index("expert_dropout")


class Options(NamedTuple):
    """What a layer's tokens are routed by; see moe_route.route_tokens and moe_balance.auxiliary_loss."""

    layer: int  # number of the block in the network, on which draws depend
    noise: float  # standard deviation of the noise that is added to logits; 0 = none
    drop: float  # probability of a hidden unit to be dropped
    sigmoid: bool
    normalize: bool
    kind: str
    noise_std: float  # of the load of load_importance, also where no noise is added
    balance_group: int
    weight: float
    z_weight: float  # 0 = no z-loss

    def numbers(self) -> tuple:
        """Returns them as the operators take them."""
        layer, noise, drop, sigmoid, normalize, kind, *rest = self
        return layer, _NOISE, _DROPOUT, noise, drop, sigmoid, normalize, KINDS[kind], *rest


class Slots(NamedTuple):
    """Who competes for which slots; see moe_route.route_tokens."""

    top_k: int
    group_size: int
    capacity: int | None
    last_capacity: int | None
    prioritized: bool

    def numbers(self) -> tuple:
        """Returns them as the operator takes them."""
        limits = [-1 if limit is None else limit for limit in (self.capacity, self.last_capacity)]
        return self.top_k, self.group_size, *limits, self.prioritized


class Output(NamedTuple):
    """What a layer gives. y and aux carry gradients."""

    y: Tensor  # (T, D) of the dtype of x
    aux: Tensor  # scalar, weight * balance loss + z_weight * z-loss
    balance: Tensor  # scalar, the balance loss
    entropy: Tensor  # scalar, as moe_route.Routed
    totals: Tensor  # (2 E + 1,) int64, as moe_route.Routed


def moe_layer(
    x: Tensor,
    router: Tensor,
    weights: Sequence[Tensor],
    slots: Slots,
    options: Options,
    *,
    bias: Tensor | None,
    words: Tensor | None,
    token: Tensor | None,
    dtype: torch.dtype,
) -> Output:
    """Returns what tokens get from their experts, the losses and statistics. First derivatives only.

    Args:
        x: (T, D), float32 or bfloat16. router: (E, D), of the linear router.
        weights: fc1 (E, H, D), bias1 (E, H), fc2 (E, H, D), bias2 (E, D), see row_products.expert_rows.
        bias: (E,), see moe_route.route_tokens; has no gradient.
        words, token: Seed and step, and the (T,) int64 global number of every token; None where nothing is drawn.
        dtype: Of the rows and of products; float32 or bfloat16.

    Raises:
        ValueError: Shapes or numbers that do not fit. TypeError: another dtype.
    """
    return Output(*_MoELayer.apply(x, router, *weights, bias, words, token, (*slots.numbers(), dtype), options))


class _MoELayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        router: Tensor,
        fc1: Tensor,
        bias1: Tensor,
        fc2: Tensor,
        bias2: Tensor,
        bias: Tensor | None,
        words: Tensor | None,
        token: Tensor | None,
        slots: tuple,
        options: Options,
    ) -> tuple[Tensor, ...]:
        numbers = options.numbers()
        weights = bias, fc1, bias1, fc2, bias2
        *results, kept = torch.ops.swin_moe.moe_layer.default(x, router, *weights, words, token, *slots, *numbers)
        ctx.save_for_backward(x, router, fc1, fc2, words, *kept)
        ctx.numbers, ctx.kinds = numbers, (bias1.dtype, bias2.dtype)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[2:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_aux: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, router, fc1, fc2, words, *kept = ctx.saved_tensors
        needs_x, needs_router, *needs = ctx.needs_input_grad[:6]
        grad = torch.zeros_like(x) if grad is None else grad
        rows = kept[-1 - _AFTER_OUT]  # biases have gradients of their dtype
        grad_fc1 = empty_like_reused(fc1) if needs[0] else None
        grad_bias1 = rows.new_empty(fc1.shape[:2]) if needs[1] else None
        grad_fc2 = empty_like_reused(fc2) if needs[2] else None
        grad_bias2 = rows.new_empty((fc2.shape[0], fc2.shape[2])) if needs[3] else None
        found = grad_fc1, grad_bias1, grad_fc2, grad_bias2
        grad_x, grad_router = torch.ops.swin_moe.moe_layer_backward.default(
            grad, grad_aux, x, router, fc1, fc2, words, kept, *ctx.numbers, needs_x, needs_router, *found
        )
        biases = [b if b is None or b.dtype == kind else b.to(kind) for b, kind in zip(found[1::2], ctx.kinds)]
        return (
            grad_x if needs_x else None,
            grad_router if needs_router else None,
            grad_fc1,
            biases[0],
            grad_fc2,
            biases[1],
            *[None] * 5,
        )


_AFTER_OUT = 3  # tensors that the operator keeps after the experts' results


def _fake_layer(
    x: Tensor,
    router: Tensor,
    bias: Tensor | None,
    fc1: Tensor,
    bias1: Tensor | None,
    fc2: Tensor,
    bias2: Tensor | None,
    words: Tensor | None,
    token: Tensor | None,
    top_k: int,
    group_size: int,
    capacity: int,
    last_capacity: int,
    prioritized: bool,
    dtype: torch.dtype,
    layer: int,
    noise_purpose: int,
    drop_purpose: int,
    noise: float,
    drop: float,
    sigmoid: bool,
    normalize: bool,
    kind: int,
    noise_std: float,
    balance_group: int,
    weight: float,
    z_weight: float,
) -> tuple:
    tokens, experts, width = x.shape[0], router.shape[0], x.shape[1]
    limited = capacity >= 0 or last_capacity >= 0
    rows = torch.library.get_ctx().new_dynamic_size() if limited else tokens * top_k
    size = torch.sym_max(torch.sym_min(balance_group, tokens), 1)
    cells = ((tokens + size - 1) // size, experts) if kind and tokens else (0,)
    load = kind == KINDS["load_importance"]

    def number(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    def whole(*shape: Any) -> Tensor:
        return x.new_empty(shape, dtype=torch.int64)

    kept = [
        number(tokens, experts),
        number(tokens, experts) if load and noise > 0 else number(0),
        number(tokens, top_k),
        number(tokens) if load else number(0),
        number(tokens, experts) if z_weight else number(0),
        whole(tokens, top_k),
        whole(tokens, top_k),
        x.new_empty((tokens, top_k), dtype=torch.bool) if limited else number(0),
        whole(rows),
        whole(experts),
        whole(rows) if drop > 0 else whole(0),
        *(x.new_empty((rows, size), dtype=dtype) for size in (width, fc1.shape[1], fc1.shape[1], width)),
        number(*cells),
        number(*cells),
        number(tokens if z_weight else 0),
    ]
    return torch.empty_like(x), number(), number(), number(), whole(2 * experts + 1), kept


def _fake_backward(grad: Tensor, grad_aux: Tensor | None, x: Tensor, router: Tensor, *rest: Any) -> tuple:
    needs_x, needs_router = rest[-6:-4]
    return x.new_empty(x.shape if needs_x else (0,)), router.new_empty(router.shape if needs_router else (0,))


extension.add_fake("moe_layer", _fake_layer)
extension.add_fake("moe_layer_backward", _fake_backward)
