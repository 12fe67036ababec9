"""LSF: its allocation and its batch script.

Source: IBM Spectrum LSF 10.1, Command Reference, bsub: -R "span[ptile=] affinity[core()]", -W [hour:]minute (at the
limit SIGUSR2, ten minutes later the end), -q, -o (appends, %J), -wa signal and -wt [hour:]minute (before the limit),
-Q "exit_code" (back into the queue), -gpu "num=/host" (where LSB_GPU_NEW_SYNTAX allows it); Using on UNIX: -J, -P;
"Submit jobs with affinity resource requirements": -n. Environment: LSF 10.1, "Environment variables set for job
execution" (LSB_JOBID); LSF 9.3.1, lsf_admin/parallel_jobs_about (LSB_MCPU_HOSTS="hostA 4 hostB 2"). Not checked against
a manual: that $LSB_DJOB_HOSTFILE names a host once for each slot, as scripts of its users take for granted.
"""

from collections.abc import Mapping

from launcher.hosts.hostfile import Host, merge
from launcher.schedulers.base import Batch, Scheduler, read_nodefile, shell_script


def hosts(environ: Mapping[str, str]) -> list[Host]:
    """Returns the hosts of the file where there is one, else of the variable."""
    if not environ.get("LSB_JOBID"):
        return []
    if environ.get("LSB_DJOB_HOSTFILE"):
        return read_nodefile("LSB_DJOB_HOSTFILE", environ["LSB_DJOB_HOSTFILE"])
    words = environ.get("LSB_MCPU_HOSTS", "").split()
    names, counts = words[::2], words[1::2]
    if len(names) != len(counts) or not all(count.isdigit() and int(count) for count in counts):
        raise ValueError(f"LSB_MCPU_HOSTS must be pairs of a host and its slots, got {environ['LSB_MCPU_HOSTS']!r}")
    return merge(Host(name, int(count)) for name, count in zip(names, counts))


def script(batch: Batch) -> str:
    """Returns what bsub reads."""
    minutes = -(-batch.seconds // 60)
    head = [
        f"#BSUB -J {batch.name}",
        f"#BSUB -n {batch.nodes * batch.ranks_per_node}",
        f'#BSUB -R "span[ptile={batch.ranks_per_node}] affinity[core({batch.cores_per_rank})]"',
        f"#BSUB -W {minutes // 60}:{minutes % 60:02d}",
        f"#BSUB -o {batch.name}-%J.out",
        "#BSUB -wa USR1",
        f"#BSUB -wt {max(1, batch.warning // 60)}",
        f'#BSUB -Q "{batch.again}"',
    ]
    head += [f'#BSUB -gpu "num={batch.gpus_per_node}/host"'] if batch.gpus_per_node else []
    head += [f"#BSUB -q {batch.queue}"] if batch.queue else []
    head += [f"#BSUB -P {batch.account}"] if batch.account else []
    return shell_script(
        batch,
        head,
        launch=batch.launch(),
        again="",
        why_again=f"Exit code {batch.again}, saved before its end, has LSF put the job back into the queue (-Q).",
    )


LSF = Scheduler("lsf", "LSF", hosts, script, "bsub <", ".lsf")
