"""Every layout to every other: written by ranks of one, resharded, read by ranks of another, written by them again."""

import itertools
import os

import numpy as np
import pytest

from checkpoint_tools.formats import open_source
from checkpoint_tools.sources.base import Options
from checkpoint_tools.verbs import reshard
from swin_moe.checkpoint import digest, shards
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.load import read_arrays
from swin_moe.checkpoint.pieces import Piece
from swin_moe.checkpoint.save import write_checkpoint
from swin_moe.config import ParallelConfig
from swin_moe.layout import Chunk
from swin_moe.parallel.sharding import Degrees, local_chunk
from tests.checkpoint.samples import CONFIG, FILE_SIZE, STATE, directory_bytes, empty_like, run_threads
from tests.checkpoint_tools.samples import convert

EXPERTS = 8
SINGLE = Degrees(1, 1, 1)
# (world, expert, expert_shard); 0 = what training would choose. 3 divides neither the experts nor their hidden units.
LAYOUTS = [
    (1, 0, 0),
    (2, 0, 0),
    (2, 1, 2),
    (2, 1, 1),
    (3, 3, 1),
    (3, 1, 3),
    (3, 0, 0),
    (4, 0, 0),
    (4, 2, 2),
    (4, 1, 4),
    (6, 6, 1),
    (6, 3, 2),
    (6, 2, 3),
    (6, 0, 0),
    (8, 0, 0),
    (8, 4, 2),
    (8, 2, 2),
    (16, 0, 0),
    (16, 8, 1),
    (16, 4, 4),
]
COVERING = [(LAYOUTS[i], LAYOUTS[(i * 7 + 3) % len(LAYOUTS)]) for i in range(len(LAYOUTS))]
MATRIX = [*COVERING, *(pytest.param(a, b, marks=pytest.mark.full) for a, b in itertools.product(LAYOUTS, LAYOUTS))]


def training_state() -> dict[str, np.ndarray]:
    """Returns parameters of a network with experts, their moments and float32 masters, router and average."""
    random = np.random.default_rng(0)
    shapes = {
        "layers.0.mlp.experts.fc1_weight": (EXPERTS, 10, 6),
        "layers.0.mlp.experts.fc1_bias": (EXPERTS, 10),
        "layers.0.mlp.experts.fc2_weight": (EXPERTS, 10, 6),
        "layers.0.mlp.experts.fc2_bias": (EXPERTS, 6),
        "layers.0.mlp.router.weight": (EXPERTS, 6),
        "norm.weight": (6,),
        "head.weight": (5, 6),
    }
    state = {}
    for name, shape in shapes.items():
        master = random.standard_normal(shape).astype("f4")
        state[f"master/{name}"], state[name] = master, master.astype("f2")
        state[f"optim.exp_avg/{name}"], state[f"optim.exp_avg_sq/{name}"] = master / 3, master**2
    state["ema/head.weight"] = state["master/head.weight"] / 2
    return state


def pieces_of(state: dict[str, np.ndarray], degrees: Degrees, rank: int) -> list[Piece]:
    """Returns what a rank holds by the sharding table."""
    pieces = []
    for name, array in state.items():
        box = local_chunk(name, array.shape, degrees.coordinates(rank))
        part = np.array(array[box.within(Chunk.whole(array.shape))])
        pieces.append(Piece.of(name, part, shape=array.shape, chunk=box))
    return pieces


def write(root, degrees, pieces):
    options = {"state": STATE, "config": CONFIG, "file_size": FILE_SIZE}
    results = run_threads(
        degrees.world_size, lambda comm: write_checkpoint(root, 1, pieces[comm.rank], comm=comm, **options)
    )
    return results[0]


@pytest.fixture(scope="module")
def state():
    return training_state()


@pytest.mark.parametrize(("source", "target"), MATRIX)
def test_round_trips_are_bit_exact(tmp_path, state, source, target):
    a, b = (Degrees.resolve(ParallelConfig(expert=e, expert_shard=s), EXPERTS, w) for w, e, s in (source, target))
    saved = write(tmp_path / "a", a, [pieces_of(state, a, rank) for rank in range(a.world_size)])
    resharded = convert(saved, tmp_path / "resharded", file_size=FILE_SIZE // 3)
    index, loaded = Index.read(resharded), []
    for rank in range(b.world_size):
        expected = pieces_of(state, b, rank)
        wanted = empty_like(expected)
        read_arrays(index, wanted)
        assert all(np.array_equal(x.tensor, y.tensor) for x, y in zip(wanted, expected)), rank
        loaded.append(wanted)
    assert directory_bytes(write(tmp_path / "b", b, loaded)) == directory_bytes(saved)


@pytest.mark.parametrize(("world", "expert", "shard"), LAYOUTS)
def test_the_plan_of_a_layout_tells_what_its_ranks_read(tmp_path, state, monkeypatch, world, expert, shard):
    for module in (reshard, digest, shards):
        monkeypatch.setattr(module, "BLOCK_BYTES", 16)  # so that a rank reads parts of chunks
    degrees = Degrees.resolve(ParallelConfig(expert=expert, expert_shard=shard), EXPERTS, world)
    path = write(tmp_path, SINGLE, [pieces_of(state, SINGLE, 0)])
    reads, real = [], os.preadv

    def noting(fd, buffers, offset):
        count = real(fd, buffers, offset)
        reads.append(count if offset else 0)  # headers lie at 0
        return count

    monkeypatch.setattr(os, "preadv", noting)
    with open_source(path, Options()) as source:
        assert reshard.resolve_degrees(source, world, expert, shard) == degrees
        reshard.check_coverage(source, degrees)
        for rank in range(world):
            pieces, share = pieces_of(state, degrees, rank), reshard.rank_share(source, degrees, rank)
            reads.clear()
            read_arrays(source.index, pieces)
            assert share.held == sum(piece.tensor.nbytes for piece in pieces) and share.read == sum(reads)
            boxes = [p.chunk for p in pieces if "experts" in p.name and p.chunk.numel]
            held = sorted({e for box in boxes for e in range(box.offset[0], box.offset[0] + box.size[0])})
            assert share.experts == ("" if not held else f"{held[0]} to {held[-1]}" if held[1:] else str(held[0]))


def test_a_cut_that_leaves_a_gap_is_refused(tmp_path, state, monkeypatch):
    real = reshard.local_chunk

    def gappy(name, shape, coordinates):
        return Chunk((0, 0), (0, 0)) if name.endswith("head.weight") else real(name, shape, coordinates)

    monkeypatch.setattr(reshard, "local_chunk", gappy)
    path = write(tmp_path, SINGLE, [pieces_of(state, SINGLE, 0)])
    with open_source(path, Options()) as source:
        with pytest.raises(CheckpointError, match=r"tensor \S*head.weight of shape \(5, 6\) cannot be cut"):
            reshard.check_coverage(source, Degrees(2, 1, 1))
