"""The experts: two-layer networks over ragged runs of tokens, or over equally many padded rows each.

Weights in Tutel's layout (tutel/experts/ffn.py): fc1 (E, H, D) is applied transposed, fc2 (E, H, D) as it is.

Shape legend: N rows (token-choice pairs) sorted by expert, E local experts, D model channels, H hidden channels of an
expert.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.moe.dispatch import Slices
from swin_moe.ops.bias_gelu import bias_gelu, is_fused
from swin_moe.ops.grouped_linear import grouped_linear, row_ends, use_grouped
from swin_moe.ops.linear import is_ordinary, is_untouched
from swin_moe.ops.random_draws import UnitDraw
from swin_moe.ops.row_products import LayerOrder, expert_layer, expert_rows, is_few, takes
from swin_moe.randomness import RandomContext, derive_key, truncated_normal_

PARAMETERS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


@dataclass(frozen=True)
class Dropout:
    """Which hidden units to drop: a function of the pair's global index (token index * k + choice) and the unit."""

    rate: float
    random: RandomContext
    layer: int
    pair: Tensor | list[Tensor]  # (N,) int64; a list for rows in slices

    def of(self, number: int) -> "Dropout":
        """Returns the dropout of one slice's rows."""
        return replace(self, pair=self.pair[number])

    def draw(self) -> UnitDraw:
        """Returns which units of the hidden layer (N, H) are dropped; the others are divided by 1 - rate."""
        assert isinstance(self.pair, Tensor), "rows in slices have a dropout of each"
        return UnitDraw(
            self.random,
            self.pair,
            purpose="expert_dropout",
            layer=self.layer,
            drop=self.rate,
            scale=1.0 / (1.0 - self.rate),
        )


def _padded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """Returns what grouped_linear does where every expert has `rows` rows: one batched product."""
    parts = x.view(len(weight), rows, x.shape[1])
    if bias is None:
        return torch.bmm(parts, weight).flatten(0, 1)
    return torch.baddbmm(bias[:, None].to(x.dtype), parts, weight).flatten(0, 1)


def _are_few_rows(tokens: Tensor, *weights: Tensor) -> bool:
    """Returns whether the kernels for few rows compute the experts as one operator."""
    if torch.compiler.is_compiling() or not is_few(tokens.shape[0], tokens.dtype, len(weights[0])):
        return False
    return is_ordinary(tokens) and all(takes(tokens, weight) and is_ordinary(weight) for weight in weights)


