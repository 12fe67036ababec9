"""Flux: its allocation, an instance started by flux alloc or flux batch, and its batch script.

Source: flux-core 0.62, man pages flux-environment(7) (FLUX_URI, FLUX_JOB_ID, set for what runs inside of a job),
flux-broker-attributes(7) (hostlist: the hosts in broker rank order, in short form) and flux-getattr(1). flux-batch(1):
"# flux:" lines, --job-name, --nodes, --nslots, --cores-per-slot, --gpus-per-node, --time-limit, --queue, --bank,
--output; flux(1): --parent. The launcher keeps the time itself, as a signal would go to the brokers.
"""

import shlex
import subprocess
from collections.abc import Mapping

from launcher.hosts.hostfile import Host, merge
from launcher.hosts.nodelist import expand
from launcher.schedulers.base import Batch, Scheduler, shell_script

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


def script(batch: Batch) -> str:
    """Returns what flux batch takes."""
    wanted = {
        "job-name": batch.name, "nodes": batch.nodes, "nslots": batch.nodes * batch.ranks_per_node,
        "cores-per-slot": batch.cores_per_rank, "gpus-per-node": batch.gpus_per_node, "time-limit": f"{batch.seconds}s",
        "queue": batch.queue, "bank": batch.account, "output": f"{batch.name}-{{{{id}}}}.out",
    }  # fmt: skip
    ranks = str(batch.nodes * batch.ranks_per_node)
    return shell_script(
        batch, [f"# flux: --{name}={value}" for name, value in wanted.items() if value],
        launch=batch.launch("-n", ranks, "--save-after", str(batch.seconds - batch.warning)),
        again=f"flux --parent batch {shlex.quote(batch.file)}",
        why_again="Saved before its end: another job continues from there.",
    )  # fmt: skip


FLUX = Scheduler("flux", "Flux", hosts, script, "flux batch", ".flux")
