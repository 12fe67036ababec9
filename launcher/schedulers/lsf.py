"""LSF's allocation.

Source: IBM Spectrum LSF 10.1 Reference, "Environment variables set for job execution": $LSB_DJOB_HOSTFILE (a host once
for each slot), LSB_MCPU_HOSTS ("hostA 4 hostB 2").
"""

from collections.abc import Mapping

from launcher.hosts.hostfile import Host, merge
from launcher.schedulers.base import Scheduler, read_nodefile


def hosts(environ: Mapping[str, str]) -> list[Host]:
    """Returns the hosts of the file where there is one, else of the variable."""
    if not environ.get("LSB_JOBID"):
        return []
    if environ.get("LSB_DJOB_HOSTFILE"):
        return read_nodefile("LSB_DJOB_HOSTFILE", environ["LSB_DJOB_HOSTFILE"])
    words = environ.get("LSB_MCPU_HOSTS", "").split()
    names, counts = words[::2], words[1::2]
    if len(names) != len(counts) or not all(count.isdigit() and int(count) for count in counts):
        raise ValueError(f"LSB_MCPU_HOSTS must be pairs of a host and its slots, got {environ['LSB_MCPU_HOSTS']!r}")
    return merge(Host(name, int(count)) for name, count in zip(names, counts))


LSF = Scheduler("lsf", "LSF", hosts)
