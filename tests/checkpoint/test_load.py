"""Loading: any layout from any other, bit-exact, reading what it needs, refusing what does not fit."""

import itertools
import os

import numpy as np
import pytest

from swin_moe.checkpoint import digest, shards
from swin_moe.checkpoint.errors import CheckpointError, CorruptionError
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.load import read_arrays
from swin_moe.checkpoint.pieces import Piece
from swin_moe.checkpoint.save import write_checkpoint
from swin_moe.layout import Chunk
from tests.checkpoint.samples import CONFIG, FILE_SIZE, STATE, empty_like, rank_pieces, run_threads, sample_state

# (expert, expert_shard) of worlds 1 to 16 with 8 experts; several divide nothing.
LAYOUTS = [(1, 1), (2, 1), (3, 1), (2, 2), (4, 1), (6, 1), (8, 1), (8, 2), (4, 4), (16, 1), (1, 3)]
COVERING = [(LAYOUTS[i], LAYOUTS[(i * 5 + 3) % len(LAYOUTS)]) for i in range(len(LAYOUTS))]
MATRIX = [*COVERING, *(pytest.param(a, b, marks=pytest.mark.full) for a, b in itertools.product(LAYOUTS, LAYOUTS))]


@pytest.mark.parametrize(("source", "target"), MATRIX)
def test_every_layout_loads_what_every_other_saved(tmp_path, source, target):
    state = sample_state(experts=8)

    def save_rank(comm):
        pieces = rank_pieces(state, comm.rank, expert=source[0], shard=source[1])
        options = {"state": STATE, "config": CONFIG, "file_size": FILE_SIZE, "comm": comm}
        return write_checkpoint(tmp_path, 1, pieces, **options)

    path = run_threads(source[0] * source[1], save_rank)[0]
    for rank in range(target[0] * target[1]):
        expected = rank_pieces(state, rank, expert=target[0], shard=target[1])
        wanted = empty_like(expected)
        read_arrays(Index.read(path), wanted)
        for got, want in zip(wanted, expected):
            assert np.array_equal(got.tensor, want.tensor), (rank, got.name)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A tensor of 60 MiB: several blocks and slabs."""
    array = np.arange(3 * 5 << 20, dtype="i4").reshape(3, 5 << 10, 1 << 10)
    path = write_checkpoint(tmp_path_factory.mktemp("big"), 1, [Piece.of("w", array)], state={}, config={})
    return array, Index.read(path)


def read_box(index, array, offset, size, **options):
    wanted = Piece("w", array.shape, "I32", Chunk(offset, size), np.empty(size, "i4"))
    read_arrays(index, [wanted], **options)
    return wanted.tensor


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("offset", "size"),
    [
        ((0, 0, 0), (3, 5120, 1024)),
        ((1, 100, 3), (2, 4000, 7)),
        ((2, 5119, 1023), (1, 1, 1)),
        ((0, 7, 0), (3, 3000, 1024)),
    ],
)
def test_boxes_over_many_blocks_are_exact(big, offset, size, verify):
    array, index = big
    box = tuple(slice(o, o + n) for o, n in zip(offset, size))
    assert np.array_equal(read_box(index, array, offset, size, verify=verify), array[box])


def test_each_needed_block_is_read_once_and_no_other(big, monkeypatch):
    array, index = big
    asked, real = [], os.preadv

    def counting(fd, buffers, offset):
        asked.append(real(fd, buffers, offset))
        return asked[-1]

    monkeypatch.setattr(os, "preadv", counting)
    header = next(iter(index.files.values())).header
    read_box(index, array, (0, 0, 0), array.shape)
    assert sum(asked) == header + array.nbytes
    asked.clear()
    read_box(index, array, (1, 0, 0), (1, 1, 5))
    assert sum(asked) == header + digest.BLOCK_BYTES
    asked.clear()
    read_box(index, array, (1, 0, 0), (1, 1, 5), verify=False)
    assert sum(asked) == 20


def test_reader_memory_is_bounded(big):
    array, index = big
    with shards.ShardReader(index) as reader:
        stored = index.tensors["w"].chunks[0]
        reader.read("w", stored, stored.chunk, np.empty_like(array))
        assert len(reader._buffer) <= shards.SLAB_BYTES + 2 * digest.BLOCK_BYTES


def test_strided_and_scalar_destinations_are_filled(tmp_path):
    state = {"w": np.arange(24.0).reshape(4, 6), "s": np.array(7)}
    path = write_checkpoint(tmp_path, 1, [Piece.of(n, a) for n, a in state.items()], state={}, config={})
    frame, scalar = np.zeros((6, 8)), np.array(0)
    read_arrays(Index.read(path), [Piece.of("w", frame.T[1:5, :]), Piece.of("s", scalar)])
    assert np.array_equal(frame.T[1:5], state["w"]) and scalar == 7 and frame[:, 0].sum() == 0


BAD = {
    "missing": (Piece.of("x", np.zeros(2)), "holds no tensor x"),
    "shape": (Piece.of("w", np.zeros((3, 3))), r"tensor w: has shape \(2, 3\), \(3, 3\) is wanted"),
    "dtype": (Piece.of("w", np.zeros((2, 3), "f4")), "tensor w: has dtype F64, F32 is wanted"),
    "box": (Piece("w", (2, 3), "F64", Chunk((1, 1), (2, 2)), np.zeros((2, 2))), "tensor w: box at"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_before_reading(tmp_path, monkeypatch, case):
    piece, message = BAD[case]
    path = write_checkpoint(tmp_path, 1, [Piece.of("w", np.ones((2, 3)))], state={}, config={})
    good = Piece.of("w", np.zeros((2, 3)))
    with pytest.raises(ValueError, match=message) as caught:
        read_arrays(Index.read(path), [good, piece])
    assert isinstance(caught.value, CheckpointError) or case == "box"
    assert not isinstance(caught.value, CorruptionError)
    assert not good.tensor.any()
