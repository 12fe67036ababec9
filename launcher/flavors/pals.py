"""HPE Cray's Parallel Application Launch Service: mpiexec of Cray EX machines under PBS.

Not its aprun, which has other options.

Sources: HPE's Cray CLI 0.99 (craycli), cray/modules/mpiexec/cli.py, "Run an application using the Parallel Application
Launch Service": -n, --ppn, --hostfile (a name a line), --cpu-bind none, --envall, --wdir, --label; cray/pals.py:
SIGHUP, SIGINT, SIGQUIT, SIGABRT, SIGALRM, SIGTERM, SIGUSR1 and SIGUSR2 are forwarded to the application. ALCF User
Guides (2026), "Running Jobs on Aurora": `-n 8 -ppn 4` places 4 ranks on each of two nodes, block by block. The man
page mpiexec(1) of PALS could not be read, so two things are not checked against a manual: that a name on several lines
takes as many ranks (used only where hosts differ in their number), and what --version says (users report "mpiexec
version 1.8.0 revision ...").
"""

import re
from collections.abc import Sequence

from launcher.flavors.base import Flavor, Start
from launcher.hosts.hostfile import Host


def _per_host(hosts: Sequence[Host]) -> int:
    """Returns the number of ranks that all hosts have, or 0 where they differ."""
    counts = {host.slots or 1 for host in hosts}
    return counts.pop() if len(counts) == 1 else 0


def _hostfile(hosts: Sequence[Host]) -> str:
    if _per_host(hosts):
        return "".join(f"{host.name}\n" for host in hosts)
    return "".join(f"{host.name}\n" * (host.slots or 1) for host in hosts)


def _options(start: Start) -> list[str]:
    options = ["-n", str(start.ranks), "--cpu-bind", "none", "--envall", "--wdir", start.directory]
    if start.hostfile:
        options += ["--hostfile", start.hostfile]
        options += ["--ppn", str(per_host)] if (per_host := _per_host(start.hosts)) else []
    return [*options, "--label"] if start.tagged else options


PALS = Flavor(
    name="pals",
    title="Cray PALS",
    version=re.compile(r"mpiexec version \d"),
    options=_options,
    hostfile=_hostfile,
    libraries=(),  # Cray MPICH comes with the programming environment, beside and not under PALS
)
