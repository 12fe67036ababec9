"""What a long verb shows: a bar on stderr, redrawn at most ten times a second; nothing where that is no terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from checkpoint_tools.source import Options
from checkpoint_tools.text import format_bytes


class ProgressBar:
    """Counts the bytes that this process wrote. Rank 0 shows its own share as that of all."""

    def __init__(self, total: int, *, enabled: bool = True) -> None:
        self._total, self._done, self._shown = max(1, total), 0, 0.0
        self._enabled = enabled and sys.stderr.isatty()
        self._started = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        """Adds bytes, and redraws where that is due."""
        self._done += num_bytes
        now = time.monotonic()
        if not self._enabled or now - self._shown < 0.1:
            return
        self._shown = now
        part = min(1.0, self._done / self._total)
        elapsed = now - self._started
        left = elapsed / part * (1 - part)
        bar = "#" * int(20 * part)
        rate = format_bytes(self._done / max(elapsed, 1e-3))
        text = f"[{bar:.<20}] {format_bytes(self._done)} of {format_bytes(self._total)} | {rate}/s | {left:.0f} s left"
        print("\r\x1b[K" + text, end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Ends the redrawn line."""
        if self._enabled:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def progress_of(options: Options, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields what counts the bytes of a long work of this rank; drawn as a bar on rank 0."""
    bar = ProgressBar(num_bytes, enabled=options.comm.rank == 0)
    try:
        yield bar.advance
    finally:
        bar.clear()
