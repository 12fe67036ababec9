"""HPE Cray's Parallel Application Launch Service: mpiexec of Cray EX machines under PBS, and its aprun.

Source: HPE Cray PALS 1.2, man page mpiexec(1): -n, --hostfile (one host a line, once for each of its ranks), --ppn,
--cpu-bind none, --envall, --wdir, --label; signals other than SIGKILL are forwarded to the application.
"""

import re
from collections.abc import Sequence

from launcher.flavors.base import Flavor, Start
from launcher.hosts.hostfile import Host


def _hostfile(hosts: Sequence[Host]) -> str:
    return "".join(f"{host.name}\n" * (host.slots or 1) for host in hosts)


def _options(start: Start) -> list[str]:
    options = ["-n", str(start.ranks), "--cpu-bind", "none", "--envall", "--wdir", start.directory]
    if start.hostfile:
        options += ["--hostfile", start.hostfile]
    return [*options, "--label"] if start.tagged else options


PALS = Flavor(
    name="pals",
    title="Cray PALS",
    version=re.compile(r"PALS|(mpiexec|aprun) version \d"),
    options=_options,
    hostfile=_hostfile,
    libraries=(),  # Cray MPICH comes with the programming environment, beside and not under PALS
)
