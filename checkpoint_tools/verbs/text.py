"""How verbs print: sizes, tables, and the bar of a long work (on stderr; nothing where that is no terminal)."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from checkpoint_tools.sources.base import Options

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def format_bytes(number: float) -> str:
    """Returns a number of bytes for people: "512 B", "1.21 GiB"."""
    power = 0
    while number >= 1000 and power < len(_UNITS) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.3g} {_UNITS[power]}" if number < 1000 else f"{number:.0f} {_UNITS[power]}"


def parse_bytes(text: str) -> int:
    """Returns the bytes of "512M", "1.5GiB" or "4096"; units are powers of 1024.

    Raises:
        ArgumentTypeError: It is no size; argparse names the option.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"a size is a number with K, M, G or T, such as 512M; got {text!r}")
    return int(float(match[1]) * _SIZES[match[2].upper()])


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns rows in aligned columns; numbers to the right."""
    cells = [list(header), *([str(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(row[i][:1].isdigit() or not row[i] for row in cells[1:]) for i in range(len(header))]
    lines = (
        "  ".join(f"{cell:>{w}}" if right else f"{cell:<{w}}" for cell, w, right in zip(row, widths, numeric))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def shortened(text: str, width: int = 60) -> str:
    """Returns a text of at most `width` characters: its beginning and its end where it is longer."""
    return text if len(text) <= width else f"{text[: width - 20]} ... {text[-15:]}"


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
