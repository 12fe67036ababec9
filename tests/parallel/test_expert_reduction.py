"""Expert gradients summed during backward are those that reduce_expert_gradients sums after it, to the bit."""

import functools

import pytest
import torch
import torch.distributed as dist

from swin_moe.config import ParallelConfig
from swin_moe.parallel import apply
from swin_moe.parallel.apply import expert_parameters, reduce_expert_gradients
from swin_moe.parallel.expert_reduction import ExpertReduction
from swin_moe.parallel.groups import build_groups
from tests.ranks import TWO_AND_FOUR, run_ranks

SIZES = (5, 7, 300, 11, 2)
MICRO_STEPS = (1, 3)


class Layer(torch.nn.Module):
    """A chain of parameters with names of experts'; the last one is used first in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for size in SIZES:
            block = torch.nn.Module()
            block.experts = torch.nn.Module()
            block.experts.fc1_weight = torch.nn.Parameter(torch.linspace(0, 1, size))
            block.experts.fc2_bias = torch.nn.Parameter(torch.ones(size), requires_grad=False)
            self.layers.append(block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a number that depends on all parameters."""
        for block in self.layers:
            x = torch.sin(x + (block.get_parameter("experts.fc1_weight") * x).sum())
        return x


def compare(micro_steps: int) -> list:
    """Returns per step: buckets under way after each backward; whether the gradients are those of the slow way."""
    apply.BUCKET_BYTES = 100
    world = dist.get_world_size()
    groups = build_groups(ParallelConfig(expert=1, expert_shard=1), 1, torch.device("cpu"))
    slow, fast = Layer(), Layer()
    reduction, results = ExpertReduction(fast, groups), []
    for step in range(3):
        under_way = []
        for micro in range(micro_steps):
            x = torch.tensor(0.3 + 0.1 * dist.get_rank() + 0.01 * micro + step)
            slow(x).backward()
            reduction.begin(last=micro == micro_steps - 1)
            fast(x).backward()
            under_way.append(reduction.under_way)
        reduce_expert_gradients(slow, groups, world)
        if step == 1:  # a step that is thrown away leaves nothing behind
            reduction.discard()
        else:
            reduction.finish(world)
            for (name, a), (_, b) in zip(expert_parameters(slow), expert_parameters(fast), strict=True):
                assert a.grad is None or b.grad is not None and torch.equal(a.grad, b.grad), name
        for parameter in (*slow.parameters(), *fast.parameters()):
            parameter.grad = None
        results.append(under_way)
    return results


def compare_each() -> dict[int, list]:
    """Returns micro-steps -> what compare gives."""
    return {micro_steps: compare(micro_steps) for micro_steps in MICRO_STEPS}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Returns world -> what every rank of it gave; a world is started once."""
    return functools.cache(lambda world: run_ranks(compare_each, world, tmp_path_factory.mktemp("ranks")))


@pytest.mark.mpi
@pytest.mark.parametrize("world", TWO_AND_FOUR)
@pytest.mark.parametrize("micro_steps", MICRO_STEPS)
def test_same_bits_and_under_way_before_the_end(compared, world, micro_steps):
    buckets = 3  # of at most 100 bytes or one parameter: 5 and 7 numbers, 300, 11 and 2
    for result in compared(world):
        for under_way in result[micro_steps]:
            assert under_way[:-1] == [0] * (micro_steps - 1) and under_way[-1] == buckets, under_way


def test_a_rank_alone_only_divides():
    layer, groups = Layer(), build_groups(ParallelConfig(expert=1, expert_shard=1), 1, torch.device("cpu"))
    reduction = ExpertReduction(layer, groups)
    reduction.begin(last=True)
    layer(torch.tensor(0.3)).backward()
    before = [p.grad.clone() for _, p in expert_parameters(layer) if p.grad is not None]
    assert reduction.under_way == 0
    reduction.finish(4.0)
    after = [p.grad for _, p in expert_parameters(layer) if p.grad is not None]
    assert len(after) == len(SIZES) and all(torch.equal(a, b / 4) for a, b in zip(after, before))
