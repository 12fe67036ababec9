"""An output that nobody reads on (`swin-moe show CONFIG | head`) ends a command in silence, with the shell's 141."""

import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from launcher.failure.kinds import UNREAD

T = TypeVar("T")


def until_unread(command: Callable[[], T]) -> T:
    """Returns what a command returns, once all it printed is written; ends where nobody reads that on."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not is_unread():
            raise
        end_unread()


def end_unread() -> NoReturn:
    """Ends this process in silence, with the shell's code: whoever read its output (`| head`) has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(UNREAD)


def is_unread() -> bool:
    """Returns whether nobody can read this process's output any more: a BrokenPipeError may be of another pipe."""
    asked = select.poll()
    asked.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in asked.poll(0))
