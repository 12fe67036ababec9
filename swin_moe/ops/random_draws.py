"""Random draws of a network as operators: which images drop a branch, which units are dropped, the noise of a router.

Every draw is the pure function of swin_moe/randomness.py, bit for bit; here it is one kernel that hashes in registers
(csrc/draws/random_draws.cpp, csrc/cuda/draws/random_draws.cu) instead of some thirty passes over memory. Seed and step
come as a tensor, so that a graph that was captured or compiled serves every step.

Shape legend: B images, L blocks, N rows, U units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from swin_moe.ops import extension
from swin_moe.ops.transforms import call_operator
from swin_moe.randomness import PURPOSES, RandomContext, derive_key, keep_mask, normal

SCHEMAS = {
    "drop_path_factors": (
        "drop_path_factors(Tensor words, Tensor sample, float[] rates, int[] purposes, ScalarType dtype) -> Tensor"
    ),
    "random_dropout": (
        "random_dropout(Tensor x, Tensor words, int layer, int purpose, int site, Tensor rows, float drop, "
        "float scale) -> Tensor"
    ),
    "random_normal": "random_normal(Tensor words, int layer, int purpose, Tensor rows, int units) -> Tensor",
    "random_words": "random_words(Tensor near, SymInt seed, SymInt step) -> Tensor",  # symbols: no graph per step
}
DROP_PATH = ("drop_path_mixer", "drop_path_ffn")
_NO_SITE = -1
NO_DRAW = (None, None, 0, 0, 0, 0.0, 1.0)  # what stands for UnitDraw.operands() where no unit is dropped


def with_words(random: RandomContext) -> RandomContext:
    """Returns the context with seed and step where the kernels read them, made once for all draws of a forward."""
    if random.words is not None:
        return random
    if isinstance(random.seed, Tensor):
        words = torch.stack([random.seed, torch.full_like(random.seed, random.step)])
        return replace(random, words=words.to(_words_device(random.sample)))
    return replace(random, words=torch.ops.swin_moe.random_words(random.sample, random.seed, random.step))


def drop_path_factors(random: RandomContext, rates: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Returns (2, L, B): what every block multiplies its mixer's and its feed-forward branch by, image by image.

    0 with the block's probability, else 1 / (1 - rate).

    Args:
        rates: (L,), of the blocks in order.
        dtype: float32 or float64.
    """
    purposes = [PURPOSES.index(purpose) for purpose in DROP_PATH]
    words = with_words(random).words
    return torch.ops.swin_moe.drop_path_factors(words, random.sample, list(rates), purposes, dtype)


def drop_units(
    x: Tensor,
    random: RandomContext,
    rows: Tensor,
    *,
    purpose: str,
    layer: int,
    site: int | None = None,
    drop: float,
    scale: float,
) -> Tensor:
    """Returns x (N, U) with units dropped with probability `drop` and the others times `scale`, in the dtype of x.

    Nothing is kept for the backward, which hashes again.

    Args:
        rows: (N,) int64, the global number of every row.
        site: Tells draws of one layer and purpose apart; None = there is one.
        scale: As it is rounded to the dtype of x.
    """
    site = _NO_SITE if site is None else site
    words = with_words(random).words
    numbers = (layer, PURPOSES.index(purpose), site, rows, drop, scale)
    return call_operator(torch.ops.swin_moe.random_dropout, _differentiate, _save, x, words, *numbers)


@dataclass(frozen=True)
class UnitDraw:
    """Which units of a hidden layer are dropped: what drop_units takes beside the layer."""

    random: RandomContext
    rows: Tensor
    purpose: str
    layer: int
    drop: float
    scale: float
    site: int | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Returns x (..., U), whose rows are numbered in order, with units dropped."""
        flat = x.reshape(-1, x.shape[-1])
        return drop_units(
            flat,
            self.random,
            self.rows,
            purpose=self.purpose,
            layer=self.layer,
            site=self.site,
            drop=self.drop,
            scale=self.scale,
        ).view(x.shape)

    def operands(self) -> tuple[Tensor | None, Tensor, int, int, int, float, float]:
        """Returns (words, rows, layer, purpose, site, drop, scale) as operators that drop units take them."""
        site = _NO_SITE if self.site is None else self.site
        words = with_words(self.random).words
        return words, self.rows, self.layer, PURPOSES.index(self.purpose), site, self.drop, self.scale


def gate_noise(random: RandomContext, rows: Tensor, units: int, *, layer: int) -> Tensor:
    """Returns (N, U) float32, standard normal noise of a router's logits; see swin_moe/randomness.py:normal."""
    words = with_words(random).words
    return torch.ops.swin_moe.random_normal(words, layer, PURPOSES.index("gate_noise"), rows, units)


