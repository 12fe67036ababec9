"""How far a command has come with one thing after another: one line on a terminal, else a line now and then."""

import sys
import time
from typing import IO

from swin_moe.run.metrics import duration

_QUIET_SECONDS = 2.0  # what is done by then says nothing


class Counter:
    """Shows `done of total what, per second, time left` on standard error."""

    def __init__(self, what: str, total: int, stream: IO[str] | None = None, *, quiet: float = _QUIET_SECONDS) -> None:
        self._what, self._total, self._quiet = what, total, quiet
        self._stream = sys.stderr if stream is None else stream
        self._began, self._next = time.monotonic(), 0.0
        self._shown = False

    def __call__(self, done: int) -> None:
        """Shows it where it is time: five times a second on a terminal, else every 10 seconds."""
        past = time.monotonic() - self._began
        terminal = self._stream.isatty()
        if past < max(self._quiet, self._next) or not done:
            return
        self._next, self._shown = past + (0.2 if terminal else 10.0), True
        speed = done / past
        left = duration((self._total - done) / speed)
        text = f"{done:,} of {self._total:,} {self._what}, {speed:,.0f}/s, {left} left"
        self._stream.write(f"\r\033[K{text}" if terminal else f"{text}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Takes the line away before something else is printed."""
        if self._shown and self._stream.isatty():
            self._stream.write("\r\033[K")
            self._stream.flush()
