"""PBS (OpenPBS and PBS Professional): its allocation and its batch script.

Source: PBS Professional 2022.1 User's Guide, section 5.1.3 "The Job's Node File": $PBS_NODEFILE names a host once for
each of its MPI processes (mpiprocs of a chunk, one where it has none). Reference Guide, qsub(1B): -N, -l select with
ncpus, mpiprocs and ngpus, -l walltime, -q, -A, -j oe, -W depend=afterany. There is no signal before the limit, so the
launcher keeps the time itself; qrerun is an operator's, so the job submits its successor.
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
    head += [f"#PBS -l walltime={batch.time}", "#PBS -j oe"]
    head += [f"#PBS -q {batch.queue}"] if batch.queue else []
    head += [f"#PBS -A {batch.account}"] if batch.account else []
    return shell_script(
        batch, head, launch=batch.launch("--save-after", str(batch.seconds - batch.warning)),
        again=f'qsub -W depend=afterany:"$PBS_JOBID" {shlex.quote(batch.file)}',
        why_again="Saved before its end: a job after this one continues from there.",
    )  # fmt: skip


PBS = Scheduler("pbs", "PBS", hosts, script, "qsub", ".pbs")
