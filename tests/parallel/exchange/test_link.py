"""Rows through links on 2 and 4 ranks under MPI (link_cases.py)."""

import pytest

from tests.parallel.exchange.link_cases import run_world
from tests.ranks import TWO_AND_FOUR, run_ranks

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("world", TWO_AND_FOUR)
def test_rows_and_gradients_through_every_transport_and_payload(world, tmp_path):
    run_ranks(run_world, world, tmp_path)