def _words_device(near: Tensor) -> torch.device:
    """Returns the device of `near`; the CPU where that device has no kernels, because the Python form reads words."""
    return near.device if extension.available(near.device.type) else torch.device("cpu")


def _random_words(near: Tensor, seed: int, step: int) -> Tensor:
    """Returns (2,) int64, seed and step, on the device that _words_device names."""
    words = torch.empty(2, dtype=torch.int64, device=_words_device(near))
    words[0].fill_(seed)  # not torch.tensor, which waits for the device
    words[1].fill_(step)
    return words


def _fake_random_words(near: Tensor, seed: int, step: int) -> Tensor:
    return torch.empty(2, dtype=torch.int64, device=_words_device(near))


def _key(words: Tensor, layer: int, purpose: int, site: int = _NO_SITE) -> int:
    seed, step = words.tolist()
    key = derive_key(seed, step, layer, purpose)
    return key if site == _NO_SITE else derive_key(key, site)


def unit_factors(
    x: Tensor, words: Tensor, layer: int, purpose: int, site: int, rows: Tensor, drop: float, scale: float
) -> Tensor:
    """Returns (N, U), by PyTorch's operators, what random_dropout multiplies x (N, U) with, in the dtype of x."""
    return keep_mask(_key(words, layer, purpose, site), rows, x.shape[1], drop=drop).to(x.dtype).mul_(scale)


def _drop_path_factors(
    words: Tensor, sample: Tensor, rates: list[float], purposes: list[int], dtype: torch.dtype
) -> Tensor:
    keep = [keep_mask(_key(words, b, p), sample, 1, drop=rate)[:, 0] for p in purposes for b, rate in enumerate(rates)]
    if not keep:
        return sample.new_empty((len(purposes), 0, len(sample)), dtype=dtype)
    factors = [mask.to(dtype).div_(1.0 - rate) for mask, rate in zip(keep, list(rates) * len(purposes))]
    return torch.stack(factors).view(len(purposes), len(rates), len(sample))


def _random_dropout(
    x: Tensor, words: Tensor, layer: int, purpose: int, site: int, rows: Tensor, drop: float, scale: float
) -> Tensor:
    return x * unit_factors(x, words, layer, purpose, site, rows, drop, scale)


def _random_normal(words: Tensor, layer: int, purpose: int, rows: Tensor, units: int) -> Tensor:
    return normal(_key(words, layer, purpose), rows, units)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, words, ctx.layer, ctx.purpose, ctx.site, rows, ctx.drop, ctx.scale = inputs
    ctx.save_for_backward(words, rows)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    words, rows = ctx.saved_tensors
    verb = torch.ops.swin_moe.random_dropout
    return verb(grad, words, ctx.layer, ctx.purpose, ctx.site, rows, ctx.drop, ctx.scale), *(None,) * 7


for _name, _kernel, _fake in (
    (
        "drop_path_factors",
        _drop_path_factors,
        lambda words, sample, rates, purposes, dtype: sample.new_empty(
            (len(purposes), len(rates), len(sample)), dtype=dtype
        ),
    ),
    ("random_words", _random_words, _fake_random_words),
    ("random_dropout", _random_dropout, lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format)),
    (
        "random_normal",
        _random_normal,
        lambda words, layer, purpose, rows, units: rows.new_empty((len(rows), units), dtype=torch.float32),
    ),
):
    _library = extension.register(SCHEMAS[_name], _kernel, _fake)
torch.library.register_autograd(
    f"{extension.NAMESPACE}::random_dropout", _differentiate, setup_context=_save, lib=_library
)
