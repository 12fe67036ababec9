"""Every scheduler whose allocations are found and whose batch scripts are written, one row each.

A row is a `Scheduler` in a file of this folder, named in SCHEDULERS here; a new one needs nothing else but its lines in
tests/launcher/schedulers/test_schedulers.py and tests/launcher/schedulers/test_script.py.
"""

from collections.abc import Mapping

from launcher.hosts.hostfile import Host
from launcher.schedulers import flux, kubernetes, lsf, pbs, slurm
from launcher.schedulers.base import Scheduler

SCHEDULERS: tuple[Scheduler, ...] = (slurm.SLURM, pbs.PBS, lsf.LSF, flux.FLUX, kubernetes.KUBERNETES)


def allocation(environ: Mapping[str, str]) -> tuple[Scheduler, list[Host]] | None:
    """Returns the scheduler in whose allocation this process is and the hosts of that, or None outside of any.

    Raises:
        ValueError: The variables contradict themselves, or a file they name cannot be read.
    """
    for scheduler in SCHEDULERS:
        hosts = scheduler.hosts(environ)
        if hosts:
            return scheduler, hosts
    return None
