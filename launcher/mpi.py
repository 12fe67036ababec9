"""Where a rank finds its world, and how it runs a program there (how all ranks end: ending.py).

MPI carries one broadcast (address and port of rank 0); gloo and NCCL move the data afterwards. MPI stays initialized,
because that is how mpirun notices a rank that died.
"""

import atexit
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from launcher import ending, guard, watch
from launcher.env import RankEnv, detect, export, parse_ready, parse_slurm, world_size_of_mpi

NO_BIND = "LAUNCHER_NO_BIND"  # set: ranks keep the cores they were started with


def bootstrap() -> RankEnv:
    """Returns this rank's facts and exports them as RANK, WORLD_SIZE and so on (env.RankEnv).

    Works under `python -m launcher`, plain mpirun, torchrun, srun and alone; alone, nothing is exported. A second call
    changes nothing. Under MPI it also binds the rank to its cores and makes an uncaught exception end every rank.

    Raises:
        ValueError: The environment contradicts itself, or mpirun and mpi4py belong to different MPIs.
    """
    kind = detect(os.environ)
    if kind == "ready":
        return parse_ready(os.environ)
    if kind == "single":
        return RankEnv(0, 1, 0, 1, "127.0.0.1", 0)
    if kind == "slurm":
        env = parse_slurm(os.environ)
        if env.master_addr == "127.0.0.1":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        watch.die_with_parent(os.getppid())
        if watch.WATCHED in os.environ:
            watch.start_watching(os.environ[watch.WATCHED])
        env = _rendezvous()
        sys.excepthook = ending.end_on_exception
    export(env, os.environ)
    return env


def call(program: Callable[[], Any], *, says_why: bool = True) -> None:
    """Runs `program` in a bootstrapped rank; a non-zero exit of one rank ends all with that code.

    says_why: False for a program of which nothing is known: then its exit code is printed.
    """
    try:
        bootstrap()
    except ValueError as error:
        guard.ended()
        sys.exit(f"launcher: {error}")
    try:
        program()
    except SystemExit as stop:
        if stop.code not in (None, 0):
            if not isinstance(stop.code, int):
                ending.end_all_ranks(1, str(stop.code))
            else:
                ending.end_all_ranks(stop.code, "" if says_why else f"exited with code {stop.code}")
        guard.ended()
        raise
    guard.ended()


def share_of_cores(cores: Sequence[int], local_rank: int, local_world_size: int) -> list[int]:
    """Returns the contiguous share of one local rank; with more ranks than cores, ranks take turns, one core each."""
    if local_world_size >= len(cores):
        return [cores[local_rank % len(cores)]]
    low, high = (i * len(cores) // local_world_size for i in (local_rank, local_rank + 1))
    return list(cores[low:high])


def _rendezvous() -> RankEnv:
    world_size = world_size_of_mpi(os.environ)
    MPI = _import_mpi()
    world = MPI.COMM_WORLD
    if world.size != world_size:
        raise ValueError(
            f"mpirun started {world_size} ranks, but mpi4py sees {world.size}: mpirun and mpi4py's MPI library "
            f"({_library(MPI)}) do not belong together; use {sys.prefix}/bin/mpirun or set MPI4PY_LIBMPI"
        )
    # Not OMPI_COMM_WORLD_LOCAL_RANK: Open MPI permutes it when there are more ranks than cores.
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_host = world.allreduce(node.size, op=MPI.MIN) == world.size
    hosts = world.gather(socket.gethostname(), root=0)
    meeting_point = None
    if world.rank == 0:
        address = "127.0.0.1" if one_host else _address_seen_from(next((h for h in hosts if h != hosts[0]), hosts[0]))
        meeting_point = address, _free_port()
    address, port = world.bcast(meeting_point, root=0)
    if one_host:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(node.rank)  # DeepSpeed asserts that it equals LOCAL_RANK
    if NO_BIND not in os.environ:
        _bind(node)
    return RankEnv(world.rank, world.size, node.rank, node.size, address, port)


def _import_mpi() -> Any:
    """Returns mpi4py.MPI, initialized. Raises ValueError where mpirun and library are known not to match.

    Checked before MPI_Init, which would print pages about PMI and abort.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"mpi4py is needed under mpirun and cannot be imported: {error}") from error
    started_by_open_mpi = "OMPI_COMM_WORLD_SIZE" in os.environ
    if started_by_open_mpi != ("Open MPI" in MPI.Get_library_version()):
        raise ValueError(
            f"ranks were started by {'Open MPI' if started_by_open_mpi else 'MPICH'}'s mpirun, but mpi4py loads "
            f"{_library(MPI)}; use {sys.prefix}/bin/mpirun, or point MPI4PY_LIBMPI to the libmpi of that mpirun"
        )
    if not MPI.Is_initialized():
        MPI.Init_thread()
        # UCX, inside the mpich wheel, answers a SIGHUP by pages of debug output from then on.
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGHUP) or signal.SIG_DFL)
        atexit.register(_finalize, MPI)
    return MPI


def _finalize(MPI: Any) -> None:
    if not MPI.Is_finalized():
        MPI.Finalize()


def _library(MPI: Any) -> str:
    return " ".join(MPI.Get_library_version().replace(",", " ").split()[:4])


def _free_port() -> int:
    """Returns a port nobody listens on, below Linux's ephemeral range, so no outgoing connection takes it meanwhile."""
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    raise ValueError("no free port between 10000 and 30000 for the ranks to meet at")


def _address_seen_from(other_host: str) -> str:
    """Returns the address of this host on the way to `other_host`; connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((other_host, 9))
        except OSError:
            return socket.gethostname()
        return probe.getsockname()[0]


def _bind(node: Any) -> None:
    """Binds this rank to its share of the host's cores, unless mpirun bound the ranks already."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    everyone = node.allgather(cores)
    if not cores or any(other != cores for other in everyone):
        return
    share = share_of_cores(cores, node.rank, node.size)
    os.sched_setaffinity(0, share)
    os.environ.setdefault("OMP_NUM_THREADS", str(len(share)))
