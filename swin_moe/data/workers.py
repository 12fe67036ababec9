"""Runs a picklable loading function over a stream of requests, in this process or in loader processes.

torch's DataLoader does the work; this wrapper adds what it lacks here: requests from a stream instead of a sampler of
indices, and processes that neither react to the trainer's signals nor outlive it.
"""

import atexit
import ctypes
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

_PREFETCH = 2  # requests loaded ahead per process
_PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal this process gets when the thread that forked it ends


def _detach(worker: int) -> None:
    # Launchers and schedulers signal whole process groups. The trainer then finishes its step and saves, for which it
    # still needs its images; a handler of its own, inherited by fork, must not run here either.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # torch's own check for a dead parent runs every 5 seconds only.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _obituary(pid: int, code: int, workers: int) -> str:
    """Returns the sentence about a loader process that ended with this exit code, -n for signal n."""
    how = f"exited with code {code}"
    if code < 0:
        causes: dict[int, str] = {
            signal.SIGKILL: " (kill -9, or the kernel for lack of memory: fewer data.workers need less)",
            signal.SIGBUS: " (as a rule /dev/shm is full: fewer data.workers need less)",
        }
        how = f"was killed by {signal.Signals(-code).name}{causes.get(-code, '')}"
    return f"loader process {pid} (of data.workers={workers}) {how}; what was saved before is kept"


def under_way(workers: int) -> int:
    """Returns how many requests are loaded, or loaded and not yet asked for, at once; that which is looked at is one.

    DataLoader takes a request from the stream when it hands out what was loaded `workers * _PREFETCH` before it.
    """
    return workers * _PREFETCH + 1


def _identity(value: Any) -> Any:
    return value


def pin(value: Any) -> Any:
    """Returns the same nested value with every tensor in page-locked memory."""
    if isinstance(value, torch.Tensor):
        return value if value.is_pinned() else value.pin_memory()
    if isinstance(value, dict):
        return {key: pin(item) for key, item in value.items()}
    if hasattr(value, "_make"):  # a named tuple
        return value._make(map(pin, value))
    return type(value)(map(pin, value)) if isinstance(value, (list, tuple)) else value


class WorkerPool:
    """Iterates over source[request] for each request, in order.

    Args:
        source: Anything picklable with __getitem__(request) -> nested lists, tuples and dicts of tensors.
        requests: Consumed lazily in this process, at most a few ahead; may be endless.
        workers: Processes; 0 = load in this one.
        pin_memory: Copy tensors to page-locked memory.
    """

    def __init__(self, source: Any, requests: Iterable[Any], *, workers: int, pin_memory: bool = False) -> None:
        self._iterator: Any = None
        self._processes: list[Any] = []
        if workers == 0:
            loaded = (source[request] for request in requests)
            self._items: Iterator[Any] = map(pin, loaded) if pin_memory else loaded
            return
        loader = DataLoader(
            source,
            sampler=requests,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=_PREFETCH,
            pin_memory=pin_memory,
            collate_fn=_identity,
            worker_init_fn=_detach,
            generator=torch.Generator(),  # or it would draw from the global one
            # Processes then share what data sets and buffers hold; Python 3.14 would begin anew and pickle it.
            multiprocessing_context="fork" if sys.platform == "linux" else None,
        )
        handler = signal.getsignal(signal.SIGCHLD)
        self._items = self._iterator = iter(loader)
        # torch's handler raises wherever the main thread is when a process dies, in the middle of a save for one.
        # Without it the next batch finds out, within 5 s.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        self._processes = self._iterator._workers
        # Runs before multiprocessing's own exit handler, which would wait for ever for children that ignore SIGTERM.
        atexit.register(self.close)

    def __iter__(self) -> Iterator[Any]:
        """Yields what was loaded.

        Raises:
            ChildProcessError: A loader process died; one sentence.
        """
        try:
            yield from self._items
        except RuntimeError as error:
            died = [process for process in self._processes if process.exitcode]
            if not died:
                raise
            raise ChildProcessError(_obituary(died[0].pid, died[0].exitcode, len(self._processes))) from error

    def close(self) -> None:
        """Ends the processes: a clean stop first, SIGKILL for one that hangs in a read. Idempotent."""
        if self._iterator is None:
            return
        iterator, self._iterator, self._items = self._iterator, None, iter(())
        atexit.unregister(self.close)
        # Private, but the only way to stop now: dropping the last reference would wait for tracebacks that hold frames.
        iterator._shutdown_workers()
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
