"""The small programs that the launcher tests run as ranks: `python -m tests.launcher.programs NAME FOLDER`."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def _sleep(folder: Path, rank: str) -> None:
    time.sleep(60)


def _raise_on_1(folder: Path, rank: str) -> None:
    if rank == "1":
        raise RuntimeError("boom on rank one")
    time.sleep(60)


def _raise_on_1_with_gloo(folder: Path, rank: str) -> None:
    """torch.distributed wraps the exception hook that it finds."""
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    _raise_on_1(folder, rank)


def _exit_3_on_1(folder: Path, rank: str) -> None:
    if rank == "1":
        sys.exit(3)
    time.sleep(60)


def _exit_3_on_all(folder: Path, rank: str) -> None:
    sys.exit(3)


def _raise_on_all(folder: Path, rank: str) -> None:
    raise RuntimeError("boom everywhere")


def _sentence_on_all(folder: Path, rank: str) -> None:
    sys.exit("the disk is full")


def _sentence_on_every_other(folder: Path, rank: str) -> None:
    sys.exit(f"rank {int(rank) % 2} of 2")


def _leave_with_5_on_1(folder: Path, rank: str) -> None:
    if rank == "1":
        os._exit(5)
    time.sleep(60)


def _crash_on_1(folder: Path, rank: str) -> None:
    if rank == "1":
        ctypes.string_at(0)
    time.sleep(60)


def _kill_1(folder: Path, rank: str) -> None:
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _sentence_on_1(folder: Path, rank: str) -> None:
    if rank == "1":
        sys.exit("the data set is gone")
    time.sleep(60)


def _save_on_signal(folder: Path, rank: str) -> None:
    """Leaves with 0 after a signal, having written its number, as the trainer does with its checkpoint."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.append(number))
    (folder / f"ready-{rank}").touch()
    while not received:
        time.sleep(0.02)
    time.sleep(0.3)
    (folder / f"saved-{rank}").write_text(str(received[0]))


def _ignore_signals(folder: Path, rank: str) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    (folder / f"ready-{rank}").touch()
    time.sleep(60)


def _start_workers(folder: Path, rank: str) -> None:
    """Sleeps beside processes that nothing but a sweep ends: in a session of their own, without the environment, deaf
    to a request, and a fork such as a loader's worker."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    workers = [
        subprocess.Popen(["sleep", "600"], start_new_session=True).pid,
        subprocess.Popen(["sleep", "601"], env={}).pid,
        subprocess.Popen([sys.executable, "-c", code], start_new_session=True).pid,
        os.fork(),
    ]
    if workers[-1] == 0:
        os.setsid()
        time.sleep(600)
    (folder / f"draft-workers-{rank}").write_text(" ".join(map(str, workers)))
    (folder / f"draft-workers-{rank}").rename(folder / f"workers-{rank}")
    time.sleep(600)


def _wait_for_rank_1(folder: Path, rank: str) -> None:
    """Rank 0 waits in a collective of gloo that rank 1 never enters."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    (folder / f"met-{rank}").touch()
    if rank == "0":
        dist.all_reduce(torch.ones(1))
    time.sleep(600)


def _sum_and_wait(folder: Path, rank: str) -> None:
    """Sums over gloo as this package's programs do, writes what this rank knows, and stays until told to go."""
    import socket

    import torch
    import torch.distributed as dist

    from swin_moe.parallel.meeting import meet

    world, port = int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"])
    store = meet(int(rank), world, os.environ["MASTER_ADDR"], port, patience=30, timeout=60)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=world)
    total = torch.ones(1)
    dist.all_reduce(total)
    names = ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    facts = {name: os.environ[name] for name in names} | {"host": socket.gethostname(), "sum": int(total)}
    (folder / f"draft-sum-{rank}").write_text(json.dumps(facts))
    (folder / f"draft-sum-{rank}").rename(folder / f"sum-{rank}")
    while not (folder / "go").exists():
        time.sleep(0.05)
    dist.destroy_process_group()


def _train(folder: Path, rank: str) -> None:
    """Ten steps with a checkpoint each and progress told, from the newest; rank 1 dies in step 5 of the first start."""
    world, start = os.environ["WORLD_SIZE"], os.environ.get("LAUNCHER_RESTART", "0")
    first = int((folder / "step").read_text()) if (folder / "step").exists() else 0
    for step in range(first, 10):
        sys.modules["mpi4py.MPI"].COMM_WORLD.Barrier()
        if rank == "0":
            Path(os.environ["LAUNCHER_PROGRESS"]).write_text(str(step))
            with (folder / "log").open("a") as log:
                log.write(f"{start}/{world}/{step} ")
            (folder / "step").write_text(str(step + 1))
        sys.modules["mpi4py.MPI"].COMM_WORLD.Barrier()
        if step == 4 and rank == "1" and start == "0":
            os.kill(os.getpid(), signal.SIGKILL)


