"""Slurm: its allocation and its batch script.

Source: Slurm 22.05, man pages sbatch(1), salloc(1) and srun(1), "OUTPUT ENVIRONMENT VARIABLES": SLURM_JOB_NODELIST,
SLURM_TASKS_PER_NODE ("2(x3),1"), SLURM_NTASKS and SLURM_NTASKS_PER_NODE (only where the user asked for tasks),
SLURM_GPUS_ON_NODE. sbatch(1): --signal=B:USR1@SECONDS (to the batch script alone), --requeue, --open-mode=append.
scontrol(1): requeue; SLURM_RESTART_COUNT.
"""

from collections.abc import Mapping

from launcher.env import tasks_of_node
from launcher.hosts.hostfile import Host
from launcher.hosts.nodelist import expand, expand_counts
from launcher.schedulers.base import Batch, Scheduler, shell_script


def hosts(environ: Mapping[str, str]) -> list[Host]:
    """Returns the nodes; ranks of a node are its tasks where tasks were asked for, else its GPUs, else one."""
    nodes = environ.get("SLURM_JOB_NODELIST")
    if not environ.get("SLURM_JOB_ID") or not nodes:
        return []
    step_tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks_of_node(environ) is not None and step_tasks != "1":
        raise ValueError(
            f"srun started this launcher as {step_tasks} tasks, each of which would start all ranks; "
            "leave srun out, or leave the launcher out: srun python -m PROGRAM"
        )
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


def script(batch: Batch) -> str:
    """Returns what sbatch takes."""
    wanted = {
        "job-name": batch.name,
        "nodes": batch.nodes,
        "ntasks-per-node": batch.ranks_per_node,
        "cpus-per-task": batch.cores_per_rank,
        "gpus-per-node": batch.gpus_per_node,
        "time": batch.time,
        "partition": batch.queue,
        "account": batch.account,
        "signal": f"B:USR1@{batch.warning}",
        "output": f"{batch.name}-%j.out",
        "open-mode": "append",
    }
    head = [f"#SBATCH --{name}={value}" for name, value in wanted.items() if value]
    return shell_script(
        batch,
        [*head, "#SBATCH --requeue"],
        launch=batch.launch(),
        again='scontrol requeue "$SLURM_JOB_ID"',
        why_again="Saved before its end: back into the queue, to continue from there.",
    )


SLURM = Scheduler("slurm", "Slurm", hosts, script, "sbatch", ".slurm")
