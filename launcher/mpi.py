"""Where a rank finds its world, and how it runs a program there (how all ranks end: ending.py).

MPI carries one broadcast (address and port of rank 0); gloo and NCCL move the data afterwards. MPI stays initialized,
because that is how mpirun notices a rank that died.
"""

import atexit
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from launcher import ending, guard, watch
from launcher.env import (
    RankEnv,
    detect,
    export,
    parse_ready,
    parse_single,
    parse_slurm,
    tasks_of_node,
    world_size_of_mpi,
)
from launcher.failure import reports
from launcher.failure.kinds import CONFIGURATION, HOST
from launcher.job.plan import describe_cores
from launcher.machine.binding import NO_BIND, bind, gpu_of, set_threads
from launcher.machine.network import read_place
from launcher.machine.software import NO_COMPARE, Software, read_software
from launcher.machine.topology import Core, Machine, read_machine
from launcher.meeting import rendezvous
from launcher.meeting.rendezvous import Facts, Meeting


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
        return parse_single(os.environ)
    sys.excepthook = ending.end_on_exception
    reports.enter("meeting")
    if kind == "slurm" and not _slurm_speaks_mpi():
        env = _meet_over_tcp()
    else:
        watch.die_with_parent(os.getppid())
        if watch.WATCHED in os.environ:
            watch.start_watching(os.environ[watch.WATCHED])
        env = _meet_over_mpi()
    export(env, os.environ)
    reports.enter("running")
    return env


def call(program: Callable[[], Any], *, says_why: bool = True) -> None:
    """Runs `program` in a bootstrapped rank; a non-zero exit of one rank ends all with that code.

    says_why: False for a program of which nothing is known: then its exit code is printed.
    """
    try:
        _join()
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


def _join() -> None:
    try:
        bootstrap()
    except ValueError as error:
        guard.ended()
        ending.fail(f"launcher: {error}", HOST if isinstance(error, rendezvous.NoRoute) else CONFIGURATION)


def _meet_over_mpi() -> RankEnv:
    world_size = world_size_of_mpi(os.environ)
    MPI = _import_mpi()
    world = MPI.COMM_WORLD
    if world.size != world_size:
        raise ValueError(
            f"mpirun started {world_size} ranks, but mpi4py sees {world.size}: mpirun and mpi4py's MPI library "
            f"({_library(MPI)}) do not belong together; use {sys.prefix}/bin/mpirun or set MPI4PY_LIBMPI"
        )
    node = _ranks_of_host(MPI, world)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(node.rank)  # DeepSpeed asserts that it equals LOCAL_RANK
    machine = read_machine(os.environ)
    cores = list(machine.cores)
    if NO_BIND in os.environ:
        set_threads(machine, node.size, os.environ)
    else:
        cores = bind(node, machine, os.environ)
    if NO_COMPARE not in os.environ:
        world.Barrier()  # clocks are read at one time
    facts = _facts(node.rank, machine, cores)
    everyone = world.gather(facts, root=0)
    meeting = world.bcast(None if everyone is None else rendezvous.decide(everyone, os.environ), root=0)
    if not meeting.network and not meeting.on_one_host:  # routes are to be followed: has every host one?
        found = world.allgather((facts.place, rendezvous.reaches(meeting)))
        meeting = rendezvous.without_route(meeting, *zip(*found))
    if everyone is not None:
        _say(everyone, meeting)
    rendezvous.settle(meeting, facts.place, os.environ)
    return RankEnv(world.rank, world.size, node.rank, node.size, meeting.address, meeting.port)


def _ranks_of_host(MPI: Any, world: Any) -> Any:
    """Returns the communicator of the ranks that share this host's memory.

    Not OMPI_COMM_WORLD_LOCAL_RANK: Open MPI permutes it when there are more ranks than cores. Where srun itself started
    the ranks, it knows how many are on this node; MPICH 5.0 takes each for alone if they are dealt out arbitrarily.
    """
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    tasks = tasks_of_node(os.environ)
    if tasks is not None and world.allreduce(tasks != node.size, op=MPI.LOR):
        return world.Split(int(os.environ["SLURM_NODEID"]), world.rank)
    return node


