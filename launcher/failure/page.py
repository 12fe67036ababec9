"""Memory that a rank shares with its guard and its reaper: what it is doing, how far its end came, what it leaves."""

import mmap
import struct
import time
from collections.abc import Iterable

_NOTE, _NAMES = struct.Struct("=dH"), struct.Struct("=H")  # time and bytes of the note; bytes of the names
_NOTE_AT, _NAMES_AT, _TEXT_AT = 8, 24, 32  # the state is byte 0: a thread that notes leaves it alone
_NOTE_BYTES, _BYTES = 1024, 4096
_RUNS, _ENDS, _JUDGED = 0, 1, 2


class Page:
    """One page; made before the forks that are to share it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _BYTES)

    def note(self, text: str) -> None:
        """Remembers what the rank is doing; costs a microsecond."""
        data = text.encode()[:_NOTE_BYTES]
        self._memory[_TEXT_AT : _TEXT_AT + len(data)] = data
        _NOTE.pack_into(self._memory, _NOTE_AT, time.time(), len(data))

    @property
    def noted(self) -> tuple[float, str]:
        """Returns (when, what) the rank noted last; "" = nothing."""
        when, length = _NOTE.unpack_from(self._memory, _NOTE_AT)
        return when, self._memory[_TEXT_AT : _TEXT_AT + length].decode(errors="replace")

    def end(self) -> None:
        """Says that the rank ends by itself."""
        self._memory[0] = _ENDS

    @property
    def ends(self) -> bool:
        """Returns whether the rank said that it ends by itself."""
        return self._memory[0] == _ENDS

    def judge(self) -> None:
        """Says that the guard did all it had to do."""
        self._memory[0] = _JUDGED

    @property
    def was_cut_off(self) -> bool:
        """Returns, once the guard is gone, whether it was killed over a rank that had not ended by itself."""
        return self._memory[0] == _RUNS

    def leave(self, names: Iterable[str]) -> None:
        """Remembers the shared memory that the rank holds, as far as there is room."""
        at, data = _TEXT_AT + _NOTE_BYTES, b""
        for name in sorted(names):
            if at + len(data) + len(name.encode()) < _BYTES:
                data += name.encode() + b"\0"
        self._memory[at : at + len(data)] = data
        _NAMES.pack_into(self._memory, _NAMES_AT, len(data))

    @property
    def left(self) -> list[str]:
        """Returns what `leave` was told last."""
        length, at = _NAMES.unpack_from(self._memory, _NAMES_AT)[0], _TEXT_AT + _NOTE_BYTES
        return [name.decode() for name in self._memory[at : at + length].split(b"\0") if name]
