"""One MPI start per world size, shared by the tests of layouts and of backends."""

import functools

import pytest

from tests.equivalence.backend_cases import run_world
from tests.ranks import run_ranks


@pytest.fixture(scope="session")
def world_results(tmp_path_factory):
    """Returns world -> what run_world gave, per rank; every world is started once, also one that fails."""

    @functools.cache
    def start(world):
        try:
            return run_ranks(run_world, world, tmp_path_factory.mktemp("ranks"), timeout=240)
        except AssertionError as error:
            return error

    def results(world):
        found = start(world)
        if isinstance(found, AssertionError):
            raise found
        return found

    return results
