"""LSF: its allocation and its batch script.

Source: IBM Spectrum LSF 10.1 Reference, "Environment variables set for job execution": $LSB_DJOB_HOSTFILE (a host once
for each slot), LSB_MCPU_HOSTS ("hostA 4 hostB 2"). bsub: -J, -n, -R "span[ptile=]", -gpu "num=/host", -W [hour:]minute,
-q, -P, -o, -wa and -wt (signal before the limit), -Q (exit codes with which the job goes back into the queue).
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
        f"#BSUB -J {batch.name}", f"#BSUB -n {batch.nodes * batch.ranks_per_node}",
        f'#BSUB -R "span[ptile={batch.ranks_per_node}] affinity[core({batch.cores_per_rank})]"',
        f"#BSUB -W {minutes // 60}:{minutes % 60:02d}", f"#BSUB -o {batch.name}-%J.out",
        "#BSUB -wa USR1", f"#BSUB -wt {max(1, batch.warning // 60)}", f'#BSUB -Q "{batch.again}"',
    ]  # fmt: skip
    head += [f'#BSUB -gpu "num={batch.gpus_per_node}/host"'] if batch.gpus_per_node else []
    head += [f"#BSUB -q {batch.queue}"] if batch.queue else []
    head += [f"#BSUB -P {batch.account}"] if batch.account else []
    return shell_script(
        batch, head, launch=batch.launch(), again="",
        why_again=f"Exit code {batch.again}, saved before its end, has LSF put the job back into the queue (-Q).",
    )  # fmt: skip


LSF = Scheduler("lsf", "LSF", hosts, script, "bsub <", ".lsf")
