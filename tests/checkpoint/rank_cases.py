"""What each MPI rank does in test_ranks.py."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from swin_moe.checkpoint import CheckpointError, CheckpointManager, Piece, save
from swin_moe.checkpoint.pieces import is_expert_tensor
from swin_moe.layout import Chunk, even_split


def global_state() -> dict[str, torch.Tensor]:
    """Returns a state with 6 experts (uneven over 4 ranks) in two dtypes."""
    random = torch.Generator().manual_seed(0)
    fc1 = torch.randn(6, 8, 4, generator=random)
    return {
        "m.experts.fc1_weight": fc1,
        "optim.exp_avg/m.experts.fc1_weight": fc1 / 3,
        "norm.weight": torch.randn(5, generator=random),
        "head.weight": torch.randn(9, 4, generator=random).bfloat16(),
    }


def local_pieces(expert: int, shard: int, rank: int) -> list[Piece]:
    """Returns a rank's pieces: experts along dim 0, H along dim 1, dense whole."""
    pieces = []
    for name, tensor in global_state().items():
        chunk = Chunk.whole(tuple(tensor.shape))
        if is_expert_tensor(name):
            (e, n), (h, m) = even_split(6, expert)[rank // shard], even_split(8, shard)[rank % shard]
            chunk = Chunk((e, h, 0), (n, m, 4))
        part = tensor[chunk.within(Chunk.whole(tuple(tensor.shape)))].clone()
        pieces.append(Piece.of(name, part, shape=tuple(tensor.shape), chunk=chunk))
    return pieces


def save_load_and_fail(root: str) -> dict:
    """Returns what one rank saw: saves in two layouts, loads in the other, a failure on the last rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    result: dict[str, Any] = {}
    for name, expert, shard in (("expert", world, 1), ("shard", 1, world)):
        manager = CheckpointManager(Path(root) / f"{name}{world}", file_size=300)
        manager.save(1, local_pieces(expert, shard, rank), state={"seed": 0}, config={})
        wanted = [
            Piece(p.name, p.shape, p.dtype, p.chunk, torch.zeros_like(p.tensor))
            for p in local_pieces(shard, expert, rank)
        ]
        state = manager.resume(wanted)
        equal = [torch.equal(a.tensor, b.tensor) for a, b in zip(wanted, local_pieces(shard, expert, rank))]
        result[name] = (state, all(equal))
    pieces = local_pieces(world, 1, rank)
    if rank == world - 1:
        object.__setattr__(pieces[0], "tensor", torch.zeros(1))
    try:
        save(Path(root) / f"expert{world}", 2, pieces, state={}, config={})
    except CheckpointError as error:
        result["error"] = str(error)
    return result
