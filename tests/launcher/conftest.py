"""The Slurm that the tests of this folder share."""

import pytest

from tests.launcher.schedulers.slurm_cluster import SlurmCluster, why_not


@pytest.fixture(scope="session")
def slurm():
    """Yields a running Slurm of two nodes; skips where there is none."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    cluster = SlurmCluster()
    yield cluster
    cluster.close()
