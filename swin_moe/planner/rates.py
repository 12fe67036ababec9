"""Seconds of operators from what calibration measured: a curve of products by shape, and a rate of every operator.

An operator takes call + byte * bytes + far * beyond + work * w: beyond is what it moves over CACHE bytes, w what the
curve says of its product in seconds, or its multiply-accumulates where it multiplies many small matrices (attention),
or 0 where it multiplies none. A kernel that calibration measured by itself has a curve of its own, which holds calls
and bytes: it takes work * w. The update of weights is such a sum over tensors, and what the host takes between
operators, where it also lets go of memory, one over operators.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from swin_moe.planner.operators import ATTENTION, BYTES, MACS, PRODUCTS, ROWS

Point = tuple[float, float, float, float]  # rows, inner, columns, FLOP/s
OTHER, UPDATE, HOST = "other", "update", "host"  # rates of no single operator
CACHE = 2.0**20  # bytes that a core has near by, so that they come quicker than others
# Operators that do a part of another's work, and have its curve.
_AS = {"expert_rows": "moe_layer", "expert_layer": "moe_layer"}
_AS |= {f"{name}_backward": f"{other}_backward" for name, other in _AS.items()}
# The same work by the CPU's kernels and by PyTorch's: whichever calibration saw.
_AS |= {"layer_norm_backward": "native_layer_norm_backward", "native_layer_norm_backward": "layer_norm_backward"}
_AS |= {"mixed_norm": "native_layer_norm", "mixed_norm_backward": "native_layer_norm_backward"}
_AS |= {"mixed_gelu": "gelu", "mixed_gelu_backward": "gelu_backward", "half_weight": "_to_copy"}
_AS |= {"mixed_linear": "addmm", "mixed_linear_backward": "mm", "mixed_residual": "addcmul", "scaled_images": "mul"}
_PASSED = 4  # tensors as large as a weight that its update reads: weight, gradient, moments
_NEAREST = 8  # points that the curve looks at
_STEEPNESS = 3  # of their weights, by distance in doublings


@dataclass(frozen=True)
class Rate:
    """Seconds of an operator: of each call, of each byte, of the work of its product, and of each byte beyond CACHE."""

    call: float
    byte: float
    work: float
    far: float = 0.0

    def seconds(self, moved: np.ndarray, work: np.ndarray | float = 0.0) -> np.ndarray:
        """Returns (calls,) seconds. moved: (calls,) bytes that each moves."""
        return self.call + self.byte * moved + self.far * beyond(moved) + self.work * work


def beyond(moved: np.ndarray) -> np.ndarray:
    """Returns the bytes of each call that no near cache holds."""
    return np.maximum(moved - CACHE, 0.0)


def moved_by_update(weights: np.ndarray) -> np.ndarray:
    """Returns the bytes that the update of each tensor moves. weights: (tensors,) bytes."""
    return _PASSED * weights


class Curve:
    """FLOP/s of products by shape, between the measured ones by distance in doublings of rows, inner and columns."""

    def __init__(self, points: Sequence[Point]) -> None:
        table = np.array(points, dtype=np.float64).reshape(-1, 4)
        self._places, self._rates = np.log2(table[:, :3]), np.log(table[:, 3])

    def seconds(self, work: np.ndarray) -> np.ndarray:
        """Returns (operators,) seconds. work: (operators, 5), see operators.py; each row a product."""
        places = np.log2(np.maximum(work[:, ROWS : ROWS + 3], 1.0))
        distances = np.sqrt(((places[:, None] - self._places[None]) ** 2).sum(-1))
        nearest = np.argsort(distances, axis=1)[:, :_NEAREST]
        weights = 1 / (np.take_along_axis(distances, nearest, 1) + 1e-3) ** _STEEPNESS
        rates = np.exp((weights * self._rates[nearest]).sum(1) / weights.sum(1))
        return 2 * work[:, MACS] / rates


@dataclass(frozen=True)
class Rates:
    """What calibration found of one precision."""

    curve: Curve
    operators: Mapping[str, Rate]
    kernels: Mapping[str, Curve] = field(default_factory=dict)  # of operators that were measured by themselves

    def own(self, name: str) -> Curve | None:
        """Returns the curve of an operator alone, or of one that does its work and more; None where none was made."""
        return self.kernels.get(name) or self.kernels.get(_AS.get(name, ""))

    def products(self, name: str, work: np.ndarray) -> np.ndarray:
        """Returns (operators,) what their products are, for Rate.work."""
        if name not in PRODUCTS:
            return np.zeros(len(work))
        own = self.own(name)
        if own is not None:
            return own.seconds(work)
        return work[:, MACS] if name in ATTENTION else self.curve.seconds(work)

    def seconds(self, name: str, work: np.ndarray) -> np.ndarray:
        """Returns (operators,) seconds of operators of one name; one that was never seen in a step takes what its own
        curve says, or moves bytes as others do and multiplies by the common curve."""
        rate = self.operators.get(name, self.operators.get(_AS.get(name, "")))
        if rate is None and self.own(name) is not None:
            return self.products(name, work)
        if rate is None:
            unseen = self.operators[OTHER]
            products = self.curve.seconds(work) if name in PRODUCTS else 0.0
            return unseen.seconds(work[:, BYTES]) + products
        return rate.seconds(work[:, BYTES], self.products(name, work))


def fit(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Returns non-negative coefficients of features (n, k <= 4) with the least squares of errors, each weighted by
    the root of its seconds: neither the many short calls decide alone, nor the few long ones.

    Tries every choice of features, which finds the optimum: with few features that is quickest.
    """
    weights = 1 / np.sqrt(np.maximum(seconds, 1e-9))
    scale = np.maximum(features.max(axis=0), 1e-30)
    a, b = features / scale * weights[:, None], seconds * weights
    best, least = np.zeros(features.shape[1]), np.inf
    for count in range(1, features.shape[1] + 1):
        for chosen in itertools.combinations(range(features.shape[1]), count):
            found = np.linalg.lstsq(a[:, chosen], b, rcond=None)[0]
            error = float(((a[:, chosen] @ found - b) ** 2).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                least, best = error, np.zeros(features.shape[1])
                best[list(chosen)] = found
    return best / scale


def fit_rates(
    curve: Curve, seen: Mapping[str, tuple[np.ndarray, np.ndarray]], kernels: Mapping[str, Curve] | None = None
) -> dict[str, Rate]:
    """Returns the rate of every operator. seen: name -> (work (n, 5), seconds (n,)) of calls that were timed."""
    found: dict[str, Rate] = {}
    plain = [calls for name, calls in seen.items() if name not in PRODUCTS]
    bare = Rates(curve, {}, kernels or {})
    others = [(OTHER, (np.concatenate([w for w, _ in plain]), np.concatenate([s for _, s in plain])))] if plain else []
    for name, (work, seconds) in (*seen.items(), *others):
        moved = work[:, BYTES]
        if bare.own(name) is not None:
            found[name] = Rate(0.0, 0.0, float(fit(bare.products(name, work)[:, None], seconds)[0]))
            continue
        features = np.stack([np.ones(len(work)), moved, bare.products(name, work), beyond(moved)], axis=1)
        found[name] = Rate(*(float(value) for value in fit(features, seconds)))
    return found
