"""Whole lines out of bytes as they come, and lines of a rank in a form that no MPI tears apart. Pure, bytes to bytes.

What is no UTF-8 stays as it is. A line that was written over (carriage returns, as progress bars have them) is shown as
it stood at its end.
"""

import re
from collections.abc import Iterator

STALE_SECONDS = 5.0  # after which the beginning of a line is shown that does not end
_LONGEST_LINE = 2**20  # bytes that are kept of a line; a longer one becomes several
_OVERWRITTEN = re.compile(rb"(?m)^[^\n]*\r(?![\r\n])")  # from a line's beginning: one try a line
_UNTAGGED = re.compile(rb"(?m)^(?!\[ranks? \d)(?=.|\n)")  # lines that do not begin with who says it (ending.py)

MARK = b"\x1e"  # at the head of a framed line: record separator, which no text has
_PIECE = 900  # bytes of a line in a frame: srun cuts at 1,024
FRAMES = 4096  # bytes of frames that are written at once: what a pipe takes whole (PIPE_BUF) and MPIs read at once


class Lines:
    """One stream of one rank, to be shown among others."""

    def __init__(self, tag: bytes = b"") -> None:
        self._tag = tag
        self._parts: list[bytes] = []  # of the line that has not ended
        self._size = 0
        self._since = 0.0  # when it began
        self._shown = False  # a beginning of it was shown

    @property
    def pending(self) -> bool:
        """Returns whether a line has begun that did not end."""
        return self._size > 0

    def feed(self, data: bytes, now: float) -> bytes:
        """Returns what can be shown after these bytes: whole lines."""
        cut = data.rfind(b"\n") + 1
        if not cut:
            self._keep(data, now)
            return self._show() if self._size > _LONGEST_LINE else b""
        whole = b"".join([*self._parts, data[:cut]])
        if self._shown:
            whole = whole.removeprefix(b"\r").removeprefix(b"\n")
        self._parts, self._size, self._shown = [], 0, False
        self._keep(data[cut:], now)
        return self._finish(whole)

    def stale(self, now: float) -> bytes:
        """Returns the line that began long ago as if it had ended, b"" where there is none."""
        return self._show() if self._size and now - self._since >= STALE_SECONDS else b""

    def end(self) -> bytes:
        """Returns the rest, as a line."""
        return self._show()

    def _keep(self, data: bytes, now: float) -> None:
        if not data:
            return
        if not self._size:
            self._since = now
        text = data.rstrip(b"\r")  # what stands at the end writes over nothing yet
        last = text.rfind(b"\r")
        if last >= 0 or text and self._parts and self._parts[-1].endswith(b"\r"):
            self._parts, self._size, data = [], 0, data[last + 1 :]
        self._parts.append(data)
        self._size += len(data)

    def _show(self) -> bytes:
        text = b"".join(self._parts).rstrip(b"\r")
        self._parts, self._size, self._shown = [], 0, True
        return self._finish(text + b"\n") if text else b""

    def _finish(self, whole: bytes) -> bytes:
        if b"\r" in whole:
            whole = _OVERWRITTEN.sub(b"", whole)
        if not self._tag or not whole:
            return whole
        if b"[rank" in whole:
            return _UNTAGGED.sub(self._tag.replace(b"\\", b"\\\\"), whole)
        return self._tag + whole[:-1].replace(b"\n", b"\n" + self._tag) + b"\n"


def frame(head: bytes, stream: int, data: bytes) -> Iterator[bytes]:
    """Yields lines that carry `data` through an MPI's output, several at once, at most FRAMES bytes.

    Args:
        head: Rank and host, b"12 n03".
        stream: 1 = standard output, 2 = standard error.
    """
    before = MARK + head + b" %d" % stream
    written: list[bytes] = []
    size = 0
    for line in re.findall(rb"[^\n]*\n|[^\n]+", data):  # bytes.splitlines splits at carriage returns, too
        ended = line.endswith(b"\n")
        text = line[:-1] if ended else line
        for start in range(0, max(1, len(text)), _PIECE):
            last = start + _PIECE >= len(text)
            made = before + (b"." if ended and last else b"+") + text[start : start + _PIECE] + b"\n"
            if size + len(made) > FRAMES:
                yield b"".join(written)
                written, size = [], 0
            written.append(made)
            size += len(made)
    if written:
        yield b"".join(written)


_FRAME = re.compile(re.escape(MARK) + rb"(\d+) (\S+) ([12])([.+])")


def unframe(line: bytes) -> tuple[int, str, int, bytes] | None:
    """Returns (rank, host, stream, bytes of it) of a framed line with its newline; None for one that is no frame."""
    found = _FRAME.match(line)
    if found is None:
        return None
    rank, host, stream, ended = found.groups()
    text = line[found.end() : -1]
    return int(rank), host.decode(errors="replace"), int(stream), text + b"\n" if ended == b"." else text
