"""Ranks that keep the others waiting before any of them runs its program."""

from collections.abc import Mapping

from launcher.failure.reports import PHASES, State


def find_late(states: Mapping[int, State], ranks: int, now: float, limit: float) -> tuple[list[int], str]:
    """Returns (the ranks that are late, a sentence about them); ([], "") if none is.

    A rank is late if it did not come to the meeting within `limit` seconds of the first that did. Where all came and
    the meeting does not end, nobody is to be named.

    Args:
        states: Of those that left word.
        ranks: How many there are.
        now: time.time().
    """
    waiting = [state for state in states.values() if state.phase != PHASES[0]]
    if not waiting or all(state.phase == PHASES[-1] for state in waiting) and len(waiting) == ranks:
        return [], ""
    since = min(state.since for state in waiting)
    if now - since < limit:
        return [], ""
    late = [rank for rank in range(ranks) if rank not in states or states[rank].phase == PHASES[0]]
    if not late:
        return [], ""
    who = ", ".join(f"{rank}{f' ({states[rank].host})' if rank in states else ''}" for rank in late[:8])
    more = f" and {len(late) - 8} more" if len(late) > 8 else ""
    s = "s" * (len(late) > 1)
    return late, f"rank{s} {who}{more} did not start within {limit:g} s, while others wait (--stall)"
