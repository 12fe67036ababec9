"""What a rank knows about its world, and how each launcher spells it in the environment. Pure parsing, no side effects
except `export`."""

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from typing import Literal

from launcher.hosts.nodelist import expand, expand_counts

Kind = Literal["ready", "mpi", "slurm", "single"]

# Written by torchrun and by `export`: with all of them set, nothing is left to find out.
READY = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# (rank, world size) as named by: Open MPI, MPICH / Intel MPI (hydra, PMI-1 and PMI-2).
MPI = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
SLURM = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
# Step ids from here on are Slurm's own (slurm/slurm.h: SLURM_INTERACTIVE_STEP, SLURM_BATCH_SCRIPT, ...): one process in
# an allocation that may have more tasks.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
MOST_RANKS = (1 << 31) - 1  # an int of C, in which MPI and torch.distributed hold it
_MOST_DIGITS = 1000  # int() takes 4,300
# What a rank inherits from mpirun and from `export`; a process that starts a new world must not pass it on.
_INHERITED = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|MPI_LOCALN?RANK\w*|(PMI|PMIX|OMPI_COMM|HYDI)_\w+"
)


@dataclass(frozen=True)
class RankEnv:
    """The six facts torch.distributed programs read; local_* count ranks on this host."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


def detect(environ: Mapping[str, str]) -> Kind:
    """Returns who started this process.

    "ready" (torchrun, or exported before) wins. MPI comes before Slurm, because mpirun inside a Slurm allocation starts
    its ranks through srun and so shows both. A Slurm batch script itself has no SLURM_STEP_ID and counts as single, and
    so does the shell of an interactive step (salloc).
    """
    if all(environ.get(name) for name in READY):
        return "ready"
    if any(rank in environ and size in environ for rank, size in MPI):
        return "mpi"
    step = environ.get("SLURM_STEP_ID", "")
    if all(environ.get(name) for name in SLURM) and step.isdigit() and int(step) < _FIRST_SPECIAL_STEP:
        return "slurm"
    return "single"


def world_size_of_mpi(environ: Mapping[str, str]) -> int:
    """Returns the number of ranks that mpirun or srun promised this process.

    Raises:
        ValueError: This process is none of them. Asked before an MPI library is loaded: that one would take the process
            for alone, and only the C library's exit leaves it again.
    """
    pairs = [(rank, size) for rank, size in MPI if rank in environ and size in environ]
    return _rank_and_size(environ, *(pairs[0] if pairs else ("SLURM_PROCID", "SLURM_NTASKS")))[1]


def rank_of(environ: Mapping[str, str]) -> str:
    """Returns this process's rank as whoever started it tells it, "?" where nobody does."""
    names = [rank for rank, _ in MPI] + ["SLURM_PROCID", "RANK"]
    return next((environ[name] for name in names if environ.get(name)), "?")


def parse_ready(environ: Mapping[str, str]) -> RankEnv:
    """Returns the exported facts. Raises ValueError naming the variable that is no number or out of range.

    A missing LOCAL_RANK (only RANK and so on set by hand) is taken as one host.
    """
    rank, world_size = _rank_and_size(environ, "RANK", "WORLD_SIZE")
    local_rank = _number(environ, "LOCAL_RANK", rank)
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", world_size)
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise ValueError(f"environment variable MASTER_PORT must be in [1, 65535], got {port}")
    return RankEnv(rank, world_size, local_rank, local_world_size, environ["MASTER_ADDR"], port)


def parse_single(environ: Mapping[str, str]) -> RankEnv:
    """Returns the facts of a process that nothing started as one of several.

    Raises:
        ValueError: WORLD_SIZE says that it is one of several, and variables that would say which are missing.
    """
    missing = [name for name in READY if not environ.get(name)]
    if environ.get("WORLD_SIZE") and _number(environ, "WORLD_SIZE") > 1:
        raise ValueError(
            f"WORLD_SIZE={environ['WORLD_SIZE']} is set, but {', '.join(missing)} is not; unset it, or start the ranks "
            "with python -m launcher"
        )
    return RankEnv(0, 1, 0, 1, "127.0.0.1", 0)


def speaks_first(environ: Mapping[str, str]) -> bool:
    """Returns whether this process says what all ranks of a world would say alike: rank 0 does."""
    return detect(environ) == "single" or environ.get("RANK", "0") == "0"


def parse_slurm(environ: Mapping[str, str]) -> RankEnv:
    """Returns the facts of an srun task; rank 0 lives on the step's first host, the port follows from the job id.

    Ports 20000-39999: above the usual services, below Linux's ephemeral range for the most part; job and step ids keep
    two steps on one host apart.
    """
    rank, world_size = _rank_and_size(environ, "SLURM_PROCID", "SLURM_NTASKS")
    hosts = expand(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or "127.0.0.1")
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(world_size)
    local_world_size = expand_counts(tasks)[_number(environ, "SLURM_NODEID", 0)]
    job, step = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_STEP_ID")
    master = hosts[0] if len(hosts) > 1 else "127.0.0.1"
    port = 20000 + (job * 7 + step) % 20000
    return RankEnv(rank, world_size, _number(environ, "SLURM_LOCALID"), local_world_size, master, port)


def tasks_of_node(environ: Mapping[str, str]) -> int | None:
    """Returns how many tasks srun started on this node; None where it did not start this very process.

    What it started may be an mpirun's daemon, whose ranks inherit these variables; they know their world from others.
    """
    names = ("HYDI_CONTROL_FD", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")
    step = environ.get("SLURM_STEP_ID", "")
    if any(name in environ for name in names) or not step.isdigit() or int(step) >= _FIRST_SPECIAL_STEP:
        return None
    if not all(environ.get(name) for name in ("SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE")):
        return None
    return expand_counts(environ["SLURM_STEP_TASKS_PER_NODE"])[_number(environ, "SLURM_NODEID")]


def export(env: RankEnv, environ: MutableMapping[str, str]) -> None:
    """Writes the facts under the names torch.distributed reads."""
    environ.update({name.upper(): str(value) for name, value in asdict(env).items()})


def without_world(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment less everything that describes the world this process itself may be a rank of."""
    return {name: value for name, value in environ.items() if not _INHERITED.fullmatch(name)}


def _rank_and_size(environ: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    rank, size = _number(environ, rank_name), _number(environ, size_name)
    if size > MOST_RANKS:
        raise ValueError(f"environment variable {size_name} must be in [1, {MOST_RANKS}], got {size}")
    if rank >= size:
        raise ValueError(f"{rank_name} must be in [0, {size_name}), got {rank_name}={rank} and {size_name}={size}")
    return rank, size


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdigit()):
        raise ValueError(f"environment variable {name} must be a whole number >= 0, got {text!r}")
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"environment variable {name} must be a whole number >= 0, got one of {len(text)} digits")
    return int(text)