def _two_layers(
    tokens: Tensor,
    counts: Any,
    dropout: Dropout | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    draw = None if dropout is None else dropout.draw()
    if isinstance(counts, Tensor) and _are_few_rows(tokens, fc1_weight, fc2_weight):
        return expert_rows(tokens, counts, fc1_weight, fc1_bias, fc2_weight, fc2_bias, draw)
    linear: Callable[..., Tensor]
    fused, ends = is_fused(tokens), None
    if not isinstance(counts, Tensor):
        linear = _padded_linear
    else:
        grouped = tokens.shape[0] > 0 and use_grouped(tokens.device, tokens.dtype, *fc1_weight.shape[1:])
        ends = row_ends(counts, tokens) if grouped or fused else None
        linear = partial(grouped_linear, ends=ends)
    product = linear(tokens, fc1_weight.transpose(1, 2), None if fused else fc1_bias, counts)
    if fused:
        hidden = bias_gelu(product, fc1_bias.float(), ends=ends, draw=draw)
    else:
        hidden = F.gelu(product) if draw is None else draw.apply(F.gelu(product))
    return linear(hidden, fc2_weight, fc2_bias, counts)


class GroupedExperts(nn.Module):
    """E experts, y = W2^T dropout(gelu(W1 x + b1)) + b2; all of the layer's, or this rank's part after parallelize().

    fc2_bias False: the second bias is a frozen zero parameter, as in the official model.
    """

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, *, fc2_bias: bool) -> None:
        super().__init__()
        self.dim, self.hidden_dim, self.num_experts = dim, hidden_dim, num_experts  # global sizes
        shapes = self.global_shapes()
        self.fc1_weight = nn.Parameter(torch.empty(shapes["fc1_weight"]))
        self.fc1_bias = nn.Parameter(torch.empty(shapes["fc1_bias"]))
        self.fc2_weight = nn.Parameter(torch.empty(shapes["fc2_weight"]))
        self.fc2_bias = nn.Parameter(torch.empty(shapes["fc2_bias"]), requires_grad=fc2_bias)
        # (offset, size) per dim of what this rank holds of each parameter.
        self.held = {name: tuple((0, n) for n in shape) for name, shape in shapes.items()}
        # Makes whole experts of this rank's parts; installed by parallelize() where ranks share an expert.
        self.gather: Callable[[Tensor, str], Tensor] | None = None

    def global_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each parameter over all ranks."""
        weight = (self.num_experts, self.hidden_dim, self.dim)
        biases = {"fc1_bias": weight[:2], "fc2_bias": (self.num_experts, self.dim)}
        return {"fc1_weight": weight, "fc2_weight": weight, **biases}

    @property
    def first_expert(self) -> int:
        """Global number of the first local expert."""
        return self.held["fc1_weight"][0][0]

    @property
    def num_local_experts(self) -> int:
        """Experts on this rank; 0 is legal."""
        return self.fc1_weight.shape[0]

    def keep(self, boxes: dict[str, tuple[tuple[int, int], ...]]) -> None:
        """Replaces every parameter by a part of it. boxes: name -> (offset, size) per dim."""
        for name, box in boxes.items():
            whole = getattr(self, name)
            part = whole.detach()[tuple(slice(o, o + n) for o, n in box)].clone()
            setattr(self, name, nn.Parameter(part, requires_grad=whole.requires_grad))
        self.held = dict(boxes)

    def forward(
        self,
        tokens: Tensor | list[Tensor],
        counts: Tensor | int | list[Tensor],
        dropout: Dropout | None = None,
        slices: Slices | None = None,
    ) -> Tensor | list[Tensor]:
        """Returns (N, D), what each row's expert makes of it, in the dtype of `tokens`. To be called outside autocast.

        Args:
            counts: Rows of each local expert, in order: (E,) int64 for ragged runs, one number where all have as many.
            slices: Of rows that are still under way (dispatch.py:Dispatched); all with one copy of the weights.
        """
        first = tokens if isinstance(tokens, Tensor) else tokens[0]
        # grouped_linear converts each expert's matrix when its turn comes; with slices every one of them would again.
        by_expert = slices is None and isinstance(counts, Tensor)
        # Kernels add the first bias to sums in float32, and round after it.
        weights = self._weights(first.dtype, keep_matrices=by_expert, keep_biases=is_fused(first))
        if isinstance(tokens, Tensor) and not isinstance(counts, list):
            return _two_layers(tokens, counts, dropout, *weights)
        assert slices is not None and isinstance(counts, list)
        results = []
        for number, sent in enumerate(tokens):
            rows, own = slices.receive(number, sent), dropout and dropout.of(number)
            results.append(slices.send(number, _two_layers(rows, counts[number], own, *weights)))
        return results

    def take_tokens(self, x: Tensor, pairs: int, dtype: torch.dtype) -> bool:
        """Returns whether `on_tokens` serves: few rows on a processor with kernels, and nothing watches or traces.

        pairs: Of a token and a choice, T * k.
        """
        if pairs == 0 or torch.compiler.is_compiling() or not is_untouched(self) or self.gather is not None:
            return False
        if dtype not in (x.dtype, torch.bfloat16) or not is_ordinary(x):
            return False
        if not is_few(pairs, dtype, max(self.num_local_experts, 1)):
            return False
        weights = self.fc1_weight, self.fc2_weight
        return all(takes(x, weight, dtype) and is_ordinary(weight) for weight in weights)

    def on_tokens(
        self, x: Tensor, gate: Tensor, order: LayerOrder, *, dtype: torch.dtype, dropout: Dropout | None
    ) -> Tensor:
        """Returns (T, D) of the dtype of x: tokens brought to their experts, computed in `dtype` and summed by gates.

        What dispatch, forward and combine do one after the other, as one operator, row_products.expert_layer.
        """
        weights = self._weights(dtype, keep_matrices=True, keep_biases=False)
        draw = None if dropout is None else dropout.draw()
        return expert_layer(x, gate, weights, order, dtype=dtype, draw=draw)

    def parameters_in_order(self) -> list[Tensor]:
        """Returns the parameters in the order of PARAMETERS."""
        return [self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias]

    def _weights(self, dtype: torch.dtype, *, keep_matrices: bool, keep_biases: bool) -> list[Tensor]:
        """Returns the parameters in the order of PARAMETERS, those that are not kept in this dtype."""
        kept = {3: keep_matrices, 2: keep_biases}
        return [w if kept[w.ndim] else w.to(dtype) for w in map(self._whole, PARAMETERS)]

    def _whole(self, name: str) -> Tensor:
        parameter = getattr(self, name)
        return parameter if self.gather is None else self.gather(parameter, name)

    def init_weights(self, seed: int, name: str, std: float) -> None:
        """Fills the weights with truncated normals, the biases with zeros.

        Every expert has a generator of its own, seeded by (seed, name, global number), and is drawn whole on the CPU,
        so that initial weights are the same however experts are spread.
        """
        with torch.no_grad():
            self.fc1_bias.zero_()
            self.fc2_bias.zero_()
            for local in range(self.num_local_experts):
                word = derive_key(seed, zlib.crc32(name.encode()), self.first_expert + local)
                generator = torch.Generator().manual_seed(word)
                for key in ("fc1_weight", "fc2_weight"):
                    whole = torch.empty((self.hidden_dim, self.dim), dtype=torch.float32)
                    truncated_normal_(whole, std, generator)
                    offset, size = self.held[key][1]
                    getattr(self, key)[local].copy_(whole[offset : offset + size])
