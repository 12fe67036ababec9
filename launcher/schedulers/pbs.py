"""The allocation of PBS: OpenPBS, PBS Professional and Torque.

Source: PBS Professional 2022.1 User's Guide, section 5.1.3 "The Job's Node File": $PBS_NODEFILE names a host once for
each of its MPI processes (mpiprocs of a chunk, one where it has none).
"""

from collections.abc import Mapping

from launcher.hosts.hostfile import Host
from launcher.schedulers.base import Scheduler, read_nodefile


def hosts(environ: Mapping[str, str]) -> list[Host]:
    """Returns the hosts of the node file."""
    path = environ.get("PBS_NODEFILE", "")
    return read_nodefile("PBS_NODEFILE", path) if path and environ.get("PBS_JOBID") else []


PBS = Scheduler("pbs", "PBS", hosts)
