"""`reshard SRC DST --world W`: a checkpoint written anew, after proving that a layout can hold and read it.

The native format has the same bytes for every layout, so what is written does not depend on the target. The target
decides what each rank will read: this verb checks that these boxes cover every tensor exactly once, and shows them.
Rank files, which do depend on it, are written by `convert --to official-moe --world W`.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from checkpoint_tools.formats import open_source
from checkpoint_tools.sources.base import Options, Source, SourceTensor
from checkpoint_tools.verbs.arguments import add_format_argument, add_output_arguments
from checkpoint_tools.verbs.convert import write_or_plan
from checkpoint_tools.verbs.inspect import num_experts
from checkpoint_tools.verbs.text import format_bytes, table
from swin_moe.checkpoint.boxes import BoxFinder, find_gap, find_overlap, split_slabs
from swin_moe.checkpoint.digest import BLOCK_BYTES
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.pieces import DTYPE_BYTES, is_expert_tensor
from swin_moe.checkpoint.plan import canonical_chunks
from swin_moe.checkpoint.shards import SLAB_BYTES
from swin_moe.config import ParallelConfig
from swin_moe.layout import Chunk
from swin_moe.parallel.sharding import Degrees, local_chunk, placement

SHOWN = 16  # ranks in the table


class RankShare(NamedTuple):
    """What one rank of the target holds and reads."""

    rank: int
    experts: str
    held: int  # bytes
    read: int  # bytes, whole digest blocks


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add = parser.add_argument
    add("source", type=Path, help="a checkpoint of any format, or a run for its newest one")
    add("destination", type=Path, help="the native checkpoint to write; nothing may be there yet")
    add("--world", type=int, required=True, help="ranks of the target")
    add("--expert", type=int, default=0, help="ranks that experts are spread over (default: as in training)")
    add("--expert-shard", type=int, default=0, help="ranks that share one expert (default: as in training)")
    add_format_argument(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace, options: Options) -> int:
    """Checks the layout, writes, and prints what each rank of the target will read."""
    with open_source(arguments.source, options, arguments.format) as source:
        degrees = resolve_degrees(source, arguments.world, arguments.expert, arguments.expert_shard)
        check_coverage(source, degrees)
        options.report(render(source, degrees))
        write_or_plan(source, arguments.destination, options, dry_run=arguments.dry_run)
    return 0


def resolve_degrees(source: Source, world: int, expert: int, shard: int) -> Degrees:
    """Returns the layout that training would use for these numbers.

    Raises:
        ValueError: The world cannot hold it; names the option.
    """
    if world < 1 or expert < 0 or shard < 0:
        raise ValueError(f"--world must be >= 1 and degrees >= 0, got {world}, {expert}, {shard}")
    experts = min((n for n in (num_experts(source, name) for name in source.tensors) if n), default=1)
    return Degrees.resolve(ParallelConfig(expert=expert, expert_shard=shard), experts, world)


def one_of_each(source: Source) -> dict[str, SourceTensor]:
    """Returns one tensor of each placement and shape: the others of its kind are cut alike."""
    kinds = {(placement(name), tuple(tensor.shape)): name for name, tensor in reversed(source.tensors.items())}
    return {name: source.tensors[name] for name in kinds.values()}


def check_coverage(source: Source, degrees: Degrees) -> None:
    """Raises CheckpointError unless the ranks' boxes cover every element, and replicas apart no element twice."""
    once = degrees.expert * degrees.expert_shard  # further ranks hold replicas of these
    for name, tensor in one_of_each(source).items():
        boxes = {local_chunk(name, tensor.shape, degrees.coordinates(rank)) for rank in range(once)}
        filled = [box for box in boxes if box.numel]
        if find_overlap(filled) is not None or find_gap(tensor.shape, filled) is not None:
            raise CheckpointError(f"{source.path}: tensor {name} of shape {tensor.shape} cannot be cut for {degrees}")


def rank_share(source: Source, degrees: Degrees, rank: int) -> RankShare:
    """Returns what a rank holds of the tensors, and the bytes it reads of a native checkpoint for them."""
    coordinates = degrees.coordinates(rank)
    held = read = 0
    experts: set[int] = set()
    touched: dict[tuple, int] = {}  # tensors of one shape and kind are stored and cut alike
    for name, tensor in source.tensors.items():
        box, item = local_chunk(name, tensor.shape, coordinates), DTYPE_BYTES[tensor.dtype]
        held += box.numel * item
        key = is_expert_tensor(name), tuple(tensor.shape), box, item
        if key not in touched:
            chunks = canonical_chunks(name, tensor.shape)
            found = BoxFinder(chunks).overlapping(box)
            touched[key] = sum(bytes_touched(chunks[i], part, item) for i, part in found)
        read += touched[key]
        if placement(name).is_expert and box.numel:
            experts.update(range(box.offset[0], box.offset[0] + box.size[0]))
    text = f"{min(experts)} to {max(experts)}" if len(experts) > 1 else "".join(map(str, experts))
    return RankShare(rank, text, held, read)


def bytes_touched(chunk: Chunk, part: Chunk, item: int) -> int:
    """Returns the bytes of the digest blocks that reading a part of a stored chunk takes; `item` bytes per element."""
    blocks: set[int] = set()
    for _, first, last in split_slabs(part, chunk, SLAB_BYTES // item):
        blocks.update(range(first * item // BLOCK_BYTES, -(-last * item // BLOCK_BYTES)))
    return sum(min(BLOCK_BYTES, chunk.numel * item - block * BLOCK_BYTES) for block in blocks)


def render(source: Source, degrees: Degrees) -> str:
    """Returns what the ranks of the target hold and read, as text; of many ranks only the first."""
    shares = [rank_share(source, degrees, rank) for rank in range(min(degrees.world_size, SHOWN))]
    rows = [(s.rank, s.experts, format_bytes(s.held), format_bytes(s.read)) for s in shares]
    more = f"\n... and {degrees.world_size - SHOWN} more ranks" if degrees.world_size > SHOWN else ""
    return (
        f"{degrees.world_size} ranks = expert {degrees.expert} x expert_shard {degrees.expert_shard} x "
        f"expert_data {degrees.expert_data}; before ZeRO cuts them further, they hold and read:\n"
        + table(("rank", "experts", "holds", "reads"), rows)
        + more
    )
