"""Every MPI that can start ranks, one row each: how it is recognized, and its words for what the launcher needs.

A row is a `Flavor` in a file of this folder, named in FLAVORS here; a new one needs nothing else but its line in
tests/launcher/flavors/test_flavors.py. The first row whose pattern stands in what `PROGRAM --version` says is the MPI.
"""

import subprocess
from pathlib import Path

from launcher.flavors import hydra, openmpi, pals, srun
from launcher.flavors.base import Flavor

FLAVORS: tuple[Flavor, ...] = (
    openmpi.OPEN_MPI_5,
    openmpi.OPEN_MPI_4,
    hydra.INTEL_MPI,
    hydra.MVAPICH,
    hydra.MPICH,  # after MVAPICH, which is one with another device
    srun.SRUN,
    pals.PALS,
)
_SECONDS = 30


def detect(program: str) -> tuple[str, Flavor]:
    """Returns (the program to start ranks with, its MPI).

    Intel's mpirun is a script that finds mpiexec.hydra in PATH only; where that fails, the mpiexec.hydra beside it is
    meant.

    Raises:
        ValueError: It does not run, or no row knows what it says.
    """
    said = ""
    for path in (program, str(Path(program).with_name("mpiexec.hydra"))):
        if path != program and not Path(path).is_file():
            continue
        said = _version(path)
        for flavor in FLAVORS:
            if flavor.version.search(said):
                return path, flavor
    known = ", ".join(flavor.title for flavor in FLAVORS)
    raise ValueError(f"{program} is none of {known}; {program} --version says: {said[:80]!r}")


def _version(program: str) -> str:
    try:
        finished = subprocess.run(
            [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{program} --version does not work: {error}") from error
    return finished.stdout + finished.stderr
