"""Runs mpirun so that signals reach the ranks, failures have a cause and a code, and nothing outlives the launcher."""

import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from launcher import watch
from launcher.failure import line, memory, orphans, reports
from launcher.failure.kinds import HOST, INTERRUPTED, MEMORY, NOT_STOPPED, STALL, kind_of
from launcher.failure.lookout import LOOK_SECONDS, Lookout, Verdict
from launcher.failure.switchboard import Switchboard
from launcher.flavors.base import Flavor
from launcher.machine import shared_memory
from launcher.machine.network import addresses_towards
from launcher.output import pump
from launcher.output.console import Console, Show

STOP = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # save and exit, within the grace time
_END_SECONDS = 30.0  # what a scheduler gets to end its step; it kills the ranks within seconds itself
_HANDLED = {signal.SIGCHLD, signal.SIGUSR1, *STOP}


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds."""

    grace: float  # between a request to stop and the end
    save_after: float = math.inf  # until the ranks are asked as by a SIGTERM, for schedulers that give no warning
    stall: float = math.inf  # a rank may be stopped by a signal, or behind all others while they start
    lost: float = line.LOST_SECONDS  # a host may not answer until it counts as lost


@dataclass(frozen=True)
class World:
    """What ranks there are, and where."""

    ranks: int = 0  # 0 = unknown
    others: Sequence[str] = ()  # the other hosts that ranks run on, which leave word over TCP
    # An empty folder that all hosts see, where ranks leave word, stacks and what they write remain; None = one of this
    # host, without what they write.
    shared: Path | None = None
    local: bool = False  # some run on this host, and mpirun, unlike srun, starts them without waiting for anything


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    code: int  # of the job; 128 + n when ended by signal n
    rank: str = ""  # the one that failed first, "" = none did, or none on this host said so
    asked_to_stop: bool = False  # by a signal, or as its time was over
    request: int = field(default=0, repr=False)  # the signal that stands for that
    killed: bool = False  # by the launcher, as it did not stop in time
    failure: reports.Failure | None = field(default=None, repr=False)  # what the ranks left of it
    step: int | None = field(default=None, repr=False)  # what the program wrote as its progress
    doubtful: bool = field(default=False, repr=False)  # a host may have been lost before any rank could say anything
    words: str = field(default="", repr=False)  # why, where that is known better than by what a rank said

    def describe(self) -> str:
        """Returns the last line of a job that failed: which kind of failure, who, and what was said."""
        if self.request and self.code == 128 + self.request:
            name = signal.Signals(self.request).name
            return f"launcher: {name} (exit code {self.code}): asked to save, the program ended without"
        who = self.failure if self.rank else "all ranks failed alike" if self.failure else "no rank said why"
        who = self.words or who
        return f"launcher: {kind_of(self.code)} (exit code {self.code}): {who}"


def supervise(
    command: Sequence[str],
    environment: dict[str, str],
    *,
    flavor: Flavor,
    limits: Limits,
    world: World,
    show: Show | None = None,
) -> Outcome:
    """Returns how the job ended, after the last process is gone.

    SIGTERM, SIGHUP, SIGINT (Ctrl-C) and SIGUSR1 are passed to every rank through mpirun, so that the program can save
    and leave; after the first three, the job is killed when `limits.grace` seconds are over, or at a second SIGINT.
    mpirun runs in a session of its own, so that Ctrl-C in a terminal arrives here only.

    Args:
        environment: What `restart.own_variables` names is in it, as ranks on other hosts get it.
        show: How output is shown; None = mpirun does it, as it comes.
    """
    shared, killed = world.shared, memory.kills()
    token = environment.get(line.TOKEN) or os.urandom(16).hex()
    with _reports(shared) as place:
        progress = place / "progress"
        own = {reports.REPORTS: str(place), reports.PROGRESS: str(progress), line.TOKEN: token}
        environment = environment | own
        console = None if show is None else Console(show)
        if console is not None:
            environment |= {pump.CONSOLE: console.path, pump.LOGS: "" if shared is None else str(shared)}
        remove = [*([place] if shared is None else []), *([console.folder] if console is not None else [])]
        with orphans.cleaned_up(token, place, remove=remove):
            with _lines(place, token, world.others, limits.lost) as lines:
                environment[line.WHERE] = lines.where if lines is not None else ""
                process = _start(command, environment, flavor, console)
                look = partial(_look, lines, Lookout(place, world.ranks, limits.stall, hears=world.local))
                outcome = _wait(process, flavor, limits, look, console, partial(reports.ask, place))
            _end_all(token, place, console)
        if outcome.killed or not outcome.code:
            return outcome
        unheard = bool(world.others) and len(reports.states(place)) < world.ranks
        outcome, first = _add_word(replace(outcome, step=reports.read_progress(progress)), place, lines)
        lost = reports.ends(place)[1] > 0 or outcome.code == 128 + flavor.stop
        return _explain(outcome, first, memory.kills() > killed, unheard, lost)


def _end_all(token: str, place: Path, console: Console | None) -> None:
    """Ends what is left of a job on this host, having shown what its ranks wrote."""
    orphans.sweep(token, spared=() if console is None else console.movers)
    if console is not None:
        console.close()
        if any(watch.start_time(pid) != "gone" for pid in console.movers):
            orphans.sweep(token)
    shared_memory.remove(reports.held_here(place))


def _add_word(outcome: Outcome, place: Path, lines: Switchboard | None) -> tuple[Outcome, reports.Failure | None]:
    """Returns (the outcome with what the lines to other hosts tell of it, how the rank that failed first did)."""
    first = reports.first_failure(place)
    if lines is None:
        return outcome, first
    if lines.lost:
        return outcome, next(iter(lines.lost.values()))
    return replace(outcome, doubtful=not outcome.asked_to_stop and (first is None or lines.silent)), first


def _explain(
    outcome: Outcome, failure: reports.Failure | None, short_of_memory: bool, unheard: bool, lost: bool = False
) -> Outcome:
    """Returns the outcome with its cause, as far as there is word of it.

    Args:
        short_of_memory: Whether the kernel killed one of this control group's processes meanwhile.
        unheard: Whether ranks may have failed without being able to leave word.
        lost: Whether a rank was ended from outside; after a request to save that is one which does not heed it.
    """
    if failure is not None:
        return replace(outcome, rank=failure.rank, code=failure.code, failure=failure)
    if outcome.request and lost:
        return replace(outcome, code=128 + outcome.request)
    if outcome.asked_to_stop or unheard or outcome.code == STALL:
        return outcome
    # No rank failed, or none lived to say so: what starts them did, or a host.
    return replace(outcome, code=MEMORY if short_of_memory else HOST)


@contextmanager
def _reports(shared: Path | None) -> Iterator[Path]:
    """Yields an empty folder for what ranks leave."""
    if shared is None:
        with tempfile.TemporaryDirectory(prefix="launcher-") as name:
            yield Path(name)
        return
    yield shared


@contextmanager
def _lines(place: Path, token: str, others: Sequence[str], seconds: float) -> Iterator[Switchboard | None]:
    """Yields what takes the word of ranks on other hosts; None where there are none, or no way leads there."""
    address = next(addresses_towards(others), "")
    try:
        lines = Switchboard(place, token, address, seconds) if address else None
    except OSError:
        lines = None
    try:
        yield lines
    finally:
        if lines is not None:
            lines.close()


def _look(lines: Switchboard | None, lookout: Lookout) -> Verdict | None:
    """Returns why the job has to end: a host is lost, or what the lookout says."""
    return lines and lines.look() or lookout.look()


def _start(
    command: Sequence[str], environment: dict[str, str], flavor: Flavor, console: Console | None
) -> subprocess.Popen[bytes]:
    watch.announce(environment)
    launcher = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        watch.die_with_parent(launcher, flavor.end)

    pipe = None if console is None else subprocess.PIPE
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        start_new_session=True,
        preexec_fn=prepare,
    )
    if console is not None:  # its threads begin after the fork, and with the signals blocked
        console.start(process)
    return process


def _wait(
    process: subprocess.Popen[bytes],
    flavor: Flavor,
    limits: Limits,
    look: Callable[[], Verdict | None],
    console: Console | None,
    ask: Callable[[int], None],
) -> Outcome:
    """Returns how the process ended, passing signals on meanwhile.

    Args:
        look: Called once in a while; returns why the job has to end.
        ask: Called with a signal before it is passed on.
    """
    deadline, interrupts, grace, asked = math.inf, 0, limits.grace, 0
    say = Console.print if console is None else console.say
    save_at = time.monotonic() + limits.save_after
    while (code := process.poll()) is None:
        # SIGCHLD is the usual way out, the time limit covers one that came between poll and here.
        left = max(0.0, min(deadline, save_at) - time.monotonic())
        received = signal.sigtimedwait(_HANDLED, min(LOOK_SECONDS, left))
        number = received.si_signo if received else None
        if number is None and (verdict := look()):
            if verdict.words:
                say(f"launcher: {verdict.words}", 2)
            _end(process, flavor)
            return Outcome(verdict.code, asked_to_stop=bool(asked), request=asked)
        if number is None and time.monotonic() >= save_at:
            number, save_at = signal.SIGTERM, math.inf
            say(f"launcher: {limits.save_after:g} s are over; the ranks have {grace:g} s to save", 1)
        interrupts += number == signal.SIGINT
        if interrupts > 1 or time.monotonic() >= deadline:
            _end(process, flavor)
            code = INTERRUPTED if interrupts else NOT_STOPPED
            words = "Ctrl-C twice" if interrupts > 1 else f"not saved in {grace:g} s"
            words += "; what was saved before is kept"
            return Outcome(code, asked_to_stop=True, killed=True, words=words)
        if number == signal.SIGINT:
            say(f"launcher: stopping; the ranks have {grace:g} s to save, Ctrl-C again ends them at once", 1)
        elif received and number in STOP:
            say(f"launcher: {signal.Signals(received.si_signo).name}: the ranks have {grace:g} s to save", 1)
        if number in STOP:
            deadline, save_at, asked = min(deadline, time.monotonic() + grace), math.inf, asked or number
        if number in (signal.SIGUSR1, *STOP):
            ask(number)
            process.send_signal(number if number == signal.SIGUSR1 else flavor.stop)
    return Outcome(code if code >= 0 else 128 - code, asked_to_stop=bool(asked), request=asked)


def _end(process: subprocess.Popen[bytes], flavor: Flavor) -> None:
    """Ends the job at once. Proxies and ranks follow: hydra's see their socket close, ranks watch this process."""
    process.send_signal(flavor.end)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
