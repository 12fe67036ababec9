"""Slurm's srun, inside an allocation or making one: it starts ranks by itself and speaks PMIx or PMI-2 with their MPI.

Source: Slurm 22.05, man page srun(1): --ntasks, --ntasks-per-node, --distribution=arbitrary ("processes in-order as
listed" by --nodelist, which may name a host once for each of its ranks, or be a file of them, which has a "/" in its
name; ranges are n[1-4]), --cpu-bind=none, --export=ALL, --chdir, --label, --kill-on-bad-exit, --overcommit (more ranks
than cores), --mpi, --input=none; "Signals and escape sequences": SIGUSR1 is forwarded, SIGTERM ends the step.
mpi_guide: PMIx for Open MPI, PMI-2 for MPICH and Intel MPI.
"""

import re
import signal
from collections.abc import Sequence

from launcher.flavors.base import Flavor, Start
from launcher.hosts.hostfile import Host
from launcher.hosts.nodelist import compress

_LONGEST_ARGUMENT = 128 * 1024 - 1024  # bytes; Linux takes 128 KiB, and --nodelist= is part of it


def _options(start: Start) -> list[str]:
    options = [f"--ntasks={start.ranks}"]
    counts = {host.slots or 1 for host in start.hosts}
    if len(counts) == 1:  # not arbitrary where it can be helped: MPICH then takes every task for alone on its node
        names = compress([host.name for host in start.hosts])
        options += [f"--nodes={len(start.hosts)}", f"--ntasks-per-node={counts.pop()}", f"--nodelist={names}"]
    elif counts:
        names = start.hostfile if _hostfile(start.hosts) else ",".join(_names_of_ranks(start.hosts))
        options += [f"--nodes={len(start.hosts)}", "--distribution=arbitrary", f"--nodelist={names}"]
    options += ["--cpu-bind=none", "--overcommit", "--export=ALL", f"--chdir={start.directory}", "--input=none"]
    options += ["--kill-on-bad-exit=1", "--quiet"]
    if start.pmi:
        options.append(f"--mpi={start.pmi}")
    return [*options, "--label"] if start.tagged else options


def _names_of_ranks(hosts: Sequence[Host]) -> list[str]:
    return [host.name for host in hosts for _ in range(host.slots or 1)]


def _hostfile(hosts: Sequence[Host]) -> str:
    """Returns the file of unequal hosts that are too many for an argument; "" = the argument holds them."""
    names = _names_of_ranks(hosts)
    unequal = len({host.slots or 1 for host in hosts}) > 1
    return "\n".join([*names, ""]) if unequal and len(",".join(names)) > _LONGEST_ARGUMENT else ""


SRUN = Flavor(
    name="srun",
    title="srun",
    version=re.compile(r"^slurm(-wlm)? \d", re.MULTILINE),
    options=_options,
    hostfile=_hostfile,
    libraries=(),
    end=signal.SIGTERM,  # a killed srun leaves its step running
)
