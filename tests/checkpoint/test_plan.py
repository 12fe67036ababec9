"""Plans: canonical places by hand, who writes what, what a reader copies."""

import json

import pytest

from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.pieces import is_expert_tensor
from swin_moe.checkpoint.plan import (
    Spec,
    assign_shares,
    canonical_chunks,
    chunk_key,
    merge_specs,
    plan_files,
    split_evenly,
)
from swin_moe.layout import Chunk

SPECS = {
    "b.experts.fc1_weight": ((3, 2, 4), "F32"),  # 3 chunks of 32 bytes
    "a": ((5,), "BF16"),  # 10 bytes
    "c": ((), "F64"),  # 8 bytes
}


def test_expert_tensors_are_those_with_experts_in_their_path():
    name = "layers.2.blocks.1.mlp.experts.fc1_weight"
    assert all(is_expert_tensor(p + name) for p in ("", "optim.exp_avg/", "master/", "ema/"))
    assert not any(map(is_expert_tensor, ("layers.0.mlp.router.weight", "experts", "layers.experts_gate.weight")))


def test_files_are_filled_in_name_order_and_aligned_inside():
    plan = plan_files(SPECS, 64)
    placed = [
        (s.file, chunk_key(n, s.chunk), s.begin - plan.files[s.file].header, s.end - s.begin)
        for n, t in plan.tensors.items()
        for s in t.chunks
    ]
    first, second = "shard-00000.safetensors", "shard-00001.safetensors"
    # a (10) and expert 0 (32) fit into 64 bytes, expert 1 does not; inside, 4-byte elements stand before 2-byte ones.
    assert placed == [
        (first, "a@0", 32, 10),
        (first, "b.experts.fc1_weight@0,0,0", 0, 32),
        (second, "b.experts.fc1_weight@1,0,0", 0, 32),
        (second, "b.experts.fc1_weight@2,0,0", 32, 32),
        ("shard-00002.safetensors", "c@", 0, 8),
    ]
    header = plan.headers[first]
    assert len(header) % 64 == 0 and int.from_bytes(header[:8], "little") == len(header) - 8
    assert json.loads(header[8:])["a@0"] == {"dtype": "BF16", "shape": [5], "data_offsets": [32, 42]}


def test_an_oversized_chunk_has_a_file_of_its_own():
    plan = plan_files({"a": ((1,), "F32"), "b": ((100,), "F32"), "c": ((1,), "F32")}, 40)
    assert [t.chunks[0].file[6:11] for t in plan.tensors.values()] == ["00000", "00001", "00002"]


def test_chunks_of_empty_and_scalar_tensors():
    assert canonical_chunks("x.experts.w", (0, 3)) == [Chunk((0, 0), (0, 3))]
    assert canonical_chunks("x.experts.w", ()) == [Chunk((), ())]
    assert plan_files({}, 10).files == {}


def specs_of(*boxes):
    """One list of specs per rank, all of tensor w (4, 6)."""
    return [[Spec("w", (4, 6), "F32", Chunk(*box)) for box in rank] for rank in boxes]


LAYOUTS = {
    "replicated": ([((0, 0), (4, 6))], [((0, 0), (4, 6))]),
    "rows": ([((0, 0), (2, 6))], [((2, 0), (2, 6))]),
    "rows twice": ([((0, 0), (2, 6))], [((2, 0), (2, 6))], [((0, 0), (2, 6))], [((2, 0), (2, 6))]),
    "partly shared": ([((1, 1), (2, 3))], [((0, 0), (4, 6))]),
    "three that overlap": ([((0, 0), (3, 4))], [((1, 2), (3, 4))], [((0, 0), (4, 6)), ((0, 0), (1, 1))]),
    "empty piece": ([((0, 0), (0, 6))], [((0, 0), (4, 6))]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_is_written_once_by_the_lowest_rank_that_holds_it(layout):
    ranks = specs_of(*LAYOUTS[layout])
    owner = {}
    for rank, shares in enumerate(assign_shares(merge_specs(ranks), ranks)):
        for share in shares:
            for i in range(4):
                for j in range(6):
                    if Chunk((i, j), (1, 1)).overlap(share.box):
                        assert (i, j) not in owner
                        assert Chunk((i, j), (1, 1)).overlap(share.piece)
                        owner[i, j] = rank
    for i in range(4):
        for j in range(6):
            holds = [any(s.chunk.overlap(Chunk((i, j), (1, 1))) for s in specs) for specs in ranks]
            assert owner[i, j] == holds.index(True)


def test_uncovered_and_contradicting_pieces_are_named():
    ranks = specs_of([((0, 0), (2, 6))], [((3, 0), (1, 6))])
    with pytest.raises(CheckpointError, match=r"tensor w: no rank holds the box at \(2, 0\) of \(1, 6\)"):
        assign_shares(merge_specs(ranks), ranks)
    other = [Spec("w", (4, 7), "F32", Chunk((0, 0), (4, 7)))]
    with pytest.raises(CheckpointError, match=r"tensor w: rank 0 says shape \(4, 6\) F32, rank 2 says \(4, 7\) F32"):
        merge_specs([*ranks, other])


def test_digest_work_is_split_in_file_order_without_loss():
    plan = plan_files({f"t{i:02d}": ((i + 1,), "F32") for i in range(20)}, 200)
    for parts in (1, 3, 30):
        dealt = split_evenly(plan, parts)
        assert [item for part in dealt for item in part] == [(f"t{i:02d}", 0) for i in range(20)]
        assert len(dealt) == parts
