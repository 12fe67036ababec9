"""How long all ranks take together, over what the program will use: gloo or NCCL where torch is installed, else MPI."""

import importlib
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from launcher import mpi
from launcher.env import MPI, detect

SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 23)  # bytes
KINDS = ("all_to_all", "all_reduce")
REPEATS = 9
OPEN_SECONDS = 30.0  # beside the import of torch


class Transport(Protocol):
    """Carries collectives of all ranks."""

    def open(self, rank: int, world: int, local_rank: int, address: str, port: int) -> None:
        """Meets the others; rank 0 may listen at this address and port."""

    def barrier(self) -> None:
        """Waits for all ranks."""

    def make(self, kind: str, size: int) -> Callable[[], object]:
        """Returns what runs a collective of so many bytes once, to its end."""

    def close(self) -> None:
        """Leaves."""


class Torch:
    """torch.distributed, on this rank's device. Imported when it is opened: that takes a second or more."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._torch: Any = None
        self._device: Any = None

    def open(self, rank: int, world: int, local_rank: int, address: str, port: int) -> None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of every host without a name
        self._torch = importlib.import_module("torch")
        self._dist = importlib.import_module("torch.distributed")
        self._device = self._torch.device("cpu")
        if self._backend == "nccl":
            self._device = self._torch.device("cuda", local_rank % self._torch.cuda.device_count())
            self._torch.cuda.set_device(self._device)
        place = f"[{address}]" if ":" in address else address
        self._dist.init_process_group(self._backend, init_method=f"tcp://{place}:{port}", rank=rank, world_size=world)
        self.barrier()

    def barrier(self) -> None:
        self._dist.all_reduce(self._torch.zeros(1, device=self._device))
        self._wait()

    def make(self, kind: str, size: int) -> Callable[[], object]:
        world = self._dist.get_world_size()
        count = max(1, size // 4 // world) * world
        source = self._torch.zeros(count, device=self._device)
        target = self._torch.zeros(count, device=self._device)

        def run() -> None:
            if kind == "all_to_all":
                self._dist.all_to_all_single(target, source)
            else:
                self._dist.all_reduce(source)
            self._wait()

        return run

    def close(self) -> None:
        self._dist.destroy_process_group()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize(self._device)


class Mpi:
    """The MPI that started the ranks."""

    def __init__(self) -> None:
        self._mpi: Any = None

    def open(self, rank: int, world: int, local_rank: int, address: str, port: int) -> None:
        mpi.bootstrap()
        self._mpi = sys.modules["mpi4py.MPI"]

    def barrier(self) -> None:
        self._mpi.COMM_WORLD.Barrier()

    def make(self, kind: str, size: int) -> Callable[[], object]:
        world = self._mpi.COMM_WORLD
        count = max(1, size // 4 // world.size) * world.size
        source, target = ([bytearray(4 * count), self._mpi.FLOAT] for _ in range(2))
        return lambda: (world.Alltoall if kind == "all_to_all" else world.Allreduce)(source, target)

    def close(self) -> None:
        return  # MPI is this process's, and stays


TRANSPORTS: dict[str, Callable[[], Transport]] = {
    "nccl": lambda: Torch("nccl"),
    "gloo": lambda: Torch("gloo"),
    "mpi": Mpi,
}  # in the order in which they are preferred; --preflight-over names one


def available(environ: Mapping[str, str], has_gpu: bool) -> list[str]:
    """Returns the transports this rank can take part in, as far as that shows without importing torch."""
    torch = importlib.util.find_spec("torch") is not None
    started = detect(environ) == "mpi" or any(rank in environ for rank, _ in MPI)
    has_mpi = "mpi4py.MPI" in sys.modules or started and importlib.util.find_spec("mpi4py") is not None
    found = {"nccl": torch and has_gpu, "gloo": torch, "mpi": has_mpi}
    return [name for name in TRANSPORTS if found[name]]


def run(transport: Transport, kind: str, size: int, repeats: int) -> list[float]:
    """Returns the seconds of each repeat on this rank, from when all were ready."""
    once = transport.make(kind, size)
    once()
    taken = []
    for _ in range(repeats):
        transport.barrier()
        began = time.perf_counter()
        once()
        taken.append(time.perf_counter() - began)
    return taken


def combine(taken: list[list[float]]) -> float:
    """Returns the seconds of a collective: the median over repeats of when the last rank had its result."""
    return statistics.median(max(repeat) for repeat in zip(*taken))


def tell_interface(name: str) -> None:
    """Has gloo and NCCL use an interface, unless the user named one."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name else ():
        os.environ.setdefault(variable, name)
