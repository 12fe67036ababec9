"""Which other hosts a job has, and on which of them nothing can be started any more."""

import os
import signal
import subprocess
import tempfile

from launcher.failure import line, orphans
from launcher.flavors.base import Start
from launcher.hosts.hostfile import Host
from launcher.job.plan import is_here
from launcher.job.prepare import Prepared

_PROBE_SECONDS = 60.0
_PROBES = 64  # at a time; each is an mpirun that sleeps until its host answers, so a host that does not delays few


def other_hosts(job: Prepared) -> list[str]:
    """Returns the job's hosts but for this one."""
    return [host.name for host in job.plan.hosts if not is_here(host.name)]


def dead_hosts(job: Prepared) -> dict[str, str]:
    """Returns {host: why} of the job's hosts on which nothing can be started any more."""
    from concurrent.futures import ThreadPoolExecutor  # costs every start of the launcher 5 ms, and a failure needs it

    names = other_hosts(job)
    with ThreadPoolExecutor(_PROBES, initializer=_let_children_be_heard) as pool:
        found = list(pool.map(lambda name: _why_not(job, name), names))
    if token := job.environment(os.environ).get(line.TOKEN):
        orphans.sweep(token)  # an ssh that still waits for an answer
    return {name: why for name, why in zip(names, found) if why}


def _let_children_be_heard() -> None:
    """Lets what this thread starts get SIGCHLD, which the launcher blocks for itself: Hydra waits for it for ever."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def _why_not(job: Prepared, host: str) -> str:
    """Returns why mpirun cannot start `true` on a host, "" = it can."""
    flavor, hosts = job.mpi.flavor, (Host(host, 1),)
    with tempfile.NamedTemporaryFile("w", prefix="launcher-host-") as file:
        text = flavor.hostfile(hosts)
        file.write(text)
        file.flush()
        start = Start(job.mpi.mpirun, 1, "/", hosts, file.name if text else "", pmi=job.mpi.pmi)
        try:
            finished = subprocess.run(
                flavor.command(start, ["true"]),
                env=job.environment(os.environ),
                timeout=_PROBE_SECONDS,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                errors="replace",
            )
        except OSError as error:
            return str(error)
        except subprocess.TimeoutExpired:
            return f"it took over {_PROBE_SECONDS:g} s to start nothing there"
    return "" if finished.returncode == 0 else cause(finished.stderr) or f"exit code {finished.returncode}"


def cause(output: str) -> str:
    """Returns the first line that says why nothing was started, "" = nobody said anything.

    That is no line of Hydra's own mpiexec where there are others: it tells that its proxy failed, and may stand before,
    or in the middle of, the proxy's line that tells why.
    """
    said = [words.strip() for words in output.splitlines() if words.strip()]
    return next((words for words in said if "[mpiexec@" not in words), said[0] if said else "")
