"""The sharding table and the degrees: pure arithmetic, checked by hand and by covering every element exactly once."""

import itertools
import subprocess
import sys

import pytest

from swin_moe.config import ParallelConfig
from swin_moe.layout import Chunk
from swin_moe.parallel.sharding import Degrees, cut_dim, describe_placement, local_chunk, placement, sub_chunk


@pytest.mark.parametrize(
    ("expert", "shard", "experts", "world", "expected"),
    [
        (0, 0, 8, 1, (1, 1, 1)),
        (0, 0, 8, 4, (4, 1, 1)),
        (0, 0, 8, 8, (8, 1, 1)),
        (0, 0, 32, 32, (32, 1, 1)),
        (0, 0, 8, 32, (8, 4, 1)),  # the official 8 experts on 32 GPUs: 4 ranks share one
        (0, 0, 16, 32, (16, 2, 1)),
        (0, 0, 8, 6, (2, 1, 3)),  # 2 ranks divide 8 experts and 6 ranks
        (0, 0, 4, 6, (2, 1, 3)),
        (0, 0, 3, 4, (1, 1, 4)),
        (2, 0, 8, 8, (2, 1, 4)),
        (8, 0, 8, 32, (8, 4, 1)),
        (2, 2, 8, 8, (2, 2, 2)),
        (0, 2, 8, 8, (4, 2, 1)),
        (3, 0, 8, 3, (3, 1, 1)),  # 3, 3, 2 experts
        (1, 4, 2, 4, (1, 4, 1)),
        (0, 0, 1, 4, (1, 4, 1)),
    ],
)
def test_degrees(expert, shard, experts, world, expected):
    degrees = Degrees.resolve(ParallelConfig(expert=expert, expert_shard=shard), experts, world)
    assert (degrees.expert, degrees.expert_shard, degrees.expert_data) == expected
    assert degrees.world_size == world


@pytest.mark.parametrize(
    ("expert", "shard", "experts", "world", "message"),
    [
        (3, 1, 8, 4, "parallel.expert=3 x parallel.expert_shard=1 = 3 does not divide the world of 4 ranks"),
        (4, 2, 8, 4, "parallel.expert=4 x parallel.expert_shard=2 = 8 does not divide the world of 4 ranks"),
        (0, 3, 8, 4, "parallel.expert_shard=3 does not divide the world of 4 ranks"),
        (8, 0, 4, 8, "parallel.expert=8 is more than model.moe.num_experts=4"),
    ],
)
def test_impossible_degrees_are_named(expert, shard, experts, world, message):
    with pytest.raises(ValueError, match=message):
        Degrees.resolve(ParallelConfig(expert=expert, expert_shard=shard), experts, world)


def test_coordinates_by_hand():
    degrees = Degrees(expert=2, expert_shard=2, expert_data=2)
    assert degrees.coordinates(5) == {"expert": (0, 2), "expert_shard": (1, 2), "expert_data": (1, 2)}
    seen = {tuple(index for index, _ in degrees.coordinates(rank).values()) for rank in range(8)}
    assert len(seen) == 8


def test_placements():
    for name in (
        "layers.2.blocks.1.mlp.experts.fc1_weight",
        "experts.fc2_bias",
        "ema/layers.0.mlp.experts.fc1_bias",
        "optim.exp_avg/layers.2.blocks.1.mlp.experts.fc2_weight",
    ):
        assert placement(name).is_expert
    for name in ("layers.2.blocks.1.mlp.fc1.weight", "mlp.router.weight", "head.bias", "my_experts.fc1_weight"):
        assert not placement(name).is_expert


def test_chunks_by_hand():
    name, shape = "mlp.experts.fc1_weight", (4, 10, 6)
    coordinates = Degrees(3, 2, 1).coordinates
    # 4 experts over 3 ranks are 2, 2, 0 as torch.chunk splits them; 10 hidden channels over 2 are 5, 5.
    assert local_chunk(name, shape, coordinates(1)) == Chunk((0, 5, 0), (2, 5, 6))
    assert local_chunk(name, shape, coordinates(2)) == Chunk((2, 0, 0), (2, 5, 6))
    assert local_chunk(name, shape, coordinates(5)) == Chunk((4, 5, 0), (0, 5, 6))
    assert local_chunk("head.weight", (3, 4), coordinates(5)) == Chunk((0, 0), (3, 4))


@pytest.mark.parametrize("degrees", [(1, 1, 2), (2, 1, 1), (3, 1, 2), (4, 2, 1), (2, 4, 1), (5, 3, 1)])
@pytest.mark.parametrize("shape", [(5, 10, 3), (8, 7)])
def test_every_element_is_held_once_per_replica(degrees, shape):
    degrees = Degrees(*degrees)
    count = dict.fromkeys(itertools.product(*map(range, shape)), 0)
    for rank in range(degrees.world_size):
        chunk = local_chunk("experts.fc1_weight", shape, degrees.coordinates(rank))
        for element in itertools.product(*(range(o, o + n) for o, n in zip(chunk.offset, chunk.size))):
            count[element] += 1
    assert set(count.values()) == {degrees.expert_data}


@pytest.mark.parametrize(
    ("degrees", "hosts", "sentence"),
    [
        ((4, 1, 2), (0,) * 4 + (1,) * 4, "4 consecutive ranks of one node"),
        ((2, 2, 2), (0,) * 4 + (1,) * 4, "4 consecutive ranks of one node"),
        ((1, 1, 4), (0, 1, 0, 1), "1 rank of one node"),
        ((8, 1, 1), (0,) * 4 + (1,) * 4, "on up to 2 nodes, because it does not fit a node of 4 ranks"),
        ((2, 1, 3), (0,) * 3 + (1,) * 3, "on up to 2 nodes, because nodes of 3 ranks are not a multiple"),
        ((2, 1, 2), (0, 1, 0, 1), "on up to 2 nodes, because consecutive ranks are on different nodes"),
    ],
)
def test_placement_of_expert_groups_on_nodes(degrees, hosts, sentence):
    assert sentence in describe_placement(Degrees(*degrees), hosts)


@pytest.mark.parametrize(
    ("shape", "parts", "expected"),
    [((4, 8, 6), 2, 0), ((1, 8, 6), 2, 1), ((3, 9, 6), 2, 2), ((3, 9, 5), 2, 0), ((0, 8), 4, 0)],
)
def test_replicas_are_cut_where_parts_are_equal(shape, parts, expected):
    assert cut_dim(shape, parts) == expected


def test_parts_of_a_box_by_hand():
    box = Chunk((4, 2), (3, 5))
    assert [sub_chunk(box, 0, i, 2) for i in range(2)] == [Chunk((4, 2), (2, 5)), Chunk((6, 2), (1, 5))]
    assert [sub_chunk(box, 1, i, 4).size for i in range(4)] == [(3, 2), (3, 2), (3, 1), (3, 0)]


def test_needs_no_torch():
    """Tools compute layouts for any world on a laptop: the table itself must not pull torch in."""
    program = (
        "import sys, types; sys.modules['torch'] = None; import importlib.util as u\n"
        "for name in ('swin_moe', 'swin_moe.parallel'):\n"
        "    module = types.ModuleType(name); module.__path__ = [name.replace('.', '/')]; sys.modules[name] = module\n"
        "import swin_moe.parallel.sharding"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
