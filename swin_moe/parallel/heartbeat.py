"""Finds the rank that everybody waits for, and turns a hang into one sentence.

Every rank tells a store once in a while what its main thread does: step, how many phases of the step it has begun, and
the name of the current one. Nothing is judged while a rank makes progress. A rank that has been in one phase for longer
than engine.timeout looks at the others: one whose beats stopped does not answer (stopped, or its node is gone); one
that has begun fewer phases is behind; among equals, one outside a collective is behind those inside one. A rank in a
long phase (start-up, saving) is given LONG_SECONDS, but beats meanwhile: from there, one without beats for twice
engine.timeout does not answer. If nobody is behind, the others are merely slow, and we wait.

Beats go over the TCP store that the ranks met at: no shared file system, and it works while collectives hang. The
store lives in rank 0, so a store that does not answer means that rank 0 does not.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from swin_moe.moe.layer import MoELayer
from swin_moe.parallel.exchange.transport import PendingRows

T = TypeVar("T")

LONG_SECONDS = 1800.0  # what start-up, loading and saving may take; also the limit of every collective
_STORE_SECONDS = 5.0  # what one call of the store may take
_SILENT = 0.8  # part of the timeout after which a rank without beats counts as silent
# The same for who looks from a long phase. Work there may hold up beats: imports and compilers keep the interpreter.
_LONG_SILENT = 2.0
_LEFT = -1  # number of the last beat of a rank that has ended its heartbeat


@dataclass(frozen=True)
class Beat:
    """What a rank said last."""

    number: int  # grows with every beat; _LEFT = the last
    step: int
    order: int  # phases begun, over the whole run
    phase: str
    seconds: float  # in this phase
    long: bool
    in_collective: bool

    def __str__(self) -> str:
        return f"{self.phase}{f' of step {self.step}' if self.step >= 0 else ''}"


class Heartbeat:
    """What this rank does, for its guard, and with `start` for the other ranks.

    Args:
        timeout: Seconds in one phase until the others are looked at; engine.timeout.
        note: Takes every phase as text; called often, so it has to be cheap.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, *, timeout: float = 60.0, note: Callable[[str], None] | None = None
    ) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._note = note
        self._main = threading.get_ident()
        self._state = (-1, 0, "start-up", time.monotonic(), True)  # one tuple: read by other threads without a lock
        self._spent: dict[str, float] = {}  # phase -> seconds, since they were last taken
        self._since = time.monotonic()
        self.patient = False  # while it is set every phase is a long one: ranks compile at their own pace
        self.culprit = -1  # the rank that everybody waits for, once it is found
        self._backward = False
        self._alarm = False  # a collective failed: somebody may be gone
        self._seen: dict[int, tuple[Beat, float]] = {}  # rank -> (its last beat, when it was new here)
        self._answered = time.monotonic()  # when the store last did
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self.enter("start-up", long=True)

    # What the main thread tells.

    def enter(self, phase: str, *, step: int | None = None, long: bool = False) -> None:
        """Begins a phase. Every rank has to begin the same ones in the same order."""
        old_step, order, *_ = self._state
        self._account()
        step, long = old_step if step is None else step, long or self.patient
        self._backward = phase == "backward"
        self._state = (step, order + 1, phase, time.monotonic(), long)
        if self._note is not None:
            self._note(f"{phase}{f' of step {step}' if step >= 0 else ''}")

    def take_seconds(self) -> dict[str, float]:
        """Returns phase -> seconds of the host's since the last call; the phase at hand begins anew."""
        self._account()
        spent, self._spent = self._spent, {}
        return spent

    def _account(self) -> None:
        phase, now = self._state[2], time.monotonic()
        self._spent[phase] = self._spent.get(phase, 0.0) + now - self._since
        self._since = now

    def over(self, items: Iterable[T], phase: str) -> Iterator[T]:
        """Yields the items, beginning the phase anew at each: a long loop of short parts."""
        for number, item in enumerate(items):
            self.enter(f"{phase} {number}")
            yield item

    def follow(self, model: nn.Module) -> None:
        """Begins a phase at the forward of every block, and of every MoE layer in it, of a model in training."""

        def begin(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: tuple) -> None:
                if module.training and not torch.compiler.is_compiling():  # a graph has no phases
                    inside_backward = self._backward
                    self.enter(f"{'backward, recomputing' if inside_backward else 'forward of'} {name}")
                    self._backward = inside_backward

            return hook

        for name, module in model.named_modules():
            listed = {f"{name}.{key}": m for key, m in module.named_children() if isinstance(module, nn.ModuleList)}
            layers = {f"{name}.{key}": m for key, m in module.named_children() if isinstance(m, MoELayer)}
            for path, child in {**listed, **layers}.items():
                child.register_forward_pre_hook(begin(path))

    # What happens beside it.

    def start(self, store: Any, end: Callable[[str], None]) -> None:
        """Starts beating and judging in two threads.

        Args:
            store: A torch.distributed store; a connection of its own is made.
            end: Called once, in a thread, with the sentence about the rank that everybody waits for. It should print
                the sentence and end every rank; it is called on all ranks but that one, on the lowest one first.
        """
        store = dist.PrefixStore("heartbeat", store.clone())
        # What a call of the store may take at most is what `stop` waits for.
        store.set_timeout(timedelta(seconds=min(self.timeout, _STORE_SECONDS)))
        for work in (lambda: self._beat(store), lambda: self._judge(end)):
            self._threads.append(threading.Thread(target=work, name="heartbeat", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Ends the threads, and returns when they have ended.

        A thread that comes back from a call of the store while the interpreter ends takes the process down with it
        ("terminate called without an active exception").
        """
        self._stopped.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def find_lost(self) -> str | None:
        """Returns the sentence about a rank whose beats stopped, or None; to be called after a collective failed.

        Takes a few seconds, because a rank counts as lost when it misses several beats.
        """
        self.enter("a collective that failed", long=True)
        self._alarm = True
        began, patience = time.monotonic(), 4 * self._interval + 1.0
        time.sleep(2 * patience)
        if self.rank and self._answered < began + patience:
            return self._sentence(0, "is gone")
        lost = [rank for rank, (_, new) in self._seen.items() if rank != self.rank and new < began + patience]
        return self._sentence(min(lost), "is gone") if lost else None

    @property
    def _interval(self) -> float:
        return min(1.0, self.timeout / 10)

    def _own(self, number: int) -> Beat:
        step, order, phase, since, long = self._state
        return Beat(number, step, order, phase, time.monotonic() - since, long, _in_collective(self._main))

    def _beat(self, store: Any) -> None:
        number, keys = 0, [str(rank) for rank in range(self.world_size)]
        while not self._stopped.wait(self._interval):
            number += 1
            try:
                own = self._own(number)
                store.set(keys[self.rank], json.dumps(vars(own)))
                # Reading costs every rank the beats of all: seldom in a large world, until this rank seems to hang.
                due = self._alarm or own.seconds > 0.1 * self.timeout or number % max(1, self.world_size // 8) == 0
                if due and store.check(keys):
                    for rank, text in enumerate(store.multi_get(keys)):
                        beat = Beat(**json.loads(text))
                        if rank not in self._seen or self._seen[rank][0].number != beat.number:
                            self._seen[rank] = beat, time.monotonic()
                self._answered = time.monotonic()
            except (RuntimeError, ValueError, OSError):  # the store is gone, or slow: _judge sees that no answer came
                pass
        if time.monotonic() - self._answered < 3 * self._interval:  # else it would cost `stop` a time-out
            with suppress(RuntimeError, OSError):
                store.set(keys[self.rank], json.dumps(vars(self._own(_LEFT))))

    def _judge(self, end: Callable[[str], None]) -> None:
        before = time.monotonic()
        while not self._stopped.wait(self._interval):
            slept, before = time.monotonic() - before, time.monotonic()
            if slept > 0.5 * self.timeout:  # this process was asleep: what it saw of the others is old
                self._answered, self._seen = before, {}
            own = self._own(0)
            if own.seconds < self.timeout:
                continue
            found = self._culprit(own)
            if found is None or found[0] == self.rank:
                continue
            rank, sentence = found
            turn = self.rank - (self.rank > rank)
            if not self._stopped.wait(min(3.0 * turn, 6.0)) and not self._moved_on(own):
                self.culprit = rank
                end(sentence)
                return

    def _moved_on(self, own: Beat) -> bool:
        return self._state[1] != own.order

    def _culprit(self, own: Beat) -> tuple[int, str] | None:
        """Returns (rank, sentence) of the one that everybody waits for, or None."""
        now, limit = time.monotonic(), f"engine.timeout={self.timeout:g} s"
        patience = (_LONG_SILENT if own.long else _SILENT) * self.timeout
        # Who was done may have left this rank with a long task of its own.
        left = {rank for rank, (beat, _) in self._seen.items() if own.long and beat.number == _LEFT}
        if self.rank and 0 not in left and now - self._answered > patience:
            return 0, self._sentence(0, f"does not answer any more ({limit})")
        for rank, (_, new) in sorted(self._seen.items()):
            if rank != self.rank and rank not in left and now - new > patience:
                return rank, self._sentence(rank, f"does not answer any more ({limit})")
        others = {rank: beat for rank, (beat, _) in self._seen.items() if rank != self.rank}
        if len(others) < self.world_size - 1:
            return None
        everyone = {**others, self.rank: own}
        rank = min(everyone, key=lambda r: (everyone[r].order, everyone[r].in_collective, r))
        behind = everyone[rank]
        ahead = max(everyone.values(), key=lambda beat: (beat.order, beat.in_collective))
        if (behind.order, behind.in_collective) == (ahead.order, ahead.in_collective):
            return None
        if behind.seconds < (LONG_SECONDS if behind.long else self.timeout):
            return None
        return rank, self._sentence(rank, f"keeps the others waiting in {ahead} ({limit})")

    def _sentence(self, rank: int, what: str) -> str:
        if rank not in self._seen:
            return f"rank {rank} {what}; this rank waits for it in {self._own(0)}"
        beat, new = self._seen[rank]
        ago = time.monotonic() - new
        return f"rank {rank} {what}; it was last seen {ago:.0f} s ago in {beat}, {beat.seconds:.0f} s after it began it"


def _in_collective(thread: int) -> bool:
    """Returns whether the thread is inside a call of torch.distributed, or waits for one that it started."""
    frame = sys._current_frames().get(thread)
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_code.co_filename.endswith("distributed_c10d.py") or frame.f_code is PendingRows.finish.__code__:
            return True
        frame = frame.f_back
    return False
