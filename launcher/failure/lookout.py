"""What the launcher sees in the folder of reports while a job runs, and why it ends the job before its starter does."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.failure import reports, stacks
from launcher.failure.kinds import HOST, STALL
from launcher.failure.starting import find_late

LOOK_SECONDS = 0.25
_MANY_RANKS = 1000  # whose words take longer to list
# After a rank left word that it failed: its MPI ends the others, if it is one that does so in time (srun takes 30 s).
_FAILED_SECONDS = 1.0
# After a rank was killed with its guard; its starter is ending the job, or it does not know that its daemon is gone.
_LOST_SECONDS = 2.5


@dataclass(frozen=True)
class Verdict:
    """Why a job has to end."""

    code: int
    words: str = ""  # a sentence, where nothing else says it


class Lookout:
    """Looks after ranks: that all of them start, and that a job with one that is gone ends soon."""

    def __init__(self, place: Path, ranks: int, stall: float, *, hears: bool = False) -> None:
        """Looks into `place`; `ranks` = 0 is an unknown number of them; `stall` seconds may a rank be late.

        Args:
            hears: Whether nothing but a fault keeps all ranks from leaving word.
        """
        self._place, self._ranks, self._stall = place, ranks, stall
        self._silent = time.monotonic() + stall if hears else math.inf  # until then the first may be heard of
        self._start_pause = stall / 20  # for each look reads a file for each rank
        self._next_start = time.monotonic() + self._start_pause
        self._pause = LOOK_SECONDS * max(1.0, ranks / _MANY_RANKS)
        self._next, self._failed, self._lost = 0.0, math.inf, math.inf  # when to look; when such a rank was seen

    def look(self) -> Verdict | None:
        """Returns why the job has to end, None while it has not."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._pause
            failed, lost = reports.ends(self._place)
            self._failed = min(self._failed, now) if failed else math.inf
            self._lost = min(self._lost, now) if lost else math.inf
            if now - self._failed >= _FAILED_SECONDS or now - self._lost >= _LOST_SECONDS:
                reports.call_it_over(self._place)
                return Verdict(HOST)
        sentence = self._late(now)
        return Verdict(STALL, sentence) if sentence else None

    def _late(self, now: float) -> str:
        """Returns the sentence about ranks that keep the others waiting, with where they are; "" = none."""
        if now < self._next_start:
            return ""
        self._next_start = now + self._start_pause
        states = reports.states(self._place)
        if not states and now > self._silent:
            return f"no rank started within {self._stall:g} s (--stall)"
        late, sentence = find_late(states, self._ranks, time.time(), self._stall)
        if late:
            where = stacks.describe(self._place, late[0])
            return f"{sentence}; {where}" if where else sentence
        if len(states) >= self._ranks and all(state.phase == reports.PHASES[-1] for state in states.values()):
            self._next_start = math.inf
        return ""
