"""What the launcher asks of every scheduler."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.hosts.hostfile import Host, merge


@dataclass(frozen=True)
class Batch:
    """A job as it is handed to a scheduler."""

    name: str
    nodes: int
    ranks_per_node: int
    cores_per_rank: int
    gpus_per_node: int
    seconds: int  # time limit
    warning: int  # seconds before it, at which the ranks are asked to save
    directory: str
    python: str
    options: tuple[str, ...]  # the launcher's own
    program: tuple[str, ...]  # "-m module ARGS" or "script.py ARGS"
    file: str = ""  # where the script is going to lie, from which it is submitted again
    queue: str = ""
    account: str = ""
    image: str = ""  # of a container
    kind: str = ""  # which kind of several the scheduler knows
    again: int = 75  # exit code of a program that saved and wants to be started again (sysexits.h, EX_TEMPFAIL)

    @property
    def time(self) -> str:
        """Returns the time limit as hours:minutes:seconds."""
        return f"{self.seconds // 3600:02d}:{self.seconds // 60 % 60:02d}:{self.seconds % 60:02d}"

    def launch(self, *more: str) -> list[str]:
        """Returns the words that start the ranks from inside the allocation."""
        return [self.python, "-m", "launcher", *more, *self.options, "--", *self.program]


@dataclass(frozen=True)
class Scheduler:
    """A scheduler: how to find its allocation, and how to ask for one."""

    name: str  # one word
    title: str  # as people write it
    # The hosts of the allocation that the environment describes, with the ranks meant for each; [] = no allocation.
    hosts: Callable[[Mapping[str, str]], list[Host]]
    script: Callable[[Batch], str]  # what its command takes to run a job
    submit: str  # that command
    suffix: str = ".sh"  # of a file with it
    kinds: tuple[str, ...] = ("",)  # first the default
    without_launcher: tuple[str, ...] = ()  # kinds of which something else starts the ranks


def time_to_save(warning: int) -> int:
    """Returns the seconds that ranks get of a warning; what is left is for ending those that are not done by then."""
    return max(1, warning - min(30, warning // 2))


def read_nodefile(variable: str, path: str) -> list[Host]:
    """Returns the hosts of a file that names a host once for each of its ranks.

    Raises:
        ValueError: The file that the variable names cannot be read, or is empty.
    """
    try:
        names = Path(path).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{variable}={path!r} cannot be read: {error}") from error
    if not names:
        raise ValueError(f"{variable}={path!r} names no host")
    return merge(Host(name, 1) for name in names)


def shell_script(batch: Batch, head: list[str], *, launch: list[str], again: str, why_again: str) -> str:
    """Returns a batch script: its directives, then the launcher, which a signal asks to save, then once more if it did.

    Args:
        head: The scheduler's directives, a line each.
        launch: What starts the ranks.
        again: Command that has the job run once more; "" = the scheduler does so by the exit code.
        why_again: What stands above it.
    """
    lines = [
        "#!/bin/bash",
        *head,
        "",
        f"# {batch.nodes * batch.ranks_per_node} ranks: {batch.ranks_per_node} on each of {batch.nodes} nodes.",
        f"cd {shlex.quote(batch.directory)} || exit 2",
        "",
        "# A signal is a request to save: the launcher passes it on to every rank, and this script waits for the end.",
        "signalled=0",
        "stop() {",
        "    signalled=1",
        '    kill -TERM "$launcher" 2> /dev/null',
        "}",
        "trap stop USR1 USR2 TERM",
        f"{shlex.join(launch)} &",
        "launcher=$!",
        'wait "$launcher"',
        "code=$?",
        'while [ "$signalled" -eq 1 ]; do',
        "    signalled=0",
        '    wait "$launcher"',
        "    code=$?",
        "done",
        "",
        f"# {why_again}",
    ]
    if again:
        lines += [f'if [ "$code" -eq {batch.again} ]; then', f"    {again}", "fi"]
    return "\n".join([*lines, 'exit "$code"', ""])
