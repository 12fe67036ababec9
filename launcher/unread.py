"""What becomes of a command whose output cannot be written: where nobody reads it on (`swin-moe show CONFIG | head`) it
ends in silence, with the shell's 141; where the disk that it is sent to is full, with one sentence and 2."""

import errno
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from launcher.failure.kinds import CONFIGURATION, UNREAD

T = TypeVar("T")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def until_unread(command: Callable[[], T]) -> T:
    """Returns what a command returns, once all it printed is written; ends where that cannot be."""
    open_streams()
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not is_unread():
            raise
        end_unread()
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        _write_no_more()
        print(f"error: standard output: {error.strerror}", file=sys.stderr)
        sys.exit(CONFIGURATION)


def open_streams() -> None:
    """Gives a process that was started without output or errors (`>&-`) somewhere to write them: to nobody."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives


def _write_no_more() -> None:
    """Gives what is still to be written to nobody: Python writes it at its end, and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_unread() -> NoReturn:
    """Ends this process in silence, with the shell's code: whoever read its output (`| head`) has seen enough."""
    _write_no_more()
    sys.exit(UNREAD)


def is_unread() -> bool:
    """Returns whether nobody can read this process's output any more: a BrokenPipeError may be of another pipe."""
    asked = select.poll()
    asked.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in asked.poll(0))
