"""Rows of tokens for experts and back: gather, gate, and sum over choices.

On CUDA with compiled kernels (csrc/cuda/moe/moe_permute.cu) each is one pass over memory; elsewhere it is a few of
PyTorch's operators, which torch.compile fuses. None has a gradient of its own: each is part of another's
(swin_moe/moe/dispatch.py).

Shape legend: T tokens, D channels, k choices per token, N rows for experts.
"""

import torch
from torch import Tensor

from swin_moe.ops import extension

SCHEMAS = {
    "moe_permute": (
        "moe_permute(Tensor x, Tensor pair, int top_k, Tensor? gate, Tensor? vacant, ScalarType? dtype=None) -> Tensor"
    ),
    "moe_unpermute": "moe_unpermute(Tensor rows, Tensor position, Tensor? keep, Tensor? gate) -> Tensor",
    "moe_gate_gradient": "moe_gate_gradient(Tensor rows, Tensor grad_out, Tensor position, Tensor? keep) -> Tensor",
}


def permute(
    x: Tensor,
    pair: Tensor,
    top_k: int,
    *,
    gate: Tensor | None = None,
    vacant: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns (N, D): for each row the token of its pair, times the pair's gate; zeros where there are no tokens.

    Args:
        x: (T, D).
        pair: (N,) int64, token * k + choice.
        gate: (T, k); None = 1.
        vacant: (N,) bool, rows that are zero with a gate; without one they hold what pair says.
        dtype: Of the result; None = that of x.
    """
    verb = torch.ops.swin_moe.moe_permute if _compiled(x) else _permute
    return verb(x, pair, top_k, gate, vacant, dtype)


def unpermute(rows: Tensor, position: Tensor, *, keep: Tensor | None, gate: Tensor | None = None) -> Tensor:
    """Returns (T, D): for each token the sum over its kept choices of gate times row, in the wider dtype of both.

    Args:
        rows: (N, D). A dropped pair's row is not read, or counts for nothing whatever it holds.
        position: (T, k) int64, row of each pair.
        keep: (T, k) bool; None = all.
        gate: (T, k); None = 1.
    """
    verb = torch.ops.swin_moe.moe_unpermute if _compiled(rows) else _unpermute
    return verb(rows, position, keep, gate)


def gate_gradient(rows: Tensor, grad_out: Tensor, position: Tensor, *, keep: Tensor | None) -> Tensor:
    """Returns (T, k): the products of each pair's row and its token's grad_out (T, D); 0 where dropped."""
    verb = torch.ops.swin_moe.moe_gate_gradient if _compiled(rows) else _gate_gradient
    return verb(rows, grad_out, position, keep)


def pick_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Returns rows[index]; zeros where there are no rows at all, of which a plan's 0 stands for none."""
    return rows.index_select(0, index) if rows.shape[0] else rows.new_zeros((len(index), *rows.shape[1:]))


def _compiled(x: Tensor) -> bool:
    return extension.kernels_take(x, extension.COMPILED)


def _permute(
    x: Tensor,
    pair: Tensor,
    top_k: int,
    gate: Tensor | None,
    vacant: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    rows = pick_rows(x, pair.div(top_k, rounding_mode="floor"))
    if gate is not None:
        gate_N = pick_rows(gate.flatten(), pair)
        if vacant is not None:  # experts multiply padding too, and it must add nothing to their gradients
            gate_N = gate_N.masked_fill(vacant, 0)
        rows.mul_(gate_N[:, None])
    # No `.to` that changes nothing: traced within an autograd.Function, torch 2.11 gives its input a gradient of zero.
    return rows if dtype in (None, rows.dtype) else rows.to(dtype)


def _gather_choice(rows: Tensor, position: Tensor, keep: Tensor | None, choice: int) -> Tensor:
    """Returns (T, D), for each token the row of its choice, zeros where dropped."""
    taken = pick_rows(rows, position[:, choice])
    # Not a product with the mask: row 0 stands in for dropped pairs and may hold inf or nan.
    return taken if keep is None else taken.masked_fill_(~keep[:, choice, None], 0)


def _unpermute(rows: Tensor, position: Tensor, keep: Tensor | None, gate: Tensor | None) -> Tensor:
    out = _gather_choice(rows, position, keep, 0)
    if gate is not None:
        out = out * gate[:, :1]
    # In place saves a pass over new memory; in a graph there is none to save, and traced within an autograd.Function
    # torch 2.11 loses the gradients of what is written in place.
    traced = torch.compiler.is_compiling()
    add, multiply_add = (torch.add, torch.addcmul) if traced else (torch.Tensor.add_, torch.Tensor.addcmul_)
    for choice in range(1, position.shape[1]):
        taken = _gather_choice(rows, position, keep, choice)
        out = add(out, taken) if gate is None else multiply_add(out, taken.to(out.dtype), gate[:, choice, None])
    return out


def _gate_gradient(rows: Tensor, grad_out: Tensor, position: Tensor, keep: Tensor | None) -> Tensor:
    choices = range(position.shape[1])
    return torch.stack([(_gather_choice(rows, position, keep, c) * grad_out).sum(dim=1) for c in choices], dim=1)


def _fake_permute(
    x: Tensor,
    pair: Tensor,
    top_k: int,
    gate: Tensor | None,
    vacant: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return x.new_empty((pair.shape[0], x.shape[1]), dtype=dtype or x.dtype)


def _fake_unpermute(rows: Tensor, position: Tensor, keep: Tensor | None, gate: Tensor | None) -> Tensor:
    dtype = rows.dtype if gate is None else torch.promote_types(rows.dtype, gate.dtype)
    return rows.new_empty((position.shape[0], rows.shape[1]), dtype=dtype)


def _fake_gate_gradient(rows: Tensor, grad_out: Tensor, position: Tensor, keep: Tensor | None) -> Tensor:
    return rows.new_empty(position.shape, dtype=torch.promote_types(rows.dtype, grad_out.dtype))


for _name, _kernel, _fake in (
    ("moe_permute", _permute, _fake_permute),
    ("moe_unpermute", _unpermute, _fake_unpermute),
    ("moe_gate_gradient", _gate_gradient, _fake_gate_gradient),
):
    extension.register(SCHEMAS[_name], _kernel, _fake)
