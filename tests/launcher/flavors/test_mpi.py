import os
import subprocess
import sys

import pytest

from launcher import mpi
from launcher.env import RankEnv, without_world
from launcher.machine import binding
from tests.ranks import ROOT


@pytest.mark.parametrize(
    "cores, ranks, shares",
    [
        ([0, 1], 1, [[0, 1]]),
        ([0, 1], 2, [[0], [1]]),
        ([4, 5, 6, 7], 2, [[4, 5], [6, 7]]),
        ([0, 1, 2], 2, [[0], [1, 2]]),
        ([0, 1], 4, [[0], [1], [0], [1]]),
        ([3], 2, [[3], [3]]),
    ],
)
def test_share_of_cores(cores, ranks, shares):
    assert [binding.share_of_cores(cores, rank, ranks) for rank in range(ranks)] == shares


def test_a_process_alone_is_rank_0_and_exports_nothing(monkeypatch):
    monkeypatch.setattr(os, "environ", without_world(os.environ))
    before = dict(os.environ)
    assert mpi.bootstrap() == RankEnv(0, 1, 0, 1, "127.0.0.1", 0)
    assert os.environ == before


def test_a_wrong_pair_of_mpis_is_named_before_it_is_initialized(monkeypatch):
    pytest.importorskip("mpi4py")
    environ = without_world(os.environ) | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    if "Open MPI" in _library_version():
        environ = without_world(os.environ) | {"PMI_RANK": "0", "PMI_SIZE": "2"}
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(mpi.watch, "die_with_parent", lambda parent: None)
    with pytest.raises(ValueError, match="ranks were started by .* mpirun, but mpi4py loads"):
        mpi.bootstrap()


def test_an_impossible_world_is_refused_before_an_mpi_library_is_loaded(monkeypatch):
    environ = without_world(os.environ) | {"PMI_RANK": "0", "PMI_SIZE": "0"}
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(mpi.watch, "die_with_parent", lambda parent: None)
    monkeypatch.setattr(mpi, "_import_mpi", lambda: pytest.fail("loads MPI"))
    with pytest.raises(ValueError, match="PMI_SIZE=0"):
        mpi.bootstrap()


def test_a_rank_with_no_file_left_to_open_outlives_its_watch():
    """It cannot look whether the launcher lives; a rank that took that for its end was killed without a word."""
    code = (
        "import os, resource, time\n"
        "from launcher import watch\n"
        "watch.announce(os.environ)\n"
        "watch._POLL_SECONDS = 0.05\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "assert watch.start_time(os.getpid()) == watch.UNKNOWN\n"
        "watch.start_watching(os.environ[watch.WATCHED])\n"
        "time.sleep(0.5)\n"
        "print('lives', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "lives\n"), done.stderr


def _library_version():
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    return MPI.Get_library_version()
