"""Flux's allocation: a Flux instance started by flux alloc or flux batch.

Source: flux-core 0.62, man pages flux-environment(7) (FLUX_URI, FLUX_JOB_ID, set for what runs inside of a job),
flux-broker-attributes(7) (hostlist: the hosts in broker rank order, in short form) and flux-getattr(1).
"""

import subprocess
from collections.abc import Mapping

from launcher.hosts.hostfile import Host, merge
from launcher.hosts.nodelist import expand
from launcher.schedulers.base import Scheduler

_SECONDS = 30


def hosts(environ: Mapping[str, str]) -> list[Host]:
    """Returns the hosts of the instance, as many ranks each as come."""
    if not environ.get("FLUX_URI"):
        return []
    try:
        found = subprocess.run(
            ["flux", "getattr", "hostlist"], capture_output=True, text=True, timeout=_SECONDS, env=dict(environ)
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"FLUX_URI is set, but flux getattr hostlist does not work: {error}") from error
    if found.returncode:
        raise ValueError(f"FLUX_URI is set, but flux getattr hostlist says: {found.stderr.strip()[:200]!r}")
    return merge(Host(name, None) for name in expand(found.stdout.strip()))


FLUX = Scheduler("flux", "Flux", hosts)
