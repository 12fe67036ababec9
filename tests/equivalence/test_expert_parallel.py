"""The layer spread over ranks equals the layer in one process: outputs, every gradient, norm, initial weights.

One MPI start per world runs all of its layouts (expert_parallel_cases.py), in float64.
"""

import pytest

from tests.equivalence.expert_parallel_cases import CASES

pytestmark = pytest.mark.mpi


@pytest.fixture
def results_of(world_results):
    """Returns world -> what every case gave, per rank."""
    return lambda world: [result["spread"] for result in world_results(world)]


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, cases in CASES.items() for name in cases])
def test_equals_one_process(results_of, world, name):
    results = results_of(world)
    ranks = [result[name] for result in results]
    for rank, found in enumerate(ranks):
        assert found["errors"]["weights"] == 0.0
        wrong = {what: value for what, value in found["errors"].items() if not value < 1e-12}
        assert not wrong, f"rank {rank}: {wrong}"
    assert len({found["norm"] for found in ranks}) == 1, "the gradient norm differs between ranks"


def test_the_layouts_are_what_they_are_called(results_of):
    results = results_of(4)
    degrees = {
        name: (d.expert, d.expert_shard, d.expert_data)
        for name, d in ((name, found["degrees"]) for name, found in results[0].items())
    }
    assert degrees["one expert a rank"] == (4, 1, 1)
    assert degrees["expert 2 x data 2"] == (2, 1, 2)
    assert degrees["expert 2 x shard 2, automatic"] == (2, 2, 1)
    assert degrees["shard 4"] == (1, 4, 1)
    assert degrees["5 experts over 4 ranks"] == (4, 1, 1)
    assert degrees["3 experts"] == (1, 1, 4)
    assert results[0]["3 experts"]["dispatcher"] == "LocalDispatcher"
    assert results[0]["shard 4"]["dispatcher"] == "AllToAllDispatcher"
    assert all(result["a starved rank"]["kept"][2] == 0 for result in results)


def test_transports_are_what_was_asked_for_where_ranks_are_on_several_nodes(results_of):
    for result in results_of(4):
        assert all(result[name]["transport"] == "linear" for name in ("5 experts over 4 ranks", "a starved rank"))
        for name in (name for name in CASES[4] if name.startswith("two hops")):
            expected = "linear" if name.endswith("in groups of two") else "hierarchical"
            assert result[name]["transport"] == expected, name
    assert results_of(2)[0]["two hops without levels"]["transport"] == "linear"
