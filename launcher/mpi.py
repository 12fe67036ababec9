"""Where a rank finds its world, and how all ranks end when one fails.

MPI carries one broadcast (address and port of rank 0); gloo and NCCL move the data afterwards. MPI stays initialized,
because that is how mpirun notices a rank that died.
"""

import atexit
import fcntl
import os
import random
import socket
import sys
import termios
import time
import traceback
from array import array
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TextIO

from launcher import guard, watch
from launcher.env import RankEnv, detect, export, parse_ready, parse_slurm, world_size_of_mpi

_LAST_WORDS_SECONDS = 1.0
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
        sys.excepthook = _end_all_ranks_on_exception
    export(env, os.environ)
    return env


def call(program: Callable[[], Any]) -> None:
    """Runs `program` in a bootstrapped rank; a non-zero exit of one rank ends all with that code."""
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
                _say(f"{stop.code}\n")
            end_all_ranks(stop.code if isinstance(stop.code, int) else 1)
        guard.ended()
        raise
    guard.ended()


def end_all_ranks(code: int) -> None:
    """Ends every rank with this exit code; returns only in a process that MPI did not start.

    To be called instead of a non-zero sys.exit, which the exception hook never sees: a rank that leaves alone waits in
    MPI_Finalize for the others for ever.
    """
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is None or not MPI.Is_initialized() or MPI.Is_finalized():
        return
    guard.ended()
    sys.stdout.flush()
    errors = _errors()
    errors.flush()
    _wait_until_read(errors)
    # Ranks that fail alike (a bad option) meet here within moments; then nobody's last words are cut off.
    everyone = MPI.COMM_WORLD.Ibarrier()
    deadline = time.monotonic() + _LAST_WORDS_SECONDS
    while not everyone.Test() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)  # from the proxy of this host to mpirun
    MPI.COMM_WORLD.Abort(code)
    os._exit(code)


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
        atexit.register(lambda: MPI.Is_finalized() or MPI.Finalize())
    return MPI


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
    """Returns the address of this host on the route to `other_host`; connecting a datagram socket sends nothing."""
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


def _end_all_ranks_on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        end_all_ranks(130)
    _say("".join(traceback.format_exception(kind, error, trace)))
    end_all_ranks(1)


def _errors() -> TextIO:
    """Returns where last words go. sys.stderr is a buffer, which dies with the rank, while the exception hook that
    torch.distributed.init_process_group installs calls ours (torch/distributed/distributed_c10d.py)."""
    return sys.__stderr__ or sys.stderr


def _say(text: str) -> None:
    _errors().write(f"[rank {os.environ.get('RANK', '0')}] {text}")


def _wait_until_read(stream: TextIO) -> None:
    """Waits at most 3 s until mpirun has read what this process wrote; hydra drops unread output when a rank aborts.

    (Seen with MPICH 5.0.2: without this the traceback of an aborting rank is lost in most runs.)
    """
    deadline = time.monotonic() + 3
    unread = array("i", [1])
    try:
        while unread[0] and time.monotonic() < deadline:
            fcntl.ioctl(stream.fileno(), termios.FIONREAD, unread)
            time.sleep(0.02)
    except OSError:  # neither a pipe nor a terminal: a file, which keeps what is written
        return
