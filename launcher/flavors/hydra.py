"""MPICH and its relatives: the process manager Hydra.

What they have in common: the whole environment travels to every host (-genvall), SIGTERM and SIGUSR1 are passed on to
the ranks, and a rank that fails ends all.

Sources: MPICH 5.0, `mpiexec -help` and doc/wiki/how_to/Using_the_Hydra_Process_Manager.md (-f, -genvall, -wdir,
-bind-to, -prepend-rank). Intel MPI 2021.18, `mpirun -help`, and the Developer Reference for Linux 2021.15, "Global
Hydra Options" (-machinefile places exactly the ranks it names, where -f takes a name only once) and "Environment
Variables for Process Pinning" (I_MPI_PIN). MVAPICH 4.0, "Using the Hydra Process Manager" (3: -f and lines host:2;
7: -bind-to; 11: -prepend-rank), and src/pm/hydra/mpiexec/options.c for -genvall, -wdir and what --version says: the
version of the MPICH in it, so that only a configure option, such as its prefix, tells it from MPICH, and not always.
That is harmless: the command line is the same, and the variables, which the source of 4.0 no longer has, are for its
forerunners: MV2_ENABLE_AFFINITY (MVAPICH2 2.3.7 User Guide, 6.18 and 11.22), MVP_ENABLE_AFFINITY (source of 3.0).
MPICH's Hydra looks hosts up as IPv4 alone (seen with 5.0.2: "unable to get host address").
"""

import re
import signal
from functools import partial

from launcher.flavors.base import Flavor, Start, with_colons


def _options(start: Start, *, hosts: str, own: tuple[str, ...]) -> list[str]:
    options = ["-n", str(start.ranks)]
    if start.hostfile:
        options += [hosts, start.hostfile]
    options += ["-genvall", "-wdir", start.directory, *own]
    return [*options, "-prepend-rank"] if start.tagged else options


MPICH = Flavor(
    name="mpich",
    title="MPICH",
    version=re.compile("HYDRA"),
    options=partial(_options, hosts="-f", own=("-bind-to", "none")),
    hostfile=with_colons,
    libraries=("libmpi.so.12", "libmpich.so.12"),
    wheel="mpich",
    ipv4_only=True,
    stop=signal.SIGTERM,
)

MVAPICH = Flavor(
    name="mvapich",
    title="MVAPICH",
    version=re.compile(r"HYDRA[\s\S]*(mvapich|mrail)", re.IGNORECASE),
    options=partial(_options, hosts="-f", own=("-bind-to", "none")),
    hostfile=with_colons,
    libraries=("libmpi.so.12",),
    environment={"MVP_ENABLE_AFFINITY": "0", "MV2_ENABLE_AFFINITY": "0"},
    stop=signal.SIGTERM,
)

INTEL_MPI = Flavor(
    name="intel",
    title="Intel MPI",
    version=re.compile(r"Intel\(R\) MPI"),
    options=partial(_options, hosts="-machinefile", own=("-silent-abort",)),
    hostfile=with_colons,
    libraries=("libmpi.so.12", "release/libmpi.so.12"),
    wheel="impi-rt",
    environment={"I_MPI_PIN": "off"},
    stop=signal.SIGTERM,
)
