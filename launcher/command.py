"""The mpirun command line of a job, and the checks that can be made before anything is started."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Flavor = Literal["mpich", "openmpi"]


@dataclass(frozen=True)
class Job:
    """What the user asked for."""

    ranks: int
    program: list[str]  # "-m module ARGS" or "script.py ARGS"
    hostfile: str = ""
    mpirun: str = ""  # "" = the wheel's, then PATH's
    environment: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raises ValueError, one sentence, for what cannot work."""
        if self.ranks < 1:
            raise ValueError(f"-n must be at least 1, got {self.ranks}")
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


def find_mpi(requested: str) -> Mpi:
    """Returns the MPI to use: the requested mpirun, else the one of this Python's environment, else PATH's.

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
        path = str(own) if own.is_file() else shutil.which("mpirun")
        if path is None:
            raise ValueError(f"no mpirun in {own.parent} or PATH; run: pip install mpich, or name one with --mpi PATH")
    flavor = _flavor(path)
    foreign = Path(path).absolute() != own
    if not foreign or "MPI4PY_LIBMPI" in os.environ or flavor == _flavor_of_wheel():
        return Mpi(path, flavor)
    return Mpi(path, flavor, _library_of(path, flavor))


def build_command(job: Job, mpi: Mpi) -> tuple[list[str], dict[str, str]]:
    """Returns the command line and the variables it needs on top of the environment."""
    environment = dict(job.environment)
    if mpi.library:
        environment["MPI4PY_LIBMPI"] = mpi.library
    command = [mpi.mpirun, "-n", str(job.ranks)]
    if mpi.flavor == "openmpi":
        # Ranks bind themselves; more ranks than cores is normal for tests and demos.
        # Quiet: what it would add to an error of a rank is a page of its own.
        command += ["--quiet", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
        if job.hostfile:
            command += ["--hostfile", job.hostfile]
        for name in environment:
            command += ["-x", name]
        if os.geteuid() == 0:
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    elif job.hostfile:
        command += ["-f", job.hostfile]  # hydra passes the whole environment on by itself
    return [*command, sys.executable, "-m", "launcher.rank", *job.program], environment


def _flavor(mpirun: str) -> Flavor:
    try:
        text = subprocess.run(
            [mpirun, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{mpirun} --version does not work: {error}") from error
    if "HYDRA" in text or "Intel(R) MPI" in text:
        return "mpich"
    if "Open MPI" in text or "OpenRTE" in text or "PRRTE" in text:
        return "openmpi"
    raise ValueError(f"{mpirun} is neither MPICH's (hydra) nor Open MPI's; it says: {text[:80]!r}")


def _flavor_of_wheel() -> Flavor | None:
    """Returns which MPI is installed as a wheel in this environment; mpi4py prefers it to the system's."""
    for name in ("mpich", "openmpi"):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name
    return None


def _library_of(mpirun: str, flavor: Flavor) -> str:
    """Returns the libmpi that belongs to a system mpirun, from its own tree or the dynamic linker's list."""
    names = ("libmpi.so.40",) if flavor == "openmpi" else ("libmpi.so.12", "libmpich.so.12")
    prefix = Path(mpirun).resolve().parent.parent
    for name in names:
        for folder in ("lib", "lib64", f"lib/{os.uname().machine}-linux-gnu"):
            if (prefix / folder / name).exists():
                return str(prefix / folder / name)
    raise ValueError(
        f"{mpirun} is {flavor}, but no {' or '.join(names)} lies under {prefix}; set MPI4PY_LIBMPI to the libmpi "
        "that belongs to it, or leave --mpi out"
    )
