"""Slurm's allocation.

Source: Slurm 22.05, man pages sbatch(1), salloc(1) and srun(1), "OUTPUT ENVIRONMENT VARIABLES": SLURM_JOB_NODELIST,
SLURM_TASKS_PER_NODE ("2(x3),1"), SLURM_NTASKS and SLURM_NTASKS_PER_NODE (only where the user asked for tasks),
SLURM_GPUS_ON_NODE.
"""

from collections.abc import Mapping

from launcher.hosts.hostfile import Host
from launcher.hosts.nodelist import expand, expand_counts
from launcher.schedulers.base import Scheduler


def hosts(environ: Mapping[str, str]) -> list[Host]:
    """Returns the nodes; ranks of a node are its tasks where tasks were asked for, else its GPUs, else one."""
    nodes = environ.get("SLURM_JOB_NODELIST")
    if not environ.get("SLURM_JOB_ID") or not nodes:
        return []
    names = expand(nodes)
    tasks = environ.get("SLURM_TASKS_PER_NODE", "")
    asked = environ.get("SLURM_NTASKS") or environ.get("SLURM_NTASKS_PER_NODE")
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if asked and tasks:
        counts = expand_counts(tasks)
        if len(counts) != len(names):
            raise ValueError(f"SLURM_TASKS_PER_NODE={tasks!r} and SLURM_JOB_NODELIST={nodes!r} differ in their number")
    else:
        counts = [int(gpus) if gpus.isdigit() and int(gpus) else 1] * len(names)
    return [Host(name, count) for name, count in zip(names, counts)]


SLURM = Scheduler("slurm", "Slurm", hosts)
