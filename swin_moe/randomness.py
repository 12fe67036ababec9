"""Random numbers as a pure function of (seed, step, layer, purpose, row, unit).

No generator objects: the same image gets the same noise on any rank, in any micro-batch and in a recomputed forward,
so neither the layout of the run nor activation recomputation can change a result, and the random state of a
checkpoint is (seed, step). A row is a global sample or token index, a unit a channel, an expert or a choice.

The mixer is the 32-bit "lowbias32" integer hash (constants 0x7feb352d, 0x846ca68b; C. Wellons, "Prospecting for Hash
Functions", 2018), in int32 arithmetic that wraps, because torch vectorizes it on CPU and GPU alike.

Shape legend: N rows, U units.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF
_SECOND_DRAW = 0x5DEECE66D2545F49  # turns a key into that of an independent draw
PURPOSES = tuple(
    "gate_noise drop_path_mixer drop_path_ffn dropout expert_dropout mixup augment order mask subset box_sample "
    "box_jitter".split()
)


@dataclass(frozen=True)
class RandomContext:
    """What a forward needs to draw: the run's seed, the optimizer step, and which samples the batch holds.

    seed: A () int64 tensor on the CPU in a traced graph that draws it itself; see fresh.
    sample: (B,) int64, index of each image in the global batch of this step.
    words: (2,) int64, seed and step where the kernels of ops/random_draws.py read them, which makes them; None = not
        yet made.
    """

    seed: int | Tensor
    step: int
    sample: Tensor
    words: Tensor | None = None

    @classmethod
    def fresh(cls, batch_size: int, device: torch.device) -> "RandomContext":
        """Returns a context seeded from torch's global generator, for models used outside the trainer."""
        seed = torch.randint(0, 2**31 - 1, (), device="cpu")
        # In a traced graph the seed stays data: as an int it would break the graph, and be a constant of it.
        return cls(seed if torch.compiler.is_compiling() else int(seed), 0, torch.arange(batch_size, device=device))

    def key(self, purpose: str, layer: int = 0) -> int:
        """Returns the 64-bit key of one kind of draw in one layer of this step; the seed is to be a number."""
        assert not isinstance(self.seed, Tensor), "traced draws take words"
        return derive_key(self.seed, self.step, layer, PURPOSES.index(purpose))


def _signed(value: int) -> int:
    """Returns the int32 with the same 32 bits."""
    value &= _MASK_32
    return value - (1 << 32) if value >= 1 << 31 else value


def derive_key(*words: int) -> int:
    """Returns a 64-bit key that depends on every word (splitmix64 finalizer over the sequence)."""
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state ^ (word & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
        state = state * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 29
    return state


def _mix(x: Tensor) -> Tensor:
    """Returns the avalanche hash of int32 values, in the memory of `x`; right shifts are made logical by masking."""
    shifted = x >> 16
    x.bitwise_xor_(shifted.bitwise_and_(0xFFFF)).mul_(_signed(0x7FEB352D))
    torch.bitwise_right_shift(x, 15, out=shifted)
    x.bitwise_xor_(shifted.bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    torch.bitwise_right_shift(x, 16, out=shifted)
    return x.bitwise_xor_(shifted.bitwise_and_(0xFFFF))


def _words(key: int) -> tuple[int, int]:
    """Returns the lower and the upper word of a key as int32 numbers."""
    return _signed(key), _signed(key >> 32)


def bits(key: int, rows: Tensor, units: int) -> Tensor:
    """Returns (N, U) int32, uniform over all 2**32 values, for rows (N,) int64.

    Row and unit are hashed apart and mixed once together: the (N, U) part costs one hash.
    """
    return _bits(*_words(key), rows, units)


def _bits(low: int, high: int, rows: Tensor, units: int) -> Tensor:
    # Truncation to int32 drops the upper half of a row; it is mixed back so that token 2**32 differs from token 0.
    row_low, row_high = rows.to(torch.int32), (rows >> 32).to(torch.int32)
    row = _mix(_mix(row_low ^ low) + row_high + high)
    unit = _mix(torch.arange(units, dtype=torch.int32, device=rows.device) * _signed(0x9E3779B9) + high)
    return _mix(row[:, None] + unit[None, :])


def uniform(key: int, rows: Tensor, units: int) -> Tensor:
    """Returns (N, U) float32 in the open interval (0, 1), on a grid of 2**-24 shifted by half a step."""
    return _to_uniform(bits(key, rows, units))


def _to_uniform(drawn: Tensor) -> Tensor:
    return ((drawn >> 8) & 0xFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-24)


def normal(key: int, rows: Tensor, units: int) -> Tensor:
    """Returns (N, U) float32 standard normal (Box-Muller over two independent uniforms)."""
    low, high = _words(key)
    second = (low ^ _signed(_SECOND_DRAW), high ^ _signed(_SECOND_DRAW >> 32))
    radius = _to_uniform(_bits(low, high, rows, units)).double().log_().mul_(-2.0).sqrt_()
    angle = _to_uniform(_bits(*second, rows, units)).double().mul_(2.0 * math.pi).cos_()
    return (radius * angle).float()


def keep_mask(key: int, rows: Tensor, units: int, *, drop: float) -> Tensor:
    """Returns (N, U) bool, True with probability 1 - drop."""
    threshold = round(drop * 2.0**32) - 2**31
    return bits(key, rows, units) >= threshold


def truncated_normal_(values: Tensor, std: float, generator: torch.Generator) -> None:
    """Fills values (on meta: leaves them) with normal numbers of mean 0, those beyond 2 drawn again.

    The numbers of torch.nn.init.trunc_normal_(values, std=std, a=-2, b=2) of torch 2.13; that of 2.11 draws others, and
    initial weights are not to depend on torch.
    """
    if values.is_meta:
        return
    with torch.no_grad():
        values.normal_(0.0, std, generator=generator)
        while values.numel() and max(map(abs, values.aminmax())) > 2.0:
            again = torch.empty_like(values).normal_(0.0, std, generator=generator)
            values.copy_(torch.where(values.abs() > 2.0, again, values))