def _train_slowly(folder: Path, rank: str) -> None:
    """As `train`, from 0.5 s a step; whoever is killed, it is not by itself."""
    world, start = os.environ["WORLD_SIZE"], os.environ.get("LAUNCHER_RESTART", "0")
    first = int((folder / "step").read_text()) if (folder / "step").exists() else 0
    for step in range(first, 10):
        time.sleep(0.5)
        sys.modules["mpi4py.MPI"].COMM_WORLD.Barrier()
        if rank == "0":
            Path(os.environ["LAUNCHER_PROGRESS"]).write_text(str(step))
            with (folder / "log").open("a") as log:
                log.write(f"{start}/{world}/{step} ")
            (folder / "step").write_text(str(step + 1))


def _fail_at_step_3(folder: Path, rank: str) -> None:
    """The note tells the step."""
    from launcher import guard

    guard.note("forward of step 3")
    (folder / f"started-{rank}-{os.environ.get('LAUNCHER_RESTART', '0')}").touch()
    if rank == "1":
        raise RuntimeError("the loss is no number")
    time.sleep(60)


def _leave_with_75_twice(folder: Path, rank: str) -> None:
    start = int(os.environ.get("LAUNCHER_RESTART", "0"))
    Path(os.environ["LAUNCHER_PROGRESS"]).write_text(str(start))
    sys.exit(75 if start < 2 else 0)


def _write_environment(folder: Path, rank: str) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "COLOUR")
    facts = [os.environ.get(name, "-") for name in names] + [",".join(map(str, sorted(os.sched_getaffinity(0))))]
    (folder / f"facts-{rank}").write_text(" ".join(facts))


def _count_ranks(folder: Path, rank: str) -> None:
    """Has all ranks meet over MPI where there is one, and writes which it is."""
    MPI = sys.modules.get("mpi4py.MPI")
    total, library = (MPI.COMM_WORLD.allreduce(1), MPI.Get_library_version()) if MPI else (0, "none")
    (folder / f"count-{rank}").write_text(f"{total} {os.environ.get('COLOUR')} {os.getcwd()} {library}")


def _write_variables(folder: Path, rank: str) -> None:
    (folder / f"variables-{rank}").write_text(json.dumps(dict(os.environ)))


def _wait_to_be_killed_once(folder: Path, rank: str) -> None:
    """Hangs in its first start, for somebody to kill; finishes when the scheduler starts it again."""
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    (folder / f"ready-{rank}-{start}").write_text(str(os.getpid()))
    time.sleep(0 if start != "0" else 600)


def _say_two_lines(folder: Path, rank: str) -> None:
    os.write(1, f"first of rank {rank}\nsecond of rank {rank}\n".encode())  # at once: MPIs tag what they read at once


def _write_much(folder: Path, rank: str) -> None:
    """Lines in pieces of every size, some too long for any pipe, some written over, some no text, one never ended."""
    import random

    draw = random.Random(int(rank))
    for number in range(300):
        size = draw.choice([0, 3, 70, 900, 901, 5000])
        line = f"r{rank} {number} ".encode() + draw.choice([b"x", b"\xff\xfe", b"\x1e0 n 1.", b"\x00"]) * size
        if number % 10 == 0:
            line = b"10%\r20%\r" + line
        line += b"\n" * (number < 299)
        for start in range(0, len(line), 1000):
            os.write(1 + number % 2, line[start : start + 1000])
    (folder / f"wrote-{rank}").touch()


def _write_6_megabytes(folder: Path, rank: str) -> None:
    for start in range(0, 100_000, 1000):
        text = "".join(f"{rank} {number:6d} {'x' * 50}\n" for number in range(start, start + 1000)).encode()
        while text:
            text = text[os.write(1, text) :]
    (folder / f"wrote-{rank}").touch()


def _die_in_a_line(folder: Path, rank: str) -> None:
    if rank == "1":
        print("a whole line")
        os.write(1, b"the last wor")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _leave_a_child_with_the_pipe(folder: Path, rank: str) -> None:
    """The child is none of the job's by token or group, and writes on."""
    code = "import os, time\ntime.sleep(0.5)\nos.write(1, b'late\\n')\ntime.sleep(30)"
    child = subprocess.Popen([sys.executable, "-c", code], env={}, start_new_session=True)
    (folder / f"child-{rank}").write_text(str(child.pid))
    print("the program ends")


def _save_and_come_back(folder: Path, rank: str) -> None:
    """Saves at a request and leaves with 75; once started again by the scheduler, finishes."""
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    if start != "0":
        (folder / f"done-{rank}-{start}").touch()
        return
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(number))
    (folder / f"ready-{rank}-{start}").touch()
    while not asked:
        time.sleep(0.02)
    (folder / f"saved-{rank}-{start}").touch()
    sys.exit(75)


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    from launcher.mpi import bootstrap

    rank = str(bootstrap().rank)
    draft = folder / f"draft-{rank}"
    draft.write_text(str(os.getpid()))
    draft.rename(folder / f"pid-{rank}")  # tests wait for the name, then read
    globals()[f"_{name}"](folder, rank)
