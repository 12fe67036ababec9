"""Slurm's srun, inside an allocation or making one: it starts ranks by itself and speaks PMIx or PMI-2 with their MPI.

Source: Slurm 22.05, man page srun(1): --ntasks, --ntasks-per-node, --distribution=arbitrary ("processes in-order as
listed" by --nodelist, which may name a host once for each of its ranks), --cpu-bind=none, --export=ALL, --chdir,
--label, --kill-on-bad-exit, --overcommit (more ranks than cores), --mpi, --input=none; "Signals and escape sequences":
SIGUSR1 is forwarded, SIGTERM ends the step. mpi_guide: PMIx for Open MPI, PMI-2 for MPICH and Intel MPI.
"""

import re
import signal

from launcher.flavors.base import Flavor, Start


def _options(start: Start) -> list[str]:
    options = [f"--ntasks={start.ranks}"]
    counts = {host.slots or 1 for host in start.hosts}
    if len(counts) == 1:  # not arbitrary where it can be helped: MPICH then takes every task for alone on its node
        names = [host.name for host in start.hosts]
        options += [f"--nodes={len(names)}", f"--ntasks-per-node={counts.pop()}", f"--nodelist={','.join(names)}"]
    elif counts:
        names = [host.name for host in start.hosts for _ in range(host.slots or 1)]
        options += [f"--nodes={len(start.hosts)}", "--distribution=arbitrary", f"--nodelist={','.join(names)}"]
    options += ["--cpu-bind=none", "--overcommit", "--export=ALL", f"--chdir={start.directory}", "--input=none"]
    options += ["--kill-on-bad-exit=1", "--quiet"]
    if start.pmi:
        options.append(f"--mpi={start.pmi}")
    return [*options, "--label"] if start.tagged else options


SRUN = Flavor(
    name="srun",
    title="srun",
    version=re.compile(r"^slurm(-wlm)? \d", re.MULTILINE),
    options=_options,
    hostfile=None,
    libraries=(),
    end=signal.SIGTERM,  # a killed srun leaves its step running
)
