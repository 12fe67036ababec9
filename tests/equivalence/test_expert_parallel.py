"""The layer spread over ranks equals the layer in one process: outputs, every gradient, norm, initial weights.

One MPI start per world runs all of its layouts (expert_parallel_cases.py), in float64.
"""

import functools

import pytest

from tests.equivalence.expert_parallel_cases import CASES, run_world
from tests.ranks import run_ranks

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Returns world -> per rank what every case gave. A function: a parametrized fixture would start ranks per case."""
    return functools.cache(lambda world: run_ranks(run_world, world, tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, cases in CASES.items() for name in cases])
def test_equals_one_process(results, world, name):
    ranks = [result[name] for result in results(world)]
    for rank, found in enumerate(ranks):
        assert found["errors"]["weights"] == 0.0
        wrong = {what: value for what, value in found["errors"].items() if not value < 1e-12}
        assert not wrong, f"rank {rank}: {wrong}"
    assert len({found["norm"] for found in ranks}) == 1, "the gradient norm differs between ranks"


def test_the_layouts_are_what_they_are_called(results):
    results = results(4)
    degrees = {name: (d.expert, d.expert_shard, d.expert_data) for name, d in
               ((name, found["degrees"]) for name, found in results[0].items())}  # fmt: skip
    assert degrees["one expert a rank"] == (4, 1, 1)
    assert degrees["expert 2 x data 2"] == (2, 1, 2)
    assert degrees["expert 2 x shard 2, automatic"] == (2, 2, 1)
    assert degrees["shard 4"] == (1, 4, 1)
    assert degrees["5 experts over 4 ranks"] == (4, 1, 1)
    assert degrees["3 experts"] == (1, 1, 4)
    assert results[0]["3 experts"]["dispatcher"] == "LocalDispatcher"
    assert results[0]["shard 4"]["dispatcher"] == "AllToAllDispatcher"
    assert all(result["a starved rank"]["kept"][2] == 0 for result in results)