def _meet_over_tcp() -> RankEnv:
    """Returns the facts of a task of srun --mpi=none. Slurm binds its tasks; where it left them free, so do we."""
    from launcher.meeting import tcp

    env = parse_slurm(os.environ)
    machine = read_machine(os.environ)
    cores = list(machine.cores)
    free = len(cores) == os.cpu_count()
    set_threads(machine, env.local_world_size if free else 1, os.environ)
    facts = _facts(env.local_rank, machine, cores)

    def decide(everyone: list[dict[str, Any]]) -> dict[str, Any]:
        known = [Facts.from_json(data) for data in everyone]
        meeting = rendezvous.decide(known, os.environ)
        _say(known, meeting)
        return asdict(meeting)

    meeting = Meeting(**tcp.gather(os.environ, facts.to_json(), decide))
    rendezvous.settle(meeting, facts.place, os.environ)
    return RankEnv(env.rank, env.world_size, env.local_rank, env.local_world_size, meeting.address, meeting.port)


def _facts(local_rank: int, machine: Machine, cores: list[Core]) -> Facts:
    software: Software | None = None
    if NO_COMPARE not in os.environ:
        software = read_software(packages=local_rank == 0)
    described = describe_cores(cores, machine.gpus, gpu_of(machine.gpus, local_rank))
    return Facts(local_rank, read_place(), described, software)


def _say(everyone: list[Facts], meeting: Meeting) -> None:
    said = rendezvous.lines(everyone, meeting, show=rendezvous.SHOW in os.environ)
    if said:
        print("\n".join(said), file=sys.stderr, flush=True)


def _slurm_speaks_mpi() -> bool:
    """Returns whether srun offers PMIx (--mpi=pmix) and mpi4py loads an MPI that takes it: Open MPI."""
    if "PMIX_RANK" not in os.environ:
        return False
    try:
        return "Open MPI" in _load_mpi().Get_library_version()
    except ValueError:
        return False


def _load_mpi() -> Any:
    """Returns mpi4py.MPI, not yet initialized. Raises ValueError where there is none."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"mpi4py is needed under mpirun and cannot be imported: {error}") from error
    return MPI


def _import_mpi() -> Any:
    """Returns mpi4py.MPI, initialized. Raises ValueError where mpirun and library are known not to match.

    Checked before MPI_Init, which would print pages about PMI and abort.
    """
    MPI = _load_mpi()
    started_by_open_mpi = "OMPI_COMM_WORLD_SIZE" in os.environ or "PMIX_RANK" in os.environ
    if started_by_open_mpi != ("Open MPI" in MPI.Get_library_version()):
        raise ValueError(
            f"ranks were started by {'Open MPI' if started_by_open_mpi else 'MPICH'}'s mpirun, but mpi4py loads "
            f"{_library(MPI)}; use {sys.prefix}/bin/mpirun, or point MPI4PY_LIBMPI to the libmpi of that mpirun"
        )
    if not MPI.Is_initialized():
        if tasks_of_node(os.environ) is not None:
            from launcher.machine.shared_memory import remove_abandoned

            remove_abandoned()
        MPI.Init_thread()
        guard.leaves_shared_memory()
        # UCX, inside the mpich wheel, answers a SIGHUP by pages of debug output from then on, and MPICH swallows a
        # SIGUSR1, the request to save of other starters.
        for number in (signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.getsignal(number) or signal.SIG_DFL)
        atexit.register(_finalize, MPI)
    return MPI


def _finalize(MPI: Any) -> None:
    if not MPI.Is_finalized():
        MPI.Finalize()


def _library(MPI: Any) -> str:
    return " ".join(MPI.Get_library_version().replace(",", " ").split()[:4])
