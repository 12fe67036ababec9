"""PBS (OpenPBS and PBS Professional): its allocation and its batch script.

Source: OpenPBS 23.06, man pages pbs_resources(7B) (mpiprocs: $PBS_NODEFILE has the host's name so often for each chunk;
ncpus, walltime) and qsub(1B): -N, -l select, -l place=scatter (one chunk a host; without it several share one that has
room), -l walltime, -q, -A, -j oe, -W depend=afterany, PBS_JOBID, and no option
for a signal before the limit, so the launcher keeps the time itself. qrerun(1B) is a manager's or operator's, so the
job submits its successor. ngpus, which pbsnodes(8B) shows, is a resource that the site has to define.
"""

import shlex
from collections.abc import Mapping

from launcher.hosts.hostfile import Host
from launcher.schedulers.base import Batch, Scheduler, read_nodefile, shell_script


def hosts(environ: Mapping[str, str]) -> list[Host]:
    """Returns the hosts of the node file."""
    path = environ.get("PBS_NODEFILE", "")
    return read_nodefile("PBS_NODEFILE", path) if path and environ.get("PBS_JOBID") else []


def script(batch: Batch) -> str:
    """Returns what qsub takes."""
    chunk = f"select={batch.nodes}:ncpus={batch.ranks_per_node * batch.cores_per_rank}:mpiprocs={batch.ranks_per_node}"
    head = [
        f"#PBS -N {batch.name}",
        f"#PBS -l {chunk}" + (f":ngpus={batch.gpus_per_node}" if batch.gpus_per_node else ""),
    ]
    head += ["#PBS -l place=scatter", f"#PBS -l walltime={batch.time}", "#PBS -j oe"]
    head += [f"#PBS -q {batch.queue}"] if batch.queue else []
    head += [f"#PBS -A {batch.account}"] if batch.account else []
    return shell_script(
        batch,
        head,
        launch=batch.launch("--save-after", str(batch.seconds - batch.warning)),
        again=f'qsub -W depend=afterany:"$PBS_JOBID" {shlex.quote(batch.file)}',
        why_again="Saved before its end: a job after this one continues from there.",
    )


PBS = Scheduler("pbs", "PBS", hosts, script, "qsub", ".pbs")
