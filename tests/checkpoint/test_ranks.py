"""Real ranks under MPI write the bytes of one process, load in other layouts, and learn of each other's failures."""

import pytest

from swin_moe.checkpoint import Piece, list_checkpoints, save
from tests.checkpoint.rank_cases import global_state, save_load_and_fail
from tests.checkpoint.samples import directory_bytes
from tests.ranks import TWO_AND_FOUR, run_ranks


@pytest.mark.mpi
@pytest.mark.parametrize("world", TWO_AND_FOUR)
def test_ranks_agree_with_a_single_process(tmp_path, world):
    pieces = [Piece.of(name, tensor) for name, tensor in global_state().items()]
    expected = directory_bytes(save(tmp_path / "single", 1, pieces, state={"seed": 0}, config={}, file_size=300))
    results = run_ranks(save_load_and_fail, world, tmp_path, str(tmp_path))
    for result in results:
        assert result["expert"] == result["shard"] == ({"seed": 0}, True)
        assert result["error"].startswith(f"rank {world - 1}: tensor m.experts.fc1_weight: an array of shape (1,)")
    for name in ("expert", "shard"):
        published = list_checkpoints(tmp_path / f"{name}{world}")
        assert [path.name for path in published] == ["0000000001"]
        assert directory_bytes(published[0]) == expected
