"""Flux: its allocation, an instance started by flux alloc or flux batch, and its batch script.

Source: flux-core 0.62 (the same in 0.88), man pages flux-environment(7), "INITIAL PROGRAM ENVIRONMENT" (FLUX_URI is set
in a batch script, and little else; flux getattr hostlist), and flux-broker-attributes(7) (hostlist: in broker rank
order, in short form). flux-batch(1): "# flux:" lines at the head; --nodes, --nslots, --cores-per-slot, --gpus-per-slot
(--gpus-per-node is flux submit's alone), --job-name, --time-limit with a unit, --queue, --setattr=bank= (for which
0.65 and later have --bank, too), --output with {{id}}. flux(1): --parent. A slot is all that a node gives, so that its
GPUs need not be a multiple of its ranks. That --signal reaches a batch script is promised by the manual of 0.88, but
not by that of 0.62, so the launcher keeps the time itself.
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
        "job-name": batch.name,
        "nodes": batch.nodes,
        "nslots": batch.nodes,
        "cores-per-slot": batch.ranks_per_node * batch.cores_per_rank,
        "gpus-per-slot": batch.gpus_per_node,
        "time-limit": f"{batch.seconds}s",
        "queue": batch.queue,
        "setattr": batch.account and f"bank={batch.account}",
        "output": f"{batch.name}-{{{{id}}}}.out",
    }
    ranks = str(batch.nodes * batch.ranks_per_node)
    return shell_script(
        batch,
        [f"# flux: --{name}={value}" for name, value in wanted.items() if value],
        launch=batch.launch("-n", ranks, "--save-after", str(batch.seconds - batch.warning)),
        again=f"flux --parent batch {shlex.quote(batch.file)}",
        why_again="Saved before its end: another job continues from there.",
    )


FLUX = Scheduler("flux", "Flux", hosts, script, "flux batch", ".flux")
