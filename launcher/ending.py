"""How all ranks of an MPI job end when one fails: soon, with one exit code, and with every sentence said once.

A rank that leaves alone waits in MPI_Finalize for the others for ever, and MPI_Abort has the ranks killed before the
others could say anything. So ranks that fail alike (a bad option, a full disk) meet first: if all arrive within a
second they leave together, without an abort and its messages. Otherwise the rank that failed says why and aborts.
"""

import ctypes
import fcntl
import os
import struct
import sys
import termios
import time
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

from launcher import guard
from launcher.failure import reports, stacks
from launcher.failure.kinds import INTERRUPTED, PROGRAM, STALL

_LAST_WORDS_SECONDS = 1.0
_STARTERS = (f"{Path(__file__).parent}/", "<frozen runpy>")  # files whose functions call a program
_RECORD = struct.Struct("=iH4090s")  # exit code; bytes of the words; the words


def fail(words: str, code: int) -> NoReturn:
    """Says why this rank ends, and ends every rank with this exit code.

    Under MPI what several ranks say alike is printed once; a rank that speaks for itself is named. Elsewhere this is a
    print to stderr and sys.exit.

    Args:
        words: One sentence, or a traceback; "" = it was said already.
    """
    end_all_ranks(code, words)
    if words:
        print(words.rstrip("\n"), file=_errors(), flush=True)
    sys.exit(code)


def end_all_ranks(code: int, words: str = "", *, culprit: int | None = None) -> None:
    """Ends every rank as `fail` does; returns only in a process that MPI did not start, having said nothing.

    Args:
        culprit: The rank that is to blame, where it is not this one.
    """
    MPI = _running_mpi()
    if MPI is None:
        return
    guard.ended()
    sys.stdout.flush()
    encoded = words.rstrip("\n").encode()
    if len(encoded) > _RECORD.size - 6:  # longer than the ranks exchange: said by everyone
        _say(_named([MPI.COMM_WORLD.rank], words.rstrip("\n")))
        encoded = b""
    endings = _meet(MPI, _RECORD.pack(code, len(encoded), encoded))
    if endings is None:
        if encoded:
            _say(_named([MPI.COMM_WORLD.rank], encoded.decode(errors="replace")))
        guard.report(code, words, culprit=culprit)
        _wait_until_read(_errors())
        time.sleep(0.1)  # from the proxy of this host to mpirun
        MPI.COMM_WORLD.Abort(code)
        os._exit(code)
    if MPI.COMM_WORLD.rank == 0:
        for line in last_words(endings):
            _say(line)
        _wait_until_read(_errors())
    _leave_together(MPI, endings)


def end_stalled(culprit: int, words: str) -> str:
    """Ends every rank as one of them stalls, with exit code 70; returns the words only where MPI did not start us.

    The words go on with who and where that rank is, and every rank's stacks are written down, where the launcher left
    a folder for them (failure/stacks.py).
    """
    place = reports.folder()
    where = "" if place is None else stacks.describe(place, culprit)
    words = f"{words}; {where}" if where else words
    end_all_ranks(STALL, words, culprit=culprit)
    return words


def end_on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ends every rank with a traceback and exit code 1; a sys.excepthook."""
    if issubclass(kind, KeyboardInterrupt):
        end_all_ranks(INTERRUPTED)
    import traceback

    end_all_ranks(PROGRAM, "".join(traceback.format_exception(kind, error, _of_program(trace))))


def _of_program(trace: TracebackType | None) -> TracebackType | None:
    """Returns a traceback from where the program's own begins: what called it is the same in every one."""
    inner = trace
    while inner is not None and inner.tb_frame.f_code.co_filename.startswith(_STARTERS):
        inner = inner.tb_next
    return inner or trace


def last_words(endings: list[tuple[int, str]]) -> list[str]:
    """Returns what is to be said of the ranks' (exit code, words), in rank order; what all say has no rank."""
    said: dict[str, list[int]] = {}
    for rank, (_, words) in enumerate(endings):
        if words:
            said.setdefault(words, []).append(rank)
    return [words if len(ranks) == len(endings) else _named(ranks, words) for words, ranks in said.items()]


def _named(ranks: list[int], words: str) -> str:
    return f"[rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}] {words}"


def _running_mpi() -> Any:
    """Returns mpi4py.MPI where it is in use, else None."""
    MPI = sys.modules.get("mpi4py.MPI")
    return None if MPI is None or not MPI.Is_initialized() or MPI.Is_finalized() else MPI


def _meet(MPI: Any, record: bytes) -> list[tuple[int, str]] | None:
    """Returns (exit code, words) of every rank, or None where not all ranks are about to end."""
    world = MPI.COMM_WORLD
    everyone = bytearray(world.size * _RECORD.size)
    request = world.Iallgather([bytearray(record), MPI.BYTE], [everyone, MPI.BYTE])
    deadline = time.monotonic() + _LAST_WORDS_SECONDS
    while not request.Test():
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)
    return [(code, words[:size].decode(errors="replace")) for code, size, words in _RECORD.iter_unpack(everyone)]


def _leave_together(MPI: Any, endings: list[tuple[int, str]]) -> NoReturn:
    """Ends this rank after MPI, with the same exit code as all."""
    MPI.Finalize()
    # The C library's exit, not os._exit: MPICH takes leave of its launcher in a handler of it, and a process that is
    # gone without counts as killed. Not sys.exit: this may be a thread beside one that hangs.
    ctypes.CDLL(None).exit(next(code for code, _ in endings if code))
    raise AssertionError("exit() does not return")


def _errors() -> TextIO:
    """Returns where last words go. sys.stderr is a buffer, which dies with the rank, while the exception hook that
    torch.distributed.init_process_group installs calls ours (torch/distributed/distributed_c10d.py)."""
    return sys.__stderr__ or sys.stderr


def _say(line: str) -> None:
    _errors().write(f"{line}\n")
    _errors().flush()


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
