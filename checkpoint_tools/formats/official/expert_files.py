"""Experts that lie in one file per rank, as the official loop and Tutel write them: which box a rank's tensor is.

Rank r of W holds, for E experts: experts [r E / W, (r + 1) E / W) where ranks divide them; where ranks outnumber them,
rows [(r % s) H / s, ...) of the hidden dim of expert r // s, with s = W / E, and of the second bias a slice of
ceil(D / s), the last one padded (microsoft/Tutel, tutel/impls/moe_layer.py and experts/ffn.py).

Shape legend: E experts, H hidden channels of one, D model channels, h and d a rank's share of them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from checkpoint_tools.sources.assembled import Leaf, Part
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.layout import Chunk

MAX_EXPERTS = 1 << 16


class Spread(NamedTuple):
    """How E experts are spread over the ranks."""

    experts: int
    world: int

    @property
    def shards(self) -> int:
        """Ranks that share one expert, s."""
        return max(1, self.world // self.experts)

    @property
    def local(self) -> int:
        """Experts, or parts of one, on a rank."""
        return max(1, self.experts // self.world)

    def check(self, path: Path) -> None:
        """Raises CheckpointError where rank files cannot hold this layout."""
        if self.experts % self.world and self.world % self.experts:
            allowed = [w for w in range(1, self.experts + 1) if self.experts % w == 0]
            raise CheckpointError(
                f"{path}: {self.experts} experts over {self.world} rank files: the number of ranks must divide the "
                f"experts ({', '.join(map(str, allowed))}) or be a multiple of them; other layouts need --to native"
            )


class Layer(NamedTuple):
    """Sizes of one MoE layer."""

    experts: int
    channels: int
    hidden: int


def local_box(spread: Spread, rank: int, kind: str, shape: tuple[int, ...]) -> Chunk:
    """Returns the box of an expert tensor, of this global shape, that a rank's file holds; without padding.

    Args:
        kind: fc1_weight, fc1_bias, fc2_weight or fc2_bias.
    """
    expert, shard = divmod(rank, spread.shards) if spread.shards > 1 else (rank * spread.local, 0)
    width = padded_share(spread, shape[1])
    start = min(shard * width, shape[1])
    size = min(width, shape[1] - start)
    rest = tuple(shape[2:])
    return Chunk((expert, start, *(0 for _ in rest)), (spread.local, size, *rest))


def padded_share(spread: Spread, length: int) -> int:
    """Returns a rank's share of dim 1, ceil(length / s)."""
    return -(-length // spread.shards)


def expert_kind(name: str) -> str:
    """Returns which of an expert's tensors a name of ours, or of its moments, is: fc1_weight, ..."""
    return name.rpartition(".")[2]


def expert_parts(name: str, leaves: Sequence[Leaf], layer: Layer) -> list[Part]:
    """Returns the parts of an expert tensor of ours, one per rank file.

    Early Tutel's biases (E, 1, H), and the shards that Tutel's scatter saves in a wrong shape, are the same elements in
    another shape: they are accepted where the elements are as many as the layout needs, in row-major order.

    Args:
        leaves: By rank. layer: Its sizes.

    Raises:
        CheckpointError: A rank's tensor does not fit; names its file.
    """
    kind, spread = expert_kind(name), Spread(layer.experts, len(leaves))
    shape: tuple[int, ...] = (layer.experts, layer.channels if kind == "fc2_bias" else layer.hidden)
    shape += (layer.channels,) if kind.endswith("weight") else ()
    wanted = (spread.local, padded_share(spread, shape[1]), *shape[2:])
    parts = []
    for rank, leaf in enumerate(leaves):
        held = leaf.record.shape
        record = leaf.record.reshaped(wanted)
        if kind == "fc2_bias" and len(held) == 2 and held[0] == wanted[0] and wanted[1] < held[1] < 2 * wanted[1]:
            record = leaf.record  # gathered with the padding of its slices
        if record is None and held != wanted:
            raise CheckpointError(
                f"{leaf.file.path}: tensor {name} has shape {held}, {wanted} is what rank {rank} of {spread.world} "
                f"holds of {spread.experts} experts"
            )
        box = local_box(spread, rank, kind, shape)
        if box.numel:
            parts.append(Part(box, (leaf._replace(record=record or leaf.record),)))
    return parts


def layer_sizes(
    path: Path,
    prefix: str,
    shapes: Mapping[str, tuple[int, ...]],
    local: tuple[int, ...],
    world: int,
    *,
    dense: tuple[int, ...] | None = None,
) -> Layer:
    """Returns the sizes of the MoE layer `prefix` (layers.2.blocks.1.mlp): by its router and a rank's fc1_weight.

    Where a dense block tells the ratio of hidden to model channels, both must agree: half of the files of ranks that
    share experts would look like whole smaller ones.

    Args:
        shapes: Our name -> shape, of tensors that every rank holds alike.
        local: Shape of fc1_weight in a rank file.
        dense: Shape of fc1.weight of a dense block, where there is one.

    Raises:
        CheckpointError: The router is missing, or files are, or the shape has no single meaning.
    """
    router, matrix = shapes.get(f"{prefix}.router.weight"), shapes.get(f"{prefix}.router.sim_matrix")
    projector = shapes.get(f"{prefix}.router.projector.weight")
    if router is not None and len(router) == 2:
        experts, channels = router
    elif matrix is not None and projector is not None and len(matrix) == len(projector) == 2:
        experts, channels = matrix[1], projector[1]
    else:
        raise CheckpointError(f"{path}: {prefix} has experts but no router, which tells how many there are")
    if not 1 <= experts <= MAX_EXPERTS or channels < 1:
        raise CheckpointError(f"{path}: {prefix}: a router of {experts} experts and {channels} channels is impossible")
    spread = Spread(experts, world)
    spread.check(path)
    expected = channels * dense[0] // dense[1] if dense and len(dense) == 2 and dense[1] else None
    if len(local) == 3 and local[2] == channels:
        hidden = local[1] * spread.shards
        fits = local[0] == spread.local and expected in (None, hidden)
    else:  # Tutel's scatter: flat pieces in another shape
        hidden = expected or 0
        fits = math.prod(local) == spread.local * hidden * channels // spread.shards
    if not fits or not hidden:
        raise CheckpointError(
            f"{path}: {prefix}: {world} rank files with fc1_weight of shape {local} do not make {experts} experts of "
            f"{channels} channels{f' and {expected} hidden channels' if expected else ''}; is a rank file missing?"
        )
    return Layer(experts, channels, hidden)
