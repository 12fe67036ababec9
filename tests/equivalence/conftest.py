"""One MPI start per world size, shared by the tests of layouts and of backends."""

import functools

import pytest

from tests.equivalence.backend_cases import run_world
from tests.ranks import run_ranks


@pytest.fixture(scope="session")
def world_results(tmp_path_factory):
    """Returns world -> what run_world gave, per rank; every world is started once."""
    return functools.cache(lambda world: run_ranks(run_world, world, tmp_path_factory.mktemp("ranks"), timeout=300))
