"""The cells of the fault matrix as data: what goes wrong, when, under which MPI, and what it has to come to."""

import signal
from dataclasses import dataclass, field

from launcher.failure import kinds
from tests.launcher.failure.fault_program import PHASES, culprit_of

STALL_SECONDS = 3
STARTERS = ("mpich", "openmpi", "srun")


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and what the job has to come to."""

    name: str
    seconds: float  # promised, until everything is gone
    code: int  # of the launcher
    victim: str = ""  # who gets the signal from outside: launcher, mpirun, daemon; "" = a rank fails by itself
    signal: int = 0
    words: str = ""  # of the last line
    saves: bool = False  # a program that runs is asked to save, and leaves with 75

    @property
    def names_rank(self) -> bool:
        """Returns whether the last line has to name the rank: it has done it."""
        return not self.victim


FAULTS = (
    Fault("exception", 5, 1, words="RuntimeError: the fault of the matrix"),
    Fault("exit(0)", 5, 1, words="exited with code 0"),
    Fault("exit(3)", 5, 3, words="exited with code 3"),
    Fault("SIGKILL of a rank", 5, 128 + signal.SIGKILL, words="was killed by SIGKILL"),
    Fault("SIGSTOP of a rank", STALL_SECONDS + 8, kinds.STALL, words=f"was stopped by a signal for {STALL_SECONDS} s"),
    Fault("out of memory", 5, kinds.MEMORY, words="was killed by the kernel for lack of memory"),
    Fault("disk full", 5, 1, words="No space left on device"),
    Fault("SIGKILL of the launcher", 5, -signal.SIGKILL, "launcher", signal.SIGKILL),
    Fault("SIGTERM of the launcher", 5, 128 + signal.SIGTERM, "launcher", signal.SIGTERM, "asked to save", True),
    Fault("SIGHUP of the launcher", 5, 128 + signal.SIGHUP, "launcher", signal.SIGHUP, "asked to save", True),
    Fault("SIGKILL of mpirun", 5, kinds.HOST, "mpirun", signal.SIGKILL, "no rank said why"),
    Fault("SIGTERM of mpirun", 5, kinds.HOST, "mpirun", signal.SIGTERM, "no rank said why"),
    Fault("SIGKILL of the daemon", 15, kinds.HOST, "daemon", signal.SIGKILL, "no rank said why"),
    Fault("SIGTERM of the daemon", 15, kinds.HOST, "daemon", signal.SIGTERM, "no rank said why"),
)


_TRAINED_EVERYWHERE = [("SIGKILL of a rank", "saving"), ("SIGTERM of the launcher", "steady state")]
_TRAINED = [
    ("exception", "first step", "srun"),
    ("exit(0)", "rendezvous", "openmpi"),
    ("exit(3)", "import", "mpich"),
    ("SIGSTOP of a rank", "steady state", "mpich"),
    ("out of memory", "steady state", "mpich"),
    ("SIGKILL of the launcher", "saving", "openmpi"),
    ("SIGKILL of mpirun", "saving", "openmpi"),
    ("SIGKILL of the daemon", "saving", "srun"),
]


@dataclass(frozen=True)
class Cell:
    """A fault in a phase of a job that a starter started."""

    fault: Fault
    phase: str
    starter: str
    program: str = "light"  # or "training": the real trainer, with a micro model

    def __str__(self) -> str:
        return f"{self.fault.name}, {self.phase}, {self.starter}{', training' if self.program == 'training' else ''}"

    @property
    def code(self) -> int:
        """Returns the exit code that it has to have."""
        runs = self.phase not in PHASES[:2]
        if self.survives:
            return 0
        passed_on = self.fault.name == "SIGTERM of mpirun" and self.starter == "mpich"
        return kinds.PREEMPTED if runs and (self.fault.saves or passed_on) else self.fault.code

    @property
    def survives(self) -> bool:
        """Returns whether the job goes on: the daemons of MPICH and Slurm ignore a request to end."""
        return self.fault.name == "SIGTERM of the daemon" and self.starter != "openmpi"


@dataclass(frozen=True)
class Result:
    """What a cell came to."""

    seconds: float  # from the fault until the launcher and every process of the job were gone
    code: int
    output: str
    left: list[str] = field(default_factory=list)  # command lines of processes that had to be ended by hand
    lost: list[str] = field(default_factory=list)  # checkpoints that were whole before and are not now
    files: list[str] = field(default_factory=list)  # that ranks left in shared memory

    @property
    def last_line(self) -> str:
        """Returns what stands last on the screen."""
        lines = self.output.strip().splitlines()
        return lines[-1] if lines else ""


def cells() -> list[Cell]:
    """Returns all of them; a disk is full only where something is written."""
    return [
        Cell(fault, phase, starter)
        for fault in FAULTS
        for phase in PHASES
        for starter in STARTERS
        if fault.name != "disk full" or phase == "saving"
    ]


def training_cells() -> list[Cell]:
    """Returns those that are run with the real trainer, too: each fault that ends a program, some everywhere."""
    rows = [(fault, phase, starter) for fault, phase in _TRAINED_EVERYWHERE for starter in STARTERS] + _TRAINED
    return [
        Cell(fault, phase, starter, "training")
        for fault in FAULTS
        for name, phase, starter in rows
        if name == fault.name
    ]


def problems(cell: Cell, result: Result) -> list[str]:
    """Returns what is wrong with what a cell came to, but for its time; [] = nothing."""
    found = []
    if result.code != cell.code:
        found.append(f"exit code {result.code}, not {cell.code}")
    if result.left:
        found.append(f"left running: {result.left}")
    if result.lost:
        found.append(f"lost: {result.lost}")
    if result.files:
        found.append(f"left in shared memory: {result.files}")
    culprit = culprit_of(cell.phase)
    if result.code in (0, kinds.PREEMPTED, -signal.SIGKILL):  # nobody is to be named, or nobody is there to name
        return found
    named = [rank for rank in (0, 1) if f"rank {rank} (" in result.last_line or f"[rank {rank}]" in result.output]
    if named != ([culprit] if cell.fault.names_rank else []):
        found.append(f"names ranks {named}")
    if cell.fault.words not in result.last_line or not result.last_line.startswith("launcher: "):
        found.append(f"last line {result.last_line!r}")
    return found


def table(results: dict[Cell, Result]) -> list[str]:
    """Returns the table of docs/launcher.md: a row for each fault under each MPI, with the seconds of each phase."""
    lines = [
        f"| fault | MPI | {' | '.join(PHASES)} | promised | exit code | last line names |",
        f"|{'---|' * (len(PHASES) + 5)}",
    ]
    for fault, starter in ((fault, starter) for fault in FAULTS for starter in STARTERS):
        row = {phase: (Cell(fault, phase, starter), results.get(Cell(fault, phase, starter))) for phase in PHASES}
        known = [(cell, result) for cell, result in row.values() if result is not None]
        if not known:
            continue
        goes_on = known[0][0].survives
        times = [
            "-" if result is None else "goes on" if goes_on else f"{result.seconds:.1f}" for _, result in row.values()
        ]
        codes = " / ".join(
            dict.fromkeys(str(result.code % 256 if result.code >= 0 else 128 - result.code) for _, result in known)
        )
        named = "the rank" if fault.names_rank else "nobody" if fault.victim != "launcher" else "-"
        promised = "" if goes_on else f"{fault.seconds:g}"
        lines.append(f"| {fault.name} | {starter} | {' | '.join(times)} | {promised} | {codes} | {named} |")
    return lines
