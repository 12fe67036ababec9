"""Small states, the pieces that ranks of a layout hold of them, and ranks as threads. Imports no torch."""

import threading
from pathlib import Path
from typing import Any

import numpy as np

from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.load import read_arrays
from swin_moe.checkpoint.pieces import Piece, is_expert_tensor
from swin_moe.layout import Chunk, even_split

STATE = {"seed": 7, "samples": 1234, "scaler": {"scale": 65536.0, "growth": None}}
CONFIG = {"model": {"name": "swin_moe", "depths": [2, 2]}}
FILE_SIZE = 4096  # several files for a few kilobytes


def sample_state(seed: int = 0, *, experts: int = 4) -> dict[str, np.ndarray]:
    """Returns a tiny mixed-dtype state: dense, experts, moments, averages, scalars, an empty tensor."""
    random = np.random.default_rng(seed)
    state = {
        "patch_embed.weight": random.standard_normal((12, 3, 4, 4)).astype("f4"),
        "layers.0.mlp.router.weight": random.standard_normal((experts, 16)).astype("f4"),
        "layers.0.mlp.experts.fc1_weight": random.standard_normal((experts, 8, 16)).astype("f4"),
        "layers.0.mlp.experts.fc1_bias": random.standard_normal((experts, 8)).astype("f2"),
        "head.bias": random.standard_normal(7).astype("f8"),
        "counts": random.integers(0, 99, (3, 5)),
        "flag": np.array([True, False, True]),
        "step": np.array(random.integers(99), dtype="i4"),
        "empty": np.zeros((0, 5), "f4"),
    }
    for name in ("layers.0.mlp.experts.fc1_weight", "patch_embed.weight"):
        state[f"optim.exp_avg/{name}"] = state[name] * 2
        state[f"ema/{name}"] = state[name] / 2
    return state


def whole_pieces(state: dict[str, np.ndarray]) -> list[Piece]:
    """Returns what a single process holds."""
    return [Piece.of(name, array) for name, array in state.items()]


def rank_pieces(state: dict[str, np.ndarray], rank: int, *, expert: int, shard: int) -> list[Piece]:
    """Returns what one rank of world = expert x shard holds: experts along dim 0 and H (dim 1), dense replicated."""
    pieces = []
    for name, array in state.items():
        box = Chunk.whole(array.shape)
        if is_expert_tensor(name):
            e, h = even_split(array.shape[0], expert)[rank // shard], even_split(array.shape[1], shard)[rank % shard]
            box = Chunk((e[0], h[0], *box.offset[2:]), (e[1], h[1], *box.size[2:]))
        part = array[box.within(Chunk.whole(array.shape))]
        pieces.append(Piece.of(name, np.array(part), shape=array.shape, chunk=box))
    return pieces


def empty_like(pieces: list[Piece]) -> list[Piece]:
    """Returns the same pieces with arrays to be filled."""
    return [Piece(p.name, p.shape, p.dtype, p.chunk, np.full_like(p.tensor, 1)) for p in pieces]


def read_state(path: Path) -> dict[str, np.ndarray]:
    """Returns all tensors of a checkpoint of a sample state, verified."""
    index = Index.read(path)
    kinds = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "BOOL": "?"}
    state = {name: np.empty(tensor.shape, kinds[tensor.dtype]) for name, tensor in index.tensors.items()}
    read_arrays(index, whole_pieces(state))
    return state


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """True if both states hold the same bytes under the same names."""
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def directory_bytes(path: Path) -> dict[str, bytes]:
    """Returns everything in a checkpoint that belongs to its identity."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.name != "provenance.json"}


class ThreadRanks:
    """Ranks as threads: many worlds in milliseconds. A rank that never comes breaks the barrier after 10 s."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=10)
        self._values: list = [None] * size

    def all_gather(self, rank: int, value: object) -> list:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


class ThreadComm:
    def __init__(self, ranks: ThreadRanks, rank: int, size: int) -> None:
        self._ranks, self.rank, self.size = ranks, rank, size

    def all_gather(self, value: object) -> list:
        return self._ranks.all_gather(self.rank, value)


def run_threads(size: int, function) -> list:
    """Returns what `function(comm)` returned, or the exception it raised, for each rank."""
    ranks = ThreadRanks(size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadComm(ranks, rank, size))
        except Exception as error:  # noqa: BLE001 - handed to the test
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
