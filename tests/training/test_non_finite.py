"""A gradient of one rank that is not finite: skipped by all ranks, reported by each with the parameter and the rank."""

import functools

import pytest

from tests.ranks import run_ranks
from tests.training.non_finite import BAD_RANK, BAD_STEP, CASES, run_world

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return functools.cache(lambda: run_ranks(run_world, 2, root, str(root), timeout=200))


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_skip_and_name_the_rank(results, case):
    name, _, precision, _, _ = CASES[case]
    ranks = [result[case] for result in results()]
    for found in ranks:
        skipped = [skipped for skipped, _ in found["updates"]]
        assert skipped == [step == BAD_STEP for step in range(len(skipped))] and len(skipped) >= 3
        assert [unchanged for _, unchanged in found["updates"]] == skipped, "weights moved in the skipped step only"
        assert found["taken"] == len(skipped) - 1
        assert len(found["messages"]) == 1
        message = found["messages"][0]
        assert message.startswith(f"step {BAD_STEP} skipped on all ranks: gradient norm ")
        assert message.endswith(f"first not finite: {name} on rank {BAD_RANK}")
        assert found["scale"] == (4.0 if precision == "fp16" else 1.0)
